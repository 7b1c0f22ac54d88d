"""HTML from the templates beside this file. No text can become markup: every value is escaped unless it is `Markup`."""

import re
from collections.abc import Sized

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

COLOURS = 8  # classes c0 to c7 in page.css


def render(template: str, **values: object) -> Markup:
    """The template of this name with these values. Raises an error for a name in it that has no value."""
    return Markup(_ENVIRONMENT.get_template(template).render(values))


def with_code(text: str) -> Markup:
    """Text in which `words between backticks` are code."""
    return Markup(re.sub("`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def breakable(text: str) -> Markup:
    """Text that may be broken after an underscore."""
    return Markup(str(escape(text)).replace("_", "_<wbr>"))


def number(value: float) -> str:
    """Four significant digits, thousands separated."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def style(number: int) -> str:
    """The classes of the n-th of several curves, from 0: its colour, and dashes where colours are used again."""
    return f"c{number % COLOURS}" + (" again" if number >= COLOURS else "")


def count(things: Sized, word: str) -> str:
    """2 keys, 1 key."""
    return f"{len(things)} {word}{'' if len(things) == 1 else 's'}"


_ENVIRONMENT = Environment(
    loader=PackageLoader("ssl_dist.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
    lstrip_blocks=True,
)  # fmt: skip
_ENVIRONMENT.filters |= {
    "with_code": with_code,
    "breakable": breakable,
    "short": number,
    "thousands": "{:,}".format,
    "count_of": count,
}
_ENVIRONMENT.globals["style_of"] = style
