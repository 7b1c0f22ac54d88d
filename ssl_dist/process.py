"""What a process of `ssl-dist` sets before torch is there: how idle threads wait, and what becomes of freed memory."""

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # parameters of mallopt(3), as glibc's malloc.h numbers them


def prepare() -> None:
    """Let idle threads of OpenMP sleep instead of spinning on cores that others need, such as those that make views;
    and let glibc keep what is freed, or it maps and unmaps every activation above 32 MB anew in each step.

    What the environment says of either stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not _is_glibc() or any(name.startswith("MALLOC_") for name in os.environ):
        return
    if "glibc.malloc" not in os.environ.get("GLIBC_TUNABLES", ""):
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, -1)  # none


def _is_glibc() -> bool:
    return "CS_GNU_LIBC_VERSION" in getattr(os, "confstr_names", {}) and bool(os.confstr("CS_GNU_LIBC_VERSION"))
