"""The picture of the first convolution's filters: torchvision's, of every kind of backbone, and in TensorBoard."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torchvision.utils import make_grid

from ssl_dist import backbones, config
from ssl_dist.run import filters
from ssl_dist.train.loop import train


@pytest.mark.parametrize(("number", "side"), [(96, 11), (64, 7), (13, 3), (3, 2)])
def test_the_picture_is_that_of_make_grid(number, side):
    weights = torch.randn(number, 3, side, side)
    weights[0] = 0.5  # nothing to tell apart in it
    expected = make_grid(weights, nrow=8, normalize=True, scale_each=True)
    shown = filters.grid(weights)
    assert torch.equal(shown[:, ::4, ::4], (expected * 255).round().byte())
    assert torch.equal(shown, shown[:, ::4, ::4].repeat_interleave(4, 1).repeat_interleave(4, 2))


@pytest.mark.parametrize(
    ("name", "shape"),
    [("alexnet_small", (64, 3, 11, 11)), ("resnet18", (64, 3, 7, 7)), ("conv4", (8, 3, 3, 3)), ("resnetv2_50", None)],
)
def test_the_first_convolution_of_a_backbone(name, shape):
    with torch.device("meta"):
        weights = filters.first_convolution(backbones.build(name))
    assert weights is not None and (shape is None or weights.shape == shape)


@pytest.mark.parametrize("first", [nn.Linear(3, 4), nn.BatchNorm2d(3), nn.Conv2d(3, 8, 1)])
def test_networks_without_one(first):
    assert filters.first_convolution(nn.Sequential(nn.Flatten(), first, nn.Conv2d(3, 8, 3))) is None
    assert filters.first_convolution(nn.Flatten()) is None


def test_other_channels_are_shown_as_pictures_show_them():
    five, two = nn.Conv2d(5, 8, 3), nn.Conv2d(2, 8, 3)
    assert torch.equal(filters.first_convolution(five), five.weight[:, :3])
    assert torch.equal(filters.first_convolution(two), two.weight[:, [0, 0, 0]])


def test_they_are_in_tensorboard_every_so_many_epochs(digits, tmp_path):
    overrides = ["data.limit=16", "optim.batch_size=8", "optim.epochs=4", "log.filters_every_epochs=2", "views.num=2"]
    settings = config.load(
        "configs/digits/relational-conv4.yaml",
        [f"data.root={digits}", f"run_dir={tmp_path / 'run'}", "data.reader=arrays", "log.every_steps=3", *overrides],
    )
    assert train(settings) == 0
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Images("filters")] == [4, 8]
    last = Image.open(io.BytesIO(board.Images("filters")[-1].encoded_image_string))
    state = torch.load(tmp_path / "run" / "checkpoints" / "step-00000008.pt", weights_only=False)
    weights = next(value for name, value in state["method"].items() if name.startswith("backbone"))
    np.testing.assert_array_equal(np.asarray(last), filters.grid(weights).permute(1, 2, 0).numpy())
