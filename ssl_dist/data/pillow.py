"""Pictures by Pillow: what it raises for a damaged one, and how one becomes upright RGB pixels as it looks."""

import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from ssl_dist.errors import quoted

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


# EXIF orientation -> what makes the picture upright (TIFF 6.0, tag 274; 1 is upright).
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnfitImage(ValueError):
    """An image that is none, or none of RGB with 8 bits; the message is the reason, without the image's name."""


def open_picture(file: Path | BytesIO) -> Image.Image:
    """Pillow's open of a file, whatever its name, but for PostScript, with which Pillow starts Ghostscript, and for one
    of which Pillow would drop bits, samples or pages without a word. Raises one of `DAMAGED_IMAGE_ERRORS`, `UnfitImage`
    for such a one."""
    image = Image.open(file)
    if image.format == "EPS":
        raise OSError("PostScript, a program that Ghostscript would run")
    _refuse_deep(image)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        samples, shown = image.tag_v2.get(TiffImagePlugin.SAMPLESPERPIXEL, 1), len(image.getbands())
        if samples > shown:
            raise UnfitImage(
                f"has {samples} samples a pixel, not the {shown} of {image.mode}; convert's --channels {samples} takes "
                "them, or save it as an RGB image"
            )
        if (pages := _num_pages(image)) > 1:
            channels = pages * samples
            raise UnfitImage(
                f"has {pages} pages; convert's --channels {channels} takes them for channels, or save each as an image"
            )
    return image


def _refuse_deep(image: Image.Image) -> None:
    """Raises `UnfitImage` for a picture whose 16 bits a channel Pillow cuts to 8. Of one that is decoded only TIFF
    tells."""
    arguments = [tile.args if isinstance(tile.args, tuple) else (tile.args,) for tile in getattr(image, "tile", ())]
    highest = [level for each in arguments for level in each[1:2] if image.format == "PPM"]
    channels, depth = 1, max(highest, default=0).bit_length()
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        depth = max(image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (8,)))
        channels = image.tag_v2.get(TiffImagePlugin.SAMPLESPERPIXEL, 1)
    elif any(str(each[0]).endswith((";16B", ";16")) for each in arguments):
        depth, channels = 16, len(str(arguments[0][0]).partition(";")[0])
    if depth > 8:
        takes = f"convert's --channels {channels} keeps them, or " if depth == 16 and image.format != "PPM" else ""
        raise UnfitImage(f"has {depth} bits a channel; {takes}save it with 8 bits a channel")


def _num_pages(image: TiffImagePlugin.TiffImageFile) -> int:
    """Without those that are small copies of others or masks."""
    count = 0
    for page in range(image.n_frames):
        image.seek(page)
        count += not image.tag_v2.get(254, 0) & 5  # NewSubfileType
    image.seek(0)
    return count


def reason_of(error: Exception) -> str:
    """Pillow's complaint in a few words."""
    unknown = isinstance(error, UnidentifiedImageError)  # its text names a memory address
    return "no picture that Pillow knows" if unknown else " ".join(str(error).split())


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """What sets a decoded picture upright by its EXIF (or, as Pillow reads it, XMP) orientation; None: nothing. Damaged
    EXIF of a sound picture counts as none, as in viewers."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except DAMAGED_IMAGE_ERRORS:
        return None
    return TURNS.get(orientation) if isinstance(orientation, int) else None


def of_8_bits(image: Image.Image) -> Image.Image:
    """The picture itself. Raises `UnfitImage` for one that RGB would clip."""
    _refuse_deep(image)
    if image.mode not in CONVERTIBLE_MODES:
        raise UnfitImage(f"pixels of mode {quoted(image.mode)} do not fit 8 bits; save it with 8 bits a channel")
    return image


def rgb(image: Image.Image) -> Image.Image:
    """Raises `UnfitImage`."""
    try:
        return image.convert("RGB")
    except DAMAGED_IMAGE_ERRORS as error:
        raise UnfitImage(f"can not be made RGB ({reason_of(error)}); save it as an RGB image") from None


def upright_pixels(image: Image.Image) -> np.ndarray:
    """Pixels uint8 [H, W, 3] of a picture, upright by its EXIF orientation. Raises `UnfitImage`."""
    turn = turn_of(of_8_bits(image))
    return np.asarray(rgb(image if turn is None else image.transpose(turn)))
