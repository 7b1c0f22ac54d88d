"""A page of all clusters: images of each, framed in the colours of their true classes, by purity or in random order.

One HTML file that fetches nothing and runs no script: the order is chosen by a radio button, and CSS does the rest.
"""

import base64
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image

SIDE = 64  # px of an image on the page, at the most
QUALITY = 85  # of its JPEG
GOLDEN_ANGLE = 137.50776  # degrees: hues of classes that follow each other lie apart

_STYLE = """
:root { color-scheme: light dark; }
body { font: 14px/1.4 system-ui, "DejaVu Sans", sans-serif; margin: 0 auto; max-width: 1280px; padding: 0 20px 40px; }
p { max-width: 90ch; }
main { display: flex; flex-direction: column; margin-top: 12px; }
article { display: grid; grid-template-columns: 190px 1fr; gap: 10px; padding: 5px 0; border-top: 1px solid #8884;
  order: var(--p); content-visibility: auto; contain-intrinsic-size: auto 80px; }
#random:checked ~ main article { order: var(--r); }
article small { display: block; }
article div { display: flex; flex-wrap: wrap; gap: 4px; }
i { display: inline-block; width: 0.8em; height: 0.8em; background: hsl(var(--h) 70% var(--l)); }
img { height: 64px; border: 4px solid hsl(var(--h) 70% var(--l)); }
"""


@dataclass(frozen=True)
class Cluster:
    """One cluster: its number, size, and place in a random order; images uint8 [n, S, S, 3] of it and their files, ""
    where they are not known. labels: the images' true classes int64 [n]; majority: its most frequent class; purity: the
    share of that class in percent; all three only where there are classes."""

    number: int
    size: int
    random_place: int
    images: np.ndarray
    files: Sequence[str]
    labels: np.ndarray | None
    majority: int | None
    purity: float

    def images_of(self, names: Sequence[str] | None) -> Iterator[str]:
        """The elements of its images; names: of the classes."""
        for row, image in enumerate(self.images):
            label = None if self.labels is None else int(self.labels[row])
            known = [] if label is None or names is None else [names[label]]
            words = escape(": ".join([*known, *filter(None, [self.files[row]])]))
            frame = "" if label is None else f' style="{colour(label)}"'
            yield f'<img src="{_data_url(image)}" alt="{words}" title="{words}"{frame}>'


def html(
    title: str, caption: str, clusters: Iterable[Cluster], first: str, names: Sequence[str] | None
) -> Iterator[str]:
    """The page, part by part. clusters: in their order, which begins with the `first` (purest, largest); names: of the
    classes, None: there are none."""
    yield (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; style-src '
        "'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f"<p>{escape(caption)}</p>\n"
        f'<input type="radio" name="order" id="ranked" checked> <label for="ranked">the {first} first</label>\n'
        '<input type="radio" name="order" id="random"> <label for="random">in random order</label>\n<main>\n'
    )
    for place, cluster in enumerate(clusters):
        purity = "" if cluster.labels is None else f", {cluster.purity:.0f} %"
        yield (
            f'<article style="--p:{place};--r:{cluster.random_place}"><p>cluster {cluster.number}'
            f"<small>{cluster.size:,} images{purity}</small>"
        )
        if cluster.majority is not None and names is not None:
            yield f'<small><i style="{colour(cluster.majority)}"></i> {escape(names[cluster.majority])}</small>'
        yield "</p><div>"
        yield from cluster.images_of(names)
        yield "</div></article>\n"
    yield "</main>\n</body>\n</html>\n"


def colour(label: int) -> str:
    """A class's colour, as CSS variables: its hue by the golden angle, in one of three lightnesses."""
    return f"--h:{label * GOLDEN_ANGLE % 360:.0f};--l:{(50, 35, 68)[label // 8 % 3]}%"


def _data_url(image: np.ndarray) -> str:
    picture, file = Image.fromarray(image), io.BytesIO()
    picture.thumbnail((SIDE, SIDE))
    picture.save(file, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
