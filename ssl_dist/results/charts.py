"""Figures of an evaluation: confusion matrices, bars of classes, grids of images, maps of points.

Arrays in, a matplotlib figure out; nothing here reads or writes a file. Colours are Okabe and Ito's, which the
colour-blind tell apart, and words, positions or shapes say what a colour says, too.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ssl_dist.run.plots import new_plot

BAR, RIGHT, WRONG = "#0072B2", "#009E73", "#D55E00"
INK, GREY, PALE = "#444444", "#666666", "#e4e4e4"
MAX_BARS = 40
MAX_AXIS_NAMES = 60
MAX_LABELLED_CLASSES = 20  # classes of which each has its number in the matrix, and its name beside a map
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31", "#7A3E9D", "#999999")
SHAPES = ("o", "s", "^", "D", "v", "P", "X")


def confusion(share_CC: np.ndarray, names: Sequence[str]) -> Figure:
    """Heat map of percent [C, C]: true classes down, predicted ones across; NaN for a class without images.

    Cells are labelled up to 20 classes, axes up to 60.
    """
    count = len(names)
    side = min(9.0, 2.6 + 0.42 * min(count, MAX_LABELLED_CLASSES) + 0.06 * max(0, count - MAX_LABELLED_CLASSES))
    figure, axes = new_plot(side + 0.9, side)
    image = axes.imshow(
        share_CC, cmap=colormaps["Blues"].with_extremes(bad=PALE), vmin=0, vmax=100, interpolation="nearest"
    )
    axes.spines[:].set_visible(False)
    axes.grid(False)
    axes.set_xlabel("predicted class", color=INK, fontsize=9)
    axes.set_ylabel("true class", color=INK, fontsize=9)
    if count <= MAX_AXIS_NAMES:
        size = 8 if count <= MAX_LABELLED_CLASSES else 6
        axes.set_xticks(
            range(count), [_short(name) for name in names], rotation=90 if count > 12 else 45, fontsize=size
        )
        if count <= 12:
            for label in axes.get_xticklabels():
                label.set(ha="right", rotation_mode="anchor")
        axes.set_yticks(range(count), [_short(name) for name in names], fontsize=size)
    else:
        axes.tick_params(labelsize=8)
    axes.tick_params(length=0, labelcolor=INK)
    if count <= MAX_LABELLED_CLASSES:
        for row, column in np.ndindex(share_CC.shape):
            value = share_CC[row, column]
            if value >= 0.5:
                color = "white" if value > 50 else INK
                weight = "bold" if row == column else "normal"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=color, weight=weight)
    bar = figure.colorbar(image, ax=axes, shrink=0.7, aspect=25, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8, labelcolor=GREY)
    bar.set_label("% of the true class's images", fontsize=8, color=GREY)
    return figure


def class_bars(values_C: np.ndarray, names: Sequence[str], mean: float, label: str, noun: str = "classes") -> Figure:
    """A bar of percent for every class, the best at the top; of more than 40 classes the 20 best and the 20 worst.

    Classes whose value is NaN are left out; equal ones stand in the order of their labels. noun: what the bars are of,
    if not of classes.
    """
    order = [int(i) for i in np.argsort(-values_C, kind="stable") if not np.isnan(values_C[i])]
    half, hidden = MAX_BARS // 2, len(order) - MAX_BARS
    shown: list[int | None] = [*order[:half], None, *order[-half:]] if hidden > 0 else list(order)
    figure, axes = new_plot(6.5, max(1.6, 0.9 + 0.24 * len(shown)))
    highest = max(float(np.nanmax(values_C)), mean)
    text_box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # the line of the mean may pass behind a text
    for row, index in enumerate(shown):
        if index is None:
            axes.text(1, row, f"... {hidden} {noun} between ...", va="center", fontsize=8, color=GREY, style="italic")
            continue
        axes.barh(row, values_C[index], color=BAR, height=0.7)
        end = values_C[index] + highest / 100
        text = axes.text(end, row, f"{values_C[index]:.1f}", va="center", fontsize=8, color=INK)
        text.set(bbox=text_box, zorder=4)
    axes.axvline(mean, color=WRONG, linewidth=1.2, linestyle="--", zorder=3)
    axes.text(mean, -0.75, f"all images {mean:.1f}", ha="center", va="bottom", fontsize=8, color=WRONG)
    axes.set_yticks(range(len(shown)), ["" if i is None else _short(names[i], 30) for i in shown], fontsize=8)
    axes.set_ylim(len(shown) - 0.4, -0.7)
    axes.set_xlim(0, max(1.0, 1.1 * highest))
    axes.grid(axis="x", color=PALE, linewidth=0.8)
    axes.tick_params(length=0, labelcolor=INK, labelsize=8)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(label, color=INK, fontsize=9)
    return figure


def neighbours(
    panels: Sequence[tuple[str, Sequence[tuple[np.ndarray, Sequence[str]]]]], size: float = 0.62, framed: bool = True
) -> Figure:
    """Queries with their nearest images, in panels side by side.

    panels: a title and its rows; a row: images uint8 [1 + k, S, S, 3], the query first, and 1 + k names of classes.
    A neighbour of the query's class has a green, solid frame; another one a red, dashed frame and its name below.
    Without frames the names are any, and all are shown.
    """
    rows = max(len(panel) for _, panel in panels)
    columns = max(len(images) for _, panel in panels for images, _ in panel)
    figure = Figure(figsize=(len(panels) * (columns + 0.5) * size + 0.2, rows * (size + 0.16) + 0.75), dpi=120)
    width, height = figure.get_size_inches()
    for number, (title, panel) in enumerate(panels):
        left = 0.1 + number * (columns + 0.5) * size
        figure.text(left / width, 1 - 0.2 / height, title, fontsize=9, color=INK, va="center", weight="bold")
        for text, x in (("query", 0), ("nearest images, the nearest first", 1.25)):
            figure.text((left + x * size) / width, 1 - 0.46 / height, text, fontsize=8, color=GREY, va="center")
        for row, (images, names) in enumerate(panel):
            top = height - 0.6 - row * (size + 0.16)
            for column, (image, name) in enumerate(zip(images, names, strict=True)):
                x = left + (column + (0.25 if column else 0)) * size
                axes = _add_image(figure, image, x, top, size, 0.9 * size)
                right = framed and name == names[0]
                if column and framed:
                    _frame(axes, RIGHT if right else WRONG, "-" if right else (0, (2, 1)))
                if not column or not right:
                    color = WRONG if column and framed else INK
                    axes.set_xlabel(_short(name, 11), fontsize=6, color=color, labelpad=1.5)
    return figure


def clusters(rows: Sequence[tuple[str, np.ndarray, np.ndarray]], size: float = 0.5) -> Figure:
    """A row of images for every cluster: (title, images uint8 [n, S, S, 3], whether each is of the cluster's class).

    Those that are stand first, in green frames, so that the frames' share of a row is about the cluster's purity.
    """
    columns = max(len(images) for _, images, _ in rows)
    left = 1.75
    figure = Figure(figsize=(left + columns * size + 0.1, len(rows) * size + 0.2), dpi=120)
    width, height = figure.get_size_inches()
    for row, (title, images, belongs) in enumerate(rows):
        top = height - 0.1 - row * size
        words = "\n".join(_short(line, 26) for line in title.split("\n"))
        figure.text(0.1 / width, (top - size / 2) / height, words, fontsize=7.5, color=INK, va="center")
        for column, index in enumerate(np.argsort(~belongs, kind="stable")):
            x = left + column * size
            axes = _add_image(figure, images[index], x, top, size, 0.88 * size)
            if belongs[index]:
                _frame(axes, RIGHT, "-")
    return figure


def points(
    xy_N2: np.ndarray, labels_N: np.ndarray | None, names: Sequence[str] | None, axis_names: tuple[str, str]
) -> Figure:
    """A map of points [N, 2], coloured and shaped by class. Up to 20 classes have their names in a legend, and colour
    and shape together are each one's own; None: there are no classes. axis_names: empty ones for a map without units.
    """
    wide, high = np.ptp(xy_N2, axis=0)
    figure, axes = new_plot(7.6, 0.5 + 6 * min(1.1, max(0.5, high / wide if wide > 0 else 1.1)))
    if labels_N is None:
        labels_N = np.zeros(len(xy_N2), np.int64)
    present = [int(label) for label in np.unique(labels_N)]
    named = names is not None and len(present) <= MAX_LABELLED_CLASSES
    for number, label in enumerate(present):
        own = xy_N2[labels_N == label]
        color, shape = PALETTE[number % len(PALETTE)], SHAPES[number % len(SHAPES)]
        name = _short(names[label]) if names is not None else None
        axes.scatter(own[:, 0], own[:, 1], s=11, c=color, marker=shape, linewidths=0, alpha=0.65, label=name)
    axes.set_xlabel(axis_names[0], color=INK)
    axes.set_ylabel(axis_names[1], color=INK)
    axes.tick_params(labelsize=8, labelcolor=GREY, color=PALE)
    axes.set_aspect("equal", adjustable="datalim")
    if not any(axis_names):  # a map without units
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(visible=True, color=PALE)
    if named:
        legend = figure.legend(
            loc="outside right center", frameon=False, fontsize=8, markerscale=2, handletextpad=0.2, labelcolor=INK
        )
        for handle in filter(None, legend.legend_handles):
            handle.set_alpha(1)
    return figure


def image_map(
    xy_N2: np.ndarray,
    images: np.ndarray,
    labels_N: np.ndarray | None,
    names: Sequence[str] | None,
    cells: int = 36,
) -> Figure:
    """Images uint8 [N, S, S, 3] at their positions on a map: in each cell of a grid the one nearest its middle.

    Up to ten classes have frames in the colours of `points`; None: there are no classes.
    """
    present = np.empty(0) if labels_N is None else np.unique(labels_N)
    framed = 0 < len(present) <= len(PALETTE)
    origin, extent = xy_N2.min(0), max(float(np.ptp(xy_N2, axis=0).max()), 1e-9)
    position_N2 = (xy_N2 - origin) / extent * cells
    cell_N2 = np.minimum(position_N2, cells - 1).astype(int)
    columns, rows = cell_N2.max(0) + 1
    side, frame = images.shape[1], 3
    page = np.full((rows * (side + 2 * frame), columns * (side + 2 * frame), 3), 255, np.uint8)
    filled_cells: set[tuple[int, int]] = set()
    for index in np.argsort(np.square(position_N2 - cell_N2 - 0.5).sum(1), kind="stable"):
        (column, row), image = cell_N2[index].tolist(), images[index]
        if (column, row) in filled_cells:
            continue
        filled_cells.add((column, row))
        top, left = (rows - 1 - row) * (side + 2 * frame), column * (side + 2 * frame)  # the map's y rises
        if framed and labels_N is not None:
            red_green_blue = to_rgb(PALETTE[int(np.searchsorted(present, labels_N[index]))])
            page[top + 1 : top + side + 5, left + 1 : left + side + 5] = np.array(red_green_blue) * 255
        page[top + frame : top + frame + side, left + frame : left + frame + side] = image
    figure, axes = new_plot(9, 9 * rows / columns + 0.4)
    axes.imshow(page, interpolation="antialiased")
    axes.set_axis_off()
    if framed and names is not None:
        handles = [Patch(color=PALETTE[number], label=_short(names[label])) for number, label in enumerate(present)]
        style = {"frameon": False, "fontsize": 8, "labelcolor": INK, "handlelength": 1, "columnspacing": 1.2}
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), **style)
    return figure


def _add_image(figure: Figure, image: np.ndarray, left: float, top: float, size: float, side: float) -> Axes:
    """An image of this side in a place of this size, in inches; small images are magnified without smoothing."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes((left / width, (top - 0.92 * size) / height, side / width, side / height))
    axes.imshow(image, interpolation="nearest" if len(image) < 120 * size else "antialiased", aspect="auto")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return axes


def _frame(axes: Axes, color: str, dashes: str | tuple[int, tuple[int, int]]) -> None:
    # The spines' own caps would fill the gaps between dashes.
    axes.spines[:].set(visible=True, color=color, linewidth=2, linestyle=dashes, capstyle="butt")


def _short(name: str, max_length: int = 18) -> str:
    name = " ".join(name.split())
    name = name if len(name) <= max_length else name[: max_length - 1] + "…"
    return name.replace("$", r"\$")  # which would start a formula
