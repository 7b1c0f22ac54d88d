"""Every method, stopped and resumed: weights, buffers, optimizer and metrics are bit for bit those of an uninterrupted
run. A new file in ssl_dist/methods is tested here by its configs/digits/<name>-*.yaml, without an edit."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from ssl_dist import config, methods
from ssl_dist.config import shipped
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.distributed.signals import STOPPED
from ssl_dist.distributed.world import one_process
from ssl_dist.run.blueprint import derive
from ssl_dist.storage import checkpoint
from ssl_dist.train.loop import claimed, fit
from ssl_dist.train.state import TrainState

DIGITS = Path("configs/digits")
TRAINABLE = [name for name in methods.names() if methods.find(name).trainable]
STEPS = 11  # two epochs of four steps and a part of the third
# In a short training more of them would leave no room for a stop between two.
FEWER_RELABELINGS = {"sela": ["method.options.relabelings=3"]}
TIME_KEYS = ("images_per_s", "views_per_s", "data_wait", "seconds_per_step")


class StopAfter:
    """A StopRequest that is set in the step after which `step` steps are completed."""

    def __init__(self, training, step):
        self.steps_left, self.saving = step - training.clock.step, False

    @property
    def requested(self):
        self.steps_left -= 1
        return self.steps_left == 0


class RecordingTrainState(TrainState):
    """A TrainState that records before which steps the method extracted outputs for all images."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.relabelled = set()

    def extract_at(self, clock):
        extract = super().extract_at(clock)

        def recorded_extract(*arguments, **options):
            self.relabelled.add(clock.step)
            return extract(*arguments, **options)

        return recorded_extract


def settings(name, digits, run, precision):
    return config.load(
        shipped.of_method(name, DIGITS),
        [
            f"data.root={digits}", f"run_dir={run}", "data.limit=72", "data.reader=arrays", "data.workers=1",
            "optim.batch_size=16", "optim.epochs=null", f"optim.steps={STEPS}", f"precision={precision}",
            "checkpoint.every_epochs=null", "log.every_steps=1", "compile=false", *FEWER_RELABELINGS.get(name, []),
        ],
    )  # fmt: skip


def train(run_config, until, session):
    """Go on with the run until `until` steps are completed; the steps before which the method relabelled.

    session: a number of which nothing may depend, the seed of torch's and numpy's own generators.
    """
    blueprint, world = derive(run_config, RankInfo()), one_process()
    with claimed(blueprint, world):
        state = RecordingTrainState(blueprint, world)
        torch.manual_seed(session), np.random.seed(session)
        assert fit(state, StopAfter(state, until)) == (0 if until == STEPS else STOPPED)
    return state.relabelled


def stops(relabelled):
    """Half-way; and for a method that relabels again, right before that and in the middle between two times."""
    steps = {STEPS // 2}
    repeated = sorted(step for step in relabelled if step > 0)
    if repeated:
        gap, after = max((b - a, b) for a, b in pairwise([0, *repeated]))
        assert gap > 1, "it relabels before every step; no stop falls between two: see FEWER_RELABELINGS"
        steps |= {after, after - gap // 2}
    return sorted(steps)


def final_state(run):
    """Everything of the last checkpoint that a step depends on, name -> tensor or number."""
    state = checkpoint.load(checkpoint.newest(run))
    assert state["step"] == STEPS
    values = {f"method.{name}": value for name, value in state["method"].items()}
    for number, entry in state["optimizer"]["state"].items():
        values |= {f"optimizer.{number}.{name}": value for name, value in entry.items()}
    for group in state["optimizer"]["param_groups"]:
        values |= {f"optimizer.{name}": value for name, value in group.items()}
    return values


def metrics(run):
    """Of every step, as text, in which a NaN is equal to itself."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: json.dumps({key: v for key, v in line.items() if key not in TIME_KEYS}) for line in lines}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize("name", TRAINABLE)
def test_a_resumed_run_is_the_uninterrupted_one(name, precision, digits, tmp_path):
    whole, parts = (settings(name, digits, tmp_path / run, precision) for run in ("whole", "parts"))
    relabelled = train(whole, STEPS, session=0)
    for session, until in enumerate([*stops(relabelled), STEPS], start=1):
        relabelled -= train(parts, until, session)
        assert checkpoint.steps(Path(parts.run_dir))[-1] == until
    assert not relabelled, f"the resumed run did not relabel before steps {relabelled}"
    one, other = final_state(Path(whole.run_dir)), final_state(Path(parts.run_dir))
    assert one.keys() == other.keys()
    for key, value in one.items():
        same = torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
        assert same, f"{key} differs"
    assert metrics(Path(whole.run_dir)) == metrics(Path(parts.run_dir))
    assert list(metrics(Path(whole.run_dir))) == list(range(1, STEPS + 1))


def test_at_which_steps_a_run_is_stopped():
    assert stops(set()) == [5]
    assert stops({0}) == [5]
    assert stops({0, 4, 8}) == [5, 6, 8]
    assert stops({0, 4, 5}) == [2, 4, 5]
    with pytest.raises(AssertionError, match="FEWER_RELABELINGS"):
        stops({0, 1, 2})


def test_every_method_has_its_config():
    missing = [name for name in methods.names() if shipped.of_method(name, DIGITS) is None]
    assert not missing
