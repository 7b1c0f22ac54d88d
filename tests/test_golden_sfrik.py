"""Losses of the official SFRIK and VICReg codes: tests/golden/sfrik.npz, and VICReg of FFCV-SSL: ffcvssl.npz.

The fixtures hold projector outputs, so the methods run with nothing for a backbone and a projector.
"""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ssl_dist.distributed.rank import RankInfo
from ssl_dist.distributed.world import World, choose_device, one_process
from ssl_dist.grid import Grid
from ssl_dist.methods import align_uniform, sfrik, simclr, vicreg
from ssl_dist.methods.base import Batch, Info
from ssl_dist.nn.layers import mlp
from tests import golden_fill, ranks

FOLDER = Path(os.environ.get("SSL_DIST_GOLDEN", Path(__file__).parent / "golden"))
SFRIK, FFCV = (dict(np.load(FOLDER / f"{name}.npz")) for name in ("sfrik", "ffcvssl"))
TYPES = {"f32": torch.float32, "f64": torch.float64}
LOSS = {"f32": 1e-6, "f64": 1e-9}  # relative to the largest magnitude of the array
GRADIENT = {"f32": 1e-5, "f64": 1e-9}

TWO = json.loads(str(SFRIK["two/configs"]))
MULTICROP = json.loads(str(SFRIK["multicrop/config"]))
OBOW = sorted({m[0] for key in SFRIK if (m := re.match(r"obow/reg_small_\w+/L\d", key))})
SWAV = sorted({m[0] for key in SFRIK if (m := re.match(r"swav/general_[\d-]+/reg_small_\w+/L\d", key))})
VICREG = sorted({key.split("/")[0] for key in FFCV if key.startswith("vicreg_")})

# The official options' names and ours.
OPTIONS = {
    "sfrik_sim_coeff": "sim_coeff",
    "sfrik_mmd_coeff": "mmd_coeff",
    "sfrik_weights": "weights",
    "auh_sim_coeff": "sim_coeff",
    "auh_unif_coeff": "unif_coeff",
    "auh_scale": "scale",
    "simclr_temp": "temperature",
    "vicreg_sim_coeff": "sim_coeff",
    "vicreg_std_coeff": "std_coeff",
    "vicreg_cov_coeff": "cov_coeff",
}
METHODS = {"sfrik": sfrik, "auh": align_uniform, "vicreg": vicreg, "simclr": simclr}
TWOPROC = sorted({key.split("/")[2] for key in SFRIK if key.startswith("twoproc/f64/")} & METHODS.keys())


def array(key, golden=SFRIK):
    return torch.from_numpy(np.asarray(golden[key]))


def close(ours, key, tolerance, golden=SFRIK):
    expected, ours = array(key, golden).double(), torch.as_tensor(ours).detach().double()
    assert ours.shape == expected.shape, key
    error = (ours - expected).abs().max() / expected.abs().max().clamp_min(1e-300)
    assert error <= tolerance, f"{key}: relative error {error:.2e}"


def degrees(text):
    return [float(weight) for weight in text.split("-")]


def ours(official):
    """Our options for the official ones."""
    options = {OPTIONS[name]: value for name, value in official.items() if name in OPTIONS}
    return options | ({"weights": degrees(options["weights"])} if "weights" in options else {})


def run(module, official, groups, world=None, **more):
    """Loss of a method on embeddings, a list of [V, B, q]."""
    world = world or one_process()
    dim, batch_size = groups[0].shape[-1], groups[0].shape[1] * world.grid.images
    info = Info(100, 0, tuple((len(group) * world.grid.views, 32) for group in groups), batch_size, 1.0, dim)
    backbone = nn.Identity()
    method = module.Method(backbone, info, module.Options(projector=[dim], **ours(official), **more))
    method.projector = nn.Identity()
    ids = torch.arange(sum(map(len, groups))).split([len(group) for group in groups])
    images = torch.arange(groups[0].shape[1])
    return method(Batch(groups, list(ids), images, None, images), world)


def leaves(prefix, names, dtype):
    return [array(f"{prefix}/{name}").to(TYPES[dtype]).requires_grad_() for name in names]


# ---------------------------------------------------------------------------------------------------- two views


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", [name for name in TWO if "batch_size_arg" not in TWO[name]])
def test_two_views(case, dtype):
    x, y = leaves("two", "xy", dtype)
    output = run(METHODS[case.split("_")[0]], TWO[case], [torch.stack([x, y])])
    output.loss.backward()
    close(output.loss, f"two/{case}/{dtype}/loss", LOSS[dtype])
    close(x.grad, f"two/{case}/{dtype}/grad_x", GRADIENT[dtype])
    close(y.grad, f"two/{case}/{dtype}/grad_y", GRADIENT[dtype])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", [name for name in TWO if "batch_size_arg" in TWO[name]])
def test_vicreg_divides_by_the_images_that_there_are(case, dtype):
    """The official code divides the covariance by a batch size from its options, which is another one in an incomplete
    last batch. Here no batch is incomplete. Its number is ours but for that factor."""
    x, y = leaves("two", "xy", dtype)
    official = ours(TWO[case])
    factor = ((len(x) - 1) / (TWO[case]["batch_size_arg"] - 1)) ** 2
    official["cov_coeff"] *= factor
    output = run(vicreg, {f"vicreg_{name}": value for name, value in official.items()}, [torch.stack([x, y])])
    output.loss.backward()
    close(output.loss, f"two/{case}/{dtype}/loss", LOSS[dtype])
    close(x.grad, f"two/{case}/{dtype}/grad_x", GRADIENT[dtype])
    close(y.grad, f"two/{case}/{dtype}/grad_y", GRADIENT[dtype])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", VICREG)
def test_vicreg_of_ffcv_ssl(case, dtype):
    x, y = (array(name, FFCV).to(TYPES[dtype]).requires_grad_() for name in "xy")
    names = ("vicreg_sim_coeff", "vicreg_std_coeff", "vicreg_cov_coeff")
    output = run(vicreg, dict(zip(names, map(float, case.split("_")[1:]), strict=True)), [torch.stack([x, y])])
    output.loss.backward()
    close(output.loss, f"{case}/{dtype}/loss", LOSS[dtype], FFCV)
    close(x.grad, f"{case}/{dtype}/grad_x", GRADIENT[dtype], FFCV)
    close(y.grad, f"{case}/{dtype}/grad_y", GRADIENT[dtype], FFCV)


# ---------------------------------------------------------------------------------------------------- multicrop


def multicrop(case, inputs, num_images, dtype, general):
    """Compare one case; inputs: the arrays' names without their folder, each [views * images, q]."""
    folder, reg_small, order = re.fullmatch(r"(\w+)/.*?reg_small_(\w+)/(L\d)", case).groups()
    tensors = [array(f"{folder}/{name}").to(TYPES[dtype]).requires_grad_() for name in inputs]
    official = MULTICROP | {"sfrik_weights": MULTICROP[order]}
    groups = [t.unflatten(0, (-1, num_images)) for t in tensors]
    output = run(sfrik, official, groups, general=general, reg_small=reg_small == "True")
    output.loss.backward()
    close(output.loss, f"{case}/{dtype}/loss", LOSS[dtype])
    for name, tensor in zip(inputs, tensors, strict=True):
        close(tensor.grad, f"{case}/{dtype}/grad_{name.split('_')[1]}", GRADIENT[dtype])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", OBOW)
def test_obow(case, dtype):
    multicrop(case, ["img_orig", "img_crops", "img_patches"], len(SFRIK["obow/img_orig"]), dtype, general=[0])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", SWAV)
def test_swav(case, dtype):
    general = [int(view) for view in re.search(r"general_([\d-]+)", case)[1].split("-")]
    inputs = [f"views_res{i}" for i in range(len(SFRIK["swav/nmb_crops"]))]
    multicrop(case, inputs, int(SFRIK["swav/bs"]), dtype, general)


# ---------------------------------------------------------------------------------------------------- pieces


@pytest.mark.parametrize("dtype", TYPES)
def test_legendre(dtype):
    t, values = array("legendre/t").to(TYPES[dtype]), array(f"legendre/values_{dtype}")
    for i, dim in enumerate(SFRIK["legendre/dims"].tolist()):
        for k, degree in enumerate(SFRIK["legendre/degrees"].tolist()):
            polynomial = sfrik.polynomial(t, sfrik.legendre(dim, degree).coef.tolist())
            assert (polynomial.double() - values[i, k]).abs().max() <= LOSS[dtype], (dim, degree)
            weights = [0.0] * (degree - 1) + [2.0]
            assert torch.allclose(sfrik.polynomial(t, sfrik.kernel(dim, weights)), 2 * polynomial)


@pytest.mark.parametrize("dtype", TYPES)
def test_projector(dtype):
    """The official hidden layers have a bias, which a BatchNorm follows: subtracted from its running mean, it is the
    same in evaluation, and in training it has no effect."""
    state = {name: value.to(TYPES[dtype]) for name, value in golden_fill.state_dict(SFRIK, "projector").items()}
    widths = [len(value) for name, value in state.items() if name.endswith("weight") and value.ndim == 2]
    x = array("projector/input").to(TYPES[dtype])
    projector = mlp([x.shape[1], *widths]).to(TYPES[dtype])
    for name in [name for name in state if name.endswith(".bias") and state[name[:-4] + "weight"].ndim == 2]:
        following = int(name.split(".")[0]) + 1
        state[f"{following}.running_mean"] -= state.pop(name)
    projector.load_state_dict(state)
    close(projector.eval()(x), f"projector/{dtype}/eval_out", 10 * LOSS[dtype])
    out = projector.train()(x)
    close(out, f"projector/{dtype}/train_out", 10 * LOSS[dtype])
    out.square().mean().backward()
    for name, parameter in projector.named_parameters():
        close(parameter.grad, f"projector/{dtype}/grad/{name}", GRADIENT[dtype])


# ---------------------------------------------------------------------------------------------------- two processes


def on_ranks(rank, size, cases, x, y):
    """This rank's loss and the gradients of its half of the images, for every (name, official options)."""
    rank_info, losses_and_gradients = RankInfo(rank, size, rank, size), []
    world = World(rank_info, Grid(size, 1), choose_device(rank_info))
    half = slice(rank * len(x) // size, (rank + 1) * len(x) // size)
    for name, official in cases:
        views = [torch.from_numpy(t[half]).double().requires_grad_() for t in (x, y)]
        output = run(METHODS[name], official, [torch.stack(views)], world)
        output.loss.backward()
        losses_and_gradients.append((output.loss.item(), *(view.grad.numpy() for view in views)))
    return losses_and_gradients


def coefficients(name):
    """The fixture does not say which of the coefficients above it was made with: those that give its loss."""

    def error(official):
        loss = run(METHODS[name], official, [torch.stack([array(f"twoproc/{v}").double() for v in "xy"])]).loss
        return abs(loss.item() - float(SFRIK[f"twoproc/f64/{name}/single/loss"]))

    return min((TWO[case] for case in TWO if case.startswith(name) and "batch_size_arg" not in TWO[case]), key=error)


def test_two_processes(tmp_path):
    """A rank's own loss differs from the official one, whose invariance is of its own images; their mean does not."""
    cases = [(name, coefficients(name)) for name in TWOPROC]
    answers = ranks.run(on_ranks, 2, tmp_path, cases, SFRIK["twoproc/x"], SFRIK["twoproc/y"])
    for (name, official), *of_ranks in zip(cases, *answers, strict=True):
        folder = f"twoproc/f64/{name}"
        for rank, (_, grad_x, grad_y) in enumerate(of_ranks):
            close(grad_x, f"{folder}/rank{rank}/grad_x", GRADIENT["f64"])
            close(grad_y, f"{folder}/rank{rank}/grad_y", GRADIENT["f64"])
        mean = np.mean([loss for loss, *_ in of_ranks])
        theirs = np.mean([SFRIK[f"{folder}/rank{rank}/loss"] for rank in range(len(of_ranks))])
        close(mean, f"{folder}/single/loss", LOSS["f64"])
        assert mean == pytest.approx(theirs, rel=LOSS["f64"])
        x, y = leaves("twoproc", "xy", "f64")
        output = run(METHODS[name], official, [torch.stack([x, y])])
        output.loss.backward()
        close(output.loss, f"{folder}/single/loss", LOSS["f64"])
        close(x.grad, f"{folder}/single/grad_x", GRADIENT["f64"])
        close(y.grad, f"{folder}/single/grad_y", GRADIENT["f64"])
