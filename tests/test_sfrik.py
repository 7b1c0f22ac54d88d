"""SFRIK against loops written from the paper, on one rank and on several; its memory at the paper's size."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special
from torch import nn

from ssl_dist import methods
from ssl_dist.distributed.world import one_process
from ssl_dist.errors import UserError
from ssl_dist.grid import Grid
from ssl_dist.methods import sfrik
from ssl_dist.methods.base import Info
from ssl_dist.train.explain import Alive
from ssl_dist.verify import command as verify
from tests import grids

EXACT = {"rtol": 1e-9, "atol": 1e-12}
FORMS = {
    "two views": ([2], {}),
    "obow": ([1, 2, 2], {"general": [0]}),
    "obow, image regularised": ([1, 2, 2], {"general": [0], "reg_small": False}),
    "swav": ([2, 2], {"general": [0, 1], "weights": [1.0, 40.0]}),
    "swav, large regularised": ([2, 2], {"general": [0, 1], "reg_small": False, "weights": [1.0, 20.0, 30.0, 40.0]}),
    "one size": ([4], {"general": [3], "mmd_coeff": 2.0, "sim_coeff": 10.0}),
}


def make(form, dtype=torch.float64, batch_size=6, **more):
    torch.manual_seed(0)
    numbers, options = FORMS[form]
    info = Info(100, 0, tuple((num, 32) for num in numbers), batch_size, 1.0, grids.Backbone.feature_dim)
    options = sfrik.Options(**({"projector": [8, 7]} | options | more))
    return sfrik.Method(grids.Backbone(), info, options).to(dtype).train()


def views(form, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(num, 6, 5, dtype=dtype, generator=generator) for num in FORMS[form][0]]


def slow_kernel(t, dim, weights):
    """Legendre polynomials of `dim` dimensions are Gegenbauer's, scaled to 1 at t = 1."""
    alpha = (dim - 2) / 2
    return sum(
        w * special.eval_gegenbauer(k, alpha, t) / special.eval_gegenbauer(k, alpha, 1.0)
        for k, w in enumerate(weights, 1)
    )


def slow_terms(z, general, reg_small, weights):
    """Invariance and discrepancy of unit rows z [K, M, q], pair by pair."""
    num_views, num_images, dim = z.shape
    similar = 0.0
    for g in general:
        other_views = [v for v in range(num_views) if v != g]
        similar += sum((z[g] - z[v]).square().mean() for v in other_views) / len(other_views) / len(general)
    regularised = range(num_views) if reg_small else general
    total = 0.0
    for v in regularised:
        gram = [[(z[v, i] @ z[v, j]).item() for j in range(num_images)] for i in range(num_images)]
        total += sum(slow_kernel(t, dim, weights) for row in gram for t in row) / num_images**2
    return similar, total / len(regularised)


# ---------------------------------------------------------------------------------------------------- kernel


@settings(max_examples=60)
@given(st.integers(3, 40000), st.lists(st.floats(0, 50), min_size=1, max_size=7), st.floats(-1, 1))
def test_kernel_is_a_sum_of_gegenbauer_polynomials(dim, weights, t):
    value = sfrik.polynomial(torch.tensor(t, dtype=torch.float64), sfrik.kernel(dim, weights))
    assert float(value) == pytest.approx(slow_kernel(t, dim, weights), rel=1e-9, abs=1e-9 * max(1, sum(weights)))


@pytest.mark.parametrize("degree", range(1, 6))
def test_in_two_dimensions_they_are_chebyshevs(degree):
    angle = torch.linspace(0, math.pi, 9, dtype=torch.float64)
    values = sfrik.polynomial(angle.cos(), sfrik.legendre(2, degree).coef.tolist())
    torch.testing.assert_close(values, (degree * angle).cos(), **EXACT)


@pytest.mark.parametrize("ends", [[(0, 5)], [(0, 2), (2, 5)], [(0, 1), (1, 1), (1, 5)]], ids=str)
def test_rows_of_the_gram_matrix_join(ends):
    z = nn.functional.normalize(torch.randn(5, 7, dtype=torch.float64), dim=1)
    _, expected = slow_terms(torch.stack([z, z]), [0], True, [1.0, 40.0, 40.0, 3.0])
    joined = sum(sfrik.discrepancy(z, [1.0, 40.0, 40.0, 3.0], lo, hi) for lo, hi in ends)
    assert float(joined) == pytest.approx(expected, rel=1e-9)


def test_discrepancy_is_that_of_places_from_the_uniform_distribution():
    """psi(1) when all are at one place; near psi(1) / M, what the diagonal gives, for M places drawn uniformly."""
    weights, generator = [1.0, 40.0, 40.0], torch.Generator().manual_seed(0)
    uniform = nn.functional.normalize(torch.randn(2000, 16, dtype=torch.float64, generator=generator), dim=1)
    assert float(sfrik.discrepancy(uniform[:1].expand(9, 16), weights)) == pytest.approx(81.0)
    assert float(sfrik.discrepancy(uniform, weights)) == pytest.approx(81 / 2000, rel=0.25)
    turn = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64, generator=generator))[0]
    lopsided = nn.functional.normalize(uniform + 0.5, dim=1)
    assert float(sfrik.discrepancy(lopsided @ turn, weights)) == pytest.approx(
        float(sfrik.discrepancy(lopsided, weights))
    )


# ---------------------------------------------------------------------------------------------------- method


def represent(method, groups):
    """Two views pass one after the other, of more all views together (they are of one size here)."""
    network = nn.Sequential(method.backbone, method.projector)
    views = torch.cat(groups)
    if len(views) == 2:
        return torch.stack([network(view) for view in views])
    return network(views.flatten(0, 1)).unflatten(0, views.shape[:2])


@pytest.mark.parametrize("form", FORMS)
def test_one_rank_equals_the_loops(form):
    method, groups = make(form), views(form)
    output = method(grids.batch_of(*groups), one_process())
    embeddings, o = represent(make(form), groups), method.options
    torch.testing.assert_close(output.representations, embeddings.detach(), **EXACT)
    z = embeddings / embeddings.norm(dim=2, keepdim=True)
    similar, discrepancy = slow_terms(z, o.general, o.reg_small, o.weights)
    torch.testing.assert_close(output.metrics["invariance"], similar.detach(), **EXACT)
    assert float(output.metrics["discrepancy"]) == pytest.approx(discrepancy, rel=1e-9)
    loss = o.sim_coeff * similar.item() + o.mmd_coeff * discrepancy
    assert output.loss.item() == pytest.approx(loss, rel=1e-9)


def test_gradients_are_those_of_finite_differences():
    method = make("swav, large regularised")
    for p in method.parameters():
        p.requires_grad_(False)
    groups = [group.requires_grad_() for group in views("swav, large regularised")]
    assert torch.autograd.gradcheck(lambda *g: method(grids.batch_of(*g), one_process()).loss, groups)


def grids_of(form):
    """Those that divide its groups; views that pass alone are sharded by real ranks only, in the certificate below."""
    every, numbers = (Grid(2, 1), Grid(3, 1), Grid(1, 2), Grid(2, 2), Grid(1, 4)), FORMS[form][0]
    return [g for g in every if g.views == 1 or (sum(numbers) > 2 and all(num % g.views == 0 for num in numbers))]


@pytest.mark.parametrize(("form", "grid"), [(form, grid) for form in FORMS for grid in grids_of(form)])
def test_any_grid_equals_one_process(form, grid):
    method, groups = make(form), views(form)
    expected, result = grids.run(method, Grid(1, 1), *groups), grids.run(method, grid, *groups)
    grids.assert_equal(result, expected.loss, expected.gradients, expected.buffers[0], EXACT)
    for output in result.outputs:
        for name, value in expected.outputs[0].metrics.items():
            torch.testing.assert_close(output.metrics[name], value, **EXACT)


def test_half_precision_is_scored_in_float32():
    method = make("swav", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = method(grids.batch_of(*views("swav", torch.float32)), one_process())
    assert output.loss.dtype == output.representations.dtype == torch.float32
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in method.parameters())


def peak(num_images, dim, device):
    """Bytes alive at most in the loss of two views and its gradient."""
    with torch.device(device):
        embeddings = torch.ones(2, num_images, dim, requires_grad=True)
        with Alive([embeddings]) as alive:
            sfrik.regularized(embeddings, sfrik.Options(), one_process())[0].backward()
    return alive.peak


@pytest.mark.parametrize(("num_images", "dim"), [(2048, 32768), (4096, 8192)])
def test_memory_at_the_papers_size(num_images, dim):
    """Embeddings and Gram matrices, each a few times: 2.5 GiB for q = 32,768, where an M x M x q array would be 512.

    Counted on torch's meta device, where tensors have a size but no bytes.
    """
    embeddings, gram = 2 * num_images * dim * 4, num_images**2 * 4
    peak_bytes = peak(num_images, dim, "meta")
    assert embeddings <= peak_bytes <= 5 * embeddings + 10 * gram, (peak_bytes / embeddings, peak_bytes / gram)


def test_memory_of_a_real_step_is_what_is_counted():
    assert peak(96, 512, "cpu") == peak(96, 512, "meta") < 96 * 96 * 512 * 4 / 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("groups", "options", "grids"),
    [
        ("[{num: 2, color_jitter: {}}]", ["general=[0]"], {"2x1", "1x2", "4x1", "2x2"}),
        ("[{num: 2, color_jitter: {}}, {num: 2, size: 16}]", ["reg_small=false"], {"2x1", "1x2", "4x1", "2x2"}),
    ],
    ids=["two views", "swav"],
)
def test_other_forms_are_certified(groups, options, grids, digits, tmp_path):
    """The form of the config for digits is certified in test_verify.py; LARS is, here."""
    overrides = [f"data.root={digits}", "data.reader=arrays", "views.num=null", f"views.groups={groups}"]
    overrides += [f"method.options.{option}" for option in options]
    overrides += ["optim.name=lars", "optim.lr=3e-3", "optim.weight_decay=1e-2"]
    cases = list(verify.cases(tmp_path, "configs/digits/sfrik-conv4.yaml", overrides=overrides, steps=3))
    rows = verify.certify(cases, tmp_path)
    assert {str(row.grid) for row in rows} == grids
    assert all(row.holds for row in rows), verify.table(rows)


# ---------------------------------------------------------------------------------------------------- options


def test_options():
    options = methods.build_options(sfrik.Method, {})
    assert options.projector == [8192] * 3 and (options.sim_coeff, options.mmd_coeff) == (4000, 1)
    assert options.weights == [1, 40, 40] and options.general == [0] and options.reg_small
    text = " ".join(grids.explained(sfrik, 2, 2048, 8).values())
    assert "L = 3" in text and "256 of 2048 rows a rank, 2.0 MiB" in text and "embeddings 128.0 MiB" in text
    for wrong in ({"weights": []}, {"weights": [-1.0]}, {"general": []}, {"general": [-1]}, {"reg_smal": True}):
        with pytest.raises(UserError, match=f"method.options.{next(iter(wrong))}"):
            methods.build_options(sfrik.Method, wrong)


def test_mistakes_are_named():
    for general in ([2], [0, 0]):
        with pytest.raises(UserError, match=r"method\.options\.general = .*0 to 1"):
            make("two views", general=general)
    with pytest.raises(UserError, match=r"method\.options\.projector.*2 or more"):
        make("two views", projector=[8, 1])
    FORMS["one"] = ([1], {})
    with pytest.raises(UserError, match=r"views\.num = 1.*2 or more"):
        make("one")
    del FORMS["one"]
