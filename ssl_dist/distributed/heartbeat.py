"""The state that every rank publishes, readable while the rank hangs and after it has died.

`RankState` is what one rank is doing: its step, its phase, and the number and call site of its last collective. A run
keeps every rank's state in a memory-mapped file, RUN/logs/board/rank-N, so that an update costs a memory write and
survives the death of the rank; a thread increments its beat and flushes the page. Clocks of two hosts are never
compared: a rank is silent when its beat does not change while another rank observes it.
"""

import contextlib
import dataclasses
import json
import mmap
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssl_dist.distributed.rank import RankInfo
from ssl_dist.reading import open_regular, parse_json, read_text
from ssl_dist.storage.durable import append_line, atomic_write, naming

RECORD = np.dtype(
    [
        ("start", "S16"),  # which start of the run; records of earlier ones do not count
        ("host", "S64"),
        ("machine", "S64"),  # distinguishes machines of one host name, and containers of one machine
        ("pid", "i8"),
        ("launcher", "i8"),  # the process that started the rank
        ("beat", "i8"),
        ("step", "i8"),  # the current one, counted from 1; 0 before the first
        ("collective", "i8"),  # number of collectives begun
        ("in_collective", "i1"),  # whether the last of them has not ended
        ("call_sites", "S96", 4),  # operation and line of code of the last ones; number n is at n % 4
    ]
)
MAX_REPORT_BYTES = 1 << 20
NUM_CALL_SITES = RECORD["call_sites"].shape[0]


def _machine() -> bytes:
    """The boot and the process namespace of this machine; containers may share host names."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{boot.read_text().strip()[:36]} {os.stat('/proc/self/ns/pid').st_ino}".encode() if boot.exists() else b""


MACHINE = _machine()
_OWN_FILES = (__file__, str(Path(__file__).with_name("world.py")), contextlib.__file__)


class RankState:
    """What this rank is doing. The training loop sets step and phase, world.py the collectives."""

    def __init__(self, rank_info: RankInfo):
        self.rank_info = rank_info
        self.phase, self.bound = "", 0.0  # a phase has its own time limit in seconds; none by default
        self.record = np.zeros((), RECORD)
        self.record["host"], self.record["machine"] = socket.gethostname().encode()[:64], MACHINE
        self.record["pid"], self.record["launcher"] = os.getpid(), os.getppid()
        self.has_device_ended: Callable[[], bool] = _ended  # whether the device has done the last collective
        self._pages: mmap.mmap | None = None

    @property
    def step(self) -> int:
        return int(self.record["step"])

    @step.setter
    def step(self, step: int) -> None:
        self.record["step"] = step

    @contextlib.contextmanager
    def phase_of(self, name: str, bound: float) -> Iterator[None]:
        """Work that takes longer than a step: `bound` seconds instead of the run's timeout."""
        before = self.phase, self.bound
        self.phase, self.bound = name, bound
        yield
        self.phase, self.bound = before  # after an error it stays, to be named

    @contextlib.contextmanager
    def collective(self, operation: str) -> Iterator[None]:
        """A collective operation with the other ranks; after an error it counts as not ended."""
        number = int(self.record["collective"]) + 1
        self.record["call_sites"][number % NUM_CALL_SITES] = f"{operation} at {_caller()}".encode()[:96]
        self.record["collective"], self.record["in_collective"] = number, 1
        yield
        self.record["in_collective"] = 0

    @property
    def is_waiting(self) -> bool:
        """Whether this rank, or its GPU, is in a collective. NCCL's return before they have ended."""
        return bool(self.record["in_collective"]) or not self.has_device_ended()

    def move_to(self, path: Path, start: str) -> None:
        """Keep the state in this file."""
        self.record["start"] = start.encode()
        path.unlink(missing_ok=True)  # who reads the former file keeps its content
        with naming(path):
            path.write_bytes(self.record.tobytes())
        with open(path, "r+b") as file:
            self._pages = mmap.mmap(file.fileno(), RECORD.itemsize)
        self.record = np.frombuffer(self._pages, RECORD, 1).reshape(())

    def beat(self) -> None:
        self.record["beat"] += 1
        if self._pages is not None:
            with contextlib.suppress(OSError):  # a file system that fails for a while must not end the watchdog
                self._pages.flush()


def _ended() -> bool:
    """On a CPU a collective has ended when its call returns. A lambda could not be copied with its layer."""
    return True


def _caller() -> str:
    """file:line that called a collective, outside this file, world.py and the libraries."""
    frame = sys._getframe(3)
    while frame.f_back is not None and (
        frame.f_code.co_filename in _OWN_FILES or "-packages" in frame.f_code.co_filename
    ):
        frame = frame.f_back
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"


@dataclass(frozen=True)
class ExitReport:
    """Why a rank has ended: logs/error-<rank>.json. blamed_rank: whose fault it was; None: its own."""

    rank: int
    host: str
    pid: int
    start: str
    step: int
    cause: str
    blamed_rank: int | None  # "behind" in the file
    code: int
    time: str
    traceback: str = ""

    @staticmethod
    def from_json(text: str) -> "ExitReport":
        """Raises ValueError for what is no report."""
        value = parse_json(text)
        fields: dict[str, Any] = {"traceback": ""} | (value if isinstance(value, dict) else {})
        kinds = dict.fromkeys(("rank", "pid", "step", "code"), int) | {"behind": int | None}
        names = {"behind" if field.name == "blamed_rank" else field.name for field in dataclasses.fields(ExitReport)}
        if set(fields) != names or not all(isinstance(fields[name], kinds.get(name, str)) for name in names):
            raise ValueError("no exit report")
        return ExitReport(blamed_rank=fields.pop("behind"), **fields)

    def to_json(self) -> str:
        fields = {"behind" if name == "blamed_rank" else name: value for name, value in asdict(self).items()}
        return json.dumps(fields, indent=1) + "\n"


class Heartbeat:
    """The states and exit reports of all ranks of one start of a run, in RUN/logs."""

    def __init__(self, logs: Path, start: str, rank_info: RankInfo):
        self.logs, self.start, self.rank_info = logs, start, rank_info

    def path(self, rank: int) -> Path:
        return self.logs / "board" / f"rank-{rank}"

    def other_ranks(self) -> list[int]:
        return [rank for rank in range(self.rank_info.world_size) if rank != self.rank_info.rank]

    def record(self, rank: int) -> np.ndarray | None:
        """The state that `rank` has published; None: not yet in this start, or it cannot be read now."""
        try:
            data = self.path(rank).read_bytes()
        except OSError:
            return None
        if len(data) != RECORD.itemsize:
            return None
        record = np.frombuffer(data, RECORD, 1).reshape(())
        return record if record["start"] == self.start.encode() else None

    def exit_report(self, rank: int) -> ExitReport | None:
        """Why `rank` has ended in this start; None: it has written no report, or it cannot be read now."""
        try:
            report = ExitReport.from_json(read_text(self.logs / f"error-{rank}.json"))
        except (OSError, ValueError):
            return None
        return report if report.start == self.start else None

    def exit_reports(self) -> list[ExitReport]:
        """The reports of the other ranks; those that blame no other rank come first."""
        try:
            names = set(os.listdir(self.logs))  # makes an NFS client ask the server again
        except OSError:
            return []
        reports = [self.exit_report(rank) for rank in self.other_ranks() if f"error-{rank}.json" in names]
        return sorted((r for r in reports if r is not None), key=lambda r: (r.blamed_rank is not None, r.rank))

    def write_exit_report(
        self, state: RankState, cause: str, blamed_rank: int | None, code: int, traceback: str = ""
    ) -> None:
        """Write this rank's report. A failure to write goes to stderr."""
        record = state.record
        report = ExitReport(
            self.rank_info.rank, _text(record["host"]), int(record["pid"]), self.start, state.step, cause,
            blamed_rank, code, time.strftime("%Y-%m-%dT%H:%M:%S%z"), traceback,
        )  # fmt: skip
        try:
            with atomic_write(self.logs / f"error-{self.rank_info.rank}.json") as file:
                file.write(report.to_json().encode())
        except OSError as error:
            print(
                f"{self.logs}: the exit report of {self.rank_info} was not written: {error.strerror}", file=sys.stderr
            )

    def is_gone(self, rank: int) -> bool:
        """Whether the process of `rank` has ended; False also where it cannot be known, on another machine."""
        record = self.record(rank)
        if record is None or not MACHINE or record["machine"] != MACHINE:
            return False
        stat = _stat(int(record["pid"]))
        return stat is None or stat[0] in "ZX"

    def sibling_pid(self, rank: int) -> int | None:
        """The process of `rank` if it lives on this machine and has the same launcher as this one, else None."""
        record = self.record(rank)
        if record is None or not MACHINE or record["machine"] != MACHINE:
            return None
        pid = int(record["pid"])
        stat = _stat(pid)
        return pid if stat is not None and int(stat[1]) == int(record["launcher"]) == os.getppid() else None

    def name(self, rank: int) -> str:
        """`rank 3 on host (pid 77) at step 12`, as far as it is known."""
        record = self.record(rank)
        if record is None:
            return f"rank {rank}"
        return f"rank {rank} on {_text(record['host'])} (pid {record['pid']}) at step {record['step']}"

    def beats(self) -> dict[int, int]:
        """The beats of the other ranks that have published a state and no exit report."""
        ended = {report.rank for report in self.exit_reports()}
        records = {rank: self.record(rank) for rank in self.other_ranks() if rank not in ended}
        return {rank: int(record["beat"]) for rank, record in records.items() if record is not None}

    def disagreement(self, state: RankState) -> str | None:
        """The error message of a collective that was another one on another rank; None: none among the last ones."""
        own = _call_sites(state.record)
        for rank in self.other_ranks():
            record = self.record(rank)
            other = {} if record is None else _call_sites(record)
            for number in sorted(own.keys() & other.keys()):
                if own[number] != other[number]:
                    return (
                        f"the ranks disagree, one has skipped a collective: number {number} was {own[number]} on rank "
                        f"{self.rank_info.rank} and {other[number]} on rank {rank}"
                    )
        return None


def _call_sites(record: np.ndarray) -> dict[int, str]:
    """The last collectives of a rank by their numbers."""
    last = int(record["collective"])
    numbers = range(max(1, last - NUM_CALL_SITES + 1), last + 1)
    return {number: record["call_sites"][number % NUM_CALL_SITES].decode(errors="replace") for number in numbers}


def _stat(pid: int) -> list[str] | None:
    """State letter and parent of a process; None: it does not exist."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text.rpartition(")")[2].split()[:2]


def _text(value: np.ndarray) -> str:
    return value.item().decode(errors="replace")


def archive_exit_reports(logs: Path) -> None:
    """Move the reports of earlier starts to faults.jsonl, so that logs/error-*.json are of this start."""
    for path in sorted(logs.glob("error-*.json")):
        with open_regular(path) as file:
            text = file.read(MAX_REPORT_BYTES).decode(errors="replace")
        try:
            report = json.dumps(json.loads(ExitReport.from_json(text).to_json()))
        except ValueError:
            report = json.dumps({"damaged": path.name, "text": text})
        append_line(logs / "faults.jsonl", report)
        path.unlink()
