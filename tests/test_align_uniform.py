"""Alignment and uniformity against loops written from the paper, on one rank and on several."""

import copy

import pytest
import torch

from ssl_dist import methods
from ssl_dist.distributed.world import one_process
from ssl_dist.errors import UserError
from ssl_dist.grid import Grid
from ssl_dist.methods import align_uniform
from ssl_dist.methods.base import Info
from tests import grids

EXACT = {"rtol": 1e-9, "atol": 1e-12}


def make(dtype=torch.float64, batch_size=6, **options):
    torch.manual_seed(0)
    info = Info(100, 0, ((1, 32), (1, 32)), batch_size, 1.0, grids.Backbone.feature_dim)
    options = align_uniform.Options(**({"projector": [8, 7]} | options))
    return align_uniform.Method(grids.Backbone(), info, options).to(dtype).train()


def views(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, 6, 5, dtype=dtype, generator=generator) for _ in range(2)]


def slow_terms(x, y, scale):
    x, y = (z / z.norm(dim=1, keepdim=True) for z in (x, y))
    n, d = x.shape
    alignment = sum((x[i] - y[i]).square().sum() for i in range(n)) / (n * d)
    uniformity = 0.0
    for z in (x, y):
        potentials = [torch.exp(-scale * (z[i] - z[j]).square().sum()) for i in range(n) for j in range(n) if i != j]
        uniformity += torch.log(sum(potentials) / len(potentials)) / 2
    return alignment, uniformity


def reference(method, groups):
    method = copy.deepcopy(method)
    x, y = (method.projector(method.backbone(view)) for [view] in groups)
    terms = slow_terms(x, y, method.options.scale)
    loss = method.options.sim_coeff * terms[0] + method.options.unif_coeff * terms[1]
    loss.backward()
    return loss.detach(), [t.detach() for t in terms], grids.gradients(method), dict(method.named_buffers())


@pytest.mark.parametrize("grid", [Grid(1, 1), Grid(2, 1), Grid(3, 1)], ids=str)
@pytest.mark.parametrize("options", [{}, {"sim_coeff": 3.0, "unif_coeff": 2.0, "scale": 0.7}], ids=str)
def test_any_number_of_ranks_equals_the_loops(grid, options):
    method, groups = make(**options), views()
    loss, terms, gradients, buffers = reference(method, groups)
    result = grids.run(method, grid, *groups)
    grids.assert_equal(result, loss, gradients, buffers, EXACT)
    for output in result.outputs:
        for name, expected in zip(("alignment", "uniformity"), terms, strict=True):
            torch.testing.assert_close(output.metrics[name], expected, **EXACT)
        assert output.representations.shape == (2, 6, 7)


def test_uniformity_of_known_places():
    same = torch.tensor([[1.0, 0.0]]).expand(5, 2)
    assert align_uniform.uniformity(same, 2.5) == pytest.approx(0.0, abs=1e-6)
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert align_uniform.uniformity(opposite, 2.5) == pytest.approx(-10.0)


def test_a_sharp_potential_is_finite():
    """exp(-400 * 4) is 0 in float32; its logarithm is not asked for."""
    z = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    value = align_uniform.uniformity(z, 400.0)
    value.backward()
    assert value.item() == pytest.approx(-1600.0) and z.grad.isfinite().all()


def test_half_precision_is_scored_in_float32():
    method = make(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = method(grids.batch_of(*views(torch.float32)), one_process())
    assert output.loss.dtype == output.representations.dtype == torch.float32
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in method.parameters())


def test_options():
    options = methods.build_options(align_uniform.Method, {})
    assert options.projector == [8192] * 3 and (options.sim_coeff, options.unif_coeff, options.scale) == (3000, 1, 2.5)
    for wrong in ({"scale": 0.0}, {"sim_coeff": -1.0}, {"unif": 1.0}):
        with pytest.raises(UserError, match=f"method.options.{next(iter(wrong))}"):
            methods.build_options(align_uniform.Method, wrong)
    with pytest.raises(UserError, match=r"optim\.batch_size = 1"):
        make(batch_size=1)
