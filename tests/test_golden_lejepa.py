"""Statistics and training steps of the official LeJEPA, its package and its minimal example: tests/golden/lejepa.npz.

Constants of the package, which it rounds to float32, are float64 in the numbers of float64. It integrates over n points
from 0 to t_max, which are 2 n - 1 from -t_max to t_max. `two_processes`: the mean of both ranks' gradients.

What the official code does otherwise, or wrong: its slices are a function of the step alone, not of a seed, and others
on a GPU than on a CPU; the minimal example draws them from the global generator, alike on several ranks only where they
are seeded alike, and has no sum over ranks. The package's SIGReg is right over ranks, but `dist_mean` of its base class
throws the mean over the ranks away, so that Moments are a rank's own. `EppsPulley(num_points=17)` of its README is a
TypeError; the program that `scripts` start is not there. The minimal example's rate ends at half of its highest,
the README's at a thousandth.
"""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from ssl_dist.clock import Clock
from ssl_dist.config import Optim, validate
from ssl_dist.distributed.world import one_process
from ssl_dist.methods import lejepa
from ssl_dist.methods.base import Batch, Info
from ssl_dist.train import optim
from tests.official_steps import Encoder, close

FOLDER = Path(os.environ.get("SSL_DIST_GOLDEN", Path(__file__).parent / "golden"))
GOLDEN = dict(np.load(FOLDER / "lejepa.npz"))
META = json.loads(str(GOLDEN["_meta"]))
TYPES = {"f32": torch.float32, "f64": torch.float64}
TOLERANCES = {"f32": 1e-5, "f64": 1e-9}  # relative to the largest magnitude of the array
KNOTS, WORLD = 2 * META["n_points"] - 1, one_process(torch.device("cpu"))
CASES = sorted({key.split("/")[1] for key in GOLDEN if re.match("statistic/t", key)})


def by_our_names(part):
    """The official layers are numbered with a dropout behind every activation, and hidden ones have a bias, which the
    BatchNorm behind it takes away."""
    found = {}
    for key in [key for key in GOLDEN if key.startswith(f"{part}/")]:
        name = key.removeprefix(f"{part}/")
        if name.startswith("proj."):
            _, number, rest = name.split(".")
            block, within = divmod(int(number), 4)
            name = f"projector.{3 * block + within}.{rest}"
        found[name] = GOLDEN[key]
    hidden = [3 * block for block in range(len(META["projector"]) - 1)]
    return {name: array for name, array in found.items() if name not in {f"projector.{n}.bias" for n in hidden}}


@pytest.fixture
def given_slices(monkeypatch):
    """The official draws [steps, D, S], in place of ours."""

    def give(drawn):
        def drawn_slices(seed, step, dim, lo, hi):
            columns = drawn[step].astype(np.float64)
            return (columns / np.linalg.norm(columns, axis=0)).T[lo:hi]

        monkeypatch.setattr(lejepa, "drawn_slices", drawn_slices)

    return give


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", CASES)
def test_statistics(case, dtype):
    t_max, num_points = float(case.split("_")[0].removeprefix("t")), int(case.split("_n")[1])
    x = torch.from_numpy(GOLDEN["statistic/x"]).to(TYPES[dtype]).requires_grad_()
    value = lejepa.epps_pulley(x, 2 * num_points - 1, t_max)
    (value * torch.arange(1, 1 + value.numel()).view(value.shape)).sum().backward()
    close(value, GOLDEN[f"statistic/{case}/{dtype}/value"], TOLERANCES[dtype], "value")
    close(x.grad, GOLDEN[f"statistic/{case}/{dtype}/grad"], TOLERANCES[dtype], "gradient")


def sliced(dtype, step):
    drawn = GOLDEN["sliced/drawn"]
    z = torch.from_numpy(GOLDEN["sliced/z"]).to(TYPES[dtype]).requires_grad_()
    options = lejepa.Options(slices=drawn.shape[-1], knots=KNOTS, t_max=META["t_max"])
    sigreg = lejepa.sigreg(z, 0, step, options, WORLD)
    sigreg.backward()
    return sigreg, z.grad


@pytest.mark.parametrize("dtype", TYPES)
def test_slices_of_every_view(given_slices, dtype):
    given_slices(GOLDEN["sliced/drawn"])
    for step in range(len(GOLDEN["sliced/drawn"])):
        value, gradient = sliced(dtype, step)
        close(value, GOLDEN[f"sliced/{dtype}/value{step}"], TOLERANCES[dtype], "value")
        close(gradient, GOLDEN[f"sliced/{dtype}/grad{step}"], TOLERANCES[dtype], "gradient")


def test_two_official_processes(given_slices):
    given_slices(GOLDEN["sliced/drawn"])
    value, gradient = sliced("f64", 0)
    close(value.expand(2), GOLDEN["two_processes/values"], TOLERANCES["f64"], "values")
    close(gradient, GOLDEN["two_processes/grad_of_mean"], TOLERANCES["f64"], "gradient")


@pytest.mark.parametrize("dtype", TYPES)
def test_steps_of_the_minimal_example(given_slices, dtype):
    """The loss, the gradients of the first step and all tensors after the last."""
    given_slices(GOLDEN["minimal/drawn"])
    images = torch.from_numpy(GOLDEN["minimal/images"]).to(TYPES[dtype]).transpose(1, 2)
    num_steps, num_views, num_images = images.shape[:3]
    init = {name: torch.from_numpy(np.asarray(array)) for name, array in by_our_names("minimal/init").items()}
    width = len(init["backbone.l0.weight"])
    info = Info(num_images, 0, ((num_views, 2),), num_images, num_steps, feature_dim=width)
    chosen = {"lambd": META["lamb"], "knots": KNOTS, "t_max": META["t_max"], "projector": META["projector"]}
    options = lejepa.Options(**chosen, slices=GOLDEN["minimal/drawn"].shape[-1])
    method = lejepa.Method(Encoder(width), info, options)
    assert not set(init) ^ set(method.state_dict())
    method.load_state_dict(init)
    method.to(TYPES[dtype]).train()
    settings = validate(Optim, {"name": "adamw", **META["adamw"], "epochs": None, "steps": num_steps})
    optimizer = optim.build(settings, method.parameter_groups(), torch.device("cpu"))
    ids, clock, terms = torch.arange(num_images), Clock(0, 1, num_steps), []
    for step in range(num_steps):
        batch = Batch([images[step]], [torch.arange(num_views)], ids, torch.full((num_images,), -1), ids, clock.step)
        output = method(batch, WORLD)
        terms.append(torch.stack([output.loss.detach(), output.metrics["prediction"], output.metrics["sigreg"]]))
        optimizer.zero_grad()
        output.loss.backward()
        if step == 0:
            gradients = by_our_names(f"minimal/{dtype}/grad")
            for name, parameter in method.named_parameters():
                close(parameter.grad, gradients[name], TOLERANCES[dtype], name)
        optimizer.step()
        clock = clock.after_step()
    close(torch.stack(terms), GOLDEN[f"minimal/{dtype}/terms"], TOLERANCES[dtype], "losses")
    ours, after = method.state_dict(), by_our_names(f"minimal/{dtype}/after")
    with_bias = {f"projector.{3 * block + 1}.running_mean" for block in range(len(META["projector"]) - 1)}
    for name, tensor in ours.items():
        if name not in with_bias:
            close(tensor, after[name], TOLERANCES[dtype], name)
