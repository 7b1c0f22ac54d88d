"""The log of a run: a progress bar, metrics.jsonl, TensorBoard. Only rank 0 writes it."""

import json
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from ssl_dist.clock import Clock
from ssl_dist.progress import Progress
from ssl_dist.run.metrics import FILE, cut_after


class RunLog:
    """Use as a context manager. `step` values are steps completed; on resume everything after `clock.step` is cut."""

    def __init__(self, run: Path, clock: Clock, title: str, images_per_step: int, views_per_image: int):
        self.images_per_step, self.views_per_image = images_per_step, views_per_image
        cut_after(run / FILE, clock.step)
        self._metrics = open(run / FILE, "a", encoding="utf-8")  # noqa: SIM115 - closed in __exit__
        self._board = SummaryWriter(run / "tensorboard", purge_step=clock.step + 1)
        self._bar = Progress(title, clock.total_steps, "step", done=clock.step)
        self._since = (clock.step, time.perf_counter())
        self._waited = 0.0

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._metrics.close()
        self._board.close()

    def waited(self, seconds: float) -> None:
        """Count seconds in which the loop waited for data."""
        self._waited += seconds

    def after_step(self, clock: Clock) -> None:
        epochs = f"epoch {clock.epochs_done:.1f}/{clock.total_epochs:g}"
        self._bar.update(1, f"step {clock.step}/{clock.total_steps}, {epochs}")

    def write(self, clock: Clock, metrics: dict[str, float], histograms: dict[str, torch.Tensor]) -> None:
        """One line of metrics.jsonl and the same numbers in TensorBoard, with the speed since the last line."""
        step, start = self._since
        now = time.perf_counter()
        seconds = max(now - start, 1e-9)
        rate = (clock.step - step) * self.images_per_step / seconds
        speed = {
            "images_per_s": rate,
            "views_per_s": rate * self.views_per_image,
            "data_wait": self._waited / seconds,
            "seconds_per_step": seconds / max(1, clock.step - step),
        }
        self._since, self._waited = (clock.step, now), 0.0
        self._write_line(clock, {"train": metrics, "speed": speed})
        for name, values in histograms.items():
            self._board.add_histogram(name, values, clock.step)
        shown = {name: metrics[name] for name in ("loss", "accuracy") if name in metrics}
        self._bar.describe(shown | {"images/s": speed["images_per_s"], "views/s": speed["views_per_s"]})

    def measured(self, clock: Clock, values: dict[str, float], seconds: float) -> None:
        """Log values measured between two steps; the time that this took does not count as training time."""
        step, start = self._since
        self._since = step, start + seconds
        self._write_line(clock, {"online": values})

    def _write_line(self, clock: Clock, groups: dict[str, dict[str, float]]) -> None:
        line = {"step": clock.step, "epoch": clock.epochs_done}
        for group, values in groups.items():
            line |= values
            for name, value in values.items():
                self._board.add_scalar(f"{group}/{name}", value, clock.step)
        self._metrics.write(json.dumps({k: _short(v) for k, v in line.items()}) + "\n")
        self._metrics.flush()

    def pictures(self, name: str, clock: Clock, views_VBCHW: np.ndarray) -> None:
        """A grid in TensorBoard: a row for each image, a column for each of its views (uint8)."""
        rows = np.concatenate(views_VBCHW, axis=3)
        self._board.add_image(name, np.concatenate(rows, axis=1), clock.step)


def _short(value: float) -> float | int:
    """Ten digits: float32 holds seven, and fp64 runs are compared by their checkpoints."""
    return value if isinstance(value, int) else float(np.format_float_positional(value, 10, fractional=False))
