"""Two measures of a representation that fall when it collapses, and are NaN when it is not finite.

Both are of rows that `sample` has chosen.
"""

import torch
from torch import Tensor

MAX_ROWS = 1024  # a sample is enough, and the spectrum of more would cost time at every logged step


def sample(z: Tensor) -> Tensor:
    """At most MAX_ROWS rows of z [..., D], evenly over all, at least float32 and of length 1."""
    rows = z.detach().reshape(-1, z.shape[-1])
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))  # a float64 need not fit into a float32
    stride = -(-len(rows) // MAX_ROWS)
    return torch.nn.functional.normalize(rows[::stride], dim=1)


def feature_std(rows: Tensor) -> float:
    """Mean over the D dimensions of the standard deviation of L2-normalised rows, times sqrt(D).

    1 for isotropic features, 0 when all rows are the same, NaN of a single row (the measure of Chen & He, SimSiam,
    2021, scaled).
    """
    if len(rows) < 2:
        return float("nan")
    return float(rows.std(0).mean() * rows.shape[1] ** 0.5)


def effective_rank(rows: Tensor) -> float:
    """exp of the entropy of the normalised singular values of centred L2-normalised rows (Roy & Vetterli, 2007).

    Between 1 (one direction is left) and D; 0 when every row is the same.
    """
    if not torch.isfinite(rows).all():
        return float("nan")  # the decomposition would raise; the loop's own check says what is wrong
    centred = rows - rows.mean(0)
    if rows.shape[1] > len(rows):  # an SVD of 1024 embeddings of 8192 dimensions takes ten times as long
        gram = centred.double() @ centred.double().T
        values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    else:
        values = torch.linalg.svdvals(centred)
    if values.sum() <= 1e-6:
        return 0.0
    share = values / values.sum()
    return float(torch.exp(-(share * torch.log(share.clamp_min(1e-12))).sum()))
