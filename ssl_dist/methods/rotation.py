"""RotationNet (Gidaris, Singh & Komodakis, ICLR 2018, arXiv:1803.07728).

Every image is shown turned by 0, 90, 180 and 270 degrees; the network tells by how much.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_dist.config import Section
from ssl_dist.methods.base import Backbone, Batch, Info, Output, SSLMethod, World, accuracy
from ssl_dist.nn.layers import at_least_float32

TURNS = 4


class Options(Section):
    pass


def quarter_turns(images_BCSS: Tensor) -> Tensor:
    """Square images [B, C, S, S] -> [4, B, C, S, S], turned by 0, 90, 180 and 270 degrees counter-clockwise."""
    return torch.stack([torch.rot90(images_BCSS, turns, (2, 3)) for turns in range(TURNS)])


def turned(batch: Batch) -> Batch:
    """A batch whose views are the quarter turns of the one view of `batch`."""
    return replace(batch, views=[quarter_turns(batch.views[0][0])], view_ids=[torch.arange(TURNS)])


def turn_targets(num_images: int, device: torch.device | str = "cpu") -> Tensor:
    """The quarter turns of the rows (turn, image) of `quarter_turns`, int64 [4 * B]."""
    return torch.arange(TURNS, device=device).repeat_interleave(num_images)


class Method(SSLMethod[Options]):
    num_views = 1

    def __init__(self, backbone: Backbone, info: Info, options: Options):
        super().__init__(backbone, info, options)
        self.classifier = nn.Linear(info.feature_dim, TURNS)

    def explain(self, world_size: int, device: str) -> dict[str, str]:
        return {
            "rotations": f"{TURNS} of every view, so that {TURNS * self.info.batch_size} images a step pass the network"
        }

    def represent(self, batch: Batch, network: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
        """Of every image's four turns, [4, B_local, D], which pass the network as one batch."""
        return super().represent(turned(batch), network)

    def forward(self, batch: Batch, world: World) -> Output:
        """Metrics: accuracy over all turned images, in percent."""
        h_4BD = self.represent(batch)[0]
        logits = at_least_float32(self.classifier(h_4BD.flatten(0, 1)))
        target = turn_targets(h_4BD.shape[1], h_4BD.device)
        metrics = {"accuracy": accuracy(logits, target, world)}
        upright = world.gather_images(h_4BD[0].detach())
        return Output(F.cross_entropy(logits, target), metrics, representations=upright)
