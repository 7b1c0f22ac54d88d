"""`ssl-dist evaluate` and `ssl-dist extract`."""

from ssl_dist.evaluate.command import evaluate, extract

__all__ = ["evaluate", "extract", "search"]
