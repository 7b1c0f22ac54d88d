"""Which rank of a run this process is, read from the launcher's environment variables."""

import os
import socket
from dataclasses import dataclass

from ssl_dist.errors import UserError

BY_SRUN = "SSL_DIST_BY_SRUN"  # environment variable of ranks that srun has started, each with cores and GPUs of its own


@dataclass(frozen=True)
class RankInfo:
    """Rank `rank` of `world_size`; `local_rank` of `local_world_size` on its node. 0 of 1 without a launcher."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @staticmethod
    def from_environment() -> "RankInfo":
        """From RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, as torchrun sets them. Raises `UserError`."""
        if "RANK" not in os.environ:
            return RankInfo()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        try:
            return RankInfo(*(int(os.environ[name]) for name in names))
        except (KeyError, ValueError):
            missing = [name for name in names if not os.environ.get(name, "").isdigit()]
            raise UserError(f"environment: RANK is set but {missing[0]} is not a number; start with torchrun") from None

    @property
    def is_rank0(self) -> bool:
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.world_size == 1

    @property
    def cores(self) -> int:
        """The number of cores of this rank: what srun gave it, else its share of those that this process may use."""
        if BY_SRUN in os.environ and "SLURM_CPUS_PER_TASK" in os.environ:
            return int(os.environ["SLURM_CPUS_PER_TASK"])
        return max(1, available_cores() // self.local_world_size)

    def __str__(self) -> str:
        return f"rank {self.rank} on {socket.gethostname()}"


def available_cores() -> int:
    """The number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
