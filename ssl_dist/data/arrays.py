"""The reader that needs no FFCV: the same .beton, JPEG decoded by Pillow."""

import io

import numpy as np
from PIL import Image

from ssl_dist.data.beton import RAW, Beton, check_value
from ssl_dist.data.pillow import DAMAGED_IMAGE_ERRORS, reason_of
from ssl_dist.data.reader import Reader, damaged
from ssl_dist.numba_cache import njit


@njit(cache=True, nogil=True)
def is_sound(data: np.ndarray, check: int) -> bool:
    """Whether the bytes of a sample match its check value (0: it has none)."""
    return check == 0 or np.int64(check_value(data)) == check


class ArraysReader(Reader):
    def _decode(self, ids: np.ndarray, pixels: np.ndarray) -> None:
        beton = self._open_file()
        for image_id, destination in zip(ids, pixels, strict=True):
            put_image(beton, image_id, destination)


def put_image(beton: Beton, image_id: int, destination: np.ndarray) -> None:
    """A stored image to the top left of destination, [Hmax, Wmax, C]."""
    pixels = stored_image(beton, image_id)
    destination[: pixels.shape[0], : pixels.shape[1]] = pixels


def stored_image(beton: Beton, image_id: int) -> np.ndarray:
    """A stored image, uint8 or uint16 [H, W, C], a JPEG as Pillow decodes it. Raises `UserError` when it is damaged."""
    data = np.asarray(beton.sample(image_id))
    size = int(beton.heights[image_id]), int(beton.widths[image_id])
    if not is_sound(data, beton.checks[image_id]):
        raise damaged(beton, image_id, "its check value differs")
    if beton.modes[image_id] == RAW:
        return data.view(beton.pixels.dtype).reshape(*size, beton.pixels.channels)
    try:
        image = Image.open(io.BytesIO(data.tobytes()), formats=["JPEG"])
        shown = image.height, image.width
        if shown == size:  # asked before its pixels take memory
            return np.asarray(image.convert("RGB"))
    except DAMAGED_IMAGE_ERRORS as error:
        raise damaged(beton, image_id, f"Pillow: {reason_of(error)}") from None
    raise damaged(beton, image_id, f"it shows {shown} pixels and the file says {size}")
