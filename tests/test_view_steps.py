"""Pixels and draws of the steps beside the first four: resizes, bicubic, padded crops, blur, solarize, their order."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from torchvision import transforms
from torchvision.transforms import functional

from ssl_dist import views
from ssl_dist.config.recipe import ViewGroup
from ssl_dist.config.section import validate
from ssl_dist.errors import UserError
from ssl_dist.thread_team import ThreadTeam
from tests.view_reference import columns_first, noise, planes, reference, rows_first

ALPHA = 1e-4
BICUBIC = functional.InterpolationMode.BICUBIC


def group_of(**recipe):
    return validate(ViewGroup, recipe)


def spec_of(group, num=1, size=16):
    return views.view_specs([group], num, size)[0]


def identity(height, width):
    return views.ViewParameters((0, 0, height, width), False, False, 1.0, 1.0, 1.0, 0.0, (0, 1, 2, 3), False)


# ------------------------------------------------------------------------------------------------- pixels

# Every recipe without hue and without torchvision's blur equals Pillow bit for bit.
JITTER = {"p": 0.8, "hue": 0.0}
RECIPES = {
    "bicubic crop": {"random_resized_crop": {"interpolation": "bicubic"}, "horizontal_flip": 0.5},
    "resize, then crop": {"resize": {"short_side": 40}, "random_resized_crop": {"scale": [0.2, 1.0]}},
    "bicubic resize, then crop": {
        "resize": {"short_side": 20, "interpolation": "bicubic"},
        "random_resized_crop": {},
        "horizontal_flip": 0.5,
    },
    "resize and centre": {"resize": {"short_side": 30}, "horizontal_flip": 0.5},
    "bicubic resize and centre": {"resize": {"short_side": 24, "interpolation": "bicubic"}, "horizontal_flip": 0.5},
    "padded": {"padded_crop": {"padding": 4}, "horizontal_flip": 0.5},
    "padded, smaller": {
        "resize": {"short_side": 12, "interpolation": "bicubic"},
        "padded_crop": {"padding": 7},
        "horizontal_flip": 0.5,
    },
    "padded, larger": {"resize": {"short_side": 40}, "padded_crop": {"padding": 3}},
    "far padded": {"padded_crop": {"padding": 50}, "horizontal_flip": 0.5},
    "blur": {"gaussian_blur": {"p": 0.7, "sigma": [0.1, 5.0]}, "horizontal_flip": 0.5},
    "solarize": {"solarize": {"p": 0.5, "threshold": 127}},
    "vicreg": {
        "random_resized_crop": {"interpolation": "bicubic"},
        "horizontal_flip": 0.5,
        "color_jitter": JITTER,
        "grayscale": 0.2,
        "gaussian_blur": {"p": 0.5},
        "solarize": {"p": 0.3},
    },
    "quarter turns": {"quarter_turns": [0, 1, 2, 3], "horizontal_flip": 0.5},
    "finetune": {
        "horizontal_flip": 0.5,
        "affine": {},
        "erasing": {"scale": [0.111, 0.111], "ratio": [1, 1], "fill": [128, 127, 3]},
    },
    "far moved": {"affine": {"p": 1.0, "degrees": 180, "translate": [0.9, 0.2], "scale": [0.1, 4.0], "shear": 70}},
    "patches": {
        "random_resized_crop": {"scale": [0.6, 1.0]},
        "color_jitter": JITTER,
        "grayscale": 0.2,
        "horizontal_flip": 0.5,
        "grid_patches": {"side": 80, "jitter": 11},
    },
    "patches with every step": {
        "resize": {"short_side": 70},
        "padded_crop": {"padding": 9},
        "horizontal_flip": 0.5,
        "quarter_turns": [1, 2],
        "affine": {},
        "gaussian_blur": {},
        "solarize": {},
        "erasing": {},
        "grid_patches": {"side": 70, "jitter": 0},
    },
    "another order": {
        "random_resized_crop": {},
        "color_jitter": JITTER,
        "grayscale": 0.5,
        "gaussian_blur": {"p": 0.5},
        "solarize": {"p": 0.5},
        "order": ["solarize", "gaussian_blur", "grayscale", "color_jitter"],
    },
}


@pytest.mark.parametrize("name", RECIPES)
@settings(max_examples=25)
@given(st.integers(0, 2**32), st.integers(1, 90), st.integers(1, 90), st.sampled_from([1, 24, 64]))
def test_drawn_views_equal_pillows(name, seed, height, width, size):
    """The parameters are the kernel's own draws, on images from one pixel to a narrow strip, larger and smaller."""
    group = group_of(**RECIPES[name])
    try:
        spec = spec_of(group, 4, size)
    except UserError:
        return  # a crop larger than the resized image
    image = noise(seed, height, width)
    sides = np.array([height]), np.array([width])
    actual = views.make_views((image[None], *sides, np.array([7])), spec, spec.view_ids, seed, 3)
    for view_id in spec.view_ids:
        drawn = views.draw_view(spec, seed, 3, 7, int(view_id), height, width)
        np.testing.assert_array_equal(actual[view_id, 0], reference(image, group, size, drawn))
        np.testing.assert_array_equal(actual[view_id, 0], views.render_view(image, spec, drawn))


@settings(max_examples=60)
@given(*[st.integers(1, 200)] * 2, st.integers(1, 80), st.booleans(), st.integers(0, 99))
def test_bicubic_resizes_equal_pillows(height, width, size, flip, seed):
    image = noise(seed, height, width)
    spec = spec_of(group_of(random_resized_crop={"interpolation": "bicubic"}), 1, size)
    actual = views.render_view(image, spec, identity(height, width)._replace(flip=flip))
    turn = functional.hflip if flip else lambda x: x
    rows = turn(rows_first(Image.fromarray(image), size, size, "bicubic"))
    np.testing.assert_array_equal(actual, planes(rows))
    if not columns_first(height, width, size, size):
        plain = functional.resize(Image.fromarray(image), [size, size], BICUBIC)
        np.testing.assert_array_equal(actual, planes(turn(plain)))


def test_bicubic_weights_below_zero_are_clipped():
    """Black beside white: the filter rings on both sides, and every channel alone."""
    image = np.zeros((12, 12, 3), np.uint8)
    image[:, 6:, 0] = 255
    image[6:, :, 1] = 255
    image[3:5, 3:5, 2] = 255
    spec = spec_of(group_of(random_resized_crop={"interpolation": "bicubic"}), 1, 29)
    actual = views.render_view(image, spec, identity(12, 12))
    np.testing.assert_array_equal(actual, planes(rows_first(Image.fromarray(image), 29, 29, "bicubic")))


@pytest.mark.parametrize(("resize", "interpolation"), [(32, "bicubic"), (45, "bicubic"), (45, "bilinear")])
def test_the_test_transform_with_either_interpolation(resize, interpolation):
    image = noise(3, 50, 61)
    sides = np.array([50]), np.array([61])
    actual = views.test_views((image[None], *sides, np.array([0])), 32, resize=resize, interpolation=interpolation)[0]
    plain = functional.resize(Image.fromarray(image), resize, functional.InterpolationMode(interpolation))
    np.testing.assert_array_equal(actual, planes(functional.center_crop(plain, [32, 32])))


@pytest.mark.parametrize(("resize", "interpolation"), [(None, "bilinear"), (45, "bicubic"), (38, "bilinear")])
def test_ten_crops_are_torchvisions(resize, interpolation):
    """Images whose centre lies between two pixels, upright and lying, on two threads."""
    sides = [(50, 61), (61, 50), (33, 40)]
    padded = np.zeros((3, 61, 61, 3), np.uint8)
    for n, (height, width) in enumerate(sides):
        padded[n, :height, :width] = noise(n, height, width)
    heights, widths = np.array(sides).T
    batch = views.Images(padded, heights, widths, np.arange(3))
    with ThreadTeam(2) as team:
        actual = views.ten_crops(batch, 32, resize, interpolation, team)
    for n, side in enumerate(sides):
        plain = functional.resize(
            Image.fromarray(noise(n, *side)), resize or 32, functional.InterpolationMode(interpolation)
        )
        for crop, expected in zip(actual[n], functional.ten_crop(plain, [32, 32]), strict=True):
            np.testing.assert_array_equal(crop, planes(expected))
    with pytest.raises(UserError, match="resize = 8"):
        views.ten_crops(batch, 32, 8)


@pytest.mark.parametrize("threshold", [0, 127, 128, 255])
def test_solarize_equals_pillow(threshold):
    image = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    spec = spec_of(group_of(solarize={"threshold": threshold}))
    actual = views.render_view(image, spec, identity(16, 16)._replace(solarize=True))
    np.testing.assert_array_equal(actual, planes(functional.solarize(Image.fromarray(image), threshold)))


def test_order_matters():
    image = noise(4, 16, 16)
    steps = {"gaussian_blur": {}, "solarize": {}, "color_jitter": {}, "grayscale": 1.0}
    drawn = identity(16, 16)._replace(jitter=True, saturation=0.3, hue=0.2, grayscale=True, sigma=1.5, solarize=True)
    orders = [
        ["color_jitter", "grayscale", "gaussian_blur", "solarize"],
        ["grayscale", "color_jitter", "gaussian_blur", "solarize"],
        ["color_jitter", "grayscale", "solarize", "gaussian_blur"],
    ]
    rendered = [views.render_view(image, spec_of(group_of(order=order, **steps)), drawn) for order in orders]
    assert all((a != b).any() for a, b in zip(rendered, rendered[1:] + rendered[:1], strict=True))
    default = views.render_view(image, spec_of(group_of(**steps)), drawn)
    np.testing.assert_array_equal(default, rendered[0])


def test_threads_padding_and_splits_change_nothing_after_a_resize():
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (7, 40, 50, 3), dtype=np.uint8)
    heights, widths, ids = generator.integers(5, 41, 7), generator.integers(5, 51, 7), np.arange(7) + 90
    spec = spec_of(group_of(**RECIPES["bicubic resize, then crop"]), 3)
    expected = views.make_views((pixels, heights, widths, ids), spec, spec.view_ids, 1, 0)
    for b in range(7):
        one = np.ascontiguousarray(pixels[b : b + 1, : heights[b], : widths[b]])
        sides = heights[b : b + 1], widths[b : b + 1]
        actual = views.make_views((one, *sides, ids[b : b + 1]), spec, spec.view_ids[1:], 1, 0)
        np.testing.assert_array_equal(actual[:, 0], expected[1:, b])


# ------------------------------------------------------------------------------------------------- draws

DRAWS = 6000


def drawn_parameters(spec, height, width):
    return [views.draw_view(spec, 11, 4, n // 3, n % 3, height, width) for n in range(DRAWS)]


def test_the_draws_of_the_first_steps_are_what_they_were():
    """A number of a draw that changed would change every run."""
    spec = spec_of(group_of(random_resized_crop={}, horizontal_flip=0.5, color_jitter={}, grayscale=0.2))
    drawn = views.draw_view(spec, 1, 2, 3, 4, 48, 64)
    assert drawn.crop == (0, 16, 42, 45)
    assert (drawn.flip, drawn.jitter, drawn.order, drawn.grayscale) == (True, True, (0, 1, 2, 3), False)
    factors = (0.5342700916127636, 1.744240892515574, 0.9963621481878461, -0.11843474209403144)
    assert drawn[3:7] == pytest.approx(factors, rel=1e-12)
    assert views.draw_view(spec, 9, 2, 7, 1, 48, 64).order == (3, 0, 2, 1)


@pytest.mark.parametrize("extra", ["gaussian_blur", "solarize", "padded_crop", "affine", "erasing"])
def test_a_further_step_leaves_the_other_draws_alone(extra):
    recipe = {"horizontal_flip": 0.5, "color_jitter": {}, "grayscale": 0.2}
    plain, more = spec_of(group_of(**recipe)), spec_of(group_of(**recipe, **{extra: {}}))
    for n in range(50):
        few, many = (views.draw_view(spec, 0, 0, n, 1, 30, 40) for spec in (plain, more))
        assert few[:9] == many[:9]


@pytest.mark.parametrize(("height", "width", "size", "padding"), [(32, 32, 32, 4), (32, 41, 32, 4), (40, 32, 32, 0)])
def test_padded_crops_are_distributed_as_torchvisions(height, width, size, padding):
    spec = spec_of(group_of(padded_crop={"padding": padding}, resize={"short_side": 32}), 3, size)
    ours = np.array([drawn.corner for drawn in drawn_parameters(spec, height, width)]) + padding
    torch.manual_seed(0)
    image = torch.zeros(1, height + 2 * padding, width + 2 * padding)
    theirs = np.array([transforms.RandomCrop.get_params(image, (size, size))[:2] for _ in range(DRAWS)])
    for column in range(2):
        values = np.union1d(ours[:, column], theirs[:, column])
        table = np.array([[np.count_nonzero(s[:, column] == v) for v in values] for s in (ours, theirs)])
        assert len(values) == 1 or stats.chi2_contingency(table).pvalue > ALPHA


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
def test_blur_and_solarize_happen_with_their_probability_and_independently(probability):
    blur = {"p": probability, "sigma": [0.1, 2.0]}
    spec = spec_of(group_of(gaussian_blur=blur, solarize={"p": probability}, horizontal_flip=0.5))
    drawn = drawn_parameters(spec, 32, 32)
    happened = np.array([(d.sigma > 0, d.solarize, d.flip) for d in drawn])
    for count in happened.sum(0)[:2]:
        assert stats.binomtest(int(count), DRAWS, probability).pvalue > ALPHA
    if 0 < probability < 1:
        assert np.abs(np.corrcoef(happened.T) - np.eye(3)).max() < 0.06
    sigmas = [d.sigma for d in drawn if d.sigma > 0]
    assert not sigmas or stats.kstest(sigmas, stats.uniform(0.1, 1.9).cdf).pvalue > ALPHA


def same_distribution(ours, theirs):
    """Kolmogorov-Smirnov for numbers on a scale, chi-square for whole numbers with few values."""
    values = np.union1d(ours, theirs)
    if len(values) > 500:
        return stats.ks_2samp(ours, theirs).pvalue > ALPHA
    table = np.array([[np.count_nonzero(sample == value) for value in values] for sample in (ours, theirs)])
    table = table[:, table.sum(0) >= 10]
    return table.shape[1] == 1 or stats.chi2_contingency(table).pvalue > ALPHA


def test_affine_draws_are_distributed_as_torchvisions():
    affine = {"p": 1.0, "degrees": 18.0, "translate": [0.1, 0.2], "scale": [0.9, 1.3], "shear": 10.0}
    spec = spec_of(group_of(affine=affine), 3, 40)
    ours = np.array([drawn.affine for drawn in drawn_parameters(spec, 30, 50)])
    torch.manual_seed(0)
    draw = transforms.RandomAffine(18.0, (0.1, 0.2), (0.9, 1.3), 10.0)
    theirs = [draw.get_params(draw.degrees, draw.translate, draw.scale, draw.shear, [40, 40]) for _ in range(DRAWS)]
    theirs = np.array([(angle, *shift, scale, shear[0]) for angle, shift, scale, shear in theirs])
    for column in range(5):
        assert same_distribution(ours[:, column], theirs[:, column]), column
    assert np.abs(np.corrcoef(ours.T) - np.eye(5)).max() < 0.06


@pytest.mark.parametrize(
    ("size", "scale", "ratio"),
    [
        (96, (0.111, 0.111), (1.0, 1.0)),
        (32, (0.02, 0.33), (0.3, 1.1)),  # not reciprocal: height and width may not be swapped
        (16, (0.5, 1.2), (0.3, 3.3)),
        (8, (1, 1), (1, 1)),
    ],
)
def test_erased_rectangles_are_distributed_as_torchvisions(size, scale, ratio):
    spec = spec_of(group_of(erasing={"p": 1.0, "scale": scale, "ratio": ratio}), 3, size)
    ours = np.array([drawn.erased for drawn in drawn_parameters(spec, 40, 30)])
    torch.manual_seed(0)
    image = torch.zeros(3, size, size)
    draws = [transforms.RandomErasing.get_params(image, scale, ratio, [0.0]) for _ in range(DRAWS)]
    theirs = np.array([(0, 0, 0, 0) if v is image else (i, j, h, w) for i, j, h, w, v in draws])
    for column in range(4):
        assert same_distribution(ours[:, column], theirs[:, column]), ("top", "left", "height", "width")[column]
    assert (ours[:, 0] + ours[:, 2] <= size).all() and (ours[:, 1] + ours[:, 3] <= size).all()


@pytest.mark.parametrize("turns", [[0], [2], [0, 1, 2, 3], [1, 3], [0, 0, 1]])
def test_quarter_turns_are_drawn_evenly_from_their_list(turns):
    spec = spec_of(group_of(quarter_turns=turns), 3)
    drawn = np.array([d.turns for d in drawn_parameters(spec, 32, 32)])
    expected = np.bincount(turns, minlength=4) / len(turns)
    counts = np.bincount(drawn, minlength=4)
    assert (counts[expected == 0] == 0).all()
    present = expected > 0
    assert present.sum() == 1 or stats.chisquare(counts[present], DRAWS * expected[present]).pvalue > ALPHA


def test_affine_and_erasing_happen_with_their_probability_and_independently():
    spec = spec_of(group_of(affine={"p": 0.3}, erasing={"p": 0.6}, gaussian_blur={"p": 0.5}))
    drawn = drawn_parameters(spec, 32, 32)
    happened = np.array([(d.affine != (0, 0, 0, 1, 0), d.erased[2] > 0, d.sigma > 0) for d in drawn])
    for count, probability in zip(happened.sum(0), (0.3, 0.6, 0.5), strict=True):
        assert stats.binomtest(int(count), DRAWS, probability).pvalue > ALPHA
    assert np.abs(np.corrcoef(happened.T) - np.eye(3)).max() < 0.06


# ------------------------------------------------------------------------------------------------- patches


def patch_group(num=5, side=64, jitter=8, **recipe):
    return group_of(num=num, grid_patches={"side": side, "jitter": jitter}, **recipe)


def test_patches_of_an_image_are_cells_of_one_picture_chosen_without_replacement():
    """View ids count through the groups; the picture depends on the image and the group, the patch on the view."""
    groups = [group_of(num=2), patch_group(9, 64, 0, random_resized_crop={}, color_jitter={}, horizontal_flip=0.5)]
    _, spec = views.view_specs(groups, 11, 20)
    cells = set()
    for image_id in range(3):
        drawn = [views.draw_view(spec, 0, 0, image_id, int(v), 90, 80) for v in spec.view_ids]
        assert len({d._replace(patch=(0, 0)) for d in drawn}) == 1
        assert sorted(d.patch for d in drawn) == [(i * 22, j * 22) for i in range(3) for j in range(3)]
        cells.add(tuple(d.patch for d in drawn))
    assert len(cells) == 3


def test_patches_are_distributed_as_the_official_ones():
    """Offset (side - patch - jitter) // 2 from cell to cell, and 0 .. jitter more, in all nine cells alike."""
    (spec,) = views.view_specs([patch_group(5, 64, 9)], 5, 20)
    patches = np.array([[views.draw_view(spec, 1, 2, n, v, 40, 40).patch for v in range(5)] for n in range(DRAWS)])
    step = (64 - 20 - 9) // 2
    offsets = patches.reshape(-1, 2)
    cells = np.minimum(offsets // step, 2)
    assert stats.chisquare(np.bincount(cells[:, 0] * 3 + cells[:, 1])).pvalue > ALPHA
    within = offsets - cells * step
    assert within.min() == 0 and within.max() == 9
    for axis in range(2):
        assert stats.chisquare(np.bincount(within[:, axis])).pvalue > ALPHA
    assert abs(np.corrcoef(within.T)[0, 1]) < 0.06
    first = cells.reshape(DRAWS, 5, 2)[:, 0]
    assert stats.chisquare(np.bincount(first[:, 0] * 3 + first[:, 1])).pvalue > ALPHA


def test_shards_of_patches_are_those_of_all_views():
    pixels, sides = noise(0, 50, 60)[None].repeat(3, 0), (np.array([50, 30, 50]), np.array([60, 60, 20]))
    recipe = {"random_resized_crop": {}, "color_jitter": {}, "resize": {"short_side": 70}}
    _, spec = views.view_specs([group_of(num=2), patch_group(6, **recipe)], 8, 24)
    ids = np.array([5, 6, 7])
    expected = views.make_views((pixels, *sides, ids), spec, spec.view_ids, 3, 4)
    for chosen in (slice(0, 2), slice(2, 6)):
        actual = views.make_views((pixels, *sides, ids), spec, spec.view_ids[chosen], 3, 4)
        np.testing.assert_array_equal(actual, expected[chosen])


# ------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"gaussian_blur": {"kernel": 4}}, ["gaussian_blur.kernel", "4", "odd"]),
        ({"gaussian_blur": {"sigma": [2.0, 0.1]}}, ["gaussian_blur.sigma", "[2.0, 0.1]", "rise"]),
        ({"gaussian_blur": {"sigma": [0.0, 0.1]}}, ["gaussian_blur.sigma", "0.0", "greater than or equal to 0.01"]),
        ({"gaussian_blur": {"sigma": [1e-300, 0.1]}}, ["gaussian_blur.sigma", "1e-300", "0.01"]),
        ({"gaussian_blur": {"sigma": [1.0, 1e9]}}, ["gaussian_blur.sigma", "1000000000.0", "1000"]),
        ({"gaussian_blur": {"p": 2}}, ["gaussian_blur.p", "2"]),
        ({"solarize": {"threshold": 256}}, ["solarize.threshold", "256", "255"]),
        ({"resize": {}}, ["resize.short_side"]),
        ({"resize": {"short_side": 0}}, ["resize.short_side", "0"]),
        ({"resize": {"short_side": 9, "interpolation": "cubic"}}, ["resize.interpolation", "cubic", "bicubic"]),
        ({"padded_crop": {"padding": -1}}, ["padded_crop.padding", "-1"]),
        ({"padded_crop": {}, "random_resized_crop": {}}, ["padded_crop", "random_resized_crop", "leave one"]),
        ({"order": ["grayscale", "grayscale"]}, ["order", "grayscale", "twice"]),
        ({"grayscale": 0.2, "order": ["color_jitter"]}, ["order", "leaves out grayscale"]),
        ({"affine": {"shear": 90}}, ["affine.shear", "90", "less than 90"]),
        ({"affine": {"scale": [0, 1]}}, ["affine.scale", "0", "greater than 0"]),
        ({"affine": {"translate": [0.1, 1.1]}}, ["affine.translate", "1.1"]),
        ({"affine": {"scale": [2, 1]}}, ["affine.scale", "[2.0, 1.0]", "rise"]),
        ({"erasing": {"fill": [0, 0, 256]}}, ["erasing.fill", "256", "255"]),
        ({"erasing": {"ratio": [2, 1]}}, ["erasing.ratio", "[2.0, 1.0]", "rise"]),
        ({"quarter_turns": []}, ["quarter_turns", "at least 1"]),
        ({"quarter_turns": [0, 0, 0, 0, 1]}, ["quarter_turns", "at most 4"]),
        ({"quarter_turns": [4]}, ["quarter_turns", "4", "3"]),
        ({"grid_patches": {"jitter": -1}}, ["grid_patches.jitter", "-1"]),
        ({"order": ["horizontal_flip"]}, ["order", "horizontal_flip", "color_jitter"]),
    ],
)
def test_mistakes_get_one_line_with_key_value_and_remedy(recipe, words):
    with pytest.raises(UserError) as raised:
        group_of(**recipe)
    message = str(raised.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"resize": {"short_side": 15}}, ["views.groups.0.resize.short_side = 15", "16", "raise it"]),
        ({"resize": {"short_side": 7}, "padded_crop": {"padding": 4}}, ["short_side = 7", "16"]),
        ({"num": 10, "grid_patches": {}}, ["views.groups.0.num = 10", "9 patches"]),
        ({"grid_patches": {"side": 39}}, ["grid_patches.side = 39", "16 px", "40"]),
        ({"grid_patches": {"side": 40}, "resize": {"short_side": 30}}, ["resize.short_side = 30", "40"]),
        ({"gaussian_blur": {"kernel": 33}}, ["views.groups.0.gaussian_blur.kernel = 33", "31 fits"]),
    ],
)
def test_sizes_that_do_not_fit_are_refused(recipe, words):
    with pytest.raises(UserError) as raised:
        spec_of(group_of(**recipe), recipe.get("num", 1))
    for word in words:
        assert word in str(raised.value), raised.value


# ------------------------------------------------------------------------------------------------- bounds

EVERYWHERE = """
import numpy as np
from tests.test_view_steps import RECIPES, UserError, group_of, noise, spec_of, views

for recipe in RECIPES.values():
    for size in (1, 24, 64):
        try:
            spec = spec_of(group_of(**recipe), 3, size)
        except UserError:
            continue
        for height, width in ((1, 1), (1, 150), (150, 1), (2, 90), (64, 64), (97, 31)):
            pixels, sides = noise(0, height, width)[None], (np.array([height]), np.array([width]))
            for seed in range(6):
                for images in (pixels, pixels[..., :2].astype(np.uint16)):
                    views.make_views((images, *sides, np.array([7])), spec, spec.view_ids, seed, 3)
"""


@pytest.mark.slow
def test_no_index_of_the_kernel_leaves_its_array(tmp_path):
    """Compiled with checks of all indices, which the kernels lack otherwise."""
    environment = os.environ | {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", EVERYWHERE], check=True, env=environment)
