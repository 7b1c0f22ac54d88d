"""The CPU twin of SyncBatchNorm against nn.BatchNorm on the whole batch in float64; ranks are threads."""

import copy
import io
import pickle

import pytest
import torch
from timm import create_model
from timm.layers import BatchNormAct2d, EvoNorm2dB0, FrozenBatchNormAct2d, GroupNormAct
from timm.layers.inplace_abn import InplaceAbn
from timm.layers.split_batchnorm import SplitBatchNorm2d
from torch import nn

from ssl_dist.distributed.world import one_process
from ssl_dist.errors import UserError
from ssl_dist.grid import Grid
from ssl_dist.nn.batchnorm import SyncBatchNorm, global_moments, refuse_others, synchronize, update_running
from ssl_dist.nn.batchnorm_cuda import CudaSyncBatchNorm
from ssl_dist.nn.layers import KeyedDropout, key_dropout, keyed_rows
from ssl_dist.nn.shapes import without_values
from tests import thread_world
from tests.pretended_cuda import CUDA_ONLY
from tests.thread_world import ALONE, among


def twin_of(reduce, gather):
    return lambda layer: SyncBatchNorm(layer, reduce, gather)


@pytest.mark.parametrize(
    ("shape", "channels_last"), [((6, 4), False), ((6, 4, 7), False), ((6, 4, 5, 5), False), ((6, 4, 5, 5), True)]
)
def test_one_rank_equals_torch(shape, channels_last):
    torch.manual_seed(0)
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)]
    theirs = kind(4).double()
    nn.init.normal_(theirs.weight)
    nn.init.normal_(theirs.bias)
    copy = kind(4).double()
    copy.load_state_dict(theirs.state_dict())
    ours = SyncBatchNorm(copy, *ALONE)
    x = torch.randn(shape, dtype=torch.float64) * 3 + 100
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    weight = torch.randn(shape, dtype=torch.float64)
    expected, actual = theirs(a), ours(b)
    # Torch computes x scale + offset: with a mean of 33 std, it loses as many units itself.
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert actual.stride() == expected.stride()
    (expected * weight).sum().backward()
    (actual * weight).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-10)
    for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-10)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-12, atol=0)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x))


SHAPES = {
    "matrix": lambda: torch.randn(3000, 6),
    "long": lambda: torch.randn(64, 6, 50),
    "contiguous": lambda: torch.randn(64, 6, 16, 16),
    "channels_last": lambda: torch.randn(64, 6, 16, 16).to(memory_format=torch.channels_last),
}


def make(layout, dtype, centre):
    """Input, the output's gradient, and a BatchNorm, for a mean of `centre` standard deviations."""
    torch.manual_seed(0)
    x, grad = SHAPES[layout](), SHAPES[layout]()
    layer = nn.BatchNorm1d(6) if x.dim() < 4 else nn.BatchNorm2d(6)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return (x + centre).to(dtype), (grad + 0.1).to(dtype), layer.to(dtype)


def step(layer, x, grad):
    """Output, gradients of input, weight and bias, running mean and variance, after a step of a copy of `layer`."""
    layer, x = copy.deepcopy(layer), x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x)
    y.backward(grad)
    return y.detach(), x.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var


@pytest.mark.parametrize("layout", SHAPES)
@pytest.mark.parametrize("centre", [0.0, 3.0, 1e4])
def test_float32_is_float64_rounded(layout, centre):
    """Torch's own is up to 1e-3 off for channels_last, and for a mean of 1e4 std in every layout."""
    x, grad, layer = make(layout, torch.float32, centre)
    ours = step(SyncBatchNorm(copy.deepcopy(layer), *ALONE), x, grad)
    theirs = step(copy.deepcopy(layer).double(), x.double(), grad.double())
    for actual, expected in zip(ours, theirs, strict=True):
        assert actual.dtype == torch.float32
        # 1e-7 is one rounding to float32. At 1e4, float64's reference is itself 1e4 of its units off.
        torch.testing.assert_close(actual.double(), expected, rtol=1e-7, atol=1e-7 if centre < 1e3 else 1e-6)


@pytest.mark.parametrize(("dtype", "accuracy"), [(torch.float32, 1.2e-7), (torch.float64, 1e-13)], ids=str)
@pytest.mark.parametrize("layout", SHAPES)
@pytest.mark.parametrize("centre", [0.0, 1e4])
def test_the_split_over_ranks_does_not_show(layout, dtype, accuracy, centre):
    x, grad, layer = make(layout, dtype, centre)
    moments = global_moments(x, ALONE[1])
    y, grad_x, grad_weight, grad_bias, *running = step(SyncBatchNorm(copy.deepcopy(layer), *ALONE), x, grad)
    for bounds in ([0, 20, len(x)], [0, 0, 1, 33, len(x)]):

        def rank(world, bounds=bounds):
            mine = slice(*bounds[world.rank_info.rank :][:2])
            twin = SyncBatchNorm(copy.deepcopy(layer), *among(world))
            return global_moments(x[mine], world.gather), step(twin, x[mine], grad[mine])

        everything = thread_world.run(rank, Grid(len(bounds) - 1, 1))
        for theirs, _ in everything:
            for actual, expected in zip(theirs, moments, strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)
        parts = list(zip(*(results for _, results in everything), strict=True))
        # Per unit of the mean in std, float64 loses one of its units.
        close = {"rtol": accuracy, "atol": accuracy * (1 + centre) if dtype == torch.float64 else accuracy}
        torch.testing.assert_close(torch.cat(parts[0]), y, **close)
        torch.testing.assert_close(torch.cat(parts[1]), grad_x, **close)
        size = len(grad.movedim(1, -1).flatten(0, -2)) ** 0.5  # of a sum of numbers of size 1
        for actual, expected in ((sum(parts[2]), grad_weight), (sum(parts[3]), grad_bias)):
            torch.testing.assert_close(actual, expected, rtol=2 * accuracy, atol=2 * close["atol"] * size)
        for theirs, expected in zip(parts[4:], running, strict=True):
            for actual in theirs:
                torch.testing.assert_close(actual, expected, rtol=accuracy, atol=accuracy)


def test_what_is_exchanged_is_float64_and_a_step_is_reproducible():
    x, grad, layer = make("channels_last", torch.float32, 1.0)
    dtypes = []

    def noting(collective):
        return lambda sums: [dtypes.append(sums.dtype), collective(sums)][1]

    twin = SyncBatchNorm(layer, *map(noting, ALONE))
    first = step(twin, x, grad)
    assert dtypes == [torch.float64] * 2  # one exchange forward, one backward
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        assert all(torch.equal(a, b) for a, b in zip(step(twin, x, grad), first, strict=True))


@pytest.mark.parametrize("layout", SHAPES)
def test_the_output_may_be_changed_in_place(layout):
    x, grad, layer = make(layout, torch.float64, 0.0)
    twin = SyncBatchNorm(layer, *ALONE)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.relu_(twin(a)).backward(grad)
    torch.relu(twin(b)).backward(grad)
    assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize(("momentum", "affine"), [(None, True), (0.3, False)])
def test_options_of_torch(momentum, affine):
    theirs = nn.BatchNorm2d(4, eps=0.1, momentum=momentum, affine=affine).double()
    ours = SyncBatchNorm(copy.deepcopy(theirs), *ALONE)
    for _ in range(3):
        a = (torch.randn(6, 4, 3, 3, dtype=torch.float64) * 2 + 1).requires_grad_()
        b = a.detach().clone().requires_grad_()
        (theirs(a) ** 3).sum().backward()
        (ours(b) ** 3).sum().backward()
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-9, atol=1e-10)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-12, atol=0)


def test_update_running_takes_an_int_count():
    layer = nn.BatchNorm1d(2)
    update_running(layer, torch.tensor([1.0, 2.0]).double(), torch.tensor([3.0, 4.0]).double(), 5)
    torch.testing.assert_close(layer.running_mean, torch.tensor([0.1, 0.2]))
    torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * torch.tensor([3.0, 4.0]) * 5 / 4)
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), "torch"])
def test_a_copy_is_independent(clone):
    if clone == "torch":

        def clone(module):
            file = io.BytesIO()
            torch.save(module, file)
            return torch.load(io.BytesIO(file.getvalue()), weights_only=False)

    net = synchronize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), twin_of(*among(one_process())))
    other = clone(net).double().to(memory_format=torch.channels_last)
    before = copy.deepcopy(net.state_dict())
    other(torch.randn(2, 3, 8, 8, dtype=torch.float64)).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert other[1].num_batches_tracked == 1 and other[1].running_mean.dtype == torch.float64
    assert net[1].weight.grad is None and other[1].weight.grad is not None
    net.load_state_dict(other.state_dict())
    assert net[1].num_batches_tracked == 1


def test_a_deep_copy_uses_the_same_ranks():
    """Copying a bound method copies its object; a world of threads cannot even be copied."""

    def rank(world):
        net = synchronize(nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2)), twin_of(*among(world)))
        other = copy.deepcopy(net)
        other(torch.full((1, 2), float(world.rank_info.rank)))
        return other[0].reduce.__self__ is world, other[0].running_mean.tolist()

    assert thread_world.run(rank, Grid(2, 1)) == [(True, pytest.approx([0.05, 0.05]))] * 2


def test_wrong_inputs_are_refused_as_torch_does():
    ours = SyncBatchNorm(nn.BatchNorm1d(4), *ALONE)
    for shape, message in (((4,), "dimensions"), ((5, 1), "channels"), ((1, 4), "more than 1 value")):
        with pytest.raises(ValueError, match=message):
            ours(torch.randn(shape))
    assert ours.num_batches_tracked == 0


def test_layers_without_a_twin_stay_and_are_refused_for_many_ranks():
    class Gated(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).sigmoid()

    untracked = BatchNormAct2d(4, track_running_stats=False)
    others = [EvoNorm2dB0(4), InplaceAbn(4), nn.InstanceNorm2d(4, track_running_stats=True), nn.SyncBatchNorm(4)]
    for layer in (Gated(4), nn.BatchNorm2d(4, track_running_stats=False), untracked, SplitBatchNorm2d(4), *others):
        net = nn.Sequential(layer)
        assert synchronize(net, twin_of(*ALONE))[0] is layer
        with pytest.raises(UserError, match=rf"its layer 0 \({type(layer).__name__}\) cannot be synchronised"):
            refuse_others(net)
    refuse_others(nn.Sequential(FrozenBatchNormAct2d(4), GroupNormAct(4, 2), nn.InstanceNorm2d(4)))
    assert isinstance(synchronize(nn.BatchNorm2d(4), twin_of(*ALONE)), SyncBatchNorm)


def test_synchronize_replaces_every_batchnorm_and_keeps_the_keys():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), nn.BatchNorm2d(4))
    keys, parameters = list(net.state_dict()), list(net.parameters())
    synchronize(net, twin_of(*ALONE))
    assert list(net.state_dict()) == keys
    assert all(p is q for p, q in zip(net.parameters(), parameters, strict=True))
    assert [type(m).__name__ for m in net.modules()].count("SyncBatchNorm") == 2


def test_bf16_input_keeps_float32_statistics():
    ours = SyncBatchNorm(nn.BatchNorm2d(4), *ALONE)
    x = (torch.randn(8, 4, 3, 3) + 5).bfloat16().requires_grad_()
    out = ours(x)
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16 and x.grad.dtype == torch.bfloat16
    assert ours.running_mean.dtype == torch.float32 and ours.weight.grad.dtype == torch.float32


def test_an_empty_share_adds_nothing():
    mean, var, count = global_moments(torch.empty(0, 3), lambda x: torch.stack([x, torch.full_like(x, 2.0)]))
    assert torch.isfinite(mean).all() and torch.isfinite(var).all() and count == 2


# ---------------------------------------------------------------------------------------------------- of timm

TIMM = {
    "relu": lambda: BatchNormAct2d(4),  # in place
    "silu": lambda: BatchNormAct2d(4, act_layer="silu", momentum=None),
    "prelu": lambda: BatchNormAct2d(4, act_layer=nn.PReLU),  # which has a parameter
    "none": lambda: BatchNormAct2d(4, apply_act=False, affine=False),
}


@pytest.mark.parametrize("kind", TIMM)
def test_an_activation_inside_is_kept(kind):
    torch.manual_seed(0)
    theirs = TIMM[kind]().double()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter))
    ours = synchronize(copy.deepcopy(theirs), twin_of(*ALONE))
    assert isinstance(ours, SyncBatchNorm)
    for mode in (True, True, False):
        a = torch.randn(6, 4, 5, 5, dtype=torch.float64).requires_grad_()
        b = a.detach().clone().requires_grad_()
        expected, actual = theirs.train(mode)(a), ours.train(mode)(b)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        (expected**3).sum().backward(), (actual**3).sum().backward()
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-9, atol=1e-10)
        for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-10)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-12, atol=0)


def test_dropout_inside_is_keyed():
    layer = BatchNormAct2d(4, drop_layer=lambda: nn.Dropout(0.5))
    net = nn.Sequential(layer)
    key_dropout(net)
    twin = synchronize(net, twin_of(*ALONE))[0]
    assert isinstance(twin.drop, KeyedDropout)
    with keyed_rows(torch.arange(3)):
        x = torch.randn(3, 4, 5, 5)
        assert torch.equal(twin(x.clone()), torch.relu(twin.drop(twin._normalize(x))))


# The smallest network of every family of timm 1.0.31 in which there is one of them.
OF_FAMILIES = [
    "halonet_h1", "test_byobnet", "cs3darknet_focus_s", "cspnext_tiny", "densenet121", "dpn48b",
    "efficientformerv2_s0", "test_efficientnet", "fastvit_t8", "ghostnet_050", "hardcorenas_b",
    "inception_resnet_v2", "inception_v3", "inception_v4", "lcnetv2_small", "test_coatnet", "lcnet_035",
    "mobilevit_xxs", "nasnetalarge", "pnasnet5large", "regnetx_002", "repghostnet_050", "resnetv2_18", "rexnet_100",
    "skresnet18", "tresnet_m", "ese_vovnet19b_slim_dw", "xception41p",
]  # fmt: skip


@pytest.mark.parametrize("name", OF_FAMILIES)
def test_every_family_is_synchronised(name):
    with without_values():
        net = create_model(name, num_classes=0)
    keys, count = list(net.state_dict()), sum(isinstance(layer, nn.BatchNorm2d) for layer in net.modules())
    assert any(isinstance(layer, BatchNormAct2d) for layer in net.modules())
    refuse_others(net)
    synchronize(net, twin_of(*ALONE))
    assert list(net.state_dict()) == keys
    assert sum(isinstance(layer, SyncBatchNorm) for layer in net.modules()) == count
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in net.modules())


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_network_on_several_ranks_is_that_of_one(num_ranks):
    torch.manual_seed(0)
    net = create_model("test_efficientnet", num_classes=0).double().train()
    x = torch.randn(8, 3, 32, 32, dtype=torch.float64)

    def results(net, x):
        (net(x) ** 2).sum().backward()
        return [p.grad for p in net.parameters()], [b.double() for b in net.buffers()]

    def rank(world):
        own = synchronize(copy.deepcopy(net), twin_of(*among(world)))
        return results(own, x.chunk(num_ranks)[world.rank_info.rank])

    everything = thread_world.run(rank, Grid(num_ranks, 1))
    gradients, buffers = results(net, x)
    largest = max(float(gradient.abs().max()) for gradient in gradients)  # that of a bias before another one is 0
    for expected, *shares in zip(gradients, *(of_rank[0] for of_rank in everything), strict=True):
        torch.testing.assert_close(sum(shares), expected, rtol=1e-9, atol=1e-13 * largest)
    for _, of_rank in everything:
        torch.testing.assert_close(of_rank, buffers, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------------------------- on GPUs


@pytest.fixture
def cuda_kernels(monkeypatch):
    """torch's kernels of BatchNorm for GPUs, which work on tensors of the CPU."""
    for name, kernel in CUDA_ONLY.items():
        monkeypatch.setattr(torch, name, kernel)


@pytest.mark.parametrize(("momentum", "affine"), [(0.1, True), (None, True), (0.3, False)])
@pytest.mark.parametrize(
    ("kind", "shape"), [(nn.BatchNorm1d, (12, 4)), (nn.BatchNorm2d, (12, 4, 5, 5)), (BatchNormAct2d, (12, 4, 5, 5))]
)
def test_the_twin_for_gpus_equals_that_of_the_cpu(kind, shape, momentum, affine, cuda_kernels):
    torch.manual_seed(0)
    layer = kind(4, momentum=momentum, affine=affine).double()
    if affine:
        nn.init.normal_(layer.weight)
    x, grad = torch.randn(shape, dtype=torch.float64) * 3 + 20, torch.randn(shape, dtype=torch.float64)

    def results(twin, x, grad):
        x = x.clone().requires_grad_()
        for _ in range(2):
            y = twin.train()(x)
        y.backward(grad)
        gradients = [p.grad for p in twin.parameters()]
        return y.detach(), x.grad, gradients, list(twin.buffers())

    def rank(world):
        mine = slice(4 * world.rank_info.rank, 4 * world.rank_info.rank + 4)
        twins = [kind(copy.deepcopy(layer), *among(world)) for kind in (CudaSyncBatchNorm, SyncBatchNorm)]
        return [results(copy.deepcopy(twin), x[mine], grad[mine]) for twin in twins]

    for ours, cpus in thread_world.run(rank, Grid(3, 1)):
        torch.testing.assert_close(ours, cpus, rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------------------------------------------- torch.compile


def twins(layer):
    return [SyncBatchNorm(layer, *ALONE), CudaSyncBatchNorm(layer, *ALONE)]


@pytest.mark.parametrize("number", [0, 1], ids=["cpu", "cuda"])
@pytest.mark.parametrize(("affine", "momentum"), [(True, 0.1), (False, None)])
def test_a_graph_does_not_end_at_a_twin(number, affine, momentum, cuda_kernels):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), twins(nn.BatchNorm2d(4, affine=affine, momentum=momentum))[number], nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3), twins(nn.BatchNorm2d(4))[number], nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3), twins(BatchNormAct2d(4))[number],
    ).to(memory_format=torch.channels_last)  # fmt: skip
    traced, x = copy.deepcopy(net), torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    compiled = torch.compile(traced, backend="aot_eager", fullgraph=True)
    for call in (net, compiled, net, compiled):  # twice each: the running statistics go on
        call(x).square().sum().backward()
    for expected, found in zip(net.parameters(), traced.parameters(), strict=True):
        assert torch.equal(found.grad, expected.grad)
    for expected, found in zip(net.buffers(), traced.buffers(), strict=True):
        assert torch.equal(found, expected)


def test_all_ranks_that_a_twin_asks_can_be_others():
    """`ViewColumns` and copies know them by the names in `collectives`."""
    for twin in twins(nn.BatchNorm2d(4)):
        assert {name for name, value in vars(twin).items() if callable(value)} == set(twin.collectives)
