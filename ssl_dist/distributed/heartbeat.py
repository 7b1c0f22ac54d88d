"""What every rank shows the others of itself, readable when its owner is stuck or dead.

`State` is what one rank is doing: its step, its phase, and the number and place of its last exchange with the others.
A run keeps every rank's state in a mapped file, RUN/logs/board/rank-N, so that writing it costs a memory write and
survives the death of its owner; a thread adds a pulse now and then and hands the page to the file system. No clock of
one host is compared with another's: a rank is silent when its pulse does not change while somebody looks.
"""

import contextlib
import json
import mmap
import os
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ssl_dist.distributed.rank import Place
from ssl_dist.storage.durable import atomic_write

RECORD = np.dtype(
    [
        ("start", "S16"),  # of which start of the run; a record of an earlier one is nobody's
        ("host", "S64"),
        ("machine", "S64"),  # what tells two machines of one name apart, and two views of one machine's processes
        ("pid", "i8"),
        ("launcher", "i8"),  # the process that started the rank
        ("pulse", "i8"),
        ("step", "i8"),  # the one being taken, counted from 1; 0 before the first
        ("exchange", "i8"),  # how many exchanges were begun
        ("inside", "i1"),  # whether the last of them has not ended
        ("sites", "S96", 4),  # what the last ones are and who asked for them; number n stands at n % 4
    ]
)
NUM_SITES = RECORD["sites"].shape[0]


def _machine() -> bytes:
    """The boot of this machine and the numbering of processes that is seen here; containers may share host names."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{boot.read_text().strip()[:36]} {os.stat('/proc/self/ns/pid').st_ino}".encode() if boot.exists() else b""


MACHINE = _machine()
_OWN_FILES = (__file__, str(Path(__file__).with_name("world.py")))


class State:
    """What this rank is doing. The loop says its step and phase, dist.py its exchanges."""

    def __init__(self, place: Place):
        self.place = place
        self.phase, self.bound = "", 0.0  # a phase has its own time limit in seconds; none by default
        self.record = np.zeros((), RECORD)
        self.record["host"], self.record["machine"] = socket.gethostname().encode()[:64], MACHINE
        self.record["pid"], self.record["launcher"] = os.getpid(), os.getppid()
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
    def exchange(self, operation: str) -> Iterator[None]:
        """An exchange with the other ranks; after an error it counts as not ended."""
        number = int(self.record["exchange"]) + 1
        self.record["sites"][number % NUM_SITES] = f"{operation} at {_caller()}".encode()[:96]
        self.record["exchange"], self.record["inside"] = number, 1
        yield
        self.record["inside"] = 0

    def move_to(self, path: Path, start: str) -> None:
        """From now on the state is in this file."""
        self.record["start"] = start.encode()
        path.unlink(missing_ok=True)  # a reader of the former one keeps what it has
        path.write_bytes(self.record.tobytes())
        with open(path, "r+b") as file:
            self._pages = mmap.mmap(file.fileno(), RECORD.itemsize)
        self.record = np.frombuffer(self._pages, RECORD, 1).reshape(())

    def pulse(self) -> None:
        self.record["pulse"] += 1
        if self._pages is not None:
            with contextlib.suppress(OSError):  # a file system that is away for a while must not end the watchdog
                self._pages.flush()


def _caller() -> str:
    """The line that asked for an exchange, outside this file, dist.py and the libraries."""
    frame = sys._getframe(3)
    while frame.f_back is not None and (
        frame.f_code.co_filename in _OWN_FILES or "-packages" in frame.f_code.co_filename
    ):
        frame = frame.f_back
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"


@dataclass(frozen=True)
class Ending:
    """Why a rank has ended: logs/error-<rank>.json. behind: the rank that it names for it, None: itself."""

    rank: int
    host: str
    pid: int
    start: str
    step: int
    cause: str
    behind: int | None
    code: int
    time: str
    traceback: str = ""


class Board:
    """The records and endings of all ranks of one start, in RUN/logs."""

    def __init__(self, logs: Path, start: str, place: Place):
        self.logs, self.start, self.place = logs, start, place

    def path(self, rank: int) -> Path:
        return self.logs / "board" / f"rank-{rank}"

    def others(self) -> list[int]:
        return [rank for rank in range(self.place.size) if rank != self.place.rank]

    def record(self, rank: int) -> np.ndarray | None:
        """What `rank` shows; None before it has shown anything in this start, or when it cannot be read now."""
        try:
            data = self.path(rank).read_bytes()
        except OSError:
            return None
        if len(data) != RECORD.itemsize:
            return None
        record = np.frombuffer(data, RECORD, 1).reshape(())
        return record if record["start"] == self.start.encode() else None

    def ending(self, rank: int) -> Ending | None:
        """Why `rank` has ended in this start, if it has said so and it can be read now."""
        try:
            found = Ending(**json.loads((self.logs / f"error-{rank}.json").read_text(encoding="utf-8")))
        except OSError:
            return None
        return found if found.start == self.start else None

    def endings(self) -> list[Ending]:
        """What the other ranks have said of their ends; those that name themselves come first."""
        try:
            names = set(os.listdir(self.logs))  # makes an NFS client ask the server again
        except OSError:
            return []
        found = [self.ending(rank) for rank in self.others() if f"error-{rank}.json" in names]
        return sorted((e for e in found if e is not None), key=lambda e: (e.behind is not None, e.rank))

    def leave(self, state: State, cause: str, behind: int | None, code: int, traceback: str = "") -> None:
        """Write this rank's ending. The folder may be full or gone: then it is only said."""
        record = state.record
        ending = Ending(
            self.place.rank, _text(record["host"]), int(record["pid"]), self.start, state.step, cause, behind, code,
            time.strftime("%Y-%m-%dT%H:%M:%S%z"), traceback,
        )  # fmt: skip
        try:
            with atomic_write(self.logs / f"error-{self.place.rank}.json") as file:
                file.write((json.dumps(asdict(ending), indent=1) + "\n").encode())
        except OSError as error:
            print(f"{self.logs}: the ending of {self.place} was not written: {error.strerror}", file=sys.stderr)

    def is_gone(self, rank: int) -> bool:
        """Whether the process of `rank` has ended, where it is on this machine; False: it has not, or who knows."""
        record = self.record(rank)
        if record is None or not MACHINE or record["machine"] != MACHINE:
            return False
        stat = _stat(int(record["pid"]))
        return stat is None or stat[0] in "ZX"

    def is_sibling(self, rank: int) -> bool:
        """Whether the process of `rank` lives on this machine and has the same launcher as this one."""
        record = self.record(rank)
        if record is None or not MACHINE or record["machine"] != MACHINE:
            return False
        stat = _stat(int(record["pid"]))
        return stat is not None and int(stat[1]) == int(record["launcher"]) == os.getppid()

    def name(self, rank: int) -> str:
        """`rank 3 on host (pid 77) at step 12`, as far as it is known."""
        record = self.record(rank)
        if record is None:
            return f"rank {rank}"
        return f"rank {rank} on {_text(record['host'])} (pid {record['pid']}) at step {record['step']}"

    def pulses(self) -> dict[int, int]:
        """The pulses of the other ranks that show something and have not said that they end."""
        ended = {ending.rank for ending in self.endings()}
        records = {rank: self.record(rank) for rank in self.others() if rank not in ended}
        return {rank: int(record["pulse"]) for rank, record in records.items() if record is not None}

    def disagreement(self, state: State) -> str | None:
        """An exchange that was not the same one on two ranks, in words; None: there is none among their last."""
        own = _sites(state.record)
        for rank in self.others():
            record = self.record(rank)
            other = {} if record is None else _sites(record)
            for number in sorted(own.keys() & other.keys()):
                if own[number] != other[number]:
                    return (
                        f"the ranks disagree, one has skipped an exchange: number {number} was {own[number]} on rank "
                        f"{self.place.rank} and {other[number]} on rank {rank}"
                    )
        return None


def _sites(record: np.ndarray) -> dict[int, str]:
    """The last exchanges of a rank by their numbers."""
    last = int(record["exchange"])
    numbers = range(max(1, last - NUM_SITES + 1), last + 1)
    return {number: record["sites"][number % NUM_SITES].decode(errors="replace") for number in numbers}


def _stat(pid: int) -> list[str] | None:
    """State letter and parent of a process; None: there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text.rpartition(")")[2].split()[:2]


def _text(value: np.ndarray) -> str:
    return value.item().decode(errors="replace")


def archive_endings(logs: Path) -> None:
    """Endings of earlier starts become lines of faults.jsonl, so that logs/error-*.json are of this start."""
    for path in sorted(logs.glob("error-*.json")):
        with open(logs / "faults.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(json.loads(path.read_text(encoding="utf-8"))) + "\n")
        path.unlink()
