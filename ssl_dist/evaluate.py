"""Evaluate a run: extract the features that are missing or stale, hand them to the evaluators, keep every number."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ssl_dist import config, dist, evaluators, features
from ssl_dist.config import to_tree
from ssl_dist.data.catalog import facts
from ssl_dist.data.readers import read_info, require_name, splits_present
from ssl_dist.errors import UserError
from ssl_dist.evaluators import results
from ssl_dist.features_file import Features, check_pair, read_features
from ssl_dist.grid import Grid
from ssl_dist.place import Place
from ssl_dist.watchdog import Watchdog

DATA_KEYS = ("data.name", "data.root", "data.reader")
# What must be told, or may be, of weights of others: their files do not.
OTHERS_KEYS = (*DATA_KEYS, "data.image_size", "data.eval_resize", "views.normalize", "backbone.name")


def source_of(encoder: features.Encoder, overrides: dict[str, str]) -> features.Source:
    """The data set to evaluate on: the run's own unless `data.name`, `data.root` or `data.reader` say otherwise."""
    data = encoder.config.data
    source = features.Source(
        overrides.get("data.name", data.name),
        overrides.get("data.root", data.root),
        overrides.get("data.reader", data.reader),
    )
    require_name(source.root, source.name)
    return source


def split_overrides(overrides: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Overrides of the data set, and those of the evaluators."""
    data, others = {}, []
    for override in overrides:
        key, _, value = override.partition("=")
        if key.startswith("data."):
            if key not in DATA_KEYS or not value:
                raise UserError(f"override {override!r}: of the data, {', '.join(DATA_KEYS)} can be set here")
            data[key] = value
        else:
            others.append(override)
    return data, others


def extract(weights: Path, splits: Sequence[str], overrides: Sequence[str], out: Path | None) -> list[Path]:
    """`ssl-dist extract`: features files of `splits` (none: training and evaluation split), alone or under torchrun."""
    folder = out or weights / "features"
    if out is None and not weights.is_dir():
        raise UserError(f"{weights}: is a file; say with --out where its features shall go")
    place = Place.from_environment()
    if any(word.startswith("backbone.") for word in overrides):
        encoder, note = _of_others(weights, overrides)
        if place.rank == 0:
            print(note, file=sys.stderr, flush=True)
        source = source_of(encoder, {})
    else:
        data, others = split_overrides(overrides)
        if others:
            raise UserError(f"override {others[0]!r}: of the data, {', '.join(DATA_KEYS)} can be set here")
        encoder = features.load_encoder(weights)
        source = source_of(encoder, data)
    threads = place.cores
    wanted = splits or _labelled_splits(source)
    with (
        Watchdog(place, features.STUCK) as dog,
        dist.start(place, Grid(place.size, 1), dog.state) as world,
        dog.reporting(),
    ):
        return [features.extract(encoder, source, split, folder, world, threads) for split in wanted]


def _of_others(path: Path, overrides: Sequence[str]) -> tuple[features.Encoder, str]:
    """The encoder in a file of another program, and a line on how it was read. The file's name stands for a method."""
    for override in overrides:
        if override.partition("=")[0] not in OTHERS_KEYS:
            raise UserError(f"override {override!r}: of weights of others, {', '.join(OTHERS_KEYS)} can be set")
    settings = config.overridden({"run_dir": str(path.parent), "method": {"name": path.name}, "data": {}}, overrides)
    require_name(settings.data.root, settings.data.name)
    training = facts(settings.data.name, splits_present(settings.data.root)).training
    return features.load_others(path, settings, read_info(settings.data.root, training))


def _labelled_splits(source: features.Source) -> list[str]:
    known = facts(source.name, splits_present(source.root))
    return [known.training, known.evaluation]


def evaluate(run: Path, chosen: Sequence[str], overrides: Sequence[str]) -> list[dict]:
    """`ssl-dist evaluate`: run evaluators on a run's newest checkpoint; returns what went to results.json."""
    data, others = split_overrides(overrides)
    options = evaluators.parse_options(chosen, others)
    if not run.is_dir():
        raise UserError(f"{run}: not a run's folder; train first")
    encoder = features.load_encoder(run)
    source = source_of(encoder, data)
    files = []
    for split in _labelled_splits(source):
        path = features.path_of(run / "features", source, split)
        if features.is_fresh(path, encoder, source, split):
            print(f"{path}: fresh", file=sys.stderr)
        else:
            reason = "stale (of another checkpoint, transform or data, or damaged)" if path.exists() else "missing"
            print(f"{path}: {reason}; extracting", file=sys.stderr)
            features.extract(
                encoder,
                source,
                split,
                path.parent,
                dist.one_process(dist.choose_device(Place())),
                Place().cores,
            )
        files.append(read_features(path))
    train, test = files
    check_pair(train, test)
    records = []
    for name in chosen:
        evaluator = evaluators.find(name)
        protocol = evaluators.protocol(evaluator, options[name])
        tree = to_tree(options[name])
        known = [r for r in results.read(run / "results.json") if _is_measured(r, protocol, tree, test)]
        if known:
            print(f"{name}: in {run / 'results.json'} already", file=sys.stderr)
            records += known
            continue
        start = time.perf_counter()
        values = evaluator.run(train, test, options[name])
        print(f"{name}: {time.perf_counter() - start:.1f} s", file=sys.stderr)
        records += results.records(values, protocol, test, seed=encoder.config.seed, options=tree)
    results.add(run / "results.json", records)
    return records


def _is_measured(record: dict, protocol: str, options: dict, test: Features) -> bool:
    """Whether `record` is what the evaluator would find again."""
    same = all(record[key] == test.metadata[key] for key in ("dataset", "split", "data", "checkpoint"))
    return same and record["protocol"] == protocol and record["options"] == options
