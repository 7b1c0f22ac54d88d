"""One image from its source to what a .beton stores: pixels for small images, JPEG for larger ones."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ssl_dist.data.beton import JPG, MAX_SIDE, PAGE_SIZE, RAW
from ssl_dist.data.manifest import Encoding
from ssl_dist.data.pillow import CONVERTIBLE_MODES, DAMAGED_IMAGE_ERRORS, reason_of
from ssl_dist.errors import UserError


@dataclass(frozen=True)
class Sample:
    """A stored image. data: height * width * 3 bytes (mode RAW) or a JPEG file (mode JPG)."""

    mode: int
    height: int
    width: int
    data: bytes


def page_size(encoding: Encoding) -> int:
    """Bytes of a page that holds any image of this encoding: a JPEG is kept only if it needs less."""
    size, largest_image = PAGE_SIZE, 3 * max(encoding.max_side, encoding.raw_side) ** 2
    while size < largest_image and size < 1 << 31:
        size *= 2
    return size


def encode(item: bytes | np.ndarray, name: str, encoding: Encoding) -> Sample:
    """`item` as the file will hold it: an encoded picture, or pixels uint8 [H, W, 3].

    Images whose sides are both at most `raw_side` are stored as pixels. JPEG files (grey or colour) whose sides are
    at most `max_side` keep their bytes. Everything else becomes RGB, is shrunk (Lanczos, antialiased) until its longer
    side equals `max_side` if it was larger, and is compressed anew. An EXIF orientation is ignored, as torchvision's
    ImageFolder does. Raises `UserError` naming the image when it can not be read.
    """
    if isinstance(item, np.ndarray):
        image, keep = Image.fromarray(item), False
    else:
        image = _open(item, name)
        keep = image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB") and len(item) <= page_size(encoding)
    width, height = image.size
    longer = max(width, height)
    if longer <= encoding.raw_side:
        return Sample(RAW, height, width, _rgb(image, name).tobytes())
    if keep and longer <= encoding.max_side:
        return Sample(JPG, height, width, bytes(item))
    image = _rgb(image, name)
    if longer > encoding.max_side:
        width, height = (max(1, round(side * encoding.max_side / longer)) for side in (width, height))
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    if max(width, height) <= encoding.raw_side:
        return Sample(RAW, height, width, image.tobytes())
    file = io.BytesIO()
    image.save(file, "JPEG", quality=encoding.jpeg_quality)
    return Sample(JPG, height, width, file.getvalue())


def _open(data: bytes, name: str) -> Image.Image:
    """A picture decoded to its end."""
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except DAMAGED_IMAGE_ERRORS as error:
        raise UserError(
            f"{name}: can not be read as an image ({reason_of(error)}); replace or remove the file"
        ) from None
    if image.mode not in CONVERTIBLE_MODES:
        raise UserError(f"{name}: pixels of mode {image.mode!r} do not fit 8 bits; save it with 8 bits a channel")
    if max(image.size) > MAX_SIDE:
        raise UserError(f"{name}: {image.size[0]}x{image.size[1]} pixels, at most {MAX_SIDE} a side can be stored")
    return image


def _rgb(image: Image.Image, name: str) -> Image.Image:
    try:
        return image.convert("RGB")
    except DAMAGED_IMAGE_ERRORS as error:
        raise UserError(f"{name}: can not be made RGB ({reason_of(error)}); save it as an RGB image") from None
