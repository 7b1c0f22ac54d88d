"""Networks of the official codes, tensor for tensor: tests/golden/backbones.npz, and a map of baselines.npz."""

import functools
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from ssl_dist import backbones
from tests import golden_fill

FOLDER = Path(os.environ.get("SSL_DIST_GOLDEN", Path(__file__).parent / "golden"))
GOLDEN = dict(np.load(FOLDER / "backbones.npz"))
BASELINES = dict(np.load(FOLDER / "baselines.npz"))
NETS = sorted(key.split("/")[0] for key in GOLDEN if re.fullmatch(r"rr_\w+/spec", key))
TYPES = {"f32": torch.float32, "f64": torch.float64}
# relative to the largest magnitude of the array: outputs, gradients (deep networks amplify rounding), statistics
TOLERANCES = {"f32": (1e-5, 1e-2, 1e-5), "f64": (1e-9, 1e-7, 1e-9)}


def name_of(net):
    return re.fullmatch(r"rr_([a-z]+\d+)(_\w+)?", net)[1]


def build(net):
    return backbones.build(name_of(net))


def last_map(backbone):
    return lambda x: list(backbone.forward_stages(x)[1].values())[-1]


@functools.cache
def filled(net):
    return golden_fill.state_dict(GOLDEN, net)


def close(ours, key, tolerance):
    wanted = torch.from_numpy(np.asarray(GOLDEN[key])).double()
    ours = ours.detach().double()
    assert ours.shape == wanted.shape, key
    error = (ours - wanted).abs().max() / wanted.abs().max()
    assert error <= tolerance, f"{key}: relative error {error:.2e}"


@pytest.mark.parametrize("net", NETS)
def test_tensor_names_shapes_and_order(net):
    ours = [(name, list(tensor.shape)) for name, tensor in build(net).state_dict().items()]
    assert ours == [(entry["name"], entry["shape"]) for entry in golden_fill.spec(GOLDEN, net)]
    assert sum(p.numel() for p in build(net).parameters()) == GOLDEN[f"{net}/n_params"]
    if f"{net}/feature_size" in GOLDEN:
        assert build(net).feature_dim == GOLDEN[f"{net}/feature_size"]


@pytest.mark.parametrize("net", NETS)
def test_the_fill_is_the_one_of_the_fixture(net):
    values = [tensor.double() for tensor in filled(net).values()]
    sums = torch.stack([sum(v.sum() for v in values), sum(v.abs().sum() for v in values)])
    torch.testing.assert_close(sums, torch.from_numpy(GOLDEN[f"{net}/fill_sum_abssum_f64"]), rtol=1e-12, atol=0)
    if f"{net}/input" in GOLDEN:
        assert torch.equal(golden_fill.image(GOLDEN, net), torch.from_numpy(GOLDEN[f"{net}/input"]))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("net", NETS)
def test_outputs_gradients_and_statistics(net, dtype):
    forward, gradient, statistics = TOLERANCES[dtype]
    backbone = build(net)
    backbone.load_state_dict(filled(net))
    backbone.to(TYPES[dtype])
    network = last_map(backbone) if net.endswith("noflatten") else backbone
    x = golden_fill.image(GOLDEN, net).to(TYPES[dtype])
    backbone.eval()
    close(network(x), f"{net}/{dtype}/eval_out", forward)
    backbone.train()
    out = network(x)
    close(out, f"{net}/{dtype}/train_out", forward)
    loss = out.square().mean()
    close(loss, f"{net}/{dtype}/train_loss_mean_sq", forward)
    loss.backward()
    checked = 0
    for name, parameter in backbone.named_parameters():
        if f"{net}/{dtype}/grad_norm/{name}" in GOLDEN:
            close(parameter.grad.norm(), f"{net}/{dtype}/grad_norm/{name}", gradient)
            close(parameter.grad[0], f"{net}/{dtype}/grad_first_out_channel/{name}", gradient)
            checked += 1
    for name, buffer in backbone.named_buffers():
        if f"{net}/{dtype}/bn_after/{name}" in GOLDEN:
            close(buffer, f"{net}/{dtype}/bn_after/{name}", statistics)
            checked += 1
    assert checked == sum(key.startswith((f"{net}/{dtype}/grad_norm/", f"{net}/{dtype}/bn_after/")) for key in GOLDEN)


@pytest.mark.parametrize("key", sorted(key for key in BASELINES if re.fullmatch(r"dim/encoder_\w+/input", key)))
def test_the_first_map_is_the_one_of_deep_infomax(key):
    net = key.split("/")[1]
    backbone = backbones.build(net.removeprefix("encoder_")).eval()
    golden_fill.fill(backbone, golden_fill.scale(BASELINES))
    features, maps = backbone.forward_stages(torch.from_numpy(BASELINES[key]))
    stage, first = next(iter(maps.items()))
    for ours, name in ((features, "y"), (first, "M")):
        wanted = torch.from_numpy(BASELINES[f"dim/{net}/f32/{name}"])
        assert (ours - wanted).abs().max() <= 1e-5 * wanted.abs().max(), name
    assert [backbone.feature_dim, backbone.stages[stage]] == BASELINES[f"dim/{net}/y_size_M_channels"].tolist()
