"""A disk on which nothing has space after so many changes: new files, folders and writes fail, the rest goes on."""

import builtins
import collections
import errno
import io
import os
import traceback


class FullDisk:
    """Patches this process's ways to write below `folder`. allowed: changes that succeed; None: all. Then `changes`
    counts them, and `places` has the numbers of those that one chain of calls made."""

    def __init__(self, monkeypatch, folder, allowed=None):
        self.folder, self.allowed, self.changes = str(folder), allowed, 0
        self.places = collections.defaultdict(list)
        self._open, self._os_open, self._mkdir = io.open, os.open, os.mkdir
        monkeypatch.setattr(builtins, "open", self.open)
        monkeypatch.setattr(io, "open", self.open)
        monkeypatch.setattr(os, "open", self.os_open)
        monkeypatch.setattr(os, "mkdir", self.mkdir)

    def spend(self, *filename):
        if self.allowed is None:
            self.places[tuple((f.f_code, line) for f, line in traceback.walk_stack(None))].append(self.changes)
        self.changes += 1
        if self.allowed is not None and self.changes > self.allowed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *filename)

    def is_ours(self, path):
        return os.fsdecode(path).startswith(self.folder)

    def open(self, file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None):
        disk = self
        path = os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else file
        if not set(mode) & set("wax+") or not self.is_ours(path):
            return self._open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        if not os.path.exists(path):
            self.spend(os.fspath(path))

        class Limited(io.FileIO):
            def write(self, data):
                disk.spend()  # the system names no file then
                return super().write(data)

        raw = Limited(file, mode.replace("b", "").replace("t", ""), closefd=closefd, opener=opener)
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

    def os_open(self, path, flags, *arguments, **options):
        if flags & os.O_CREAT and self.is_ours(path) and not os.path.exists(path):
            self.spend(os.fspath(path))
        return self._os_open(path, flags, *arguments, **options)

    def mkdir(self, path, *arguments, **options):
        if self.is_ours(path) and not os.path.exists(path):
            self.spend(os.fspath(path))
        self._mkdir(path, *arguments, **options)
