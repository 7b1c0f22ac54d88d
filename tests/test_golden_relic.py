"""Losses, EMA schedule, head and two complete training loops of the official ReLIC: tests/golden/relic.npz."""

import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ssl_dist import methods
from ssl_dist.clock import Clock
from ssl_dist.distributed.world import one_process
from ssl_dist.methods import relic
from ssl_dist.methods.base import Batch, Info

FOLDER = Path(os.environ.get("SSL_DIST_GOLDEN", Path(__file__).parent / "golden"))
GOLDEN = dict(np.load(FOLDER / "relic.npz"))
COPY_STEPS = 2  # by default
TYPES = {"f32": torch.float32, "f64": torch.float64}
TOLERANCES = {"f32": 1e-5, "f64": 1e-9}  # relative to the largest magnitude of the array
INVARIANCE = {"f32": 1e-5, "f64": 1e-7}  # the authors' small value comes from cancelling terms as large as the loss
CONFIGS = json.loads(str(GOLDEN["loss/configs"]))
SCHEDULES = sorted({m[1] for key in GOLDEN if (m := re.match(r"ema/(\d+)/", key))})
LOOPS = sorted({m[1] for key in GOLDEN if (m := re.match(r"loop/(\w+)/", key))})


def array(key):
    return torch.from_numpy(np.asarray(GOLDEN[key]))


def error(ours, key, least=0.0):
    """Relative to the largest magnitude of the array, or to `least` where that is more."""
    expected, ours = array(key).double(), torch.as_tensor(ours).detach().double()
    assert ours.shape == expected.shape, key
    return float((ours - expected).abs().max() / expected.abs().max().clamp_min(max(least, 1e-300)))


def close(ours, key, tolerance, least=0.0):
    distance = error(ours, key, least)
    assert distance <= tolerance, f"{key}: relative error {distance:.2e}"


# ---------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", range(len(CONFIGS)))
def test_loss(case, dtype):
    config, prefix, tolerance = CONFIGS[case], f"loss/{case}/{dtype}", TOLERANCES[dtype]
    online, target = (array(f"loss/x_{name}").to(TYPES[dtype]).requires_grad_() for name in ("online", "target"))
    log_tau, bias = (torch.tensor(config[name], dtype=TYPES[dtype], requires_grad=True) for name in ("log_tau", "b"))
    z = relic.logits(online, target, log_tau, bias, config["max_tau"])
    invariance = relic.invariance_loss(z)
    loss = relic.instance_loss(z, "sigmoid" if config["use_siglip"] else "softmax") + config["alpha"] * invariance
    loss.backward()
    close(loss, f"{prefix}/loss", tolerance)
    least = abs(float(GOLDEN[f"{prefix}/loss"])) if dtype == "f32" else 0.0
    close(invariance, f"{prefix}/invariance", INVARIANCE[dtype], least)
    close(online.grad, f"{prefix}/grad_x_online", tolerance)
    close(target.grad, f"{prefix}/grad_x_target", tolerance)
    close(log_tau.grad, f"{prefix}/grad_log_tau", tolerance)
    # No softmax sees a bias: its gradient is 0, in the fixture rounding noise, so it is measured against 1.
    close(bias.grad, f"{prefix}/grad_b", tolerance, least=0.0 if config["use_siglip"] else 1.0)


def test_clipped_temperatures_are_among_the_cases():
    clipped = [case for case, config in enumerate(CONFIGS) if math.exp(config["log_tau"]) > config["max_tau"]]
    assert clipped and all(GOLDEN[f"loss/{case}/f64/grad_log_tau"] == 0 for case in clipped)


# ---------------------------------------------------------------------------------------------------- schedule, head


@pytest.mark.parametrize("case", SCHEDULES)
def test_schedule(case):
    total, base = GOLDEN[f"ema/{case}/K_total_and_base"].tolist()
    ours = [relic.cosine_gamma(k, int(total), base) for k in GOLDEN[f"ema/{case}/k"].tolist()]
    np.testing.assert_allclose(ours, GOLDEN[f"ema/{case}/gamma"], rtol=0, atol=1e-6)


def make(backbone, view_groups=((2, 32), (4, 13)), dtype=torch.float32, batch_size=8, epochs=2, per_epoch=3, **options):
    info = Info(
        per_epoch * batch_size, 0, view_groups, batch_size, epochs, backbone.feature_dim, steps_per_epoch=per_epoch
    )
    return relic.Method(backbone, info, relic.Options(**options)).to(dtype)


@pytest.mark.parametrize(("mode", "loss"), [("non_siglip", "softmax"), ("siglip", "sigmoid")])
def test_initial_values(mode, loss):
    method, expected = make(Toy(3, 4), loss=loss), json.loads(str(GOLDEN["ema/initial"]))[mode]
    assert method.log_tau.item() == pytest.approx(expected["init_log_tau"])
    assert method.bias.item() == expected["init_b"] and method.max_tau == expected["max_tau"]


def test_head():
    spec = json.loads(str(GOLDEN["head/spec"]))
    backbone = Toy(3, spec[0]["shape"][1])
    ours = [(name, list(tensor.shape)) for name, tensor in make(backbone).head.state_dict().items()]
    assert ours == [(entry["name"].removeprefix("block."), entry["shape"]) for entry in spec]


# ---------------------------------------------------------------------------------------------------- loop


class Toy(nn.Module):
    """The fixture's encoder: 3x3 convolution of stride 2, BatchNorm, ReLU, mean over the map."""

    def __init__(self, channels, feature_dim):
        super().__init__()
        self.conv = nn.Conv2d(channels, feature_dim, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(feature_dim)
        self.feature_dim = feature_dim

    def forward(self, x):
        return self.bn(self.conv(x)).relu().mean((2, 3))


def renamed(state):
    """The official names of the tensors, as ours."""
    ours = {"tau": "log_tau", "b": "bias"}
    for network, prefix in (("online_encoder", ""), ("target_encoder", "target_")):
        ours |= {f"{network}.0.": f"{prefix}backbone.", f"{network}.1.block.": f"{prefix}head."}
    pattern = re.compile("^(" + "|".join(re.escape(name) for name in ours) + ")")
    return {name: pattern.sub(lambda match: ours[match[1]], name) for name in state}


@pytest.mark.parametrize("case", LOOPS)
def test_training_loop(case, monkeypatch):
    prefix, args = f"loop/{case}", json.loads(str(GOLDEN[f"loop/{case}/args"]))
    steps = sorted({int(m[1]) for key in GOLDEN if (m := re.match(rf"{prefix}/step(\d+)/loss$", key))})
    assert steps and steps == list(range(len(steps)))
    init = {key.removeprefix(f"{prefix}/init/") for key in GOLDEN if key.startswith(f"{prefix}/init/")}
    state = {ours: array(f"{prefix}/init/{name}") for name, ours in renamed(init).items()}
    views = [
        [array(f"{prefix}/step{step}/{name}") for name in ("global_views", "true_local_views_used")] for step in steps
    ]
    (num_global, batch_size), num_local = views[0][0].shape[:2], len(views[0][1])
    assert 2 * num_global + num_local == GOLDEN[f"{prefix}/n_online_preds"]

    per_epoch = steps_per_epoch(prefix, len(steps), args)
    feature_dim, channels = state["backbone.conv.weight"].shape[:2]
    method = make(
        Toy(channels, feature_dim),
        tuple((len(group), group.shape[-1]) for group in views[0]),
        batch_size=batch_size,
        epochs=args["num_epochs"],
        per_epoch=per_epoch,
        loss="sigmoid" if args["use_siglip"] else "softmax",
        pairing="official",
        hidden=args["proj_hidden_dim"],
        dim=args["proj_out_dim"],
        alpha=args["alpha"],
        gamma=args["gamma"],
    ).train()
    method.load_state_dict(state)
    trained = [p for p in method.parameters() if p.requires_grad]
    adam = torch.optim.Adam(trained, args["learning_rate"], weight_decay=args["weight_decay"])
    instance, invariance = recorded(monkeypatch, "instance_loss"), recorded(monkeypatch, "invariance_loss")

    pairs = GOLDEN[f"{prefix}/pairs_target_online"].tolist()
    ids = [torch.arange(num_global), num_global + torch.arange(num_local)]
    clock = Clock(0, per_epoch, args["num_epochs"] * per_epoch)
    for step in steps:
        instance.clear(), invariance.clear()
        batch = Batch(views[step], ids, torch.arange(batch_size), None, None, step)
        output = method(batch, one_process())
        adam.zero_grad()
        output.loss.backward()
        adam.step()
        clock = clock.after_step()
        method.after_step(clock)

        at = f"{prefix}/step{step}"
        assert len(instance) == len(invariance) == len(pairs)
        # In float32 the noise of the cancelling terms: computed in float64 from the same logits, the invariance is as
        # far from the fixture.
        close(torch.stack(invariance), f"{at}/pair_invariance", 1e-5, least=GOLDEN[f"{at}/pair_loss"].max())
        close(torch.stack(instance) + args["alpha"] * torch.stack(invariance), f"{at}/pair_loss", 1e-5)
        close(output.loss, f"{at}/loss", 1e-5)
        coming = relic.gamma_of(max(step + 1, COPY_STEPS), method.total, args["gamma"])
        assert coming == pytest.approx(float(GOLDEN[f"{at}/printed_gamma_after_update"]), abs=1e-6)
        after = {key.removeprefix(f"{at}/state_after/") for key in GOLDEN if key.startswith(f"{at}/state_after/")}
        ours = method.state_dict()
        assert set(renamed(after).values()) == set(ours)
        for name, our_name in renamed(after).items():
            if name == "b" and not args["use_siglip"]:  # Adam on rounding noise; ours stays where it is
                assert torch.equal(ours["bias"], state["bias"])
            else:
                exact = ours[our_name].dtype == torch.int64
                close(ours[our_name], f"{at}/state_after/{name}", 0 if exact else 1e-5)


def steps_per_epoch(prefix, num_steps, args):
    """A fixture may hold the first steps of a training alone: its schedule says of how many. Without averages among
    them (the first steps copy) nothing depends on it."""
    gammas = [float(GOLDEN[f"{prefix}/step{step}/printed_gamma_after_update"]) for step in range(num_steps)]

    def explains(per_epoch):
        total = per_epoch * (args["num_epochs"] + 2) - 1
        ours = [relic.gamma_of(max(step + 1, COPY_STEPS), total, args["gamma"]) for step in range(num_steps)]
        return np.allclose(ours, gammas, rtol=0, atol=1e-6)

    least = -(-num_steps // args["num_epochs"])
    return next((count for count in range(least, 100 * least) if explains(count)), least)


def recorded(monkeypatch, name):
    """What `relic.<name>` returns from now on."""
    values, function = [], getattr(relic, name)

    def record(*arguments):
        value = function(*arguments)
        values.append(value.detach())
        return value

    monkeypatch.setattr(relic, name, record)
    return values


def test_options_are_those_of_the_authors():
    args = json.loads(str(GOLDEN["loop/default/args"]))
    options = methods.build_options(relic.Method, {})
    assert options.alpha == args["alpha"] and args["update_gamma_after_step"] + 1 == options.copy_steps == COPY_STEPS
    assert args["update_gamma_every_n_steps"] == options.average_every == 1 and options.loss == "softmax"
