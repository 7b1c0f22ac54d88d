"""The view steps of one channel, int [H, W], levels 0..highest, in plain loops over whole numbers and float64."""

import math

import numpy as np


def resampled(plane, crop, size, bicubic, highest):
    """Pillow's resize of the crop (top, left, height, width) to size x size: the rows, then the columns."""
    top, left, height, width = crop
    part = plane[top : top + height, left : left + width].astype(object)
    rows = levels(part @ weights(width, size, bicubic).T, highest)
    return levels(weights(height, size, bicubic) @ rows, highest)


def weights(old, new, bicubic):
    """Whole numbers of 22 fractional bits, [new, old]: libImaging/Resample.c."""
    scale = old / new
    stretch = max(scale, 1.0)
    support = stretch * (2 if bicubic else 1)
    out = np.zeros((new, old), object)
    for x in range(new):
        center = (x + 0.5) * scale
        first, last = max(int(center - support + 0.5), 0), min(int(center + support + 0.5), old)
        values = [kernel(abs((i - center + 0.5) / stretch), bicubic) for i in range(first, last)]
        for i, value in zip(range(first, last), values, strict=True):
            share = value / sum(values) * (1 << 22)
            out[x, i] = int(share + math.copysign(0.5, share))
    return out


def kernel(x, bicubic):
    if not bicubic:
        return max(1 - x, 0.0)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * -0.5 if x < 2 else 0.0


def levels(sums, highest):
    return np.clip((sums + (1 << 21)) // (1 << 22), 0, highest)


def blended(plane, base, factor, highest):
    """Truncated, in float32 as Pillow does it."""
    base, factor = np.float32(base), np.float32(factor)
    mixed = base + factor * (plane.astype(np.float32) - base)
    return np.clip(mixed, 0, highest).astype(np.int64)


def contrasted(plane, factor, highest):
    return blended(plane, math.floor(plane.mean() + 0.5), factor, highest)


def solarized(plane, threshold, highest):
    return np.where(plane >= threshold * (highest // 255), highest - plane, plane)


def box_blurred(plane, sigma):
    """Pillow's GaussianBlur: three passes of a box with soft ends along the rows, three along the columns."""
    length = box_radius(np.float32(sigma))
    radius = int(length)
    inner = int(np.float32(1 << 24) / np.float32(length * 2 + 1))
    outer = ((1 << 24) - (2 * radius + 1) * inner) // 2
    for _ in range(2):
        for _ in range(3):
            padded = np.pad(plane.astype(object), ((0, 0), (radius + 1, radius + 1)), "edge")
            count, side = 2 * radius + 1, plane.shape[1]
            inside = sum(padded[:, 1 + i : 1 + i + side] for i in range(count))
            plane = (inside * inner + (padded[:, :side] + padded[:, -side:]) * outer + (1 << 23)) // (1 << 24)
        plane = plane.T
    return plane.astype(np.int64)


def box_radius(sigma):
    """In float32, of which the weights of 16-bit levels tell the last digits."""
    one, variance = np.float32(1), sigma * sigma / np.float32(3)
    whole = np.float32(math.floor((np.float32(math.sqrt(12 * float(variance) + 1)) - 1) / 2))
    part = (2 * whole + one) * (whole * (whole + one) - np.float32(3) * variance)
    return whole + part / (np.float32(6) * (variance - (whole + one) * (whole + one)))


def gaussian_blurred(plane, sigma, kernel_size):
    """torchvision's gaussian_blur in float64."""
    half = kernel_size // 2
    places = np.arange(-half, half + 1)
    taps = np.exp(-0.5 * (places / sigma) ** 2)
    taps /= taps.sum()
    padded = np.pad(plane.astype(np.float64), half, "reflect")
    side = plane.shape[0]
    rows = sum(tap * padded[:, i : i + side] for i, tap in enumerate(taps))
    return np.rint(sum(tap * rows[i : i + side] for i, tap in enumerate(taps))).astype(np.int64)
