"""The numbers of a study, in the paper's layout: mean and standard deviation over seeds."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ssl_dist import text_table
from ssl_dist.report import published
from ssl_dist.report.published import Published
from ssl_dist.results.means import Mean
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
class Beside:
    """A published number that a cell may stand beside, and what else differs between the two."""

    row: Published
    differences: list[str]


Key = tuple[Value, ...]
Place = tuple[Key, Key]


@dataclass(frozen=True)
class Grid:
    """rows: values of the row axes; columns: values of the column axes and the measure's column; a cell for each pair
    that some run belongs to, and published numbers beside some of them. references: of a row the one that its
    differences are to. differences: published ones, in words."""

    rows: list[Key]
    columns: list[Key]
    cells: dict[Place, Mean]
    beside: dict[Place, Beside]
    references: dict[Key, Key] = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """What differs, each once."""
        return list(dict.fromkeys("; ".join(other.differences) for other in self.beside.values() if other.differences))

    def text(self, row: Key, column: Key) -> str:
        """A cell as it is printed: the mean, its difference to the row that all are compared with, the published number
        and the difference to that, and the number of its note."""
        if (row, column) not in self.cells:
            return "–"
        cell, other = self.cells[row, column], self.beside.get((row, column))
        reference = self.reference(row, column)
        text = str(cell) if reference is None else f"{cell} ({cell.over(reference.mean)})"
        if other is None:
            return text
        std = "" if other.row.std is None else f" ± {other.row.std:g}"
        note = f" [{self.notes.index('; '.join(other.differences)) + 1}]" if other.differences else ""
        return f"{text}; published {other.row.value:g}{std}, {cell.over(other.row.value)}{note}"

    def reference(self, row: Key, column: Key) -> Mean | None:
        """What a cell's mean is compared with; None: with nothing, or one of the two is not there yet."""
        other = self.references.get(row, row)
        found = self.cells.get((other, column))
        return None if other == row or not found or not found.values or not self.cells[row, column].values else found


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
        place: Mean(tuple(number.value for number in there.get(place, ())), count) for place, count in wanted.items()
    }
    beside = {place: other for place, found in there.items() if (other := _beside(found))}
    rows = list(dict.fromkeys(row for row, _ in wanted))
    to = study.table.difference_to
    references = {
        row: tuple(to.get(axis, value) for axis, value in zip(study.table.rows, row, strict=True)) for row in rows if to
    }
    return Grid(rows, columns, cells, beside, references, _published_differences(study, trainings, references))


def _published_differences(study: Study, trainings: Sequence[Training], references: dict[Key, Key]) -> list[str]:
    """In words, of the rows that are compared with others."""
    configs = {tuple(training.labels[axis] for axis in study.table.rows): training.config for training in trainings}
    pairs = [(configs[row], configs[other]) for row, other in references.items() if other in configs]
    found = [row for row in published.differences_between() if any(row.is_between(*pair) for pair in pairs)]
    return [row.words for row in found]


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
    fields = ("name", "value", "dataset", "split", "step", "checkpoint", "protocol", "time")
    rows = [
        [*number.training.labels.values(), number.measure.column, *map(number.record.get, fields), number.training.run]
        for number in numbers
    ]
    return text_table.as_csv([*study.axes, "column", *fields, "run"], rows)


def means_as_csv(study: Study, table: Grid) -> str:
    """A line for every cell of the table: mean, standard deviation, how many runs it is of, the difference to the row
    that all are compared with, and the published number."""
    rows = []
    for row in table.rows:
        for column in table.columns:
            cell, other = table.cells.get((row, column)), table.beside.get((row, column))
            if cell is not None and cell.values:
                reference = table.reference(row, column)
                difference = None if reference is None else cell.mean - reference.mean
                of_cell = [cell.mean, cell.std, len(cell.values), difference]
                rows.append([*row, heading(study, column), *of_cell, None if other is None else other.row.value])
    return text_table.as_csv(
        [*study.table.rows, "column", "mean", "std", study.table.over + "s", "difference", "published"], rows
    )


def as_markdown(study: Study, table: Grid) -> str:
    """Title, source and table."""
    lines = [f"# {study.title}", "", about(study), "", *text_table.as_markdown(*_texts(study, table))]
    for line in footnotes(table):
        lines += ["", line]
    return "\n".join(lines) + "\n"


def as_latex(study: Study, table: Grid) -> str:
    """The table alone, with title and footnotes as comments."""
    return text_table.as_latex(*_texts(study, table), [study.title, about(study), *footnotes(table)])


def about(study: Study) -> str:
    """What the table is of, in sentences."""
    to = study.table.difference_to
    named = ", ".join(f"{axis} {value}" for axis, value in to.items())
    compared = f" In brackets the difference to the mean of {named}." if to else ""
    return f"{study.source}. Mean ± standard deviation over {study.table.over}.{compared}"


def footnotes(table: Grid) -> list[str]:
    """What differs from the published numbers, where those stand, and differences that are published."""
    notes = [f"[{number}] {note}." for number, note in enumerate(table.notes, 1)]
    sources = dict.fromkeys(f"Published: {other.row.footnote}" for other in table.beside.values())
    return [*notes, *sources, *table.differences]


def _texts(study: Study, table: Grid) -> tuple[list[str], list[list[str]], range]:
    """Head, rows and which columns are of numbers."""
    head = [*study.table.rows, *(heading(study, column) for column in table.columns)]
    rows = [[*map(str, row), *(table.text(row, column) for column in table.columns)] for row in table.rows]
    return head, rows, range(len(study.table.rows), len(head))
