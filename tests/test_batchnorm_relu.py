"""BatchNorm, sum, ReLU and pooling as one operation, against the layers one after the other."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ssl_dist import backbones
from ssl_dist.grid import Grid
from ssl_dist.nn import batchnorm_relu as module
from ssl_dist.nn.batchnorm import SyncBatchNorm, ViewColumns, one_view, synchronize
from ssl_dist.nn.batchnorm_cuda import CudaSyncBatchNorm
from ssl_dist.nn.batchnorm_relu import batchnorm_relu
from tests import thread_world
from tests.thread_world import ALONE, among

F32, F64 = torch.float32, torch.float64
SHAPES = [(6, 8, 32, 32), (3, 5, 7, 9), (2, 3, 2, 2), (4, 300, 5, 4), (2, 8, 33, 64), (700, 16, 16, 16), (5, 1, 3, 2)]
TAILS = {"relu": (False, False), "sum": (True, False), "pooling": (False, True)}
CLOSE = {F32: {"rtol": 2e-7, "atol": 2e-7}, F64: {"rtol": 1e-14, "atol": 1e-13}}


def apart(layer, x, added=None, pooled=False):
    """The layers one after the other."""
    y = layer(x)
    y = torch.relu(y if added is None else y + added)
    return F.avg_pool2d(y, 2) if pooled else y


def make(shape, tail, dtype):
    """Layer, x, what is added, and the gradient of the output."""
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(shape[1]).to(dtype)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    x, added, grad = ((torch.randn(shape) + 0.3).to(dtype, memory_format=torch.channels_last) for _ in range(3))
    with_sum, pooled = TAILS[tail]
    return layer, x, added if with_sum else None, F.avg_pool2d(grad, 2) if pooled else grad


def step(operation, layer, x, added, grad, pooled, collectives=ALONE):
    """Output, gradients and running statistics of a step of a copy of `layer`."""
    twin = SyncBatchNorm(copy.deepcopy(layer), *collectives)
    x, added = (None if t is None else t.detach().clone().requires_grad_() for t in (x, added))
    out = operation(twin, x, added, pooled)
    out.backward(grad)
    results = [out.detach(), x.grad, twin.weight.grad, twin.bias.grad, *twin.buffers()]
    return results if added is None else [*results, added.grad]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_it_is_what_the_layers_compute(shape, tail, dtype, monkeypatch):
    layer, x, added, grad = make(shape, tail, dtype)
    expected = step(apart, layer, x, added, grad, TAILS[tail][1])
    monkeypatch.setattr(F, "relu", None)  # the layers one after the other would call it
    actual = step(batchnorm_relu, layer, x, added, grad, TAILS[tail][1])
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE[dtype])
        assert one.dim() < 4 or one.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("tail", TAILS)
def test_the_number_of_threads_does_not_show(tail):
    layer, x, added, grad = make((700, 8, 32, 32), tail, F32)
    before, results = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            results.append(step(batchnorm_relu, layer, x, added, grad, TAILS[tail][1]))
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


@pytest.mark.parametrize("tail", TAILS)
def test_the_split_over_ranks_does_not_show(tail):
    layer, x, added, grad = make((31, 6, 8, 8), tail, F64)
    pooled = TAILS[tail][1]
    out, grad_x, grad_weight, grad_bias, *others = step(batchnorm_relu, layer, x, added, grad, pooled)
    bounds = [0, 7, 8, 31]

    def rank(world):
        mine = slice(*bounds[world.rank_info.rank :][:2])
        of_mine = (None if t is None else t[mine] for t in (x, added, grad))
        return step(batchnorm_relu, layer, *of_mine, pooled, among(world))

    parts = list(zip(*thread_world.run(rank, Grid(3, 1)), strict=True))
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(torch.cat(parts[0]), out, **close)
    torch.testing.assert_close(torch.cat(parts[1]), grad_x, **close)
    torch.testing.assert_close(sum(parts[2]), grad_weight, **close)
    torch.testing.assert_close(sum(parts[3]), grad_bias, **close)
    for theirs, expected in zip(parts[4:6], others[:2], strict=True):
        assert all(torch.allclose(one, expected, rtol=1e-12) for one in theirs)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_diverges_shows(tail, value):
    layer, x, added, grad = make((4, 3, 4, 4), tail, F32)
    x[1, 2, 3, 3] = value
    out, grad_x, grad_weight, *_ = step(batchnorm_relu, layer, x, added, grad, TAILS[tail][1])
    assert out[:, 2].isnan().any() and grad_x[:, 2].isnan().any() and grad_weight[2].isnan()
    assert out[:, :2].isfinite().all() and grad_x[:, :2].isfinite().all()


def test_the_gradient_is_that_of_finite_differences():
    layer, x, added, _ = make((3, 2, 4, 5), "sum", F64)
    for tail in TAILS:
        with_sum, pooled = TAILS[tail]
        twin = SyncBatchNorm(copy.deepcopy(layer), *ALONE)
        twin.momentum = 0.0
        inputs = x.clone().requires_grad_(), added.clone().requires_grad_()
        torch.autograd.gradcheck(
            lambda x, added, twin=twin, s=with_sum, p=pooled: batchnorm_relu(twin, x, added if s else None, p), inputs
        )


OTHERS = {
    "torch's": lambda layer: layer,
    "in evaluation": lambda layer: SyncBatchNorm(layer, *ALONE).eval(),
    "without weight": lambda layer: SyncBatchNorm(nn.BatchNorm2d(layer.num_features, affine=False), *ALONE),
    "of a GPU": lambda layer: CudaSyncBatchNorm(layer, *ALONE),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_others_are_the_layers_one_after_the_other(kind, monkeypatch):
    layer, x, _, _ = make((3, 4, 6, 6), "relu", F32)
    monkeypatch.setattr(module, "_sweeps", None)
    layer = OTHERS[kind](layer)
    if kind == "of a GPU":
        monkeypatch.setattr(layer, "_by_moments", lambda x, normalize: x)
        torch.testing.assert_close(batchnorm_relu(layer, x), torch.relu(x))
    else:
        torch.testing.assert_close(batchnorm_relu(layer, x), apart(copy.deepcopy(layer), x))


@pytest.mark.parametrize(
    "x", [torch.randn(3, 4, 6, 6), torch.randn(3, 4, 1, 6).to(memory_format=torch.channels_last)[:, :, :, ::2]]
)
def test_so_are_other_layouts(x):
    twin = SyncBatchNorm(nn.BatchNorm2d(4), *ALONE)
    torch.testing.assert_close(batchnorm_relu(twin, x), apart(copy.deepcopy(twin), x))


@pytest.mark.parametrize("name", ["conv4", "resnet8", "resnet18_small_stem", "resnet18", "resnet50", "resnetv2_50"])
def test_a_network_trains_as_by_its_layers(name, monkeypatch):
    torch.manual_seed(0)
    images = [torch.randn(6, 3, 33, 33, dtype=F64).to(memory_format=torch.channels_last) for _ in range(3)]
    network = synchronize(backbones.build(name).double(), lambda layer: SyncBatchNorm(layer, *ALONE))
    network = network.to(memory_format=torch.channels_last)
    others, losses = copy.deepcopy(network), {}
    for kind, trained in (("one", network), ("apart", others)):
        if kind == "apart":
            monkeypatch.setattr(module, "_is_one_operation", lambda *_: False)
        optimizer = torch.optim.SGD(trained.parameters(), 0.01, 0.9)
        for batch in images:
            loss = trained(batch).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.setdefault(kind, []).append(loss.item())
    torch.testing.assert_close(losses["one"], losses["apart"], rtol=1e-8, atol=1e-10)
    assert network.state_dict().keys() == others.state_dict().keys()


def test_conv4_gives_features_and_maps_of_the_same_pass():
    network = synchronize(backbones.build("conv4"), lambda layer: SyncBatchNorm(layer, *ALONE))
    images = torch.randn(4, 3, 37, 37).to(memory_format=torch.channels_last)
    features, maps = network.forward_stages(images)
    torch.testing.assert_close(network(images), features, rtol=1e-6, atol=1e-6)
    assert [tuple(x.shape[1:]) for x in maps.values()] == [(8, 37, 37), (16, 18, 18), (32, 9, 9), (64, 4, 4)]


def test_a_view_alone_has_the_ranks_of_its_column():
    """The layer is called, so what wraps a call (`ViewColumns`) knows of it."""
    twin = SyncBatchNorm(nn.BatchNorm2d(4), *ALONE)
    columns = ViewColumns(twin, lambda layer: lambda: None)
    x = torch.randn(3, 4, 6, 6).to(memory_format=torch.channels_last)
    with one_view(0):
        batchnorm_relu(twin, x)
    assert [number for number, _, _ in columns.passes[twin]] == [0] and not twin.running_mean.any()


def test_memory_holds_no_map_in_between():
    """Of a training pass only x and the output live on: what `saved_tensors_hooks` sees is x and vectors."""
    twin, saved = SyncBatchNorm(nn.BatchNorm2d(4), *ALONE), []
    x = torch.randn(3, 4, 6, 6).to(memory_format=torch.channels_last).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        batchnorm_relu(twin, x, pooled=True)
    assert sorted(t.numel() for t in saved)[-2:] == [4, x.numel()]
