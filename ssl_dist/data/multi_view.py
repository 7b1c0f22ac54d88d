"""K views of an image for a data loader of one's own: `ssl_dist.MultiView`.

    views = ssl_dist.MultiView("simclr", size=224, normalize=(mean, std))
    loader = DataLoader(views.over(ImageFolder(root)), batch_size=256, num_workers=8, shuffle=True)
    for epoch in range(100):
        views.set_epoch(epoch)
        for x, label in loader:                              # x: [B, 2, 3, 224, 224]

A view is a function of (seed, epoch, index of the image, number of the view), as in the trainings of this package: not
of the workers, the batch, or the order. With `dtype=torch.uint8` the loader moves a fourth of the bytes, and the loop
makes the same floats of them on its device:

    views = ssl_dist.MultiView("simclr", size=224, normalize=(mean, std), dtype=torch.uint8)
    x = views.to_float(x.to(device))                         # in the loop
"""

import functools
import hashlib
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ssl_dist.config import Normalize, validate
from ssl_dist.config.recipe import ViewGroup
from ssl_dist.data.normalize import LEVELS, Channels, normalized, of_channels
from ssl_dist.data.pillow import upright_pixels
from ssl_dist.errors import UserError, did_you_mean, quoted
from ssl_dist.views import MAX_CHANNELS, Images, PixelFormat, make_views, view_specs
from ssl_dist.views.pixels import refuse_steps_of_colour

Recipe = Mapping[str, Any]

_CROP: Recipe = {"random_resized_crop": {"scale": [0.08, 1.0]}, "horizontal_flip": 0.5}
_STRONG: Recipe = {"p": 0.8, "brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}
_VICREG: Recipe = {
    "random_resized_crop": {"scale": [0.08, 1.0], "interpolation": "bicubic"}, "horizontal_flip": 0.5, "grayscale": 0.2,
    "color_jitter": {"p": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1},
}  # fmt: skip
# Of the papers: relational reasoning (as in configs/cifar10), SimCLR (appendix A, at full strength), VICReg (as in
# configs/imagenet). The number of views is left open where it is the user's choice.
RECIPES: dict[str, list[Recipe]] = {
    "relational": [{**_CROP, "color_jitter": _STRONG, "grayscale": 0.2}],
    "simclr": [{**_CROP, "color_jitter": _STRONG, "grayscale": 0.2, "gaussian_blur": {"p": 0.5, "sigma": [0.1, 2.0]}}],
    "vicreg": [
        {"num": 1, **_VICREG, "gaussian_blur": {"p": 1.0, "sigma": [0.1, 2.0]}},
        {"num": 1, **_VICREG, "gaussian_blur": {"p": 0.1, "sigma": [0.1, 2.0]}, "solarize": {"p": 0.2}},
    ],
}


class MultiView:
    """K views of an image, [K, C, S, S]: float32 in [0, 1] or normalised, or their levels.

    recipe: a name (relational, simclr, vicreg), or one or several groups as `views.groups` of a config has them; num:
    K, where the recipe leaves it open. Groups of different sizes give a list, a tensor a group. size: S of groups that
    name none. normalize: mean and standard deviation of the channels of pixels in [0, 1]. dtype: float32, or that
    of the images, uint8 or uint16, which leaves the rest to `to_float`. Raises `UserError` for a recipe that is none.
    """

    def __init__(
        self,
        recipe: str | Recipe | Sequence[Recipe] = "relational",
        num: int = 2,
        size: int = 224,
        normalize: tuple[Channels, Channels] | Normalize | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ):
        if isinstance(recipe, str) and recipe not in RECIPES:
            raise UserError(
                f"recipe = {recipe!r}: no such recipe; {did_you_mean(recipe, RECIPES)}recipes: {', '.join(RECIPES)}"
            )
        given = RECIPES[recipe] if isinstance(recipe, str) else recipe
        groups = [*given] if isinstance(given, Sequence) else [given]
        if not groups or not all(isinstance(group, Mapping) for group in groups):
            raise UserError(f"recipe = {quoted(recipe)}: give a name, or one or several dicts as views.groups has them")
        if dtype != torch.float32 and dtype not in LEVELS:
            raise UserError(f"dtype = {quoted(dtype)}: give torch.float32, torch.uint8 or torch.uint16")
        self.dtype = dtype
        num, size, self.seed = _whole("num", num, 1), _whole("size", size, 1), _whole("seed", seed)
        parsed = [validate(ViewGroup, dict(group), f"recipe[{n}].") for n, group in enumerate(groups)]
        num_views = sum(group.num or num for group in parsed)
        self.specs, self._groups = view_specs(parsed, num_views, size), parsed
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # workers that live on see a new one
        self._constants = None if normalize is None else of_channels(normalize)

    def set_epoch(self, epoch: int) -> None:
        """Other views from now on, also in workers that are there already; images in flight keep theirs."""
        self._epoch[0] = _whole("epoch", epoch)

    def __call__(self, image: Image.Image | np.ndarray, index: int | None = None) -> Tensor | list[Tensor]:
        """The views of an image: PIL, set upright by its EXIF orientation, or uint8 or uint16 [H, W, C], C to 32.
        index: its number in the data set; None, as a torchvision transform is called: a number made of its pixels."""
        pixels = _pixels(image)
        if index is None:
            index = int.from_bytes(hashlib.blake2b(pixels.tobytes(), digest_size=7).digest())
        parts = [part[:, 0] for part in self.batch(pixels[None], [index])]
        if self.dtype == torch.float32:
            parts = [self.to_float(part) for part in parts]
        elif self.dtype != parts[0].dtype:
            raise UserError(f"dtype = {self.dtype}: the images are of {parts[0].dtype}; give this, or torch.float32")
        if len({spec.size for spec in self.specs}) > 1:
            return parts
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def to_float(self, levels: Tensor) -> Tensor:
        """float32 of views uint8 or uint16 [..., C, S, S], on their device: in [0, 1], or normalised."""
        if not isinstance(levels, Tensor) or levels.dtype not in LEVELS or levels.dim() < 3:
            given = f"{list(levels.shape)} of {levels.dtype}" if isinstance(levels, Tensor) else type(levels).__name__
            raise ValueError(f"levels are {given}: give a tensor uint8 or uint16 [..., C, S, S], one a group of views")
        channels = levels.shape[-3]
        constants = self._constants or Normalize(mean=(0.0,) * channels, std=(1.0,) * channels)
        if len(constants.mean) != channels:
            raise UserError(
                f"normalize: is of {len(constants.mean)} channels, and the image has {channels}; give as many"
            )
        return _to_float(constants.mean, constants.std, levels.device)(levels[None])[0]

    def batch(self, pixels: np.ndarray, indices: Sequence[int] | np.ndarray) -> list[Tensor]:
        """The views of images uint8 or uint16 [B, H, W, C] with these numbers in the data set: [K, B, C, S, S] of their
        type a group. Raises `UserError` where a recipe changes colours, and the images are not RGB with 8 bits."""
        pixels = np.ascontiguousarray(pixels)
        if (
            pixels.dtype not in (np.uint8, np.uint16)
            or pixels.ndim != 4
            or not 1 <= pixels.shape[3] <= MAX_CHANNELS
            or len(indices) != len(pixels)
            or 0 in pixels.shape[1:]
        ):
            raise ValueError(
                f"pixels {list(pixels.shape)} of {pixels.dtype} and {len(indices)} indices: give uint8 or uint16 "
                f"[B, H, W, C], C up to {MAX_CHANNELS}, and B indices"
            )
        refuse_steps_of_colour(self._groups, PixelFormat.of(pixels), "recipe[{}]")
        heights, widths = (np.full(len(pixels), side, np.int64) for side in pixels.shape[1:3])
        images = Images(pixels, heights, widths, np.asarray(indices, np.int64))
        epoch = int(self._epoch)
        return [torch.from_numpy(make_views(images, s, s.view_ids, self.seed, epoch)) for s in self.specs]

    def over(self, dataset: Any) -> "Views":
        """The data set with the views of its images in the place of these, each drawn by its index there."""
        return Views(dataset, self)


class Views(Dataset):
    """A data set of (image, ...) as one of (views, ...)."""

    def __init__(self, dataset: Any, views: MultiView):
        self.dataset, self.views = dataset, views

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        index = range(len(self))[index]  # the last one has one number, and behind it there is none
        item = self.dataset[index]
        if isinstance(item, tuple | list):
            return (self.views(item[0], index), *item[1:])
        return self.views(item, index)


@functools.lru_cache(maxsize=8)
def _to_float(mean: Channels, std: Channels, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Kept, for the table behind it; not by a `MultiView`, which workers that are spawned get pickled."""
    return normalized(Normalize(mean=mean, std=std), torch.float32, device, torch.contiguous_format)


def _whole(name: str, value: Any, least: int | None = None) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise UserError(f"{name} = {quoted(value)}: give a whole number") from None
    if least is not None and number < least:
        raise UserError(f"{name} = {number}: give {least} or more")
    return number


def _pixels(image: Any) -> np.ndarray:
    """Of one image: [H, W, C]."""
    if isinstance(image, Image.Image):
        return upright_pixels(image)
    if not isinstance(image, np.ndarray) or image.dtype not in (np.uint8, np.uint16) or image.ndim != 3:
        given = f"{list(image.shape)} of {image.dtype}" if hasattr(image, "dtype") else type(image).__name__
        raise ValueError(f"an image is {given}: give a PIL image, or an array uint8 or uint16 [H, W, C]")
    return np.ascontiguousarray(image)
