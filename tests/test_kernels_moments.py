"""Sums and maps per channel against the same in float64 by torch, for every layout, type and number of threads."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ssl_dist.kernels import moments
from ssl_dist.kernels.moments import Elements

ROOT = Path(__file__).parent.parent
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16

LAYOUTS = {
    "matrix": lambda: torch.randn(6000, 5),
    "long": lambda: torch.randn(40, 3, 77),
    "contiguous": lambda: torch.randn(30, 6, 9, 11),
    "one channel": lambda: torch.randn(30, 1, 9, 11),
    "channels_last": lambda: torch.randn(64, 8, 32, 32).to(memory_format=torch.channels_last),
    "channels_last, odd": lambda: torch.randn(31, 6, 9, 11).to(memory_format=torch.channels_last),
    "channels_last_3d": lambda: torch.randn(5, 4, 3, 5, 7).to(memory_format=torch.channels_last_3d),
    "wide": lambda: torch.randn(70, 2100),
    "every other": lambda: torch.randn(40, 6, 8, 8)[::2, :, 1:],
    "empty": lambda: torch.randn(0, 4, 3, 3),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def make(layout, dtype, centre=0.0):
    torch.manual_seed(0)
    x, grad = (LAYOUTS[layout]() for _ in range(2))
    return (x + centre).to(dtype), grad.to(dtype)


def per_channel(x):
    """Float64 [elements, C]."""
    return x.double().movedim(1, -1).flatten(0, -2)


@layouts
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
@pytest.mark.parametrize("centre", [0.0, 1e4])
def test_sums(layout, dtype, centre):
    x, grad = make(layout, dtype, centre)
    values, grads = per_channel(x), per_channel(grad)
    mean, squares = Elements(x).moments()
    assert mean.dtype == squares.dtype == F64
    if x.numel():
        expected = values.mean(0)
        torch.testing.assert_close(mean, expected, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(squares, (values - expected).square().sum(0), rtol=1e-12, atol=0)
    else:
        assert not mean.any() and not squares.any()
    close = {"rtol": 1e-12, "atol": 1e-12 * max(1, len(values))}
    sum_g, sum_gd = Elements(x).products(grad, mean)
    torch.testing.assert_close(sum_g, grads.sum(0), **close)
    torch.testing.assert_close(sum_gd, (grads * (values - mean)).sum(0), **close)


@layouts
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_maps_are_rounded_once(layout, dtype):
    x, grad = make(layout, dtype, 1e4)
    shape = [1, -1] + [1] * (x.dim() - 2)
    vectors = torch.randn(4, x.shape[1], dtype=F64)
    vectors[0] += 1e4
    mean, scale, offset, scale_g = (v.view(shape) for v in vectors)
    exact = (x.double() - mean) * scale + offset
    for ours, expected in (
        (Elements(x).affine(*vectors[:3]), exact),
        (Elements(x).affine2(grad, *vectors), grad.double() * scale_g + exact),
    ):
        assert ours.dtype == x.dtype and ours.shape == x.shape
        # Half a unit in the last place; bfloat16 passes through float32, float64 has several operations.
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(ours.double(), expected, rtol=0.51 * eps, atol=max(1e-7 * eps, 1e-14))
        if layout not in ("one channel", "every other", "empty"):
            assert ours.stride() == x.stride()


def test_far_outliers_and_constants_do_not_cancel():
    """The element that all are seen from may itself be far from the mean."""
    x = torch.randn(4096, 2, dtype=F64) + 7
    x[0, 0], x[:, 1] = 1e9, 1e9 + 0.1
    mean, squares = Elements(x).moments()
    torch.testing.assert_close(mean, x.mean(0), rtol=0, atol=1e-13 * x[:, 0].std().item())
    torch.testing.assert_close(squares[0], (x[:, 0] - x[:, 0].mean()).square().sum(), rtol=1e-11, atol=0)
    assert squares[1] == 0


@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "matrix"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_shows(layout, bad):
    x, _ = make(layout, F32)
    x[3, 2] = bad
    mean, squares = Elements(x).moments()
    assert not mean[2].isfinite() and not squares[2].isfinite()
    assert mean[:2].isfinite().all() and squares[:2].isfinite().all()


@layouts
def test_results_do_not_depend_on_the_number_of_threads(layout, monkeypatch):
    monkeypatch.setattr(moments, "PIECE_SIZE", 1 << 8)  # many pieces also of small tensors
    x, grad = make(layout, F32)
    vectors = torch.randn(4, x.shape[1], dtype=F64)
    results = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        e = Elements(x)
        results.append([*e.moments(), *e.products(grad, vectors[0]), e.affine(*vectors[:3]), e.affine2(grad, *vectors)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


WARM_UP = """
import torch
from torch import nn
from ssl_dist.nn.batchnorm import SyncBatchNorm
from ssl_dist.kernels import moments
compiled = [function for function in vars(moments).values() if hasattr(function, "signatures")]
counts = lambda: [len(function.signatures) for function in compiled]
assert sum(counts()) == 0 and len(compiled) == 8
for number, dtype in enumerate((torch.float32, torch.float64), 1):
    moments.warm_up(dtype)
    assert counts() == [number] * 8
    x = torch.randn(4, 3, 5, 5, dtype=dtype)
    for images in (x, x.to(memory_format=torch.channels_last), x[::2], x[:0], x.bfloat16()):
        layer = SyncBatchNorm(nn.BatchNorm2d(images.shape[1]), lambda x: x + 2, lambda x: torch.stack([x, x + 2]))
        layer(images.clone().requires_grad_()).sum().backward()
    assert counts() == [number] * 8, "the first step compiled something"
"""


@pytest.mark.slow
def test_warm_up_compiles_what_training_calls():
    """What it leaves out would be compiled in the first step, while other ranks wait; in a process that is new."""
    done = subprocess.run([sys.executable, "-c", WARM_UP], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
