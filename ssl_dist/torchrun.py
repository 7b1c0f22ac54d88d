"""A command of this program on several ranks of this machine, by torchrun."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

# What ranks tell torchrun is 0 for these, or it would start them again: a mistake, a stop on request, a closed output.
_OF_RANKS = {"2", "75", "141"}


def run(ranks: int, words: Sequence[str]) -> int:
    """The exit code of `ssl-dist WORDS` on these ranks, whose threads share the cores unless OMP_NUM_THREADS is set:
    torchrun would give each one thread."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // ranks))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    with tempfile.TemporaryDirectory() as folder:
        exit_file = Path(folder, "exit-code")  # the first rank writes it
        environment = os.environ | {"OMP_NUM_THREADS": threads, "SSL_DIST_EXIT_FILE": str(exit_file)}
        command = [*torchrun, "-m", "ssl_dist", *words]
        code = subprocess.run(command, env=environment, check=False).returncode
        said = exit_file.read_text().strip() if exit_file.exists() else ""
    return int(said) if said in _OF_RANKS else code
