"""`ssl-dist study`: make the runs of a study that are not complete, measure what is not measured, lay it all out.

What is complete is seen from the runs themselves, so a study that was stopped or killed goes on where it was, and a run
that was made by other means counts. One that was made of another config is refused before anything is trained.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from ssl_dist import results, torchrun
from ssl_dist.data.readers import Dataset
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.errors import UserError, quoted
from ssl_dist.evaluate.command import LAYER_KEY, evaluate
from ssl_dist.nn.features import OUTPUT
from ssl_dist.run import folder as run_folder
from ssl_dist.run.blueprint import RunPlan, derive
from ssl_dist.storage import checkpoint
from ssl_dist.study import page, spec
from ssl_dist.study.numbers import Number
from ssl_dist.study.spec import Measure, Training
from ssl_dist.train.loop import train


def run(path: Path, overrides: Sequence[str], ranks: int = 1, collect: bool = False, only: str | None = None) -> int:
    """Perform the study in the file. Returns the exit code: 0, that of a training which failed, or 75 when it was
    stopped. collect: only measure and lay out the runs that are complete. only: the name of one run, which is made and
    measured by the ranks that call this; nothing is laid out."""
    spec.check_ranks(ranks)
    study, trainings = spec.read(path, overrides)
    chosen = trainings if only is None else [spec.named(trainings, only)]
    for training in chosen:
        if checkpoint.steps(training.run):
            check_run(training, plan_of(training))
    if only is not None:
        return _complete_and_measure(chosen[0])[0]
    folder = Path(study.folder)
    found: list[Number] = []
    for place, training in enumerate(trainings, 1):
        print(f"== {place} of {len(trainings)}: {training.title} -> {training.run}", file=sys.stderr, flush=True)
        if not collect or is_complete(training):
            words = ["study", str(path), *overrides, "--only", training.name]
            code = 0 if ranks == 1 or is_over(training) else torchrun.run(ranks, words)
            numbers: list[Number] = []
            if not code:
                code, numbers = _complete_and_measure(training)
            if code:
                print(f"{training.run}: exit code {code}; the same command goes on", file=sys.stderr, flush=True)
                return code
            found += numbers
        page.write(folder, study, trainings, found)
    if not found:
        print("no run is complete yet", file=sys.stderr, flush=True)
    print((folder / "table.md").read_text(encoding="utf-8"))
    print(
        f"{folder}: table.md, .html, .csv, .tex, numbers.csv"
        + ("" if study.figure is None else ", figure.png, figure.svg")
    )
    return 0


def _complete_and_measure(training: Training) -> tuple[int, list[Number]]:
    """Train what is left and measure what is not measured; the exit code of what failed or was stopped, and the
    numbers."""
    numbers: list[Number] = []
    if not is_complete(training) and (code := train(training.config)):
        return code, numbers
    for measure in training.measures:
        code, number = measured(training, measure)
        if code:
            return code, numbers
        numbers.append(number)
    return 0, numbers


def plan_of(training: Training) -> RunPlan:
    return derive(training.config, RankInfo())


def check_run(training: Training, plan: RunPlan) -> None:
    """Raises `UserError` when the folder holds a run of another config, or one that was trained for longer: its newest
    checkpoint is measured. plan: of the training."""
    run_folder.check(training.run, plan.config, "give the study another folder, or restore these values")
    newest, last = max(checkpoint.steps(training.run), default=0), plan.clock().total_steps
    if newest > last:
        raise UserError(
            f"run_dir = {quoted(str(training.run))}: holds a run of {newest:,} steps, and this study trains {last:,}; "
            "give the study another folder, or train as long there"
        )


def is_complete(training: Training) -> bool:
    """Whether the run's newest checkpoint is of its last step."""
    steps = checkpoint.steps(training.run)
    return bool(steps) and steps[-1] >= plan_of(training).clock().total_steps


def is_over(training: Training) -> bool:
    """Whether the run is complete and, by what results.json tells of its last step, measured."""
    return is_complete(training) and all(is_recorded(training, measure) for measure in training.measures)


def is_recorded(training: Training, measure: Measure) -> bool:
    """Whether results.json has a number of this name, of the newest checkpoint, the measure's data set and layer. Which
    options it was measured with, `evaluate` compares."""
    newest = checkpoint.steps(training.run)[-1:]
    wanted = (measure.result, _measured_on(training, measure), measure.overrides.get(LAYER_KEY, OUTPUT), newest)
    records = results.read(training.run / "results.json")
    return any((record["name"], record["dataset"], record["layer"], [record["step"]]) == wanted for record in records)


def _measured_on(training: Training, measure: Measure) -> str:
    """The name of the data set, which dataset.json tells where the settings do not."""
    data, other = training.config.data, measure.overrides
    name = other.get("data.name", None if "data.root" in other else data.name)
    return str(name or Dataset(str(other.get("data.root", data.root))).name)


def measured(training: Training, measure: Measure) -> tuple[int, Number]:
    """The number of a run, which is measured unless results.json has it. Raises `UserError` where the evaluator gives
    no such result."""
    code, records = evaluate(training.run, [measure.evaluator], spec.words(measure.overrides))
    by_name = {record["name"]: record for record in records}
    if code == 0 and measure.result not in by_name:
        raise UserError(
            f"measures: {measure.evaluator} gives no {measure.result}, but {', '.join(by_name)}; name one of these"
        )
    record = by_name.get(measure.result, {})
    epochs = record.get("step", 0) / plan_of(training).order.steps_per_epoch
    return code, Number(training, measure, record, epochs)
