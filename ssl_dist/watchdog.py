"""The one clock of a training: a rank that makes no progress ends, and what ends a rank is named by all of them.

A thread looks at this rank's state (board.py). A rank whose step has not moved for the timeout ends itself when the
others wait for it; when it waits for others, it gives them the time to say what is wrong, then names them and ends.
Exchanges themselves have no time limit, as a save may take minutes: a phase announces its own bound.
"""

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from ssl_dist.board import Board, State
from ssl_dist.errors import Fault, UserError
from ssl_dist.place import Place
from ssl_dist.ranklog import RankLog

START = 600.0  # seconds from the launch to the loop: finding each other, reading a checkpoint from a slow disk
FIRST_STEP = 300.0  # caches are cold, kernels are loaded
COMPILING = 1800.0  # the first step under torch.compile
SAVE = 300.0  # other ranks wait while the first one writes a checkpoint
GRACE = 3.0  # seconds in which a rank that is behind a fault has said so
EVIDENCE = 4.0  # seconds in which the cause of a lost connection is looked for


class Watchdog:
    """Use as a context manager around all that a rank does with the others.

    on_orphaned is called once when the launcher (torchrun) has died: its ranks would train on unseen.
    """

    def __init__(self, place: Place, timeout: float, on_orphaned: Callable[[], None] = lambda: None):
        self.place, self.timeout = place, timeout
        self.state = State(place)
        self.state.phase, self.state.bound = "start-up", START
        self.log = RankLog(place)
        self.board: Board | None = None
        self._on_orphaned = on_orphaned
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._interval = min(1.0, max(0.05, timeout / 20))
        self._main = threading.main_thread().ident
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def show(self, logs: Path, start: str) -> None:
        """From now on the state is on the board in RUN/logs, and the log and the ending of this rank are written."""
        self.board = Board(logs, start, self.place)
        self.state.move_to(self.board.path(self.place.rank), start)
        self.log.open(logs)

    def __exit__(self, kind, error: BaseException | None, _traceback) -> None:
        self._ended.set()
        self._thread.join()
        try:
            if isinstance(error, Exception):
                self._conclude(error)
        finally:
            self.log.close()

    def _conclude(self, error: Exception) -> None:
        """Leave for the others why this rank ends. Raises `Fault` in place of the error of a lost connection."""
        if isinstance(error, UserError):
            self._leave(str(error), None, 2, agreed=not error.met_alone)
        elif isinstance(error, Fault):
            self._leave(str(error), None, error.code, agreed=error.agreed)
        elif _is_lost_contact(error):
            raise self._lost(error) from error
        else:
            cause = f"{type(error).__name__}: {error}"
            print(f"error: {self.where()}: {cause}", file=sys.stderr, flush=True)
            self._leave(cause, None, 1, agreed=False, trace="".join(traceback.format_exception(error)))

    def where(self) -> str:
        """`rank 1 on host at step 3`, as it stands at the head of what a rank says."""
        return f"{self.place} at step {self.state.step}"

    # ------------------------------------------------------------------ the clock

    def _watch(self) -> None:
        last, stood, before = None, 0.0, time.monotonic()
        while not self._ended.wait(self._interval):
            # A process that was suspended (a gang scheduler, a laptop's lid) has not hung: count own ticks, not time.
            now = time.monotonic()
            stood += min(now - before, 2 * self._interval)
            before = now
            self.state.pulse()
            if self._launcher is not None and os.getppid() != self._launcher:
                self._launcher = None
                self._on_orphaned()
            mark = self.state.step, self.state.phase
            if mark != last:
                last, stood = mark, 0.0
            bound = self.state.bound or self.timeout
            if stood > bound and self._is_behind():
                self._end(f"no progress for {bound:g} s{self._during()}, at {self._position()}", None)
            elif stood > bound + GRACE:
                self._end(*self._waiting_for(bound))

    def _during(self) -> str:
        return f" in {self.state.phase}" if self.state.phase else ""

    def _is_behind(self) -> bool:
        """Whether the others wait for this rank, as far as can be seen."""
        if self.place.alone or self.board is None:
            return True
        own = int(self.state.record["exchange"])
        records = [self.board.record(rank) for rank in self.board.others()]
        others = [int(record["exchange"]) for record in records if record is not None]
        if others and own != max(others):
            return own < max(others)
        return not (self.state.record["inside"] or self._is_in_torch())

    def _is_in_torch(self) -> bool:
        """Whether the main thread is in a backward pass, where DDP exchanges gradients."""
        frame = sys._current_frames().get(self._main)
        while frame is not None:
            if frame.f_code.co_name == "backward" and f"{os.sep}torch{os.sep}" in frame.f_code.co_filename:
                return True
            frame = frame.f_back
        return False

    def _position(self) -> str:
        """Where the main thread is: the innermost line that is not in a library."""
        frame = innermost = sys._current_frames().get(self._main)
        while frame is not None and ("-packages" in frame.f_code.co_filename or "<" in frame.f_code.co_filename):
            frame = frame.f_back
        frame = frame or innermost
        if frame is None:
            return "its end"
        return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} in {frame.f_code.co_name}"

    def _waiting_for(self, bound: float) -> tuple[str, int | None]:
        """Whom this rank has waited for, in words, and the number of that rank."""
        assert self.board is not None
        waited = f"{bound:g} s without progress{self._during()}"
        silent = self.board.silent(3 * self._interval)
        if silent:
            return f"lost {self.board.name(silent[0])}: no sign of life; {waited}", silent[0]
        disagreement = self.board.disagreement(self.state)
        if disagreement:
            return disagreement, None
        own = int(self.state.record["exchange"])
        for rank in self.board.others():
            record = self.board.record(rank)
            if record is not None and record["exchange"] < own:
                return f"{self.board.name(rank)} lags behind; {waited}", rank
        return f"{waited}, at {self._position()}", None

    def _end(self, cause: str, behind: int | None) -> None:
        """End this process now: its main thread may never come back."""
        print(f"error: {self.where()}: {cause}", file=sys.stderr, flush=True)
        self._leave(cause, behind, 1, agreed=False)
        self.log.stacks()
        self._kill_silent(behind)
        os._exit(1)

    # ------------------------------------------------------------------ endings

    def _leave(self, cause: str, behind: int | None, code: int, agreed: bool, trace: str = "") -> None:
        self.log.note(f"{self.where()}: {cause}\n{trace}")
        if self.board is not None and (self.place.is_first or not agreed):
            self.board.leave(self.state, cause, behind, code, trace)

    def _lost(self, error: Exception) -> Fault:
        """The fault behind a lost connection: what another rank has left, or that it has left nothing."""
        cause, behind, code = self._cause(str(error).splitlines()[0])
        self._leave(cause, behind, code, agreed=False, trace="".join(traceback.format_exception(error)))
        self._kill_silent(behind)
        fault = Fault(f"{self.where()}: {cause}")
        fault.code = code
        return fault

    def _cause(self, said: str) -> tuple[str, int | None, int]:
        board, end = self.board, time.monotonic() + EVIDENCE
        if board is None:
            return f"lost contact with another rank ({said})", None, 1
        dead_since: dict[int, float] = {}
        while time.monotonic() < end:
            for rank in board.others():
                ending = board.ending(rank)
                if ending is not None and ending.behind is None:
                    text = f"rank {rank} on {ending.host} ended at step {ending.step}: {ending.cause}"
                    return text, rank, ending.code
                if board.is_gone(rank):
                    dead_since.setdefault(rank, time.monotonic())
            # One that has just gone may have left its ending a moment before.
            if any(time.monotonic() - since > 0.5 for since in dead_since.values()):
                break
            time.sleep(0.05)
        disagreement = board.disagreement(self.state)
        if disagreement:
            return disagreement, None, 1
        for rank in dead_since or board.silent(3 * self._interval):
            return f"lost {board.name(rank)}: no sign of life, it was killed or has crashed", rank, 1
        for rank in board.others():
            ending = board.ending(rank)
            if ending is not None:
                return ending.cause, ending.behind, ending.code
        return f"lost contact with another rank ({said})", None, 1

    def _kill_silent(self, rank: int | None) -> None:
        """A frozen rank of the same launcher would keep its GPU, and torchrun, for half a minute."""
        if rank is None or self.board is None or not self.board.is_sibling(rank):
            return
        if self.board.ending(rank) is None and rank in self.board.silent(3 * self._interval):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(self.board.record(rank)["pid"]), signal.SIGKILL)


def _is_lost_contact(error: Exception) -> bool:
    """Whether an exchange failed because another rank is gone; torch says so in the words of its backends."""
    words = ("gloo", "NCCL", "Connection", "connection", "socket")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
