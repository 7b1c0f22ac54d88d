"""Reading of small files that a user may hand over: none that has no end, no value that could not be shown."""

import errno
import json
import math
import os
import stat
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeGuard

MAX_TEXT_BYTES = 1 << 30  # the metrics of a long run take some 100 MB
MAX_INT_DIGITS = 18  # of a whole number in JSON that is kept as such; a longer one is read as a float


def open_regular(path: str | Path) -> BufferedReader:
    """Open a file to read its bytes. Raises OSError, also for what has no end or waits for a writer: a device, a pipe.

    The caller closes it.
    """
    # without O_NONBLOCK a pipe that nobody writes to would wait here
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    mode = os.fstat(file.fileno()).st_mode
    if not stat.S_ISREG(mode):
        file.close()
        code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(code, os.strerror(code) if stat.S_ISDIR(mode) else "it is not a regular file", str(path))
    return file


def read_bytes(path: str | Path, max_bytes: int = MAX_TEXT_BYTES) -> bytes:
    """All of a file. Raises OSError, also where it has more than `max_bytes` or is no regular file."""
    blocks, left = [], max_bytes + 1
    with open_regular(path) as file:
        # To read `left` at once would take that much memory, however small the file is.
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            blocks.append(block)
            left -= len(block)
    if left == 0:
        raise OSError(errno.EFBIG, f"it has more than {max_bytes:,} bytes", str(path))
    return b"".join(blocks)


def read_text(path: str | Path, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """The text of a UTF-8 file, with or without a byte order mark. Raises what `read_bytes` does, and
    UnicodeDecodeError."""
    return read_bytes(path, max_bytes).decode("utf-8-sig")


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError for what is none, also for nesting that is too deep.

    Half a character (a lone surrogate), which no file or message can hold, becomes `?`.
    """
    try:
        value = json.loads(text, parse_int=_whole_number)
        if "\\u" in text:
            value = json.loads(json.dumps(value, ensure_ascii=False).encode(errors="replace"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def _whole_number(digits: str) -> int | float:
    return int(digits) if len(digits) <= MAX_INT_DIGITS else float(digits)


def json_lines(path: Path, is_valid: Callable[[dict], bool]) -> tuple[list[dict], list[int]]:
    """The valid objects in a file of one JSON object a line, and the line numbers of what is none.

    An unfinished last line, which a process may be writing, is neither. Raises OSError; a missing file holds nothing.
    """
    try:
        data = read_bytes(path)
    except FileNotFoundError:
        return [], []
    valid, faulty = [], []
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        try:
            value = parse_json(line.decode())
        except ValueError:
            value = None
        if isinstance(value, dict) and is_valid(value):
            valid.append(value)
        else:
            faulty.append(number)
    return valid, faulty


def is_finite(value: object) -> TypeGuard[float]:
    """Whether it is a number, whole or not; true and false are none, and neither are NaN and infinity."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: object) -> TypeGuard[int]:
    """Whether it is a whole number of steps, epochs or bytes; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53
