"""Classify the images of a split: every image once, whatever the number of ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ssl_dist.data.normalize import normalized
from ssl_dist.data.readers import Dataset
from ssl_dist.device import allow_tf32
from ssl_dist.errors import UserError, quoted
from ssl_dist.methods.base import SSLMethod
from ssl_dist.progress import Progress
from ssl_dist.results import confusion
from ssl_dist.results.accuracy import target_rank
from ssl_dist.results.figures import add_picture
from ssl_dist.run import folder as run_folder
from ssl_dist.run.encoder import BATCH_TIMEOUT_S, Encoder, outputs, share_in_batches
from ssl_dist.transfer.subject import EvalContext

Crops = Literal[1, 10]
CROPS = {1: "centre crop", 10: "mean of the scores of ten crops (corners and centre, and mirrored)"}  # for protocols


@dataclass(frozen=True)
class Classified:
    """The counts of every classifier. total: images; num_top1, num_top5: those whose class is the first, or among the
    first five; confusion: images by true class (row) and predicted class (column) of the last classifier, int64 [C, C],
    None above `confusion.MAX_CLASSES`."""

    total: int
    num_top1: dict[str, int]
    num_top5: dict[str, int]
    confusion: Tensor | None

    def values(self, name: str) -> dict[str, float]:
        """`<name>_top1` and `<name>_top5` in percent; `<name>_<stage>_top1` of a classifier on a stage."""
        values = {}
        for classifier, num_top1 in self.num_top1.items():
            prefix = name if classifier == "output" else f"{name}_{classifier}"
            values[f"{prefix}_top1"] = num_top1 * 100.0 / self.total
            values[f"{prefix}_top5"] = self.num_top5[classifier] * 100.0 / self.total
        return values


def draw(
    classified: Classified, context: EvalContext, evaluator: str, how: str, classes: Sequence[str] | None = None
) -> None:
    """Write the last classifier's confusions to RUN/figures; of a held-out part none. how: the classifier in words;
    classes: the names of its classes, None: those of the data set."""
    if context.held_out is not None or classified.confusion is None:
        return
    counts_CC = classified.confusion.numpy()

    def write() -> None:
        names = confusion.names_up_to(len(counts_CC), classes or context.dataset.info(context.test).classes)
        what = f"{counts_CC.sum():,} images of {context.dataset.name} {context.test}"
        for picture in confusion.pictures(counts_CC, names, evaluator, how, what):
            add_picture(context.run / "figures", context.metadata, evaluator, *picture)

    with context.world.state.phase_of("the pictures", BATCH_TIMEOUT_S):
        context.world.on_rank0(write)


def classify(
    method: SSLMethod,
    encoder: Encoder,
    context: EvalContext,
    classes: Sequence[str] | None = None,
    crops: Crops = 1,
) -> Classified:
    """Classify the measured images under the test transform of `encoder`, which is the method's. classes: the names of
    the classifier's classes, with which those of the data set are matched; None: classes are matched by number. crops:
    10: scores are the mean over ten crops of an image.

    The method is left in evaluation mode and float32. Raises `UserError` for images without a label, for labels that
    the classifier has no score for, and for scores that are not finite: a training may diverge where its loss, which is
    of the statistics of a batch, shows nothing.
    """
    dataset, split, world = context.dataset, context.test, context.world
    with dataset.open(split) as reader:
        ids = np.arange(reader.info.count, dtype=np.int64) if context.test_ids is None else context.test_ids
        labels = torch.from_numpy(reader.labels(ids))
        if classes is not None:
            labels = world.raise_together(lambda: _by_name(labels, dataset, split, classes))
        method.float().eval()
        names, num_classes = classifiers(method, encoder)
        world.raise_together(lambda: _check_labels(labels, dataset, split, num_classes))
        low, high = share_in_batches(world, len(ids))
        num_top1_H, num_top5_H = torch.zeros(2, len(names), dtype=torch.int64)
        has_matrix = num_classes <= confusion.MAX_CLASSES
        counts_CC = torch.zeros(num_classes if has_matrix else 0, num_classes, dtype=torch.int64)
        to_input = normalized(encoder.normalize, torch.float32, world.device)
        allow_tf32(encoder.config.tf32)

        def score(pixels: Tensor) -> Tensor:
            """All of the method's classifiers, [N, H, C]."""
            return torch.stack(list(method.logits(to_input(pixels)).values()), 1)

        broken: list[int] = []
        start, title = low, f"{run_folder.title(context.run)}: classify {dataset.name} {split}"
        with (
            Progress(title, high - low, "image", quiet=not world.is_rank0) as progress,
            world.state.phase_of(f"the classification of {split}", BATCH_TIMEOUT_S),
        ):
            method.to(world.device).to(memory_format=torch.channels_last)
            images = reader, ids[low:high], encoder.config.data, world.rank_info.cores
            for scores in outputs(score, *images, world, progress, crops):
                broken += ids[start + np.flatnonzero(~np.isfinite(scores).all(1))[:1]].tolist()
                scores_BHC = torch.from_numpy(scores).view(len(scores), len(names), num_classes)
                target_B = labels[start : start + len(scores_BHC)]
                start += len(scores_BHC)
                for h, scores_BC in enumerate(scores_BHC.unbind(1)):
                    rank_B = target_rank(scores_BC, target_B)
                    num_top1_H[h] += (rank_B < 1).sum()
                    num_top5_H[h] += (rank_B < 5).sum()
                if has_matrix:
                    predicted_B = scores_BC.argmax(1).where(rank_B > 0, target_B)  # of equal scores the first class
                    counts_CC.index_put_((target_B, predicted_B), torch.ones_like(target_B), accumulate=True)
    with world.state.phase_of(f"the classification of {split}, of the other ranks", BATCH_TIMEOUT_S):
        world.raise_together(lambda: _require_finite(broken, dataset, split))
        num_top1_H, num_top5_H, counts_CC = (
            world.all_reduce_sum(counts.to(world.device)).cpu() for counts in (num_top1_H, num_top5_H, counts_CC)
        )
    top1, top5 = (dict(zip(names, counts.tolist(), strict=True)) for counts in (num_top1_H, num_top5_H))
    return Classified(len(ids), top1, top5, counts_CC if has_matrix else None)


def _require_finite(broken: Sequence[int], dataset: Dataset, split: str) -> None:
    """Raises `UserError` where there are ids of images whose scores are not finite."""
    if broken:
        raise UserError(
            f"scores of image {broken[0]} of {dataset.name} {split} are not finite: the network has diverged; train "
            "it with a lower rate (optim.lr, finetune.lr)"
        )


def classifiers(method: SSLMethod, encoder: Encoder) -> tuple[list[str], int]:
    """The names of a method's classifiers, and how many classes they tell apart."""
    size = encoder.config.data.image_size
    with torch.no_grad():
        scores = method.logits(next(method.parameters()).new_zeros(1, method.info.channels, size, size))
    return list(scores), next(iter(scores.values())).shape[1]


def _by_name(labels: Tensor, dataset: Dataset, split: str, classes: Sequence[str]) -> Tensor:
    """Labels of the data set, int64 [N], as numbers of the classifier's classes of these names."""
    own = dataset.info(split).classes
    number_of = {name: number for number, name in enumerate(classes)}
    unknown = [own[label] for label in labels.unique().tolist() if label >= 0 and own[label] not in number_of]
    if unknown:
        raise UserError(
            f"{dataset.root}: class {quoted(unknown[0])} of {split} is none of the {len(classes)} that the classifier "
            f"was trained on ({quoted(', '.join(classes))}); name its folder as one of them and convert again, or "
            "train a classifier on this data set (probe)"
        )
    numbers = torch.tensor([number_of.get(name, -1) for name in own] + [-1])  # the last one is that of the label -1
    return numbers[labels]


def _check_labels(labels: Tensor, dataset: Dataset, split: str, num_classes: int) -> None:
    missing = int((labels < 0).sum())
    if missing:
        raise UserError(
            f"{dataset.root}: {missing} of {len(labels)} images of {split} have no label; name a labelled split"
        )
    highest = int(labels.max())
    if highest >= num_classes:
        raise UserError(
            f"{dataset.root}: images of {split} have labels up to {highest}, and the classifier knows {num_classes} "
            "classes; train one on this data set (probe)"
        )
