"""Pictures of attention during a training: of the same images at every time, see results/attention.py."""

import contextlib
from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from ssl_dist.clock import Clock
from ssl_dist.data.plan import limited
from ssl_dist.nn.backbone import TokenBackbone
from ssl_dist.results import attention
from ssl_dist.results.figures import add_picture
from ssl_dist.run.blueprint import RunPlan
from ssl_dist.run.log import RunLog


class AttentionPictures:
    """Of images that are trained on, evenly spaced, under the test transform: in TensorBoard and RUN/figures."""

    def __init__(self, plan: RunPlan):
        self.plan = plan

    @cached_property
    def _pixels(self) -> np.ndarray:
        """uint8 or uint16 [N, C, S, S]."""
        ids = self.plan.order.train_ids
        with self.plan.open_reader() as reader:
            return attention.read_images(reader, ids[limited(len(ids), attention.NUM_IMAGES)], self.plan.config.data)

    def draw(self, encoder: nn.Module, to_input: Callable[[Tensor], Tensor], log: RunLog, clock: Clock) -> None:
        """Draw them by an encoder in evaluation mode."""
        from ssl_dist.run import plots  # matplotlib takes a second

        assert isinstance(encoder, TokenBackbone), "the plan refuses others"
        split = self.plan.split
        when, statistics = f" after step {clock.step:,}", (split.mean, split.std)
        with contextlib.ExitStack() as stack:
            if self.plan.config.compile:  # graphs of these few images would take longer than they do
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            pictures = attention.pictures(encoder, self._pixels, to_input, statistics, when)
        for picture in pictures:
            log.pictures(picture.name, clock, picture.groups)
            texts = picture.name, picture.figure(), picture.title, picture.caption
            add_picture(
                self.plan.run / "figures", {"dataset": split.name, "split": split.split}, plots.TRAINING, *texts
            )
