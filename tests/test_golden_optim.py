"""LARS and the learning rates of the official SFRIK, VICReg, FFCV-SSL and SeLa codes."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssl_dist.clock import Clock
from ssl_dist.config import Optim
from ssl_dist.train import optim
from ssl_dist.train.optim import LARS

FOLDER = Path(os.environ.get("SSL_DIST_GOLDEN", Path(__file__).parent / "golden"))
SFRIK, FFCV, SELA = (dict(np.load(FOLDER / f"{name}.npz")) for name in ("sfrik", "ffcvssl", "sela"))
TYPES = {"f32": torch.float32, "f64": torch.float64}
TOLERANCES = {"f32": 1e-5, "f64": 1e-9}  # relative to the largest magnitude of the array
CASES = sorted({m[1] for key in SFRIK if (m := re.match(r"lars/(\w+)/f64/step1/mu/", key))})
NO_FILTER = sorted({m[0] for key in SFRIK if (m := re.match(r"lars/nofilter_lr([^_]+)_wd([^/]+)", key))})
COSINES = sorted({int(key.split("/")[1]) for key in FFCV if key.startswith("lr/")})
DROPS = sorted(key for key in SELA if key.startswith("lr_"))


class Toy(nn.Module):
    """The fixture's network: b(h + z(h)), h = relu(bn(a(x))); z begins at 0."""

    def __init__(self, state):
        super().__init__()
        hidden, inputs = state["a.weight"].shape
        self.a, self.bn = nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden)
        self.z, self.b = nn.Linear(hidden, hidden, bias=False), nn.Linear(hidden, len(state["b.bias"]))
        self.load_state_dict(state)

    def forward(self, x):
        h = F.relu(self.bn(self.a(x)))
        return self.b(h + self.z(h))


def array(key):
    return torch.from_numpy(np.asarray(SFRIK[key]))


def close(ours, key, tolerance):
    expected, ours = array(key).double(), ours.detach().double()
    assert ours.shape == expected.shape, key
    error = (ours - expected).abs().max() / expected.abs().max().clamp_min(1e-300)
    assert error <= tolerance, f"{key}: relative error {error:.2e}"


def toy(dtype):
    state = {key.removeprefix("lars/init/"): array(key) for key in SFRIK if key.startswith("lars/init/")}
    return Toy(state).to(dtype).train()


def step(net, optimizer, number, dtype):
    loss = F.mse_loss(net(array("lars/x")[number - 1].to(dtype)), array("lars/target")[number - 1].to(dtype))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", CASES)
def test_lars_steps(case, dtype):
    config = json.loads(str(SFRIK["lars/config"]))
    net, tolerance = toy(TYPES[dtype]), TOLERANCES[dtype]
    options = Optim(name="lars", weight_decay=config["weight_decays"][case], momentum=config["momentum"])
    optimizer = optim.build(options, [{"params": list(net.parameters())}], torch.device("cpu"))
    assert {group["trust"] for group in optimizer.param_groups} == {config["eta"]}
    for number, rate in enumerate(config["lr_per_step"], start=1):
        optim.set_lr(optimizer, rate)
        prefix = f"lars/{case}/{dtype}/step{number}"
        close(step(net, optimizer, number, TYPES[dtype]), f"{prefix}/loss", tolerance)
        for name, parameter in net.named_parameters():
            if name == "a.bias":  # a BatchNorm follows: its gradient is 0, and what is left of it is rounding noise
                assert (parameter - array(f"{prefix}/param/{name}")).abs().max() <= tolerance
                continue
            close(parameter, f"{prefix}/param/{name}", tolerance)
            close(parameter.grad, f"{prefix}/grad/{name}", tolerance)
            close(optimizer.state[parameter]["momentum_buffer"], f"{prefix}/mu/{name}", tolerance)


@pytest.mark.parametrize("case", NO_FILTER)
def test_lars_without_exclusion(case):
    rate, decay = re.fullmatch(r"lars/nofilter_lr([^_]+)_wd(.+)", case).groups()
    net = toy(torch.float64)
    optimizer = LARS(net.parameters(), lr=float(rate), weight_decay=float(decay.replace("_", "-")))
    step(net, optimizer, 1, torch.float64)
    for name, parameter in net.named_parameters():
        if name == "a.bias":  # its gradient is 0 but for its weight decay
            start = array("lars/init/a.bias").double()
            expected = start * (1 - float(rate) * optimizer.defaults["trust"])
            assert torch.allclose(parameter, expected, rtol=1e-9, atol=0)
        close(parameter, f"{case}/f64/step1/param/{name}", TOLERANCES["f64"])


@pytest.mark.parametrize("number", range(len(json.loads(str(SFRIK["lr/configs"])))))
def test_sfrik_rates(number):
    """Warm-up over 10 epochs and cosine to a thousandth; the very first step has rate 0."""
    config = json.loads(str(SFRIK["lr/configs"]))[number]
    options = Optim(
        name="lars",
        lr=config["base_lr"],
        lr_batch=256,
        batch_size=config["batch_size"],
        epochs=config["epochs"],
        warmup_epochs=10,
        schedule="cosine",
        lr_final=0.001,
    )
    total = config["epochs"] * config["loader_len"]
    rates = [optim.lr(options, Clock(int(step), config["loader_len"], total)) for step in SFRIK[f"lr/{number}/steps"]]
    assert rates == pytest.approx(SFRIK[f"lr/{number}/lr_f64"].tolist(), rel=1e-9)


@pytest.mark.parametrize("number", COSINES)
def test_ffcv_rates(number):
    batch, base, final, total, warmup = FFCV[f"lr/{number}/bs_base_endratio_total_warmup"].tolist()
    options = Optim(
        lr=base, lr_batch=256, batch_size=int(batch), warmup_epochs=warmup, schedule="cosine", lr_final=final
    )
    rates = [optim.lr(options, Clock(int(step), 1, int(total))) for step in FFCV[f"lr/{number}/steps"]]
    assert rates == pytest.approx(FFCV[f"lr/{number}/lr_f64"].tolist(), rel=1e-9)


@pytest.mark.parametrize("key", DROPS)
def test_sela_rates(key):
    """main.py: a tenth every `drop` epochs and a thousandth from epoch 350; cifar.py: at 0.6 and 0.8 of a length that
    it knows, else constant."""
    expected = SELA[key]
    if key.startswith("lr_main"):
        rate, drop = re.fullmatch(r"lr_main/lr(.+)_drop(\d+)", key).groups()
        drops = [m * int(drop) for m in (1, 2, 3) if m * int(drop) < 350]
        drops += [350] * (3 - len(drops))
        options = Optim(lr=float(rate), epochs=len(expected), schedule="step", milestone_epochs=drops)
    else:
        epochs, rate = re.fullmatch(r"lr_cifar/epochs(\d+)_base(.+)", key).groups()
        schedule = "step" if int(epochs) in (200, 400, 800, 1600) else "constant"
        options = Optim(lr=float(rate), epochs=len(expected), schedule=schedule, milestones=[0.6, 0.8])
    per_epoch = 7
    clocks = [
        Clock(epoch * per_epoch + s, per_epoch, len(expected) * per_epoch)
        for epoch in range(len(expected))
        for s in (0, 6)
    ]
    assert [optim.lr(options, clock) for clock in clocks] == pytest.approx(np.repeat(expected, 2).tolist(), rel=1e-12)
