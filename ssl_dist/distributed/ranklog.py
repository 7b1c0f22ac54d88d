"""The log of one rank, RUN/logs/rank-N.log: events with their time."""

import faulthandler
import sys
import time
from io import FileIO
from pathlib import Path

from ssl_dist.distributed.rank import RankInfo


class RankLog:
    """Writes nothing before `open`; after it also the stacks of all threads if the process crashes."""

    def __init__(self, rank_info: RankInfo):
        self.rank_info = rank_info
        self._file: FileIO | None = None
        self._shows_crashes = False

    def open(self, logs: Path) -> None:
        """Write to this folder until the next call; an evaluation has several trainings, one after another."""
        self.close()
        # without a buffer, which would fail again when it is closed
        path = logs / f"rank-{self.rank_info.rank}.log"
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - kept open
        if not faulthandler.is_enabled():  # else the surrounding program has set its own
            faulthandler.enable(self._file)
            self._shows_crashes = True

    def note(self, text: str) -> None:
        """Add an entry. A full disk must not hide the fault that the entry is about."""
        if self._file is None:
            return
        try:
            entry = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text.rstrip()}\n"
            self._file.write(entry.encode(errors="backslashreplace"))
        except OSError as error:
            print(f"{self._file.name}: {error.strerror}", file=sys.stderr, flush=True)

    def stacks(self) -> None:
        """Add the stacks of all threads."""
        if self._file is not None:
            faulthandler.dump_traceback(self._file)

    def close(self) -> None:
        if self._file is not None:
            if self._shows_crashes:
                faulthandler.disable()
            self._file.close()
            self._file = None
