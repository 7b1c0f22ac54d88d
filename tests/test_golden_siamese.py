"""Training steps of the official Barlow Twins, SimSiam, MoCo v2 and v3 on a small encoder: tests/golden/siamese.npz.

Kept of each are the loss of every step, the gradients of the first, and weights and running statistics after the last.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ssl_dist import methods
from ssl_dist.clock import Clock
from ssl_dist.config import Optim, validate
from ssl_dist.distributed.world import one_process
from ssl_dist.methods.base import Batch, Info
from ssl_dist.train import optim

FOLDER = Path(os.environ.get("SSL_DIST_GOLDEN", Path(__file__).parent / "golden"))
GOLDEN = dict(np.load(FOLDER / "siamese.npz"))
META = json.loads(str(GOLDEN["_meta"]))
TYPES = {"f32": torch.float32, "f64": torch.float64}
TOLERANCES = {"f32": 1e-5, "f64": 1e-9}  # relative to the largest magnitude of the array
SGD, LARS = {"name": "sgd", "lr": META["lr"], **META["sgd"]}, {"name": "lars", "momentum": 0.9}
LARS |= {"lr": META["lars"]["lr"][0], "bias_lr": META["lars"]["lr"][1], "weight_decay": META["lars"]["weight_decay"]}
OPTIM = {
    "barlow_twins": LARS,
    "simsiam": SGD | {"schedule": "cosine"},
    "mocov2": SGD,
    "mocov3": SGD,
}
PREFIXES = {  # of the official names, and ours; None: nothing of ours
    "barlow_twins": {"bn.": None, "backbone.": "backbone.", "projector.": "projector."},
    "simsiam": {
        "encoder.fc.6.bias": None, "encoder.fc.7.": "projector.1.", "encoder.fc.": "projector.0.",
        "encoder.": "backbone.", "predictor.": "predictor.",
    },
    "mocov2": {
        "queue_ptr": None, "queue": "queue.rows", "encoder_q.fc.": "projector.", "encoder_q.": "backbone.",
        "encoder_k.fc.": "target_projector.", "encoder_k.": "target_backbone.",
    },
    "mocov3": {
        "base_encoder.fc.4.": "projector.1.", "base_encoder.fc.": "projector.0.", "base_encoder.": "backbone.",
        "momentum_encoder.fc.4.": "target_projector.1.", "momentum_encoder.fc.": "target_projector.0.",
        "momentum_encoder.": "target_backbone.", "predictor.": "predictor.0.",
    },
}  # fmt: skip


class Encoder(nn.Module):
    def __init__(self, width_in, width):
        super().__init__()
        self.l0 = nn.Linear(width_in, width, bias=False)
        self.bn = nn.BatchNorm1d(width)

    def forward(self, x):
        return torch.relu(self.bn(self.l0(x.flatten(1))))


def renamed(name, part):
    """What the fixture has of `<name>/<part>/`, by our names."""
    found = {}
    for key, array in GOLDEN.items():
        if key.startswith(f"{name}/{part}/"):
            official = key.removeprefix(f"{name}/{part}/")
            prefix = next(prefix for prefix in PREFIXES[name] if official.startswith(prefix))
            ours = PREFIXES[name][prefix]
            if ours is not None:
                tensor = torch.from_numpy(np.asarray(array))
                found[ours + official.removeprefix(prefix)] = tensor.T if official == "queue" else tensor
    return found


def close(ours, expected, tolerance, name):
    expected, ours = expected.double(), ours.detach().double()
    assert ours.shape == expected.shape, name
    least = 1.0 if name.endswith("running_mean") else 1e-300  # behind a BatchNorm it is 0
    distance = float((ours - expected).abs().max() / expected.abs().max().clamp_min(least))
    assert distance <= tolerance, f"{name}: relative error {distance:.2e}"


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", OPTIM)
def test_steps(name, dtype):
    x, tolerance = torch.from_numpy(GOLDEN["x"]).to(TYPES[dtype]), TOLERANCES[dtype]
    num_steps, _, num_images = x.shape[:3]
    init = renamed(name, "init")
    width, width_in = init["backbone.l0.weight"].shape
    info = Info(num_images, 0, ((2, x.shape[-1]),), num_images, num_steps, feature_dim=width)
    module = methods.find(name)
    method = module(Encoder(width_in, width), info, validate(module.Options, META[f"{name}_options"]))
    method.load_state_dict(init)
    method.to(TYPES[dtype]).train()
    world, clock = one_process(torch.device("cpu")), Clock(0, 1, num_steps)
    options = validate(Optim, OPTIM[name] | {"epochs": None, "steps": num_steps})
    optimizer = optim.build(options, method.parameter_groups(), torch.device("cpu"))
    ids, losses = torch.arange(num_images), []
    for step in range(num_steps):
        optim.set_lr(optimizer, optim.lr(options, clock), options.peak_lr)
        batch = Batch([x[step]], [torch.arange(2)], ids, torch.full((num_images,), -1), ids, step)
        loss = method(batch, world).loss
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.detach())
        if step == 0:
            gradients = {key: p.grad for key, p in method.named_parameters() if p.requires_grad}
            expected = renamed(name, f"{dtype}/grad")
            assert gradients.keys() == expected.keys()
            for key, gradient in gradients.items():
                close(gradient, expected[key], tolerance, key)
        optimizer.step()
        clock = clock.after_step()
        # The official codes move the target at the beginning of a step, and never its running statistics.
        target = {key: t.clone() for key, t in method.named_parameters() if key.startswith("target_")}
        method.after_step(clock)
    close(torch.stack(losses), torch.from_numpy(GOLDEN[f"{name}/{dtype}/losses"]), tolerance, "losses")
    after = {key: t for key, t in method.state_dict().items() if not key.startswith("target_")} | target
    expected_after = renamed(name, f"{dtype}/after")
    if name == "simsiam":  # whose last layer has a bias that never changes; the BatchNorm behind it takes it away
        bias = torch.from_numpy(GOLDEN["simsiam/init/encoder.fc.6.bias"]).double()
        mean = expected_after["projector.1.running_mean"]
        expected_after["projector.1.running_mean"] = mean - bias * (1 - 0.9 ** (2 * num_steps))
    for key, expected in expected_after.items():
        if not (key.startswith("target_") and key not in target):
            close(after[key], expected, tolerance, key)
