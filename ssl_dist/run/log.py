"""The log of a run: a progress bar, metrics.jsonl, TensorBoard. Only rank 0 writes it.

What cannot be written raises OSError with the file's name.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssl_dist.clock import Clock
from ssl_dist.progress import Progress
from ssl_dist.run import board, mosaic
from ssl_dist.run.metrics import FILE, append, cut_after

_BUCKETS = 1e-12 * 1.1 ** np.arange(774)  # up to 1e20, as TensorBoard's own


class RunLog:
    """Use as a context manager. `step` values are steps completed; on resume everything after `clock.step` is cut.

    settings: of the run, for TensorBoard. about: what it says of the metrics that are not in `board.MEANINGS`. on_line:
    gets every line of metrics.jsonl after it is written.
    """

    def __init__(
        self,
        run: Path,
        clock: Clock,
        title: str,
        images_per_step: int,
        views_per_image: int,
        settings: Mapping[str, Any],
        about: str = "",
        on_line: Callable[[dict[str, float]], object] = lambda line: None,
    ):
        self.images_per_step, self.views_per_image = images_per_step, views_per_image
        self._path, self._on_line = run / FILE, on_line
        cut_after(self._path, clock.step)
        self._board = board.EventFile(run / "tensorboard", clock.step + 1, others=about)
        self._board.add(clock.step, *board.settings(settings))
        self._bar = Progress(title, clock.total_steps, "step", done=clock.step)
        self._online: dict[str, float] = {}
        self._since = (clock.step, time.perf_counter())
        self._waited = 0.0

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def waited(self, seconds: float) -> None:
        """Count seconds in which the loop waited for data."""
        self._waited += seconds

    def after_step(self, clock: Clock) -> None:
        """Count a step whose checkpoint, where one is due, is saved."""
        epochs = f"epoch {clock.epochs_done:.1f}/{clock.total_epochs:g}"
        self._bar.update(1, f"step {clock.step}/{clock.total_steps}, {epochs}")
        if clock.done:
            self._board.add(clock.step, board.completed())

    def speed(self, clock: Clock) -> dict[str, float]:
        """Images and views a second, the share of the time that the loop waited for data, and seconds a step, since
        the last call."""
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
        return speed

    def write(
        self, clock: Clock, metrics: dict[str, float], histograms: dict[str, torch.Tensor], speed: dict[str, float]
    ) -> None:
        """One line of metrics.jsonl and the same numbers in TensorBoard. histograms: 1-d, NaN for no value."""
        from torch.utils.tensorboard import summary

        self._write_line(clock, {"train": metrics, "speed": speed})
        bins = np.concatenate([-_BUCKETS[::-1], [0.0], _BUCKETS])
        for name, tensor in histograms.items():
            values = tensor.numpy()
            if len(values := values[~np.isnan(values)]):
                self._board.add(clock.step, summary.histogram(name, values, bins))
        shown = {name: metrics[name] for name in ("loss", "accuracy") if name in metrics}
        self._bar.describe(shown | self._online | {"images/s": speed["images_per_s"], "views/s": speed["views_per_s"]})

    def measured(self, clock: Clock, values: dict[str, float], seconds: float) -> None:
        """Log values measured between two steps; the time that this took does not count as training time."""
        step, start = self._since
        self._since = step, start + seconds
        self._write_line(clock, {"online": values})
        self._online |= values

    def _write_line(self, clock: Clock, groups: dict[str, dict[str, float]]) -> None:
        from torch.utils.tensorboard import summary

        line = {"step": clock.step, "epoch": clock.epochs_done}
        scalars = []
        for group, values in groups.items():
            line |= values
            scalars += [summary.scalar(f"{group}/{name}", value) for name, value in values.items()]
        self._board.add(clock.step, *scalars)
        line = {name: _short(value) for name, value in line.items()}
        append(self._path, line)
        self._on_line(line)

    def pictures(self, name: str, clock: Clock, groups: Sequence[np.ndarray]) -> None:
        """A grid of the views of every group in TensorBoard, see `mosaic.of_views`."""
        self.picture(name, clock, mosaic.of_views(groups)[0].transpose(2, 0, 1))

    def picture(self, name: str, clock: Clock, pixels_CHW: np.ndarray) -> None:
        """A picture in TensorBoard, uint8 [3, height, width]."""
        from torch.utils.tensorboard import summary

        self._board.add(clock.step, summary.image(name, pixels_CHW, dataformats="CHW"))


def _short(value: float) -> float | int:
    """Ten digits: float32 holds seven, and fp64 runs are compared by their checkpoints."""
    return value if isinstance(value, int) else float(np.format_float_positional(value, 10, fractional=False))
