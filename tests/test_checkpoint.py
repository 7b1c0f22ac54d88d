import dataclasses
import errno
import hashlib
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from ssl_dist.errors import UserError
from ssl_dist.methods.base import Info
from ssl_dist.storage import checkpoint, durable
from tests import kills
from tests.messages import naming

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "numpy", "pytest", "ssl_dist.storage.checkpoint", "tests.ranks"])

INFO = Info(num_images=4, num_classes=2, view_groups=((2, 32),), batch_size=2, total_epochs=1.0)
FILES = r"LAST|step-\d{8}\.pt(\.sha256)?"


def state(step, value=0.0):
    net = nn.Linear(2, 2)
    nn.init.constant_(net.weight, value)
    return {
        "format": 1, "step": step, "config": {"seed": 0}, "method": net.state_dict(), "optimizer": {}, "world_size": 1,
        "versions": checkpoint.versions(), "normalize": {"mean": [0.5] * 3, "std": [0.2] * 3},
        "info": dataclasses.asdict(INFO), "data": {"split": "ab", "ids": "cd"},
    }  # fmt: skip


def test_round_trip_without_running_code(tmp_path):
    path = checkpoint.save(tmp_path, state(12, 3.0))
    assert path.name == "step-00000012.pt"
    assert (tmp_path / "checkpoints" / "LAST").read_text().strip() == path.name
    loaded = checkpoint.load(path)
    assert loaded["step"] == 12 and torch.equal(loaded["method"]["weight"], torch.full((2, 2), 3.0))
    assert checkpoint.newest(tmp_path) == path
    assert sorted(os.listdir(path.parent)) == ["LAST", path.name, path.name + ".sha256"]


def test_no_checkpoint_is_none(tmp_path):
    assert checkpoint.newest(tmp_path) is None and checkpoint.steps(tmp_path) == []


def value_in(run):
    """Step and value of the newest checkpoint; checks that its path, state and digest are of the same save."""
    path, loaded, digest = checkpoint.load_newest(run)
    assert path == checkpoint.path_of(run, loaded["step"]) == checkpoint.newest(run)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    return loaded["step"], loaded["method"]["weight"][0, 0].item()


def damage(path, how):
    data = bytearray(path.read_bytes())
    checksum = path.with_name(path.name + ".sha256")
    data[len(data) // 2] ^= 1
    if how == "empty":
        path.write_bytes(b"")
    elif how == "half":
        path.write_bytes(path.read_bytes()[: len(data) // 2])
    elif how == "bit":
        path.write_bytes(data)
    elif how == "no checksum":
        checksum.unlink()
    elif how == "garbage checksum":
        checksum.write_bytes(b"\xff\x00garbage")
    elif how == "empty checksum":
        checksum.write_bytes(b"")
    elif how == "unreadable":
        path.unlink()
        path.symlink_to(path)  # a loop, which not even root can open
    elif how == "forbidden":
        path.chmod(0)
    else:
        path.unlink()
        path.mkdir()


MESSAGES_OF_DAMAGE = {
    "empty": "SHA-256 differs", "half": "SHA-256 differs", "bit": "SHA-256 differs",
    "no checksum": "has no checksum beside it", "garbage checksum": "checksum file is damaged",
    "empty checksum": "checksum file is damaged", "folder": "cannot be read: .*Is a directory",
    "unreadable": "cannot be read: .*[Ss]ymbolic links", "forbidden": "cannot be read: .*Permission denied",
}  # fmt: skip
UNLESS_ROOT = pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")


@pytest.mark.parametrize(
    "how", [pytest.param(how, marks=UNLESS_ROOT) if how == "forbidden" else how for how in MESSAGES_OF_DAMAGE]
)
def test_a_damaged_newest_checkpoint_is_skipped_with_a_warning(tmp_path, capsys, how):
    good = checkpoint.save(tmp_path, state(1, 1.0))
    bad = checkpoint.save(tmp_path, state(2))
    damage(bad, how)
    assert checkpoint.newest(tmp_path) == good
    [warning] = capsys.readouterr().err.splitlines()
    assert re.search(f"^WARNING: {bad}: .*{MESSAGES_OF_DAMAGE[how]}", warning)
    assert value_in(tmp_path) == (1, 1.0)
    damage(good, how)
    with pytest.raises(UserError, match=f"all 2 checkpoints are damaged .*{bad.name}: .*{MESSAGES_OF_DAMAGE[how]}"):
        checkpoint.load_newest(tmp_path)


def test_all_damaged_is_refused(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, state(step)).write_bytes(b"x")
    with pytest.raises(UserError, match="all 2 checkpoints are damaged"):
        checkpoint.newest(tmp_path)


def test_prune_keeps_the_newest_and_every_mth(tmp_path):
    for step in range(1, 8):
        checkpoint.save(tmp_path, state(step))
    checkpoint.prune(tmp_path, keep=2, keep_every=3, step=7)
    assert checkpoint.steps(tmp_path) == [3, 6, 7]
    checkpoint.prune(tmp_path, keep=1, keep_every=None, step=7)
    assert checkpoint.steps(tmp_path) == [7]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3


@pytest.mark.parametrize("keep", [1, 2])
def test_prune_does_not_remove_good_checkpoints_for_damaged_newer_ones(tmp_path, capsys, keep):
    for step in (6, 8, 10, 12):
        checkpoint.save(tmp_path, state(step))
    for step in (10, 12):
        checkpoint.path_of(tmp_path, step).write_bytes(b"damaged")
    assert checkpoint.newest(tmp_path) == checkpoint.path_of(tmp_path, 8)
    saved = checkpoint.save(tmp_path, state(9))
    checkpoint.prune(tmp_path, keep, None, step=9)
    assert checkpoint.steps(tmp_path) == [8, 9][-keep:]
    assert not list(saved.parent.glob("step-0000001*.sha256")), "a checksum of nothing"
    capsys.readouterr()
    assert checkpoint.newest(tmp_path) == saved and capsys.readouterr().err == ""


@pytest.fixture
def no_fsync(monkeypatch):
    """No fsync, which is slow: for tests that save hundreds of times and simulate no power failure."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def prepare(run, *steps_values, damaged=()):
    for step, value in steps_values:
        checkpoint.save(run, state(step, value))
    for step, how in damaged:
        damage(checkpoint.path_of(run, step), how)


def save_and_prune(step, value, keep, keep_every=None):
    def action(run):
        checkpoint.save(run, state(step, value))
        checkpoint.prune(run, keep, keep_every, step)

    return action


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "damaged", "after", "keep"),
    [
        ([], [], (1, 1.0), 1),
        ([(1, 1.0)], [], (2, 2.0), 1),
        ([(1, 1.0), (2, 2.0), (3, 3.0)], [], (4, 4.0), 2),
        ([(3, 3.0)], [], (3, 4.0), 1),  # again, over the only one
        ([(1, 1.0), (3, 3.0)], [(3, "bit")], (3, 4.0), 2),
        ([(1, 1.0), (3, 3.0)], [(3, "no checksum")], (3, 4.0), 1),
        ([(1, 1.0), (3, 3.0)], [(3, "garbage checksum")], (3, 4.0), 1),
        ([(1, 1.0), (5, 5.0), (6, 6.0)], [(5, "half"), (6, "folder")], (3, 3.0), 1),
    ],
    ids=["first", "keep 1", "keep 2", "again", "over bit", "over no checksum", "over garbage", "before damaged"],
)
def test_no_kill_loses_what_was_saved(tmp_path, capsys, no_fsync, before, damaged, after, keep):
    """After a kill behind any change of the file system the newest valid checkpoint is the previous or the new one."""
    prepared = tmp_path / "prepared"
    (prepared / "checkpoints").mkdir(parents=True)
    prepare(prepared, *before, damaged=damaged)
    old = value_in(prepared) if before else None
    damaged_names = [checkpoint.path_of(prepared, step).name for step, _ in damaged]
    capsys.readouterr()
    action = save_and_prune(*after, keep)
    outcomes = []
    for run in kills.every_kill(prepared, tmp_path, action):
        outcomes.append(value_in(run) if checkpoint.steps(run) else None)
        warnings = capsys.readouterr().err.splitlines()
        assert all(any(name in warning for name in damaged_names) for warning in warnings), (
            "a valid checkpoint counts as damaged"
        )
        last = run / "checkpoints" / "LAST"
        if last.exists() and not damaged:
            named = last.with_name(last.read_text().strip())
            assert named == checkpoint.path_of(run, checkpoint.steps(run)[-1]) or outcomes[-1] == after
            assert named.exists()
        checkpoint.remove_leftovers(run)
        files = {name for name in os.listdir(last.parent) if not name.endswith(".damaged")}
        assert all(re.fullmatch(FILES, name) for name in files)
        assert {name.removesuffix(".sha256") for name in files} == files - {n for n in files if n.endswith(".sha256")}
        action(run)  # the next start does it again
        assert value_in(run) == after and last.read_text().strip() == checkpoint.path_of(run, after[0]).name
        assert capsys.readouterr().err == ""
        checksum = checkpoint.path_of(run, after[0]).with_suffix(".pt.sha256")
        assert len(checksum.read_text().splitlines()) == 1, "sha256sum -c must hold"
    assert set(outcomes) == {old, after} and outcomes == sorted(outcomes, key=[old, after].index), (
        "first the old one, then the new"
    )


def test_prune_loses_nothing_at_any_kill(tmp_path, capsys, no_fsync):
    prepared = tmp_path / "prepared"
    prepare(prepared, *((step, float(step)) for step in range(1, 8)))
    for run in kills.every_kill(prepared, tmp_path, lambda run: checkpoint.prune(run, 2, 3, 7)):
        assert {3, 6, 7} <= set(checkpoint.steps(run)) and value_in(run) == (7, 7.0)
        checkpoint.remove_leftovers(run)
        assert len(os.listdir(run / "checkpoints")) == 2 * len(checkpoint.steps(run)) + 1
        for step in checkpoint.steps(run):
            assert checkpoint.load_run(checkpoint.path_of(run, step))[2] in (
                checkpoint.path_of(run, step).with_suffix(".pt.sha256").read_text()
            )
    assert checkpoint.steps(prepared) == list(range(1, 8)) and capsys.readouterr().err == ""


def test_only_leftovers_of_saves_are_removed(tmp_path):
    prepare(tmp_path, (1, 1.0))
    folder = tmp_path / "checkpoints"
    expected = ["notes.txt", "best.pt", "x.sha256", "best.pt.sha256", "old.tmp", "step-00000001.pt.damaged"]
    expected += os.listdir(folder)
    for name in {*expected, "step-00000002.pt.sha256", ".step-00000003.pt.01234567.tmp"} - set(os.listdir(folder)):
        (folder / name).touch()
    checkpoint.remove_leftovers(tmp_path)
    assert sorted(os.listdir(folder)) == sorted(expected)


def save_forever(run, sender):
    """Save and prune as a training does, without pause; sends the number of each step that is saved."""
    torch.set_num_threads(1)
    lock = durable.lock(run / "lock", os.O_RDWR | os.O_CREAT, wait=False)
    checkpoint.remove_leftovers(run)
    newest = checkpoint.load_newest(run)
    step = newest[1]["step"] if newest else 0
    while lock:
        step += 1
        save_and_prune(step, float(step), keep=2)(run)
        sender.send_bytes(str(step).encode())


def start_saving(run):
    (run / "checkpoints").mkdir(exist_ok=True)
    receiver, sender = _context.Pipe(duplex=False)
    process = _context.Process(target=save_forever, args=(run, sender))
    process.start()
    sender.close()
    return process, receiver


@pytest.mark.slow
def test_kills_at_any_time(tmp_path, capsys):
    rng = random.Random(0)
    kills = last_saved = 0
    while kills < 25 or last_saved <= 50:  # enough saves for the kills to fall into, on a busy machine too
        kills += 1
        process, receiver = start_saving(tmp_path)
        last_saved = max(last_saved, int(receiver.recv_bytes()))
        time.sleep(rng.uniform(0, 0.06))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        try:
            while True:
                last_saved = max(last_saved, int(receiver.recv_bytes()))
        except EOFError:
            pass
        step, value = value_in(tmp_path)
        assert step in (last_saved, last_saved + 1) and value == step
        assert (tmp_path / "checkpoints" / "LAST").read_text() in {f"step-{s:08d}.pt\n" for s in (step - 1, step)}
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_reading_while_a_training_saves_and_prunes(tmp_path, capsys):
    process, receiver = start_saving(tmp_path)
    try:
        receiver.recv_bytes()
        steps = []
        while len(steps) < 300 or steps[-1] - steps[0] <= 20:  # on a busy machine 300 reads see fewer saves
            path, loaded, _ = checkpoint.load_newest(tmp_path)
            assert path == checkpoint.path_of(tmp_path, loaded["step"])
            assert loaded["method"]["weight"][0, 0].item() == loaded["step"]
            steps.append(loaded["step"])
            assert process.is_alive()
    finally:
        process.kill()
        process.join()
    assert steps == sorted(steps)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("instant", ["listed", "opened", "opened, saved again", "checked"])
def test_a_file_replaced_or_pruned_while_it_is_read_is_not_damaged(tmp_path, capsys, monkeypatch, instant):
    """Between any two steps of the reader the file that it is about to use is pruned or replaced."""
    prepare(tmp_path, (1, 1.0))
    hooked = {"listed": "steps", "checked": "_examine"}.get(instant, "_checksums")
    original = getattr(checkpoint, hooked)

    def hook(*arguments):
        monkeypatch.setattr(checkpoint, hooked, original)
        answer = original(*arguments) if instant in ("listed", "checked") else None
        save_and_prune(1 if instant.endswith("again") else 2, 2.0, keep=1)(tmp_path)
        return answer or original(*arguments)

    monkeypatch.setattr(checkpoint, hooked, hook)
    path, loaded, digest = checkpoint.load_newest(tmp_path)
    assert capsys.readouterr().err == ""
    if instant == "checked":  # the open file has been removed, but its bytes are still those that were checked
        assert (path, loaded["step"], loaded["method"]["weight"][0, 0].item()) == (
            checkpoint.path_of(tmp_path, 1),
            1,
            1.0,
        )
        assert not path.exists()
    else:
        assert loaded["method"]["weight"][0, 0].item() == 2.0
        assert digest == hashlib.sha256(path.read_bytes()).hexdigest()


SAVE_WITH_A_SIZE_LIMIT = """
import pathlib, resource, signal, sys, torch
from tests.test_checkpoint import state
from ssl_dist.storage import checkpoint
big = state(2) | {"optimizer": {"moment": torch.zeros(int(sys.argv[3]))}}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try: checkpoint.save(pathlib.Path(sys.argv[1]), big)
except OSError as error: print('refused', error.errno, error.filename, error)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "size"), [(1000, 0), (1000, 60_000), (100_000, 60_000)])
def test_a_failed_write_leaves_nothing_behind_and_keeps_the_older(tmp_path, limit, size):
    """The failing write is a flush of the buffer, torch's first write, or one in the middle of a tensor."""
    old = checkpoint.save(tmp_path, state(1))
    before = os.listdir(old.parent)
    command = [sys.executable, "-c", SAVE_WITH_A_SIZE_LIMIT, str(tmp_path), str(limit), str(size)]
    completed = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": "."}
    )
    path = checkpoint.path_of(tmp_path, 2)
    assert completed.stdout.startswith(f"refused {errno.EFBIG} {path} "), completed.stderr
    assert completed.stdout.count(path.name) == 2
    assert checkpoint.newest(tmp_path) == old and os.listdir(old.parent) == before


FILL_UP = """
import sys
from pathlib import Path
from tests.test_checkpoint import fill_up
fill_up(Path(sys.argv[1]))
"""


def fill_up(disk):
    """Save with 0, 1, ... free pages: every save succeeds or changes nothing."""
    outcomes = []
    for pages in range(12):
        run = disk / "run"
        prepare(run, (1, 1.0), (2, 2.0))
        before = sorted(os.listdir(run / "checkpoints"))
        with open(disk / "filler", "wb") as file:
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - pages * 4096
            file.write(bytes(free))
        try:
            path = checkpoint.save(run, state(3, 3.0))
        except OSError as error:
            assert error.errno == errno.ENOSPC and "No space left" in str(error) and error.filename in str(error)
            if error.filename.endswith("LAST"):  # the checkpoint itself was complete and in place before
                assert value_in(run) == (3, 3.0)
                outcomes.append("saved")
            else:
                assert "step-00000003.pt" in error.filename and value_in(run) == (2, 2.0)
                assert sorted(os.listdir(run / "checkpoints")) == before
                outcomes.append("full")
        else:
            assert value_in(run) == (3, 3.0) and path.exists()
            outcomes.append("saved")
        shutil.rmtree(run)
        (disk / "filler").unlink()
    print(*outcomes)


def test_a_disk_that_is_full(tmp_path):
    if shutil.which("unshare") is None:
        pytest.skip("unshare (util-linux) is missing, which mounts a small file system for one process alone")
    mount = 'mount -t tmpfs -o size=1m tmpfs "$0"'
    in_own_namespace = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    trial = subprocess.run([*in_own_namespace, mount, tmp_path], capture_output=True, text=True, check=False)
    if trial.returncode:
        pytest.skip(f"a tmpfs may not be mounted here: {trial.stderr.strip()}")
    completed = subprocess.run(
        [*in_own_namespace, f'{mount} && exec "$@"', tmp_path, sys.executable, "-c", FILL_UP, tmp_path],
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": "."},
    )  # fmt: skip
    assert completed.returncode == 0, completed.stderr
    assert {"full", "saved"} == set(completed.stdout.split())


def test_foreign_files_are_refused_in_one_line(tmp_path):
    path = tmp_path / "x.pt"
    for content in (b"", b"garbage" * 100, b"hello"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=str(path)) as raised:
            checkpoint.load(path)
        assert "\n" not in str(raised.value)
    torch.save({"weights": 1}, path)
    with pytest.raises(UserError, match="not a checkpoint of ssl_dist"):
        checkpoint.load(path)
    torch.save(subprocess.Popen, path)
    with pytest.raises(UserError, match="more than tensors"):
        checkpoint.load(path)


def test_restore_is_strict(tmp_path):
    path = tmp_path / "x.pt"
    good = nn.Linear(2, 2).state_dict()
    checkpoint.restore(nn.Linear(2, 2), good, path)
    with pytest.raises(UserError, match=naming("weight", "[2, 2]", "[3, 2]")):
        checkpoint.restore(nn.Linear(2, 3), good, path)
    with pytest.raises(UserError, match="holds bias, unknown here"):
        checkpoint.restore(nn.Linear(2, 2, bias=False), good, path)
    with pytest.raises(UserError, match="lacks bias"):
        checkpoint.restore(nn.Linear(2, 2), {"weight": good["weight"]}, path)
