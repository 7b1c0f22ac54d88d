"""Pictures of a run as PNG files: its views, its loss, its relation scores. Nothing here touches a display."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ssl_dist.errors import UserError, refuse_unreadable
from ssl_dist.reading import is_finite
from ssl_dist.run import mosaic
from ssl_dist.run.metrics import read_metrics
from ssl_dist.storage.durable import atomic_write

_LOSS, _BOTH, _POSITIVE, _NEGATIVE = "#1f4e79", "#444444", "#2a8f4c", "#c0504d"
_GREY = "#666666"
TRAINING = "training"  # in the place of an evaluator that draws


def views_grid(
    path: str | Path,
    groups: Sequence[np.ndarray],
    note: str = "",
    titles: Sequence[str] = (),
    texts: Mapping[str, str] | None = None,
) -> None:
    """The views of each image side by side: of every group uint8 [V, B, 3, S, S], see `mosaic.of_views`. note: a line
    below the picture; titles: of the columns, which have numbers without; texts: chunks of the PNG file.

    Small views are magnified without smoothing.
    """
    figure, axes = columns(groups, titles or [str(view) for view in range(sum(map(len, groups)))])
    sizes = ", then ".join(f"{len(group)} of {group.shape[-1]} px" for group in groups)
    if not titles:
        axes.set_xlabel("view" if len(groups) == 1 else f"view: {sizes}", fontsize=8, color=_GREY)
    if note:
        figure.supxlabel(textwrap.fill(note, int(14 * figure.get_figwidth())), fontsize=8, color=_GREY)
    axes.xaxis.set_label_position("top")
    _save(figure, path, texts)


def of_training(title: str, caption: str) -> dict[str, str]:
    """The texts of a picture in RUN/figures that a training has drawn; `results.figures` has those of evaluations."""
    return {"Title": title, "Description": caption, "Evaluator": TRAINING}


def columns(groups: Sequence[np.ndarray], labels: Sequence[str], inches: float = 1.0) -> tuple[Figure, Axes]:
    """`mosaic.of_views` as a figure with a label above each column. inches: the width of the largest column, less where
    there are many."""
    page, middles = mosaic.of_views(groups)
    side = max(group.shape[-1] for group in groups)
    shown = page.shape[1] / side  # columns of the largest views in the width
    cell = min(inches, 24 / shown)
    figure, axes = new_plot(cell * shown + 0.5, cell * page.shape[0] / side + 0.5)
    axes.imshow(page, interpolation="nearest" if side < 120 * cell else "antialiased")
    axes.set_xticks(middles, labels)
    axes.set_yticks([])
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=8, labelcolor=_GREY)
    axes.set_frame_on(False)
    return figure, axes


def loss_curve(path: str | Path, metrics_jsonl: str | Path) -> None:
    """The loss against the epoch; accuracies, where they were logged, on a second axis. Damaged lines are passed over.

    Raises `UserError` when the file cannot be read or holds no loss, OSError when the picture cannot be written.
    """
    with refuse_unreadable(metrics_jsonl):
        lines = [line for line in read_metrics(Path(metrics_jsonl))[0] if is_finite(line.get("loss"))]
    if not lines:
        raise UserError(f"{metrics_jsonl}: holds no loss yet; train for log.every_steps steps at least")
    figure, axes = new_plot(7, 4)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    epochs = [line["epoch"] for line in lines]
    marker = "." if len(lines) < 30 else ""
    axes.plot(epochs, [line["loss"] for line in lines], color=_LOSS, linewidth=1.6, label="loss", marker=marker)
    axes.set(xlabel="epoch", ylabel="loss")
    axes.set_xlim(0, None)
    axes.yaxis.label.set_color(_LOSS)
    curves = {
        "accuracy": ("accuracy", _BOTH, "-"),
        "accuracy_positive": ("accuracy of positives", _POSITIVE, "--"),
        "accuracy_negative": ("accuracy of negatives", _NEGATIVE, "--"),
    }
    logged = {name: curve for name, curve in curves.items() if any(is_finite(line.get(name)) for line in lines)}
    if logged:
        right = axes.twinx()
        right.spines[["top", "left"]].set_visible(False)
        for name, (label, color, dashes) in logged.items():
            points = [(line["epoch"], line[name]) for line in lines if is_finite(line.get(name))]
            right.plot(*zip(*points, strict=True), color=color, linestyle=dashes, linewidth=1.2, label=label)
        right.set(ylabel="accuracy (%)")
        right.set_ylim(None, 100.5)
        handles = axes.get_lines() + right.get_lines()
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=9)
    _save(figure, path)


def new_plot(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of this size in inches with one pair of axes, open above and on the right."""
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    return figure, axes


def _save(figure: Figure, path: str | Path, texts: Mapping[str, str] | None = None) -> None:
    """Raises OSError."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        FigureCanvasAgg(figure).print_png(file, metadata=dict(texts or {}))
