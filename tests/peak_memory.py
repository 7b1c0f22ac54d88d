"""How far the resident memory of a process rises during a call, by Linux's account."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

needs_linux = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's account of memory")


def run(script: str, *arguments: str) -> str:
    """What `script` prints in a process whose allocator gives large blocks back at once. Left to itself glibc raises
    the size from which it does so, by what was freed so far: the peak then differs from process to process by 10 MiB.
    """
    allocator = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "1"}
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | allocator | path).stdout


def peak_mib(call: Callable[[], object]) -> float:
    """Pages of a mapped file count as well. A kernel that keeps a file in large folios (Linux 6.18) maps one whole when
    a byte of it is read: up to some MiB that no budget of ours knows of, by how the file came into its cache.
    """
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")  # forgets the peak so far
    before = _mib("VmRSS")
    call()
    return _mib("VmHWM") - before


def _mib(name: str) -> float:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(name))
