"""What explain and train warn of before a run; each remedy, taken as it stands, ends the warning."""

import re
from pathlib import Path

import pytest
import torch

from ssl_dist import cli, config
from ssl_dist.config import usual
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.run.blueprint import derive
from ssl_dist.train import advice

CONFIG = "configs/digits/simclr-conv4.yaml"


@pytest.fixture
def warned(digits, tmp_path):
    def run(*overrides, cpu=False):
        fixed = [f"data.root={digits}", "data.reader=arrays", f"run_dir={tmp_path / 'run'}", "optim.epochs=4"]
        return advice.warnings(derive(config.load(CONFIG, [*fixed, *overrides]), RankInfo()), cpu)

    return run


@pytest.mark.parametrize(
    ("overrides", "begins"),
    [
        ("data.eval_resize=85", r"data\.eval_resize = 85: evaluation sees 14 % of the area"),
        ("data.eval_resize=39", r"data\.eval_resize = 39: evaluation sees 67 %"),
        ("optim.warmup_epochs=4", r"optim\.warmup_epochs = 4: the run ends after 4 epochs"),
        ("optim.schedule=step optim.milestone_epochs=[4,8]", r"optim\.milestone_epochs = \[4\.0, 8\.0\]: the"),
        ("optim.schedule=epoch_cosine optim.epochs=1", r"optim\.schedule = 'epoch_cosine': .*the run has 1;"),
        ("optim.momentum=0.5", r"optim\.momentum = 0\.5: changes nothing, for adam does not read it"),
        ("optim.lr_final=0.1", r"optim\.lr_final = 0\.1: changes nothing, for schedule constant does not"),
        ("optim.lr_final=0.1 optim.schedule=step", r"optim\.lr_final = 0\.1: changes nothing, for schedule step"),
        ("optim.milestones=[0.6]", r"optim\.milestones = \[0\.6\]: changes nothing, for schedule constant"),
        ("optim.milestone_epochs=[2] optim.schedule=cosine", r"optim\.milestone_epochs = \[2\.0\]: changes nothing"),
        ("precision=bf16", r"precision = 'bf16': this CPU takes 3 times"),
        ("compile=true", r"compile = true: on a CPU, .* a step of conv4 takes as long or longer"),
    ],
)  # fmt: skip
def test_a_remedy_ends_its_warning(warned, monkeypatch, overrides, begins):
    monkeypatch.setattr(advice, "slowdown", lambda dtype: 3.0)
    [text] = warned(*overrides.split(), cpu=True)
    assert re.match(begins, text), text
    remedies = re.findall(r"[a-z][\w.]+=[\w.,\[\]]+", text)
    if "milestone" not in text:
        assert warned(*overrides.split(), *remedies[:1], cpu=True) == []
    assert remedies and warned(*overrides.split(), *remedies, cpu=True) == []


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("optim.lr=0.1", "optim.lr = 0.1: unusually high for adam; usual are 1e-05 to 0.01"),
        ("optim.lr=1e-6", "optim.lr = 1e-06: unusually low for adam"),
        ("optim.name=sgd optim.lr=1e-5", "optim.lr = 1e-05: unusually low for sgd; usual are 0.001 to 1"),
        ("optim.lr=1e-3 optim.lr_batch=1", "optim.lr = 0.001 (0.064 for a batch of 64): unusually high"),
        ("optim.schedule=cosine optim.epochs=null optim.steps=9", "'cosine': the rate is down after optim.steps = 9"),
    ],
)
def test_what_has_no_single_remedy(warned, overrides, words):
    [text] = warned(*overrides.split())
    assert words in text


def test_nothing_is_said_of_usual_settings(warned):
    assert warned("optim.warmup_epochs=1", "optim.schedule=cosine", "data.eval_resize=37", cpu=True) == []
    assert (
        warned("optim.name=sgd", "optim.lr=0.1", "optim.momentum=0.5", "optim.schedule=step", "optim.milestones=[0.6]")
        == []
    )
    assert warned("optim.schedule=epoch_cosine", "optim.lr_final=0.1") == []
    assert warned("method={name: random_weights}", "optim.lr=1", "optim.warmup_epochs=9", cpu=True) == []


def test_rates_of_all_configs_are_usual_and_all_their_keys_are_read():
    for path in Path("configs").rglob("*.yaml"):
        if "studies" not in path.parts:
            optim = config.load(path).optim
            assert advice._unread(optim) == [], path
            low, high = usual.LEARNING_RATES[optim.name]
            assert low <= optim.peak_lr <= high, path


def test_top_5_of_few_classes(warned, digits, monkeypatch):
    from ssl_dist.data.readers import Dataset

    info = Dataset.info
    for classes, words in (("abcd", ["top-5 of 4 classes is always 100 %: compare by top-1"]), ("abcdef", [])):
        monkeypatch.setattr(Dataset, "info", lambda self, split: _with_classes(info(self, split), classes))  # noqa: B023
        assert warned() == words


def _with_classes(info, classes):
    from dataclasses import replace

    return replace(info, classes=tuple(classes))


@pytest.mark.parametrize("name", ["alexnet", "timm/resnet18", "timm/vit_tiny_patch16_224"])
def test_compiling_is_left_to_networks_without_the_one_kernel(warned, name):
    assert warned("compile=true", f"backbone.name={name}", "data.image_size=224", cpu=True) == []


def test_a_probe_measures_and_is_short():
    assert advice.slowdown(torch.float32) == pytest.approx(1, abs=0.9)
    assert advice.slowdown(torch.float64) > 1.2


def test_explain_and_train_say_the_same(digits, tmp_path, capsys):
    few = [CONFIG, f"data.root={digits}", "data.reader=arrays", "data.limit=64", f"run_dir={tmp_path / 'run'}",
           "optim.steps=1", "optim.lr=0.5", "data.eval_resize=64"]  # fmt: skip
    assert cli.main(["explain", *few]) == 0
    told = capsys.readouterr().out
    assert "evaluated on    shorter side to 64 px, middle 32x32 px: 25 % of the area of a square image" in told
    assert cli.main(["train", *few]) == 0
    lines = [line.removeprefix("warning: ") for line in capsys.readouterr().err.splitlines() if "warning: " in line]
    assert len(lines) == 2 and all(line in told for line in lines)
