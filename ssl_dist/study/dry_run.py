"""`ssl-dist study --dry-run`: the runs of a study, their steps and hours, also before any data set is converted."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ssl_dist import config, evaluators
from ssl_dist.config import Config, Section, to_tree
from ssl_dist.data import unconverted
from ssl_dist.data.readers import Dataset
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.evaluate import command as evaluate
from ssl_dist.run.blueprint import RunPlan, derive
from ssl_dist.storage import checkpoint
from ssl_dist.study import spec
from ssl_dist.study.command import check_run, is_recorded
from ssl_dist.study.spec import Measure, Training
from ssl_dist.train import operations, roofline
from ssl_dist.transfer.recipe import Recipe, config_tree


def describe(path: Path, overrides: Sequence[str], ranks: int = 1, device: str | None = None) -> str:
    """A line for every run with its steps and what is left of them. device: a GPU that `explain --device` knows: how
    long the trainings that are left take on `ranks` of it, those of the runs and those on top of their backbones.
    Raises `UserError` where a folder holds another run, as `command.run` does."""
    spec.check_ranks(ranks)
    _, trainings = spec.read(path, overrides)
    costs = None if device is None else Costs(roofline.named(device), ranks)
    lines, total, left = [], 0, 0
    steps_of: dict[str, int] = {}
    for training in trainings:
        alike, saved = _without_seed(training.config), checkpoint.steps(training.run)
        if saved or alike not in steps_of:
            plan = plan_of(training.config, RankInfo())
            check_run(training, plan)
            steps_of[alike] = plan.clock().total_steps
        steps = steps_of[alike]
        done = max(saved, default=0)
        total, left = total + steps, left + max(0, steps - done)
        state = "complete" if saved and done >= steps else f"{done:,} done" if done else "new"
        named = ", ".join(dict.fromkeys(measure.evaluator for measure in training.measures))
        text = f"{training.name}: {training.title}, {steps:,} steps, {state}; then {named}"
        lines.append(text if costs is None else text + costs.of(training, max(0, steps - done)))
    lines.append(f"{len(trainings)} runs, {total:,} steps, {left:,} of them left")
    if costs is not None:
        lines += costs.sums()
    return "\n".join([*lines, *_unconverted(trainings)])


def dataset_of(data: dict) -> Dataset:
    """The one that is converted, or what is published of it. data: of a config. Raises `UserError` where there is
    neither."""
    place = data["root"], data["name"], data["reader"]
    return unconverted.find(place[1], place[0], place[2]) or Dataset(*place)


def plan_of(settings: Config, rank_info: RankInfo) -> RunPlan:
    """Also where the data set is not converted."""
    return derive(settings, rank_info, dataset_of(to_tree(settings.data)))


@dataclass
class Costs:
    """Seconds on `ranks` GPUs, summed up: of the runs' trainings, named "", and of those of evaluators, by their names.
    uncounted: what of the measures is not in it."""

    gpu: roofline.Device
    ranks: int
    seconds: dict[str, float] = field(default_factory=dict)
    uncounted: dict[str, None] = field(default_factory=dict)
    _of_step: dict[str, tuple[float, int]] = field(default_factory=dict)  # by the config without its seed and folder

    def of(self, training: Training, steps: int) -> str:
        """Add the steps and what is not measured of a run; the hours of it as the end of a line."""
        seconds = {"": steps * self._step(training.config)[0]} if steps else {}
        for measure in training.measures:
            if steps or not is_recorded(training, measure):
                of_measure = self._measure(training, measure)
                if of_measure is not None:
                    seconds[measure.evaluator] = seconds.get(measure.evaluator, 0.0) + of_measure
        for name, of_name in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + of_name
        parts = [f"{name} {_time(of_name)}".strip() for name, of_name in seconds.items()]
        return f"; about {', '.join(parts)}" if parts else ""

    def sums(self) -> list[str]:
        parts = [f"{_time(seconds)} of {name or 'trainings'}" for name, seconds in self.seconds.items()]
        total = f"about {_time(sum(self.seconds.values()))}, one after the other, on {self.ranks} x {self.gpu.name}"
        not_counted = ["the test of what was trained", *self.uncounted]
        return [f"{total}: {', '.join(parts)}; {self.gpu.basis}", f"not counted: {', '.join(not_counted)}"]

    def _measure(self, training: Training, measure: Measure) -> float | None:
        """Of the training that the evaluator does; None: it does none, or its images are not known."""
        request = evaluate.parse([measure.evaluator], spec.words(measure.overrides))
        module = evaluators.find(measure.evaluator)
        if not hasattr(module, "training"):
            self.uncounted[measure.evaluator] = None
            return None
        if isinstance(request.subset, str) and not Path(request.subset).is_file():
            self.uncounted[f"{measure.evaluator} on {request.subset}, which is not there"] = None
            return None
        method, recipe = module.training(request.options[measure.evaluator])
        return self._of_recipe(training.config, request, method, recipe)

    def _of_recipe(self, run: Config, request: evaluate.EvalRequest, method: str, recipe: Recipe) -> float:
        run = config.overridden(to_tree(run), evaluate.transform_of(request.data))
        data = {key: request.data.get(f"data.{key}", value) for key, value in to_tree(run.data).items()}
        dataset = dataset_of(data)
        subset = to_tree(request.subset) if isinstance(request.subset, Section) else request.subset
        images: dict[str, object] = {"name": dataset.name, "root": dataset.root, "reader": dataset.reader}
        images |= {"split": dataset.uses.training, "subset": subset}
        settings = config.validate(Config, config_tree(run, images, Path("x"), method, recipe))
        seconds, steps = self._step(settings)
        return seconds * steps

    def _step(self, settings: Config) -> tuple[float, int]:
        """Seconds of a step, and how many a training has."""
        alike = _without_seed(settings)
        if alike not in self._of_step:
            plan = plan_of(settings, RankInfo(0, self.ranks, 0, self.ranks))
            seconds = roofline.estimate(operations.count(plan, self.gpu.kind), plan, self.gpu).step
            self._of_step[alike] = seconds, plan.clock().total_steps
        return self._of_step[alike]


def _without_seed(settings: Config) -> str:
    """What runs of several seeds have in common."""
    return config.dump(settings.model_copy(update={"seed": 0, "run_dir": "x"}))


def _time(seconds: float) -> str:
    """In hours, minutes or seconds."""
    size, unit = next((size, unit) for size, unit in ((3600, "h"), (60, "min"), (0, "s")) if seconds >= 1.5 * size)
    value = seconds / (size or 1)
    return f"{value:,.0f} {unit}" if value >= 10 else f"{value:.2g} {unit}"


def _unconverted(trainings: Sequence[Training]) -> list[str]:
    """A line for every data set that is not converted."""
    lines = {}
    for training in trainings:
        data = to_tree(training.config.data)
        for other in ({}, *(measure.overrides for measure in training.measures)):
            root, name = (other.get(f"data.{key}", data[key]) for key in ("root", "name"))
            dataset = unconverted.find(name, root, data["reader"])
            if dataset is not None:
                sizes = dataset.sizes
                splits = ", ".join(f"{split} {count:,}" for split, count in sizes.splits.items())
                lines[root] = (
                    f"{name} is not converted here ({root}): {splits} images of {sizes.width}x{sizes.height} in "
                    f"{sizes.classes:,} classes, as published ({sizes.source})"
                )
    return list(lines.values())
