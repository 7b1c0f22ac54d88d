"""Training steps of the official SwAV on a small encoder, two large and two small crops: tests/golden/swav.npz."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from ssl_dist.clock import Clock
from ssl_dist.config import Optim, validate
from ssl_dist.distributed.world import one_process
from ssl_dist.methods import swav
from ssl_dist.methods.base import Batch, Info
from ssl_dist.train import optim
from tests.official_steps import Encoder, close

FOLDER = Path(os.environ.get("SSL_DIST_GOLDEN", Path(__file__).parent / "golden"))
GOLDEN = dict(np.load(FOLDER / "swav.npz"))
META = json.loads(str(GOLDEN["_meta"]))
TYPES = {"f32": torch.float32, "f64": torch.float64}
TOLERANCES = {"f32": 1e-5, "f64": 1e-9}  # relative to the largest magnitude of the array
PREFIXES = {"enc.": "backbone.", "projection_head.": "projector.", "prototypes.weight": "prototypes"}


def tensors(part):
    """By our names. The first layer of the official head has a bias, which the BatchNorm behind it takes away."""
    found = {}
    for key, array in GOLDEN.items():
        if key.startswith(f"{part}/"):
            official = key.removeprefix(f"{part}/")
            prefix = next(prefix for prefix in PREFIXES if official.startswith(prefix))
            found[PREFIXES[prefix] + official.removeprefix(prefix)] = torch.from_numpy(np.asarray(array))
    del found["projector.0.bias"]
    return found


def test_assignments():
    scores = torch.from_numpy(GOLDEN["sinkhorn/scores"])
    ours = swav.assignments(scores, META["sinkhorn_epsilon"], META["options"]["sinkhorn_iterations"])
    close(ours, torch.from_numpy(GOLDEN["sinkhorn/assignments"]), 1e-12, "assignments")


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", ["plain", "queue"])
def test_steps(case, dtype):
    big, small = (torch.from_numpy(GOLDEN[name]).to(TYPES[dtype]) for name in ("big", "small"))
    num_steps, _, num_images = big.shape[:3]
    init = tensors("init")
    options = META["options"] | ({"queue": META["queue"], "queue_from_epoch": 0} if case == "queue" else {})
    width = len(init["backbone.l0.weight"])
    info = Info(num_images, 0, ((2, 4), (2, 2)), num_images, num_steps, feature_dim=width)
    method = swav.Method(Encoder(width), info, validate(swav.Options, options))
    method.load_state_dict(init, strict=False)
    method.to(TYPES[dtype]).train()
    world, clock = one_process(torch.device("cpu")), Clock(0, 1, num_steps)
    settings = validate(Optim, {"name": "sgd", **META["sgd"], "epochs": None, "steps": num_steps})
    optimizer = optim.build(settings, method.parameter_groups(), torch.device("cpu"))
    ids, losses = torch.arange(num_images), []
    for step in range(num_steps):
        optim.reset_state(optimizer, method.before_step(clock, None, world))
        views, view_ids = [big[step], small[step]], [torch.arange(2), torch.arange(2, 4)]
        loss = method(Batch(views, view_ids, ids, torch.full((num_images,), -1), ids, step), world).loss
        losses.append(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        for parameter in method.frozen(clock):
            parameter.grad = None
        optimizer.step()
        clock = clock.after_step()
        method.after_step(clock)
    close(torch.stack(losses), torch.from_numpy(GOLDEN[f"{case}/{dtype}/losses"]), TOLERANCES[dtype], "losses")
    ours = method.state_dict()
    for key, value in tensors(f"{case}/{dtype}/after").items():
        if key != "projector.1.running_mean":  # with the bias
            close(ours[key], value, TOLERANCES[dtype], key)
    if case == "queue":
        for queue, rows in zip(method.queues, torch.from_numpy(GOLDEN[f"queue/{dtype}/queue"]), strict=True):
            held, expected = (torch.tensor(sorted(kept.tolist())) for kept in (queue.rows, rows))  # in another order
            close(held, expected, TOLERANCES[dtype], "queue")
