"""Supervised classification on any number of ranks. Its recipe is in test_golden_baselines.py, `rotation` in
test_rotation.py."""

import copy

import pytest
import torch

from ssl_dist import methods
from ssl_dist.distributed.world import one_process
from ssl_dist.errors import UserError
from ssl_dist.grid import Grid
from ssl_dist.methods import supervised
from ssl_dist.methods.base import Info
from tests import grids

EXACT = {"rtol": 1e-9, "atol": 1e-12}
CASES = [(Grid(1, 1), 1), (Grid(2, 1), 1), (Grid(3, 1), 1), (Grid(1, 1), 4), (Grid(3, 2), 4)]
LABELS = torch.tensor([0, 3, 1, 1, 2, 0])


def make(dtype=torch.float64, num_classes=4, num_views=1, **options):
    torch.manual_seed(0)
    info = Info(100, num_classes, ((num_views, 32),), 6, 1.0, grids.Backbone.feature_dim)
    return supervised.Method(grids.Backbone(), info, supervised.Options(**options)).to(dtype).train()


def images(num_views=1):
    return torch.randn(num_views, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("grid", "num_views"),
    [(Grid(1, 1), 1), (Grid(2, 1), 1), (Grid(3, 1), 1), (Grid(1, 1), 4), (Grid(3, 2), 4)],
    ids=str,
)
def test_any_number_of_ranks_equals_one(grid, num_views):
    method, batch = make(num_views=num_views), images(num_views)
    one = copy.deepcopy(method)
    h = one.backbone(batch.flatten(0, 1))
    logits, labels = one.classifier(h), LABELS.tolist() * num_views
    loss = -sum(row.log_softmax(0)[label] for row, label in zip(logits, labels, strict=True)) / len(labels)
    loss.backward()
    result = grids.run(method, grid, batch, labels=LABELS)
    grids.assert_equal(result, loss.detach(), grids.gradients(one), dict(one.named_buffers()), EXACT)
    right = sum(int(row.argmax()) == label for row, label in zip(logits, labels, strict=True))
    for output in result.outputs:
        assert float(output.metrics["accuracy"]) == pytest.approx(100 * right / len(labels))
        torch.testing.assert_close(output.representations, h[:6].detach(), **EXACT)


def test_half_precision_is_scored_in_float32():
    method = make(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = method(grids.batch_of(images().float(), labels=LABELS), one_process())
    assert output.loss.dtype == output.representations.dtype == torch.float32


def test_labels_and_options():
    assert supervised.Method.needs_labels and supervised.Method.num_views == 1
    with pytest.raises(UserError, match=r"data\.split.*labels"):
        make(num_classes=0)
    assert methods.build_options(supervised.Method, {}).rotation is False
    assert not hasattr(make(), "rotation_classifier")
    with pytest.raises(UserError, match=r"method\.options\.rotate"):
        methods.build_options(supervised.Method, {"rotate": True})
