"""`ssl-dist study`: make the runs of a study that are not complete, measure what is not measured, lay it all out.

What is complete is seen from the runs themselves, so a study that was stopped or killed goes on where it was, and a run
that was made by other means counts.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ssl_dist import config
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.errors import UserError
from ssl_dist.evaluate.command import evaluate
from ssl_dist.run.blueprint import RunPlan, derive
from ssl_dist.storage import checkpoint
from ssl_dist.storage.durable import atomic_write_or_refuse
from ssl_dist.study import page, spec
from ssl_dist.study.numbers import Number
from ssl_dist.study.spec import Measure, Training
from ssl_dist.train import operations, roofline
from ssl_dist.train.loop import train


def run(path: Path, overrides: Sequence[str], ranks: int = 1, collect: bool = False, only: str | None = None) -> int:
    """Perform the study in the file. Returns the exit code: 0, that of a training which failed, or 75 when it was
    stopped. collect: only measure and lay out the runs that are complete. only: the name of one run, which is made and
    measured by the ranks that call this; nothing is laid out."""
    study, trainings = spec.read(path, overrides)
    if only is not None:
        return _complete_and_measure(spec.named(trainings, only), 1)[0]
    folder = Path(study.folder)
    found: list[Number] = []
    for place, training in enumerate(trainings, 1):
        print(f"== {place} of {len(trainings)}: {training.title} -> {training.run}", file=sys.stderr, flush=True)
        if not collect or is_complete(training):
            code, numbers = _complete_and_measure(training, ranks)
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


def _complete_and_measure(training: Training, ranks: int) -> tuple[int, list[Number]]:
    """Train what is left and measure what is not measured; the exit code of what failed or was stopped, and the
    numbers."""
    numbers: list[Number] = []
    if not is_complete(training) and (code := _train(training, ranks)):
        return code, numbers
    for measure in training.measures:
        code, number = measured(training, measure)
        if code:
            return code, numbers
        numbers.append(number)
    return 0, numbers


def plan_of(training: Training) -> RunPlan:
    return derive(training.config, RankInfo())


def is_complete(training: Training) -> bool:
    """Whether the run's newest checkpoint is of its last step."""
    steps = checkpoint.steps(training.run)
    return bool(steps) and steps[-1] >= plan_of(training).clock().total_steps


def _train(training: Training, ranks: int) -> int:
    if ranks == 1:
        return train(training.config)
    path = training.run.with_name(training.name + ".yaml")
    with atomic_write_or_refuse(path) as file:
        file.write(config.dump(training.config).encode())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"]
    return subprocess.run([*command, "ssl_dist", "train", str(path)], env=os.environ, check=False).returncode


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


def describe(path: Path, overrides: Sequence[str], ranks: int = 1, device: str | None = None) -> str:
    """`ssl-dist study --dry-run`: a line for every run with its steps and what is left of them. device: a GPU that
    `explain --device` knows: how long the steps that are left take on `ranks` of it, evaluations not counted."""
    _, trainings = spec.read(path, overrides)
    gpu = None if device is None else roofline.named(device)
    seconds_of: dict[str, float] = {}  # a step, by the config without its seed
    lines, total, left, seconds = [], 0, 0, 0.0
    for training in trainings:
        clock = plan_of(training).clock()
        done = max(checkpoint.steps(training.run), default=0)
        remaining = max(0, clock.total_steps - done)
        total, left = total + clock.total_steps, left + remaining
        state = "complete" if is_complete(training) else f"{done:,} done" if done else "new"
        evaluators = ", ".join(dict.fromkeys(measure.evaluator for measure in training.measures))
        text = f"{training.name}: {training.title}, {clock.total_steps:,} steps, {state}; then {evaluators}"
        if gpu is not None and remaining:
            alike = config.dump(training.config.model_copy(update={"seed": 0, "run_dir": "x"}))
            if alike not in seconds_of:
                plan = derive(training.config, RankInfo(0, ranks, 0, ranks))
                seconds_of[alike] = roofline.estimate(operations.count(plan, gpu.kind), plan, gpu).step
            seconds += remaining * seconds_of[alike]
            text += f"; about {remaining * seconds_of[alike] / 3600:.2g} h"
        lines.append(text)
    lines.append(f"{len(trainings)} runs, {total:,} steps, {left:,} of them left")
    if gpu is not None:
        lines.append(
            f"about {seconds / 3600:.3g} h of trainings, one after the other, on {ranks} x {gpu.name}; {gpu.basis}"
        )
    return "\n".join(lines)
