"""RotationNet (Gidaris, Singh & Komodakis, ICLR 2018, arXiv:1803.07728).

Every view is shown turned by 0, 90, 180 and 270 degrees; the network tells by how much. One view of an image by
default; with K of them it is the baseline of figure 2b of relational reasoning (arXiv:2006.05849).
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


def quarter_turns(images: Tensor) -> Tensor:
    """Square images [..., S, S] -> [4, ..., S, S], turned by 0, 90, 180 and 270 degrees counter-clockwise."""
    return torch.stack([torch.rot90(images, turns, (-2, -1)) for turns in range(TURNS)])


def turned(batch: Batch) -> Batch:
    """A batch whose views are the quarter turns of those of the one group of `batch`: first all upright ones."""
    [views], [ids] = batch.views, batch.view_ids
    view_ids = torch.arange(TURNS)[:, None] + TURNS * ids
    return replace(batch, views=[quarter_turns(views).flatten(0, 1)], view_ids=[view_ids.flatten()])


def turn_targets(num_upright: int, device: torch.device | str = "cpu") -> Tensor:
    """The quarter turns of the rows (turn, upright image) of `quarter_turns`, int64 [4 * num_upright]."""
    return torch.arange(TURNS, device=device).repeat_interleave(num_upright)


class Method(SSLMethod[Options]):
    num_views = 1
    free_views = True

    def __init__(self, backbone: Backbone, info: Info, options: Options):
        super().__init__(backbone, info, options)
        self.num_views = info.views_of_one_group("rotation")
        self.classifier = nn.Linear(info.feature_dim, TURNS)

    def explain(self, world_size: int, device: str) -> dict[str, str]:
        turned = TURNS * self.num_views * self.info.batch_size
        return {"rotations": f"{TURNS} of every view, so that {turned} images a step pass the network"}

    def represent(self, batch: Batch, network: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
        """Of the four turns of every view, [4 * V_local, B_local, D], which pass the network as one batch."""
        return super().represent(turned(batch), network)

    def forward(self, batch: Batch, world: World) -> Output:
        """Metrics: accuracy over all turned images, in percent."""
        h_RBD = self.represent(batch)[0]
        logits = at_least_float32(self.classifier(h_RBD.flatten(0, 1)))
        target = turn_targets(len(logits) // TURNS, h_RBD.device)
        metrics = {"accuracy": accuracy(logits, target, world)}
        upright = world.gather_images(h_RBD[0].detach())
        return Output(F.cross_entropy(logits, target), metrics, representations=upright)
