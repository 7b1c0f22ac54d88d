"""A command whose output nobody reads, or no disk holds, does its work and says so by its exit code."""

import io
import os
import signal
import sys

import pytest

from ssl_dist import cli, outcome, terminal
from ssl_dist.distributed.rank import UNDER_TORCHRUN
from ssl_dist.distributed.signals import StopRequest
from tests.test_train import CONFIG, fingerprint, metrics, overrides


def unread():
    """A stream whose reader is gone."""
    reading, writing = os.pipe()
    os.close(reading)
    return open(writing, "w", encoding="utf-8")


def full():
    return open("/dev/full", "w", encoding="utf-8")


def closed():
    return None


def run(arguments, monkeypatch, **streams):
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    return cli.main(list(map(str, arguments)))


@pytest.fixture(scope="module")
def undisturbed(digits, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert cli.main(["train", CONFIG, *overrides(digits, run, "optim.steps=3")]) == 0
    return run


@pytest.mark.parametrize("stream", [unread, full, closed])
def test_a_training_outlives_its_terminal(stream, digits, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr("ssl_dist.progress.PLAIN_INTERVAL_S", 0.0)
    words = ["train", CONFIG, *overrides(digits, tmp_path, "optim.steps=3")]
    assert run(words, monkeypatch, stderr=stream(), stdout=stream()) == 0
    assert fingerprint(tmp_path) == fingerprint(undisturbed) and metrics(tmp_path) == metrics(undisturbed)
    log = (tmp_path / "logs" / "rank-0.log").read_text()
    if stream is not closed:
        assert log.count("standard error cannot be written") == 1 and "metrics.jsonl" in log


def test_a_training_outlives_the_hangup_of_its_terminal(monkeypatch):
    monkeypatch.delenv(UNDER_TORCHRUN, raising=False)
    former = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
        monkeypatch.setenv(UNDER_TORCHRUN, "ssl_dist")
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.requested, "torchrun kills what does not end"
    finally:
        signal.signal(signal.SIGHUP, former)


@pytest.mark.parametrize("command", [["keys", "optim"], ["keys", "--markdown"]])
def test_output_that_nobody_reads_ends_quietly(command, monkeypatch, capsys):
    assert run(command, monkeypatch, stdout=unread()) == outcome.UNREAD == 128 + signal.SIGPIPE
    assert capsys.readouterr().err == ""
    assert run(command, monkeypatch, stdout=closed()) == 0


def test_output_that_no_disk_holds_is_one_line(monkeypatch, capsys):
    assert run(["keys"], monkeypatch, stdout=full()) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: standard output: ") and "No space left" in line


def test_a_mistake_without_a_reader_has_its_exit_code(monkeypatch):
    assert run(["explain", "nowhere.yaml"], monkeypatch, stderr=unread()) == 2
    assert run(["explain", "nowhere.yaml"], monkeypatch, stderr=full()) == 2
    with pytest.raises(SystemExit) as exit:
        run(["explain", "--nonsense"], monkeypatch, stderr=unread())
    assert exit.value.code == 2


def test_what_an_encoding_lacks_is_spelt_out(monkeypatch):
    text = "1 ± 2 \udce9 é 中"
    in_utf8 = text.encode(errors="surrogateescape")
    for encoding, written in (("ascii", b"1 +- 2 \xe9 \\xe9 \\u4e2d"), ("utf-8", in_utf8)):
        data = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(data, encoding))
        with terminal.lasting():
            print(text, end="")
        assert data.getvalue() == written and sys.stdout.errors == "strict"


def test_closed_descriptors_are_not_taken_by_files(tmp_path):
    """Whatever is written to standard error would stand in a checkpoint."""
    pid = os.fork()
    if pid == 0:
        try:
            os.closerange(0, 3)
            sys.stdout = sys.stderr = None
            with terminal.lasting(), open(tmp_path / "file", "w") as file:
                print("to nobody", flush=True)
                print("to nobody", file=sys.stderr, flush=True)
                os.write(2, b"of a library")
                file.write("whole")
                file.flush()
                os._exit(0 if file.fileno() > 2 else 1)
        finally:
            os._exit(9)
    assert os.waitpid(pid, 0)[1] == 0 and (tmp_path / "file").read_text() == "whole"
