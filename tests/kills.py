"""A process that is killed at every change of the file system in turn, also in the middle of a write."""

import io
import os
import shutil
import signal
import traceback

CHANGES = ("open", "close", "fsync", "replace", "rename", "unlink", "mkdir")


def every_kill(prepared, tmp_path, action):
    """Yield a copy of the folder `prepared` for each point at which `action(copy)` can be killed by SIGKILL.

    The n-th copy is what a process leaves that was killed just before its n-th call of `CHANGES`, or half way through
    it if it is a write. Ends when `action` completes; that folder is yielded as well, as the last.
    """
    number, killed = 0, True
    while killed:
        number += 1
        copy = tmp_path / f"killed-{number}"
        shutil.copytree(prepared, copy, symlinks=True)
        pid = os.fork()
        if pid == 0:
            _act(action, copy, number)
        status = os.waitpid(pid, 0)[1]
        killed = os.WIFSIGNALED(status)
        assert os.WTERMSIG(status) == signal.SIGKILL if killed else status == 0, f"status {status}, see its traceback"
        yield copy
        shutil.rmtree(copy)
    assert number > 5, "the action hardly touches the file system: are its calls still those in CHANGES?"


def _act(action, folder, number):
    """In the child: never returns."""
    calls_left = number

    def is_fatal():
        nonlocal calls_left
        calls_left -= 1
        return calls_left == 0

    def counted(call):
        def counting(*arguments, **options):
            if is_fatal():
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return counting

    class Torn(io.FileIO):
        def write(self, data):
            if is_fatal():
                super().write(memoryview(data)[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return super().write(data)

    try:
        os.fsync = lambda _: None  # a kill loses nothing that was handed to the kernel, and disks are slow
        for name in CHANGES:
            setattr(os, name, counted(getattr(os, name)))
        fdopen = os.fdopen
        os.fdopen = lambda descriptor, mode: (
            fdopen(descriptor, mode) if mode == "rb" else io.BufferedWriter(Torn(descriptor, mode), 512)
        )
        action(folder)
        os._exit(0)
    except BaseException:  # the parent prints it
        traceback.print_exc()
    os._exit(1)
