import math

import pytest
import torch
from torch import nn

from ssl_dist import optim
from ssl_dist.clock import Clock
from ssl_dist.config import Optim


def rates(options, total=100, per_epoch=10):
    return [optim.lr(options, Clock(step, per_epoch, total)) for step in range(total)]


def test_constant():
    assert set(rates(Optim(lr=0.5))) == {0.5}


def test_warmup_then_cosine_to_zero():
    values = rates(Optim(lr=1.0, warmup_epochs=2.0, schedule="cosine"))
    assert values[:20] == pytest.approx([s / 20 for s in range(20)])
    assert values[20] == 1.0
    assert values[60] == pytest.approx(0.5)
    assert values[99] == pytest.approx(0.5 * (1 + math.cos(math.pi * 79 / 80)))


def test_step_falls_at_the_milestones():
    values = rates(Optim(lr=1.0, schedule="step"))
    assert values[49] == 1.0 and values[50] == pytest.approx(0.1) and values[75] == pytest.approx(0.01)


@pytest.mark.parametrize(("name", "kind"), [("adam", "Adam"), ("adamw", "AdamW"), ("sgd", "SGD")])
def test_build(name, kind):
    layer = nn.Linear(2, 2)
    optimizer = optim.build(Optim(name=name, lr=0.25, weight_decay=0.5), layer.parameters())
    assert type(optimizer).__name__ == kind and optimizer.param_groups[0]["weight_decay"] == 0.5
    optim.set_lr(optimizer, 0.125)
    assert optimizer.param_groups[0]["lr"] == 0.125


def test_reset_state_forgets_only_what_was_redrawn():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = optim.build(Optim(), [a, b])
    (a.sum() + b.sum()).backward()
    optimizer.step()
    optim.reset_state(optimizer, [a])
    assert a not in optimizer.state and b in optimizer.state
    optimizer.step()
