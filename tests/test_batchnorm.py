"""The CPU twin of SyncBatchNorm against nn.BatchNorm on the whole batch: two ranks are played by two halves."""

import pytest
import torch
from torch import nn

from ssl_dist.batchnorm import SyncBatchNorm, global_moments, synchronize


def alone(x):
    return x.clone()


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
    ours = SyncBatchNorm(copy, alone)
    x = torch.randn(shape, dtype=torch.float64) * 3 + 100
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    weight = torch.randn(shape, dtype=torch.float64)
    (theirs(a) * weight).sum().backward()
    (ours(b) * weight).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-10)
    for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-10)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-12, atol=0)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x))


def test_moments_of_two_ranks_do_not_cancel():
    halves = torch.randn(2, 8, 3, dtype=torch.float32) + 1e4
    parts = []  # first pass: collect what each rank would send

    def record(x):
        parts.append(x.clone())
        return x

    for half in halves:
        global_moments(half, record)
    firsts = parts[0] + parts[2]

    def second(half, answers):
        return global_moments(half, lambda _: answers.pop(0))

    mean = firsts[:-1] / firsts[-1]
    squares = sum((h.var(0, correction=0) + (h.mean(0) - mean) ** 2) * 8 for h in halves)
    got_mean, got_var, count = second(halves[0], [firsts, squares])
    torch.testing.assert_close(got_mean, halves.flatten(0, 1).mean(0))
    torch.testing.assert_close(
        got_var, halves.flatten(0, 1).double().var(0, correction=0).float(), rtol=1e-3, atol=1e-3
    )
    assert count == 16


def test_synchronize_replaces_every_batchnorm_and_keeps_the_keys():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), nn.BatchNorm2d(4))
    keys, parameters = list(net.state_dict()), list(net.parameters())
    synchronize(net, alone)
    assert list(net.state_dict()) == keys
    assert all(p is q for p, q in zip(net.parameters(), parameters, strict=True))
    assert [type(m).__name__ for m in net.modules()].count("SyncBatchNorm") == 2


def test_bf16_input_keeps_float32_statistics():
    ours = SyncBatchNorm(nn.BatchNorm2d(4), alone)
    x = (torch.randn(8, 4, 3, 3) + 5).bfloat16().requires_grad_()
    out = ours(x)
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16 and x.grad.dtype == torch.bfloat16
    assert ours.running_mean.dtype == torch.float32 and ours.weight.grad.dtype == torch.float32


def test_an_empty_share_adds_nothing():
    mean, var, count = global_moments(torch.empty(0, 3), lambda x: x + torch.full_like(x, 2.0))
    assert torch.isfinite(mean).all() and torch.isfinite(var).all() and count == 2
