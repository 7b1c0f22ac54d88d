"""VICReg against loops written from the paper, on one rank and on several."""

import copy

import pytest
import torch

from ssl_dist import methods
from ssl_dist.distributed.world import one_process
from ssl_dist.errors import UserError
from ssl_dist.grid import Grid
from ssl_dist.methods import vicreg
from ssl_dist.methods.base import Info
from tests import grids

EXACT = {"rtol": 1e-9, "atol": 1e-12}


def make(dtype=torch.float64, batch_size=6, **options):
    torch.manual_seed(0)
    info = Info(100, 0, ((2, 32),), batch_size, 1.0, grids.Backbone.feature_dim)
    options = vicreg.Options(**({"projector": [8, 7]} | options))
    return vicreg.Method(grids.Backbone(), info, options).to(dtype).train()


def views(dtype=torch.float64):
    return torch.randn(2, 6, 5, dtype=dtype, generator=torch.Generator().manual_seed(1))


def slow_terms(x, y):
    """Invariance, variance and covariance, entry by entry."""
    n, d = x.shape
    invariance = sum((x[i, j] - y[i, j]) ** 2 for i in range(n) for j in range(d)) / (n * d)
    variance, covariance = 0.0, 0.0
    for z in (x, y):
        mean = [sum(z[i, j] for i in range(n)) / n for j in range(d)]
        entries = {
            (j, k): sum((z[i, j] - mean[j]) * (z[i, k] - mean[k]) for i in range(n)) / (n - 1)
            for j in range(d)
            for k in range(d)
        }
        variance += sum((1 - (entries[j, j] + 1e-4).sqrt()).clamp_min(0) for j in range(d)) / d / 2
        covariance += sum(c**2 for (j, k), c in entries.items() if j != k) / d
    return invariance, variance, covariance


def reference(method, both):
    """Loss, terms, gradients and buffers of one process, views one after the other through backbone and projector."""
    method = copy.deepcopy(method)
    x, y = (method.projector(method.backbone(view)) for view in both)
    terms, o = slow_terms(x, y), method.options
    loss = o.sim_coeff * terms[0] + o.std_coeff * terms[1] + o.cov_coeff * terms[2]
    loss.backward()
    return loss.detach(), [t.detach() for t in terms], grids.gradients(method), dict(method.named_buffers())


@pytest.mark.parametrize("ends", [[(0, 5)], [(0, 2), (2, 5)], [(0, 1), (1, 1), (1, 4), (4, 5)]], ids=str)
def test_rows_of_the_covariance_join(ends):
    z = torch.randn(9, 5, dtype=torch.float64)
    _, _, expected = slow_terms(z, torch.zeros_like(z))
    torch.testing.assert_close(sum(vicreg.covariance(z, lo, hi) for lo, hi in ends), expected, **EXACT)


def test_a_collapsed_dimension_costs_one():
    assert vicreg.variance(torch.ones(4, 3)) == pytest.approx(0.99)  # 1 - sqrt(1e-4)
    assert vicreg.variance(5 * torch.randn(40, 3)) == 0


@pytest.mark.parametrize("grid", [Grid(1, 1), Grid(2, 1), Grid(3, 1)], ids=str)
@pytest.mark.parametrize("options", [{}, {"sim_coeff": 3.0, "std_coeff": 0.0, "cov_coeff": 2.0}], ids=str)
def test_any_number_of_ranks_equals_the_loops(grid, options):
    method, both = make(**options), views()
    loss, terms, gradients, buffers = reference(method, both)
    result = grids.run(method, grid, both)
    grids.assert_equal(result, loss, gradients, buffers, EXACT)
    for output in result.outputs:
        for name, expected in zip(("invariance", "variance", "covariance"), terms, strict=True):
            torch.testing.assert_close(output.metrics[name], expected, **EXACT)
        assert output.representations.shape == (2, 6, 7)


def test_half_precision_is_scored_in_float32():
    method = make(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = method(grids.batch_of(views(torch.float32)), one_process())
    assert output.loss.dtype == output.representations.dtype == torch.float32
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in method.parameters())


def test_options():
    options = methods.build_options(vicreg.Method, {})
    assert options.projector == [8192] * 3 and (options.sim_coeff, options.std_coeff, options.cov_coeff) == (25, 25, 1)
    assert "2048 of 8192 rows a rank, 64.0 MiB" in grids.explained(vicreg, 2, 2048, 4)["covariance"]
    for wrong in ({"sim_coef": 1.0}, {"cov_coeff": -1.0}, {"projector": []}, {"projector": [0]}):
        with pytest.raises(UserError, match=f"method.options.{next(iter(wrong))}"):
            methods.build_options(vicreg.Method, wrong)
    with pytest.raises(UserError, match=r"optim\.batch_size = 1"):
        make(batch_size=1)
