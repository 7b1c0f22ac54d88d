"""K views of decoded images: one compiled function, uint8 in and uint8 out, that runs without the GIL.

Every parameter of a view is a function of keys.hash64(seed, VIEWS, epoch, image id, view id) and the image's size, so
no thread, batch, shard or reader can change a pixel. The steps and their order are those of `config.ViewGroup`; the
pixels equal those of torchvision's transforms on PIL images (what that means: resample.py, color.py).
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numba import njit

from ssl_dist.config import ViewGroup
from ssl_dist.data import color, resample
from ssl_dist.data.views_draw import RESIZE, ViewParameters, draw_parameters, numeric_recipe
from ssl_dist.errors import UserError
from ssl_dist.keys import VIEWS, fold, hash64


@dataclass(frozen=True, eq=False)
class ViewSpec:
    """A group of views of one size. `params`: the recipe as read by the kernel, float64, slots in views_draw.py."""

    size: int
    num: int
    first_view: int
    params: np.ndarray

    def __post_init__(self):
        self.params.flags.writeable = False

    @property
    def view_ids(self) -> np.ndarray:
        """int64 [num], counted over all groups."""
        return np.arange(self.first_view, self.first_view + self.num, dtype=np.int64)


def view_specs(groups: Sequence[ViewGroup], num_views: int, image_size: int) -> list[ViewSpec]:
    """One spec a group, view ids counted through all of them. Raises `UserError` unless the nums make `num_views`."""
    nums = [num_views if group.num is None and len(groups) == 1 else group.num for group in groups]
    if None in nums:
        raise UserError(f"views.groups[{nums.index(None)}].num = null: give each of several groups its num")
    if sum(nums) != num_views:
        raise UserError(f"views.groups: num adds up to {sum(nums)}, but {num_views} views are wanted; change either")
    specs, first = [], 0
    for group, num in zip(groups, nums, strict=True):
        size = image_size if group.size is None else group.size
        specs.append(ViewSpec(size, num, first, numeric_recipe(group, resize=size)))
        first += num
    return specs


@njit(cache=True, inline="always")
def _render(image, resize, drawn, work, out):
    """One view of image uint8 [H, W, 3] with the parameters drawn -> out uint8 [3, S, S]."""
    resample.resize_crop(image, drawn.crop, drawn.flip, resize, work, out)
    rgb = out.reshape(3, out.shape[1] * out.shape[2])
    if drawn.jitter:
        for step in drawn.order:
            if step == 0 and drawn.brightness != 1:
                color.adjust_brightness(rgb, np.float32(drawn.brightness))
            elif step == 1 and drawn.contrast != 1:
                color.adjust_contrast(rgb, np.float32(drawn.contrast))
            elif step == 2 and drawn.saturation != 1:
                color.adjust_saturation(rgb, np.float32(drawn.saturation))
            elif step == 3 and drawn.hue != 0:
                color.adjust_hue(rgb, np.float32(drawn.hue))
    if drawn.grayscale:
        color.to_gray(rgb)


@njit(cache=True, nogil=True)
def _make_range(pixels, heights, widths, ids, view_ids, recipe, epoch_key, out, lo, hi):
    """The views of images lo .. hi - 1 into out uint8 [V, B, 3, S, S]."""
    work = resample.new_work(pixels.shape[1], pixels.shape[2], out.shape[3])
    resize = int(recipe[RESIZE])
    for b in range(lo, hi):
        image_key = fold(epoch_key, ids[b])
        for v in range(view_ids.shape[0]):
            drawn = draw_parameters(recipe, fold(image_key, view_ids[v]), heights[b], widths[b])
            _render(pixels[b], resize, drawn, work, out[v, b])


def _read_only(array, dtype):
    """A contiguous read-only view: writable and read-only arrays are two types to numba, each its own compilation."""
    array = np.ascontiguousarray(array, dtype).view()
    array.flags.writeable = False
    return array


def make_views(
    pixels: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    ids: np.ndarray,
    spec: ViewSpec,
    view_ids: np.ndarray,
    seed: int,
    epoch: int,
    out: np.ndarray | None = None,
    pool: ThreadPoolExecutor | None = None,
    threads: int = 1,
) -> np.ndarray:
    """Views uint8 [V, B, 3, S, S] of images b = pixels[b, :heights[b], :widths[b]], pixels uint8 [B, Hmax, Wmax, 3].

    ids int64 [B] and view_ids int64 [V] (any of the spec's) name the draws. The images are cut into `threads` even
    slices that run in `pool`, or all here without one.
    """
    num_images, num_views = len(pixels), len(view_ids)
    assert pixels.dtype == np.uint8 and pixels.ndim == 4 and pixels.shape[3] == 3, (pixels.dtype, pixels.shape)
    assert len(heights) == len(widths) == len(ids) == num_images
    shape = (num_views, num_images, 3, spec.size, spec.size)
    if out is None:
        out = np.empty(shape, np.uint8)
    assert out.shape == shape and out.dtype == np.uint8 and out.flags.c_contiguous, (out.shape, shape)
    if num_images == 0 or num_views == 0:
        return out
    # the kernel does not check its indices
    assert np.min(heights) >= 1 and np.max(heights) <= pixels.shape[1], (heights, pixels.shape)
    assert np.min(widths) >= 1 and np.max(widths) <= pixels.shape[2], (widths, pixels.shape)
    pixels = _read_only(pixels, np.uint8)
    heights, widths, ids, view_ids = (_read_only(a, np.int64) for a in (heights, widths, ids, view_ids))
    arguments = (pixels, heights, widths, ids, view_ids, spec.params, hash64(seed, VIEWS, epoch), out)
    if pool is None:
        _make_range(*arguments, 0, num_images)
        return out
    edges = [num_images * i // threads for i in range(threads + 1)]
    for job in [pool.submit(_make_range, *arguments, lo, hi) for lo, hi in pairwise(edges) if lo < hi]:
        job.result()
    return out


def test_views(
    pixels: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    size: int,
    resize: int | None = None,
    out: np.ndarray | None = None,
    pool: ThreadPoolExecutor | None = None,
    threads: int = 1,
) -> np.ndarray:
    """The one view for evaluation, uint8 [B, 3, S, S]: short side to `resize` (null: size), then the centre crop.

    Equals torchvision's Resize(resize) and CenterCrop(size) on a PIL image; an image of size x size stays as it is.
    Raises `UserError` when resize < size.
    """
    resize = size if resize is None else resize
    if resize < size:
        raise UserError(f"resize = {resize}: must be at least the size of the centre crop, {size}")
    spec = ViewSpec(size, 1, 0, numeric_recipe(ViewGroup(), resize))  # a recipe with nothing random in it
    ids = np.zeros(len(pixels), np.int64)
    out = None if out is None else out[None]
    return make_views(pixels, heights, widths, ids, spec, spec.view_ids, 0, 0, out, pool, threads)[0]


def draw(spec: ViewSpec, seed: int, epoch: int, image_id: int, view_id: int, height: int, width: int) -> ViewParameters:
    """The parameters that `make_views` uses for this view of an image of height x width pixels."""
    return draw_parameters(spec.params, hash64(seed, VIEWS, epoch, image_id, view_id), height, width)


@njit(cache=True, nogil=True)
def _apply(image, resize, drawn, out):
    _render(image, resize, drawn, resample.new_work(image.shape[0], image.shape[1], out.shape[1]), out)


def apply(image: np.ndarray, spec: ViewSpec, parameters: ViewParameters) -> np.ndarray:
    """The view uint8 [3, S, S] of image uint8 [H, W, 3] with these parameters, by the kernel's own code."""
    top, left, height, width = (int(n) for n in parameters.crop)
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3, (image.dtype, image.shape)
    assert top >= 0 and height > 0 and top + height <= image.shape[0], (parameters.crop, image.shape)
    assert left >= 0 and width > 0 and left + width <= image.shape[1], (parameters.crop, image.shape)
    drawn = ViewParameters(
        (top, left, height, width),
        bool(parameters.flip),
        bool(parameters.jitter),
        *(float(factor) for factor in parameters[3:7]),
        tuple(int(step) for step in parameters.order),
        bool(parameters.grayscale),
    )
    out = np.empty((3, spec.size, spec.size), np.uint8)
    _apply(_read_only(image, np.uint8), int(spec.params[RESIZE]), drawn, out)
    return out


def warm_up(spec: ViewSpec) -> None:
    """Compile the kernel, or load it from numba's cache, in the calling thread (10 s of CPU, once on a machine)."""
    one = np.ones(1, np.int64)
    make_views(np.zeros((1, 1, 1, 3), np.uint8), one, one, one, spec, spec.view_ids[:1], 0, 0)
