"""tools/paper_row.py: what one stay at a machine does not reach, the next one does."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from ssl_dist.report import published

PATH = Path(__file__).parents[1] / "tools/paper_row.py"


@pytest.fixture
def paper_row():
    spec = importlib.util.spec_from_file_location("paper_row", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_stays_go_on_until_the_row_is_there(paper_row, digits, tmp_path, monkeypatch, capsys):
    row = next(row for row in published.read() if (row.method, row.dataset) == ("relational", "cifar10"))
    protocol = row.protocol.model_copy(update={"results": ["knn20_top1"], "options": {}})
    row = row.model_copy(update={"dataset": "digits", "protocol": protocol})
    monkeypatch.setattr(published, "beside", lambda settings: [row])
    run = tmp_path / "run"

    def stay(minutes, evaluation_minutes=0.0):
        words = [
            str(PATH), "configs/digits/relational-conv4.yaml", "--data", str(digits), "--run", str(run), "--minutes",
            str(minutes), "--evaluation-minutes", str(evaluation_minutes), "--evaluator", "knn", "data.reader=arrays",
            "data.limit=64", "optim.batch_size=16", "optim.epochs=10", "views.num=2",
        ]  # fmt: skip
        monkeypatch.setattr(sys, "argv", words)
        return paper_row.main(), capsys.readouterr()

    code, said = stay(minutes=0.2)  # shorter than a save may take
    stopped = re.search(r"stopping after step (\d+), which is saved", said.err)
    assert code == 75 and stopped
    code, said = stay(minutes=5, evaluation_minutes=5)
    assert code == 75 and "the training is complete; the same command evaluates it" in said.out
    code, said = stay(minutes=5)
    assert code == 0 and "paper: linear evaluation, top-1 61.03; here: knn20_top1 " in said.out
    written = json.loads((run / "row.json").read_text())
    assert written["paper"][0]["value"] == 61.03 and 0 <= written["here"]["knn20_top1"] <= 100
    starts = [json.loads(line) for line in (run / "logs" / "starts.jsonl").read_text().splitlines()]
    assert [start["step"] for start in starts][:2] == [0, int(stopped[1])]
