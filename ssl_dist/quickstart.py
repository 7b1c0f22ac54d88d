"""`ssl-dist quickstart`: from nothing to an accuracy, on scikit-learn's handwritten digits."""

import argparse
import importlib.util
import sys
from pathlib import Path

from ssl_dist import torchrun
from ssl_dist.command_line import argument, command, importing

DIGITS = Path("data", "digits")
CONFIGS = "configs/digits/relational-conv4.yaml", "configs/digits/random_weights-conv4.yaml"
TRAINED, RANDOM = Path("runs", "digits-relational-conv4"), Path("runs", "digits-random_weights-conv4")
TABLE = Path("runs", "digits-quickstart.txt")
LOOK_AT: dict[Path | str, str] = {
    TRAINED / "report.html": "its page, in a browser: health, results, curves, views, config",
    TRAINED / "views.png": "the views of some digits, as the network sees them",
    TRAINED / "loss.png": "loss and accuracies over the epochs",
    TABLE: "the table above; each run's own numbers are in its results.json",
}


@command(
    "quickstart",
    "train on handwritten digits, and measure",
    argument("overrides", "for both trainings, for example data.reader=arrays", nargs="*", metavar="key=value"),
)
def quickstart(args: argparse.Namespace) -> int:
    """Train relational reasoning on scikit-learn's handwritten digits, without labels, on two ranks (one where there is
    one GPU), and compare it with random weights. Writes data/digits and runs/ in this folder; run again, it does what
    is left. A few minutes on 2 cores."""
    with importing():
        from ssl_dist import config, results
        from ssl_dist.convert.command import convert, usage
        from ssl_dist.distributed.world import ranks_here
        from ssl_dist.evaluate.command import evaluate
        from ssl_dist.report import report
        from ssl_dist.train.loop import train

    overrides = list(args.overrides)
    if importlib.util.find_spec("ffcv") is None and not any(word.startswith("data.reader=") for word in overrides):
        _step("FFCV is not installed: the trainings read by data.reader=arrays")
        overrides.append("data.reader=arrays")
    for file in CONFIGS:
        config.load(file, overrides)  # a mistake shows before anything is written
    _step("1 of 4: the digits as 32x32 images, one .beton file a split")
    print(usage(DIGITS, convert("digits", None, DIGITS)))
    ranks = ranks_here(2)
    _step(f"2 of 4: relational reasoning without labels under torchrun, ranks: {ranks}")
    if code := torchrun.run(ranks, ["train", CONFIGS[0], *overrides]):
        return code
    _step("3 of 4: random weights, to compare with")
    if code := train(config.load(CONFIGS[1], overrides)):
        return code
    _step("4 of 4: features of both, kNN and logistic regression on the test images; a page")
    records = []
    for run in (TRAINED, RANDOM):
        code, _ = evaluate(run, ["knn", "logistic"], [])
        if code:
            return code
        records += results.read(run / "results.json")
    report([TRAINED], None)
    _step("result")
    table = results.table(records)
    TABLE.write_text(f"{table}\n", encoding="utf-8")
    print(table)
    _step("look at")
    for what, why in (LOOK_AT | {_tensorboard(): "everything that was logged, in a browser"}).items():
        print(f"{what!s:42} {why}")
    return 0


def _tensorboard() -> str:
    """Its command, by the environment in this folder where that runs this program."""
    program = Path(sys.prefix, "bin", "tensorboard")
    inside = program.is_relative_to(Path.cwd())
    return f"{program.relative_to(Path.cwd()) if inside else 'tensorboard'} --logdir runs"


def _step(text: str) -> None:
    print(f"\n== {text}", flush=True)
