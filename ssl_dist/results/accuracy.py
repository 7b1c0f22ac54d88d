"""Top-1 and top-5 with a stated order of ties, and how many neighbours they are taken of."""

import logging
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ssl_dist.errors import UserError


def target_rank(scores_QC: Tensor, targets_Q: Tensor) -> Tensor:
    """How many classes stand before each target when scores fall and, where they are equal, class indices rise.

    scores [Q, C], targets int64 [Q] in [-1, C) -> int64 [Q]; top-n is right where the rank is below n. A target of -1
    is a class without scores: its rank is so high that it is never right, however few classes there are. So is that of
    a row with a score that is no number, which is neither above another one nor below it.
    """
    num_classes = scores_QC.shape[1]
    score_Q1 = scores_QC.gather(1, targets_Q.clamp_min(0)[:, None])
    earlier_QC = torch.arange(num_classes, device=scores_QC.device) < targets_Q[:, None]
    ahead_QC = (scores_QC > score_Q1) | ((scores_QC == score_Q1) & earlier_QC)
    return ahead_QC.sum(1).where((targets_Q >= 0) & ~scores_QC.isnan().any(1), torch.iinfo(torch.int64).max)


def top1_and_top5(blocks: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """In percent, from blocks of scores [Q, C] and targets [Q]; see `target_rank`."""
    num_images, num_top1, num_top5 = 0, 0, 0
    for scores_QC, targets_Q in blocks:
        rank_Q = target_rank(scores_QC, targets_Q)
        num_images += len(rank_Q)
        num_top1 += int((rank_Q < 1).sum())
        num_top5 += int((rank_Q < 5).sum())
    return num_top1 * 100.0 / num_images, num_top5 * 100.0 / num_images


def neighbour_counts(
    requested: Sequence[int] | None, published: Sequence[int], num_images: int, key: str, source: str
) -> list[int]:
    """The numbers of nearest images to measure, rising. Without a request the published ones, without those above the
    number of images, and a warning says so. key: the option's. Raises `UserError` for a request above it."""
    counts = sorted(set(requested or published))
    fitting = [k for k in counts if k <= num_images]
    if fitting == counts:
        return counts
    if requested is not None or not fitting:
        raise UserError(
            f"{key} = {counts[-1] if requested else 'null'}: {source} has {num_images} images to choose from;"
            f" give {key}=[...] with numbers up to {num_images}"
        )
    left_out = ", ".join(str(k) for k in counts if k > num_images)
    logging.getLogger(__name__).warning(
        "%s = %s left out, since %s has only %d images", key, left_out, source, num_images
    )
    return fitting
