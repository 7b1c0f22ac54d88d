"""A wish to stop. Signals set a flag and nothing else; the loop looks at it between two steps."""

import os
import signal

STOPPED = 75  # exit code: stopped on request after a checkpoint; start the same command again
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class StopRequest:
    """Use as a context manager around the loop: handlers are there inside it and the former ones come back after it."""

    def __init__(self):
        self.requested = False
        self.saving = False  # a save is never broken off
        self._interrupts = 0
        self._former = {}

    def __enter__(self):
        for number in _SIGNALS:
            self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_):
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def request(self) -> None:
        """Ask from within the program; what the signals do."""
        self.requested = True

    def _handle(self, number, _frame) -> None:
        self.requested = True
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts >= 3 and not self.saving:
                os._exit(130)
