"""Deep InfoMax against loops written from the paper, on one rank and on several."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssl_dist import backbones, methods
from ssl_dist.distributed.world import one_process
from ssl_dist.errors import UserError
from ssl_dist.grid import Grid
from ssl_dist.methods import infomax
from ssl_dist.methods.base import Info
from tests import grids

EXACT = {"rtol": 1e-9, "atol": 1e-12}
ALL = {"alpha": 0.5, "beta": 2.0, "gamma": 0.3}


class Backbone(nn.Module):
    """A map of 4 channels and features of 3 numbers; BatchNorm, so that the images of other ranks matter."""

    feature_dim, stages = 3, {"first": 4, "second": 9}

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.linear = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.forward_stages(x)[0]

    def forward_stages(self, x):
        first = F.relu(self.bn(self.conv(x)))
        return self.linear(first.mean((2, 3))), {"first": first, "second": first.repeat(1, 3, 1, 1)[:, :9]}


def make(dtype=torch.float64, batch_size=6, stages=Backbone.stages, seed=5, **options):
    torch.manual_seed(0)
    info = Info(100, 0, ((1, 7),), batch_size, 1.0, Backbone.feature_dim, stages=stages, seed=seed)
    return infomax.Method(Backbone(), info, infomax.Options(**({"hidden": 24} | options))).to(dtype).train()


def images(dtype=torch.float64):
    return torch.randn(1, 6, 3, 7, 7, dtype=dtype, generator=torch.Generator().manual_seed(1))


def slow_score(net, layers, x):
    for layer in layers[:-1]:
        x = F.relu(F.linear(x, getattr(net, layer).weight, getattr(net, layer).bias))
    return F.linear(x, getattr(net, layers[-1]).weight, getattr(net, layers[-1]).bias)[0]


def slow_terms(method, y, maps, drawn):
    """Pair by pair and place by place: image i with its own map, and with the map of the next image."""
    n, terms = len(y), {}
    layers = ["l0", "l1", "l2"]
    if method.options.alpha:
        net, total = method.global_net, 0.0
        for i in range(n):
            for sign, k in ((-1, i), (1, (i + 1) % n)):
                whole = net.pool(net.c1(F.relu(net.c0(maps[k : k + 1])))).flatten()
                total += F.softplus(sign * slow_score(net, layers, torch.cat([y[i], whole]))) / n
        terms["global"] = total
    if method.options.beta:
        net, total, (height, width) = method.local_net, 0.0, maps.shape[2:]
        for i in range(n):
            for sign, k in ((-1, i), (1, (i + 1) % n)):
                for h in range(height):
                    for w in range(width):
                        score = slow_score(net, layers, torch.cat([maps[k, :, h, w], y[i]]))
                        total += F.softplus(sign * score) / (n * height * width)
        terms["local"] = total
    if method.options.gamma:
        net, total = method.prior_net, 0.0
        for i in range(n):
            is_drawn, is_encoded = (torch.sigmoid(slow_score(net, layers, row[i])) for row in (drawn, y))
            total -= (is_drawn.log() + (1 - is_encoded).log()) / n
        terms["prior"] = total
    return terms


def reference(method, batch):
    method = copy.deepcopy(method)
    y, maps = method.backbone.forward_stages(batch[0])
    drawn = method.drawn(grids.batch_of(batch), y)
    terms = slow_terms(method, y, maps["first"], drawn)
    weights = {"global": method.options.alpha, "local": method.options.beta, "prior": method.options.gamma}
    loss = sum(weights[name] * term for name, term in terms.items())
    loss.backward()
    terms = {name: term.detach() for name, term in terms.items()}
    return loss.detach(), terms, grids.gradients(method), dict(method.named_buffers())


@pytest.mark.parametrize("grid", [Grid(1, 1), Grid(2, 1), Grid(3, 1), Grid(6, 1)], ids=str)
@pytest.mark.parametrize(
    "weights", [ALL, {"alpha": 0.0, "gamma": 0.0}, {"beta": 0.0, "alpha": 1.0}, {"beta": 0.0, "gamma": 1.0}], ids=str
)
def test_any_number_of_ranks_equals_the_loops(grid, weights):
    method, batch = make(**weights), images()
    loss, terms, gradients, buffers = reference(method, batch)
    alive = {name for name, gradient in gradients.items() if gradient.abs().max() > 1e-6}
    assert gradients.keys() - alive <= {"backbone.conv.bias"}, "a network of dead units would hide a fault"
    result = grids.run(method, grid, batch)
    grids.assert_equal(result, loss, gradients, buffers, EXACT)
    for output in result.outputs:
        assert output.metrics.keys() == {f"loss_{name}" for name in terms}
        assert output.representations.shape == (6, 3)
        for name, term in terms.items():
            torch.testing.assert_close(output.metrics[f"loss_{name}"], term, **EXACT)


def test_an_adversarial_prior_turns_the_gradient_of_the_backbone_round():
    grads = {}
    for prior in ("cooperative", "adversarial"):
        method = make(beta=0.0, gamma=1.0, prior=prior)
        result = grids.run(method, Grid(1, 1), images())
        grads[prior] = result.gradients, result.loss
    (one, loss), (other, same) = grads.values()
    assert torch.equal(loss, same) and loss > 0
    for name, gradient in one.items():
        sign = -1 if name.startswith("backbone.") else 1
        torch.testing.assert_close(other[name], sign * gradient, **EXACT)


def test_draws_are_functions_of_seed_step_and_image():
    method = make()
    batch = grids.batch_of(images(), images=torch.tensor([4, 9, 2, 30, 11, 7]))
    like = torch.empty(6, 40, dtype=torch.float64)
    drawn = method.drawn(batch, like)
    assert drawn.shape == (6, 40) and 0 <= drawn.min() < 0.05 and 0.95 < drawn.max() < 1
    other = grids.batch_of(images()[:, :2], images=torch.tensor([30, 4]))
    assert torch.equal(method.drawn(other, like[:2]), drawn[[3, 0]])
    later = copy.copy(batch)
    object.__setattr__(later, "step", 1)
    assert not torch.equal(method.drawn(later, like), drawn)
    assert not torch.equal(make(seed=6).drawn(batch, like), drawn)


def test_gradients_that_cancel_keep_their_digits():
    """The gradients of joint and marginal pairs nearly cancel; float32 must stay near float64 all the same."""
    torch.manual_seed(0)
    net = infomax.LocalNet(8, 4, 32)
    maps, y = torch.rand(16, 4, 32, 32), torch.rand(16, 1, 8) + 1e-2 * torch.rand(16, 2, 8)
    gradients = {}
    for dtype in (torch.float64, torch.float32):
        own = copy.deepcopy(net).to(dtype)
        infomax.jensen_shannon(own(maps.to(dtype), y.to(dtype))).backward()
        gradients[dtype] = own.l2.weight.grad.double(), own.l2.bias.grad.double()
    for exact, ours in zip(gradients[torch.float64], gradients[torch.float32], strict=True):
        assert (ours - exact).norm() < 1e-6 * exact.norm()  # 4e-7 is the worst of five seeds; by a matrix product 2e-6


def test_half_precision_is_scored_in_float32():
    method = make(torch.float32, **ALL)
    with torch.autocast("cpu", torch.bfloat16):
        output = method(grids.batch_of(images(torch.float32)), one_process())
    assert output.loss.dtype == output.representations.dtype == torch.float32
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in method.parameters())


def test_it_learns_to_tell_images_from_their_maps():
    torch.manual_seed(0)
    method = make(torch.float32, gamma=0.0, hidden=32)
    adam = torch.optim.Adam(method.parameters(), 1e-2)
    for _ in range(60):
        adam.zero_grad()
        batch = torch.randn(1, 16, 3, 1, 1).expand(-1, -1, -1, 7, 7)  # plain colours
        output = method(grids.batch_of(batch), one_process())
        output.loss.backward()
        adam.step()
    assert output.loss < 0.7, "1.39 is chance"


def test_a_term_without_weight_has_no_parameters():
    names = {name.split(".")[0] for name, _ in make(beta=0.0, gamma=1.0).named_parameters()}
    assert names == {"backbone", "prior_net"}


@pytest.mark.parametrize("name", ["conv4", "resnet8", "resnet18"])
def test_backbones_that_show_their_maps(name):
    backbone = backbones.build(name)
    info = Info(100, 0, ((1, 32),), 2, 1.0, backbone.feature_dim, stages=backbone.stages)
    method = infomax.Method(backbone, info, infomax.Options(hidden=4)).train()
    assert method(grids.batch_of(torch.randn(1, 2, 3, 32, 32)), one_process()).loss.isfinite()


def test_options_and_mistakes():
    options = methods.build_options(infomax.Method, {})
    assert (options.alpha, options.beta, options.gamma, options.hidden) == (0.0, 1.0, 0.1, 256)
    assert "128 of two a step; weights global 0, local 1" in grids.explained(infomax, 1, 128)["pairs"]
    for wrong in ({"aplha": 1.0}, {"beta": -1.0}, {"prior": "uniform"}):
        with pytest.raises(UserError, match=f"method.options.{next(iter(wrong))}"):
            methods.build_options(infomax.Method, wrong)
    with pytest.raises(UserError, match=r"optim\.batch_size = 1"):
        make(batch_size=1)
    with pytest.raises(UserError, match=r"backbone\.name.*maps"):
        make(stages={})
    with pytest.raises(UserError, match=r"method\.options\.beta = 0"):
        make(beta=0.0, gamma=0.0)
