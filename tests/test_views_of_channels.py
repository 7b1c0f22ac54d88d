"""Views of images with any number of channels, of 8 or 16 bits."""

import re

import numpy as np
import pytest

import ssl_dist
from ssl_dist import views
from ssl_dist.config import validate
from ssl_dist.config.recipe import ViewGroup
from ssl_dist.errors import UserError
from ssl_dist.views import PixelFormat, make, pixels, shown
from tests import slow_planes as slow
from tests.messages import naming

SIZE = 16
CROP = {"random_resized_crop": {"scale": [0.2, 1.0]}}
NO_COLOUR = {"saturation": 0.0, "hue": 0.0}
RECIPES = {
    "bilinear": {**CROP, "horizontal_flip": 0.5, "quarter_turns": [0, 1, 2, 3]},
    "bicubic": {"random_resized_crop": {"interpolation": "bicubic"}},
    "brightness": {**CROP, "color_jitter": {"p": 1.0, "contrast": 0.0, **NO_COLOUR}},
    "blur": {**CROP, "gaussian_blur": {"p": 1.0, "sigma": [0.1, 6.0]}},
    "kernel": {**CROP, "gaussian_blur": {"p": 1.0, "sigma": [0.5, 2.0], "kernel": 5}},
    "solarize": {**CROP, "solarize": {"p": 0.7, "threshold": 100}},
    "affine": {**CROP, "affine": {"p": 1.0}},
    "erasing": {**CROP, "erasing": {"p": 1.0}},
    "padded": {"padded_crop": {"padding": 4}, "resize": {"short_side": SIZE}, "horizontal_flip": 0.5},
    "resize first": {**CROP, "resize": {"short_side": 24}},
    "patches": {**CROP, "grid_patches": {"side": 64, "jitter": 8}},
    "centre": {},
}


def group_of(recipe):
    return validate(ViewGroup, {"num": 4, **recipe}, "recipe.")


def spec_of(recipe, pixels=views.RGB):
    [spec] = views.view_specs([group_of(recipe)], 4, SIZE, pixels)
    return spec


def images_of(channels, bits, count=3):
    """Of several sizes, in the upper left of the array."""
    shape = (count, 40, 33, channels)
    levels = np.random.default_rng(channels).integers(0, 1 << bits, shape, dtype=PixelFormat(channels, bits).dtype)
    sizes = np.array([(40, 33), (30, 33), (40, 20)][:count])
    return views.Images(levels, sizes[:, 0], sizes[:, 1], np.arange(count))


@pytest.mark.parametrize("name", RECIPES)
def test_every_step_on_8_bits_is_that_of_rgb_channel_by_channel(name):
    images, spec = images_of(5, 8), spec_of(RECIPES[name])
    made = views.make_views(images, spec, spec.view_ids, 3, 1)
    assert made.shape == (4, 3, 5, SIZE, SIZE) and made.dtype == np.uint8
    for chosen in ([0, 1, 2], [2, 3, 4]):
        expected = views.make_views(images._replace(pixels=images.pixels[..., chosen]), spec, spec.view_ids, 3, 1)
        np.testing.assert_array_equal(made[:, :, chosen], expected)


@pytest.mark.parametrize(("channels", "bits"), [(2, 16), (5, 8)])
@pytest.mark.parametrize("name", ["bilinear", "bicubic", "brightness", "contrast", "blur", "kernel", "solarize"])
def test_views_are_those_of_slow_loops(name, channels, bits):
    recipe = RECIPES.get(name, {**CROP, "color_jitter": {"p": 1.0, "brightness": 0.0, **NO_COLOUR}})
    images, highest = images_of(channels, bits), (1 << bits) - 1
    spec, bicubic = spec_of(recipe), name == "bicubic"
    made = views.make_views(images, spec, spec.view_ids, 0, 0)
    for view, image in np.ndindex(4, 3):
        height, width = int(images.heights[image]), int(images.widths[image])
        drawn = views.draw_view(spec, 0, 0, image, view, height, width)
        for c in range(channels):
            plane = slow.resampled(images.pixels[image, :, :, c], drawn.crop, SIZE, bicubic, highest).astype(np.int64)
            plane = np.rot90(plane[:, ::-1] if drawn.flip else plane, drawn.turns)
            if name == "brightness":
                plane = slow.blended(plane, 0, drawn.brightness, highest)
            if name == "contrast":
                plane = slow.contrasted(plane, drawn.contrast, highest)
            if name == "blur":
                plane = slow.box_blurred(plane, drawn.sigma)
            if name == "kernel":
                plane = slow.gaussian_blurred(plane, drawn.sigma, 5)
            if drawn.solarize:
                plane = slow.solarized(plane, 100, highest)
            difference = np.abs(made[view, image, c].astype(np.int64) - plane).max()
            assert difference <= (name == "kernel"), (view, image, c, difference)  # float32 there: a level, rarely


def test_16_bits_move_and_erase_as_8_bits_do():
    """Levels that are 8 bits times 257: what comes out is nearly 257 times as much: each rounds."""
    low = images_of(4, 8)
    high = low._replace(pixels=low.pixels.astype(np.uint16) * 257)
    for name in ("padded", "erasing", "affine", "centre", "patches"):
        spec = spec_of(RECIPES[name])
        one, other = (views.make_views(part, spec, spec.view_ids, 0, 0).astype(int) for part in (low, high))
        assert np.abs(one * 257 - other).max() <= 2 * 257 and other.max() > 60000
        if name == "erasing":
            assert ((one == 0) == (other == 0)).mean() > 0.99
    square = low._replace(pixels=low.pixels[:, :20, :20], heights=np.full(3, 20), widths=np.full(3, 20))
    crops = views.ten_crops(square, 16, 20)
    assert crops.shape == (3, 10, 4, 16, 16) and (crops[0, 0] == low.pixels[0, :16, :16].transpose(2, 0, 1)).all()


def test_one_view_by_its_parameters():
    images, spec = images_of(3, 16), spec_of(RECIPES["bilinear"], PixelFormat(3, 16))
    made = views.make_views(images, spec, spec.view_ids, 0, 0)
    drawn = views.draw_view(spec, 0, 0, 0, 2, 40, 33)
    np.testing.assert_array_equal(views.render_view(images.pixels[0], spec, drawn), made[2, 0])
    assert (views.test_views(images, SIZE)[0].max() > 255) and make._is_rgb(images.pixels.view(np.uint8)[..., :3])


@pytest.mark.parametrize("depth", [PixelFormat(5, 8), PixelFormat(3, 16), PixelFormat(1, 8)])
def test_steps_of_colour_are_refused_and_the_remedy_works(depth):
    recipe = {"color_jitter": {}, "grayscale": 0.2, "erasing": {"fill": [1, 2, 3]}}
    groups = [group_of(RECIPES["bilinear"]), group_of(recipe)]
    with pytest.raises(UserError) as caught:
        views.view_specs(groups, 8, SIZE, depth)
    message, _, remedy = str(caught.value).partition("; set ")
    assert re.search(naming("views.groups.1.color_jitter.saturation", "8 bits", str(depth)), message)
    assert views.view_specs(groups, 8, SIZE)
    base = {"run_dir": "x", "data": {"root": "y"}, "views": {"groups": [RECIPES["bilinear"], recipe]}}
    base["views"]["groups"] = [{"num": 4, **group} for group in base["views"]["groups"]]
    mended = ssl_dist.config.overridden(base, remedy.split()).views.groups
    assert len(views.view_specs(mended, 8, SIZE, depth)) == 2 and not pixels.steps_of_colour(mended)


def test_what_pictures_show():
    planes = np.arange(5 * 4, dtype=np.uint16).reshape(5, 2, 2) * 1000
    mean, std = [0.01] * 5, [0.02] * 5
    white = 0.07 * 65535
    expected = np.minimum(planes[:3] / white, 1) * 255
    np.testing.assert_array_equal(shown.shown(planes, mean, std), expected.round())
    eight = planes.astype(np.uint8)
    np.testing.assert_array_equal(shown.shown(eight, mean, std), eight[:3])
    np.testing.assert_array_equal(shown.shown(eight[:2], mean, std), eight[[0, 0, 0]])
    assert shown.words(views.RGB) == "" and "channel 0 of 2 as gray" in shown.words(PixelFormat(2, 8))
    assert "channels 0, 1 and 2 of 5" in shown.words(PixelFormat(5, 16)) and "white" in shown.words(PixelFormat(5, 16))


def test_multi_view_takes_them():
    image = images_of(4, 16).pixels[0]
    recipe = {"random_resized_crop": {}, "horizontal_flip": 0.5}
    made = ssl_dist.MultiView(recipe, size=SIZE)(image, 0)
    assert made.shape == (2, 4, SIZE, SIZE) and 0.9 < made.max() <= 1
    normalized = ssl_dist.MultiView(recipe, size=SIZE, normalize=([0.5] * 4, [0.25] * 4))(image, 0)
    np.testing.assert_allclose(normalized, (made - 0.5) / 0.25, atol=1e-5)
    with pytest.raises(UserError, match=r"recipe\[0\].color_jitter.saturation: needs red, green and blue"):
        ssl_dist.MultiView("simclr")(image, 0)
    with pytest.raises(UserError, match="normalize: is of 3 channels, and the image has 4"):
        ssl_dist.MultiView(recipe, normalize=([0.5] * 3, [0.25] * 3))(image, 0)
    with pytest.raises(ValueError, match="uint8 or uint16"):
        ssl_dist.MultiView(recipe)(image.astype(np.int32), 0)
