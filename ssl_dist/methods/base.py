"""What a method is: a module that turns a batch of views into a loss. Everything here is paper-independent."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from ssl_dist.config import Section


@dataclass(frozen=True)
class Info:
    """What a method may know of its surroundings when it is built."""

    num_images: int  # images that training sees in an epoch's order
    num_classes: int  # 0 when the data set has no labels
    view_groups: tuple[tuple[int, int], ...]  # (views, side in pixels) of every group, over all ranks
    batch_size: int  # M, images of the global batch
    total_epochs: float
    feature_dim: int = 0  # width of the backbone's output; filled in when the backbone is built


@dataclass(frozen=True)
class Batch:
    """This rank's part of the global batch, normalised, on the device.

    views: one tensor a group, [V_local, B_local, 3, S, S]; view_ids: one int64 [V_local] a group, counted over all
    groups; image_ids, labels: int64 [B_local], label -1 = unknown.
    """

    views: list[Tensor]
    view_ids: list[Tensor]
    image_ids: Tensor
    labels: Tensor


@dataclass
class Output:
    """loss: scalar whose mean over the ranks is the loss of the global batch. metrics: what is logged, name -> value
    of the global batch (plain numbers or detached scalars); histograms: name -> detached 1-d tensor; representations:
    detached [..., D], from which the run's health (collapse) is judged."""

    loss: Tensor
    metrics: dict[str, float | Tensor] = field(default_factory=dict)
    histograms: dict[str, Tensor] = field(default_factory=dict)
    representations: Tensor | None = None


class SSLMethod(nn.Module):
    """Base of every method. A subclass in `methods/<name>.py` is called `Method` and names its `Options`.

    State is parameters and buffers only. A method calls `world.gather_views`, `world.sum` and their like; it never
    asks for a rank or a size. Draws come from `ssl_dist.keys`, never from torch's global generator.
    """

    Options: ClassVar[type[Section]]
    views_together: ClassVar[bool] = True  # views of one size pass the backbone as one batch (BatchNorm over all)
    trainable: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    free_views: ClassVar[bool] = False  # K is the user's choice, so views may be spread over the ranks

    num_views: int

    def __init__(self, backbone: nn.Module, info: Info, options: Section):
        super().__init__()
        self.backbone = backbone
        self.info = info
        self.options = options

    @classmethod
    def explain(cls, num_views: int, batch_size: int, options: Section, world_size: int = 1) -> dict[str, str]:
        """What of this method a plan should show, name -> text; for example the pairs of a step and those of a rank."""
        return {}

    @classmethod
    def warm_up(cls, options: Section, dtype: torch.dtype) -> None:
        """Compile what the method needs compiled. Called before the ranks meet, or they would wait for one another."""

    def forward(self, batch: Batch, world) -> Output:
        raise NotImplementedError(f"{type(self).__module__} must define forward")

    def before_step(self, clock, extract, world) -> list[nn.Parameter]:
        """Called before every step. Returns the parameters it re-drew; their optimizer state is reset."""
        return []

    def after_step(self, clock) -> None:
        """Called after every optimizer step (EMA of a target network)."""

    def encoder(self) -> nn.Module:
        """The network whose output evaluation reads: images [N, 3, S, S] -> features [N, D]."""
        return self.backbone

    def represent(self, views_VBCHW: Tensor) -> Tensor:
        """Representations [V, B, D] of a group's views, at least float32; in one pass, or each view in its own."""
        if not self.views_together:
            return at_least_float32(torch.stack([self.backbone(view) for view in views_VBCHW]))
        return at_least_float32(self.backbone(views_VBCHW.flatten(0, 1)).unflatten(0, views_VBCHW.shape[:2]))


def at_least_float32(x: Tensor) -> Tensor:
    """bf16 and fp16 become float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
