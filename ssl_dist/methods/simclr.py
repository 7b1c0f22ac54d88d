"""SimCLR (Chen, Kornblith, Norouzi & Hinton, ICML 2020, arXiv:2002.05709).

Two views of every image are encoded and projected. To every view, all 2M - 1 others are candidates, and the other view
of its image, the partner, shall be the most similar one.

Losses dcl and dclw: decoupled contrastive learning (Yeh, Hong, Hsu, Liu, Chen & LeCun, ECCV 2022, arXiv:2110.06848).
"""

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ssl_dist.config import PositiveFloat, PositiveInt, Section
from ssl_dist.methods.base import Backbone, Batch, Info, Output, SSLMethod, World
from ssl_dist.nn.layers import full_precision


class Options(Section):
    loss: Literal["nt_xent", "log_of_mean", "dcl", "dclw"] = Field(
        "nt_xent",
        description="nt_xent: minus the mean log probability of the partner, as in the paper; log_of_mean: minus the "
        "log of its mean probability, as in the official code of relational reasoning; dcl: the partner is no "
        "candidate; dclw: partners that are less alike weigh more, too",
    )
    temperature: PositiveFloat = Field(0.5, description="what cosine similarities are divided by; dcl and dclw: 0.1")
    sigma: PositiveFloat = Field(0.5, description="dclw: what they are divided by for the weights")
    projector: Annotated[list[PositiveInt], Field(min_length=1)] = Field(
        default_factory=lambda: [256, 64], description="widths of the projector's layers, the embedding's the last"
    )
    activation: Literal["relu", "leaky_relu"] = Field("relu", description="between the projector's layers")
    last_bias: bool = Field(False, description="whether the projector's last layer has a bias")
    batchnorm: Literal["both_views", "one_view"] = Field(
        "both_views", description="what its statistics run over; one_view: as in SFRIK's baseline"
    )


ACTIVATIONS = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU}


def candidates(z_ND: Tensor, temperature: float, lo: int = 0, hi: int | None = None) -> tuple[Tensor, Tensor]:
    """For the anchors lo..hi-1: cosine similarity to each of the N rows, divided by the temperature, [hi - lo, N], -inf
    to itself; and the row of the partner, [hi - lo].

    z: N = 2M embeddings, view-major, so that rows i and i + M are the two views of an image.
    """
    unit, rows = F.normalize(z_ND, dim=1), torch.arange(len(z_ND), device=z_ND.device)
    anchors = rows[lo:hi]
    logits = unit[anchors] @ unit.T / temperature
    return logits.masked_fill(anchors[:, None] == rows, -torch.inf), (anchors + len(rows) // 2) % len(rows)


def log_probability(logits: Tensor, partner: Tensor) -> Tensor:
    """Of the partner among an anchor's candidates: log of its exponential over the sum of all of theirs."""
    return -F.cross_entropy(logits, partner, reduction="none")


def decoupled(logits: Tensor, partner: Tensor) -> Tensor:
    """Log of the partner's exponential over the sum of those of the other candidates (DCL)."""
    of_partner = logits.gather(1, partner[:, None])
    return of_partner[:, 0] - logits.scatter(1, partner[:, None], -torch.inf).logsumexp(1)


def minus_mean(score_N: Tensor, z_ND: Tensor, options: Options) -> Tensor:
    """Of `log_probability` the normalised temperature-scaled cross-entropy (equation 1), of `decoupled` DCL."""
    return -score_N.mean()


def log_of_mean(score_N: Tensor, z_ND: Tensor, options: Options) -> Tensor:
    """Minus the log of the mean probability; anchors that find their partner weigh more than in `minus_mean`."""
    return math.log(len(score_N)) - torch.logsumexp(score_N, 0)


def weighted(score_N: Tensor, z_ND: Tensor, options: Options) -> Tensor:
    """DCL whose logit of the partner is multiplied by w = 2 - exp(cosine / sigma) / mean exp(cosine / sigma)
    (DCLW)."""
    unit = F.normalize(z_ND, dim=1)
    cosine_N = (unit * unit.roll(len(unit) // 2, 0)).sum(1)
    weight_N = 2 - len(cosine_N) * (cosine_N / options.sigma).softmax(0)
    return -(score_N + (weight_N - 1) * cosine_N / options.temperature).mean()


# A loss: the score of every anchor, and what it makes of all scores and embeddings.
LOSSES = {
    "nt_xent": (log_probability, minus_mean),
    "log_of_mean": (log_probability, log_of_mean),
    "dcl": (decoupled, minus_mean),
    "dclw": (decoupled, weighted),
}


def contrast(z_ND: Tensor, options: Options, world: World) -> tuple[Tensor, Tensor]:
    """The loss, and the accuracy in percent, of the embeddings of the global batch (as of `candidates`); each rank
    compares its even share of the anchors with all rows."""
    score, loss = LOSSES[options.loss]
    lo, hi = world.share(len(z_ND))
    logits, partner = candidates(z_ND, options.temperature, lo, hi)
    share = score(logits, partner)
    score_N = world.all_reduce_sum_with_grad(F.pad(share, (lo, len(z_ND) - hi)))  # one number an anchor
    correct = world.all_reduce_sum((logits.detach().argmax(1) == partner).sum())
    return loss(score_N, z_ND, options), 100 * correct / len(z_ND)


class Method(SSLMethod[Options]):
    num_views = 2

    def __init__(self, backbone: Backbone, info: Info, options: Options):
        super().__init__(backbone, info, options)
        info.require_two_images("simclr compares a view with those of other images")
        self.views_together = options.batchnorm == "both_views"
        self.projector = self.mlp_on_features(options.projector, options.last_bias, ACTIVATIONS[options.activation])

    def explain(self, world_size: int, device: str) -> dict[str, str]:
        rows = self.num_views * self.info.batch_size
        loss = f"{self.options.loss}, temperature {self.options.temperature:g}"
        return {"similarities": f"{rows} x {rows} a step, {-(-rows // world_size)} x {rows} a rank; {loss}"}

    def forward(self, batch: Batch, world: World) -> Output:
        """Metrics: accuracy, how often the partner is the most similar candidate, in percent."""
        z_ND = self.gathered(batch, world, lambda images: self.projector(self.backbone(images))).flatten(0, 1)
        with full_precision(z_ND.device):  # exponentials of similarities: never in half precision
            loss, accuracy = contrast(z_ND, self.options, world)
        return Output(loss, {"accuracy": accuracy}, representations=z_ND.detach())
