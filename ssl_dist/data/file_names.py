r"""<split>-files.txt beside a .beton: the files that its images were made of, for whoever has an id and wants a photo.

Line i (from 0) has the path of image i, relative to the source that was converted, in UTF-8. A backslash in a name is
written \\, a line feed \n, a carriage return \r, and a byte that is no UTF-8 \xNN: so every path has one line.
"""

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from ssl_dist.errors import UserError, refuse_unreadable

_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}
_UNESCAPES = {escape: char for char, escape in _ESCAPES.items()}
_REMEDY = "convert again, which writes it anew"


def path_of(root: str | Path, split: str) -> Path:
    """Where the list of a split lies in a converted data set."""
    return Path(root) / f"{split}-files.txt"


def escaped(name: str) -> str:
    """A path, as Python has it, in the form of a line."""
    text = re.sub(r"[\\\n\r]", lambda found: _ESCAPES[found[0]], name)
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def unescaped(line: str) -> str:
    """The path of a line, as Python has it."""
    known = re.sub(
        rb"\\(?:x([0-9a-f]{2})|[\\nr])",
        lambda found: bytes.fromhex(found[1].decode()) if found[1] else _UNESCAPES[found[0].decode()].encode(),
        line.encode(),
    )
    return os.fsdecode(known)


def text(names: Iterable[str]) -> str:
    """The content of the file of these paths, in id order."""
    return "".join(f"{escaped(name)}\n" for name in names)


def read(path: Path, count: int, digest: str | None) -> list[str] | None:
    """The lines of a split's list, [count], as they stand there; None: the data set has none (digest None), or its
    file was removed. digest: its SHA-256 by dataset.json. Raises `UserError` for another file than that one."""
    if digest is None or not path.is_file():
        return None
    with refuse_unreadable(path, _REMEDY):
        content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != digest:
        raise UserError(f"{path}: not the list that was written (its SHA-256 is another one); {_REMEDY}")
    lines = content.decode().split("\n")[:-1]
    if len(lines) != count:
        raise UserError(f"{path}: lists {len(lines)} files of {count} images; {_REMEDY}")
    return lines
