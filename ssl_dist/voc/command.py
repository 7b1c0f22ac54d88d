"""`ssl-dist voc TASK RUN|WEIGHTS --root ROOT --out DIR`: one transfer, from the folder to results.json."""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure

from ssl_dist import results
from ssl_dist.config import parse_yaml, to_tree, validate
from ssl_dist.device import allow_tf32
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.distributed.signals import STOPPED
from ssl_dist.distributed.world import choose_device
from ssl_dist.errors import UserError, quoted
from ssl_dist.results.figures import add_picture
from ssl_dist.voc import classification, data, detection, finetune, loop, pictures, pretrained, segmentation
from ssl_dist.voc.data import Sample, Split
from ssl_dist.voc.pretrained import Pretrained

TASKS = {
    "classification": classification,
    "finetune": finetune,
    "detection": detection,
    "segmentation": segmentation,
}
Options = classification.Options | finetune.Options | detection.Options | segmentation.Options
# Values, protocol, and the SHA-256 of training and of test images with what is true of them.
Outcome = tuple[dict[str, float], str, str, str]


@dataclass(frozen=True)
class Transfer:
    """What a task works on. out: the folder of results; threads: how many read images, and fit."""

    source: Pretrained
    train: Split
    test: Split
    out: Path
    device: torch.device
    threads: int

    @property
    def names(self) -> dict[str, str]:
        """What was measured on which images, by the fields of a record."""
        source, names = self.source, {"dataset": self.test.dataset, "split": self.test.name}
        names |= {"method": source.method, "backbone": source.name, "transform": f"normalised by {source.normalize}"}
        return names | {"checkpoint": source.sha256, "step": str(source.step)}


def run(name: str, weights: Path, roots: Sequence[Path], out: Path, overrides: Sequence[str]) -> tuple[int, list[dict]]:
    """Returns the exit code, and what went to OUT/results.json. Raises `UserError`.

    roots: folders in VOC's format; the training split is that of all, the test split the first one's. Checkpoints of a
    training lie in OUT/<task>.
    """
    if not RankInfo.from_environment().alone:
        raise UserError("voc: runs in one process; start it without torchrun")
    of_weights = [override for override in overrides if override.partition("=")[0] in pretrained.KEYS]
    options = parse_options(name, [override for override in overrides if override not in of_weights])
    if len({root.resolve() for root in roots}) < len(roots):
        raise UserError(f"--root {roots[-1]}: the same folder stands there twice; leave one out")
    train = data.read_split(roots, options.IMAGE_SET, options.train_split)
    test = data.read_split(roots[:1], options.IMAGE_SET, options.test_split)
    data.check_disjoint(train, test)
    source = pretrained.load(weights, of_weights)
    threads = options.workers or RankInfo().cores
    allow_tf32(False)
    transfer = Transfer(source, train, test, out, choose_device(RankInfo()), threads)
    outcome: Outcome | None
    if isinstance(options, classification.Options):
        outcome = classify(transfer, options)
    elif isinstance(options, finetune.Options):
        outcome = fine_tune(transfer, options)
    elif isinstance(options, detection.Options):
        outcome = detect(transfer, options)
    else:
        outcome = segment(transfer, options)
    if outcome is None:
        return STOPPED, []
    values, protocol, train_digest, digest = outcome
    metadata = transfer.names | {"data": digest, "train_data": train_digest}
    records = results.make_records(values, protocol, metadata, source.seed, to_tree(options), TASKS[name].VERSION)
    results.add(out / "results.json", records)
    return 0, records


def parse_options(name: str, overrides: Sequence[str]) -> Options:
    """The options of a task from `key=value` (values are YAML)."""
    tree = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise UserError(f"override {quoted(override)}: write key=value, for example batch_size=8")
        tree[key] = parse_yaml(value, f"override {quoted(override)}")
    return validate(TASKS[name].Options, tree)


def classify(transfer: Transfer, options: classification.Options) -> Outcome:
    """SVMs on frozen features."""
    train, test = transfer.train, transfer.test
    train_labels, test_labels = train.labels, test.labels  # damaged lists show before the long extraction
    classification.present_classes(train_labels, test_labels, options)
    folder, device, threads = transfer.out / "features", transfer.device, transfer.threads
    train_features, test_features = (
        classification.features_of(transfer.source, split, options, folder, device, threads) for split in (train, test)
    )
    parts = train_features, train_labels, test_features, test_labels
    values = classification.evaluate(*parts, options, threads)
    return values, _protocol(classification.PROTOCOL, options, train), _labelled_digest(train), _labelled_digest(test)


def fine_tune(transfer: Transfer, options: finetune.Options) -> Outcome | None:
    """A linear classifier on the network, trained with it. None: stopped on request."""
    source, train, test = transfer.source, transfer.train, transfer.test
    finetune.check_classes(test)
    task = finetune.task(source, train, options, transfer.device)
    digest = _labelled_digest(train)
    if not _fit("finetune", task, options, transfer, digest):
        return None
    values = finetune.evaluate(task.model, test, source.normalize, options, transfer.device, transfer.threads)
    return values, _protocol(finetune.PROTOCOL, options, train), digest, _labelled_digest(test)


def _labelled_digest(split: Split) -> str:
    row = {sample: labels.tobytes() for sample, labels in zip(split.samples, split.labels, strict=True)}
    return split.digest(row.__getitem__)


def detect(transfer: Transfer, options: detection.Options) -> Outcome | None:
    """Faster R-CNN, fine-tuned. None: stopped on request."""
    train, test = transfer.train, transfer.test
    task = detection.task(transfer.source, train, options, transfer.device)
    for sample in test.samples:
        sample.objects()  # a damaged annotation shows now and not after the training
    digest = train.digest(_annotation)
    if not _fit("detection", task, options, transfer, digest):
        return None
    if options.statistics_steps and options.norm == "batch":
        loop.renew_statistics(task, options, options.statistics_steps, transfer.threads)
    values, figure = detection.evaluate(task.model, test, transfer.device, transfer.threads)
    _add_picture(transfer, "detection", figure, "Boxes that were found", pictures.BOXES_CAPTION)
    protocol = _protocol(detection.PROTOCOL, options, train, network=detection.network(transfer.source))
    return values, protocol, digest, test.digest(_annotation)


def segment(transfer: Transfer, options: segmentation.Options) -> Outcome | None:
    """A fully convolutional network, fine-tuned. None: stopped on request."""
    source, train, test = transfer.source, transfer.train, transfer.test
    task, stride = segmentation.task(source, train, options, transfer.device)
    digest = train.digest(_mask)
    if not _fit("segmentation", task, options, transfer, digest):
        return None
    values, figure = segmentation.evaluate(task.model, test, source.normalize, transfer.device, transfer.threads)
    network = segmentation.network(source, stride)
    _add_picture(transfer, "segmentation", figure, "Masks that were found", pictures.MASKS_CAPTION)
    return values, _protocol(segmentation.PROTOCOL, options, train, network=network), digest, test.digest(_mask)


def _annotation(sample: Sample) -> bytes:
    return data.file_bytes(sample.annotation_path)


def _mask(sample: Sample) -> bytes:
    return data.file_bytes(sample.mask_path)


def _add_picture(transfer: Transfer, name: str, figure: Figure, title: str, caption: str) -> None:
    folder = transfer.out / "figures"
    path = add_picture(folder, transfer.names, f"voc {name}", f"voc-{name}", figure, title, caption)
    print(path, file=sys.stderr, flush=True)


def _fit(name: str, task: loop.Task, options: loop.TrainingOptions, transfer: Transfer, digest: str) -> bool:
    """Whether the training is complete; it was stopped on request otherwise. digest: of the training split."""
    source, train, folder = transfer.source, transfer.train, transfer.out / name
    settings = {
        "task": name,
        "weights": source.sha256,
        "backbone": source.name,
        "normalize": to_tree(source.normalize),
        "train": train.title,
        "images": hashlib.sha256("\n".join(sample.id for sample in train.samples).encode()).hexdigest(),
        "contents": digest,
        "options": to_tree(options),
    }
    with loop.claimed(folder):
        return loop.fit(task, options, folder, settings, transfer.threads) != STOPPED


def _protocol(template: str, options: Options, train: Split, **more: str) -> str:
    return template.format(**options.model_dump(), train=train.title, **more)


def headline(records: Sequence[dict]) -> list[dict]:
    """The records without those of single classes, for a table."""
    single = {f"_{name}" for name in segmentation.NAMES}
    return [record for record in records if not any(record["name"].endswith(end) for end in single)]
