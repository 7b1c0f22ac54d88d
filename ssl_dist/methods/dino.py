"""DINO: self-distillation with no labels (Caron, Touvron, Misra, Jégou, Mairal, Bojanowski & Joulin, ICCV 2021,
arXiv:2104.14294).

An online network sees all views of an image; a target network, which is a moving average of it and has no gradient, the
large ones. Both give distributions over K outputs, and that of a view shall be the target's of each other large view.
The target's are centred by the mean of batches before, so that no output wins, and sharpened by a low temperature, so
that not all win alike. What is evaluated is the target.
"""

import math
from dataclasses import replace
from functools import reduce
from itertools import pairwise

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ssl_dist.config import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Probability, Section
from ssl_dist.methods.base import Backbone, Batch, Clock, Info, Output, SSLMethod, World
from ssl_dist.nn.backbone import freeze_offset
from ssl_dist.nn.layers import ema_update, full_precision, rising_decay, target_network


class Options(Section):
    outputs: PositiveInt = Field(65536, description="K, of the head")
    hidden: PositiveInt = Field(2048, description="hidden units of the head's two layers")
    bottleneck: PositiveInt = Field(256, description="width of the embeddings before the last layer")
    batchnorm: bool = Field(
        False, description="whether hidden layers of the head have BatchNorm; conv4 collapses without"
    )
    norm_last_layer: bool = Field(True, description="the last layer's weights have length 1; false: it is learnt")
    freeze_last_layer_epochs: NonNegativeFloat = Field(1.0, description="first epochs in which it does not learn")
    temperature: PositiveFloat = Field(0.1, description="of the online network's distribution")
    target_temperature: PositiveFloat = Field(0.04, description="of the target's distribution")
    target_temperature_first: PositiveFloat = Field(0.04, description="that of the first epoch")
    target_temperature_epochs: NonNegativeInt = Field(0, description="epochs in which it goes there, in equal steps")
    center_momentum: Probability = Field(0.9, description="share of the centre that an average keeps")
    momentum: Probability = Field(0.996, description="share of the target that the first average keeps; rises to 1")


class Head(nn.Module):
    """Features [N, D] -> embeddings [N, bottleneck]; products of these, at length 1, with the rows of `last_layer` are
    its outputs."""

    def __init__(self, feature_dim: int, options: Options):
        super().__init__()
        layers: list[nn.Module] = []
        for dim_in, dim_out in pairwise([feature_dim, options.hidden, options.hidden]):
            layers.append(nn.Linear(dim_in, dim_out, bias=not options.batchnorm))
            layers += [nn.BatchNorm1d(dim_out), nn.GELU()] if options.batchnorm else [nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(options.hidden, options.bottleneck))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self.direction = nn.Parameter(nn.Linear(options.bottleneck, options.outputs, bias=False).weight.detach())
        self.length = nn.Parameter(torch.ones(options.outputs, 1), requires_grad=not options.norm_last_layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)

    @property
    def last_layer(self) -> Tensor:
        """Its weights [K, bottleneck], apart in direction and length (Salimans & Kingma, 2016)."""
        return self.length * F.normalize(self.direction, dim=1)


def distillation(logits_VNK: list[Tensor], target_GNK: Tensor, large: list[int], temperature: float) -> Tensor:
    """The sum over N images of the mean cross-entropy (equation 3) of pairs of a large view's target and another view's
    distribution. large: the views [G] that targets are of."""
    total = target_GNK.new_zeros(())
    for view, logits_NK in enumerate(logits_VNK):
        others = [target_NK for target_NK, of_view in zip(target_GNK, large, strict=True) if of_view != view]
        if others:
            total = total - (reduce(torch.add, others) * (logits_NK / temperature).log_softmax(1)).sum()
    return total / (len(large) * (len(logits_VNK) - 1))


class Method(SSLMethod[Options]):
    """views.groups: the large views, which are those of the largest size; then, if any, the small ones."""

    free_views = True
    fixed_length = True  # momentum

    def __init__(self, backbone: Backbone, info: Info, options: Options):
        super().__init__(backbone, info, options)
        self.num_views = info.views_compared("dino")
        sizes = [size for _, size in info.view_groups]
        self.large_groups = [group for group, size in enumerate(sizes) if size == max(sizes)]
        group_of = [group for group, (num, _) in enumerate(info.view_groups) for _ in range(num)]
        self.large = [view for view, group in enumerate(group_of) if group in self.large_groups]
        self.head = Head(info.feature_dim, options)
        if options.batchnorm:
            freeze_offset(backbone)  # as in `mlp_on_features`
        self.target_backbone, self.target_head = target_network(backbone), target_network(self.head)
        self.center: Tensor
        self.register_buffer("center", torch.zeros(options.outputs))

    def explain(self, world_size: int, device: str) -> dict[str, str]:
        options, images = self.options, -(-self.info.batch_size // world_size)
        rows = images * (self.num_views + len(self.large))
        return {
            "distillation": f"{len(self.large)} targets and {self.num_views} views of an image, {images} images a "
            f"rank: {rows * options.outputs * 4 / 2**20:.1f} MiB of outputs",
            "target": f"a moving average from momentum {options.momentum:g} on; it is what evaluation reads",
        }

    def encoder(self) -> nn.Module:
        return self.target_backbone

    def frozen(self, clock: Clock) -> list[nn.Parameter]:
        steps = self.options.freeze_last_layer_epochs * self.info.steps_per_epoch
        return [self.head.direction, self.head.length] if clock.step < steps else []

    def forward(self, batch: Batch, world: World) -> Output:
        """Metrics: the mean entropy of a target, which at 1 is all outputs alike: a collapse; and that of the mean
        target, 1 when all outputs are used equally; the target's temperature and momentum of the coming average."""
        options, temperature = self.options, self._target_temperature(batch.step)
        views, ids = ([of[group] for group in self.large_groups] for of in (batch.views, batch.view_ids))
        with torch.no_grad():
            large = replace(batch, views=views, view_ids=ids)
            target_GMD = F.normalize(self.projected(large, world, self.target_head, self.target_backbone), dim=-1)
        z_VMD = F.normalize(self.projected(batch, world, self.head), dim=-1)
        lo, hi = world.share(z_VMD.shape[1])
        with full_precision(z_VMD.device):
            with torch.no_grad():
                last_layer = self.target_head.last_layer
                q_GNK = ((target_GMD[:, lo:hi] @ last_layer.T - self.center) / temperature).softmax(-1)
                self._mean_output = target_GMD.flatten(0, 1).mean(0) @ last_layer.T  # that of the mean embedding
            last_layer = self.head.last_layer
            logits = [z_MD[lo:hi] @ last_layer.T for z_MD in z_VMD]
            share = distillation(logits, q_GNK, self.large, options.temperature) / z_VMD.shape[1]
            metrics = self._entropies(q_GNK, target_GMD[..., 0].numel(), world)
        metrics |= {"target_temperature": temperature, "momentum": self._momentum(batch.step)}
        return Output(world.scale_for_ddp_mean(share), metrics, representations=z_VMD.detach())

    def _entropies(self, q_GNK: Tensor, num_rows: int, world: World) -> dict[str, float | Tensor]:
        """In units of log K."""
        usage_K = world.all_reduce_sum(q_GNK.sum((0, 1))) / num_rows
        total = world.all_reduce_sum(-torch.xlogy(q_GNK, q_GNK).sum())
        unit = math.log(max(2, len(usage_K)))
        return {
            "target_entropy": total / (num_rows * unit),
            "usage_entropy": -torch.xlogy(usage_K, usage_K).sum() / unit,
        }

    def _target_temperature(self, step: int) -> float:
        options, epoch = self.options, step // self.info.steps_per_epoch
        first, last = options.target_temperature_first, options.target_temperature
        steps = options.target_temperature_epochs - 1  # between epochs
        return first + (last - first) * epoch / steps if epoch < steps else last

    def _momentum(self, step: int) -> float:
        """Of the average after step number `step`."""
        total = round(self.info.steps_per_epoch * self.info.total_epochs)
        return rising_decay(step / total, self.options.momentum)

    def after_step(self, clock: Clock) -> None:
        """The centre and the target follow (step: clock.step - 1)."""
        self.center.lerp_(self._mean_output.to(self.center.dtype), 1 - self.options.center_momentum)
        momentum = self._momentum(clock.step - 1)
        ema_update(self.target_backbone, self.backbone, momentum)
        ema_update(self.target_head, self.head, momentum)
