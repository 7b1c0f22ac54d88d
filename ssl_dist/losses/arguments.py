"""What the losses are given: views, labels and options, of one shape and kind, or one line that says what is wrong."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ssl_dist.config import validate
from ssl_dist.config.section import AnySection
from ssl_dist.distributed.world import World, joined
from ssl_dist.nn.layers import at_least_float32

Views = Sequence[Tensor] | Tensor


def gathered(views: Views, world: World | None, number: int | None = None, least: int = 2) -> tuple[Tensor, World]:
    """The views of the global batch [K, M, D], at least float32, and the ranks that hold them. Raises `ValueError`."""
    if (
        not isinstance(views, Sequence | Tensor)
        or (isinstance(views, Tensor) and not views.ndim)
        or not all(isinstance(view, Tensor) for view in views)
    ):
        given = ", ".join(map(described, views)) if isinstance(views, Sequence) else described(views)
        raise ValueError(f"views are {given}: give tensors [B, D], or one [K, B, D]")
    shapes = {tuple(view.shape) for view in views}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise ValueError(f"views {shapes_of(views)}: give each as [B, D], all of one shape")
    [(num_images, _)] = shapes
    if len(views) < least or number not in (None, len(views)):
        raise ValueError(f"views {shapes_of(views)}: give {number or f'{least} or more'}")
    z_KBD = views if isinstance(views, Tensor) else torch.stack([*views])
    if not z_KBD.is_floating_point():
        raise ValueError(f"views are {z_KBD.dtype}: give embeddings, in floating point")
    z_KBD = at_least_float32(z_KBD)
    world = world or joined(z_KBD.device)
    if num_images * world.rank_info.world_size < 2:
        raise ValueError(f"views {shapes_of(views)}: one image has no other to be compared with; give 2 or more")
    return world.gather_views(z_KBD), world


def stacked(views: Views) -> Tensor:
    """Views [K, B, D], at least float32. Raises `ValueError`."""
    tensors = [*views]
    shapes = {tuple(view.shape) if isinstance(view, Tensor) else () for view in tensors}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2 or not tensors[0].is_floating_point():
        raise ValueError(
            f"views are {', '.join(map(described, tensors))}: give each as [B, D], of one shape, floating point"
        )
    return at_least_float32(views if isinstance(views, Tensor) else torch.stack(tensors))


def labelled(logits: Views, labels: Views) -> list[tuple[Tensor, Tensor]]:
    """Heads and their labels, logits at least float32. Raises `ValueError`."""
    if not all(isinstance(z, Tensor) and z.ndim == 2 and z.is_floating_point() for z in logits) or not len(logits):
        raise ValueError(f"logits are {', '.join(map(described, logits))}: give [B, K] of each head, in floating point")
    if len(labels) != len(logits):
        raise ValueError(f"labels of {len(labels)} heads are not those of {len(logits)}")
    for z, y in zip(logits, labels, strict=True):
        if not isinstance(y, Tensor) or y.dtype != torch.int64 or y.shape != z.shape[:1]:
            raise ValueError(f"labels are {described(y)}: give int64 {list(z.shape[:1])}")
        if len(y) and not 0 <= int(y.min()) <= int(y.max()) < z.shape[1]:
            raise ValueError(f"labels go from {int(y.min())} to {int(y.max())}: give 0 to {z.shape[1] - 1}")
    return [(at_least_float32(z), y) for z, y in zip(logits, labels, strict=True)]


def predictions(predicted: Views, target: Views, num_views: int | None = 2) -> tuple[Tensor, Tensor]:
    """Both as tensors of one shape, at least float32, the second without gradient. Raises `ValueError`."""
    both = []
    for views in (predicted, target):
        if not all(isinstance(view, Tensor) and view.is_floating_point() for view in views):
            raise ValueError(f"views are {', '.join(map(described, views))}: give tensors [B, D] in floating point")
        both.append(at_least_float32(views if isinstance(views, Tensor) else torch.stack([*views])))
    shape = both[0].shape
    wanted = "[B, D]" if num_views is None else f"[{num_views}, B, D]"
    if both[1].shape != shape or len(shape) != (2 if num_views is None else 3) or num_views not in (None, shape[0]):
        raise ValueError(f"views {shapes_of(predicted)} and {shapes_of(target)}: give two of one shape {wanted}")
    return both[0], both[1].detach()


def options_of(section: type[AnySection], **given: Any) -> AnySection:
    """Raises `UserError`, which is a `ValueError`, of one line."""
    return validate(section, given)


def listed(numbers: Any) -> Any:
    """As options have it, where it is one."""
    return [*numbers] if isinstance(numbers, Iterable) else numbers


def shapes_of(views: Views) -> str:
    """The shapes of views, as in [4, 8] and [4, 9]."""
    if isinstance(views, Tensor):
        return str(list(views.shape))
    return " and ".join(str(list(view.shape)) for view in views)


def described(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
