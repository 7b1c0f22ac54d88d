"""An untrained backbone: what the architecture alone is worth, the lower end of every table."""

from ssl_dist.config import Section
from ssl_dist.methods.base import SSLMethod


class Options(Section):
    pass


class Method(SSLMethod[Options]):
    trainable = False
    num_views = 1
