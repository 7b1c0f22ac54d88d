"""PNG files of 16 bits a channel, which Pillow reads of gray alone (PNG specification, third edition, W3C 2025)."""

import struct
import zlib

import numpy as np

from ssl_dist.data.pillow import UnfitImage
from ssl_dist.numba_cache import njit

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_SAMPLES = {0: 1, 2: 3, 4: 2, 6: 4}  # color type -> samples a pixel, alpha among them
_HEADER = struct.Struct(">IIBBBBB")  # width, height, bits, color type, compression, filter, interlace


def is_deep_png(data: bytes) -> bool:
    """Whether a file is a PNG of 16 bits."""
    return data.startswith(SIGNATURE) and data[24:25] == b"\x10"


def read_deep_png(data: bytes, max_pixels: int) -> np.ndarray:
    """uint16 [H, W, samples]. Raises `UnfitImage` for more than `max_pixels` pixels and for what is damaged."""
    parts, at, header = [], len(SIGNATURE), b""
    while at + 12 <= len(data):
        (length,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        chunk, check = data[at + 8 : at + 8 + length], data[at + 8 + length : at + 12 + length]
        if check != struct.pack(">I", zlib.crc32(kind + chunk)):
            raise UnfitImage("is a damaged PNG (a checksum differs)")
        header = chunk if kind == b"IHDR" else header
        parts += [chunk] if kind == b"IDAT" else []
        at += 12 + length
        if kind == b"IEND":
            break
    if len(header) != _HEADER.size:
        raise UnfitImage("is a damaged PNG (no header)")
    width, height, _, color, *_, interlace = _HEADER.unpack(header)
    if color not in _SAMPLES or interlace:
        raise UnfitImage("is a PNG with a palette or interlaced; save it as a plain one")
    if width * height > max_pixels:
        raise UnfitImage(f"has {width * height} pixels, over the limit; --max-pixels {width * height} reads it")
    row = 1 + width * _SAMPLES[color] * 2
    unpacked = zlib.decompressobj().decompress(b"".join(parts), height * row + 1)
    if len(unpacked) != height * row:
        raise UnfitImage(f"is a damaged PNG ({len(unpacked)} of {height * row} bytes)")
    lines = np.frombuffer(unpacked, np.uint8).reshape(height, row).copy()
    if height and lines[:, 0].max() > 4:
        raise UnfitImage("is a damaged PNG (an unknown filter)")
    _unfilter(lines, _SAMPLES[color] * 2)
    pixels = np.ascontiguousarray(lines[:, 1:]).view(">u2").astype(np.uint16)
    return pixels.reshape(height, width, _SAMPLES[color])


@njit(cache=True, nogil=True)
def _unfilter(lines: np.ndarray, step: int) -> None:
    """Undo the filter of each line, uint8 [H, 1 + bytes], that its first byte names, in place (section 9); step: bytes
    of a pixel."""
    nothing = np.int64(0)
    for y in range(lines.shape[0]):
        kind = lines[y, 0]
        for x in range(1, lines.shape[1]):
            left = np.int64(lines[y, x - step]) if x > step else nothing
            above = np.int64(lines[y - 1, x]) if y > 0 else nothing
            corner = np.int64(lines[y - 1, x - step]) if y > 0 and x > step else nothing
            if kind == 1:
                predicted = left
            elif kind == 2:
                predicted = above
            elif kind == 3:
                predicted = (left + above) >> 1
            elif kind == 4:
                to_left, to_above = abs(above - corner), abs(left - corner)
                to_corner = abs(left + above - 2 * corner)
                nearest = left if to_left <= to_above and to_left <= to_corner else above
                predicted = nearest if to_left <= to_corner or to_above <= to_corner else corner
            else:
                predicted = nothing
            lines[y, x] = np.uint8((np.int64(lines[y, x]) + predicted) & 255)
