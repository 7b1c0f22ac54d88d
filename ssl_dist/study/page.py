"""What a study writes: its table as Markdown, HTML, CSV and LaTeX, every number as CSV, and its figure."""

import base64
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from ssl_dist.results import mean_plots
from ssl_dist.storage.durable import atomic_write_or_refuse
from ssl_dist.study import figure as figures
from ssl_dist.study import numbers as layout
from ssl_dist.study.numbers import Number
from ssl_dist.study.spec import Study, Training

_ENVIRONMENT = Environment(
    loader=PackageLoader("ssl_dist.study"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
    lstrip_blocks=True,
)  # fmt: skip


def write(folder: Path, study: Study, trainings: Sequence[Training], numbers: Sequence[Number]) -> None:
    """Write table.md, .html, .csv and .tex, numbers.csv and, where the study has a figure, figure.png and figure.svg.
    Raises `UserError` where the folder cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    table = layout.grid(study, trainings, numbers)
    files = {
        "table.md": layout.as_markdown(study, table).encode(),
        "table.csv": layout.means_as_csv(study, table).encode(),
        "table.tex": layout.as_latex(study, table).encode(),
        "numbers.csv": layout.as_csv(study, numbers).encode(),
    }
    picture = None
    if study.figure is not None:
        figure = figures.draw(study, study.figure, numbers)
        picture = mean_plots.as_png(figure)
        files |= {"figure.png": picture, "figure.svg": mean_plots.as_svg(figure)}
    files["table.html"] = html(study, table, numbers, picture).encode()
    for name, content in files.items():
        with atomic_write_or_refuse(folder / name) as file:
            file.write(content)


def html(study: Study, table: layout.Grid, numbers: Sequence[Number], picture: bytes | None) -> str:
    """One file that needs no other and no network."""
    protocols = dict.fromkeys((number.measure.column, number.record["protocol"]) for number in numbers)
    return _ENVIRONMENT.get_template("table.html").render(
        study=study, table=table, protocols=list(protocols), about=layout.about(study),
        footnotes=layout.footnotes(table),
        heads=[layout.heading(study, column) for column in table.columns],
        picture=None if picture is None else base64.b64encode(picture).decode(),
    )  # fmt: skip
