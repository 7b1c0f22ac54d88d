"""Pre-training: the loop, the state that it works on, and what runs beside it."""

from ssl_dist.train.loop import train

__all__ = ["collapse", "explain", "online_knn", "optim", "preflight", "relabel", "state", "train"]
