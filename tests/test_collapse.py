"""The two numbers by which a collapse is seen."""

import math
import warnings

import pytest
import torch

from ssl_dist.train import collapse
from ssl_dist.train.collapse import MAX_ROWS, sample


def feature_std(z):
    return collapse.feature_std(sample(z))


def effective_rank(z):
    return collapse.effective_rank(sample(z))


def test_isotropic_features_have_full_rank():
    z = torch.randn(4, 500, 16, generator=torch.Generator().manual_seed(0))
    assert feature_std(z) == pytest.approx(1, abs=0.02) and effective_rank(z) > 15.5


def test_a_collapse_is_seen():
    row = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    assert feature_std(row.expand(50, 16)) == pytest.approx(0, abs=1e-6) and effective_rank(row.expand(50, 16)) == 0
    line = torch.linspace(-1, 1, 50)[:, None] * row
    assert effective_rank(line) == pytest.approx(1, abs=1e-3), "one direction is left"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_gives_nan_and_no_error(value):
    z = torch.ones(8, 4)
    z[3, 2] = value
    assert math.isnan(effective_rank(z)) and math.isnan(feature_std(z))


def test_one_row_has_no_spread():
    with warnings.catch_warnings(action="error"):
        assert math.isnan(feature_std(torch.ones(1, 4))) and effective_rank(torch.ones(1, 4)) == 0


def test_float64_beyond_float32():
    z = torch.randn(100, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert effective_rank(z * 1e100) == pytest.approx(effective_rank(z)) and effective_rank(z) > 1


def test_a_sample_is_taken_from_many_rows():
    z = torch.randn(5 * MAX_ROWS, 4, generator=torch.Generator().manual_seed(0))
    assert effective_rank(z) == effective_rank(z[::5])


def test_more_dimensions_than_rows():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(30, 5, generator=generator) @ torch.randn(5, 200, generator=generator)
    turn = torch.linalg.qr(torch.randn(200, 200, generator=generator))[0]
    narrow = z @ turn[:, :30] @ turn[:, :30].T  # of 30 dimensions, but for the turn
    assert effective_rank(narrow @ turn) == pytest.approx(effective_rank(narrow @ turn[:, :30]), rel=1e-3)
    assert effective_rank(z[:1].expand(30, 200)) == 0
    assert effective_rank(torch.linspace(-1, 1, 30)[:, None] * z[:1]) == pytest.approx(1, abs=1e-3)
