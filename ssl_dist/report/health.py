"""The health of a run on its page, and the few numbers at its top."""

import statistics
from collections.abc import Sequence

from ssl_dist import results
from ssl_dist.report import verdicts
from ssl_dist.report.markup import number
from ssl_dist.report.run import Run, seconds
from ssl_dist.report.verdicts import Level, Verdict

WORDS: dict[Level, str] = {"ok": "fine", "info": "to know", "warning": "look", "error": "ill", "unknown": "unknown"}


def judge(run: Run) -> list[Verdict]:
    """The verdicts on a run, the most serious first; none on a method that does not train."""
    judged = verdicts.judge(run.lines, run.config.optim, run.total_steps) if run.trains else []
    return sorted(judged, key=lambda verdict: verdicts.LEVELS.index(verdict.level))


def key_numbers(run: Run) -> list[tuple[str, str]]:
    """Up to four accuracies, the time and the throughput: their names and values."""
    best = [record for record in run.results if record["name"].endswith("_top1")]
    numbers = [
        (f"{results.label(record)}, {record['dataset']} {record['split']}", f"{record['value']:.2f}")
        for record in best[:4]
    ]
    if seconds(run):
        numbers.append(("time in steps", duration(seconds(run))))
    rates = [rate for _, rate in run.values("images_per_s")]
    if rates:
        numbers.append(("images a second, median", number(statistics.median(rates))))
    return numbers


def faults(judged: Sequence[Verdict]) -> list[tuple[Level, int]]:
    """How many checks found a fault, or perhaps one: the levels that occur."""
    levels: tuple[Level, ...] = ("error", "warning")
    counts = [(level, sum(verdict.level == level for verdict in judged)) for level in levels]
    return [(level, number) for level, number in counts if number]


def duration(time_s: float) -> str:
    minutes = round(time_s / 60)
    if minutes < 2:
        return f"{time_s:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
