"""Time for memory: what the backward pass needs of a backbone is computed again there, not kept from the forward pass
(Chen et al., 2016, arXiv:1604.06174). Loss and gradient are the same; sums over images may be rounded otherwise.

`by_blocks` keeps the maps between the backbone's blocks alone. `in_parts` lets the images pass in parts, of which the
backward pass holds one at a time; as the loss is one of the whole batch, that is more than to add up gradients.
"""

import contextlib
import contextvars
import itertools
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from ssl_dist.errors import UserError
from ssl_dist.nn.backbone import Backbone
from ssl_dist.nn.batchnorm import is_of_batches, kept_statistics
from ssl_dist.nn.layers import keyed_rows, keys_of_rows


def by_blocks(backbone: Backbone, name: str) -> None:
    """Compute the inside of every block again in the backward pass. Raises `UserError` where there are no blocks."""
    blocks = backbone.blocks()
    if not blocks:
        raise UserError(f"backbone.recompute = true: {name} has no blocks to compute again; set it to false")
    for block in blocks:
        block.forward = MethodType(_again(type(block).forward), block)  # a bound one follows a copy of its module


def in_parts(backbone: Backbone, name: str, num_parts: int) -> None:
    """Let the images of a pass go through in parts. Raises `UserError` where images do not pass independently."""
    layers = [layer for layer in backbone.modules() if is_of_batches(layer)]
    if layers:
        raise UserError(
            f"optim.accumulate = {num_parts}: the {len(layers)} BatchNorm layers of {name} need all images at once; "
            "set it to 1, and backbone.recompute=true to hold less, train on more ranks, or choose one without "
            "BatchNorm (timm/vit_small_patch16_224)"
        )
    for method in backbone.passes:
        whole = _again(getattr(type(backbone), method))
        setattr(backbone, method, MethodType(_parted(whole, num_parts), backbone))


def _parted(whole: Callable[..., Any], num_parts: int) -> Callable[..., Any]:
    """`whole` of a backbone and images, and of what else has a row an image, as that of parts of the images, put
    together."""

    def call(backbone: Backbone, *rows: Tensor | None) -> Any:
        if not torch.is_grad_enabled():
            return whole(backbone, *rows)
        images, keys = rows[0], keys_of_rows()
        assert images is not None, "a pass begins with images"
        num = len(images.chunk(num_parts))
        parts = zip(*([None] * num if of_row is None else of_row.chunk(num_parts) for of_row in rows), strict=True)
        outputs = []
        for part, of_part in zip(parts, [None] * num if keys is None else keys.chunk(num_parts), strict=True):
            with keyed_rows(of_part):
                outputs.append(whole(backbone, *part))
        return tree_map(lambda *tensors: torch.cat(tensors), *outputs)

    return call


def _again(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` of a module and its inputs, which keeps the inputs alone and runs again in the backward pass."""

    def call(module: nn.Module, *inputs: Tensor) -> Any:
        context, runs = contextvars.copy_context(), itertools.count()  # autograd's threads have no context of ours

        def run(*inputs: Tensor) -> Any:
            with kept_statistics(module) if next(runs) else contextlib.nullcontext():
                return forward(module, *inputs)

        # Draws come from keys, not from torch's generator.
        return checkpoint(partial(context.run, run), *inputs, use_reentrant=False, preserve_rng_state=False)

    return call
