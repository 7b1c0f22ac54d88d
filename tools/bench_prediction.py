"""What `ssl-dist explain` predicts for a step, beside trainings on this machine: on one rank and on two.

    python tools/bench_prediction.py --data data/digits [--ranks 1 2] [--rounds 3] [--steps 8] [--cases conv4 ...]
    python tools/bench_prediction.py --published

In every round the rates are measured (tools/bench_rates.py, with as many ranks), then every case is trained for a few
steps with one thread a rank, in the environment that `ssl-dist` makes, by the arrays reader. The table has the medians
of the rounds, of a training its fastest step. CPU time is that of rank 0's main thread, so without its views and
without waiting: other work on the machine disturbs it less than wall time. Where ranks take all cores, the views are
made once and used again: threads that make views would take turns with the ranks, which no GPU's loader does.

--published: ResNet-50 as NVIDIA trains it, by the rates of devices.yaml, beside the images a second that NVIDIA
publishes for one GPU (PyTorch/Classification/ConvNets/resnet50v1.5 of NVIDIA/DeepLearningExamples; batches of 256).
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import bench_rates  # beside this file
import rows

from ssl_dist import outcome
from ssl_dist.distributed.rank import available_cores

ROOT = Path(__file__).resolve().parent.parent
SMALLER = ["data.image_size=64", "optim.batch_size=32"]
CASES = {  # name: config of configs/digits, overrides
    "relational, conv4, 32 px, K = 8": ("relational-conv4.yaml", ["views.num=8"]),
    "simclr, resnet18, 64 px": ("simclr-conv4.yaml", ["backbone.name=resnet18", *SMALLER]),
    "vicreg, conv4, 40 px": ("vicreg-conv4.yaml", ["data.image_size=40"]),
    "rotation, resnet8, 48 px": ("rotation-conv4.yaml", ["backbone.name=resnet8", "data.image_size=48"]),
}
KEPT = "SSL_DIST_BENCH_KEPT"  # environment variable of the ranks
SKIPPED = 4  # steps at the start that live on batches made ahead
PUBLISHED = {("v100", "fp32"): 367, ("v100", "fp16"): 1200, ("a100", "tf32"): 938, ("a100", "bf16"): 2470}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that `ssl-dist convert` wrote")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a training")
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="parts of their names (default: all)")
    parser.add_argument("--published", action="store_true")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(*arguments.worker)
    elif arguments.published:
        compare_published()
    elif arguments.data is None:
        parser.error("give --data or --published")
    else:
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    from ssl_dist.data import manifest

    manifest.load(arguments.data)  # one that is missing shows before minutes of measuring
    names = [name for name in CASES if any(part in name for part in arguments.cases)]
    row = "{:34} {:>5} {:>10} {:>9} {:>6} {:>10} {:>9} {:>6}  {}"
    columns = ("", "ranks", "wall, ms", "measured", "ratio", "CPU, ms", "measured", "ratio", "bound by")
    print(row.format(*columns), flush=True)
    found = []
    for ranks in arguments.ranks:
        rounds = []
        for _ in range(arguments.rounds):
            rates = bench_rates.measured(ranks, arguments.rounds)
            rounds.append([compare_case(name, ranks, rates, arguments) for name in names])
        for name, *tries in zip(names, *rounds, strict=True):
            figures = [statistics.median(values) for values in zip(*(times for times, _ in tries), strict=True)]
            wall, measured_wall, cpu, measured_cpu = (f"{1e3 * seconds:.1f}" for seconds in figures)
            ratios = (f"{statistics.median(t[i] / t[i + 1] for t, _ in tries):.2f}" for i in (0, 2))
            wall_ratio, cpu_ratio = ratios
            of_wall, of_cpu = (rows.ratio([t[i] for t, _ in tries], [t[i + 1] for t, _ in tries]) for i in (0, 2))
            result = f"{wall} ms beside {measured_wall} ms measured: {of_wall}"
            result += f"; of CPU time {cpu} ms beside {measured_cpu} ms: {of_cpu}"
            found.append((f"a step as explain predicts it, {name}, {ranks} rank(s)", result))
            cells = (name, ranks, wall, measured_wall, wall_ratio, cpu, measured_cpu, cpu_ratio, tries[0][1])
            print(row.format(*cells), flush=True)
    rows.show(found)


def compare_case(name: str, ranks: int, rates: dict, arguments: argparse.Namespace) -> tuple[list[float], str]:
    """Seconds of a step: wall time predicted and measured, CPU time predicted and measured; what bounds it."""
    from ssl_dist.data import manifest

    file, overrides = CASES[name]
    config = ROOT / "configs" / "digits" / file
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            f"run_dir={folder}/run", f"data.root={arguments.data.resolve()}",
            f"data.name={manifest.load(arguments.data).name}", "data.reader=arrays", "optim.epochs=null",
            f"optim.steps={SKIPPED + arguments.steps + 1}", "checkpoint.every_epochs=null", "log.every_steps=1000",
            *overrides,
        ]  # fmt: skip
        kept = ranks >= available_cores()
        wall, cpu, bound = predicted(config, settings, ranks, rates, kept)
        measured_wall, measured_cpu = trained(config, settings, ranks, kept)
    return [wall, measured_wall, cpu, measured_cpu], bound


def predicted(config: Path, settings: list[str], ranks: int, rates: dict, kept: bool) -> tuple[float, float, str]:
    """Seconds of a step by the wall (kept: with views that are there), those in which a rank computes, and what bounds
    it."""
    from ssl_dist.config import load, validate
    from ssl_dist.distributed.rank import RankInfo
    from ssl_dist.run.blueprint import derive
    from ssl_dist.train import operations, roofline

    plan, device = derive(load(config, settings), RankInfo(0, ranks, 0, ranks)), validate(roofline.Device, rates)
    times = roofline.estimate(operations.count(plan, "cpu"), plan, device)
    return times.device if kept else times.step, times.computing, times.bound


def trained(config: Path, settings: list[str], ranks: int, kept: bool) -> tuple[float, float]:
    """Seconds of the fastest step by the wall, and of the one that takes rank 0 the least CPU time. kept: the views of
    the first step are those of all."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*torchrun, __file__, "--worker", str(config), *settings]
    environment = os.environ | bench_rates.TUNED | ({KEPT: "1"} if kept else {})
    completed = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [line for line in completed.stdout.splitlines() if line.startswith("[")]
    if completed.returncode or not lines:
        sys.exit(f"{completed.stderr[-3000:]}\nthe training of {config} failed")
    wall, cpu = json.loads(lines[-1])
    return wall, cpu


def work(config: str, *settings: str) -> None:
    """Train as one of the ranks; rank 0 prints what `trained` returns."""
    import torch

    from ssl_dist import methods
    from ssl_dist.config import load
    from ssl_dist.data.loader import TrainLoader
    from ssl_dist.train.loop import train

    torch.set_num_threads(1)
    settings_, ends = load(config, settings), []
    method = methods.find(settings_.method.name)
    after_step = method.after_step

    def note(self, clock):
        after_step(self, clock)
        ends.append((time.perf_counter(), time.thread_time()))

    method.after_step = note
    if KEPT in os.environ:
        make, kept = TrainLoader._next, []

        def again(loader, step, *others):
            if not kept:
                kept.append(make(loader, step, *others))
            return replace(kept[0], step=step)

        TrainLoader._next = again
    if train(settings_) != 0:
        sys.exit(1)
    if os.environ["RANK"] == "0":
        print(
            json.dumps(
                [min(b - a for a, b in itertools.pairwise(times)) for times in zip(*ends[SKIPPED:], strict=True)]
            )
        )


def compare_published() -> None:
    import torch
    from torch import nn

    from ssl_dist import backbones
    from ssl_dist.train import operations, roofline

    print("ResNet-50, 224 px, batches of 256: images a second of one GPU")
    found = []
    for (name, precision), published in PUBLISHED.items():
        device = roofline.named(name)
        dtype = torch.bfloat16 if precision in ("bf16", "fp16") else torch.float32
        with torch.device("meta"):
            network = nn.Sequential(backbones.build("resnet50"), nn.Linear(2048, 1000)).to(dtype).train()
            step = operations.count_network(network, torch.empty(256, 3, 224, 224, dtype=dtype))
        seconds = sum(max(device.seconds(operation, precision)) for operation in step.operations)
        rate = 256 / seconds
        print(f"{name} {precision}: predicted {rate:,.0f}, published {published:,}, ratio {rate / published:.2f}")
        result = f"{rate:,.0f} beside {published:,} published: {rows.ratio([rate], [published])}"
        what = "images a second as explain predicts them, ResNet-50, 224 px, batches of 256"
        found.append((f"{what}, one {name.upper()}, {precision}", result))
    rows.show(found)


if __name__ == "__main__":
    sys.exit(outcome.of_program(main))
