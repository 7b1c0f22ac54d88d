"""The jobs of slurm/submit.py on this machine, one after another: `--cluster local`."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from ssl_dist import config
from ssl_dist.config import Config
from ssl_dist.errors import UserError
from ssl_dist.job import FIRST_PORT, NUM_PORTS

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


def run_all(nodes: int, ranks: int, trainings: list[Config], then: list[str] | None) -> int:
    """Train by every config and evaluate what is done. Returns the first exit code that is not 0."""
    if nodes > 1:
        raise UserError(f"--nodes {nodes}: with --cluster local there is one node, this machine")
    for settings in trainings:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "config.yaml")
            path.write_text(config.dump(settings), encoding="utf-8")
            code = run(["train", str(path)], ranks)
        if code == 0 and then:
            code = run(["evaluate", settings.run_dir, *then], 1)
        if code:
            return code
    return 0


def run(arguments: list[str], ranks: int) -> int:
    """The command in `ranks` processes, which hear the signals that this one gets. Returns their highest exit code, as
    srun does; a killed rank counts as 128 and the signal's number."""
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    shared["MASTER_PORT"] = str(FIRST_PORT + os.getpid() % NUM_PORTS)
    shared["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    processes: list[subprocess.Popen] = []

    def pass_on(number, _frame) -> None:
        for process in processes:
            process.send_signal(number)

    former = {number: signal.signal(number, pass_on) for number in PASSED_ON}
    try:
        for rank in range(ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "ssl_dist.job", *arguments],
                    env=os.environ | (shared | own if ranks > 1 else {}),
                    start_new_session=True,  # a Ctrl-C in the terminal reaches it once, from here
                )
            )
        codes = [process.wait() for process in processes]
    finally:
        for process in processes:
            process.kill()
        for number, handler in former.items():
            signal.signal(number, handler)
    return max(code if code >= 0 else 128 - code for code in codes)
