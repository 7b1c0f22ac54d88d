"""One image from its source to what a .beton stores: pixels for small images, JPEG for larger ones."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ssl_dist.convert.channels import read_channels
from ssl_dist.data.beton import JPG, MAX_SIDE, PAGE_SIZE, RAW
from ssl_dist.data.manifest import Encoding
from ssl_dist.data.pillow import DAMAGED_IMAGE_ERRORS, UnfitImage, of_8_bits, open_picture, reason_of, rgb, turn_of

MAX_PIXELS = 178_956_970  # of a picture that is read: where Pillow takes it for an attack
MAX_STORED_PIXELS = 89_478_485  # where Pillow, in the readers, would warn


@dataclass(frozen=True)
class Sample:
    """A stored image. data: the bytes of height * width pixels (mode RAW) or a JPEG file (mode JPG); turned: whether
    its EXIF orientation was applied."""

    mode: int
    height: int
    width: int
    data: bytes
    turned: bool = False


def page_size(encoding: Encoding) -> int:
    """Bytes of a page that holds any image of this encoding: a JPEG is kept only if it needs less."""
    size, largest_image = PAGE_SIZE, encoding.pixels.num_bytes * max(encoding.max_side, encoding.raw_side) ** 2
    while size < largest_image and size < 1 << 31:
        size *= 2
    return size


@contextmanager
def pillow_limited_to(max_pixels: int) -> Iterator[None]:
    """Let Pillow decode pictures of up to `max_pixels` (rounded up to even), without its warnings, which begin at the
    half. Its limit is one for the process, so it is set around a conversion and not in its threads."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = -(-max_pixels // 2)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def pixel_limit() -> int:
    """Of a picture that is read, as `pillow_limited_to` has set it."""
    return 2 * (Image.MAX_IMAGE_PIXELS or MAX_PIXELS)


def encode(item: bytes | np.ndarray, encoding: Encoding) -> Sample:
    """`item` as the file will hold it: an encoded picture, or pixels uint8 [H, W, 3].

    Images whose sides are both at most `raw_side` are stored as pixels. JPEG files (grey or colour) whose sides are
    at most `max_side` keep their bytes. Everything else becomes RGB, is shrunk (Lanczos, antialiased) until its longer
    side equals `max_side` if it was larger, and is compressed anew. So is a JPEG file whose EXIF orientation turns it,
    where `encoding.orientation` applies that; what is stored has no EXIF. With `encoding.channels` see
    `_encode_channels`. Raises `UnfitImage` when it can not be read or stored.
    """
    if encoding.channels is not None:
        return _encode_channels(item, encoding, encoding.channels)
    turn = None
    if isinstance(item, np.ndarray):
        image, keep = Image.fromarray(item), False
    else:
        image = decoded(item)
        keep = image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB") and len(item) <= page_size(encoding)
        if encoding.orientation == "applied":
            turn = turn_of(image)
    if turn is not None:
        image, keep = image.transpose(turn), False
    width, height = image.size
    longer, turned = max(width, height), turn is not None
    if longer <= encoding.raw_side:
        return Sample(RAW, height, width, rgb(image).tobytes(), turned)
    if longer > encoding.max_side:
        width, height = (max(1, round(side * encoding.max_side / longer)) for side in (width, height))
        keep = False
    if width * height > MAX_STORED_PIXELS:
        raise UnfitImage(f"would be stored with {width}x{height} pixels, over {MAX_STORED_PIXELS}; lower --max-side")
    if keep:
        return Sample(JPG, height, width, bytes(item))
    image = rgb(image)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    if max(width, height) <= encoding.raw_side:
        return Sample(RAW, height, width, image.tobytes(), turned)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=encoding.jpeg_quality)
    return Sample(JPG, height, width, file.getvalue(), turned)


def _encode_channels(item: bytes | np.ndarray, encoding: Encoding, channels: int) -> Sample:
    """An image of so many channels, always as pixels; a larger one is shrunk channel by channel, as floating point."""
    pixels = item if isinstance(item, np.ndarray) else read_channels(item, channels, pixel_limit())
    if 8 * pixels.itemsize != encoding.bits:
        raise UnfitImage(
            f"has {8 * pixels.itemsize} bits a channel, and the first image has {encoding.bits}; save all alike"
        )
    height, width = pixels.shape[:2]
    if (longer := max(height, width)) > encoding.max_side:
        height, width = (max(1, round(side * encoding.max_side / longer)) for side in (height, width))
        floats = pixels.astype(np.float32)
        shrunk = [
            Image.fromarray(floats[..., c]).resize((width, height), Image.Resampling.LANCZOS) for c in range(channels)
        ]
        pixels = np.stack([np.asarray(plane) for plane in shrunk], -1).round().clip(0, (1 << encoding.bits) - 1)
    data = pixels.astype(encoding.pixels.dtype).tobytes()
    if len(data) > page_size(encoding):
        raise UnfitImage(f"would be stored in {len(data)} bytes, over {page_size(encoding)}; lower --max-side")
    return Sample(RAW, height, width, data)


def decoded(data: bytes) -> Image.Image:
    """A picture decoded to its end."""
    try:
        image = open_picture(io.BytesIO(data))
        if max(image.size) > MAX_SIDE:
            raise UnfitImage(f"{image.size[0]}x{image.size[1]} pixels, at most {MAX_SIDE} a side can be stored")
        image.load()
    except Image.DecompressionBombError as error:
        number = (re.findall(r"\((\d+) pixels\)", str(error)) or ["more"])[0]
        raise UnfitImage(f"has {number} pixels, over the limit; --max-pixels {number} reads it") from None
    except UnfitImage:
        raise
    except DAMAGED_IMAGE_ERRORS as error:
        if data[4:8] == b"ftyp":  # of ISO media files, as phones write them
            raise UnfitImage("HEIC, AVIF or a film, whatever its name says; make JPEG of it first") from None
        raise UnfitImage(f"can not be read as an image ({reason_of(error)})") from None
    return of_8_bits(image)
