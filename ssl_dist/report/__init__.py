"""`ssl-dist report RUN [RUN ...]`: a page to look at, and the table of results over seeds."""

import os
from collections.abc import Sequence
from pathlib import Path

from ssl_dist.report import comparison, page
from ssl_dist.report import run as runs
from ssl_dist.report.run import Run
from ssl_dist.report.seeds import over_seeds, table
from ssl_dist.storage.durable import atomic_write_or_refuse

__all__ = ["over_seeds", "read", "report", "table", "write"]


def report(folders: Sequence[Path], out: Path | None) -> str:
    """`ssl-dist report`: write the page; returns the table of results over seeds, and where the page is.

    out: the file; None: report.html in the run's folder, or in the folder that all runs have in common. Raises
    `UserError` for a folder that is no run's, for two runs that differ in nothing, and when the file cannot be written.
    """
    several = read(folders)
    return f"{_results(several)}\n\n{write(several, out)}: open it in a browser"


def read(folders: Sequence[Path]) -> list[Run]:
    """The runs; where two folders have one name, each is called by its path from the folder that holds all."""
    several = [runs.read(folder) for folder in folders]
    if len({run.name for run in several}) < len(several):
        for run in several:
            run.name = str(run.folder.relative_to(_common_folder(several)))
    return several


def write(several: Sequence[Run], out: Path | None) -> Path:
    """Write the page of one run, or of several side by side, whole or not at all; returns where it is."""
    text = page.of_run(several[0]) if len(several) == 1 else comparison.of_runs(several)
    path = out if out is not None else _common_folder(several) / "report.html"
    with atomic_write_or_refuse(path, "give another file with --out") as file:
        file.write(text.encode())
    return path


def _common_folder(several: Sequence[Run]) -> Path:
    """The run's own folder, or the nearest one that holds all of several runs."""
    first = several[0].folder
    return first if len(several) == 1 else Path(os.path.commonpath([run.folder.parent for run in several]))


def _results(several: Sequence[Run]) -> str:
    """The results of the runs that have some, over seeds, and the notes on the others."""
    measured = [run.folder for run in several if run.records]
    notes = [f"{run.folder}: {note}" for run in several if not run.records for note in run.notes.get("results", [])]
    return "\n".join([*([table(over_seeds(measured))] if measured else []), *notes])
