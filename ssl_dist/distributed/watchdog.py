"""The only time limit of a training: a rank without progress ends, and every rank names the one that is to blame.

A thread observes this rank's state (heartbeat.py). A rank whose step has not moved for the timeout ends itself when the
others wait for it; when it waits for others, it gives them the time to report what is wrong, then names them and ends.
Collectives have no time limit of their own, as a save may take minutes: a phase announces its own bound.
"""

import contextlib
import faulthandler
import os
import signal
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from ssl_dist.distributed.heartbeat import ExitReport, Heartbeat, RankState
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.distributed.ranklog import RankLog
from ssl_dist.errors import Fault, RaisedOn, UserError

START_TIMEOUT_S = 600.0  # from the launch to the first step: rendezvous, reading a checkpoint from a slow disk
FIRST_STEP_TIMEOUT_S = 300.0  # caches are cold, kernels are loaded
COMPILE_TIMEOUT_S = 1800.0  # the first step under torch.compile
SAVE_TIMEOUT_S = 300.0  # the others wait while the first rank writes a checkpoint or pictures
GRACE_S = 3.0  # in which a rank that caused a fault has reported it, and one that lives has beaten
EVIDENCE_TIMEOUT_S = 4.0  # in which the cause of a lost connection is looked for
LIBRARIES = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), "<frozen")


class Watchdog:
    """Use as a context manager around all that a rank does with the others, with `reporting` inside the world.

    on_orphaned is called once when the launcher (torchrun) has died: its ranks would train on unseen.
    """

    def __init__(self, rank_info: RankInfo, timeout: float, on_orphaned: Callable[[], None] = lambda: None):
        self.rank_info, self.timeout = rank_info, timeout
        self.state = RankState(rank_info)
        self.state.phase, self.state.bound = "start-up", START_TIMEOUT_S
        self.log = RankLog(rank_info)
        self.heartbeat: Heartbeat | None = None
        self._on_orphaned = on_orphaned
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._interval = min(1.0, max(0.05, timeout / 20))
        self._main = threading.main_thread().ident
        self._is_ending = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        self._thread.join(timeout=5)  # it may be held up by a file system that does not answer
        self.log.close()

    def publish(self, logs: Path, start: str) -> None:
        """From now on the state is published in RUN/logs, and the log and the exit report of this rank are written."""
        self.heartbeat = Heartbeat(logs, start, self.rank_info)
        self.state.move_to(self.heartbeat.path(self.rank_info.rank), start)
        self.log.open(logs)

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Write why this rank ends, while it is still connected with the others, so that they find it when they
        notice. Raises `Fault` in place of the error of a lost connection."""
        try:
            yield
        except Exception as error:
            self._is_ending = True  # only the beat goes on
            self._report(error)
            raise

    def _report(self, error: Exception) -> None:
        if isinstance(error, UserError):
            everywhere = error.raised_on is RaisedOn.EVERY_RANK
            self._write_exit_report(str(error), None, 2, everywhere)
            if not everywhere:
                raise UserError(str(error), RaisedOn.THIS_RANK) from error
        elif isinstance(error, Fault):
            self._write_exit_report(str(error), None, error.code, error.raised_on is RaisedOn.EVERY_RANK)
        elif _is_lost_contact(error):
            raise self._lost(error) from error
        else:
            cause = f"{type(error).__name__}: {error}"
            self._write_exit_report(cause, None, 1, everywhere=False, trace="".join(traceback.format_exception(error)))
            print(f"error: {self.where()}: {cause}", file=sys.stderr, flush=True)

    def where(self) -> str:
        """`rank 1 on host at step 3`, as it stands at the head of what a rank says."""
        return f"{self.rank_info} at step {self.state.step}"

    # ------------------------------------------------------------------ the clock

    def _watch(self) -> None:
        last, stood, before = None, 0.0, time.monotonic()
        seen: dict[int, int] | None = None  # the others' beats when this rank began to doubt them
        while not self._ended.wait(self._interval):
            # A process that was suspended (a gang scheduler, a laptop's lid) has not hung: count own ticks, not time.
            now = time.monotonic()
            stood += min(now - before, 2 * self._interval)
            before = now
            self.state.beat()
            if self._launcher is not None and os.getppid() != self._launcher:
                self._launcher = None
                self._on_orphaned()
            mark = self.state.step, self.state.phase
            if mark != last or self._is_ending:
                last, stood, seen = mark, 0.0, None
            bound = max(self.state.bound, self.timeout)
            if stood <= bound:
                continue
            if self._is_straggler():
                self._end(f"no progress for {bound:g} s{self._during()}, at {self._position()}{self._remedy()}", [])
            elif seen is None:
                seen = self.heartbeat.beats()
            elif stood > bound + GRACE_S:
                self._end(*self._waiting_for(bound, _unchanged(seen, self.heartbeat.beats())))

    def _during(self) -> str:
        return f" in {self.state.phase}" if self.state.phase else ""

    def _remedy(self) -> str:
        return "" if self.state.bound > self.timeout else "; raise timeout if a step may take that long"

    def _is_straggler(self) -> bool:
        """Whether the others wait for this rank, as far as can be seen."""
        if self.rank_info.alone or self.heartbeat is None:
            return True
        if self.state.record["in_collective"]:
            return False
        own = int(self.state.record["collective"])
        records = [self.heartbeat.record(rank) for rank in self.heartbeat.others()]
        others = [int(record["collective"]) for record in records if record is not None]
        if others and own > min(others):
            return False
        return bool(others and own < max(others)) or not self._is_in_backward()

    def _is_in_backward(self) -> bool:
        """Whether the main thread is in a backward pass, where DDP reduces gradients."""
        frame = sys._current_frames().get(self._main)
        while frame is not None:
            if frame.f_code.co_name == "backward" and f"{os.sep}torch{os.sep}" in frame.f_code.co_filename:
                return True
            frame = frame.f_back
        return False

    def _position(self) -> str:
        """Where the main thread is: the innermost line that is not in a library."""
        frame = innermost = sys._current_frames().get(self._main)
        while frame is not None and frame.f_code.co_filename.startswith(LIBRARIES):
            frame = frame.f_back
        frame = frame or innermost
        if frame is None:
            return "its end"
        return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} in {frame.f_code.co_name}"

    def _waiting_for(self, bound: float, silent: list[int]) -> tuple[str, list[int]]:
        """Whom this rank has waited for, in words; and the silent ranks."""
        waited = f"{bound:g} s without progress{self._during()}"
        for report in self.heartbeat.exit_reports():
            return self._of(report), silent
        if silent:
            return f"lost {self.heartbeat.name(silent[0])}: no sign of life; {waited}", silent
        disagreement = self.heartbeat.disagreement(self.state)
        if disagreement:
            return disagreement, silent
        own = int(self.state.record["collective"])
        for rank in self.heartbeat.others():
            record = self.heartbeat.record(rank)
            if record is not None and record["collective"] < own:
                return f"{self.heartbeat.name(rank)} lags behind; {waited}", silent
        return f"{waited}, at {self._position()}", silent

    def _end(self, cause: str, silent: list[int]) -> None:
        """End this process now: its main thread may never come back."""
        # Nor may a file system or a pipe that is written to below.
        faulthandler.dump_traceback_later(5, exit=True, file=sys.__stderr__)
        self._write_exit_report(cause, silent[0] if silent else None, 1, everywhere=False)
        print(f"error: {self.where()}: {cause}", file=sys.stderr, flush=True)
        self.log.stacks()
        self._kill(silent)
        os._exit(1)

    # ------------------------------------------------------------------ exit reports

    def _write_exit_report(self, cause: str, behind: int | None, code: int, everywhere: bool, trace: str = "") -> None:
        self.log.note(f"{self.where()}: {cause}\n{trace}")
        if self.heartbeat is not None and (self.rank_info.is_rank0 or not everywhere):
            self.heartbeat.write_exit_report(self.state, cause, behind, code, trace)

    def _lost(self, error: Exception) -> Fault:
        """The fault behind a lost connection: what another rank has left, or that it has left nothing."""
        cause, behind, code = self._cause(" ".join(str(error).split())[:600])
        self._write_exit_report(cause, behind, code, everywhere=False, trace="".join(traceback.format_exception(error)))
        return Fault(f"{self.where()}: {cause}", code=code)

    def _cause(self, message: str) -> tuple[str, int | None, int]:
        """Of the lost connection: words, the rank behind it, the exit code."""
        board, end = self.heartbeat, time.monotonic() + EVIDENCE_TIMEOUT_S
        if board is None:
            return f"lost contact with another rank ({message})", None, 1
        before, gone = board.beats(), []
        while time.monotonic() < end:
            for report in board.exit_reports():
                return self._of(report), report.rank if report.behind is None else report.behind, report.code
            if gone:
                break  # it has had the time to write a report
            gone = [rank for rank in before if board.is_gone(rank)]
            time.sleep(0.5 if gone else 0.1)
        disagreement = board.disagreement(self.state)
        if disagreement:
            return disagreement, None, 1
        silent = gone or _unchanged(before, board.beats())
        if not silent:
            return f"lost contact with another rank ({message})", None, 1
        text = f"lost {board.name(silent[0])}: no sign of life, it was killed or has crashed"
        self._kill(silent)
        return text, silent[0], 1

    def _of(self, report: ExitReport) -> str:
        """What to tell of another rank's report: its own cause, or that of the rank that it blames."""
        if report.behind is not None and report.behind != self.rank_info.rank:
            return report.cause
        return f"rank {report.rank} on {report.host} ended at step {report.step}: {report.cause}"

    def _kill(self, silent: list[int]) -> None:
        """A frozen rank of the same launcher would keep its GPU, and torchrun, for half a minute."""
        for rank in silent:
            if self.heartbeat.is_sibling(rank):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(self.heartbeat.record(rank)["pid"]), signal.SIGKILL)


def _unchanged(before: dict[int, int], after: dict[int, int]) -> list[int]:
    return [rank for rank, beat in before.items() if after.get(rank) == beat]


def _is_lost_contact(error: Exception) -> bool:
    """Whether a collective failed because another rank is gone: torch's own types, or the words of gloo."""
    is_torchs = type(error).__module__.startswith("torch") and type(error).__name__.startswith("Dist")
    return isinstance(error, RuntimeError) and (is_torchs or "gloo" in str(error) or "NCCL" in str(error))
