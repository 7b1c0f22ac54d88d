"""Pixels to network input: on a CPU by a table, on a GPU by torch's operations, to the same bits."""

import pytest
import torch

from ssl_dist.config import Normalize
from ssl_dist.data.normalize import LEVELS, normalized, pixels_of

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


def test_a_gpu_gets_the_same_shape_and_order():
    pixels = torch.empty(2, 5, 3, 7, 9, dtype=torch.uint8, device="meta")
    images = normalized(THREE, torch.float32, torch.device("meta"))(pixels)
    assert images.shape == pixels.shape and images.dtype == torch.float32
    assert images.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
