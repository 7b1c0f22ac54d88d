"""The results of several runs in one table, mean ± standard deviation over the seeds of one config."""

from collections.abc import Sequence
from pathlib import Path

from ssl_dist import config, results, text_table
from ssl_dist.errors import UserError
from ssl_dist.report.varied import MAX_KEYS, compared, head, shown, varied
from ssl_dist.results.means import Mean

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
    "layer",
    "name",
    "protocol",
    "version",
)


def over_seeds(runs: Sequence[Path]) -> list[dict]:
    """One record for every number that runs of one config, but for the seed, have measured alike: the keys in
    `GROUP_KEYS`; `run`, the first run's name; `varied`, the values of the keys that differ between the groups; mean,
    std (of the sample, n - 1; None for one seed), seeds and values. Groups stand in the order of their numbers, else of
    the runs.

    Raises `UserError` for a run without results, and for two runs of one config that have the same seed.
    """
    groups: dict[tuple, dict[int, tuple[Path, float]]] = {}
    trees: dict[str, dict[str, object]] = {}
    for run in runs:
        tree, records = _read(run)
        trees[repr(tree)] = tree
        for record in records:
            by_seed = groups.setdefault((repr(tree), *(record[key] for key in GROUP_KEYS)), {})
            seed = record["seed"]
            if seed in by_seed:
                raise UserError(f"{run}: has the seed, {seed}, and the config of {by_seed[seed][0]}")
            by_seed[seed] = run, record["value"]
    keys = varied(list(trees.values()))
    places = _in_order([[tree.get(key) for key in keys] for tree in trees.values()])
    place_of = dict(zip(trees, places, strict=True))
    means = []
    for (settings, *of_group), by_seed in sorted(groups.items(), key=lambda group: place_of[group[0][0]]):
        seeds = sorted(by_seed)
        values = tuple(by_seed[seed][1] for seed in seeds)
        mean, first = Mean(values, len(values)), next(iter(by_seed.values()))[0]
        more = {"run": first.name, "mean": mean.mean, "std": mean.std, "seeds": seeds, "values": values}
        more["varied"] = {key: trees[settings].get(key) for key in keys}
        means.append(dict(zip(GROUP_KEYS, of_group, strict=True)) | more)
    return means


def _in_order(rows: Sequence[Sequence[object]]) -> list[tuple[tuple[bool, float], ...]]:
    """A place for each row: by the first value, then the second, and so on; numbers rise, others follow in the order in
    which they come first."""
    places = []
    for values in zip(*rows, strict=True):
        texts = list(dict.fromkeys(map(repr, values)))
        places.append(
            [
                (False, value)
                if isinstance(value, int | float) and not isinstance(value, bool)
                else (True, texts.index(repr(value)))
                for value in values
            ]
        )
    return list(zip(*places, strict=True)) if places else [()] * len(rows)


def _read(run: Path) -> tuple[dict[str, object], list[dict]]:
    """What two runs that differ in their seed only have in common, and the run's newest numbers."""
    records = results.read(run / "results.json")
    if not records:
        raise UserError(f"{run}: holds no results; run `ssl-dist evaluate {run} knn` first")
    return compared(config.load(run / "config.yaml")), newest(records)


def newest(records: Sequence[dict]) -> list[dict]:
    """The last measurement of each number and size of images, without records that a fit has converged, which is no
    result."""
    latest: dict[tuple, dict] = {}
    for record in sorted(records, key=lambda record: record["time"]):
        number = record["name"], record["dataset"], record["split"], record["protocol"], record["layer"]
        latest.pop((*number, ""), None)  # of a size that was not recorded: the later one takes its place
        latest[(*number, results.size_of(record))] = record
    return [record for record in latest.values() if not record["name"].endswith("_converged") or not record["value"]]


def table(records: list[dict]) -> str:
    """A line for each number, with its protocols as footnotes. What was varied, if it has room, stands in the place of
    a run's name, and lines of one result stand together."""
    keys = list(records[0].get("varied", {}))
    keys = keys if len(keys) <= MAX_KEYS else []
    if keys:
        order = list(dict.fromkeys((record["dataset"], record["split"], record["name"]) for record in records))
        records = sorted(records, key=lambda r: order.index((r["dataset"], r["split"], r["name"])))
    columns = ["method", "backbone", "step", "dataset", "split"]
    named = [key for key in keys if key not in ("method.name", "backbone.name")]  # those have a column
    heads = ["method", "backbone", "step", "data set", "split", "result", "mean ± std", "seeds"]
    rows = []
    for record in records:
        cells = [shown(record["varied"][key]) for key in named] if keys else [record["run"]]
        cells += [str(record[column]) for column in columns]
        cells += [results.label(record), results.number(record["mean"], record["std"]), str(len(record["seeds"]))]
        rows.append((cells, record["protocol"]))
    return text_table.with_protocols([*(map(head, named) if keys else ["run"]), *heads], rows)
