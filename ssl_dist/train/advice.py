"""What is worth a second look before a run starts: settings that run, and that a reader of its numbers would regret."""

import json
import time

import torch
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from ssl_dist import backbones
from ssl_dist.config import Optim, usual
from ssl_dist.nn.shapes import without_values
from ssl_dist.run.blueprint import RunPlan
from ssl_dist.train import optim

PROBE_S = 0.02  # for each precision
SLOWER = 1.1  # times as long in 16 bits as in float32 is worth a line
OWN = f"{backbones.__name__}."  # the networks that call nn/batchnorm_relu.py
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def warnings(plan: RunPlan, on_this_cpu: bool) -> list[str]:
    """A sentence each, which begins with the key. on_this_cpu: the run trains on the CPU of this machine, which is
    measured where `precision` asks for 16 bits."""
    found = [_crop(plan), _top5(plan)]
    if plan.method_class.trainable:
        found += [_rate(plan), _warmup(plan), _schedule(plan), *_unread(plan.config.optim)]
        if on_this_cpu:
            found += [_half_precision(plan.config.precision), _compile(plan)]
    return [sentence for sentence in found if sentence]


def seen(plan: RunPlan) -> float:
    """The share of the area of a square image that evaluation sees: of the middle square of another one."""
    data = plan.config.data
    return (data.image_size / (data.eval_resize or data.image_size)) ** 2


def _crop(plan: RunPlan) -> str:
    share, data = seen(plan), plan.config.data
    if share >= usual.LEAST_SHARE_SEEN:
        return ""
    size = round(data.image_size / usual.CROP_SHARE)
    return (
        f"data.eval_resize = {data.eval_resize}: evaluation sees {100 * share:.0f} % of the area of a square image; "
        f"data.eval_resize={size} sees {100 * (data.image_size / size) ** 2:.0f} %, data.eval_resize=null all of it"
    )


def _top5(plan: RunPlan) -> str:
    classes = len(plan.dataset.info(plan.split.split).classes)
    if not 1 <= classes <= 5:
        return ""
    return f"top-5 of {classes} class{'es' * (classes > 1)} is always 100 %: compare by top-1"


def _rate(plan: RunPlan) -> str:
    options = plan.config.optim
    low, high = usual.LEARNING_RATES[options.name]
    if low <= options.peak_lr <= high:
        return ""
    batch = "" if options.lr_batch is None else f" ({options.peak_lr:g} for a batch of {options.batch_size})"
    side = "high" if options.peak_lr > high else "low"
    return f"optim.lr = {options.lr:g}{batch}: unusually {side} for {options.name}; usual are {low:g} to {high:g}"


def _warmup(plan: RunPlan) -> str:
    epochs, clock = plan.config.optim.warmup_epochs, plan.clock()
    if not epochs or epochs < clock.total_epochs:
        return ""
    return (
        f"optim.warmup_epochs = {epochs:g}: the run ends after {clock.total_epochs:.3g} epochs, before the rate is at "
        f"its highest; a tenth of the run is optim.warmup_epochs={clock.total_epochs / 10:.2g}"
    )


def _schedule(plan: RunPlan) -> str:
    options, clock = plan.config.optim, plan.clock()
    if options.schedule == "epoch_cosine" and clock.total_epochs <= 1:
        return (
            f"optim.schedule = 'epoch_cosine': is constant within an epoch, and the run has {clock.total_epochs:.3g}; "
            "optim.schedule=cosine falls from step to step"
        )
    if options.schedule == "step" and all(step >= clock.total_steps for step in optim.milestones(options, clock)):
        key = "milestones" if options.milestone_epochs is None else "milestone_epochs"
        return (
            f"optim.{key} = {getattr(options, key)}: the rate does not fall, for the run ends after "
            f"{clock.total_epochs:.3g} epochs; as shares: optim.milestones=[0.5,0.75] optim.milestone_epochs=null"
        )
    if options.schedule in ("cosine", "epoch_cosine") and options.epochs is None:
        return (
            f"optim.schedule = {options.schedule!r}: the rate is down after optim.steps = {options.steps}, "
            f"{clock.total_epochs:.3g} epochs, and such a run cannot be prolonged; give the length that is meant "
            "(optim.epochs)"
        )
    return ""


def _unread(options: Optim) -> list[str]:
    """Of keys that this optimizer or this schedule does not read. They are no error, for then a run that has them could
    neither be resumed nor evaluated: its checkpoints hold the config, which is validated when they are read."""
    by_name, by_schedule = options.name, f"schedule {options.schedule}"
    readers = {
        "momentum": (by_name, options.name in ("sgd", "lars")),
        "lr_final": (by_schedule, options.schedule in ("cosine", "epoch_cosine")),
        "milestones": (by_schedule, options.schedule == "step"),
        "milestone_epochs": (by_schedule, options.schedule == "step"),
    }
    default, found = Optim(), []
    for key, (reader, is_read) in readers.items():
        value, usual_value = getattr(options, key), getattr(default, key)
        if not is_read and value != usual_value:
            text = json.dumps(usual_value, separators=(",", ":"))
            found.append(
                f"optim.{key} = {value}: changes nothing, for {reader} does not read it; the default is "
                f"optim.{key}={text}"
            )
    return found


def _half_precision(precision: str) -> str:
    if precision not in HALF:
        return ""
    ratio = slowdown(HALF[precision])
    if ratio < SLOWER:
        return ""
    return (
        f"precision = {precision!r}: this CPU takes {ratio:.2g} times as long for a convolution as in fp32 (measured "
        "just now); precision=fp32"
    )


def _compile(plan: RunPlan) -> str:
    if not plan.config.compile:
        return ""
    with without_values():
        blocks = [part for part in plan.build().backbone.modules() if type(part).__module__.startswith(OWN)]
    if not any(isinstance(layer, _BatchNorm) for block in blocks for layer in block.children()):
        return ""  # which torch.compile may make faster
    return (
        "compile = true: on a CPU, BatchNorm and ReLU are one kernel, which torch.compile takes apart: a step of "
        f"{plan.config.backbone.name} takes as long or longer; compile=false"
    )


def slowdown(dtype: torch.dtype) -> float:
    """The time of a convolution on this CPU in `dtype`, by that in float32; measured in some 50 ms."""
    times = []
    for number in (torch.float32, dtype):
        x = torch.ones(8, 32, 16, 16, dtype=number).to(memory_format=torch.channels_last)
        weights = torch.ones(32, 32, 3, 3, dtype=number).to(memory_format=torch.channels_last)
        with torch.no_grad():
            functional.conv2d(x, weights, padding=1)  # the first one chooses how
            each: list[float] = []
            end = time.perf_counter() + PROBE_S
            while not each or time.perf_counter() < end:
                start = time.perf_counter()
                functional.conv2d(x, weights, padding=1)
                each.append(time.perf_counter() - start)
        times.append(min(each))
    return times[1] / times[0]
