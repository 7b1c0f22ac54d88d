"""`ssl-dist` as a rank with a planned fault: python tests/faulty_rank.py FAULT FOLDER train CONFIG ...

The fault occurs in rank 1 at step 3. FOLDER gets its time (fault) and the process id of every rank (pid-N).
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
from pathlib import Path

AT_STEP = 3


def stuck_in_user_code():
    time.sleep(1000)


def stuck_in_c():
    ctypes.PyDLL(None).sleep(1000)  # holds the interpreter's lock, so that no Python thread runs


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def frozen():
    os.kill(os.getpid(), signal.SIGSTOP)


def record_and_run(folder, action):
    """Write the time of the fault, then cause it."""
    (folder / "fault").write_text(str(time.time()))
    action()


def frozen_unseen(folder):
    """Neither rank's heartbeat sees any collective."""
    from ssl_dist.distributed.heartbeat import RankState

    RankState.collective = lambda self, operation: contextlib.nullcontext()
    fault_in_forward(folder, frozen)


def fault_in_forward(folder, action):
    from ssl_dist.methods.relational import Method

    forward = Method.forward

    def faulty(self, batch, world):
        if is_rank_1() and world.state.step == AT_STEP and not (folder / "fault").exists():
            record_and_run(folder, action)
        return forward(self, batch, world)

    Method.forward = faulty


def skipped_collective(folder):
    from ssl_dist.distributed.world import World

    reduce = World.all_reduce_sum

    def faulty(self, x):
        caller = sys._getframe(1).f_code.co_name
        if self.state.step == AT_STEP and caller == "forward" and not (folder / "fault").exists():
            record_and_run(folder, lambda: None)
            return x
        return reduce(self, x)

    if is_rank_1():
        World.all_reduce_sum = faulty


def not_finite(folder):
    from ssl_dist.distributed.world import World

    scale_for_ddp_mean = World.scale_for_ddp_mean

    def faulty(self, loss_share):
        if is_rank_1() and self.state.step == AT_STEP:
            record_and_run(folder, lambda: None)
            loss_share = loss_share * float("nan")
        return scale_for_ddp_mean(self, loss_share)

    World.scale_for_ddp_mean = faulty


def loader_exception(folder):
    from ssl_dist.data.loader import TrainLoader

    batch = TrainLoader._next

    def faulty(self, step, *arguments):
        if is_rank_1() and step == AT_STEP - 1:
            record_and_run(folder, lambda: None)
            raise ValueError("planned failure in the loader")
        return batch(self, step, *arguments)

    TrainLoader._next = faulty


def stuck_in_the_save(folder):
    from ssl_dist.distributed import watchdog
    from ssl_dist.train.state import TrainState

    watchdog.SAVE_TIMEOUT_S = 8.0
    save = TrainState._save

    def faulty(self, clock):
        if clock.step == 4:
            record_and_run(folder, stuck_in_user_code)
        save(self, clock)

    TrainState._save = faulty


def slow_pictures(folder):
    from ssl_dist.train.state import TrainState

    show_images = TrainState._show_images

    def slow(self, log, clock):
        time.sleep(9)
        show_images(self, log, clock)

    TrainState._show_images = slow


def killed_in_the_extraction(folder):
    from ssl_dist.run import encoder as run_encoder

    test_views = run_encoder.views.test_views

    def faulty(*arguments, **options):
        if is_rank_1():
            record_and_run(folder, killed)
        return test_views(*arguments, **options)

    run_encoder.views.test_views = faulty


def is_rank_1():
    return os.environ["RANK"] == "1"


def main(fault, folder, *arguments):
    from ssl_dist import cli

    folder = Path(folder)
    (folder / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
    if fault in ("stuck_in_user_code", "stuck_in_c", "killed", "frozen"):
        fault_in_forward(folder, globals()[fault])
    elif fault != "none":
        globals()[fault](folder)
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
