"""What pictures show of images that are not RGB with 8 bits."""

from collections.abc import Sequence

import numpy as np

from ssl_dist.views.pixels import PixelFormat

WHITE = 3  # standard deviations above the mean, of a channel of 16 bits


def shown(planes: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Images uint8 or uint16 [..., C, H, W] as pictures, uint8 [..., 3, H, W]: the first three channels as red, green
    and blue, of one or two the first as gray. 16 bits become 8 so that mean + `WHITE` * std of a channel, of pixels in
    [0, 1], is white, as microscopes and satellites seldom use all of the range."""
    chosen = [0, 1, 2] if planes.shape[-3] >= 3 else [0, 0, 0]
    planes = planes[..., chosen, :, :]
    if planes.dtype == np.uint8:
        return planes
    white = [min(1.0, mean[c] + WHITE * std[c]) * 65535 for c in chosen]
    levels = planes / np.maximum(white, 1.0)[:, None, None] * 255
    return np.minimum(levels, 255).round().astype(np.uint8)


def words(pixels: PixelFormat) -> str:
    """That choice in words; empty: the pictures are the images."""
    if pixels.is_rgb:
        return ""
    of_all = f" of {pixels.channels}" if pixels.channels > 1 else ""
    text = (
        f"pictures show channels 0, 1 and 2{of_all} as red, green and blue"
        if pixels.channels >= 3
        else f"pictures show channel 0{of_all} as gray"
    )
    return text + f", a channel's mean + {WHITE} standard deviations as white" * (pixels.bits == 16)
