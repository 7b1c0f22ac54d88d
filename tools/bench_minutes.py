"""Minutes of training to an accuracy: `ssl_dist train` beside a port of the official relational-reasoning loop.

    python tools/bench_minutes.py --data data/cifar10 [--marks 50 52.5] [--max-minutes 30] [--seeds 1 2 3]

Both train conv4 by the relational method with M images a batch and K views of each, from a seed, in the environment of
`ssl-dist`. Ours: the loop of `ssl_dist train` (`fit`). The port: tools/bench_step.py's, on all training images,
which it holds in memory as torchvision's CIFAR10 does, or, with --images, reads from JPEG files as ImageFolder does.

They take turns, a slice of an epoch each. Behind a slice its clock stands, and the accuracy on the test split of
logistic regression on the backbone's features is measured, by one protocol for both, that of `ssl-dist evaluate RUN
logistic`. The clock counts the training alone, in minutes of wall time: no start, no measuring. A mark is reached at
the end of the first slice with that accuracy or a higher one; a side ends when it has reached all marks, or with the
slice in which its clock passes --max-minutes. Of several seeds: medians, and ratios with the least and the greatest.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import bench_step
import rows  # beside this file

from ssl_dist import outcome
from ssl_dist.data import manifest
from ssl_dist.distributed.rank import available_cores

SIDES = "ours", "port"
Minutes = dict[float, float]  # of training until a mark in percent; without those that were not reached


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder that `ssl-dist convert` wrote (CIFAR-10)")
    parser.add_argument("--images", type=Path, help="folder with the same images as JPEG files: SPLIT/CLASS/*.jpg")
    parser.add_argument("--marks", type=float, nargs="+", default=[50.0, 52.5], help="accuracies in percent")
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64, help="images")
    parser.add_argument("--slice", type=float, default=0.25, help="of an epoch, between two measurements")
    parser.add_argument("--max-minutes", type=float, default=30.0, help="of training, for each side and seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--reader", choices=["ffcv", "arrays"], default="ffcv", help="of our side, and to measure")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        {"ours": train_ours, "port": train_port}[arguments.worker](arguments)
        return
    name = manifest.load(arguments.data).name  # a mistake in --data shows here, in one line
    if arguments.images is not None:
        bench_step.require_same_images(arguments.images, arguments.data, "train")
    case = f"{name}, conv4, M = {arguments.batch}, K = {arguments.views}"
    case += "" if arguments.images is None else ", of JPEG files on the port's side"
    runs = [compare(arguments, case, seed) for seed in arguments.seeds]
    found = []
    for mark in arguments.marks:
        ours, port = ([run[side].get(mark, math.inf) for run in runs] for side in SIDES)
        what = f"training until logistic regression reaches {mark:g} %, {case}"
        found.append((what, result(ours, port, arguments.max_minutes)))
    rows.show(found)


def compare(arguments: argparse.Namespace, case: str, seed: int) -> dict[str, Minutes]:
    """Train both sides and print a line a slice; the marks that each has reached."""
    print(f"{case}, seed {seed}; minutes of training, accuracy in percent")
    print(f"{'epochs':>8}" + "".join(f" {f'{side}, min':>12} {'accuracy':>9}" for side in SIDES), flush=True)
    reached: dict[str, Minutes] = {side: {} for side in SIDES}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-minutes-")))
        running = {side: started(side, seed, folder, stack) for side in SIDES}
        for process in running.values():
            answer(process, folder)  # it is ready, so that none starts while the other's clock runs
        slices = 0
        while running:
            slices += 1
            line = f"{slices * arguments.slice:8.2f}"
            for side in SIDES:
                if side not in running:
                    line += f" {'-':>12} {'-':>9}"
                    continue
                process = running[side]
                process.stdin.write("turn\n")
                process.stdin.flush()
                seconds, accuracy = answer(process, folder)
                line += f" {seconds / 60:12.3f} {accuracy:9.2f}"
                for mark in arguments.marks:
                    if accuracy >= mark:
                        reached[side].setdefault(mark, seconds / 60)
                if reached[side].keys() >= {*arguments.marks} or seconds >= 60 * arguments.max_minutes:
                    del running[side]
            print(line, flush=True)
    return reached


def result(ours: list[float], port: list[float], limit: float) -> str:
    """What was measured for one mark; infinite: not reached."""
    name = "a port of the official loop"
    if max(ours + port) < math.inf:
        return rows.beside(ours, {f"of {name}": port}, " min")
    middles = map(statistics.median, (ours, port))
    words = [f"{rows.figure(m)} min" if m < math.inf else f"not reached within {limit:g} min" for m in middles]
    return f"{words[0]}; {name}: {words[1]}"


def started(side: str, seed: int, folder: Path, stack: ExitStack) -> subprocess.Popen:
    """A process of a side, which ends with the context. What it says and its temporary files go to the folder."""
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", side, "--seeds", str(seed)]
    environment = {"OMP_NUM_THREADS": str(available_cores())} | os.environ | bench_step.TUNED | {"TMPDIR": str(folder)}
    pipe, said = subprocess.PIPE, stack.enter_context((folder / "said").open("a"))
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=said, text=True, env=environment)
    stack.enter_context(process)
    stack.callback(process.terminate)
    return process


def answer(process: subprocess.Popen, folder: Path):
    line = process.stdout.readline()
    if not line:
        sys.exit(f"{(folder / 'said').read_text()[-3000:]}\na training ended with exit code {process.wait()}")
    return json.loads(line)


class Turns:
    """The worker's end: counts steps and their time. After those of a slice it measures, answers and waits."""

    def __init__(self, steps: int, measure: Callable[[], float]):
        self.steps, self.measure = steps, measure
        self.number, self.seconds, self.begun = 0, 0.0, 0.0

    def wait(self) -> bool:
        """Let the clock run with the next turn; whether there is one."""
        there_is_one = bool(sys.stdin.readline())
        self.begun = time.perf_counter()
        return there_is_one

    def after_step(self) -> bool:
        """Whether to go on."""
        self.number += 1
        if self.number % self.steps:
            return True
        self.seconds += time.perf_counter() - self.begun
        print(json.dumps([self.seconds, self.measure()]), flush=True)
        return self.wait()


def steps_of_slice(arguments: argparse.Namespace, num_images: int) -> int:
    return max(1, round(arguments.slice * (num_images // arguments.batch)))


def train_ours(arguments: argparse.Namespace) -> None:
    """`ssl_dist.train.loop.fit`, with a pause after each slice."""
    from ssl_dist import views
    from ssl_dist.distributed.rank import RankInfo
    from ssl_dist.distributed.signals import StopRequest
    from ssl_dist.distributed.world import one_process
    from ssl_dist.kernels import moments
    from ssl_dist.run.blueprint import derive
    from ssl_dist.train.loop import claimed, fit
    from ssl_dist.train.state import TrainState

    side = bench_step.Ours(of_bench_step(arguments))
    endless = side.config.optim.model_copy(update={"steps": 10**6})  # the rate is constant
    plan = derive(side.config.model_copy(update={"optim": endless, "seed": arguments.seeds[0]}), RankInfo())
    for spec in plan.specs:
        views.warm_up(spec, plan.split.pixels)
    plan.method_class.warm_up(plan.options, plan.dtype)
    moments.warm_up(plan.dtype)
    with one_process() as world, claimed(plan, world):
        run = TrainState(plan, world)
        method, data = run.method, plan.config.data
        of_method = method.after_step
        steps = steps_of_slice(arguments, plan.info.num_images)
        turns = Turns(steps, lambda: accuracy(method.encoder(), plan.normalize, data))

        def after_step(clock):
            of_method(clock)
            if not turns.after_step():
                sys.exit()  # nobody asks for another turn

        method.after_step = after_step
        print("null", flush=True)
        if turns.wait():
            fit(run, StopRequest())


def train_port(arguments: argparse.Namespace) -> None:
    import torch

    from ssl_dist.config import Data, Normalize

    torch.manual_seed(arguments.seeds[0])
    if arguments.images is None:
        images = bench_step.InMemory(bench_step.pixels_of(arguments.data, "train"))
    else:
        images = bench_step.InFiles(arguments.images / "train")
    port = bench_step.Port(of_bench_step(arguments), images)
    normalize = Normalize(mean=port.info.mean, std=port.info.std)
    data = Data(root=str(arguments.data), reader=arguments.reader)
    turns = Turns(steps_of_slice(arguments, len(images)), lambda: accuracy(port.backbone, normalize, data))
    print("null", flush=True)
    if not turns.wait():
        return
    while True:
        for views in port.loader:
            port.step(views)
            if not turns.after_step():
                return


def of_bench_step(arguments: argparse.Namespace) -> argparse.Namespace:
    """The same case in its words."""
    case = {"data": str(arguments.data), "reader": arguments.reader, "backbone": "conv4"}
    return argparse.Namespace(**case, views=arguments.views, images=arguments.batch)


def accuracy(backbone, normalize, data) -> float:
    """Percent of the test split, by logistic regression on the features of both splits at its optimum."""
    import numpy as np
    import torch

    from ssl_dist import evaluate
    from ssl_dist.data.normalize import normalized
    from ssl_dist.data.readers import Dataset
    from ssl_dist.device import CPU
    from ssl_dist.distributed.world import one_process
    from ssl_dist.progress import Progress
    from ssl_dist.run.encoder import outputs

    dataset, to_input = Dataset(data.root, reader=data.reader), normalized(normalize, torch.float32, CPU)
    features_and_labels = []
    backbone.eval()
    for split in (dataset.uses.training, dataset.uses.evaluation):
        with dataset.open(split) as reader, Progress(split, reader.info.count, "image", quiet=True) as progress:
            ids = np.arange(reader.info.count)
            world, threads = one_process(), available_cores()
            made = outputs(lambda pixels: backbone(to_input(pixels)), reader, ids, data, threads, world, progress)
            features_and_labels += [np.concatenate([*made]), dataset.labels(split)]
    backbone.train()
    return evaluate.logistic(*features_and_labels)["logistic_top1"]


if __name__ == "__main__":
    sys.exit(outcome.of_program(main))
