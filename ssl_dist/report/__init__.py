"""`ssl-dist report RUN [RUN ...]`: a page to look at, and the table of results over seeds."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from ssl_dist.errors import UserError
from ssl_dist.report import page, varied
from ssl_dist.report.ablation import Ablation
from ssl_dist.report.run import Run
from ssl_dist.report.run import read as read_run
from ssl_dist.report.seeds import over_seeds, table
from ssl_dist.storage.durable import atomic_write_or_refuse

__all__ = ["over_seeds", "read", "report", "table", "write"]


def report(
    folders: Sequence[Path],
    out: Path | None,
    csv: Path | None = None,
    latex: Path | None = None,
    figures: Path | None = None,
) -> str:
    """`ssl-dist report`: write the page; returns the table of results over seeds, and where the page is.

    out: the file; None: report.html in the run's folder, or in the folder that all runs have in common. csv, latex:
    files for the table of means; figures: a folder for the plots of each result against what was varied, as PNG and
    SVG. Raises `UserError` for a folder that is no run's, for two runs that differ in nothing, when there is nothing to
    write to a file that is asked for, and when it cannot be written.
    """
    runs = read(folders)
    text = _results(runs)
    files = _further_files(runs, csv, latex, figures)
    lines = [f"{write(runs, out)}: open it in a browser"]
    for path, content in files.items():
        if path.parent == figures:
            figures.mkdir(parents=True, exist_ok=True)
        with atomic_write_or_refuse(path) as file:
            file.write(content)
    lines += [f"{path}: written" for path in (csv, latex) if path is not None]
    lines += [] if figures is None else [f"{figures}: {len(files) - len(lines) + 1} plots written"]
    return "\n".join([text, "", *lines])


def _further_files(
    runs: Sequence[Run], csv: Path | None, latex: Path | None, figures: Path | None
) -> dict[Path, bytes]:
    if csv is latex is figures is None:
        return {}
    ablation = Ablation(over_seeds([run.folder for run in runs]))
    files = {}
    if csv is not None:
        files[csv] = ablation.as_csv().encode()
    if latex is not None:
        files[latex] = ablation.as_latex().encode()
    if figures is not None:
        if ablation.plotted_key is None:
            raise UserError(
                f"--figures {figures}: no key with numbers differs between the runs, so that there is nothing to plot "
                "against; name runs of several values, for example of views.num"
            )
        from ssl_dist.results import mean_plots  # matplotlib takes a second

        for name, figure in ablation.plots():
            stem = figures / re.sub(r"[^\w.-]+", "_", name).strip("_")
            files[stem.with_name(stem.name + ".png")] = mean_plots.as_png(figure)
            files[stem.with_name(stem.name + ".svg")] = mean_plots.as_svg(figure)
    return files


def read(folders: Sequence[Path]) -> list[Run]:
    """The runs; where two folders have one name, each is called by its path from the folder that holds all."""
    runs = [read_run(folder) for folder in folders]
    if len({run.name for run in runs}) < len(runs):
        for run in runs:
            run.name = str(run.folder.relative_to(_common_folder(runs)))
    if len(runs) > 1:
        for run, label in zip(runs, varied.labels([run.config for run in runs]) or [], strict=False):
            run.label = label
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
