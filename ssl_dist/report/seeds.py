"""The results of several runs in one table, mean ± standard deviation over the seeds of one config."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from ssl_dist import config, results, text_table
from ssl_dist.errors import UserError
from ssl_dist.run import folder as run_folder

# What must be equal for a mean over seeds.
GROUP_KEYS = (
    "method",
    "backbone",
    "step",
    "dataset",
    "split",
    "data",
    "train_data",
    "transform",
    "name",
    "protocol",
    "version",
)

# What may differ between the runs of a mean. Two files of weights may be one, but nothing here proves it.
FREE_KEYS = ("seed", *(key for key in run_folder.FREE_KEYS if key != "backbone.weights"))
FREE_SECTIONS = tuple(f"{key}." for key in FREE_KEYS)


def over_seeds(runs: Sequence[Path]) -> list[dict]:
    """One record for every number that runs of one config, but for the seed, have measured alike: the keys in
    `GROUP_KEYS`, `run` (the first run's name), mean, std (of the sample, n - 1; None for one seed) and seeds.

    Raises `UserError` for a run without results, and for two runs of one config that have the same seed.
    """
    groups: dict[tuple, dict[int, tuple[Path, float]]] = {}
    for run in runs:
        settings, records = _read(run)
        for record in records:
            by_seed = groups.setdefault((settings, *(record[key] for key in GROUP_KEYS)), {})
            seed = record["seed"]
            if seed in by_seed:
                raise UserError(f"{run}: has the seed, {seed}, and the config of {by_seed[seed][0]}")
            by_seed[seed] = run, record["value"]
    means = []
    for (_, *key), by_seed in groups.items():
        values = [value for _, value in by_seed.values()]
        std = statistics.stdev(values) if len(values) > 1 else None
        first = next(iter(by_seed.values()))[0]
        more = {"run": first.name, "mean": statistics.fmean(values), "std": std, "seeds": sorted(by_seed)}
        means.append(dict(zip(GROUP_KEYS, key, strict=True)) | more)
    return means


def _read(run: Path) -> tuple[str, list[dict]]:
    """What two runs that differ in their seed only have in common, and the run's newest numbers."""
    records = results.read(run / "results.json")
    if not records:
        raise UserError(f"{run}: holds no results; run `ssl-dist evaluate {run} knn` first")
    tree = run_folder.flat(config.to_tree(config.load(run / "config.yaml")))
    settings = {key: value for key, value in tree.items() if key not in FREE_KEYS and not key.startswith(FREE_SECTIONS)}
    return repr(settings), newest(records)


def newest(records: Sequence[dict]) -> list[dict]:
    """The last measurement of each number and size of images, without records that a fit has converged, which is no
    result."""
    latest: dict[tuple, dict] = {}
    for record in sorted(records, key=lambda record: record["time"]):
        number = record["name"], record["dataset"], record["split"], record["protocol"]
        latest.pop((*number, ""), None)  # of a size that was not recorded: the later one takes its place
        latest[(*number, results.size_of(record))] = record
    return [record for record in latest.values() if not record["name"].endswith("_converged") or not record["value"]]


def table(records: list[dict]) -> str:
    """A line for each number, with its protocols as footnotes."""
    head = ("run", "method", "backbone", "step", "data set", "split", "result", "mean ± std", "seeds")
    columns = ("run", "method", "backbone", "step", "dataset", "split", "name")
    rows = []
    for record in records:
        cells = [str(record[column]) for column in columns]
        cells += [results.number(record["mean"], record["std"]), str(len(record["seeds"]))]
        rows.append((cells, record["protocol"]))
    return text_table.with_protocols(head, rows)
