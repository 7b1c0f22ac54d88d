"""The jobs of slurm/submit.py on this machine, one after another: `--cluster local`."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType

from ssl_dist import config, job
from ssl_dist.config import Config
from ssl_dist.errors import UserError
from ssl_dist.job import FIRST_PORT, NUM_PORTS

FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


def run_all(nodes: int, ranks: int, configs: list[Config], evaluation: list[str] | None) -> int:
    """Train by every config, and evaluate each run that is done. Returns the first exit code that is not 0."""
    if nodes > 1:
        raise UserError(f"--nodes {nodes}: with --cluster local there is one node, this machine")
    for training in configs:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "config.yaml")
            path.write_text(config.dump(training), encoding="utf-8")
            code = run(["train", str(path)], ranks)
        if code == 0 and evaluation:
            code = run(["evaluate", training.run_dir, *evaluation], 1)
        if code:
            return code
    return 0


def run(arguments: list[str], ranks: int) -> int:
    """Run a command on `ranks` ranks and return its exit code. One rank is this process: a job of several trainings
    imports torch once."""
    if ranks > 1:
        return _run_processes(arguments, ranks)
    former_handlers = {number: signal.getsignal(number) for number in (*FORWARDED_SIGNALS, signal.SIGCONT)}
    try:
        return job.run(arguments)
    finally:
        for number, handler in former_handlers.items():
            signal.signal(number, handler)


def _run_processes(arguments: list[str], ranks: int) -> int:
    """Run a command in `ranks` processes, to which the signals of this one are forwarded. Returns their highest exit
    code, as srun does; a killed rank counts as 128 and the signal's number."""
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    shared["MASTER_PORT"] = str(FIRST_PORT + os.getpid() % NUM_PORTS)
    shared["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    processes: list[subprocess.Popen] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        for process in processes:
            process.send_signal(number)

    former_handlers = {number: signal.signal(number, forward) for number in FORWARDED_SIGNALS}
    try:
        for rank in range(ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "ssl_dist.job", *arguments],
                    env=os.environ | shared | own,
                    start_new_session=True,  # a Ctrl-C in the terminal reaches it once, from here
                )
            )
        codes = [process.wait() for process in processes]
    finally:
        for process in processes:
            process.kill()
        for number, handler in former_handlers.items():
            signal.signal(number, handler)
    return max(code if code >= 0 else 128 - code for code in codes)
