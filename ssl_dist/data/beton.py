"""The .beton file: FFCV 1.0.2's format for the two fields `image` (RGB, raw or JPEG) and `label` (int64, -1 unknown).

Images of other channels or of 16 bits are raw, [H, W, C], little-endian; their field is of FFCV's type for fields of
one's own, which FFCV refuses, and its arguments are the channels and the bits of each.

A file is a header, two field descriptors, one record a sample, pages of data (a sample never crosses a page) and a
table with the place and size of every sample's data. FFCV reads these files; this module needs nothing but numpy.

Two things go beyond what FFCV's own writer does: samples lie in id order, whatever made them, so equal input gives
equal bytes; and three of the bytes that pad a record hold a check value of the sample's data (0: none). FFCV ignores
the padding.
"""

import contextlib
import fcntl
import hashlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np

from ssl_dist.errors import UserError, refuse_unreadable
from ssl_dist.numba_cache import njit
from ssl_dist.reading import open_regular
from ssl_dist.storage.durable import sync_folder
from ssl_dist.views.pixels import MAX_CHANNELS, RGB, PixelFormat

JPG, RAW = 0, 1  # FFCV's values of `mode`
VERSION = 2
PAGE_SIZE = 1 << 21  # the least FFCV allows, 2 MiB
INT_FIELD, IMAGE_FIELD, OWN_FIELD = 1, 2, 255  # FFCV's type ids

HEADER = np.dtype(
    [("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"), ("table", "<u8")],
    align=True,
)
FIELD = np.dtype([("type_id", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)])
SAMPLE = np.dtype(
    {
        "names": ["mode", "width", "height", "pointer", "check", "label"],
        "formats": ["<u1", "<u2", "<u2", "<u8", ("<u1", 3), "<i8"],
        "offsets": [0, 1, 3, 5, 13, 16],
        "itemsize": 24,
    }
)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("pointer", "<u8"), ("size", "<u8")])

FIELDS = np.zeros(2, FIELD)
for _field, _type_id, _name in zip(FIELDS, (IMAGE_FIELD, INT_FIELD), (b"image", b"label"), strict=True):
    _field["type_id"] = _type_id
    _field["name"][: len(_name)] = np.frombuffer(_name, np.uint8)
RECORDS_START = HEADER.itemsize + FIELDS.nbytes

MAX_SIDE = 65535  # sides are 16 bits wide


@njit(cache=True, nogil=True)
def check_value(data: np.ndarray) -> np.uint64:
    """24 bits from a sample's bytes (uint8 [n]), never 0. A sum weighted by position: loops without a carried
    product, so it runs at memory speed and costs nothing beside decoding."""
    plain = np.uint64(0)
    weighted = np.uint64(0)
    for i in range(data.size):
        value = np.uint64(data[i])
        plain += value
        weighted += value * np.uint64(i + 1)
    mixed = (plain * np.uint64(0x9E3779B97F4A7C15)) ^ (weighted * np.uint64(0xD1342543DE82EF95))
    return (mixed >> np.uint64(32)) % np.uint64(0xFFFFFF) + np.uint64(1)


class Digest:
    """SHA-256 over (label, mode, height, width, size, bytes) of every sample in id order."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()

    def add(self, label: int, mode: int, height: int, width: int, data: bytes | memoryview) -> None:
        self._sha.update(struct.pack("<qBHHQ", label, mode, height, width, len(data)))
        self._sha.update(data)

    def hexdigest(self) -> str:
        return self._sha.hexdigest()


class Writer:
    """Writes up to `count` samples in id order to a temporary file beside `path`, which `publish` moves into place.

    Use as a context manager: without `publish` the temporary file is removed. Raises `UserError` when another process
    is writing the same file; `OSError` (a full disk, say) is left to the caller.
    """

    def __init__(self, path: Path, count: int, page_size: int = PAGE_SIZE, pixels: PixelFormat = RGB):
        """pixels: of every image."""
        assert count > 0 and PAGE_SIZE <= page_size < 1 << 32 and page_size & (page_size - 1) == 0
        self.path, self.count, self.page_size, self.pixels = Path(path), count, page_size, pixels
        self.temporary = self.path.with_name(f".{self.path.name}.tmp")
        self.digest = Digest()
        self._records = np.zeros(count, SAMPLE)
        self._allocations = np.zeros(count, ALLOCATION)
        self._next = 0
        data_start = RECORDS_START + self._records.nbytes
        self._pointer = -(-data_start // page_size) * page_size
        # No truncation before the lock is ours: another process may be writing.
        self._file = open(self.temporary, "ab", buffering=1 << 20)  # noqa: SIM115 - closed by __exit__
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UserError(f"{self.path}: another process is converting into this folder; wait for it") from None
        try:
            self._file.truncate(0)
            self._file.write(bytes(self._pointer))
        except OSError:
            self.__exit__()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._file.closed:
            self.temporary.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # what could not be flushed belongs to a file that is gone
                self._file.close()

    def add(self, label: int, mode: int, height: int, width: int, data: bytes) -> None:
        """Append the next sample. data: a JPEG file, of RGB alone, or the bytes of height * width pixels."""
        assert len(data) <= self.page_size and 0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE
        assert len(data) == height * width * self.pixels.num_bytes or (mode == JPG and self.pixels.is_rgb)
        room = self.page_size - self._pointer % self.page_size
        if len(data) > room:
            self._file.write(bytes(room))
            self._pointer += room
        check = int(check_value(np.frombuffer(data, np.uint8)))
        self._records[self._next] = (mode, width, height, self._pointer, list(check.to_bytes(3, "little")), label)
        self._allocations[self._next] = (self._next, self._pointer, len(data))
        self._file.write(data)
        self.digest.add(label, mode, height, width, data)
        self._pointer += len(data)
        self._next += 1

    def complete(self) -> str:
        """Complete the temporary file, which can be opened from now on, and return the digest."""
        assert 0 < self._next <= self.count
        records, allocations = self._records[: self._next], self._allocations[: self._next]
        padding = -self._pointer % self.page_size  # FFCV reads whole pages
        self._file.write(bytes(padding))
        table = self._pointer + padding
        self._file.write(allocations.tobytes())
        self._file.flush()
        header = np.array([(VERSION, len(FIELDS), self.page_size, self._next, table)], HEADER)
        # A file opened for appending writes at its end only; the front goes through its own handle.
        with open(self.temporary, "r+b") as front:
            front.write(header.tobytes() + _fields(self.pixels).tobytes() + records.tobytes())
            front.flush()
            os.fsync(front.fileno())
        return self.digest.hexdigest()

    def publish(self) -> None:
        """Put the complete file in its place."""
        os.replace(self.temporary, self.path)
        self._file.close()
        sync_folder(self.path.parent)


class Beton:
    """An open .beton file. Index = image id.

    count; labels int64 [N]; modes uint8 [N]; heights, widths, pointers, sizes int64 [N]; checks int64 [N] (0: none);
    data uint8 [bytes of the file], mapped; pixels: what those of every image are; tables_sha256: SHA-256 of all that is
    not the samples' bytes. Every sample lies in the pages, and none over another. Raises `UserError` for a file that is
    missing, truncated, foreign or contradicts itself.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        records, allocations, self.tables_sha256, self.pixels = _read_tables(self.path)
        self.count = len(records)
        self.labels = records["label"].astype(np.int64)
        self.modes = records["mode"].copy()
        self.heights, self.widths, self.pointers = (
            records[name].astype(np.int64) for name in ("height", "width", "pointer")
        )
        self.checks = records["check"].astype(np.int64) @ np.array([1, 1 << 8, 1 << 16])
        # FFCV's own writer lists the allocations in the order in which its workers ended.
        order = np.argsort(allocations["sample_id"], kind="stable")
        self.sizes = allocations["size"][order].astype(np.int64)
        raw = self.modes == RAW
        if (
            (allocations["sample_id"][order] != np.arange(self.count)).any()
            or (allocations["pointer"][order] != records["pointer"]).any()
            or not np.isin(self.modes, (JPG, RAW) if self.pixels.is_rgb else (RAW,)).all()
            or min(self.heights.min(), self.widths.min(), self.sizes.min()) < 1
            or (self.sizes[raw] != (self.heights * self.widths * self.pixels.num_bytes)[raw]).any()
            or self.labels.min() < -1
        ):
            raise _refused(self.path, "its tables contradict each other")
        by_place = np.argsort(self.pointers, kind="stable")
        ends = (self.pointers + self.sizes)[by_place]
        if (ends[:-1] > self.pointers[by_place][1:]).any():
            raise _refused(self.path, "its tables contradict each other: two images lie in one place")
        self.data = np.memmap(self.path, np.uint8, "r")

    def sample(self, image_id: int) -> np.ndarray:
        """The bytes of one sample, uint8 [size], mapped."""
        start = self.pointers[image_id]
        return self.data[start : start + self.sizes[image_id]]

    def samples(self) -> Iterator[tuple[int, int, int, int, memoryview]]:
        """(label, mode, height, width, bytes) of every sample in id order, as `Digest.add` takes them."""
        rows = zip(self.labels, self.modes, self.heights, self.widths, strict=True)
        for image_id, (label, mode, height, width) in enumerate(rows):
            yield int(label), int(mode), int(height), int(width), self.sample(image_id).data


def _fields(pixels: PixelFormat) -> np.ndarray:
    """The descriptors of the two fields."""
    fields = FIELDS.copy()
    if not pixels.is_rgb:
        fields[0]["type_id"] = OWN_FIELD
        fields[0]["arguments"][:2] = pixels
    return fields


def _read_tables(path: Path) -> tuple[np.ndarray, np.ndarray, str, PixelFormat]:
    """The records and the allocations of a file whose frame is sound, every place inside its pages, the SHA-256 of
    header, descriptors, records and allocations, and what the pixels are."""
    if not path.is_file():
        raise _refused(path, "there is no such file")
    with refuse_unreadable(path, "make it readable"), open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size < RECORDS_START:
            raise _refused(path, f"{size} bytes are not a .beton file")
        header = np.fromfile(file, HEADER, 1)[0]
        fields = np.fromfile(file, FIELD, 2)
        count, table, page = int(header["num_samples"]), int(header["table"]), int(header["page_size"])
        if header["version"] != VERSION or not 0 < header["num_fields"] < 256 or page & (page - 1) or not page:
            raise _refused(path, "it is not a .beton file of FFCV 1.0")
        kinds = [(int(field["type_id"]), field["name"].tobytes().rstrip(b"\0").decode("latin-1")) for field in fields]
        pixels = PixelFormat(*fields[0]["arguments"][:2].tolist()) if kinds[0][0] == OWN_FIELD else RGB
        image_fields = [(IMAGE_FIELD, "image")]
        if pixels.channels in range(1, MAX_CHANNELS + 1) and pixels.bits in (8, 16):
            image_fields.append((OWN_FIELD, "image"))
        if header["num_fields"] != 2 or kinds[0] not in image_fields or kinds[1] != (INT_FIELD, "label"):
            raise _refused(path, "its fields are not `image` and `label`")
        if table == 0 or count == 0:
            raise _refused(path, "its writer did not finish it")
        expected = table + count * ALLOCATION.itemsize
        if size != expected:
            raise _refused(path, f"it has {size} bytes and its header speaks of {expected}: truncated or damaged")
        pages_start = RECORDS_START + count * SAMPLE.itemsize
        if pages_start > table:
            raise _refused(path, f"its header speaks of {count} images, and its table begins at byte {table}: damaged")
        file.seek(0)
        front = file.read(pages_start)
        file.seek(table)
        back = file.read(count * ALLOCATION.itemsize)
    records = np.frombuffer(front, SAMPLE, offset=RECORDS_START)
    allocations = np.frombuffer(back, ALLOCATION)
    # before any of them becomes a signed number
    pointers, sizes = allocations["pointer"], allocations["size"]
    if pointers.min() < pages_start or pointers.max() > table or (sizes > table - pointers).any():
        raise _refused(path, "its tables contradict each other: an image lies outside the pages")
    return records, allocations, hashlib.sha256(front + back).hexdigest(), pixels


def _refused(path: Path, reason: str) -> UserError:
    return UserError(f"{path}: {reason}; write it with `ssl-dist convert DATASET --root SOURCE --out {path.parent}`")
