"""Progress without a terminal: a line every ten seconds and one at the end."""

import sys
import time

import nbclient
from nbformat.v4 import new_code_cell, new_notebook

from ssl_dist.progress import Progress


def lines_of(monkeypatch, capsys, *arguments, status=None, **options):
    """What is printed of units that take 4 s each."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    with Progress(*arguments, **options) as progress:
        progress.describe({"loss": 1 / 3})
        for _ in range(progress.total - options.get("done", 0)):
            now[0] += 4
            progress.update(1, status)
    return capsys.readouterr().err.splitlines()


def test_plain_lines(monkeypatch, capsys):
    assert lines_of(monkeypatch, capsys, "test", 4, "image") == [
        "test: 3/4, 0.25 images/s, 0:04 left, loss 0.3333",
        "test: 4/4, 0.25 images/s, 0:00 left, loss 0.3333",
    ]
    assert lines_of(monkeypatch, capsys, "sela", 904, "step", done=900, status="step 9") == [
        "sela: step 9, 0:04 left, loss 0.3333",
        "sela: step 9, 0:00 left, loss 0.3333",
    ], "the rate is that of this start"
    assert lines_of(monkeypatch, capsys, "test", 4, "image", quiet=True) == []


def test_a_notebook_has_a_bar():
    """Though its stderr is no terminal. A process that only starts a notebook, like this one, has none."""
    code = (
        "import sys\nfrom ssl_dist.progress import Progress\nfrom ssl_dist.terminal import lasting\n"
        "with lasting(), Progress('work', 4, 'step') as bar: bar.update(4)"  # as a training has its streams
    )
    notebook = nbclient.execute(new_notebook(cells=[new_code_cell(code)]), timeout=60, kernel_name="python3")
    assert "work: 100%" in "".join(output["text"] for output in notebook.cells[0].outputs)
    assert "ipykernel" in sys.modules
    with Progress("work", 4, "step") as progress:
        assert progress._bar.disable
