"""What happens to one view: a recipe in numbers, and the parameters drawn from it.

A recipe is a float64 array with one slot per number (the constants below). Every draw is `keys.uniform(key, n)` of
the view's key with the fixed number n given here, so a recipe that lacks a step leaves the draws of the others alone.
The distributions are those of torchvision's RandomResizedCrop, RandomCrop, RandomHorizontalFlip, RandomGrayscale,
RandomSolarize and RandomErasing, and of ColorJitter, GaussianBlur and RandomAffine under RandomApply.
"""

import math
from typing import NamedTuple

import numpy as np

from ssl_dist.config.recipe import Resize, ViewGroup
from ssl_dist.keys import uniform
from ssl_dist.numba_cache import njit
from ssl_dist.views.resample import Box, Pair, proportional

# Slots of a recipe. SCALE, RATIO, LOG_RATIO, the four of the jitter and SIGMA take two slots: lowest, highest.
SIZE, BICUBIC = 0, 1  # of the view, or the image that patches are cut out of; whether the resize to it is bicubic
CROP, SCALE, RATIO, LOG_RATIO = 2, 3, 5, 7
RESIZE, PADDING = 9, 10  # without a random resized crop: pixels of the resized image's short side
FLIP = 11
JITTER, BRIGHTNESS, CONTRAST, SATURATION, HUE = 12, 13, 15, 17, 19
GRAYSCALE = 21
BLUR, SIGMA, KERNEL = 22, 23, 25  # KERNEL 0: Pillow's blur
SOLARIZE, THRESHOLD = 26, 27
ORDER = 28  # four slots: the steps below in the order in which they run
TURNS, TURN = 32, 33  # how many values there are to draw from, and up to four of them
AFFINE, DEGREES, RIGHT, DOWN, ZOOM, SHEAR = 37, 38, 40, 42, 44, 46
ERASING, ERASED_SCALE, ERASED_LOG_RATIO, FILL = 48, 49, 51, 53
PATCH, PATCH_JITTER = 56, 57  # PATCH: the side of the view that is cut out, 0: none is
SLOTS = 58

CENTRE, RANDOM, PADDED = 0, 1, 2  # what CROP may be
ORDERED = ("color_jitter", "grayscale", "gaussian_blur", "solarize")
COLOR_JITTER, TO_GRAY, GAUSSIAN_BLUR, SOLARIZATION = 1, 2, 3, 4  # what ORDER may hold; 0: no step
NOT_MOVED = (0.0, 0.0, 0.0, 1.0, 0.0)  # what an affine step that is left out has drawn

# Numbers of the draws. The crop's try t uses DRAW_CROP + 4 t + (0 area, 1 ratio, 2 top, 3 left).
CROP_TRIES = ERASING_TRIES = 10
DRAW_CROP = 0
DRAW_FLIP = 40
DRAW_JITTER = 41
DRAW_FACTORS = 42  # brightness, contrast, saturation, hue
DRAW_ORDER = 46  # three exchanges
DRAW_GRAYSCALE = 49
DRAW_CORNER = 50  # top, left of the padded crop
DRAW_BLUR = 52
DRAW_SIGMA = 53
DRAW_SOLARIZE = 54
DRAW_TURN = 55
DRAW_AFFINE = 56
DRAW_MOVE = 57  # degrees, right, down, scale, shear
DRAW_ERASING = 62
DRAW_ERASED = 63  # a try takes four: area, ratio, top, left
DRAW_CELLS = 103  # eight exchanges
DRAW_PATCH = 111  # a cell takes two: down, right

AffineParameters = tuple[float, float, float, float, float]  # degrees, pixels right and down, scale, shear


class ViewParameters(NamedTuple):
    """What is done to one view. A factor of 1 (hue, sigma: 0) stands for a step that is left out."""

    crop: tuple[int, int, int, int]  # top, left, height, width in pixels of the source, after a resize that precedes it
    flip: bool
    jitter: bool  # whether the next five are applied
    brightness: float
    contrast: float
    saturation: float
    hue: float  # turns of the wheel, [-0.5, 0.5]
    order: tuple[int, int, int, int]  # a permutation of 0 brightness, 1 contrast, 2 saturation, 3 hue
    grayscale: bool
    corner: Pair = (0, 0)  # of a padded crop: top, left in the resized image; negative in the padding
    sigma: float = 0.0  # of the blur, pixels
    solarize: bool = False
    turns: int = 0  # right angles, counter-clockwise
    affine: AffineParameters = NOT_MOVED
    erased: Box = (0, 0, 0, 0)  # nothing where the height is 0
    patch: Pair = (0, 0)  # top, left of a grid's patch


def numeric_recipe(group: ViewGroup, size: int) -> np.ndarray:
    """The recipe float64 [SLOTS] of a group whose views have sides of `size` pixels.

    A resize that precedes a random resized crop is not in it: `make_views` does it once for all views of an image.
    """
    recipe = np.zeros(SLOTS)
    recipe[BRIGHTNESS:HUE] = 1.0
    if group.grid_patches is not None:
        recipe[PATCH : PATCH + 2] = size, group.grid_patches.jitter
        size = group.grid_patches.side
    recipe[SIZE] = size
    resize, crop = group.resize or Resize(short_side=size), group.random_resized_crop
    recipe[BICUBIC] = (crop or resize).interpolation == "bicubic"
    if crop is not None:
        recipe[CROP] = RANDOM
        recipe[SCALE : SCALE + 2] = crop.scale
        recipe[RATIO : RATIO + 2] = crop.ratio
        recipe[LOG_RATIO : LOG_RATIO + 2] = [math.log(ratio) for ratio in crop.ratio]
    else:
        recipe[RESIZE] = resize.short_side
    if group.padded_crop is not None:
        recipe[CROP] = PADDED
        recipe[PADDING] = group.padded_crop.padding
    recipe[FLIP] = group.horizontal_flip
    jitter = group.color_jitter
    if jitter is not None:
        recipe[JITTER] = jitter.p
        strengths = {BRIGHTNESS: jitter.brightness, CONTRAST: jitter.contrast, SATURATION: jitter.saturation}
        for slot, strength in strengths.items():
            recipe[slot : slot + 2] = max(0.0, 1.0 - strength), 1.0 + strength
        recipe[HUE : HUE + 2] = -jitter.hue, jitter.hue
    recipe[GRAYSCALE] = group.grayscale
    if group.gaussian_blur is not None:
        recipe[BLUR] = group.gaussian_blur.p
        recipe[SIGMA : SIGMA + 2] = group.gaussian_blur.sigma
        recipe[KERNEL] = group.gaussian_blur.kernel or 0
    if group.solarize is not None:
        recipe[SOLARIZE : SOLARIZE + 2] = group.solarize.p, group.solarize.threshold
    recipe[TURNS] = len(group.quarter_turns)
    recipe[TURN : TURN + len(group.quarter_turns)] = group.quarter_turns
    affine, erasing = group.affine, group.erasing
    if affine is not None:
        recipe[AFFINE] = affine.p
        recipe[DEGREES : DEGREES + 2] = -affine.degrees, affine.degrees
        for slot, share in zip((RIGHT, DOWN), affine.translate, strict=True):
            recipe[slot : slot + 2] = -share * size, share * size
        recipe[ZOOM : ZOOM + 2] = affine.scale
        recipe[SHEAR : SHEAR + 2] = -affine.shear, affine.shear
    if erasing is not None:
        recipe[ERASING] = erasing.p
        recipe[ERASED_SCALE : ERASED_SCALE + 2] = erasing.scale
        recipe[ERASED_LOG_RATIO : ERASED_LOG_RATIO + 2] = [math.log(ratio) for ratio in erasing.ratio]
        recipe[FILL : FILL + 3] = erasing.fill
    recipe[ORDER : ORDER + len(group.order)] = [1 + ORDERED.index(step) for step in group.order]
    return recipe


@njit(inline="always", cache=True)
def _between(recipe: np.ndarray, slot: int, u: float) -> float:
    return recipe[slot] + (recipe[slot + 1] - recipe[slot]) * u


@njit(cache=True, nogil=True)
def _draw_crop(recipe: np.ndarray, key: np.uint64, height: int, width: int) -> Box:
    """The crop of RandomResizedCrop.get_params: ten tries, then the largest central crop within the ratio's range."""
    area = height * width
    for attempt in range(CROP_TRIES):
        n = DRAW_CROP + 4 * attempt
        target = area * _between(recipe, SCALE, uniform(key, n))
        ratio = math.exp(_between(recipe, LOG_RATIO, uniform(key, n + 1)))
        w = round(math.sqrt(target * ratio))
        h = round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(uniform(key, n + 2) * (height - h + 1))
            left = int(uniform(key, n + 3) * (width - w + 1))
            return top, left, h, w
    h, w = height, width
    if width / height < recipe[RATIO]:
        h = max(round(width / recipe[RATIO]), 1)
    elif width / height > recipe[RATIO + 1]:
        w = max(round(height * recipe[RATIO + 1]), 1)
    return (height - h) // 2, (width - w) // 2, h, w


@njit(cache=True, inline="always")
def _shuffled(key: np.uint64, n: int, count: int) -> int:
    """0 .. count - 1 in an order drawn by Fisher and Yates' exchanges, from draw n on.

    Four bits a place, the first one lowest: an array would cost more than all the draws.
    """
    order = 0x876543210
    for i in range(count - 1):
        j = i + int(uniform(key, n + i) * (count - i))
        change = (order >> 4 * j & 15) - (order >> 4 * i & 15)
        order += (change << 4 * i) - (change << 4 * j)
    return order


@njit(cache=True, inline="always")
def resized(recipe: np.ndarray, height: int, width: int) -> Pair:
    """Height and width that a crop of height x width pixels is resized to, before S x S pixels of it are kept."""
    if recipe[CROP] == RANDOM:
        return int(recipe[SIZE]), int(recipe[SIZE])
    return proportional(int(recipe[RESIZE]), height, width)


@njit(cache=True, nogil=True)
def _draw_corner(recipe: np.ndarray, key: np.uint64, height: int, width: int) -> Pair:
    """The top left corner of RandomCrop's window in the image resized and padded; in the padding it is negative."""
    new_height, new_width = resized(recipe, height, width)
    padding, size = int(recipe[PADDING]), int(recipe[SIZE])
    top = int(uniform(key, DRAW_CORNER) * (new_height + 2 * padding - size + 1)) - padding
    left = int(uniform(key, DRAW_CORNER + 1) * (new_width + 2 * padding - size + 1)) - padding
    return top, left


@njit(cache=True, nogil=True)
def _draw_affine(recipe: np.ndarray, key: np.uint64) -> AffineParameters:
    """The parameters of RandomAffine.get_params."""
    return (
        _between(recipe, DEGREES, uniform(key, DRAW_MOVE)),
        float(round(_between(recipe, RIGHT, uniform(key, DRAW_MOVE + 1)))),
        float(round(_between(recipe, DOWN, uniform(key, DRAW_MOVE + 2)))),
        _between(recipe, ZOOM, uniform(key, DRAW_MOVE + 3)),
        _between(recipe, SHEAR, uniform(key, DRAW_MOVE + 4)),
    )


@njit(cache=True, nogil=True)
def _draw_erased(recipe: np.ndarray, key: np.uint64) -> Box:
    """The rectangle of RandomErasing.get_params: ten tries, then nothing; it is lower and narrower than the view."""
    size = int(recipe[SIZE])
    for attempt in range(ERASING_TRIES):
        n = DRAW_ERASED + 4 * attempt
        area = size * size * _between(recipe, ERASED_SCALE, uniform(key, n))
        ratio = math.exp(_between(recipe, ERASED_LOG_RATIO, uniform(key, n + 1)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if h < size and w < size:
            return int(uniform(key, n + 2) * (size - h + 1)), int(uniform(key, n + 3) * (size - w + 1)), h, w
    return 0, 0, 0, 0


@njit(cache=True, nogil=True)
def draw_parameters(recipe: np.ndarray, key: np.uint64, height: int, width: int) -> ViewParameters:
    """The parameters of the view with this key of an image of height x width pixels, after a resize before a crop."""
    crop, corner = (0, 0, height, width), (0, 0)
    if recipe[CROP] == RANDOM:
        crop = _draw_crop(recipe, key, height, width)
    elif recipe[CROP] == PADDED:
        corner = _draw_corner(recipe, key, height, width)
    order = _shuffled(key, DRAW_ORDER, 4)
    sigma, solarize = 0.0, False
    if recipe[BLUR] > 0 and uniform(key, DRAW_BLUR) < recipe[BLUR]:
        sigma = _between(recipe, SIGMA, uniform(key, DRAW_SIGMA))
    if recipe[SOLARIZE] > 0:
        solarize = uniform(key, DRAW_SOLARIZE) < recipe[SOLARIZE]
    turn, affine, erased = TURN, NOT_MOVED, (0, 0, 0, 0)
    if recipe[TURNS] > 1:
        turn += int(uniform(key, DRAW_TURN) * recipe[TURNS])
    if recipe[AFFINE] > 0 and uniform(key, DRAW_AFFINE) < recipe[AFFINE]:
        affine = _draw_affine(recipe, key)
    if recipe[ERASING] > 0 and uniform(key, DRAW_ERASING) < recipe[ERASING]:
        erased = _draw_erased(recipe, key)
    return ViewParameters(
        crop,
        uniform(key, DRAW_FLIP) < recipe[FLIP],
        uniform(key, DRAW_JITTER) < recipe[JITTER],
        _between(recipe, BRIGHTNESS, uniform(key, DRAW_FACTORS)),
        _between(recipe, CONTRAST, uniform(key, DRAW_FACTORS + 1)),
        _between(recipe, SATURATION, uniform(key, DRAW_FACTORS + 2)),
        _between(recipe, HUE, uniform(key, DRAW_FACTORS + 3)),
        (order & 15, order >> 4 & 15, order >> 8 & 15, order >> 12 & 15),
        uniform(key, DRAW_GRAYSCALE) < recipe[GRAYSCALE],
        corner,
        sigma,
        solarize,
        int(recipe[turn]),
        affine,
        erased,
        (0, 0),
    )


@njit(cache=True, nogil=True)
def draw_patch(recipe: np.ndarray, key: np.uint64, n: int) -> Pair:
    """Top and left of the n-th patch of a grid; `key` is that of the group's first view, which all its views share."""
    cell = _shuffled(key, DRAW_CELLS, 9) >> 4 * n & 15
    step = (int(recipe[SIZE]) - int(recipe[PATCH]) - int(recipe[PATCH_JITTER])) // 2
    choices = int(recipe[PATCH_JITTER]) + 1
    down = int(uniform(key, DRAW_PATCH + 2 * cell) * choices)
    right = int(uniform(key, DRAW_PATCH + 2 * cell + 1) * choices)
    return cell // 3 * step + down, cell % 3 * step + right
