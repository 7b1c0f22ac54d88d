"""The compiled loops of the relation head; ssl_dist/kernels/relation.py has the equations and calls them in turn.

All of them take a range first..last-1 of images: one thread works on the rows of its images alone, those of the pairs'
left members or those of the right ones.
"""

import math

import numpy as np
from numpy import ndarray

from ssl_dist.kernels.compiled import njit_sums


@njit_sums()
def count(couples: ndarray, num_images: int, lo: int, hi: int, count_a: ndarray, count_b: ndarray) -> None:
    """Pairs of the share in which a row is the left (count_a) or the right (count_b) member."""
    for unit in range(lo, hi):
        q, m = unit // num_images, unit % num_images
        a, b, s = couples[q]
        count_a[a * num_images + m] += 2
        count_b[b * num_images + m] += 1
        count_b[b * num_images + (m - s) % num_images] += 1


@njit_sums()
def moments(
    first: int, last: int, couples: ndarray, num_images: int, lo: int, hi: int, A: ndarray, B: ndarray,
    count_a: ndarray, count_b: ndarray, pair_b: ndarray, sums: ndarray,
) -> None:  # fmt: skip
    """Images first..last-1: pair_b = B' of their rows; sums[m] = the parts of sum h and sum h^2 of image m's rows."""
    hidden = A.shape[1]
    for q in range(lo // num_images, (hi + num_images - 1) // num_images):
        left, right, s = couples[q, 0] * num_images, couples[q, 1] * num_images, couples[q, 2]
        for m in range(max(first, lo - q * num_images), min(last, hi - q * num_images)):
            other = m - s if m >= s else m - s + num_images
            to, positive, negative = pair_b[left + m], B[right + m], B[right + other]
            for h in range(hidden):
                to[h] += positive[h] + negative[h]
    for m in range(first, last):
        sum_h, sum_hh = sums[m, 0], sums[m, 1]
        for row in range(m, A.shape[0], num_images):
            n_a, n_b, a, b, pair = np.float64(count_a[row]), np.float64(count_b[row]), A[row], B[row], pair_b[row]
            for h in range(hidden):
                sum_h[h] += n_a * a[h] + n_b * b[h]
            for h in range(hidden):
                sum_hh[h] += np.float64(a[h]) * (n_a * a[h] + 2.0 * pair[h]) + n_b * b[h] * b[h]


@njit_sums()
def normalize(
    first: int, last: int, num_images: int, A: ndarray, B: ndarray,
    scale: ndarray, shift: ndarray, ya: ndarray, yb: ndarray,
) -> None:  # fmt: skip
    """Images first..last-1: y_p = ya_i + yb_j."""
    for m in range(first, last):
        for row in range(m, A.shape[0], num_images):
            a, b, to_a, to_b = A[row], B[row], ya[row], yb[row]
            for h in range(scale.shape[0]):
                to_a[h] = a[h] * scale[h] + shift[h]
            for h in range(scale.shape[0]):
                to_b[h] = b[h] * scale[h]


@njit_sums(inline="always")
def _focal(t: float, sign: float, gamma: float) -> tuple[float, float]:
    """(1 - pt)^gamma * BCE of a logit, and the derivative in it; sign is +1 for target 1 and -1 for target 0."""
    x = sign * t
    e = math.exp(-abs(x))
    tail = math.log1p(e)
    bce = tail + max(-x, 0.0)
    miss = (e if x > 0.0 else 1.0) / (1.0 + e)  # 1 - pt
    # The paper's gamma is 2; others go through log(1 - pt), which does not underflow.
    modulation = miss * miss if gamma == 2.0 else math.exp(-gamma * (tail + max(x, 0.0)))
    return modulation * bce, -sign * modulation * (gamma * (1.0 - miss) * bce + miss)


@njit_sums()
def sweep_left(
    first: int, last: int, couples: ndarray, num_images: int, lo: int, hi: int, ya: ndarray, yb: ndarray,
    w: ndarray, c: np.floating, slope: np.floating, gamma: float, weights: tuple[float, float], labels: ndarray,
    logits: ndarray, d: ndarray, fa: ndarray, totals: ndarray,
) -> None:  # fmt: skip
    """Images first..last-1 on the left: logits and d [2, units] (positives, negatives), FA, totals[m] = loss, dc."""
    hidden, cast, num_pairs = w.shape[0], w.dtype.type, 2.0 * len(couples) * num_images
    for q in range(lo // num_images, (hi + num_images - 1) // num_images):
        left, right, s = couples[q, 0] * num_images, couples[q, 1] * num_images, couples[q, 2]
        for m in range(max(first, lo - q * num_images), min(last, hi - q * num_images)):
            other = m - s if m >= s else m - s + num_images
            a, positive, negative, to = ya[left + m], yb[right + m], yb[right + other], fa[left + m]
            t_p = t_n = c
            for h in range(hidden):
                y = a[h] + positive[h]
                t_p += max(y, slope * y) * w[h]
                y = a[h] + negative[h]
                t_n += max(y, slope * y) * w[h]
            loss_p, d_p = _focal(np.float64(t_p), 1.0, gamma)
            same = labels[m] >= 0 and labels[m] == labels[other]
            loss_n, d_n = _focal(np.float64(t_n), 1.0 if same else -1.0, gamma)
            weight_n = weights[0] if same else weights[1]
            d_p *= weights[0] / num_pairs
            d_n *= weight_n / num_pairs
            totals[m, 0] += (weights[0] * loss_p + weight_n * loss_n) / num_pairs
            totals[m, 1] += d_p + d_n
            unit = q * num_images + m - lo
            logits[0, unit], logits[1, unit] = t_p, t_n
            d[0, unit], d[1, unit] = d_p, d_n
            steep_p, steep_n = cast(d_p), cast(d_n)
            flat_p, flat_n = steep_p * slope, steep_n * slope
            for h in range(hidden):
                f_p = steep_p if a[h] + positive[h] > 0 else flat_p
                f_n = steep_n if a[h] + negative[h] > 0 else flat_n
                to[h] += f_p + f_n


@njit_sums()
def sweep_right(
    first: int, last: int, couples: ndarray, num_images: int, lo: int, hi: int, by_right: ndarray,
    A: ndarray, B: ndarray, ya: ndarray, yb: ndarray, slope: np.floating, d: ndarray,
    fa: ndarray, fb: ndarray, pair_ya: ndarray, sums: ndarray,
) -> None:  # fmt: skip
    """Images first..last-1 on the right: FB and pair_ya, the sum of ya over a row's pairs; sums[m] = the parts of F
    and of sum f h of image m's rows."""
    hidden, cast = A.shape[1], A.dtype.type
    for q in by_right:
        left, right, s = couples[q, 0] * num_images, couples[q, 1] * num_images, couples[q, 2]
        for m in range(first, last):
            other = m + s if m + s < num_images else m + s - num_images
            # A share may begin and end inside a couple, so that a row may have one of the two pairs only.
            unit_p, unit_n = q * num_images + m - lo, q * num_images + other - lo
            has_p, has_n = 0 <= unit_p < hi - lo, 0 <= unit_n < hi - lo
            steep_p = cast(d[0, unit_p]) if has_p else cast(0)
            steep_n = cast(d[1, unit_n]) if has_n else cast(0)
            flat_p, flat_n, one_p, one_n = steep_p * slope, steep_n * slope, cast(has_p), cast(has_n)
            b, positive, negative = yb[right + m], ya[left + m], ya[left + other]
            to_f, to_y = fb[right + m], pair_ya[right + m]
            for h in range(hidden):
                f_p = steep_p if b[h] + positive[h] > 0 else flat_p
                f_n = steep_n if b[h] + negative[h] > 0 else flat_n
                to_f[h] += f_p + f_n
            for h in range(hidden):
                to_y[h] += one_p * positive[h] + one_n * negative[h]
    for m in range(first, last):
        sum_f, sum_fh = sums[m, 0], sums[m, 1]
        for row in range(m, A.shape[0], num_images):
            a, b, f_a, f_b = A[row], B[row], fa[row], fb[row]
            for h in range(hidden):
                sum_f[h] += f_a[h]
            for h in range(hidden):
                sum_fh[h] += np.float64(f_a[h]) * a[h] + np.float64(f_b[h]) * b[h]


@njit_sums()
def finish(
    first: int, last: int, num_images: int, f: ndarray, count: ndarray, y: ndarray, pair: ndarray,
    scale_f: ndarray, scale_pair: ndarray, scale_y: ndarray, offset: ndarray,
) -> None:  # fmt: skip
    """Images first..last-1: f becomes the gradient, f scale_f - pair scale_pair - count (y scale_y + offset)."""
    for m in range(first, last):
        for row in range(m, f.shape[0], num_images):
            to, row_y, row_pair, n = f[row], y[row], pair[row], count[row]
            for h in range(scale_f.shape[0]):
                to[h] = to[h] * scale_f[h] - row_pair[h] * scale_pair[h] - n * (row_y[h] * scale_y[h] + offset[h])
