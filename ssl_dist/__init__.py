"""Self-supervised pre-training of image backbones at any world size, and its evaluation."""

__version__ = "0.1.0"

from ssl_dist import numba_cache

numba_cache.use()
