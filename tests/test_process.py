"""What `ssl-dist` sets in its process: ssl_dist/process.py. Each test asks a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CLEAR = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith("MALLOC_") and name not in ("OMP_WAIT_POLICY", "GLIBC_TUNABLES")
}
# Whether a block of 64 MiB that was filled and given back is filled again without new pages.
KEEPS = """
import os, resource, sys
from ssl_dist import __main__, cli, job
def fill():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(b"x") * (64 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def command(*_):
    fill()
    print(os.environ["OMP_WAIT_POLICY"], "new" if fill() > 8000 else "kept")
    return 7
__main__.main = cli.main = command
sys.exit(__main__.program() if sys.argv[1] == "program" else job.run(["train"]))
"""


def answer(start="program", **environment):
    command = [sys.executable, "-c", KEEPS, start]
    done = subprocess.run(command, cwd=ROOT, env=CLEAR | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr
    return done.stdout.split()


needs_glibc = pytest.mark.skipif(
    not os.confstr("CS_GNU_LIBC_VERSION"), reason="the allocator of other C libraries has no such parameters"
)


@needs_glibc
@pytest.mark.parametrize("start", ["program", "a task of Slurm"])
def test_idle_threads_sleep_and_freed_memory_is_kept(start):
    assert answer(start) == ["PASSIVE", "kept"]


@needs_glibc
@pytest.mark.parametrize("name", ["GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_"])
def test_what_the_user_has_set_stays(name):
    value = {"GLIBC_TUNABLES": "glibc.malloc.check=0", "MALLOC_TRIM_THRESHOLD_": "131072"}[name]
    assert answer(**{name: value}, OMP_WAIT_POLICY="ACTIVE") == ["ACTIVE", "new"]


@needs_glibc
def test_tunables_of_other_parts_of_glibc_leave_the_allocator_to_the_program():
    assert answer(GLIBC_TUNABLES="glibc.rtld.nns=4") == ["PASSIVE", "kept"]


def test_the_installed_command_is_the_prepared_program():
    script = Path(sys.executable).with_name("ssl-dist").read_text(encoding="utf-8")
    assert "from ssl_dist.__main__ import program" in script
