"""What a Slurm task runs: a command of `ssl-dist`, with the rank read from srun's environment variables.

`python -m ssl_dist.job train CONFIG ...` under srun is what slurm/train.sbatch starts; submitit starts a `Job`.
"""

import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ssl_dist import cli, process
from ssl_dist.distributed.rank import BY_SRUN, environment_number
from ssl_dist.distributed.signals import STOPPED
from ssl_dist.errors import UserError

# Where Slurm reserves no port: by the job's id, above torchrun's 29500 and below the ports of clients.
FIRST_PORT, NUM_PORTS = 29600, 3000


@dataclass(frozen=True)
class Job:
    """A command as an importable object: submitit pickles this class's name and the arguments."""

    arguments: tuple[str, ...]

    def __call__(self) -> int:
        """Run in a task's process. Any exit code but 0 ends that process, and the batch script sees it."""
        code = run(self.arguments)
        if code:
            sys.exit(code)  # submitit lets SystemExit pass
        return code


def run(arguments: Sequence[str]) -> int:
    """Run the command, whose name comes first, in this task; returns its exit code."""
    process.prepare()
    is_training = arguments[0] in ("train", "study")
    for number in (signal.SIGTERM, signal.SIGUSR2):
        # Before the training has its handlers nothing is to be saved. Those of submitit would requeue from a task.
        signal.signal(number, (lambda *_: os._exit(STOPPED)) if is_training else signal.SIG_DFL)
    signal.signal(signal.SIGCONT, signal.SIG_DFL)
    try:
        os.environ |= environment(os.environ)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return cli.main(arguments)


def environment(slurm: Mapping[str, str]) -> dict[str, str]:
    """The environment variables that torchrun would set, from those of srun; empty under torchrun and without srun.

    Raises `UserError` where tasks are not spread evenly over the nodes, or the first node's name is not known.
    """
    if "RANK" in slurm or "SLURM_PROCID" not in slurm:
        return {}
    size, nodes = environment_number("SLURM_NTASKS", slurm), environment_number("SLURM_NNODES", slurm)
    if nodes == 0 or size % nodes:
        raise UserError(f"--tasks-per-node: {size} tasks on {nodes} nodes: give every node as many as the others")
    if size > 1 and "MASTER_ADDR" not in slurm:
        raise UserError(
            "environment: MASTER_ADDR is not set; the batch script sets it to the first of "
            '`scontrol show hostnames "$SLURM_JOB_NODELIST"` (see slurm/train.sbatch)'
        )
    return {
        BY_SRUN: "1",
        "RANK": str(environment_number("SLURM_PROCID", slurm)),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(environment_number("SLURM_LOCALID", slurm)),
        "LOCAL_WORLD_SIZE": str(size // nodes),
        "MASTER_PORT": str(port(slurm)),
    }


def port(slurm: Mapping[str, str]) -> int:
    """The port of rank 0: the first that Slurm reserved for this step (srun --resv-ports), else one by the job's id,
    so that jobs on one node do not share it; another one at every start, in case it is taken."""
    reserved = re.match(r"\d+", slurm.get("SLURM_STEP_RESV_PORTS", ""))
    if reserved:
        return int(reserved[0])
    job, restarts = environment_number("SLURM_JOB_ID", slurm), environment_number("SLURM_RESTART_COUNT", slurm, 0)
    return FIRST_PORT + (job + 97 * restarts) % NUM_PORTS


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
