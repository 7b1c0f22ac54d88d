"""The pictures of runs on a page: their views, and the figures that evaluators drew."""

from collections.abc import Sequence

from ssl_dist.report.frame import notes
from ssl_dist.report.markup import Html, element, joined
from ssl_dist.report.pictures import Picture
from ssl_dist.report.run import Run

WIDE_PIXELS = 1000  # above which a picture takes the whole width from the start


def views(runs: Sequence[Run]) -> Html:
    """The grids of views of each run, one for each recipe, in boxes that scroll where a grid is wide."""
    words = "Each row is an image, each column one of its views, as the network sees them (before normalisation)."
    legend = element("p", words) if any(run.views for run in runs) else None
    parts = []
    for run in runs:
        grids = [
            element(
                "figure",
                element("figcaption", f"views.groups.{number}") if len(run.views) > 1 else None,
                element("div", _image(picture), class_="scroll views", tabindex="0"),
            )
            for number, picture in enumerate(run.views)
        ]
        name = element("h3", run.name) if len(runs) > 1 else None
        parts.append(element("div", name, notes(run, "views"), *grids))
    return joined(legend, element("div", *parts, class_="beside"))


def figures(runs: Sequence[Run]) -> Html:
    """All pictures, evaluator by evaluator; those of one name beside one another. A click enlarges one."""
    by_evaluator: dict[str, list[Html]] = {}
    names = dict.fromkeys(picture.name for run in runs for picture in run.figures)
    for name in names:
        for run in runs:
            for picture in [picture for picture in run.figures if picture.name == name]:
                shown = _figure(picture, run.name if len(runs) > 1 else None)
                by_evaluator.setdefault(picture.evaluator or "others", []).append(shown)
    parts = [
        joined(element("h3", evaluator), element("div", *shown, class_="pictures"))
        for evaluator, shown in by_evaluator.items()
    ]
    return joined(*parts)


def _figure(picture: Picture, whose: str | None) -> Html:
    unmarked = None if picture.checkpoint else " (it does not say of which checkpoint)"
    words = element(
        "figcaption",
        element("b", picture.title),
        f" · {whose}" if whose else None,
        unmarked,
        element("br"),
        picture.caption,
    )
    button = element("button", _image(picture), class_="picture", type="button", title="larger or smaller")
    return element("figure", words, button, class_="large" if picture.width > WIDE_PIXELS and whose is None else None)


def _image(picture: Picture) -> Html:
    return element("img", src=picture.url, alt=picture.title, width=picture.width, height=picture.height)
