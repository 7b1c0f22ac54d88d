"""The kNN during a training: what it measures, and that it changes nothing of the training."""

import json

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ssl_dist import config
from ssl_dist.convert.command import convert
from ssl_dist.data.readers import Dataset
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.errors import UserError
from ssl_dist.run.blueprint import derive
from ssl_dist.run.encoder import load_encoder
from ssl_dist.storage import checkpoint
from ssl_dist.train import online_knn
from ssl_dist.train.explain import explain
from ssl_dist.train.loop import train
from tests import ranks
from tests.make_images import picture, save


def settings(digits, run, *more, method="relational"):
    return config.load(
        f"configs/digits/{method}-conv4.yaml",
        [
            f"data.root={digits}", f"run_dir={run}", "data.reader=arrays", "data.workers=1", "data.limit=64",
            "optim.batch_size=16", "optim.epochs=3", "log.knn_every_epochs=1", "log.every_steps=100", *more,
        ],
    )  # fmt: skip


def logged(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[online_knn.NAME] for line in lines if online_knn.NAME in line}


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "online"
    assert train(settings(digits, run)) == 0
    return run


def test_it_is_the_knn_of_the_encoder_on_held_out_images(run, digits):
    """Against every image by itself, sorted by cosine: a slow reference."""
    values = logged(run)
    assert list(values) == [4, 8, 12]
    encoder = load_encoder(run)
    with Dataset(digits, reader="arrays").open("train") as reader, torch.no_grad():
        count = reader.info.count
        labels = reader.labels(np.arange(count))
        [(pixels, _, _, _)] = reader.batches([np.arange(count)])
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (encoder.normalize.mean, encoder.normalize.std))
        h = encoder.module((torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std).double()
    h = (h / h.norm(dim=1, keepdim=True)).numpy()
    used = online_knn.chosen_images(derive(settings(digits, run), RankInfo()))
    queries, bank = used.ids[-used.num_queries :], used.ids[: -used.num_queries]
    assert sorted(used.ids) == list(range(count)) and not set(queries) & set(bank)
    assert used.num_queries == pytest.approx(count / 11, rel=0.05)
    assert set(labels[queries]) == set(labels), "of every class"
    right = 0
    for query in queries:
        cosines = h[bank] @ h[query]
        nearest = np.argsort(-cosines, kind="stable")[: online_knn.K]
        votes = np.zeros(10)
        for i in nearest:
            votes[labels[bank[i]]] += np.exp(cosines[i] / 0.07)
        right += votes.argmax() == labels[query]
    assert values[12] == pytest.approx(100 * right / len(queries))


def test_it_stands_in_tensorboard(run):
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    shown = {event.step: event.value for event in events.Scalars(f"online/{online_knn.NAME}")}
    assert shown == pytest.approx(logged(run))


@pytest.mark.parametrize("method", ["relational", "relic", "vicreg"])
def test_the_training_is_the_one_without_it(digits, tmp_path, method):
    states = []
    for every in ("1", "null"):
        run = tmp_path / every
        assert train(settings(digits, run, f"log.knn_every_epochs={every}", method=method)) == 0
        states.append(checkpoint.load_run(run)[1]["method"])
    assert len(logged(tmp_path / "1")) == 3 and not logged(tmp_path / "null")
    for key, tensor in states[0].items():
        assert torch.equal(tensor, states[1][key]), key


def test_a_resume_logs_each_value_once(run, digits, tmp_path):
    other = tmp_path / "run"
    assert train(settings(digits, other, "optim.epochs=2")) == 0
    assert train(settings(digits, other)) == 0
    assert logged(other) == logged(run)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "holds no labelled split train"),  # the split that it would work on
        (["log.knn_every_epochs=null", "log.probe_every_epochs=1"], "split unlabeled of .*, which is trained on"),
    ],
)
def test_labels_are_needed(tmp_path, words, says):
    for i in range(4):
        save(tmp_path / f"images/unlabeled/{i}.jpg", picture(24, 24, i))
    convert("folder", tmp_path / "images", tmp_path / "data", name="plain", workers=1, progress=False)
    given = ["data.name=plain", "data.limit=null", "optim.batch_size=2", *words]
    chosen = settings(tmp_path / "data", tmp_path / "run", *given)
    for action in (lambda: explain(chosen, 1), lambda: train(chosen)):
        with pytest.raises(UserError, match=says):
            action()


def in_ranks(rank, size, digits, run):
    torch.set_num_threads(1)
    return train(settings(digits, run, "precision=fp64"))


@pytest.mark.slow
def test_any_world_size_measures_the_same(digits, tmp_path):
    for count in (1, 2, 4):
        (tmp_path / f"ranks{count}").mkdir()
        codes = ranks.launch(in_ranks, count, tmp_path / f"ranks{count}", str(digits), str(tmp_path / f"run{count}"))
        assert set(codes) == {0}
    assert len(logged(tmp_path / "run1")) == 3
    assert logged(tmp_path / "run1") == logged(tmp_path / "run2") == logged(tmp_path / "run4")


@pytest.mark.parametrize("num_pairs", [0, 2])
def test_classes_of_which_one_image_is_taken_are_left_out(tmp_path, num_pairs):
    for label in range(20):
        for i in range(2 if label < num_pairs else 1):
            save(tmp_path / "source/train" / f"c{label:02}" / f"{i}.png", picture(32, 32, 20 * i + label))
    convert("folder", tmp_path / "source", tmp_path / "data", name="many", workers=1, progress=False)
    plan = derive(settings(tmp_path / "data", tmp_path / "run", "data.name=many", method="relational"), RankInfo())
    if num_pairs:
        used = online_knn.chosen_images(plan)
        assert used.num_queries == num_pairs and sorted(used.labels) == [0, 0, 1, 1]
        return
    with pytest.raises(UserError, match=r"log.knn_every_epochs = 1: no two of the 20 images .* set it to null"):
        online_knn.chosen_images(plan)
