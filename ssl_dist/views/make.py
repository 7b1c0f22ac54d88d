"""K views of decoded images: one compiled function, uint8 in and uint8 out, that runs without the GIL. Images of other
channels than RGB, and uint16 ones, have a kernel of their own (planes.py).

Every parameter of a view is a function of keys.hash64(seed, VIEWS, epoch, image id, view id) and the image's size, so
no thread, batch, shard or reader can change a pixel. The steps and their order are those of `config.ViewGroup`;
the pixels equal those of torchvision's transforms on PIL images (what that means: resample.py, color.py, blur.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from ssl_dist.config.recipe import Interpolation, Resize, ViewGroup
from ssl_dist.errors import UserError
from ssl_dist.keys import VIEWS, hash64, row_keys
from ssl_dist.thread_team import ALONE, ThreadTeam
from ssl_dist.views import planes, render, resample
from ssl_dist.views.draw import PATCH, SIZE, ViewParameters, draw_parameters, draw_patch, numeric_recipe
from ssl_dist.views.pixels import MAX_CHANNELS, RGB, PixelFormat, refuse_steps_of_colour
from ssl_dist.views.render import Images
from ssl_dist.views.resample import Pair


@dataclass(frozen=True, eq=False)
class ViewSpec:
    """A group of views of one size. `params`: the recipe as read by the kernel, float64, slots in draw.py."""

    size: int
    num: int
    first_view: int
    params: np.ndarray
    resize: Resize | None = None  # of an image before random resized crops are taken out of it

    def __post_init__(self) -> None:
        self.params.flags.writeable = False

    @property
    def patches(self) -> bool:
        """Whether the views are patches of one image, which the recipe makes for the first view's key."""
        return self.params[PATCH] > 0

    @property
    def side(self) -> int:
        """Of what the recipe makes, in pixels: the view, or the image that patches are cut out of."""
        return int(self.params[SIZE])

    @property
    def view_ids(self) -> np.ndarray:
        """int64 [num], counted over all groups."""
        return np.arange(self.first_view, self.first_view + self.num, dtype=np.int64)


def view_specs(
    groups: Sequence[ViewGroup], num_views: int, image_size: int, pixels: PixelFormat = RGB
) -> list[ViewSpec]:
    """One spec a group, view ids counted through all of them. Raises `UserError` unless the nums make `num_views`, and
    for steps of colour where the images' pixels are not RGB."""
    refuse_steps_of_colour(groups, pixels)
    specs: list[ViewSpec] = []
    first = 0
    for n, group in enumerate(groups):
        num = num_views if group.num is None and len(groups) == 1 else group.num
        if num is None:
            raise UserError(f"views.groups[{n}].num = null: give each of several groups its num")
        size = image_size if group.size is None else group.size
        _check_sizes(group, num, size, f"views.groups.{n}")
        before = group.resize if group.random_resized_crop is not None else None
        specs.append(ViewSpec(size, num, first, numeric_recipe(group, size), before))
        first += num
    if first != num_views:
        raise UserError(f"views.groups: num adds up to {first}, but {num_views} views are wanted; change either")
    return specs


def _check_sizes(group: ViewGroup, num: int, size: int, name: str) -> None:
    grid = group.grid_patches
    if grid is not None:
        if num > 9:
            raise UserError(f"{name}.num = {num}: a grid has 9 patches; lower it, or make a further group")
        if grid.side < size + grid.jitter:
            raise UserError(
                f"{name}.grid_patches.side = {grid.side}: patches of {size} px that move by {grid.jitter} need more; "
                f"raise it to {size + grid.jitter} at least"
            )
        size = grid.side
    resize, padding = group.resize, group.padded_crop.padding if group.padded_crop is not None else 0
    if resize is not None and group.random_resized_crop is None and resize.short_side + 2 * padding < size:
        raise UserError(
            f"{name}.resize.short_side = {resize.short_side}: with a padding of {padding} px smaller than the crop of "
            f"{size} px; raise it, or lower the group's size"
        )
    kernel = group.gaussian_blur.kernel if group.gaussian_blur is not None else None
    if kernel is not None and kernel // 2 >= size:
        raise UserError(
            f"{name}.gaussian_blur.kernel = {kernel}: too large for views of {size} px; {2 * size - 1} fits"
        )


def _read_only(array: ArrayLike, dtype: DTypeLike) -> np.ndarray:
    """A contiguous read-only view: writable and read-only arrays are two types to numba, each its own compilation."""
    view: np.ndarray = np.ascontiguousarray(array, dtype).view()
    view.flags.writeable = False
    return view


def make_views(
    images: Images,
    spec: ViewSpec,
    view_ids: np.ndarray,
    seed: int,
    epoch: int,
    team: ThreadTeam = ALONE,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Views uint8 [V, B, 3, S, S] of the images; [V, B, C, S, S] of C channels, uint16 of uint16. view_ids: int64 [V],
    any of the spec's; they and the images' ids name the draws. The team's threads share the images. out: where the
    views are written; None: into an array of their own.
    """
    pixels, heights, widths, ids = images
    num_images = len(pixels)
    assert pixels.ndim == 4 and _has_a_kernel(pixels), (pixels.dtype, pixels.shape)
    assert len(heights) == len(widths) == len(ids) == num_images
    shape = (len(view_ids), num_images, pixels.shape[3], spec.size, spec.size)
    out = np.empty(shape, pixels.dtype) if out is None else out
    assert out.shape == shape and out.dtype == pixels.dtype and out.flags.c_contiguous, (out.shape, out.dtype)
    if out.size == 0:
        return out
    # the kernel does not check its indices
    assert np.min(heights) >= 1 and np.max(heights) <= pixels.shape[1], (heights, pixels.shape)
    assert np.min(widths) >= 1 and np.max(widths) <= pixels.shape[2], (widths, pixels.shape)
    images = Images(_read_only(pixels, pixels.dtype), *(_read_only(a, np.int64) for a in (heights, widths, ids)))
    view_ids, epoch_key = _read_only(view_ids, np.int64), hash64(seed, VIEWS, epoch)

    def make(lo: int, hi: int) -> None:
        _make_slice(spec, Images._make(array[lo:hi] for array in images), view_ids, epoch_key, out, lo)

    team.run(make, num_images)
    return out


def _has_a_kernel(pixels: np.ndarray) -> bool:
    return pixels.dtype in (np.uint8, np.uint16) and 1 <= pixels.shape[-1] <= MAX_CHANNELS


def _is_rgb(pixels: np.ndarray) -> bool:
    """Of images [..., C]: whether they have the kernel of RGB with 8 bits."""
    return PixelFormat.of(pixels).is_rgb


def _make_slice(
    spec: ViewSpec, images: Images, view_ids: np.ndarray, epoch_key: np.uint64, out: np.ndarray, first: int
) -> None:
    """The views of n images into out[:, first : first + n]."""
    kernel, channels = render if _is_rgb(images.pixels) else planes, images.pixels.shape[3]
    if spec.resize is None and not spec.patches:
        kernel.make_range(images, view_ids, spec.params, epoch_key, out, first)
        return
    first_view = _read_only([spec.first_view], np.int64)
    for b in range(len(images.ids)):  # image by image, because one that is very long becomes large
        image = Images._make(array[b : b + 1] for array in images)
        if spec.resize is not None:
            pixels = _resized(images.pixels[b], images.heights[b], images.widths[b], spec.resize)
            height, width = (_read_only([side], np.int64) for side in pixels.shape[:2])
            image = Images(pixels[None], height, width, image.ids)
        if not spec.patches:
            kernel.make_range(image, view_ids, spec.params, epoch_key, out, first + b)
            continue
        whole = np.empty((1, 1, channels, spec.side, spec.side), out.dtype)
        kernel.make_range(image, first_view, spec.params, epoch_key, whole, 0)
        [[key]] = row_keys(epoch_key, image.ids, first_view)
        for v, view_id in enumerate(view_ids):
            out[v, first + b] = _cut(whole[0, 0], spec, draw_patch(spec.params, key, view_id - spec.first_view))


def _cut(image: np.ndarray, spec: ViewSpec, corner: Pair) -> np.ndarray:
    """The view whose top left corner lies there in image uint8 [3, side, side]."""
    top, left = corner
    return image[:, top : top + spec.size, left : left + spec.size]


def _resized(image: np.ndarray, height: int, width: int, resize: Resize) -> np.ndarray:
    """The first height x width pixels of image [H, W, C] resized, [H', W', C]."""
    resize_image = resample.resize_image if _is_rgb(image) else planes.resize_image
    sides = resample.proportional(resize.short_side, int(height), int(width))
    resized = resize_image(image, int(height), int(width), sides, resize.interpolation == "bicubic")
    return _read_only(np.stack(list(resized), -1), image.dtype)


def test_views(
    images: Images,
    size: int,
    resize: int | None = None,
    interpolation: Interpolation = "bilinear",
    team: ThreadTeam = ALONE,
) -> np.ndarray:
    """The one view for evaluation, [B, C, S, S] of the images' own type: short side to `resize` (null: size), then the
    centre crop.

    Equals torchvision's Resize(resize, interpolation) and CenterCrop(size) on a PIL image; an image of size x size
    stays as it is. Raises `UserError` when resize < size.
    """
    resize = _checked_resize(size, resize)
    group = ViewGroup(resize=Resize(short_side=resize, interpolation=interpolation))  # nothing random in it
    spec = ViewSpec(size, 1, 0, numeric_recipe(group, size))
    return make_views(images, spec, spec.view_ids, 0, 0, team)[0]


def ten_crops(
    images: Images,
    size: int,
    resize: int | None = None,
    interpolation: Interpolation = "bilinear",
    team: ThreadTeam = ALONE,
) -> np.ndarray:
    """Ten views for evaluation, [B, 10, C, S, S] of the images' own type: short side to `resize` (null: size), then its
    corners (top left, top right, bottom left, bottom right) and its centre, and those of the mirrored image.

    Equals torchvision's Resize(resize, interpolation) and TenCrop(size) on a PIL image. Raises `UserError` when
    resize < size.
    """
    how = Resize(short_side=_checked_resize(size, resize), interpolation=interpolation)
    pixels = _read_only(images.pixels, images.pixels.dtype)
    out = np.empty((len(pixels), 10, pixels.shape[3], size, size), pixels.dtype)

    def make(low: int, high: int) -> None:
        for b in range(low, high):
            whole = _resized(pixels[b], images.heights[b], images.widths[b], how).transpose(2, 0, 1)
            down, right = whole.shape[1] - size, whole.shape[2] - size
            corners = [(0, 0), (0, right), (down, 0), (down, right), (round(down / 2), round(right / 2))]
            for n, (top, left) in enumerate(corners):
                out[b, n] = whole[:, top : top + size, left : left + size]
                out[b, 5 + n] = whole[:, :, ::-1][:, top : top + size, left : left + size]

    team.run(make, len(pixels))
    return out


def _checked_resize(size: int, resize: int | None) -> int:
    resize = size if resize is None else resize
    if resize < size:
        raise UserError(f"resize = {resize}: must be at least the size of the centre crop, {size}")
    return resize


def draw_view(
    spec: ViewSpec, seed: int, epoch: int, image_id: int, view_id: int, height: int, width: int
) -> ViewParameters:
    """The parameters that `make_views` uses for this view of an image of height x width pixels."""
    if spec.resize is not None:
        height, width = resample.proportional(spec.resize.short_side, height, width)
    key = hash64(seed, VIEWS, epoch, image_id, spec.first_view if spec.patches else view_id)
    drawn = draw_parameters(spec.params, key, height, width)
    return drawn._replace(patch=draw_patch(spec.params, key, view_id - spec.first_view)) if spec.patches else drawn


def render_view(image: np.ndarray, spec: ViewSpec, parameters: ViewParameters) -> np.ndarray:
    """The view [C, S, S] of image [H, W, C] with these parameters, by the kernel's own code."""
    assert image.ndim == 3 and _has_a_kernel(image), (image.dtype, image.shape)
    image = _read_only(image, image.dtype)
    if spec.resize is not None:
        image = _resized(image, image.shape[0], image.shape[1], spec.resize)
    top, left, height, width = parameters.crop
    assert top >= 0 and height > 0 and top + height <= image.shape[0], (parameters.crop, image.shape)
    assert left >= 0 and width > 0 and left + width <= image.shape[1], (parameters.crop, image.shape)
    out = np.empty((image.shape[2], spec.side, spec.side), image.dtype)
    (render if _is_rgb(image) else planes).make_one(image, spec.params, parameters, out)
    return _cut(out, spec, parameters.patch)


def warm_up(spec: ViewSpec, pixels: PixelFormat = RGB) -> None:
    """Compile the kernel, or load it from numba's cache, in the calling thread (15 s of CPU, once on a machine)."""
    one = np.ones(1, np.int64)
    make_views(Images(np.zeros((1, 1, 1, pixels.channels), pixels.dtype), one, one, one), spec, spec.view_ids[:1], 0, 0)
