"""Two ranks on two cores beside one rank on one core, and beside what this machine allows at all.

    python tools/bench_ranks.py --data data/cifar10 [--rounds 5] [--steps 30] [key=value ...]

Of the same config, interleaved in one run, as the launch scripts start them, with one thread a rank:
    alone         one rank
    side by side  two trainings that know nothing of one another, one a core: they share memory, caches and clock, and
                  what a pair of them reaches is the machine's own limit
    two ranks     one training of the same global batch, which gives the result of `alone`
Speed is steps of the global batch a second (the median of `seconds_per_step` in metrics.jsonl after the first ones);
"of the limit" is that of two ranks by that of side by side. Views are made in every process, as in a training.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import rows  # beside this file

from ssl_dist import config, outcome
from ssl_dist.data import manifest

ROOT = Path(__file__).resolve().parent.parent
EVERY, SKIPPED = 5, 2  # steps between two lines of the log; lines at the start that live on batches made ahead


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder that `ssl-dist convert` wrote")
    parser.add_argument("--config", default=str(ROOT / "configs/cifar10/relational-conv4.yaml"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30, help="timed steps of a training")
    parser.add_argument("--cores", type=int, nargs=2, default=sorted(os.sched_getaffinity(0))[:2])
    arguments, overrides = parser.parse_known_args()  # overrides may stand behind options
    if len(arguments.cores) < 2:
        parser.error("this machine has one core; two are needed")
    settings = [
        f"data.root={arguments.data.resolve()}", f"data.name={manifest.load(arguments.data).name}",
        "optim.epochs=null", f"optim.steps={EVERY * SKIPPED + arguments.steps}", "checkpoint.every_epochs=null",
        f"log.every_steps={EVERY}", "data.workers=1", *overrides,
    ]  # fmt: skip
    wanted = config.load(arguments.config, settings)  # a mistake in it shows here, in one line
    one, two = arguments.cores
    kinds = {"alone": [([one], 1)], "side by side": [([one], 1), ([two], 1)], "two ranks": [([one, two], 2)]}
    times: dict[str, list[float]] = {kind: [] for kind in kinds}  # ms of every round
    for _ in range(arguments.rounds):
        for kind, trainings in kinds.items():
            each = train(arguments.config, settings, trainings)
            times[kind].append(1000 * statistics.mean(each) / len(each))  # two trainings make two steps in that time
    print(f"{arguments.config} {' '.join(overrides)}; ms per step of the global batch, medians")
    alone = statistics.median(times["alone"])
    for kind, values in times.items():
        middle = statistics.median(values)
        print(f"{kind:<13} {middle:8.1f} {alone / middle:6.2f} x")
    reached = [a / b for a, b in zip(times["side by side"], times["two ranks"], strict=True)]
    print(f"of the limit  {100 * statistics.median(reached):.0f} % ({100 * min(reached):.0f}-{100 * max(reached):.0f})")
    sizes = f"{wanted.backbone.name}, M = {wanted.optim.batch_size}, K = {wanted.views.num}, {wanted.precision}"
    result = rows.beside(times["two ranks"], {"of one rank": times["alone"]}, " ms")
    limit = rows.ratio(times["alone"], times["side by side"])
    result += f"; two trainings side by side, which is what the machine allows: {limit}"
    rows.show([(f"a training step of two ranks on two cores, {sizes}", result)])


def train(file: str, settings: list[str], trainings: list[tuple[list[int], int]]) -> list[float]:
    """Seconds a step of each of the trainings, which run at the same time: (cores, ranks)."""
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        processes = []
        for number, (cores, num_ranks) in enumerate(trainings):
            output = stack.enter_context(open(folder / f"output-{number}", "w+", encoding="utf-8"))
            command = ["taskset", "-c", ",".join(map(str, cores)), ROOT / "launch/torchrun_single.sh", str(num_ranks)]
            command += [file, *settings, f"run_dir={folder}/run-{number}"]
            processes.append((subprocess.Popen(command, env=environment, stdout=output, stderr=output), output))
        try:
            for process, output in processes:
                if code := process.wait():
                    output.seek(0)
                    sys.exit(f"{output.read()[-3000:]}\na training ended with exit code {code}")
        finally:
            for process, _ in processes:
                process.terminate()  # where another one failed, or this script is interrupted
                process.wait()
        return [of_run(folder / f"run-{number}") for number in range(len(trainings))]


def of_run(run: Path) -> float:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["seconds_per_step"] for line in lines[1 + SKIPPED :])


if __name__ == "__main__":
    sys.exit(outcome.of_program(main))
