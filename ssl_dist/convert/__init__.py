"""`ssl-dist convert`: a data set as it lies on disk, written as one .beton file a split."""

from ssl_dist.convert.command import convert

__all__ = ["convert"]
