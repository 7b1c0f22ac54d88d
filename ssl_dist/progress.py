"""Bars with a rate and the time left on a terminal; a plain line now and then elsewhere. All of it on stderr."""

import sys
import time

from tqdm import tqdm

from ssl_dist.clock import Clock

PLAIN_SECONDS = 10.0  # between two lines where there is no terminal


class Progress:
    """A bar with the rate and the time left on a terminal; a plain line now and then elsewhere."""

    def __init__(self, title: str, clock: Clock):
        self.title = title
        self._text = ""
        self._terminal = sys.stderr.isatty()
        self._start = (clock.step, time.perf_counter())
        self._last_line = time.perf_counter()
        self._bar = tqdm(
            total=clock.total_steps, initial=clock.step, desc=title, unit="step", disable=not self._terminal
        )

    def update(self, clock: Clock) -> None:
        self._bar.update(1)
        now = time.perf_counter()
        if not self._terminal and (now - self._last_line > PLAIN_SECONDS or clock.done):
            self._last_line = now
            first, start = self._start
            left = (now - start) / max(1, clock.step - first) * (clock.total_steps - clock.step)
            print(
                f"{self.title}: step {clock.step}/{clock.total_steps}, epoch {clock.epochs_done:.1f}/"
                f"{clock.total_epochs:g}, {duration(left)} left{self._text}",
                file=sys.stderr,
                flush=True,
            )

    def describe(self, metrics: dict[str, float], speed: dict[str, float]) -> None:
        shown = {name: metrics[name] for name in ("loss", "accuracy") if name in metrics}
        shown |= {"images/s": speed["images_per_s"], "views/s": speed["views_per_s"]}
        self._bar.set_postfix({k: f"{v:.4g}" for k, v in shown.items()}, refresh=False)
        self._text = "".join(f", {k} {v:.4g}" for k, v in shown.items())

    def close(self) -> None:
        self._bar.close()


class Counter:
    """A bar over images of a long job that is no training: rate and time left, plain lines without a terminal."""

    def __init__(self, title: str, total: int, unit: str, quiet: bool = False):
        self.title, self.total, self.unit, self.quiet = title, total, unit, quiet
        self._done, self._start = 0, time.perf_counter()
        self._last_line = self._start
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, desc=title, unit=unit, disable=quiet or not self._terminal)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.close()

    def update(self, count: int) -> None:
        self._done += count
        self._bar.update(count)
        now = time.perf_counter()
        if self.quiet or self._terminal or (now - self._last_line < PLAIN_SECONDS and self._done < self.total):
            return
        self._last_line = now
        rate = self._done / max(now - self._start, 1e-9)
        left = duration((self.total - self._done) / max(rate, 1e-9))
        line = f"{self.title}: {self._done}/{self.total}, {rate:.4g} {self.unit}s/s, {left} left"
        print(line, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
