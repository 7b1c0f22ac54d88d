"""The state of a training on one rank, which the loop in loop.py works on: a method, its optimizer and its clock."""

import contextlib
import dataclasses
import inspect
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ssl_dist import config
from ssl_dist.clock import Clock
from ssl_dist.data.loader import HostBatch, TrainLoader
from ssl_dist.data.normalize import normalized, pixels_of
from ssl_dist.device import HostCopy, Uploads, allow_tf32
from ssl_dist.distributed import watchdog
from ssl_dist.distributed import world as world_module
from ssl_dist.distributed.signals import StopRequest
from ssl_dist.errors import Fault, RaisedOn, UserError, quoted
from ssl_dist.grid import Grid
from ssl_dist.methods.base import Batch, Extract, Output, Rows
from ssl_dist.nn import compiled
from ssl_dist.run import board, filters
from ssl_dist.run import folder as run_folder
from ssl_dist.run.blueprint import RunPlan
from ssl_dist.run.log import RunLog
from ssl_dist.storage import checkpoint
from ssl_dist.train import collapse, optim, relabel
from ssl_dist.train.attention import AttentionPictures
from ssl_dist.train.listener import SILENT, Listener
from ssl_dist.train.online_measures import OnlineMeasures
from ssl_dist.views import shown

ANEW = "begin anew in another run_dir with a lower optim.lr or precision=fp32"

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
SCALARS, ROWS = "the metrics", "rows of the representations"  # beside the histograms' names, in one copy to the host


class TrainState:
    """A method, its optimizer and the steps completed, from the newest checkpoint in the run's folder where there is
    one. Building it writes nothing."""

    def __init__(self, plan: RunPlan, world: world_module.World, lock: int | None = None, listener: Listener = SILENT):
        """lock: the descriptor of the folder's lock, on rank 0; None: nobody else can write the folder."""
        self.plan, self.world, self.config, self._lock = plan, world, plan.config, lock
        self.folder, self._listener = plan.run, listener
        allow_tf32(self.config.tf32)
        torch.use_deterministic_algorithms(self.config.deterministic)
        method = plan.build()
        if self.config.deterministic and world.device.type == "cuda" and (obstacle := method.nondeterministic()):
            raise UserError(f"deterministic = true: {obstacle}, or deterministic=false")
        if plan.initial_weights is not None and world.is_rank0:
            print(f"backbone.weights: {plan.initial_weights.note}", file=sys.stderr, flush=True)
        if self.config.channels_last:
            method.to(memory_format=torch.channels_last)
        world.synchronize_batchnorm(method)
        self.method = method.to(world.device).train()
        self.columns = None if method.views_together else world.view_columns(self.method)
        self.optimizer = optim.build(self.config.optim, method.parameter_groups(), world.device, method.backbone)
        self.scaler = optim.LossScaler(world.device.type, enabled=self.config.precision == "fp16")
        self.online = OnlineMeasures(plan, world, method.info.feature_dim)
        self._attention = AttentionPictures(plan)
        self.clock = plan.clock(self._resume())
        if self.config.compile:
            compiled.compile_network(method.backbone)
        self.wrapped = world.wrap(self.method)
        self._unwritten: Callable[[], None] | None = None
        self.grad_norm: Tensor | None = None  # of the last step, before it was clipped
        self._upload = Uploads(world.device)
        self._normalize = normalized(plan.normalize, plan.dtype, world.device)

    def _resume(self) -> int:
        """Load the newest valid checkpoint, if there is one; returns the steps it has completed."""
        path = self.world.on_rank0(lambda: checkpoint.newest(self.folder))
        if path is None:
            return 0
        state = checkpoint.load(path)
        run_folder.check_checkpoint(path, config.validate(config.Config, state["config"], f"{path}: "), self.config)
        identity = self.plan.data_identity
        if state["data"].get("weights") != identity.get("weights"):
            raise UserError(
                f"backbone.weights = {quoted(self.config.backbone.weights)}: not the file that {path} began from; give "
                "that one, or another run_dir"
            )
        if state["data"] != identity:
            raise UserError(
                f"data.root = {quoted(self.config.data.root)}: not the images that {path} was trained on (another "
                "conversion or another data.subset file); give their folder, or another run_dir"
            )
        normalize = config.to_tree(self.plan.normalize)
        if state["normalize"] != normalize:
            raise UserError(
                f"views.normalize = {self.config.views.normalize!r}: is {normalize}, and {path} was trained with "
                f"{state['normalize']}; restore mean and std in {self.config.data.root}/dataset.json, or give another "
                "run_dir"
            )
        checkpoint.restore(self.method, state["method"], path)
        if self.method.trainable:
            checkpoint.restore_optimizer(self.optimizer, state["optimizer"], path)
        self.scaler.restore(state.get("loss_scale", {}))
        if self.online.probe is not None:
            self._resume_probe(state.get("probe"), path)
        return int(state["step"])

    def _resume_probe(self, state: dict[str, Any] | None, path: Path) -> None:
        assert self.online.probe is not None
        if state:
            self.online.probe.restore(state, path)
        elif self.world.is_rank0:
            print(f"log.probe_every_epochs: {path} holds no probe; it begins anew", file=sys.stderr, flush=True)

    def loader(self) -> TrainLoader:
        order, specs, world = self.plan.order, self.plan.specs, self.world
        pin = world.device.type == "cuda"
        reader = self.plan.open_reader()
        return TrainLoader(reader, order, specs, world.grid, world.rank_info.rank, self.plan.threads, pin)

    def log(self) -> contextlib.AbstractContextManager[RunLog | None]:
        """The run's log on rank 0, None elsewhere."""
        if not self.world.is_rank0:
            return contextlib.nullcontext()
        title = run_folder.title(self.folder)
        settings, about = run_folder.spelt_out(self.config), inspect.getdoc(self.plan.method_class.forward) or ""
        images, views, on_line = self.config.optim.batch_size, self.plan.num_views, self._listener.on_log
        return RunLog(self.folder, self.clock, title, images, views, settings, about, on_line)

    def batches(self, loader: TrainLoader, log: RunLog | None) -> Iterator[HostBatch]:
        """The batches that are left. The watchdog gets each step, the log the time waited for it."""
        state, iterator = self.world.state, loader.batches(self.clock.step, self.clock.total_steps)
        first_step = watchdog.COMPILE_TIMEOUT_S if self.config.compile else watchdog.FIRST_STEP_TIMEOUT_S
        state.phase, state.bound = "the first step", first_step
        for step in range(self.clock.step + 1, self.clock.total_steps + 1):
            state.step = step
            start = time.perf_counter()
            with state.phase_of("the wait for images", state.bound):
                host = next(iterator)
            if log is not None:
                log.waited(time.perf_counter() - start)
            yield host
            state.phase, state.bound = "", 0.0

    def autocast(self) -> torch.autocast:
        dtype = AUTOCAST.get(self.config.precision)
        return torch.autocast(self.world.device.type, dtype, enabled=dtype is not None)

    def to_device(self, host: HostBatch) -> Batch:
        """The batch on the device. A GPU copies it while it still works on the backward pass of the step before."""
        *views_by_group, (labels, positions) = self._upload([*host.views, host.labels_positions])
        views_by_group = [self._normalize(group) for group in views_by_group]
        return Batch(views_by_group, host.view_ids, host.image_ids, labels, positions, host.step)

    def forward(self, batch: Batch) -> Output:
        with self.autocast():
            output = self.wrapped(batch, self.world)
        if self.columns is not None:
            self.columns.settle(self.world.gather_columns)
        return output

    def backward(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()

    def update(self, frozen: Iterable[nn.Parameter] = ()) -> None:
        """One step of the optimizer, which passes over `frozen` parameters; in fp16 see `optim.LossScaler`."""
        self.scaler.unscale_(self.optimizer)
        for parameter in frozen:
            parameter.grad = None
        self.grad_norm = optim.clip(self.optimizer, self.config.optim)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def extract_at(self, clock: Clock) -> Extract:
        """The `extract` that a method's `before_step` gets; `relabel.outputs` says what it takes and returns."""

        def extract(network: nn.Module, augmented: bool = False, training: bool = False) -> Rows:
            with self.autocast():
                return relabel.outputs(self.plan, self.world, self._normalize, clock.step, network, augmented, training)

        return extract

    def write(self, log: RunLog | None, clock: Clock, output: Output) -> None:
        """Log this step. Every rank takes part, because the loss is averaged over them. The line is written by
        `flush_log`: what a GPU computes is on its way to the host until then."""
        loss = self.world.all_reduce_mean(output.loss.detach())
        if log is not None:
            self._unwritten = self._line(log, clock, loss, output)

    def _line(self, log: RunLog, clock: Clock, loss: Tensor, output: Output) -> Callable[[], None]:
        """What writes the line of a step."""
        # of the step just taken; a group may have a factor of its own, or one rate throughout
        rate = optim.lr(self.config.optim, dataclasses.replace(clock, step=clock.step - 1))
        metrics = {"loss": loss, "lr": rate, **output.metrics}
        if self.grad_norm is not None:
            metrics["grad_norm"] = self.grad_norm
        if self.scaler.is_enabled():
            metrics["loss_scale"] = self.scaler.on_device()
        on_device = {name: value for name, value in metrics.items() if isinstance(value, Tensor)}
        tensors = output.histograms | {SCALARS: torch.stack([v.detach().double() for v in on_device.values()])}
        if output.representations is not None:
            tensors[ROWS] = collapse.sample(output.representations)
        copied, speed = HostCopy(tensors), log.speed(clock)

        def write() -> None:
            self._require_lock()
            host = copied.wait()
            values = metrics | dict(zip(on_device, host.pop(SCALARS).tolist(), strict=True))
            if (rows := host.pop(ROWS, None)) is not None:
                values |= {"feature_std": collapse.feature_std(rows), "effective_rank": collapse.effective_rank(rows)}
            log.write(clock, {name: float(value) for name, value in values.items()}, host, speed)

        return write

    def flush_log(self) -> None:
        """Write the line that is not yet written, if there is one."""
        write, self._unwritten = self._unwritten, None
        if write is not None:
            write()

    def show_images(self, log: RunLog | None, clock: Clock) -> None:
        """The pictures of `_show_images`. Every rank takes part; rank 0 draws."""
        with self.world.state.phase_of("the pictures", watchdog.SAVE_TIMEOUT_S):
            self.world.on_rank0(lambda: self._show_images(log, clock))

    def _show_images(self, log: RunLog | None, clock: Clock, num_images: int = 8) -> None:
        """All views of the first images of this step, also those that other ranks hold, and what the method draws of
        them: TensorBoard, views.png and figures/. Nothing that the training depends on is changed."""
        assert log is not None, "rank 0 has the log"
        from ssl_dist.run import plots  # matplotlib takes a second, which only rank 0 need spend

        step, split = clock.step - 1, self.plan.split
        with TrainLoader(self.plan.open_reader(), self.plan.order, self.plan.specs, Grid(1, 1), 0, 1, False) as loader:
            [images] = loader.reader.batches([self.plan.order.global_ids(step)[:num_images]])
            host = loader.batch(step, images)

        def as_rgb(group: Tensor) -> np.ndarray:
            return group.numpy() if split.pixels.is_rgb else shown.shown(group.numpy(), split.mean, split.std)

        note, groups = shown.words(split.pixels), [as_rgb(group) for group in host.views]
        log.pictures("views", clock, groups)
        plots.views_grid(self.folder / "views.png", groups, note)
        for name, columns in self._drawn(host).items():
            group = pixels_of(torch.stack([*columns.values()]), self.plan.normalize, host.views[0].dtype).cpu()
            log.pictures(name, clock, [as_rgb(group)])
            path, about = self.folder / "figures" / f"{name}.png", f"drawn after step {clock.step}"
            plots.views_grid(path, [as_rgb(group)], note, [*columns], plots.of_training(name, about))

    def _drawn(self, host: HostBatch) -> dict[str, dict[str, Tensor]]:
        """What the method draws of these images."""
        self.method.eval()
        with contextlib.ExitStack() as stack, torch.no_grad(), self.autocast():
            if self.config.compile:  # graphs of these few images would take longer than they do
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            drawn = self.method.pictures(self.to_device(host))
        self.method.train()
        return drawn

    def show_filters(self, log: RunLog | None, clock: Clock) -> None:
        """The filters of the backbone's first convolution in TensorBoard. Every rank takes part."""
        weights = filters.first_convolution(self.method.backbone)
        if weights is None:
            return

        def show() -> None:
            assert log is not None, "rank 0 has the log"
            self._require_lock()
            log.picture("filters", clock, filters.grid(weights).numpy())

        with self.world.state.phase_of("the picture of the filters", watchdog.SAVE_TIMEOUT_S):
            self.world.on_rank0(show)

    def show_attention(self, log: RunLog | None, clock: Clock) -> None:
        """What the encoder makes of some images (attention.py). Every rank takes part; rank 0 draws."""

        def show() -> None:
            assert log is not None, "rank 0 has the log"
            self._require_lock()
            with self._evaluated() as encoder:
                self._attention.draw(encoder, self._normalize, log, clock)

        with self.world.state.phase_of("the pictures of attention", watchdog.SAVE_TIMEOUT_S):
            self.world.on_rank0(show)

    @contextlib.contextmanager
    def _evaluated(self) -> Iterator[nn.Module]:
        """A context with the network that evaluation reads, in evaluation mode."""
        self.method.eval()
        with self.autocast():
            yield self.method.encoder()
        self.method.train()

    def teach_probe(self, batch: Batch) -> None:
        """One step of the online probe (online_probe.py), where the config asks for it. Every rank takes part."""
        if self.online.probe is not None:
            with self._evaluated() as encoder:
                self.online.probe.learn(encoder, batch)

    def measure(self, log: RunLog | None, clock: Clock) -> None:
        """Log the measures of online_measures.py that are due. Every rank takes part."""
        due = self.online.due(clock)
        if not due:
            return
        self.flush_log()
        start = time.perf_counter()
        with self._evaluated() as encoder:
            values = self.online.measure(due, encoder, self._normalize)
        if log is not None:
            log.measured(clock, values, time.perf_counter() - start)

    def save(self, clock: Clock, stop: StopRequest) -> None:
        """Rank 0 writes a checkpoint; the others wait, and a failure there ends all of them.

        Raises `Fault` on every rank where a weight or a moment of the optimizer is not finite, though the loss was:
        such a checkpoint would take the place of a good one.
        """
        self.flush_log()
        broken = checkpoint.not_finite(self.method, self.optimizer)
        if (probe := self.online.probe) is not None:
            broken = broken or checkpoint.not_finite(probe, probe.optimizer)
        if self.world.any_rank(bool(broken))()[0]:
            raise Fault(
                f"{self.world.rank_info} at step {clock.step}: {broken or 'a weight'} is not finite after this step; "
                f"{self._newest()}; {ANEW}",
                RaisedOn.EVERY_RANK,
            )
        if self.scaler.is_enabled() and (scale := self.scaler.get_scale()) < optim.LEAST_LOSS_SCALE:
            raise Fault(
                f"{self.world.rank_info} at step {clock.step}: no gradient is finite, though the scale of the loss is "
                f"down to {scale:g}; {self._newest()}; {ANEW}",
                RaisedOn.EVERY_RANK,
            )
        stop.saving = True
        with self.world.state.phase_of(f"the save of step {clock.step}", watchdog.SAVE_TIMEOUT_S):
            self.world.on_rank0(lambda: self._save(clock))
        stop.saving = False

    def _require_lock(self) -> None:
        if self._lock is not None:
            run_folder.require_lock(self.folder, self._lock)

    def _save(self, clock: Clock) -> None:
        self._require_lock()
        state = {
            "format": checkpoint.FORMAT,
            "step": clock.step,
            "config": config.to_tree(self.config),
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict() if self.method.trainable else {},
            "world_size": self.world.rank_info.world_size,
            "versions": checkpoint.versions(),
            "normalize": config.to_tree(self.plan.normalize),
            "info": dataclasses.asdict(self.plan.info),
            "data": self.plan.data_identity,
            "classes": self.plan.class_names,
            "loss_scale": self.scaler.state(),
            "probe": {} if self.online.probe is None else self.online.probe.state(),
        }
        try:
            checkpoint.save(self.folder, state)
        except OSError as error:
            raise OSError(
                error.errno, f"{error.strerror}, while saving step {clock.step}; {self._newest()}", error.filename
            ) from error
        options = self.config.checkpoint
        checkpoint.prune(self.folder, options.keep, options.keep_every, clock.step)
        self._listener.on_checkpoint(checkpoint.path_of(self.folder, clock.step))

    def finish(self, clock: Clock) -> None:
        """Write what a complete run has: a checkpoint, also of a method that takes no step, and the loss curve."""
        with self.world.state.phase_of("the end of the run", watchdog.SAVE_TIMEOUT_S):
            self.world.on_rank0(lambda: self._finish(clock))

    def _finish(self, clock: Clock) -> None:
        if not checkpoint.steps(self.folder):
            self._save(clock)
            events = board.EventFile(self.folder / "tensorboard", None)
            events.add(clock.step, *board.settings(run_folder.spelt_out(self.config)), board.completed())
        if (self.folder / "metrics.jsonl").exists():
            from ssl_dist.run import plots

            plots.loss_curve(self.folder / "loss.png", self.folder / "metrics.jsonl")

    def diagnosis(self, clock: Clock, output: Output) -> str:
        """Why a non-finite loss ends the run, in one line. Every rank takes part."""
        terms = {"loss": float(output.loss.detach())} | {name: float(v) for name, v in output.metrics.items()}
        reports = self.world.all_gather_object((str(self.world.rank_info), terms))
        broken = [(rank, terms) for rank, terms in reports if not math.isfinite(terms["loss"])]
        names = ", ".join(rank for rank, _ in broken[:4]) + (f" and {len(broken) - 4} more" if len(broken) > 4 else "")
        values = ", ".join(f"{name} = {value:g}" for name, value in broken[0][1].items())
        return f"{names} at step {clock.step + 1}: the loss is not finite ({values}); {self._newest()}; {ANEW}"

    def _newest(self) -> str:
        steps = checkpoint.steps(self.folder)
        return f"the newest checkpoint is {checkpoint.path_of(self.folder, steps[-1])}" if steps else "nothing is saved"
