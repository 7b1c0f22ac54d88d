"""The health of a run on its page, and the few numbers at its top."""

import statistics
from collections.abc import Sequence

from ssl_dist.report import verdicts
from ssl_dist.report.markup import Html, count, element, joined, number
from ssl_dist.report.run import Run, seconds
from ssl_dist.report.verdicts import Level, Verdict

WORDS: dict[Level, str] = {"ok": "fine", "info": "to know", "warning": "look", "error": "ill", "unknown": "unknown"}


def judge(run: Run) -> list[Verdict]:
    """The verdicts on a run, the most serious first; none on a method that does not train."""
    judged = verdicts.judge(run.lines, run.config.optim, run.total_steps) if run.trains else []
    return sorted(judged, key=lambda verdict: verdicts.LEVELS.index(verdict.level))


def badge(level: Level) -> Html:
    return element("span", WORDS[level], class_=f"badge {level}")


def verdicts_of(run: Run, judged: Sequence[Verdict]) -> Html:
    """A row for each verdict."""
    if not run.trains:
        return element("p", f"{run.config.method.name} does not train: there is nothing to judge.", class_="none")
    return joined(*map(_verdict_row, judged))


def _verdict_row(verdict: Verdict) -> Html:
    detail = f"{verdict.measured}. Healthy: {verdict.threshold}."
    remedy = element("p", verdict.remedy, class_="remedy") if verdict.remedy else None
    words = element("p", element("b", verdict.check), ". ", verdict.words)
    return element(
        "div", badge(verdict.level), element("div", words, remedy, element("small", detail)), class_="verdict"
    )


def key_numbers(run: Run, judged: Sequence[Verdict]) -> Html:
    best = [record for record in run.results if record["name"].endswith("_top1")]
    cells = [
        (f"{record['name']}, {record['dataset']} {record['split']}", f"{record['value']:.2f}") for record in best[:4]
    ]
    if seconds(run):
        cells.append(("time in steps", duration(seconds(run))))
    rates = [rate for _, rate in run.values("images_per_s")]
    if rates:
        cells.append(("images a second, median", number(statistics.median(rates))))
    if judged:
        cells.append((f"health, {count(judged, 'check')}", _summary(judged)))
    items = [element("div", element("dt", name), element("dd", value)) for name, value in cells]
    return element("dl", *items, class_="numbers") if items else Html("")


def _summary(judged: Sequence[Verdict]) -> Html:
    """How many checks found a fault, or perhaps one."""
    levels: tuple[Level, ...] = ("error", "warning")
    counts = [(level, sum(verdict.level == level for verdict in judged)) for level in levels]
    shown = [element("span", f"{number} {WORDS[level]}", class_=f"badge {level}") for level, number in counts if number]
    return joined(*shown) if shown else element("span", "no illness", class_="badge ok")


def duration(time_s: float) -> str:
    minutes = round(time_s / 60)
    if minutes < 2:
        return f"{time_s:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
