"""Backbones by name: shapes, names of tensors, initial weights, and what a wrong name gets."""

import re
import sys

import pytest
import torch
import torchvision

from ssl_dist import backbones
from ssl_dist.backbones.conv4 import Conv4
from ssl_dist.errors import UserError
from ssl_dist.nn.layers import KeyedDropPath, key_dropout, keyed_rows
from ssl_dist.run.blueprint import try_size

LARGE = ["resnet18", "resnet34", "resnet50", "resnet101"]
EFFICIENT = ["efficientnet_b0", "efficientnet_v2_s"]
SIZES = dict.fromkeys(["alexnet", "alexnet_small"], (223, 254))  # others: 32 and 64 px


# Of the deepest and the widest one each will do.
@pytest.mark.parametrize("name", [name for name in backbones.names() if not re.search(r"(34|101|200)x|x[45]_", name)])
def test_features_and_maps_are_as_wide_as_documented(name):
    with torch.device("meta"):
        backbone = backbones.build(name).eval()
        for size in SIZES.get(name, (32, 64)):
            images = torch.empty(2, 3, size, size)
            assert backbone(images).shape == (2, backbone.feature_dim)
            features, maps = backbone.forward_stages(images)
            assert features.shape == (2, backbone.feature_dim)
            assert {stage: one.shape[1] for stage, one in maps.items()} == backbone.stages
            assert list(maps) == list(backbone.stages)
            sides = [one.shape[2] for one in maps.values()]
            assert sides == sorted(sides, reverse=True) and all(one.ndim == 4 for one in maps.values())


MAPS = [
    # backbone, size, whether its features are the mean of the last map, whether its maps come out of a ReLU
    ("conv4", 32, True, True),
    ("resnet8", 32, True, True),
    ("resnet18", 32, True, True),
    ("resnet18_small_stem", 32, True, True),
    ("resnetv2_50", 32, True, False),
    ("efficientnet_b0", 32, True, False),
    ("alexnet", 224, False, True),
]


@pytest.mark.parametrize(("name", "size", "is_mean", "is_rectified"), MAPS)
def test_features_and_maps_are_of_one_pass(name, size, is_mean, is_rectified):
    backbone = backbones.build(name)
    for layer in backbone.modules():
        if type(layer).__name__ in ("Dropout", "StochasticDepth"):
            layer.p = 0.0
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        features, maps = backbone.forward_stages(images)
        torch.testing.assert_close(features, backbone(images))  # in training mode: the statistics of the batch
        untouched = backbone.forward_stages(images)[1]
    if is_mean:
        torch.testing.assert_close(features, list(maps.values())[-1].mean((2, 3)))
    for stage, one in maps.items():
        torch.testing.assert_close(one, untouched[stage])
    for stage, one in maps.items():  # a later layer that works in place would undo this
        assert (one.min() >= 0) == is_rectified, stage


def test_a_small_stem_keeps_the_side():
    with torch.device("meta"):
        images = torch.empty(1, 3, 32, 32)
        sides = [one.shape[-1] for one in backbones.build("resnet18_small_stem").forward_stages(images)[1].values()]
    assert sides == [32, 32, 16, 8, 4]


def test_all_widths_of_a_wide_resnet_are_multiplied():
    with torch.device("meta"):
        plain, wide = backbones.build("resnet50"), backbones.build("resnet50x2")
    assert wide.stages == {stage: 2 * channels for stage, channels in plain.stages.items()}
    for name, tensor in plain.state_dict().items():
        if tensor.ndim == 4:
            factors = [a / b for a, b in zip(wide.state_dict()[name].shape, tensor.shape, strict=True)]
            assert factors == [2, 1 if name == "conv1.weight" else 2, 1, 1], name


def test_the_small_alexnet_is_selas():
    """Names, shapes and number of weights that the official class has with size="small", without its top layers."""
    convolutions = {0: (64, 3, 11), 4: (192, 64, 5), 8: (384, 192, 3), 11: (256, 384, 3), 14: (256, 256, 3)}
    expected = {}
    for number, (out_channels, in_channels, kernel) in convolutions.items():
        expected[f"features.{number}.weight"] = [out_channels, in_channels, kernel, kernel]
        expected[f"features.{number}.bias"] = [out_channels]
        for name in ("weight", "bias", "running_mean", "running_var"):
            expected[f"features.{number + 1}.{name}"] = [out_channels]
        expected[f"features.{number + 1}.num_batches_tracked"] = []
    for number, in_features in ((1, 9216), (4, 4096)):
        expected[f"classifier.{number}.weight"] = [4096, in_features]
        expected[f"classifier.{number}.bias"] = [4096]
    with torch.device("meta"):
        backbone = backbones.build("alexnet_small")
    shapes = {name: list(tensor.shape) for name, tensor in backbone.state_dict().items()}
    assert shapes == expected and list(shapes) == list(expected)
    assert sum(p.numel() for p in backbone.parameters()) == 57_006_144


@pytest.mark.parametrize("size", [32, 222, 255])
def test_alexnet_says_which_images_it_takes(size):
    with torch.device("meta"), pytest.raises(ValueError, match=f"223 to 254 px.*not {size} x {size}"):
        backbones.build("alexnet")(torch.empty(1, 3, size, size))


def test_alexnets_biases_before_a_batchnorm_learn_nothing_and_matter_to_nothing():
    backbone = backbones.build("alexnet").train()
    for layer in backbone.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    images = torch.randn(3, 3, 224, 224)
    features = backbone(images)
    features.square().mean().backward()
    convolutions = [layer for layer in backbone.features if isinstance(layer, torch.nn.Conv2d)]
    for layer in convolutions:
        assert layer.bias.grad.count_nonzero() == 0 and layer.weight.grad.count_nonzero() > 0
        torch.nn.init.constant_(layer.bias, 0.1)
    torch.testing.assert_close(backbone(images), features, rtol=1e-3, atol=1e-5)
    means = [layer.running_mean for layer in backbone.features if isinstance(layer, torch.nn.BatchNorm2d)]
    assert all(mean.abs().max() > 0.005 for mean in means)  # in training the bias reached the statistics
    backbone.eval()
    with torch.no_grad():
        before = backbone(images)
        torch.nn.init.constant_(convolutions[0].bias, 1.0)
        assert not torch.allclose(backbone(images), before)  # in evaluation it counts


def with_keyed_depth(name):
    """In training mode, float64; where stochastic depth is on, it drops half of the rows, so that it does in each."""
    backbone = backbones.build(name).double().train()
    key_dropout(backbone)
    for layer in backbone.modules():
        if isinstance(layer, KeyedDropPath) and layer.p:
            layer.p = 0.5
    return backbone


@pytest.mark.parametrize(
    ("name", "size"),
    [("conv4", 32), ("resnet8", 32), ("resnet18", 64), ("resnetv2_50", 64), *((n, 64) for n in EFFICIENT)],
)
def test_no_gradient_is_mere_rounding(name, size):
    """Where the exact gradient is 0, a computed one of 1e-18 would become a step of Adam."""
    torch.manual_seed(0)
    backbone = with_keyed_depth(name)
    with keyed_rows(torch.arange(8)):
        features = backbone(torch.randn(8, 3, size, size).double())
    (features * torch.randn_like(features)).mean().backward()
    largest = {path: float(p.grad.abs().max()) for path, p in backbone.named_parameters()}
    typical = sorted(largest.values())[len(largest) // 2]
    assert [path for path, value in largest.items() if 0 < value < 1e-8 * typical] == []


@pytest.mark.parametrize("name", EFFICIENT)
def test_only_biases_without_effect_are_held(name):
    """Moving them changes no output of training mode. Others are free: a 3x3 convolution sees a shift at the border."""
    torch.manual_seed(0)
    backbone = with_keyed_depth(name)
    images, rows = torch.randn(4, 3, 64, 64).double(), torch.arange(4)
    with keyed_rows(rows):
        features = backbone(images)
    features.square().mean().backward()
    without_gradient = [p for p in backbone.parameters() if p.grad.count_nonzero() == 0]
    lasts = [p for path, p in backbone.named_parameters() if re.search(r"block\.\d\.1\.bias", path)]
    assert without_gradient and (len(without_gradient) < len(lasts))
    with torch.no_grad():
        for bias in without_gradient:
            bias += torch.randn_like(bias)
        with keyed_rows(rows):
            torch.testing.assert_close(backbone(images), features)


@pytest.mark.parametrize("name", EFFICIENT)
def test_efficientnets_are_torchvisions_without_the_classifier(name):
    ours, theirs = backbones.build(name).eval(), getattr(torchvision.models, name)().eval()
    theirs.classifier = torch.nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images))
    of_torchvision = torchvision.ops.StochasticDepth
    kinds = [[type(layer) for layer in net.modules() if isinstance(layer, of_torchvision)] for net in (ours, theirs)]
    assert kinds[0] == kinds[1] and set(kinds[0]) == {of_torchvision}


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


@pytest.mark.parametrize("name", ["conv4", "resnet56", "resnet34", "alexnet"])
def test_initial_weights_have_the_spread_of_he_et_al(name):
    torch.manual_seed(0)
    backbone = backbones.build(name)
    for path, layer in backbone.named_modules():
        if isinstance(layer, torch.nn.Conv2d):
            expected = (2 / (layer.kernel_size[0] ** 2 * layer.out_channels)) ** 0.5
            # four standard errors of a standard deviation
            spread = 4 * expected / (2 * layer.weight.numel()) ** 0.5
            assert abs(float(layer.weight.detach().std()) - expected) < spread, path
            assert layer.bias is None or torch.all(layer.bias == 0)
        if isinstance(layer, torch.nn.BatchNorm2d):
            assert torch.all(layer.weight == 1) and torch.all(layer.bias == 0), path
        if isinstance(layer, torch.nn.Linear):  # SeLa's AlexNet
            assert abs(float(layer.weight.detach().std()) - 0.01) < 1e-4 and torch.all(layer.bias == 0), path


def test_weights_follow_the_seed_of_the_caller():
    def weights(seed):
        torch.manual_seed(seed)
        return torch.cat([p.detach().flatten() for p in backbones.build("resnet8").parameters()])

    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resent8", "'resnet8'"),
        ("conv", "'conv4'"),
        ("zzz", "timm/<name>"),
        ("resnet9", "resnet32, resnet56"),
        ("resnet50x3", "x2, x4 or x5"),
        ("alexnets", "'alexnet'"),
    ],
)
def test_a_wrong_name_gets_the_nearest_and_the_list(name, expected):
    for function in (backbones.check, backbones.build):
        with pytest.raises(UserError) as caught:
            function(name)
        assert name in str(caught.value) and expected in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["conv4", "alexnet", "efficientnet_b0", "timm/resnet18"])
def test_an_option_that_a_backbone_has_not_is_refused(name):
    with pytest.raises(UserError, match=f"zero_init_residual = true: backbone {name} has no such option"):
        backbones.build(name, zero_init_residual=True)


# the second widens its features at the end, the third has a submodule of the name stages
@pytest.mark.parametrize("name", ["timm/resnet18", "timm/mobilenetv3_small_050", "timm/convnext_atto"])
def test_timm(name):
    pytest.importorskip("timm")
    backbone = backbones.build(name).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features, maps = backbone.forward_stages(images)
        assert features.shape == (2, backbone.feature_dim)
        torch.testing.assert_close(features, backbone(images))
    assert {stage: one.shape[1] for stage, one in maps.items()} == backbone.stages != {}
    assert all(tensor.startswith("model.") for tensor in backbone.state_dict())
    with pytest.raises(UserError, match="'timm/resnet18'"):
        backbones.check("timm/resent18")


@pytest.mark.parametrize(
    ("word", "name"),
    [("vit_tiny_patch16_224", "timm/vit_tiny_patch16_224"), ("vit_tinny_patch16_224", "timm/vit_tiny_patch16_224"),
     ("resnet-18", "resnet18")],
)  # fmt: skip
def test_a_name_of_timms_is_found_without_its_prefix(word, name):
    pytest.importorskip("timm")
    with pytest.raises(UserError) as caught:
        backbones.check(word)
    hint = re.search(r"did you mean '(.*)'\?", str(caught.value))[1]
    assert hint == name
    backbones.check(hint)


def test_without_timm_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="no such backbone; backbones"):
        backbones.check("vit_tiny_patch16_224")
    with pytest.raises(UserError, match="pip install timm"):
        backbones.build("timm/resnet18")


class SaysNothing(Conv4):
    def forward(self, x):
        if x.shape[-1] % 7:
            raise AssertionError  # what a bare assert is where pytest does not rewrite it
        return super().forward(x)


def test_a_backbone_that_refuses_a_size_without_a_word_is_a_users_mistake():
    backbone = SaysNothing().to("meta")
    words = r"data\.image_size: views of 32 px do not fit backbone mine: AssertionError; it takes 224 px"
    with pytest.raises(UserError, match=words):
        try_size(backbone, 32, "mine", "views")
    try_size(backbone, 224, "mine", "views")
