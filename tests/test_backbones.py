"""Backbones by name: shapes, names of tensors, initial weights, and what a wrong name gets."""

import sys

import pytest
import torch
import torchvision

from ssl_dist import backbones
from ssl_dist.errors import UserError

LARGE = ["resnet18", "resnet34", "resnet50", "resnet101"]


@pytest.mark.parametrize("name", backbones.names())
def test_features_and_maps_are_as_wide_as_said(name):
    with torch.device("meta"):
        backbone = backbones.build(name).eval()
        for size in (32, 64):
            images = torch.empty(2, 3, size, size)
            assert backbone(images).shape == (2, backbone.feature_dim)
            features, maps = backbone.forward_stages(images)
            assert features.shape == (2, backbone.feature_dim)
            assert {stage: one.shape[1] for stage, one in maps.items()} == backbone.stages
            assert list(maps) == list(backbone.stages)
            sides = [one.shape[2] for one in maps.values()]
            assert sides == sorted(sides, reverse=True) and all(one.ndim == 4 for one in maps.values())


@pytest.mark.parametrize("name", ["conv4", "resnet8", "resnet18"])
def test_the_output_is_the_mean_of_the_last_map_of_the_same_pass(name):
    backbone = backbones.build(name)
    images = torch.randn(2, 3, 32, 32)
    features, maps = backbone.forward_stages(images)
    assert torch.equal(features, backbone(images))  # in training mode: the statistics of the batch
    torch.testing.assert_close(features, list(maps.values())[-1].mean((2, 3)))
    assert all(one.min() >= 0 for one in maps.values())  # after a ReLU, which no later layer undoes in place


@pytest.mark.parametrize("name", LARGE)
def test_large_resnets_are_torchvisions_without_fc(name):
    with torch.device("meta"):
        ours, theirs = backbones.build(name).state_dict(), getattr(torchvision.models, name)().state_dict()
    assert list(ours) == [key for key in theirs if not key.startswith("fc.")]
    assert all(tensor.shape == theirs[key].shape for key, tensor in ours.items())


def test_a_large_resnet_computes_what_torchvisions_does():
    ours, theirs = backbones.build("resnet18").eval(), torchvision.models.resnet18(num_classes=1).eval()
    theirs.fc = torch.nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(images), theirs(images))


@pytest.mark.parametrize("name", ["conv4", "resnet56", "resnet34"])
def test_initial_weights_have_the_spread_of_he_et_al(name):
    torch.manual_seed(0)
    backbone = backbones.build(name)
    for path, layer in backbone.named_modules():
        if isinstance(layer, torch.nn.Conv2d):
            wanted = (2 / (layer.kernel_size[0] ** 2 * layer.out_channels)) ** 0.5
            # four standard errors of a standard deviation
            spread = 4 * wanted / (2 * layer.weight.numel()) ** 0.5
            assert abs(float(layer.weight.detach().std()) - wanted) < spread, path
            assert layer.bias is None
        if isinstance(layer, torch.nn.BatchNorm2d):
            assert torch.all(layer.weight == 1) and torch.all(layer.bias == 0), path


def test_weights_follow_the_seed_of_the_caller():
    def weights(seed):
        torch.manual_seed(seed)
        return torch.cat([p.detach().flatten() for p in backbones.build("resnet8").parameters()])

    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("resent8", "'resnet8'"), ("conv", "'conv4'"), ("zzz", "timm/<name>"), ("resnet9", "resnet32, resnet56")],
)
def test_a_wrong_name_gets_the_nearest_and_the_list(name, expected):
    for function in (backbones.check, backbones.build):
        with pytest.raises(UserError) as caught:
            function(name)
        assert name in str(caught.value) and expected in str(caught.value) and "\n" not in str(caught.value)


def test_timm():
    pytest.importorskip("timm")
    with torch.device("meta"):
        for name in ("timm/resnet18", "timm/mobilenetv3_small_050"):  # the second widens its features at the end
            backbone = backbones.build(name).eval()
            assert backbone(torch.empty(2, 3, 64, 64)).shape == (2, backbone.feature_dim)
    with pytest.raises(UserError, match="'timm/resnet18'"):
        backbones.check("timm/resent18")


def test_without_timm_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="pip install timm"):
        backbones.build("timm/resnet18")
