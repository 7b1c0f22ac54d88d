"""Pixels to network input, on the device that computes."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ssl_dist.config import Normalize, validate
from ssl_dist.errors import UserError, quoted
from ssl_dist.kernels.pixels import look_up

Channels = tuple[float, ...]
LEVELS = {torch.uint8: 255, torch.uint16: 65535}  # the highest


def of_channels(given: Normalize | tuple[Channels, Channels]) -> Normalize:
    """Mean and standard deviation of the channels of pixels in [0, 1], as a pair or named. Raises `UserError`."""
    if isinstance(given, Normalize):
        return given
    if not isinstance(given, Sequence) or len(given) != 2:
        raise UserError(f"normalize = {quoted(given)}: give (mean, std), each a number a channel")
    return validate(Normalize, {"mean": given[0], "std": given[1]}, "normalize.")


def normalized(
    constants: Normalize,
    dtype: torch.dtype,
    device: torch.device,
    memory_format: torch.memory_format = torch.channels_last,
) -> Callable[[Tensor], Tensor]:
    """A function from uint8 or uint16 [..., C, S, S] to (x / 255 - mean) / std as `dtype`, 65535 in the place of 255
    for uint16. memory_format: its order in memory, torch.channels_last or torch.contiguous_format (plane by plane).

    The constants are rounded once, from float64, so that every rank and precision sees the same map.
    """
    mean = torch.tensor(constants.mean, dtype=torch.float64)
    std = torch.tensor(constants.std, dtype=torch.float64)
    scales = {kind: (1 / (highest * std)).to(device, dtype).view(-1, 1, 1) for kind, highest in LEVELS.items()}
    offset = (-mean / std).to(device, dtype).view(-1, 1, 1)

    def apply(pixels: Tensor) -> Tensor:
        flat = pixels.flatten(0, -4)
        images = flat.to(dtype, memory_format=memory_format)
        return images.mul_(scales[pixels.dtype]).add_(offset).unflatten(0, pixels.shape[:-3])

    @functools.cache
    def table(kind: torch.dtype) -> Tensor:
        """What becomes of every level [C, levels]."""
        levels = torch.arange(LEVELS[kind] + 1, dtype=torch.int32).to(kind)
        return apply(levels.expand(1, len(offset), 1, -1))[0, :, 0]

    def apply_by_table(pixels: Tensor) -> Tensor:
        return look_up(pixels.flatten(0, -4), table(pixels.dtype), memory_format).unflatten(0, pixels.shape[:-3])

    return apply_by_table if device.type == "cpu" else apply


def pixels_of(images: Tensor, constants: Normalize, dtype: torch.dtype) -> Tensor:
    """What `normalized` made images [..., C, S, S] of, uint8 or uint16: the nearest level."""
    mean, std = (
        torch.tensor(values, dtype=torch.float64, device=images.device).view(-1, 1, 1)
        for values in (constants.mean, constants.std)
    )
    return ((images.double() * std + mean).clamp(0, 1) * LEVELS[dtype]).round().to(dtype)
