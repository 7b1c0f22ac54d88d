"""HTML built so that no text can become markup: every string is escaped unless it is `Html` already."""

import html
import re
from collections.abc import Sequence

_VOID = {"img", "meta", "br", "col"}


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def element(name: str, /, *children: object, **attributes: object) -> Html:
    """<name attributes>children</name>. Children are escaped unless they are `Html`; None and False are left out.

    An attribute's name may end in an underscore (class_), and its underscores become hyphens (data_frame); True gives
    the attribute without a value, None and False leave it out.
    """
    words = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        words.append(key if value is True else f'{key}="{html.escape(str(value))}"')
    opening = f"<{' '.join(words)}>"
    if name in _VOID:
        return Html(opening)
    return Html(opening + joined(*children) + f"</{name}>")


def joined(*children: object) -> Html:
    """Children one after the other, escaped unless they are `Html`."""
    kept = [child for child in children if child is not None and child is not False]
    return Html("".join(child if isinstance(child, Html) else html.escape(str(child)) for child in kept))


def with_code(text: str) -> Html:
    """Text in which `words between backticks` are code."""
    parts = re.split(r"`([^`]*)`", text)
    return joined(*(element("code", part) if number % 2 else part for number, part in enumerate(parts)))


def table(heads: list, rows: list[list], class_: str | None = None) -> Html:
    """A table in a box of its own that scrolls where the screen is narrow. Cells are text, or elements td and th."""
    head = element("tr", *(_cell("th", cell, scope="col") for cell in heads))
    body = [element("tr", *(_cell("td", cell) for cell in row)) for row in rows]
    shown = element("table", element("thead", head), element("tbody", *body), class_=class_)
    return element("div", shown, class_="scroll", tabindex="0")


def _cell(name: str, content: object, **attributes: str) -> Html:
    if isinstance(content, Html) and content.startswith(("<td", "<th")):
        return content
    return element(name, content, **attributes)


def number_cell(*children: object) -> Html:
    """A table's cell at whose right edge a number stands."""
    return element("td", *children, class_="value")


def number_head(*children: object) -> Html:
    """The head of a column of numbers."""
    return element("th", *children, scope="col", class_="value")


def number(value: float) -> str:
    """Four significant digits, thousands separated."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def count(things: Sequence, word: str) -> str:
    """2 keys, 1 key."""
    return f"{len(things)} {word}{'' if len(things) == 1 else 's'}"
