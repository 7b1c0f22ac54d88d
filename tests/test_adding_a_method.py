"""Adding a method touches one .py and one .yaml: here Barlow Twins (Zbontar et al., ICML 2021, arXiv:2103.03230)."""

from functools import partial
from pathlib import Path

import pytest
import torch

from ssl_dist import cli, methods
from ssl_dist.errors import UserError
from ssl_dist.storage import checkpoint
from ssl_dist.storage import features as features_file
from ssl_dist.verify import command as verify
from tests import mutations

METHOD = '''
"""Barlow Twins: the cross-correlation of two views' embeddings is drawn to the identity."""

from typing import Literal

import torch
from pydantic import Field

from ssl_dist.config import NonNegativeFloat, PositiveInt, Section
from ssl_dist.methods.base import Output, SSLMethod
from ssl_dist.nn import mlp


class Options(Section):
    off_diagonal: NonNegativeFloat = Field(0.005, description="weight of the correlations between features")
    hidden: PositiveInt = 64
    form: Literal["square", "absolute"] = "square"


def barlow_loss(z_1_MD, z_2_MD, off_diagonal, form):
    a, b = ((z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt() for z in (z_1_MD, z_2_MD))
    gap = a.T @ b / len(a) - torch.eye(a.shape[1], dtype=a.dtype, device=a.device)
    gap = gap.square() if form == "square" else gap.abs()
    on = gap.diagonal().sum()
    return on + off_diagonal * (gap.sum() - on)


class Method(SSLMethod[Options]):
    num_views = 2
    views_together = False

    def __init__(self, backbone, info, options):
        super().__init__(backbone, info, options)
        self.projector = mlp([info.feature_dim, options.hidden, options.hidden])

    def forward(self, batch, world):
        z_KMD = self.gathered(batch, world, lambda images: self.projector(self.backbone(images)))
        loss = barlow_loss(*z_KMD, self.options.off_diagonal, self.options.form)
        return Output(loss, representations=z_KMD.detach())
'''

CONFIG = """
# ssl-dist train barlow-conv4.yaml
run_dir: runs/digits-barlow-conv4
data: {name: digits, root: data/digits, reader: arrays}
backbone: {name: conv4}
method: {name: barlow, options: {hidden: 32}}
optim: {batch_size: 32, epochs: 2}
"""


@pytest.fixture
def dropped(tmp_path, monkeypatch):
    """Two files in a folder that is looked into as if it were ssl_dist/methods; the config."""
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "barlow.py").write_text(METHOD)
    (tmp_path / "barlow-conv4.yaml").write_text(CONFIG)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path / "methods")])
    return tmp_path / "barlow-conv4.yaml"


@pytest.mark.slow
def test_it_is_explained_trained_resumed_and_extracted(dropped, digits, tmp_path, capsys):
    words = [str(dropped), f"data.root={digits}", f"run_dir={tmp_path / 'run'}", "data.limit=96"]
    assert cli.main(["explain", *words, "--world", "2"]) == 0
    assert "barlow on conv4" in capsys.readouterr().out
    assert cli.main(["train", *words]) == 0
    assert cli.main(["train", *words, "optim.epochs=4"]) == 0
    state = checkpoint.load(checkpoint.newest(tmp_path / "run"))
    assert state["step"] == 12 and "projector.0.weight" in state["method"]
    assert cli.main(["extract", str(tmp_path / "run"), "--out", str(tmp_path / "features")]) == 0
    extracted = features_file.read_features(tmp_path / "features" / "digits-test.safetensors")
    assert extracted.features.shape[1] == 64 and len(extracted.features) == len(extracted.labels) > 0
    assert cli.main(["evaluate", str(tmp_path / "run"), "knn"]) == 0


def test_its_mistakes_are_found_like_those_of_others(dropped, digits, tmp_path):
    for name, message in (("barlw", "'barlow'"), ("relationl", "barlow")):
        with pytest.raises(UserError, match=message):
            methods.find(name)
    with pytest.raises(UserError, match=r"method\.options\.hiden.*'hidden'"):
        methods.build_options(methods.find("barlow"), {"hiden": 3})


@pytest.mark.slow
def test_it_is_certified(dropped, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "CONFIGS", dropped.parent)
    cases = list(verify.cases(tmp_path, names=["barlow"], steps=3))
    rows = verify.certify(cases, tmp_path, partial(mutations.add_methods, tmp_path / "methods"))
    assert {row.case.variant for row in rows} == {"form=square", "form=absolute"}
    assert len(rows) == 2 * 2 * 2 and all(row.holds for row in rows), verify.table(rows)


def test_its_loss_is_pure(dropped):
    loss = methods.find("barlow").forward.__globals__["barlow_loss"]
    z = torch.randn(6, 3, dtype=torch.float64)
    a = (z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt()
    expected = sum(
        (1.0 if i == j else 0.1) * (float((a[:, i] * a[:, j]).mean()) - (i == j)) ** 2
        for i in range(3)
        for j in range(3)
    )
    assert float(loss(z, z, 0.1, "square")) == pytest.approx(expected)


@pytest.mark.parametrize("package", ["distributed", "run", "train", "verify"])
def test_the_loop_and_what_it_stands_on_name_no_method(package):
    for path in (Path(methods.__file__).parents[1] / package).glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not [method for method in methods.names() if f'"{method}"' in text], path
