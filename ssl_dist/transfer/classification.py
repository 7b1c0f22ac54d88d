"""What a classifier makes of the images of a split: every image once, whatever the number of ranks."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ssl_dist.data.normalize import normalized
from ssl_dist.data.readers import Dataset
from ssl_dist.distributed.world import World
from ssl_dist.errors import UserError
from ssl_dist.methods.base import SSLMethod
from ssl_dist.progress import Progress
from ssl_dist.results import confusion
from ssl_dist.results.accuracy import target_rank
from ssl_dist.results.figures import add_picture
from ssl_dist.run.encoder import STUCK, Encoder, outputs
from ssl_dist.transfer.subject import EvalContext


@dataclass(frozen=True)
class Classified:
    """confusion: of every classifier how many images of each class (row) it took for which (column), int64 [C, C];
    among_five: how many images have their class among its first five."""

    confusion: dict[str, Tensor]
    among_five: dict[str, int]

    def values(self, name: str) -> dict[str, float]:
        """`<name>_top1` and `<name>_top5` in percent; `<name>_<stage>_top1` of a classifier on a stage."""
        found = {}
        for classifier, counts_CC in self.confusion.items():
            prefix = name if classifier == "output" else f"{name}_{classifier}"
            total = int(counts_CC.sum())
            found[f"{prefix}_top1"] = int(counts_CC.diagonal().sum()) * 100.0 / total
            found[f"{prefix}_top5"] = self.among_five[classifier] * 100.0 / total
        return found


def draw(found: Classified, subject: EvalContext, evaluator: str, how: str) -> None:
    """RUN/figures gets the confusions of the last classifier; `how` says in words what that is."""
    if subject.part is not None:  # to choose by; pictures are of the test split
        return

    def write() -> None:
        counts_CC = list(found.confusion.values())[-1].numpy()
        known = subject.source.info(subject.test).classes
        names = [*known, *(str(label) for label in range(len(known), len(counts_CC)))]
        what = f"{counts_CC.sum():,} images of {subject.source.name} {subject.test}"
        for picture in confusion.pictures(counts_CC, names, evaluator, how, what):
            add_picture(subject.run / "figures", subject.metadata, evaluator, *picture)

    with subject.world.state.phase_of("the pictures", STUCK):
        subject.world.on_rank0(write)


class _Scores(nn.Module):
    """The scores of all of a method's classifiers, [N, H, C]."""

    def __init__(self, method: SSLMethod):
        super().__init__()
        self.method = method

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack(list(self.method.logits(images).values()), 1)


def classify(
    method: SSLMethod,
    encoder: Encoder,
    source: Dataset,
    split: str,
    world: World,
    threads: int,
    ids: np.ndarray | None = None,
) -> Classified:
    """Classify the images `ids` of a split, all of them by default, under the encoder's test transform.

    The method is left in evaluation mode and float32. Raises `UserError` for images without a label, and for classes
    that the classifier does not know.
    """
    with source.open(split, threads) as reader:
        ids = np.arange(reader.info.count, dtype=np.int64) if ids is None else ids
        labels = torch.from_numpy(reader.labels(ids))
        method.float().eval()
        names, num_classes = classifiers(method, encoder)
        world.raise_together(lambda: _check_labels(labels, source, split, num_classes))
        low, high = world.share(len(ids))
        counts_HCC = torch.zeros(len(names), num_classes, num_classes, dtype=torch.int64)
        among_five_H = torch.zeros(len(names), dtype=torch.int64)
        done = low
        with (
            Progress(f"classify {source.name} {split}", high - low, "image", quiet=not world.is_rank0) as counter,
            world.state.phase_of(f"the classification of {split}", STUCK),
        ):
            module = _Scores(method).to(world.device, memory_format=torch.channels_last)
            to_input = normalized(encoder.normalize, torch.float32, world.device)
            images = ids[low:high]
            for scores in outputs(module, to_input, encoder.config.data, reader, images, world, threads, counter):
                scores_BHC = torch.from_numpy(scores).view(-1, len(names), num_classes)
                target_B = labels[done : done + len(scores_BHC)]
                done += len(scores_BHC)
                for h, scores_BC in enumerate(scores_BHC.unbind(1)):
                    rank_B = target_rank(scores_BC, target_B)
                    among_five_H[h] += (rank_B < 5).sum()
                    predicted_B = scores_BC.argmax(1).where(rank_B > 0, target_B)  # of equal scores the first class
                    ones = torch.ones_like(target_B)
                    counts_HCC[h].index_put_((target_B, predicted_B), ones, accumulate=True)
    with world.state.phase_of(f"the classification of {split}, of the other ranks", STUCK):
        counts_HCC = world.all_reduce_sum(counts_HCC.to(world.device)).cpu()
        among_five_H = world.all_reduce_sum(among_five_H.to(world.device)).cpu()
    return Classified(dict(zip(names, counts_HCC, strict=True)), dict(zip(names, among_five_H.tolist(), strict=True)))


def classifiers(method: SSLMethod, encoder: Encoder) -> tuple[list[str], int]:
    """The names of a method's classifiers, and how many classes they know."""
    size = encoder.config.data.image_size
    like = next(method.parameters())
    with torch.no_grad():
        found = method.logits(torch.zeros(1, 3, size, size, dtype=like.dtype, device=like.device))
    return list(found), next(iter(found.values())).shape[1]


def _check_labels(labels: Tensor, source: Dataset, split: str, num_classes: int) -> None:
    missing = int((labels < 0).sum())
    if missing:
        raise UserError(
            f"{source.root}: {missing} of {len(labels)} images of {split} have no label; name a labelled split"
        )
    highest = int(labels.max())
    if highest >= num_classes:
        raise UserError(
            f"{source.root}: images of {split} have labels up to {highest}, and the classifier knows {num_classes} "
            "classes; train one on this data set (probe)"
        )
