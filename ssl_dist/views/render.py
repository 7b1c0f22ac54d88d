"""The view kernel: compiled functions that make views of decoded images, uint8 in and uint8 out, without the GIL."""

from typing import NamedTuple

import numpy as np

from ssl_dist.keys import fold
from ssl_dist.numba_cache import njit
from ssl_dist.views import blur, color, draw, geometry, resample
from ssl_dist.views.draw import ViewParameters

Buffers = tuple[resample.Buffers, blur.Buffers]


class Images(NamedTuple):
    """n decoded images: image b is pixels[b, :heights[b], :widths[b]]."""

    pixels: np.ndarray  # uint8 [n, Hmax, Wmax, 3]
    heights: np.ndarray  # int64 [n], as widths and ids
    widths: np.ndarray
    ids: np.ndarray


@njit(cache=True, inline="always")
def _new_buffers(recipe: np.ndarray, max_height: int, max_width: int) -> Buffers:
    """Buffers of one thread for resizing and for blurring, reused for all its views."""
    size = int(recipe[draw.SIZE])
    shortest = size if recipe[draw.CROP] == draw.RANDOM else int(recipe[draw.RESIZE])
    for_resize = resample.new_buffers(max_height, max_width, (size, size), shortest, recipe[draw.BICUBIC] != 0)
    return for_resize, blur.new_buffers(size, recipe[draw.SIGMA + 1], int(recipe[draw.KERNEL]))


@njit(cache=True, inline="always")
def _jitter(rgb: np.ndarray, drawn: ViewParameters) -> None:
    for step in drawn.order:
        if step == 0 and drawn.brightness != 1:
            color.adjust_brightness(rgb, np.float32(drawn.brightness))
        elif step == 1 and drawn.contrast != 1:
            color.adjust_contrast(rgb, np.float32(drawn.contrast))
        elif step == 2 and drawn.saturation != 1:
            color.adjust_saturation(rgb, np.float32(drawn.saturation))
        elif step == 3 and drawn.hue != 0:
            color.adjust_hue(rgb, np.float32(drawn.hue))


@njit(cache=True, inline="always")
def _render(image: np.ndarray, recipe: np.ndarray, drawn: ViewParameters, buffers: Buffers, out: np.ndarray) -> None:
    """One view of image uint8 [H, W, 3] with the parameters drawn -> out uint8 [3, S, S]."""
    for_resize, for_blur = buffers
    size = out.shape[1]
    height, width = draw.resized(recipe, drawn.crop[2], drawn.crop[3])
    corner = drawn.corner
    if recipe[draw.CROP] == draw.CENTRE:
        corner = (round((height - size) / 2), round((width - size) / 2))
    bicubic = recipe[draw.BICUBIC] != 0
    resample.resize_crop(image, drawn.crop, (height, width), corner, drawn.flip, bicubic, for_resize, out)
    if drawn.turns > 0:
        geometry.turn(out, drawn.turns, for_blur.first)
    if drawn.affine != draw.NOT_MOVED:
        geometry.move(out, drawn.affine, for_blur.first)
    rgb = out.reshape(3, size * size)
    for place in range(draw.ORDER, draw.ORDER + 4):
        step = recipe[place]
        if step == draw.COLOR_JITTER and drawn.jitter:
            _jitter(rgb, drawn)
        elif step == draw.TO_GRAY and drawn.grayscale:
            color.to_gray(rgb)
        elif step == draw.GAUSSIAN_BLUR and drawn.sigma > 0:
            if recipe[draw.KERNEL] > 0:
                blur.blur_as_torchvision(out, drawn.sigma, int(recipe[draw.KERNEL]), for_blur)
            else:
                blur.blur_as_pillow(out, drawn.sigma, for_blur)
        elif step == draw.SOLARIZATION and drawn.solarize:
            color.solarize(rgb, int(recipe[draw.THRESHOLD]))
    if drawn.erased[2] > 0:
        geometry.erase(out, drawn.erased, recipe[draw.FILL], recipe[draw.FILL + 1], recipe[draw.FILL + 2])


@njit(cache=True, nogil=True)
def make_range(
    images: Images, view_ids: np.ndarray, recipe: np.ndarray, epoch_key: np.uint64, out: np.ndarray, first: int
) -> None:
    """The views of n images into out[:, first : first + n], uint8 [V, B, 3, S, S]."""
    pixels, heights, widths, ids = images
    buffers = _new_buffers(recipe, pixels.shape[1], pixels.shape[2])
    for b in range(pixels.shape[0]):
        image_key = fold(epoch_key, ids[b])
        for v in range(view_ids.shape[0]):
            drawn = draw.draw_parameters(recipe, fold(image_key, view_ids[v]), heights[b], widths[b])
            _render(pixels[b], recipe, drawn, buffers, out[v, first + b])


@njit(cache=True, nogil=True)
def make_one(image: np.ndarray, recipe: np.ndarray, drawn: ViewParameters, out: np.ndarray) -> None:
    """The view with the parameters drawn of image uint8 [H, W, 3] -> out uint8 [3, S, S]."""
    buffers = _new_buffers(recipe, image.shape[0], image.shape[1])
    _render(image, recipe, drawn, buffers, out)
