"""torch.compile of a backbone."""

import functools

import torch

from ssl_dist.nn.backbone import Backbone
from ssl_dist.nn.batchnorm import SyncBatchNorm
from ssl_dist.nn.layers import KeyedDropout

# What a graph cannot hold: kernels of numba, exchanges between ranks, a context variable. Graphs end there.
_OUTSIDE = ((SyncBatchNorm, "_normalize"), (KeyedDropout, "forward"))


def compile_network(network: Backbone) -> None:
    """Let torch.compile make graphs of the network, of each of its `passes` that is called, at the first call."""
    _mark_outside()
    for name in network.passes:
        setattr(network, name, torch.compile(getattr(network, name)))


@functools.cache
def _mark_outside() -> None:
    """Not where the layers are defined: torch.compiler.disable imports torch._dynamo, a second that every command would
    wait for."""
    for layer, name in _OUTSIDE:
        setattr(layer, name, torch.compiler.disable(getattr(layer, name)))
