"""SimCLR (Chen, Kornblith, Norouzi & Hinton, ICML 2020, arXiv:2002.05709).

Two views of every image are encoded and projected. To every view, all 2M - 1 others are candidates, and the other view
of its image, the partner, shall be the most similar one.
"""

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ssl_dist.config import PositiveFloat, PositiveInt, Section
from ssl_dist.methods.base import Backbone, Batch, Info, Output, SSLMethod, World
from ssl_dist.nn.layers import full_precision, mlp


class Options(Section):
    loss: Literal["nt_xent", "log_of_mean"] = Field(
        "nt_xent",
        description="nt_xent: minus the mean log probability of the partner, as in the paper; log_of_mean: minus the "
        "log of its mean probability, as in the official code of relational reasoning",
    )
    temperature: PositiveFloat = Field(0.5, description="what cosine similarities are divided by")
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


def nt_xent(log_probability_N: Tensor) -> Tensor:
    """The normalised temperature-scaled cross-entropy (equation 1) from every anchor's log probability of its partner,
    which is the softmax over its candidates."""
    return -log_probability_N.mean()


def log_of_mean(log_probability_N: Tensor) -> Tensor:
    """Minus the log of the mean probability; anchors that find their partner weigh more than in `nt_xent`."""
    return math.log(len(log_probability_N)) - torch.logsumexp(log_probability_N, 0)


LOSSES = {"nt_xent": nt_xent, "log_of_mean": log_of_mean}


def contrast(z_ND: Tensor, kind: str, temperature: float, world: World) -> tuple[Tensor, Tensor]:
    """The loss of `kind` in `LOSSES`, and the accuracy in percent, of the embeddings of the global batch (as of
    `candidates`); each rank compares its even share of the anchors with all rows."""
    lo, hi = world.share(len(z_ND))
    logits, partner = candidates(z_ND, temperature, lo, hi)
    share = -F.cross_entropy(logits, partner, reduction="none")
    log_probability = world.all_reduce_sum_with_grad(F.pad(share, (lo, len(z_ND) - hi)))  # one number an anchor
    correct = world.all_reduce_sum((logits.detach().argmax(1) == partner).sum())
    return LOSSES[kind](log_probability), 100 * correct / len(z_ND)


class Method(SSLMethod[Options]):
    num_views = 2

    def __init__(self, backbone: Backbone, info: Info, options: Options):
        super().__init__(backbone, info, options)
        info.require_two_images("simclr compares a view with those of other images")
        self.views_together = options.batchnorm == "both_views"
        self.projector = mlp([info.feature_dim, *options.projector], options.last_bias, ACTIVATIONS[options.activation])

    def explain(self, world_size: int, device: str) -> dict[str, str]:
        rows = self.num_views * self.info.batch_size
        loss = f"{self.options.loss}, temperature {self.options.temperature:g}"
        return {"similarities": f"{rows} x {rows} a step, {-(-rows // world_size)} x {rows} a rank; {loss}"}

    def forward(self, batch: Batch, world: World) -> Output:
        """Metrics: accuracy, how often the partner is the most similar candidate, in percent."""
        z_ND = self.gathered(batch, world, lambda images: self.projector(self.backbone(images))).flatten(0, 1)
        with full_precision(z_ND.device):  # exponentials of similarities: never in half precision
            loss, accuracy = contrast(z_ND, self.options.loss, self.options.temperature, world)
        return Output(loss, {"accuracy": accuracy}, representations=z_ND.detach())
