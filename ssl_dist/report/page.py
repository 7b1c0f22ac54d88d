"""The page of a run, or of several side by side: a whole HTML document that needs nothing but itself.

A content security policy lets the page's own style and script run (by their hashes) and pictures in the page itself
show; nothing can be fetched, and no text from a file can become code.
"""

import base64
import hashlib
from collections.abc import Sequence
from datetime import datetime
from importlib import resources

from markupsafe import Markup

from ssl_dist import __version__, results
from ssl_dist.report import charts, comparison, health, published, scores, settings
from ssl_dist.report.markup import render
from ssl_dist.report.pictures import Picture
from ssl_dist.report.run import Run


def of(runs: Sequence[Run]) -> str:
    """The whole document of one run, or of several side by side."""
    style, script = (Markup(_file(name)) for name in ("page.css", "page.js"))
    return render(
        "run.html" if len(runs) == 1 else "runs.html", runs=runs, version=__version__,
        time=datetime.now().astimezone().isoformat(" ", "minutes"), style=style, style_hash=_hash(style), script=script,
        script_hash=_hash(script), charts=charts, comparison=comparison, figures=_by_evaluator(runs), health=health,
        published=published, results=results, scores=scores, settings=settings,
    )  # fmt: skip


def _by_evaluator(runs: Sequence[Run]) -> dict[str, list[tuple[Run, Picture]]]:
    """All figures, evaluator by evaluator; those of one name, by several runs, stand beside one another."""
    figures: dict[str, list[tuple[Run, Picture]]] = {}
    for name in dict.fromkeys(picture.name for run in runs for picture in run.figures):
        for run in runs:
            for picture in run.figures:
                if picture.name == name:
                    figures.setdefault(picture.evaluator or "others", []).append((run, picture))
    return figures


def _file(name: str) -> str:
    return resources.files("ssl_dist.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
