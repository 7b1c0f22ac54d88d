"""The page of several runs: side by side in columns, their curves in one plot, mean ± std over seeds."""

from collections.abc import Sequence

from ssl_dist import results
from ssl_dist.errors import UserError
from ssl_dist.report import gallery, health, scores, seeds, settings
from ssl_dist.report.charts import overlaid
from ssl_dist.report.curves import COLOURS
from ssl_dist.report.frame import document, navigation, notes, section
from ssl_dist.report.markup import Html, element, joined, number_cell, number_head, table
from ssl_dist.report.run import Run
from ssl_dist.report.verdicts import Verdict


def of_runs(runs: Sequence[Run]) -> str:
    """The whole document of two runs or more."""
    names = [
        element("span", run.name, class_=f"key c{number % COLOURS}", title=str(run.folder))
        for number, run in enumerate(runs)
    ]
    heads = [element("th", name, scope="col") for name in names]
    return document(
        f"{len(runs)} runs: {', '.join(run.name for run in runs)}",
        [
            element("h1", f"{len(runs)} runs side by side"),
            _overview(runs, names),
            _notes(runs, "title"),
            navigation(),
            section("health", "Health", _health(runs, heads)),
            section("results", "Results", _notes(runs, "results"), _results(runs, names), _over_seeds(runs)),
            section("published", "Published", _published(runs)),
            section("curves", "Curves", _notes(runs, "curves"), overlaid(runs)),
            section("views", "Views", gallery.views(runs)),
            section("pictures", "Pictures", _notes(runs, "pictures"), gallery.figures(runs)),
            section("config", "Config", settings.differences(runs, heads)),
        ],
    )


def _overview(runs: Sequence[Run], names: Sequence[Html]) -> Html:
    rows = []
    for run, name in zip(runs, names, strict=True):
        config, total = run.config, run.total_steps
        step = "none" if run.step is None else f"{run.step:,}" + (f" of {total:,}" if total else "")
        digest = element("code", run.digest[:12] + "…", title=run.digest) if run.digest else "none"
        facts = [config.method.name, config.backbone.name, config.data.name, str(config.seed), step, digest]
        rows.append([element("th", name, scope="row"), *facts])
    return table(["run", "method", "backbone", "data set", "seed", "step", "checkpoint"], rows)


def _notes(runs: Sequence[Run], part: str) -> Html:
    noted = [run for run in runs if run.notes.get(part)]
    return joined(*(element("div", element("b", run.name), notes(run, part)) for run in noted))


def _health(runs: Sequence[Run], heads: list[Html]) -> Html:
    judged = [{verdict.check: verdict for verdict in health.judge(run)} for run in runs]
    checks = dict.fromkeys(check for by_check in judged for check in by_check)
    rows = [
        [element("th", check, scope="row"), *(_verdict(by_check.get(check)) for by_check in judged)] for check in checks
    ]
    return table(["", *heads], rows, class_="verdicts")


def _verdict(verdict: Verdict | None) -> Html:
    if verdict is None:
        return element("td", "–")
    words = None if verdict.level == "ok" else element("div", verdict.words)
    remedy = element("div", verdict.remedy, class_="remedy") if verdict.remedy else None
    return element("td", health.badge(verdict.level), words, remedy, element("div", element("small", verdict.measured)))


def _results(runs: Sequence[Run], names: Sequence[Html]) -> Html | None:
    """A row for each number, measured alike (data set, split and protocol); the highest accuracy is bold."""
    keys = ("dataset", "split", "name", "protocol")
    by_run = [{tuple(record[key] for key in keys): record for record in run.records} for run in runs]
    order = sorted(dict.fromkeys(key for records in by_run for key in records), key=lambda key: key[:2])
    if not order:
        return None
    protocols = list(dict.fromkeys(key[3] for key in order))
    rows, group = [], None
    for key in order:
        if group != (group := key[:2]):
            rows.append([scores.group_row(key[0], key[1], columns=len(runs) + 1)])
        values = [records[key]["value"] for records in by_run if key in records]
        best = max(values) if len(values) > 1 and key[2].endswith(("_top1", "_top5")) else None
        cells = [_value(run, records.get(key), best) for run, records in zip(runs, by_run, strict=True)]
        rows.append([element("td", key[2], scores.mark(protocols, key[3])), *cells])
    return joined(table(["result", *map(number_head, names)], rows), scores.footnotes(protocols))


def _value(run: Run, record: dict | None, best: float | None) -> Html:
    if record is None:
        return number_cell("–")
    shown = scores.value(record)
    return number_cell(element("b", shown) if record["value"] == best else shown, scores.stale(run, record))


def _over_seeds(runs: Sequence[Run]) -> Html | None:
    try:
        means = seeds.over_seeds([run.folder for run in runs if run.records])
    except UserError as error:  # two runs of one config and seed have a column each above, but no mean
        return element("p", f"No mean over seeds: {error}.", class_="none")
    rows = [
        [
            record["method"],
            record["backbone"],
            f"{record['dataset']}, {record['split']}",
            record["name"],
            number_cell(results.number(record["mean"], record["std"])),
            ", ".join(map(str, record["seeds"])),
        ]
        for record in means
        if record["std"] is not None
    ]
    if not rows:
        return None
    words = "Runs whose configs differ in the seed only; the standard deviation is that of the sample (n − 1)."
    heads = ["method", "backbone", "data set", "result", number_head("mean ± std"), "seeds"]
    return joined(element("h3", "Over seeds"), table(heads, rows), element("p", words, class_="none"))


def _published(runs: Sequence[Run]) -> Html:
    """Once for all runs of one method, backbone and data set, beside the first of them."""
    first = {run.title: run for run in reversed(runs)}
    shown = [run for run in runs if first[run.title] is run and scores.has_published(run)]
    if not shown:
        words = "No number of a paper is known here for these runs (ssl_dist/report/published.yaml)."
        return element("p", words, class_="none")
    return joined(
        *(element("div", element("h3", f"{run.title} (here: {run.name})"), scores.published(run)) for run in shown)
    )
