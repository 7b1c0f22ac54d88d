"""The losses as modules; those with networks of their own hold them."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ssl_dist.config import validate
from ssl_dist.distributed.world import joined
from ssl_dist.losses.arguments import Views
from ssl_dist.losses.functional import Kind, align_uniform, nt_xent, relational, relic, sfrik, vicreg
from ssl_dist.methods import infomax as _infomax
from ssl_dist.methods import relational as _relational
from ssl_dist.methods import relic as _relic
from ssl_dist.methods.relational import RelationModule
from ssl_dist.nn.layers import at_least_float32, full_precision


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
        options = validate(
            _relational.Options, {"hidden": hidden, "aggregation": aggregation, "gamma": gamma, "alpha": alpha}
        )
        self.gamma, self.alpha = options.gamma, options.alpha
        self.head = RelationModule(feature_dim, options.hidden, options.aggregation)

    def forward(self, views: Views, labels: Tensor | None = None) -> Tensor:
        return relational(views, self.head, self.gamma, self.alpha, labels)


class DeepInfoMax(nn.Module):
    """Deep InfoMax (Hjelm et al. 2019): features [B, D] share information with maps [B, C, H, W] of an early layer of
    the same images. Its networks are parts of this module: weights alpha of the global term (equation 4 on whole
    maps), beta of the local one (on their places), gamma of the prior (equation 7); 0 leaves one out."""

    def __init__(
        self,
        feature_dim: int,
        channels: int,
        alpha: float = 0.0,
        beta: float = 1.0,
        gamma: float = 0.1,
        hidden: int = 256,
        prior: Literal["cooperative", "adversarial"] = "cooperative",
    ):
        """Raises `ValueError`. prior: `ssl-dist keys method.options.prior` of infomax says which is whose."""
        super().__init__()
        given = {"alpha": alpha, "beta": beta, "gamma": gamma, "hidden": hidden, "prior": prior}
        self.options = validate(_infomax.Options, given)
        if not (alpha or beta or gamma):
            raise ValueError("alpha, beta and gamma are 0: every term is left out; give one a weight")
        self.global_net, self.local_net, self.prior_net = _infomax.networks(feature_dim, channels, self.options)

    def forward(self, features: Tensor, maps: Tensor, drawn: Tensor | None = None) -> Tensor:
        """drawn: samples of the prior [B, D], uniform in [0, 1); None: drawn by torch's generator."""
        if features.ndim != 2 or maps.ndim != 4 or len(features) != len(maps):
            raise ValueError(
                f"features {list(features.shape)} and maps {list(maps.shape)}: give [B, D] and [B, C, H, W]"
            )
        features, world = at_least_float32(features), joined(features.device)
        of_all = world.gather_views(features[None])[0]
        if len(of_all) < 2:
            raise ValueError(
                f"features {list(features.shape)}: one image has no other to be paired with; give 2 or more"
            )
        first = world.rank_info.rank * len(features)
        before = of_all.roll(1, 0)[first : first + len(features)]
        drawn = torch.rand_like(features) if drawn is None else drawn
        with full_precision(features.device):
            nets = _infomax.Networks(self.global_net, self.local_net, self.prior_net)
            return _infomax.weighted_terms(nets, self.options, features, before, at_least_float32(maps), drawn)[0]
