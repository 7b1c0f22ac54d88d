"""The tools for measuring run on their smallest input, so that a change which breaks one is noticed."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools"
TESTED_ELSEWHERE = {"compare": "test_compare.py", "draw_packages": "test_imports.py", "list_ids": "test_list_ids.py"}
SMALLEST_INPUTS = {  # arguments, and how a line of the table begins that must hold figures above 0
    "bench_knn": (
        ["--images", "500", "--queries", "20", "--features", "8", "--classes", "5", "--threads", "1"], "MiB at the peak"
    ),
    "bench_memory": (
        ["--data", "DIGITS", "--config", "CONFIG", "--grids", "1x1", "--steps", "2", "backbone.name=conv4",
         "views.num=2", "data.reader=arrays"], "tuned"
    ),
    "bench_relation": (["--views", "2", "4", "--features", "16", "--rounds", "1"], "  16   4      768"),
    "bench_sinkhorn": (
        ["--images", "300", "--clusters", "10", "--features", "8", "--processes", "2", "--rounds", "1"], "ours, 2"
    ),
    "bench_step": (
        ["--data", "DIGITS", "--reader", "arrays", "--views", "2", "--images", "8", "--rounds", "1", "--steps", "1",
         "--environments", "tuned"],
        "tuned environment"
    ),
    "bench_views": (["--rounds", "1"], "ReLIC, 32 px"),
    "kill_series": (["--seed", "0", "--kills", "1", "--series", "1"], "series-1: passed"),
}  # fmt: skip


def test_every_tool_is_run_by_a_test():
    assert {path.stem for path in TOOLS.glob("*.py")} == SMALLEST_INPUTS.keys() | TESTED_ELSEWHERE.keys()
    for name, file in TESTED_ELSEWHERE.items():
        assert name in Path(__file__).with_name(file).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST_INPUTS)
def test_the_tool_runs(name, digits, tmp_path):
    arguments, table_line = SMALLEST_INPUTS[name]
    words = {"DIGITS": str(digits), "CONFIG": "configs/digits/relational-conv4.yaml"}
    command = [sys.executable, str(TOOLS / f"{name}.py"), *(words.get(word, word) for word in arguments)]
    completed = subprocess.run(command, cwd=TOOLS.parent, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    assert any(row.startswith(table_line) for row in completed.stdout.splitlines()), completed.stdout
