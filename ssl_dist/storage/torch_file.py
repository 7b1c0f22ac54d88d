"""Files of torch.save: read without running code from them, and only when what they build is bounded by their size.

`torch.load(weights_only=True)` runs nothing of a file, but it builds whatever the pickle in it says: tuples that hold
themselves twice over and over, a key that takes for ever to hash or ends the process, storages and byte arrays of any
length; and an archive may be compressed. So the archive's directory and the pickle's opcodes are walked first. What
torch writes of tensors and plain values passes. An archive keeps a CRC-32 of every record, which torch writes and does
not read: a flipped bit would be other weights without a word. It is compared here. Objects of other classes are
refused, or, in files of others (`load_of_others`), replaced by stubs.
"""

import os
import pickle
import pickletools
import struct
import warnings
import zipfile
import zlib
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import IO, Any, BinaryIO

import torch
from safetensors import SafetensorError

from ssl_dist.errors import MAX_QUOTED, one_line
from ssl_dist.storage import inert

MAX_OPCODES = 2_000_000  # ten seconds; a backbone has some thousands
MAX_PICKLE = 1 << 26  # bytes
MAX_DEPTH = 50  # of tuples, lists and dictionaries in each other
MAX_GROWTH = 16  # times the bytes that hold it, of an archive that is unpacked or of a pickle written out as a tree
ALLOWANCE = 1 << 20  # bytes that are granted in any case
MAX_CLASSES = 300  # of objects that become stubs; torch looks each one up among all
MAX_STUB_STEPS = 100_000  # opcodes that name, make or fill a stub

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
    _checked(file)
    return _load(file)


def load_of_others(file: BinaryIO) -> tuple[Any, list[str]]:
    """The same with a stub (`inert`) in the place of every object of another class, and the names of their classes.
    What is of the modules os, posix, nt and sys is refused, as torch does."""
    foreign = _checked(file)
    with torch.serialization.safe_globals(inert.stubs(foreign)):
        return _load(file), sorted(foreign)


def _load(file: BinaryIO) -> Any:
    file.seek(0)
    with warnings.catch_warnings(action="ignore"):  # torch's, of pickles that it then refuses
        return torch.load(file, map_location="cpu", weights_only=True)


def _checked(file: BinaryIO) -> dict[str, str]:
    """The classes that the file names and torch does not know, as `inert.stubs` takes them. Raises what `load` does."""
    file.seek(0)
    is_archive = file.read(4) == b"PK\3\4"
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    return _check_archive(file, size) if is_archive else _check_legacy(file, size)


def _check_archive(file: BinaryIO, size: int) -> dict[str, str]:
    foreign: dict[str, str] = {}
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
                    foreign |= _check_pickle(record, entry, records)
                while record.read(1 << 20):  # to the end, where zipfile compares the CRC-32; torch does not
                    pass
    return foreign


def _check_pickle(record: IO[bytes], entry: zipfile.ZipInfo, records: Mapping[str, int]) -> dict[str, str]:
    """records: the size of every record of the archive."""
    if entry.file_size > MAX_PICKLE:
        raise ValueError(f"its pickle has {entry.file_size:,} bytes, at most {MAX_PICKLE:,} are read")
    folder = entry.filename.removesuffix("data.pkl")
    walked = _walk(record, entry.file_size)
    for key, wanted in walked.storages.items():
        there = records.get(f"{folder}data/{key}", 0)
        if wanted > there:
            raise ValueError(f"its tensor data/{key} has {there:,} bytes and is read as {wanted:,}")
    return walked.foreign


def _check_legacy(file: BinaryIO, size: int) -> dict[str, str]:
    """The form of before torch 1.6: five pickles in a row, of which the first is a number, then the storages."""
    magic = _walk(file, size)
    if magic.result.value != torch.serialization.MAGIC_NUMBER:
        if magic.callables:
            raise pickle.UnpicklingError(f"GLOBAL {magic.callables[0]}")
        raise ValueError("not a file of torch.save")
    wanted, foreign = 0, dict[str, str]()
    for _ in range(4):
        walked = _walk(file, size)
        wanted += sum(walked.storages.values())
        foreign |= walked.foreign
    if wanted > size:
        raise ValueError(f"its tensors have {wanted:,} bytes and it has {size:,}")
    return foreign


@dataclass(slots=True)
class _Value:
    """One value on the pickle's stack. size: bytes, written out as a tree; used: something holds it, so it is finished;
    value: of a number, a text or a global's name; items: of a tuple; stub: the class of which it is an object that
    becomes a stub. Nothing walks through a stub or hashes what it holds, so it counts as one value, whatever it holds,
    and may hold itself."""

    size: int = 1
    depth: int = 0
    value: object = None
    items: tuple["_Value", ...] = ()
    used: bool = False
    stub: str | None = None


@dataclass(frozen=True)
class _Walked:
    """What a pickle would give: its result, the bytes of every storage that it asks for, the globals it names, and the
    classes that torch does not know, as `inert.stubs` takes them."""

    result: _Value
    storages: Mapping[str, int]
    callables: list[str]
    foreign: dict[str, str]


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
    foreign: dict[str, str] = {}
    budget, stub_steps = MAX_GROWTH * min(size, MAX_PICKLE) + ALLOWANCE, 0

    def hold(holder: _Value, children: Iterable[_Value]) -> None:
        nonlocal budget
        for child in children:
            child.used = True
            budget -= child.size
            if holder.stub is None:
                holder.size += child.size
                holder.depth = max(holder.depth, child.depth + 1)
        if holder.used and holder.stub is None:
            raise ValueError("its pickle changes a value that another one, or itself, holds")
        if holder.depth > MAX_DEPTH:
            raise ValueError(f"its pickle holds values in each other, more than {MAX_DEPTH} deep")
        if budget < 0:
            raise ValueError(f"its pickle would grow to more than {MAX_GROWTH} times its size")

    def made_of(children: list[_Value]) -> _Value:
        made = _Value(items=tuple(children[:6]))
        hold(made, children)
        return made

    def count_stub(name: str) -> None:
        nonlocal stub_steps
        stub_steps += 1
        foreign.setdefault(name, "")
        if len(foreign) > MAX_CLASSES or stub_steps > MAX_STUB_STEPS:
            raise ValueError(f"its pickle has objects of more than {MAX_CLASSES} classes, or too many")

    def fill(holder: _Value, children: list[_Value], filled: str) -> None:
        """Add items to a container; a stub is one from then on."""
        if holder.stub is not None:
            if foreign[holder.stub] not in ("", filled):
                raise ValueError(f"its pickle treats {holder.stub} as a list and as a dictionary")
            foreign[holder.stub], holder.stub = filled, None
        hold(holder, children)

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
                name = _present_name(*str(argument).partition(" ")[::2])
                callables.append(name)
                if not inert.is_torchs(name):
                    count_stub(name)
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
                fill(stack[-2], [stack.pop()], "elements")
            case "SETITEM":
                fill(stack[-3], [stack.pop(), stack.pop()], "items")
            case "APPENDS" | "SETITEMS":
                items = popped_mark()
                fill(stack[-1], items, "elements" if opcode.name == "APPENDS" else "items")
            case "BUILD":
                if stack[-2].stub is not None:
                    count_stub(stack[-2].stub)
                hold(stack[-2], [stack.pop()])
            case "REDUCE" | "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                _check_call(function, arguments)
                name = str(function.value)
                made = made_of([arguments])
                if isinstance(function.value, str) and name in foreign:
                    count_stub(name)
                    made = _Value(stub=name)
                stack.append(made)
            case "BINPERSID":
                key, wanted = _storage(stack.pop())
                storages[key] = max(storages.get(key, 0), wanted)
                stack.append(_Value())
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "STOP":
                return _Walked(stack.pop(), storages, callables, foreign)
            case other:
                raise ValueError(f"its pickle has an opcode that torch does not write: {other}")
    raise EOFError("its pickle does not end")


def _present_name(module: str, name: str) -> str:
    """What torch makes of a global's name, which a pickle has as Python 2 called it."""
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"


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
