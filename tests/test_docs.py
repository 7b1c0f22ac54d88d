"""The script that a reader begins with: it runs, and learns."""

import re
import runpy
import sys
from pathlib import Path


def test_relational_reasoning_in_one_file(digits, monkeypatch, capsys):
    words = ["relational_reasoning.py", "--data", str(digits), "--steps", "20", "--views", "4"]
    monkeypatch.setattr(sys, "argv", words)
    path = Path("docs/relational_reasoning.py")
    assert len(path.read_text().splitlines()) <= 150
    runpy.run_path(str(path), run_name="__main__")
    before, first, last, after = capsys.readouterr().out.splitlines()
    accuracy = [float(re.search(r"([\d.]+) %$", line)[1]) for line in (before, first, last, after)]
    assert first.startswith("step 1: ") and last.startswith("step 20: ")
    assert accuracy[3] > accuracy[0] and accuracy[2] > accuracy[1]
