"""No space at any write: one line, and the same command goes on to the same numbers."""

import os
import re
import resource
import shutil

import pytest

from ssl_dist import cli
from tests.full_disk import FullDisk
from tests.make_images import simple_folder
from tests.test_train import CONFIG, fingerprint, metrics, overrides

STEPS = ("optim.steps=2", "checkpoint.every_steps=1", "checkpoint.every_epochs=null", "log.every_steps=1")


def command(digits, run):
    return ["train", CONFIG, *overrides(digits, run, *STEPS)]


def files(run):
    """The names in a run's folder, but for TensorBoard's, of which every start leaves one."""
    return {
        os.path.relpath(os.path.join(folder, name), run)
        for folder, _, names in os.walk(run)
        for name in names
        if not name.startswith("events.out.")
    }


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory):
    """A training that nothing disturbed, and the changes to the disk that each place of the code makes in it."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as monkeypatch:
        disk = FullDisk(monkeypatch, run)
        assert cli.main(command(digits, run)) == 0
    assert disk.changes > 40, "does the training write as tests/full_disk.py sees it?"
    return run, list(disk.places.values())


def check(allowed, whole, digits, run, capsys):
    with pytest.MonkeyPatch.context() as monkeypatch:
        FullDisk(monkeypatch, run, allowed)
        code = cli.main(command(digits, run))
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line or "Traceback" in line]
    if code == 0:  # what failed decides nothing: the log of a rank
        assert lines == []
    else:
        assert code in (1, 2) and len(lines) == 1, lines
        assert lines[0].startswith("error: ") and str(run) in lines[0] and "No space left" in lines[0], lines
        assert re.search("choose another folder|mend that and give the same command again", lines[0]), lines
    assert not [name for name in files(run) if name.endswith(".tmp")]
    assert cli.main(command(digits, run)) == 0
    capsys.readouterr()
    assert fingerprint(run) == fingerprint(whole[0]) and metrics(run) == metrics(whole[0])
    assert files(run) - {"logs/faults.jsonl"} == files(whole[0])
    return code


@pytest.mark.parametrize("share", [0.0, 0.15, 0.4, 0.7, 1.0])
def test_no_space_is_one_line_and_nothing_is_lost(share, whole, digits, tmp_path, capsys):
    last = max(map(max, whole[1]))
    check(round(share * last), whole, digits, tmp_path / "run", capsys)


@pytest.mark.slow
def test_no_space_at_any_write(whole, digits, tmp_path, capsys):
    """At every place that writes, the first time; a checkpoint is one place with dozens of writes."""
    tried = sorted(changes[0] for changes in whole[1])
    codes = [check(allowed, whole, digits, tmp_path / f"run-{allowed}", capsys) for allowed in tried]
    assert codes.count(0) < len(codes) / 4


COMMANDS = {
    "convert": "convert folder --root {0}/source --out {0}/new --name colours --workers 1",
    "evaluate": "evaluate {0}/run data.root={0}/data knn knn.k=[1]",
    "extract": "extract {0}/run data.root={0}/data --out {0}/new",
    "export": "export {0}/run --format seed --out {0}/new.tar",
    "report": "report {0}/run --out {0}/new.html",
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Pictures, a data set of them, and a run on it."""
    folder = tmp_path_factory.mktemp("prepared")
    simple_folder(folder / "source")
    for command in (
        COMMANDS["convert"].replace("new", "data"),
        f"train {CONFIG} data.name=colours data.root={{0}}/data data.reader=arrays data.workers=1 optim.batch_size=4 "
        "optim.steps=1 optim.epochs=null run_dir={0}/run",
    ):
        assert cli.main(command.format(folder).split()) == 0
    return folder


def refuse(command, folder, reason, capsys):
    """The command, which must end with one line or well; whether it was refused."""
    capsys.readouterr()
    before = {path for path in folder.rglob("*") if path.is_file()}
    code = cli.main(COMMANDS[command].format(folder).split())
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line or "Traceback" in line]
    assert (code, len(lines)) in ((0, 0), (2, 1)), lines
    assert not lines or (str(folder) in lines[0] and reason in lines[0])
    left = {path for path in folder.rglob("*") if path.is_file()} - before
    assert not [path for path in left if path.name.endswith(".tmp") or path.stat().st_size == 0]
    return code == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_no_space_for_a_command(command, prepared, tmp_path, capsys):
    with pytest.MonkeyPatch.context() as monkeypatch:
        disk = FullDisk(monkeypatch, shutil.copytree(prepared, tmp_path / "whole"))
        assert cli.main(COMMANDS[command].format(disk.folder).split()) == 0
    tried = sorted({change for changes in disk.places.values() for change in (changes[0], changes[-1])})
    assert tried
    for allowed in tried:
        folder = shutil.copytree(prepared, tmp_path / f"copy-{allowed}")
        with pytest.MonkeyPatch.context() as monkeypatch:
            FullDisk(monkeypatch, folder, allowed)
            assert refuse(command, folder, "No space left", capsys)
        assert cli.main(COMMANDS[command].format(folder).split()) == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_files_that_may_not_grow(command, prepared, tmp_path, capsys):
    """As `ulimit -f` does."""
    folder = shutil.copytree(prepared, tmp_path / "copy")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        assert refuse(command, folder, "File too large", capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert cli.main(COMMANDS[command].format(folder).split()) == 0
