import fcntl
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ssl_dist import config
from ssl_dist.config import Config
from ssl_dist.errors import UserError
from ssl_dist.run import folder as run_folder


def make(**changes):
    tree = {"run_dir": "a", "data": {"name": "digits", "root": "b"}, "optim": {"epochs": 3}}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            tree.setdefault(section, {})[name] = value
        else:
            tree[section] = value
    return config.validate(Config, tree)


def trained(run, **changes):
    """Accept a config and leave a checkpoint behind, which fixes the config of later starts."""
    run_folder.accept(run, make(**changes))
    (run / "checkpoints" / "step-00000001.pt").touch()


def test_a_start_without_a_checkpoint_fixes_no_config(tmp_path):
    run_folder.claim(tmp_path)
    run_folder.accept(tmp_path, make())
    run_folder.accept(tmp_path, make(seed=1))
    assert config.load(tmp_path / "config.yaml").seed == 1


def test_a_default_that_is_written_out_is_no_other_config(tmp_path):
    run_folder.claim(tmp_path)
    trained(tmp_path)
    run_folder.accept(tmp_path, make(method={"options": {"gamma": 2.0}}))


def test_first_config_is_kept_and_the_same_is_accepted(tmp_path):
    run_folder.claim(tmp_path)
    run_folder.accept(tmp_path, make())
    run_folder.accept(tmp_path, make())
    assert config.load(tmp_path / "config.yaml") == make()


@pytest.mark.parametrize(
    "changes",
    [
        {"data__root": "elsewhere"}, {"data__reader": "arrays"}, {"data__workers": 3}, {"data__view_shards": 1},
        {"checkpoint": {"keep": 5}}, {"log": {"every_steps": 1}}, {"timeout": 5.0}, {"run_dir": "c"},
        {"optim__epochs": 4},
    ],
)  # fmt: skip
def test_what_does_not_change_the_numbers_may_differ(tmp_path, changes):
    run_folder.claim(tmp_path)
    trained(tmp_path)
    run_folder.accept(tmp_path, make(**changes))
    assert config.load(tmp_path / "config.yaml") == make(), "config.yaml keeps the first"


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"seed": 1}, "seed"), ({"optim__lr": 0.5}, "optim.lr"), ({"optim__epochs": 2}, "optim.epochs"),
        ({"data__limit": 3}, "data.limit"), ({"views": {"num": 4}}, "views.num"), ({"precision": "bf16"}, "precision"),
        ({"method": {"options": {"gamma": 1.0}}}, "method.options"),
    ],
)  # fmt: skip
def test_what_changes_the_numbers_is_refused_by_name(tmp_path, changes, key):
    run_folder.claim(tmp_path)
    trained(tmp_path)
    with pytest.raises(UserError, match="another config.*" + key):
        run_folder.accept(tmp_path, make(**changes))


@pytest.mark.parametrize(
    "scheduled",
    [
        {"optim__schedule": "cosine"}, {"method__name": "relic"}, {"method__name": "sela"},
        {"optim__weight_decay": 0.04, "optim__weight_decay_final": 0.4}, {"optim__weight_decay_final": 1e-6},
    ],
)  # fmt: skip
def test_a_scheduled_run_may_not_grow(tmp_path, scheduled):
    run_folder.claim(tmp_path)
    trained(tmp_path, **scheduled)
    with pytest.raises(UserError, match=r"optim\.epochs"):
        run_folder.accept(tmp_path, make(**scheduled, optim__epochs=4))


def test_a_weight_decay_that_ends_where_it_begins_may_grow(tmp_path):
    run_folder.claim(tmp_path)
    same = {"optim__weight_decay": 0.04, "optim__weight_decay_final": 0.04}
    trained(tmp_path, **same)
    run_folder.accept(tmp_path, make(**same, optim__epochs=4))


def test_one_writer_at_a_time_and_the_lock_ends_with_its_owner(tmp_path):
    code = (
        "import pathlib, sys; from ssl_dist.run import folder as run_folder\n"
        "run_folder.claim(pathlib.Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": "."},
    )  # fmt: skip
    assert owner.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="another process is writing it; wait for it"):
        run_folder.claim(tmp_path)
    run_folder.note_start(tmp_path, make(), 0, 1)
    noted = f"another process is writing it .*pid {os.getpid()} on host {socket.gethostname()}"
    with pytest.raises(UserError, match=noted) as raised:
        run_folder.claim(tmp_path)
    assert "\n" not in str(raised.value)
    with open(tmp_path / "logs" / "starts.jsonl", "a") as file:
        file.write('{"pid": 1')  # torn by a kill
    with pytest.raises(UserError, match=r"another process is writing it .*; wait for it"):
        run_folder.claim(tmp_path)
    owner.kill()
    owner.wait()
    os.close(run_folder.claim(tmp_path))


def test_the_lock_is_one_that_nfs_keeps_between_machines(tmp_path):
    """NFS turns an flock into a lock of its server only where the file is open for writing, which no folder can be."""
    lock = run_folder.claim(tmp_path)
    assert os.path.samestat(os.fstat(lock), os.stat(tmp_path / "logs" / "starts.jsonl"))
    assert fcntl.fcntl(lock, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
    run_folder.note_start(tmp_path, make(), 0, 1)  # opens and closes the same file
    with pytest.raises(UserError, match="another process"):
        run_folder.claim(tmp_path)
    os.close(lock)
    assert sorted(os.listdir(tmp_path)) == ["checkpoints", "logs", "tensorboard"]
    assert os.listdir(tmp_path / "logs") == ["starts.jsonl"]


def test_the_owner_removes_leftovers_of_a_killed_one(tmp_path):
    os.close(run_folder.claim(tmp_path))
    leftovers = [".config.yaml.01234567.tmp", "checkpoints/.step-00000002.pt.89abcdef.tmp"]
    leftovers += ["checkpoints/step-00000002.pt.sha256"]
    other_files = ["checkpoints/step-00000001.pt", "checkpoints/step-00000001.pt.sha256", ".notes.tmp", "results.json"]
    for name in leftovers + other_files:
        (tmp_path / name).touch()
    lock = run_folder.claim(tmp_path)
    assert [name for name in leftovers + other_files if (tmp_path / name).exists()] == other_files
    for name in leftovers:
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="another process"):
        run_folder.claim(tmp_path)
    assert all((tmp_path / name).exists() for name in leftovers), "who does not own the folder removes nothing"
    os.close(lock)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        run_folder.claim(tmp_path / "file" / "run")


def test_starts_are_noted(tmp_path):
    run_folder.claim(tmp_path)
    for step in (0, 7):
        run_folder.note_start(tmp_path, make(), step, 2)
    lines = [json.loads(line) for line in (tmp_path / "logs" / "starts.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 7] and lines[0]["world_size"] == 2
    assert lines[0]["config"]["optim"]["epochs"] == 3


def test_titles(monkeypatch, tmp_path):
    assert run_folder.title(Path("runs/a")) == "a"
    assert run_folder.title(Path("runs/a/evaluations/probe-1")) == "a: probe-1"
    monkeypatch.chdir(tmp_path)
    assert run_folder.title(Path(".")) == tmp_path.name
    assert run_folder.title_of_file(Path("runs/a/checkpoints/step-00000001.pt")) == "a"
    assert run_folder.title_of_file(Path("weights/resnet50.pth")) == "resnet50.pth"
