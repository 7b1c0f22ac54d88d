"""VICReg: variance-invariance-covariance regularisation (Bardes, Ponce & LeCun, ICLR 2022, arXiv:2105.04906).

Two views of every image of a mini-batch are embedded. The loss draws the two embeddings of an image together, keeps
the standard deviation of every dimension above 1, and takes the covariance of any two dimensions away.

As in the official code the invariance is a mean over dimensions, too, where equation 5 sums over them, and the two
views' hinges are averaged, their covariances summed.
"""

import torch
import torch.nn.functional as F
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
    sim_coeff: NonNegativeFloat = Field(25.0, description="weight of the invariance between the views")
    std_coeff: NonNegativeFloat = Field(25.0, description="weight of the hinge on the standard deviations")
    cov_coeff: NonNegativeFloat = Field(1.0, description="weight of the covariances")


def variance(z_MD: Tensor) -> Tensor:
    """mean_j relu(1 - sqrt(var_j + 1e-4)), var unbiased over the M rows: equations 1 and 2."""
    return F.relu(1 - torch.sqrt(z_MD.var(0) + 1e-4)).mean()


def covariance(z_MD: Tensor, lo: int = 0, hi: int | None = None) -> Tensor:
    """What the rows lo..hi-1 of the covariance matrix C [D, D] add to sum_{i != j} C_ij^2 / D: equations 3 and 4."""
    num_images, dim = z_MD.shape
    centred = z_MD - z_MD.mean(0)
    rows = centred[:, lo:hi].T @ centred / (num_images - 1)
    rows.diagonal(lo).zero_()
    return rows.square().sum() / dim


def regularized(z_KMD: Tensor, options: Options, world: World) -> tuple[Tensor, dict[str, float | Tensor]]:
    """A loss whose mean over the ranks is that of two views [2, M, D] of the global batch, and its unweighted terms;
    each rank takes its even share of the rows of the covariance matrices."""
    x_MD, y_MD = z_KMD
    lo, hi = world.share(z_KMD.shape[-1])
    invariance = F.mse_loss(x_MD, y_MD)
    std = (variance(x_MD) + variance(y_MD)) / 2
    cov_share = covariance(x_MD, lo, hi) + covariance(y_MD, lo, hi)
    loss = options.sim_coeff * invariance + options.std_coeff * std
    loss = loss + options.cov_coeff * world.scale_for_ddp_mean(cov_share)
    return loss, {
        "invariance": invariance.detach(),
        "variance": std.detach(),
        "covariance": world.all_reduce_sum(cov_share.detach()),
    }


class Method(SSLMethod[Options]):
    num_views = 2
    views_together = False

    def __init__(self, backbone: Backbone, info: Info, options: Options):
        super().__init__(backbone, info, options)
        info.require_two_images("one image has no variance")
        self.projector = self.mlp_on_features(options.projector)

    def explain(self, world_size: int, device: str) -> dict[str, str]:
        dim = self.options.projector[-1]
        rows = -(-dim // world_size)
        return {"covariance": f"{rows} of {dim} rows a rank, {rows * dim * 4 / 2**20:.1f} MiB, for each of 2 views"}

    def forward(self, batch: Batch, world: World) -> Output:
        """Metrics: the unweighted terms."""
        z_KMD = self.gathered(batch, world, lambda images: self.projector(self.backbone(images)))
        with full_precision(z_KMD.device):
            loss, terms = regularized(z_KMD, self.options, world)
        return Output(loss, terms, representations=z_KMD.detach())
