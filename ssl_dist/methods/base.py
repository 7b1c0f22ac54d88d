"""What a method is: a module that turns a batch of views into a loss. This page is all that its author needs.

A method is a file `methods/<name>.py` with `class Options(Section)` and `class Method(SSLMethod[Options])`, which
defines `num_views` and `forward`, and what else it needs of the hooks below.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Generic, Protocol, TypeVar, get_args, get_origin

import numpy as np
import torch
from torch import Tensor, nn

from ssl_dist.clock import Clock
from ssl_dist.config import Section
from ssl_dist.device import to_device
from ssl_dist.errors import UserError
from ssl_dist.kernels.ranks import Ranks
from ssl_dist.keys import DROPOUT, hash64, row_keys
from ssl_dist.nn.backbone import Backbone, freeze_offset
from ssl_dist.nn.batchnorm import one_view
from ssl_dist.nn.layers import KeyedDropout, at_least_float32, keyed_rows, mlp


@dataclass(frozen=True)
class Info:
    """What a method knows of the run when it is built."""

    num_images: int  # N, images that are trained on
    num_classes: int  # 0 when the data set has no labels
    view_groups: tuple[tuple[int, int], ...]  # (views, side in pixels) of every group, over all ranks
    batch_size: int  # M, images of the global batch
    total_epochs: float
    feature_dim: int = 0  # width of the backbone's output; filled in when the backbone is built
    stages: dict[str, int] = field(default_factory=dict)  # the backbone's feature maps: name -> channels; filled in too
    steps_per_epoch: int = 1
    seed: int = 0  # of the run, for a method's own draws: see keys.py
    channels: int = 3  # C, of an image

    @property
    def num_views(self) -> int:
        """Of an image, of all groups."""
        return sum(num for num, _ in self.view_groups)

    def require_two_images(self, why: str) -> None:
        """Raises `UserError` for batches of one image; `why`: what the method would do with another."""
        if self.batch_size < 2:
            raise UserError(f"optim.batch_size = 1: {why}; give 2 or more")

    def views_compared(self, method: str) -> int:
        """K of a method that compares views, of any number of recipes. Raises `UserError` for a single view."""
        if self.num_views < 2:
            raise UserError(f"views.num = {self.num_views}: {method} compares views of an image; give 2 or more")
        return self.num_views

    def require_views(self, option: str, chosen: Sequence[int]) -> None:
        """Raises `UserError` unless an option's numbers are different ones of the views."""
        if max(chosen) >= self.num_views or len(set(chosen)) < len(chosen):
            raise UserError(
                f"method.options.{option} = {chosen}: give different numbers of the views, which are 0 to "
                f"{self.num_views - 1}"
            )

    def views_of_one_group(self, method: str) -> int:
        """K of a method that takes views of one recipe. Raises `UserError` when there are several groups."""
        if len(self.view_groups) != 1:
            raise UserError(
                f"views.groups: {method} takes views of one recipe, {len(self.view_groups)} are given; keep one group"
            )
        return self.view_groups[0][0]


@dataclass(frozen=True)
class Batch:
    """This rank's part of the global batch, on the device; the ids, of which draws are made, on the host: to ask the
    device for a number makes the host wait for it."""

    views: list[Tensor]  # one tensor a group, [V_local, B_local, C, S, S], normalised
    view_ids: list[Tensor]  # one int64 [V_local] a group, on the host, counted over all groups
    image_ids: Tensor  # int64 [B_local], on the host: rows of the data set's split
    labels: Tensor  # int64 [B_local], -1 where unknown
    positions: Tensor  # int64 [B_local], 0 .. info.num_images - 1: rows of what a method keeps of every image
    step: int = 0  # steps completed before this one


@dataclass(frozen=True)
class Rows:
    """This rank's part of all training images, as `extract` returns it: their positions int64 [n], in rising order, and
    a network's output for them [n, D], at least float32. All ranks together hold every position once; which rank
    holds which depends on how many there are."""

    positions: Tensor
    values: Tensor


@dataclass
class Output:
    """What `forward` returns. All but the loss is detached."""

    loss: Tensor  # scalar whose mean over the ranks is the loss of the global batch
    metrics: Mapping[str, float | Tensor] = field(default_factory=dict)  # to be logged: name -> number or scalar
    histograms: dict[str, Tensor] = field(default_factory=dict)  # to be logged: name -> 1-d of this rank, NaN: no value
    representations: Tensor | None = None  # [..., D] of the global batch; a collapse is detected in them


class World(Ranks, Protocol):
    """All ranks of a training, as a method sees them: collectives, and no rank or world size.

    Gradients are averaged over the ranks. So a loss that every rank computes in full is returned as it is; where each
    rank computes a share of a sum, `scale_for_ddp_mean` of its share is returned.
    """

    def gather_views(self, z_VBD: Tensor) -> Tensor:
        """Representations [K, M, D] of the global batch in canonical (view, image) order, with gradient, from this
        rank's [V_local, B_local, D]."""

    def gather_images(self, x_B: Tensor) -> Tensor:
        """What belongs to the images of the global batch, [M, ...], without gradient, from [B_local, ...]."""

    def all_reduce_sum_with_grad(self, x: Tensor) -> Tensor:
        """The sum of the ranks' tensors of one shape, on every rank, with gradient."""

    def all_reduce_mean(self, x: Tensor) -> Tensor:
        """The mean of the ranks' tensors of one shape, on every rank, without gradient."""

    def scale_for_ddp_mean(self, loss_share: Tensor) -> Tensor:
        """A loss whose mean over the ranks is the sum of their shares."""


class Extract(Protocol):
    """A network's outputs for all training images, spread over the ranks."""

    def __call__(self, network: nn.Module, augmented: bool = False, training: bool = False) -> Rows:
        """network: images [N, C, S, S] -> [N, D], without gradient. augmented: of a random view by the first group's
        recipe, instead of the test transform. training: in the network's training mode."""


OptionsT = TypeVar("OptionsT", bound=Section)


class SSLMethod(nn.Module, Generic[OptionsT]):
    """Base of every method.

    State is parameters and buffers only. A method calls `world.gather_views`, `world.all_reduce_sum` and their like; it
    never asks for a rank or a world size. Draws come from `ssl_dist.keys`, never from torch's global generator.
    """

    Options: ClassVar[type[Section]] = Section  # that of SSLMethod[Options]
    num_views: int  # K, of the class (by default, where `free_views`) or set by __init__
    views_together: bool = True  # views of one size pass the backbone as one batch (BatchNorm over all)
    trainable: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    free_views: ClassVar[bool] = False  # K is the user's choice, so views may be spread over the ranks
    fixed_length: ClassVar[bool] = False  # a schedule of its own spans the training, which may not grow later

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        for base in getattr(cls, "__orig_bases__", ()):
            if get_origin(base) is SSLMethod:
                (cls.Options,) = get_args(base)

    def __init__(self, backbone: Backbone, info: Info, options: OptionsT):
        super().__init__()
        self.backbone = backbone
        self.info = info
        self.options = options

    def mlp_on_features(
        self, widths: Sequence[int], last_bias: bool = False, activation: type[nn.Module] = nn.ReLU
    ) -> nn.Sequential:
        """A projector of the backbone's features, see `nn.layers.mlp`. The BatchNorm of its first layer takes away what
        is added to the features of all images alike, so that does not learn."""
        if len(widths) > 1:
            freeze_offset(self.backbone)
        return mlp([self.info.feature_dim, *widths], last_bias, activation)

    def explain(self, world_size: int, device: str) -> dict[str, str]:
        """Lines of `ssl-dist explain`, name -> text; for example the pairs of a step and those of a rank. device: cpu
        or cuda, on which the ranks would train."""
        return {}

    def nondeterministic(self) -> str:
        """What of the method has no deterministic kernel on a GPU, and what to set; empty where nothing is."""
        return ""

    @classmethod
    def warm_up(cls, options: OptionsT, dtype: torch.dtype) -> None:
        """Compile what the method needs compiled. Called before the ranks connect: none waits in a collective."""

    def forward(self, batch: Batch, world: World) -> Output:
        """The loss of this rank's views; see `World` for its mean over the ranks."""
        raise NotImplementedError(f"{type(self).__module__} must define forward")

    def before_step(self, clock: Clock, extract: Extract, world: World) -> list[nn.Parameter]:
        """Called before every step. Returns the parameters it re-drew; their optimizer state is reset."""
        return []

    def frozen(self, clock: Clock) -> Sequence[nn.Parameter]:
        """What does not learn in the step that follows `clock.step` completed ones: it has no gradient, no weight
        decay, and no state of the optimizer that changes. A function of the clock."""
        return ()

    def after_step(self, clock: Clock) -> None:
        """Called after every optimizer step (EMA of a target network)."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What learns, in groups as torch's optimizers take them. "lr_factor" of a group multiplies its rate,
        and with "constant_lr" that is the highest one at every step."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def encoder(self) -> nn.Module:
        """The network whose output evaluation reads: images [N, C, S, S] -> features [N, D]."""
        return self.backbone

    def pictures(self, batch: Batch) -> dict[str, dict[str, Tensor]]:
        """What is drawn of a few images beside their views (`log.images_every_epochs`): name of a picture -> title of a
        column -> images [B, C, S, S], normalised as the views of the batch. Called on one rank, without gradient and in
        evaluation mode; it must leave the method's state as it is."""
        return {}

    def logits(self, images: Tensor) -> dict[str, Tensor]:
        """Scores [N, C] of every classifier of a method that has some, from images [N, C, S, S]."""
        raise NotImplementedError(f"{type(self).__module__} does not classify")

    # ------------------------------------------------------------------ passing views

    def represent(self, batch: Batch, network: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
        """Representations [V_local, B_local, D] of every group's views, at least float32.

        network: images [N, C, S, S] -> [N, D], the backbone by default. Views of one size pass it together, whatever
        group they are of, or each view in a pass of its own (`views_together`).
        """
        network = network or self.backbone
        if not self.views_together:
            return [
                torch.stack([self._alone(batch, network, v, i) for v, i in zip(views, ids, strict=True)])
                for views, ids in zip(batch.views, batch.view_ids, strict=True)
            ]
        z_by_group: dict[int, Tensor] = {}
        for size in dict.fromkeys(group.shape[-1] for group in batch.views):
            members = [g for g, group in enumerate(batch.views) if group.shape[-1] == size]
            views = torch.cat([batch.views[g] for g in members]) if len(members) > 1 else batch.views[members[0]]
            with self.keyed(batch, torch.cat([batch.view_ids[g] for g in members])):
                z = at_least_float32(network(views.flatten(0, 1)).unflatten(0, views.shape[:2]))
            z_by_group |= zip(members, z.split([len(batch.views[g]) for g in members]), strict=True)
        return [z_by_group[g] for g in range(len(batch.views))]

    def _alone(self, batch: Batch, network: Callable[[Tensor], Tensor], images: Tensor, view_id: Tensor) -> Tensor:
        with self.keyed(batch, view_id[None]), one_view(int(view_id)):
            return at_least_float32(network(images))

    def outputs(self, batch: Batch) -> list[Tensor]:
        """What networks make of the views for the loss, with gradient: `ssl-dist explain` counts the memory that they
        hold. To be defined where these are not the backbone's representations."""
        return self.represent(batch)

    def gathered(self, batch: Batch, world: World, network: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Representations [K, M, D] of the global batch, views in the order of their ids; see `represent`."""
        return torch.cat([world.gather_views(z) for z in self.represent(batch, network)])

    def projected(
        self, batch: Batch, world: World, projector: nn.Module, network: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Embeddings [K, M, D] of the global batch, at least float32: what the network makes of views of one size at a
        time, see `represent`, passes the projector together, of all sizes."""
        features = self.represent(batch, network)
        rows = [z.flatten(0, 1) for z in features]
        embedded = at_least_float32(projector(torch.cat(rows))).split([len(z) for z in rows])
        parts = [world.gather_views(z.view(*of.shape[:2], -1)) for z, of in zip(embedded, features, strict=True)]
        return torch.cat(parts)

    @contextlib.contextmanager
    def keyed(self, batch: Batch, view_ids: Tensor) -> Iterator[None]:
        """A context for a pass of rows (view, image), view-major: each row gets its key, from which dropout draws."""
        if not self._draws:
            yield
            return
        key = hash64(self.info.seed, DROPOUT, batch.step)
        keys = row_keys(key, view_ids.numpy(), batch.image_ids.numpy())
        with keyed_rows(to_device(keys.view(np.int64).ravel(), batch.views[0].device)):
            yield

    @cached_property
    def _draws(self) -> bool:
        """Whether any layer draws from row keys; without one no keys are computed."""
        return any(isinstance(layer, KeyedDropout) for layer in self.modules())


def accuracy(logits: Tensor, target: Tensor, world: World) -> Tensor:
    """The share of rows of all ranks that are classified correctly, in percent. Ranks hold equally many rows."""
    return 100 * world.all_reduce_mean((logits.argmax(1) == target).double().mean())
