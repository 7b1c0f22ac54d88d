"""The losses of the methods on plain embeddings, for a training loop of one's own: functions, and modules of them.

    from ssl_dist import losses
    loss = losses.nt_xent(z1, z2, temperature=0.2)           # each [B, D], row i of both from image i

Views are embeddings [B, D] of B images in one order, floating point; half precision is raised to float32. A loss is a
scalar with gradient; a wrong shape is a `ValueError` that says the shapes.

Over several ranks (an initialised process group) the images of all ranks are one batch: give each rank its own B
images, the same number on every rank, and let DistributedDataParallel average the gradients; they are those of one
process that holds the whole batch. The mean over the ranks of the loss is its loss.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssl_dist.config import validate
from ssl_dist.config.section import AnySection
from ssl_dist.distributed.world import World, joined
from ssl_dist.kernels import relation
from ssl_dist.methods import align_uniform as _align_uniform
from ssl_dist.methods import relational as _relational
from ssl_dist.methods import relic as _relic
from ssl_dist.methods import sfrik as _sfrik
from ssl_dist.methods import simclr as _simclr
from ssl_dist.methods import vicreg as _vicreg
from ssl_dist.methods.relational import RelationModule
from ssl_dist.nn.layers import at_least_float32, full_precision

Views = Sequence[Tensor] | Tensor
Kind = Literal["nt_xent", "log_of_mean"]

__all__ = [
    "SFRIK",
    "AlignUniform",
    "NTXent",
    "ReLIC",
    "RelationModule",
    "Relational",
    "VICReg",
    "align_uniform",
    "nt_xent",
    "relational",
    "relic",
    "sfrik",
    "vicreg",
]


def nt_xent(
    z1: Tensor, z2: Tensor, temperature: float = 0.5, kind: Kind = "nt_xent", world: World | None = None
) -> Tensor:
    """SimCLR's normalised temperature-scaled cross-entropy over the 2B views (Chen et al. 2020, equation 1): the
    partner of a view against all the others, by cosine / temperature. kind: log_of_mean as in the official code of
    relational reasoning."""
    options = _options(_simclr.Options, temperature=temperature, loss=kind)
    z_KMD, world = _gathered((z1, z2), world, 2)
    with full_precision(z_KMD.device):
        return _simclr.contrast(z_KMD.flatten(0, 1), options.loss, options.temperature, world)[0]


def vicreg(
    z1: Tensor,
    z2: Tensor,
    sim_coeff: float = 25.0,
    std_coeff: float = 25.0,
    cov_coeff: float = 1.0,
    world: World | None = None,
) -> Tensor:
    """Variance-invariance-covariance regularisation (Bardes et al. 2022), with the means and sums of the official
    code."""
    options = _options(_vicreg.Options, sim_coeff=sim_coeff, std_coeff=std_coeff, cov_coeff=cov_coeff)
    z_KMD, world = _gathered((z1, z2), world, 2)
    with full_precision(z_KMD.device):
        return _vicreg.regularized(z_KMD, options, world)[0]


def align_uniform(
    z1: Tensor,
    z2: Tensor,
    sim_coeff: float = 3000.0,
    unif_coeff: float = 1.0,
    scale: float = 2.5,
    world: World | None = None,
) -> Tensor:
    """Alignment and uniformity on the hypersphere (Wang & Isola 2020) of embeddings, which are normalised here.

    The alignment is a mean over dimensions, as in SFRIK's paper, whose defaults these are; Wang & Isola's own loss,
    their align_loss + uniform_loss with t = 2, is sim_coeff=D, scale=2.
    """
    options = _options(_align_uniform.Options, sim_coeff=sim_coeff, unif_coeff=unif_coeff, scale=scale)
    z_KMD, _ = _gathered((z1, z2), world, 2)
    with full_precision(z_KMD.device):
        return _align_uniform.aligned(z_KMD, options)[0]


def sfrik(
    views: Views,
    sim_coeff: float = 4000.0,
    mmd_coeff: float = 1.0,
    weights: Sequence[float] = (1.0, 40.0, 40.0),
    general: Sequence[int] = (0,),
    reg_small: bool = True,
    world: World | None = None,
) -> Tensor:
    """Rotation-invariant kernels (Zheng et al. 2023) of K views [K, B, D], which are normalised here. weights: of the
    Legendre polynomials of degree 1, 2, ...; general: views that the others are compared with."""
    options = _options(
        _sfrik.Options,
        sim_coeff=sim_coeff,
        mmd_coeff=mmd_coeff,
        weights=_listed(weights),
        general=_listed(general),
        reg_small=reg_small,
    )
    z_KMD, world = _gathered(views, world)
    if max(options.general) >= len(z_KMD):
        raise ValueError(f"general = {options.general}: there are {len(z_KMD)} views, 0 to {len(z_KMD) - 1}")
    if z_KMD.shape[2] < 2:
        raise ValueError(f"views {_text(views)}: a kernel on the sphere needs 2 dimensions or more")
    with full_precision(z_KMD.device):
        return _sfrik.regularized(z_KMD, options, world)[0]


def relic(
    online: Views,
    target: Views,
    log_tau: Tensor | float = 0.0,
    bias: Tensor | float = 0.0,
    max_tau: float = 5.0,
    options: _relic.Options | None = None,
    world: World | None = None,
) -> Tensor:
    """ReLIC (Mitrovic et al. 2021) of V online views [V, B, D] against G target views [G, B, D], which are of the first
    G online views and have no gradient: similarities times exp(log_tau), at most max_tau, plus a bias. Give G and V of
    2 or more, or G = V - 1."""
    online_VMD, world = _gathered(online, world)
    target_GMD, _ = _gathered(target, world, least=1)
    if target_GMD.shape[1:] != online_VMD.shape[1:] or len(target_GMD) > len(online_VMD):
        raise ValueError(f"targets {_text(target)} are not those of the first online views {_text(online)}")
    log_tau, bias = (torch.as_tensor(number, device=online_VMD.device) for number in (log_tau, bias))
    with full_precision(online_VMD.device):
        return _relic.compare(online_VMD, target_GMD.detach(), log_tau, bias, max_tau, options or _relic.Options())[0]


def relational(
    views: Views,
    head: RelationModule,
    gamma: float = 2.0,
    alpha: float | None = 0.5,
    labels: Tensor | None = None,
    world: World | None = None,
) -> Tensor:
    """Self-supervised relational reasoning (Patacchiola & Storkey 2020, equation 5) of K views [K, B, D]: the mean
    focal binary cross-entropy of the head's scores over all K (K - 1) B pairs, half of them of one image.

    labels: int64 [B], -1 where unknown; pairs of two images with equal labels count as positive.
    """
    if labels is not None and (not isinstance(labels, Tensor) or labels.is_floating_point()):
        raise ValueError(f"labels are {_kind(labels)}: give a tensor of whole numbers, -1 where unknown")
    options = _options(_relational.Options, gamma=gamma, alpha=alpha)
    z_KMD, world = _gathered(views, world)
    num_views, num_images, _ = z_KMD.shape
    if labels is not None and labels.shape != (num_images // world.rank_info.world_size,):
        raise ValueError(f"labels {list(labels.shape)} are not those of the images of {_text(views)}")
    own = torch.full((num_images,), -1, device=z_KMD.device) if labels is None else world.gather_images(labels)
    couples = _relational.couples(num_views, num_images)
    lo, hi = world.share(len(couples) * num_images)
    pairs = relation.Share(couples, num_images, lo, hi)
    targets = _relational.targets(couples, own, lo, hi, some_known=labels is not None)
    with full_precision(z_KMD.device):
        share, _ = _relational.mean_loss(head, z_KMD, pairs, own, targets, options.gamma, options.alpha, world)
    return world.scale_for_ddp_mean(share)


# ---------------------------------------------------------------------------------------------------- modules


class NTXent(nn.Module):
    """See `nt_xent`."""

    def __init__(self, temperature: float = 0.5, kind: Kind = "nt_xent"):
        super().__init__()
        self.temperature, self.kind = temperature, kind

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        return nt_xent(z1, z2, self.temperature, self.kind)


class VICReg(nn.Module):
    """See `vicreg`."""

    def __init__(self, sim_coeff: float = 25.0, std_coeff: float = 25.0, cov_coeff: float = 1.0):
        super().__init__()
        self.coefficients = sim_coeff, std_coeff, cov_coeff

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        return vicreg(z1, z2, *self.coefficients)


class AlignUniform(nn.Module):
    """See `align_uniform`."""

    def __init__(self, sim_coeff: float = 3000.0, unif_coeff: float = 1.0, scale: float = 2.5):
        super().__init__()
        self.numbers = sim_coeff, unif_coeff, scale

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        return align_uniform(z1, z2, *self.numbers)


class SFRIK(nn.Module):
    """See `sfrik`."""

    def __init__(
        self,
        sim_coeff: float = 4000.0,
        mmd_coeff: float = 1.0,
        weights: Sequence[float] = (1.0, 40.0, 40.0),
        general: Sequence[int] = (0,),
        reg_small: bool = True,
    ):
        super().__init__()
        self.numbers = sim_coeff, mmd_coeff, tuple(weights), tuple(general), reg_small

    def forward(self, views: Views) -> Tensor:
        return sfrik(views, *self.numbers)


class ReLIC(nn.Module):
    """See `relic`; factor and bias of the logits are parameters of this module."""

    def __init__(self, options: _relic.Options | None = None):
        super().__init__()
        self.options = options or _relic.Options()
        log_tau, self.max_tau, bias = _relic.initial_logits(self.options)
        learnt = self.options.learn_temperature
        self.log_tau = nn.Parameter(torch.tensor(log_tau), requires_grad=learnt)
        self.bias = nn.Parameter(torch.tensor(bias), requires_grad=learnt)

    def forward(self, online: Views, target: Views) -> Tensor:
        return relic(online, target, self.log_tau, self.bias, self.max_tau, self.options)


class Relational(nn.Module):
    """See `relational`; the relation head, for representations of `feature_dim`, is a part of this module."""

    def __init__(
        self,
        feature_dim: int,
        hidden: int = 256,
        aggregation: Literal["cat", "sum", "mean", "max"] = "cat",
        gamma: float = 2.0,
        alpha: float | None = 0.5,
    ):
        super().__init__()
        options = _options(_relational.Options, hidden=hidden, aggregation=aggregation, gamma=gamma, alpha=alpha)
        self.gamma, self.alpha = options.gamma, options.alpha
        self.head = RelationModule(feature_dim, options.hidden, options.aggregation)

    def forward(self, views: Views, labels: Tensor | None = None) -> Tensor:
        return relational(views, self.head, self.gamma, self.alpha, labels)


# ---------------------------------------------------------------------------------------------------- views


def _gathered(views: Views, world: World | None, number: int | None = None, least: int = 2) -> tuple[Tensor, World]:
    """The views of the global batch [K, M, D], at least float32, and the ranks that hold them. Raises `ValueError`."""
    if (
        not isinstance(views, Sequence | Tensor)
        or (isinstance(views, Tensor) and not views.ndim)
        or not all(isinstance(view, Tensor) for view in views)
    ):
        given = ", ".join(map(_kind, views)) if isinstance(views, Sequence) else _kind(views)
        raise ValueError(f"views are {given}: give tensors [B, D], or one [K, B, D]")
    shapes = {tuple(view.shape) for view in views}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise ValueError(f"views {_text(views)}: give each as [B, D], all of one shape")
    [(num_images, _)] = shapes
    if len(views) < least or number not in (None, len(views)):
        raise ValueError(f"views {_text(views)}: give {number or f'{least} or more'}")
    z_KBD = views if isinstance(views, Tensor) else torch.stack([*views])
    if not z_KBD.is_floating_point():
        raise ValueError(f"views are {z_KBD.dtype}: give embeddings, in floating point")
    z_KBD = at_least_float32(z_KBD)
    world = world or joined(z_KBD.device)
    if num_images * world.rank_info.world_size < 2:
        raise ValueError(f"views {_text(views)}: one image has no other to be compared with; give 2 or more")
    return world.gather_views(z_KBD), world


def _options(section: type[AnySection], **given: Any) -> AnySection:
    """Raises `UserError`, which is a `ValueError`, of one line."""
    return validate(section, given)


def _listed(numbers: Any) -> Any:
    """As options have it, where it is one."""
    return [*numbers] if isinstance(numbers, Iterable) else numbers


def _kind(given: object) -> str:
    return str(given.dtype) if isinstance(given, Tensor) else type(given).__name__


def _text(views: Views) -> str:
    """The shapes of views, as in [4, 8] and [4, 9]."""
    if isinstance(views, Tensor):
        return str(list(views.shape))
    return " and ".join(str(list(view.shape)) for view in views)
