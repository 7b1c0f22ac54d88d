"""What a kernel needs of the ranks that hold the rows of a matrix together; `distributed.world.World` has it."""

from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Phases(Protocol):
    """Announces work that takes longer than a training step."""

    def phase_of(self, name: str, bound: float) -> AbstractContextManager[None]:
        """Around that work: `bound` seconds, in place of the run's timeout, until a rank counts as stuck in it."""


class Ranks(Protocol):
    """The ranks, each with some of the rows."""

    @property
    def state(self) -> Phases: ...

    def share(self, count: int) -> tuple[int, int]:
        """This rank's even share [lo, hi) of `count` pieces of work."""

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """The sum of the ranks' tensors of one shape, on every rank, without gradient; `x` is not changed."""

    def all_gather_object(self, value: T) -> list[T]:
        """The values of all ranks, by rank."""


class FromHost:
    """The ranks for tensors of the CPU, where collectives take those of `device`."""

    def __init__(self, ranks: Ranks, device: torch.device):
        self._ranks, self._device = ranks, device

    @property
    def state(self) -> Phases:
        return self._ranks.state

    def share(self, count: int) -> tuple[int, int]:
        return self._ranks.share(count)

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        return self._ranks.all_reduce_sum(x.to(self._device)).cpu()

    def all_gather_object(self, value: T) -> list[T]:
        return self._ranks.all_gather_object(value)
