"""DeepCluster: loss, the routine before an epoch on any number of ranks, and what it refuses."""

import copy
import math

import pytest
import torch
from torch import nn

from ssl_dist.clock import Clock
from ssl_dist.distributed.world import one_process
from ssl_dist.errors import UserError
from ssl_dist.grid import Grid
from ssl_dist.methods import deepcluster
from ssl_dist.methods.base import Batch, Info, Rows
from tests import thread_world

IMAGES = 48
PIXELS = torch.randn(IMAGES, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


class Backbone(nn.Module):
    def __init__(self, feature_dim=6):
        super().__init__()
        self.linear, self.feature_dim = nn.Linear(5, feature_dim, bias=False), feature_dim

    def forward(self, x):
        return self.linear(x)


def make(seed=0, num_classes=0, feature_dim=6, num_images=IMAGES, batch_size=12, **options):
    torch.manual_seed(seed)
    info = Info(num_images, num_classes, ((1, 5),), batch_size, 4.0, feature_dim, steps_per_epoch=4, seed=seed)
    options = deepcluster.Options(**{"clusters": 5, "hidden": 8, **options})
    return deepcluster.Method(Backbone(feature_dim), info, options).double().train()


def extract_of(world):
    def extract(network, augmented=False, training=False):
        own = torch.arange(world.rank_info.rank, IMAGES, world.rank_info.world_size)
        with torch.no_grad():
            return Rows(own, network(PIXELS[own]))

    return extract


def start_epoch(world, method, step=0):
    method = copy.deepcopy(method)
    method.before_step(Clock(step, 4, 16), extract_of(world), world)
    return method


def test_only_the_start_of_an_epoch_makes_labels():
    world = one_process()
    for step in range(8):
        method = make()
        before, last = method.labels.of_images.clone(), method.head[-1].weight.detach().clone()
        redrawn = method.before_step(Clock(step, 4, 16), extract_of(world), world)
        is_due = step in (0, 4)
        assert [id(p) for p in redrawn] == [id(p) for p in method.head[-1].parameters()] * is_due
        assert torch.equal(method.labels.of_images, before) == (not is_due)
        assert torch.equal(method.head[-1].weight, last) == (not is_due)


def test_the_last_layer_is_drawn_small_and_anew_for_every_epoch():
    drawn = []
    for epoch in (0, 0, 1):
        method = make(hidden=2000)
        method.head[-1].bias.data.fill_(3)
        weight, bias = method.draw_last_layer(epoch)
        assert not bias.any()
        assert weight.std().item() == pytest.approx(0.01, rel=0.05) and abs(weight.mean().item()) < 4e-4
        assert 0.03 < weight.abs().max() < 0.06
        drawn.append(weight.detach().clone())
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_any_number_of_ranks_makes_the_same_labels_and_weights(size):
    untrained = make()
    [alone] = thread_world.run(lambda world: start_epoch(world, untrained))
    for method in thread_world.run(lambda world: start_epoch(world, untrained), Grid(size, 1)):
        for name, expected in alone.state_dict().items():
            torch.testing.assert_close(method.state_dict()[name], expected, rtol=1e-9, atol=0, msg=name)
    sizes = alone.labels.sizes(0)
    assert sizes.sum() == IMAGES and sizes.min() > 0
    torch.testing.assert_close(alone.weight, 1 - sizes.double() / IMAGES)
    assert 0 < alone.distance < 2


def test_epochs_are_clustered_with_keys_of_their_own():
    labels = [start_epoch(one_process(), make(), step).labels.of_images for step in (0, 4)]
    assert not torch.equal(*labels)


def test_wide_features_are_halved(monkeypatch):
    monkeypatch.setattr(deepcluster, "WIDE_FEATURES", 6)
    assert make().components == 3
    assert make(feature_dim=5).components == 5
    assert make(components=4).components == 4
    rows = Rows(torch.arange(IMAGES), torch.randn(IMAGES, 6))
    clustered = []
    monkeypatch.setattr(deepcluster, "kmeans", lambda x, *_: clustered.append(x) or (torch.zeros(IMAGES).long(), 0.0))
    make(components=4).cluster(rows, 0, one_process())
    assert clustered[0].shape == (IMAGES, 4)


# ---------------------------------------------------------------------------------------------------- loss


def test_the_loss_is_that_of_the_loop():
    torch.manual_seed(0)
    logits, labels, weight = torch.randn(9, 4).double(), torch.randint(0, 4, (9,)), torch.rand(4).double()
    total, weights = deepcluster.weighted_cross_entropy(logits, labels, weight)
    terms = []
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        p = [math.exp(v) for v in row]
        terms.append((-math.log(p[label] / sum(p)), weight[label].item()))
    assert weights.item() == pytest.approx(sum(w for _, w in terms), rel=1e-12)
    assert total.item() == pytest.approx(sum(w * loss for loss, w in terms), rel=1e-12)


@pytest.mark.parametrize("size", [2, 3])
def test_the_loss_of_several_ranks_is_that_of_one(size):
    """The weights of a rank's images differ from those of another's: means of means would be wrong."""
    positions, untrained = torch.arange(12) * 4, make()

    def step(world):
        method = start_epoch(world, untrained)
        method.head.eval()  # its BatchNorm is not synchronised here
        low, high = world.share(len(positions))
        own = positions[low:high]
        output = method(Batch([PIXELS[own][None]], [torch.zeros(1).long()], own, None, own, 0), world)
        output.loss.backward()
        return output, {name: p.grad for name, p in method.named_parameters()}

    [(alone, gradients)] = thread_world.run(step)
    several = thread_world.run(step, Grid(size, 1))
    assert sum(output.loss.item() for output, _ in several) / size == pytest.approx(alone.loss.item(), rel=1e-12)
    for name, expected in gradients.items():
        mean = sum(g[name] for _, g in several) / size
        torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-12 * float(expected.abs().max()))
    for output, _ in several:
        for name, value in output.metrics.items():
            assert float(value) == pytest.approx(float(alone.metrics[name]), rel=1e-9), name


# ---------------------------------------------------------------------------------------------------- options


def test_ten_clusters_for_every_class():
    assert make(clusters=None, num_classes=3).num_clusters == 30
    assert make(clusters=7, num_classes=3).num_clusters == 7


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clusters": None}, "clusters = null: .*no classes"),
        ({"clusters": 1}, "clusters = 1: "),
        ({"clusters": None, "num_classes": 5}, f"clusters = 50: .*{IMAGES}"),
        ({"components": 7}, "components = 7: .*features, 6"),
        ({"num_images": 6}, "components = 6: .*fewer components"),
        ({"batch_size": 1}, "optim.batch_size = 1: "),
    ],
)
def test_what_makes_no_sense_is_refused(options, words):
    with pytest.raises(UserError, match=words):
        make(**options)
