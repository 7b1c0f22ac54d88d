"""Deep InfoMax (Hjelm et al., ICLR 2019, arXiv:1808.06670).

The features y of an image shall share information with the map M of an early layer: small networks T score pairs (y, M)
of one image against pairs of two images, place by place (local) and as a whole (global). A third network tells y from
draws of a uniform prior.
"""

from functools import reduce
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ssl_dist.config import NonNegativeFloat, PositiveInt, Section
from ssl_dist.device import to_device
from ssl_dist.errors import UserError
from ssl_dist.keys import METHOD, hash64, uniform_rows
from ssl_dist.methods.base import Backbone, Batch, Info, Output, SSLMethod, World
from ssl_dist.nn.layers import at_least_float32


class Options(Section):
    alpha: NonNegativeFloat = Field(0.0, description="weight of the global term; 0: left out")
    beta: NonNegativeFloat = Field(1.0, description="weight of the local term; 0: left out")
    gamma: NonNegativeFloat = Field(0.1, description="weight of the prior term; 0: left out")
    hidden: PositiveInt = Field(256, description="hidden units of the local and the global network")
    prior: Literal["cooperative", "adversarial"] = Field(
        "cooperative",
        description="cooperative: the backbone lowers the prior term as its network does, as in the official code of "
        "relational reasoning; adversarial: it raises it, as in the paper's equation 7",
    )


# ---------------------------------------------------------------------------------------------------- losses


def jensen_shannon(scores: Tensor) -> Tensor:
    """Minus the Jensen-Shannon estimate of mutual information (equation 4) from scores T [..., 2]: of pairs of one
    image and of pairs of two images. Means run over all entries."""
    joint, marginal = at_least_float32(scores).unbind(-1)
    return F.softplus(-joint).mean() + F.softplus(marginal).mean()


def prior_matching(drawn: Tensor, encoded: Tensor) -> Tensor:
    """Minus the objective of equation 7 from the logits of D for draws of the prior and for features."""
    drawn, encoded = at_least_float32(drawn), at_least_float32(encoded)
    return -(F.logsigmoid(drawn).mean() + F.logsigmoid(-encoded).mean())


# ---------------------------------------------------------------------------------------------------- networks


def pair_scores(last: nn.Linear, hidden: Tensor) -> Tensor:
    """The last layer's scores [..., 2] from hidden units [..., 2, H] of two pairs that share a map.

    The gradients of the two kinds of pairs nearly cancel. Written as one score and what the other differs by, they do
    so place by place, before they are summed, and torch's sum is a tree where a matrix product adds row after row:
    float32 keeps its digits.
    """
    one, other = hidden.unbind(-2)
    score = (one * last.weight[0]).sum(-1) + last.bias
    return torch.stack([score, score + ((other - one) * last.weight[0]).sum(-1)], -1)


class LocalNet(nn.Module):
    """Scores every place of a map against features: linear layers of (map, features) to `hidden`, `hidden` and 1."""

    def __init__(self, feature_dim: int, channels: int, hidden: int):
        super().__init__()
        self.l0 = nn.Linear(channels + feature_dim, hidden)
        self.l1 = nn.Linear(hidden, hidden)
        self.l2 = nn.Linear(hidden, 1)

    def forward(self, maps_BCHW: Tensor, y_B2D: Tensor) -> Tensor:
        """Scores [B, H, W, 2] of each map with two features."""
        of_map, of_y = self.l0.weight.tensor_split([maps_BCHW.shape[1]], 1)
        hidden = F.linear(maps_BCHW.movedim(1, -1), of_map, self.l0.bias)[:, :, :, None]
        hidden = F.relu(hidden + F.linear(y_B2D, of_y)[:, None, None])
        return pair_scores(self.l2, F.relu(self.l1(hidden)))


class GlobalNet(nn.Module):
    """Scores a whole map against features: 3x3 convolutions to 64 and 32, pooled to 16x16; linear layers of (features,
    map) to `hidden`, `hidden` and 1."""

    def __init__(self, feature_dim: int, channels: int, hidden: int):
        super().__init__()
        self.c0 = nn.Conv2d(channels, 64, 3)
        self.c1 = nn.Conv2d(64, 32, 3)
        self.pool = nn.AdaptiveAvgPool2d(16)
        self.l0 = nn.Linear(feature_dim + 32 * 16 * 16, hidden)
        self.l1 = nn.Linear(hidden, hidden)
        self.l2 = nn.Linear(hidden, 1)

    def forward(self, maps_BCHW: Tensor, y_B2D: Tensor) -> Tensor:
        """Scores [B, 2] of each map with two features."""
        of_y, of_map = self.l0.weight.tensor_split([y_B2D.shape[-1]], 1)
        whole = self.pool(self.c1(F.relu(self.c0(maps_BCHW)))).flatten(1)
        hidden = F.relu(F.linear(whole, of_map, self.l0.bias)[:, None] + F.linear(y_B2D, of_y))
        return pair_scores(self.l2, F.relu(self.l1(hidden)))


class PriorNet(nn.Module):
    """The logit that a vector [B, D] was drawn from the prior, [B, 1]."""

    def __init__(self, feature_dim: int):
        super().__init__()
        self.l0 = nn.Linear(feature_dim, 512)
        self.l1 = nn.Linear(512, 128)
        self.l2 = nn.Linear(128, 1)

    def forward(self, y_BD: Tensor) -> Tensor:
        return self.l2(F.relu(self.l1(F.relu(self.l0(y_BD)))))


class Networks(NamedTuple):
    """Of the terms that have a weight: another network would be parameters without gradients."""

    global_net: GlobalNet | None
    local_net: LocalNet | None
    prior_net: PriorNet | None


def networks(feature_dim: int, channels: int, options: Options) -> Networks:
    return Networks(
        GlobalNet(feature_dim, channels, options.hidden) if options.alpha else None,
        LocalNet(feature_dim, channels, options.hidden) if options.beta else None,
        PriorNet(feature_dim) if options.gamma else None,
    )


def weighted_terms(
    nets: Networks, options: Options, y_BD: Tensor, y_before_BD: Tensor, maps_BCHW: Tensor, drawn_BD: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and its terms by name before they are weighted: means over these images. y_before: the features of
    another image than the map's; drawn: from the prior."""
    y_B2D = torch.stack([y_BD, y_before_BD], 1)
    terms, weights = {}, {"global": options.alpha, "local": options.beta, "prior": options.gamma}
    if nets.global_net is not None:
        terms["global"] = jensen_shannon(nets.global_net(maps_BCHW, y_B2D))
    if nets.local_net is not None:
        terms["local"] = jensen_shannon(nets.local_net(maps_BCHW, y_B2D))
    if nets.prior_net is not None:
        # Twice its constant copy minus y: the value of y, the opposite gradient.
        encoded = y_BD if options.prior == "cooperative" else 2 * y_BD.detach() - y_BD
        terms["prior"] = prior_matching(nets.prior_net(drawn_BD), nets.prior_net(encoded))
    return reduce(torch.add, (weights[name] * term for name, term in terms.items())), terms


# ---------------------------------------------------------------------------------------------------- method


class Method(SSLMethod[Options]):
    num_views = 1

    def __init__(self, backbone: Backbone, info: Info, options: Options):
        super().__init__(backbone, info, options)
        if not info.stages:
            raise UserError(
                "backbone.name: infomax needs maps of an early layer and this backbone gives none; try conv4"
            )
        info.require_two_images("infomax pairs an image with another one")
        if not (options.alpha or options.beta or options.gamma):
            raise UserError("method.options.beta = 0: every term is left out; give alpha, beta or gamma a weight")
        # The first map, as in the official code of relational reasoning.
        self.stage, channels = next(iter(info.stages.items()))
        self.global_net, self.local_net, self.prior_net = networks(info.feature_dim, channels, options)

    def explain(self, world_size: int, device: str) -> dict[str, str]:
        options, num_pairs = self.options, self.info.batch_size
        weights = f"global {options.alpha:g}, local {options.beta:g}, prior {options.gamma:g} ({options.prior})"
        return {
            "pairs": f"features and maps, {num_pairs} of one image and {num_pairs} of two a step; weights {weights}"
        }

    def nondeterministic(self) -> str:
        if self.global_net is None:
            return ""
        return (
            f"the 16x16 pooling behind method.options.alpha = {self.options.alpha:g} has no deterministic gradient on "
            "a GPU; give method.options.alpha=0"
        )

    @classmethod
    def warm_up(cls, options: Options, dtype: torch.dtype) -> None:
        uniform_rows(hash64(0), np.zeros(1, np.int64), 1)

    def forward(self, batch: Batch, world: World) -> Output:
        """Metrics: the terms of the loss before they are weighted."""
        with self.keyed(batch, batch.view_ids[0]):
            y, maps = self.backbone.forward_stages(batch.views[0][0])
        y = at_least_float32(y)
        nets = Networks(self.global_net, self.local_net, self.prior_net)
        before = self.of_image_before(y, batch, world)
        # Ranks hold equally many images, so the mean of their means is that of the global batch.
        loss, terms = weighted_terms(nets, self.options, y, before, maps[self.stage], self.drawn(batch, y))
        metrics = {f"loss_{name}": world.all_reduce_mean(term.detach()) for name, term in terms.items()}
        return Output(loss, metrics, representations=world.gather_images(y.detach()))

    def of_image_before(self, y_BD: Tensor, batch: Batch, world: World) -> Tensor:
        """The features of the image before each one in the global batch, the last before the first.

        The pairs of two images are those of the official code, (y, map of the next image), seen from the map:
        features are gathered over the ranks, and maps, which are much larger, are not.
        """
        y_MD = world.gather_views(y_BD[None])[0]
        own = (world.gather_images(batch.positions) == batch.positions[:, None]).int().argmax(1)
        return y_MD.roll(1, 0)[own]

    def drawn(self, batch: Batch, like: Tensor) -> Tensor:
        """Draws of the prior, uniform in [0, 1): for every image a function of the seed, the step and the image."""
        key = hash64(self.info.seed, METHOD, batch.step)
        return to_device(uniform_rows(key, batch.image_ids.numpy(), like.shape[1]), like.device).to(like.dtype)
