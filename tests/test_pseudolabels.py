"""Labels that a method gives the images itself."""

import math

import pytest
import torch

from ssl_dist.distributed.world import one_process
from ssl_dist.grid import Grid
from ssl_dist.nn.pseudolabels import PseudoLabels
from tests import thread_world


def test_at_first_every_cluster_has_its_share_in_an_order_of_each_heads_own():
    labels = PseudoLabels(3, 20, 8, seed=1)
    assert labels.of_images.dtype == torch.int32 and labels.of_images.shape == (3, 20)
    in_turn = torch.arange(20) % 8
    for head in range(3):
        assert torch.equal(labels.of_images[head].sort().values.long(), in_turn.sort().values)
        assert labels.sizes(head).tolist() == [3, 3, 3, 3, 2, 2, 2, 2]
    assert len({tuple(row.tolist()) for row in labels.of_images}) == 3
    assert torch.equal(labels.of_images, PseudoLabels(3, 20, 8, seed=1).of_images)
    assert not torch.equal(labels.of_images, PseudoLabels(3, 20, 8, seed=2).of_images)
    assert torch.equal(labels.of(torch.tensor([4, 0])), labels.of_images[:, [4, 0]].long())


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_rank_learns_the_labels_of_all(size):
    new = torch.tensor([[0, 0, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1, 1]])

    def replace(world):
        labels = PseudoLabels(3, 7, 3, seed=0)
        before = labels.of_images.clone()
        own = torch.arange(world.rank_info.rank, 7, size)
        labels.replace([0, 2], [new[0, own], new[1, own]], own, world)
        assert torch.equal(labels.of_images[1], before[1])
        return before, labels

    for before, labels in thread_world.run(replace, Grid(size, 1)):
        assert torch.equal(labels.of_images[[0, 2]].long(), new)
        figures = {name: float(value) for name, value in labels.metrics().items()}
        assert figures["labels_changed"] == pytest.approx(float((before[[0, 2]] != new).double().mean()))
        assert figures["cluster_min"] == 0 and figures["cluster_max"] == pytest.approx(3)  # all 7 in one of 3 clusters
        p = torch.tensor([3, 2, 2]).double() / 7
        assert figures["cluster_entropy"] == pytest.approx(float(-(p * p.log()).sum()) / math.log(3) / 2)


def test_metrics_are_state():
    labels = PseudoLabels(1, 6, 2, seed=0)
    labels.replace([0], [torch.tensor([0, 1, 0, 1, 0, 1])], torch.arange(6), one_process())
    shown = labels.metrics()
    again = PseudoLabels(1, 6, 2, seed=9)
    again.load_state_dict(labels.state_dict())
    assert again.metrics() == shown and shown["cluster_entropy"] == 1
    labels.replace([0], [torch.zeros(6).long()], torch.arange(6), one_process())
    assert shown["cluster_entropy"] == 1, "what was handed out does not change"
