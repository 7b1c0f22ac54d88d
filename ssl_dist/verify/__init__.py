"""`ssl-dist verify`: real steps at several world sizes against one process."""

from ssl_dist.verify.command import verify

__all__ = ["ranks", "verify"]
