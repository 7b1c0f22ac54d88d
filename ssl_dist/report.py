"""`ssl-dist report RUN RUN ...`: the results of several runs in one table, mean ± standard deviation over seeds."""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from ssl_dist.errors import UserError
from ssl_dist.evaluators import results

SAME = ("method", "backbone", "step", "dataset", "split", "name", "protocol")  # what a seed may not change


def over_seeds(runs: Sequence[Path]) -> list[dict]:
    """One record for every number that the runs have measured alike, in the order of their first mention: what is in
    `SAME`, mean, std (of the sample, n - 1; None for one seed) and seeds. Raises `UserError` for a run without
    results, and for two runs that have the same seed.
    """
    groups: dict[tuple, dict[int | None, float]] = defaultdict(dict)
    for run in runs:
        records = results.read(run / "results.json")
        if not records:
            raise UserError(f"{run}: holds no results; run `ssl-dist evaluate {run} knn` first")
        newest = {(r["name"], r["dataset"], r["split"], r["protocol"]): r for r in records}  # a later one is the newer
        for record in newest.values():
            values = groups[tuple(record[key] for key in SAME)]
            if record["seed"] in values:
                raise UserError(f"{run}: seed {record['seed']} was given twice; name every run once")
            values[record["seed"]] = record["value"]
    return [
        dict(zip(SAME, key, strict=True))
        | {
            "mean": statistics.fmean(values.values()),
            "std": statistics.stdev(values.values()) if len(values) > 1 else None,
            "seeds": sorted(values),
        }
        for key, values in groups.items()
    ]


def table(records: list[dict]) -> str:
    """A line a number, with its protocols as footnotes."""
    protocols = list(dict.fromkeys(record["protocol"] for record in records))
    head = ("method", "backbone", "step", "data set", "split", "result", "mean ± std", "seeds", "")
    rows = [head] + [
        (
            record["method"], record["backbone"], str(record["step"]), record["dataset"], record["split"],
            record["name"], _value(record), str(len(record["seeds"])), f"[{protocols.index(record['protocol']) + 1}]",
        )
        for record in records
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join([*lines, "", *(f"[{number}] {text}" for number, text in enumerate(protocols, 1))])


def _value(record: dict) -> str:
    return f"{record['mean']:.2f}" + ("" if record["std"] is None else f" ± {record['std']:.2f}")
