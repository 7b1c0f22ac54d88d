"""SimCLR's losses against loops written from the papers, on one rank and on several, and those of decoupled contrastive
learning against another implementation: tests/golden/dcl.npz."""

import copy
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_dist import methods
from ssl_dist.distributed.world import one_process
from ssl_dist.errors import UserError
from ssl_dist.grid import Grid
from ssl_dist.methods import simclr
from ssl_dist.methods.base import Info
from tests import grids

EXACT = {"rtol": 1e-9, "atol": 1e-12}
GOLDEN = dict(np.load(Path(os.environ.get("SSL_DIST_GOLDEN", Path(__file__).parent / "golden"), "dcl.npz")))


def make(dtype=torch.float64, batch_size=6, **options):
    torch.manual_seed(0)
    info = Info(100, 0, ((2, 32),), batch_size, 1.0, grids.Backbone.feature_dim)
    return simclr.Method(grids.Backbone(), info, simclr.Options(**({"projector": [8, 7]} | options))).to(dtype).train()


def views(dtype=torch.float64):
    """Alike enough that some views find their partners and some do not."""
    generator = torch.Generator().manual_seed(1)
    shared, own = (torch.randn(n, 6, 5, dtype=dtype, generator=generator) for n in (1, 2))
    return shared + 0.4 * own


def slow_probabilities(z_ND, temperature):
    """Every view's probability of its partner among all other views."""
    n = len(z_ND)
    cosine = [[z_ND[i] @ z_ND[j] / (z_ND[i].norm() * z_ND[j].norm()) for j in range(n)] for i in range(n)]
    partners = [(i + n // 2) % n for i in range(n)]
    return [
        (cosine[i][partners[i]] / temperature).exp()
        / sum((cosine[i][j] / temperature).exp() for j in range(n) if j != i)
        for i in range(n)
    ], [max((j for j in range(n) if j != i), key=lambda j: cosine[i][j]) == partners[i] for i in range(n)]


def slow_loss(z_ND, kind, temperature):
    if kind.startswith("dcl"):
        return slow_decoupled(z_ND, temperature, weighted=kind == "dclw")
    p, _ = slow_probabilities(z_ND, temperature)
    return -sum(x.log() for x in p) / len(p) if kind == "nt_xent" else -(sum(p) / len(p)).log()


def slow_decoupled(z_ND, temperature, weighted, sigma=0.5):
    """The mean over both views of every image of minus w cosine / t, plus the log of the sum over the views of the
    other images."""
    num_images = len(z_ND) // 2
    z = [[row / row.norm() for row in half] for half in (z_ND[:num_images], z_ND[num_images:])]
    likeness = [(z[0][i] @ z[1][i] / sigma).exp() for i in range(num_images)]
    total = 0.0
    for i in range(num_images):
        w = 2 - likeness[i] / (sum(likeness) / num_images) if weighted else 1.0
        for k in range(2):
            others = [z[k][i] @ z[v][j] for v in range(2) for j in range(num_images) if j != i]
            total = total - w * (z[k][i] @ z[1 - k][i]) / temperature
            total = total + sum((cosine / temperature).exp() for cosine in others).log()
    return total / (2 * num_images)


def reference(method, both):
    method = copy.deepcopy(method)
    passes = [both.flatten(0, 1)] if method.views_together else list(both)
    z_ND = torch.cat([method.projector(method.backbone(images)) for images in passes])
    loss = slow_loss(z_ND, method.options.loss, method.options.temperature)
    loss.backward()
    right = slow_probabilities(z_ND.detach(), method.options.temperature)[1]
    return loss.detach(), 100 * sum(right) / len(right), grids.gradients(method), dict(method.named_buffers())


@pytest.mark.parametrize("grid", [Grid(1, 1), Grid(2, 1), Grid(3, 1)], ids=str)
@pytest.mark.parametrize("loss", simclr.LOSSES)
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.1, "activation": "leaky_relu", "last_bias": True}, {"batchnorm": "one_view"}],
    ids=str,
)
def test_any_number_of_ranks_equals_the_loops(grid, loss, options):
    method, both = make(loss=loss, **options), views()
    expected, accuracy, gradients, buffers = reference(method, both)
    assert 0 < accuracy < 100
    result = grids.run(method, grid, both)
    grids.assert_equal(result, expected, gradients, buffers, EXACT)
    for output in result.outputs:
        assert float(output.metrics["accuracy"]) == pytest.approx(accuracy)
        assert output.representations.shape == (12, 7)
        torch.testing.assert_close(output.loss.detach(), expected, **EXACT)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.data())
def test_shares_of_anchors_join(num_images, data):
    z = torch.randn(2 * num_images, 4, dtype=torch.float64)
    cut = data.draw(st.integers(0, len(z)))
    whole = simclr.candidates(z, 0.2)
    parts = [simclr.candidates(z, 0.2, *ends) for ends in ((0, cut), (cut, len(z)))]
    for joined, expected in zip(map(torch.cat, zip(*parts, strict=True)), whole, strict=True):
        torch.testing.assert_close(joined, expected, **EXACT)


@pytest.mark.parametrize("loss", simclr.LOSSES)
@pytest.mark.parametrize("temperature", [1e-3, 1e3])
def test_extreme_temperatures_are_finite(loss, temperature):
    """exp(1 / temperature) is infinite in either precision."""
    z = torch.randn(12, 5, requires_grad=True)
    value, _ = simclr.contrast(z, simclr.Options(loss=loss, temperature=temperature), one_process())
    value.backward()
    assert value.isfinite() and z.grad.isfinite().all()
    if temperature == 1e3:
        assert value.item() == pytest.approx(math.log(10 if loss.startswith("dcl") else 11), abs=1e-2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("case", sorted({key.rsplit("/", 2)[0] for key in GOLDEN if key.startswith("dcl")}))
def test_decoupled_losses_of_another_implementation(case, dtype, tolerance):
    """It adds the means of both directions."""
    kind, numbers = case.split("/")
    temperature, sigma = (float(word[1:]) for word in numbers.split("_"))
    z = torch.from_numpy(GOLDEN["z"]).to(dtype).requires_grad_()
    options = simclr.Options(loss=kind, temperature=temperature, sigma=sigma)
    loss, _ = simclr.contrast(z.flatten(0, 1), options, one_process())
    (2 * loss).backward()
    part = f"{case}/{'f64' if dtype == torch.float64 else 'f32'}"
    assert 2 * loss.item() == pytest.approx(float(GOLDEN[f"{part}/loss"]), rel=tolerance)
    expected = torch.from_numpy(GOLDEN[f"{part}/grad"])
    assert float((z.grad - expected).abs().max() / expected.abs().max()) <= tolerance


def test_half_precision_is_scored_in_float32():
    method = make(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = method(grids.batch_of(views(torch.float32)), one_process())
    assert output.loss.dtype == output.representations.dtype == torch.float32
    assert output.loss.item() == pytest.approx(slow_loss(output.representations, "nt_xent", 0.5).item(), rel=1e-6)
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in method.parameters())


@pytest.mark.parametrize("loss", simclr.LOSSES)
def test_it_learns_what_views_share(loss):
    torch.manual_seed(0)
    method = make(torch.float32, loss=loss)
    adam = torch.optim.Adam(method.parameters(), 1e-2)
    for _ in range(60):
        batch = 3 * torch.randn(1, 8, 5) + 0.1 * torch.randn(2, 8, 5)
        adam.zero_grad()
        output = method(grids.batch_of(batch), one_process())
        output.loss.backward()
        adam.step()
    assert output.metrics["accuracy"] > 85


def test_options():
    options = methods.build_options(simclr.Method, {})
    assert (options.loss, options.temperature, options.projector) == ("nt_xent", 0.5, [256, 64])
    assert "256 x 256 a step, 64 x 256 a rank" in grids.explained(simclr, 2, 128, 4)["similarities"]
    for wrong in ({"los": "nt_xent"}, {"loss": "infonce"}, {"temperature": 0.0}, {"projector": []}):
        with pytest.raises(UserError, match=f"method.options.{next(iter(wrong))}"):
            methods.build_options(simclr.Method, wrong)
    with pytest.raises(UserError, match=r"optim\.batch_size = 1"):
        make(batch_size=1)
    assert isinstance(make(activation="leaky_relu").projector[2], torch.nn.LeakyReLU)
    assert [name for name in make(last_bias=True).state_dict() if "projector" in name] == [
        "projector.0.weight", "projector.1.weight", "projector.1.bias", "projector.1.running_mean",
        "projector.1.running_var", "projector.1.num_batches_tracked", "projector.3.weight", "projector.3.bias",
    ]  # fmt: skip
