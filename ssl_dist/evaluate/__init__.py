"""`ssl-dist evaluate` and `ssl-dist extract`; and the evaluators of features on arrays, for programs of others."""

from ssl_dist.evaluate.arrays import clusters, knn, logistic, logistic_sgd, retrieval
from ssl_dist.evaluate.command import evaluate, extract

__all__ = ["clusters", "evaluate", "extract", "knn", "logistic", "logistic_sgd", "retrieval"]
