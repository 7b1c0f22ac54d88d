"""How a command ends: its exit code, the one line that says why, and what torchrun is told."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from ssl_dist import terminal
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.distributed.signals import STOPPED
from ssl_dist.errors import AFTER_MENDING, Fault, RaisedOn, UserError, of_system, one_line

UNREAD = 141  # exit code of a command whose output nobody reads any more, as `| head` leaves it: a shell's for SIGPIPE


def of(command: Callable[[], int | None], output: terminal.Stream) -> int:
    """Run a command, which returns its exit code or None for 0; print the error that it raises. Returns the exit code
    for the caller of this process. output: what it prints to."""
    rank = rank_info()
    exit_file = _ExitFile(rank)
    try:
        exit_file.clear()
        code = command() or _code_of_output(output)
    except (UserError, Fault) as error:
        if _prints(error, rank):
            print(f"error: {error}", file=sys.stderr, flush=True)
        code = error.code if isinstance(error, Fault) else 2
    except OSError as error:
        print(one_line(f"error: {of_system(error)}; {AFTER_MENDING}"), file=sys.stderr, flush=True)
        code = 1
    except KeyboardInterrupt:
        code = 130
    return exit_file.code_for_launcher(code)


def of_program(main: Callable[[], int | None]) -> int:
    """The same of a whole program, which prints to standard output: that it may be cut short there, too."""
    with terminal.lasting() as output:
        return of(main, output)


class _ExitFile:
    """The file that SSL_DIST_EXIT_FILE names, where launch/torchrun_multi.sh has set it: torchrun tells its caller 1
    whatever the ranks return, so the first rank of a machine writes its exit code there."""

    def __init__(self, rank: RankInfo):
        name = os.environ.get("SSL_DIST_EXIT_FILE")
        self._is_there = bool(name)
        self._path = Path(name) if name and rank.local_rank == 0 else None

    def clear(self) -> None:
        """Remove that of a start before this one."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def code_for_launcher(self, code: int) -> int:
        """Write `code` down; returns what to tell torchrun, which would start the ranks again after a fault only."""
        if self._path is not None:
            try:
                self._path.write_text(f"{code}\n")
            except OSError as error:
                print(one_line(f"error: SSL_DIST_EXIT_FILE: {of_system(error)}"), file=sys.stderr, flush=True)
        return 0 if self._is_there and code in (2, STOPPED, UNREAD) else code


def _code_of_output(output: terminal.Stream) -> int:
    """The exit code of a command that is done, by what became of what it printed. Raises `UserError`."""
    output.flush()
    if output.failure is None:
        return 0
    if terminal.is_reader_gone(output.failure):
        return UNREAD
    raise UserError(f"standard output: cannot be written: {output.failure.strerror}; print to a disk with space left")


def rank_info() -> RankInfo:
    """Who this process is among the ranks: the only one, where the environment does not tell, or nothing possible."""
    try:
        return RankInfo.from_environment()
    except UserError:
        return RankInfo()


def note(line: str) -> None:
    """Print a line for the user, on rank 0."""
    if rank_info().is_rank0:
        print(line, file=sys.stderr, flush=True)


def _prints(error: UserError | Fault, rank: RankInfo) -> bool:
    """Whether this rank is the one to print an error that other ranks may raise too."""
    if error.raised_on is RaisedOn.THIS_RANK:
        return True
    return rank.is_rank0 if error.raised_on is RaisedOn.EVERY_RANK else rank.local_rank == 0
