"""The frame of a page: a whole HTML document that needs nothing but itself, and its sections.

A content security policy lets the page's own style and script run (by their hashes) and pictures in the page itself
show; nothing can be fetched, and no text from a file can become code.
"""

import base64
import hashlib
from collections.abc import Sequence
from datetime import datetime
from importlib import resources

from ssl_dist import __version__
from ssl_dist.report.markup import Html, element, joined, with_code
from ssl_dist.report.run import Run


def document(title: str, body: Sequence[Html | None]) -> str:
    """The whole page around the sections of `body`."""
    style, script = (Html(_file(name)) for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; "
        "form-action 'none'"
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", style),
    )
    time = datetime.now().astimezone().isoformat(" ", "minutes")
    words = f"Made by ssl-dist {__version__} at {time}. This file needs no other one and no network."
    footer = element("footer", words)
    return "<!doctype html>\n" + element(
        "html", head, element("body", *body, footer, element("script", script)), lang="en"
    )


def navigation() -> Html:
    names = ("Health", "Results", "Curves", "Views", "Pictures", "Config")
    return element("nav", *(element("a", name, href=f"#{name.lower()}") for name in names))


def section(id: str, title: str, *parts: Html | None) -> Html:
    return element("section", element("h2", title), *parts, id=id)


def notes(run: Run, part: str) -> Html:
    """What is missing or odd in this part, in words."""
    return joined(*(element("p", with_code(sentence), class_="none") for sentence in run.notes.get(part, [])))


def _file(name: str) -> str:
    return resources.files("ssl_dist.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
