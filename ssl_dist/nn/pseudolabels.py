"""Labels that a method gives the training images itself: part of its state, equal on all ranks."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ssl_dist.kernels.ranks import Ranks
from ssl_dist.keys import METHOD, ORDER, hash64, permutation

FIGURES = ("labels_changed", "cluster_min", "cluster_max", "cluster_entropy")


class PseudoLabels(nn.Module):
    """One label of every image for each of several heads, 0 .. num_clusters - 1.

    At first the position modulo num_clusters, permuted for each head by a key. The figures of the last relabeling are
    state as well, so that a resumed run logs the same.
    """

    of_images: Tensor  # int32 [heads, N], by position
    figures: Tensor

    def __init__(self, num_heads: int, num_images: int, num_clusters: int, seed: int):
        super().__init__()
        self.num_clusters = num_clusters
        in_order = np.arange(num_images, dtype=np.int32) % num_clusters
        drawn = [in_order[permutation(hash64(seed, METHOD, ORDER, head), num_images)] for head in range(num_heads)]
        self.register_buffer("of_images", torch.from_numpy(np.stack(drawn)))
        self.register_buffer("figures", torch.zeros(len(FIGURES)))

    def of(self, positions: Tensor) -> Tensor:
        """The labels of these images, int64 [heads, n]."""
        return self.of_images[:, positions].long()

    def sizes(self, head: int) -> Tensor:
        """Images of every cluster, int64 [num_clusters]."""
        return torch.bincount(self.of_images[head], minlength=self.num_clusters)

    @torch.no_grad()
    def replace(self, heads: Sequence[int], labels_Hn: Sequence[Tensor], positions: Tensor, ranks: Ranks) -> None:
        """New labels for these heads: each rank brings those of its own images [n]; together they have all positions.

        Figures over these heads: the share of labels that changed, the smallest and the largest cluster in multiples of
        the mean size, and the entropy of the sizes, 1 when all are equal.
        """
        changed, sizes = 0.0, []
        for head, labels in zip(heads, labels_Hn, strict=True):
            own = torch.zeros_like(self.of_images[head])
            own[positions] = labels.to(own.dtype)
            new = ranks.all_reduce_sum(own)
            changed += float((new != self.of_images[head]).double().mean()) / len(heads)
            self.of_images[head] = new
            sizes.append(self.sizes(head).double() / len(new))
        share = torch.stack(sizes)
        entropy = float(-torch.xlogy(share, share).sum(1).mean()) / math.log(max(2, self.num_clusters))
        smallest, largest = (self.num_clusters * float(value) for value in (share.min(), share.max()))
        self.figures.copy_(torch.tensor([changed, smallest, largest, entropy], dtype=torch.float64))

    def metrics(self) -> dict[str, Tensor]:
        """What is logged of the last relabeling."""
        return dict(zip(FIGURES, self.figures.clone(), strict=True))
