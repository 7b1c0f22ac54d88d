"""Pictures of what a vision transformer makes of some images.

Attention: what the class token takes of each patch in the last block (Caron et al. 2021, "Emerging properties in
self-supervised vision transformers", figure 1), the mean over the heads and each head. Principal components: the first
three of the features of all patches of all images, as red, green and blue (Oquab et al. 2023, "DINOv2", figure 1):
patches of one colour are alike, in one image or in several.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ssl_dist import views
from ssl_dist.config import Data
from ssl_dist.data.reader import Reader
from ssl_dist.errors import UserError
from ssl_dist.nn.backbone import TokenBackbone
from ssl_dist.views import shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_IMAGES = 8
_COLUMN_INCHES = 1.6
_NO_SPREAD = 1e-6  # of the largest feature: what differs by less is equal, but for rounding


@dataclass(frozen=True)
class Picture:
    """name: of its file and in TensorBoard; groups: of columns, uint8 [V, N, 3, S, S], a row for each image; labels: of
    the columns; title, caption: of its figure."""

    name: str
    groups: Sequence[np.ndarray]
    labels: Sequence[str]
    title: str
    caption: str

    def figure(self) -> "Figure":
        from ssl_dist.run import plots  # matplotlib takes a second

        return plots.columns(self.groups, self.labels, _COLUMN_INCHES)[0]


def read_images(reader: Reader, ids: np.ndarray, data: Data) -> np.ndarray:
    """The images of these ids under the test transform, uint8 or uint16 [N, C, S, S]."""
    in_order, places = np.unique(ids, return_inverse=True)
    [images] = reader.batches([in_order])
    return views.test_views(images, data.image_size, data.eval_resize, data.eval_interpolation)[places]


@torch.no_grad()
def pictures(
    backbone: TokenBackbone,
    pixels_NCSS: np.ndarray,
    to_input: Callable[[Tensor], Tensor],
    statistics: tuple[Sequence[float], Sequence[float]],
    when: str = "",
) -> list[Picture]:
    """The pictures of images, uint8 or uint16 [N, C, S, S], by a backbone in evaluation mode: `patch_pca`, and before
    it `attention` where there is a class token. to_input: makes input of pixels on the backbone's device; statistics:
    mean and std of the images, to show others than RGB by; when: the moment of a training, for captions.

    Raises `UserError` for features that are not finite.
    """
    device = next(backbone.parameters()).device
    images_N3SS = shown.shown(pixels_NCSS, *statistics)
    x = to_input(torch.from_numpy(pixels_NCSS).to(device))
    components_N3hw = principal_components(backbone.patch_map(backbone.tokens(x), x))
    colours_N3SS = enlarged(components_N3hw, x.shape[-1])
    found = []
    if backbone.has_class_token:
        attention_NHhw = class_attention(backbone, x)
        shares_NVhw = torch.cat([attention_NHhw.mean(1, keepdim=True), attention_NHhw], 1)
        maps_VN3SS = [enlarged(colour_map(share_Nhw), x.shape[-1]) for share_Nhw in shares_NVhw.unbind(1)]
        found.append(
            Picture(
                "attention",
                [images_N3SS[None], maps_VN3SS[0][None], np.stack(maps_VN3SS[1:])],
                ["image", "mean", *(f"head {number}" for number in range(attention_NHhw.shape[1]))],
                "Attention of the class token",
                f"What the class token takes of each patch in the last block{when}: the mean over the heads, and each "
                "head. Dark is nothing, bright the patch that it takes the most of, in each square by itself.",
            )
        )
    found.append(
        Picture(
            "patch_pca",
            [images_N3SS[None], colours_N3SS[None]],
            ["image", "patches"],
            "Principal components of the patches",
            f"The first three principal components of the features of all patches of these images{when}, as red, green "
            "and blue: patches of one colour are alike.",
        )
    )
    return found


def class_attention(backbone: TokenBackbone, images: Tensor) -> Tensor:
    """What the class token takes of each patch in the last block, float32 [N, heads, h, w] on the host; the rest to a
    sum of 1 it takes of itself and of other tokens that are no patches."""
    sides = [side // backbone.patch_size for side in images.shape[2:]]
    one_by_one = [backbone.last_attention(image)[0, :, 0, backbone.num_prefix_tokens :] for image in images.split(1)]
    return torch.stack(one_by_one).float().cpu().unflatten(2, sides)


def principal_components(maps_NDhw: Tensor) -> Tensor:
    """The first three principal components over all places of all maps, float64 [N, 3, h, w] on the host, each from 0
    to 1. Of a component's two signs the one is taken with which its largest weight is positive."""
    number, _, height, width = maps_NDhw.shape
    x_PD = maps_NDhw.permute(0, 2, 3, 1).flatten(0, 2).cpu().double()
    if not x_PD.isfinite().all():
        raise UserError(
            "pictures of the patches: their features are not finite, the weights have diverged; use an earlier "
            "checkpoint, or train anew with a lower optim.lr"
        )
    largest = x_PD.abs().max()
    x_PD = x_PD - x_PD.mean(0)
    _, axes_DD = torch.linalg.eigh(x_PD.T @ x_PD)  # variances rise
    axes_D3 = axes_DD[:, -3:].flip(1)
    signs_3 = axes_D3.gather(0, axes_D3.abs().argmax(0, keepdim=True)).sign()
    y_P3 = x_PD @ (axes_D3 * signs_3)
    low, high = y_P3.aminmax(dim=0)
    y_P3 = (y_P3 - low) / (high - low).clamp(min=max(_NO_SPREAD * float(largest), torch.finfo(torch.float64).tiny))
    return y_P3.view(number, height, width, 3).permute(0, 3, 1, 2)


def colour_map(shares_Nhw: Tensor) -> Tensor:
    """Shares as colours [N, 3, h, w] from 0 to 1, by matplotlib's viridis: 0 is dark, the largest of a map bright."""
    from matplotlib import colormaps

    relative = shares_Nhw / shares_Nhw.amax((1, 2), keepdim=True).clamp(min=torch.finfo(shares_Nhw.dtype).tiny)
    return torch.from_numpy(colormaps["viridis"](relative.numpy())[..., :3]).movedim(3, 1)


def enlarged(maps_N3hw: Tensor, side: int) -> np.ndarray:
    """Maps of colours from 0 to 1 as images uint8 [N, 3, side, side]: a square of one colour for each place."""
    times = side // maps_N3hw.shape[-1]
    levels = (maps_N3hw * 255).round().to(torch.uint8)
    return levels.repeat_interleave(times, 2).repeat_interleave(times, 3).numpy()
