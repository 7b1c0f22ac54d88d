"""The comparisons on the page of several runs: checks, results, means over seeds and published numbers."""

import base64
from collections import Counter
from collections.abc import Sequence

from markupsafe import Markup

from ssl_dist import results
from ssl_dist.errors import UserError
from ssl_dist.report import health, seeds, varied
from ssl_dist.report.ablation import Ablation
from ssl_dist.report.markup import style
from ssl_dist.report.published import beside
from ssl_dist.report.run import Run
from ssl_dist.report.verdicts import Verdict

MAX_BESIDE = 4  # runs whose verdicts stand in columns; of more, runs with the same verdict stand together
PLOT_INCHES = (4.6, 3.0)
ROW_KEYS = ("dataset", "split", "name", "protocol", "layer", "data", "train_data", "version", "size")


def names(runs: Sequence[Run]) -> list[Markup]:
    """Each run's short name with the colour of its curves."""
    markup = Markup('<span class="key {}" title="{}">{}</span>')
    # broken between what was varied and the seed, nowhere else
    words = [", ".join(part.replace(" ", "\xa0") for part in run.short_name.split(", ")) for run in runs]
    return [markup.format(style(number), run.folder, words[number]) for number, run in enumerate(runs)]


def health_checks(runs: Sequence[Run]) -> list[tuple[str, list[Verdict | None]]]:
    """The name of each check, and its verdicts on the runs."""
    judged = [{verdict.check: verdict for verdict in health.judge(run)} for run in runs]
    checks = dict.fromkeys(check for by_check in judged for check in by_check)
    return [(check, [by_check.get(check) for by_check in judged]) for check in checks]


def alike(verdicts: Sequence[Verdict | None]) -> list[tuple[Verdict, list[int]]]:
    """A check's verdicts that say the same, each once with the numbers of its runs."""
    groups: dict[tuple, tuple[Verdict, list[int]]] = {}
    for number, verdict in enumerate(verdicts):
        if verdict is not None:
            groups.setdefault((verdict.level, verdict.words, verdict.remedy), (verdict, []))[1].append(number)
    return list(groups.values())


def result_rows(runs: Sequence[Run]) -> list[dict]:
    """A row for each number that was measured alike (dataset, split, name, protocol, layer, the images of both splits,
    their size and the evaluator's version): the `records` of the runs, None for one that has none; the `best` value of
    several, where it is an accuracy; and a `remark` that tells rows apart which differ in images, size or version
    alone, else empty."""
    by_run = [
        {tuple((record | {"size": results.size_of(record)})[key] for key in ROW_KEYS): record for record in run.records}
        for run in runs
    ]
    keys = sorted(dict.fromkeys(key for records in by_run for key in records), key=lambda key: key[:2])
    number_alike = Counter(key[:5] for key in keys)
    rows = []
    for key in keys:
        records = [records.get(key) for records in by_run]
        values = [record["value"] for record in records if record is not None]
        best = max(values) if len(values) > 1 and key[2].endswith(("_top1", "_top5")) else None
        row = dict(zip(ROW_KEYS, key, strict=True)) | {"records": records, "best": best, "remark": ""}
        if number_alike[key[:5]] > 1:
            train_data = "unknown ones" if row["train_data"] is None else row["train_data"][:8]
            row["remark"] = (
                f"on images {row['data'][:8]}, learned from {train_data}, {row['size'] or 'size not recorded'}, "
                f"version {row['version'] or 'unknown'}"
            )
        rows.append(row)
    return rows


def ablation(runs: Sequence[Run]) -> tuple[Ablation | None, str]:
    """The means over seeds, by what was varied; None where no mean is of several seeds and no number was varied. Or why
    there are none, in words."""
    try:
        records = seeds.over_seeds([run.folder for run in runs if run.records])
    except UserError as error:  # two runs of one config and seed have a column each above, but no mean
        return None, str(error)
    if not records:
        return None, ""
    found = Ablation(records)
    several = any(record["std"] is not None for record in records)
    return (found if several or found.plotted_key is not None else None), ""


def plots(means: Ablation) -> list[tuple[str, str]]:
    """The name of each result and a picture of it against what was varied, as an address that needs no file."""
    found = []
    for name, figure in means.plots(PLOT_INCHES):
        from ssl_dist.results import mean_plots  # matplotlib takes a second

        found.append((name, "data:image/png;base64," + base64.b64encode(mean_plots.as_png(figure)).decode()))
    return found


def varied_values(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """What stands above the columns of the keys that were varied, without those of method, backbone and data set; and
    for each run its values."""
    trees = [varied.compared(run.config) for run in runs]
    keys = [key for key in varied.varied(trees) if key not in varied.FAMILY]
    keys = keys if len(keys) <= varied.MAX_KEYS else []
    return [*map(varied.head, keys)], [[varied.shown(tree.get(key)) for key in keys] for tree in trees]


def with_published(runs: Sequence[Run]) -> list[Run]:
    """The first run of each method, backbone and data set that numbers of papers stand beside."""
    first: dict[str, Run] = {}
    for run in runs:
        if beside(run.config):
            first.setdefault(run.title, run)
    return list(first.values())
