"""`ssl_dist.MultiView`: the views of the trainings in a data loader of one's own."""

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms

import ssl_dist
from ssl_dist.data.multi_view import RECIPES
from ssl_dist.errors import UserError
from ssl_dist.views import Images, make_views
from tests.make_images import picture

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


class Photos:
    """Five images, each with its number."""

    def __init__(self, kind=np.asarray):
        self.kind = kind

    def __len__(self):
        return 5

    def __getitem__(self, index):
        return self.kind(picture(40, 30, index)), index


def test_they_are_the_views_of_the_trainings():
    views = ssl_dist.MultiView("simclr", num=3, size=24, normalize=(MEAN, STD), seed=7)
    views.set_epoch(4)
    image = picture(40, 30)
    [spec] = views.specs
    one = Images(image[None], np.array([40]), np.array([30]), np.array([11]))
    expected = make_views(one, spec, spec.view_ids, 7, 4)
    np.testing.assert_array_equal(views.batch(image[None], [11])[0], expected)
    tensor = views(Image.fromarray(image), 11)
    to_float = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    for view, pixels in zip(tensor, expected[:, 0], strict=True):
        torch.testing.assert_close(view, to_float(Image.fromarray(pixels.transpose(1, 2, 0))))
    plain = ssl_dist.MultiView("simclr", num=3, size=24, seed=7)(image, 11)
    assert plain.shape == (3, 3, 24, 24) and 0 <= plain.min() < plain.max() <= 1


@pytest.mark.parametrize("recipe", ["simclr", [{"num": 1, "size": 24}, {"num": 2, "size": 16}]])
def test_levels_become_the_same_floats_on_the_device_of_the_loop(recipe):
    """In a batch of the loader's; and a MultiView of levels may have become floats in a process before."""
    floats = ssl_dist.MultiView(recipe, size=24, normalize=(MEAN, STD))
    levels = ssl_dist.MultiView(recipe, size=24, normalize=(MEAN, STD), dtype=torch.uint8)
    [[expected, _]], [[made, _]] = (DataLoader(views.over(Photos()), 5) for views in (floats, levels))
    for group, pixels in zip(*([batch] if recipe == "simclr" else batch for batch in (expected, made)), strict=True):
        assert pixels.dtype == torch.uint8 and pixels.shape == group.shape
        assert torch.equal(levels.to_float(pixels), group)
    shape = (2, 3, 3, 24, 24)
    assert levels.to_float(torch.empty(shape, dtype=torch.uint8, device="meta")).shape == shape
    assert torch.equal(levels.to_float(pixels[0, 0]), levels.to_float(pixels)[0, 0])
    for wrong, given in ((group, "of torch.float32"), ([pixels], "list"), (pixels[0, 0, 0], "of torch.uint8")):
        with pytest.raises(ValueError, match=f"^levels are .*{given}: give a tensor uint8"):
            levels.to_float(wrong)


def test_the_dtype_is_that_of_the_images():
    deep = picture(40, 30).astype(np.uint16)
    groups = [{"random_resized_crop": {}}]
    views = ssl_dist.MultiView(groups, size=8, dtype=torch.uint16)
    [batch] = DataLoader(views.over([deep] * 3), 3, num_workers=1)
    assert batch.dtype == torch.uint16 and torch.equal(batch[1], views(deep, 1))
    for dtype, image in ((torch.uint8, deep), (torch.uint16, picture(40, 30))):
        with pytest.raises(UserError, match=f"^dtype = {dtype}: .* torch.uint.*; give this, or torch.float32$"):
            ssl_dist.MultiView(groups, size=8, dtype=dtype)(image)
    with pytest.raises(UserError, match=r"^dtype = torch\.float16: give torch\.float32, torch\.uint8"):
        ssl_dist.MultiView(dtype=torch.float16)


@pytest.mark.parametrize("workers", [0, 2])
def test_neither_workers_nor_order_change_a_view(workers):
    views = ssl_dist.MultiView(num=2, size=16)
    loader = DataLoader(views.over(Photos()), 2, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    for epoch in range(2):
        views.set_epoch(epoch)
        seen = {int(i): view for x, index in loader for view, i in zip(x, index, strict=True)}
        for index, view in seen.items():
            assert torch.equal(view, views(picture(40, 30, index), index))
    views.set_epoch(0)
    assert not torch.equal(seen[0], views(picture(40, 30), 0)), "an epoch has views of its own"


def test_without_an_index_the_pixels_name_the_views():
    views = ssl_dist.MultiView(size=16)
    one, same, other = views(picture(40, 30)), views(Image.fromarray(picture(40, 30))), views(picture(40, 30, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert not torch.equal(ssl_dist.MultiView(size=16, seed=1)(picture(40, 30)), one)


def test_groups_of_several_sizes():
    crop = RECIPES["relational"][0]
    parts = ssl_dist.MultiView([{"num": 2, **crop}, {"num": 4, "size": 8, **crop}], size=16)(picture(40, 30), 0)
    assert [tuple(part.shape) for part in parts] == [(2, 3, 16, 16), (4, 3, 8, 8)]
    assert ssl_dist.MultiView("vicreg", size=16)(picture(40, 30), 0).shape == (2, 3, 16, 16)


@pytest.mark.parametrize(
    ("name", "config"),
    [("relational", "cifar10-short/relational-conv4"), ("vicreg", "imagenet/vicreg-resnet50")],
)
def test_recipes_are_those_of_the_configs(name, config):
    with open(f"configs/{config}.yaml") as file:
        assert RECIPES[name] == yaml.safe_load(file)["views"]["groups"]


def test_a_photo_that_lies_on_its_side():
    lying, exif = Image.fromarray(np.rot90(picture(40, 30))), Image.Exif()
    exif[274] = 6
    lying.info["exif"] = exif.tobytes()
    views = ssl_dist.MultiView(size=16)
    assert torch.equal(views(lying, 3), views(picture(40, 30), 3))


def test_mistakes():
    with pytest.raises(UserError, match="did you mean 'simclr'"):
        ssl_dist.MultiView("simcrl")
    with pytest.raises(UserError, match=r"recipe\[0\]"):
        ssl_dist.MultiView({"horizontal_flop": 0.5})
    for wrong in (None, 3, [], [3], ["simclr"]):
        with pytest.raises(UserError, match=r"recipe = .*: give a name, or"):
            ssl_dist.MultiView(wrong)
    for name, value in {"num": 0, "size": "32", "seed": 1.5}.items():
        with pytest.raises(UserError, match=f"{name} = {value!r}: give"):
            ssl_dist.MultiView(**{name: value})
    with pytest.raises(UserError, match=r"normalize = .*: give \(mean, std\)"):
        ssl_dist.MultiView(normalize=(0.5, 0.5, 0.5))
    with pytest.raises(UserError, match=r"normalize\.std\.0 = 0"):
        ssl_dist.MultiView(normalize=[(0.5,) * 3, (0,) * 3])
    views = ssl_dist.MultiView(size=np.int64(16))
    with pytest.raises(UserError, match="epoch = 'a'"):
        views.set_epoch("a")
    with pytest.raises(ValueError, match=r"\[1, 0, 30, 3\] of uint8"):
        views(picture(40, 30)[:0])
    photos = views.over([picture(40, 30), picture(40, 30)])
    assert torch.equal(photos[-1], photos[1]) and len([*photos]) == 2
    with pytest.raises(ValueError, match=r"\[40, 30\] of uint8: give a PIL image"):
        views(picture(40, 30)[:, :, 0])
    with pytest.raises(ValueError, match=r"\[1, 40, 30, 3\] of uint8 and 2 indices"):
        views.batch(picture(40, 30)[None], [1, 2])
    with pytest.raises(ValueError, match="mode 'F'"):
        views(Image.new("F", (4, 4)))
