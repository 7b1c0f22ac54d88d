"""Bars with a rate and the time left on a terminal and in a notebook; a plain line now and then elsewhere. All of it on
stderr."""

import sys
import time

from tqdm import tqdm

PLAIN_INTERVAL_S = 10.0  # between two lines where there is no terminal


class Progress:
    """A bar with the rate and the time left where one can be shown; a plain line now and then elsewhere. A context
    manager.

    total: units of work, of which `done` were there before; quiet: show nothing.
    """

    def __init__(self, title: str, total: int, unit: str, quiet: bool = False, done: int = 0):
        self.title, self.total, self.unit, self.quiet = title, total, unit, quiet
        self._terminal = sys.stderr.isatty() or _in_notebook()
        self._first = self._done = done
        self._start = self._last_line = time.perf_counter()
        self._values = ""
        self._bar = tqdm(total=total, initial=done, desc=title, unit=unit, disable=quiet or not self._terminal)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, count: int, status: str | None = None) -> None:
        """`count` more units are done. status: what a plain line says in the place of their number and rate."""
        self._done += count
        self._bar.update(count)
        now = time.perf_counter()
        if self.quiet or self._terminal or (now - self._last_line < PLAIN_INTERVAL_S and self._done < self.total):
            return
        self._last_line = now
        seconds, num_new = now - self._start, self._done - self._first
        left = duration(seconds / max(1, num_new) * (self.total - self._done))
        if status is None:
            status = f"{self._done}/{self.total}, {num_new / max(seconds, 1e-9):.4g} {self.unit}s/s"
        print(f"{self.title}: {status}, {left} left{self._values}", file=sys.stderr, flush=True)

    def describe(self, values: dict[str, float]) -> None:
        """Show these beside the progress from now on."""
        self._bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)
        self._values = "".join(f", {name} {value:.4g}" for name, value in values.items())

    def close(self) -> None:
        self._bar.close()


def _in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, which draws a line anew, too."""
    kernel = sys.modules.get("ipykernel.kernelapp")
    return kernel is not None and kernel.IPKernelApp.initialized()


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
