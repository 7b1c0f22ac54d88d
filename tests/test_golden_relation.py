"""Pairs, relation head, focal loss and Adam steps of the official relational reasoning: tests/golden/relation.npz."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ssl_dist.distributed.world import one_process
from ssl_dist.methods import relational
from ssl_dist.methods.base import Batch, Info

FOLDER = Path(os.environ.get("SSL_DIST_GOLDEN", Path(__file__).parent / "golden"))
GOLDEN = dict(np.load(FOLDER / "relation.npz"))
TYPES = {"f32": torch.float32, "f64": torch.float64}
TOLERANCES = {"f32": 1e-5, "f64": 1e-9}  # relative to the largest magnitude of the array
PAIRS = sorted({key.split("/")[1] for key in GOLDEN if key.startswith("pairs/")})
CASES = sorted(key.split("/")[1] for key in GOLDEN if key.startswith("features/"))
AGGREGATIONS = sorted({m[1] for key in GOLDEN if (m := re.match(r"head/(\w+)/linear1.weight", key))})
PATHS = {"fused": True, "plain": False}

# A BatchNorm follows this bias (and the toy backbone's): its gradient is rounding noise, which Adam amplifies in f32.
NOISE = ("linear1.bias", "lin.bias", "bn1.running_mean")


class Toy(nn.Module):
    """The fixture's backbone: Linear(p -> d), or none when only the head is looked at."""

    def __init__(self, feature_dim, lin=None):
        super().__init__()
        self.feature_dim = feature_dim
        self.feature_extractor = nn.ModuleDict({} if lin is None else {"lin": lin})

    def forward(self, x):
        return self.feature_extractor["lin"](x)


def array(key):
    return torch.from_numpy(np.asarray(GOLDEN[key]))


def close(ours, key, tolerance):
    expected, ours = array(key).double(), torch.as_tensor(ours).detach().double()
    assert ours.shape == expected.shape, key
    error = (ours - expected).abs().max() / expected.abs().max().clamp_min(1e-300)
    assert error <= tolerance, f"{key}: relative error {error:.2e}"


def tensors(prefix):
    return {key.removeprefix(prefix): array(key) for key in GOLDEN if key.startswith(prefix)}


def make(backbone, num_views, aggregation, hidden, dtype, fused):
    options = relational.Options(aggregation=aggregation, hidden=hidden)
    method = relational.Method(backbone, Info(100, 10, ((num_views, 32),), 64, 1.0, backbone.feature_dim), options).to(
        dtype
    )
    method.fused = fused
    return method


def in_pair_order(positive, negative, num_images):
    """From units to the paper's order: for every couple of views its positives, then its negatives."""
    return torch.stack([positive.view(-1, num_images), negative.view(-1, num_images)], 1).flatten()


@pytest.mark.parametrize("case", PAIRS)
def test_pairs(case):
    left, right, target = relational.relation_pairs(*map(int, GOLDEN[f"pairs/{case}/K_M"]))
    assert torch.equal(left, array(f"pairs/{case}/left"))
    assert torch.equal(right, array(f"pairs/{case}/right"))
    assert torch.equal(target.float(), array(f"pairs/{case}/target"))
    assert [(target == 1).sum(), (target == 0).sum()] == GOLDEN[f"pairs/{case}/tot_pos_neg"].tolist()


@pytest.mark.parametrize("dtype", TYPES)
def test_focal_loss(dtype):
    target = array("focal/target").to(TYPES[dtype])
    for row, (gamma, alpha) in enumerate(zip(GOLDEN["focal/gamma"], GOLDEN["focal/alpha_nan_means_None"], strict=True)):
        logits = array("focal/logits").to(TYPES[dtype]).requires_grad_()
        loss = relational.focal_bce(logits, target, float(gamma), None if np.isnan(alpha) else float(alpha)).mean()
        loss.backward()
        expected = GOLDEN[f"focal/loss_{dtype}"][row]
        assert loss.item() == pytest.approx(expected, rel=TOLERANCES[dtype])
        gradient = torch.from_numpy(GOLDEN["focal/grad_f64"][row])
        error = (logits.grad.double() - gradient).abs().max() / gradient.abs().max()
        assert error <= TOLERANCES[dtype]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_head(aggregation, case, dtype, path):
    num_views, num_images = map(int, GOLDEN[f"pairs/{case}/K_M"])
    prefix, tolerance = f"{aggregation}/{case}/{dtype}", TOLERANCES[dtype]
    state, features = tensors(f"head/{aggregation}/"), array(f"features/{case}").to(TYPES[dtype]).requires_grad_()
    backbone = Toy(features.shape[1])
    method = make(backbone, num_views, aggregation, len(state["linear1.bias"]), TYPES[dtype], PATHS[path])
    head = method.relation_module
    head.load_state_dict(state)
    target = array(f"pairs/{case}/target").to(TYPES[dtype])

    def relate():
        num_units = num_views * (num_views - 1) // 2 * num_images
        unknown = torch.full((num_images,), -1)
        loss, logits, _ = method.relate(features.view(num_views, num_images, -1), unknown, 0, num_units, one_process())
        return loss, in_pair_order(*logits, num_images)

    method.eval()
    loss, logits = relate()
    close(logits, f"{prefix}/logits_eval", tolerance)
    close(loss, f"{prefix}/loss_eval", tolerance)
    assert head.bn1.num_batches_tracked == 0

    method.train()
    loss, logits = relate()
    close(logits, f"{prefix}/logits_train", tolerance)
    close(loss, f"{prefix}/loss_focal", tolerance)
    close(relational.focal_bce(logits, target, 0.0, None).mean(), f"{prefix}/loss_bce", tolerance)
    for name, expected in tensors(f"{prefix}/bn_after/").items():
        close(getattr(head.bn1, name), f"{prefix}/bn_after/{name}", 0 if expected.dtype == torch.int64 else tolerance)
    loss.backward()
    close(features.grad, f"{prefix}/grad/features", tolerance)
    for name, parameter in head.named_parameters():
        if name == "linear1.bias":
            assert torch.all(parameter.grad == 0), "exactly 0 by mathematics; the fixture holds rounding noise"
        else:
            close(parameter.grad, f"{prefix}/grad/{name}", tolerance)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_adam_steps(aggregation, dtype, path):
    prefix, tolerance = f"steps/{aggregation}", TOLERANCES[dtype]
    data = array("steps/data").to(TYPES[dtype])
    state = {_ours(name): value for name, value in tensors(f"{prefix}/init/").items()}
    feature_dim, inputs = state["backbone.feature_extractor.lin.weight"].shape
    num_views, num_images = data.shape[1:3]
    backbone = Toy(feature_dim, nn.Linear(inputs, feature_dim))
    hidden = len(state["relation_module.linear1.bias"])
    method = make(backbone, num_views, aggregation, hidden, TYPES[dtype], PATHS[path]).train()
    method.load_state_dict(state)
    groups = json.loads(str(GOLDEN["steps/adam_param_groups"]))
    keep = ("lr", "betas", "eps", "weight_decay")
    modules = (method.backbone, method.relation_module)
    parameters = [{"params": m.parameters(), **{k: g[k] for k in keep}} for m, g in zip(modules, groups, strict=True)]
    adam = torch.optim.Adam(parameters)
    history = []
    for step, views in enumerate(data, start=1):
        images = torch.arange(num_images)
        output = method(Batch([views], [torch.arange(num_views)], images, None, images), one_process())
        adam.zero_grad()
        output.loss.backward()
        adam.step()
        history.append([output.loss.item(), output.metrics["accuracy"].item()])
        for name, expected in tensors(f"{prefix}/{dtype}/after{step}/").items():
            ours = method.state_dict()[_ours(name)]
            if dtype == "f64":
                close(ours, f"{prefix}/{dtype}/after{step}/{name}", tolerance)
            elif not name.endswith(NOISE):
                # Adam divides by the gradient's size: of a gradient near 0 it makes rounding noise a part of lr.
                error = (ours - expected).abs().double().flatten()
                assert error.quantile(0.999) <= tolerance * expected.abs().max().clamp_min(0.1), name
                assert error.max() <= 0.1 * step * groups[0]["lr"], name
    checked = {int(m[1]) for key in GOLDEN if (m := re.match(rf"{prefix}/{dtype}/after(\d+)/", key))}
    assert checked and checked <= set(range(1, len(data) + 1))
    pattern = rf"{prefix}/{dtype}/(loss|acc)_(?:mean_)?steps?(\d+)(?:_(\d+))?$"
    means = {key: m for key in GOLDEN if (m := re.match(pattern, key))}
    assert {m[1] for m in means.values()} == {"loss", "acc"}
    for key, m in means.items():
        loss, accuracy = np.mean(history[int(m[2]) - 1 : int(m[3] or m[2])], axis=0)
        ours, allowed = (loss, tolerance) if m[1] == "loss" else (accuracy, 1e-6)
        assert ours == pytest.approx(float(GOLDEN[key]), rel=allowed), key


def _ours(name):
    return name.replace("net.", "backbone.", 1) if name.startswith("net.") else name
