"""The tools for measuring run on their smallest input, so that a change which breaks one is noticed."""

import importlib.util
import itertools
import random
import runpy
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from ssl_dist.errors import UserError
from tests.make_images import save
from tests.tool_module import TOOLS, tool_module

bench_all = tool_module("bench_all")
BENCHES = bench_all.BENCHES
TESTED_ELSEWHERE = {
    "bench_all": "test_bench_all.py",
    "bench_rates": "test_tools.py",  # by bench_prediction
    "docs_pages": "test_manual.py",  # by the build of the manual
    "draw_packages": "test_imports.py",
    "list_ids": "test_list_ids.py",
    "paper_row": "test_paper_row.py",
    "rows": "test_bench_all.py",
    "scaling": "test_project_files.py",
    "to_mlflow": "test_trackers.py",
    "to_wandb": "test_trackers.py",
}
SMALLEST_INPUTS = {  # arguments, and how a line of the table begins that must hold figures above 0
    "fuzz": (["--inputs", "1", "--minutes", "2"], "all "),
    "gpu_check": (["--device", "pretended"], "failed: none"),
    "kill_series": (["--seed", "0", "--kills", "1", "--series", "1"], "series-1: passed"),
}


def test_every_tool_is_run_by_a_test():
    tested = SMALLEST_INPUTS.keys() | BENCHES.keys() | TESTED_ELSEWHERE.keys()
    assert {path.stem for path in TOOLS.glob("*.py")} == tested
    for name, file in TESTED_ELSEWHERE.items():
        assert name in Path(__file__).with_name(file).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST_INPUTS)
def test_the_tool_runs(name):
    arguments, table_line = SMALLEST_INPUTS[name]
    command = [sys.executable, str(TOOLS / f"{name}.py"), *arguments]
    completed = subprocess.run(command, cwd=TOOLS.parent, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    assert any(row.startswith(table_line) for row in completed.stdout.splitlines()), completed.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHES)
def test_the_benchmark_prints_rows(name, digits):
    found, flaw = bench_all.measured(name, BENCHES[name].quick, {bench_all.CIFAR10: digits})
    assert found and not flaw, flaw


OFFICIAL = {
    "datamanager.py": """
        import torch
        class MultiCIFAR10(torch.utils.data.Dataset):
            def __len__(self):
                return len(self.data)
            def __getitem__(self, index):
                pixels = self.data[index]
                return pixels, [self.transform(pixels)] * self.repeat_augmentations, self.targets[index]
        class DataManager:
            def __init__(self, seed): pass
            def get_train_transforms(self, method, dataset):
                return torch.as_tensor
        """,
    "backbones/conv4.py": "class Conv4: pass",
    "methods/relationnet.py": """
        class Model:
            def __init__(self, network, device): pass
            def train(self, epoch, loader):
                print("what it says is no answer:", [len(views) for pixels, views, label in loader])
        """,
}


@pytest.mark.slow
def test_the_official_codes_own_files(digits, tmp_path):
    """Stand-ins for them: the loop gets batches, and the time of the steps comes back."""
    for name, text in OFFICIAL.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(text))
    words = f"--data {digits} --reader arrays --views 2 --images 8 --rounds 1 --steps 2 --environments tuned"
    [(what, result)], flaw = bench_all.measured("bench_step", f"{words} --beside official --official {tmp_path}", {})
    assert "M = 8, K = 2" in what and "of the official code's own files" in result and not flaw


def test_images_of_the_official_side(digits, tmp_path):
    bench_step = tool_module("bench_step")
    in_memory = bench_step.InMemory(bench_step.pixels_of(digits, "train", 3))
    for number in range(3):
        save(tmp_path / "train" / "some class" / f"{number}.png", in_memory[number])
    in_files = bench_step.InFiles(tmp_path / "train")
    assert [image.tobytes() for image in in_files] == [image.tobytes() for image in in_memory]
    with pytest.raises(UserError, match=r"holds 3 images in train, and .* 1442"):
        bench_step.require_same_images(tmp_path, digits, "train")


@pytest.fixture
def fuzz():
    spec = importlib.util.spec_from_file_location("fuzz", TOOLS / "fuzz.py")
    module = sys.modules["fuzz"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_fuzzer_stops_what_computes_or_waits_too_long(fuzz, tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "MAX_CPU_SECONDS", 1)
    monkeypatch.setattr(fuzz, "perform", lambda words: sum(1 for _ in itertools.count()))
    assert "signal SIGXCPU" in fuzz.broken_rule(*fuzz.outcome_of([], tmp_path))
    monkeypatch.setattr(fuzz, "MAX_SECONDS", 1)
    monkeypatch.setattr(fuzz, "perform", lambda words: time.sleep(60))
    assert fuzz.broken_rule(*fuzz.outcome_of([], tmp_path)) == "no end within 1 s"


def test_the_fuzzer_sees_every_broken_rule(fuzz):
    line = "error: seed = -1: must be at least 0\n"
    for code, text in ((0, ""), (0, "WARNING: x\n"), (2, line), (1, "loading\n" + line), (75, "")):
        assert not fuzz.broken_rule(code, text)
    traceback = "Traceback (most recent call last):\n  File\nValueError: x\n"
    broken = [
        (2, ""),
        (2, line + line),
        (2, f"error: {'x' * 500}\n"),
        (1, traceback),
        (0, traceback),
        (-11, ""),
        (3, line),
    ]
    for code, text in [*broken, (None, "")]:
        assert fuzz.broken_rule(code, text), (code, text)
    rng, tree = random.Random(0), {"a": [1, {"b": "c"}], "d": None}
    assert all(isinstance(fuzz.changed_bytes(b"some bytes", rng), bytes) for _ in range(200))
    trees = [fuzz.changed_tree(tree, rng) for _ in range(200)]
    assert sum(repr(changed) != repr(tree) for changed in trees) > 150 and tree == {"a": [1, {"b": "c"}], "d": None}


@pytest.mark.parametrize(
    ("name", "words", "line"),
    [
        ("bench_extract", ["--data", "nowhere"], "data.root = 'nowhere': there is no dataset.json in it"),
        ("bench_loader", ["--ffcv-ssl", "nowhere"], "--ffcv-ssl nowhere: give the folder in which pip has"),
        ("bench_step", ["--data", ".", "--beside", "official"], "--official: give a checkout of the official code"),
        ("bench_step", ["--data", "nowhere"], "data.root = 'nowhere': there is no dataset.json in it"),
        ("bench_minutes", ["--data", "nowhere"], "data.root = 'nowhere': there is no dataset.json in it"),
        ("bench_memory", ["--data", "nowhere"], "data.root = 'nowhere': there is no dataset.json in it"),
        ("bench_memory", ["--data", ".", "--steps", "2"], "--steps 2: give 3 or more; the first two are not read"),
        ("bench_ranks", ["--data", "nowhere"], "data.root = 'nowhere': there is no dataset.json in it"),
        ("bench_prediction", ["--data", "nowhere"], "data.root = 'nowhere': there is no dataset.json in it"),
        ("bench_views", ["--images", "nowhere"], "--images nowhere: no image files"),
        ("list_ids", ["x", "--root", "nowhere", "--out", "x"], "--root nowhere: there is no such folder"),
        ("paper_row", ["--data", "x", "--run", "x", "--minutes", "1", "optim.lr=-1"], "optim.lr = -1"),
        ("scaling", ["--device", "h10"], "--device 'h10'"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(name, words, line, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
    monkeypatch.syspath_prepend(str(TOOLS))  # as a program's own folder is
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(TOOLS / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith(f"error: {line}") and said.count("\n") == 1


def test_every_tool_ends_as_the_commands_do():
    for path in TOOLS.glob("*.py"):
        # Not one that reads the package as text, and a hook of mkdocs.
        if "ssl_dist" in path.read_text() and path.stem not in ("draw_packages", "docs_pages"):
            assert path.read_text().endswith("sys.exit(outcome.of_program(main))\n"), path
