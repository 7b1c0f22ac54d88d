"""Building blocks of methods: backbones, layers with keyed randomness, BatchNorm over ranks, labels of their own."""

from ssl_dist.nn.backbone import Backbone
from ssl_dist.nn.layers import KeyedDropout, KeyedDropPath, ema_update, key_dropout, mlp
from ssl_dist.nn.pseudolabels import PseudoLabels

__all__ = ["Backbone", "KeyedDropPath", "KeyedDropout", "PseudoLabels", "ema_update", "key_dropout", "mlp"]
