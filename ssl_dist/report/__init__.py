"""`ssl-dist report RUN [RUN ...]`: a page to look at, and the table of results over seeds."""

import os
from collections.abc import Sequence
from pathlib import Path

from ssl_dist import durable
from ssl_dist.errors import UserError
from ssl_dist.report import comparison, page
from ssl_dist.report import run as runs
from ssl_dist.report.seeds import over_seeds, table

__all__ = ["over_seeds", "table", "write"]


def write(folders: Sequence[Path], out: Path | None) -> Path:
    """Write the page of one run, or of several side by side, whole or not at all; returns where it is.

    out: the file; None: report.html in the run's folder, or in the folder that all runs have in common. Raises
    `UserError` for a folder that is no run's, and when the file cannot be written.
    """
    several = [runs.read(folder) for folder in folders]
    if len({run.name for run in several}) < len(several):
        for run in several:
            run.name = str(run.folder.relative_to(common_folder(folders)))
    text = page.of_run(several[0]) if len(several) == 1 else comparison.of_runs(several)
    path = out if out is not None else common_folder(folders) / "report.html"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.write_text(path, text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}; give another file with --out") from None
    return path


def common_folder(folders: Sequence[Path]) -> Path:
    """The run's own folder, or the nearest one that holds all of several runs."""
    resolved = [folder.resolve() for folder in folders]
    return resolved[0] if len(resolved) == 1 else Path(os.path.commonpath([folder.parent for folder in resolved]))


def results_table(folders: Sequence[Path]) -> str:
    """The results of the runs that have some, over seeds, and a line for each run that has none. Raises `UserError` for
    two runs that differ in nothing, and for damaged results."""
    measured = [folder for folder in folders if runs.has_results(folder)]
    lines = [
        f"{folder}: no results yet; run `ssl-dist evaluate {folder} knn logistic`"
        for folder in folders
        if folder not in measured
    ]
    return "\n".join([*([table(over_seeds(measured))] if measured else []), *lines])
