"""SFRIK: self-supervised learning with rotation-invariant kernels (Zheng, Puy, Riccietti, Perez & Gribonval, ICLR 2023,
arXiv:2208.00789).

Views of every image of a mini-batch are embedded on the unit sphere of q dimensions. The loss draws the embeddings of
an image together and brings the distribution of each view's embeddings close to the uniform one, measured by the
maximum mean discrepancy of a kernel psi(<x, y>) that does not change when the sphere is turned: a sum of Legendre
polynomials up to a truncation order L.

One form covers the official three. General views are compared with every other view:
    two views      general [0]       reg_small true
    OBoW           general [0]       the whole image first, then crops and patches; regularised all or only the image
    SwAV           general [0, 1]    the large crops first, then the small ones; regularised all or only the large ones
"""

from functools import reduce

import numpy as np
import torch
import torch.nn.functional as F
from numpy.polynomial import Polynomial
from pydantic import Field
from torch import Tensor

from ssl_dist.config import NonNegativeFloat, NonNegativeInt, PositiveInt, Section
from ssl_dist.errors import UserError
from ssl_dist.methods.base import Backbone, Batch, Info, Output, SSLMethod, World
from ssl_dist.nn.layers import full_precision


class Options(Section):
    projector: list[PositiveInt] = Field(
        default_factory=lambda: [8192, 8192, 8192],
        min_length=1,
        description="widths of the projector's layers; the last is q, that of the embeddings",
    )
    sim_coeff: NonNegativeFloat = Field(
        4000.0, description="weight of the invariance, a mean over dimensions: 4000 for q = 8192, 40000 for 32768"
    )
    mmd_coeff: NonNegativeFloat = Field(1.0, description="weight of the discrepancy from the uniform distribution")
    weights: list[NonNegativeFloat] = Field(
        default_factory=lambda: [1.0, 40.0, 40.0],
        min_length=1,
        description="of the Legendre polynomials of degree 1, 2, ... L in the kernel",
    )
    general: list[NonNegativeInt] = Field(
        default_factory=lambda: [0],
        min_length=1,
        description="views, counted over all groups, that the others are compared with; SwAV's form: [0, 1]",
    )
    reg_small: bool = Field(True, description="regularise the distribution of every view; false: of the general ones")


# ---------------------------------------------------------------------------------------------------- kernel


def legendre(dim: int, degree: int) -> Polynomial:
    """The Legendre polynomial of a degree >= 1 in `dim` >= 2 dimensions; 1 at t = 1.

    By the recurrence (k + dim - 2) P_{k+1} = (2k + dim - 2) t P_k - k P_{k-1} from P_0 = 1, P_1 = t.
    """
    t = Polynomial([0.0, 1.0])
    before, now = Polynomial([1.0]), t
    for k in range(1, degree):
        before, now = now, ((2 * k + dim - 2) * t * now - k * before) / (k + dim - 2)
    return now


def kernel(dim: int, weights: list[float]) -> list[float]:
    """Coefficients c_0 .. c_L of psi(t) = sum_k weights[k-1] P_k(t) = sum_k c_k t^k."""
    coefficients = np.zeros(len(weights) + 1)
    for degree, weight in enumerate(weights, 1):
        coefficients[: degree + 1] += weight * np.asarray(legendre(dim, degree).coef, np.float64)
    return coefficients.tolist()


def polynomial(t: Tensor, coefficients: list[float]) -> Tensor:
    """sum_k coefficients[k] t^k, by Horner's rule."""
    *lower, second, highest = coefficients
    value = highest * t + second
    for c in reversed(lower):
        value = value * t + c
    return value


# ---------------------------------------------------------------------------------------------------- losses


def discrepancy(z_MD: Tensor, weights: list[float], lo: int = 0, hi: int | None = None) -> Tensor:
    """What the rows lo..hi-1 of the Gram matrix add to mean_{i, j} psi(<z_i, z_j>) of unit rows z, i = j included.

    This is the squared maximum mean discrepancy from the uniform distribution on the sphere. Nothing is larger than
    the Gram matrix.
    """
    gram = z_MD[lo:hi] @ z_MD.T
    return polynomial(gram, kernel(z_MD.shape[1], weights)).sum() / len(z_MD) ** 2


def invariance(z_KMD: Tensor, general: list[int]) -> Tensor:
    """The mean over general views g and the other views v of mean (z_g - z_v)^2, over images and dimensions."""
    pairs = [(g, v) for g in general for v in range(len(z_KMD)) if v != g]
    return reduce(torch.add, (F.mse_loss(z_KMD[g], z_KMD[v]) for g, v in pairs)) / len(pairs)


def regularized(embeddings_KMD: Tensor, options: Options, world: World) -> tuple[Tensor, dict[str, float | Tensor]]:
    """A loss whose mean over the ranks is that of all views of the global batch, and its unweighted terms; each rank
    takes its even share of the rows of the Gram matrices."""
    z_KMD, (lo, hi) = F.normalize(embeddings_KMD, dim=-1), world.share(embeddings_KMD.shape[1])
    spread = range(len(z_KMD)) if options.reg_small else options.general
    shares = [discrepancy(z_KMD[v], options.weights, lo, hi) for v in spread]
    similar, share = invariance(z_KMD, options.general), reduce(torch.add, shares) / len(shares)
    loss = options.sim_coeff * similar + options.mmd_coeff * world.scale_for_ddp_mean(share)
    return loss, {"invariance": similar.detach(), "discrepancy": world.all_reduce_sum(share.detach())}


# ---------------------------------------------------------------------------------------------------- method


class Method(SSLMethod[Options]):
    free_views = True

    def __init__(self, backbone: Backbone, info: Info, options: Options):
        super().__init__(backbone, info, options)
        self.num_views = info.views_compared("sfrik")
        info.require_views("general", options.general)
        if options.projector[-1] < 2:
            raise UserError(
                "method.options.projector: the last width is 1, and there is no such sphere; give 2 or more"
            )
        # As in the official code: two views pass one after the other, of multicrop all of one size together.
        self.views_together = self.num_views > 2
        self.projector = self.mlp_on_features(options.projector)

    def explain(self, world_size: int, device: str) -> dict[str, str]:
        num_views, batch_size, options = self.num_views, self.info.batch_size, self.options
        regularised = num_views if options.reg_small else len(options.general)
        weights = ", ".join(f"{w:g}" for w in options.weights)
        rows, mib = -(-batch_size // world_size), batch_size * 4 / 2**20
        return {
            "kernel": f"L = {len(options.weights)}, weights {weights}; on {regularised} of {num_views} views",
            "Gram matrices": f"{rows} of {batch_size} rows a rank, {rows * mib:.1f} MiB for each view and degree; "
            f"all embeddings {num_views * options.projector[-1] * mib:.1f} MiB, the loss at its peak 5 times that",
        }

    def forward(self, batch: Batch, world: World) -> Output:
        """Metrics: the unweighted terms."""
        embeddings = self.gathered(batch, world, lambda images: self.projector(self.backbone(images)))
        with full_precision(embeddings.device):
            loss, terms = regularized(embeddings, self.options, world)
        return Output(loss, terms, representations=embeddings.detach())
