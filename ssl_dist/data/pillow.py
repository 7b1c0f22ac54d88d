"""What Pillow raises for a damaged file, and which pictures it maps to RGB as they look."""

import struct
import zlib
from io import BytesIO
from pathlib import Path

from PIL import Image, UnidentifiedImageError

# What Pillow raises for a damaged file, depending on the format.
DAMAGED_IMAGE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    NotImplementedError,
    OverflowError,
    TypeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
# 8-bit pictures that `convert("RGB")` maps to what they show; 16-bit and float ones it clips instead.
CONVERTIBLE_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"}


def open_picture(file: Path | BytesIO) -> Image.Image:
    """Pillow's open of a file, whatever its name, but for PostScript, with which Pillow starts Ghostscript. Raises one
    of `DAMAGED_IMAGE_ERRORS`."""
    image = Image.open(file)
    if image.format == "EPS":
        raise OSError("PostScript, a program that Ghostscript would run")
    return image


def reason_of(error: Exception) -> str:
    """Pillow's complaint in a few words."""
    unknown = isinstance(error, UnidentifiedImageError)  # its text names a memory address
    return "no picture that Pillow knows" if unknown else " ".join(str(error).split())
