"""The view kernel's parameters and their distributions, and that nothing but the keys can change a view."""

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torchvision import transforms

from ssl_dist import views
from ssl_dist.config import ViewGroup, Views
from ssl_dist.errors import UserError
from ssl_dist.thread_team import ThreadTeam

FULL = Views().groups[0]  # random resized crop, flip, colour jitter, grayscale


def spec_of(num=1, size=16, **recipe):
    return views.view_specs([ViewGroup(**recipe)], num, size)[0]


@pytest.fixture(scope="module")
def batch():
    """Pixels [9, 40, 50, 3] of images of several sizes, filled with noise beyond them as well, and their ids."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (9, 40, 50, 3), dtype=np.uint8)
    heights, widths = generator.integers(5, 41, 9), generator.integers(5, 51, 9)
    return pixels, heights, widths, generator.integers(0, 2**40, 9)


def select(batch, images):
    return tuple(array[images] for array in batch)


# ------------------------------------------------------------------------------------------------- specs


def test_specs_count_view_ids_through_the_groups():
    groups = [ViewGroup(num=2, size=24), ViewGroup(num=3, horizontal_flip=0.5)]
    large, small = views.view_specs(groups, 5, 16)
    assert (large.size, large.num, large.view_ids.tolist()) == (24, 2, [0, 1])
    assert (small.size, small.num, small.view_ids.tolist()) == (16, 3, [2, 3, 4])
    (only,) = views.view_specs([ViewGroup()], 7, 32)
    assert (only.size, only.num, only.first_view) == (32, 7, 0)


@pytest.mark.parametrize("nums", [(2,), (2, 3), (2, None)])
def test_specs_refuse_numbers_that_do_not_add_up(nums):
    with pytest.raises(UserError, match=r"views\.groups.*num"):
        views.view_specs([ViewGroup(num=num) for num in nums], 4, 16)


def test_test_views_refuse_a_centre_crop_larger_than_the_image(batch):
    with pytest.raises(UserError, match="resize = 8"):
        views.test_views(batch, 16, resize=8)


# ------------------------------------------------------------------------- only the keys can change a view


def test_views_are_the_drawn_parameters_applied(batch):
    pixels, heights, widths, ids = batch
    spec = views.view_specs([FULL], 6, 16)[0]
    ours = views.make_views(batch, spec, spec.view_ids, 5, 2)
    for b, (height, width) in enumerate(zip(heights, widths, strict=True)):
        for view_id in spec.view_ids:
            drawn = views.draw_view(spec, 5, 2, int(ids[b]), int(view_id), int(height), int(width))
            expected = views.render_view(pixels[b, :height, :width], spec, drawn)
            np.testing.assert_array_equal(ours[view_id, b], expected)


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 12])
def test_threads_change_nothing(batch, threads):
    spec = views.view_specs([FULL], 4, 16)[0]
    expected = views.make_views(batch, spec, spec.view_ids, 1, 0)
    tests = views.test_views(batch, 16)
    with ThreadTeam(threads) as team:
        for _ in range(3):
            actual = views.make_views(batch, spec, spec.view_ids, 1, 0, team)
            np.testing.assert_array_equal(actual, expected)
            np.testing.assert_array_equal(views.test_views(batch, 16, team=team), tests)


@settings(max_examples=20)
@given(st.integers(0, 9), st.integers(0, 5), st.permutations(range(9)), st.integers(0, 12))
def test_splits_orders_and_padding_change_nothing(batch, image_cut, view_cut, order, padding):
    spec = views.view_specs([FULL], 5, 16)[0]
    expected = views.make_views(batch, spec, spec.view_ids, 1, 3)
    pixels, heights, widths, ids = select(batch, np.array(order))
    pixels = np.pad(pixels, ((0, 0), (0, padding), (0, 2 * padding), (0, 0)), constant_values=77)
    shuffled = (pixels, heights, widths, ids)
    actual = np.zeros_like(expected)
    for images in (slice(0, image_cut), slice(image_cut, 9)):
        for chosen in (slice(0, view_cut), slice(view_cut, 5)):
            part = views.make_views(select(shuffled, images), spec, spec.view_ids[chosen], 1, 3)
            actual[chosen, images] = part
    np.testing.assert_array_equal(actual, expected[:, np.array(order)])


def test_padding_is_not_seen_by_the_test_transform(batch):
    pixels, heights, widths, ids = batch
    tests = views.test_views(batch, 16)
    for b, (height, width) in enumerate(zip(heights, widths, strict=True)):
        tight = np.ascontiguousarray(pixels[b : b + 1, :height, :width])
        np.testing.assert_array_equal(
            views.test_views((tight, *(array[b : b + 1] for array in (heights, widths, ids))), 16)[0], tests[b]
        )


def test_read_only_and_strided_arrays_are_taken(batch):
    spec = views.view_specs([FULL], 2, 16)[0]
    expected = views.make_views(batch, spec, spec.view_ids, 1, 0)
    pixels = batch[0].copy()
    pixels.flags.writeable = False
    np.testing.assert_array_equal(views.make_views((pixels, *batch[1:]), spec, spec.view_ids, 1, 0), expected)
    every_other = tuple(array[::2] for array in batch)
    np.testing.assert_array_equal(views.make_views(every_other, spec, spec.view_ids, 1, 0), expected[:, ::2])


def test_no_images_or_no_views(batch):
    spec = views.view_specs([FULL], 2, 16)[0]
    none = select(batch, slice(0, 0))
    assert views.make_views(none, spec, spec.view_ids, 0, 0).shape == (2, 0, 3, 16, 16)
    assert views.make_views(batch, spec, spec.view_ids[:0], 0, 0).shape == (0, 9, 3, 16, 16)


def test_every_part_of_the_key_matters():
    spec = views.view_specs([FULL], 2, 16)[0]
    keys = [(0,) * 4, (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (2**63 + 1, 0, 0, 0), (0, 0, 2**40, 0)]
    drawn = [views.draw_view(spec, *key, 32, 32) for key in keys]
    assert len(set(drawn)) == len(keys)
    assert drawn == [views.draw_view(spec, *key, 32, 32) for key in keys]


def test_a_step_left_out_leaves_the_other_draws_alone():
    whole = spec_of(**FULL.model_dump(exclude={"num", "size"}))
    crop_only = spec_of(random_resized_crop={})
    flip_only = spec_of(horizontal_flip=0.5)
    for image_id in range(50):
        full = views.draw_view(whole, 3, 1, image_id, 0, 30, 40)
        assert views.draw_view(crop_only, 3, 1, image_id, 0, 30, 40).crop == full.crop
        plain = views.draw_view(flip_only, 3, 1, image_id, 0, 30, 40)
        assert (plain.flip, plain.crop) == (full.flip, (0, 0, 30, 40))
        assert not plain.jitter and not plain.grayscale


# --------------------------------------------------------------- distributions, beside torchvision's own draws

DRAWS = 6000
ALPHA = 1e-4  # seeds are fixed: a test that passes once passes always


def drawn_parameters(spec, height, width, count=DRAWS):
    return [views.draw_view(spec, 11, 4, n // 3, n % 3, height, width) for n in range(count)]


def same_distribution(ours, theirs):
    """Two-sample Kolmogorov-Smirnov; for whole numbers with many ties a chi-square over bins of the pooled sample."""
    ours, theirs = np.asarray(ours, float), np.asarray(theirs, float)
    values = np.unique(np.concatenate([ours, theirs]))
    if len(values) > 500:
        return stats.ks_2samp(ours, theirs).pvalue > ALPHA
    edges = np.unique(np.quantile(np.concatenate([ours, theirs]), np.linspace(0, 1, 16)))
    edges = np.append(edges, np.inf)
    table = np.stack([np.histogram(sample, edges)[0] for sample in (ours, theirs)])
    return stats.chi2_contingency(table[:, table.sum(0) > 0]).pvalue > ALPHA


@pytest.mark.parametrize(
    ("height", "width", "crop"),
    [
        (32, 32, {}),
        (375, 500, {}),
        (60, 41, {"scale": (0.2, 0.6), "ratio": (0.5, 1.2)}),
        (90, 30, {}),  # many tries fail
        (30, 110, {"scale": (0.6, 1.0)}),  # nearly all fail: the central crop
    ],
)
def test_crops_are_distributed_as_torchvisions(height, width, crop):
    group = ViewGroup(random_resized_crop=crop)
    (spec,) = views.view_specs([group], 3, 16)
    ours = np.array([drawn.crop for drawn in drawn_parameters(spec, height, width)])
    torch.manual_seed(0)
    image = torch.zeros(1, height, width)
    scale, ratio = list(group.random_resized_crop.scale), list(group.random_resized_crop.ratio)
    theirs = np.array([transforms.RandomResizedCrop.get_params(image, scale, ratio) for _ in range(DRAWS)])
    for column in range(4):
        assert same_distribution(ours[:, column], theirs[:, column]), ("top", "left", "height", "width")[column]
    area, aspect = (lambda c: c[:, 2] * c[:, 3]), (lambda c: c[:, 3] / c[:, 2])
    assert same_distribution(area(ours), area(theirs))
    assert same_distribution(aspect(ours), aspect(theirs))
    centre = (lambda c: c[:, 0] - (height - c[:, 2]) / 2), (lambda c: c[:, 1] - (width - c[:, 3]) / 2)
    assert all(same_distribution(offset(ours), offset(theirs)) for offset in centre)


@pytest.mark.parametrize(("height", "width"), [(10, 200), (200, 10), (7, 50), (1, 300), (300, 1), (33, 90)])
def test_a_crop_that_cannot_succeed_is_torchvisions_central_one(height, width):
    ratio = (3 / 4, 4 / 3)
    (spec,) = views.view_specs([ViewGroup(random_resized_crop={"scale": (1.0, 1.0), "ratio": ratio})], 1, 16)
    expected = transforms.RandomResizedCrop.get_params(torch.zeros(1, height, width), [1.0, 1.0], list(ratio))
    assert views.draw_view(spec, 0, 0, 0, 0, height, width).crop == tuple(expected)


def test_every_crop_lies_in_the_image():
    spec = spec_of(random_resized_crop={"scale": (0.01, 1.0), "ratio": (0.2, 5.0)})
    for n in range(2000):
        height, width = 1 + n % 7, 1 + n % 11
        top, left, h, w = views.draw_view(spec, 0, 0, n, 0, height, width).crop
        assert min(top, left) >= 0 and min(h, w) >= 1 and top + h <= height and left + w <= width


def test_jitter_is_distributed_as_torchvisions():
    strengths = {"brightness": 0.8, "contrast": 1.4, "saturation": 0.3, "hue": 0.2}
    spec = spec_of(color_jitter={"p": 1.0, **strengths})
    ours = drawn_parameters(spec, 32, 32)
    torch.manual_seed(0)
    jitter = transforms.ColorJitter(**strengths)
    theirs = [jitter.get_params(*(getattr(jitter, name) for name in strengths)) for _ in range(DRAWS)]
    for n, name in enumerate(strengths):
        assert same_distribution([getattr(d, name) for d in ours], [t[n + 1] for t in theirs]), name
    counts = Counter(drawn.order for drawn in ours)
    assert set(counts) == set(permutations(range(4)))
    assert stats.chisquare(list(counts.values())).pvalue > ALPHA
    factors = np.array([drawn[3:7] for drawn in ours])
    assert np.abs(np.corrcoef(factors.T) - np.eye(4)).max() < 0.06  # independent of each other


def test_a_strength_of_zero_leaves_its_step_out():
    spec = spec_of(color_jitter={"p": 1.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0})
    assert {drawn[3:7] for drawn in drawn_parameters(spec, 32, 32, 100)} == {(1.0, 1.0, 1.0, 0.0)}
    pixels = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)
    ours = views.make_views((pixels, np.array([16]), np.array([16]), np.array([0])), spec, spec.view_ids, 0, 0)
    np.testing.assert_array_equal(ours[0, 0], pixels[0].transpose(2, 0, 1))


@pytest.mark.parametrize("probability", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_steps_happen_with_their_probability_and_independently(probability):
    spec = spec_of(horizontal_flip=probability, color_jitter={"p": probability}, grayscale=probability)
    happened = np.array([(d.flip, d.jitter, d.grayscale) for d in drawn_parameters(spec, 32, 32)])
    for count in happened.sum(0):
        assert stats.binomtest(int(count), DRAWS, probability).pvalue > ALPHA
    if 0 < probability < 1:
        assert np.abs(np.corrcoef(happened.T) - np.eye(3)).max() < 0.06
