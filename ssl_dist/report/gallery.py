"""The pictures of runs on a page: their views, and the figures that evaluators drew."""

from collections.abc import Sequence

from ssl_dist.report.markup import Html, element, joined
from ssl_dist.report.pictures import Picture
from ssl_dist.report.run import Run


def views(run: Run) -> Html:
    """The grids of views, one for each recipe, in boxes that scroll where a grid is wide."""
    caption = "Each row is an image, each column one of its views, as the network sees them (before normalisation)."
    return joined(
        *(
            element(
                "figure",
                element("figcaption", caption if number == 0 else f"{picture.name}: the next recipe of views.groups."),
                element("div", image(picture), class_="scroll views", tabindex="0"),
            )
            for number, picture in enumerate(run.views)
        )
    )


def figures(several: Sequence[Run]) -> Html:
    """All pictures; those of one name beside each other. A click enlarges one."""
    names = dict.fromkeys(picture.name for run in several for picture in run.figures)
    shown = [
        _figure(picture, run.name if len(several) > 1 else None)
        for name in names
        for run in several
        for picture in run.figures
        if picture.name == name
    ]
    return element("div", *shown, class_="pictures")


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
    button = element("button", image(picture), class_="picture", type="button", title="larger or smaller")
    return element("figure", words, button)


def image(picture: Picture) -> Html:
    return element("img", src=picture.url, alt=picture.title, width=picture.width, height=picture.height)
