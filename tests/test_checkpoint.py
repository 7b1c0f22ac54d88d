import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from ssl_dist import checkpoint
from ssl_dist.errors import UserError


def state(step, value=0.0):
    net = nn.Linear(2, 2)
    nn.init.constant_(net.weight, value)
    return {
        "format": 1, "step": step, "config": {"seed": 0}, "method": net.state_dict(), "optimizer": {}, "world_size": 1,
        "versions": checkpoint.versions(), "normalize": {}, "info": {}, "data": {},
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


@pytest.mark.parametrize("harm", ["truncate", "flip", "no checksum"])
def test_a_damaged_newest_is_passed_over_loudly(tmp_path, capsys, harm):
    good = checkpoint.save(tmp_path, state(1))
    bad = checkpoint.save(tmp_path, state(2))
    data = bytearray(bad.read_bytes())
    if harm == "truncate":
        bad.write_bytes(data[:-10])
    elif harm == "flip":
        data[len(data) // 2] ^= 1
        bad.write_bytes(data)
    else:
        bad.with_name(bad.name + ".sha256").unlink()
    assert checkpoint.newest(tmp_path) == good
    warning = capsys.readouterr().err
    assert "WARNING" in warning and bad.name in warning


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
def test_a_damaged_newer_one_does_not_push_the_good_ones_out(tmp_path, capsys, keep):
    for step in (6, 8, 10, 12):
        checkpoint.save(tmp_path, state(step))
    for step in (10, 12):
        checkpoint.path_of(tmp_path, step).write_bytes(b"damaged")
    assert checkpoint.newest(tmp_path) == checkpoint.path_of(tmp_path, 8)
    saved = checkpoint.save(tmp_path, state(9))
    checkpoint.prune(tmp_path, keep, None, step=9)
    assert checkpoint.steps(tmp_path) == [8, 9][-keep:]
    capsys.readouterr()
    assert checkpoint.newest(tmp_path) == saved and capsys.readouterr().err == ""


def test_a_failed_write_leaves_nothing_behind_and_spares_the_older(tmp_path):
    old = checkpoint.save(tmp_path, state(1))
    code = (
        "import resource, signal, sys, pathlib\n"
        "sys.path.insert(0, '.')\n"
        "from tests.test_checkpoint import state\n"
        "from ssl_dist import checkpoint\n"
        "big = state(2); signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"  # a full disk, seen by the process alone
        f"try: checkpoint.save(pathlib.Path({str(tmp_path)!r}), big)\n"
        "except OSError as error: print('refused', error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("refused"), done.stderr
    assert checkpoint.newest(tmp_path) == old
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))


def test_foreign_files_are_refused_in_one_line(tmp_path):
    path = tmp_path / "x.pt"
    for content in (b"", b"garbage" * 100):
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
    with pytest.raises(UserError, match=r"weight has shape \[2, 2\], here \[3, 2\]: it belongs to another"):
        checkpoint.restore(nn.Linear(2, 3), good, path)
    with pytest.raises(UserError, match="holds bias, unknown here"):
        checkpoint.restore(nn.Linear(2, 2, bias=False), good, path)
    with pytest.raises(UserError, match="lacks bias"):
        checkpoint.restore(nn.Linear(2, 2), {"weight": good["weight"]}, path)
