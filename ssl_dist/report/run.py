"""The files of a run's folder, read for its page. A missing or damaged one is no error but a note on the page."""

import contextlib
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ssl_dist import config, evaluators, methods, results
from ssl_dist.config import Config
from ssl_dist.data import manifest
from ssl_dist.data.catalog import SplitRoles
from ssl_dist.errors import UserError
from ssl_dist.reading import json_lines
from ssl_dist.report import pictures
from ssl_dist.report.markup import count
from ssl_dist.report.pictures import Picture
from ssl_dist.report.seeds import newest
from ssl_dist.report.verdicts import MAX_MAGNITUDE, is_amount, is_number
from ssl_dist.results import suggestion
from ssl_dist.run import plugged
from ssl_dist.run.metrics import read_metrics
from ssl_dist.storage import checkpoint

VIEWS = "views*.png"


@dataclass
class Run:
    """notes: by the part of the page, what is missing or odd there and the command that mends it."""

    folder: Path
    name: str
    config: Config
    trains: bool
    lines: list[dict] = field(default_factory=list)  # of metrics.jsonl
    records: list[dict] = field(default_factory=list)  # of results.json, the newest of each number
    starts: list[dict] = field(default_factory=list)  # of logs/starts.jsonl
    views: list[Picture] = field(default_factory=list)
    figures: list[Picture] = field(default_factory=list)
    evaluations: list["Run"] = field(default_factory=list)  # trainings on its backbone, of which only the log is read
    checkpoint: str | None = None  # name of the newest valid one
    digest: str | None = None  # its SHA-256
    labelled: dict[str, bool] = field(default_factory=dict)  # by split; empty: the data set is not at data.root now
    uses: SplitRoles | None = None  # of the splits; None: the data set is not there
    notes: dict[str, list[str]] = field(default_factory=dict)
    label: str | None = None  # a short name beside other runs; None: its name

    @property
    def short_name(self) -> str:
        return self.label or self.name

    @property
    def title(self) -> str:
        """What was trained, in three words."""
        return f"{self.config.method.name} · {self.config.backbone.name} · {self.config.data.name}"

    @property
    def step(self) -> int | None:
        """Steps completed, by the newest checkpoint or, before the first, by the log."""
        if self.checkpoint is not None:
            return checkpoint.step_of(self.checkpoint)
        return self.lines[-1]["step"] if self.lines else None

    @property
    def total_steps(self) -> int | None:
        """None: the length is given in epochs, and no line tells yet how many steps one has."""
        optim = self.config.optim
        if optim.steps is not None or not self.lines or not self.lines[-1]["epoch"]:
            return optim.steps
        return round(self.lines[-1]["step"] / self.lines[-1]["epoch"]) * optim.epochs

    @property
    def has_several_sizes(self) -> bool:
        """Whether its numbers are of images of several sizes."""
        return len({results.size_of(record) for record in self.records}) > 1

    @property
    def results(self) -> list[dict]:
        """The records of whole splits on images that nothing was fitted to."""
        whole = filter(results.is_of_a_whole_split, self.records)
        return [record for record in whole if "_train_" not in record["name"]]

    def values(self, key: str) -> list[tuple[float, float]]:
        """(epoch, value) of the lines that have the number; NaN where it is none that can be drawn."""
        logged = [(line["epoch"], line[key]) for line in self.lines if is_number(line.get(key))]
        return [(epoch, float(value) if abs(value) < MAX_MAGNITUDE else math.nan) for epoch, value in logged]

    def evaluation(self, with_labels: Sequence[str]) -> str:
        """The command that measures it by these evaluators, or where its data set has no labels by those that need
        none, between backticks."""
        words = [*with_labels]
        if self.uses is not None:
            words = suggestion.evaluators(self.labelled, self.uses, with_labels)
        return command(self, "evaluate", *words)

    def note(self, part: str, sentence: str) -> None:
        self.notes.setdefault(part, []).append(sentence)


def read(folder: Path) -> Run:
    """Raises `UserError` when the folder is not a run's, or its config.yaml is damaged."""
    run = _open(folder)
    _read_data(run)
    _read_checkpoint(run)
    _read_metrics(run)
    _read_results(run)
    _read_starts(run)
    _read_views(run)
    _read_figures(run)
    _read_evaluations(run)
    return run


def _open(folder: Path) -> Run:
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder}: not a run's folder, it holds no config.yaml; name the run_dir of a training")
    settings = config.load(path)
    plugged.recall(settings, path, folder)
    folder = folder.resolve()
    return Run(folder, folder.name, settings, methods.find(settings.method.name).trainable)


def command(run: Run, *words: str) -> str:
    """`ssl-dist ...` on this run, as one types it, between backticks."""
    return f"`{shlex.join(['ssl-dist', words[0], str(run.folder), *words[1:]])}`"


def training(run: Run) -> str:
    return f"`{shlex.join(['ssl-dist', 'train', str(run.folder / 'config.yaml')])}`"


def _read_data(run: Run) -> None:
    """What dataset.json says; a data set that is at another place now, or on another machine, is passed over."""
    with contextlib.suppress(UserError):
        dataset = manifest.load(run.config.data.root)
        if run.config.data.name not in (None, dataset.name):
            return
        run.uses = dataset.uses
        run.labelled = {split: record.labelled for split, record in dataset.splits.items()}
        for split, record in dataset.splits.items():
            if record.skipped:
                were = "was" if len(record.skipped) == 1 else "were"
                images, place = count(record.skipped, "image"), f"{run.config.data.root}/{manifest.FILE}"
                text = f"{images} could not be read and {were} left out by convert --skip-damaged; {place} names them."
                run.note("title", f"Of split {split}, {text}")


def _read_checkpoint(run: Run) -> None:
    try:
        newest_valid = checkpoint.newest_digest(run.folder)
    except UserError as error:
        run.note("title", f"No checkpoint can be used: {error}.")
        return
    if newest_valid is None:
        run.note("title", f"There is no checkpoint yet; {training(run)} makes one.")
        return
    run.checkpoint, run.digest = newest_valid[0].name, newest_valid[1]
    newer = [step for step in checkpoint.steps(run.folder) if step > checkpoint.step_of(run.checkpoint)]
    if newer:
        run.note("title", f"A newer checkpoint, of step {newer[-1]:,}, is damaged and passed over.")


def _read_metrics(run: Run) -> None:
    if not run.trains:
        run.note("curves", f"{run.config.method.name} does not train: there is nothing to plot.")
        return
    path = run.folder / "metrics.jsonl"
    try:
        run.lines, faulty = read_metrics(path)
    except OSError as error:
        run.note("curves", f"metrics.jsonl cannot be read: {error.strerror}.")
        return
    if faulty:
        verb = "is" if len(faulty) == 1 else "are"
        run.note("curves", f"{count(faulty, 'line')} of metrics.jsonl cannot be read and {verb} left out: line "
                 f"{', '.join(map(str, faulty[:5]))}{', ...' if len(faulty) > 5 else ''}.")  # fmt: skip
    if not run.lines:
        every = run.config.log.every_steps
        run.note("curves", f"No step is logged yet; {training(run)} begins, and logs every {every} steps.")


def _read_results(run: Run) -> None:
    try:
        records = results.read(run.folder / "results.json")
    except UserError as error:
        run.note("results", f"{error}.")
        return
    run.records = newest(records)
    if not run.records:
        run.note("results", f"Nothing is measured yet; {run.evaluation(['knn', 'logistic'])} does it.")
    older = {record["step"] for record in run.records if run.digest and record["checkpoint"] != run.digest}
    if older:
        steps = ", ".join(f"{step:,}" for step in sorted(older))
        run.note("results", f"Numbers marked with a step are of another checkpoint than the newest (of step {steps}); "
                 f"{run.evaluation(['knn', 'logistic'])} measures the newest.")  # fmt: skip


def _read_starts(run: Run) -> None:
    path = run.folder / "logs" / "starts.jsonl"
    with contextlib.suppress(OSError):  # what it says of versions and hosts is left out
        run.starts, _ = json_lines(path, lambda line: isinstance(line.get("versions"), dict))


def _read_views(run: Run) -> None:
    if not run.trains:
        run.note("views", f"{run.config.method.name} does not train: it makes no views.")
        return
    run.views = _readable(run, "views", sorted(run.folder.glob(VIEWS)))
    if not run.views:
        run.note("views", f"There is no picture of the views yet; {training(run)} draws it after its first step.")


def _read_figures(run: Run) -> None:
    drawn = _readable(run, "pictures", sorted((run.folder / "figures").glob("*.png")))
    run.figures = [picture for picture in drawn if run.digest is None or picture.checkpoint in (None, run.digest)]
    stale = [picture.name for picture in drawn if picture not in run.figures]
    drawing = [name for name in ("knn", "retrieval", "clusters", "embedding") if name in evaluators.names()]
    again = run.evaluation(drawing)
    if stale:
        run.note("pictures", f"Left out, being of another checkpoint: {', '.join(stale)}; {again} draws them anew.")
    elif not run.figures:
        run.note("pictures", f"There are no pictures yet; {again} draws some.")


def _read_evaluations(run: Run) -> None:
    for path in sorted((run.folder / "evaluations").glob("*/config.yaml")):
        try:
            evaluation = _open(path.parent)
        except UserError as error:
            run.note("evaluations", f"{error}.")
            continue
        _read_metrics(evaluation)
        run.evaluations.append(evaluation)


def _readable(run: Run, part: str, paths: Sequence[Path]) -> list[Picture]:
    readable = []
    for path in paths:
        try:
            readable.append(pictures.read(path))
        except UserError as error:
            run.note(part, f"{error}.")
    return readable


def seconds(run: Run) -> float:
    """Time that the training spent on its steps, as far as it was logged."""
    total, last = 0.0, 0
    for line in run.lines:
        time = line.get("seconds_per_step")
        if is_amount(time):
            total += (line["step"] - last) * time
            last = line["step"]
    return total
