"""RotationNet: the turns against index arithmetic, its step and that of SeLa's retraining on any number of ranks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssl_dist import methods
from ssl_dist.distributed.world import one_process
from ssl_dist.errors import UserError
from ssl_dist.grid import Grid
from ssl_dist.methods import rotation, supervised
from ssl_dist.methods.base import Info
from ssl_dist.nn.layers import KeyedDropout
from tests import grids

EXACT = {"rtol": 1e-9, "atol": 1e-12}
CASES = [(Grid(1, 1), 1), (Grid(2, 1), 1), (Grid(3, 1), 1), (Grid(1, 1), 4), (Grid(1, 2), 4), (Grid(3, 4), 4)]


class Backbone(nn.Module):
    """Distinguishes turns, and one image of the batch from another only by its BatchNorm."""

    feature_dim = 6

    def __init__(self, dropout=0.0):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.dropout = KeyedDropout(dropout, 0) if dropout else nn.Identity()

    def forward(self, x):
        return self.dropout(F.relu(self.bn(self.conv(x))).flatten(2).max(2).values)


def make(module, dtype=torch.float64, num_classes=4, dropout=0.0, num_views=1, **options):
    torch.manual_seed(0)
    info = Info(100, num_classes, ((num_views, 5),), 6, 1.0, Backbone.feature_dim)
    return module.Method(Backbone(dropout), info, module.Options(**options)).to(dtype).train()


def images(dtype=torch.float64, num_views=1):
    return torch.randn(num_views, 6, 3, 5, 5, dtype=dtype, generator=torch.Generator().manual_seed(1))


LABELS = torch.tensor([0, 3, 1, 1, 2, 0])


def slow_turns(image):
    """Row r, column c of a quarter turn counter-clockwise shows row c, column S - 1 - r."""
    side = image.shape[-1]
    turned = torch.empty_like(image)
    for r in range(side):
        for c in range(side):
            turned[:, r, c] = image[:, c, side - 1 - r]
    return turned


def reference(method, batch, labels=None):
    """Loss and gradients of one process with the passes and means written out."""
    method = copy.deepcopy(method)
    turns = [list(batch.flatten(0, 1))]
    for _ in range(3):
        turns.append([slow_turns(image) for image in turns[-1]])
    h = method.backbone(torch.stack([image for turn in turns for image in turn]))
    n = len(turns[0])
    if isinstance(method, rotation.Method):
        parts = {"rotation": -method.classifier(h).log_softmax(1)[torch.arange(4 * n), torch.arange(4 * n) // n].mean()}
    else:
        turn = -method.rotation_classifier(h).log_softmax(1)[torch.arange(4 * n), torch.arange(4 * n) // n].mean()
        parts = {
            "labels": -method.classifier(h[:n]).log_softmax(1)[torch.arange(n), labels.repeat(len(batch))].mean(),
            "rotation": turn,
        }
    loss = sum(parts.values())
    loss.backward()
    return loss.detach(), parts, h[: batch.shape[1]].detach(), grids.gradients(method), dict(method.named_buffers())


def test_turns_are_counter_clockwise():
    image = torch.arange(9.0).view(1, 1, 3, 3)
    assert rotation.quarter_turns(image)[1, 0, 0].tolist() == [[2, 5, 8], [1, 4, 7], [0, 3, 6]]
    batch = images()
    turned = rotation.quarter_turns(batch[0])
    for turn in range(3):
        for image, after in zip(turned[turn], turned[turn + 1], strict=True):
            assert torch.equal(slow_turns(image), after)


@pytest.mark.parametrize(("grid", "num_views"), CASES, ids=str)
def test_any_number_of_ranks_equals_one(grid, num_views):
    method, batch = make(rotation, num_views=num_views), images(num_views=num_views)
    loss, _, upright, gradients, buffers = reference(method, batch)
    result = grids.run(method, grid, batch)
    _compare(result, loss, upright, gradients, buffers)


@pytest.mark.parametrize(("grid", "num_views"), CASES, ids=str)
def test_retraining_on_labels_and_turns(grid, num_views):
    method, batch = make(supervised, rotation=True, num_views=num_views), images(num_views=num_views)
    loss, parts, upright, gradients, buffers = reference(method, batch, LABELS)
    result = grids.run(method, grid, batch, labels=LABELS)
    _compare(result, loss, upright, gradients, buffers)
    for output in result.outputs:
        for name, part in parts.items():
            torch.testing.assert_close(output.metrics[f"loss_{name}"], part.detach(), **EXACT)


def _compare(result, loss, upright, gradients, buffers):
    grids.assert_equal(result, loss, gradients, buffers, EXACT)
    for output in result.outputs:
        torch.testing.assert_close(output.representations, upright, **EXACT)
        assert torch.equal(output.metrics["accuracy"], result.outputs[0].metrics["accuracy"])


@pytest.mark.parametrize("module", [rotation, supervised])
def test_every_turn_has_a_dropout_mask_of_its_own(module):
    """Each turn of an image has a mask of its own, and any number of ranks has the same ones."""
    method = make(module, dropout=0.5, num_views=2, **({"rotation": True} if module is supervised else {}))
    batch = images(num_views=2)
    one, three = (grids.run(method, grid, batch, labels=LABELS) for grid in (Grid(1, 1), Grid(3, 2)))
    torch.testing.assert_close(one.loss, three.loss, **EXACT)
    plain = torch.rand(1, 12, 3, 1, 1, dtype=torch.float64).expand(2, -1, -1, 5, 5)  # looks the same from all sides
    h = method.represent(grids.batch_of(plain))[0]
    assert len({tuple(of_turn.flatten().tolist()) for of_turn in h}) == len(h) == 8
    assert torch.equal(
        *make(module, **({"rotation": True} if module is supervised else {})).represent(grids.batch_of(plain))[0][:2]
    )


def test_accuracy_counts_every_turn():
    method = make(rotation)
    with torch.no_grad():
        method.classifier.weight.zero_()
        method.classifier.bias.copy_(torch.tensor([0.0, 0.0, 1.0, 0.0]))
    output = method(grids.batch_of(images()), one_process())
    assert float(output.metrics["accuracy"]) == 25


def test_it_learns_turns():
    torch.manual_seed(0)
    method = make(rotation, torch.float32)
    adam = torch.optim.Adam(method.parameters(), 1e-2)
    picture = torch.randn(1, 1, 3, 5, 5)
    for _ in range(80):
        adam.zero_grad()
        output = method(grids.batch_of(picture + 0.1 * torch.randn(1, 8, 3, 5, 5)), one_process())
        output.loss.backward()
        adam.step()
    assert output.metrics["accuracy"] > 90


def test_options():
    assert methods.build_options(rotation.Method, {}) == rotation.Options()
    assert "512 images" in grids.explained(rotation, 1, 128, 4)["rotations"]
    with pytest.raises(UserError, match=r"method\.options\.x"):
        methods.build_options(rotation.Method, {"x": 1})
