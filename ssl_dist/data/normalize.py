"""Pixels to network input, on the device that computes."""

from collections.abc import Callable

import torch
from torch import Tensor

from ssl_dist.config import Normalize


def normalized(constants: Normalize, dtype: torch.dtype, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A function from uint8 [..., 3, S, S] to (x / 255 - mean) / std as `dtype`, in channels-last memory order.

    The constants are rounded once, from float64, so that every rank and precision sees the same map.
    """
    mean = torch.tensor(constants.mean, dtype=torch.float64)
    std = torch.tensor(constants.std, dtype=torch.float64)
    scale = (1 / (255 * std)).to(device, dtype).view(3, 1, 1)
    offset = (-mean / std).to(device, dtype).view(3, 1, 1)

    def apply(pixels: Tensor) -> Tensor:
        flat = pixels.flatten(0, -4)
        images = flat.to(dtype, memory_format=torch.channels_last)
        return images.mul_(scale).add_(offset).unflatten(0, pixels.shape[:-3])

    return apply
