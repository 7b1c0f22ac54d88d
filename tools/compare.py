"""Compare methods in one table: train each config, evaluate kNN and logistic regression, print, and draw bars.

    python tools/compare.py configs/cifar10-short/*.yaml --data data/cifar10 --out runs/short [--ranks N]

Each run lies in OUT under the name of its config's run_dir. Stopped, the same command goes on where it was: what is
finished stays, a training resumes. At the end OUT holds compare.md and compare.png. The overrides go to every training.
Seconds are those that the loop spent on its steps, whatever stops lay between them.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ssl_dist import config, results
from ssl_dist.errors import UserError

LAUNCHER = Path(__file__).parents[1] / "launch" / "torchrun_single.sh"
RESULTS = {"kNN-20": "knn20_top1", "kNN-200": "knn200_top1", "logistic": "logistic_top1"}  # by column
COLOURS = ("#9fb8d1", "#5b86b5", "#1f4e79")
SORT_COLUMN = "logistic"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", metavar="CONFIG|key=value")
    parser.add_argument("--data", required=True, help="folder that `ssl-dist convert` wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and of the table")
    parser.add_argument("--ranks", type=int, default=1, help="of every training (default 1)")
    arguments = parser.parse_args()
    files = [word for word in arguments.configs if "=" not in word]
    overrides = [word for word in arguments.configs if "=" in word] + [f"data.root={arguments.data}"]
    try:
        runs = {file: arguments.out / Path(config.load(file, overrides).run_dir).name for file in files}
        if len(set(runs.values())) < len(files):
            raise UserError("two of the configs have run_dirs of one name; compare them one after the other")
        for number, (file, run) in enumerate(runs.items(), 1):
            print(f"== {number} of {len(runs)}: {file} -> {run}", flush=True)
            code = train(file, [*overrides, f"run_dir={run}"], arguments.ranks) or evaluate(run)
            if code:
                print(f"{file}: exit code {code}; the same command goes on from here", file=sys.stderr)
                return code
        rows = sorted(map(read, runs.values()), key=lambda row: row[SORT_COLUMN], reverse=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = table(rows)
    (arguments.out / "compare.md").write_text(text + "\n", encoding="utf-8")
    bars(arguments.out / "compare.png", rows)
    print(f"\n{text}\n\n{arguments.out / 'compare.md'}, {arguments.out / 'compare.png'}")
    return 0


def train(file: str, overrides: list[str], ranks: int) -> int:
    return call("bash", str(LAUNCHER), str(ranks), file, *overrides)


def evaluate(run: Path) -> int:
    return call(sys.executable, "-m", "ssl_dist", "evaluate", str(run), "knn", "logistic", "knn.k=[20, 200]")


def call(*command: str) -> int:
    """The exit code. A signal to stop is passed on and the command's own end awaited: a training saves first."""
    process = subprocess.Popen(command, env=os.environ | {"PYTHON": sys.executable})
    before = {
        number: signal.signal(number, lambda number, _: process.send_signal(number))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
    }
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def read(run: Path) -> dict:
    """A row of the table: method, backbone, steps, seconds and the newest of each result."""
    records = sorted(results.read(run / "results.json"), key=lambda record: record["time"])
    newest = {record["name"]: record for record in records if results.is_of_a_whole_split(record)}
    record = newest[RESULTS[SORT_COLUMN]]
    values = {column: newest[name]["value"] for column, name in RESULTS.items()}
    return {
        "method": record["method"],
        "backbone": record["backbone"],
        "steps": record["step"],
        "seconds": seconds(run),
        **values,
    }


def seconds(run: Path) -> float:
    """Time that the training spent on its steps, from the rates in metrics.jsonl; 0 when it took none."""
    path, total, last = run / "metrics.jsonl", 0.0, 0
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        entry = json.loads(line)
        total += (entry["step"] - last) * entry["seconds_per_step"]
        last = entry["step"]
    return total


def table(rows: list[dict]) -> str:
    """Markdown, a line a run."""
    lines = [
        f"| method | backbone | steps | seconds | {' | '.join(RESULTS)} |",
        "|---|---|" + "---:|" * (2 + len(RESULTS)),
    ]
    for row in rows:
        values = " | ".join(f"{row[column]:.2f}" for column in RESULTS)
        lines.append(f"| {row['method']} | {row['backbone']} | {row['steps']} | {row['seconds']:.0f} | {values} |")
    return "\n".join(lines)


def bars(path: Path, rows: list[dict]) -> None:
    """A group of bars for each run, the best at the top."""
    figure = Figure(figsize=(7, 1 + 0.5 * len(rows)), dpi=120)
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    height = 0.8 / len(RESULTS)
    for number, (column, colour) in enumerate(zip(RESULTS, COLOURS, strict=True)):
        positions = [row + (number - 1) * height for row in range(len(rows))]
        container = axes.barh(positions, [row[column] for row in rows], height, color=colour, label=column)
        axes.bar_label(container, fmt="%.1f", padding=2, fontsize=7)
    axes.set_yticks(range(len(rows)), [row["method"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("accuracy on the test images (%)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    FigureCanvasAgg(figure).print_png(path)


if __name__ == "__main__":
    sys.exit(main())
