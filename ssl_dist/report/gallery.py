"""The order of the pictures on a page."""

from collections.abc import Sequence

from ssl_dist.report.pictures import Picture
from ssl_dist.report.run import Run


def by_evaluator(runs: Sequence[Run]) -> dict[str, list[tuple[Run, Picture]]]:
    """All figures, evaluator by evaluator; those of one name, by several runs, stand beside one another."""
    figures: dict[str, list[tuple[Run, Picture]]] = {}
    for name in dict.fromkeys(picture.name for run in runs for picture in run.figures):
        for run in runs:
            for picture in run.figures:
                if picture.name == name:
                    figures.setdefault(picture.evaluator or "others", []).append((run, picture))
    return figures
