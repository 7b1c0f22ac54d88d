"""Training for a transfer: one process, seeded, resumed exactly. What a task trains on is behind `Task`.

`train.loop` draws views of one size and shares a method's loss between ranks; here images of any size go with their
boxes or masks through one process, at a rate that counts steps by other rules, so a common loop would branch at nearly
every line. What does not depend on that is shared: clock, log, stop request, checkpoints and the setting of rates.

The order of images, their augmentation and every draw of torch's generator are functions of (seed, step), so weights,
momenta and the step are all that is saved. On a CPU a resume is exact bit for bit; on a GPU the gradients of RoIAlign
and of upsampling are summed in an order that varies.
"""

import dataclasses
import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ssl_dist.clock import Clock
from ssl_dist.distributed.signals import STOPPED, StopRequest
from ssl_dist.errors import Fault, UserError, quoted
from ssl_dist.keys import INIT, METHOD, ORDER, TRANSFER, hash64, permutation
from ssl_dist.progress import Progress
from ssl_dist.run.folder import differences
from ssl_dist.run.log import RunLog
from ssl_dist.storage import checkpoint, durable
from ssl_dist.thread_team import run_ahead
from ssl_dist.train import optim
from ssl_dist.voc.options import TrainingOptions

FREE_OPTIONS = ("workers", "log_every")  # they change no number
Item = TypeVar("Item")


@dataclasses.dataclass
class Task(Generic[Item]):
    """What is trained. load: (epoch, index) -> one image of the training split, augmented, on the CPU; loss: a list of
    those -> named terms, whose sum is minimised. frozen: modules whose statistics stay."""

    model: nn.Module
    num_images: int
    load: Callable[[int, int], Item]
    loss: Callable[[list[Item]], dict[str, Tensor]]
    frozen: list[nn.Module]

    def train_mode(self) -> None:
        self.model.train()
        for module in self.frozen:
            module.eval()

    def batches(self, clock: Clock, options: TrainingOptions, threads: int) -> Iterator[list[Item]]:
        """The batches of the steps that follow `clock`. The tail of an epoch that fills no batch is dropped."""
        return read_ahead(self.load, _order(clock, self.num_images, options), options.batch_size, threads)


def seed_torch(seed: int, purpose: int = INIT, number: int = 0) -> None:
    """Give torch's generators, on every device, the state that belongs to new layers or, for METHOD, to a step."""
    torch.manual_seed(int(hash64(seed, TRANSFER, purpose, number)) & 0x7FFFFFFFFFFFFFFF)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, released when the process ends. Raises `UserError` when another process has it."""
    with durable.refuse_unwritable(folder, "choose another --out"):
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        try:
            descriptor = durable.lock(folder / "lock", os.O_WRONLY | os.O_CREAT, wait=False)
        except BlockingIOError:
            raise UserError(f"{folder}: another process is writing it; wait for it, or choose another --out") from None
    try:
        durable.remove_dead(folder)
        checkpoint.remove_leftovers(folder)
        yield
    finally:
        os.close(descriptor)


def fit(task: Task, options: TrainingOptions, folder: Path, settings: dict, threads: int) -> int:
    """Train to the last step, or go on with what `folder` holds; 0 when complete, 75 when asked to stop.

    settings: plain values that must be the same on resume, among them the names task and train, normalize, images
    (SHA-256 of the ids) and contents (of pictures and annotations).
    """
    per_epoch = task.num_images // options.batch_size
    if per_epoch == 0:
        raise UserError(f"batch_size = {options.batch_size}: larger than the {task.num_images} images to train on")
    optimizer = _optimizer(task.model, options)
    clock = Clock(_resume(task.model, optimizer, folder, settings), per_epoch, options.steps)
    if clock.done:
        return 0
    task.train_mode()
    title = f"{folder.absolute().name}: {settings['task']} {settings['train']}"
    with StopRequest() as stop, RunLog(folder, clock, title, options.batch_size, 1, settings) as log:
        for items in task.batches(clock, options, threads):
            optim.set_lr(optimizer, lr(options, clock))
            seed_torch(options.seed, METHOD, clock.step)
            terms = task.loss(items)
            loss = functools.reduce(torch.add, terms.values())
            if not torch.isfinite(loss):
                shown = ", ".join(f"{name} {float(value.detach()):g}" for name, value in terms.items())
                raise Fault(f"{folder}: step {clock.step + 1}: the loss is not finite ({shown}); try a lower lr")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if options.MAX_GRADIENT_NORM is not None:
                nn.utils.clip_grad_norm_(task.model.parameters(), options.MAX_GRADIENT_NORM)
            optimizer.step()
            clock = clock.after_step()
            if clock.step == 1 or clock.done or clock.due(options.log_every):
                values = {name: float(value.detach()) for name, value in {"loss": loss, **terms}.items()}
                log.write(clock, values | {"lr": lr(options, clock)}, {}, log.speed(clock))
            stopping = stop.requested
            if stopping or clock.done or clock.due(every_epochs=1):
                stop.saving = True
                _save(task.model, optimizer, clock.step, folder, settings)
                stop.saving = False
            log.after_step(clock)
            if stopping and not clock.done:
                print(
                    f"stopping after step {clock.step}, which is saved; the same command goes on",
                    file=sys.stderr,
                    flush=True,
                )
                return STOPPED
    return 0


def renew_statistics(task: Task, options: TrainingOptions, steps: int, threads: int) -> None:
    """Put the mean over `steps` batches of training images in the place of BatchNorm's running mean and variance.

    The running ones weigh the last batches most and mix those of weights that have changed since ("precise BN" of
    detectron2, which MoCo's detection takes). The batches are those that would follow the last step.
    """
    task.train_mode()
    norms = [m for m in task.model.modules() if isinstance(m, nn.BatchNorm2d) and m.training]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's word for the mean of all batches since the reset
    clock = Clock(options.steps, task.num_images // options.batch_size, options.steps + steps)
    with torch.no_grad(), Progress("statistics of BatchNorm", steps, "step") as counter:
        for step, items in enumerate(task.batches(clock, options, threads), clock.step):
            seed_torch(options.seed, METHOD, step)
            task.loss(items)
            counter.update(1)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def lr(options: TrainingOptions, clock: Clock) -> float:
    """The learning rate of the step that follows `clock.step` completed ones.

    Unlike that of `train.optim`, the warm-up does not begin at 0, and milestones are rounded to the nearest step.
    """
    if clock.step < options.warmup_steps:
        return options.lr * (clock.step + 1) / (options.warmup_steps + 1)
    passed = sum(clock.step >= round(share * clock.total_steps) for share in options.milestones)
    return options.lr * options.RATE_DECAY**passed


def epoch_order(seed: int, epoch: int, num_images: int) -> np.ndarray:
    """int64 [N]: the images in the order of this epoch."""
    return permutation(hash64(seed, TRANSFER, ORDER, epoch), num_images)


def _order(clock: Clock, num_images: int, options: TrainingOptions) -> Iterator[tuple[int, int]]:
    """(epoch, index) of every image from this step to the last."""
    for step in range(clock.step, clock.total_steps):
        epoch, within = divmod(step, clock.steps_per_epoch)
        if within == 0 or step == clock.step:
            order = epoch_order(options.seed, epoch, num_images)
        for index in order[within * options.batch_size : (within + 1) * options.batch_size]:
            yield epoch, int(index)


def read_ahead(load: Callable[..., Item], arguments: Iterable[tuple], size: int, threads: int) -> Iterator[list[Item]]:
    """Lists of `size` results of load(*arguments), in their order, read two lists ahead."""
    calls = (functools.partial(load, *of_one) for of_one in arguments)
    with closing(run_ahead(calls, threads, 2 * size)) as items:
        while batch := list(itertools.islice(items, size)):
            yield batch


def _optimizer(model: nn.Module, options: TrainingOptions) -> torch.optim.SGD:
    """SGD; what BatchNorm learns does not decay (as in detectron2)."""
    norms = {id(p) for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in norms], "weight_decay": options.weight_decay},
        {"params": [p for p in trained if id(p) in norms], "weight_decay": 0.0},
    ]
    return torch.optim.SGD([group for group in groups if group["params"]], lr=options.lr, momentum=options.momentum)


def _save(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, folder: Path, settings: dict) -> None:
    broken = checkpoint.not_finite(model, optimizer)
    if broken:
        raise Fault(f"{folder}: {broken} is not finite after step {step}; try a lower lr")
    state = {
        "format": checkpoint.FORMAT,
        "step": step,
        "config": settings,
        "method": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "world_size": 1,
        "versions": checkpoint.versions(),
        "normalize": settings["normalize"],
        "info": {},
        "data": {"images": settings["images"]},
    }
    checkpoint.save(folder, state)
    checkpoint.prune(folder, keep=2, keep_every=None, step=step)


def _resume(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, settings: dict) -> int:
    """Load the newest checkpoint, if there is one. Returns the steps completed."""
    newest = checkpoint.load_newest(folder)
    if newest is None:
        return 0
    path, state, _ = newest
    different = [
        f"{key} (there {quoted(old)}, now {quoted(new)})"
        for key, old, new in differences(state["config"], settings)
        if key.removeprefix("options.") not in FREE_OPTIONS
        and not (key == "contents" and old is None)  # a checkpoint of before they were kept
    ]
    if different:
        raise UserError(
            f"{folder}: holds a training with other settings: {'; '.join(different)}; choose another --out or restore "
            "these values"
        )
    checkpoint.restore(model, state["method"], path)
    checkpoint.restore_optimizer(optimizer, state["optimizer"], path)
    print(f"{path}: taken up after step {state['step']}", file=sys.stderr, flush=True)
    return state["step"]
