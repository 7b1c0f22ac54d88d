"""Vision transformers of timm as backbones: any size of images, tokens by name, attention, stochastic depth."""

import copy
import re
from functools import partial
from pathlib import Path

import pytest
import torch

from ssl_dist import backbones, config, methods
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.errors import UserError
from ssl_dist.methods.base import Info
from ssl_dist.nn import recompute
from ssl_dist.nn.backbone import TokenBackbone, freeze_offset
from ssl_dist.nn.compiled import compile_network
from ssl_dist.nn.layers import KeyedDropPath, key_dropout
from ssl_dist.run.blueprint import derive

timm = pytest.importorskip("timm")

# with a class token; with registers, whose positions are of patches alone; without a class token
NAMES = ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_base_patch16_gap_224"]


def tiny(**options):
    torch.manual_seed(0)
    return backbones.build("timm/vit_tiny_patch16_224", image_size=32, patch_size=8, **options).eval()


@pytest.mark.parametrize("name", NAMES)
def test_it_computes_what_timm_does(name):
    patch = int(re.search(r"patch(\d+)", name)[1])
    size, other = 4 * patch, 7 * patch
    ours = backbones.build(f"timm/{name}", image_size=size).eval()
    theirs = timm.create_model(name, num_classes=0, img_size=size, dynamic_img_size=True).eval()
    theirs.load_state_dict(ours.model.state_dict())
    with torch.no_grad():
        images = torch.randn(2, 3, size, size)
        assert torch.equal(ours(images), theirs(images))
        assert torch.equal(ours.tokens(images), theirs.forward_features(images))
        images = torch.randn(2, 3, other, other)
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)
        _, maps = ours.forward_stages(images)
        for number, expected in enumerate(theirs.forward_intermediates(images)[1]):
            torch.testing.assert_close(maps[f"blocks.{number}"], expected, rtol=1e-4, atol=1e-4)


def test_positions_are_of_the_size_it_is_built_for():
    """Also of a network that timm lets take any size; one that resizes images within stays as it is."""
    for name in ("vit_tiny_patch16_224", "test_vit"):
        assert backbones.build(f"timm/{name}", image_size=48).grid == (3, 3)
        assert backbones.build(f"timm/{name}", image_size=48, patch_size=8).grid == (6, 6)
    tensors = backbones.build("timm/crossvit_9_240").state_dict()
    backbones.build("timm/crossvit_9_240", image_size=64).load_state_dict(tensors)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_by_name(name):
    patch = int(re.search(r"patch(\d+)", name)[1])
    backbone = backbones.build(f"timm/{name}", image_size=3 * patch).eval()
    assert isinstance(backbone, TokenBackbone)
    images = torch.randn(2, 3, 3 * patch, 3 * patch)
    with torch.no_grad():
        features, maps = backbone.forward_stages(images)
        tokens = backbone.tokens(images)
    assert torch.equal(features, backbone(images))
    assert {stage: one.shape[1] for stage, one in maps.items()} == backbone.stages
    num_prefix = tokens.shape[1] - 9
    assert num_prefix == backbone.num_prefix_tokens
    assert torch.equal(maps["patches"].flatten(2).transpose(1, 2), tokens[:, num_prefix:])
    assert ("class" in maps) == backbone.has_class_token == ("gap" not in name)
    if backbone.has_class_token:
        assert torch.equal(maps["class"], maps["blocks.11.class"])
        assert torch.equal(maps["class"].flatten(1), tokens[:, 0])
        assert not torch.allclose(maps["blocks.10.class"], maps["class"])


def test_positions_of_another_size_learn_as_timms_do():
    ours = tiny()
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, patch_size=8, dynamic_img_size=True)
    theirs.load_state_dict(ours.model.state_dict())
    images, weights = torch.randn(2, 3, 56, 56), torch.randn(2, 192)
    for network in (ours, theirs.eval()):
        (network(images) * weights).sum().backward()
    gradient = theirs.pos_embed.grad
    torch.testing.assert_close(ours.model.pos_embed.grad, gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


def test_the_bias_of_keys_does_not_learn():
    """Also after what the training does to a network: another type, which torch puts into the same parameter."""
    backbone = tiny().double().to(memory_format=torch.channels_last)
    (backbone(torch.randn(2, 3, 32, 32, dtype=torch.float64)) * torch.randn(2, 192)).sum().backward()
    for block in backbone.model.blocks:
        query, key, value = block.attn.qkv.bias.grad.unflatten(0, (3, 192))
        assert key.abs().max() == 0 < min(query.abs().max(), value.abs().max())


def test_some_of_the_patches_pass():
    backbone, images = tiny().double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    order = torch.stack([torch.randperm(16), torch.randperm(16)])
    whole, permuted = backbone.tokens(images), backbone.tokens(images, order)
    for n in range(2):
        torch.testing.assert_close(permuted[n, 1:], whole[n, 1:][order[n]])
        torch.testing.assert_close(permuted[n, 0], whole[n, 0])
    few = backbone.tokens(images, order[:, :4])
    assert few.shape == (2, 5, 192) and not torch.allclose(few[:, 0], whole[:, 0])
    # what does not go in has no influence
    patches = images.unfold(2, 8, 8).unfold(3, 8, 8).flatten(2, 3).clone()
    left_out = order[0, 4:]
    patches[0, :, left_out] = 7.0
    changed = patches.unflatten(2, (4, 4)).permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 32, 32)
    assert not torch.allclose(backbone.tokens(changed)[0], whole[0])
    torch.testing.assert_close(backbone.tokens(changed, order[:, :4]), few)


def test_attention_is_what_the_last_block_computes():
    backbone, images = tiny().double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    attention = backbone.last_attention(images)
    assert attention.shape == (2, 3, 17, 17)
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 3, 17, dtype=torch.float64))
    inputs, outputs = [], []
    last = backbone.model.blocks[-1].attn
    last.register_forward_hook(lambda _, given, out: inputs.append(given[0]) or outputs.append(out))
    backbone(images)
    value = last.qkv(inputs[0])[..., 2 * 192 :].unflatten(2, (3, 64)).transpose(1, 2)
    expected = last.proj((attention @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(outputs[0], expected)


def test_stochastic_depth_is_drawn_from_keys():
    backbone = tiny(drop_path=0.3)
    key_dropout(backbone)
    rates = [layer.p for layer in backbone.modules() if isinstance(layer, KeyedDropPath)]
    assert rates == pytest.approx([0.3 * number / 11 for number in range(12) for _ in range(2) if number], abs=1e-6)
    assert not any(isinstance(layer, KeyedDropPath) for layer in tiny().modules())


def test_accumulation_passes_tokens_in_parts():
    whole = tiny().double()
    parted = copy.deepcopy(whole)
    recompute.in_parts(parted, "vit", 3)
    images, kept = torch.randn(5, 3, 32, 32, dtype=torch.float64), torch.randint(16, (5, 4))
    sizes = []
    parted.model.norm.register_forward_hook(lambda _, given, out: sizes.append(len(out)))
    gradients = []
    for backbone in (whole, parted):
        backbone.tokens(images, kept).square().sum().backward()
        gradients.append(backbone.model.pos_embed.grad)
    assert sizes[:3] == [2, 2, 1]
    torch.testing.assert_close(*gradients)
    sizes.clear()
    torch.testing.assert_close(parted(images), whole(images))
    assert sizes == [2, 2, 1]


def test_tokens_pass_in_a_graph(monkeypatch):
    graphs = []
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=lambda graph, _: graphs.append(1) or graph))
    plain, kept = tiny(), torch.randint(16, (2, 4))
    compiled, images = copy.deepcopy(plain), torch.randn(2, 3, 32, 32)
    compile_network(compiled)
    assert torch.equal(compiled.tokens(images, kept), plain.tokens(images, kept))
    assert len(graphs) == 1


def test_fixed_positions():
    backbone = tiny()
    backbone.fix_positions(torch.ones(16, 192))
    assert not backbone.model.pos_embed.requires_grad
    assert torch.equal(backbone.model.pos_embed[:, 1:], torch.ones(1, 16, 192))
    assert not backbone.model.pos_embed[:, 0].any()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("conv4", {"patch_size": 8}, "backbone.patch_size = 8: backbone conv4 has no such option"),
        ("resnet18", {"drop_path": 0.1}, "backbone.drop_path = 0.1: backbone resnet18 has no such option"),
        (
            "timm/vgg11",
            {"drop_path": 0.1},
            "has no stochastic depth; set backbone.drop_path to 0, not 0.1",
        ),
        ("timm/resnet18", {"patch_size": 8}, "timm/resnet18': has no backbone.patch_size to be 8; set that to null"),
    ],
)
def test_what_a_backbone_cannot_have_is_refused(name, options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        backbones.build(name, **options)


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "convnext_atto", "vit_base_patch16_gap_224", "resnet18", "mobilenetv3_small_050"]
)
def test_an_offset_is_added_to_all_features(name):
    backbone = backbones.build(f"timm/{name}", image_size=32 if "vit" in name else None).eval()
    offset, images = backbone.offset(), torch.randn(2, 3, 32, 32)
    assert (offset is None) == (name in ("resnet18", "mobilenetv3_small_050"))
    with torch.no_grad():
        if offset is not None:
            before = backbone(images)
            offset += torch.arange(len(offset))
            torch.testing.assert_close(backbone(images) - before, torch.arange(len(offset)).float().expand(2, -1))
            freeze_offset(backbone)
    assert [p for p in backbone.parameters() if not p.requires_grad] == ([] if offset is None else [offset])
    freeze_offset(torch.nn.Linear(2, 2))  # of which nothing is known


@pytest.mark.parametrize(
    ("name", "options", "learns"),
    [
        ("simclr", {}, False),
        ("simclr", {"projector": [8]}, True),  # no BatchNorm
        ("relational", {}, False),
        ("relational", {"head": "dot_product"}, True),
        ("mocov2", {}, True),
    ],
)
def test_what_batchnorm_takes_away_does_not_learn(name, options, learns):
    method_class = methods.find(name)
    info = Info(64, 0, ((2, 32),), 8, 1.0, feature_dim=192)
    method = method_class(tiny(), info, methods.build_options(method_class, options))
    assert method.backbone.offset().requires_grad is learns


def test_patches_may_be_frozen(digits, tmp_path):
    own = ["backbone.patch_size=4", "data.image_size=16", f"data.root={digits}", f"run_dir={tmp_path}"]
    path = Path("configs/digits/mocov3-conv4.yaml")
    for name in ("timm/vit_tiny_patch16_224", "conv4"):
        of_name = own if name.startswith("timm") else own[1:]
        settings = config.load(path, [*of_name, "backbone.freeze_patches=true", f"backbone.name={name}"])
        if name == "conv4":
            with pytest.raises(UserError, match="freeze_patches = true: conv4 has no patches; set it to false"):
                derive(settings, RankInfo())
            continue
        method = derive(settings, RankInfo()).build()
        frozen = {name for name, p in method.backbone.named_parameters() if not p.requires_grad}
        # beside the offset, which the projector's BatchNorm takes away
        assert frozen == {"model.patch_embed.proj.weight", "model.patch_embed.proj.bias", "model.norm.bias"}
