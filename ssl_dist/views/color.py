"""Colour steps on one view, uint8 [3, N] (planes of N pixels), in place.

All but hue equal Pillow bit for bit (ImageEnhance, convert("L"), ImageOps.solarize): a blend is computed in float32
and truncated, the luminance is 16-bit fixed point. Hue follows torchvision's tensor kernel (rotation in a real-valued
HSV space, truncated) up to one level; Pillow's own works in an 8-bit HSV space and is coarser. Every step rounds to 8
bits, as a chain of Pillow calls does.
"""

import numpy as np

from ssl_dist.numba_cache import njit

F, I = np.float32, np.int32  # noqa: E741 - numba would compute mixed expressions in 64 bits
VALUE_SAFE = {"nnan", "ninf", "nsz"}  # no NaN or infinity can arise; to reorder or contract would change roundings


@njit(cache=True, nogil=True)
def _luminance(r: np.float32, g: np.float32, b: np.float32) -> np.float32:
    """(19595 r + 38470 g + 7471 b + 32768) >> 16 of float32 levels; every term is below 2**24, so this is exact."""
    return F(I((F(19595) * r + F(38470) * g + F(7471) * b + F(32768)) * F(1 / 65536)))


@njit(cache=True, nogil=True, fastmath=VALUE_SAFE)
def _blend(base: np.float32, level: np.float32, factor: np.float32) -> np.uint8:
    """base + factor (level - base), clipped and truncated to 8 bits, as ImagingBlend."""
    return np.uint8(I(min(max(base + factor * (level - base), F(0)), F(255))))


@njit(cache=True, nogil=True, fastmath=VALUE_SAFE)
def _blend_all(rgb: np.ndarray, base: np.float32, factor: np.float32) -> None:
    levels = rgb.reshape(rgb.size)
    for i in range(levels.shape[0]):
        levels[i] = _blend(base, F(levels[i]), factor)


@njit(cache=True, nogil=True)
def adjust_brightness(rgb: np.ndarray, factor: np.float32) -> None:
    """Blend with black. factor: float32 >= 0."""
    _blend_all(rgb, F(0), factor)


@njit(cache=True, nogil=True)
def _sum_luminance(red: np.ndarray, green: np.ndarray, blue: np.ndarray) -> np.uint32:
    total = np.uint32(0)
    for i in range(red.shape[0]):
        total = np.uint32(total + np.uint32(_luminance(F(red[i]), F(green[i]), F(blue[i]))))
    return total


@njit(cache=True, nogil=True)
def adjust_contrast(rgb: np.ndarray, factor: np.float32) -> None:
    """Blend with the rounded mean luminance of the view. factor: float32 >= 0."""
    num_pixels, total = rgb.shape[1], np.int64(0)
    for lo in range(0, num_pixels, 65536):  # a sum of 32 bits is four times as fast and holds so many levels
        hi = lo + 65536
        total += _sum_luminance(rgb[0, lo:hi], rgb[1, lo:hi], rgb[2, lo:hi])
    _blend_all(rgb, F(int(total / num_pixels + 0.5)), factor)


@njit(cache=True, nogil=True, fastmath=VALUE_SAFE)
def adjust_saturation(rgb: np.ndarray, factor: np.float32) -> None:
    """Blend with the luminance of each pixel. factor: float32 >= 0."""
    red, green, blue = rgb[0], rgb[1], rgb[2]
    for i in range(red.shape[0]):
        r, g, b = F(red[i]), F(green[i]), F(blue[i])
        gray = _luminance(r, g, b)
        red[i] = _blend(gray, r, factor)
        green[i] = _blend(gray, g, factor)
        blue[i] = _blend(gray, b, factor)


@njit(cache=True, nogil=True, fastmath=VALUE_SAFE)
def _channel(value: np.float32, chroma: np.float32, distance: np.float32) -> np.uint8:
    """value - chroma clip(distance, 0, 1) in levels, truncated as torchvision's conversion to uint8 does."""
    return np.uint8(I((value - chroma * min(max(distance, F(0)), F(1))) * F(255.999 / 255)))


@njit(cache=True, nogil=True, fastmath=VALUE_SAFE)
def adjust_hue(rgb: np.ndarray, shift: np.float32) -> None:
    """Turn the hue by `shift` (float32 in [-0.5, 0.5], turns of the wheel); HSV saturation and value stay.

    With the hue h in sextants, 0 <= h < 6, a colour of value V and chroma C has the channels V - C clip(d, 0, 1):
    red d = 2 - |h - 3|, green d = |h - 2| - 1, blue d = |h - 4| - 1.
    """
    red, green, blue = rgb[0], rgb[1], rgb[2]
    turn = F(6) * shift
    for i in range(red.shape[0]):
        r, g, b = F(red[i]), F(green[i]), F(blue[i])
        value = max(r, max(g, b))
        chroma = value - min(r, min(g, b))
        sextants = F(1) / max(chroma, F(1))
        at_red, at_green, at_blue = (g - b) * sextants, (b - r) * sextants + F(2), (r - g) * sextants + F(4)
        hue = turn + (at_red if value == r else (at_green if value == g else at_blue))
        hue = hue + F(6) if hue < F(0) else hue
        hue = hue - F(6) if hue >= F(6) else hue
        red[i] = _channel(value, chroma, F(2) - abs(hue - F(3)))
        green[i] = _channel(value, chroma, abs(hue - F(2)) - F(1))
        blue[i] = _channel(value, chroma, abs(hue - F(4)) - F(1))


@njit(cache=True, nogil=True)
def to_gray(rgb: np.ndarray) -> None:
    """All three channels become the luminance."""
    red, green, blue = rgb[0], rgb[1], rgb[2]
    for i in range(red.shape[0]):
        gray = np.uint8(I(_luminance(F(red[i]), F(green[i]), F(blue[i]))))
        red[i] = gray
        green[i] = gray
        blue[i] = gray


@njit(cache=True, nogil=True)
def solarize(rgb: np.ndarray, threshold: int) -> None:
    """Levels from `threshold` (0 to 255) on are inverted, as ImageOps.solarize does."""
    levels = rgb.reshape(rgb.size)
    for i in range(levels.shape[0]):
        levels[i] = 255 - levels[i] if levels[i] >= threshold else levels[i]
