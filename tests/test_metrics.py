"""metrics.jsonl when it is damaged: what can be read is, what cannot stays, and a training goes on."""

import json
import os

import pytest

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
