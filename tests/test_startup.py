"""What each command imports: none waits for a package that it does not use. Names, not times: those vary by machine."""

import importlib
import json
import subprocess
import sys

import pytest

from ssl_dist import backbones, config

# Packages that take from a fifth of a second to several seconds.
SLOW = [
    "torch", "numba", "torch._dynamo", "torchvision", "timm", "matplotlib", "sklearn", "scipy.stats", "tensorboard",
    "ffcv",
]  # fmt: skip
ARITHMETIC = {"torch", "numba"}
# A command, and what it needs of these. All run in one process, one after another, so what one needs the next may have.
NEEDED = {
    "--help": set(),
    "keys optim.lr": set(),
    "slurm/submit.py train CONFIG --gpus-per-node 8 --cpus-per-task 8 --dry-run": set(),
    "keys": ARITHMETIC,
    "report RUN": ARITHMETIC,
    "extract RUN --out FEATURES": ARITHMETIC,
    # The pictures of the confusion matrix, and the results for TensorBoard.
    "evaluate RUN knn knn.k=[3]": ARITHMETIC | {"matplotlib", "tensorboard"},
    # On the meta device torch computes shapes in Python, for which it imports its compiler.
    "explain CONFIG data.root=DATA data.reader=arrays": ARITHMETIC | {"matplotlib", "tensorboard", "torch._dynamo"},
}
COMMANDS = """
import json, runpy, sys
from ssl_dist.cli import main

def code(words):
    try:
        if words[0].endswith(".py"):
            sys.argv = words
            return runpy.run_path(words[0])["main"]()
        return main(words)
    except SystemExit as end:  # of --help
        return end.code

(slow, commands), path = json.load(sys.stdin), sys.argv[1]
ends = [(code(words), [name for name in slow if name in sys.modules]) for words in commands]
json.dump(ends, open(path, "w"))
"""


@pytest.mark.slow
def test_no_command_waits_for_what_it_does_not_use(digits, tmp_path):
    from ssl_dist.evaluate.command import evaluate
    from ssl_dist.train.loop import train

    places = {"RUN": str(tmp_path / "run"), "FEATURES": str(tmp_path / "features"), "DATA": str(digits)}
    places["CONFIG"] = "configs/digits/relational-conv4.yaml"
    overrides = [f"data.root={digits}", f"run_dir={places['RUN']}", "data.reader=arrays"]
    assert train(config.load("configs/digits/random_weights-conv4.yaml", overrides)) == 0
    assert evaluate(tmp_path / "run", ["knn"], ["knn.k=[1]"])[0] == 0

    commands = []
    for line in NEEDED:
        for word, place in places.items():
            line = line.replace(word, place)
        commands.append(line.split())
    command = [sys.executable, "-c", COMMANDS, tmp_path / "ends.json"]
    subprocess.run(command, input=json.dumps([SLOW, commands]), text=True, check=True, stdout=subprocess.DEVNULL)
    ends = json.loads((tmp_path / "ends.json").read_text())
    for (line, needed), (code, imported) in zip(NEEDED.items(), ends, strict=True):
        assert (line, code, set(imported) - needed) == (line, 0, set())


def test_each_file_of_backbones_has_those_it_is_said_to_have():
    """The table is what `names()` reads, without importing the files."""
    for file, names in backbones._FILES.items():
        assert sorted(importlib.import_module(f"ssl_dist.backbones.{file}").BACKBONES) == sorted(names)
