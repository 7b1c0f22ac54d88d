"""Both Gaussian blurs against Pillow and torchvision."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from ssl_dist.views import blur as blurs
from tests.view_reference import blur, distance, noise, planes, smooth


def blurred(image, sigma, kernel=None):
    view = np.ascontiguousarray(planes(image))
    work = blurs.new_buffers(view.shape[1], sigma, kernel or 0)
    if kernel is None:
        blurs.blur_as_pillow(view, sigma, work)
    else:
        blurs.blur_as_torchvision(view, sigma, kernel, work)
    return view


@settings(max_examples=150)
@given(st.integers(1, 70), st.floats(0.001, 30), st.integers(0, 99))
@example(1, 2.0, 0)  # one pixel
@example(3, 20.0, 0)  # boxes wider than the view
@example(32, 0.1, 0)
@example(32, 2.0, 0)
@example(32, 1.5**0.5, 0)  # the box's radius is about 1: its fractional part about 0
def test_pillows_blur_bit_for_bit(size, sigma, seed):
    image = noise(seed, size, size)
    np.testing.assert_array_equal(blurred(image, sigma), planes(blur(Image.fromarray(image), None, sigma)))


@pytest.mark.parametrize("sigma", np.linspace(0.1, 2.0, 39).tolist())
def test_pillows_blur_over_the_range_of_the_papers(sigma):
    image = noise(int(sigma * 1000), 64, 64)
    np.testing.assert_array_equal(blurred(image, sigma), planes(blur(Image.fromarray(image), None, sigma)))


@pytest.mark.parametrize("kind", [noise, smooth])
@pytest.mark.parametrize("kernel", [1, 3, 7, 9, 19])
def test_torchvisions_blur_up_to_rare_single_levels(kernel, kind):
    differing = count = 0
    for seed in range(20):
        size, sigma = (32, 41, 96, 10)[seed % 4], float(np.random.default_rng(seed).uniform(0.1, 2.0))
        image = kind(seed, size, size)
        actual, expected = blurred(image, sigma, kernel), planes(blur(Image.fromarray(image), kernel, sigma))
        assert distance(actual, expected) <= 1
        differing, count = differing + np.count_nonzero(actual != expected), count + actual.size
    assert differing <= 1e-4 * count


@pytest.mark.parametrize("kernel", [None, 1, 3, 9, 15])
def test_a_plain_image_stays_as_it_is(kernel):
    """A weight missing or too much would show, at the edges too; 15 is the largest kernel for 8 pixels."""
    for level in (0, 1, 128, 255):
        image = np.full((8, 8, 3), level, np.uint8)
        np.testing.assert_array_equal(blurred(image, 1.3, kernel), planes(image))


@pytest.mark.parametrize("kernel", [None, 5])
def test_a_blur_commutes_with_a_flip(kernel):
    """So a paper that flips last has the views of one that flips first."""
    image = noise(1, 33, 33)
    mirrored = blurred(np.ascontiguousarray(image[:, ::-1]), 1.1, kernel)
    assert distance(mirrored, blurred(image, 1.1, kernel)[:, :, ::-1]) <= (0 if kernel is None else 1)
