"""tools/to_wandb.py and to_mlflow.py: the log and the results of a run, read back from what the trackers wrote."""

import json
import runpy
import shutil
import struct
import sys
from pathlib import Path

import pytest
from PIL import Image

from ssl_dist import results
from ssl_dist.run import metrics

TOOLS = Path(__file__).parents[1] / "tools"
LINES = [{"step": step, "epoch": step / 10, "loss": 1 / step} for step in (1, 2, 4)] + [{"step": 6, "epoch": 0.6}]


@pytest.fixture
def run(random_run, tmp_path):
    """A run with a log of four lines, the last without a loss, one result measured at two steps, and a picture."""
    folder = shutil.copytree(random_run, tmp_path / "run")
    for line in LINES:
        metrics.append(folder / "metrics.jsonl", line)
    for step, value in ((6, 70.0), (3, 60.0)):
        fields = ("method", "backbone", "dataset", "split", "data", "train_data", "transform", "checkpoint")
        metadata = dict.fromkeys(fields, "x") | {"step": step, "checkpoint": str(step)}
        results.add(folder / "results.json", results.make_records({"knn20": value}, "of x", metadata, 0, {}, 1))
    (folder / "figures").mkdir(exist_ok=True)
    Image.new("L", (8, 8)).save(folder / "figures" / "errors.png")
    return folder


def call(tool, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", [tool, *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(TOOLS / tool), run_name="__main__")
    return ended.value.code


def test_mlflow(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'store'}")
    import mlflow

    for expected in (4, 0, 1):  # anew, nothing new, and gone on with
        assert call("to_mlflow.py", monkeypatch, run, "--experiment", "digits") in (None, 0)
        assert f"run: {expected} lines" in capsys.readouterr().out
        if not expected:
            metrics.append(run / "metrics.jsonl", {"step": 8, "epoch": 0.8, "loss": 0.125})
    client = mlflow.MlflowClient()
    (there,) = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    losses = client.get_metric_history(there.info.run_id, "loss")
    assert [(point.step, point.value) for point in losses] == [(1, 1.0), (2, 0.5), (4, 0.25), (8, 0.125)]
    values = client.get_metric_history(there.info.run_id, "x/x/knn20")
    assert [(point.step, point.value) for point in values] == [(3, 60.0), (6, 70.0)]
    assert there.data.metrics["x/x/knn20"] == 70.0 and there.info.status == "FINISHED"
    assert there.data.params["method.name"] == "random_weights" and there.data.params["views.num"]
    assert [file.path for file in client.list_artifacts(there.info.run_id)] == ["pictures", "results.json"]
    assert call("to_mlflow.py", monkeypatch, run, tmp_path, "--experiment", "other") == 2
    assert "cannot be read" in capsys.readouterr().err and client.get_experiment_by_name("other") is None


def test_wandb(run, tmp_path, monkeypatch, capsys):
    for name in ("WANDB_DIR", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "wandb").mkdir()
    assert call("to_wandb.py", monkeypatch, run, "--project", "digits") in (None, 0)
    assert "run: 4 lines" in capsys.readouterr().out
    (written,) = tmp_path.glob("wandb/**/*.wandb")
    records = list(wandb_records(written.read_bytes()))
    (settings,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert settings.project == "digits" and settings.display_name == "run"
    tree = {update.key: json.loads(update.value_json) for update in settings.config.update}
    assert tree["method"]["name"] == "random_weights"
    history = [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    assert [(line["_step"], line.get("loss")) for line in history] == [(1, 1.0), (2, 0.5), (4, 0.25), (6, None)]
    assert any("pictures" in key for key in history[-1])
    summary = {
        item.key or ".".join(item.nested_key): json.loads(item.value_json)
        for record in records
        if record.WhichOneof("record_type") == "summary"
        for item in record.summary.update
    }
    assert summary["x/x/knn20"] == 70.0
    assert call("to_wandb.py", monkeypatch, tmp_path, "--project", "digits") == 2


def wandb_records(content):
    """Of a file of an offline run: a header of 7 bytes, then LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    place, message = 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # no room for a header
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        message += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(message)
            message = b""
