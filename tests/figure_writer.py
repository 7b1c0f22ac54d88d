"""A FigureWriter that keeps figures in memory, with images whose colour tells the split and the image."""

import numpy as np
from matplotlib.text import Text

COLORS = {"train": 100, "test": 200}


class MemoryFigureWriter:
    def __init__(self, folder=None):
        self.folder = folder
        self.pictures = {}
        self.pages = {}
        self.tables = {}
        self.part_of = {}

    def images(self, part, rows):
        ids = part.image_ids[np.asarray(rows)]
        images = np.zeros((len(ids), 8, 8, 3), np.uint8)
        images[..., 0] = COLORS[part.metadata["split"]]
        images[..., 1], images[..., 2] = (ids // 256)[:, None, None], (ids % 256)[:, None, None]
        return images

    def choice(self, part):
        return ""

    def add(self, name, figure, title, caption, part=None):
        self.pictures[name] = (figure, title, caption)
        self.part_of[name] = part

    def add_page(self, name, parts, part):
        self.pages[name] = "".join(parts)
        self.part_of[name] = part
        return f"figures/{name}.html"

    def add_table(self, name, columns, rows, part):
        self.tables[name] = [tuple(columns), *map(tuple, rows)]
        return f"figures/{name}.csv"

    def files(self, part, rows):
        return [f"{part.metadata['split']}/{image}.jpg" for image in part.image_ids[np.asarray(rows)]]

    def texts(self, name):
        """Everything that is written in a picture."""
        return [text.get_text() for text in self.pictures[name][0].findobj(Text) if text.get_text()]

    def images_shown(self, name):
        """(split's name, image id) of every image in a picture, axes by axes."""
        shown = []
        for axes in self.pictures[name][0].axes:
            for image in axes.images:
                red, green, blue = (int(v) for v in np.asarray(image.get_array())[0, 0])
                shown.append(({v: k for k, v in COLORS.items()}[red], green * 256 + blue))
        return shown


def drawn(figure):
    """Lay the figure out and draw it, which finds what cannot be drawn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())
