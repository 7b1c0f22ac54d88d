"""Which curves a page shows, and in which order."""

from collections.abc import Sequence

from markupsafe import Markup

from ssl_dist.report import verdicts
from ssl_dist.report.curves import Curve, chart
from ssl_dist.report.run import Run
from ssl_dist.train import online_knn, online_probe

# These come first, in this order; what else a method logs follows.
ONLINE = (online_knn.NAME, online_probe.NAME)
FIRST = ("loss", "accuracy", *ONLINE, "feature_std", "effective_rank", "lr", "images_per_s", "data_wait")
_COMMON = FIRST[2:]  # mean the same whatever the method; the others are drawn method by method
_UNPLOTTED = {"step", "epoch", "views_per_s", "seconds_per_step"}  # the axis, and multiples of images_per_s
# Of metrics whose axis begins at 0: title, unit, and the value and name of a limit.
_FROM_ZERO: dict[str, tuple[str, str, tuple[float, str] | None]] = {
    "lr": ("learning rate", "", None),
    "feature_std": ("feature_std", "1: isotropic", (verdicts.COLLAPSED_STD, "collapsed below")),
    "effective_rank": ("effective rank", "directions", (verdicts.COLLAPSED_RANK, "collapsed below")),
    "images_per_s": ("throughput", "images/s", None),
    "data_wait": ("waiting for images", "% of the time", (100 * verdicts.SLOW_WAIT, "slow above")),
}


def charts(run: Run) -> Markup:
    """A chart for each metric of one run, with all accuracies of its pretext task in one."""
    keys = _plotted([run])
    together = [key for key in keys if key.startswith("accuracy")]
    shown = []
    for key in keys:
        if key not in together:
            shown += _charts(key, [run], named=False)
        elif key == together[0]:
            curves = [Curve(_words(key), style, run.values(key)) for style, key in enumerate(together)]
            shown.append(chart("accuracy of the pretext task", "%", curves, named=len(curves) > 1))
    return Markup().join(shown)


def overlaid(runs: Sequence[Run], keys: Sequence[str] | None = None) -> Markup:
    """A chart for each metric, all or those of `keys`, with a curve for each run that logged it."""
    plotted = [key for key in _plotted(runs) if keys is None or key in keys]
    return Markup().join(drawn for key in plotted for drawn in _charts(key, runs, named=True))


def _plotted(runs: Sequence[Run]) -> list[str]:
    keys = dict.fromkeys(key for run in runs for line in run.lines for key in line)
    plotted = [key for key in keys if key not in _UNPLOTTED and any(run.values(key) for run in runs)]
    return sorted(plotted, key=lambda key: FIRST.index(key) if key in FIRST else len(FIRST))  # a stable sort


def _charts(key: str, runs: Sequence[Run], named: bool) -> list[Markup]:
    """One chart, or one for each method where losses of different methods would not compare."""
    scale = 100.0 if key == "data_wait" else 1.0  # a share, shown in percent
    by_method: dict[str, list[Curve]] = {}
    for style, run in enumerate(runs):
        if run.values(key):
            points = [(epoch, scale * value) for epoch, value in run.values(key)]
            method = "" if key in _COMMON else run.config.method.name
            by_method.setdefault(method, []).append(Curve(run.short_name, style, points))
    return [
        _chart(key, curves, f" · {method}" if len(by_method) > 1 else "", named) for method, curves in by_method.items()
    ]


def _chart(key: str, curves: Sequence[Curve], suffix: str, named: bool) -> Markup:
    if key in _FROM_ZERO:
        title, unit, limit = _FROM_ZERO[key]
        return chart(title, unit, curves, named, True, limit)
    unit = "%" if key.startswith("accuracy") else "% of held-out images" if key in ONLINE else ""
    return chart(_words(key) + suffix, unit, curves, named)


def _words(key: str) -> str:
    return key.replace("_", " ")
