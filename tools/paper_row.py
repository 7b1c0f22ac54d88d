"""One row of a paper in several short stays at a machine: it trains until its minutes are over, and the same command
goes on from the checkpoint. When the training is complete it is evaluated and shown beside the published number.

    python tools/paper_row.py --minutes 8 --data data/cifar10 --run runs/paper-row [CONFIG] [key=value ...]

CONFIG is relational reasoning on CIFAR-10 by default: conv4, 200 epochs, seed 1. Exit code 75: there is more to do;
carry the run's folder to the next stay. RUN/row.json holds what is shown. --data is a folder that `ssl-dist convert`
wrote; where FFCV is not installed add data.reader=arrays.
"""

import argparse
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from ssl_dist import cli, config, outcome, results
from ssl_dist.distributed.signals import STOPPED
from ssl_dist.report import published

CONFIG = Path(__file__).parents[1] / "configs/cifar10/relational-conv4.yaml"
EVALUATORS = ("knn", "probe")
SAVING_S = 15.0  # from the request to stop until the checkpoint is written


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="CONFIG|key=value")
    parser.add_argument("--minutes", type=float, required=True, help="of this stay")
    parser.add_argument("--evaluation-minutes", type=float, default=3.0, help="that must be left for the evaluation")
    parser.add_argument("--data", required=True, help="folder that `ssl-dist convert` wrote")
    parser.add_argument("--run", type=Path, required=True, help="folder of the run")
    parser.add_argument("--evaluator", action="append", help="may be repeated (default: knn and probe)")
    arguments = parser.parse_intermixed_args()
    end = time.monotonic() + 60 * arguments.minutes
    files = [word for word in arguments.words if "=" not in word] or [str(CONFIG)]
    words = [word for word in arguments.words if "=" in word]
    words += [f"data.root={arguments.data}", f"run_dir={arguments.run}"]
    settings = config.load(files[0], words)
    code = train_until(end - SAVING_S, ["train", files[0], *words])
    if code:
        return code
    if end - time.monotonic() < 60 * arguments.evaluation_minutes:
        print("the training is complete; the same command evaluates it", flush=True)
        return STOPPED
    code = cli.main(["evaluate", str(arguments.run), *(arguments.evaluator or EVALUATORS)])
    if code == 0:
        show(settings, arguments.run)
    return code


def train_until(end: float, command: list[str]) -> int:
    """The exit code of a training that gets SIGTERM at `end`, by the monotonic clock, and again until it has heard."""
    done = threading.Event()

    def stop() -> None:
        seconds = max(0.0, end - time.monotonic())
        while not done.wait(seconds):
            os.kill(os.getpid(), signal.SIGTERM)
            seconds = 1.0

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # while the training is not there to take it
    threading.Thread(target=stop, daemon=True).start()
    try:
        return cli.main(command)
    finally:
        done.set()
        signal.signal(signal.SIGTERM, before)


def show(settings: config.Config, run: Path) -> None:
    """Print the results and what the paper publishes, and write both to row.json."""
    records = results.read(run / "results.json")
    ours = {record["name"]: record["value"] for record in records}
    papers = []
    for row in published.beside(settings):
        alike = {record["name"]: record["value"] for record in published.measured_alike(row, settings, records)}
        values = ", ".join(f"{name} {value:.2f}" for name, value in alike.items()) or "none that is measured alike"
        print(f"paper: {row.result} {row.value:g}; here: {values}\n       {row.footnote}")
        papers.append({"result": row.result, "value": row.value, "footnote": row.footnote, "here": alike})
    (run / "row.json").write_text(json.dumps({"here": ours, "paper": papers}, indent=1) + "\n", encoding="utf-8")
    print(f"{len(ours)} results, {len(papers)} published numbers: {run / 'row.json'}")


if __name__ == "__main__":
    sys.exit(outcome.of_program(main))
