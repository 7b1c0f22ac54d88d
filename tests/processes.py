"""Find processes by their environment and kill them; a guard process that does so when the tests have been killed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
DEADLINE = 60  # seconds


def until(condition, expectation, deadline=DEADLINE):
    """Wait for the first true result of `condition()`, and return it."""
    end = time.monotonic() + deadline
    while not (result := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"not within {deadline} s: {expectation() if callable(expectation) else expectation}")
        time.sleep(0.2)  # a look at Slurm is a process
    return result


def processes(**environment):
    """The processes that were started with all of these in their environment, oldest first, without zombies."""
    lines = {os.fsencode(f"{name}={value}") for name, value in environment.items()}
    starts_and_pids = []
    for entry in os.listdir("/proc"):
        try:
            if entry.isdigit() and lines.issubset(Path("/proc", entry, "environ").read_bytes().split(b"\0")):
                starts_and_pids.append(
                    (int(Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()[19]), int(entry))
                )
        except (FileNotFoundError, ProcessLookupError, PermissionError):  # it has ended, or belongs to another user
            continue
    return [pid for _, pid in sorted(starts_and_pids)]


def running(pids):
    """The command lines, by pid, of those of the processes that run; a zombie has ended."""
    lines = {}
    for pid in pids:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                lines[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (FileNotFoundError, ProcessLookupError):
            continue
    return lines


def send(pids, *numbers):
    """Send each signal to all processes before the next signal."""
    for number in numbers:
        for pid in pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue


def kill(deadline=DEADLINE, **environment):
    """Kill what `processes` returns until it is empty; stopped first, so that none can report the end of another."""
    until(
        lambda: not (pids := processes(**environment)) or send(pids, signal.SIGSTOP, signal.SIGKILL),
        lambda: f"the end of {processes(**environment)}",
        deadline,
    )


def remove(sockets, *network_removal):
    """Remove the folder of sockets, and the nodes' network by this command."""
    shutil.rmtree(sockets, ignore_errors=True)
    subprocess.run(network_removal, env=os.environ | {"PATH": PATH}, stderr=subprocess.DEVNULL)


def guard(parent, conf, *to_remove):
    """Sleep until the parent dies, which the kernel reports by SIGTERM; then kill what is left of its cluster."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    while os.getppid() == parent:
        signal.sigtimedwait({signal.SIGTERM}, 5)
    kill(SLURM_CONF=conf)
    remove(*to_remove)


if __name__ == "__main__":
    guard(int(sys.argv[1]), *sys.argv[2:])
