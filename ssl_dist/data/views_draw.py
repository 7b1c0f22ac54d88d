"""What happens to one view: a recipe in numbers, and the parameters drawn from it.

A recipe is a float64 array with one slot per number (the constants below). Every draw is `keys.uniform(key, n)` of
the view's key with the fixed number n given here, so a recipe that lacks a step leaves the draws of the others alone.
The distributions are those of torchvision's RandomResizedCrop, RandomHorizontalFlip, ColorJitter under RandomApply,
and RandomGrayscale.
"""

import math
from typing import NamedTuple

import numpy as np
from numba import njit

from ssl_dist.config import ViewGroup
from ssl_dist.keys import uniform

# Slots of a recipe. RESIZE: 0 = random resized crop; n > 0 = the short side becomes n pixels, then a centre crop.
RESIZE, SCALE, RATIO, FLIP, JITTER, BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAYSCALE = 0, 1, 3, 5, 6, 7, 9, 11, 13, 15
SLOTS = 16  # SCALE, RATIO and the four of the jitter take two slots: lowest, highest

# Numbers of the draws. The crop's try t uses DRAW_CROP + 4 t + (0 area, 1 ratio, 2 top, 3 left).
CROP_TRIES = 10
DRAW_CROP = 0
DRAW_FLIP = 40
DRAW_JITTER = 41
DRAW_FACTORS = 42  # brightness, contrast, saturation, hue
DRAW_ORDER = 46  # three exchanges
DRAW_GRAYSCALE = 49


class ViewParameters(NamedTuple):
    """What is done to one view, in this order. A factor of 1 (hue: 0) stands for a step that is left out."""

    crop: tuple[int, int, int, int]  # top, left, height, width in pixels of the source
    flip: bool
    jitter: bool  # whether the next five are applied
    brightness: float
    contrast: float
    saturation: float
    hue: float  # turns of the wheel, [-0.5, 0.5]
    order: tuple[int, int, int, int]  # a permutation of 0 brightness, 1 contrast, 2 saturation, 3 hue
    grayscale: bool


def numeric_recipe(group: ViewGroup, resize: int) -> np.ndarray:
    """The recipe float64 [SLOTS] of a group; `resize` is the short side of a group without a random crop."""
    recipe = np.zeros(SLOTS)
    recipe[BRIGHTNESS:HUE] = 1.0
    recipe[RESIZE] = resize
    if group.random_resized_crop is not None:
        recipe[RESIZE] = 0
        recipe[SCALE : SCALE + 2] = group.random_resized_crop.scale
        recipe[RATIO : RATIO + 2] = group.random_resized_crop.ratio
    recipe[FLIP] = group.horizontal_flip
    jitter = group.color_jitter
    if jitter is not None:
        recipe[JITTER] = jitter.p
        strengths = {BRIGHTNESS: jitter.brightness, CONTRAST: jitter.contrast, SATURATION: jitter.saturation}
        for slot, strength in strengths.items():
            recipe[slot : slot + 2] = max(0.0, 1.0 - strength), 1.0 + strength
        recipe[HUE : HUE + 2] = -jitter.hue, jitter.hue
    recipe[GRAYSCALE] = group.grayscale
    return recipe


@njit(inline="always", cache=True)
def _between(recipe, slot, u):
    return recipe[slot] + (recipe[slot + 1] - recipe[slot]) * u


@njit(cache=True, nogil=True)
def _draw_crop(recipe, key, height, width):
    """The crop of RandomResizedCrop.get_params: ten tries, then the largest central crop within the ratio's range."""
    area = height * width
    log_low, log_high = math.log(recipe[RATIO]), math.log(recipe[RATIO + 1])
    for attempt in range(CROP_TRIES):
        n = DRAW_CROP + 4 * attempt
        target = area * _between(recipe, SCALE, uniform(key, n))
        ratio = math.exp(log_low + (log_high - log_low) * uniform(key, n + 1))
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


@njit(cache=True, nogil=True)
def draw_parameters(recipe, key, height, width):
    """The parameters of the view with this key of an image of height x width pixels."""
    crop = (0, 0, height, width)
    if recipe[RESIZE] == 0:
        crop = _draw_crop(recipe, key, height, width)
    order = np.arange(4)  # shuffled by Fisher and Yates' exchanges
    for i in range(3):
        j = i + int(uniform(key, DRAW_ORDER + i) * (4 - i))
        order[i], order[j] = order[j], order[i]
    return ViewParameters(
        crop,
        uniform(key, DRAW_FLIP) < recipe[FLIP],
        uniform(key, DRAW_JITTER) < recipe[JITTER],
        _between(recipe, BRIGHTNESS, uniform(key, DRAW_FACTORS)),
        _between(recipe, CONTRAST, uniform(key, DRAW_FACTORS + 1)),
        _between(recipe, SATURATION, uniform(key, DRAW_FACTORS + 2)),
        _between(recipe, HUE, uniform(key, DRAW_FACTORS + 3)),
        (order[0], order[1], order[2], order[3]),
        uniform(key, DRAW_GRAYSCALE) < recipe[GRAYSCALE],
    )
