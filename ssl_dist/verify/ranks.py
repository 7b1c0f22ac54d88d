"""The processes of `ssl-dist verify`: ranks that train for real and measure their difference from one process.

The process of W = 1 writes its tensors to a page a step. A rank of several reads that page when it has taken the same
step and keeps only the difference, so that no process holds more than one step, whatever the backbone.
"""

import contextlib
import math
import multiprocessing
import os
import queue
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from ssl_dist.clock import Clock
from ssl_dist.config import Config
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.distributed.signals import StopRequest
from ssl_dist.distributed.world import World, join_world
from ssl_dist.errors import Fault
from ssl_dist.grid import Grid
from ssl_dist.methods.base import Output
from ssl_dist.run.blueprint import RunPlan, derive
from ssl_dist.run.log import RunLog
from ssl_dist.train.loop import fit
from ssl_dist.train.state import TrainState

STEP_TIMEOUT_S = 300.0  # in which some rank must have taken a step; the first one may have to compile
SIZE_FLOOR = 1e-3  # share of the largest tensor of a kind below which a tensor counts as that share
NORM = {"fp64": math.inf, "fp32": 2}  # the vector norm that a tensor's difference and size are taken in

Figures = dict[str, list[float]]  # kind of tensors -> its difference at every step
Messages: TypeAlias = "Queue[tuple[int, int, Figures | str | None]]"


@dataclass(frozen=True)
class GridTraining:
    """A training on a grid of ranks. pages: the folder of the tensors of one process, which `writes` them; device: cpu
    or cuda."""

    title: str
    config: Config
    pages: Path
    device: str
    writes: bool


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor], norm: float) -> float:
    """The largest relative difference among tensors of one kind: |a - b| / max(|b|, floor), | | the vector norm.

    The floor is SIZE_FLOOR times the largest |b| of the kind: the gradient of a bias before a BatchNorm is exactly 0,
    and what is seen of it is rounding noise. Infinite where names or shapes differ, where integers do, and for NaN.
    """
    if ours.keys() != theirs.keys():
        return math.inf
    floating = {name: b.double() for name, b in theirs.items() if b.is_floating_point()}
    sizes = {name: float(torch.linalg.vector_norm(b, norm)) for name, b in floating.items()}
    floor = SIZE_FLOOR * max(sizes.values(), default=0.0)
    worst = 0.0
    for name, b in theirs.items():
        a = ours[name]
        if torch.equal(a, b):
            continue
        if a.shape != b.shape or name not in floating:
            return math.inf
        scale = max(sizes[name], floor)
        relative = float(torch.linalg.vector_norm(a.double() - floating[name], norm)) / scale if scale else math.inf
        worst = max(worst, math.inf if math.isnan(relative) else relative)
    return worst


class ComparedTraining(TrainState):
    """The training of a run that, in the place of a log and checkpoints, writes its tensors or compares them with those
    that were written. on_page: called after each."""

    def __init__(self, plan: RunPlan, world: World, pages: Path, writes: bool, on_page: Callable[[], None]):
        super().__init__(plan, world)
        self.pages, self.writes, self.on_page = pages, writes, on_page
        self.figures: Figures = {}

    def log(self) -> contextlib.AbstractContextManager[RunLog | None]:
        return contextlib.nullcontext()

    def write(self, log: RunLog | None, clock: Clock, output: Output) -> None:
        """The gradients that made this step are still in `p.grad`."""
        head: dict[str, Tensor] = {}
        deep: dict[str, Tensor] = {}
        for name, parameter in self.method.named_parameters():
            if parameter.grad is not None:
                (deep if name.startswith("backbone.") else head)[name] = parameter.grad
        self.show(clock.step, loss={"loss": self.world.all_reduce_mean(output.loss.detach())}, head=head, deep=deep)

    def show_images(self, log: RunLog | None, clock: Clock) -> None:
        pass

    def save(self, clock: Clock, stop: StopRequest) -> None:
        pass

    def finish(self, clock: Clock) -> None:
        weights = {name: parameter.detach() for name, parameter in self.method.named_parameters()}
        buffers = dict(self.method.named_buffers())
        if (probe := self.online.probe) is not None:
            weights |= {f"online_probe.{name}": parameter.detach() for name, parameter in probe.named_parameters()}
            buffers |= {f"online_probe.{name}": buffer for name, buffer in probe.named_buffers()}
        self.show("end", buffers=buffers, weights=weights)

    def show(self, page: int | str, **kinds: dict[str, Tensor]) -> None:
        path = self.pages / f"{page}.pt"
        if self.writes:
            path.parent.mkdir(exist_ok=True)
            torch.save(kinds, path)
        else:
            one_process = torch.load(path)
            for kind, tensors in kinds.items():
                on_host = {name: tensor.cpu() for name, tensor in tensors.items()}
                figure = difference(on_host, one_process[kind], NORM[self.config.precision])
                self.figures.setdefault(kind, []).append(figure)
        self.on_page()


def run(
    size: int,
    trainings: list[GridTraining],
    prepare: Callable[[], None] | None = None,
    step_timeout_s: float = STEP_TIMEOUT_S,
) -> list[Figures]:
    """Run the trainings on `size` processes that form one group; for each the figures, the worst of all ranks.

    Every rank calls `prepare` first. Raises `Fault` when a rank fails or dies, and after `step_timeout_s` without a
    step of any rank.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    messages: Messages = context.Queue()
    port = _free_port()
    ranks = [
        context.Process(target=_rank, args=(rank, size, port, trainings, prepare, messages), daemon=True)
        for rank in range(size)
    ]
    for rank in ranks:
        rank.start()
    try:
        results = _collect(ranks, messages, trainings, step_timeout_s)
        for rank in ranks:
            rank.join(10)
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    return results


def _collect(
    ranks: Sequence[BaseProcess], messages: Messages, trainings: list[GridTraining], step_timeout_s: float
) -> list[Figures]:
    size = len(ranks)
    of_ranks: list[list[Figures]] = [[] for _ in trainings]
    start = last_message = time.monotonic()
    while any(len(figures) < size for figures in of_ranks):
        try:
            rank, number, message = messages.get(timeout=1)
        except queue.Empty:
            dead = [f"rank {i} of {size} (exit code {p.exitcode})" for i, p in enumerate(ranks) if p.exitcode]
            if dead:
                raise Fault(f"verify: {', '.join(dead)} died without a word") from None
            if time.monotonic() - last_message > step_timeout_s:
                title = next(t.title for t, figures in zip(trainings, of_ranks, strict=True) if len(figures) < size)
                raise Fault(f"verify: no step of any of {size} ranks within {step_timeout_s:g} s at {title}") from None
            continue
        last_message = time.monotonic()
        title = trainings[number].title
        if isinstance(message, str):
            print(message, file=sys.stderr, flush=True)
            raise Fault(f"verify: rank {rank} of {size} failed at {title}: {message.splitlines()[-1]}")
        if message is not None:
            of_ranks[number].append(message)
            if len(of_ranks[number]) == size:
                print(f"{title}: {last_message - start:.1f} s", file=sys.stderr, flush=True)
                start = last_message
    return [_worst(figures) for figures in of_ranks]


def _worst(of_ranks: list[Figures]) -> Figures:
    kinds = of_ranks[0]
    return {kind: [max(step) for step in zip(*(figures[kind] for figures in of_ranks), strict=True)] for kind in kinds}


def _rank(
    rank: int,
    size: int,
    port: int,
    trainings: list[GridTraining],
    prepare: Callable[[], None] | None,
    messages: Messages,
) -> None:
    """One process of the group. It sends (rank, training, None) at every step, then the training's figures, or a
    traceback."""
    torch.set_num_threads(1)
    rank_info = RankInfo(rank, size, rank, size)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    number = 0
    try:
        if prepare is not None:
            prepare()
        group = join_world(rank_info, Grid(size, 1), device=_device(trainings[0].device, rank))  # all grids use it
        for number, training in enumerate(trainings):
            plan = derive(training.config, rank_info)
            world = World(rank_info, plan.grid, _device(training.device, rank))
            on_page = partial(messages.put, (rank, number, None))
            compared = ComparedTraining(plan, world, training.pages, training.writes, on_page)
            assert fit(compared, StopRequest()) == 0, "no signal is taken here"
            messages.put((rank, number, compared.figures))
        group.close()
    except BaseException:  # whatever it is, the parent shows it and ends the others
        messages.put((rank, number, traceback.format_exc()))


def _device(name: str, rank: int) -> torch.device:
    """A GPU that ranks may share, or the CPU."""
    return torch.device("cuda", rank % torch.cuda.device_count()) if name == "cuda" else torch.device("cpu")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
