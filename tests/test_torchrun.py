"""Commands on several ranks of this machine: their exit code is the ranks' own."""

import pytest

from ssl_dist import torchrun


@pytest.mark.slow
def test_a_mistake_of_the_ranks_is_one(tmp_path, capfd):
    words = ["train", "configs/digits/relational-conv4.yaml", f"data.root={tmp_path}", f"run_dir={tmp_path / 'run'}"]
    assert torchrun.run(2, words) == 2
    errors = capfd.readouterr().err
    assert "there is no dataset.json in it" in errors and "Traceback" not in errors


def test_a_process_that_says_nothing_has_its_own_code(monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    assert torchrun.run(2, ["train"]) == 1
