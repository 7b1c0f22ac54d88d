"""Optimizers and the learning rate, a pure function of the clock."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from ssl_dist.clock import Clock
from ssl_dist.config import Optim


def build(options: Optim, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer named by the config over one group of parameters; the rate is set before every step."""
    parameters = list(parameters)
    if options.name == "adam":
        return torch.optim.Adam(parameters, lr=options.lr, weight_decay=options.weight_decay)
    if options.name == "adamw":
        return torch.optim.AdamW(parameters, lr=options.lr, weight_decay=options.weight_decay)
    return torch.optim.SGD(parameters, lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay)


def lr(options: Optim, clock: Clock) -> float:
    """The learning rate of the step that follows `clock.step` completed steps.

    A linear warm-up from 0 over `warmup_epochs`; then constant, cosine to 0 at the end (Loshchilov & Hutter, 2017,
    without restarts), or a fall to a tenth at every milestone.
    """
    warmup = options.warmup_epochs * clock.steps_per_epoch
    if clock.step < warmup:
        return options.lr * clock.step / warmup
    if options.schedule == "cosine":
        progress = (clock.step - warmup) / max(1.0, clock.total_steps - warmup)
        return options.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    if options.schedule == "step":
        return options.lr * 0.1 ** sum(clock.progress >= share for share in options.milestones)
    return options.lr


def set_lr(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def reset_state(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Forget the optimizer's state of parameters that a method has drawn anew."""
    for parameter in parameters:
        optimizer.state.pop(parameter, None)
