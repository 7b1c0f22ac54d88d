"""Pixels to network input: on a CPU by a table, on a GPU by torch's operations, to the same bits."""

import subprocess
import sys

import pytest
import torch

from ssl_dist.config import Normalize
from ssl_dist.data.normalize import LEVELS, normalized, pixels_of
from ssl_dist.device import CPU

THREE = Normalize(mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.2435, 0.2616))
PIXELS = {
    "planes": lambda kind, c: draw(kind, 2, 5, c, 7, 9),
    "channels innermost": lambda kind, c: draw(kind, 2, 5, 7, 9, c).movedim(-1, 2),
    "one view": lambda kind, c: draw(kind, 5, c, 8, 8),
    "every other": lambda kind, c: draw(kind, 4, 5, c, 7, 9)[::2, :, :, 1:],
    "none": lambda kind, c: draw(kind, 0, 5, c, 7, 9),
}


def draw(kind, *shape):
    return torch.randint(0, LEVELS[kind] + 1, shape, dtype=torch.int32).to(kind)


@pytest.mark.parametrize("layout", PIXELS)
@pytest.mark.parametrize("kind", LEVELS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("constants", [THREE, Normalize(mean=(0.3,), std=(0.5,))], ids=["RGB", "grey"])
def test_it_is_the_formula_to_the_bit(layout, kind, dtype, constants):
    torch.manual_seed(0)
    pixels = PIXELS[layout](kind, len(constants.mean))
    mean, std = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (constants.mean, constants.std))
    # Each constant is rounded once, and so is each of the two operations.
    expected = pixels.to(dtype) * (1 / (LEVELS[kind] * std)).to(dtype) + (-mean / std).to(dtype)
    actual = normalized(constants, dtype, torch.device("cpu"))(pixels)
    assert actual.dtype == dtype and torch.equal(actual, expected)
    assert not actual.numel() or actual.flatten(0, -4).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(pixels_of(actual, constants, kind).to(torch.int32), pixels.to(torch.int32))


@pytest.mark.parametrize("layout", PIXELS)
@pytest.mark.parametrize("kind", LEVELS, ids=str)
def test_plane_by_plane_they_are_the_same(layout, kind):
    pixels = PIXELS[layout](kind, 3)
    planes = normalized(THREE, torch.float32, CPU, torch.contiguous_format)(pixels)
    assert planes.is_contiguous() and torch.equal(planes, normalized(THREE, torch.float32, CPU)(pixels))


def test_a_gpu_gets_the_same_shape_and_order():
    pixels = torch.empty(2, 5, 3, 7, 9, dtype=torch.uint8, device="meta")
    images = normalized(THREE, torch.float32, torch.device("meta"))(pixels)
    assert images.shape == pixels.shape and images.dtype == torch.float32
    assert images.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    planes = normalized(THREE, torch.float32, torch.device("meta"), torch.contiguous_format)(pixels)
    assert planes.shape == pixels.shape and planes.is_contiguous()


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_another_number_of_channels_is_refused(channels):
    with pytest.raises(ValueError, match=f"images of {channels} channels, and mean and std of 3"):
        normalized(THREE, torch.float32, torch.device("cpu"))(draw(torch.uint8, 5, channels, 8, 8))


def test_a_forked_process_has_threads_of_its_own():
    """Those of its parent do not run there, and the child would wait for them."""
    script = """
import os, torch
from ssl_dist.config import Normalize
from ssl_dist.data.normalize import normalized
torch.set_num_threads(2)
to_input = normalized(Normalize(mean=(0.5,), std=(0.5,)), torch.float32, torch.device("cpu"))
pixels = torch.zeros(8, 1, 4, 4, dtype=torch.uint8)
to_input(pixels)
if (child := os.fork()) == 0:
    os._exit(int(not (to_input(pixels) == -1).all()))
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
