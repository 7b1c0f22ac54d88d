"""The numbers of a study, in the paper's layout: mean and standard deviation over seeds."""

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ssl_dist.report import published
from ssl_dist.report.published import Published
from ssl_dist.study.spec import Labels, Measure, Study, Training, Value


@dataclass(frozen=True)
class Number:
    """A result of a run, and the record of results.json that holds it."""

    training: Training
    measure: Measure
    record: dict
    epochs: float  # of the training, at the checkpoint that was measured

    @property
    def value(self) -> float:
        return self.record["value"]


@dataclass(frozen=True)
class Cell:
    """values: of the runs that are there, out of `wanted`."""

    values: tuple[float, ...]
    wanted: int

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        """Of several runs; over the whole population of them no one asks, so n - 1."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        if not self.values:
            return ""
        std = "" if self.std is None else f" ± {self.std:.2f}"
        return f"{self.mean:.2f}{std}" + (
            f" ({len(self.values)} of {self.wanted})" if len(self.values) < self.wanted else ""
        )


@dataclass(frozen=True)
class Beside:
    """A published number that a cell may stand beside, and what else differs between the two."""

    row: Published
    differences: list[str]


Key = tuple[Value, ...]
Place = tuple[Key, Key]


@dataclass(frozen=True)
class Grid:
    """rows: values of the row axes; columns: values of the column axes and the measure's column; a cell for each pair
    that some run belongs to, and published numbers beside some of them."""

    rows: list[Key]
    columns: list[Key]
    cells: dict[Place, Cell]
    beside: dict[Place, Beside]

    @property
    def notes(self) -> list[str]:
        """What differs, each once."""
        return list(dict.fromkeys("; ".join(other.differences) for other in self.beside.values() if other.differences))

    def text(self, row: Key, column: Key) -> str:
        """A cell as it is printed: the mean, the published number and the difference, and the number of its note."""
        if (row, column) not in self.cells:
            return "–"
        cell, other = self.cells[row, column], self.beside.get((row, column))
        if other is None:
            return str(cell)
        std = "" if other.row.std is None else f" ± {other.row.std:g}"
        note = f" [{self.notes.index('; '.join(other.differences)) + 1}]" if other.differences else ""
        return f"{cell}; published {other.row.value:g}{std}, {cell.mean - other.row.value:+.2f}{note}"


def grid(study: Study, trainings: Sequence[Training], numbers: Sequence[Number]) -> Grid:
    """The table of a study. numbers: those that are there so far."""
    wanted: dict[Place, int] = {}
    there: dict[Place, list[Number]] = {}
    for training in trainings:
        for measure in training.measures:
            place = _place(study, training.labels, measure)
            wanted[place] = wanted.get(place, 0) + 1
    for number in numbers:
        there.setdefault(_place(study, number.training.labels, number.measure), []).append(number)
    columns = list(dict.fromkeys(column for _, column in wanted))
    order = {measure.column: place for place, measure in reversed(list(enumerate(study.measures)))}
    columns.sort(key=lambda column: order[str(column[-1])])  # stable: column axes stay in their order
    cells = {
        place: Cell(tuple(number.value for number in there.get(place, ())), count) for place, count in wanted.items()
    }
    beside = {place: other for place, found in there.items() if (other := _beside(found))}
    return Grid(list(dict.fromkeys(row for row, _ in wanted)), columns, cells, beside)


def _beside(numbers: Sequence[Number]) -> Beside | None:
    """The first published number that was measured as these, which differ in the seed alone."""
    training, record = numbers[0].training, numbers[0].record
    for row in published.beside(training.config):
        if published.measured_alike(row, training.config, [record]):
            return Beside(row, published.differences(row, training.config, record, numbers[0].epochs, len(numbers)))
    return None


def _place(study: Study, labels: Labels, measure: Measure) -> Place:
    row = tuple(labels[axis] for axis in study.table.rows)
    return row, (*(labels[axis] for axis in study.table.columns), measure.column)


def heading(study: Study, column: Key) -> str:
    """What stands above a column: the values of the column axes, and what is measured where columns differ in it."""
    named = [f"{axis} = {value}" for axis, value in zip(study.table.columns, column[:-1], strict=True)]
    several = len({measure.column for measure in study.measures}) > 1
    return ", ".join([*named, *([str(column[-1])] if several or not named else [])])


def as_csv(study: Study, numbers: Sequence[Number]) -> str:
    """A line for every number: the values of all axes, what was measured and by which protocol, and of which run."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    fields = ("name", "value", "dataset", "split", "step", "checkpoint", "protocol", "time")
    writer.writerow([*study.axes, "column", *fields, "run"])
    for number in numbers:
        labels, record = number.training.labels, number.record
        writer.writerow([*labels.values(), number.measure.column, *map(record.get, fields), number.training.run])
    return text.getvalue()


def as_markdown(study: Study, table: Grid) -> str:
    """Title, source and table."""
    head = [*study.table.rows, *(heading(study, column) for column in table.columns)]
    lines = [f"# {study.title}", "", f"{study.source}. Mean ± standard deviation over {study.table.over}.", ""]
    lines += [_line(head), "|" + "---|" * len(study.table.rows) + "---:|" * len(table.columns)]
    for row in table.rows:
        lines.append(_line([*map(str, row), *(table.text(row, column) for column in table.columns)]))
    notes = [f"[{number}] {note}." for number, note in enumerate(table.notes, 1)]
    sources = dict.fromkeys(f"Published: {other.row.footnote}" for other in table.beside.values())
    for line in (*notes, *sources):
        lines += ["", line]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
