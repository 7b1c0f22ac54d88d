"""tools/compare.py: its table, and two configs for digits trained, evaluated and taken from disk the second time."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ssl_dist import cli

TOOL = Path("tools/compare.py").resolve()


@pytest.fixture(scope="module")
def compare():
    spec = importlib.util.spec_from_file_location("compare", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_seconds_are_summed_over_the_lines(compare, tmp_path):
    assert compare.seconds(tmp_path) == 0
    lines = [(1, 5.0), (20, 0.1), (40, 0.2)]
    text = "".join(json.dumps({"step": step, "seconds_per_step": rate}) + "\n" for step, rate in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    assert compare.seconds(tmp_path) == pytest.approx(5 + 19 * 0.1 + 20 * 0.2)


def test_the_table_has_a_line_a_run(compare, tmp_path):
    row = {
        "method": "simclr",
        "backbone": "conv4",
        "steps": 12,
        "seconds": 3.4,
        "kNN-20": 1,
        "kNN-200": 2,
        "logistic": 3,
    }
    head, rule, line = compare.table([row]).splitlines()
    assert line == "| simclr | conv4 | 12 | 3 | 1.00 | 2.00 | 3.00 |"
    assert head.count("|") == rule.count("|") == line.count("|")
    compare.bars(tmp_path / "bars.png", [row, row | {"method": "rotation"}])
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def folders(tmp_path, digits):
    return ["--data", str(digits), "--out", str(tmp_path / "out")]


def run(tmp_path, digits, *words):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TOOL.parents[1]), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(TOOL), *words, *folders(tmp_path, digits)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_methods_are_compared_and_what_is_finished_stays(compare, digits, tmp_path, monkeypatch):
    supervised, random_weights = (f"configs/digits/{name}-conv4.yaml" for name in ("supervised", "random_weights"))
    words = ["data.reader=arrays", "data.limit=128"]
    first = run(tmp_path, digits, supervised, *words)
    assert first.returncode == 0, first.stderr
    checkpoint = tmp_path / "out" / "digits-supervised-conv4" / "checkpoints" / "LAST"
    before = checkpoint.stat().st_mtime_ns
    # one real launch is enough
    monkeypatch.setattr(compare, "train", lambda file, overrides, ranks: cli.main(["train", file, *overrides]))
    monkeypatch.setattr(
        compare, "evaluate", lambda run: cli.main(["evaluate", str(run), "knn", "logistic", "knn.k=[20, 200]"])
    )
    monkeypatch.setattr(sys, "argv", ["compare.py", random_weights, supervised, *words, *folders(tmp_path, digits)])
    assert compare.main() == 0
    assert checkpoint.stat().st_mtime_ns == before
    rows = [line.split("|")[1:-1] for line in (tmp_path / "out" / "compare.md").read_text().splitlines()]
    head, _, *values = [[cell.strip() for cell in row] for row in rows]
    assert {row[0] for row in values} == {"supervised", "random_weights"}
    assert float(values[0][-1]) >= float(values[1][-1])
    assert head[-1] == "logistic" and all(60 < float(cell) <= 100 for row in values for cell in row[-3:])


@pytest.mark.slow
def test_a_mistake_ends_the_comparison(digits, tmp_path):
    unknown_key = run(tmp_path, digits, "configs/digits/supervised-conv4.yaml", "optim.lrr=1")
    assert unknown_key.returncode == 2 and "optim.lrr" in unknown_key.stderr
    same_name = run(
        tmp_path, digits, "configs/digits/supervised-conv4.yaml", "configs/digits/../digits/supervised-conv4.yaml"
    )
    assert same_name.returncode == 2 and "one name" in same_name.stderr
