"""Evaluate a run: extract the features that are missing or stale, hand them to the evaluators, keep every number."""

import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from ssl_dist import config, evaluators, methods, results
from ssl_dist.config import ClassSubset, Section, parse_yaml, to_tree, validate
from ssl_dist.data.reader import Reader
from ssl_dist.data.readers import Dataset
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.distributed.signals import STOPPED
from ssl_dist.distributed.watchdog import Watchdog
from ssl_dist.distributed.world import World, join_world
from ssl_dist.errors import UserError
from ssl_dist.evaluate import search
from ssl_dist.grid import Grid
from ssl_dist.results.figures import FigureWriter, has_pictures
from ssl_dist.run.encoder import (
    STUCK,
    Encoder,
    extract_features,
    features_path,
    is_fresh,
    load_encoder,
    load_others,
    load_together,
)
from ssl_dist.storage.features import check_pair, read_features
from ssl_dist.transfer.recipe import Stopped
from ssl_dist.transfer.subject import EvalContext, chosen_images, held_out

LONGEST = 7 * 24 * 3600.0  # seconds that an evaluator may take on rank 0; one that dies is noticed at once

DATA_KEYS = ("data.name", "data.root", "data.reader")
SUBSET = "data.subset"
# What must be told, or may be, of weights of others: their files do not.
OTHERS_KEYS = (*DATA_KEYS, "data.image_size", "data.eval_resize", "views.normalize", "backbone.name")


def source_of(encoder: Encoder, overrides: dict[str, str]) -> Dataset:
    """The data set to evaluate on: the run's own unless `data.name`, `data.root` or `data.reader` say otherwise."""
    data = encoder.config.data
    return Dataset(
        overrides.get("data.root", data.root),
        overrides.get("data.name", data.name),
        overrides.get("data.reader", data.reader),
    )


class _Images(Section):
    subset: ClassSubset | str | None = Field(None, description="{per_class: n, start: m}, or a file with one id a line")


def split_overrides(overrides: Sequence[str], keys: Sequence[str] = DATA_KEYS) -> tuple[dict[str, str], list[str]]:
    """Overrides of the data set, of which `keys` are known, and those of the evaluators."""
    data, others = {}, []
    for override in overrides:
        key, _, value = override.partition("=")
        if key.startswith("data."):
            if key not in keys or not value:
                raise UserError(f"override {override!r}: of the data, {', '.join(keys)} can be set here")
            data[key] = value
        else:
            others.append(override)
    return data, others


def extract(weights: Path, splits: Sequence[str], overrides: Sequence[str], out: Path | None) -> list[Path]:
    """`ssl-dist extract`: features files of `splits` (none: training and evaluation split), alone or under torchrun."""
    folder = out or weights / "features"
    if out is None and not weights.is_dir():
        raise UserError(f"{weights}: is a file; say with --out where its features shall go")
    rank_info = RankInfo.from_environment()
    if any(word.startswith("backbone.") for word in overrides):
        encoder, note = _of_others(weights, overrides)
        if rank_info.rank == 0:
            print(note, file=sys.stderr, flush=True)
        source = source_of(encoder, {})
    else:
        data, others = split_overrides(overrides)
        if others:
            raise UserError(f"override {others[0]!r}: of the data, {', '.join(DATA_KEYS)} can be set here")
        encoder = load_encoder(weights)
        source = source_of(encoder, data)
    threads = rank_info.cores
    wanted = splits or (source.uses.training, source.uses.evaluation)
    with (
        Watchdog(rank_info, STUCK) as watchdog,
        join_world(rank_info, Grid(rank_info.world_size, 1), watchdog.state) as world,
        watchdog.reporting(),
    ):
        if encoder.ids:  # of a training, which may have saved meanwhile
            encoder = load_together(weights, world)[1]
        return [extract_features(encoder, source, split, folder, world, threads) for split in wanted]


def _of_others(path: Path, overrides: Sequence[str]) -> tuple[Encoder, str]:
    """The encoder in a file of another program, and a line on how it was read. The file's name stands for a method."""
    for override in overrides:
        if override.partition("=")[0] not in OTHERS_KEYS:
            raise UserError(f"override {override!r}: of weights of others, {', '.join(OTHERS_KEYS)} can be set")
    settings = config.overridden({"run_dir": str(path.parent), "method": {"name": path.name}, "data": {}}, overrides)
    dataset = Dataset(settings.data.root, settings.data.name)
    return load_others(path, settings, dataset.info(dataset.uses.training))


@dataclass(frozen=True)
class EvalRequest:
    """What the words of an evaluation ask for. data: overrides of the data set; subset: of its training images, None:
    all; share: of them to hold out, None: nothing is; validation: whether what is not searched is measured on them;
    options: of every evaluator; grids: of those to search over."""

    data: dict[str, str]
    subset: ClassSubset | str | None
    share: float | None
    validation: bool
    options: dict[str, Section]
    grids: dict[str, search.Grid]


def parse(
    chosen: Sequence[str], overrides: Sequence[str], validation: float | None = None, searched: Sequence[str] = ()
) -> EvalRequest:
    """The words of `ssl-dist evaluate`, checked as far as they can be without the run. Raises `UserError`."""
    data, others = split_overrides(overrides, (*DATA_KEYS, SUBSET))
    options = evaluators.parse_options(chosen, others)
    grids = search.grids(chosen, others, searched)
    if validation is not None:
        search.check_share(validation)
    share = search.SHARE if validation is None and grids else validation
    subset = data.pop(SUBSET, None)
    if subset is not None:
        subset = validate(_Images, {"subset": parse_yaml(subset, f"override {SUBSET}={subset}")}, "data.").subset
    return EvalRequest(data, subset, share, validation is not None, options, grids)


def evaluate(
    run: Path,
    chosen: Sequence[str],
    overrides: Sequence[str],
    validation: float | None = None,
    searched: Sequence[str] = (),
) -> tuple[int, list[dict]]:
    """`ssl-dist evaluate`: run evaluators on a run's newest checkpoint, alone or under torchrun.

    validation: measure on this share of the training split, held out of it, instead of the test split. searched: lists
    of option values; the best combination on the held-out share is measured on the test split.

    Returns the exit code, 0 or that of a stop on request, and what went to results.json.
    """
    wanted = parse(chosen, overrides, validation, searched)
    if not run.is_dir():
        raise UserError(f"{run}: not a run's folder; train first")
    encoder = load_encoder(run)
    source = source_of(encoder, wanted.data)
    train, test = source.uses.training, source.uses.evaluation
    train_ids, words = (None, None) if wanted.subset is None else chosen_images(source, train, wanted.subset)
    rank_info = RankInfo.from_environment()
    with (
        Watchdog(rank_info, encoder.config.timeout) as watchdog,
        join_world(rank_info, Grid(rank_info.world_size, 1), watchdog.state) as world,
        watchdog.reporting(),
    ):
        encoder = load_together(run, world)[1]
        world.on_rank0(lambda: results.require_writable(run / "results.json"))
        whole = EvalContext(run, encoder, source, train, test, world, watchdog, train_ids, subset=words)
        held = None if wanted.share is None else world.raise_together(lambda: held_out(whole, wanted.share))
        records = []
        try:
            for name in chosen:
                if name in wanted.grids:
                    records += _searched(whole, held, name, wanted.grids[name])
                else:
                    subject = held if wanted.validation else whole
                    records += _measured(subject, name, wanted.options[name])
        except Stopped as stopped:
            if world.is_rank0:
                print(f"stopped; the same command goes on with {stopped}", file=sys.stderr, flush=True)
            return STOPPED, records
        return 0, records


def _searched(whole: EvalContext, held: EvalContext, name: str, grid: search.Grid) -> list[dict]:
    """The records of every combination on the held-out part, and those of the best one on the test split."""
    tries = [_measured(held, name, each.options, f"one of a search: {each}") for each in grid.candidates]
    values = [{record["name"]: record["value"] for record in records} for records in tries]
    number = whole.world.raise_together(lambda: search.best(values))
    best, score = grid.candidates[number], search.top1(values[number])
    _say(whole.world, f"{name}: {best} has the highest top-1 of {len(tries)} on {held.part}, {score:.2f}")
    remark = f"{best} chosen of {grid} by top-1 on {held.part}"
    return [*itertools.chain(*tries), *_measured(whole, name, best.options, remark)]


def _measured(subject: EvalContext, name: str, options: Section, remark: str | None = None) -> list[dict]:
    """The evaluator's records, measured or read again. `remark` goes to their protocol."""
    world, evaluator, path = subject.world, evaluators.find(name), subject.run / "results.json"
    fitted = None if subject.subset is None else f"fitted on {subject.subset} of {subject.train}"
    seen = None
    if subject.part is not None and methods.find(subject.encoder.config.method.name).needs_labels:
        seen = "the encoder may have been trained on these labels"
    measured = world.on_rank0(lambda: evaluators.protocol(evaluator, options))  # it may read a file
    protocol = "; ".join(filter(None, (measured, fitted, seen, remark)))
    tree = to_tree(options)
    metadata = subject.metadata
    known = world.on_rank0(lambda: [r for r in results.read(path) if _is_measured(r, protocol, tree, metadata)])
    if known and world.on_rank0(lambda: _lacks_pictures(subject, name)):
        _say(world, f"{name}: has no pictures of this checkpoint; measuring again")
    elif known:
        _say(world, f"{name}: in {path} already")
        return known
    start = time.perf_counter()
    if evaluators.sees_images(evaluator):
        values = evaluator.measure(subject, options)
    else:
        for split in (subject.train, subject.test):
            if split not in subject.files:
                subject.files[split] = _fresh_features(subject, split)
        with world.state.phase_of(f"evaluator {name}", LONGEST):
            values = world.on_rank0(lambda: _from_features(subject, name, options))
    _say(world, f"{name}: {time.perf_counter() - start:.1f} s")
    records = results.make_records(values, protocol, metadata, seed=subject.encoder.config.seed, options=tree)
    world.on_rank0(lambda: results.add(path, records))
    return records


def _lacks_pictures(subject: EvalContext, name: str) -> bool:
    """Whether the evaluator would draw what is not there: of an earlier version's run, or removed."""
    if subject.part is not None or not evaluators.draws(evaluators.find(name)):
        return False
    return not has_pictures(subject.run / "figures", name, subject.encoder.sha256)


def _from_features(subject: EvalContext, name: str, options: Section) -> dict[str, float]:
    train, test = (read_features(subject.files[split]) for split in (subject.train, subject.test))
    check_pair(train, test)
    if train.metadata["checkpoint"] != subject.encoder.sha256:
        raise UserError(f"{train.source}: another process has written features of another checkpoint; evaluate again")
    if subject.train_ids is not None:  # the row of an image in the file of its split is its id
        train = train.subset(subject.train_ids)
    if subject.test_ids is not None:
        test = test.subset(subject.test_ids, subject.part)
    evaluator, source = evaluators.find(name), subject.source
    if subject.part is not None:
        return evaluator.run(train, test, options)  # to choose by; pictures are of the test split

    def open_split(split: str) -> Reader:
        return source.open(split, subject.world.rank_info.cores)

    with FigureWriter(subject.run / "figures", test, open_split, subject.encoder.config.data, name) as album:
        return evaluator.run(train, test, options, album)


def _fresh_features(subject: EvalContext, split: str) -> Path:
    """The features file of a split by the run's newest checkpoint; it is extracted when it is missing or stale."""
    world, encoder, source = subject.world, subject.encoder, subject.source
    path = features_path(subject.run / "features", source, split)
    if world.on_rank0(lambda: is_fresh(path, encoder, source, split)):
        _say(world, f"{path}: fresh")
        return path
    reason = "stale (of another checkpoint, transform or data, or damaged)" if path.exists() else "missing"
    _say(world, f"{path}: {reason}; extracting")
    return extract_features(encoder, source, split, path.parent, world, world.rank_info.cores)


def _say(world: World, text: str) -> None:
    if world.is_rank0:
        print(text, file=sys.stderr, flush=True)


def _is_measured(record: dict, protocol: str, options: dict, metadata: dict[str, str]) -> bool:
    """Whether `record` is what the evaluator would find again."""
    same = all(record[key] == metadata[key] for key in ("dataset", "split", "data", "checkpoint"))
    return same and record["protocol"] == protocol and record["options"] == options
