"""The exceptions that end a command with a message of one line and no traceback, and what such a line may hold."""

import difflib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import Enum


class RaisedOn(Enum):
    """Which ranks raise an error, and so which of them print it."""

    EVERY_RANK = "all ranks raise it together: rank 0 prints it"
    THIS_RANK = "the other ranks do not raise it: this rank prints it"
    EACH_MACHINE = "raised before the rendezvous, most likely by all ranks: the first rank of each machine prints it"


MAX_MESSAGE, MAX_QUOTED = 490, 160  # characters of a message, and of a value in it


def one_line(text: str, max_length: int = MAX_MESSAGE) -> str:
    """`text` on one line, whatever is in it: what cannot be printed is escaped, and what is too long lacks its middle,
    since a message begins with the key or file and ends with the remedy."""
    if len(text) > 4 * max_length:  # to escape megabytes would take long
        text = _without_middle(text, 4 * max_length)
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return _without_middle(escaped, max_length)


def first_line(error: BaseException) -> str:
    """The first line that an error says, or its kind where it says nothing, as a bare `assert`."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def quoted(value: object) -> str:
    """A value that a user gave, as a message shows it: as Python writes it, on one line and shortened."""
    return one_line(repr(_without_middle(value, 4 * MAX_QUOTED) if isinstance(value, str) else value), MAX_QUOTED)


def _without_middle(text: str, max_length: int) -> str:
    head = max_length * 3 // 5
    return text if len(text) <= max_length else f"{text[:head]} ... {text[head + 5 - max_length :]}"


class UserError(ValueError):
    """A mistake in what the user gave: exit code 2. The message names the key or file, the value and the remedy; it is
    kept to one line (`one_line`)."""

    def __init__(self, message: str, raised_on: RaisedOn = RaisedOn.EACH_MACHINE):
        super().__init__(one_line(message))
        self.raised_on = raised_on


class NotInstalled(UserError):
    """An optional package is needed and missing."""


class Fault(RuntimeError):
    """Something that ends the run. The message names the rank, its host, the step and the cause, on one line.

    code: the exit code, 1 or that of the rank that caused the fault.
    """

    def __init__(self, message: str, raised_on: RaisedOn = RaisedOn.THIS_RANK, code: int = 1):
        super().__init__(one_line(message))
        self.raised_on, self.code = raised_on, code


AFTER_MENDING = "mend that and give the same command again"  # the remedy where the system has refused something


def of_system(error: OSError) -> str:
    """What the system refused, for a message: the file, where it is known, and the reason."""
    reason = error.strerror or str(error) or type(error).__name__
    return (
        f"{os.fsdecode(error.filename)}: {reason}" if isinstance(error.filename, str | bytes | os.PathLike) else reason
    )


@contextmanager
def refuse_unreadable(target: object, remedy: str = "") -> Iterator[None]:
    """Turn an error of reading into the `UserError` that `target`, a path or a key = value, cannot be read."""
    try:
        yield
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise UserError(f"{target}: cannot be read: {reason}{remedy and '; '}{remedy}") from None


def did_you_mean(name: str, names: Iterable[str], cutoff: float = 0.6, who: str = "you") -> str:
    """`did you mean 'x'? ` with the nearest of `names`, for a message; empty when none is as near as `cutoff`."""
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=cutoff)
    return f"did {who} mean {near[0]!r}? " if near else ""
