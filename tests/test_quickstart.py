"""`ssl-dist quickstart` in a folder that is empty, and again."""

import pytest

from ssl_dist import cli, quickstart, torchrun


@pytest.mark.slow
def test_from_nothing_to_a_table(tmp_path, monkeypatch, capsys):
    trained = []

    def train_here(ranks, words):  # torchrun itself is tested with the launch scripts
        trained.append(ranks)
        return cli.main([*words, "optim.steps=2"])

    monkeypatch.setattr(torchrun, "run", train_here)
    monkeypatch.chdir(tmp_path)
    words = ["quickstart", "data.reader=arrays", "data.limit=200", "optim.batch_size=16"]
    assert cli.main(words) == 0
    first = capsys.readouterr().out
    table = (tmp_path / quickstart.TABLE).read_text()
    assert table in first and "relational" in table and "random_weights" in table and "knn20_top1" in table
    for what in quickstart.LOOK_AT:
        assert str(what) in first and (tmp_path / what).is_file()
    assert "\ntensorboard --logdir runs" in first
    assert "\ndata/digits: done: train (1442 images), test (355 images)" in first
    monkeypatch.setattr("sys.prefix", str(tmp_path / ".venv"))
    assert quickstart._tensorboard() == ".venv/bin/tensorboard --logdir runs"
    assert cli.main(words) == 0
    again = capsys.readouterr()
    assert (tmp_path / quickstart.TABLE).read_text() == table in again.out and "already" in again.err
    assert len(trained) == 2 and 1 <= trained[0] <= 2


def test_a_mistake_shows_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["quickstart", "optim.epoch=1"]) == 2
    assert "error: unknown key optim.epoch = 1: write optim.epochs=1" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_a_training_that_fails_ends_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torchrun, "run", lambda ranks, words: 75)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["quickstart", "data.reader=arrays"]) == 75
    assert "3 of 4" not in capsys.readouterr().out
