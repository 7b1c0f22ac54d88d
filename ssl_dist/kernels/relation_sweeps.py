"""The relation head's Triton kernels for GPUs: relation.py has the equations, relation_cuda.py launches the kernels.

Only that file imports this one, and late: Triton comes with torch's CUDA builds alone.

A program of a sweep owns a row, that of image program_id(0) in view program_id(1), and adds to it in one order. A row
has H hidden units in a tile of HP, a power of two. `couples` [., 3] holds (couple, view of the pairs' other members,
shift), those of view k from begins[k] to begins[k + 1] - 1; the share has the units lo..hi-1. Vectors over hidden units
are float64 in between; a program of theirs has BH units. Constants of the loss are compiled in: as arguments they would
be float32.
"""

import triton
import triton.language as tl

VARYING = ("couples", "begins", "M", "lo", "hi")  # nothing is compiled for a value or an alignment of them


@triton.jit
def _read(x, row, H: tl.constexpr, HP: tl.constexpr):
    """A row of a matrix [., H], with 0 behind the last unit."""
    h = tl.arange(0, HP)
    return tl.load(x + row.to(tl.int64) * H + h, mask=h < H, other=0.0)


@triton.jit
def _write(x, row, values, H: tl.constexpr, HP: tl.constexpr):
    h = tl.arange(0, HP)
    tl.store(x + row.to(tl.int64) * H + h, values, mask=h < H)


@triton.jit
def _vector(x, H: tl.constexpr, HP: tl.constexpr):
    """A vector over hidden units."""
    h = tl.arange(0, HP)
    return tl.load(x + h, mask=h < H, other=0.0)


@triton.jit
def _couple(couples, i):
    return tl.load(couples + 3 * i), tl.load(couples + 3 * i + 1), tl.load(couples + 3 * i + 2)


@triton.jit(do_not_specialize=VARYING)
def moments(A, B, couples, begins, M, lo, hi, counts, pair_h, pair_hh, H: tl.constexpr, HP: tl.constexpr):
    """Rows as left members: how many pairs they have, and the sums of h and h^2 over these."""
    m, a = tl.program_id(0), tl.program_id(1)
    row = a * M + m
    left = _read(A, row, H, HP)
    sum_b, sum_bb, n = tl.zeros_like(left), tl.zeros_like(left), 0
    for i in range(tl.load(begins + a), tl.load(begins + a + 1)):
        q, b, s = _couple(couples, i)
        unit = q.to(tl.int64) * M + m
        if (unit >= lo) & (unit < hi):
            positive, negative = _read(B, b * M + m, H, HP), _read(B, b * M + tl.where(m >= s, m - s, m - s + M), H, HP)
            sum_b += positive + negative
            sum_bb += positive * positive + negative * negative
            n += 2
    sum_a = n * left
    tl.store(counts + row, n)
    _write(pair_h, row, sum_a + sum_b, H, HP)
    _write(pair_hh, row, left * (sum_a + 2 * sum_b) + sum_bb, H, HP)


@triton.jit
def normalization(
    sum_h, sum_hh, bn_weight, bn_bias, statistics, scale, shift,
    P: tl.constexpr, eps: tl.constexpr, H: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """From sums over all P pairs, float64: statistics = mean, biased variance and r, float64 [3, H]; and what makes
    y = h scale + shift."""
    h = tl.program_id(0) * BH + tl.arange(0, BH)
    mask = h < H
    mean = tl.load(sum_h + h, mask=mask, other=0.0) / P
    var = tl.load(sum_hh + h, mask=mask, other=0.0) / P - mean * mean
    var = tl.where(var < 0.0, 0.0, var)  # NaN stays
    r = 1.0 / tl.sqrt(var + eps)
    factor = r * tl.load(bn_weight + h, mask=mask, other=0.0)
    tl.store(statistics + h, mean, mask=mask)
    tl.store(statistics + H + h, var, mask=mask)
    tl.store(statistics + 2 * H + h, r, mask=mask)
    tl.store(scale + h, factor, mask=mask)
    tl.store(shift + h, tl.load(bn_bias + h, mask=mask, other=0.0) - mean * factor, mask=mask)


@triton.jit
def _focal(t, sign, gamma: tl.constexpr):
    """(1 - pt)^gamma * BCE of a logit, and the derivative in it; sign is +1 for target 1 and -1 for target 0."""
    x = sign * t
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    tail = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))  # log1p(e) (Goldberg, 1991)
    bce = tail + tl.maximum(-x, 0.0)
    miss = tl.where(x > 0.0, e, 1.0) / u  # 1 - pt
    modulation = miss * miss if gamma == 2.0 else tl.exp(-gamma * (tail + tl.maximum(x, 0.0)))
    return modulation * bce, -sign * modulation * (gamma * (1.0 - miss) * bce + miss)


@triton.jit
def _pair(y, w, c, sign, part, slope: tl.constexpr, gamma: tl.constexpr):
    """Of a pair: the logit, its part of the loss, d and f. y: its normalised row; part: its weight over P."""
    is_steep = y > 0.0
    t = tl.sum(tl.where(is_steep, y, y * slope) * w) + c
    loss, derivative = _focal(t, sign, gamma)
    d = derivative * part
    return t, loss * part, d, tl.where(is_steep, d, d * slope)


@triton.jit(do_not_specialize=VARYING)
def sweep_left(
    A, B, scale, shift, w, c, labels, couples, begins, M, lo, hi, logits, d, totals, fa, pair_fh,
    slope: tl.constexpr, gamma: tl.constexpr, weight_1: tl.constexpr, weight_0: tl.constexpr,
    H: tl.constexpr, HP: tl.constexpr,
):  # fmt: skip
    """Rows as left members: logits and d [2, units] of their pairs; totals [2, rows], their parts of loss and dc; FA;
    the sum of f h over their pairs. weight_1: the weight of targets 1, over P; weight_0: that of targets 0."""
    m, a = tl.program_id(0), tl.program_id(1)
    row, rows, units = a * M + m, tl.num_programs(1) * M, hi - lo
    factor, weight, constant = _vector(scale, H, HP), _vector(w, H, HP), tl.load(c)
    left = _read(A, row, H, HP)
    ya = left * factor + _vector(shift, H, HP)
    label = tl.load(labels + m)
    part_1, part_0 = tl.full((), weight_1, left.dtype), tl.full((), weight_0, left.dtype)
    sum_f, sum_fb = tl.zeros_like(left), tl.zeros_like(left)
    sum_loss, sum_d = tl.full((), 0.0, left.dtype), tl.full((), 0.0, left.dtype)
    for i in range(tl.load(begins + a), tl.load(begins + a + 1)):
        q, b, s = _couple(couples, i)
        unit = q.to(tl.int64) * M + m
        if (unit >= lo) & (unit < hi):
            other = tl.where(m >= s, m - s, m - s + M)
            positive, negative = _read(B, b * M + m, H, HP), _read(B, b * M + other, H, HP)
            same = (label >= 0) & (label == tl.load(labels + other))
            sign, part = tl.where(same, 1.0, -1.0).to(left.dtype), tl.where(same, part_1, part_0)
            t_p, loss_p, d_p, f_p = _pair(positive * factor + ya, weight, constant, 1.0, part_1, slope, gamma)
            t_n, loss_n, d_n, f_n = _pair(negative * factor + ya, weight, constant, sign, part, slope, gamma)
            tl.store(logits + unit - lo, t_p)
            tl.store(logits + unit - lo + units, t_n)
            tl.store(d + unit - lo, d_p)
            tl.store(d + unit - lo + units, d_n)
            sum_loss += loss_p + loss_n
            sum_d += d_p + d_n
            sum_f += f_p + f_n
            sum_fb += f_p * positive + f_n * negative
    tl.store(totals + row, sum_loss)
    tl.store(totals + rows + row, sum_d)
    _write(fa, row, sum_f, H, HP)
    _write(pair_fh, row, sum_f * left + sum_fb, H, HP)


@triton.jit
def weight_gradients(
    sum_f, sum_fh, statistics, bn_weight, bn_bias, w, gradients, of_share, H: tl.constexpr, BH: tl.constexpr
):  # fmt: skip
    """From sums over the share's pairs, float64: gradients = dg, de, dw [3, H]; of_share = de, dg, float64 [2, H]."""
    h = tl.program_id(0) * BH + tl.arange(0, BH)
    mask = h < H
    mean, r = tl.load(statistics + h, mask=mask, other=0.0), tl.load(statistics + 2 * H + h, mask=mask, other=0.0)
    F = tl.load(sum_f + h, mask=mask, other=0.0)
    X = r * (tl.load(sum_fh + h, mask=mask, other=0.0) - mean * F)
    g, e = tl.load(bn_weight + h, mask=mask, other=0.0), tl.load(bn_bias + h, mask=mask, other=0.0)
    weight = tl.load(w + h, mask=mask, other=0.0)
    tl.store(gradients + h, weight * X, mask=mask)
    tl.store(gradients + H + h, weight * F, mask=mask)
    tl.store(gradients + 2 * H + h, g * X + e * F, mask=mask)
    tl.store(of_share + h, weight * F, mask=mask)
    tl.store(of_share + H + h, weight * X, mask=mask)


@triton.jit
def gradient_scales(
    of_all, statistics, scale, w, scales, P: tl.constexpr, H: tl.constexpr, BH: tl.constexpr
):  # fmt: skip
    """From de and dg of all ranks, float64 [2, H]: the three vectors [3, H] of a row's gradient.

    With h_i the sum of h over the n_i pairs of i, YA_i - n_i e = r g (h_i - n_i mean), so that
    dA_i = FA_i [r g w] - h_i [r g r dg/P] + n_i [r g (r mean dg/P - de/P)], and dB_j alike.
    """
    h = tl.program_id(0) * BH + tl.arange(0, BH)
    mask = h < H
    mean, r = tl.load(statistics + h, mask=mask, other=0.0), tl.load(statistics + 2 * H + h, mask=mask, other=0.0)
    mean_e, mean_g = tl.load(of_all + h, mask=mask, other=0.0) / P, tl.load(of_all + H + h, mask=mask, other=0.0) / P
    factor, weight = tl.load(scale + h, mask=mask, other=0.0), tl.load(w + h, mask=mask, other=0.0)
    tl.store(scales + h, factor * weight, mask=mask)
    tl.store(scales + H + h, factor * r * mean_g, mask=mask)
    tl.store(scales + 2 * H + h, factor * (r * mean * mean_g - mean_e), mask=mask)


@triton.jit(do_not_specialize=VARYING)
def sweep_right(
    A, B, scale, shift, scales, couples, begins, M, lo, hi, d, counts, pair_h, fa, dB,
    slope: tl.constexpr, H: tl.constexpr, HP: tl.constexpr,
):  # fmt: skip
    """FA of a row becomes dA; then the row as right member: dB."""
    m, b = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)  # the most couples first
    row = b * M + m
    factor, offset = _vector(scale, H, HP), _vector(shift, H, HP)
    scale_f, scale_h, scale_n = _vector(scales, H, HP), _vector(scales + H, H, HP), _vector(scales + 2 * H, H, HP)
    dA = _read(fa, row, H, HP) * scale_f - _read(pair_h, row, H, HP) * scale_h + tl.load(counts + row) * scale_n
    _write(fa, row, dA, H, HP)

    right = _read(B, row, H, HP)
    sum_f, sum_a, n = tl.zeros_like(right), tl.zeros_like(right), 0
    for i in range(tl.load(begins + b), tl.load(begins + b + 1)):
        q, a, s = _couple(couples, i)
        first = q.to(tl.int64) * M - lo
        if (first + m >= 0) & (first + m < hi - lo):
            steep, left = tl.load(d + first + m), _read(A, a * M + m, H, HP)
            sum_f += tl.where(right * factor + (left * factor + offset) > 0.0, steep, steep * slope)
            sum_a += left
            n += 1
        other = tl.where(m + s < M, m + s, m + s - M)
        if (first + other >= 0) & (first + other < hi - lo):
            steep, left = tl.load(d + (hi - lo) + first + other), _read(A, a * M + other, H, HP)
            sum_f += tl.where(right * factor + (left * factor + offset) > 0.0, steep, steep * slope)
            sum_a += left
            n += 1
    _write(dB, row, sum_f * scale_f - (n * right + sum_a) * scale_h + n * scale_n, H, HP)
