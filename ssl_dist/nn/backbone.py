"""What a backbone is: images to features, through stages whose maps a method or a probe may ask for."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Step = tuple[str, Callable[[Tensor], Tensor]]


class Backbone(nn.Module):
    """Images [N, C, S, S] -> features [N, D].

    in_channels: C, 3 unless `backbones.build` was asked for others. feature_dim: D. stages: name -> channels of each
    stage's map, in order of depth; the first one is the map after the first non-linearity. A subclass gives the `steps`
    from stage to stage, and `pooled` where it is not the mean.
    """

    in_channels: int = 3
    feature_dim: int
    stages: dict[str, int]

    def steps(self) -> list[Step]:
        """For each stage its name and what turns the map before it (at first: the images) into its own."""
        raise NotImplementedError(f"{type(self).__module__} must define steps")

    def pooled(self, last_map: Tensor) -> Tensor:
        """The map of the last stage [N, C, h, w] -> features [N, D]."""
        return torch.flatten(nn.functional.adaptive_avg_pool2d(last_map, 1), 1)

    def blocks(self) -> list[nn.Module]:
        """What `backbone.recompute` computes again, in order: modules that keep nothing for one another."""
        return outermost_blocks(self)

    def forward(self, x: Tensor) -> Tensor:
        for _, step in self.steps():
            x = step(x)
        return self.pooled(x)

    def forward_stages(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What `forward` returns, and the map [N, C, h, w] of every stage, of one pass."""
        maps = {}
        for name, step in self.steps():
            maps[name] = x = step(x)
        return self.pooled(x), maps


def outermost_blocks(module: nn.Module) -> list[nn.Module]:
    """The modules below `module` that are made of others, without mere sequences of modules and without their parts."""
    found: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, nn.Sequential | nn.ModuleList):
            found += outermost_blocks(child)
        elif next(child.children(), None) is not None:
            found.append(child)
    return found
