"""The relation head as the paper writes it: pairs in loops, concatenated, through torch's own modules."""

import torch
from torch import nn


def pairs(num_views, num_images):
    """(left row, right row, target) in the paper's order."""
    triples, shift = [], 1
    for a in range(num_views):
        for b in range(a + 1, num_views):
            triples += [(a * num_images + m, b * num_images + m, 1) for m in range(num_images)]
            triples += [(a * num_images + m, b * num_images + (m - shift) % num_images, 0) for m in range(num_images)]
            shift = 1 if shift + 1 >= num_images else shift + 1
    return triples


def aggregate(x, y, how):
    return {
        "cat": lambda: torch.cat([x, y]),
        "sum": lambda: x + y,
        "mean": lambda: (x + y) / 2,
        "max": lambda: torch.max(x, y),
    }[how]()


def loss_and_logits(z_KMD, head, how, gamma, alpha, labels=None):
    """Mean focal loss over all pairs and their logits; `head` is a RelationModule on one process, in training, or None
    for the dot product. labels: of the images, None for those that are not known."""
    num_views, num_images, _ = z_KMD.shape
    labels = labels or [None] * num_images
    rows, table = z_KMD.flatten(0, 1), pairs(num_views, num_images)
    if head is None:
        logits = torch.stack([rows[i].dot(rows[j]) / len(rows[i]) for i, j, _ in table])
    else:
        stacked = torch.stack([aggregate(rows[i], rows[j], how) for i, j, _ in table])
        logits = nn.Sequential(head.linear1, head.bn1, head.act, head.linear2)(stacked).squeeze(1)
    of_class = [y or labels[i % num_images] == labels[j % num_images] is not None for i, j, y in table]
    target = torch.tensor(of_class, dtype=logits.dtype)
    p = torch.sigmoid(logits)
    pt = p * target + (1 - p) * (1 - target)
    weight = 1 if alpha is None else alpha * target + (1 - alpha) * (1 - target)
    bce = nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (weight * (1 - pt) ** gamma * bce).mean(), logits
