"""Methods that label the images themselves, in real trainings: a resume at any step, right before and between two
relabelings, is exact to the bit, and several ranks make the labels of one."""

import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from ssl_dist import config
from ssl_dist.storage import checkpoint
from tests import ranks
from tests.test_train import fingerprint, metrics

STEPS, PER_EPOCH = 7, 3
OPTIONS = {
    # due before the steps 0, 1, 2 and 4: the schedule is quadratic
    "sela": ["method.options.clusters=6", "method.options.heads=2", "method.options.relabelings=5"],
    "deepcluster": ["method.options.clusters=6", "method.options.components=8"],
}


def run_training(method, data, run, *more):
    from ssl_dist.train.loop import train

    small = [
        f"data.root={data}", f"run_dir={run}", "data.limit=48", "data.reader=arrays", "optim.batch_size=16",
        "optim.epochs=null", f"optim.steps={STEPS}", "checkpoint.every_steps=1", "checkpoint.keep=100",
        "log.every_steps=1", "timeout=20", *OPTIONS[method],
    ]  # fmt: skip
    return train(config.load(f"configs/digits/{method}-conv4.yaml", [*small, *more]))


def in_ranks(rank, size, *arguments):
    return run_training(*arguments)


def state(run, step):
    return checkpoint.load(checkpoint.path_of(Path(run), step))["method"]


def labels(run):
    return [state(run, step)["labels.of_images"] for step in range(1, STEPS + 1)]


@pytest.fixture(scope="module", params=sorted(OPTIONS))
def uninterrupted(request, digits, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / request.param
    assert run_training(request.param, digits, run) == 0
    return request.param, run


def test_labels_change_when_they_are_due(uninterrupted):
    method, run = uninterrupted
    changes = [step for step, (a, b) in enumerate(pairwise(labels(run)), 1) if not torch.equal(a, b)]
    assert changes == {"sela": [1, 2, 4], "deepcluster": [3, 6]}[method]
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for name in ("loss", "accuracy", "labels_changed", "cluster_min", "cluster_max", "cluster_entropy"):
        assert name in lines[-1]
    changed = [line["labels_changed"] for line in lines]  # of the last relabeling, which is state
    assert all(changed[step] == changed[step - 1] for step in range(1, STEPS) if step not in changes)
    assert len({*changed}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, STEPS))
def test_a_resume_is_exact_at_any_step(uninterrupted, digits, tmp_path, step):
    method, uninterrupted_run = uninterrupted
    run = tmp_path / "run"
    shutil.copytree(uninterrupted_run, run)
    for later in range(step + 1, STEPS + 1):
        checkpoint.path_of(run, later).unlink()
    assert run_training(method, digits, run) == 0
    assert fingerprint(run) == fingerprint(uninterrupted_run)
    assert all(torch.equal(a, b) for a, b in zip(labels(run), labels(uninterrupted_run), strict=True))
    last_lines = {line["step"]: line for line in metrics(run)}
    assert [last_lines[line["step"]] for line in metrics(uninterrupted_run)] == metrics(uninterrupted_run)


@pytest.mark.slow
def test_two_ranks_make_the_labels_of_one(uninterrupted, digits, tmp_path):
    method, _ = uninterrupted
    assert run_training(method, digits, tmp_path / "one", "precision=fp64") == 0
    arguments = method, digits, tmp_path / "two", "precision=fp64"
    assert ranks.launch(in_ranks, 2, tmp_path, *arguments) == [0, 0]
    assert all(torch.equal(a, b) for a, b in zip(labels(tmp_path / "one"), labels(tmp_path / "two"), strict=True))
    one, two = state(tmp_path / "one", STEPS), state(tmp_path / "two", STEPS)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: name + text)
