"""The comparisons on the page of several runs: checks, results, means over seeds and published numbers."""

from collections import Counter
from collections.abc import Sequence

from markupsafe import Markup

from ssl_dist import results
from ssl_dist.errors import UserError
from ssl_dist.report import health, seeds
from ssl_dist.report.markup import COLOURS
from ssl_dist.report.published import beside
from ssl_dist.report.run import Run
from ssl_dist.report.verdicts import Verdict

ROW_KEYS = ("dataset", "split", "name", "protocol", "data", "train_data", "version", "size")


def names(runs: Sequence[Run]) -> list[Markup]:
    """Each run's name with the colour of its curves."""
    markup = Markup('<span class="key c{}" title="{}">{}</span>')
    return [markup.format(number % COLOURS, run.folder, run.name) for number, run in enumerate(runs)]


def health_checks(runs: Sequence[Run]) -> list[tuple[str, list[Verdict | None]]]:
    """The name of each check, and its verdicts on the runs."""
    judged = [{verdict.check: verdict for verdict in health.judge(run)} for run in runs]
    checks = dict.fromkeys(check for by_check in judged for check in by_check)
    return [(check, [by_check.get(check) for by_check in judged]) for check in checks]


def result_rows(runs: Sequence[Run]) -> list[dict]:
    """A row for each number that was measured alike (dataset, split, name, protocol, the images of both splits, their
    size and the evaluator's version): the `records` of the runs, None for one that has none; the `best` value of
    several, where it is an accuracy; and a `remark` that tells rows apart which differ in images, size or version
    alone, else empty."""
    by_run = [
        {tuple((record | {"size": results.size_of(record)})[key] for key in ROW_KEYS): record for record in run.records}
        for run in runs
    ]
    keys = sorted(dict.fromkeys(key for records in by_run for key in records), key=lambda key: key[:2])
    number_alike = Counter(key[:4] for key in keys)
    rows = []
    for key in keys:
        records = [records.get(key) for records in by_run]
        values = [record["value"] for record in records if record is not None]
        best = max(values) if len(values) > 1 and key[2].endswith(("_top1", "_top5")) else None
        row = dict(zip(ROW_KEYS, key, strict=True)) | {"records": records, "best": best, "remark": ""}
        if number_alike[key[:4]] > 1:
            train_data = "unknown ones" if row["train_data"] is None else row["train_data"][:8]
            row["remark"] = (
                f"on images {row['data'][:8]}, learned from {train_data}, {row['size'] or 'size not recorded'}, "
                f"version {row['version'] or 'unknown'}"
            )
        rows.append(row)
    return rows


def means_over_seeds(runs: Sequence[Run]) -> tuple[list[dict], str]:
    """The records of `seeds.over_seeds` that are of several seeds; or why there are none, in words."""
    try:
        means = seeds.over_seeds([run.folder for run in runs if run.records])
    except UserError as error:  # two runs of one config and seed have a column each above, but no mean
        return [], str(error)
    return [record for record in means if record["std"] is not None], ""


def with_published(runs: Sequence[Run]) -> list[Run]:
    """The first run of each method, backbone and data set that numbers of papers stand beside."""
    first: dict[str, Run] = {}
    for run in runs:
        if beside(run.config):
            first.setdefault(run.title, run)
    return list(first.values())
