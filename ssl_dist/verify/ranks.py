"""The processes behind `ssl-dist verify`: ranks that train for real and measure how far they are from one process.

The process of W = 1 writes its tensors to a page a step. A rank of more reads that page when it has taken the same step
and keeps only the difference, so nobody holds more than one step, whatever the backbone.
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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
from ssl_dist.train.loop import fit
from ssl_dist.train.state import TrainState

PATIENCE = 300.0  # seconds in which some rank must have taken a step; the first one may have to compile
FLOOR = 1e-3  # share of the largest tensor of a kind below which a tensor counts as that share
NORM = {"fp64": math.inf, "fp32": 2}  # the vector norm that a tensor's difference and size are taken in

Figures = dict[str, list[float]]  # kind of tensors -> its difference at every step


@dataclass(frozen=True)
class Job:
    """A training on a grid of ranks. pages: the folder of the tensors of one process."""

    title: str
    config: Config
    pages: Path


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor], norm: float) -> float:
    """The largest relative difference among tensors of one kind: |a - b| / max(|b|, floor), | | the vector norm.

    The floor is FLOOR times the largest |b| of the kind: the gradient of a bias before a BatchNorm is exactly 0, and
    what is seen of it is rounding noise. Infinite where names or shapes differ, where integers do, and for NaN.
    """
    if ours.keys() != theirs.keys():
        return math.inf
    floating = {name: b.double() for name, b in theirs.items() if b.is_floating_point()}
    sizes = {name: float(torch.linalg.vector_norm(b, norm)) for name, b in floating.items()}
    floor = FLOOR * max(sizes.values(), default=0.0)
    worst = 0.0
    for name, b in theirs.items():
        a = ours[name]
        if torch.equal(a, b):
            continue
        if a.shape != b.shape or name not in floating:
            return math.inf
        scale = max(sizes[name], floor)
        found = float(torch.linalg.vector_norm(a.double() - floating[name], norm)) / scale if scale else math.inf
        worst = max(worst, math.inf if math.isnan(found) else found)
    return worst


class Witness(TrainState):
    """The real training, which shows its tensors instead of keeping them: one process records, several compare."""

    def __init__(self, plan: RunPlan, world: World, pages: Path, alive: Callable[[], None]):
        super().__init__(plan, world)
        self.pages, self.alive = pages, alive
        self.figures: Figures = {}

    def log(self):
        return contextlib.nullcontext()

    def write(self, log, clock: Clock, output: Output) -> None:
        """The gradients that made this step are still in `p.grad`."""
        head, deep = {}, {}
        for name, parameter in self.method.named_parameters():
            if parameter.grad is not None:
                (deep if name.startswith("backbone.") else head)[name] = parameter.grad
        self.show(clock.step, loss={"loss": self.world.all_reduce_mean(output.loss.detach())}, head=head, deep=deep)

    def save(self, clock: Clock, stop: StopRequest) -> None:
        pass

    def finish(self, clock: Clock) -> None:
        weights = {name: parameter.detach() for name, parameter in self.method.named_parameters()}
        self.show("end", buffers=dict(self.method.named_buffers()), weights=weights)

    def show(self, page: int | str, **kinds: dict[str, Tensor]) -> None:
        path = self.pages / f"{page}.pt"
        if self.world.alone:
            path.parent.mkdir(exist_ok=True)
            torch.save(kinds, path)
        else:
            one_process = torch.load(path)
            for kind, tensors in kinds.items():
                found = difference(tensors, one_process[kind], NORM[self.config.precision])
                self.figures.setdefault(kind, []).append(found)
        self.alive()


def run(
    size: int,
    jobs: list[Job],
    prepare: Callable[[], None] | None = None,
    say: Callable[[str], None] = lambda _: None,
    patience: float = PATIENCE,
) -> list[Figures]:
    """Run the jobs on `size` processes that form one group; for each the figures, the worst of all ranks.

    Every rank calls `prepare` first. Raises `Fault` when a rank fails or dies, and after `patience` seconds without a
    step of any rank.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    answers = context.Queue()
    port = _free_port()
    ranks = [
        context.Process(target=_rank, args=(rank, size, port, jobs, prepare, answers), daemon=True)
        for rank in range(size)
    ]
    for rank in ranks:
        rank.start()
    try:
        results = _collect(ranks, answers, jobs, say, patience)
        for rank in ranks:
            rank.join(10)
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    return results


def _collect(ranks: list, answers, jobs: list[Job], say: Callable[[str], None], patience: float) -> list[Figures]:
    size = len(ranks)
    done: list[list[Figures]] = [[] for _ in jobs]
    start = heard = time.monotonic()
    while any(len(figures) < size for figures in done):
        try:
            rank, number, answer = answers.get(timeout=1)
        except queue.Empty:
            dead = [f"rank {i} of {size} (exit code {p.exitcode})" for i, p in enumerate(ranks) if p.exitcode]
            if dead:
                raise Fault(f"verify: {', '.join(dead)} died without a word") from None
            if time.monotonic() - heard > patience:
                title = next(job.title for job, figures in zip(jobs, done, strict=True) if len(figures) < size)
                raise Fault(f"verify: no step of any of {size} ranks within {patience:g} s at {title}") from None
            continue
        heard = time.monotonic()
        if isinstance(answer, str):
            print(answer, file=sys.stderr, flush=True)
            raise Fault(f"verify: rank {rank} of {size} failed at {jobs[number].title}: {answer.splitlines()[-1]}")
        if answer is not None:
            done[number].append(answer)
            if len(done[number]) == size:
                say(f"{jobs[number].title}: {heard - start:.1f} s")
                start = heard
    return [_worst(figures) for figures in done]


def _worst(ranks: list[Figures]) -> Figures:
    return {kind: [max(step) for step in zip(*(figures[kind] for figures in ranks), strict=True)] for kind in ranks[0]}


def _rank(rank: int, size: int, port: int, jobs: list[Job], prepare: Callable[[], None] | None, answers) -> None:
    """One process of the group. Answers (rank, job, None) at every step, then the job's figures, or a traceback."""
    torch.set_num_threads(1)
    rank_info = RankInfo(rank, size, rank, size)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    number = 0
    try:
        if prepare is not None:
            prepare()
        group = join_world(rank_info, Grid(size, 1))  # the exchanges of every grid go through it
        for number, job in enumerate(jobs):
            plan = derive(job.config, rank_info)
            world = World(rank_info, plan.grid, torch.device("cpu"))
            witness = Witness(plan, world, job.pages, lambda number=number: answers.put((rank, number, None)))
            assert fit(witness, StopRequest()) == 0, "nobody asked it to stop"
            answers.put((rank, number, witness.figures))
        group.close()
    except BaseException:  # whatever it is, the parent shows it and ends the others
        answers.put((rank, number, traceback.format_exc()))


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
