import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ssl_dist import keys

MASK = (1 << 64) - 1
FIRST_HASHES = [6462984041960516004, 8409816773569330625]
FIRST_PERMUTATION = [0, 6, 4, 3, 5, 2, 7, 1]


def mix(z):
    """SplitMix64's finaliser in Python's own integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5))
@settings(deadline=None, max_examples=50)
def test_hash64_against_exact_integers(words):
    key = 0
    for word in words:
        key = mix((key * 0xD1342543DE82EF95 + mix((word + 0x9E3779B97F4A7C15) & MASK)) & MASK)
    assert int(keys.hash64(*words)) == key


def test_first_values_never_change():
    """Checkpoints of today must resume tomorrow: these numbers are part of the format."""
    assert [int(keys.hash64(0, 1, 2)), int(keys.hash64(7))] == FIRST_HASHES
    assert keys.permutation(keys.hash64(0, keys.ORDER, 0), 8).tolist() == FIRST_PERMUTATION


def test_order_and_length_of_words_matter():
    hashes = {int(keys.hash64(*words)) for words in [(), (0,), (0, 0), (1, 2), (2, 1), (1,), (1, 0), (0, 1)]}
    assert len(hashes) == 8


def test_uniform_is_uniform():
    key = keys.hash64(3)
    draws = np.array([keys.uniform(key, n) for n in range(4000)])
    assert draws.min() >= 0 and draws.max() < 1
    assert stats.kstest(draws, "uniform").pvalue > 0.01
    neighbours = np.array([keys.uniform(keys.hash64(0, image), 0) for image in range(4000)])
    assert stats.kstest(neighbours, "uniform").pvalue > 0.01
    assert abs(np.corrcoef(neighbours[1:], neighbours[:-1])[0, 1]) < 0.05


def test_normals_are_normal():
    draws = keys.normals(keys.hash64(4), 4000)
    assert np.isfinite(draws).all() and stats.kstest(draws, "norm").pvalue > 0.01
    assert np.array_equal(keys.normals(keys.hash64(4), 4000), draws) and keys.normals(keys.hash64(4), 0).shape == (0,)


def test_rows_of_normals_are_functions_of_their_ids():
    key, ids = keys.hash64(5), np.array([7, 0, 3, 10**12])
    rows = keys.normal_rows(key, ids, 1000)
    assert stats.kstest(rows.ravel(), "norm").pvalue > 0.01
    assert np.abs(np.corrcoef(rows) - np.eye(4)).max() < 0.1
    assert np.array_equal(keys.normal_rows(key, ids[2:], 1000), rows[2:])


@pytest.mark.parametrize("n", [0, 1, 2, 1000])
def test_permutation_is_one(n):
    order = keys.permutation(keys.hash64(1), n)
    assert order.dtype == np.int64 and np.array_equal(np.sort(order), np.arange(n))


def test_permutations_of_keys_are_fair():
    places = np.array([keys.permutation(keys.hash64(k), 6) for k in range(3000)])
    counts = np.stack([np.bincount(places[:, i], minlength=6) for i in range(6)])
    assert stats.chisquare(counts.ravel()).pvalue > 0.01
