"""Requests to stop: a signal sets a flag and nothing else, and the loop reads the flag between two steps.

SIGHUP, which a terminal sends when it is closed, is none: a training outlives its terminal. Only torchrun passes it on
to its ranks to end them.
"""

import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

from ssl_dist.distributed.rank import UNDER_TORCHRUN

STOPPED = 75  # exit code: stopped on request after a checkpoint; start the same command again
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class StopRequest:
    """Use as a context manager around the loop: it handles the signals inside and restores their handlers after it."""

    def __init__(self) -> None:
        self.requested = False
        self.saving = False  # a save is never interrupted
        self._interrupts = 0
        self._former_handlers: dict[signal.Signals, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> "StopRequest":
        for number in _SIGNALS:
            self._former_handlers[number] = signal.signal(number, self._handle)
        on_hangup = self._handle if UNDER_TORCHRUN in os.environ else signal.SIG_IGN
        self._former_handlers[signal.SIGHUP] = signal.signal(signal.SIGHUP, on_hangup)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former_handlers.items():
            signal.signal(number, handler)

    def request(self) -> None:
        """Request a stop from within the program, as the signals do."""
        self.requested = True

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.requested = True
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts >= 3 and not self.saving:
                os._exit(130)
