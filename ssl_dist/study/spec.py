"""What a study is: a YAML file that says which runs to make, what to measure on them, and where each number goes.

Every combination of the axes' values is a training of its own, by the config that `config` names and its overrides.
"""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from ssl_dist import config
from ssl_dist.config import Config, Section, shipped, to_tree, validate
from ssl_dist.config.section import PathText, read_yaml
from ssl_dist.errors import UserError, did_you_mean, quoted
from ssl_dist.evaluate import command as evaluate
from ssl_dist.run import plugged

Value = str | int | float
Values = Annotated[list[Value], Field(min_length=1)]
Overrides = dict[str, Any]  # config key -> value
Labels = dict[str, Value]  # axis -> value


class KeyAxis(Section):
    """Values of one config key."""

    key: str
    values: Values


class Measure(Section):
    """A number of every run that `of` admits: a result of an evaluator."""

    column: str = Field(description="of the table")
    of: dict[str, Value | Values] = Field(
        default_factory=dict, description="axis -> the value or values it is taken at"
    )
    evaluator: str
    result: str = Field(description="name of the number in results.json")
    overrides: Overrides = Field(default_factory=dict, description="of the evaluator, and of data.* for a transfer")

    def admits(self, labels: Mapping[str, Value]) -> bool:
        return _agree(self.of, labels)


class Table(Section):
    rows: Annotated[list[str], Field(min_length=1)] = Field(description="axes that make the rows")
    columns: list[str] = Field(default_factory=list, description="axes that make columns, beside those of the measures")
    over: str = Field("seed", description="the axis that mean and standard deviation are taken over")
    difference_to: Labels = Field(
        default_factory=dict,
        description="axis of the rows -> value: beside each mean stands the difference to that of the row with it",
    )


class Gain(Section):
    """A difference of means: at the value `of` of an axis, less that at its value `over`."""

    axis: str
    of: Value
    over: Value


class FigureSpec(Section):
    """column: of the table. Lines against `x`, one for each value of `by`; with `gain` bars, grouped by `x`."""

    column: str
    x: str
    by: str
    logarithmic: bool | None = Field(None, description="axis of x; null: where its values are a geometric series")
    gain: Gain | None = None


class Study(Section):
    title: str
    source: str = Field(description="paper and table or figure")
    folder: PathText = Field(description="of the runs, and of what is written about them")
    config: str = Field(
        description="config beside this file; {axis} stands for the value of an axis, * in its name for what only one "
        "file has there"
    )
    axes: Annotated[dict[str, Values | KeyAxis | dict[str, Overrides]], Field(min_length=1)] = Field(
        description="values; {key: k, values: [...]} of a config key; or value: {key: value, ...}"
    )
    exclude: list[dict[str, Value | Values]] = Field(default_factory=list, description="combinations left out")
    overrides: Overrides = Field(default_factory=dict, description="of every run")
    measures: Annotated[list[Measure], Field(min_length=1)]
    table: Table
    figure: FigureSpec | None = None

    @model_validator(mode="after")
    def _axes(self) -> Self:
        for number, measure in enumerate(self.measures):
            for axis, wanted in measure.of.items():
                self._require(f"measures.{number}.of.{axis}", axis)
                for value in wanted if isinstance(wanted, list) else [wanted]:
                    if value not in self.values(axis):
                        raise ValueError(f"measures.{number}.of.{axis}: {value!r} is none of {self.values(axis)}")
        for number, excluded in enumerate(self.exclude):
            for axis in excluded:
                self._require(f"exclude.{number}.{axis}", axis)
        named = [*self.table.rows, *self.table.columns, self.table.over]
        for axis in named:
            self._require("table", axis)
        for axis, value in self.table.difference_to.items():
            if axis not in self.table.rows:
                raise ValueError(f"table.difference_to: {axis} makes no rows; {', '.join(self.table.rows)} do")
            if value not in self.values(axis):
                raise ValueError(f"table.difference_to.{axis}: {value!r} is none of {self.values(axis)}")
        for measure in self.measures:
            single = {axis for axis, wanted in measure.of.items() if not isinstance(wanted, list)}
            for axis in self.axes.keys() - {*named, *single}:
                raise ValueError(f"table: axis {axis} is in no row, column or mean; add it to rows")
        if self.figure is not None:
            gain = self.figure.gain
            for axis in (self.figure.x, self.figure.by, *([] if gain is None else [gain.axis])):
                self._require("figure", axis)
            if gain is not None:
                for key, value in (("of", gain.of), ("over", gain.over)):
                    if value not in self.values(gain.axis):
                        raise ValueError(f"figure.gain.{key}: {value!r} is none of {self.values(gain.axis)}")
            if self.figure.column not in {measure.column for measure in self.measures}:
                raise ValueError(f"figure.column: {self.figure.column} is the column of no measure")
        return self

    @model_validator(mode="after")
    def _cells(self) -> Self:
        """A cell of the table is of one measure."""
        found: dict[tuple, int] = {}
        for labels in self.combinations():
            place = {axis: labels[axis] for axis in (*self.table.rows, *self.table.columns)}
            for number, measure in enumerate(self.measures):
                if measure.admits(labels):
                    first = found.setdefault((measure.column, *place.values()), number)
                    if first != number:
                        raise ValueError(
                            f"measures.{number}.column: {measure.column!r} is that of measures.{first} too, and "
                            f"{_title(place)} would have the mean of both; give it another column"
                        )
        return self

    @model_validator(mode="after")
    def _points(self) -> Self:
        """A point of the figure is of one value of every axis but `table.over`, which its deviation is over."""
        figure = self.figure
        if figure is None:
            return self
        drawn = [figure.x, figure.by, *([] if figure.gain is None else [figure.gain.axis])]
        found: dict[tuple, Labels] = {}
        for labels in self.combinations():
            if any(measure.column == figure.column and measure.admits(labels) for measure in self.measures):
                first = found.setdefault(tuple(labels[axis] for axis in drawn), labels)
                for axis, value in labels.items():
                    if value != first[axis] and axis != self.table.over:
                        raise ValueError(
                            f"figure: a point would be a mean over {axis} ({first[axis]}, {value}); make it x or by, "
                            f"take {figure.column} at one value of it (of, in measures), or leave out the figure"
                        )
        return self

    def _require(self, where: str, axis: str) -> None:
        if axis not in self.axes:
            raise ValueError(f"{where}: {axis} is no axis; there are {', '.join(self.axes)}")

    def values(self, axis: str) -> list[Value]:
        """The values of an axis, in the order of the file."""
        spec = self.axes[axis]
        return spec.values if isinstance(spec, KeyAxis) else list(spec)

    def set_by(self, axis: str, value: Value) -> Overrides:
        """The config keys that a value of an axis sets."""
        spec = self.axes[axis]
        if isinstance(spec, KeyAxis):
            return {spec.key: value}
        return spec[str(value)] if isinstance(spec, dict) else {}

    def overrides_of(self, labels: Labels) -> Overrides:
        """The config keys that a combination sets."""
        chosen: Overrides = {}
        for axis, value in labels.items():
            chosen |= self.set_by(axis, value)
        return chosen | self.overrides

    def combinations(self) -> list[Labels]:
        """All that are measured, the first axis varying slowest."""
        products = itertools.product(*(self.values(axis) for axis in self.axes))
        combinations = [dict(zip(self.axes, values, strict=True)) for values in products]
        return [
            labels
            for labels in combinations
            if any(measure.admits(labels) for measure in self.measures)
            and not any(_agree(excluded, labels) for excluded in self.exclude)
        ]


def _agree(wanted: Mapping[str, Value | Values], labels: Mapping[str, Value]) -> bool:
    """Whether every axis of `wanted` has the value, or one of the values, named there."""
    return all(labels[axis] in (values if isinstance(values, list) else [values]) for axis, values in wanted.items())


def _title(labels: Labels) -> str:
    return " ".join(f"{axis}={value}" for axis, value in labels.items())


@dataclass(frozen=True)
class Training:
    """One run of a study."""

    labels: Labels
    config: Config
    measures: tuple[Measure, ...]

    @cached_property
    def run(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def name(self) -> str:
        """That of its folder."""
        return self.run.name

    @property
    def title(self) -> str:
        return _title(self.labels)


def named(trainings: Sequence[Training], name: str) -> Training:
    """The one of this name. Raises `UserError` when there is none."""
    names = [training.name for training in trainings]
    if name not in names:
        raise UserError(f"--only {name}: no run of this study; {did_you_mean(name, names)}--dry-run lists them")
    return trainings[names.index(name)]


def words(overrides: Overrides) -> list[str]:
    """As they stand on a command line, key=value."""
    return [f"{key}={json.dumps(value)}" for key, value in overrides.items()]


def check_ranks(number: int) -> None:
    """Raises `UserError` where a training cannot have so many."""
    if number < 1:
        raise UserError(f"--ranks {number}: at least one rank is needed")


def read(path: Path, further: Sequence[str] = ()) -> tuple[Study, list[Training]]:
    """The study in a file and its trainings; `further` overrides key=value go to all of them. Raises `UserError`."""
    path = shipped.found(path)
    tree = read_yaml(path, f"study {path}", "configs/studies/ holds examples")
    if not isinstance(tree, dict):
        raise UserError(f"study {path}: must be a mapping with title, axes, measures; see configs/studies/")
    study = validate(Study, tree, f"study {path}: ")
    for labels in study.combinations():
        _refuse_run_dir(study, path, labels, further)
        _refuse_set_twice(study, path, labels, further)
    trainings = [_training(study, path, labels, further) for labels in study.combinations()]
    if not trainings:
        raise UserError(f"study {path}: every combination is excluded; leave some")
    _refuse_one_folder(path, trainings)
    _refuse_made_twice(study, path, trainings)
    for training in trainings:
        plugged.pinned(training.config)  # an evaluator may be of its plugins
    for number, measure in enumerate(study.measures):
        try:
            evaluate.parse([measure.evaluator], words(measure.overrides))
        except UserError as error:
            raise UserError(f"study {path}: measures.{number}: {error}") from None
    return study, trainings


def _refuse_run_dir(study: Study, path: Path, labels: Labels, further: Sequence[str]) -> None:
    """Raises `UserError` where `run_dir` is set, which a study makes of its folder for each combination."""
    for word in [*words(study.overrides_of(labels)), *further]:
        if word.partition("=")[0] == "run_dir":
            raise UserError(f"study {path}: {word}: a study names the folders of its runs; write folder: in the file")


def _refuse_set_twice(study: Study, path: Path, labels: Labels, further: Sequence[str]) -> None:
    """Raises `UserError` where a key that an axis sets is set once more: the axis would name what was not trained."""
    of_axes = [(f"axis {axis}", word) for axis, value in labels.items() for word in words(study.set_by(axis, value))]
    of_all = [("overrides", word) for word in words(study.overrides)] + [("the command line", word) for word in further]
    for place, (axis, word) in enumerate(of_axes):
        for other, its_word in [*of_axes[place + 1 :], *of_all]:
            key, its_key = (one.partition("=")[0] + "." for one in (word, its_word))
            if other != axis and (key.startswith(its_key) or its_key.startswith(key)):
                raise UserError(
                    f"study {path}: {its_word} of {other} and {word} of {axis} undo one another; leave out one of them"
                )


def _refuse_one_folder(path: Path, trainings: Sequence[Training]) -> None:
    """Raises `UserError` where two combinations have the same folder: the run of one would be taken as the other's."""
    found: dict[str, Training] = {}
    for training in trainings:
        first = found.setdefault(training.name, training)
        if first is not training:
            raise UserError(
                f"study {path}: {first.title} and {training.title} have one folder, {training.run}; leave one out, or "
                "give a value another name, as name: {key: value}"
            )


def _refuse_made_twice(study: Study, path: Path, trainings: Sequence[Training]) -> None:
    """Raises `UserError` where two combinations make one training and measure it alike: the axis that tells them apart
    sets nothing."""
    found: dict[tuple[str, int], Training] = {}
    for training in trainings:
        made = json.dumps(to_tree(training.config) | {"run_dir": ""})
        for number, measure in enumerate(study.measures):
            if not measure.admits(training.labels):
                continue
            first = found.setdefault((made, number), training)
            if first is not training:
                axis = next(name for name, value in training.labels.items() if first.labels[name] != value)
                raise UserError(
                    f"study {path}: {first.title} and {training.title} make the same training; write the axis as "
                    f"{axis}: {{key: a config key, values: [...]}}, name {{{axis}}} in config, or leave one value out"
                )


def _training(study: Study, path: Path, labels: Labels, further: Sequence[str]) -> Training:
    try:
        name = study.config.format(**{axis: _in_names(value) for axis, value in labels.items()})
    except (KeyError, IndexError, ValueError, AttributeError):
        raise UserError(
            f"study {path}: config = {quoted(study.config)}: names what is no axis; there are {', '.join(study.axes)}"
        ) from None
    file = path.parent / name
    if "*" in file.name:
        fitting = sorted(file.parent.glob(file.name))
        if len(fitting) > 1:
            names = ", ".join(one.name for one in fitting)
            raise UserError(f"study {path}: config = {quoted(study.config)}: {labels} fits {names}; it must fit one")
        file = next(iter(fitting), file)
    if not file.is_file():
        raise UserError(f"study {path}: {file} is missing, which {labels} needs; write it, or exclude the combination")
    run = Path(study.folder, "-".join(map(_in_names, labels.values())))
    own = [*words(study.overrides_of(labels)), *further, f"run_dir={json.dumps(str(run))}"]
    try:
        settings = config.load(file, own)
    except UserError as error:
        raise UserError(f"study {path}: {labels}: {error}") from None
    return Training(labels, settings, tuple(measure for measure in study.measures if measure.admits(labels)))


def _in_names(value: Value) -> str:
    """As it stands in the name of a file."""
    return re.sub(r"[^\w.-]+", "_", str(value))
