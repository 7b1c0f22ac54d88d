"""Cosines against whole numbers of Python, in any order of sums, and neighbours that no device decides."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_dist.device import CPU
from ssl_dist.kernels import exact_cosines, neighbours
from ssl_dist.kernels.exact_cosines import cosines, slices
from ssl_dist.storage.features import Features


def hard_rows(count=40, dim=33, seed=0):
    """Rows whose order rounding would decide: equal, multiples, other in a last bit, huge, tiny, aligned, of zeros."""
    generator = np.random.default_rng(seed)
    rows = generator.standard_normal((count, dim)).astype(np.float32)
    rows[1::4] = rows[0]
    rows[2::8] = rows[0] * np.float32(2.0**-100)
    rows[3::8] = np.nextafter(rows[0], np.float32(9), where=np.arange(dim) == 5, out=rows[0].copy())
    rows[5] = 0
    rows[6] = np.float32(3e38)
    rows[7] = np.float32(1e-45)
    rows[12] = 1
    return rows


def of(rows, number=2):
    return slices(torch.from_numpy(rows), number, CPU)


@pytest.mark.parametrize("dim", [1, 2, 33, 512, 5000])
@pytest.mark.parametrize("number", [1, 2])
def test_they_are_sums_of_whole_numbers(number, dim):
    rows = hard_rows(16, max(dim, 6))[:, :dim]
    own = of(rows, number)
    bits = exact_cosines._low_bits(dim)
    whole = [[list(map(int, row)) for row in part.tolist()] for part in own]
    assert all(torch.equal(part, part.round()) for part in own)
    product = cosines(own, own)
    for q in (0, 1, 3, 6, 7, 12):
        for r in range(16):
            high = sum(a * b for a, b in zip(whole[0][q], whole[0][r], strict=True))
            assert abs(high) < 2**53
            expected = float(high)
            if number == 2:
                mixed = sum(a * b for a, b in zip(whole[0][q], whole[1][r], strict=True))
                mixed += sum(a * b for a, b in zip(whole[1][q], whole[0][r], strict=True))
                assert abs(mixed) <= 2**53
                expected = float(Fraction(high) + Fraction(mixed, 2**bits))  # one rounding
            assert product[q, r].item() == expected * 2.0**-52


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("dim", [6, 512, 4096])
def test_the_order_of_sums_changes_no_bit(dim, number):
    ours, theirs = of(hard_rows(40, dim), number), of(hard_rows(64, dim, seed=1), number)
    expected = cosines(ours, theirs)
    for seed in range(5):
        order = torch.from_numpy(np.random.default_rng(seed).permutation(dim))
        assert torch.equal(cosines([h[:, order] for h in ours], [h[:, order] for h in theirs]), expected)
        each = torch.cat([cosines([h[[q]] for h in ours], [h[s : s + 7] for h in theirs])
                          for q in range(3) for s in range(0, 64, 7)], 1)  # fmt: skip
        assert torch.equal(each.view(3, -1), expected[:3])
    rounded = ours[0] / 3 @ (theirs[0] / 3).T
    assert not torch.equal(rounded, (ours[0] / 3)[:, order] @ (theirs[0] / 3)[:, order].T), "else nothing is shown"


@pytest.mark.parametrize("threads", [1, 3])
def test_the_slices_of_a_row_do_not_depend_on_its_block(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    for dim in (6, 500, 4099):
        rows = hard_rows(100, dim)
        whole = of(rows)
        for size in (1, 2, 7):
            parts = [of(rows[start : start + size]) for start in range(0, 100, size)]
            for one, joined in zip(whole, map(torch.cat, zip(*parts, strict=True)), strict=True):
                assert torch.equal(one, joined)
    torch.set_num_threads(before)


@pytest.mark.parametrize("dim", [3, 100, 512])
def test_they_are_as_near_to_the_exact_ones_as_is_said(dim):
    rows = np.concatenate([hard_rows(16, max(dim, 6))[:, :dim], np.eye(4, dim)]).astype(np.float32)
    exact = [[Fraction(float(value)) for value in row] for row in rows[:9]]
    one, two = (cosines(of(rows, number), of(rows, number)) for number in (1, 2))
    for q in range(9):
        for r in range(9):
            product = sum(a * b for a, b in zip(exact[q], exact[r], strict=True))
            squares = sum(a * a for a in exact[q]) * sum(b * b for b in exact[r])
            cosine = math.copysign(math.sqrt(product**2 / squares), product) if squares else 0.0
            assert abs(two[q, r].item() - cosine) <= dim * 2.0**-50
            assert abs(one[q, r].item() - cosine) <= dim**0.5 * 2.0**-25


# ---------------------------------------------------------------------------------------------------- neighbours


def part(rows):
    return Features(np.asarray(rows, np.float32), np.arange(len(rows)), np.arange(len(rows)), {})


def exact(train, test, k, dtype=torch.float64, sizes=None):
    with pytest.MonkeyPatch.context() as patch:
        if sizes:
            patch.setattr(neighbours, "_exact_block_sizes", lambda *_: sizes)
        blocks = list(neighbours._exact_neighbours(train, test, k, dtype, 1 << 20, 0, CPU))
    assert [start for start, _, _ in blocks] == np.cumsum([0] + [len(rows) for _, _, rows in blocks[:-1]]).tolist()
    return torch.cat([cosine for _, cosine, _ in blocks]), torch.cat([rows for _, _, rows in blocks])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [None, (1, 1), (3, 7), (40, 5)])
def test_the_order_of_neighbours_is_that_of_the_cosines_then_the_rows(dtype, sizes):
    train, test = part(hard_rows(60)), part(hard_rows(20))
    cosine_QK, row_QK = exact(train, test, 50, dtype, sizes)
    number = 1 if dtype == torch.float32 else 2
    expected_QN = cosines(of(test.features, number), of(train.features, number))
    for query, row_K in enumerate(row_QK.tolist()):
        order = sorted(range(60), key=lambda row: (-expected_QN[query, row].item(), row))
        assert row_K == order[:50]
    assert torch.equal(cosine_QK, expected_QN.gather(1, row_QK).to(dtype)) and cosine_QK.dtype == dtype


def test_of_equal_rows_the_lower_is_the_nearer():
    _, row_QK = exact(part(np.ones((300, 7))), part(np.ones((2, 7))), 250, sizes=(1, 64))
    assert row_QK.tolist() == [list(range(250))] * 2
    train = part(hard_rows(200))
    _, row_QK = exact(train, part(hard_rows(200)[:1]), 70)
    equal = [row for row in range(200) if row == 0 or row % 4 == 1 or row % 8 == 2]
    assert {5, 6, 7, 12} & set(equal) == {5}
    equal = [row for row in equal if row != 5]
    assert [row for row in row_QK[0].tolist() if row in equal] == equal[
        : sum(row in equal for row in row_QK[0].tolist())
    ]


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 12), st.integers(1, 5), st.integers(1, 6))
def test_they_are_the_cpus_where_its_rounding_does_not_decide(data, k, num_queries, num_rows):
    def draw(count):
        row = st.lists(st.integers(-2, 2), min_size=3, max_size=3)
        return np.array(data.draw(st.lists(row, min_size=count, max_size=count)), np.float32)

    train, test = part(draw(12)), part(draw(4))
    ((_, cosine_QK, on_cpu_QK),) = neighbours._rounded_neighbours(train, test, 12, torch.float64, 1 << 20, 0)
    _, row_QK = exact(train, test, k, sizes=(num_queries, num_rows))
    for query in range(4):
        groups = np.append(0, np.cumsum(np.diff(-cosine_QK[query].numpy()) > 1e-12))  # equal but for rounding
        for place, row in enumerate(row_QK[query].tolist()):
            assert row in on_cpu_QK[query][groups == groups[place]]
        copies = [np.flatnonzero((train.features == train.features[row]).all(1)) for row in row_QK[query]]
        order = row_QK[query].tolist()
        for rows in copies:
            assert [row for row in order if row in rows] == sorted(rows)[: len(set(order) & set(rows))]


@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=4), st.integers(1, 6))
def test_where_the_largest_stand(rows, k):
    expected = [sorted(sorted(range(6), key=lambda i: (-row[i], i))[:k]) for row in rows]
    assert neighbours.largest(torch.tensor(rows, dtype=torch.float64), k).tolist() == expected
