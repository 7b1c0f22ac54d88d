"""Runs for MLflow: config, log, results and pictures of each.

    MLFLOW_TRACKING_URI=http://localhost:5000 python tools/to_mlflow.py RUN [RUN ...] --experiment NAME

A run that goes on is sent again: it keeps its place there, and the lines of the log that are new are added. While a
training runs, `ssl_dist.pretrain(..., on_log=lambda line: mlflow.log_metrics(line, int(line["step"])))` sends each line
at once.

needs pip install mlflow, or mlflow-skinny where a server runs elsewhere
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Metric

import ssl_dist
from ssl_dist import config, outcome
from ssl_dist.nn import features

FOLDER = "ssl_dist.folder"  # the tag by which a run is found again
MAX_METRICS = 1000  # in a request, by MLflow's interface
MAX_TEXT = 6000  # characters of a parameter, by MLflow's interface


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a training")
    parser.add_argument("--experiment", required=True, help="made if it is not there")
    arguments = parser.parse_args()
    runs = [ssl_dist.Run(folder) for folder in arguments.runs]  # a wrong folder ends it before any is sent
    experiment = mlflow.set_experiment(arguments.experiment).experiment_id
    for run in runs:
        print(f"{run.folder}: {send(run, experiment)} lines of the log")


def send(run: ssl_dist.Run, experiment: str) -> int:
    """The number of lines that were sent. Raises `UserError` when the results cannot be read."""
    results = run.results()
    folder = run.folder.resolve()
    client = mlflow.MlflowClient()
    found = client.search_runs([experiment], f"tags.`{FOLDER}` = '{folder}'")
    last = found[0].data.metrics.get("step", -1) if found else -1
    if found:
        number = found[0].info.run_id
    else:
        number = client.create_run(experiment, run_name=folder.name, tags={FOLDER: str(folder)}).info.run_id
        for key, value in leaves(config.to_tree(run.config)):
            client.log_param(number, key, str(value)[:MAX_TEXT])
    now = int(time.time() * 1000)
    columns = run.metrics()
    rows = [row for row, step in enumerate(columns.get("step", ())) if step > last]
    metrics = [
        Metric(name, float(column[row]), now, int(columns["step"][row]))
        for row in rows
        for name, column in columns.items()
        if math.isfinite(column[row])
    ]
    for record in sorted(results, key=lambda record: (record["step"], record["time"])):  # the last of a name is shown
        name = f"{record['dataset']}/{record['split']}/{features.named(record['name'], record['layer'])}"
        name = name.replace("+", " ")  # which the name of a metric must not have
        sent = [(point.step, point.value) for point in client.get_metric_history(number, name)]
        if (record["step"], record["value"]) not in sent:
            metrics.append(Metric(name, record["value"], now, record["step"]))
    for start in range(0, len(metrics), MAX_METRICS):
        client.log_batch(number, metrics=metrics[start : start + MAX_METRICS])
    for path in sorted([*folder.glob("views*.png"), *folder.glob("figures/*.png")]):
        client.log_artifact(number, str(path), "pictures")
    if results:  # with the protocol of each number
        client.log_artifact(number, str(folder / "results.json"))
    client.set_terminated(number)
    return len(rows)


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a config by their keys with dots."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


if __name__ == "__main__":
    sys.exit(outcome.of_program(main))
