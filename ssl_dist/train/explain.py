"""`ssl-dist explain`: what a config will do, on any number of ranks, without starting anything.

Memory is counted, not guessed: forward and backward of the backbone run on torch's meta device, where tensors have a
size but no bytes, and the largest sum of tensors alive at once is taken. Python, libraries and what an allocator keeps
unused come on top. On a CPU, the ranks of six trainings had 1.00 to 1.07 times in use of what is counted, and those of
a seventh, where the loss holds most beside a small network, 1.11 times: tools/bench_all.py --only bench_memory
"""

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ssl_dist.config import Config
from ssl_dist.data.loader import AHEAD
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.errors import UserError
from ssl_dist.grid import Grid, splits
from ssl_dist.methods.base import Batch, SSLMethod
from ssl_dist.nn.shapes import without_values
from ssl_dist.run import folder as run_folder
from ssl_dist.run.blueprint import RunPlan, derive
from ssl_dist.storage import checkpoint
from ssl_dist.train import advice, online_knn, online_probe, operations, optim, roofline
from ssl_dist.train.held_out import HeldOutImages
from ssl_dist.train.operations import Step
from ssl_dist.train.roofline import Device


def explain(
    config: Config,
    world_size: int,
    ranks_per_node: int | None = None,
    device: str | None = None,
    rates: Path | None = None,
) -> str:
    """A text of `name: value` lines. device: cpu, cuda, or a GPU that roofline.py has rates of; None: what this machine
    has. rates: of a CPU, a file of tools/bench_rates.py. Raises `UserError` for everything that could not run."""
    timed: Device | None = None
    if rates is not None:
        timed = roofline.read_rates(rates)
        if device not in (None, timed.kind):
            raise UserError(f"--rates {rates}: has rates of a {timed.kind}; leave out --device {device}")
    elif device not in (None, "cpu", "cuda"):
        timed = roofline.named(device)
    if timed is not None:
        device = timed.kind
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    rank_info = RankInfo(0, world_size, 0, ranks_per_node or world_size)
    plan = derive(config, rank_info)
    run_folder.check(plan.run, plan.config)
    memory = Memory.of(plan, device)
    of_method = _on_meta(plan).explain(world_size, device)
    lines = _data(plan) | _grid(plan, memory) | of_method | _training(plan) | _memory(memory)
    if plan.method_class.trainable:
        lines |= _time(plan, operations.count(plan, device), timed)
    steps = checkpoint.steps(plan.run)
    lines["run folder"] = f"{plan.run} ({f'resumes after step {steps[-1]}' if steps else 'new'})"
    if doubts := advice.warnings(plan, on_this_cpu=device == "cpu" and timed is None):
        lines["warnings" if len(doubts) > 1 else "warning"] = "\n".join(doubts)
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {text}".replace("\n", "\n" + " " * (width + 2)) for name, text in lines.items())


def _data(plan: RunPlan) -> dict[str, str]:
    split, used = plan.split, len(plan.order.train_ids)
    part = "" if used == split.count else f", {used} of them used"
    classes = f"{len(split.classes)} classes" if split.labelled else "no labels"
    stored, largest = max(split.max_height, split.max_width), max(spec.size for spec in plan.specs)
    # An image of the converted set is never larger than --max-side was: larger views show no more than it has.
    enlarged = f", enlarged to views of {largest} px" if largest > stored else ""
    if skipped := plan.dataset.skipped(split.split):
        part += f" ({skipped} damaged ones left out by convert --skip-damaged, see {plan.dataset.root}/dataset.json)"
    mean, std = (" ".join(f"{v:.4g}" for v in values) for values in (plan.normalize.mean, plan.normalize.std))
    return {
        "data": f"{plan.config.data.name}, split {split.split}: {split.count} images{part}, {classes}, "
        f"stored with at most {split.max_height}x{split.max_width} px{enlarged}"
        + (f", {split.pixels}" if not split.pixels.is_rgb else ""),
        "normalisation": f"mean {mean}, std {std}",
        "reader": f"{plan.config.data.reader}, {plan.threads} view thread(s) a rank",
    }


def _grid(plan: RunPlan, memory: "Memory") -> dict[str, str]:
    grid, images = plan.grid, plan.config.optim.batch_size
    groups = " + ".join(f"{s.num} x {s.size} px" for s in plan.specs)
    views_per_rank = " + ".join(f"{s.num // grid.views} x {s.size} px" for s in plan.specs)
    return {
        "method": f"{plan.config.method.name} on {plan.config.backbone.name}",
        **(
            {"plugins": ", ".join(plugin.file for plugin in plan.config.plugins.values())}
            if plan.config.plugins
            else {}
        ),
        **({} if plan.initial_weights is None else {"weights": plan.initial_weights.note}),
        "views": f"{groups} of each image",
        "evaluated on": _evaluated(plan),
        "global batch": f"{images} images, {images * plan.num_views} views",
        "ranks": f"{grid.size} = {grid.images} image shard(s) x {grid.views} view shard(s)",
        "each rank": f"{images // grid.images} images, {views_per_rank} views of each",
        "who holds what": _who(grid) + _where(grid, plan.rank_info.local_world_size),
        "splits": _splits(plan, memory),
    }


def _evaluated(plan: RunPlan) -> str:
    data, share = plan.config.data, advice.seen(plan)
    cubic = ", bicubic" if data.eval_interpolation == "bicubic" else ""
    part = "all of a square image" if share == 1 else f"{100 * share:.0f} % of the area of a square image"
    size = data.image_size
    return f"shorter side to {data.eval_resize or size} px{cubic}, middle {size}x{size} px: {part}"


def _who(grid: Grid) -> str:
    if grid.size == 1:
        return "rank 0 holds everything"
    if grid.views == 1:
        return "no two ranks hold the same image"
    first = [f"{r}-{r + grid.views - 1}" for r in range(0, grid.size, grid.views)]
    if len(first) > 3:
        first[1:-1] = [first[1], "..."]
    return f"ranks {', '.join(first)} hold views of the same images"


def _where(grid: Grid, ranks_per_node: int) -> str:
    if grid.size == ranks_per_node:
        return ""
    nodes = f"; {grid.size // ranks_per_node} nodes of {ranks_per_node} ranks"
    if grid.views == 1:
        return nodes
    return f"{nodes}, view shards {'inside a node' if grid.inside(ranks_per_node) else 'spread over several nodes'}"


def _splits(plan: RunPlan, memory: "Memory") -> str:
    """Every split that divides, a line each: what data.view_shards can be. Views and the network's memory are the
    same for all; decoded images are fewer where a rank holds fewer of them."""
    images, ranks_per_node = plan.config.optim.batch_size, plan.rank_info.local_world_size
    groups = [spec.num for spec in plan.specs]
    rows = [f"{'data.view_shards':>16} {'Wi x Wv':>9} {'images':>7} {'views':>9} {'MiB':>9}  a rank"]
    for grid in splits(plan.rank_info.world_size, images, groups, plan.method_class.free_views):
        views = "+".join(str(num // grid.views) for num in groups)
        total = f"{_mib(memory.total(grid)):.1f}"
        notes = ["chosen"] * (grid == plan.grid) + ["over nodes"] * (not grid.inside(ranks_per_node))
        row = f"{grid.views:>16} {f'{grid.images} x {grid.views}':>9} {images // grid.images:>7} {views:>9} {total:>9}"
        rows.append(f"{row}  {', '.join(notes)}".rstrip())
    return "\n".join(rows)


def _training(plan: RunPlan) -> dict[str, str]:
    if not plan.method_class.trainable:
        return {"training": "none: the weights are written as they are drawn"}
    clock, options = plan.clock(), plan.config.optim
    last = clock.total_steps - 1
    points = {0, clock.total_steps // 4, clock.total_steps // 2, last}
    points.add(min(last, math.ceil(options.warmup_epochs * clock.steps_per_epoch)))
    if options.schedule == "step":
        points |= {min(last, step) for step in optim.milestones(options, clock)}
    rates = ", ".join(f"{optim.lr(options, plan.clock(step)):.3g} at step {step}" for step in sorted(points))
    lines = {
        "length": f"{clock.total_steps} steps = {clock.total_epochs:g} epochs of {clock.steps_per_epoch} steps",
        "optimizer": f"{options.name}, {options.schedule}, rate {rates}",
        "precision": plan.config.precision,
    }
    settings = plan.config.log
    if (every := settings.knn_every_epochs) is not None:
        lines["online kNN"] = f"every {every} epochs, {_held_out(online_knn.chosen_images(plan))}"
    if (every := settings.probe_every_epochs) is not None:
        of = _held_out(online_probe.chosen_images(plan))
        cost = f"in every step the network passes one view of the {plan.num_views} once more, forward alone"
        lines["online probe"] = f"every {every} epochs, {of}; {cost}"
    return lines


def _held_out(images: HeldOutImages) -> str:
    return f"on {images.num_queries} images held out of split {images.split}"


@dataclass(frozen=True)
class Memory:
    """What one rank holds, in bytes where not said otherwise; all but decoded images is the same for every split.

    On a GPU `waiting` and the decoded images lie in the host's memory, the rest on the device. Of the loss only the
    representations are counted: what a method does with them is its own."""

    plan: RunPlan
    parameters: int  # numbers in the backbone
    feature_dim: int
    weights: int  # those trained with gradients, optimizer state and, on several ranks, buckets that average gradients
    waiting: int  # views as pixels: of the batches made ahead or in the making, and of this step's batch
    inputs: int  # this step's views as numbers
    activations: int  # of the backbone, with the gradients in flight, at their largest
    representations: int  # of all ranks, and their gradient

    @staticmethod
    def of(plan: RunPlan, device: str) -> "Memory":
        """device: cpu or cuda, which keep different maps for the backward pass."""
        element, images, trainable = plan.dtype.itemsize, plan.config.optim.batch_size, plan.method_class.trainable
        method = _on_meta(plan)
        everything = sum(p.numel() for p in method.parameters())
        trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
        name = plan.config.optim.name
        copies = 4 if name in ("adam", "adamw") else 3 if name == "lars" or plan.config.optim.momentum else 2
        copies += plan.rank_info.world_size > 1
        probe = 4 * plan.info.num_classes * method.info.feature_dim * (plan.config.log.probe_every_epochs is not None)
        levels = plan.split.pixels.channels * sum(images * spec.num * spec.size**2 for spec in plan.specs)
        levels //= plan.rank_info.world_size
        return Memory(
            plan=plan,
            parameters=sum(p.numel() for p in method.backbone.parameters()),
            feature_dim=method.info.feature_dim,
            weights=(everything + (copies - 1) * trained * trainable + probe * trainable) * element,
            waiting=(AHEAD + 1) * levels * plan.split.pixels.bits // 8 if trainable else 0,
            inputs=levels * element if trainable else 0,
            activations=_peak(plan, method, device) if trainable else 0,
            representations=2 * images * plan.num_views * method.info.feature_dim * element if trainable else 0,
        )

    def decoded(self, grid: Grid) -> int:
        """Two batches of images as the reader hands them over, padded to the largest: one is replaced by the next."""
        plan = self.plan
        images = plan.config.optim.batch_size // grid.images if plan.method_class.trainable else 0
        return 2 * images * plan.split.max_height * plan.split.max_width * plan.split.pixels.num_bytes

    def parts(self, grid: Grid) -> dict[str, int]:
        return {
            "weights, gradients, optimizer": self.weights,
            "decoded images": self.decoded(grid),
            "waiting views": self.waiting,
            "input": self.inputs,
            "activations": self.activations,
            "representations": self.representations,
        }

    def total(self, grid: Grid) -> int:
        return sum(self.parts(grid).values())


def _on_meta(plan: RunPlan) -> SSLMethod[Any]:
    with without_values():
        return plan.build()


def _peak(plan: RunPlan, method: SSLMethod[Any], device: str) -> int:
    """The most that forward and backward of the backbone hold at once on this rank, beside weights and input."""
    method.train()
    if device == "cpu":
        operations.with_stand_ins(method, device)
    half = plan.config.precision in ("bf16", "fp16")
    if half:  # under autocast the layers put out 16 bits; their float32 weights are counted elsewhere
        method.bfloat16()
    for parameter in method.parameters():  # and so are their gradients
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    num_images = plan.config.optim.batch_size // plan.grid.images
    if not method.views_together or min(spec.num for spec in plan.specs) == plan.grid.views:
        num_images = max(2, num_images)  # a BatchNorm that knows of no other rank refuses a single value
    shapes = [
        (spec.num // plan.grid.views, num_images, plan.split.pixels.channels, spec.size, spec.size)
        for spec in plan.specs
    ]
    views = [
        torch.empty((k * m, *pixels), dtype=plan.dtype, device="meta", memory_format=torch.channels_last).unflatten(
            0, (k, m)
        )
        for k, m, *pixels in shapes
    ]
    view_ids = [
        torch.from_numpy(spec.view_ids[: shape[0]].copy()) for spec, shape in zip(plan.specs, shapes, strict=True)
    ]
    ids = torch.arange(num_images)
    with Alive([*method.parameters(), *method.buffers(), *views]) as alive:
        passed = [group.bfloat16() if half else group for group in views]
        z = method.outputs(Batch(passed, view_ids, ids, torch.full_like(ids, -1), ids))
        torch.autograd.backward(z, [torch.empty_like(part) for part in z])
    return alive.peak


class Alive(TorchDispatchMode):
    """Counts the bytes of the live tensors that operations have created.

    Tensors that share a storage count once; those in `uncounted` do not count."""

    def __init__(self, uncounted: list[Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self._uncounted = {t.untyped_storage()._cdata for t in uncounted}
        self._held: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        outputs = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor):
                self._hold(tensor.untyped_storage())
        return outputs

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._uncounted or key in self._held:
            return

        def gone(_: object) -> None:
            self.now -= num_bytes
            del self._held[key]

        self._held[key] = weakref.ref(storage, gone)
        self.now += num_bytes
        self.peak = max(self.peak, self.now)


def _memory(memory: Memory) -> dict[str, str]:
    grid = memory.plan.grid
    text = ", ".join(f"{name} {_mib(num_bytes):.1f}" for name, num_bytes in memory.parts(grid).items())
    return {
        "backbone": f"{memory.parameters:,} parameters, {memory.feature_dim} features",
        "memory a rank": f"about {_mib(memory.total(grid)):.1f} MiB, the allocator's slack not counted:\n{text}",
    }


def _time(plan: RunPlan, step: Step, device: Device | None) -> dict[str, str]:
    """Work and communication of a step on one rank, and how long they take on a device whose rates are known."""
    moved = f"{step.num_bytes / 1e6:.4g} MB read and written"
    work = f"a rank: {step.flops / 1e9:.4g} GFLOP, {moved}, {len(step.operations)} operations"
    lines = {"work of a step": work, "communication": _communication(step)}
    if device is None:
        names = ", ".join(roofline.read_table())
        return lines | {
            "time": f"for an estimate: --device {names}; or --rates FILE, of a CPU, by tools/bench_rates.py"
        }
    times, steps = roofline.estimate(step, plan, device), plan.clock().steps_per_epoch
    text = f"about {1e3 * times.step:.3g} ms a step, {_duration(steps * times.step)} an epoch, on {device.name}"
    parts = ", ".join(f"{name} {1e3 * seconds:.3g}" for name, seconds in times.parts(device).items())
    lines["time"] = f"{text}; bound by {times.bound}\nms: {parts}\n{device.basis}"
    return lines


def _communication(step: Step) -> str:
    if not step.collectives:
        return "none: one rank"
    sent: dict[str, float] = {}
    for collective in step.collectives:
        sent[collective.purpose] = sent.get(collective.purpose, 0.0) + collective.sent
    parts = ", ".join(f"{purpose} {num_bytes / 1e6:.3g}" for purpose, num_bytes in sent.items())
    return f"{sum(sent.values()) / 1e6:.3g} MB a step sent by a rank in {len(step.collectives)} collectives: {parts}"


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s"


def _mib(num_bytes: int) -> float:
    return num_bytes / 2**20
