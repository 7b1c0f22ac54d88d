"""Optimizers and the learning rate, a pure function of the clock."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from ssl_dist.clock import Clock
from ssl_dist.config import Optim
from ssl_dist.lars import LARS


def build(options: Optim, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer named by the config; the rate is set before every step.

    One group of parameters; for lars a second one, of biases, BatchNorm and scalars such as a learnt temperature, which
    have neither weight decay nor adaptation.
    """
    parameters = list(parameters)
    if options.name == "lars":
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": options.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "adapt": False},
        ]
        return LARS(groups, lr=options.lr, momentum=options.momentum)
    if options.name == "adam":
        return torch.optim.Adam(parameters, lr=options.lr, weight_decay=options.weight_decay)
    if options.name == "adamw":
        return torch.optim.AdamW(parameters, lr=options.lr, weight_decay=options.weight_decay)
    return torch.optim.SGD(parameters, lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay)


def lr(options: Optim, clock: Clock) -> float:
    """The learning rate of the step that follows `clock.step` completed steps.

    A linear warm-up over `warmup_epochs`, 0 at the very first step; then constant, half a cosine down to `lr_final`
    times the peak (Loshchilov & Hutter, 2017, without restarts), or a fall to a tenth at every milestone.
    """
    warmup = options.warmup_epochs * clock.steps_per_epoch
    if clock.step < warmup:
        return options.peak_lr * clock.step / warmup
    if options.schedule == "cosine":
        progress = (clock.step - warmup) / max(1.0, clock.total_steps - warmup)
        falling = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return options.peak_lr * (options.lr_final + (1 - options.lr_final) * falling)
    if options.schedule == "step":
        return options.peak_lr * 0.1 ** sum(clock.step >= milestone for milestone in milestones(options, clock))
    return options.peak_lr


def milestones(options: Optim, clock: Clock) -> list[int]:
    """The steps from which on the rate is lower, under schedule step. 0.07 of 100 steps is step 7, not 8."""
    if options.milestone_epochs is not None:
        steps = [epoch * clock.steps_per_epoch for epoch in options.milestone_epochs]
    else:
        steps = [share * clock.total_steps for share in options.milestones]
    return [math.ceil(round(step, 6)) for step in steps]


def set_lr(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def reset_state(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Forget the optimizer's state of parameters that a method has drawn anew."""
    for parameter in parameters:
        optimizer.state.pop(parameter, None)
