"""Where a process stands among the ranks of a run, as its launcher says."""

import os
import socket
from dataclasses import dataclass

from ssl_dist.errors import UserError


@dataclass(frozen=True)
class Place:
    """A rank of `size`, and of `local_size` on this node. One process alone when there is no launcher."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @staticmethod
    def from_environment() -> "Place":
        """torchrun sets RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE."""
        if "RANK" not in os.environ:
            return Place()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        try:
            return Place(*(int(os.environ[name]) for name in names))
        except (KeyError, ValueError):
            missing = [name for name in names if not os.environ.get(name, "").isdigit()]
            raise UserError(f"environment: RANK is set but {missing[0]} is not a number; start with torchrun") from None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.size == 1

    def __str__(self) -> str:
        return f"rank {self.rank} on {socket.gethostname()}"
