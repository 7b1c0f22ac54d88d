"""RUN/logs/rank-N.log: what happened to one rank, with the time."""

import faulthandler
import sys
import time
from pathlib import Path

from ssl_dist.place import Place


class RankLog:
    """Keeps nothing before `open`; from then on also the stacks of all threads if the process crashes."""

    def __init__(self, place: Place):
        self.place = place
        self._file = None
        self._crashes_were_shown = False  # by the program that this runs in

    def open(self, logs: Path) -> None:
        self._file = open(logs / f"rank-{self.place.rank}.log", "a", encoding="utf-8")  # noqa: SIM115 - kept open
        self._crashes_were_shown = faulthandler.is_enabled()
        faulthandler.enable(self._file)

    def note(self, text: str) -> None:
        """One entry of the file. A full disk must not hide the fault that is being noted."""
        if self._file is None:
            return
        try:
            self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text.rstrip()}\n")
            self._file.flush()
        except OSError as error:
            print(f"{self._file.name}: {error.strerror}", file=sys.stderr, flush=True)

    def stacks(self) -> None:
        """Where every thread is."""
        if self._file is not None:
            faulthandler.dump_traceback(self._file)

    def close(self) -> None:
        if self._file is not None:
            faulthandler.disable()
            if self._crashes_were_shown:
                faulthandler.enable()
            self._file.close()
            self._file = None
