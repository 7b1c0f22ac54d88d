"""Files of torch.save: read without running code from them, and only when what they build is bounded by their size.

`torch.load(weights_only=True)` runs nothing of a file, but it builds whatever the pickle in it says: tuples that hold
themselves twice over and over, a key that takes for ever to hash or ends the process, storages and byte arrays of any
length; and an archive may be compressed. So the archive's directory and the pickle's opcodes are walked first. What
torch writes of tensors and plain values passes. An archive keeps a CRC-32 of every record, which torch writes and does
not read: a flipped bit would be other weights without a word. It is compared here.
"""

import os
import pickle
import pickletools
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import IO, Any, BinaryIO

import torch
from safetensors import SafetensorError

from ssl_dist.errors import MAX_QUOTED, one_line

MAX_OPCODES = 2_000_000  # ten seconds; a backbone has some thousands
MAX_PICKLE = 1 << 26  # bytes
MAX_DEPTH = 50  # of tuples, lists and dictionaries in each other
MAX_GROWTH = 16  # times the bytes that hold it, of an archive that is unpacked or of a pickle written out as a tree
ALLOWANCE = 1 << 20  # bytes that are granted in any case

# What torch, zipfile and safetensors raise over bytes that are not theirs.
DAMAGED_FILE_ERRORS = (
    SafetensorError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError,
    ArithmeticError, MemoryError, struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def reason_of(error: Exception) -> str:
    """What one of `DAMAGED_FILE_ERRORS` says, in a line."""
    lines = str(error).splitlines()
    return one_line(lines[0], MAX_QUOTED) if lines else type(error).__name__


def load(file: BinaryIO) -> Any:
    """What a file of torch.save holds, from its beginning, on the CPU: tensors and plain values.

    Raises `pickle.UnpicklingError` when it holds anything else, naming it as `GLOBAL module.name`, and one of
    `DAMAGED_FILE_ERRORS` when it is damaged, no such file, or would build more than its size justifies.
    """
    file.seek(0)
    is_archive = file.read(4) == b"PK\3\4"
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    if is_archive:
        _check_archive(file, size)
    else:
        _check_legacy(file, size)
    file.seek(0)
    with warnings.catch_warnings(action="ignore"):  # torch's, of pickles that it then refuses
        return torch.load(file, map_location="cpu", weights_only=True)


def _check_archive(file: BinaryIO, size: int) -> None:
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        unpacked = sum(entry.file_size for entry in entries)
        if unpacked > MAX_GROWTH * size + ALLOWANCE:
            raise ValueError(f"its {size:,} bytes unpack to {unpacked:,}")
        records = {entry.filename: entry.file_size for entry in entries}
        for entry in entries:
            if entry.CRC == 0:  # torch writes none where it was told so
                entry.CRC = None  # type: ignore[assignment]  # zipfile then compares none
            with archive.open(entry) as record:
                if entry.filename.endswith("/data.pkl"):
                    _check_pickle(record, entry, records)
                while record.read(1 << 20):  # to the end, where zipfile compares the CRC-32; torch does not
                    pass


def _check_pickle(record: IO[bytes], entry: zipfile.ZipInfo, records: Mapping[str, int]) -> None:
    """records: the size of every record of the archive."""
    if entry.file_size > MAX_PICKLE:
        raise ValueError(f"its pickle has {entry.file_size:,} bytes, at most {MAX_PICKLE:,} are read")
    folder = entry.filename.removesuffix("data.pkl")
    for key, wanted in _walk(record, entry.file_size).storages.items():
        there = records.get(f"{folder}data/{key}", 0)
        if wanted > there:
            raise ValueError(f"its tensor data/{key} has {there:,} bytes and is read as {wanted:,}")


def _check_legacy(file: BinaryIO, size: int) -> None:
    """The form of before torch 1.6: five pickles in a row, of which the first is a number, then the storages."""
    magic = _walk(file, size)
    if magic.result.value != torch.serialization.MAGIC_NUMBER:
        if magic.callables:
            raise pickle.UnpicklingError(f"GLOBAL {magic.callables[0]}")
        raise ValueError("not a file of torch.save")
    wanted = 0
    for _ in range(4):
        wanted += sum(_walk(file, size).storages.values())
    if wanted > size:
        raise ValueError(f"its tensors have {wanted:,} bytes and it has {size:,}")


@dataclass(slots=True)
class _Value:
    """One value on the pickle's stack. size: bytes, written out as a tree; used: something holds it, so it is finished;
    value: of a number, a text or a global's name; items: of a tuple."""

    size: int = 1
    depth: int = 0
    value: object = None
    items: tuple["_Value", ...] = ()
    used: bool = False


@dataclass(frozen=True)
class _Walked:
    """What a pickle would give: its result, the bytes of every storage that it asks for, and the globals it names."""

    result: _Value
    storages: Mapping[str, int]
    callables: list[str]


# Calls that take memory by a number; with nothing to take it for they are made by torch.
_TAKING_MEMORY = ("builtins.bytearray", "__builtin__.bytearray", "torch._utils._rebuild_qtensor")


# Of torch's storages, without that word in their names; the others' is 1.
_ITEM_BYTES = {"Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "QInt32": 4} | {
    "ComplexFloat": 8, "ComplexDouble": 16,
}  # fmt: skip


def _walk(file: IO[bytes], size: int) -> _Walked:
    """Go through the opcodes of one pickle of at most `size` bytes, those that torch's own unpickler takes, building
    nothing. Raises ValueError for what would grow."""
    stack: list[_Value] = []
    marks: list[list[_Value]] = []
    memo: dict[int, _Value] = {}
    storages: dict[str, int] = {}
    callables: list[str] = []
    budget = MAX_GROWTH * min(size, MAX_PICKLE) + ALLOWANCE

    def hold(holder: _Value, children: Iterable[_Value]) -> None:
        nonlocal budget
        for child in children:
            child.used = True
            holder.size += child.size
            holder.depth = max(holder.depth, child.depth + 1)
            budget -= child.size
        if holder.used:
            raise ValueError("its pickle changes a value that another one, or itself, holds")
        if holder.depth > MAX_DEPTH:
            raise ValueError(f"its pickle holds values in each other, more than {MAX_DEPTH} deep")
        if budget < 0:
            raise ValueError(f"its pickle would grow to more than {MAX_GROWTH} times its size")

    def made_of(children: list[_Value]) -> _Value:
        made = _Value(items=tuple(children[:6]))
        hold(made, children)
        return made

    def popped_mark() -> list[_Value]:
        nonlocal stack
        items, stack = stack, marks.pop()
        return items

    argument: Any
    for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if number > MAX_OPCODES:
            raise ValueError(f"its pickle has more than {MAX_OPCODES:,} steps")
        match opcode.name:
            case "PROTO":
                pass
            case "MARK":
                marks.append(stack)
                stack = []
            case "GLOBAL":
                name = str(argument).replace(" ", ".", 1)
                callables.append(name)
                stack.append(_Value(value=name))
            case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_SET":
                stack.append(_Value())
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(_Value(value=argument))
            case "BINUNICODE" | "SHORT_BINSTRING":
                stack.append(_Value(1 + len(argument), value=argument))
            case "TUPLE":
                items = popped_mark()
                stack.append(made_of(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                stack[-count:] = [made_of(_last(stack, count))]
            case "APPEND":
                hold(stack[-2], [stack.pop()])
            case "SETITEM":
                hold(stack[-3], [stack.pop(), stack.pop()])
            case "APPENDS" | "SETITEMS":
                items = popped_mark()
                hold(stack[-1], items)
            case "BUILD":
                hold(stack[-2], [stack.pop()])
            case "REDUCE" | "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                _check_call(function, arguments)
                stack.append(made_of([arguments]))
            case "BINPERSID":
                key, wanted = _storage(stack.pop())
                storages[key] = max(storages.get(key, 0), wanted)
                stack.append(_Value())
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "STOP":
                return _Walked(stack.pop(), storages, callables)
            case other:
                raise ValueError(f"its pickle has an opcode that torch does not write: {other}")
    raise EOFError("its pickle does not end")


def _last(stack: list[_Value], count: int) -> list[_Value]:
    if len(stack) < count:
        raise ValueError("its pickle takes more from its stack than there is")
    return stack[-count:]


def _check_call(function: _Value, arguments: _Value) -> None:
    name = str(function.value)
    if name == "torch._tensor._rebuild_from_type_v2" and arguments.items:  # calls its first argument
        name = str(arguments.items[0].value)
    is_class = name.startswith("torch.") and name.endswith(("Storage", "Tensor"))
    if name in _TAKING_MEMORY or (is_class and arguments.items):
        raise ValueError(f"its pickle takes memory by a number ({name})")


def _storage(identity: _Value) -> tuple[str, int]:
    """The key of a storage that a pickle refers to, and its bytes."""
    if len(identity.items) < 5 or identity.items[0].value not in ("storage", b"storage"):
        raise ValueError("its pickle refers to something that is no tensor's storage")
    _, kind, key, _, count = (item.value for item in identity.items[:5])
    if not isinstance(count, int) or count < 0:
        raise ValueError(f"its tensor {key!r} has no length")
    return str(key), count * _ITEM_BYTES.get(str(kind).removeprefix("torch.").removesuffix("Storage"), 1)
