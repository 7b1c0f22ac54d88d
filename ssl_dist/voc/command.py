"""`ssl-dist voc TASK RUN|WEIGHTS --root ROOT --out DIR`: one transfer, from the folder to results.json."""

import hashlib
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

from ssl_dist import results
from ssl_dist.config import Section, parse_yaml, to_tree, validate
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.distributed.world import choose_device
from ssl_dist.errors import UserError
from ssl_dist.results.figures import add_picture
from ssl_dist.voc import classification, data, detection, loop, pictures, pretrained, segmentation
from ssl_dist.voc.data import Sample, Split
from ssl_dist.voc.pretrained import Pretrained


def run(name: str, weights: Path, roots: Sequence[Path], out: Path, overrides: Sequence[str]) -> tuple[int, list[dict]]:
    """Returns the exit code, and what went to OUT/results.json. Raises `UserError`.

    roots: folders in VOC's format; trained is on the training split of all, tested on the first one's. Checkpoints of
    a training lie in OUT/<task>.
    """
    if not RankInfo.from_environment().alone:
        raise UserError("voc: runs in one process; start it without torchrun")
    of_weights = [override for override in overrides if override.partition("=")[0] in pretrained.KEYS]
    options = parse_options(name, [override for override in overrides if override not in of_weights])
    if len({root.resolve() for root in roots}) < len(roots):
        raise UserError(f"--root {roots[-1]}: the same folder stands there twice; leave one out")
    kind = import_module(f"ssl_dist.voc.{name}").KIND
    train = data.read_split(roots, kind, options.train_split)
    test = data.read_split(roots[:1], kind, options.test_split)
    data.check_disjoint(train, test)
    source = pretrained.load(weights, of_weights)
    device = choose_device(RankInfo())
    threads = options.workers or RankInfo().cores
    with ThreadPoolExecutor(threads, "image") as pool:
        steps = {"classification": classify, "detection": detect, "segmentation": segment}
        code, values, protocol, digest = steps[name](source, train, test, options, out, device, pool)
    if code:
        return code, []
    made = records(values, protocol, source, test, digest, options)
    results.add(out / "results.json", made)
    return 0, made


def parse_options(name: str, overrides: Sequence[str]) -> Section:
    """The options of a task from `key=value` (values are YAML)."""
    tree = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise UserError(f"override {override!r}: write key=value, for example batch_size=8")
        tree[key] = parse_yaml(value, f"override {override!r}")
    return validate(import_module(f"ssl_dist.voc.{name}").Options, tree)


def classify(source: Pretrained, train: Split, test: Split, options, out: Path, device, pool):
    train_labels, test_labels = train.labels, test.labels  # damaged lists show before the long extraction
    classification.classes_there(train_labels, test_labels, options)
    parts = [
        classification.features_of(source, part, options, out / "features", device, pool) for part in (train, test)
    ]
    workers = options.workers or RankInfo().cores
    values = classification.evaluate(parts[0], train_labels, parts[1], test_labels, options, workers)
    row = {sample: labels.tobytes() for sample, labels in zip(test.samples, test_labels, strict=True)}
    return 0, values, _protocol(classification, options, train), test.digest(row.__getitem__)


def detect(source: Pretrained, train: Split, test: Split, options, out: Path, device, pool):
    task = detection.task(source, train, options, device)
    for sample in test.samples:
        sample.objects()
    code = _fit("detection", task, source, train, options, out / "detection")
    if not code and options.statistics_steps and options.norm == "batch":
        loop.renew_statistics(task, options, options.statistics_steps, options.workers or RankInfo().cores)
    values, picture = ({}, None) if code else detection.evaluate(task.model, test, device, pool)
    if picture is not None:
        _add_picture(out, source, test, "detection", picture, "Boxes that were found", pictures.BOXES_CAPTION)
    return code, values, _protocol(detection, options, train), test.digest(_annotation)


def segment(source: Pretrained, train: Split, test: Split, options, out: Path, device, pool):
    task, stride = segmentation.task(source, train, options, device)
    code = _fit("segmentation", task, source, train, options, out / "segmentation")
    values, picture = ({}, None) if code else segmentation.evaluate(task.model, test, source.normalize, device, pool)
    if picture is not None:
        _add_picture(out, source, test, "segmentation", picture, "Masks that were found", pictures.MASKS_CAPTION)
    return code, values, _protocol(segmentation, options, train, stride=stride), test.digest(_mask)


def _add_picture(out: Path, source: Pretrained, test: Split, name: str, picture, title: str, caption: str) -> None:
    known = {"dataset": test.samples[0].root.name, "split": test.name, "checkpoint": source.sha256}
    path = add_picture(out / "figures", known, f"voc {name}", f"voc-{name}", picture, title, caption)
    print(path, file=sys.stderr, flush=True)


def _annotation(sample: Sample) -> bytes:
    return sample.annotation_path.read_bytes()


def _mask(sample: Sample) -> bytes:
    return sample.mask_path.read_bytes()


def _fit(name: str, task: loop.Task, source: Pretrained, train: Split, options, folder: Path) -> int:
    listing = hashlib.sha256("\n".join(sample.id for sample in train.samples).encode()).hexdigest()
    settings = {
        "task": name,
        "weights": source.sha256,
        "backbone": source.name,
        "normalize": to_tree(source.normalize),
        "train": train.title,
        "images": listing,
        "options": to_tree(options),
    }
    facts = {"normalize": to_tree(source.normalize), "data": {"images": listing}}
    with loop.claimed(folder):
        return loop.fit(task, options, folder, settings, facts, options.workers or RankInfo().cores)


def _protocol(module, options: Section, train: Split, **more) -> str:
    return module.PROTOCOL.format(**options.model_dump(), train=train.title, **more)


def records(
    values: dict[str, float], protocol: str, source: Pretrained, test: Split, digest: str, options: Section
) -> list[dict]:
    """The values as records of results.json."""
    shared = {
        "protocol": protocol,
        "options": to_tree(options),
        "dataset": test.samples[0].root.name,
        "split": test.name,
        "data": digest,
        "seed": source.seed,
        "method": source.method,
        "backbone": source.name,
        "checkpoint": source.sha256,
        "step": source.step,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return [{"name": name, "value": float(value), **shared} for name, value in values.items()]


def headline(made: Sequence[dict]) -> list[dict]:
    """The records without those of single classes, for a table."""
    single = {f"_{name}" for name in segmentation.NAMES}
    return [record for record in made if not any(record["name"].endswith(end) for end in single)]
