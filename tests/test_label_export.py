"""`ssl-dist labels`: the file, what it refuses, and that another run takes the labels as its own."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ssl_dist import cli, config
from ssl_dist.data import labels
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.run.blueprint import derive
from ssl_dist.storage import checkpoint
from ssl_dist.train.loop import train

CONFIG = "configs/digits/sela-conv4.yaml"
SMALL = [
    "data.limit=48", "data.reader=arrays", "optim.batch_size=16", "optim.epochs=null", "optim.steps=2",
    "method.options.clusters=6", "method.options.heads=2", "timeout=20",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    """Two steps of training on some digits."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert train(config.load(CONFIG, [f"data.root={digits}", f"run_dir={folder}", *SMALL])) == 0
    return folder


def blueprint_of(digits, *more):
    return derive(config.load(CONFIG, [f"data.root={digits}", "run_dir=none", *SMALL, *more]), RankInfo())


def test_the_file_holds_the_labels_of_every_training_image(run, digits, tmp_path, capsys):
    out = tmp_path / "new" / "labels.csv"
    assert cli.main(["labels", str(run), "--out", str(out)]) == 0
    output = capsys.readouterr().out
    assert "48 images by 2 head(s), after step 2" in output and "10 classes: 0." in output
    ids = blueprint_of(digits).order.train_ids
    stored = checkpoint.load(checkpoint.newest(Path(run)))["method"]["labels.of_images"]
    lines = out.read_text().splitlines()
    assert lines[0] == "image_id,label_0,label_1"
    assert lines[1:] == [f"{i},{a},{b}" for i, a, b in zip(ids, *stored.tolist(), strict=True)]
    for column in range(2):
        read = labels.read(out, column, 2000)
        assert np.array_equal(read[ids], stored[column]) and (read >= 0).sum() == 48


def test_another_run_takes_them_as_labels(run, digits, tmp_path):
    out = tmp_path / "labels.csv"
    assert cli.main(["labels", str(run), "--out", str(out), f"data.root={digits}"]) == 0
    taken = blueprint_of(digits, f"data.labels={{file: {out}, column: 1}}")
    ids = taken.order.train_ids
    with taken.open_reader() as reader:
        of_images = torch.from_numpy(reader.labels(ids))
    assert torch.equal(of_images.int(), checkpoint.load(checkpoint.newest(Path(run)))["method"]["labels.of_images"][1])
    assert taken.info.num_classes == int(of_images.max()) + 1


def test_a_checkpoint_file_will_do(run, tmp_path, digits):
    path = checkpoint.newest(Path(run))
    assert cli.main(["labels", str(path), "--out", str(tmp_path / "a.csv")]) == 0
    assert cli.main(["labels", str(run), "--out", str(tmp_path / "b.csv")]) == 0
    assert (tmp_path / "a.csv").read_text() == (tmp_path / "b.csv").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["RUN", "data.limit=3"], "data.limit=3.*data.root"),
        (["nowhere"], "nowhere.*not found"),
        (["EMPTY"], "no checkpoint"),
        (["OTHER"], "random_weights gives its images no labels"),
        (["RUN", "data.root=MOVED"], "data.root = .*not the images"),
    ],
)
def test_what_is_refused(run, digits, tmp_path, capsys, arguments, words):
    places = {"RUN": run, "EMPTY": tmp_path / "empty", "OTHER": tmp_path / "other", "MOVED": tmp_path / "moved"}
    places["EMPTY"].mkdir()
    if "OTHER" in arguments:
        settings = [f"data.root={digits}", f"run_dir={places['OTHER']}", "data.reader=arrays"]
        assert train(config.load("configs/digits/random_weights-conv4.yaml", settings)) == 0
    if "MOVED" in arguments[-1]:
        other_images(places["MOVED"], digits)
    words_in = [w.replace("MOVED", str(places["MOVED"])) if "=" in w else str(places.get(w, w)) for w in arguments]
    assert cli.main(["labels", *words_in, "--out", str(tmp_path / "x.csv")]) == 2
    [line] = capsys.readouterr().err.splitlines()[-1:]
    assert re.search(words, line), line
    assert not (tmp_path / "x.csv").exists()


def other_images(folder, digits):
    """A conversion whose dataset.json has other checksums."""
    shutil.copytree(digits, folder)
    facts = json.loads((folder / "dataset.json").read_text())
    facts["splits"]["train"]["sha256"] = "0" * 64
    (folder / "dataset.json").write_text(json.dumps(facts))
