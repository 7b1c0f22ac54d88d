"""The filters of a network's first convolution as a picture: what it sees first in an image."""

import torch
from torch import Tensor, nn

COLUMNS = 8  # filters beside each other, and pixels between them, as torchvision's make_grid has them
GAP = 2
MAGNIFIED = 4  # times, without smoothing


def first_convolution(network: nn.Module) -> Tensor | None:
    """The weights [N, 3, h, w] of the first layer that has weights, where it is a convolution of images and its filters
    have more than one pixel; else None. Of more than three channels those of the first three, of fewer those of the
    first, as pictures show the images."""
    for layer in network.modules():
        if any(True for _ in layer.parameters(recurse=False)):
            if isinstance(layer, nn.Conv2d) and layer.weight[0, 0].numel() > 1:
                weights = layer.weight.detach()
                return weights[:, :3] if weights.shape[1] >= 3 else weights[:, :1].expand(-1, 3, -1, -1)
            return None
    return None


def grid(weights_N3HW: Tensor) -> Tensor:
    """The filters in rows of eight on black, uint8 [3, height, width]. Each goes from its smallest weight, which is 0,
    to its largest, 255."""
    weights = weights_N3HW.float().cpu()
    low, high = weights.amin((1, 2, 3), keepdim=True), weights.amax((1, 2, 3), keepdim=True)
    pixels = ((weights - low) / (high - low).clamp(min=1e-5) * 255).round().to(torch.uint8)
    count, _, height, width = pixels.shape
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    cells = torch.zeros(rows * columns, 3, height + GAP, width + GAP, dtype=torch.uint8)
    cells[:count, :, GAP:, GAP:] = pixels
    cells = cells.view(rows, columns, 3, height + GAP, width + GAP)
    page = cells.permute(2, 0, 3, 1, 4).reshape(3, rows * (height + GAP), columns * (width + GAP))
    page = torch.nn.functional.pad(page, (0, GAP, 0, GAP))
    return page.repeat_interleave(MAGNIFIED, 1).repeat_interleave(MAGNIFIED, 2)
