"""Runs for Weights & Biases: config, log, results and pictures of each.

    python tools/to_wandb.py RUN [RUN ...] --project PROJECT
    WANDB_MODE=offline python tools/to_wandb.py RUN --project PROJECT       then: wandb sync wandb/offline-run-*

A run that goes on is sent again: it keeps its place there, and the lines of the log that are new are added. While a
training runs, `ssl_dist.pretrain(..., on_log=wandb.log)` sends each line at once.

needs pip install wandb
"""

import argparse
import hashlib
import sys
from pathlib import Path

import wandb

import ssl_dist
from ssl_dist import config, outcome
from ssl_dist.nn import features


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a training")
    parser.add_argument("--project", required=True, help="made if it is not there")
    arguments = parser.parse_args()
    for run in [ssl_dist.Run(folder) for folder in arguments.runs]:  # a wrong folder ends it before any is sent
        print(f"{run.folder}: {send(run, arguments.project)} lines of the log")


def send(run: ssl_dist.Run, project: str) -> int:
    """The number of lines that were sent. Raises `UserError` when the results cannot be read."""
    results = run.results()
    folder = run.folder.resolve()
    number = hashlib.sha256(str(folder).encode()).hexdigest()[:16]  # the same for the same folder: what is sent joins
    columns = run.metrics()
    with wandb.init(
        project=project, id=number, name=folder.name, resume="allow", config=config.to_tree(run.config)
    ) as there:
        first = there.starting_step
        num_sent = 0
        for row in range(len(columns.get("step", ()))):
            line = {name: float(column[row]) for name, column in columns.items() if column[row] == column[row]}
            if line["step"] >= first:
                there.log(line, step=int(line["step"]))
                num_sent += 1
        for record in sorted(results, key=lambda record: (record["step"], record["time"])):  # the last of a name counts
            name = features.named(record["name"], record["layer"])
            there.summary[f"{record['dataset']}/{record['split']}/{name}"] = record["value"]
        if results:  # with the protocol of each number
            there.save(str(folder / "results.json"), base_path=str(folder), policy="now")
        pictures = sorted([*folder.glob("views*.png"), *folder.glob("figures/*.png")])
        there.log({f"pictures/{path.stem}": wandb.Image(str(path)) for path in pictures})
    return num_sent


if __name__ == "__main__":
    sys.exit(outcome.of_program(main))
