"""Imported once by the server that forks the ranks of the tests (tests/ranks.py), instead of by every rank.

A process that starts with nothing needs five seconds of CPU before its first step, a fork of this server one.
"""

import gc

import torch.distributed  # noqa: F401

import ssl_dist.data.arrays
import ssl_dist.evaluate.command
import ssl_dist.run.log
import ssl_dist.run.plots
import ssl_dist.train.loop
import ssl_dist.verify.ranks  # noqa: F401
from ssl_dist.keys import hash64

hash64(0)  # numba's own registries; no kernel that uses threads may run before a fork
gc.freeze()  # or a collection in a fork would copy every page that it looks at
