"""Trainings from a program or a notebook: `ssl_dist.pretrain` and `ssl_dist.Run`.

run = ssl_dist.pretrain("configs/digits/relational-conv4.yaml", {"data.root": "data/digits", "views.num": 4})
run.plot(), run.evaluate("knn"), run.results()
"""

import copy
import json
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ssl_dist import config, results
from ssl_dist.config import Config
from ssl_dist.errors import UserError, quoted
from ssl_dist.evaluate.command import evaluate
from ssl_dist.report import report
from ssl_dist.run.metrics import FILE, read_metrics
from ssl_dist.storage import checkpoint
from ssl_dist.train.listener import SILENT, Listener
from ssl_dist.train.loop import train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Settings = str | os.PathLike[str] | Mapping[str, Any] | Config


def pretrain(
    settings: Settings,
    overrides: Mapping[str, Any] | None = None,
    *,
    on_log: Callable[[dict[str, float]], object] | None = None,
    on_checkpoint: Callable[[Path], object] | None = None,
) -> "Run":
    """Train by a config, in this process, as `ssl-dist train` does: the same call again resumes, and a run that is
    complete is left alone.

    settings: a config's file, its tree, or a `Config`; overrides: values by keys with dots. on_log gets each line of
    the log, on_checkpoint the file of each checkpoint. Ctrl-C stops after the step, which is saved. For the main
    thread. Raises `UserError` for a mistake and `Fault` for a loss that is not finite.
    """
    if threading.current_thread() is not threading.main_thread():
        raise UserError("pretrain: trains in the main thread, where Ctrl-C arrives; call it there, or in a process")
    words = _words(overrides)
    if isinstance(settings, str | os.PathLike):
        chosen = config.load(Path(settings), words)
    else:
        if not isinstance(settings, Config | Mapping):
            raise UserError(f"settings = {quoted(settings)}: give a config's file, its tree, or a Config")
        tree = config.to_tree(settings) if isinstance(settings, Config) else copy.deepcopy(dict(settings))
        chosen = config.overridden(tree, words)
    train(chosen, Listener(on_log or SILENT.on_log, on_checkpoint or SILENT.on_checkpoint))
    return Run(chosen.run_dir)


class Run:
    """The folder of a training, whoever made it."""

    def __init__(self, folder: str | os.PathLike[str]):
        """Raises `UserError` when it is no run's folder."""
        self.folder = Path(folder)
        self.config = config.load(self.folder / "config.yaml")

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}): {self.config.method.name} on {self.config.backbone.name}, step {self.step}"

    @property
    def step(self) -> int:
        """Of the newest checkpoint; 0 where there is none."""
        return max(checkpoint.steps(self.folder), default=0)

    def metrics(self) -> dict[str, np.ndarray]:
        """The log as columns by name, float64, with NaN where a line lacks a number; pandas.DataFrame takes it."""
        lines, _ = read_metrics(self.folder / FILE)
        names = dict.fromkeys(name for line in lines for name in line)
        return {name: np.array([line.get(name, np.nan) for line in lines], np.float64) for name in names}

    def plot(self, *names: str) -> "Figure":
        """The log's columns of these names against the epoch, one below the other; none named: loss, and accuracy where
        the method has one. Raises `UserError` for a name that the log lacks."""
        from matplotlib.figure import Figure

        columns = self.metrics()
        names = names or tuple(name for name in ("loss", "accuracy") if name in columns)
        for name in names:
            if name not in columns:
                raise UserError(f"{self.folder / FILE}: has no {name}; it has {', '.join(columns) or 'no line'}")
        if not names:
            raise UserError(f"{self.folder / FILE}: holds no line; the run has taken no step")
        figure = Figure(figsize=(7, 2.4 * len(names)), layout="constrained")
        for axes, name in zip(figure.subplots(len(names), sharex=True, squeeze=False)[:, 0], names, strict=True):
            there = np.isfinite(columns[name])
            axes.plot(columns["epoch"][there], columns[name][there], color="#1f4e79")
            axes.set_ylabel(name)
            axes.grid(alpha=0.3)
        axes.set_xlabel("epoch")
        return figure

    def evaluate(self, *evaluators: str, overrides: Mapping[str, Any] | None = None) -> dict[str, float]:
        """Measure the newest checkpoint as `ssl-dist evaluate` does; values by name. overrides: options and data by
        keys with dots: `run.evaluate("knn", overrides={"knn.k": [20]})`. Raises `UserError`."""
        for name in evaluators:
            if not isinstance(name, str):
                raise UserError(f"evaluator {quoted(name)}: give names one by one, as in evaluate('knn', 'logistic')")
        _, records = evaluate(self.folder, list(evaluators), _words(overrides))
        return {record["name"]: record["value"] for record in records}

    def results(self) -> list[dict[str, Any]]:
        """Every number that was measured, with its protocol: the records of results.json."""
        return results.read(self.folder / "results.json")

    def report(self) -> Path:
        """Write the run's page, report.html, and return its path."""
        report([self.folder], None)
        return self.folder / "report.html"


def _words(overrides: Mapping[str, Any] | None) -> list[str]:
    """As on a command line."""
    if not isinstance(overrides, Mapping | None):
        raise UserError(f"overrides = {quoted(overrides)}: give a dict of values by keys with dots")
    return [f"{key}={_text(key, value)}" for key, value in (overrides or {}).items()]


def _text(key: str, value: Any) -> str:
    """A value in JSON, with paths, and numbers and arrays of numpy."""

    def plain(part: Any) -> Any:
        if isinstance(part, np.generic | np.ndarray):
            return part.tolist()
        if isinstance(part, os.PathLike):
            return os.fspath(part)
        raise UserError(f"{key} = {quoted(value)}: a value of a config is a number, a text, or a list or dict of these")

    return json.dumps(value, default=plain)
