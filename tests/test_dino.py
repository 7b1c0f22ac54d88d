"""DINO against loops over images, views and outputs written from the paper; its schedules, centre and target."""

import copy
import math

import pytest
import torch

from ssl_dist import methods
from ssl_dist.clock import Clock
from ssl_dist.distributed.world import one_process
from ssl_dist.errors import UserError
from ssl_dist.grid import Grid
from ssl_dist.methods import dino
from ssl_dist.methods.base import Info
from ssl_dist.nn.layers import KeyedDropPath, target_network
from tests import grids

EXACT = {"rtol": 1e-9, "atol": 1e-12}
NUM_IMAGES = 8
GRIDS = [Grid(1, 1), Grid(2, 1), Grid(1, 2), Grid(2, 2), Grid(4, 1)]
OPTIONS = {"outputs": 7, "hidden": 6, "bottleneck": 4, "freeze_last_layer_epochs": 0}


def make(groups=((2, 32), (2, 16)), epochs=4.0, **options):
    """After a step or two: target, centre and lengths are not what they were at the start."""
    torch.manual_seed(0)
    info = Info(100, 0, groups, NUM_IMAGES, epochs, grids.Backbone.feature_dim, steps_per_epoch=5)
    method = dino.Method(grids.Backbone(), info, dino.Options(**(OPTIONS | options))).double().train()
    with torch.no_grad():
        for parameter in method.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        method.center += torch.randn_like(method.center)
    return method


def views(groups):
    generator = torch.Generator().manual_seed(1)
    shared = torch.randn(1, NUM_IMAGES, 5, dtype=torch.float64, generator=generator)
    return [
        shared + 0.4 * torch.randn(num, NUM_IMAGES, 5, dtype=torch.float64, generator=generator) for num, _ in groups
    ]


def outputs(x, backbone, head):
    """[V, M, K] of views [V, M, inputs]: equation 1 without its temperature."""
    features = backbone(x.flatten(0, 1))
    embedded = torch.stack([z / z.norm() for z in head.mlp(features)])
    weights = torch.stack([length * v / v.norm() for length, v in zip(head.length, head.direction, strict=True)])
    return (embedded @ weights.T).unflatten(0, x.shape[:2])


def slow_step(method, of_groups, large):
    """Loss with gradient (equations 1 and 3), and the centre after it (equation 4)."""
    method, options = copy.deepcopy(method), method.options
    all_views = torch.cat(of_groups)
    with torch.no_grad():
        target = outputs(all_views[large], method.target_backbone, method.target_head)
    online = outputs(all_views, method.backbone, method.head)
    total, pairs = 0.0, 0
    for g, view in enumerate(large):
        for other in range(len(all_views)):
            if other == view:
                continue
            pairs += 1
            for m in range(NUM_IMAGES):
                t = [
                    (float(o) - float(c)) / options.target_temperature
                    for o, c in zip(target[g, m], method.center, strict=True)
                ]
                norm = sum(math.exp(x) for x in t)
                scaled = online[other, m] / options.temperature
                log_norm = sum(x.exp() for x in scaled).log()
                total = total - sum(math.exp(x) / norm * (y - log_norm) for x, y in zip(t, scaled, strict=True))
    loss = total / (pairs * NUM_IMAGES)
    loss.backward()
    mean = sum(target[g, m] for g in range(len(large)) for m in range(NUM_IMAGES)) / (len(large) * NUM_IMAGES)
    center = options.center_momentum * method.center + (1 - options.center_momentum) * mean
    learnt = {name: p.grad for name, p in method.named_parameters() if p.requires_grad}
    return loss.detach(), learnt, center


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(
    ("groups", "options", "large"),
    [
        (((2, 32), (2, 16)), {}, [0, 1]),
        (((4, 32),), {"norm_last_layer": False}, [0, 1, 2, 3]),
        (((2, 16), (2, 32), (2, 32)), {"temperature": 0.2, "target_temperature": 0.5}, [2, 3, 4, 5]),
    ],
    ids=["multicrop", "one recipe", "two recipes of large views"],
)
def test_any_grid_of_ranks_equals_the_loops(grid, groups, options, large, monkeypatch):
    method, of_groups = make(groups, **options), views(groups)
    loss, learnt, center = slow_step(method, of_groups, large)
    assert method.large == large
    monkeypatch.setattr(
        grids, "gradients", lambda own: {n: p.grad.clone() for n, p in own.named_parameters() if p.requires_grad}
    )
    centers = []
    monkeypatch.setattr(dino.Method, "_entropies", _and_keep_center(dino.Method._entropies, centers))
    result = grids.run(method, grid, *of_groups)
    torch.testing.assert_close(result.loss, loss, **EXACT)
    assert result.gradients.keys() == learnt.keys()
    for name, expected in learnt.items():
        torch.testing.assert_close(result.gradients[name], expected, **EXACT, msg=lambda m, n=name: f"{n}: {m}")
    for after in centers:
        torch.testing.assert_close(after, center, **EXACT)
    assert len(centers) == grid.size
    for output in result.outputs:
        assert 0 < output.metrics["target_entropy"] <= output.metrics["usage_entropy"] <= 1
        assert output.representations.shape == (sum(num for num, _ in groups), NUM_IMAGES, 4)


def _and_keep_center(entropies, centers):
    def kept(self, *arguments):
        momentum = self.options.center_momentum
        centers.append(self.center * momentum + self._mean_output * (1 - momentum))
        return entropies(self, *arguments)

    return kept


def test_target_and_centre_follow_a_step():
    method = make()
    before = copy.deepcopy(method)
    method(grids.batch_of(*views(((2, 32), (2, 16)))), one_process())
    _, _, center = slow_step(before, views(((2, 32), (2, 16))), [0, 1])
    method.after_step(Clock(1, 5, 20))
    torch.testing.assert_close(method.center, center, **EXACT)
    for name in ("backbone.linear.weight", "head.direction", "head.mlp.0.bias"):
        old, online = (made.get_parameter(name) for made in (before, method))
        expected = 0.996 * before.get_parameter(f"target_{name}") + 0.004 * online
        torch.testing.assert_close(method.get_parameter(f"target_{name}"), expected, **EXACT)
        assert torch.equal(old, online)
    assert method.encoder() is method.target_backbone


def test_schedules():
    method = make(target_temperature_first=0.04, target_temperature=0.07, target_temperature_epochs=3)
    temperatures = [method._target_temperature(step) for step in range(20)]
    assert temperatures == pytest.approx([0.04] * 5 + [0.055] * 5 + [0.07] * 10)
    assert make(target_temperature_first=0.04, target_temperature_epochs=0)._target_temperature(0) == 0.04
    assert method._momentum(0) == pytest.approx(0.996)
    assert method._momentum(10) == pytest.approx(0.998)
    assert method._momentum(20) == 1


def test_the_last_layer_is_frozen_at_first():
    method = make(freeze_last_layer_epochs=1.5)
    frozen = [len(method.frozen(Clock(step, 5, 20))) for step in range(20)]
    assert frozen == [2] * 8 + [0] * 12  # 7.5 steps
    assert {id(p) for p in method.frozen(Clock(0, 5, 20))} == {id(method.head.direction), id(method.head.length)}


def test_a_target_has_no_stochastic_depth():
    online = torch.nn.Sequential(KeyedDropPath(0.3, 0), torch.nn.Linear(2, 2))
    target = target_network(online)
    assert (online[0].p, target[0].p) == (0.3, 0.0)
    assert not target[1].weight.requires_grad and online[1].weight.requires_grad
    assert target[1].weight is not online[1].weight and torch.equal(target[1].weight, online[1].weight)


def test_one_large_view_is_the_target_of_the_small_ones():
    method = make(((1, 32), (2, 16)))
    loss = method(grids.batch_of(*views(((1, 32), (2, 16)))), one_process()).loss
    torch.testing.assert_close(loss, slow_step(method, views(((1, 32), (2, 16))), [0])[0], **EXACT)


def test_a_single_view_is_refused():
    with pytest.raises(UserError, match=r"views.num = 1: dino compares views of an image; give 2 or more"):
        make(((1, 32),))


def test_explain():
    lines = grids.explained(dino, 4, 64, 2, outputs=1024)
    assert lines["distillation"] == "4 targets and 4 views of an image, 32 images a rank: 1.0 MiB of outputs"
    assert methods.find("dino") is dino.Method
