"""A run folder that an earlier version of the program left: this one goes on with it as that one did."""

import json
import tarfile
from pathlib import Path

import pytest

from ssl_dist import config
from ssl_dist.storage import checkpoint
from ssl_dist.train.loop import train

FIXTURE = Path(__file__).parent / "fixtures" / "run-92bd7ab.tar.xz"  # see README.md beside it
TIMES = ("images_per_s", "views_per_s", "data_wait", "seconds_per_step")


def test_it_goes_on_with_the_same_numbers(digits, tmp_path):
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(tmp_path, filter="data")
    run, after = tmp_path / "run", json.loads((tmp_path / "after.json").read_text())
    before = (run / "metrics.jsonl").read_text()
    assert checkpoint.steps(run) == [4]
    assert train(config.load(run / "config.yaml", [f"data.root={digits}", f"run_dir={run}"])) == 0

    text = (run / "metrics.jsonl").read_text()
    assert text.startswith(before)
    lines = [json.loads(line) for line in text[len(before) :].splitlines()]
    assert [line["step"] for line in lines] == [line["step"] for line in after["metrics"]] == [5, 6, 7, 8]
    for line, expected in zip(lines, after["metrics"], strict=True):
        # Of the smallest singular values, which processors with other instructions round otherwise.
        assert line.pop("effective_rank") == pytest.approx(expected.pop("effective_rank"), rel=1e-6)
        assert {key: value for key, value in line.items() if key not in TIMES} == pytest.approx(expected, rel=1e-8)

    state = checkpoint.load(checkpoint.newest(run))
    assert state["step"] == 8 and state["method"].keys() == after["tensors"].keys()
    for name, (total, norm) in after["tensors"].items():
        tensor = state["method"][name].double()
        assert float(tensor.norm()) == pytest.approx(norm, rel=1e-8), name
        assert float(tensor.sum()) == pytest.approx(total, rel=1e-8, abs=1e-8 * norm), name
    moments = [state["optimizer"]["state"][number] for number in sorted(state["optimizer"]["state"])]
    for moment, (_, variance) in zip(moments, after["moments"], strict=True):
        assert float(moment["exp_avg_sq"].sum()) == pytest.approx(variance, rel=1e-7)
