"""The log of a run: a progress bar, metrics.jsonl, TensorBoard. Only rank 0 writes it.

What cannot be written raises OSError with the file's name.
"""

import io
import itertools
import os
import re
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

from ssl_dist.clock import Clock
from ssl_dist.progress import Progress
from ssl_dist.run.metrics import FILE, append, cut_after
from ssl_dist.storage import durable

_BUCKETS = 1e-12 * 1.1 ** np.arange(774)  # up to 1e20, as TensorBoard's own
_SECOND = re.compile(r"events\.out\.tfevents\.(\d{10})\.")


class EventFile:
    """A file of TensorBoard's events, whole at any time. torch's SummaryWriter writes in a thread of its own, which
    prints a traceback where the disk is full.

    purge_step: TensorBoard passes over what former files hold from this step on.
    """

    _numbers = itertools.count()

    def __init__(self, folder: Path, purge_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files by name, so one that is begun later sorts later, also where the clock was set back
        former = [int(match[1]) for match in map(_SECOND.match, os.listdir(folder)) if match]
        second = max([int(time.time()), *(second + 1 for second in former)])
        start = f"{second}.{socket.gethostname()}.{os.getpid()}.{next(self._numbers)}"
        self._path = folder / f"events.out.tfevents.{start}"
        self._append(
            Event(step=purge_step, file_version="brain.Event:2"),
            Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)),
        )

    def add(self, step: int, *summaries: Any) -> None:
        """Write summaries of torch.utils.tensorboard.summary. Raises OSError with the file's name."""
        self._append(*(Event(step=step, summary=summary) for summary in summaries))

    def _append(self, *events: Event) -> None:
        records = io.BytesIO()
        for event in events:
            event.wall_time = time.time()
            RecordWriter(records).write(event.SerializeToString())
        durable.append(self._path, records.getvalue())


class RunLog:
    """Use as a context manager. `step` values are steps completed; on resume everything after `clock.step` is cut."""

    def __init__(self, run: Path, clock: Clock, title: str, images_per_step: int, views_per_image: int):
        self.images_per_step, self.views_per_image = images_per_step, views_per_image
        self._path = run / FILE
        cut_after(self._path, clock.step)
        self._board = EventFile(run / "tensorboard", clock.step + 1)
        self._bar = Progress(title, clock.total_steps, "step", done=clock.step)
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
        epochs = f"epoch {clock.epochs_done:.1f}/{clock.total_epochs:g}"
        self._bar.update(1, f"step {clock.step}/{clock.total_steps}, {epochs}")

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
        self._write_line(clock, {"train": metrics, "speed": speed})
        bins = np.concatenate([-_BUCKETS[::-1], [0.0], _BUCKETS])
        for name, tensor in histograms.items():
            values = tensor.numpy()
            if len(values := values[~np.isnan(values)]):
                self._board.add(clock.step, summary.histogram(name, values, bins))
        shown = {name: metrics[name] for name in ("loss", "accuracy") if name in metrics}
        self._bar.describe(shown | {"images/s": speed["images_per_s"], "views/s": speed["views_per_s"]})

    def measured(self, clock: Clock, values: dict[str, float], seconds: float) -> None:
        """Log values measured between two steps; the time that this took does not count as training time."""
        step, start = self._since
        self._since = step, start + seconds
        self._write_line(clock, {"online": values})

    def _write_line(self, clock: Clock, groups: dict[str, dict[str, float]]) -> None:
        line = {"step": clock.step, "epoch": clock.epochs_done}
        scalars = []
        for group, values in groups.items():
            line |= values
            scalars += [summary.scalar(f"{group}/{name}", value) for name, value in values.items()]
        self._board.add(clock.step, *scalars)
        append(self._path, {name: _short(value) for name, value in line.items()})

    def pictures(self, name: str, clock: Clock, views_VBCHW: np.ndarray) -> None:
        """A grid in TensorBoard: a row for each image, a column for each of its views (uint8)."""
        rows = np.concatenate(views_VBCHW, axis=3)
        self.picture(name, clock, np.concatenate(rows, axis=1))

    def picture(self, name: str, clock: Clock, pixels_CHW: np.ndarray) -> None:
        """A picture in TensorBoard, uint8 [3, height, width]."""
        self._board.add(clock.step, summary.image(name, pixels_CHW, dataformats="CHW"))


def _short(value: float) -> float | int:
    """Ten digits: float32 holds seven, and fp64 runs are compared by their checkpoints."""
    return value if isinstance(value, int) else float(np.format_float_positional(value, 10, fractional=False))
