"""The ranks of a run and their collectives. Only this file and rendezvous.py name torch.distributed.

Gradient rule: `gather_views` and `all_reduce_sum_with_grad` have a SUM backward, and DDP averages gradients over the
ranks. So when the *mean over the ranks* of the returned loss is the loss of the global batch, the gradients equal those
of one process: a loss computed in full on every rank is returned as it is, a rank's share of a sum goes through
`scale_for_ddp_mean`.
"""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ssl_dist.device import HostCopy
from ssl_dist.distributed import gloo_threads, rendezvous
from ssl_dist.distributed.heartbeat import RankState
from ssl_dist.distributed.rank import BY_SRUN, RankInfo, environment_number
from ssl_dist.errors import AFTER_MENDING, Fault, RaisedOn, UserError, of_system
from ssl_dist.grid import Grid
from ssl_dist.nn import batchnorm, batchnorm_cuda

T = TypeVar("T")


class World:
    """The process group of a run, the grid that its ranks form, and the collectives of methods and the loop."""

    def __init__(self, rank_info: RankInfo, grid: Grid, device: torch.device, state: RankState | None = None):
        assert grid.size == rank_info.world_size, "the grid must hold every rank"
        self.rank_info, self.grid, self.device = rank_info, grid, device
        self.state = state or RankState(rank_info)  # what this rank is doing, for the watchdog and the other ranks

    def __enter__(self) -> "World":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None or self.device.type == "cpu":
            self.close()  # with NCCL this would wait for collectives that never end; the end of the process frees them

    @property
    def is_rank0(self) -> bool:
        return self.rank_info.is_rank0

    @property
    def alone(self) -> bool:
        return self.rank_info.alone

    # ------------------------------------------------------------------ for methods

    def gather_views(self, z_VBD: Tensor) -> Tensor:
        """The global batch's representations [K, M, D] in canonical (view, image) order, from [V_local, B_local, D]."""
        return z_VBD if self.alone else _GatherViews.apply(z_VBD, self)

    def gather_images(self, x_B: Tensor) -> Tensor:
        """A quantity of the images of the global batch [M, ...] from [B_local, ...]; no gradient."""
        return x_B if self.alone else self._gather(x_B)[:: self.grid.views].flatten(0, 1)

    def gather(self, x: Tensor) -> Tensor:
        """[W, ...] from every rank's [...], which have one shape; no gradient."""
        return x[None] if self.alone else self._gather(x)

    def all_reduce_sum_with_grad(self, x: Tensor) -> Tensor:
        """The sum over the ranks, with gradient."""
        return x if self.alone else _Sum.apply(x, self)

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """The sum over the ranks, without gradient; `x` is not changed."""
        return x if self.alone else self._all_reduce_sum(x)

    def _all_reduce_sum(self, x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
        total = x.detach().clone(memory_format=torch.contiguous_format)
        with self._collective("all_reduce"):
            dist.all_reduce(total, group=group)
        return total

    def share(self, count: int) -> tuple[int, int]:
        """This rank's even share [lo, hi) of `count` pieces of work."""
        rank, size = self.rank_info.rank, self.rank_info.world_size
        return rank * count // size, (rank + 1) * count // size

    def scale_for_ddp_mean(self, loss_share: Tensor) -> Tensor:
        """The loss whose mean over the ranks is the sum of the ranks' shares."""
        return loss_share * self.rank_info.world_size

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
        """BatchNorm over the global batch, by a twin for GPUs or one for the CPU. The latter also for one process, so
        that the arithmetic is the same on any number of ranks; one GPU has torch's."""
        if not self.alone:
            batchnorm.refuse_others(module)
        on_gpu = self.device.type == "cuda"
        if on_gpu and self.alone:
            return module
        twin = batchnorm_cuda.CudaSyncBatchNorm if on_gpu else batchnorm.SyncBatchNorm
        return batchnorm.synchronize(module, lambda layer: twin(layer, self.all_reduce_sum, self.gather))

    def view_columns(self, module: nn.Module) -> batchnorm.ViewColumns | None:
        """For a method whose views pass alone, after `synchronize_batchnorm`. None: every rank holds all views."""
        if self.grid.views == 1:
            return None
        groups = []
        for column in range(self.grid.views):  # every rank takes part in the making of every group
            with self._collective("new_group"), gloo_threads.unobtrusive():
                ranks = list(range(column, self.rank_info.world_size, self.grid.views))
                groups.append(dist.new_group(ranks, timeout=rendezvous.COLLECTIVE_TIMEOUT))
        group = groups[self.grid.view_shard(self.rank_info.rank)]
        assert isinstance(group, dist.ProcessGroup), "a rank belongs to the group of its column"

        in_column = {
            "reduce": lambda x: self._all_reduce_sum(x, group),
            "gather": lambda x: self._gather(x, group, self.grid.images),
        }

        def to_column(layer: nn.Module) -> Callable[[], None]:
            assert isinstance(layer, batchnorm.SyncBatchNorm), "the twins are in place"
            before = {name: getattr(layer, name) for name in layer.collectives}
            vars(layer).update({name: in_column[name] for name in before})
            return lambda: vars(layer).update(before)

        return batchnorm.ViewColumns(module, to_column)

    def gather_columns(self, x: Tensor) -> Tensor:
        """[columns, ...] from every rank's [...]: those of the ranks that hold the first images; no gradient."""
        return self._gather(x)[: self.grid.views]

    def all_reduce_mean(self, x: Tensor) -> Tensor:
        """The mean over the ranks, without gradient."""
        return self.all_reduce_sum(x) / self.rank_info.world_size

    def any_rank(self, *flags: bool | Tensor) -> Callable[[], list[bool]]:
        """For every flag, whether it is set on any rank: one small all-reduce, whose result the returned call waits
        for. That is the only wait for a GPU in a step, so the loop gives it more work first."""
        up = torch.stack(
            [
                flag.to(torch.float32) if isinstance(flag, Tensor) else torch.full((), float(flag), device=self.device)
                for flag in flags
            ]
        )
        on_gpu = self.device.type == "cuda"
        work = None
        if not self.alone:
            with self._collective("all_reduce"):
                work = dist.all_reduce(up, dist.ReduceOp.MAX, async_op=True)
                if on_gpu:
                    work.wait()  # the stream waits, not this thread
        copied = HostCopy({"up": up})

        def flags_of_all() -> list[bool]:
            if work is not None and not on_gpu:
                with self._collective("all_reduce"):
                    work.wait()
            return [value > 0 for value in copied.wait()["up"].tolist()]

        return flags_of_all

    def on_rank0(self, action: Callable[[], T]) -> T:
        """What `action` returns on rank 0, broadcast to every rank. A `UserError` or `OSError` there is raised on every
        rank, the latter as a `Fault`."""
        outcome: list[Any] = [None, None]  # value, exception
        if self.is_rank0:
            try:
                outcome[0] = action()
            except UserError as error:
                outcome[1] = UserError(str(error), RaisedOn.EVERY_RANK)
            except OSError as error:
                where = f"{self.rank_info} at step {self.state.step}"
                outcome[1] = Fault(f"{where}: {of_system(error)}; {AFTER_MENDING}", RaisedOn.EVERY_RANK)
        if not self.alone:
            with self._collective("broadcast"):
                dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def raise_together(self, action: Callable[[], T]) -> T:
        """What `action` returns on this rank. A `UserError` in it on any rank is raised on every rank."""
        message: str | None = None
        try:
            value = action()
        except UserError as error:
            message = str(error)
        for message_of_rank in self.all_gather_object(message):
            if message_of_rank is not None:
                raise UserError(message_of_rank, RaisedOn.EVERY_RANK)
        return value

    def all_gather_object(self, value: T) -> list[T]:
        """The values of all ranks, by rank; they must pickle."""
        if self.alone:
            return [value]
        values: list[Any] = [None] * self.rank_info.world_size
        with self._collective("all_gather"):
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if not self.alone:
            with self._collective("barrier"):
                dist.barrier()

    def close(self) -> None:
        if not self.alone and dist.is_initialized():
            dist.destroy_process_group()

    @contextlib.contextmanager
    def _collective(self, operation: str) -> Iterator[None]:
        """A context of one collective operation, which the watchdog sees, also where a GPU ends it later."""
        with self.state.collective(operation):
            yield
        if self.device.type == "cuda":
            ended = torch.cuda.Event()
            ended.record()
            self.state.has_device_ended = ended.query

    def _gather(self, x: Tensor, group: dist.ProcessGroup | None = None, size: int | None = None) -> Tensor:
        """[W, ...] from every rank's [...]; the shapes are equal by the grid. size: ranks of the group."""
        flat = x.detach().flatten()
        out = flat.new_empty((size or self.rank_info.world_size) * flat.numel())
        with self._collective("all_gather"):
            dist.all_gather_into_tensor(out, flat, group=group)
        return out.view(-1, *x.shape)


def choose_device(rank_info: RankInfo) -> torch.device:
    """The rank's own GPU where there is one for each rank of the node, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    on_node = environment_number("SLURM_GPUS_ON_NODE", default=0) if BY_SRUN in os.environ else 0
    if count == 1 < rank_info.local_world_size <= on_node:
        return torch.device("cuda", 0)  # srun --gpus-per-task shows every rank its own GPU alone
    if count < rank_info.local_world_size:
        raise UserError(
            f"{rank_info.local_world_size} ranks on this node but {count} GPUs are visible; start {count} ranks, "
            "or set CUDA_VISIBLE_DEVICES= to run on the CPU"
        )
    return torch.device("cuda", rank_info.local_rank)


def ranks_here(wanted: int) -> int:
    """`wanted` ranks, or as many as this machine has GPUs where it has some, but fewer."""
    return min(wanted, torch.cuda.device_count() or wanted)


def join_world(
    rank_info: RankInfo,
    grid: Grid,
    state: RankState | None = None,
    is_stopping: Callable[[], bool] = lambda: False,
    device: torch.device | None = None,
) -> World:
    """Wait for the other ranks and form their process group; one rank has nothing to wait for. device: one that other
    ranks may have as well, so that all collectives go by gloo; None: a GPU of the rank's own, or the CPU. Raises what
    `rendezvous.join` and `self_test` raise."""
    shared, device = device is not None, device or choose_device(rank_info)
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic; read when CUDA starts
        torch.cuda.set_device(device)
    world = World(rank_info, grid, device, state)
    if not world.alone:
        rendezvous.join(rank_info, torch.device("cpu") if shared else device, is_stopping)
        self_test(world)
    return world


def self_test(world: World) -> None:
    """Check at start-up that gathered values are in canonical order and gradients are summed; some milliseconds.

    The cell (k, m) of the global batch holds its own number, and rank r's loss is r + 1 times the sum of squares; so
    the gradient of a cell must be 2 cell (1 + 2 + ... + W). All are whole numbers, which float64 holds exactly on any
    number of ranks. Raises `Fault`: a library or network that computes wrong sums would train a wrong model silently.
    """
    grid, rank, size = world.grid, world.rank_info.rank, world.rank_info.world_size
    num_views, num_images = 2 * grid.views, 3 * grid.images
    cells = torch.arange(1, num_views * num_images + 1, dtype=torch.float64, device=world.device)
    cells = cells.view(num_views, num_images, 1)
    views, images = grid.view_range(rank, num_views), grid.image_range(rank, num_images)
    own = cells[views.start : views.stop, images.start : images.stop].clone().requires_grad_()
    gathered = world.gather_views(own)
    if not torch.equal(gathered.detach(), cells):
        raise Fault(f"{world.rank_info}: self-test: gathered representations are not in canonical order")
    (gathered.square().sum() * (rank + 1)).backward()
    assert own.grad is not None, "a leaf of the graph"
    if not torch.equal(own.grad, own.detach() * size * (size + 1)):
        raise Fault(f"{world.rank_info}: self-test: gradients of gathered views are not summed over the ranks")
    total = world.all_reduce_sum_with_grad(own.sum())
    if total.item() != cells.sum().item():
        raise Fault(f"{world.rank_info}: self-test: a sum over the ranks is {total.item():g}, not {cells.sum():g}")


def one_process(device: torch.device | None = None) -> World:
    """A world of one rank, for work that needs no other: reading checkpoints, tests."""
    return World(RankInfo(), Grid(1, 1), device or torch.device("cpu"))


def joined(device: torch.device) -> World:
    """The ranks of the process group that the calling program has formed, each with images of its own; one rank where
    it has formed none."""
    if not dist.is_available() or not dist.is_initialized():
        return one_process(device)
    size = dist.get_world_size()
    return World(RankInfo(dist.get_rank(), size), Grid(size, 1), device)


class _GatherViews(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z_VBD: Tensor, world: World) -> Tensor:
        ctx.world, grid = world, world.grid
        num_views, num_images = z_VBD.shape[:2]
        parts = world._gather(z_VBD).unflatten(0, (grid.images, grid.views))
        canonical = parts.movedim((1, 2), (0, 1))  # image shard and image come together, in this order
        return canonical.reshape(grid.views * num_views, grid.images * num_images, *z_VBD.shape[2:])

    @staticmethod
    def backward(ctx: Any, grad_KMD: Tensor) -> tuple[Tensor, None]:
        grid, rank = ctx.world.grid, ctx.world.rank_info.rank
        grad = ctx.world.all_reduce_sum(grad_KMD)
        views, images = grid.view_range(rank, grad.shape[0]), grid.image_range(rank, grad.shape[1])
        return grad[views.start : views.stop, images.start : images.stop].contiguous(), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, world: World) -> Tensor:
        ctx.world = world
        return world.all_reduce_sum(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.world.all_reduce_sum(grad), None
