"""Signals ask for a stop and do nothing else; only a third Ctrl-C outside a save ends at once."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ssl_dist.distributed.signals import StopRequest

CODE = """
import os, signal
from ssl_dist.distributed.signals import StopRequest
with StopRequest() as stop:
    stop.saving = {saving}
    for _ in range({times}):
        os.kill(os.getpid(), signal.SIGINT)
    print(stop.requested)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2], ids=lambda number: number.name)
def test_a_signal_raises_the_flag_inside_and_the_former_handler_comes_back(number):
    numbers = []
    before = signal.signal(number, lambda *_: numbers.append(number))
    try:
        with StopRequest() as stop:
            assert not stop.requested
            os.kill(os.getpid(), number)
            assert stop.requested and not numbers
        os.kill(os.getpid(), number)
        assert numbers == [number]
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize(
    ("times", "saving", "code"), [(1, False, 0), (2, False, 0), (3, False, 130), (3, True, 0), (9, True, 0)]
)
def test_the_third_interrupt_ends_at_once_but_never_a_save(times, saving, code):
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(times=times, saving=saving)], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (code, "True\n" if code == 0 else ""), done.stderr


def test_the_program_may_request_a_stop_too():
    stop = StopRequest()
    stop.request()
    assert stop.requested
