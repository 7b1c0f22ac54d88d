"""A trained network as a module that takes images as people have them: `ssl_dist.load`."""

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ssl_dist import config, views
from ssl_dist.config import Normalize
from ssl_dist.convert.channels import SUFFIX, read_channels
from ssl_dist.convert.encode import MAX_PIXELS, decoded
from ssl_dist.convert.walk import EXTENSIONS
from ssl_dist.data.normalize import Channels, normalized, of_channels
from ssl_dist.data.pillow import UnfitImage, upright_pixels
from ssl_dist.device import allow_tf32, chosen
from ssl_dist.distributed.rank import available_cores
from ssl_dist.errors import UserError
from ssl_dist.nn import features
from ssl_dist.nn.features import OUTPUT
from ssl_dist.progress import Progress
from ssl_dist.run import exported
from ssl_dist.run.encoder import BATCH_SIZE, Encoder, load_encoder, load_others
from ssl_dist.storage import hub

# Of the weights that are published, unless they say otherwise.
IMAGENET = Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

Pictures = Image.Image | np.ndarray | Tensor | Sequence[Image.Image | np.ndarray | Tensor]


class Embedder(nn.Module):
    """A frozen network in evaluation mode with the transform of its images, whose settings are attributes.

    It takes a picture or several: PIL images; pixels uint8 or uint16, arrays [H, W, C] or [N, H, W, C] and tensors
    [C, H, W] or [N, C, H, W], where C is 3 unless it was trained on images of others. PIL images are set upright by
    their EXIF orientation, the short side is resized to `resize`, and the centre of `size` x `size` pixels is
    normalised by `mean` and `std`. A tensor in floating point, [N, 3, S, S], counts as normalised and goes into the
    network as it is. The result is float32 [N, dim], on the network's device.
    """

    def __init__(self, encoder: Encoder, layer: str = OUTPUT):
        super().__init__()
        network, data = encoder.backbone, encoder.config.data
        self.network, self.layer = network.to(memory_format=torch.channels_last), layer
        self.dim = features.width(layer, network.stages, network.feature_dim)
        self.size, self.resize, self.interpolation = data.image_size, data.eval_resize, data.eval_interpolation
        self.mean, self.std = encoder.normalize.mean, encoder.normalize.std
        self.source, self.tf32 = encoder.file, encoder.config.tf32
        self.eval().requires_grad_(False)

    def extra_repr(self) -> str:
        """What stands in its text: where it comes from, and what it does with images."""
        return (
            f"{self.source}, layer {self.layer}, {self.dim} features; short side to {self.resize or self.size} "
            f"({self.interpolation}), centre {self.size} px, mean {self.mean}, std {self.std}"
        )

    @property
    def channels(self) -> int:
        """C of the images."""
        return len(self.mean)

    @property
    def device(self) -> torch.device:
        """That of the network."""
        return next(self.network.parameters()).device

    def forward(self, images: Pictures) -> Tensor:
        """Features float32 [N, dim] of these images, N = 1 of a single one. Raises `ValueError` where it is none."""
        allow_tf32(self.tf32)
        x = images if isinstance(images, Tensor) and images.is_floating_point() else self.transform(images)
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(
                f"images {list(x.shape)} in floating point: give normalised ones, [N, {self.channels}, S, S]"
            )
        x = x.to(self.device, next(self.network.parameters()).dtype, memory_format=torch.channels_last)
        return features.of_layer(self.network, self.layer, x).float()

    def transform(self, images: Pictures) -> Tensor:
        """What `forward` passes to the network for images that are not normalised: float32 [N, C, size, size]."""
        to_input = normalized(Normalize(mean=self.mean, std=self.std), torch.float32, self.device)
        with ThreadPoolExecutor(available_cores()) as threads:
            made = [*threads.map(self._view, _single(images))]
        if len({part.dtype for part in made}) > 1:
            raise ValueError("images of uint8 and of uint16 in one call: give each by themselves")
        pixels = np.concatenate(made) if made else np.empty((0, self.channels, self.size, self.size), np.uint8)
        return to_input(torch.from_numpy(pixels).to(self.device))

    def _view(self, picture: Any) -> np.ndarray:
        """The view [1, C, size, size] of a picture, or of what gives one."""
        pixels = _pixels(picture, self.channels)
        height, width = (np.array([side]) for side in pixels.shape[:2])
        image = views.Images(pixels[None], height, width, np.zeros(1, np.int64))
        return views.test_views(image, self.size, self.resize, self.interpolation)

    @torch.no_grad()
    def embed(
        self,
        images: str | os.PathLike[str] | Iterable[Any],
        batch_size: int = BATCH_SIZE,
        progress: bool = True,
    ) -> np.ndarray:
        """Features float32 [N, dim] of many images, on the host, with a progress bar.

        images: a folder (all pictures in it and below, in the order of `files_of`), pictures as `forward` takes them,
        or a DataLoader of batches, whose first part is taken where a batch has several. Warns of floating-point pixels
        that look as if they were not normalised. Raises `UserError` that names a file which cannot be read.
        """
        if isinstance(images, str | os.PathLike):
            files = files_of(images, EXTENSIONS if self.channels == 3 else (*EXTENSIONS, SUFFIX))
            batches: Iterable[Any] = _batches([*map(_File, files)], batch_size)
            total = len(files)
        elif isinstance(images, torch.utils.data.DataLoader):
            batches, total = images, len(images.dataset) if isinstance(images.dataset, Sized) else 0
        else:
            if isinstance(images, torch.utils.data.Dataset) or not isinstance(images, Iterable | Image.Image):
                raise ValueError(f"images are {type(images).__name__}: give a folder, pictures, or a DataLoader")
            single = isinstance(images, Image.Image) or (isinstance(images, np.ndarray | Tensor) and images.ndim == 3)
            pictures: Any = [images] if single else images
            whole = pictures if isinstance(pictures, np.ndarray | Tensor | Sequence) else [*pictures]
            batches, total = _batches(whole, batch_size), len(whole)
        rows = [np.empty((0, self.dim), np.float32)]
        with Progress("embedding", total, "image", quiet=not progress) as bar:
            for batch in batches:
                if isinstance(images, torch.utils.data.DataLoader) and isinstance(batch, list | tuple):
                    batch = batch[0]
                if len(rows) == 1:
                    self._warn_of_raw_pixels(batch)
                rows.append(self(batch).cpu().numpy())
                bar.update(len(rows[-1]))
        return np.concatenate(rows)

    def _warn_of_raw_pixels(self, batch: Any) -> None:
        """Of torchvision's ToTensor alone, say: the network would see images that it was not trained on."""
        if isinstance(batch, Tensor) and batch.is_floating_point() and batch.numel() and any(self.mean):
            low, high = batch.aminmax()
            if 0 <= low < high <= 1:
                warnings.warn(
                    f"embed: images in floating point from {low:.3g} to {high:.3g} count as normalised, which would "
                    f"have values below 0; give uint8, or normalise by mean {self.mean} and std {self.std}",
                    stacklevel=3,
                )


def load(
    source: str | os.PathLike[str],
    layer: str = OUTPUT,
    device: str | torch.device | None = None,
    *,
    backbone: str | None = None,
    image_size: int | None = None,
    resize: int | None = None,
    normalize: Normalize | tuple[Channels, Channels] | None = None,
    weights_prefix: str | None = None,
    resize_pos_embed: bool = False,
) -> Embedder:
    """The network of a run's folder (its newest checkpoint), of a checkpoint, of what `ssl-dist export` wrote with
    safetensors, or of a file of another program, also as hf://ORG/NAME or timm:NAME.

    layer: output, or a stage of the backbone, whose map is averaged over its places, or several of these joined by +,
    one behind the other. device: by default a GPU where there is one. backbone: of a file of another program, as in a
    config; then images are of 224 px, resized to 256, and normalised as ImageNet's unless the file says otherwise.
    image_size, resize, normalize (mean, std): in place of the run's own. weights_prefix, resize_pos_embed: of a file
    of another program, as `backbone.*` of a config. Raises `UserError`.
    """
    path, computing = Path(source), chosen(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if backbone is None and hub.is_name(str(path)):
        path = hub.located(str(path)) if str(path).startswith("hf:") else path
        if not exported.is_exported(path):
            raise UserError(f"{os.fspath(source)}: weights of another program; give backbone=..., whose they are")
    changed = [
        *([] if image_size is None else [f"data.image_size={image_size}"]),
        *([] if resize is None else [f"data.eval_resize={resize}"]),
    ]
    if backbone is None:
        encoder = (exported.read(path) if exported.is_exported(path) else load_encoder(path)).with_transform(changed)
    else:
        size = image_size or 224
        changed = [f"data.image_size={size}", f"data.eval_resize={resize or round(size / 0.875)}"]
        of_backbone = {"name": backbone, "weights_prefix": weights_prefix, "resize_pos_embed": resize_pos_embed}
        tree = {"run_dir": str(path.parent), "method": {"name": path.name}, "backbone": of_backbone}
        settings = config.overridden(tree | {"data": {"root": str(path.parent)}}, changed)
        encoder, _ = load_others(path, settings, IMAGENET if normalize is None else of_channels(normalize))
    embedder = Embedder(encoder, layer)
    if normalize is not None:
        constants = of_channels(normalize)
        if len(constants.mean) != embedder.channels:
            raise UserError(
                f"normalize: is of {len(constants.mean)} channels, and the network takes {embedder.channels}; give a "
                "value of each"
            )
        embedder.mean, embedder.std = constants.mean, constants.std
    return embedder.to(computing)


def files_of(folder: str | os.PathLike[str], extensions: tuple[str, ...] = EXTENSIONS) -> list[Path]:
    """The pictures in a folder and below it by their suffixes, sorted. Raises `UserError` when there is none."""
    if not os.path.isdir(folder):
        raise UserError(f"{os.fspath(folder)}: not a folder; give one that holds pictures")
    found = sorted(
        Path(parent, name)
        for parent, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(extensions) and not name.startswith(".")
    )
    if not found:
        raise UserError(f"{os.fspath(folder)}: holds no picture ({', '.join(extensions)})")
    return found


class _File:
    """A picture that is read when its batch is passed."""

    def __init__(self, path: Path):
        self.path = path

    def pixels(self, channels: int) -> np.ndarray:
        try:
            if channels != 3:
                return read_channels(self.path.read_bytes(), channels, MAX_PIXELS)
            return upright_pixels(decoded(self.path.read_bytes()))
        except UnfitImage as error:
            raise UserError(f"{self.path}: {error}") from None


def _batches(whole: Any, size: int) -> Iterator[Any]:
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"batch_size = {size!r}: give a whole number, 1 or more")
    return (whole[start : start + size] for start in range(0, len(whole), size))


def _single(images: Any) -> Iterator[Any]:
    """The images one by one."""
    if isinstance(images, Sequence) and not isinstance(images, str | bytes):
        for image in images:
            yield from _single(image)
    elif isinstance(images, np.ndarray | Tensor) and images.ndim == 4:
        yield from images
    else:
        yield images


def _pixels(image: Any, channels: int) -> np.ndarray:
    """Of one image: uint8 or uint16 [H, W, C]."""
    if isinstance(image, _File):
        return image.pixels(channels)
    if isinstance(image, Image.Image) and channels == 3:
        return upright_pixels(image)
    is_tensor = isinstance(image, Tensor)
    pixels = image.cpu().movedim(-3, -1).numpy() if is_tensor and image.ndim == 3 else np.asarray(image)
    if (
        pixels.dtype not in (np.uint8, np.uint16)
        or pixels.ndim != 3
        or pixels.shape[-1] != channels
        or not pixels.size
        or isinstance(image, Image.Image)
    ):
        expected = "[{0}, H, W] or [N, {0}, H, W]" if is_tensor else "[H, W, {0}] or [N, H, W, {0}]"
        expected = expected.format(channels)
        given = f"{list(image.shape)} of {image.dtype}" if hasattr(image, "dtype") else type(image).__name__
        raise ValueError(f"an image is {given}: give {'PIL images, or ' * (channels == 3)}uint8 or uint16 {expected}")
    return np.ascontiguousarray(pixels)
