"""The ranks of a run. The only file that names torch.distributed.

Gradient rule: `gather_views` and `sum` have a SUM backward, and `wrap` averages gradients over the ranks. So when the
*mean over the ranks* of the returned loss is the loss of the global batch, the gradients equal those of one process:
a loss computed in full on every rank is returned as it is, a rank's share of a sum goes through `from_share`.
"""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ssl_dist import batchnorm
from ssl_dist.errors import UserError
from ssl_dist.grid import Grid

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Where this process stands, as its launcher says; one process alone when there is none."""

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


class World:
    """All ranks of a run, the grid they form, and the few exchanges that methods and the loop need."""

    def __init__(self, place: Place, grid: Grid, device: torch.device):
        assert grid.size == place.size, "the grid must hold every rank"
        self.place, self.grid, self.device = place, grid, device
        self._agreed: BaseException | None = None  # an error that all ranks raise together

    def __enter__(self) -> "World":
        return self

    def __exit__(self, _kind, error: BaseException | None, _traceback) -> None:
        if isinstance(error, UserError) and error is not self._agreed:
            error.met_alone = True
        self.close()

    @property
    def is_first(self) -> bool:
        return self.place.rank == 0

    @property
    def alone(self) -> bool:
        return self.place.size == 1

    # ------------------------------------------------------------------ for methods

    def gather_views(self, z_VBD: Tensor, batch: Any = None) -> Tensor:
        """The global batch's representations [K, M, D] in canonical (view, image) order, from [V_local, B_local, D]."""
        return z_VBD if self.alone else _GatherViews.apply(z_VBD, self.grid, self.place.rank)

    def gather_images(self, x_B: Tensor, batch: Any = None) -> Tensor:
        """A quantity of the images of the global batch [M, ...] from [B_local, ...]; no gradient."""
        return x_B if self.alone else _gather(x_B)[:: self.grid.views].flatten(0, 1)

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the ranks, with gradient."""
        return x if self.alone else _Sum.apply(x)

    def reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks, without gradient; `x` is not changed."""
        if self.alone:
            return x
        total = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    def share(self, count: int) -> tuple[int, int]:
        """This rank's even share [lo, hi) of `count` pieces of work."""
        rank, size = self.place.rank, self.place.size
        return rank * count // size, (rank + 1) * count // size

    def from_share(self, loss_share: Tensor) -> Tensor:
        """A loss whose mean over the ranks is the sum of the ranks' shares."""
        return loss_share * self.place.size

    # ------------------------------------------------------------------ for the loop

    def wrap(self, method: nn.Module) -> nn.Module:
        """`method` with gradients averaged over the ranks; buffers need no broadcast, they are equal by design."""
        if self.alone or not any(p.requires_grad for p in method.parameters()):
            return method
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        with warnings.catch_warnings():
            # torch 2.15 prefers another name for this argument; older versions know only this one.
            warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
            # Not that any were unused: it keeps DDP from rearranging its buckets after the first backward. A resumed
            # run would sum its first gradients in another order than the run that was not interrupted.
            return nn.parallel.DistributedDataParallel(
                method, device_ids, broadcast_buffers=False, find_unused_parameters=True
            )

    def synchronize_batchnorm(self, module: nn.Module) -> nn.Module:
        """BatchNorm over the global batch, on GPU by torch and on CPU by our twin."""
        if self.alone:
            return module
        batchnorm.refuse_others(module)
        if self.device.type == "cuda":
            return nn.SyncBatchNorm.convert_sync_batchnorm(module)
        return batchnorm.synchronize(module, self.reduce)

    def mean(self, x: Tensor) -> Tensor:
        """The mean over the ranks, without gradient."""
        return self.reduce(x) / self.place.size

    def any(self, *flags: bool) -> list[bool]:
        """For every flag, whether it is up on any rank. One small all-reduce."""
        if self.alone:
            return list(flags)
        up = torch.tensor([float(flag) for flag in flags], device=self.device)
        dist.all_reduce(up, dist.ReduceOp.MAX)
        return [value > 0 for value in up.tolist()]

    def first(self, action: Callable[[], T]) -> T:
        """What `action` returns on rank 0, on every rank; a `UserError` or `OSError` there is raised on every rank."""
        if self.alone:
            return action()
        answer: list[Any] = [None, None]
        if self.is_first:
            try:
                answer[0] = action()
            except (UserError, OSError) as error:
                answer[1] = error
        dist.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            self._agreed = answer[1]
            raise answer[1]
        return answer[0]

    def barrier(self) -> None:
        if not self.alone:
            dist.barrier()

    def close(self) -> None:
        if not self.alone and dist.is_initialized():
            dist.destroy_process_group()


def choose_device(place: Place) -> torch.device:
    """The rank's own GPU where there is one for each rank of the node, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count < place.local_size:
        raise UserError(
            f"{place.local_size} ranks on this node but {count} GPUs are visible; start {count} ranks, "
            "or set CUDA_VISIBLE_DEVICES= to run on the CPU"
        )
    return torch.device("cuda", place.local_rank)


def start(place: Place, grid: Grid, timeout: float) -> World:
    """Join the other ranks (nothing to do for one rank). A rank waits `timeout` seconds for the others, no longer."""
    device = choose_device(place)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if place.size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    return World(place, grid, device)


def one_process(device: torch.device | None = None) -> World:
    """A world of one rank, for work that needs no other: reading checkpoints, tests."""
    return World(Place(), Grid(1, 1), device or torch.device("cpu"))


def _gather(x: Tensor) -> Tensor:
    """[W, ...] from every rank's [...]; the shapes are equal by the grid."""
    flat = x.detach().flatten()
    out = flat.new_empty(dist.get_world_size() * flat.numel())
    dist.all_gather_into_tensor(out, flat)
    return out.view(-1, *x.shape)


class _GatherViews(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z_VBD, grid: Grid, rank: int):
        ctx.grid, ctx.rank = grid, rank
        num_views, num_images = z_VBD.shape[:2]
        parts = _gather(z_VBD).unflatten(0, (grid.images, grid.views))
        ctx.shape = parts.shape
        canonical = parts.movedim((1, 2), (0, 1))  # image shard and image come together, in this order
        return canonical.reshape(grid.views * num_views, grid.images * num_images, *z_VBD.shape[2:])

    @staticmethod
    def backward(ctx, grad_KMD):
        grid = ctx.grid
        num_views, num_images = ctx.shape[2:4]
        grad = grad_KMD.clone(memory_format=torch.contiguous_format)  # autograd's buffer may be shared
        dist.all_reduce(grad)
        views = slice(grid.view_shard(ctx.rank) * num_views, (grid.view_shard(ctx.rank) + 1) * num_views)
        images = slice(grid.image_shard(ctx.rank) * num_images, (grid.image_shard(ctx.rank) + 1) * num_images)
        return grad[views, images].contiguous(), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        total = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad):
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total
