"""The relation head as the paper writes it: pairs in loops, concatenated, through torch's own modules."""

import torch
from torch import nn


def pairs(num_views, num_images):
    """(left row, right row, target) in the paper's order."""
    found, shift = [], 1
    for a in range(num_views):
        for b in range(a + 1, num_views):
            found += [(a * num_images + m, b * num_images + m, 1) for m in range(num_images)]
            found += [(a * num_images + m, b * num_images + (m - shift) % num_images, 0) for m in range(num_images)]
            shift = 1 if shift + 1 >= num_images else shift + 1
    return found


def aggregate(x, y, how):
    return {
        "cat": lambda: torch.cat([x, y]),
        "sum": lambda: x + y,
        "mean": lambda: (x + y) / 2,
        "max": lambda: torch.max(x, y),
    }[how]()


def loss_and_logits(z_KMD, head, how, gamma, alpha):
    """Mean focal loss over all pairs and their logits; `head` is a RelationModule on one process, in training."""
    num_views, num_images, _ = z_KMD.shape
    rows, table = z_KMD.flatten(0, 1), pairs(num_views, num_images)
    stacked = torch.stack([aggregate(rows[i], rows[j], how) for i, j, _ in table])
    logits = nn.Sequential(head.linear1, head.bn1, head.act, head.linear2)(stacked).squeeze(1)
    target = torch.tensor([y for _, _, y in table], dtype=logits.dtype)
    p = torch.sigmoid(logits)
    pt = p * target + (1 - p) * (1 - target)
    weight = 1 if alpha is None else alpha * target + (1 - alpha) * (1 - target)
    bce = nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (weight * (1 - pt) ** gamma * bce).mean(), logits
