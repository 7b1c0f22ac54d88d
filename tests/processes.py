"""Finding processes by their environment, killing them, and a guard that does it when the tests were killed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
DEADLINE = 60  # seconds


def until(condition, what, deadline=DEADLINE):
    """The first true result of `condition()`."""
    end = time.monotonic() + deadline
    while not (answer := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"not within {deadline} s: {what() if callable(what) else what}")
        time.sleep(0.1)
    return answer


def processes(**environment):
    """The processes that were started with all of these in their environment, the oldest first; no zombies."""
    lines = {os.fsencode(f"{name}={value}") for name, value in environment.items()}
    starts_and_pids = []
    for entry in os.listdir("/proc"):
        try:
            if entry.isdigit() and lines.issubset(Path("/proc", entry, "environ").read_bytes().split(b"\0")):
                starts_and_pids.append(
                    (int(Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()[19]), int(entry))
                )
        except (FileNotFoundError, ProcessLookupError, PermissionError):  # gone, or somebody else's
            continue
    return [pid for _, pid in sorted(starts_and_pids)]


def send(pids, *numbers):
    """Each signal to all of them before the next one."""
    for number in numbers:
        for pid in pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue


def kill(deadline=DEADLINE, **environment):
    """Kill what `processes` finds until nothing is found; stopped first, so that none can report the end of another."""
    until(
        lambda: not (pids := processes(**environment)) or send(pids, signal.SIGSTOP, signal.SIGKILL),
        lambda: f"the end of {processes(**environment)}",
        deadline,
    )


def remove(sockets, *remove_nodes):
    shutil.rmtree(sockets, ignore_errors=True)
    subprocess.run(remove_nodes, env=os.environ | {"PATH": PATH}, stderr=subprocess.DEVNULL)


def keep(parent, conf, *leftovers):
    """Sleep until the parent dies, which the kernel reports by SIGTERM; then kill all that it left of its cluster."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    while os.getppid() == parent:
        signal.sigtimedwait({signal.SIGTERM}, 5)
    kill(SLURM_CONF=conf)
    remove(*leftovers)


if __name__ == "__main__":
    keep(int(sys.argv[1]), *sys.argv[2:])
