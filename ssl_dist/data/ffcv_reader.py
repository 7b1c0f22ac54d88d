"""FFCV's Loader behind the reader contract: its file, its memory manager and its pipeline, with a decoder of our own.

What is not used of FFCV, and why:
- its threads and ring of buffers (`EpochIterator`): an exception there kills the thread and the consumer waits for
  ever, an early `break` leaks both, and a batch is overwritten four batches later. Here the compiled pipeline is
  called by whoever asks for a batch, on memory of that batch, so order and ids are the caller's and errors arrive
  where they belong;
- its `imdecode`: it uses the fast DCT, up to 21 grey levels off. Called as it comes, libturbojpeg (the one FFCV is
  linked with) equals Pillow bit for bit at the same speed;
- its compiler: numba never caches FFCV's closures (4-12 s at every start). The loop is a cached function of this
  module instead.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import llvmlite.binding
import numba
import numba.typed
import numpy as np
import torch
from numba.core import types

from ssl_dist.data.arrays import is_sound, put_image
from ssl_dist.data.beton import RAW, Beton
from ssl_dist.data.reader import Reader, SplitInfo, damaged
from ssl_dist.errors import UserError
from ssl_dist.numba_cache import njit


@contextmanager
def _thread_counts_kept() -> Iterator[None]:
    """Put the process's numbers of threads back, which FFCV sets when it is imported and with every Loader."""
    before = torch.get_num_threads(), numba.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        numba.set_num_threads(before[1])


# FFCV keeps two constants in a numba dictionary that only Python reads; compiling it would take 5 s at every start.
with _thread_counts_kept(), mock.patch.object(numba.typed, "Dict", dict):
    try:
        from ffcv import libffcv
        from ffcv.fields.rgb_image import SimpleRGBImageDecoder
        from ffcv.loader import loader as ffcv_loader
        from ffcv.memory_managers.os_cache import OSCacheContext, OSCacheManager
        from ffcv.pipeline.allocation_query import AllocationQuery
        from ffcv.pipeline.compiler import Compiler
        from ffcv.pipeline.state import State
        from ffcv.reader import Reader as FfcvFile
    except (ImportError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"data.reader = 'ffcv': FFCV can not be imported ({reason}); install it (apt-get install libopencv-dev "
            "libturbojpeg0-dev pkg-config g++, then pip install ffcv), or set data.reader=arrays, which works now"
        ) from None

# The functions are bound by name, not by address, so that numba can cache the code that calls them. Pointers are
# integers here. TJPF_RGB = 0; flags 0: the accurate DCT and fancy upsampling, libjpeg's defaults.
for _name in ("tjInitDecompress", "tjDecompressHeader3", "tjDecompress2", "tjDestroy"):
    _function = getattr(libffcv.lib, _name)  # found in the libturbojpeg that libffcv was linked with
    llvmlite.binding.add_symbol(_name, ctypes.cast(_function, ctypes.c_void_p).value)

_P, _I = types.intp, types.int32
# Any: numba declares its types of functions as callables that make signatures.
_init_decompress: Any = types.ExternalFunction("tjInitDecompress", _P())
_decompress_header: Any = types.ExternalFunction("tjDecompressHeader3", _I(_P, _P, types.uint64, _P, _P, _P, _P))
_decompress: Any = types.ExternalFunction("tjDecompress2", _I(_P, _P, types.uint64, _P, _I, _I, _I, _I, _I))
_destroy: Any = types.ExternalFunction("tjDestroy", _I(_P))

SOUND, DAMAGED, DOUBTFUL = 0, 1, 2


@njit(cache=True, nogil=True)
def _copy_raw(image: np.ndarray, height: np.int64, width: np.int64, destination: np.ndarray) -> None:
    """Stored pixels uint8 [height * width * 3] to the top left of destination, uint8 [Hmax, Wmax, 3]."""
    row = width * 3
    for y in range(height):
        for x in range(width):
            for channel in range(3):
                destination[y, x, channel] = image[y * row + x * 3 + channel]


@njit(cache=True, nogil=True)
def _decode_images(
    ids: np.ndarray, pixels: np.ndarray, statuses: np.ndarray, metadata: np.ndarray, storage: tuple, checks: np.ndarray
) -> None:
    """Decode whole images into the top left of pixels, uint8 [n, Hmax, Wmax, 3].

    metadata: FFCV's records; storage: data, pointers (sorted) and sizes of its memory manager. statuses[i]: SOUND;
    DAMAGED, the bytes are not those that were written; DOUBTFUL, libturbojpeg complained.
    """
    data, pointers, sizes = storage
    handle = _init_decompress()
    header = np.empty(4, np.int32)  # of a JPEG: width, height, subsampling, colour space
    at = header.ctypes.data
    row = pixels.shape[2] * 3
    for i in range(ids.size):
        record = metadata[ids[i]]
        start = record["data_ptr"]
        size = sizes[np.searchsorted(pointers, start)]
        image = data[start : start + size]
        height, width = np.int64(record["height"]), np.int64(record["width"])
        if not is_sound(image, checks[ids[i]]):
            statuses[i] = DAMAGED
        elif record["mode"] == RAW:
            statuses[i] = SOUND
            _copy_raw(image, height, width, pixels[i])
        else:
            statuses[i] = DOUBTFUL
            source, target = image.ctypes.data, pixels[i].ctypes.data
            if (
                _decompress_header(handle, source, size, at, at + 4, at + 8, at + 12) == 0
                and header[0] == width
                and header[1] == height
                and _decompress(handle, source, size, target, width, row, height, 0, 0) == 0
            ):
                statuses[i] = SOUND
    _destroy(handle)


class MappedFile(OSCacheManager):
    """FFCV's manager that maps the file, without the Python tables of every sample's pages that only the other manager
    reads: 12 s and 1.4 GB for ImageNet, on every rank."""

    def __init__(self, reader: FfcvFile):
        self.reader = reader
        order = np.argsort(reader.alloc_table["ptr"])
        self.ptrs, self.sizes = reader.alloc_table["ptr"][order], reader.alloc_table["size"][order]
        self.context = OSCacheContext(self)

    @property
    def state_type(self) -> types.Tuple:
        """FFCV's own marks numba's one uint8 array type as read-only for the whole process: functions compiled before
        are not found any more (a KeyError deep inside numba), and later ones cannot write."""
        mapped = types.Array(types.uint8, 1, "C", readonly=True)
        return types.Tuple([mapped, types.uint64[::1], types.uint64[::1]])


class WholeImage(SimpleRGBImageDecoder):
    """FFCV operation: decode whole images of any size into a buffer as large as the largest."""

    def __init__(self, info: SplitInfo, checks: np.ndarray):
        super().__init__()
        self.shape, self.checks = (info.max_height, info.max_width, 3), checks

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, tuple[AllocationQuery, AllocationQuery]]:
        state = replace(previous_state, jit_mode=True, shape=self.shape, dtype=np.dtype("u1"))
        return state, (AllocationQuery(self.shape, np.dtype("u1")), AllocationQuery((), np.dtype("u1")))

    def generate_code(self) -> Callable[..., tuple]:
        checks = self.checks

        def decode(batch_indices: np.ndarray, destination: tuple, metadata: np.ndarray, storage_state: tuple) -> tuple:
            pixels, statuses = destination
            data, pointers, sizes = storage_state
            storage = np.asarray(data), pointers, sizes
            _decode_images(batch_indices, pixels, statuses, metadata, storage, checks)
            return destination

        return decode


class FfcvReader(Reader):
    def __init__(self, info: SplitInfo, beton: Beton):
        super().__init__(info, beton)
        # FFCV would compile the Python function around our compiled one, which takes seconds and saves nothing.
        interpreted = mock.patch.object(Compiler, "is_enabled", False)
        with _thread_counts_kept(), interpreted, mock.patch.object(ffcv_loader, "OSCacheManager", MappedFile):
            loader = ffcv_loader.Loader(
                str(beton.path),
                batch_size=1,  # of buffers that are never allocated
                num_workers=1,
                os_cache=True,
                pipelines={"image": [WholeImage(info, beton.checks)], "label": None},
            )
        self._context = loader.memory_manager.schedule_epoch([])
        self._context.__enter__()
        self._metadata = loader.reader.metadata
        stages, (self._node,) = loader.code
        ((self._stage, _),) = stages

    def _decode(self, ids: np.ndarray, pixels: np.ndarray) -> None:
        beton = self._open_file()
        statuses = np.empty(len(ids), np.uint8)
        self._stage(
            batch_indices=ids,
            metadata=self._metadata,
            storage_state=self._context.state,
            **{f"memory_{self._node}": (pixels, statuses), f"shared_memory_{self._node}": None},
        )
        for i in np.flatnonzero(statuses):
            if statuses[i] == DAMAGED:
                raise damaged(beton, int(ids[i]), "its check value differs")
            # Pillow is the judge of what a JPEG shows, for both readers: it takes some that libturbojpeg warns of.
            put_image(beton, int(ids[i]), pixels[i])

    def close(self) -> None:
        super().close()
        self._context = self._metadata = self._stage = None
