"""Pre-training: the loop and its state, checks before it, relabelling, and measurements during it."""

from ssl_dist.train.loop import train

__all__ = [
    "collapse",
    "explain",
    "online_knn",
    "operations",
    "optim",
    "preflight",
    "relabel",
    "roofline",
    "state",
    "train",
]
