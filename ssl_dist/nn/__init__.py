"""Building blocks of methods: layers with keyed randomness, BatchNorm over all ranks, labels of a method's own."""

from ssl_dist.nn.layers import KeyedDropout, KeyedDropPath, ema_update, key_dropout, keyed_rows, mlp
from ssl_dist.nn.pseudolabels import PseudoLabels

__all__ = [
    "KeyedDropPath",
    "KeyedDropout",
    "PseudoLabels",
    "batchnorm",
    "ema_update",
    "key_dropout",
    "keyed_rows",
    "mlp",
]
