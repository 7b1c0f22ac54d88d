"""Atomic writes of files, locks, and removal of the temporary files of killed processes."""

import errno
import fcntl
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ssl_dist.errors import UserError

_REMEDY = "give a folder that can, with space left"
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file that takes `path`'s place when the block ends well, and leaves no trace when it does not.

    Raises OSError with the name of the file, also where the system gives none (a full disk), and for what is there
    and is no regular file: root would put a file in the place of /dev/null.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is there and is not a regular file", str(path))
    name = temporary_path(path, new_token())
    with naming(path):
        with temporary(name) as file:
            yield file
            sync(file)
            os.replace(name, path)
        sync_folder(path.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError of the block the name of the file, where the system gives none (on a full disk) or that of its
    temporary file."""
    try:
        yield
    except OSError as error:
        if error.filename is None or _TEMPORARY.fullmatch(os.path.basename(str(error.filename))):
            error.filename = str(path)
        raise


def append(path: Path, data: bytes) -> None:
    """Add bytes to the end of a file, all or none of them but for a kill; one that there was not before is gone then.
    Raises OSError with the file's name."""
    is_new = not path.exists()
    with naming(path), open(path, "ab", buffering=0) as file:
        size, left = file.seek(0, os.SEEK_END), memoryview(data)
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            file.truncate(size)
            if is_new:
                path.unlink()
            raise


def append_line(path: Path, line: str) -> None:
    """Add a line to a text file, as `append` does; one that a kill has torn is ended before it."""
    with naming(path), open(path, "ab+", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
        is_torn = size > 0 and file.read(1) != b"\n"
    append(path, (f"\n{line}\n" if is_torn else f"{line}\n").encode())


@contextmanager
def refuse_unwritable(target: object, remedy: str = _REMEDY) -> Iterator[None]:
    """Turn an OSError of the block into the `UserError` that `target`, a path or key = value, cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror or error}; {remedy}") from None


@contextmanager
def atomic_write_or_refuse(path: Path, remedy: str = _REMEDY) -> Iterator[BinaryIO]:
    """`atomic_write` that makes the folder, too, and raises `UserError` where it cannot be written."""
    with refuse_unwritable(path, remedy):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            yield file


def write_together_or_refuse(target: Path, files: Mapping[Path, bytes]) -> None:
    """Put files of one folder, which is made, in place when all of them are written; in their order, each whole. Raises
    `UserError` on `target` where one cannot be written; then none is there, and no folder that was not."""
    folder, token = next(iter(files)).parent, new_token()
    is_new = not folder.exists()
    with refuse_unwritable(target):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with ExitStack() as written:
                remove_dead(folder)
                for path, content in files.items():
                    file = written.enter_context(temporary(temporary_path(path, token)))
                    file.write(content)
                    sync(file)
                for path in files:
                    os.replace(temporary_path(path, token), path)
        except OSError:
            if is_new:
                with suppress(OSError):  # where something is in it
                    folder.rmdir()
            raise
        sync_folder(folder)


@contextmanager
def temporary(name: Path) -> Iterator[BinaryIO]:
    """A new file that is gone after the block. A lock on it tells `remove_dead` that its writer is alive."""
    try:
        with os.fdopen(lock(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
            yield file
    finally:
        name.unlink(missing_ok=True)


def temporary_path(path: Path, token: str) -> Path:
    return path.with_name(f".{path.name}.{token}.tmp")


def new_token() -> str:
    """A token for the names of a process's temporary files that no other process, on any host, has."""
    return secrets.token_hex(4)


def write_text(path: Path, text: str) -> None:
    """Put a small text file in place."""
    with atomic_write(path) as file:
        file.write(text.encode())


def remove_dead(folder: Path) -> None:
    """Remove the temporary files that killed processes left in `folder`; those of living ones, on any host, stay."""
    for name in filter(_TEMPORARY.fullmatch, os.listdir(folder)):
        path = folder / name
        try:
            descriptor = lock(path, os.O_WRONLY, wait=False)
        except (BlockingIOError, FileNotFoundError, PermissionError):
            continue  # its writer lives, has just finished, or is another user, who may remove it
        try:
            path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def lock(path: Path, flags: int, *, wait: bool = True) -> int:
    """Open `path` and take an flock on it, released when the process ends; returns the descriptor that holds it.

    flags: those of os.open. The file must be opened for writing, or NFS would keep the lock to one machine. Raises
    BlockingIOError when another process holds it and `wait` is False.
    """
    while True:
        descriptor = os.open(path, flags, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if is_at(path, descriptor):
                return descriptor
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the file was replaced or removed before we had the lock, which is now on nothing


def is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file is still the one that `path` names."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def sync(file: BinaryIO) -> None:
    """Make what was written to `file` survive a power cut."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
