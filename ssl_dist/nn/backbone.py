"""What a backbone is: images to features, through stages whose maps a method or a probe may ask for."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

Step = tuple[str, Callable[[Tensor], Tensor]]


class Backbone(nn.Module):
    """Images [N, C, S, S] -> features [N, D].

    in_channels: C, 3 unless `backbones.build` was asked for others. feature_dim: D. stages: name -> channels of each
    stage's map, in order of depth; the first one is the map after the first non-linearity. A subclass gives the `steps`
    from stage to stage, and `pooled` where it is not the mean.
    """

    # What takes images, and then, if anything, what has a row an image.
    passes: ClassVar[tuple[str, ...]] = ("forward", "forward_stages")
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

    def offset(self) -> nn.Parameter | None:
        """What is added to the features of all images alike, as the bias of a normalisation with which the network ends
        is; None: nothing is."""
        return None

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


class TokenBackbone(Backbone):
    """A vision transformer: images [N, C, S, S] -> tokens [N, P + n, D], P of no patch (the class token first, where
    there is one) and one of each of n patches, row by row; features are made of these.

    Its stages: every block's patches as a map, `blocks.3`; its class token after the last normalisation as a map of one
    pixel, `blocks.3.class`; and those of all blocks together after it, `patches` and `class`.
    """

    passes = (*Backbone.passes, "tokens")
    patch_size: int  # side of a patch in pixels
    token_dim: int  # D of a token
    num_prefix_tokens: int  # P
    has_class_token: bool
    grid: tuple[int, int]  # rows and columns of patches of the images whose positions it holds

    def tokens(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """All tokens after the last normalisation [N, P + n, D]. kept: int64 [N, n], the patches that go in, each image
        its own; None: all of them, in their order."""
        raise NotImplementedError(f"{type(self).__module__} must define tokens")

    def patch_projection(self) -> nn.Module:
        """What turns the pixels of a patch into a token."""
        raise NotImplementedError(f"{type(self).__module__} must define patch_projection")

    def fix_positions(self, places: Tensor) -> None:
        """Give the patches of `grid` these positions [n, D], and tokens of no patch none. They do not learn."""
        raise NotImplementedError(f"{type(self).__module__} must define fix_positions")

    def last_attention(self, images: Tensor) -> Tensor:
        """Of the last block [N, heads, P + n, P + n]: what each token takes of each, which sums to 1 over the last
        dimension."""
        raise NotImplementedError(f"{type(self).__module__} must define last_attention")

    def token_stages(self, num_blocks: int) -> dict[str, int]:
        """`stages` of a network of so many blocks."""
        names = [f"blocks.{number}" for number in range(num_blocks)]
        of_class = [f"{name}.class" for name in names] if self.has_class_token else []
        last = ["class"] if self.has_class_token else []
        return dict.fromkeys([*names, *of_class, "patches", *last], self.token_dim)

    def token_maps(self, outputs: list[Tensor], norm: Callable[[Tensor], Tensor], images: Tensor) -> dict[str, Tensor]:
        """The map of every stage, from the tokens [N, P + n, D] that leave each block. norm: the last normalisation."""
        maps = {f"blocks.{number}": self.patch_map(x, images) for number, x in enumerate(outputs)}
        normalized = [norm(x) for x in (outputs if self.has_class_token else outputs[-1:])]
        if self.has_class_token:
            of_class = [x[:, 0, :, None, None] for x in normalized]
            maps |= {f"blocks.{number}.class": x for number, x in enumerate(of_class)} | {"class": of_class[-1]}
        return maps | {"patches": self.patch_map(normalized[-1], images)}

    def patch_map(self, tokens: Tensor, images: Tensor) -> Tensor:
        """The tokens [N, P + n, D] of images that are of patches, each at its place: [N, D, h, w]."""
        sides = [side // self.patch_size for side in images.shape[2:]]
        return tokens[:, self.num_prefix_tokens :].transpose(1, 2).unflatten(2, sides)


def freeze_offset(network: nn.Module) -> None:
    """Let the offset of a backbone keep its value, for a method whose loss does not depend on it: its gradient is 0, of
    which rounding makes noise that Adam would make as large as any gradient, and another on each number of ranks."""
    if isinstance(network, Backbone) and (offset := network.offset()) is not None:
        offset.requires_grad_(False)


def outermost_blocks(module: nn.Module) -> list[nn.Module]:
    """The modules below `module` that are made of others, without mere sequences of modules and without their parts."""
    found: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, nn.Sequential | nn.ModuleList):
            found += outermost_blocks(child)
        elif next(child.children(), None) is not None:
            found.append(child)
    return found
