"""Every augmentation of the papers' official codes as a recipe of view groups.

The names are repository/recipe; a normalisation is no step of a view but `views.normalize`. Sizes and numbers of views
that a code takes from its command line are those of its published runs; for OBoW and SwAV on STL-10, where there are
none, smaller ones. `SIDE`, the padding of side / 8 and the share that is erased depend on the data set: STL-10's.
"""

import itertools

import numpy as np
import pytest

from ssl_dist import views
from ssl_dist.config import Views
from ssl_dist.config.section import validate
from tests.view_reference import distance, noise, reference, smooth

SIDE = 96  # of STL-10
CROP = {"scale": [0.08, 1.0], "ratio": [0.75, 4 / 3]}
BICUBIC = CROP | {"interpolation": "bicubic"}
STRONG = {"p": 0.8, "brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}
MIDDLE = {"p": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.4}
WEAK = {"p": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
ALWAYS = MIDDLE | {"p": 1.0}
BLUR = {"p": 0.5, "sigma": [0.1, 2.0]}
LAST_GRAY = ["color_jitter", "grayscale", "gaussian_blur", "solarize"]
FIRST_GRAY = ["grayscale", "color_jitter"]

RELATIONAL = {"random_resized_crop": CROP, "horizontal_flip": 0.5, "color_jitter": STRONG, "grayscale": 0.2}
PADDED = {"padded_crop": {"padding": SIDE // 8}, "horizontal_flip": 0.5}
PROBE = [{"size": 224, "random_resized_crop": CROP, "horizontal_flip": 0.5}]

VICREG = {"num": 1, "size": 224, "random_resized_crop": BICUBIC, "horizontal_flip": 0.5, "color_jitter": WEAK}
VICREG |= {"grayscale": 0.2, "order": LAST_GRAY}
TWO_OF_VICREG = [
    VICREG | {"gaussian_blur": BLUR | {"p": 1.0}, "solarize": {"p": 0.0}},
    VICREG | {"gaussian_blur": BLUR | {"p": 0.1}, "solarize": {"p": 0.2}},
]
SELA = {"size": 224, "random_resized_crop": CROP, "grayscale": 0.2, "color_jitter": ALWAYS, "horizontal_flip": 0.5}
SELA |= {"order": FIRST_GRAY}
SELA_CIFAR = {"size": 224, "resize": {"short_side": 256}, "random_resized_crop": {"scale": [0.2, 1.0]}}
SELA_CIFAR |= {"color_jitter": ALWAYS, "grayscale": 0.2, "horizontal_flip": 0.5}


def obow(original, resize, crop, patch, side, jitter):
    """The whole image, two crops and five patches of the 3 x 3 grid."""
    colors = {"color_jitter": jitter, "grayscale": 0.2, "horizontal_flip": 0.5}
    small = {"random_resized_crop": {"scale": [0.08, 0.6]}, "gaussian_blur": BLUR}
    grid = {"random_resized_crop": {"scale": [0.6, 1.0]}, "grid_patches": {"side": side, "jitter": 24}}
    return [
        {"num": 1, "size": original, "resize": {"short_side": resize}, "horizontal_flip": 0.5},
        {"num": 2, "size": crop, **small, **colors},
        {"num": 5, "size": patch, **grid, **colors},
    ]


def swav(sizes, jitter):
    step = {"horizontal_flip": 0.5, "color_jitter": jitter, "grayscale": 0.2, "gaussian_blur": BLUR}
    return [
        {"num": num, "size": size, "random_resized_crop": {"scale": scale}, **step}
        for num, size, scale in zip((2, 6), sizes, ([0.14, 1.0], [0.05, 0.14]), strict=True)
    ]


def relic(side):
    blur = {"p": 1.0, "sigma": [0.1, 2.0], "kernel": {32: 3, 64: 7, 96: 9, 192: 19}[side]}
    step = {"horizontal_flip": 0.5, "color_jitter": STRONG, "grayscale": 0.2, "gaussian_blur": blur}
    first = {"num": 2, "size": side, "random_resized_crop": CROP | {"scale": [0.1, 1.0]}}
    local = {"num": 4, "size": side * 3 // 7, "random_resized_crop": CROP | {"scale": [0.05, 1.0]}}
    return [first | step | {"solarize": {"p": 0.2, "threshold": 127}}, local | step]


RECIPES = {
    "self-supervised-relational-reasoning/relationnet": [RELATIONAL],
    "self-supervised-relational-reasoning/simclr": [RELATIONAL],
    "self-supervised-relational-reasoning/deepinfomax": [{"horizontal_flip": 0.5}],
    "self-supervised-relational-reasoning/standard": [PADDED],
    "self-supervised-relational-reasoning/rotationnet": [PADDED],
    "self-supervised-relational-reasoning/deepcluster": [PADDED],
    "self-supervised-relational-reasoning/finetune": [
        {
            "horizontal_flip": 0.5,
            "affine": {"p": 0.5, "degrees": 18, "translate": [0.1, 0.1], "scale": [0.9, 1.1], "shear": 10},
            # erased after the normalisation, to 0: the level of the mean, 0.5, up to half a level
            "erasing": {"p": 0.5, "scale": [0.111, 0.111], "ratio": [1.0, 1.0], "fill": [128, 128, 128]},
        }
    ],
    "self-supervised-relational-reasoning/lineval": [{}],
    "self-supervised-relational-reasoning/test": [{}],
    "sfrik/ImageNet/VICReg": TWO_OF_VICREG,
    "sfrik/ImageNet/SimCLR": [
        {
            "num": 2,
            "size": 224,
            "random_resized_crop": BICUBIC,
            "horizontal_flip": 0.5,
            "color_jitter": STRONG,
            "grayscale": 0.2,
            "gaussian_blur": BLUR,
        }
    ],
    "sfrik/STL10/AUH": [
        {
            "num": 2,
            "size": 64,
            "random_resized_crop": BICUBIC,
            "horizontal_flip": 0.5,
            "color_jitter": ALWAYS,
            "grayscale": 0.2,
        }
    ],
    "sfrik/ImageNet/OBoW": obow(224, 256, 160, 96, 256, MIDDLE),
    "sfrik/STL10/OBoW": obow(96, 96, 64, 32, 96, ALWAYS),
    "sfrik/ImageNet/SwAV": swav((224, 96), STRONG),
    "sfrik/STL10/SwAV": swav((64, 32), ALWAYS),
    "sfrik/linear_probe": PROBE,
    "sfrik/feature_extraction": [{"size": 224, "resize": {"short_side": 256, "interpolation": "bicubic"}}],
    "self-label/level 0": [{"size": 224, "resize": {"short_side": 256}}],
    "self-label/level 1": [{"size": 224, "resize": {"short_side": 256}, "horizontal_flip": 0.5}],
    "self-label/level 2": [
        {"size": 224, "resize": {"short_side": 256}, "random_resized_crop": CROP, "horizontal_flip": 0.5}
    ],
    "self-label/level 3": [SELA],
    "self-label/cifar train": [SELA_CIFAR],
    "self-label/cifar test": [{"size": 224, "resize": {"short_side": 256}}],
    "self-label/retrain_with_rotnet": [SELA],  # the four rotations are the method's: of one and the same view
    "self-label/linear_probe_alexnet": PROBE,
    "moco v2/aug_plus": [  # SeLa's Aug++
        {
            "size": 224,
            "random_resized_crop": {"scale": [0.2, 1.0]},
            "color_jitter": {"p": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
            "grayscale": 0.2,
            "gaussian_blur": BLUR,
            "horizontal_flip": 0.5,
        }
    ],
    **{f"relic/{side}": relic(side) for side in (32, 64, 96, 192)},
    "vicreg/pretrain": TWO_OF_VICREG,
    "vicreg/linear_probe": PROBE,
    "dino/transform": [{"size": 224, "resize": {"short_side": 256, "interpolation": "bicubic"}}],
}


def groups_of(name):
    return validate(Views, {"groups": RECIPES[name]}).groups


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_makes_the_views_that_pillow_and_torchvision_make(name):
    groups = groups_of(name)
    num_views = sum(group.num or 1 for group in groups)
    specs = views.view_specs(groups, num_views, SIDE)
    pixels = np.stack([smooth(1, 110, 130), noise(2, 110, 130)])
    heights, widths, ids = np.array([110, 75]), np.array([130, 101]), np.array([4, 9])
    for group, spec in zip(groups, specs, strict=True):
        ours = views.make_views((pixels, heights, widths, ids), spec, spec.view_ids, 1, 0)
        assert ours.shape == (spec.num, 2, 3, spec.size, spec.size)
        for v, b in itertools.product(range(min(spec.num, 2)), range(2)):
            image = pixels[b, : heights[b], : widths[b]]
            drawn = views.draw_view(spec, 1, 0, int(ids[b]), int(spec.view_ids[v]), *image.shape[:2])
            expected = reference(image, group, spec.size, drawn)
            exact = drawn.hue == 0 or not drawn.jitter
            exact &= group.gaussian_blur is None or group.gaussian_blur.kernel is None
            if exact:
                np.testing.assert_array_equal(ours[v, b], expected)
                continue
            # single levels of the hue and of torchvision's blur, which later steps may enlarge or turn over
            threshold = group.solarize.threshold if drawn.solarize else None
            near = distance(ours[v, b], expected) <= 4 if threshold is None else True
            assert near and np.count_nonzero(ours[v, b] != expected) <= 2e-3 * expected.size


def test_asymmetric_views_and_several_sizes_count_their_ids_through_the_groups():
    specs = views.view_specs(groups_of("sfrik/ImageNet/OBoW"), 8, 224)
    assert [(spec.size, spec.view_ids.tolist()) for spec in specs] == [(224, [0]), (160, [1, 2]), (96, [3, 4, 5, 6, 7])]
    specs = views.view_specs(groups_of("vicreg/pretrain"), 2, 32)
    assert [(spec.size, spec.view_ids.tolist()) for spec in specs] == [(224, [0]), (224, [1])]
