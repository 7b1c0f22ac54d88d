"""Which rank of a run this process is, read from the launcher's environment variables."""

import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ssl_dist.errors import RaisedOn, UserError, quoted

UNDER_TORCHRUN = "TORCHELASTIC_RUN_ID"  # environment variable that torchrun sets
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
BY_SRUN = "SSL_DIST_BY_SRUN"  # environment variable of ranks that srun has started, each with cores and GPUs of its own

# The cores that this process was started with, in order.
GIVEN_CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [*range(os.cpu_count() or 1)]


@dataclass(frozen=True)
class RankInfo:
    """Rank `rank` of `world_size`; `local_rank` of `local_world_size` on its node. 0 of 1 without a launcher."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @staticmethod
    def from_environment() -> "RankInfo":
        """From RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, as torchrun sets them; 0 of 1 where none is set.

        Raises `UserError` where a part of them is set only, or where no rank can have such numbers.
        """
        given = [name for name in _VARIABLES if name in os.environ]
        if not given:
            return RankInfo()
        for name in _VARIABLES:
            if name not in os.environ:
                raise _impossible(f"{given[0]} = {quoted(os.environ[given[0]])} is set but {name} is not", given)
        info = RankInfo(*(environment_number(name) for name in _VARIABLES))
        for (name, number), (of, size) in (
            (("RANK", info.rank), ("WORLD_SIZE", info.world_size)),
            (("LOCAL_RANK", info.local_rank), ("LOCAL_WORLD_SIZE", info.local_world_size)),
        ):
            if number >= size:
                raise _impossible(f"{name} = {number} of {of} = {size}: ranks count from 0", given)
        if info.local_world_size > info.world_size or info.local_rank > info.rank:
            raise _impossible(
                f"LOCAL_RANK = {info.local_rank} of {info.local_world_size} cannot be RANK = {info.rank} of "
                f"{info.world_size}",
                given,
            )
        return info

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
            return max(1, environment_number("SLURM_CPUS_PER_TASK"))
        return max(1, available_cores() // self.local_world_size)

    def __str__(self) -> str:
        return f"rank {self.rank} on {socket.gethostname()}"


def available_cores() -> int:
    """The number of cores this process may use; of a rank that `cores.bind` has bound, those of the ranks beside it
    too."""
    return len(GIVEN_CORES)


def environment_number(name: str, environment: Mapping[str, str] = os.environ, default: int | None = None) -> int:
    """The whole number >= 0 in an environment variable, `default` where it is not set. Raises `UserError`."""
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None:
        raise UserError(f"environment: {name} is not set; start with srun or torchrun, which set it")
    together = [other for other in _VARIABLES if other in environment] if name in _VARIABLES else [name]
    if not re.fullmatch("[0-9]{1,9}", text):
        raise _impossible(f"{name} = {quoted(text)} is not a number", together)
    return int(text)


def _impossible(fault: str, given: Sequence[str]) -> UserError:
    remedy = f"start with torchrun or srun, or unset {' '.join(given)}"
    return UserError(f"environment: {fault}; {remedy}", RaisedOn.THIS_RANK)
