"""The interface of a method's author is typed: mypy reports what a method may not use, and nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")

ROOT = Path(__file__).parent.parent

RIGHT = """
import torch
from torch import Tensor, nn

from ssl_dist import clock
from ssl_dist.config import Section
from ssl_dist.distributed.world import one_process
from ssl_dist.methods import base
from ssl_dist.methods.base import Backbone, Batch, Clock, Extract, Info, Output, SSLMethod, World
from ssl_dist.nn import mlp


class Options(Section):
    weight: float = 1.0


class Method(SSLMethod[Options]):
    num_views = 2
    mean: Tensor

    def __init__(self, backbone: Backbone, info: Info, options: Options):
        super().__init__(backbone, info, options)
        self.projector = mlp([info.feature_dim, 16])
        self.register_buffer("mean", torch.zeros(info.feature_dim))

    def before_step(self, clock: Clock, extract: Extract, world: World) -> list[nn.Parameter]:
        if clock.step % clock.steps_per_epoch == 0:
            rows = extract(self.backbone, augmented=True)
            self.mean.copy_(world.all_reduce_sum(rows.values.sum(0)) / self.info.num_images)
        return []

    def forward(self, batch: Batch, world: World) -> Output:
        x_MD, y_MD = self.gathered(batch, world, lambda images: self.projector(self.backbone(images)))
        lo, hi = world.share(len(x_MD))
        loss = world.scale_for_ddp_mean((x_MD[lo:hi] - y_MD[lo:hi]).square().sum() * self.options.weight)
        return Output(loss, {"lo": lo, "positions": batch.positions.sum()})


world: base.World = one_process()  # what a training passes
now: base.Clock = clock.Clock(0, 1, 2)
"""

WRONG = """

class Wrong(Method):
    def before_step(self, clock: Clock, extract: Extract, world: World) -> list[nn.Parameter]:
        extract(self.backbone, augment=True)  # error
        return clock.epoch_number  # error

    def forward(self, batch: Batch, world: World) -> Output:
        print(world.rank_info)  # error
        print(world.alone)  # error
        print(self.options.misspelt)  # error
        print(self.info.classes)  # error
        print(batch.position)  # error
        print(batch.positions + 1)
        world.gather_views(batch.views)  # error
        return Output(metrics={})  # error

    def explain(self) -> dict[str, str]:  # error
        return {}
"""


@pytest.mark.slow
def test_mypy_reports_wrong_uses_alone(tmp_path):
    text = RIGHT + WRONG
    (tmp_path / "guest.py").write_text(text)
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", str(tmp_path / "guest.py")]
    env = os.environ | {"MYPYPATH": str(ROOT)}
    answer = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    errors = [line for line in answer.stdout.splitlines() if "guest.py:" in line and ": error:" in line]
    reported = {int(line.split("guest.py:")[1].split(":")[0]) for line in errors}
    wrong = {number for number, line in enumerate(text.splitlines(), 1) if line.endswith("# error")}
    assert reported == wrong, answer.stdout + answer.stderr
