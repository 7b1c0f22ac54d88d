"""Standard output and standard error that may fail: a terminal that was closed, `| head`, a full disk.

What a command does is never ended by where it reports: `lasting` keeps the failure, and the command's caller decides at
the end what it means.
"""

import codecs
import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO, cast

_IN_ASCII = {"±": "+-", "·": "-", "×": "x", "–": "-", "…": "..."}


class Stream:
    """A text stream whose writes do not raise OSError. failure: the first one; None: all that was written has arrived
    as far as is known. on_failure is called with a sentence at the first."""

    def __init__(self, stream: "TextIO | Stream", name: str, on_failure: Callable[[str], None]):
        # the outer of two that are nested learns nothing of what fails within the inner
        self._stream: TextIO = stream._stream if isinstance(stream, Stream) else stream
        self._name, self._on_failure = name, on_failure
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        with self._kept():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        with self._kept():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self.failure is None:
                self.failure = error
                self._on_failure(f"{self._name} cannot be written: {error.strerror}")

    def finish(self) -> None:
        """Write what is buffered. What never arrives is dropped, or Python would try again when the process ends and
        return another exit code."""
        with self._kept():
            try:
                self._stream.flush()
            except OSError:
                with open(os.devnull, "wb") as nowhere:
                    os.dup2(nowhere.fileno(), self._stream.fileno())
                self._stream.flush()
                raise


@contextlib.contextmanager
def lasting(on_failure: Callable[[str], None] = lambda _: None) -> Iterator[Stream]:
    """A context in which sys.stdout and sys.stderr may fail, be closed or know no more than ASCII. Yields the former.

    on_failure: gets a sentence when one of them fails first.
    """
    for descriptor in range(3):  # of what is closed, or the next file that is opened would take its place
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number
    former = sys.stdout, sys.stderr
    streams = [
        Stream(stream or open(number, "w", closefd=False), name, on_failure)  # noqa: SIM115 - lasts as the process does
        for number, (stream, name) in enumerate(zip(former, ("standard output", "standard error"), strict=True), 1)
    ]
    sys.stdout, sys.stderr = (cast(TextIO, stream) for stream in streams)
    try:
        with _spelt_out(former[0]), _spelt_out(former[1]):
            yield streams[0]
    finally:
        for stream in streams:
            stream.finish()
        sys.stdout, sys.stderr = former


def is_reader_gone(error: OSError) -> bool:
    """Whether nobody reads any more, as after `| head -1` or when a terminal was closed."""
    return error.errno in (errno.EPIPE, errno.EIO)


@contextlib.contextmanager
def _spelt_out(stream: TextIO | None) -> Iterator[None]:
    """Characters that the stream's encoding lacks are written in ASCII, bytes of a file's name that are no UTF-8 as
    they are."""
    if not isinstance(stream, io.TextIOWrapper):
        yield
        return
    former = stream.errors
    stream.reconfigure(errors="ssl_dist.spelt_out")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # it flushes
            stream.reconfigure(errors=former)


def _spell_out(error: UnicodeError) -> tuple[str | bytes, int]:
    assert isinstance(error, UnicodeEncodeError), "for writing"
    character = error.object[error.start]
    if "\udc80" <= character <= "\udcff":  # Python's sign for a byte of a file's name that is no UTF-8
        return bytes([ord(character) - 0xDC00]), error.start + 1
    escaped = character.encode("ascii", "backslashreplace").decode()
    return _IN_ASCII.get(character, escaped), error.start + 1


codecs.register_error("ssl_dist.spelt_out", _spell_out)
