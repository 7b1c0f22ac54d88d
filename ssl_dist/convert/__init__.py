"""`ssl-dist convert`: convert a data set to one .beton file per split."""

from ssl_dist.convert.command import convert

__all__ = ["convert"]
