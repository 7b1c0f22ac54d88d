"""Evaluate a run: extract the features that are missing or stale, run the evaluators on them, record every number."""

import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import Field

from ssl_dist import config, evaluators, methods, plugins, results
from ssl_dist.config import ClassSubset, Section, parse_yaml, to_tree, validate
from ssl_dist.data.readers import Dataset
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.distributed.signals import STOPPED
from ssl_dist.distributed.watchdog import Watchdog
from ssl_dist.distributed.world import World, join_world
from ssl_dist.errors import UserError, quoted
from ssl_dist.evaluate import search
from ssl_dist.evaluate import splits as split_choice
from ssl_dist.evaluators import Evaluator, FeatureEvaluator, ImageEvaluator
from ssl_dist.grid import Grid
from ssl_dist.nn.features import OUTPUT
from ssl_dist.results.figures import FigureWriter, has_pictures
from ssl_dist.run import board, exported, plugged
from ssl_dist.run import folder as run_folder
from ssl_dist.run.encoder import (
    BATCH_TIMEOUT_S,
    Encoder,
    depends_on,
    extract_features,
    features_path,
    is_fresh,
    load_encoder,
    load_others,
    load_together,
)
from ssl_dist.storage.durable import refuse_unwritable
from ssl_dist.storage.features import check_pair, lack_of_classes, read_features
from ssl_dist.transfer.recipe import Stopped
from ssl_dist.transfer.subject import EvalContext, chosen_images, hold_out

EVALUATOR_TIMEOUT_S = 7 * 24 * 3600.0  # on rank 0; if its process dies, the others end at once

DATA_KEYS = ("data.name", "data.root", "data.reader")
TRANSFORM_KEYS = ("data.image_size", "data.eval_resize", "data.eval_interpolation", "tf32")
LAYER_KEY = "layer"  # whose features are extracted
EVAL_KEYS = (*DATA_KEYS, LAYER_KEY, *TRANSFORM_KEYS)
SUBSET_KEY = "data.subset"
# What can be set for weights of other programs, whose files do not say it.
BACKBONE_KEYS = ("backbone.name", "backbone.patch_size", "backbone.weights_prefix", "backbone.resize_pos_embed")
OF_FOREIGN = ("backbone.", "views.")  # what the overrides begin with by which such weights are known
FOREIGN_KEYS = (*EVAL_KEYS, "views.normalize", *BACKBONE_KEYS)


# -------------------------------------------------------------------------------------------------- extract


def extract(weights: Path, splits: Sequence[str], overrides: Sequence[str], out: Path | None) -> list[Path]:
    """`ssl-dist extract`: features files of `splits` (none: training and evaluation split, where the data set has
    them, else all), alone or under torchrun."""
    folder = out or weights / "features"
    if out is None and not weights.is_dir():
        raise UserError(f"{weights}: is a file; say with --out where its features shall go")
    rank_info = RankInfo.from_environment()
    if exported.is_exported(weights) and not any(override.startswith("backbone.") for override in overrides):
        overrides = [*exported.overrides(weights), *overrides]
    if any(override.startswith("backbone.") for override in overrides):
        encoder, dataset, note = _foreign_encoder(weights, overrides)
        if rank_info.rank == 0:
            print(note, file=sys.stderr, flush=True)
    else:
        data, rest = split_overrides(overrides)
        if rest:
            raise UserError(f"override {rest[0]!r}: only of the data, {', '.join(EVAL_KEYS)}, can be set here")
        encoder = load_encoder(weights).with_transform(transform_of(data)).with_layer(data.get(LAYER_KEY, OUTPUT))
        dataset = dataset_of(encoder, data)
    chosen = split_choice.extracted(dataset, splits)
    with (
        Watchdog(rank_info, BATCH_TIMEOUT_S) as watchdog,
        join_world(rank_info, Grid(rank_info.world_size, 1), watchdog.state) as world,
        watchdog.reporting(),
    ):
        if encoder.ids:  # of a run, which may have saved another checkpoint since
            encoder = load_together(weights, world)[1].like(encoder)
            _note(world, encoder)
        else:
            plugged.require_same(world)
        return [extract_features(encoder, dataset, split, folder, world, rank_info.cores) for split in chosen]


def _foreign_encoder(path: Path, overrides: Sequence[str]) -> tuple[Encoder, Dataset, str]:
    """The encoder in a file of another program, the data set, and a line on how the file was read. The file's name
    stands for a method."""
    for override in overrides:
        if override.partition("=")[0] not in FOREIGN_KEYS:
            raise UserError(f"override {override!r}: of weights of others, {', '.join(FOREIGN_KEYS)} can be set")
    layers = [override for override in overrides if override.startswith(f"{LAYER_KEY}=")]
    overrides = [override for override in overrides if override not in layers]
    settings = config.overridden({"run_dir": str(path.parent), "method": {"name": path.name}, "data": {}}, overrides)
    dataset = Dataset(settings.data.root, settings.data.name, settings.data.reader)
    encoder, note = load_others(path, settings, dataset.info(split_choice.extracted(dataset, [])[0]))
    return encoder.with_layer(split_overrides(layers)[0].get(LAYER_KEY, OUTPUT)), dataset, note


def dataset_of(encoder: Encoder, overrides: dict[str, str]) -> Dataset:
    """The data set to evaluate on: the run's own unless `data.name`, `data.root` or `data.reader` say otherwise; of
    `data.root` alone whatever lies there."""
    data = encoder.config.data
    name = overrides.get("data.name", None if "data.root" in overrides else data.name)
    dataset = Dataset(
        overrides.get("data.root", data.root),
        None if name == "null" else name,
        overrides.get("data.reader", data.reader),
    )
    if dataset.pixels.channels != encoder.channels:
        raise UserError(
            f"data.root = {quoted(dataset.root)}: its images have {dataset.pixels}, and the network of {encoder.file} "
            f"takes {encoder.channels}; give images of as many channels"
        )
    return dataset


def transform_of(data: dict[str, str]) -> list[str]:
    """Those overrides that change the test transform, as key=value."""
    return [f"{key}={value}" for key, value in data.items() if key in TRANSFORM_KEYS]


def _note(world: World, encoder: Encoder) -> None:
    """Say what code of the user's own runs, and how the size of images differs from that of the training."""
    if files := [str(file.path) for file in plugins.files()]:
        _print_on_rank0(world, f"plugins: {', '.join(files)}")
    if encoder.size_note is not None:
        _print_on_rank0(world, encoder.size_note)


def split_overrides(overrides: Sequence[str], keys: Sequence[str] = EVAL_KEYS) -> tuple[dict[str, str], list[str]]:
    """Overrides of the data set, which must be among `keys`, as key: value, without quotes that stand for YAML's; and
    the rest, the evaluators'."""
    data, rest = {}, []
    for override in overrides:
        key, _, value = override.partition("=")
        if key.startswith("data.") or key in keys:
            if key not in keys or not value:
                raise UserError(f"override {override!r}: of the data, {', '.join(keys)} can be set here")
            parsed = parse_yaml(value, f"override {override!r}")
            data[key] = parsed if isinstance(parsed, str) else value
        else:
            rest.append(override)
    return data, rest


# -------------------------------------------------------------------------------------------------- evaluate


class _Images(Section):
    subset: ClassSubset | str | None = Field(None, description="{per_class: n, start: m}, or a file with one id a line")


@dataclass(frozen=True)
class EvalRequest:
    """An evaluation as the command line asks for it. data: overrides of the data set; subset: of its training images,
    None: all; held_out: of them, None: nothing is; validation: whether what is not searched is measured on
    them; options: of every evaluator; spaces: of the evaluators to search for."""

    data: dict[str, str]
    subset: ClassSubset | str | None
    held_out: search.HeldOut | None
    validation: bool
    options: dict[str, Section]
    spaces: dict[str, search.SearchSpace]


def parse(
    chosen: Sequence[str],
    overrides: Sequence[str],
    validation: search.HeldOut | None = None,
    searched: Sequence[str] = (),
) -> EvalRequest:
    """The words of `ssl-dist evaluate`, checked as far as they can be without the run. Raises `UserError`."""
    data, rest = split_overrides(overrides, (*EVAL_KEYS, SUBSET_KEY))
    for name in chosen:
        if data.get(LAYER_KEY, OUTPUT) != OUTPUT and not evaluators.reads_layers(evaluators.find(name)):
            raise UserError(f"{LAYER_KEY} = {quoted(data[LAYER_KEY])}: {name} reads no layer by name; leave it out")
    options = evaluators.parse_options(chosen, rest)
    spaces = search.search_spaces(chosen, rest, searched)
    if isinstance(validation, float):
        search.check_share(validation)
    held_out = search.DEFAULT_SHARE if validation is None and spaces else validation
    subset = None
    if SUBSET_KEY in data:
        text = data.pop(SUBSET_KEY)
        tree = {"subset": parse_yaml(text, f"override {SUBSET_KEY}={text}")}
        subset = validate(_Images, tree, "data.").subset
    return EvalRequest(data, subset, held_out, validation is not None, options, spaces)


def evaluate(
    run: Path,
    chosen: Sequence[str],
    overrides: Sequence[str],
    validation: search.HeldOut | None = None,
    searched: Sequence[str] = (),
    split: str | None = None,
    out: Path | None = None,
) -> tuple[int, list[dict]]:
    """`ssl-dist evaluate`: run evaluators on a run's newest checkpoint, alone or under torchrun; or on a file of
    another program, where `backbone.name` is given: its features and results go to `out`.

    validation: measure on these images of the training split, held out of it, instead of the test split. searched:
    lists of option values; the best combination on the held-out images is measured on the test split. split: what is
    measured in the test split's place; without labels, or as the only one, it stands alone (`evaluate.splits`).

    Returns the exit code, 0 or that of a stop on request, and the records that results.json holds of it.
    """
    foreign = [override for override in overrides if override.startswith(OF_FOREIGN)]
    if exported.is_exported(run) and not any(override.startswith("backbone.") for override in foreign):
        overrides = [*exported.overrides(run), *overrides]
        foreign = [override for override in overrides if override.startswith(OF_FOREIGN)]
    if foreign:
        request = parse(chosen, [word for word in overrides if word not in foreign], validation, searched)
        if out is None:
            raise UserError(f"{run}: is a file; say with --out where its features and results shall go")
        data = [f"{key}={value}" for key, value in request.data.items()]
        encoder, dataset, note = _foreign_encoder(run, [*foreign, *data])
        run = out
        with refuse_unwritable(run, "give another --out"):
            run.mkdir(parents=True, exist_ok=True)
        if RankInfo.from_environment().is_rank0:
            print(note, file=sys.stderr, flush=True)
    else:
        plugged.recall_run(run)
        request = parse(chosen, overrides, validation, searched)
        if out is not None:
            raise UserError(f"--out {out}: is for weights of others; the results of a run stand in its folder")
        if not run.is_dir():
            raise UserError(
                f"{run}: not a run's folder; train first, or, for weights of others, say backbone.name=... and --out"
            )
        encoder = load_encoder(run).with_transform(transform_of(request.data))
        encoder = encoder.with_layer(request.data.get(LAYER_KEY, OUTPUT))
        dataset = dataset_of(encoder, request.data)
    parts = [SUBSET_KEY] * (request.subset is not None) + ["--search"] * bool(request.spaces)
    only_held_out = request.validation and not request.spaces
    train, test = split_choice.choose(run, dataset, chosen, overrides, split, only_held_out, parts)
    train_ids, subset = (None, None) if request.subset is None else chosen_images(dataset, train, request.subset)
    rank_info = RankInfo.from_environment()
    with (
        Watchdog(rank_info, encoder.config.timeout) as watchdog,
        join_world(rank_info, Grid(rank_info.world_size, 1), watchdog.state) as world,
        watchdog.reporting(),
    ):
        if not foreign:
            encoder = load_together(run, world)[1].like(encoder)
            _note(world, encoder)
        if train == test and not only_held_out:
            _print_on_rank0(world, f"split {test} of {dataset.name} stands alone: nothing is learned from another one")
        world.on_rank0(lambda: results.require_writable(run / "results.json"))
        whole = EvalContext(run, encoder, dataset, train, test, world, watchdog, train_ids, subset=subset)
        part = whole if request.held_out is None else world.raise_together(partial(hold_out, whole, request.held_out))
        records = []
        try:
            for name in chosen:
                if name in request.spaces:
                    records += _search(whole, part, name, request.spaces[name])
                else:
                    records += _measure(part if request.validation else whole, name, request.options[name])
        except Stopped as stopped:
            _print_on_rank0(world, f"stopped; the same command goes on with {stopped}")
            return STOPPED, records
        return 0, records


def _search(whole: EvalContext, part: EvalContext, name: str, space: search.SearchSpace) -> list[dict]:
    """The records of every combination on the held-out part, and those of the best one on the test split."""
    tries = [_measure(part, name, each.options, f"one of a search: {each.words}") for each in space.candidates]
    values = [{record["name"]: record["value"] for record in records} for records in tries]
    index = whole.world.raise_together(lambda: search.best_index(values))
    best, score = space.candidates[index], search.top1(values[index])
    _print_on_rank0(
        whole.world, f"{name}: {best.words} has the highest top-1 of {len(tries)} on {part.held_out}, {score:.2f}"
    )
    remark = f"{best.words} chosen of {space.words} by top-1 on {part.held_out}"
    return [*itertools.chain(*tries), *_measure(whole, name, best.options, remark)]


def _measure(context: EvalContext, name: str, options: Section, remark: str | None = None) -> list[dict]:
    """The evaluator's records: those that results.json has of this measurement, or new ones, which are added to it.

    remark: on the choice of the options, for the protocol.
    """
    world, evaluator, path = context.world, evaluators.find(name), context.run / "results.json"
    source = plugins.source_of(plugins.EVALUATORS, name)  # another file may measure otherwise
    remarks = [text for text in (source and f"by {source}", remark) if text]
    protocol = world.on_rank0(lambda: _protocol(context, evaluator, options, remarks))  # it may read a file
    metadata, tree = context.metadata, to_tree(options)
    same: dict[str, object] = {key: metadata[key] for key in results.IDENTITY if key in metadata}
    same |= {"protocol": protocol, "options": tree, "version": evaluator.VERSION}
    recorded = world.on_rank0(lambda: [record for record in results.read(path) if record | same == record])
    title = f"{run_folder.title(context.run)}: {name}"
    if recorded:
        if not world.on_rank0(lambda: _lacks_pictures(context, name, evaluator)):
            _print_on_rank0(world, f"{title}: in {path} already")
            return recorded
        _print_on_rank0(world, f"{title}: has no pictures of this checkpoint; measuring again")
    start = time.perf_counter()
    values = _values(context, name, evaluator, options)
    _print_on_rank0(world, f"{title}: {time.perf_counter() - start:.1f} s")
    if not values:  # it draws, and measures nothing
        return []
    seed = context.encoder.config.seed
    records = results.make_records(values, protocol, metadata, seed, options=tree, version=evaluator.VERSION)
    world.on_rank0(lambda: results.add(path, records))
    world.on_rank0(lambda: _show(context.run, records))
    return records


def _show(run: Path, records: list[dict]) -> None:
    """Add to TensorBoard what is measured on a whole split, after learning from all images of one."""
    shown = [each for each in records if results.is_of_a_whole_split(each) and results.learned_from_all_images(each)]
    if shown:
        with refuse_unwritable(run / "tensorboard", "give a run's folder that can, with space left"):
            board.write_results(run, shown)


def _protocol(context: EvalContext, evaluator: Evaluator, options: Section, remarks: Sequence[str]) -> str:
    """The evaluator's protocol with what this evaluation adds to it."""
    parts = [evaluators.protocol(evaluator, options)]
    if (layer := context.encoder.layer) != OUTPUT:
        remarks = [f"layer {layer} in the output's place", *remarks]
    if context.alone:
        alone = f"within split {context.test} alone"
        if lack := lack_of_classes(context.dataset.labels(context.test)):
            parts = [evaluators.protocol_without_labels(evaluator, options)]
            alone += f", which has {lack}: no accuracies"
        parts.append(alone)
    if context.subset is not None:
        parts.append(f"{results.FITTED_ON} {context.subset} of {context.train}")
    if context.held_out is not None and methods.find(context.encoder.config.method.name).needs_labels:
        parts.append("the encoder may have been trained on these labels")
    return "; ".join([*parts, *remarks])


def _lacks_pictures(context: EvalContext, name: str, evaluator: Evaluator) -> bool:
    """Whether the evaluator would draw pictures that are not there: removed, or not drawn by an earlier version."""
    if context.held_out is not None or not evaluators.draws(evaluator):
        return False
    return not has_pictures(context.run / "figures", name, context.encoder.sha256, context.encoder.layer)


def _values(context: EvalContext, name: str, evaluator: Evaluator, options: Section) -> dict[str, float]:
    """Run the evaluator: on all ranks if it works on images, on rank 0 if it works on features."""
    if isinstance(evaluator, ImageEvaluator):
        return evaluator.measure(context, options)
    for split in (context.train, context.test):
        if split not in context.features_files:
            context.features_files[split] = _fresh_features(context, split)
    with context.world.state.phase_of(f"evaluator {name}", EVALUATOR_TIMEOUT_S):
        return context.world.on_rank0(partial(_from_features, context, name, evaluator, options))


def _from_features(context: EvalContext, name: str, evaluator: FeatureEvaluator, options: Section) -> dict[str, float]:
    """Run the evaluator on the features of the images that are learned from and measured."""
    train = read_features(context.features_files[context.train])
    test = train if context.alone else read_features(context.features_files[context.test])
    check_pair(train, test)
    for split, part in ((context.train, train), (context.test, test)):  # they were found fresh, maybe hours ago
        if not depends_on(context.encoder, context.dataset, split).items() <= part.metadata.items():
            raise UserError(f"{part.source}: another process has written other features in their place; evaluate again")
    if context.train_ids is not None:  # the row of an image in the file of its split is its id
        train = train.subset(context.train_ids)
    if context.test_ids is not None:
        test = test.subset(context.test_ids, context.held_out)
    device = context.world.device
    if context.held_out is not None:
        return evaluator.run(train, test, options, None, device)  # pictures are of the test split only
    dataset, data = context.dataset, context.encoder.config.data
    with FigureWriter(context.run / "figures", test, dataset.open, data, name, dataset.files) as writer:
        return evaluator.run(train, test, options, writer, device)


def _fresh_features(context: EvalContext, split: str) -> Path:
    """The features file of a split by the run's newest checkpoint; it is extracted when it is missing or stale."""
    world, encoder, dataset = context.world, context.encoder, context.dataset
    path = features_path(context.run / "features", dataset, split, encoder.layer)
    if world.on_rank0(lambda: is_fresh(path, encoder, dataset, split)):
        _print_on_rank0(world, f"{path}: fresh")
        return path
    reason = "stale (of another checkpoint, transform or data, or damaged)" if path.exists() else "missing"
    _print_on_rank0(world, f"{path}: {reason}; extracting")
    return extract_features(encoder, dataset, split, path.parent, world, world.rank_info.cores)


def _print_on_rank0(world: World, text: str) -> None:
    if world.is_rank0:
        print(text, file=sys.stderr, flush=True)
