"""Barlow Twins (Zbontar, Jing, Misra, LeCun & Deny, ICML 2021, arXiv:2103.03230).

Two views of every image of a mini-batch are embedded. The loss brings the cross-correlation matrix of the two
embeddings, over the images of the batch, close to the identity: the views agree in every dimension, and no two
dimensions say the same.

As in the official code the loss is a sum over the matrix, and a dimension is divided by sqrt(var + 1e-5), as BatchNorm
does it.
"""

import torch
from pydantic import Field
from torch import Tensor

from ssl_dist.config import NonNegativeFloat, PositiveInt, Section
from ssl_dist.methods.base import Backbone, Batch, Info, Output, SSLMethod, World
from ssl_dist.nn.layers import full_precision


class Options(Section):
    projector: list[PositiveInt] = Field(
        default_factory=lambda: [8192, 8192, 8192],
        min_length=1,
        description="widths of the projector's layers; the last is that of the embeddings",
    )
    lambd: NonNegativeFloat = Field(0.0051, description="weight of the redundancy, the entries beside the diagonal")


def standardized(z_MD: Tensor) -> Tensor:
    """Every dimension with mean 0 and variance 1 over the M rows."""
    centred = z_MD - z_MD.mean(0)
    return centred / torch.sqrt(centred.square().mean(0) + 1e-5)


def correlation(x_MD: Tensor, y_MD: Tensor, lo: int = 0, hi: int | None = None) -> Tensor:
    """Rows lo..hi-1 of the cross-correlation matrix C [D, D] (equation 2)."""
    return standardized(x_MD)[:, lo:hi].T @ standardized(y_MD) / len(x_MD)


def decorrelated(z_KMD: Tensor, options: Options, world: World) -> tuple[Tensor, dict[str, float | Tensor]]:
    """A loss whose mean over the ranks is that of two views [2, M, D] of the global batch (equation 1), and its
    unweighted terms; each rank takes its even share of the rows of the matrix."""
    x_MD, y_MD = z_KMD
    lo, hi = world.share(z_KMD.shape[-1])
    rows = correlation(x_MD, y_MD, lo, hi)
    diagonal = rows.diagonal(lo)
    invariance = (diagonal - 1).square().sum()
    redundancy = (rows.square()).sum() - diagonal.square().sum()
    loss = world.scale_for_ddp_mean(invariance + options.lambd * redundancy)
    terms = world.all_reduce_sum(torch.stack([invariance, redundancy]).detach())
    return loss, {"invariance": terms[0], "redundancy": terms[1]}


class Method(SSLMethod[Options]):
    num_views = 2
    views_together = False

    def __init__(self, backbone: Backbone, info: Info, options: Options):
        super().__init__(backbone, info, options)
        info.require_two_images("one image has no correlation")
        self.projector = self.mlp_on_features(options.projector)

    def explain(self, world_size: int, device: str) -> dict[str, str]:
        dim = self.options.projector[-1]
        rows = -(-dim // world_size)
        return {"correlation": f"{rows} of {dim} rows a rank, {rows * dim * 4 / 2**20:.1f} MiB"}

    def forward(self, batch: Batch, world: World) -> Output:
        """Metrics: the unweighted terms."""
        z_KMD = self.gathered(batch, world, lambda images: self.projector(self.backbone(images)))
        with full_precision(z_KMD.device):
            loss, terms = decorrelated(z_KMD, self.options, world)
        return Output(loss, terms, representations=z_KMD.detach())
