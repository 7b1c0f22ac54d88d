"""The code path of a GPU on a pretended one: no tensor on the wrong device, the CPU's numbers, one wait a step."""

from collections import defaultdict

import pytest
import torch

from ssl_dist import methods
from ssl_dist.methods.base import SSLMethod
from ssl_dist.verify import command as verify
from tests.pretended_cuda import CUDA, NOTES, pretended
from tests.pretended_training import train, train_on_gpu

ONE_WAIT = {("event", "distributed/world.py:wait"): 1}  # for whether any rank stops or has no finite loss
MEANT_IN_FLOAT64 = {
    "methods/base.py:accuracy",  # counts
    "nn/layers.py:to_device",  # draws of a prior, on their way to float32
}


NAMES = [name for name in methods.names() if name != "random_weights"]


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Every method with every option that is a choice, on the digits: name -> its configs."""
    configs = defaultdict(list)
    for case in verify.cases(tmp_path_factory.mktemp("verify"), steps=2):
        if case.config.precision == "fp64":
            configs[case.method].append(case.config)
    return configs


def no_new_labels(monkeypatch, name):
    """The method `name` goes on with the labels that it begins with."""
    monkeypatch.setattr(methods.find(name), "before_step", SSLMethod.before_step)


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_those_of_the_cpu(name, cases, monkeypatch):
    few = ["method.options.clusters=8"] if name == "deepcluster" else []
    for config in cases[name]:
        expected = train(config, few)
        training = train_on_gpu(monkeypatch, config, few)
        assert training.losses == pytest.approx(expected.losses, rel=1e-10), config.method
        if not of_labels(name):
            assert dict(training.notes.waits) == ONE_WAIT, config.method


def of_labels(name):
    return methods.find(name).before_step is not SSLMethod.before_step


@pytest.mark.parametrize("name", NAMES)
def test_one_of_eight_ranks(name, cases, monkeypatch):
    no_new_labels(monkeypatch, name)
    for config in cases[name]:
        notes = train_on_gpu(monkeypatch, config, ["precision=fp32", "optim.batch_size=16"], 8).notes
        assert dict(notes.waits) == ONE_WAIT, config.method
        assert {place for _, place in notes.wide} <= MEANT_IN_FLOAT64, config.method


@pytest.mark.parametrize("name", NAMES)
def test_no_loss_in_half_precision(name, cases, monkeypatch):
    no_new_labels(monkeypatch, name)
    for config in cases[name]:
        notes = train_on_gpu(monkeypatch, config, ["precision=bf16"]).notes
        assert not notes.half and dict(notes.waits) == ONE_WAIT, (config.method, notes.half)


def test_the_notes_see_what_waits(monkeypatch):
    """The pretended GPU itself: were it blind, all tests above would pass."""
    with pretended(monkeypatch):
        x = torch.arange(4.0, device=CUDA)
        for number, wait in enumerate(
            (
                lambda: x.sum().item(),
                lambda: bool((x > 0).all()),
                lambda: x[x > 1],
                lambda: x.nonzero(),
                lambda: x.cpu(),
                lambda: x.tolist(),
                lambda: torch.ones(3).to(CUDA),
                lambda: torch.ones(3).to(CUDA, non_blocking=True),  # from pageable memory
                lambda: torch.tensor([1.0], device=CUDA),
                lambda: torch.equal(x, x),
                lambda: torch.cuda.synchronize(),
            )
        ):
            NOTES.take()
            wait()
            assert sum(NOTES.waits.values()) >= 1, number
        NOTES.take()
        y = torch.ones(3).pin_memory().to(CUDA, non_blocking=True) + x[:3] * 2
        host = y.to("cpu", non_blocking=True)
        assert not NOTES.waits and host.device.type == "cpu" and y.is_cuda
        for wrong in (lambda: x + torch.ones(4), lambda: x.numpy(), lambda: torch.ones(4)[x.long()]):
            with pytest.raises((RuntimeError, TypeError), match="cuda:0"):
                wrong()
