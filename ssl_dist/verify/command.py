"""`ssl-dist verify`: the equality certificate. Real steps on several processes and grids against one process.

The training loop, the loader, the augmentations and BatchNorm are those of a run. Loss, gradients, buffers and weights
of every rank are compared with one process; `verify_ranks.difference` is the measure. In float64 loss and gradients are
compared at every step, buffers and weights at the end. In float32 only the first step is: Adam divides a gradient by
its own size, so rounding noise of a gradient near 0 moves a weight as far as a signal does.

On GPUs all of them, one process too, are compared with one process on the CPU in float64. Ranks share GPUs where these
are fewer: their collectives go by gloo.
"""

import json
import os
import sys
import tempfile
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from ssl_dist import config, methods, text_table
from ssl_dist.config import Config, Section, shipped
from ssl_dist.convert.command import convert
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.errors import NotInstalled, UserError, quoted
from ssl_dist.grid import Grid, splits
from ssl_dist.run.blueprint import RunPlan, derive
from ssl_dist.verify import ranks as verify_ranks
from ssl_dist.verify.ranks import GridTraining

WORLD_SIZES = (2, 4)
STEPS = 10  # in float64; in float32 one
BATCH_SIZE = 16  # images: small, and every grid divides it
NUM_VIEWS = 4
CONFIGS = shipped.CONFIGS / "digits"
KINDS = ("loss", "head", "deep", "buffers", "weights")  # head, deep: gradients outside and inside the backbone
BOUNDS = {
    "fp64": dict.fromkeys(KINDS, 1e-9),
    "fp32": {"loss": 1e-5, "head": 1e-5, "deep": 1e-2},
}
# Of a GPU from the CPU in float64: here fp32 has all of its rounding, not only that of another order of sums.
CUDA_BOUNDS = {
    "fp64": dict.fromkeys(KINDS, 1e-9),
    "fp32": {"loss": 1e-4, "head": 1e-3, "deep": 1e-1},
}
OWN_KEYS = ("precision", "run_dir", "optim.epochs", "optim.steps", "log.every_steps", "data.view_shards")
LEGEND = """\
Each figure is the largest of all ranks and steps. A tensor differs by max|a-b| / max|b| in fp64. In fp32, where the
first step is compared, by |a-b| / |b| in the 2-norm: a unit within rounding of 0 falls to the other side of its ReLU.
|b| counts as no less than 1/1000 of the largest of its kind. head, deep: gradients outside and inside the backbone.
Buffers that are integers must be equal."""


@dataclass(frozen=True)
class VerifyCase:
    """A method with one choice of its options, in one precision. grids: of every number of ranks; note: its config."""

    method: str
    variant: str
    config: Config
    trains: bool
    note: str
    grids: dict[int, list[Grid]]
    device: str = "cpu"

    @property
    def title(self) -> str:
        return f"{self.method} {self.variant} {self.config.precision}"

    @property
    def bounds(self) -> dict[str, float]:
        bounds = (CUDA_BOUNDS if self.device == "cuda" else BOUNDS)[self.config.precision]
        return bounds if self.trains else {kind: bounds[kind] for kind in ("buffers", "weights")}

    def reference(self, pages: Path) -> GridTraining:
        """One process on the CPU, which writes the pages."""
        precision = "fp64" if self.device == "cuda" else self.config.precision
        settings = self.config.model_copy(update={"precision": precision})
        return GridTraining(f"{self.title} on one process", settings, pages, "cpu", writes=True)

    def on_grid(self, grid: Grid, pages: Path) -> GridTraining:
        data = self.config.data.model_copy(update={"view_shards": grid.views})
        settings = self.config.model_copy(update={"data": data})
        return GridTraining(f"{self.title} {grid}", settings, pages, self.device, writes=False)


@dataclass(frozen=True)
class Row:
    """What a case on a grid of ranks differs by from one process, kind of tensors -> figure."""

    case: VerifyCase
    grid: Grid
    figures: dict[str, float]

    @property
    def holds(self) -> bool:
        return all(self.figures[kind] <= bound for kind, bound in self.case.bounds.items())


def verify(
    file: str | None = None,
    names: Sequence[str] = (),
    overrides: Sequence[str] = (),
    steps: int = STEPS,
    device: str = "cpu",
) -> int:
    """Certify the method of a config file, or the named ones (default: all), and print the table. device: cpu or cuda.
    Returns 0 when every bound holds, else 1."""
    if file is not None and names:
        raise UserError(f"verify: give a config ({file}) or --method {names[0]}, not both")
    if steps < 1:
        raise UserError(f"--steps {steps}: at least one step is needed")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU is visible here; leave it out")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of the ranks; see launch/torchrun_multi.sh
    with tempfile.TemporaryDirectory(prefix="ssl_dist-verify-") as folder:
        chosen = [replace(c, device=device) for c in cases(Path(folder), file, names, overrides, steps)]
        rows = certify(chosen, Path(folder))
    good = sum(row.holds for row in rows)
    print(table(rows))
    print(LEGEND)
    print("\n".join(dict.fromkeys(case.note for case in chosen)))
    bounds = CUDA_BOUNDS if device == "cuda" else BOUNDS
    print("bounds: " + "; ".join(f"{precision} {_describe_bounds(of_kinds)}" for precision, of_kinds in bounds.items()))
    print(f"{good} of {len(rows)} hold" + ("" if good == len(rows) else f", {len(rows) - good} DIFFERENT"))
    return 0 if good == len(rows) else 1


def certify(
    chosen: list[VerifyCase],
    folder: Path,
    prepare: Callable[[], None] | None = None,
    sizes: Sequence[int] = WORLD_SIZES,
) -> list[Row]:
    """Run the cases on one process, then on `sizes` ranks (on GPUs on one, too); the rows of the first case come first.

    Every rank calls `prepare` first. The tensors of one process are kept in `folder`.
    """
    rows: list[list[Row]] = [[] for _ in chosen]
    verify_ranks.run(1, [case.reference(folder / f"pages-{i}") for i, case in enumerate(chosen)], prepare)
    for size in (1, *sizes):
        places = [
            (number, grid)
            for number, case in enumerate(chosen)
            if size > 1 or case.device == "cuda"
            for grid in case.grids[size]
        ]
        if not places:
            continue
        trainings = [chosen[number].on_grid(grid, folder / f"pages-{number}") for number, grid in places]
        for (number, grid), figures in zip(places, verify_ranks.run(size, trainings, prepare), strict=True):
            worst = {kind: max(figures[kind]) for kind in chosen[number].bounds}
            rows[number].append(Row(chosen[number], grid, worst))
    return [row for group in rows for row in group]


def cases(
    folder: Path, file: str | None = None, names: Sequence[str] = (), overrides: Sequence[str] = (), steps: int = STEPS
) -> Iterator[VerifyCase]:
    """Every variant of the method of a config file, or of the named methods (default: all), in every precision.

    Without a file the method's config for digits is taken, the checkout's or one made here, and digits are converted.
    Of all methods those are left out, and it is said, whose backbone is of a package that is not installed.
    """
    for override in overrides:
        key = override.partition("=")[0]
        if key in OWN_KEYS:
            raise UserError(f"override {quoted(override)}: verify sets {key} itself (--steps for the number of steps)")
    if file is not None:
        yield from _cases(file, str(file), [], overrides, steps)
        return
    for name in names:
        methods.find(name)
    convert("digits", None, folder / "digits", workers=1, progress=False)
    digits = ["data.name=digits", f"data.root={folder / 'digits'}", "data.reader=arrays"]
    for name in names or methods.names():
        path = shipped.of_method(name, CONFIGS)
        origin = "a config of verify's own (digits, adam)" if path is None else f"configs/digits/{path.name}"
        if path is None:
            path = folder / f"{name}.yaml"
            tree = {"run_dir": "none", "data": {"name": "digits", "root": "none"}, "method": {"name": name}}
            path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        try:
            yield from _cases(path, origin, digits, overrides, steps)
        except NotInstalled as error:
            if names:
                raise
            print(f"{name} is left out: {error}", file=sys.stderr, flush=True)


def _cases(
    path: str | Path, origin: str, data: list[str], overrides: Sequence[str], steps: int
) -> Iterator[VerifyCase]:
    quick = [*data, f"optim.batch_size={BATCH_SIZE}", "data.workers=1", "compile=false"]
    base = config.load(path, [*quick, *overrides])
    name, method = base.method.name, methods.find(base.method.name)
    if method.free_views and len(base.views.groups) == 1 and base.views.groups[0].num is None:
        quick.append(f"views.num={NUM_VIEWS}")
    quick.append(f"data.limit={base.optim.batch_size * 5 // 2}")  # two steps an epoch and a tail that is dropped
    own = ["run_dir=none", "data.view_shards=1", "optim.epochs=null", "log.every_steps=1"]
    for variant, choice in variants(methods.build_options(method, base.method.options)):
        for precision, length in [("fp64", steps), ("fp32", 1)] if method.trainable else [("fp64", steps)]:
            last = [*own, *choice, f"precision={precision}", f"optim.steps={length}"]
            settings = config.load(path, [*quick, *overrides, *last])
            plan = derive(settings, RankInfo())
            grids = _grids(plan)
            derive(settings, RankInfo(0, max(WORLD_SIZES), 0, max(WORLD_SIZES)))  # several ranks refuse more
            note = f"{name}: {origin}, {_describe(plan, steps)}"
            yield VerifyCase(name, variant, plan.config, method.trainable, note, grids)


def variants(options: Section) -> Iterator[tuple[str, list[str]]]:
    """The options as they are, then with every other value of every Literal, one at a time: name, overrides."""
    choices = {name: _alternatives(field.annotation) for name, field in type(options).model_fields.items()}
    chosen = {name: getattr(options, name) for name, values in choices.items() if values}
    yield ",".join(f"{name}={value}" for name, value in chosen.items()) or "-", []
    for name, current in chosen.items():
        for value in choices[name]:
            if value != current:
                yield f"{name}={value}", [f"method.options.{name}={json.dumps(value)}"]


def _alternatives(annotation: Any) -> list[Any]:
    """The values of a Literal, also inside `Literal[...] | None`; none for other types."""
    if typing.get_origin(annotation) is Literal:
        return list(typing.get_args(annotation))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        values = [value for part in typing.get_args(annotation) for value in _alternatives(part)]
        return [*values, None] if values and type(None) in typing.get_args(annotation) else values
    return []


def _grids(plan: RunPlan) -> dict[int, list[Grid]]:
    """Every grid of every number of ranks. All of these numbers must be able to share the batch."""
    batch, groups = plan.config.optim.batch_size, [spec.num for spec in plan.specs]
    grids = {size: splits(size, batch, groups, plan.method_class.free_views) for size in (1, *WORLD_SIZES)}
    if batch % max(WORLD_SIZES):
        raise UserError(f"optim.batch_size = {batch}: {max(WORLD_SIZES)} ranks cannot share it; give a multiple of 4")
    return grids


def _describe(plan: RunPlan, steps: int) -> str:
    batch, method = plan.config.optim.batch_size, plan.method_class
    taken = f"{steps} steps (fp32: 1) of {batch} images x {plan.num_views} views" if method.trainable else "no step"
    together = "" if method.free_views else "; views are not sharded"
    return f"{plan.config.backbone.name}; takes {taken}{together}"


def _describe_bounds(bounds: dict[str, float]) -> str:
    return ", ".join(f"{kind} {bound:g}" for kind, bound in bounds.items())


def table(rows: list[Row]) -> str:
    """One line a row; - for what has no bound."""
    head = ["method", "variant", "precision", "grid", *KINDS, ""]
    lines = [head] + [
        [
            row.case.method, row.case.variant, row.case.config.precision, str(row.grid),
            *(f"{row.figures[kind]:.1e}" if kind in row.figures else "-" for kind in KINDS),
            "equal" if row.holds else "DIFFERENT",
        ]
        for row in rows
    ]  # fmt: skip
    return "\n".join(text_table.aligned(lines))
