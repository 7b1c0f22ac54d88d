"""The losses as functions."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ssl_dist.distributed.world import World, joined
from ssl_dist.kernels import relation, sinkhorn
from ssl_dist.losses.arguments import (
    Views,
    described,
    gathered,
    labelled,
    listed,
    options_of,
    predictions,
    shapes_of,
    stacked,
)
from ssl_dist.methods import align_uniform as _align_uniform
from ssl_dist.methods import barlow_twins as _barlow_twins
from ssl_dist.methods import byol as _byol
from ssl_dist.methods import deepcluster as _deepcluster
from ssl_dist.methods import dino as _dino
from ssl_dist.methods import lejepa as _lejepa
from ssl_dist.methods import mae as _mae
from ssl_dist.methods import mocov2 as _mocov2
from ssl_dist.methods import mocov3 as _mocov3
from ssl_dist.methods import relational as _relational
from ssl_dist.methods import relic as _relic
from ssl_dist.methods import sela as _sela
from ssl_dist.methods import sfrik as _sfrik
from ssl_dist.methods import simclr as _simclr
from ssl_dist.methods import simsiam as _simsiam
from ssl_dist.methods import vicreg as _vicreg
from ssl_dist.methods.relational import RelationModule
from ssl_dist.nn.layers import at_least_float32, full_precision
from ssl_dist.nn.patches import patchified

Kind = Literal["nt_xent", "log_of_mean"]


def nt_xent(
    z1: Tensor, z2: Tensor, temperature: float = 0.5, kind: Kind = "nt_xent", world: World | None = None
) -> Tensor:
    """SimCLR's normalised temperature-scaled cross-entropy over the 2B views (Chen et al. 2020, equation 1): the
    partner of a view against all the others, by cosine / temperature. kind: log_of_mean as in the official code of
    relational reasoning."""
    options = options_of(_simclr.Options, temperature=temperature, loss=kind)
    z_KMD, world = gathered((z1, z2), world, 2)
    with full_precision(z_KMD.device):
        return _simclr.contrast(z_KMD.flatten(0, 1), options, world)[0]


def dcl(
    z1: Tensor, z2: Tensor, temperature: float = 0.1, sigma: float | None = None, world: World | None = None
) -> Tensor:
    """Decoupled contrastive learning (Yeh et al. 2022): `nt_xent` without the partner among the others. sigma: partners
    that are less alike weigh more, by cosine / sigma, which is 0.5 in DCLW; None: all weigh the same."""
    weights = {"loss": "dcl"} if sigma is None else {"loss": "dclw", "sigma": sigma}
    options = options_of(_simclr.Options, temperature=temperature, **weights)
    z_KMD, world = gathered((z1, z2), world, 2)
    with full_precision(z_KMD.device):
        return _simclr.contrast(z_KMD.flatten(0, 1), options, world)[0]


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
    options = options_of(_vicreg.Options, sim_coeff=sim_coeff, std_coeff=std_coeff, cov_coeff=cov_coeff)
    z_KMD, world = gathered((z1, z2), world, 2)
    with full_precision(z_KMD.device):
        return _vicreg.regularized(z_KMD, options, world)[0]


def barlow_twins(z1: Tensor, z2: Tensor, lambd: float = 0.0051, world: World | None = None) -> Tensor:
    """Barlow Twins (Zbontar et al. 2021, equation 1): the sum over the cross-correlation matrix, as in the official
    code. lambd: weight of the entries beside the diagonal."""
    options = options_of(_barlow_twins.Options, lambd=lambd)
    z_KMD, world = gathered((z1, z2), world, 2)
    with full_precision(z_KMD.device):
        return _barlow_twins.decorrelated(z_KMD, options, world)[0]


def byol(predicted: Views, target: Views) -> Tensor:
    """BYOL (Grill et al. 2020, equation 2): squared distances of the unit vectors of both views' predictions [2, B, D]
    and the target's embeddings [2, B, D], which have no gradient; each prediction is of the other view."""
    predicted_VBD, target_VBD = predictions(predicted, target)
    with full_precision(predicted_VBD.device):
        return _byol.symmetric(predicted_VBD, target_VBD)


def simsiam(predicted: Views, embedded: Views) -> Tensor:
    """SimSiam (Chen & He 2021, equations 1 to 3): minus the cosine of both views' predictions [2, B, D] and embeddings
    [2, B, D], which have no gradient; each prediction is of the other view."""
    predicted_VBD, z_VBD = predictions(predicted, embedded)
    with full_precision(predicted_VBD.device):
        return _simsiam.negative_cosine(predicted_VBD, z_VBD)


def mocov2(query: Tensor, key: Tensor, queue: Tensor, temperature: float = 0.2) -> Tensor:
    """MoCo v2 (Chen et al. 2020): queries [B, D] pick their keys [B, D] out of those and of a queue of unit vectors
    [Q, D]. Only queries have a gradient."""
    options = options_of(_mocov2.Options, temperature=temperature)
    query_BD, key_BD = predictions(query, key, num_views=None)
    if not isinstance(queue, Tensor) or queue.ndim != 2 or queue.shape[1] != query_BD.shape[1]:
        raise ValueError(f"queue is {described(queue)}: give [Q, {query_BD.shape[1]}]")
    with full_precision(query_BD.device):
        z = _mocov2.logits(query_BD, key_BD, queue.detach().to(query_BD.dtype), options.temperature)
        return nn.functional.cross_entropy(z, torch.zeros(len(z), dtype=torch.int64, device=z.device))


def mocov3(query: Views, key: Views, temperature: float = 1.0, world: World | None = None) -> Tensor:
    """MoCo v3 (Chen, Xie & He 2021, equation 1): both views' predictions [2, B, D] pick the target's embeddings of the
    other view [2, B, D], which have no gradient, out of those of the batch; times 2 temperature, both ways added."""
    options = options_of(_mocov3.Options, temperature=temperature)
    predictions(query, key)
    query_KMD, world = gathered(query, world, 2)
    key_KMD, _ = gathered(key, world, 2)
    with full_precision(query_KMD.device):
        return _mocov3.contrast(query_KMD, key_KMD.detach(), options.temperature, world)[0]


def mae(predicted: Tensor, images: Tensor, hidden: Tensor, patch_size: int = 16, norm_pix_loss: bool = True) -> Tensor:
    """MAE (He et al. 2022, section 3): the mean squared error of predicted patches [B, n, patch_size^2 C], row by
    row, channels last within, over those of images [B, C, S, S] that are hidden: [B, n], true or 1, as many of each."""
    if not isinstance(images, Tensor) or images.ndim != 4 or any(side % patch_size for side in images.shape[2:]):
        raise ValueError(f"images are {described(images)}: give [B, C, S, S] of whole patches of {patch_size} pixels")
    patches = patchified(at_least_float32(images), patch_size)
    for name, x, shape in (("predicted", predicted, patches.shape), ("hidden", hidden, patches.shape[:2])):
        if not isinstance(x, Tensor) or x.shape != shape:
            raise ValueError(f"{name} is {described(x)}: give {list(shape)}")
    with full_precision(patches.device):
        return _mae.hidden_error(at_least_float32(predicted), patches, hidden.to(patches.dtype), norm_pix_loss)


def lejepa(
    views: Views,
    step: int,
    seed: int = 0,
    lambd: float = 0.05,
    slices: int = 1024,
    knots: int = 17,
    t_max: float = 5.0,
    global_views: Sequence[int] | None = None,
    world: World | None = None,
) -> Tensor:
    """LeJEPA (Balestriero & LeCun 2025) of K views [K, B, D]: (1 - lambd) times the mean squared distance to the mean
    of the global views (None: of all), plus lambd times `sigreg`."""
    numbers = {"lambd": lambd, "slices": slices, "knots": knots, "t_max": t_max}
    options = options_of(_lejepa.Options, **numbers, global_views=listed(global_views))
    z_KMD, world = gathered(views, world)
    chosen = [*range(len(z_KMD))] if options.global_views is None else options.global_views
    if max(chosen) >= len(z_KMD) or len(set(chosen)) < len(chosen):
        raise ValueError(f"global_views = {chosen}: give different numbers of {len(z_KMD)} views, from 0 on")
    with full_precision(z_KMD.device):
        return _lejepa.regularized(z_KMD, chosen, seed, step, options, world)[0]


def sigreg(
    views: Views,
    step: int,
    seed: int = 0,
    slices: int = 1024,
    knots: int = 17,
    t_max: float = 5.0,
    world: World | None = None,
) -> Tensor:
    """Sketched isotropic Gaussian regularisation (Balestriero & LeCun 2025) of K views [K, B, D], one or more: how far
    each is from a standard normal distribution along random directions, which are a function of seed and step. Give
    every training step another number, the same on all ranks."""
    options = options_of(_lejepa.Options, slices=slices, knots=knots, t_max=t_max)
    z_KMD, world = gathered(views, world, least=1)
    with full_precision(z_KMD.device):
        return _lejepa.sigreg(z_KMD, seed, step, options, world)


def dino(
    logits: Views,
    target: Views,
    center: Tensor,
    temperature: float = 0.1,
    target_temperature: float = 0.04,
) -> Tensor:
    """DINO (Caron et al. 2021, equation 3): the outputs of V views [V, B, K] against the target's of the first G of
    them [G, B, K], which have no gradient, are centred by [K], see `dino_center`, and sharpened. A view is not compared
    with itself."""
    options = options_of(_dino.Options, temperature=temperature, target_temperature=target_temperature)
    logits_VBK, target_GBK = stacked(logits), stacked(target)
    if len(logits_VBK) < 2 or len(target_GBK) > len(logits_VBK):
        shapes = f"logits {shapes_of(logits)} and targets {shapes_of(target)}"
        raise ValueError(f"{shapes}: give 2 views or more, and no more targets")
    if target_GBK.shape[1:] != logits_VBK.shape[1:] or center.shape != logits_VBK.shape[2:]:
        shapes = f"targets {shapes_of(target)} and center {list(center.shape)}"
        raise ValueError(f"{shapes} are not those of {shapes_of(logits)}")
    with full_precision(logits_VBK.device):
        q_GBK = ((target_GBK.detach() - center) / options.target_temperature).softmax(-1)
        large = [*range(len(q_GBK))]
        return _dino.distillation([*logits_VBK], q_GBK, large, options.temperature) / logits_VBK.shape[1]


@torch.no_grad()
def dino_center(target: Views, center: Tensor, momentum: float = 0.9, world: World | None = None) -> Tensor:
    """The centre [K] after a step (equation 4): a moving average of the mean output of the target [G, B, K] over the
    batch of all ranks."""
    target_GBK = stacked(target)
    world = world or joined(target_GBK.device)
    return torch.lerp(world.all_reduce_mean(target_GBK.mean((0, 1))).to(center), center, momentum)


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
    options = options_of(_align_uniform.Options, sim_coeff=sim_coeff, unif_coeff=unif_coeff, scale=scale)
    z_KMD, _ = gathered((z1, z2), world, 2)
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
    options = options_of(
        _sfrik.Options,
        sim_coeff=sim_coeff,
        mmd_coeff=mmd_coeff,
        weights=listed(weights),
        general=listed(general),
        reg_small=reg_small,
    )
    z_KMD, world = gathered(views, world)
    if max(options.general) >= len(z_KMD):
        raise ValueError(f"general = {options.general}: there are {len(z_KMD)} views, 0 to {len(z_KMD) - 1}")
    if z_KMD.shape[2] < 2:
        raise ValueError(f"views {shapes_of(views)}: a kernel on the sphere needs 2 dimensions or more")
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
    online_VMD, world = gathered(online, world)
    target_GMD, _ = gathered(target, world, least=1)
    if target_GMD.shape[1:] != online_VMD.shape[1:] or len(target_GMD) > len(online_VMD):
        raise ValueError(f"targets {shapes_of(target)} are not those of the first online views {shapes_of(online)}")
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
        raise ValueError(f"labels are {described(labels)}: give a tensor of whole numbers, -1 where unknown")
    options = options_of(_relational.Options, gamma=gamma, alpha=alpha)
    z_KMD, world = gathered(views, world)
    num_views, num_images, _ = z_KMD.shape
    if labels is not None and labels.shape != (num_images // world.rank_info.world_size,):
        raise ValueError(f"labels {list(labels.shape)} are not those of the images of {shapes_of(views)}")
    own = torch.full((num_images,), -1, device=z_KMD.device) if labels is None else world.gather_images(labels)
    couples = _relational.couples(num_views, num_images)
    lo, hi = world.share(len(couples) * num_images)
    pairs = relation.Share(couples, num_images, lo, hi)
    targets = _relational.targets(couples, own, lo, hi, some_known=labels is not None)
    with full_precision(z_KMD.device):
        share, _ = _relational.mean_loss(head, z_KMD, pairs, own, targets, options.gamma, options.alpha, world)
    return world.scale_for_ddp_mean(share)


def deepcluster(logits: Tensor, labels: Tensor, sizes: Tensor, world: World | None = None) -> Tensor:
    """DeepCluster's cross-entropy (Caron et al. 2018) of logits [B, K] with clusters int64 [B], in which an image of a
    cluster of n of the N images weighs 1 - n / N: as if each were drawn equally often. sizes: n of all images [K]."""
    [(logits_BK, labels_B)] = labelled([logits], [labels])
    if not isinstance(sizes, Tensor) or sizes.shape != logits_BK.shape[1:] or sizes.sum() <= 0 or (sizes < 0).any():
        raise ValueError(
            f"sizes are {described(sizes)}: give the number of images of each of {logits_BK.shape[1]} clusters"
        )
    weight_K = (1 - sizes.double() / sizes.sum()).to(logits_BK)
    world = world or joined(logits_BK.device)
    with full_precision(logits_BK.device):
        loss_share, weight_share = _deepcluster.weighted_cross_entropy(logits_BK, labels_B, weight_K)
    return world.scale_for_ddp_mean(loss_share / world.all_reduce_sum(weight_share))


def sela(logits: Views, labels: Views) -> Tensor:
    """SeLa's cross-entropy (Asano et al. 2020, equation 2): the mean over H heads of logits [H, B, K] with labels of
    their own, int64 [H, B], by `sela_labels`."""
    pairs = labelled(logits, labels)
    with full_precision(pairs[0][0].device):
        return _sela.heads_loss([z for z, _ in pairs], torch.stack([y for _, y in pairs])).mean()


def sela_labels(scores: Tensor, lamb: float = 25.0, tolerance: float = 0.1, world: World | None = None) -> Tensor:
    """Labels int64 [n] of images by the scores [n, K] of a head of SeLa: the optimal transport to K clusters of equal
    size (equations 4 to 8), by Sinkhorn-Knopp in float64. Give the scores of all images of the data set, over several
    ranks each its part. `tolerance`: of the error, a sum over all images. Raises `Fault` for scores that are not
    finite."""
    if not isinstance(scores, Tensor) or scores.ndim != 2 or not scores.is_floating_point() or scores.shape[1] < 2:
        raise ValueError(f"scores are {described(scores)}: give [n, K], in floating point, of 2 clusters or more")
    options = options_of(_sela.Options, lamb=lamb, tolerance=tolerance)
    world = world or joined(scores.device)
    num_rows = int(world.all_reduce_sum(torch.tensor(len(scores), device=scores.device)))
    if num_rows < scores.shape[1]:
        raise ValueError(f"scores are {described(scores)}: {num_rows} images cannot fill {scores.shape[1]} clusters")
    scores = scores.detach().to(torch.float64, copy=True)  # they are overwritten
    return sinkhorn.sinkhorn_knopp(scores, num_rows, options.lamb, options.tolerance, world, "of the labels").labels
