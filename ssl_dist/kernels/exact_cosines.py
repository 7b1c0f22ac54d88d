"""Cosines whose bits are the same on every device, in any blocks and in any order of their sums.

A product of matrices is rounded by the order of its sums, which differs from one device and shape to another. It is not
rounded where every number in it is a whole one below 2^53, which float64 holds (Ozaki, Ogita, Oishi & Rump, 2012,
"Error-free transformations of matrix multiplication"). So a row u of length 1 is cut into whole numbers,

    u = 2^-26 h + 2^-(26 + L) l + what is left,    h = round(2^26 u),    l = round(2^L (2^26 u - h)),

and u . v = 2^-52 (h . h' + 2^-L (h . l' + l . h')), where by Cauchy and Schwarz, whatever the order of the sums,

    |partial sum of h . h'|            <= |h| |h'|             <  2^53        as |h| <= 2^26 + sqrt(D) / 2
    |partial sum of h . l' + l . h'|   <= |h| |l'| + |l| |h'|  <= 2^53        as |l| <= 2^(L - 1) sqrt(D).

All else is done number by number: quotients, roundings, one sum, products with powers of two. Those are the same
everywhere by IEEE 754. Lengths are not (they are sums), so the host computes them for every device.

From the cosine of the rows in exact arithmetic these are at most D 2^-50 away; with h alone sqrt(D) 2^-25.
"""

import math

import torch
from torch import Tensor

Slices = tuple[Tensor, ...]  # whole numbers in float64 [R, D]: h, or h and l

_HIGH_BITS = 26


def slices(rows_RD: Tensor, number: int, device: torch.device) -> Slices:
    """h (number = 1), or h and l (number = 2), of rows float32 [R, D] on the host. A row of zeros stays one."""
    norm_R1 = lengths(rows_RD)
    rest_RD = rows_RD.to(device).double()
    rest_RD /= norm_R1.to(device)
    rest_RD *= 2.0**_HIGH_BITS
    high_RD = rest_RD.round()
    if number == 1:
        return (high_RD,)
    rest_RD -= high_RD
    rest_RD *= 2.0 ** _low_bits(rest_RD.shape[1])
    return high_RD, rest_RD.round_()


def lengths(rows_RD: Tensor) -> Tensor:
    """Of rows [R, D], float64 [R, 1]; 1 for a row of zeros."""
    norm_R1 = torch.linalg.vector_norm(rows_RD, dim=1, keepdim=True, dtype=torch.float64)
    return norm_R1.where(norm_R1 > 0, 1.0)


def cosines(ours: Slices, theirs: Slices) -> Tensor:
    """float64 [Q, R] of the rows with these slices, as many of the one as of the other; a row of zeros has cosine 0
    with everything. Takes twice its size in memory where there are two slices."""
    product_QR = ours[0] @ theirs[0].T
    if len(ours) == 2:
        mixed_QR = ours[0] @ theirs[1].T
        mixed_QR.addmm_(ours[1], theirs[0].T)
        product_QR.add_(mixed_QR, alpha=2.0 ** -_low_bits(ours[0].shape[1]))
    return product_QR.mul_(2.0 ** (-2 * _HIGH_BITS))


def _low_bits(dim: int) -> int:
    """L: as many as leave the sums below 2^53."""
    return math.floor(26.9 - math.log2(dim) / 2)
