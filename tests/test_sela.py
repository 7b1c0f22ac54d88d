"""SeLa: schedule, loss, relabeling on any number of ranks, and what it refuses."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ssl_dist.clock import Clock
from ssl_dist.distributed.world import one_process
from ssl_dist.errors import UserError
from ssl_dist.grid import Grid
from ssl_dist.methods import sela
from ssl_dist.methods.base import Batch, Info, Rows
from tests import thread_world

IMAGES = 36
PIXELS = torch.randn(IMAGES, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


class Backbone(nn.Module):
    feature_dim = 6

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, self.feature_dim)

    def forward(self, x):
        return self.linear(x)


def make(seed=0, **options):
    torch.manual_seed(seed)
    info = Info(IMAGES, 0, ((1, 5),), 12, 4.0, Backbone.feature_dim, steps_per_epoch=3, seed=seed)
    return sela.Method(Backbone(), info, sela.Options(**{"clusters": 4, "heads": 2, **options})).double().train()


def extract_of(world, calls=None):
    def extract(network, augmented=False, training=False):
        if calls is not None:
            calls.append((augmented, training))
        own = torch.arange(world.rank_info.rank, IMAGES, world.rank_info.world_size)
        with torch.no_grad():
            return Rows(own, network(PIXELS[own]))

    return extract


def batch_of(positions, step=0):
    return Batch([PIXELS[positions][None]], [torch.zeros(1).long()], positions, None, positions, step)


# ---------------------------------------------------------------------------------------------------- schedule


def official_steps(times, steps_per_epoch, total):
    """The official queue: at every step at most one time is taken, when it has come."""
    queue, taken = sorted(times), []
    for step in range(total):
        if queue and step >= queue[0] * steps_per_epoch:
            queue.pop(0)
            taken.append(step)
    return taken


@settings(max_examples=60)
@given(
    st.integers(1, 30), st.integers(1, 120), st.integers(1, 9), st.sampled_from(["quadratic", "linear"])
)  # fmt: skip
def test_steps_are_those_of_the_queue(epochs, count, steps_per_epoch, schedule):
    times = sela.relabel_times(epochs, count, schedule)
    assert times[0] == 0 and np.all(np.diff(times) > 0) and (count == 1 or times[-1] > epochs)
    steps = sela.relabel_steps(times, steps_per_epoch)
    total = epochs * steps_per_epoch
    assert steps[steps < total].tolist() == official_steps(times, steps_per_epoch, total)
    assert np.all(np.diff(steps) > 0)


def test_quadratic_is_dense_at_the_start():
    steps = sela.relabel_steps(sela.relabel_times(100, 50, "quadratic"), 10)
    assert np.diff(steps)[:5].mean() < 10 < np.diff(steps)[-5:].mean()
    even = np.diff(sela.relabel_steps(sela.relabel_times(100, 50, "linear"), 10))
    assert even.max() - even.min() <= 1


@pytest.mark.parametrize("schedule", ["quadratic", "linear"])
def test_labels_are_made_when_they_are_due_and_only_then(schedule):
    """A method that was just built (a resume) does the same at every step: the step alone decides."""
    world = one_process()
    total, due = 12, []
    for step in range(total):
        method, calls = make(relabelings=5, schedule=schedule), []
        before = method.labels.of_images.clone()
        assert method.before_step(Clock(step, 3, total), extract_of(world, calls), world) == []
        assert bool(calls) == (not torch.equal(method.labels.of_images, before))
        due += [step] * bool(calls)
    expected = official_steps(sela.relabel_times(total / 3, 5, schedule), 3, total)
    assert due == expected and 0 in due and 1 < len(due) < total


# ---------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(("labels_from", "call"), [("augmented", (True, True)), ("test", (False, False))])
def test_what_new_labels_are_made_from(labels_from, call):
    calls = []
    make(labels_from=labels_from).before_step(Clock(0, 3, 12), extract_of(one_process(), calls), one_process())
    assert calls == [call]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_any_number_of_ranks_makes_the_same_labels(size):
    """Every rank brings other images, in another order, and all have the same labels and figures afterwards."""

    untrained = make()

    def relabel(world):
        method = copy.deepcopy(untrained)
        method.before_step(Clock(0, 3, 12), extract_of(world), world)
        return method

    [alone] = thread_world.run(relabel)
    for method in thread_world.run(relabel, Grid(size, 1)):
        assert torch.equal(method.labels.of_images, alone.labels.of_images)
        assert torch.equal(method.labels.figures, alone.labels.figures)
        torch.testing.assert_close(method.sinkhorn, alone.sinkhorn, rtol=1e-9, atol=0)
    for head in range(2):
        assert alone.labels.sizes(head).min() >= IMAGES // 4 - 2
    assert alone.labels.figures[0] > 0 and alone.sinkhorn[0] % 1 == 0 and alone.sinkhorn[1] <= 0.1


def test_one_head_at_a_time():
    for step, head in ((0, 0), (3, 1), (7, 0)):
        method = make(relabel="one", relabelings=1000)
        before = method.labels.of_images.clone()
        method.before_step(Clock(step, 3, 12), extract_of(one_process()), one_process())
        changed = (method.labels.of_images != before).any(1)
        assert changed.tolist() == [head == 0, head == 1]


def test_blocks_do_not_matter(monkeypatch):
    world = one_process()
    whole, parts = make(), make()
    whole.before_step(Clock(0, 3, 12), extract_of(world), world)
    monkeypatch.setattr(sela, "BLOCK_BYTES", 8 * 6 * 5)
    parts.before_step(Clock(0, 3, 12), extract_of(world), world)
    assert torch.equal(whole.labels.of_images, parts.labels.of_images)


def test_float32_scores_take_half_the_memory_and_give_the_same_labels(monkeypatch):
    """Intercepts of a million: float32 would round these logits to 0.06 without the shift of rows."""
    taken, plain = [], sela.sinkhorn.sinkhorn_knopp
    monkeypatch.setattr(sela.sinkhorn, "sinkhorn_knopp", lambda x, *rest: taken.append(x.nbytes) or plain(x, *rest))
    labels = {}
    for dtype in ("fp64", "fp32"):
        method = make(sinkhorn_dtype=dtype)
        nn.init.constant_(method.heads[0].bias, 1e6)
        method.before_step(Clock(0, 3, 12), extract_of(one_process()), one_process())
        labels[dtype] = method.labels.of_images
    assert torch.equal(labels["fp64"], labels["fp32"])
    assert taken == [IMAGES * 4 * 8] * 2 + [IMAGES * 4 * 4] * 2
    for dtype, size in (("fp64", 8), ("fp32", 4)):
        line = make(sinkhorn_dtype=dtype).explain(2, "cpu")["a relabeling"]
        assert f"{size * 4 / 1024:.1f} KiB of scores ({dtype})" in line
    options = sela.Options(sinkhorn_dtype="fp32")
    method = sela.Method(Backbone(), Info(1_281_167, 0, ((1, 5),), 12, 4.0, 6), options)
    assert "11.7 KiB of scores (fp32)" in method.explain(8, "cpu")["a relabeling"]
    assert "14,662 MiB, 1,833 a rank" in method.explain(8, "cpu")["a relabeling"]


# ---------------------------------------------------------------------------------------------------- loss


def test_the_loss_is_that_of_the_loop():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 5, 4, dtype=torch.float64), torch.randint(0, 4, (3, 5))
    losses = sela.heads_loss(list(logits), labels)
    assert losses.shape == (5,)
    for image in range(5):
        terms = []
        for head in range(3):
            p = [math.exp(v) for v in logits[head, image].tolist()]
            terms.append(-math.log(p[labels[head, image]] / sum(p)))
        assert losses[image].item() == pytest.approx(sum(terms) / 3, rel=1e-12)


@pytest.mark.parametrize("size", [2, 3])
def test_a_step_on_several_ranks_is_that_of_one(size):
    positions = torch.tensor([30, 4, 17, 9, 2, 33, 21, 8, 11, 0, 26, 14])

    untrained = make()

    def step(world):
        method = copy.deepcopy(untrained)
        low, high = world.share(len(positions))
        output = method(batch_of(positions[low:high]), world)
        output.loss.backward()
        return output, {name: p.grad for name, p in method.named_parameters()}

    [(alone, gradients)] = thread_world.run(step)
    several = thread_world.run(step, Grid(size, 1))
    assert sum(output.loss.item() for output, _ in several) / size == pytest.approx(alone.loss.item(), rel=1e-12)
    for name, expected in gradients.items():
        torch.testing.assert_close(sum(g[name] for _, g in several) / size, expected, rtol=1e-10, atol=1e-14)
    for output, _ in several:
        assert output.metrics.keys() == alone.metrics.keys()
        for name, value in output.metrics.items():
            assert float(value) == pytest.approx(float(alone.metrics[name]), rel=1e-12), name
    method = untrained
    z = method.backbone(PIXELS[positions])
    hits = [method.heads[h](z).argmax(1) == method.labels.of_images[h, positions] for h in range(2)]
    assert float(alone.metrics["accuracy"]) == pytest.approx(100 * float(torch.stack(hits).double().mean()))


@pytest.mark.parametrize("clusters", [1, IMAGES + 1])
def test_numbers_of_clusters_that_make_no_sense(clusters):
    with pytest.raises(UserError, match=f"clusters = {clusters}: .*{IMAGES}"):
        make(clusters=clusters)
