"""Trainings of three steps on the pretended GPU (pretended_cuda.py): one process, or rank 0 of a fake group."""

import contextlib
from dataclasses import dataclass

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from ssl_dist import config
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.distributed.signals import StopRequest
from ssl_dist.distributed.world import World
from ssl_dist.run.blueprint import derive
from ssl_dist.train.loop import fit
from ssl_dist.train.state import TrainState
from ssl_dist.verify import ranks as verify_ranks
from tests import pretended_cuda
from tests.pretended_cuda import CPU, CUDA, NOTES, Notes, real


@dataclass
class Training:
    """losses: of every step; notes: what the device was asked for in the second step, which logs nothing; all_notes:
    from the beginning to the end."""

    losses: list[float]
    notes: Notes
    all_notes: Notes
    config: config.Config


class _Recorded(TrainState):
    """Writes nothing. A step begins where its batch goes to the device."""

    def __init__(self, plan, world):
        self.steps, self.losses = [], []
        super().__init__(plan, world)

    def to_device(self, host):
        self.steps.append(NOTES.take())
        return super().to_device(host)

    def forward(self, batch):
        output = super().forward(batch)
        self.losses.append(output.loss.detach())
        return output

    def log(self):
        return contextlib.nullcontext(_Lines() if self.config.log.every_steps == 1 else None)

    def save(self, clock, stop):
        pass

    def show_images(self, log, clock):
        pass

    def finish(self, clock):
        self.steps.append(NOTES.take())


class _Lines:
    """A log that keeps nothing."""

    def speed(self, clock):
        return {}

    def write(self, clock, metrics, histograms, speed):
        pass

    def waited(self, seconds):
        pass

    after_step = waited


class _FakeWorld(World):
    """Rank 0 of several whose group is a fake one, without processes."""

    def wrap(self, method):
        return method

    def on_rank0(self, action):
        return action()

    def all_gather_object(self, value):
        return [value] * self.rank_info.world_size

    def barrier(self):
        pass


def train(settings, overrides=(), device=CPU, size=1, log_every=1000) -> Training:
    """Train by a config with overrides. Losses of one process only mean something: the fake group gathers what happens
    to lie in its buffers."""
    few = ["optim.steps=3", "optim.epochs=null", f"log.every_steps={log_every}"]
    settings = config.overridden(config.to_tree(settings), [*overrides, *few])
    rank_info = RankInfo(0, size, 0, size)
    plan = derive(settings, rank_info)
    run = _Recorded(plan, (World if size == 1 else _FakeWorld)(rank_info, plan.grid, device))
    assert fit(run, StopRequest()) == 0
    notes = run.steps[-2] if run.losses else Notes()
    return Training([float(real(loss)) for loss in run.losses], notes, sum(run.steps, Notes()), settings)


@contextlib.contextmanager
def fake_group(size):
    """A context in which torch.distributed has a group of `size` ranks of which this process is the first."""
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def train_on_gpu(monkeypatch, settings, overrides=(), size=1, log_every=1000) -> Training:
    """`train` on the pretended GPU, as rank 0 of `size`."""
    with contextlib.ExitStack() as stack:
        if size > 1:
            stack.enter_context(fake_group(size))
        stack.enter_context(pretended_cuda.pretended(monkeypatch, max(size, 1)))
        return train(settings, overrides, CUDA, size, log_every)


_entered = contextlib.ExitStack()


def pretend_in_a_rank():
    """In a process of `verify`: a GPU from the first training on one until the process ends. DDP's C++ knows no
    pretended tensors, so hooks average the gradients."""

    def wrap(world, method):
        def average(parameter):
            parameter.grad.copy_(world.all_reduce_mean(parameter.grad))  # in the layout of the weights

        if not world.alone:
            for parameter in method.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(average)
        return method

    def device(name, rank):
        if name == "cpu":
            return CPU
        if not _pretended:
            _pretended.append(_entered.enter_context(pretended_cuda.pretended(pytest.MonkeyPatch(), 1)))
            World.wrap = wrap
        return CUDA

    verify_ranks._device = device


_pretended = []
