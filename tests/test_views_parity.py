"""Pixels of the view kernel against Pillow and torchvision, with the same parameters on both sides."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance
from torchvision.transforms import _functional_tensor as tensor_kernels
from torchvision.transforms import functional

from ssl_dist import views
from ssl_dist.config import ViewGroup
from tests.view_reference import columns_first, distance, noise, planes, rows_first, smooth

ORDERS = list(itertools.permutations(range(4)))


def spec(size):
    return views.view_specs([ViewGroup()], 1, size)[0]


def crop_spec(size):
    group = ViewGroup(random_resized_crop={"scale": (0.08, 1.0)})
    return views.view_specs([group], 1, size)[0]


def parameters(image, **changes):
    """Parameters that leave an image as it is, but for `changes`."""
    height, width = image.shape[:2]
    neutral = views.ViewParameters((0, 0, height, width), False, True, 1.0, 1.0, 1.0, 0.0, (0, 1, 2, 3), False)
    return neutral._replace(**changes)


def saturated(seed, size):
    return noise(seed, size, size) // 128 * 255


def gray(seed, size):
    return noise(seed, size, size)[:, :, :1].repeat(3, axis=2)


IMAGES = {"noise": lambda seed: noise(seed, 64, 64), "smooth": lambda seed: smooth(seed, 64, 64)}
IMAGES |= {"saturated": lambda seed: saturated(seed, 64), "gray": lambda seed: gray(seed, 64)}


def check_crop(image, crop, size, flip):
    top, left, height, width = crop
    actual = views.render_view(image, crop_spec(size), parameters(image, crop=crop, flip=flip))
    part = Image.fromarray(image).crop((left, top, left + width, top + height))
    turn = functional.hflip if flip else lambda x: x
    np.testing.assert_array_equal(actual, planes(turn(rows_first(part, size, size))))
    plain = planes(turn(functional.resized_crop(Image.fromarray(image), top, left, height, width, [size, size])))
    assert distance(actual, plain) <= (2 if columns_first(height, width, size, size) else 0)


SIDE = st.integers(1, 300)


@settings(max_examples=60)
@given(SIDE, SIDE, st.integers(1, 80), st.booleans(), st.tuples(*[st.floats(0, 1)] * 4), st.integers(0, 99))
def test_crop_resize_flip(height, width, size, flip, shares, seed):
    crop_height, crop_width = (1 + int(s * (side - 1)) for s, side in zip(shares[:2], (height, width), strict=True))
    top, left = int(shares[2] * (height - crop_height)), int(shares[3] * (width - crop_width))
    check_crop(noise(seed, height, width), (top, left, crop_height, crop_width), size, flip)


@pytest.mark.parametrize(
    ("height", "width", "crop", "size"),
    [
        (1, 1, (0, 0, 1, 1), 32),  # one pixel
        (1, 300, (0, 0, 1, 300), 7),
        (300, 1, (0, 0, 300, 1), 7),
        (32, 32, (0, 0, 32, 32), 32),  # nothing to do
        (32, 32, (5, 9, 1, 1), 32),  # one pixel of many
        (33, 47, (3, 5, 29, 31), 17),  # odd sides
        (300, 300, (0, 0, 300, 300), 1),
        (64, 64, (0, 0, 64, 64), 32),  # exactly half
        (31, 31, (31 - 11, 31 - 13, 11, 13), 224),  # a corner, much enlarged
        (400, 500, (20, 30, 350, 420), 224),
    ],
)
@pytest.mark.parametrize("flip", [False, True])
def test_crop_resize_flip_at_the_edges(height, width, crop, size, flip):
    check_crop(noise(1, height, width), crop, size, flip)
    for level in (0, 255):  # a weight missing or too much would show
        image = np.full((height, width, 3), level, np.uint8)
        assert (views.render_view(image, crop_spec(size), parameters(image, crop=crop, flip=flip)) == level).all()


@settings(max_examples=60)
@given(SIDE, SIDE, st.integers(1, 64), st.integers(0, 40), st.integers(0, 99))
@example(40, 40, 32, 0, 0)
@example(300, 2, 32, 5, 0)
@example(33, 64, 32, 0, 0)  # a long side that is rounded down
@example(64, 67, 32, 0, 0)  # an offset that ends in a half
def test_the_test_transform(height, width, size, margin, seed):
    image = noise(seed, height, width)
    resize = size + margin
    padded = np.full((1, height + 3, width + 2, 3), 99, np.uint8)
    padded[0, :height, :width] = image
    actual = views.test_views((padded, np.array([height]), np.array([width]), np.array([0])), size, resize=resize)[0]
    plain = functional.resize(Image.fromarray(image), resize)
    rows = rows_first(Image.fromarray(image), plain.height, plain.width)
    np.testing.assert_array_equal(actual, planes(functional.center_crop(rows, [size, size])))
    limit = 2 if columns_first(height, width, plain.height, plain.width) else 0
    assert distance(actual, planes(functional.center_crop(plain, [size, size]))) <= limit


def test_the_test_transform_leaves_an_image_of_the_right_size_alone():
    image = noise(0, 32, 32)
    actual = views.test_views((image[None], np.array([32]), np.array([32]), np.array([0])), 32)
    np.testing.assert_array_equal(actual[0], planes(image))


ENHANCERS = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
}


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("step", ENHANCERS)
def test_brightness_contrast_and_saturation_equal_pillow(step, kind):
    factors = [0.0, 0.2, 0.5, 0.999999, 1.0, 1.000001, 1.8, 3.7, *np.random.default_rng(2).uniform(0, 2, 40)]
    for seed, factor in enumerate(factors):
        image = IMAGES[kind](seed)
        actual = views.render_view(image, spec(64), parameters(image, **{step: float(factor)}))
        expected = planes(ENHANCERS[step](Image.fromarray(image)).enhance(float(factor)))
        np.testing.assert_array_equal(actual, expected, err_msg=str(factor))


def test_contrast_of_more_pixels_than_one_partial_sum_holds():
    image = noise(3, 300, 300) | 128
    actual = views.render_view(image, spec(300), parameters(image, contrast=0.4))
    np.testing.assert_array_equal(actual, planes(ImageEnhance.Contrast(Image.fromarray(image)).enhance(0.4)))


@pytest.mark.parametrize("kind", IMAGES)
def test_grayscale_equals_torchvision_on_pil(kind):
    image = IMAGES[kind](4)
    actual = views.render_view(image, spec(64), parameters(image, grayscale=True))
    expected = functional.rgb_to_grayscale(Image.fromarray(image), num_output_channels=3)
    np.testing.assert_array_equal(actual, planes(expected))


@pytest.mark.parametrize("kind", IMAGES)
def test_hue_is_torchvisions_tensor_kernel(kind, record_property):
    to_pillow, differing = 0, 0
    shifts = [-0.5, -1 / 3, -1 / 6, 1e-7, 1 / 6, 0.25, 0.5, *np.random.default_rng(3).uniform(-0.5, 0.5, 40)]
    for seed, shift in enumerate(shifts):
        image = IMAGES[kind](seed)
        actual = views.render_view(image, spec(64), parameters(image, hue=float(shift)))
        expected = tensor_kernels.adjust_hue(torch.from_numpy(planes(image).copy()), float(shift)).numpy()
        assert distance(actual, expected) <= 1, shift
        differing += np.count_nonzero(actual != expected)
        pillow = planes(functional.adjust_hue(Image.fromarray(image), float(shift)))
        # the two references disagree; no more than they do
        assert distance(actual, pillow) <= distance(expected, pillow) + 1
        to_pillow = max(to_pillow, distance(actual, pillow))
    assert differing < 1e-4 * len(shifts) * image.size
    record_property("largest difference to Pillow's hue, grey levels", to_pillow)
    print(f"{kind}: hue differs from Pillow's by up to {to_pillow} grey levels")
    assert to_pillow <= (0 if kind == "gray" else 20)


def reference(image, size, drawn):
    """The pipeline in Pillow, but for the hue."""
    top, left, height, width = drawn.crop
    view = rows_first(Image.fromarray(image).crop((left, top, left + width, top + height)), size, size)
    view = functional.hflip(view) if drawn.flip else view
    for step in drawn.order if drawn.jitter else ():
        if step == 0:
            view = functional.adjust_brightness(view, drawn.brightness)
        elif step == 1:
            view = functional.adjust_contrast(view, drawn.contrast)
        elif step == 2:
            view = functional.adjust_saturation(view, drawn.saturation)
        elif drawn.hue != 0:
            turned = tensor_kernels.adjust_hue(torch.from_numpy(planes(view).copy()), drawn.hue)
            view = Image.fromarray(turned.permute(1, 2, 0).numpy())
    return planes(functional.rgb_to_grayscale(view, num_output_channels=3) if drawn.grayscale else view)


@pytest.mark.parametrize("order", ORDERS)
def test_whole_pipelines_in_every_order(order):
    generator = np.random.default_rng(ORDERS.index(order))
    image = smooth(5, 40, 40) if ORDERS.index(order) % 2 else noise(5, 40, 40)
    for flip, jitter, grayscale in itertools.product([False, True], repeat=3):
        brightness, contrast, saturation = (float(f) for f in generator.uniform(0.2, 1.8, 3))
        drawn = views.ViewParameters(
            (3, 1, 25, 37), flip, jitter, brightness, contrast, saturation, 0.0, order, grayscale
        )
        np.testing.assert_array_equal(views.render_view(image, crop_spec(32), drawn), reference(image, 32, drawn))
        drawn = drawn._replace(hue=float(generator.uniform(-0.2, 0.2)))
        actual, expected = views.render_view(image, crop_spec(32), drawn), reference(image, 32, drawn)
        assert np.count_nonzero(actual != expected) <= 1e-3 * actual.size  # the hue's rare single levels,
        assert distance(actual, expected) <= 4  # which contrast and saturation may enlarge


@settings(max_examples=25)
@given(st.integers(0, 2**32), st.integers(1, 60), st.integers(1, 60))
def test_drawn_pipelines(seed, height, width):
    """The parameters come from the kernel's own draws, the pixels from Pillow."""
    jitter = {"p": 0.8, "hue": 0.0}
    group = ViewGroup(random_resized_crop={}, horizontal_flip=0.5, color_jitter=jitter, grayscale=0.2)
    (drawn_spec,) = views.view_specs([group], 8, 24)
    image = noise(seed, height, width)
    sizes = np.array([height]), np.array([width])
    actual = views.make_views((image[None], *sizes, np.array([7])), drawn_spec, drawn_spec.view_ids, seed, 3)
    for view_id in range(8):
        drawn = views.draw_view(drawn_spec, seed, 3, 7, view_id, height, width)
        np.testing.assert_array_equal(actual[view_id, 0], reference(image, 24, drawn))
