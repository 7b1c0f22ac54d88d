"""What is computed again in the backward pass changes no bit of it, counts once, and is not held meanwhile."""

import copy

import pytest
import torch

from ssl_dist import backbones, config
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.errors import UserError
from ssl_dist.nn import recompute
from ssl_dist.nn.batchnorm import ViewColumns, one_view
from ssl_dist.nn.layers import key_dropout, keyed_rows
from ssl_dist.run.blueprint import derive
from ssl_dist.train.explain import Alive

VIT = "timm/test_vit"  # timm's own smallest, without dropout


def build(name, change=None, dropout=None):
    torch.manual_seed(0)
    backbone = backbones.build(name).double().train()
    for path, layer in backbone.named_modules():
        if dropout and type(layer) is torch.nn.Dropout and "attn_drop" not in path:  # a fused attention draws by itself
            layer.p = dropout
    key_dropout(backbone)
    if change:
        change(backbone)
    return backbone


def gradients(backbone, images):
    """Of a loss that sees every output and the first map, for draws of every image's own."""
    with keyed_rows(torch.arange(len(images))):
        features, maps = backbone.forward_stages(images)
    weights = torch.linspace(-1, 1, features.numel(), dtype=features.dtype).view_as(features)
    ((features * weights).sum() + next(iter(maps.values())).square().mean()).backward()
    return [features.detach(), *(p.grad for p in backbone.parameters())]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("conv4", 16),
        ("resnet8", 16),
        ("resnet18", 32),
        ("resnetv2_50", 32),
        ("efficientnet_b0", 32),
        (VIT, 160),
        ("timm/test_efficientnet", 32),
    ],
)
def test_blocks_computed_again_change_no_bit(name, size):
    images = torch.randn(4, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    kept, again = build(name), build(name, lambda backbone: recompute.by_blocks(backbone, name))
    for expected, found in zip(gradients(kept, images), gradients(again, images), strict=True):
        assert torch.equal(expected, found)
    for expected, found in zip(kept.buffers(), again.buffers(), strict=True):  # of BatchNorm: a pass counts once
        assert torch.equal(expected, found)


@pytest.mark.parametrize("num_parts", [3, 9])
def test_parts_have_the_gradient_of_the_whole(num_parts):
    images = torch.randn(8, 3, 160, 160, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole = build(VIT, dropout=0.2)
    parted = build(VIT, lambda backbone: recompute.in_parts(backbone, VIT, num_parts), dropout=0.2)
    for expected, found in zip(gradients(whole, images), gradients(parted, images), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12 * float(expected.abs().max()))


def peak(name, change=lambda backbone: None):
    with torch.device("meta"):
        backbone = backbones.build(name).train()
    change(backbone)
    for parameter in backbone.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    images = torch.empty(256, 3, 160, 160, device="meta")
    with Alive([*backbone.parameters(), *backbone.buffers(), images]) as alive:
        features = backbone(images)
        features.backward(torch.empty_like(features))
    return alive.peak


def test_less_is_held():
    """A share of what is held otherwise. A part of four holds a quarter; a block's input stays beside its inside."""
    assert peak(VIT, lambda backbone: recompute.in_parts(backbone, VIT, 4)) < 0.27 * peak(VIT)
    assert peak("resnet50", lambda backbone: recompute.by_blocks(backbone, "resnet50")) < 0.42 * peak("resnet50")


def test_a_copy_computes_with_its_own_weights():
    images = torch.ones(2, 3, 16, 16, dtype=torch.float64)
    backbone = build("conv4", lambda backbone: recompute.by_blocks(backbone, "conv4"))
    target = copy.deepcopy(backbone)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.zero_()
        assert not backbone(images).any() and target(images).any()


def test_a_view_alone_counts_once():
    backbone = build("conv4", lambda backbone: recompute.by_blocks(backbone, "conv4"))
    columns = ViewColumns(backbone, lambda layer: lambda: None)
    with one_view(0):
        features = backbone(torch.randn(4, 3, 16, 16, dtype=torch.float64))
    columns.settle(lambda x: x[None])
    before = copy.deepcopy(list(backbone.buffers()))
    features.square().sum().backward()
    assert not any(columns.passes.values())
    assert all(map(torch.equal, backbone.buffers(), before))


def plan(digits, *overrides):
    settings = config.load(
        "configs/digits/simclr-conv4.yaml", [f"data.root={digits}", "data.reader=arrays", *overrides]
    )
    return derive(settings, RankInfo(0, 1, 0, 1))


@pytest.mark.parametrize(
    ("words", "message", "remedy"),
    [
        (["optim.accumulate=4"], "optim.accumulate = 4: the 4 BatchNorm layers of conv4", ["backbone.recompute=true"]),
        (["backbone.name=alexnet", "backbone.recompute=true", "data.image_size=224"], "alexnet has no blocks", []),
        (
            ["compile=true", "backbone.recompute=true"],
            "compile: true cannot trace backbone.recompute",
            ["compile=true"],
        ),
    ],
)
def test_what_does_not_go_is_refused(digits, words, message, remedy):
    with pytest.raises(UserError, match=message):
        plan(digits, *words)
    plan(digits, *remedy)
