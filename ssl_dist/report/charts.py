"""Which curves a page shows, and in which order."""

from collections.abc import Sequence

from ssl_dist import verdicts
from ssl_dist.report.curves import Curve, chart
from ssl_dist.report.markup import Html, element
from ssl_dist.report.run import Run

# Those that every method has come first, in this order; what else a method logs follows.
FIRST = ("loss", "accuracy", "feature_std", "effective_rank", "lr", "images_per_s", "data_wait")
_COMMON = FIRST[2:]  # mean the same whatever the method; the others are drawn method by method
_UNPLOTTED = {"step", "epoch", "views_per_s", "seconds_per_step"}  # the axis, and multiples of images_per_s
_PERCENT = ("accuracy", "top1")


def charts(several: Sequence[Run]) -> Html:
    """A chart a metric, with a curve for each run that logged it; of a single run, all accuracies in one chart."""
    keys = list(dict.fromkeys(key for run in several for line in run.lines for key in line))
    keys = [key for key in keys if key not in _UNPLOTTED and any(run.values(key) for run in several)]
    keys.sort(key=lambda key: FIRST.index(key) if key in FIRST else len(FIRST))  # a stable sort
    together = [key for key in keys if key.startswith("accuracy")] if len(several) == 1 else []
    shown = []
    for key in keys:
        if key not in together:
            shown += _charts(key, several)
        elif key == together[0]:
            shown.append(_accuracies(several[0], together))
    return element("div", *shown, class_="charts")


def _accuracies(run: Run, keys: Sequence[str]) -> Html:
    found = [Curve(_words(key), style, run.values(key)) for style, key in enumerate(keys)]
    return chart("accuracy of the pretext task", "%", found, named=len(found) > 1)


def _charts(key: str, several: Sequence[Run]) -> list[Html]:
    """One chart, or one for each method where losses of several methods would not compare."""
    scale = 100.0 if key == "data_wait" else 1.0  # a share, shown in percent
    by_method: dict[str, list[Curve]] = {}
    for style, run in enumerate(several):
        if run.values(key):
            points = [(epoch, scale * value) for epoch, value in run.values(key)]
            method = "" if key in _COMMON else run.config.method.name
            by_method.setdefault(method, []).append(Curve(run.name, style, points))
    is_single = len(several) == 1
    return [
        _chart(key, curves, f" · {method}" if len(by_method) > 1 else "", not is_single)
        for method, curves in by_method.items()
    ]


def _chart(key: str, found: Sequence[Curve], suffix: str, named: bool) -> Html:
    match key:
        case "lr":
            return chart("learning rate", "", found, named, from_zero=True)
        case "feature_std":
            return chart(key, "1: isotropic", found, named, True, (verdicts.COLLAPSED_STD, "collapsed below"))
        case "effective_rank":
            return chart(
                "effective rank", "directions", found, named, True, (verdicts.COLLAPSED_RANK, "collapsed below")
            )
        case "images_per_s":
            return chart("throughput", "images/s", found, named, from_zero=True)
        case "data_wait":
            return chart(
                "waiting for images", "% of the time", found, named, True, (100 * verdicts.WAITING, "slow above")
            )
    return chart(_words(key) + suffix, "%" if any(word in key for word in _PERCENT) else "", found, named)


def _words(key: str) -> str:
    return key.replace("_", " ")
