"""Steps of a resize on vectors of pixels: loops over pixels of three bytes that numba would leave scalar.

Written in the terms of LLVM, which has vectors of any length on every processor, and makes them of what the processor
has. Arrays are flat. Indices leave their arrays unseen, except in what numba compiled under NUMBA_BOUNDSCHECK=1, which
needs a NUMBA_CACHE_DIR of its own.
"""

from collections.abc import Callable
from typing import Any

from llvmlite.ir import Constant, IntType, Undefined, VectorType
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

BITS = 22  # of the fraction of a weight
HALF = 1 << (BITS - 1)
ROWS, PIXELS = 4, 4  # of a block: `interleave` reads so many pixels of so many rows
PACKED = 4 * ROWS  # bytes of a column of a block: (red, green, blue, any) of each row
SPAN = 32  # bytes of a row that `filter_span` makes
_BYTE, _INT, _LONG = IntType(8), IntType(32), IntType(64)


def _intrinsic(define: Callable[..., Any]) -> Any:
    """numba's `intrinsic`, by whose type a caller would pass the typing context, too."""
    return intrinsic(define)


class _Array:
    """An array among the arguments of an intrinsic."""

    def __init__(self, context: Any, builder: Any, signature: Any, arguments: Any, number: int):
        self.context, self.builder = context, builder
        self.array = context.make_array(signature.args[number])(context, builder, arguments[number])

    def pointer(self, index: Any, kind: Any, count: int = 1) -> Any:
        """To the element `index`, of this LLVM type that takes `count` elements."""
        if self.context.enable_boundscheck:
            for end in (index, self.builder.add(index, Constant(_LONG, count - 1))):
                cgutils.do_boundscheck(self.context, self.builder, end, self.array.nitems)
        return self.builder.bitcast(self.builder.gep(self.array.data, [index]), kind.as_pointer())


def _shuffled(builder: Any, first: Any, second: Any, places: list[int]) -> Any:
    """The elements of both vectors, one behind the other, at these places."""
    return builder.shuffle_vector(first, second, Constant(VectorType(_INT, len(places)), places))


def _all(value: int, count: int) -> Any:
    return Constant(VectorType(_INT, count), [value] * count)


def _filtered(
    builder: Any, pixels: _Array, at: Any, pitch: Any, weights: _Array, first: Any, taps: Any, count: int
) -> Any:
    """The rounded and clipped level, uint8 [count], of the sum over t < taps of pixels[at + t * pitch + (0 .. count-1)]
    * weights[first + t]. 8-bit levels times weights that add up to 2**22 have room in 32 bits, also those of the cubic
    filter, whose weights above 0 add up to less than 1.2 times as much."""
    bytes_, ints = VectorType(_BYTE, count), VectorType(_INT, count)
    total = cgutils.alloca_once_value(builder, _all(HALF, count))
    place = cgutils.alloca_once_value(builder, at)
    with cgutils.for_range(builder, taps) as loop:
        read = builder.load(place)
        levels = builder.zext(builder.load(pixels.pointer(read, bytes_, count), align=1), ints)
        weight = builder.trunc(builder.load(weights.pointer(builder.add(first, loop.index), _LONG)), _INT)
        one = builder.insert_element(Constant(ints, Undefined), weight, Constant(_INT, 0))
        product = builder.mul(levels, _shuffled(builder, one, one, [0] * count))
        builder.store(builder.add(builder.load(total), product), total)
        builder.store(builder.add(read, pitch), place)
    level = builder.ashr(builder.load(total), _all(BITS, count))
    level = builder.select(builder.icmp_signed("<", level, _all(0, count)), _all(0, count), level)
    level = builder.select(builder.icmp_signed(">", level, _all(255, count)), _all(255, count), level)
    return builder.trunc(level, bytes_)


@_intrinsic
def interleave(
    typingctx: Any, image: Any, first: Any, second: Any, third: Any, fourth: Any, packed: Any, to: Any
) -> Any:
    """Pixels of four rows, three bytes each, side by side: packed[to + 16 p + 4 r] = byte 3 p of row r, and so on.

    Reads 16 bytes of image from each of the four indices on, and writes the 64 bytes of four columns.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source = _Array(context, builder, signature, arguments, 0)
        target = _Array(context, builder, signature, arguments, 5)
        kind = VectorType(_BYTE, 4 * PIXELS)
        padded = [3 * pixel + min(channel, 2) for pixel in range(PIXELS) for channel in range(4)]
        rows = []
        for index in arguments[1 : 1 + ROWS]:
            line = builder.load(source.pointer(index, kind, 4 * PIXELS), align=1)
            rows.append(builder.bitcast(_shuffled(builder, line, line, padded), VectorType(_INT, PIXELS)))
        pairs = [place for pixel in range(PIXELS) for place in (pixel, PIXELS + pixel)]
        upper, lower = _shuffled(builder, rows[0], rows[1], pairs), _shuffled(builder, rows[2], rows[3], pairs)
        fours = [2 * pixel + place for pixel in range(PIXELS) for place in (0, 1, 2 * PIXELS, 2 * PIXELS + 1)]
        columns = _shuffled(builder, upper, lower, fours)
        builder.store(columns, target.pointer(arguments[6], columns.type, PACKED * PIXELS), align=1)
        return context.get_dummy_value()

    index = types.uint64
    return types.void(image, index, index, index, index, packed, index), generate


@_intrinsic
def filter_column(
    typingctx: Any, packed: Any, at: Any, weights: Any, first: Any, taps: Any, rows: Any, to: Any, pitch: Any
) -> Any:
    """A pixel of four rows out of `taps` columns of packed from byte `at` on, with the weights from `first` on.

    Writes four bytes to rows[to + r * pitch], r = 0 .. 3: red, green, blue, and one that the next pixel overwrites.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, factors, target = (_Array(context, builder, signature, arguments, number) for number in (0, 2, 5))
        _, at, _, first, taps, _, place, pitch = arguments
        step = Constant(_LONG, PACKED)
        levels = _filtered(builder, source, at, step, factors, first, taps, PACKED)
        pixels = builder.bitcast(levels, VectorType(_INT, ROWS))
        for row in range(ROWS):
            pixel = builder.extract_element(pixels, Constant(_INT, row))
            builder.store(pixel, target.pointer(place, _INT, 4), align=1)
            place = builder.add(place, pitch)
        return context.get_dummy_value()

    index = types.uint64
    return types.void(packed, index, weights, index, index, rows, index, index), generate


@_intrinsic
def filter_span(
    typingctx: Any, rows: Any, at: Any, pitch: Any, weights: Any, first: Any, taps: Any, line: Any, to: Any
) -> Any:
    """32 bytes of line, from `to` on, out of `taps` rows of `pitch` bytes, with the weights from `first` on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, factors, target = (_Array(context, builder, signature, arguments, number) for number in (0, 3, 6))
        _, at, pitch, _, first, taps, _, to = arguments
        levels = _filtered(builder, source, at, pitch, factors, first, taps, SPAN)
        builder.store(levels, target.pointer(to, levels.type, SPAN), align=1)
        return context.get_dummy_value()

    index = types.uint64
    return types.void(rows, index, index, weights, index, index, line, index), generate
