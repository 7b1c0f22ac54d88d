"""The script and the notebook that a reader begins with: they run, and learn."""

import re
import runpy
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest


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


def executed(name, folder, **shorter):
    """The outputs of a notebook by which no cell of it fails, with fewer steps, in a folder that holds nothing; its own
    outputs are of the steps that it says."""
    notebook = nbformat.read(f"docs/{name}.ipynb", 4)
    assert all(cell.get("outputs") is not None for cell in notebook.cells if cell.cell_type == "code")
    for name, number in shorter.items():
        (cell,) = [cell for cell in notebook.cells if re.search(rf"^{name} = \d+$", cell.source, re.MULTILINE)]
        cell.source = re.sub(rf"^{name} = .*$", f"{name} = {number}", cell.source, flags=re.MULTILINE)
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def pictures(outputs):
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.slow
def test_the_notebook_runs_from_images_to_a_linear_evaluation(tmp_path):
    outputs = executed("relational_reasoning", tmp_path, STEPS=10, VIEWS=2)
    results = {path.parent.name: path.read_text() for path in tmp_path.glob("runs/*/results.json")}
    assert results.keys() == {"notebook-relational", "notebook-random_weights"}
    assert "logistic_top1" in results["notebook-relational"]
    assert pictures(outputs) == 3


@pytest.mark.slow
def test_the_notebook_of_a_loop_of_ones_own(tmp_path):
    outputs = executed("own_loop", tmp_path, STEPS=6)
    text = "".join(output.get("text", "") for output in outputs)
    accuracy = [float(value) for value in re.findall(r"([\d.]+) %", text)]
    assert len(accuracy) == 3 and min(accuracy) > 90 and pictures(outputs) == 2


@pytest.mark.slow
def test_the_notebook_of_features(tmp_path):
    outputs = executed("features", tmp_path, STEPS=6)
    assert pictures(outputs) == 2 and (tmp_path / "runs/features/features/digits-test.safetensors").exists()
    assert [o["data"]["text/plain"] for o in outputs if "data" in o][-2:] == ["(8, 512)", "(8, 256)"]


def test_what_the_acceptance_page_names_is_there():
    text = Path("docs/acceptance.md").read_text()
    files = set(re.findall(r"\b(?:configs|docs|tests|tools|launch)/[\w/.-]+\.(?:yaml|md|svg|ipynb|py|sh)\b", text))
    assert len(files) > 40 and not [file for file in files if not Path(file).is_file()]
    states = re.findall(r"^\| [A-E]\d+ \|.*? \| ([YPN-]) \|", text, re.MULTILINE)
    assert len(states) == 218
    counts = " | ".join(str(states.count(state)) for state in "YPN-")
    assert f"| all | {counts} |" in text
