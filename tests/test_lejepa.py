"""LeJEPA against loops over views, slices and knots written from the paper, and its statistic against a closed form."""

import cmath
import copy
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats

from ssl_dist import methods
from ssl_dist.distributed.world import one_process
from ssl_dist.errors import UserError
from ssl_dist.grid import Grid
from ssl_dist.methods import lejepa
from ssl_dist.methods.base import Info
from tests import grids

EXACT = {"rtol": 1e-9, "atol": 1e-12}
NUM_IMAGES, SEED = 8, 3
GRIDS = [Grid(1, 1), Grid(2, 1), Grid(1, 2), Grid(2, 2), Grid(4, 1)]
MULTICROP = ((2, 32), (2, 16))
OPTIONS = {"projector": [8, 4], "slices": 6, "knots": 5, "t_max": 2.0, "lambd": 0.3}


def make(groups=MULTICROP, batch_size=NUM_IMAGES, **options):
    torch.manual_seed(0)
    info = Info(100, 0, groups, batch_size, 1.0, grids.Backbone.feature_dim, seed=SEED)
    return lejepa.Method(grids.Backbone(), info, lejepa.Options(**(OPTIONS | options))).double().train()


def views(groups):
    """Tensors of the groups."""
    generator = torch.Generator().manual_seed(1)
    shared = torch.randn(1, NUM_IMAGES, 5, dtype=torch.float64, generator=generator)
    return [
        shared + 0.4 * torch.randn(num, NUM_IMAGES, 5, dtype=torch.float64, generator=generator) for num, _ in groups
    ]


def slow_statistic(numbers, knots, t_max):
    """N times the trapezoids under |phi_N - phi|^2 phi, the characteristic functions at one knot after another."""
    points = [-t_max + 2 * t_max * k / (knots - 1) for k in range(knots)]
    heights = []
    for t in points:
        mean = sum(cmath.exp(1j * t * x) for x in numbers) / len(numbers)
        normal = math.exp(-(t**2) / 2)
        heights.append(abs(mean - normal) ** 2 * normal)
    return len(numbers) * sum((a + b) / 2 * 2 * t_max / (knots - 1) for a, b in pairwise(heights))


def slow_loss(z_KMD, global_views, options, step=0):
    """Equations of section 5.1, the distance as in algorithm 2: with gradient, so the statistic stands in reals."""
    num_views, num_images, dim = z_KMD.shape
    prediction, sigreg = 0.0, 0.0
    for m in range(num_images):
        centre = sum(z_KMD[g, m] for g in global_views) / len(global_views)
        for k in range(num_views):
            prediction = prediction + (centre - z_KMD[k, m]).square().sum() / (num_views * num_images * dim)
    slices = torch.from_numpy(lejepa.drawn_slices(SEED, step, dim, 0, options.slices))
    for k in range(num_views):
        for direction in slices:
            x = [row @ direction for row in z_KMD[k]]
            for j in range(options.knots):
                t = options.t_max * (2 * j / (options.knots - 1) - 1)
                width = 2 * options.t_max / (options.knots - 1) * (0.5 if j in (0, options.knots - 1) else 1)
                normal = math.exp(-(t**2) / 2)
                real = sum((t * number).cos() for number in x) / num_images
                imaginary = sum((t * number).sin() for number in x) / num_images
                distance = (real - normal) ** 2 + imaginary**2
                sigreg = sigreg + num_images * distance * normal * width / (num_views * options.slices)
    return (1 - options.lambd) * prediction + options.lambd * sigreg


def reference(method, groups, global_views):
    method = copy.deepcopy(method)
    z = torch.cat([x.flatten(0, 1) for x in groups])  # in tests all are of one size: they pass together
    z_KMD = method.projector(method.backbone(z)).view(-1, NUM_IMAGES, method.options.projector[-1])
    loss = slow_loss(z_KMD, global_views, method.options)
    loss.backward()
    return loss.detach(), grids.gradients(method), dict(method.named_buffers())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(
    ("groups", "options", "global_views"),
    [
        (MULTICROP, {}, [0, 1]),
        (((4, 32),), {}, [0, 1, 2, 3]),
        (MULTICROP, {"global_views": [1, 3], "knots": 4, "slices": 3, "lambd": 1.0}, [1, 3]),
    ],
    ids=["multicrop", "one recipe", "chosen"],
)
def test_any_grid_of_ranks_equals_the_loops(grid, groups, options, global_views):
    """Three slices on four ranks: one has none."""
    method, of_groups = make(groups, **options), views(groups)
    expected, gradients, buffers = reference(method, of_groups, global_views)
    result = grids.run(method, grid, *of_groups)
    grids.assert_equal(result, expected, gradients, buffers, EXACT)
    for output in result.outputs:
        weighted = (1 - method.options.lambd) * output.metrics["prediction"]
        weighted += method.options.lambd * output.metrics["sigreg"]
        torch.testing.assert_close(weighted, expected, **EXACT)
        assert output.representations.shape == (4, NUM_IMAGES, 4)


# ---------------------------------------------------------------------------------------------------- statistic


@pytest.mark.parametrize("knots", [2, 3, 4, 17, 40])
def test_the_statistic_knot_by_knot(knots):
    x = 1.5 * torch.randn(2, 9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.2
    ours = lejepa.epps_pulley(x, knots, 3.0)
    for v in range(2):
        for s in range(3):
            expected = slow_statistic(x[v, :, s].tolist(), knots, 3.0)
            assert ours[v, s].item() == pytest.approx(expected, rel=1e-12)


def test_many_knots_reach_the_integral_over_all_t():
    """Which Gaussian integrals give in closed form (Epps & Pulley 1983), without any characteristic function."""
    x = 0.7 * torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.2
    pairs = torch.exp(-((x[:, None] - x) ** 2) / 2).sum((0, 1)) * math.sqrt(2 * math.pi) / 9
    each = torch.exp(-(x**2) / 4).sum(0) * 2 * math.sqrt(math.pi)
    expected = pairs - each + 9 * math.sqrt(2 * math.pi / 3)
    torch.testing.assert_close(lejepa.epps_pulley(x, 200, 10.0), expected, rtol=1e-10, atol=0)


def test_it_is_small_for_the_normal_distribution_alone():
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(4000, 1, dtype=torch.float64, generator=generator)
    uniform = (torch.rand(4000, 1, dtype=torch.float64, generator=generator) - 0.5) * math.sqrt(12)
    options = lejepa.Options()
    fits, *others = (
        float(lejepa.epps_pulley(x, options.knots, options.t_max))
        for x in (normal, uniform, normal + 0.2, 1.2 * normal, 0 * normal)
    )
    assert fits < 1 and min(others) > 5


# ---------------------------------------------------------------------------------------------------- slices


def test_slices_are_unit_vectors_of_every_direction():
    drawn = lejepa.drawn_slices(0, 7, 5, 0, 4000)
    assert drawn.shape == (4000, 5)
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=1), 1, rtol=1e-12)
    # A coordinate of a uniform unit vector in 5 dimensions, from -1 to 1, has (x + 1) / 2 of Beta(2, 2).
    for column in drawn.T:
        assert stats.kstest((column + 1) / 2, stats.beta(2, 2).cdf).pvalue > 0.01
    assert np.abs(np.corrcoef(drawn.T) - np.eye(5)).max() < 0.06


def test_slices_are_those_of_seed_and_step_whoever_draws_them():
    drawn = lejepa.drawn_slices(0, 7, 5, 0, 9)
    assert np.array_equal(np.concatenate([lejepa.drawn_slices(0, 7, 5, *ends) for ends in ((0, 4), (4, 9))]), drawn)
    for other in (lejepa.drawn_slices(1, 7, 5, 0, 9), lejepa.drawn_slices(0, 8, 5, 0, 9)):
        assert not np.isclose(other, drawn).any()


def test_half_precision_is_tested_in_float32():
    method = make().float()
    with torch.autocast("cpu", torch.bfloat16):
        output = method(grids.batch_of(*(x.float() for x in views(MULTICROP))), one_process())
    assert output.loss.dtype == output.representations.dtype == torch.float32
    expected = slow_loss(output.representations.double(), [0, 1], method.options)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)


# ---------------------------------------------------------------------------------------------------- options


def test_options():
    options = methods.build_options(lejepa.Method, {})
    assert (options.lambd, options.slices, options.knots, options.t_max) == (0.05, 1024, 17, 5.0)
    for wrong in ({"lambd": 0.0}, {"lambd": 1.1}, {"knots": 1}, {"slices": 0}, {"global_views": []}, {"projector": []}):
        with pytest.raises(UserError, match=f"method.options.{next(iter(wrong))}"):
            methods.build_options(lejepa.Method, wrong)
    assert make(((1, 8), (1, 32), (2, 16), (1, 32))).global_views == [1, 4]
    with pytest.raises(UserError, match=r"global_views = \[0, 4\]: give different numbers"):
        make(global_views=[0, 4])
    with pytest.raises(UserError, match=r"views\.num = 1"):
        make(((1, 32),))
    with pytest.raises(UserError, match=r"optim\.batch_size = 1"):
        make(batch_size=1)
    shown = grids.explained(lejepa, 4, 16, world_size=4, slices=10)
    assert shown["slices"].startswith("3 of 10 a rank, each of 64 embeddings at 9 points")
