"""The training loop: read `fit` from top to bottom. state.py has what it works on."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

import torch

from ssl_dist import terminal, views
from ssl_dist.config import Config
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.distributed.rendezvous import StoppedWhileWaiting
from ssl_dist.distributed.signals import STOPPED, StopRequest
from ssl_dist.distributed.watchdog import Watchdog
from ssl_dist.distributed.world import World, join_world
from ssl_dist.errors import Fault, RaisedOn, UserError
from ssl_dist.kernels import moments
from ssl_dist.run import folder as run_folder
from ssl_dist.run.blueprint import RunPlan, derive
from ssl_dist.train import announce, optim
from ssl_dist.train.listener import SILENT, Listener
from ssl_dist.train.preflight import agree
from ssl_dist.train.state import TrainState


def train(config: Config, listener: Listener = SILENT) -> int:
    """Start or resume a training on this rank. Returns 0 when it is complete, 75 when it was stopped by a signal.
    listener: is told of lines of the log and of checkpoints, on rank 0.

    For the main thread, whose signal handlers it replaces until it returns; a hang ends the whole process.
    """
    rank_info = RankInfo.from_environment()
    plan = derive(config, rank_info)
    for spec in plan.specs:
        views.warm_up(spec, plan.split.pixels)  # compile before the rendezvous, or the ranks wait for one another
    plan.method_class.warm_up(plan.options, plan.dtype)
    if not torch.cuda.is_available():
        moments.warm_up(plan.dtype)
    with (
        StopRequest() as stop,
        Watchdog(rank_info, config.timeout, stop.request) as watchdog,
        terminal.lasting(lambda fault: watchdog.log.note(f"{fault}; what is done goes on in metrics.jsonl")),
    ):
        try:
            world = join_world(rank_info, plan.grid, watchdog.state, lambda: stop.requested)
        except StoppedWhileWaiting:
            if rank_info.local_rank == 0:
                print("stopped before all ranks had come; nothing has begun", file=sys.stderr, flush=True)
            return STOPPED
        with world, watchdog.reporting():
            code, _ = train_in(world, watchdog, stop, plan, _announce, listener)
            if code == 0 and world.is_rank0:
                print(announce.ending(plan), file=sys.stderr, flush=True)
            return code


def _announce(run: TrainState) -> None:
    if run.world.is_rank0:
        print(announce.beginning(run), file=sys.stderr, flush=True)


def train_in(
    world: World,
    watchdog: Watchdog,
    stop: StopRequest,
    plan: RunPlan,
    begins: Callable[[TrainState], None] = lambda run: None,
    listener: Listener = SILENT,
) -> tuple[int, TrainState]:
    """Run the training of `plan` on ranks that form a world. begins: gets the state before the first step. Returns its
    exit code and its last state."""
    with claimed(plan, world) as lock:
        watchdog.publish(plan.run / "logs", agree(plan, world))
        try:
            run = TrainState(plan, world, lock, listener)
        except UserError as error:
            # config, images and checkpoint are the same on all ranks, so all raise it
            raise UserError(str(error), RaisedOn.EVERY_RANK) from error
        rank_info = world.rank_info
        world.on_rank0(lambda: run_folder.note_start(run.folder, plan.config, run.clock.step, rank_info.world_size))
        watchdog.log.note(
            f"{rank_info} of {rank_info.world_size} (pid {os.getpid()}) begins after step {run.clock.step}"
        )
        begins(run)
        code = fit(run, stop)
        watchdog.log.note("stopped on request" if code == STOPPED else "done")
        return code, run


@contextlib.contextmanager
def claimed(plan: RunPlan, world: World) -> Iterator[int | None]:
    """A context in which rank 0 holds the lock of the run's folder, after it has checked the config. Yields the
    descriptor that holds it, None on the other ranks."""
    locks: list[int] = []

    def claim() -> None:
        locks.append(run_folder.claim(plan.run))
        run_folder.accept(plan.run, plan.config)

    try:
        world.on_rank0(claim)
        yield locks[0] if locks else None
    finally:
        for lock in locks:
            os.close(lock)


def fit(run: TrainState, stop: StopRequest) -> int:
    """Train to the end, or to the step at which a rank has got a stop signal. Returns the exit code."""
    clock, method, world, settings = run.clock, run.method, run.world, run.config
    if clock.done:
        run.finish(clock)
        return 0
    with run.loader() as loader, run.log() as log:
        for host in run.batches(loader, log):
            batch = run.to_device(host)
            redrawn = method.before_step(clock, run.extract_at(clock), world)
            optim.reset_state(run.optimizer, redrawn)
            optim.set_rates(run.optimizer, settings.optim, clock)

            output = run.forward(batch)
            flags = world.any_rank(stop.requested, ~torch.isfinite(output.loss.detach()))
            run.backward(output.loss)
            run.flush_log()  # of the step before: a GPU has work meanwhile
            stopping, broken = flags()
            if broken:
                raise Fault(run.diagnosis(clock, output), RaisedOn.EVERY_RANK)
            run.update(method.frozen(clock))

            clock = clock.after_step()
            method.after_step(clock)
            run.teach_probe(batch)
            if clock.step == 1 or clock.done or clock.due(settings.log.every_steps):
                run.write(log, clock, output)
            if clock.step == 1 or clock.due(every_epochs=settings.log.images_every_epochs):
                run.show_images(log, clock)
            if clock.due(every_epochs=settings.log.filters_every_epochs):
                run.show_filters(log, clock)
            if clock.due(every_epochs=settings.log.attention_every_epochs):
                run.show_attention(log, clock)
            run.measure(log, clock)
            if stopping or clock.done or clock.due(settings.checkpoint.every_steps, settings.checkpoint.every_epochs):
                run.save(clock, stop)
            if log is not None:
                log.after_step(clock)
            if stopping and not clock.done:
                if world.is_rank0:
                    print(
                        f"stopping after step {clock.step}, which is saved; the same command goes on",
                        file=sys.stderr,
                        flush=True,
                    )
                return STOPPED
    run.finish(clock)
    return 0
