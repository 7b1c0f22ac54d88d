"""The reader that needs no FFCV: the same .beton, pixels copied by numba, JPEG decoded by Pillow."""

import io

import numpy as np
from numba import njit
from PIL import Image

from ssl_dist.data.beton import RAW, Beton, check_value
from ssl_dist.data.pillow import DAMAGED_IMAGE_ERRORS, reason_of
from ssl_dist.data.reader import Reader, damaged


@njit(cache=True, nogil=True)
def is_sound(data: np.ndarray, check: int) -> bool:
    """Whether the bytes of a sample match its check value (0: it has none)."""
    return check == 0 or np.int64(check_value(data)) == check


@njit(cache=True, nogil=True)
def copy_raw(image: np.ndarray, height: int | np.int64, width: int | np.int64, destination: np.ndarray) -> None:
    """Stored pixels uint8 [height * width * 3] to the top left of destination, uint8 [Hmax, Wmax, 3]."""
    row = width * 3
    for y in range(height):
        for x in range(width):
            for channel in range(3):
                destination[y, x, channel] = image[y * row + x * 3 + channel]


@njit(cache=True, nogil=True)
def _copy_all_raw(ids: np.ndarray, data: np.ndarray, columns: tuple[np.ndarray, ...], pixels: np.ndarray) -> int:
    """Copy the raw images among `ids`; returns the first place whose bytes are damaged, or -1."""
    pointers, sizes, modes, heights, widths, checks = columns
    for i in range(ids.size):
        n = ids[i]
        if modes[n] == RAW:
            image = data[pointers[n] : pointers[n] + sizes[n]]
            if not is_sound(image, checks[n]):
                return i
            copy_raw(image, heights[n], widths[n], pixels[i])
    return -1


class ArraysReader(Reader):
    def _decode(self, ids: np.ndarray, pixels: np.ndarray) -> None:
        beton = self._open_file()
        data = np.asarray(beton.data)
        columns = beton.pointers, beton.sizes, beton.modes, beton.heights, beton.widths, beton.checks
        bad = _copy_all_raw(ids, data, columns, pixels)
        if bad >= 0:
            raise damaged(beton, int(ids[bad]), "its check value differs")
        for i in np.flatnonzero(beton.modes[ids] != RAW):
            put_image(beton, int(ids[i]), pixels[i])


def put_image(beton: Beton, image_id: int, destination: np.ndarray) -> None:
    """A stored image to the top left of destination, uint8 [Hmax, Wmax, 3]."""
    pixels = stored_image(beton, image_id)
    destination[: pixels.shape[0], : pixels.shape[1]] = pixels


def stored_image(beton: Beton, image_id: int) -> np.ndarray:
    """A stored image, uint8 [H, W, 3], a JPEG as Pillow decodes it. Raises `UserError` when it is damaged."""
    data = np.asarray(beton.sample(image_id))
    size = int(beton.heights[image_id]), int(beton.widths[image_id])
    if not is_sound(data, beton.checks[image_id]):
        raise damaged(beton, image_id, "its check value differs")
    if beton.modes[image_id] == RAW:
        return data.reshape(*size, 3)
    try:
        pixels = np.asarray(Image.open(io.BytesIO(data.tobytes())).convert("RGB"))
    except DAMAGED_IMAGE_ERRORS as error:
        raise damaged(beton, image_id, f"Pillow: {reason_of(error)}") from None
    if pixels.shape[:2] != size:
        raise damaged(beton, image_id, f"it shows {pixels.shape[:2]} pixels and the file says {size}")
    return pixels
