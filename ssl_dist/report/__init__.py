"""`ssl-dist report RUN [RUN ...]`: a page to look at, and the table of results over seeds."""

import os
from collections.abc import Sequence
from pathlib import Path

from ssl_dist.report import page
from ssl_dist.report.run import Run
from ssl_dist.report.run import read as read_run
from ssl_dist.report.seeds import over_seeds, table
from ssl_dist.storage.durable import atomic_write_or_refuse

__all__ = ["over_seeds", "read", "report", "table", "write"]


def report(folders: Sequence[Path], out: Path | None) -> str:
    """`ssl-dist report`: write the page; returns the table of results over seeds, and where the page is.

    out: the file; None: report.html in the run's folder, or in the folder that all runs have in common. Raises
    `UserError` for a folder that is no run's, for two runs that differ in nothing, and when the file cannot be written.
    """
    runs = read(folders)
    return f"{_results(runs)}\n\n{write(runs, out)}: open it in a browser"


def read(folders: Sequence[Path]) -> list[Run]:
    """The runs; where two folders have one name, each is called by its path from the folder that holds all."""
    runs = [read_run(folder) for folder in folders]
    if len({run.name for run in runs}) < len(runs):
        for run in runs:
            run.name = str(run.folder.relative_to(_common_folder(runs)))
    return runs


def write(runs: Sequence[Run], out: Path | None) -> Path:
    """Write the page of one run, or of several side by side, whole or not at all; returns where it is."""
    text = page.of(runs)
    path = out if out is not None else _common_folder(runs) / "report.html"
    with atomic_write_or_refuse(path, "give another file with --out") as file:
        file.write(text.encode(errors="backslashreplace"))  # a folder's name may be no UTF-8
    return path


def _common_folder(runs: Sequence[Run]) -> Path:
    """The run's own folder, or the nearest one that holds all runs."""
    first = runs[0].folder
    return first if len(runs) == 1 else Path(os.path.commonpath([run.folder.parent for run in runs]))


def _results(runs: Sequence[Run]) -> str:
    """The results of the runs that have some, over seeds, and the notes on the others."""
    measured = [run.folder for run in runs if run.records]
    notes = [f"{run.folder}: {note}" for run in runs if not run.records for note in run.notes.get("results", [])]
    return "\n".join([*([table(over_seeds(measured))] if measured else []), *notes])
