"""New labels of SeLa by Sinkhorn-Knopp: time of an iteration and peak memory, on one process and on several.

    python tools/bench_sinkhorn.py [--images 100000] [--clusters 3000] [--processes 1 2] [--rounds 5] [--dtype fp64]

The features of all images are random; a head makes scores of them and Sinkhorn-Knopp works on these in place, as in a
training. "plain" is the iteration as the official code writes it, with numpy, on one process: two passes over the
array in place of one. Each takes a turn in every round, in processes of its own with one thread each. Time: wall and
CPU, of an iteration, medians over the rounds (CPU: of a process). Memory: the largest resident size, less that before
there were features; "counted": features and ours' scores, 4 D + 8 K bytes an image (4 K in fp32), over the processes.
"""

import argparse
import contextlib
import multiprocessing
import os
import socket
import statistics
import sys
import time
from pathlib import Path

import rows  # beside this file

from ssl_dist import outcome

ITERATIONS = 11  # of a turn
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000, help="N")
    parser.add_argument("--clusters", type=int, default=3000, help="K")
    parser.add_argument("--features", type=int, default=256, help="D")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=["fp64", "fp32"], default="fp64", help="of our scores")
    arguments = parser.parse_args()
    os.environ |= dict.fromkeys(THREADS, "1")
    sides = {"plain": (plain, 1)} | {f"ours, {size} process(es)": (ours, size) for size in arguments.processes}
    turns: dict[str, list[list[float]]] = {name: [] for name in sides}  # wall ms, CPU ms and peak MiB of every round
    for _ in range(arguments.rounds):
        for name, (side, size) in sides.items():
            wall, cpu, mib = (max(of_ranks) for of_ranks in zip(*in_processes(side, size, arguments), strict=True))
            turns[name].append([1000 * wall, 1000 * cpu, mib])
    print(f"N = {arguments.images}, K = {arguments.clusters}, D = {arguments.features}, {arguments.rounds} rounds")
    print(f"{'':<22} {'wall ms':>8} {'CPU ms':>8} {'peak MiB':>9} {'counted':>8}")
    score_bytes = {"fp64": 8, "fp32": 4}[arguments.dtype]
    counted = arguments.images * (4 * arguments.features + score_bytes * arguments.clusters) / 2**20
    columns = {name: list(zip(*of_side, strict=True)) for name, of_side in turns.items()}
    plain_ms, _, plain_mib = columns["plain"]
    found = []
    for name, (_, size) in sides.items():
        wall, cpu, mib = (statistics.median(column) for column in columns[name])
        print(f"{name:<22} {wall:>8.0f} {cpu:>8.0f} {mib:>9.0f} {counted / size:>8.0f}", flush=True)
        if name != "plain":
            what = f"an iteration of Sinkhorn-Knopp, N = {arguments.images:,}, K = {arguments.clusters:,}"
            result = rows.beside(columns[name][0], {"of numpy in one process": plain_ms}, " ms")
            result += f"; peak memory of a process {mib:,.0f} MiB beside {statistics.median(plain_mib):,.0f} MiB"
            found.append((f"{what}, {arguments.dtype}, {name}", result))
    rows.show(found)


def in_processes(side, size: int, arguments) -> list[tuple[float, float, float]]:
    """Wall and CPU seconds of an iteration and peak MiB, of every process."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [context.Process(target=rank_of, args=(side, r, size, port, arguments, queue)) for r in range(size)]
    for rank in ranks:
        rank.start()
    measurements = [queue.get(timeout=3600) for _ in ranks]
    for rank in ranks:
        rank.join()
    return measurements


def rank_of(side, rank: int, size: int, port: int, arguments, answers) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    answers.put(side(rank, size, arguments))


def peak() -> float:
    """The largest resident size of this process until now, in MiB (the kernel's own count)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


def ours(rank: int, size: int, arguments) -> tuple[float, float, float]:
    import torch

    from ssl_dist.distributed.rank import RankInfo
    from ssl_dist.distributed.world import World, join_world
    from ssl_dist.grid import Grid
    from ssl_dist.methods import sela
    from ssl_dist.methods.base import Info, Rows

    class Enough(Exception):
        pass

    class Clocked(World):
        """Ends the work after some iterations, each of which asks for one sum."""

        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.stamps = []

        def all_reduce_sum(self, x):
            total = super().all_reduce_sum(x)
            if len(x.shape):
                self.stamps.append((time.perf_counter(), time.process_time()))
            if len(self.stamps) > ITERATIONS:
                raise Enough
            return total

    torch.set_num_threads(1)
    options = sela.Options(clusters=arguments.clusters, tolerance=1e-12, sinkhorn_dtype=arguments.dtype)
    sela.Method.warm_up(options, torch.float32)
    rank_info = RankInfo(rank, size, rank, size)
    join_world(rank_info, Grid(size, 1))
    world = Clocked(rank_info, Grid(size, 1), torch.device("cpu"))
    info = Info(arguments.images, 0, ((1, 32),), size, 1.0, arguments.features)
    method = sela.Method(torch.nn.Identity(), info, options)
    before = peak()
    lo, hi = world.share(arguments.images)
    features = torch.randn(hi - lo, arguments.features).relu_()
    with contextlib.suppress(Enough):
        method.relabel([0], Rows(torch.arange(lo, hi), features), world)
    wall, cpu = zip(*world.stamps, strict=True)
    return (wall[-1] - wall[0]) / ITERATIONS, (cpu[-1] - cpu[0]) / ITERATIONS, peak() - before


def plain(rank: int, size: int, arguments) -> tuple[float, float, float]:
    import numpy as np

    before, draw = peak(), np.random.default_rng(0)
    features = np.maximum(draw.standard_normal((arguments.images, arguments.features), np.float32), 0)
    weight = draw.standard_normal((arguments.features, arguments.clusters)) / 16
    scores = features @ weight
    scores -= scores.max(1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(1, keepdims=True)
    P = scores.T
    P **= 25
    c = np.full((arguments.images, 1), 1 / arguments.images)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(ITERATIONS):
        r = (1 / arguments.clusters) / (P @ c)
        c = (1 / arguments.images) / (r.T @ P).T
    return (time.perf_counter() - wall) / ITERATIONS, (time.process_time() - cpu) / ITERATIONS, peak() - before


if __name__ == "__main__":
    sys.exit(outcome.of_program(main))
