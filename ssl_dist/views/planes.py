"""The view kernel of images with any number of channels, of 8 or 16 bits: the steps of render.py, channel by channel.

A channel becomes what Pillow and torchvision make of it as a picture of its own (mode L), rounded to its own 8 or 16
bits after each step: of uint8 the same as in render.py, bit for bit, but for contrast, which blends each channel with
its own mean and not with that of the luminance. Levels that a recipe names (solarize) are of 8 bits and count as 257
each of 16. A channel takes several times as long as one of the three there: its sums are of 64 bits, pixel by pixel.
"""

import math

import numpy as np

from ssl_dist.keys import fold
from ssl_dist.numba_cache import njit
from ssl_dist.views import blur, draw, geometry, resample
from ssl_dist.views.draw import AffineParameters, ViewParameters
from ssl_dist.views.render import Images
from ssl_dist.views.resample import Bool, Box, Pair
from ssl_dist.views.vectors import BITS, HALF

Buffers = tuple[resample.Buffers, blur.Buffers]
F, I, L, U = np.float32, np.int32, np.int64, np.uint64  # noqa: E741 - unsigned indices spare the test for negative ones
FRACTION = 24  # bits of the weights of a box


@njit(cache=True, nogil=True)
def _for_resize(image: np.ndarray, kept: Pair, shortest: int, bicubic: bool) -> resample.Buffers:
    """As `resample.new_buffers`; packed: the sums at one pixel, float64 [C]; rows: [C, H, S] of the image's type; line:
    float64 [S], sums."""
    height, width, channels = image.shape
    taps = math.ceil((4 if bicubic else 2) * max(height / shortest, width / shortest, 1.0))
    return resample.Buffers(
        np.empty(taps),
        (np.empty(kept[1], np.uint64), np.empty(kept[1] * taps, np.uint64)),
        (np.empty(kept[0], np.uint64), np.empty(kept[0] * taps, np.uint64)),
        np.empty(channels, np.float64),
        np.empty((channels, height, kept[1]), image.dtype),
        np.empty(kept[1], np.float64),
    )


@njit(cache=True, nogil=True)
def _new_buffers(recipe: np.ndarray, image: np.ndarray) -> Buffers:
    """Of one thread, for images of up to this one's size."""
    size, kernel = int(recipe[draw.SIZE]), int(recipe[draw.KERNEL])
    shortest = size if recipe[draw.CROP] == draw.RANDOM else int(recipe[draw.RESIZE])
    number, none = image.shape[2] * size * size, np.empty(0, image.dtype)
    for_blur = blur.Buffers(
        np.empty(number, image.dtype),
        np.empty(number, image.dtype),
        none,
        np.empty(0, np.uint32),
        np.empty(kernel + 1, np.float32),
        np.empty(size + kernel, np.float32),
        np.empty(size, np.float32),
    )
    return _for_resize(image, (size, size), shortest, recipe[draw.BICUBIC] != 0), for_blur


# ------------------------------------------------------------------------------------------------- resizing


@njit(cache=True, nogil=True)
def _resize_crop(
    image: np.ndarray,
    crop: Box,
    resized: Pair,
    corner: Pair,
    flip: Bool,
    bicubic: bool,
    buffers: resample.Buffers,
    out: np.ndarray,
) -> None:
    """`resample.resize_crop` of image [H, W, C] -> out [C, S, S]. Taps beyond the crop have the weight 0."""
    top, left, height, width = crop
    (x_start, x_weights), (y_start, y_weights), sums = buffers.x_plan, buffers.y_plan, buffers.line
    upright = np.bool_(False)
    x_taps = resample.plan_axis(width, resized[1], corner[1], flip, bicubic, buffers.filter, buffers.x_plan)
    y_taps = resample.plan_axis(height, resized[0], corner[0], upright, bicubic, buffers.filter, buffers.y_plan)
    channels, at_pixel, rows, size = image.shape[2], buffers.packed, buffers.rows, U(out.shape[2])
    scale, highest = 1 / (1 << BITS), float((1 << 8 * out.itemsize) - 1)
    for y in range(int(y_start[0]), min(int(y_start[-1]) + y_taps, height)):
        line = image[top + y]
        for x in range(size):
            for c in range(channels):
                at_pixel[c] = HALF
            for k in range(x_taps):
                column, weight = (
                    U(left + min(int(x_start[x]) + k, width - 1)),
                    float(L(x_weights[x * U(x_taps) + U(k)])),
                )
                for c in range(U(channels)):
                    at_pixel[c] += line[column, c] * weight
            for c in range(U(channels)):
                rows[c, y, x] = I(min(max(at_pixel[c] * scale, 0.0), highest))
    for c in range(channels):
        for y in range(out.shape[1]):
            for x in range(size):
                sums[x] = HALF
            for k in range(y_taps):
                line, weight = rows[c, min(int(y_start[y]) + k, height - 1)], float(L(y_weights[y * y_taps + k]))
                for x in range(size):
                    sums[x] += line[x] * weight
            for x in range(size):
                out[c, y, x] = I(min(max(sums[x] * scale, 0.0), highest))


@njit(cache=True, nogil=True)
def resize_image(image: np.ndarray, height: int, width: int, resized: Pair, bicubic: bool) -> np.ndarray:
    """The first height x width pixels of image [H, W, C] -> [C, resized height, resized width]."""
    out = np.empty((image.shape[2], resized[0], resized[1]), image.dtype)
    buffers = _for_resize(image, resized, min(resized[0], resized[1]), bicubic)
    _resize_crop(image, (0, 0, height, width), resized, (0, 0), np.bool_(False), bicubic, buffers, out)
    return out


# ------------------------------------------------------------------------------------------------- moving


@njit(cache=True, nogil=True)
def _turn(view: np.ndarray, quarters: int) -> None:
    """`geometry.turn` of view [C, S, S]."""
    size, before = view.shape[1], view.copy()
    for c in range(view.shape[0]):
        for y in range(size):
            for x in range(size):
                row = x if quarters == 1 else size - 1 - (y if quarters == 2 else x)
                column = y if quarters == 3 else size - 1 - (x if quarters == 2 else y)
                view[c, y, x] = before[c, row, column]


@njit(cache=True, nogil=True)
def _move(view: np.ndarray, affine: AffineParameters) -> None:
    """`geometry.move` of view [C, S, S]."""
    size, before = view.shape[1], view.copy()
    xx, xy, x_shift, yx, yy, y_shift = geometry.inverse(affine, size)
    for y in range(size):
        for x in range(size):
            x_in = xx * (x + 0.5) + xy * (y + 0.5) + x_shift
            y_in = yx * (x + 0.5) + yy * (y + 0.5) + y_shift
            if x_in < 0 or x_in >= size or y_in < 0 or y_in >= size:
                for c in range(view.shape[0]):
                    view[c, y, x] = 0
                continue
            left, top = math.floor(x_in - 0.5), math.floor(y_in - 0.5)
            x_part, y_part = x_in - 0.5 - left, y_in - 0.5 - top
            near, far = max(left, 0), min(left + 1, size - 1)
            upper, lower = max(top, 0), min(top + 1, size - 1)
            for c in range(view.shape[0]):
                above, below = float(before[c, upper, near]), float(before[c, lower, near])
                above += (float(before[c, upper, far]) - above) * x_part
                below += (float(before[c, lower, far]) - below) * x_part
                view[c, y, x] = int(above + (below - above) * y_part)


# ------------------------------------------------------------------------------------------------- levels


@njit(cache=True, nogil=True)
def _blend_plane(plane: np.ndarray, base: np.float32, factor: np.float32, highest: int) -> None:
    """base + factor (level - base) of a plane [N], clipped and truncated."""
    for i in range(U(plane.shape[0])):
        plane[i] = I(min(max(base + factor * (F(plane[i]) - base), F(0)), F(highest)))


@njit(cache=True, nogil=True)
def _jitter(planes: np.ndarray, drawn: ViewParameters, highest: int) -> None:
    """Brightness and contrast of planes [C, N] in the drawn order; there is no saturation and no hue."""
    for step in drawn.order:
        if step == 0 and drawn.brightness != 1:
            for c in range(planes.shape[0]):
                _blend_plane(planes[c], F(0), F(drawn.brightness), highest)
        elif step == 1 and drawn.contrast != 1:
            for c in range(planes.shape[0]):
                total = L(0)
                for i in range(U(planes.shape[1])):
                    total += L(planes[c, i])
                _blend_plane(planes[c], F(int(total / planes.shape[1] + 0.5)), F(drawn.contrast), highest)


@njit(cache=True, nogil=True)
def _solarize(planes: np.ndarray, threshold: int, highest: int) -> None:
    for c in range(planes.shape[0]):
        for i in range(planes.shape[1]):
            level = L(planes[c, i])
            planes[c, i] = highest - level if level >= threshold else level


# ------------------------------------------------------------------------------------------------- blur


@njit(cache=True, nogil=True)
def _box_columns(source: np.ndarray, out: np.ndarray, radius: int, box: tuple[float, float], sums: np.ndarray) -> None:
    """One pass of the box filter along the columns of a plane [S, S]. box: the weights of the pixels inside, and of the
    two beyond. Edges are repeated."""
    (inner, outer), size, scale = box, U(source.shape[0]), 1 / (1 << FRACTION)
    last = source.shape[0] - 1
    for x in range(size):
        sums[x] = 0
    for y in range(-radius, radius + 1):
        row = source[min(max(y, 0), last)]
        for x in range(size):
            sums[x] += row[x]
    for y in range(last + 1):
        before, first = source[max(y - radius - 1, 0)], source[max(y - radius, 0)]
        after, to = source[min(y + radius + 1, last)], out[y]
        for x in range(size):
            far = float(before[x]) + float(after[x])
            to[x] = I((sums[x] * inner + far * outer + (1 << FRACTION - 1)) * scale)
            sums[x] += float(after[x]) - float(first[x])


@njit(cache=True, nogil=True)
def _transpose(source: np.ndarray, out: np.ndarray) -> None:
    for y in range(source.shape[0]):
        for x in range(source.shape[0]):
            out[x, y] = source[y, x]


@njit(cache=True, nogil=True)
def _blur_as_pillow(view: np.ndarray, sigma: float, buffers: blur.Buffers, sums: np.ndarray) -> None:
    """`blur.blur_as_pillow` of view [C, S, S], in place."""
    size, length = view.shape[1], blur._box_radius(sigma)
    radius = int(length)
    inner = L(F(1 << FRACTION) / F(F(length * F(2)) + F(1)))
    box = float(inner), float(((1 << FRACTION) - (2 * radius + 1) * inner) >> 1)
    one, other = buffers.first[: size * size].reshape(size, size), buffers.second[: size * size].reshape(size, size)
    for c in range(view.shape[0]):
        _transpose(view[c], one)
        _box_columns(one, other, radius, box, sums)  # the rows
        _box_columns(other, one, radius, box, sums)
        _box_columns(one, other, radius, box, sums)
        _transpose(other, one)
        _box_columns(one, other, radius, box, sums)
        _box_columns(other, one, radius, box, sums)
        _box_columns(one, view[c], radius, box, sums)


# ------------------------------------------------------------------------------------------------- a view


@njit(cache=True, nogil=True)
def _render(image: np.ndarray, recipe: np.ndarray, drawn: ViewParameters, buffers: Buffers, out: np.ndarray) -> None:
    """One view of image [H, W, C] with the parameters drawn -> out [C, S, S]."""
    for_resize, for_blur = buffers
    size, highest = out.shape[1], (1 << 8 * out.itemsize) - 1
    height, width = draw.resized(recipe, drawn.crop[2], drawn.crop[3])
    corner = drawn.corner
    if recipe[draw.CROP] == draw.CENTRE:
        corner = (round((height - size) / 2), round((width - size) / 2))
    bicubic = recipe[draw.BICUBIC] != 0
    _resize_crop(image, drawn.crop, (height, width), corner, drawn.flip, bicubic, for_resize, out)
    if drawn.turns > 0:
        _turn(out, drawn.turns)
    if drawn.affine != draw.NOT_MOVED:
        _move(out, drawn.affine)
    planes = out.reshape(out.shape[0], size * size)
    for place in range(draw.ORDER, draw.ORDER + 4):
        step = recipe[place]
        if step == draw.COLOR_JITTER and drawn.jitter:
            _jitter(planes, drawn, highest)
        elif step == draw.GAUSSIAN_BLUR and drawn.sigma > 0:
            if recipe[draw.KERNEL] > 0:
                blur.blur_as_torchvision(out, drawn.sigma, int(recipe[draw.KERNEL]), for_blur)
            else:
                _blur_as_pillow(out, drawn.sigma, for_blur, for_resize.line)
        elif step == draw.SOLARIZATION and drawn.solarize:
            _solarize(planes, int(recipe[draw.THRESHOLD]) * (highest // 255), highest)
    top, left, height, width = drawn.erased
    for c in range(out.shape[0]):
        for y in range(top, top + height):
            for x in range(left, left + width):
                out[c, y, x] = 0


@njit(cache=True, nogil=True)
def make_range(
    images: Images, view_ids: np.ndarray, recipe: np.ndarray, epoch_key: np.uint64, out: np.ndarray, first: int
) -> None:
    """The views of n images into out[:, first : first + n], [V, B, C, S, S]."""
    pixels, heights, widths, ids = images
    buffers = _new_buffers(recipe, pixels[0])
    for b in range(pixels.shape[0]):
        image_key = fold(epoch_key, ids[b])
        for v in range(view_ids.shape[0]):
            drawn = draw.draw_parameters(recipe, fold(image_key, view_ids[v]), heights[b], widths[b])
            _render(pixels[b], recipe, drawn, buffers, out[v, first + b])


@njit(cache=True, nogil=True)
def make_one(image: np.ndarray, recipe: np.ndarray, drawn: ViewParameters, out: np.ndarray) -> None:
    """The view with the parameters drawn of image [H, W, C] -> out [C, S, S]."""
    _render(image, recipe, drawn, _new_buffers(recipe, image), out)
