"""metrics.jsonl when it is damaged: what can be read is, what cannot stays, and a training goes on."""

import json
import os
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ssl_dist.clock import Clock
from ssl_dist.run.log import RunLog
from ssl_dist.run.metrics import cut_after, read_metrics

LINES = [{"step": step, "epoch": step / 10, "loss": 1.0} for step in (1, 2, 3)]
ODD = [
    b"5", b"true", b"[]", b"{}", b"{",
    b'"\\ud800"', b"\xff\xfe", b'{"step": true, "epoch": 1}', b'{"step": -1, "epoch": 1}',
    b'{"step": 1}', b'{"step": 1, "epoch": NaN}', b'{"step": 1' + b"0" * 400 + b', "epoch": 1}', b"[" * 100_000,
]  # fmt: skip


def written(path, *lines, tail=b""):
    path.write_bytes(b"".join(line + b"\n" for line in lines) + tail)
    return path


@pytest.mark.parametrize("odd", ODD)
def test_a_line_that_is_none_is_named_and_stays(tmp_path, odd):
    first, *rest = (json.dumps(line).encode() for line in LINES)
    path = written(tmp_path / "metrics.jsonl", first, odd, *rest, tail=b'{"step": 4, "ep')
    assert read_metrics(path) == (LINES, [2])
    cut_after(path, 2)
    assert path.read_bytes() == b"".join(line + b"\n" for line in (first, odd, rest[0]))


def test_nothing_is_written_where_nothing_is_cut(tmp_path):
    path = written(tmp_path / "metrics.jsonl", *(json.dumps(line).encode() for line in LINES))
    before = path.stat()
    cut_after(path, 3)
    assert path.stat() == before
    cut_after(tmp_path / "missing", 3)
    assert read_metrics(tmp_path / "missing") == ([], [])


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(OSError, match="not a regular file"):
        read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("seconds", [5, 0, -3600])
def test_tensorboard_shows_the_resume_also_where_the_clock_was_set_back(tmp_path, monkeypatch, seconds):
    def train(first, last, value):
        with RunLog(tmp_path, Clock(first - 1, 10, 20), "run", 1, 1, {}) as log:
            for step in range(first, last + 1):
                log.write(Clock(step, 10, 20), {"loss": value}, {}, log.speed(Clock(step, 10, 20)))

    train(1, 8, 1.0)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + seconds)
    train(6, 10, 2.0)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    values = [(event.step, event.value) for event in board.Scalars("train/loss")]
    assert values == [(step, 1.0 if step < 6 else 2.0) for step in range(1, 11)]
