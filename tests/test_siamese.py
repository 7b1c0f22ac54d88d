"""Barlow Twins, BYOL, SimSiam, MoCo v2, MoCo v3 and NNCLR against references written from the papers; the queue."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssl_dist import methods
from ssl_dist.clock import Clock
from ssl_dist.config import validate
from ssl_dist.distributed.world import one_process
from ssl_dist.errors import UserError
from ssl_dist.methods import barlow_twins, byol, mocov2, mocov3, nnclr, simsiam
from ssl_dist.methods.base import Batch, Info
from ssl_dist.nn.layers import rising_decay
from ssl_dist.nn.queue import Queue

NUM_IMAGES, DIM = 6, 5
WORLD = one_process(torch.device("cpu"))
FFCV = dict(np.load(Path(os.environ.get("SSL_DIST_GOLDEN", Path(__file__).parent / "golden"), "ffcvssl.npz")))


def embeddings(number=2, seed=0):
    return torch.randn(number, NUM_IMAGES, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(a, b):
    a, b = a.detach(), b.detach()
    return float(a @ b / (a.norm() * b.norm()))


def cross_entropy(scores, answer):
    return math.log(sum(math.exp(s - scores[answer]) for s in scores))


def test_barlow_twins_entry_by_entry():
    x, y = embeddings()
    expected = 0.0
    for i in range(DIM):
        for j in range(DIM):
            a, b = x[:, i] - x[:, i].mean(), y[:, j] - y[:, j].mean()
            a, b = a / (a.square().mean() + 1e-5).sqrt(), b / (b.square().mean() + 1e-5).sqrt()
            correlation = float((a * b).mean())
            expected += (correlation - 1) ** 2 if i == j else 0.3 * correlation**2
    loss, terms = barlow_twins.decorrelated(embeddings(), barlow_twins.Options(lambd=0.3), WORLD)
    assert float(loss) == pytest.approx(expected, rel=1e-12)
    assert float(terms["invariance"] + 0.3 * terms["redundancy"]) == pytest.approx(expected, rel=1e-12)


def test_byol_is_the_distance_of_unit_vectors_both_ways():
    predicted, target = embeddings(), embeddings(seed=1)
    pairs = [(predicted[v, m], target[1 - v, m]) for v in range(2) for m in range(NUM_IMAGES)]
    expected = sum(float((a / a.norm() - b / b.norm()).square().sum()) for a, b in pairs) / NUM_IMAGES
    assert float(byol.symmetric(predicted, target)) == pytest.approx(expected, rel=1e-12)


def test_simsiam_has_no_gradient_on_the_side_of_the_target():
    predicted, z = embeddings().requires_grad_(), embeddings(seed=1).requires_grad_()
    loss = simsiam.negative_cosine(predicted, z)
    expected = -sum(cosine(predicted[v, m], z[1 - v, m]) for v in range(2) for m in range(NUM_IMAGES))
    assert loss.item() == pytest.approx(expected / (2 * NUM_IMAGES), rel=1e-12)
    loss.backward()
    assert z.grad is None and predicted.grad.abs().max() > 0


def test_mocov3_picks_its_image_out_of_the_batch():
    query, key = embeddings(), embeddings(seed=1)
    expected = 0.0
    for v in range(2):
        for m in range(NUM_IMAGES):
            scores = [cosine(query[v, m], key[1 - v, n]) / 0.3 for n in range(NUM_IMAGES)]
            expected += 2 * 0.3 * cross_entropy(scores, m) / NUM_IMAGES
    assert float(mocov3.contrast(query, key, 0.3, WORLD)[0]) == pytest.approx(expected, rel=1e-12)


def test_mocov2_picks_its_key_out_of_the_queue():
    (query, key), queue = embeddings(), F.normalize(embeddings(1, seed=2)[0], dim=1)
    z = mocov2.logits(query, key, queue, 0.2)
    for m in range(NUM_IMAGES):
        expected = [cosine(query[m], other) / 0.2 for other in (key[m], *queue)]
        assert z[m].tolist() == pytest.approx(expected, rel=1e-12)


def test_nnclr_asks_neighbours():
    z, predicted, support = embeddings(), embeddings(seed=1), F.normalize(embeddings(2, seed=2).flatten(0, 1), dim=1)
    neighbours = torch.stack([nnclr.nearest(z_MD, support) for z_MD in z])
    expected, right = 0.0, 0
    for v in range(2):
        for m in range(NUM_IMAGES):
            neighbour = max(support, key=lambda row, query=z[v, m]: cosine(row, query))
            assert torch.equal(neighbours[v, m], neighbour)
            scores = [cosine(neighbour, predicted[1 - v, n]) / 0.1 for n in range(NUM_IMAGES)]
            expected += cross_entropy(scores, m) / 2
            right += max(range(NUM_IMAGES), key=scores.__getitem__) == m
    total, correct = nnclr.contrast(neighbours, predicted, 0.1, 0)
    assert float(total) == pytest.approx(expected, rel=1e-12) and int(correct) == right
    parts = [nnclr.contrast(neighbours[:, lo:hi], predicted, 0.1, lo) for lo, hi in ((0, 2), (2, 6))]
    assert float(sum(part for part, _ in parts)) == pytest.approx(expected, rel=1e-12)


def test_the_share_that_an_average_keeps_rises_to_one():
    """Half of the way in the middle, and as much before it as after."""
    of = [rising_decay(k / 50, 0.9) for k in range(51)]
    assert of[0] == 0.9 and of[25] == pytest.approx(0.95) and of[50] == 1 and of == sorted(of)
    assert [a + b for a, b in zip(of, reversed(of), strict=True)] == pytest.approx([1.9] * 51)
    assert of[10] == pytest.approx(0.9 + 0.1 * 0.09549150281252627)  # (1 - cos 36 degrees) / 2


@pytest.mark.parametrize(("dtype", "tolerance"), [("f64", 1e-9), ("f32", 1e-5)])
@pytest.mark.parametrize("name", ["barlow_0.0051", "byol"])
def test_losses_of_ffcv_ssl(name, dtype, tolerance):
    """tests/golden/ffcvssl.npz: what its README says of the inputs."""
    x, y = (torch.from_numpy(FFCV[key]).to({"f32": torch.float32, "f64": torch.float64}[dtype]) for key in "xy")
    x.requires_grad_(), y.requires_grad_()
    if name == "byol":
        student, teacher = torch.stack([x, 1.1 * x.flip(0)]), torch.stack([y, 0.9 * y.flip(0) + 0.1])
        loss = byol.symmetric(student, teacher.detach())
    else:
        loss, _ = barlow_twins.decorrelated(torch.stack([x, y]), barlow_twins.Options(), WORLD)
    loss.backward()
    zero = torch.zeros_like(y)
    for ours, key in ((loss, "loss"), (x.grad, "grad_x"), (zero if y.grad is None else y.grad, "grad_y")):
        expected = torch.from_numpy(np.asarray(FFCV[f"{name}/{dtype}/{key}"]))
        limit = tolerance * float(expected.abs().max())
        assert float((ours.detach() - expected).abs().max()) <= limit, key


# ---------------------------------------------------------------------------------------------------- queue


@pytest.mark.parametrize(("size", "count"), [(6, 2), (7, 3), (4, 4), (3, 5)])
def test_the_newest_take_the_place_of_the_oldest(size, count):
    """Of batches that divide the queue or not, or are larger than it."""
    queue, told = Queue(size, 2, seed=0).double(), []
    at_first = queue.rows.clone()
    for step in range(6):
        new = torch.randn(count, 2, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        queue.push(new, step)
        told += [*F.normalize(new, dim=1)]
        newest = told[-size:]
        held = {tuple(row) for row in queue.rows.tolist()}
        assert {tuple(row.tolist()) for row in newest} <= held
        assert len(held) == size and len(held & {tuple(row) for row in at_first.tolist()}) == max(0, size - len(told))


def test_a_queue_begins_with_unit_vectors_of_the_seed():
    one, same, other = Queue(50, 3, seed=1).rows, Queue(50, 3, seed=1).rows, Queue(50, 3, seed=2).rows
    torch.testing.assert_close(one.norm(dim=1), torch.ones(50))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert one.mean(0).abs().max() < 0.4  # no direction is preferred


# ---------------------------------------------------------------------------------------------------- methods


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, DIM)

    def forward(self, x):
        return self.linear(x.flatten(1))


OPTIONS = {
    "barlow_twins": {"projector": [8, 8]},
    "byol": {"projector": [8, 4], "predictor": 8, "tau": 0.5},
    "simsiam": {"projector": [8, 8, 4], "predictor": 4},
    "mocov2": {"queue": 20, "hidden": 8, "dim": 4, "momentum": 0.5},
    "mocov3": {"projector": [8, 4], "predictor": 8, "momentum": 0.5},
    "nnclr": {"support": 20, "projector": [8, 4], "predictor": 8},
}


def build(name, batch_size=NUM_IMAGES, **options):
    module = methods.find(name)
    info = Info(NUM_IMAGES, 0, ((2, 2),), batch_size, 10, feature_dim=DIM)
    torch.manual_seed(0)
    return module(Tiny(), info, validate(module.Options, OPTIONS[name] | options)).double().train()


def batch_of(groups):
    """Two views of NUM_IMAGES images, in one group or in two."""
    x = torch.randn(2, NUM_IMAGES, 3, 2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ids = torch.arange(NUM_IMAGES)
    views, view_ids = (
        ([x], [torch.arange(2)]) if groups == 1 else ([x[:1], x[1:]], [torch.tensor([0]), torch.tensor([1])])
    )
    return Batch(views, view_ids, ids, torch.full((NUM_IMAGES,), -1), ids, step=0)


@pytest.mark.parametrize("name", OPTIONS)
def test_two_recipes_of_a_view_each_are_two_views_of_one(name):
    together, apart = (build(name)(batch_of(groups), WORLD) for groups in (1, 2))
    assert together.loss.item() == pytest.approx(apart.loss.item(), rel=1e-12)
    assert torch.isfinite(together.representations).all()
    assert all(math.isfinite(float(value)) for value in together.metrics.values())


@pytest.mark.parametrize("name", ["byol", "mocov2", "mocov3"])
def test_the_target_is_an_average_of_the_online_network(name):
    method = build(name)
    method(batch_of(1), WORLD)
    with torch.no_grad():
        for p in method.backbone.parameters():
            p.add_(1)
    before = [p.clone() for p in method.target_backbone.parameters()]
    method.after_step(Clock(1, 1, 10))
    share = {"byol": 0.5, "mocov2": 0.5, "mocov3": rising_decay(0.1, 0.5)}[name]
    for old, online, target in zip(
        before, method.backbone.parameters(), method.target_backbone.parameters(), strict=True
    ):
        torch.testing.assert_close(target, share * old + (1 - share) * online)
        assert not target.requires_grad
    assert method.encoder() is method.backbone


def test_the_predictors_rate_may_stay():
    groups = build("simsiam").parameter_groups()
    assert [group.get("constant_lr", False) for group in groups] == [False, True]
    assert sum(len(group["params"]) for group in groups) == len([*build("simsiam").parameters()])
    assert not build("simsiam", constant_predictor_lr=False).parameter_groups()[1]["constant_lr"]


@pytest.mark.parametrize("name", ["barlow_twins", "byol", "simsiam", "mocov3", "nnclr"])
def test_one_image_is_refused(name):
    with pytest.raises(UserError, match=r"optim\.batch_size = 1: .* give 2 or more"):
        build(name, batch_size=1)
