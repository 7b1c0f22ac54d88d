"""Means over seeds as ablations are published: a row for each group of runs, named by what was varied, a column for
each result; as CSV and LaTeX, and plotted against what was varied."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from ssl_dist import results, text_table
from ssl_dist.report.varied import MAX_KEYS, MAX_LABEL, head, shown
from ssl_dist.results.means import Mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RESULT = ("dataset", "split", "name", "layer", "protocol", "data", "train_data", "version")


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only, at one step."""

    method: str
    backbone: str
    step: int
    varied: dict[str, object]
    run: str  # name of the first

    @property
    def key(self) -> str:
        return repr((self.method, self.backbone, self.step, self.varied))


@dataclass(frozen=True)
class Ablation:
    """records: of `seeds.over_seeds`."""

    records: Sequence[dict]

    @cached_property
    def groups(self) -> list[Group]:
        """The rows."""
        groups: dict[str, Group] = {}
        for record in self.records:
            groups.setdefault(_group(record).key, _group(record))
        return list(groups.values())

    def _result(self, record: dict) -> tuple:
        """What the records of a column have in common: the test transform, which follows the run's config, only where a
        run was measured under several."""
        return tuple(record[key] for key in (*_RESULT, *(["transform"] if self._has_transforms else [])))

    @cached_property
    def _has_transforms(self) -> bool:
        cells = [(_group(record).key, *(record[key] for key in _RESULT)) for record in self.records]
        return len(set(cells)) < len(cells)

    @cached_property
    def results(self) -> list[dict]:
        """A record of each column, by data set and split."""
        columns = {self._result(record): record for record in self.records}
        return sorted(columns.values(), key=lambda record: (record["dataset"], record["split"]))

    @cached_property
    def protocols(self) -> list[str]:
        return list(dict.fromkeys(record["protocol"] for record in self.results))

    @cached_property
    def _cells(self) -> dict[tuple[str, tuple], dict]:
        cells = {(_group(record).key, self._result(record)): record for record in self.records}
        assert len(cells) == len(self.records), "two means in one cell: what was varied does not tell their runs apart"
        return cells

    def mean(self, group: Group, result: dict) -> Mean | None:
        """A cell; None: the group has no such result."""
        record = self._cells.get((group.key, self._result(result)))
        return None if record is None else Mean(record["values"], len(self.seeds(group)))

    def seeds(self, group: Group) -> list[int]:
        return sorted({seed for record in self.records if _group(record).key == group.key for seed in record["seeds"]})

    @cached_property
    def keys(self) -> list[str]:
        """What was varied."""
        return list(self.groups[0].varied)

    @cached_property
    def label_heads(self) -> list[str]:
        """Of the columns that name a row: what was varied, or the first run where that is too much; where nothing was
        varied, method and backbone."""
        heads = [*map(head, self.keys)] or ["method", "backbone"]
        heads = heads if len(heads) <= MAX_KEYS else ["run"]
        return [*heads, *(["step"] if self._has_steps else []), "seeds"]

    def labels(self, group: Group) -> list[str]:
        values = [*map(shown, group.varied.values())] or [group.method, group.backbone]
        values = values if len(values) <= MAX_KEYS else [group.run]
        return [*values, *([f"{group.step:,}"] if self._has_steps else []), str(len(self.seeds(group)))]

    @property
    def _has_steps(self) -> bool:
        """Whether steps differ, and not because the length was varied."""
        varied_length = {"optim.steps", "optim.epochs"} & set(self.keys)
        return not varied_length and len({group.step for group in self.groups}) > 1

    @property
    def about(self) -> str:
        """What all rows have in common, in a sentence."""
        first, result = self.groups[0], self.results[0]
        common = [] if "method.name" in self.keys else [first.method]
        common += [] if "backbone.name" in self.keys else [first.backbone]
        common += [] if self._several_splits else [f"measured on {result['dataset']} {result['split']}"]
        return ", ".join([*common, "mean ± standard deviation over seeds"])

    @property
    def _several_splits(self) -> bool:
        return len({(record["dataset"], record["split"]) for record in self.results}) > 1

    def result_head(self, result: dict) -> str:
        """Its name; with data set and split where those differ, and a number where several have one name."""
        where = f" ({result['dataset']}, {result['split']})" if self._several_splits else ""
        alike = [self._result(other) for other in self.results if self._result(other)[:4] == self._result(result)[:4]]
        return results.label(result) + where + (f" #{alike.index(self._result(result)) + 1}" if len(alike) > 1 else "")

    def as_latex(self) -> str:
        """The table of all groups and results, with the protocols as comments."""
        heads = [*map(self.result_head, self.results)]
        rows = []
        for group in self.groups:
            cells = (self.mean(group, result) for result in self.results)
            rows.append([*self.labels(group), *("–" if cell is None else str(cell) for cell in cells)])
        head_cells = [*self.label_heads, *heads]
        right_aligned = range(len(self.label_heads) - 1, len(head_cells))
        remarks = [f"{self.about}."]
        for protocol in self.protocols:
            named = [h for h, result in zip(heads, self.results, strict=True) if result["protocol"] == protocol]
            remarks.append(f"{', '.join(named)}: {protocol}")
        return text_table.as_latex(head_cells, rows, right_aligned, remarks)

    def as_csv(self) -> str:
        """A line for every mean, with the seeds that it is of and their values."""
        columns = ["method", "backbone", "step", "dataset", "split", "name", "layer", "mean", "std"]
        rows = []
        for record in self.records:
            values = [" ".join(map(str, record[column])) for column in ("seeds", "values")]
            mean = [record[column] for column in columns]
            rows.append([*record["varied"].values(), *mean, *values, record["protocol"]])
        return text_table.as_csv([*self.keys, *columns, "seeds", "values", "protocol"], rows)

    @cached_property
    def plotted_key(self) -> str | None:
        """The key that results are plotted against: of those whose values are numbers, the one with the most; None:
        there is none."""
        return max(filter(self._numbers, self.keys), key=lambda key: len(self._numbers(key)), default=None)

    def _numbers(self, key: str) -> list[float]:
        """The values of a key, rising, without null; none where one of them is no number, or there is one alone."""
        values = [group.varied[key] for group in self.groups if group.varied[key] is not None]
        numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
        return sorted(set(numbers)) if len(numbers) == len(values) and len(set(numbers)) > 1 else []

    def plots(self, size: tuple[float, float] = (7, 4.2)) -> Iterator[tuple[str, "Figure"]]:
        """The name of each result and a plot of its means, with a line for each combination of the other keys' values,
        which is named by its first run where that would be long. None where nothing numeric was varied. size:
        in inches."""
        key = self.plotted_key
        if key is None:
            return
        from ssl_dist.results import mean_plots  # matplotlib takes a second

        places = self._numbers(key)
        for result in self.results:
            points: dict[str, list[tuple[mean_plots.Place, float, float]]] = {}
            names: dict[str, str] = {}
            for group in self.groups:
                others = [f"{head(other)} {shown(value)}" for other, value in group.varied.items() if other != key]
                others += [f"step {group.step:,}"] if self._has_steps else []
                cell, place = self.mean(group, result), group.varied[key]
                if isinstance(place, int | float):
                    line = ", ".join(others)
                    names.setdefault(line, line if len(line) <= MAX_LABEL else group.run)
                    of_line = points.setdefault(line, [])
                    of_line += [] if cell is None else [(place, cell.mean, cell.std or 0.0)]
            lines = [mean_plots.Line(names[line], of_line) for line, of_line in points.items()]
            name = self.result_head(result)
            unit = " (%)" if result["name"].endswith(("_top1", "_top5")) else ""
            logarithmic = mean_plots.is_geometric(places)
            yield name, mean_plots.lines(lines, places, (head(key), name + unit), "", logarithmic, size)


def _group(record: dict) -> Group:
    return Group(record["method"], record["backbone"], record["step"], record["varied"], record["run"])
