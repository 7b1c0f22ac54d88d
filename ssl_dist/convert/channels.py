"""Images of C channels with 8 or 16 bits out of their files: arrays (npy), TIFF, PNG, and 8 bits of what Pillow reads.

The channels of an array [H, W, C] are its last axis; those of a TIFF file the samples of its pages, page after page.
Nothing is unpickled, and no value is scaled; where white is zero (TIFF), values are turned round.
"""

import io
import itertools
import logging
import struct
import threading
import tokenize
from typing import Any

import numpy as np
from PIL import Image

from ssl_dist.data.beton import MAX_SIDE
from ssl_dist.data.pillow import DAMAGED_IMAGE_ERRORS, UnfitImage, open_picture, reason_of
from ssl_dist.errors import UserError

# What numpy and tifffile raise of damaged files besides.
_ALSO_DAMAGED = (RuntimeError, MemoryError, ArithmeticError, tokenize.TokenError)
SUFFIX = ".npy"  # beside those of pictures
_NPY, _PNG, _TIFF = b"\x93NUMPY", b"\x89PNG\r\n\x1a\n", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_SMALL_OR_MASK = 5  # bits of a TIFF page's subfile type: a copy of another page, a mask
_MAX_PAGES = 256  # with small copies and masks
_WHITE_IS_ZERO, _PALETTE = 0, 3  # of a TIFF page's photometric interpretation
# numpy reads a header by `ast.literal_eval`, whose depth CPython 3.11.7 counts for all threads together and then raises
# SystemError (gh-106905).
_header_lock = threading.Lock()


def read_channels(data: bytes, channels: int, max_pixels: int) -> np.ndarray:
    """The pixels of a file, uint8 or uint16 [H, W, C]. Raises `UnfitImage` where it has other channels, more than
    `max_pixels` pixels, or can not be read, and `UserError` where the library for it is missing."""
    try:
        if data.startswith(_NPY):
            pixels = _of_npy(data, channels)
        elif data.startswith(_TIFF):
            pixels = _of_tiff(data, channels, max_pixels)
        elif data.startswith(_PNG) and data[24:25] == b"\x10":
            pixels = _of_deep_png(data, max_pixels)
        else:
            pixels = _of_pillow(data)
    except (UnfitImage, UserError):
        raise
    except Image.DecompressionBombError:
        raise _over_limit("more") from None
    except (*DAMAGED_IMAGE_ERRORS, *_ALSO_DAMAGED) as error:
        raise UnfitImage(f"can not be read ({reason_of(error)})") from None
    if pixels.shape[2] != channels:
        raise _of_others(pixels.shape[2], channels)
    if max(pixels.shape[:2]) > MAX_SIDE or not pixels.size:
        raise UnfitImage(f"{pixels.shape[1]}x{pixels.shape[0]} pixels, 1 to {MAX_SIDE} a side can be stored")
    return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)


def _of_npy(data: bytes, channels: int) -> np.ndarray:
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read_header:
        raise UnfitImage(f"is an array of version {version}; save it with numpy.save")
    with _header_lock:
        shape, in_columns, dtype = read_header[version](file)
    if dtype.hasobject:
        raise UnfitImage("holds Python objects, which are never unpickled; save numbers, uint8 or uint16 [H, W, C]")
    _require_levels(dtype)
    if len(shape) not in (2, 3):
        raise UnfitImage(f"holds an array {list(shape)}; save one image, [H, W, C] or [H, W]")
    if len(shape) == 3 and shape[0] == channels != shape[2]:
        raise UnfitImage(f"holds an array {list(shape)}; save it as [H, W, C], numpy.moveaxis(x, 0, -1)")
    rest = data[file.tell() :]
    if len(rest) != int(np.prod(shape, dtype=object)) * dtype.itemsize:
        raise UnfitImage(f"holds {len(rest)} bytes of an array {list(shape)} of {dtype}: damaged")
    pixels = np.frombuffer(rest, dtype).reshape(shape, order="F" if in_columns else "C")
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _of_tiff(data: bytes, channels: int, max_pixels: int) -> np.ndarray:
    try:
        import tifffile
    except ImportError:
        raise UserError(
            "--channels: TIFF needs tifffile, which is not installed; pip install 'ssl_dist[tiff]'"
        ) from None
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what matters is raised
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        pages = [page.aspage() for page in itertools.islice(file.pages, _MAX_PAGES + 1)]
        if len(pages) > _MAX_PAGES:  # or endless, as those of a damaged file that lead in a circle
            raise UnfitImage(f"has more than {_MAX_PAGES} pages")
        whole = [page for page in pages if not int(page.subfiletype) & _SMALL_OR_MASK]
        if (number := sum(page.samplesperpixel for page in whole)) != channels:
            raise _of_others(number, channels)  # before anything is decoded
        parts = [_of_page(page, max_pixels) for page in whole]
    if len({part.shape[:2] for part in parts}) != 1:
        raise UnfitImage("has pages of several sizes")
    return np.concatenate(parts, axis=2)


def _of_page(page: Any, max_pixels: int) -> np.ndarray:
    """uint8 or uint16 [H, W, samples]."""
    if page.axes not in ("YX", "YXS", "SYX") or page.photometric == _PALETTE:
        raise UnfitImage(f"has pages of axes {page.axes}, of photometry {int(page.photometric)}; save Y, X and samples")
    if page.photometric == _WHITE_IS_ZERO and page.samplesperpixel > 1:  # nothing tells of which of them that holds
        raise UnfitImage(f"has pages of {page.samplesperpixel} samples whose white is zero; save them as MinIsBlack")
    _require_levels(np.dtype(page.dtype))
    if (number := page.imagewidth * page.imagelength) > max_pixels:
        raise _over_limit(str(number))
    pixels = page.asarray()
    if page.photometric == _WHITE_IS_ZERO:
        pixels = pixels.dtype.type((1 << page.bitspersample) - 1) - pixels
    return {"YX": pixels[..., None], "YXS": pixels, "SYX": np.moveaxis(pixels, 0, -1)}[page.axes]


def _of_deep_png(data: bytes, max_pixels: int) -> np.ndarray:
    """Of 16 bits, which Pillow reads of gray alone."""
    try:
        import imagecodecs
    except ImportError:
        raise UserError(
            "--channels: PNG of 16 bits needs imagecodecs, which is not installed; pip install 'ssl_dist[tiff]'"
        ) from None
    width, height = struct.unpack(">II", data[16:24])
    if width * height > max_pixels:
        raise _over_limit(str(width * height))
    pixels = imagecodecs.png_decode(data)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _of_pillow(data: bytes) -> np.ndarray:
    """Of 8 bits; a palette shows its colours."""
    image = open_picture(io.BytesIO(data))
    image.load()
    whole = {"1": "L", "P": "RGB", "PA": "RGBA"}
    pixels = np.asarray(image.convert(whole[image.mode]) if image.mode in whole else image)
    _require_levels(pixels.dtype)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _require_levels(dtype: np.dtype) -> None:
    if dtype.newbyteorder("=") not in (np.uint8, np.uint16):
        raise UnfitImage(f"holds {dtype}; save it as uint8 or uint16")


def _of_others(number: int, channels: int) -> UnfitImage:
    return UnfitImage(f"has {number} channels, not the {channels} of --channels")


def _over_limit(number: str) -> UnfitImage:
    return UnfitImage(f"has {number} pixels, over the limit; --max-pixels {number} reads it")
