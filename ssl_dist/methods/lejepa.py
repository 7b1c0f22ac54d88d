"""LeJEPA (Balestriero & LeCun 2025, arXiv:2511.08544): a joint-embedding predictive architecture without heuristics.

Every view of an image predicts the mean embedding of its global views. What keeps the embeddings from being all the
same is SIGReg: along random directions, the slices, those of every view shall be distributed as a standard normal,
by the test of Epps and Pulley. There is no target network, no stopped gradient and no schedule.

As in the paper's algorithm 2 the squared distance is a mean over the dimensions, not the sum of its equations.
"""

from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ssl_dist.config import NonNegativeInt, PositiveFloat, PositiveInt, Section
from ssl_dist.device import to_device
from ssl_dist.keys import METHOD, hash64, normal_rows
from ssl_dist.methods.base import Backbone, Batch, Info, Output, SSLMethod, World
from ssl_dist.nn.layers import full_precision


class Options(Section):
    lambd: Annotated[float, Field(gt=0, le=1)] = Field(
        0.05, description="weight of SIGReg; that of the prediction is 1 - lambd"
    )
    slices: PositiveInt = Field(1024, description="random directions, new ones in every step")
    knots: Annotated[int, Field(ge=2, le=1000)] = Field(17, description="points of the integral from -t_max to t_max")
    t_max: PositiveFloat = Field(5.0, description="where the integral over characteristic functions ends")
    global_views: list[NonNegativeInt] | None = Field(
        None,
        min_length=1,
        description="views, counted over all groups, whose mean is predicted; null: those of the largest size",
    )
    projector: list[PositiveInt] = Field(
        default_factory=lambda: [2048, 2048, 128],
        min_length=1,
        description="widths of the projector's layers; the last is that of the embeddings",
    )


def drawn_slices(seed: int, step: int, dim: int, lo: int, hi: int) -> np.ndarray:
    """The slices lo..hi-1 of a step: float64 [hi - lo, D], unit vectors of uniform direction."""
    rows = normal_rows(hash64(seed, METHOD, step), np.arange(lo, hi), dim)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def epps_pulley(x_NS: Tensor, knots: int, t_max: float) -> Tensor:
    """The statistic [..., S] of every column of N numbers [..., N, S] (section 4.2.3):

        N * integral from -t_max to t_max of |phi_N(t) - phi(t)|^2 * phi(t) dt

    phi_N(t) = mean exp(i t x), phi(t) = exp(-t^2 / 2), by the trapezoidal rule. The integrand is symmetric: the points
    t >= 0 stand for those below 0, too.
    """
    end = knots - 1
    place = torch.arange(end, -1, -2, dtype=x_NS.dtype, device=x_NS.device)  # t in units of t_max / end
    t = t_max / end * place
    weight = torch.full_like(t, 2).masked_fill_((place == 0) | (place == end), 1) * (2 * t_max / end)
    phi = torch.exp(-t.square() / 2)
    angle = x_NS[..., None] * t
    error = (angle.cos().mean(-3) - phi).square() + angle.sin().mean(-3).square()
    return x_NS.shape[-2] * (error @ (weight * phi))


def sigreg(z_KMD: Tensor, seed: int, step: int, options: Options, world: World) -> Tensor:
    """A number whose mean over the ranks is the mean statistic of K views of the global batch along the slices of a
    step (sections 4.3 and 5.1); each rank tests all embeddings along its even share of the slices."""
    lo, hi = world.share(options.slices)
    drawn = torch.from_numpy(drawn_slices(seed, step, z_KMD.shape[-1], lo, hi)).to(z_KMD.dtype)
    slices_SD = to_device(drawn.numpy(), z_KMD.device)
    statistic_KS = epps_pulley(z_KMD @ slices_SD.T, options.knots, options.t_max)
    return world.scale_for_ddp_mean(statistic_KS.sum() / (len(z_KMD) * options.slices))


def regularized(
    z_KMD: Tensor, chosen: list[int], seed: int, step: int, options: Options, world: World
) -> tuple[Tensor, dict[str, float | Tensor]]:
    """A loss whose mean over the ranks is that of K views of the global batch (section 5.1), and its unweighted terms.
    chosen: the global views."""
    centre_MD = torch.stack([z_KMD[view] for view in chosen]).mean(0)
    prediction = (centre_MD - z_KMD).square().mean()
    gaussian = sigreg(z_KMD, seed, step, options, world)
    loss = (1 - options.lambd) * prediction + options.lambd * gaussian
    return loss, {"prediction": prediction.detach(), "sigreg": world.all_reduce_mean(gaussian.detach())}


class Method(SSLMethod[Options]):
    """views.groups: views of one recipe, or global ones, then smaller local ones."""

    free_views = True

    def __init__(self, backbone: Backbone, info: Info, options: Options):
        super().__init__(backbone, info, options)
        self.num_views = info.views_compared("lejepa")
        info.require_two_images("one image has no distribution")
        if options.global_views is not None:
            info.require_views("global_views", options.global_views)
        self.global_views = options.global_views or self._largest()
        self.projector = self.mlp_on_features(options.projector, last_bias=True)

    def _largest(self) -> list[int]:
        """The views of the largest size."""
        sizes = [size for num, size in self.info.view_groups for _ in range(num)]
        return [view for view, size in enumerate(sizes) if size == max(sizes)]

    def explain(self, world_size: int, device: str) -> dict[str, str]:
        options, rows = self.options, self.num_views * self.info.batch_size
        share, points = -(-options.slices // world_size), (options.knots + 1) // 2
        return {
            "prediction": f"of the mean of {len(self.global_views)} views by {self.num_views}",
            "slices": f"{share} of {options.slices} a rank, each of {rows} embeddings at {points} points: "
            f"{6 * share * rows * points * 4 / 2**20:.1f} MiB",  # angles, and what their gradient is made of
        }

    def forward(self, batch: Batch, world: World) -> Output:
        """Metrics: the two terms before they are weighted."""
        z_KMD = self.projected(batch, world, self.projector)
        with full_precision(z_KMD.device):
            loss, terms = regularized(z_KMD, self.global_views, self.info.seed, batch.step, self.options, world)
        return Output(loss, terms, representations=z_KMD.detach())
