"""The training of a transfer: its order, its rate, its resume, and who may write its folder."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from torch import nn

from ssl_dist.clock import Clock
from ssl_dist.errors import Fault, UserError
from ssl_dist.storage import checkpoint
from ssl_dist.voc import loop

SETTINGS = {"task": "toy", "train": "numbers", "images": "ab", "normalize": {"mean": [0, 0, 0], "std": [1, 1, 1]}}


class Toy(nn.Module):
    """A network with BatchNorm and dropout, whose draws must come again after a resume."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.3)

    def forward(self, x):
        return self.drop(torch.relu(self.norm(self.conv(x)))).mean((1, 2, 3))


def toy(batches=None, on_load=lambda epoch, index: None):
    loop.seed_torch(3)
    model = Toy()

    def load(epoch, index):
        on_load(epoch, index)
        generator = torch.Generator().manual_seed(1000 * epoch + index)
        return index, torch.randn(3, 6, 6, generator=generator)

    def loss(items):
        ids, images = zip(*items, strict=True)
        if batches is not None:
            batches.append(ids)
        return {"square": ((model(torch.stack(images)) - 2 - torch.tensor(ids) / 10) ** 2).mean()}

    return loop.Task(model, 11, load, loss, [])


def options(**changes):
    values = {"steps": 9, "batch_size": 4, "lr": 0.1, "milestones": [0.5], "seed": 3, "log_every": 2}
    return loop.TrainingOptions(**(values | changes))


def fit(folder, task, **changes):
    training_options = options(**changes)
    settings = SETTINGS | {"options": {"steps": training_options.steps, "workers": training_options.workers}}
    with loop.claimed(folder):
        return loop.fit(task, training_options, folder, settings, threads=2)


def renew_statistics(task, steps):
    loop.renew_statistics(task, options(), steps, threads=2)


def test_every_image_once_an_epoch_in_an_order_of_its_own(tmp_path):
    batches = []
    assert fit(tmp_path, toy(batches)) == 0
    assert [len(ids) for ids in batches] == [4] * 9, "the tail that fills no batch is dropped"
    epochs = [sum(batches[start : start + 2], ()) for start in range(0, 8, 2)]
    assert all(len(set(epoch)) == 8 for epoch in epochs) and len(set(epochs)) == 4
    assert epochs[1] == tuple(loop.epoch_order(3, 1, 11)[:8])
    assert sorted(loop.epoch_order(3, 1, 11)) == list(range(11))
    assert not np.array_equal(loop.epoch_order(4, 1, 11), loop.epoch_order(3, 1, 11))


def test_the_rate():
    training_options = options(warmup_steps=3, steps=100, milestones=[0.5, 11 / 12], lr=1.0)
    rates = [loop.lr(training_options, Clock(step, 7, 100)) for step in (0, 1, 2, 3, 49, 50, 91, 92, 99)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 0.1, 0.1, 0.01, 0.01])


class Clipped(loop.TrainingOptions):
    RATE_DECAY = 0.5
    MAX_GRADIENT_NORM = 0.01


def test_a_rate_that_is_halved_and_gradients_that_are_clipped(tmp_path):
    clipped = Clipped(steps=4, batch_size=4, lr=0.1, momentum=0.0, weight_decay=0, milestones=[0.25, 0.5])
    assert [loop.lr(clipped, Clock(step, 2, 4)) for step in range(4)] == pytest.approx([0.1, 0.05, 0.025, 0.025])
    task = toy()
    before = torch.cat([p.detach().flatten().clone() for p in task.model.parameters()])
    with loop.claimed(tmp_path):
        loop.fit(task, clipped.model_copy(update={"steps": 2, "milestones": []}), tmp_path, SETTINGS, threads=1)
    moved = torch.cat([p.detach().flatten() for p in task.model.parameters()]) - before
    assert 0.1 * 0.01 < moved.norm() <= 2 * 0.1 * 0.01 * 1.001, "two steps, each of norm 0.01"


def test_the_loss_falls_and_what_is_written(tmp_path):
    assert fit(tmp_path, toy(), steps=60, lr=0.2) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, *range(2, 61, 2)]
    assert lines[-1]["square"] == lines[-1]["loss"] and lines[-1]["lr"] == pytest.approx(0.02)
    assert np.mean([line["loss"] for line in lines[-5:]]) < 0.5 * lines[0]["loss"]
    assert checkpoint.steps(tmp_path) == [58, 60], "the newest two"


def test_the_loss_is_the_sum_of_its_terms(tmp_path):
    task = toy()
    square = task.loss
    task.loss = lambda items: {"first": square(items)["square"], "second": torch.tensor(2.0)}
    assert fit(tmp_path, task, steps=1) == 0
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["loss"] == pytest.approx(line["first"] + 2) and line["second"] == 2


def test_a_resume_at_any_step_equals_no_stop_bit_for_bit(tmp_path):
    whole = toy()
    assert fit(tmp_path / "whole", whole) == 0
    batches = []
    for stop in (1, 2, 3, 5, 8):
        folder = tmp_path / f"stop-{stop}"
        # The signal comes while images of a step ahead are read; the loop stops after the step at hand.
        count = [0]

        def interrupt(epoch, index, count=count, stop=stop):
            count[0] += 1
            if count[0] == 4 * stop:
                os.kill(os.getpid(), signal.SIGTERM)

        codes = [fit(folder, toy(on_load=interrupt))]
        (step,) = checkpoint.steps(folder)[-1:]
        again = toy(batches)
        codes.append(fit(folder, again))
        assert codes == [75, 0] and 0 < step < 9
        for name, tensor in whole.model.state_dict().items():
            assert torch.equal(tensor, again.model.state_dict()[name]), (stop, name)
        lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
        expected = [json.loads(text) for text in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
        assert [(x["step"], x["loss"]) for x in lines] == [(x["step"], x["loss"]) for x in expected]
    done = toy(batches := [])
    assert fit(folder, done) == 0 and batches == [], "a complete training is only loaded"
    assert torch.equal(done.model.conv.weight, whole.model.conv.weight)


def test_a_crash_goes_on_from_the_last_epoch_bit_for_bit(tmp_path):
    whole, count = toy(), []

    def crash(epoch, index):
        count.append(index)
        if len(count) == 23:
            raise RuntimeError("a fault")

    assert fit(tmp_path / "whole", whole) == 0
    with pytest.raises(RuntimeError, match="a fault"):
        fit(tmp_path / "run", toy(on_load=crash))
    assert checkpoint.steps(tmp_path / "run") == [2, 4]
    again = toy()
    assert fit(tmp_path / "run", again) == 0
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 4, 6, 8, 9]


def test_statistics_are_the_mean_over_the_batches_that_would_follow(tmp_path):
    batches = []
    task = toy(batches)
    task.frozen.append(task.model.drop)
    task.model.norm.running_mean.fill_(5.0)
    task.model.norm.num_batches_tracked.fill_(100)  # as after a training
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    renew_statistics(task, 4)
    follow = [loop.epoch_order(3, epoch, 11)[start : start + 4].tolist() for epoch in (4, 5, 6) for start in (0, 4)]
    assert [list(ids) for ids in batches] == follow[1:5], "9 steps were taken, the next is the second of epoch 4"
    maps = []
    for step, ids in enumerate(batches, 9):
        epoch = step // 2
        images = [torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(1000 * epoch + i)) for i in ids]
        maps.append(task.model.conv(torch.stack(images)))
    mean = torch.stack([m.mean((0, 2, 3)) for m in maps]).mean(0)
    variance = torch.stack([m.var((0, 2, 3)) for m in maps]).mean(0)
    torch.testing.assert_close(task.model.norm.running_mean, mean)
    torch.testing.assert_close(task.model.norm.running_var, variance)
    assert task.model.norm.momentum == 0.1
    for name, tensor in task.model.state_dict().items():
        assert torch.equal(tensor, before[name]) or name.startswith(("norm.running", "norm.num")), name
    fixed = toy()
    fixed.frozen.append(fixed.model.norm)
    fixed.model.norm.running_mean.fill_(5.0)
    renew_statistics(fixed, 2)
    assert (fixed.model.norm.running_mean == 5.0).all(), "statistics that stay"


def test_a_damaged_checkpoint_is_passed_over(tmp_path, capsys):
    whole = toy()
    assert fit(tmp_path, whole) == 0
    path = checkpoint.path_of(tmp_path, 9)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    again = toy()
    assert fit(tmp_path, again) == 0
    stderr = capsys.readouterr().err
    assert f"{path}: its SHA-256 differs" in stderr and "taken up after step 8" in stderr
    assert torch.equal(again.model.conv.weight, whole.model.conv.weight)


def test_other_settings_are_refused_by_name(tmp_path):
    fit(tmp_path, toy())
    with pytest.raises(UserError, match=r"options.steps \(there 9, now 12\)"):
        fit(tmp_path, toy(), steps=12)
    assert fit(tmp_path, toy(), workers=1) == 0


def test_one_writer_at_a_time(tmp_path):
    with (
        loop.claimed(tmp_path / "out"),
        pytest.raises(UserError, match="another process is writing it"),
        loop.claimed(tmp_path / "out"),
    ):
        pass
    with loop.claimed(tmp_path / "out"):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"), loop.claimed(tmp_path / "file"):
        pass


def test_a_loss_that_is_not_finite_ends_it(tmp_path):
    task = toy()
    with torch.no_grad():
        task.model.conv.weight.fill_(torch.inf)
    with pytest.raises(Fault, match=r"step 1: the loss is not finite \(square nan\)"):
        fit(tmp_path, task)
    assert checkpoint.steps(tmp_path) == []


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    rate = loop.lr
    monkeypatch.setattr(loop, "lr", lambda options, clock: np.inf if clock.step == 3 else rate(options, clock))
    with pytest.raises(Fault, match=r"is not finite after step 4; try a lower lr"):
        fit(tmp_path, toy())
    assert checkpoint.steps(tmp_path) == [2]


def test_too_few_images_and_an_image_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="batch_size = 12: larger than the 11 images"):
        fit(tmp_path, toy(), batch_size=12)

    def damaged(epoch, index):
        if index == 5:
            raise UserError("image 5: damaged")

    with pytest.raises(UserError, match="image 5: damaged"):
        fit(tmp_path, toy(on_load=damaged))
