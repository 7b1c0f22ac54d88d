"""Networks of the official codes, tensor for tensor: tests/golden/backbones.npz, and a map of baselines.npz."""

import functools
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ssl_dist import backbones
from ssl_dist.storage import formats
from tests import golden_fill

FOLDER = Path(os.environ.get("SSL_DIST_GOLDEN", Path(__file__).parent / "golden"))
GOLDEN = dict(np.load(FOLDER / "backbones.npz"))
BASELINES = dict(np.load(FOLDER / "baselines.npz"))
FACTS = json.loads(str(GOLDEN["structure/facts"]))
NETS = sorted(key.split("/")[0] for key in GOLDEN if re.fullmatch(r"(rr|sfrik|relic|sela)_\w+/spec", key))
TYPES = {"f32": torch.float32, "f64": torch.float64}
# relative to the largest magnitude of the array: outputs, gradients (deep networks amplify rounding), statistics
TOLERANCES = {"f32": (1e-5, 1e-2, 1e-5), "f64": (1e-9, 1e-7, 1e-9)}
RUNS = [
    pytest.param(net, dtype, marks=[pytest.mark.slow] if GOLDEN[f"{net}/input_shape"][-1] > 200 else [])
    for net in NETS
    for dtype in TYPES
    if f"{net}/{dtype}/eval_out" in GOLDEN
]
# the backbone of ours that computes the same, and how its tensors are called there
PATTERNS = [
    (r"rr_([a-z]+\d+)(_64px|_noflatten)?", r"\1", {}),
    (r"sfrik_(resnet\d+)", r"\1", {}),
    (r"relic_(resnet\d+)", r"\1", formats.RELIC),
    (r"relic_(resnet\d+)_cifar", r"\1_small_stem", formats.RELIC),
    (r"relic_(efficientnet_\w+)", r"\1", formats.RELIC),
    (r"sela_(resnetv2_50|alexnet)_\d+heads?", r"\1", {}),
    (r"sela_resnetv1_(\d+)_\d+heads?", r"resnet\1", formats.SELA),
]


def ours(net):
    """Name of our backbone, and the official name of each of its tensors."""
    [(pattern, name, naming)] = [row for row in PATTERNS if re.fullmatch(row[0], net)]
    return re.sub(pattern, name, net), naming


class Network(nn.Module):
    """Our backbone with the linear heads of the fixture; its tensors under their official names."""

    def __init__(self, net):
        super().__init__()
        name, self.naming = ours(net)
        self.backbone = backbones.build(name)
        self.as_map = net.endswith("noflatten")
        self.heads = nn.ModuleDict()
        for entry in golden_fill.spec(GOLDEN, net):
            if entry["name"].startswith("top_layer") and entry["name"].endswith("weight"):
                outputs, features = entry["shape"]
                name = entry["name"].removesuffix(".weight").replace(".", "-")
                self.heads[name] = nn.Linear(features, outputs)

    def forward(self, x):
        features, maps = self.backbone.forward_stages(x)
        if self.as_map:
            return list(maps.values())[-1]
        return torch.cat([head(features) for head in self.heads.values()], 1) if self.heads else features

    def official(self, name):
        part, _, rest = name.partition(".")
        return formats.renamed(rest, self.naming) if part == "backbone" else rest.replace("-", ".")


@functools.lru_cache(maxsize=1)
def filled(net):
    return golden_fill.state_dict(GOLDEN, net)


def distance(actual, expected):
    """The largest difference, relative to the largest magnitude of what is expected."""
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max() / expected.abs().max())


def tolerance(key, dtype):
    forward, gradient, statistics = TOLERANCES[dtype]
    return gradient if "grad" in key else statistics if "bn_after" in key else forward


@functools.cache
def results(net, dtype):
    """What our network gives for the fixture's keys after <net>/<dtype>/, in float64."""
    network = Network(net)
    network.load_state_dict({name: filled(net)[network.official(name)] for name in network.state_dict()})
    network.to(TYPES[dtype])
    x = golden_fill.image(GOLDEN, net).to(TYPES[dtype])
    network.eval()
    with torch.no_grad():
        tensors = {"eval_out": network(x)}
    network.train()
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    tensors["train_out"] = network(x)
    tensors["train_loss_mean_sq"] = tensors["train_out"].square().mean()
    tensors["train_loss_mean_sq"].backward()
    for name, parameter in network.named_parameters():
        name = network.official(name)
        if any(key.endswith(f"/grad_norm/{name}") for key in GOLDEN):
            tensors[f"grad_norm/{name}"] = parameter.grad.norm()
            tensors[f"grad_first_out_channel/{name}"] = parameter.grad[0].clone()
    tensors |= {f"bn_after/{network.official(name)}": buffer for name, buffer in network.named_buffers()}
    return {key: value.detach().double() for key, value in tensors.items()}


@pytest.mark.parametrize("net", NETS)
def test_tensor_names_shapes_and_order(net):
    network = Network(net)
    names_and_shapes = [(network.official(name), list(tensor.shape)) for name, tensor in network.state_dict().items()]
    assert names_and_shapes == [(entry["name"], entry["shape"]) for entry in golden_fill.spec(GOLDEN, net)]
    assert sum(p.numel() for p in network.parameters()) == GOLDEN[f"{net}/n_params"]
    if f"{net}/feature_size" in GOLDEN:
        assert network.backbone.feature_dim == GOLDEN[f"{net}/feature_size"]


@pytest.mark.parametrize("net", NETS)
def test_the_fill_is_the_one_of_the_fixture(net):
    values = [tensor.double() for tensor in filled(net).values()]
    sums = torch.stack([sum(v.sum() for v in values), sum(v.abs().sum() for v in values)])
    torch.testing.assert_close(sums, torch.from_numpy(GOLDEN[f"{net}/fill_sum_abssum_f64"]), rtol=1e-12, atol=0)
    if f"{net}/input" in GOLDEN:
        assert torch.equal(golden_fill.image(GOLDEN, net), torch.from_numpy(GOLDEN[f"{net}/input"]))


@pytest.mark.parametrize(("net", "dtype"), RUNS)
def test_outputs_gradients_and_statistics(net, dtype):
    """Float32 itself can be off by more than its tolerance in a deep network in training mode, and another number of
    threads adds up in another order: there, twice the distance of our own float32 from our float64 is allowed."""
    tensors = results(net, dtype)
    keys = [key.removeprefix(f"{net}/{dtype}/") for key in GOLDEN if key.startswith(f"{net}/{dtype}/")]
    assert {"eval_out", "train_out", "train_loss_mean_sq"} < set(keys)
    for key in keys:
        expected = torch.from_numpy(np.asarray(GOLDEN[f"{net}/{dtype}/{key}"])).double()
        allowed = tolerance(key, dtype)
        if dtype == "f32":
            allowed = max(allowed, 2 * distance(tensors[key], results(net, "f64")[key]))
        assert distance(tensors[key], expected) <= allowed, key


@pytest.mark.parametrize("key", sorted(key for key in GOLDEN if re.fullmatch(r"structure/\w+_spec", key)))
def test_networks_of_which_the_fixture_has_the_tensors_alone(key):
    name, naming = ours(key.removeprefix("structure/").removesuffix("_spec"))
    with torch.device("meta"):
        tensors = backbones.build(name).state_dict()
    names_and_shapes = [(formats.renamed(name, naming), list(tensor.shape)) for name, tensor in tensors.items()]
    assert names_and_shapes == [(entry["name"], entry["shape"]) for entry in json.loads(str(GOLDEN[key]))]


@pytest.mark.parametrize("fact", sorted(fact for fact in FACTS if re.fullmatch(r"(sfrik|relic)\.[\w.]+", fact)))
def test_facts_of_the_official_networks(fact):
    facts = FACTS[fact]
    name = {"efficientnet_v2_s": "efficientnet_v2_s"}.get(fact.split(".")[1], fact.split(".")[1])
    if not isinstance(facts, dict) or "n_params" not in facts:
        return
    if fact.endswith("modify_True"):
        name += "_small_stem"
    with torch.device("meta"):
        backbone = backbones.build(name)
    assert sum(p.numel() for p in backbone.parameters()) == facts["n_params"]
    tensors = backbone.state_dict()
    if "n_tensors" in facts:
        assert len(tensors) == facts["n_tensors"]
    if "conv1" in facts:
        assert list(tensors["conv1.weight"].shape) == facts["conv1"]
        assert [backbone.feature_dim] == facts["last"]
    if facts.get("embedding"):
        assert backbone.feature_dim == facts["embedding"]


def test_residual_blocks_begin_as_the_identity_when_asked():
    assert FACTS["sfrik.zero_init"] == {"bn2_weight_all_zero": True}
    for name, last in (("resnet18", "bn2"), ("resnet50", "bn3")):
        for zero_init in (True, False):
            tensors = backbones.build(name, zero_init_residual=zero_init).state_dict()
            last_weights = [tensor for key, tensor in tensors.items() if key.endswith(f".{last}.weight")]
            assert len(last_weights) == sum(1 for key in tensors if key.endswith(".conv1.weight"))
            assert all(torch.all(tensor == (0 if zero_init else 1)) for tensor in last_weights)


@pytest.mark.parametrize("key", sorted(key for key in BASELINES if re.fullmatch(r"dim/encoder_\w+/input", key)))
def test_the_first_map_is_the_one_of_deep_infomax(key):
    net = key.split("/")[1]
    backbone = backbones.build(net.removeprefix("encoder_")).eval()
    golden_fill.fill(backbone, golden_fill.scale(BASELINES))
    features, maps = backbone.forward_stages(torch.from_numpy(BASELINES[key]))
    stage, first = next(iter(maps.items()))
    for actual, name in ((features, "y"), (first, "M")):
        expected = torch.from_numpy(BASELINES[f"dim/{net}/f32/{name}"])
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max(), name
    assert [backbone.feature_dim, backbone.stages[stage]] == BASELINES[f"dim/{net}/y_size_M_channels"].tolist()
