"""ReLIC: representation learning via invariant causal mechanisms (Mitrovic et al., ICLR 2021, arXiv:2010.07922).

From its view of an image an online network picks the target network's view of the same image out of those of the other
images of the batch (an instance task), with the same certainty in either direction (the invariance). The target
is a moving average of the online network. As in Relic v2 (Tomasev et al., 2022, arXiv:2201.05119) global views pass
both networks and smaller local views the online one; the learnt temperature and the sigmoid loss are those of SigLIP
(Zhai et al., 2023, arXiv:2303.15343).
"""

import math
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ssl_dist.config import FiniteFloat, NonNegativeFloat, PositiveFloat, PositiveInt, Probability, Section
from ssl_dist.errors import UserError
from ssl_dist.methods.base import Backbone, Batch, Clock, Info, Output, SSLMethod, World
from ssl_dist.nn.layers import ema_update, full_precision, target_network

DEFAULTS = {"softmax": (0.0, 5.0, 0.0), "sigmoid": (math.log(10), 15.0, -10.0)}  # log_tau, max_tau, bias


class Options(Section):
    loss: Literal["softmax", "sigmoid"] = Field(
        "softmax", description="instance task: the image out of the batch (InfoNCE), or yes or no per pair (SigLIP)"
    )
    alpha: NonNegativeFloat = Field(1.0, description="weight of the invariance")
    gamma: Probability = Field(0.995, description="share of the target that its first average keeps; rises to 1")
    log_tau: FiniteFloat | None = Field(
        None, description="initial logarithm of the factor on cosines; null: 0, log 10 with sigmoid"
    )
    max_tau: PositiveFloat | None = Field(None, description="largest factor; null: 5, 15 with sigmoid")
    bias: FiniteFloat | None = Field(None, description="initial summand of the logits; null: 0, -10 with sigmoid")
    learn_temperature: bool = Field(True, description="false: factor and bias stay what they are at first")
    similarity: Literal["cosine", "dot_product"] = Field(
        "cosine", description="of two embeddings; dot_product: they are not normalised"
    )
    positive_weight: NonNegativeFloat = Field(1.0, description="sigmoid: weight of the pairs of one image")
    negative_weight: NonNegativeFloat = Field(1.0, description="sigmoid: weight of the pairs of two images")
    copy_steps: PositiveInt = Field(
        2, description="first steps after each of which the target is a copy of the online network; then an average"
    )
    average_every: PositiveInt = Field(1, description="steps from one average to the next")
    hidden: PositiveInt = Field(512, description="hidden units of the head")
    dim: PositiveInt = Field(64, description="width of the embeddings")
    pairing: Literal["distinct", "official"] = Field(
        "distinct",
        description="distinct: the online network sees each view once; official: the global views twice, the second "
        "time as if they were local ones, as the authors' code does",
    )


# ---------------------------------------------------------------------------------------------------- losses


def initial_logits(options: Options) -> tuple[float, float, float]:
    """log_tau, max_tau and bias as the options give them, or as their loss has them."""
    given = (options.log_tau, options.max_tau, options.bias)
    log_tau, max_tau, bias = (
        default if value is None else value for value, default in zip(given, DEFAULTS[options.loss], strict=True)
    )
    return log_tau, max_tau, bias


def logits(
    online_ND: Tensor, target_ND: Tensor, log_tau: Tensor, bias: Tensor, max_tau: float, similarity: str = "cosine"
) -> Tensor:
    """[N, N]: similarity (cosine or dot_product) of online row i and target row j, times a factor, plus a bias.

    The factor exp(log_tau) stops at max_tau, and above it log_tau has no gradient.
    """
    if similarity == "cosine":
        online_ND, target_ND = F.normalize(online_ND, dim=1), F.normalize(target_ND, dim=1)
    return online_ND @ target_ND.T * log_tau.exp().clamp(0, max_tau) + bias


def instance_loss(logits_NN: Tensor, kind: str, positive: float = 1.0, negative: float = 1.0) -> Tensor:
    """The instance task, row i's answer being column i.

    softmax: mean cross-entropy of the rows. sigmoid: -1/N sum_ij w_ij log sigmoid(+-Z_ij), + and the weight `positive`
    on the diagonal, - and `negative` beside it.
    """
    if kind == "softmax":
        return F.cross_entropy(logits_NN, torch.arange(len(logits_NN), device=logits_NN.device))
    diagonal = torch.eye(len(logits_NN), dtype=logits_NN.dtype, device=logits_NN.device)
    weights = negative + (positive - negative) * diagonal
    return -(weights * F.logsigmoid((2 * diagonal - 1) * logits_NN)).sum() / len(logits_NN)


def invariance_loss(logits_NN: Tensor) -> Tensor:
    """1/N sum_i KL(p2_i || p1_i): p1 the softmax of row i, p2 that of column i. Both have gradients."""
    towards_target, towards_online = logits_NN.log_softmax(1), logits_NN.T.log_softmax(1)
    return F.kl_div(towards_target, towards_online, reduction="batchmean", log_target=True)


def compare(
    online_VMD: Tensor, target_GMD: Tensor, log_tau: Tensor, bias: Tensor, max_tau: float, options: Options
) -> tuple[Tensor, dict[str, float | Tensor]]:
    """The mean loss over all pairs of a target and an online view but those of one global view, and its terms.

    The first G online views are the global ones, in the order of the targets.
    """
    # A bias shifts all logits alike, which no softmax sees: its gradient is 0, computed rounding noise, which Adam
    # makes as large as the learning rate and different for every number of ranks.
    bias = bias if options.loss == "sigmoid" else bias.detach() + 0 * bias
    instance, invariance, accuracy = [], [], []
    for g, target_MD in enumerate(target_GMD):
        for v, online_MD in enumerate(online_VMD):
            if v == g:
                continue
            z_MM = logits(online_MD, target_MD, log_tau, bias, max_tau, options.similarity)
            instance.append(instance_loss(z_MM, options.loss, options.positive_weight, options.negative_weight))
            invariance.append(invariance_loss(z_MM))
            correct = z_MM.detach().argmax(1) == torch.arange(len(z_MM), device=z_MM.device)
            accuracy.append(100 * correct.to(z_MM.dtype).mean())
    names = ("instance", "invariance", "accuracy")
    means = dict(zip(names, (torch.stack(v).mean() for v in (instance, invariance, accuracy)), strict=True))
    loss = means["instance"] + options.alpha * means["invariance"]
    return loss, {name: value.detach() for name, value in means.items()}


# ---------------------------------------------------------------------------------------------------- moving average


def cosine_gamma(k: int, total: int, base: float) -> float:
    """1 - (1 - base)(cos(pi k / total) + 1) / 2, computed in float32 as by the authors."""
    return float(1 - (1 - torch.tensor(base)) * (torch.cos(torch.tensor(math.pi * k / total)) + 1) / 2)


def gamma_of(step: int, total: int, base: float, copy_steps: int = 2, every: int = 1) -> float:
    """Share of the target that the average after step number `step` (the first is 0) keeps; 0: it becomes a copy; 1:
    there is none after this step, which is no multiple of `every`.

    The authors schedule gamma after each average for the next one, so the first average keeps `base`.
    """
    if step < copy_steps:
        return 0.0
    if step % every:
        return 1.0
    last = step - every
    return cosine_gamma(last if last >= copy_steps else 0, total, base)


# ---------------------------------------------------------------------------------------------------- method


class Method(SSLMethod[Options]):
    """views.groups: the global views (2 in the paper), then, if any, the local ones, smaller and any number."""

    free_views = True
    views_together = False
    fixed_length = True  # gamma

    def __init__(self, backbone: Backbone, info: Info, options: Options):
        super().__init__(backbone, info, options)
        if len(info.view_groups) > 2:
            raise UserError(
                f"views.groups: relic takes global views and local ones, {len(info.view_groups)} groups are given; "
                "keep two"
            )
        if info.view_groups[0][0] < 2:
            raise UserError("views.groups[0].num = 1: relic compares global views of an image; give 2")
        info.require_two_images("relic tells an image from others of the batch")
        self.num_views = info.num_views
        self.head = nn.Sequential(
            nn.Linear(info.feature_dim, options.hidden, bias=False),
            nn.ReLU(),
            nn.Linear(options.hidden, options.dim, bias=False),
        )
        self.target_backbone = target_network(backbone)
        self.target_head = target_network(self.head)
        log_tau, self.max_tau, bias = initial_logits(options)
        learnt = options.learn_temperature
        self.log_tau = nn.Parameter(torch.tensor(log_tau), requires_grad=learnt)
        self.bias = nn.Parameter(torch.tensor(bias), requires_grad=learnt)
        # The steps in which gamma would reach 1.
        self.total = round(info.steps_per_epoch * (info.total_epochs + 2)) - options.copy_steps + 1

    def explain(self, world_size: int, device: str) -> dict[str, str]:
        options = self.options
        return {
            "instance task": f"1 of {self.info.batch_size} images, {options.loss} loss, invariance x {options.alpha:g}",
            "target": f"a copy for {options.copy_steps} steps, then a moving average from gamma {options.gamma:g} on"
            + (f", every {options.average_every} steps" if options.average_every > 1 else ""),
        }

    def encoder(self) -> nn.Module:
        return self.target_backbone

    def forward(self, batch: Batch, world: World) -> Output:
        """Metrics: the terms of the loss, factor and bias of the logits, gamma of the coming average, and the share of
        images that are picked correctly, in percent; each a mean over the pairs of a target view and an online view."""
        with torch.no_grad():
            globals_alone = replace(batch, views=batch.views[:1], view_ids=batch.view_ids[:1])
            target_GMD = self.gathered(globals_alone, world, lambda x: self.target_head(self.target_backbone(x)))
        online_VMD = self.gathered(self._online(batch), world, lambda x: self.head(self.backbone(x)))
        with full_precision(online_VMD.device):
            loss, metrics = compare(online_VMD, target_GMD, self.log_tau, self.bias, self.max_tau, self.options)
        metrics |= {
            "temperature": self.log_tau.detach().exp().clamp(0, self.max_tau),
            "bias": self.bias.detach(),
            "gamma": self._gamma(batch.step),
        }
        return Output(loss, metrics, representations=online_VMD.detach())

    def _online(self, batch: Batch) -> Batch:
        """The views that the online network gets: all of them; in the official pairing, the global views twice."""
        if self.options.pairing == "distinct":
            return batch
        num_global = self.info.view_groups[0][0]
        view_ids = [batch.view_ids[0], *(ids + num_global for ids in batch.view_ids)]
        return replace(batch, views=[batch.views[0], *batch.views], view_ids=view_ids)

    def _gamma(self, step: int) -> float:
        options = self.options
        return gamma_of(step, self.total, options.gamma, options.copy_steps, options.average_every)

    def after_step(self, clock: Clock) -> None:
        """The target follows the online network, running statistics included (step: clock.step - 1)."""
        gamma = self._gamma(clock.step - 1)
        if gamma == 1:
            return
        for target, online in ((self.target_backbone, self.backbone), (self.target_head, self.head)):
            if gamma == 0:
                target.load_state_dict(online.state_dict())  # integers too
            else:
                ema_update(target, online, gamma)
