"""Relational reasoning: pairs, loss, the head, and one global batch on any number of ranks, against slow loops."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ssl_dist import methods
from ssl_dist.distributed.world import one_process
from ssl_dist.errors import UserError
from ssl_dist.grid import Grid
from ssl_dist.kernels import relation_cuda
from ssl_dist.keys import METHOD, hash64
from ssl_dist.methods import relational
from ssl_dist.methods.base import Batch, Info
from tests import grids, slow_relation, thread_world

AGGREGATIONS = ("cat", "sum", "mean", "max")


class Backbone(nn.Module):
    """Linear and BatchNorm: wrong statistics or gradients across ranks would show."""

    feature_dim = 6

    def __init__(self):
        super().__init__()
        self.linear, self.bn = nn.Linear(5, self.feature_dim), nn.BatchNorm1d(self.feature_dim)

    def forward(self, x):
        return self.bn(self.linear(x))


def make(num_views=4, dtype=torch.float64, seed=0, groups=None, batch_size=64, **options):
    torch.manual_seed(seed)
    info = Info(100, 10, groups or ((num_views, 32),), batch_size, 1.0, Backbone.feature_dim)
    method = relational.Method(Backbone(), info, relational.Options(hidden=16, **options))
    for module in (m for m in method.modules() if isinstance(m, nn.BatchNorm1d)):
        nn.init.normal_(module.weight)
        nn.init.normal_(module.bias)
    return method.to(dtype)


def batch_of(views, labels=None):
    return Batch(
        [views], [torch.arange(len(views))], torch.arange(views.shape[1]), labels, torch.arange(views.shape[1])
    )


def gradients(method):
    return {name: p.grad.clone() for name, p in method.named_parameters()}


# ---------------------------------------------------------------------------------------------------- pairs


@settings(max_examples=40)
@given(st.integers(2, 7), st.integers(1, 9))
def test_pairs_are_those_of_the_loop(num_views, num_images):
    left, right, target = relational.relation_pairs(num_views, num_images)
    assert left.dtype == right.dtype == torch.int64
    assert list(zip(left.tolist(), right.tolist(), target.tolist(), strict=True)) == slow_relation.pairs(
        num_views, num_images
    )


@settings(max_examples=40)
@given(st.integers(2, 6), st.integers(2, 7), st.data())
def test_shares_of_units_join_to_all_pairs(num_views, num_images, data):
    num_units = num_views * (num_views - 1) // 2 * num_images
    cut = data.draw(st.integers(0, num_units))
    couples = relational.couples(num_views, num_images)
    parts = [relational.unit_rows(couples, num_images, *ends) for ends in ((0, cut), (cut, num_units))]
    left, positive, negative = (torch.cat(rows) for rows in zip(*parts, strict=True))
    expected = slow_relation.pairs(num_views, num_images)
    joined = [*((*pair, 1) for pair in zip(left.tolist(), positive.tolist(), strict=True)),
             *((*pair, 0) for pair in zip(left.tolist(), negative.tolist(), strict=True))]  # fmt: skip
    assert sorted(joined) == sorted(expected)
    assert torch.all(positive % num_images == left % num_images) and torch.all(
        negative % num_images != left % num_images
    )


def test_negatives_may_be_drawn():
    """A shift for every pair of views, from all but 0, and another one at another step."""
    drawn = np.stack([relational.couples(6, 5, hash64(0, METHOD, step)) for step in range(400)])
    assert np.array_equal(drawn[:, :, :2], np.broadcast_to(relational.couples(6, 5)[:, :2], (400, 15, 2)))
    counts = np.bincount(drawn[:, :, 2].ravel(), minlength=5)
    assert counts[0] == 0 and len(counts) == 5 and counts[1:].min() > 1350 and counts[1:].max() < 1650
    assert relational.couples(3, 2, hash64(1))[:, 2].tolist() == [1, 1, 1]


@pytest.mark.parametrize("fused", [True, False])
def test_drawn_negatives_are_those_of_every_rank(fused):
    views = torch.randn(4, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    method = make(4, negatives="random")
    method.fused = fused
    one, four = (grids.run(method, grid, views) for grid in (Grid(1, 1), Grid(2, 2)))
    torch.testing.assert_close(four.loss, one.loss, rtol=1e-9, atol=0)
    assert not torch.allclose(one.loss, grids.run(make(4), Grid(1, 1), views).loss, rtol=1e-5, atol=0)


def test_one_view_has_no_pairs():
    with pytest.raises(ValueError, match="no pairs"):
        relational.relation_pairs(1, 4)


# ---------------------------------------------------------------------------------------------------- loss


@settings(max_examples=40)
@given(st.sampled_from([0.0, 1.0, 2.0, 3.5]), st.sampled_from([None, 0.0, 0.25, 0.5, 1.0]), st.integers(0, 99))
def test_focal_loss_is_that_of_the_formula(gamma, alpha, seed):
    torch.manual_seed(seed)
    logits, target = 5 * torch.randn(20, dtype=torch.float64), torch.randint(0, 2, (20,))
    pt = torch.where(target == 1, torch.sigmoid(logits), torch.sigmoid(-logits))
    weight = 1.0 if alpha is None else torch.tensor([1 - alpha, alpha], dtype=torch.float64)[target]
    expected = -weight * (1 - pt) ** gamma * torch.log(pt)
    torch.testing.assert_close(relational.focal_bce(logits, target, gamma, alpha), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_loss_of_extreme_logits_is_finite(gamma):
    logits = torch.tensor([-300.0, 300.0, -300.0, 300.0], requires_grad=True)
    loss = relational.focal_bce(logits, torch.tensor([0, 0, 1, 1]), gamma, 0.5)
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), torch.tensor([0.0, 150.0, 150.0, 0.0]))
    torch.testing.assert_close(logits.grad, torch.tensor([0.0, 0.5, -0.5, 0.0]))


# ---------------------------------------------------------------------------------------------------- method


def reference(method, views, gamma=2.0, alpha=0.5):
    """Loss, logits and gradients of one process, by the slow loops; `method` is not changed but for its gradients."""
    method = copy.deepcopy(method)
    [z] = method.represent(batch_of(views))
    loss, logits = slow_relation.loss_and_logits(z, method.relation_module, method.options.aggregation, gamma, alpha)
    loss.backward()
    return loss.detach(), logits.detach(), gradients(method), dict(method.named_buffers())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("grid", [Grid(1, 1), Grid(1, 2), Grid(2, 1), Grid(3, 1), Grid(2, 2), Grid(3, 4)], ids=str)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_any_grid_of_ranks_equals_the_loops(aggregation, grid, fused):
    method = make(4, aggregation=aggregation)
    views = torch.randn(4, 6, 5, dtype=torch.float64)
    loss, logits, grads, buffers = reference(method, views)

    def rank(world):
        own = world.synchronize_batchnorm(copy.deepcopy(method)).train()
        own.fused = fused
        of_views, of_images = (f(world.rank_info.rank, n) for f, n in ((grid.view_range, 4), (grid.image_range, 6)))
        output = own(batch_of(views[of_views.start : of_views.stop, of_images.start : of_images.stop]), world)
        output.loss.backward()
        return output, gradients(own), dict(own.named_buffers())

    outputs, all_gradients, all_buffers = zip(*thread_world.run(rank, grid), strict=True)
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(torch.stack([o.loss.detach() for o in outputs]).mean(), loss, **close)
    for name, expected in grads.items():
        mean = torch.stack([g[name] for g in all_gradients]).mean(0)  # as DDP does
        torch.testing.assert_close(mean, expected, **close, msg=lambda m, n=name: f"{n}: {m}")
    for ours in all_buffers:
        for name, expected in buffers.items():
            torch.testing.assert_close(ours[name], expected, **close)
    scores = logits.view(-1, 2, 6)
    correct = torch.stack([(scores[:, 0] > 0).double().mean(), (scores[:, 1] <= 0).double().mean()]) * 100
    for output in outputs:
        assert output.metrics["accuracy_positive"] == pytest.approx(correct[0].item())
        assert output.metrics["accuracy_negative"] == pytest.approx(correct[1].item())
        assert output.metrics["accuracy"] == pytest.approx(correct.mean().item())
        assert output.representations.shape == (4, 6, 6)
    for name, expected in (("positive", scores[:, 0]), ("negative", scores[:, 1])):
        joined = torch.cat([o.histograms[f"relation_score_{name}"] for o in outputs])
        torch.testing.assert_close(joined, torch.sigmoid(expected.flatten()), **close)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("gamma", "alpha"), [(0.0, None), (1.0, 0.25), (3.5, 0.9)])
def test_gamma_and_alpha_reach_the_loss(gamma, alpha, fused):
    method = make(3, gamma=gamma, alpha=alpha)
    method.fused = fused
    views = torch.randn(3, 5, 5, dtype=torch.float64)
    loss, _, grads, _ = reference(method, views, gamma, alpha)
    output = method(batch_of(views), one_process())
    output.loss.backward()
    torch.testing.assert_close(output.loss.detach(), loss, rtol=1e-10, atol=0)
    for name, expected in grads.items():
        torch.testing.assert_close(method.get_parameter(name).grad, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_bias_before_the_batchnorm_stays_where_it_is(aggregation):
    method = make(3, torch.float32, aggregation=aggregation)
    before = method.relation_module.linear1.bias.detach().clone()
    adam = torch.optim.Adam(method.parameters(), 1e-2)
    for _ in range(3):
        method(batch_of(torch.randn(3, 5, 5)), one_process()).loss.backward()
        adam.step()
    assert torch.equal(method.relation_module.linear1.bias, before)


def test_half_precision_features_are_scored_in_float32():
    method, views = make(3, torch.float32), torch.randn(3, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        output = method(batch_of(views), one_process())
    assert output.loss.dtype == output.representations.dtype == torch.float32
    output.loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in method.parameters())


@pytest.mark.parametrize("grid", [Grid(1, 1), Grid(2, 2), Grid(3, 4)], ids=str)
@pytest.mark.parametrize("head", ["dot_product", "encoder"])
def test_the_ablations_score_by_dot_products(head, grid):
    method, views = make(4, head=head), torch.randn(4, 6, 5, dtype=torch.float64)
    alone = copy.deepcopy(method)
    network = nn.Sequential(alone.backbone, *([alone.encoding] if head == "encoder" else []))
    z = network(views.flatten(0, 1)).unflatten(0, (4, 6))
    assert z.shape[2] == (64 if head == "encoder" else Backbone.feature_dim)
    loss, logits = slow_relation.loss_and_logits(z, None, "", 2.0, 0.5)
    loss.backward()

    result = grids.run(method, grid, views)
    close = {"rtol": 1e-9, "atol": 1e-12}
    grids.assert_equal(result, loss.detach(), gradients(alone), dict(alone.named_buffers()), close)
    assert result.outputs[0].metrics["accuracy_positive"] == pytest.approx(
        (logits.view(-1, 2, 6)[:, 0] > 0).double().mean().item() * 100
    )


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("grid", [Grid(1, 1), Grid(2, 2)], ids=str)
def test_known_labels_make_positive_pairs(grid, fused):
    """labelled: 1 for the loop, so that all labels but the unknown ones count; then a share of them, drawn by key."""
    views, labels = torch.randn(4, 6, 5, dtype=torch.float64), torch.tensor([0, 1, 0, -1, -1, 0])
    method = make(4, labelled=1.0)
    alone = copy.deepcopy(method)
    [z] = alone.represent(batch_of(views))
    known_labels = [None if label < 0 else int(label) for label in labels]
    loss, logits = slow_relation.loss_and_logits(z, alone.relation_module, "cat", 2.0, 0.5, known_labels)
    loss.backward()

    method.fused = fused
    result = grids.run(method, grid, views, labels=labels)
    close = {"rtol": 1e-9, "atol": 1e-12}
    grids.assert_equal(result, loss.detach(), gradients(alone), dict(alone.named_buffers()), close)
    pairs = slow_relation.pairs(4, 6)
    positive = torch.tensor(
        [y or known_labels[i % 6] == known_labels[j % 6] is not None for i, j, y in pairs], dtype=torch.bool
    )
    assert positive.sum() > len(pairs) // 2
    metrics = result.outputs[0].metrics
    assert metrics["positive_share"] == pytest.approx(100 * positive.double().mean().item())
    right = (logits > 0) == positive
    assert metrics["accuracy"] == pytest.approx(100 * right.double().mean().item())
    assert metrics["accuracy_negative"] == pytest.approx(100 * right[~positive].double().mean().item())


def test_which_labels_are_known_is_drawn_by_image():
    labels = torch.zeros(4000, dtype=torch.int64)
    batch = Batch([], [], torch.arange(4000), labels, torch.arange(4000))
    quarter = make(4, labelled=0.25)._revealed_labels(batch)
    assert set(quarter.tolist()) == {-1, 0} and (quarter == 0).double().mean().item() == pytest.approx(0.25, abs=0.03)
    second_half = Batch([], [], torch.arange(2000, 4000), labels[:2000], torch.arange(2000))
    assert torch.equal(make(4, labelled=0.25)._revealed_labels(second_half), quarter[2000:])
    half = make(4, labelled=0.5)._revealed_labels(batch)
    assert ((half == 0) | (quarter == -1)).all(), "a larger share holds the smaller one"


def test_labels_that_there_are_not_are_refused():
    info = Info(100, 0, ((4, 32),), 64, 1.0, Backbone.feature_dim)
    with pytest.raises(UserError, match=r"labelled = 0.1: some images of this split have no label"):
        relational.Method(Backbone(), info, relational.Options(labelled=0.1))


def test_tensor_names():
    names = [n for n in make(4).state_dict() if n.startswith("relation_module.")]
    assert names == [f"relation_module.{n}" for n in (
        "linear1.weight", "linear1.bias", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var",
        "bn1.num_batches_tracked", "linear2.weight", "linear2.bias",
    )]  # fmt: skip


def test_it_learns_what_views_share():
    """Images differ in a direction that their views share; the head finds it within a few steps."""
    torch.manual_seed(0)
    method = make(4, torch.float32)
    adam = torch.optim.Adam(method.parameters(), 1e-2)
    for _ in range(60):
        views = 3 * torch.randn(1, 8, 5) + 0.1 * torch.randn(4, 8, 5)
        adam.zero_grad()
        output = method(batch_of(views), one_process())
        output.loss.backward()
        adam.step()
    assert output.metrics["accuracy"] > 85
    positive, negative = (output.histograms[f"relation_score_{kind}"].mean() for kind in ("positive", "negative"))
    assert positive > negative + 0.2


# ---------------------------------------------------------------------------------------------------- mistakes


def test_mistakes_are_named():
    with pytest.raises(UserError, match=r"views\.num = 1.*2 or more"):
        make(1)
    with pytest.raises(UserError, match=r"views\.groups.*2 are given"):
        make(groups=((2, 32), (4, 16)))
    with pytest.raises(UserError, match=r"optim\.batch_size = 1"):
        make(2, batch_size=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gama": 1.0}, ["method.options.gama", "'gamma'"]),
        ({"aggregation": "concat"}, ["method.options.aggregation", "'cat'"]),
        ({"alpha": 2.0}, ["method.options.alpha", "weight of positives"]),
        ({"gamma": -1.0}, ["method.options.gamma"]),
        ({"hidden": 0}, ["method.options.hidden"]),
    ],
)
def test_wrong_options_name_the_key(options, words):
    with pytest.raises(UserError) as caught:
        methods.build_options(methods.find("relational"), options)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_methods_are_found_by_the_name_of_their_file():
    assert {"relational", "random_weights"} <= set(methods.names()) and "base" not in methods.names()
    assert methods.find("relational") is relational.Method
    for name, expected in (("relationl", "'relational'"), ("base", "random_weights"), ("", "methods: ")):
        with pytest.raises(UserError) as caught:
            methods.find(name)
        assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_options_have_the_papers_defaults():
    options = methods.build_options(relational.Method, {})
    assert (options.aggregation, options.gamma, options.alpha, options.hidden) == ("cat", 2.0, 0.5, 256)
    assert methods.build_options(relational.Method, {"alpha": None}).alpha is None
    text = grids.explained(relational, 32, 64)
    assert "31744 positive" in " ".join(text.values()) and "scoring" not in text["pairs a rank"]
    on_max = grids.explained(relational, 32, 64, aggregation="max")["pairs a rank"]
    assert on_max.endswith("by torch operations (max does not split over the members of a pair) takes about 248.0 MiB")


@pytest.mark.parametrize(
    ("obstacle", "words"),
    [
        ("", "scoring them by Triton takes about 10.5 MiB"),
        ("Triton is not installed", "by torch operations (Triton is not installed) takes about 248.0 MiB"),
    ],
)
def test_explain_names_what_scores_pairs_on_a_gpu(obstacle, words, monkeypatch):
    monkeypatch.setattr(relation_cuda, "obstacle", lambda: obstacle)
    assert grids.explained(relational, 32, 64, device="cuda")["pairs a rank"].endswith(words)


def test_random_weights_take_no_step_and_no_option():
    method = methods.find("random_weights")
    assert not method.trainable
    backbone = Backbone()
    built = method(backbone, Info(10, 0, ((1, 32),), 64, 0.0, backbone.feature_dim), methods.build_options(method, {}))
    assert built.encoder() is backbone and all(name.startswith("backbone.") for name in built.state_dict())
    with pytest.raises(UserError, match=r"method\.options\.x"):
        methods.build_options(method, {"x": 1})
