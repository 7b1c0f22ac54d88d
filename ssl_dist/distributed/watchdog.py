"""The only timeout of a training: it ends a rank that makes no progress, and every rank names the rank to blame.

A thread observes this rank's state (heartbeat.py). When the step has not moved for the timeout, a rank first looks for
others that show no sign of life or have reported a fault, and names them. Without such evidence it ends itself when the
others wait for it; when it waits for others, it leaves them time for their reports, then names them and ends. In a
phase with a bound of its own, it ends then too if it waits for a rank that has reported its end. This is the only
clock: torch's collectives have no timeout in practice, as a save may take minutes, and a phase announces its own bound;
NCCL's handling of errors by its own threads, which may end a process before it has reported, is off.
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
from types import FrameType

from ssl_dist.distributed.heartbeat import ExitReport, Heartbeat, RankState
from ssl_dist.distributed.rank import UNDER_TORCHRUN, RankInfo
from ssl_dist.distributed.ranklog import RankLog
from ssl_dist.errors import AFTER_MENDING, Fault, RaisedOn, UserError, of_system, one_line

START_TIMEOUT_S = 600.0  # from the launch to the first step: rendezvous, reading a checkpoint from a slow disk
FIRST_STEP_TIMEOUT_S = 300.0  # caches are cold, kernels are loaded
COMPILE_TIMEOUT_S = 1800.0  # the first step under torch.compile
SAVE_TIMEOUT_S = 300.0  # the others wait while rank 0 writes a checkpoint or pictures
GRACE_S = 3.0  # within which a rank has reported the fault that it caused, and a live rank has beaten
EVIDENCE_TIMEOUT_S = 4.0  # of the search for the cause of a lost connection
LIBRARIES = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), "<frozen")


class Watchdog:
    """Use as a context manager around the whole life of the process group, with `reporting` inside the world.

    on_orphaned is called once when the launcher (torchrun) has died: its ranks would go on unseen.
    """

    def __init__(self, rank_info: RankInfo, timeout: float, on_orphaned: Callable[[], None] = lambda: None):
        self.rank_info, self.timeout = rank_info, timeout
        self.state = RankState(rank_info)
        self.state.phase, self.state.bound = "start-up", START_TIMEOUT_S
        self.log = RankLog(rank_info)
        self.heartbeat: Heartbeat | None = None  # None before `publish`
        self._on_orphaned = on_orphaned
        self._launcher = os.getppid() if UNDER_TORCHRUN in os.environ else None
        self._interval = min(1.0, max(0.05, timeout / 20))
        self._is_ending = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(timeout=5)  # it may be held up by a file system that does not answer
        self.log.close()

    def publish(self, logs: Path, start: str) -> None:
        """Publish the state in RUN/logs, and write the log and the exit report of this rank there."""
        self.heartbeat = Heartbeat(logs, start, self.rank_info)
        self.state.move_to(self.heartbeat.path(self.rank_info.rank), start)
        self.log.open(logs)

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Write the exit report of an error while the other ranks are still connected, so that they find it when they
        lose the connection. Raises `Fault` in place of the error of a lost connection."""
        try:
            yield
        except Exception as error:
            self._is_ending = True  # beat on, but measure no time
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
            raise self._lost_contact(error) from error
        elif isinstance(error, OSError):
            cause, trace = f"{of_system(error)}; {AFTER_MENDING}", _trace(error)
            self._write_exit_report(cause, None, 1, everywhere=False, trace=trace)
            raise Fault(f"{self.where()}: {cause}") from error
        else:
            cause = f"{type(error).__name__}: {error}"
            self._write_exit_report(cause, None, 1, everywhere=False, trace=_trace(error))
            print(one_line(f"error: {self.where()}: {cause}"), file=sys.stderr, flush=True)

    def where(self) -> str:
        """`rank 1 on host at step 3`: the head of every message of this rank."""
        return f"{self.rank_info} at step {self.state.step}"

    # ------------------------------------------------------------------ the clock

    def _watch(self) -> None:
        last_progress: tuple[int, str] | None = None
        last_beats: dict[int, int] | None = None  # of the other ranks when the bound was passed
        stalled_s, last_tick = 0.0, time.monotonic()
        while not self._ended.wait(self._interval):
            # A process that was suspended (a gang scheduler, a laptop's lid) has not hung: count own ticks, not time.
            now = time.monotonic()
            stalled_s += min(now - last_tick, 2 * self._interval)
            last_tick = now
            self.state.beat()
            if self._launcher is not None and os.getppid() != self._launcher:
                self._launcher = None
                self._on_orphaned()
            progress, heartbeat = (self.state.step, self.state.phase), self.heartbeat
            if progress != last_progress or self._is_ending:
                last_progress, stalled_s, last_beats = progress, 0.0, None
            bound = max(self.state.bound, self.timeout)
            if stalled_s <= bound:
                if stalled_s > self.timeout + GRACE_S and heartbeat is not None and self._waits_in_vain(heartbeat):
                    self._end(*self._blame(heartbeat, self.timeout, []), [])
                continue
            if heartbeat is None or self.rank_info.alone:
                self._end(self._own_fault(bound), None, [])
            elif last_beats is None:
                last_beats = heartbeat.beats()
            elif stalled_s > bound + GRACE_S:
                silent = _unchanged(last_beats, heartbeat.beats())
                has_evidence = bool(silent or heartbeat.exit_reports())
                if not has_evidence and self._is_straggler(heartbeat):
                    self._end(self._own_fault(bound), None, [])
                if has_evidence or stalled_s > bound + 2 * GRACE_S:
                    self._end(*self._blame(heartbeat, bound, silent), silent)

    def _waits_in_vain(self, heartbeat: Heartbeat) -> bool:
        """Whether this rank waits for one that has reported its end. In a phase, such as a save by rank 0, the bound is
        far off; and without a connection (a cut link, NCCL) nothing else tells it."""
        return self.state.is_waiting and bool(heartbeat.exit_reports())

    def _own_fault(self, bound: float) -> str:
        return f"no progress for {bound:g} s{self._during()}, at {_position()}{self._remedy()}"

    def _during(self) -> str:
        return f" in {self.state.phase}" if self.state.phase else ""

    def _remedy(self) -> str:
        return "" if self.state.bound > self.timeout else "; raise timeout if a step may take that long"

    def _is_straggler(self, heartbeat: Heartbeat) -> bool:
        """Whether the other ranks wait for this one, as far as can be seen."""
        if self.state.is_waiting:
            return False
        own = int(self.state.record["collective"])
        records = [heartbeat.record(rank) for rank in heartbeat.other_ranks()]
        others = [int(record["collective"]) for record in records if record is not None]
        if others and own > min(others):
            return False
        return bool(others and own < max(others)) or not _is_in_backward()

    def _blame(self, heartbeat: Heartbeat, bound: float, silent: list[int]) -> tuple[str, int | None]:
        """The error message that names the rank which this one has waited for, and that rank, where it is known."""
        waited = f"{bound:g} s without progress{self._during()}"
        for report in heartbeat.exit_reports():
            return self._cause_in(report), _blamed_in(report)
        if silent:
            return f"lost {heartbeat.name(silent[0])}: no sign of life; {waited}", silent[0]
        disagreement = heartbeat.disagreement(self.state)
        if disagreement:
            return disagreement, None
        own = int(self.state.record["collective"])
        for rank in heartbeat.other_ranks():
            record = heartbeat.record(rank)
            if record is not None and record["collective"] < own:
                return f"{heartbeat.name(rank)} lags behind; {waited}", rank
        return f"{waited}, at {_position()}", None

    def _end(self, cause: str, blamed_rank: int | None, silent: list[int]) -> None:
        """End this process now, and the silent ranks of its launcher: its main thread may never return."""
        # Nor may the calls below, where a file system or a pipe does not answer.
        faulthandler.dump_traceback_later(5, exit=True, file=2)
        self._write_exit_report(cause, blamed_rank, 1, everywhere=False)
        print(f"error: {self.where()}: {cause}", file=sys.stderr, flush=True)
        self.log.stacks()
        if self.heartbeat is not None:
            _kill(self.heartbeat, silent)
        os._exit(1)

    # ------------------------------------------------------------------ exit reports

    def _write_exit_report(
        self, cause: str, blamed_rank: int | None, code: int, everywhere: bool, trace: str = ""
    ) -> None:
        self.log.note(f"{self.where()}: {cause}\n{trace}")
        if self.heartbeat is not None and (self.rank_info.is_rank0 or not everywhere):
            self.heartbeat.write_exit_report(self.state, cause, blamed_rank, code, trace)

    def _lost_contact(self, error: Exception) -> Fault:
        """The fault that caused the error of a lost connection: that of another rank's report, or its death."""
        message = " ".join(str(error).split())[:600]
        evidence = None if self.heartbeat is None else self._evidence(self.heartbeat)
        cause, blamed_rank, code = evidence or (f"lost contact with another rank ({message})", None, 1)
        self._write_exit_report(cause, blamed_rank, code, everywhere=False, trace=_trace(error))
        return Fault(f"{self.where()}: {cause}", code=code)

    def _evidence(self, heartbeat: Heartbeat) -> tuple[str, int | None, int] | None:
        """Cause, rank to blame and exit code of a lost connection; None: the other ranks live and report nothing."""
        beats, gone = heartbeat.beats(), list[int]()
        end = time.monotonic() + EVIDENCE_TIMEOUT_S
        while time.monotonic() < end:
            for report in heartbeat.exit_reports():
                return self._cause_in(report), _blamed_in(report), report.code
            if gone:
                break  # it has had the time to write a report
            gone = [rank for rank in beats if heartbeat.is_gone(rank)]
            time.sleep(0.5 if gone else 0.1)
        disagreement = heartbeat.disagreement(self.state)
        if disagreement:
            return disagreement, None, 1
        silent = gone or _unchanged(beats, heartbeat.beats())
        if not silent:
            return None
        cause = f"lost {heartbeat.name(silent[0])}: no sign of life, it was killed or has crashed"
        _kill(heartbeat, silent)
        return cause, silent[0], 1

    def _cause_in(self, report: ExitReport) -> str:
        """The cause in another rank's report, with that rank's name unless it blames a third one."""
        if report.blamed_rank is not None and report.blamed_rank != self.rank_info.rank:
            return report.cause
        return f"rank {report.rank} on {report.host} ended at step {report.step}: {report.cause}"


def _blamed_in(report: ExitReport) -> int:
    """The rank that a report blames, or that has written it."""
    return report.rank if report.blamed_rank is None else report.blamed_rank


def _trace(error: Exception) -> str:
    return "".join(traceback.format_exception(error))


def _main_thread() -> FrameType | None:
    """The innermost frame of the main thread; None after its end."""
    return sys._current_frames().get(threading.main_thread().ident or 0)


def _is_in_backward() -> bool:
    """Whether the main thread is in a backward pass, where DDP reduces gradients."""
    frame = _main_thread()
    while frame is not None:
        if frame.f_code.co_name == "backward" and f"{os.sep}torch{os.sep}" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def _position() -> str:
    """Where the main thread is: the innermost line that is not in a library."""
    frame = innermost = _main_thread()
    while frame is not None and frame.f_code.co_filename.startswith(LIBRARIES):
        frame = frame.f_back
    frame = frame or innermost
    if frame is None:
        return "its end"
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} in {frame.f_code.co_name}"


def _kill(heartbeat: Heartbeat, silent: list[int]) -> None:
    """Kill the silent ranks of this launcher: a frozen one would keep its GPU, and torchrun, for half a minute."""
    for rank in silent:
        pid = heartbeat.sibling_pid(rank)
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _unchanged(before: dict[int, int], after: dict[int, int]) -> list[int]:
    return [rank for rank, beat in before.items() if after.get(rank) == beat]


def _is_lost_contact(error: Exception) -> bool:
    """Whether a collective failed because another rank is gone: torch's own types, or the words of gloo."""
    is_torchs = type(error).__module__.startswith("torch") and type(error).__name__.startswith("Dist")
    return isinstance(error, RuntimeError) and (is_torchs or "gloo" in str(error) or "NCCL" in str(error))
