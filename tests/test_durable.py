"""Files whole or not at all: at every instant, on a full disk, beside other processes."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ssl_dist.storage import durable
from tests import kills


def test_old_or_new_at_every_kill(tmp_path):
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    (prepared / "x").write_text("old" * 1000)
    contents = []
    for folder in kills.every_kill(prepared, tmp_path, lambda folder: durable.write_text(folder / "x", "new" * 1000)):
        contents.append((folder / "x").read_text())
        durable.remove_dead(folder)
        assert os.listdir(folder) == ["x"]
    assert contents == sorted(contents, reverse=True) and set(contents) == {"old" * 1000, "new" * 1000}


def test_the_order_that_survives_a_power_cut(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor):
        calls.append("folder" if os.path.samestat(os.fstat(descriptor), tmp_path.stat()) else "file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    durable.write_text(tmp_path / "x", "new")
    assert calls == ["file", "replace", "folder"]


@pytest.mark.parametrize("error", [ValueError("stop"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_what_fails_leaves_no_trace(tmp_path, error):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(type(error)), durable.atomic_write(path) as file:
        file.write(b"new")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x"]
    if isinstance(error, OSError):
        assert error.filename == str(path) and str(path) in str(error)


def test_what_is_no_regular_file_stays(tmp_path):
    """Root could rename over /dev/null."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file") as raised, durable.atomic_write(tmp_path / "pipe") as file:
        file.write(b"new")
    assert raised.value.filename == str(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo() and os.listdir(tmp_path) == ["pipe"]


def test_a_link_is_replaced_and_what_it_led_to_stays(tmp_path):
    (tmp_path / "old").write_text("old")
    for link, aim in (("x", "old"), ("y", "nothing")):
        (tmp_path / link).symlink_to(tmp_path / aim)
        durable.write_text(tmp_path / link, "new")
        assert (tmp_path / link).read_text() == "new" and not (tmp_path / link).is_symlink()
    assert (tmp_path / "old").read_text() == "old"


def test_an_error_that_names_a_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError) as raised, durable.atomic_write(tmp_path / "x"):
        os.stat(tmp_path / "other")
    assert Path(raised.value.filename) == tmp_path / "other"


def test_only_temporary_files_of_ended_processes_are_removed(tmp_path):
    dead = [".x.0123abcd.tmp", ".a.b.part-3.00000000.tmp"]
    foreign = ["x.tmp", ".x.tmp", ".x.0123abc.tmp", ".x.0123ABCD.tmp", "x.0123abcd.tmp", ".x.0123abcd.tmp.gz"]
    for name in dead + foreign:
        (tmp_path / name).touch()
    code = (
        "import sys; from pathlib import Path; from ssl_dist.storage import durable\n"
        "with durable.atomic_write(Path(sys.argv[1])) as file: print('open', flush=True); sys.stdin.read()"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "y")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout.readline() == "open\n"
    durable.remove_dead(tmp_path)
    [living] = set(os.listdir(tmp_path)) - set(foreign)
    assert living.startswith(".y.")
    writer.communicate("")
    assert writer.returncode == 0 and sorted(os.listdir(tmp_path)) == sorted([*foreign, "y"])


def test_a_lock_is_on_the_file_that_is_there_now(tmp_path):
    """Who waited for the lock of a file that was replaced meanwhile must not go on beside a holder of the new one's."""
    path, locks = tmp_path / "x", Path("/proc/locks")
    locked = durable.lock(path, os.O_RDWR | os.O_CREAT)
    with pytest.raises(BlockingIOError):
        durable.lock(path, os.O_RDWR, wait=False)
    code = (
        "import os, sys; from pathlib import Path; from ssl_dist.storage import durable\n"
        "print('here', flush=True); print(os.read(durable.lock(Path(sys.argv[1]), os.O_RDWR), 9))"
    )
    waiting = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert waiting.stdout.readline() == "here\n"
    while not any("->" in line and f" {waiting.pid} " in line for line in locks.read_text().splitlines()):
        assert waiting.poll() is None
    durable.write_text(path, "new")
    os.close(locked)
    assert waiting.communicate()[0] == "b'new'\n"
