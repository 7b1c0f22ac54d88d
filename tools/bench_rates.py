"""The rates of this machine's CPU, for `ssl-dist explain --rates FILE`: what an operation of each kind reaches.

    python tools/bench_rates.py --out rates.yaml [--ranks 2] [--rounds 5]

One thread a rank, float32, the environment that `ssl-dist` makes for itself. --ranks: as many processes as will train
side by side measure at once, each the same thing, because they share memory and caches; the file holds rank 0's times,
the shortest of the rounds. Operators are timed in steps of small networks, where a map has left the cache when it is
needed again; then the kernel for pairs, all-reduces over gloo, Pillow's JPEG decoding, and views. CPU time, which other
work on the machine disturbs less, except for all-reduces. About 15 seconds. None of the networks is a backbone of the
package: tools/bench_prediction.py holds what explain makes of these rates against trainings.
"""

import argparse
import collections
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode_temporarily

from ssl_dist import outcome
from ssl_dist.distributed import gloo_threads
from ssl_dist.train import operations

TUNED = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592",
}
SMALL_BYTES, LARGE_BYTES = 2**14, 2**18  # of operations that take their start alone; whose rate counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file to write (default: print it)")
    parser.add_argument("--ranks", type=int, default=1, help="processes that measure at once (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of which medians are taken (default %(default)s)")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        work(arguments)
        return
    row = measured(arguments.ranks, arguments.rounds)
    if arguments.out:
        arguments.out.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    print(f"{row['name']}, {arguments.ranks} rank(s) at once")
    for name, rate in sorted(row["operations"].items()):
        reached = (
            f"{rate['flop_per_s'] / 1e9:.1f} GFLOP/s"
            if "flop_per_s" in rate
            else f"{rate['byte_per_s'] / 1e9:.1f} GB/s"
        )
        print(f"{name:34} {1e6 * rate['start_s']:7.1f} us + {reached}")
    for rate in row["convolutions"]:
        forward, backward = rate["forward"] / 1e9, rate["backward"] / 1e9
        shape = " ".join(map(str, rate["shape"]))
        print(f"convolution {shape:22} {forward:7.1f} GFLOP/s forward, {backward:.1f} backward")
    print(
        f"product {row['flop_per_s']['fp32'] / 1e9:.1f} GFLOP/s; {1e6 * row['launch_s']:.1f} us of Python an operation"
    )
    node, loader = row["node"], row["loader"]
    print(
        f"all-reduce {1e6 * (node['latency_s'] + node.get('host_s', 0)):.0f} us + {node['byte_per_s'] / 1e9:.2f} GB/s"
    )
    print(f"image {1e6 * loader['image_s']:.0f} us + {loader['decoded'] / 1e6:.0f} million pixels/s")
    for rate in loader["views"]:
        plain, blurred = rate["plain"] / 1e6, rate["blurred"] / 1e6
        print(f"views of {rate['side']} px: {plain:.0f} million pixels/s, {blurred:.0f} blurred")


def measured(ranks: int, rounds: int) -> dict:
    """The row of a device, as `roofline.Device` takes it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            __file__,
            "--ranks",
            str(ranks),
            "--rounds",
            str(rounds),
            "--store",
            f"{folder}/store",
        ]
        processes = [
            subprocess.Popen(
                [*command, "--worker", str(rank)], stdout=subprocess.PIPE, text=True, env=os.environ | TUNED
            )
            for rank in range(ranks)
        ]
        outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        sys.exit("a rank failed")
    return json.loads(outputs[0])


def work(arguments: argparse.Namespace) -> None:
    """Measure as one of the ranks; rank 0 prints the row."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    with gloo_threads.unobtrusive():
        dist.init_process_group(
            "gloo", init_method=f"file://{arguments.store}", rank=arguments.worker, world_size=arguments.ranks
        )
    # The shortest try of several ranks would be one in which the others happened to wait.
    typical = min if arguments.ranks == 1 else statistics.median
    clock = Stopwatch(arguments.rounds, dist.barrier, typical)
    cores = len(os.sched_getaffinity(0))
    row = {
        "name": f"{processor()}, {cores} cores",
        "kind": "cpu",
        "ranks": arguments.ranks,
        "sources": [f"python tools/bench_rates.py --ranks {arguments.ranks}, torch {torch.__version__}"],
        "cores": cores,
        **arithmetic(clock, arguments.rounds),
        "node": collectives(clock, arguments.ranks),
        "loader": loader(clock),
    }
    if arguments.worker == 0:
        print(json.dumps(row))
    dist.destroy_process_group()


class Stopwatch:
    """Seconds of a call on this rank, while the other ranks make the same call."""

    def __init__(self, rounds: int, together: Callable[[], None], typical: Callable[[list[float]], float]):
        """typical: of the times of several rounds."""
        self._rounds, self.together, self.typical = rounds, together, typical

    def __call__(self, call: Callable[[], object], least_s: float = 0.004) -> float:
        """CPU time: other programs on the machine disturb it less; on a quiet one it is the wall's."""
        call()
        start = time.perf_counter()
        call()
        repeats = max(1, round(least_s / max(1e-7, time.perf_counter() - start)))
        return self._typical(call, repeats, time.process_time)

    def wall(self, call: Callable[[], object], repeats: int, now: Callable[[], float] = time.perf_counter) -> float:
        """Of what the ranks do together, so equally often."""
        return self._typical(call, repeats, now)

    def _typical(self, call: Callable[[], object], repeats: int, now: Callable[[], float]) -> float:
        times = []
        for _ in range(self._rounds):
            self.together()
            start = now()
            for _ in range(repeats):
                call()
            times.append((now() - start) / repeats)
        return self.typical(times)


def processor() -> str:
    names = [
        line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return names[0] if names else platform.processor() or platform.machine()


def arithmetic(clock: Stopwatch, rounds: int) -> dict:
    """Rates of operators, from steps of networks; every operation's time is the clock's choice of the rounds."""
    import torch

    from ssl_dist.nn import batchnorm

    timed, seen = [], Seen()
    backward = batchnorm._Normalize.backward
    batchnorm._Normalize.backward = staticmethod(seen.batchnorm("native_batch_norm_backward", 5, backward))
    for network, images in networks():
        network.train().to(memory_format=torch.channels_last)
        for layer in network.modules():
            if isinstance(layer, batchnorm.SyncBatchNorm):
                layer._normalize = seen.batchnorm("native_batch_norm", 3, layer._normalize)
        optimizer = torch.optim.Adam(network.parameters())
        images = images.to(memory_format=torch.channels_last)
        of_rounds = []
        for _ in range(rounds + 1):
            clock.together()
            seen.calls = []
            with seen:
                network(images).square().mean().backward()
                optimizer.step()
            optimizer.zero_grad()
            of_rounds.append(seen.calls)
        for calls in zip(*of_rounds[1:], strict=True):
            timed.append((calls[0][0], clock.typical([seconds for _, seconds in calls])))
    found = rates_of(timed)
    a, b = torch.randn(2, 384, 384)
    return {
        "launch_s": launch(clock, found["add"]["start_s"]),
        "flop_per_s": {"fp32": 2 * 384**3 / clock(lambda: a @ b)},
        "byte_per_s": found["add"]["byte_per_s"],
        "start_s": found["add"]["start_s"],
        "operations": found | {"relation": pairs(clock), "batchnorm_relu": batchnorm_relus(clock)},
        "convolutions": convolutions(timed),
    }


def networks() -> list:
    """(network, images) with the widths and operations that backbones have; none is a backbone of the package."""
    import torch
    from torch import nn

    from ssl_dist.nn.batchnorm import SyncBatchNorm

    def layer(in_, out, kernel=3, stride=1):
        norm = SyncBatchNorm(nn.BatchNorm2d(out), lambda x: x, lambda x: x[None])
        return [nn.Conv2d(in_, out, kernel, stride, kernel // 2, bias=False), norm, nn.ReLU(inplace=True)]

    class Residual(nn.Module):
        def __init__(self, in_, out, stride):
            super().__init__()
            self.long = nn.Sequential(*layer(in_, out, 3, stride), *layer(out, out)[:2])
            self.short = nn.Sequential(*layer(in_, out, 1, stride)[:2]) if stride > 1 else nn.Identity()
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x):
            out = self.long(x)
            out += self.short(x)
            return self.relu(out)

    def end(width):
        norm = SyncBatchNorm(nn.BatchNorm1d(96), lambda x: x, lambda x: x[None])
        return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 96), norm, nn.ReLU(), nn.Linear(96, 48)]

    plain = [*layer(3, 8), *layer(8, 8), nn.AvgPool2d(2), *layer(8, 16), *layer(16, 16), nn.AvgPool2d(2)]
    plain += [*layer(16, 32), *layer(32, 32), nn.AvgPool2d(2), *layer(32, 64), *layer(64, 64), *end(64)]
    narrow = [*layer(3, 16), Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2), *end(64)]
    wide = [*layer(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1), Residual(64, 64, 1), *layer(64, 256, 1), *layer(256, 64, 1)]
    wide += [Residual(64, 128, 2), Residual(128, 256, 2), Residual(256, 512, 2), *end(512)]
    stem = [*layer(3, 64), Residual(64, 64, 1), Residual(64, 128, 2), Residual(128, 256, 2), *end(256)]
    tails = [Residual(256, 512, 2), Residual(512, 512, 1), *end(512)]
    shapes = [(plain, (160, 3, 24, 24)), (narrow, (48, 3, 40, 40)), (wide, (24, 3, 96, 96)), (stem, (12, 3, 28, 28)),
              (tails, (48, 256, 4, 4))]  # fmt: skip
    return [(nn.Sequential(*layers), torch.randn(shape)) for layers, shape in shapes]


class Seen(TorchDispatchMode):
    """The operations of a step on the CPU and their CPU time: `calls`, (operation, seconds)."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        start = time.process_time()
        outputs = function(*args, **(kwargs or {}))
        seconds = time.process_time() - start
        if operation := operations.operation_of(function, args, kwargs or {}, outputs):
            self.calls.append((operation, seconds))
        return outputs

    def batchnorm(self, name, passes, call):
        """`call` of BatchNorm, one operation to us. passes: over a map, see `operations.count`."""

        def timed(*arguments):
            with _pop_mode_temporarily():
                start = time.process_time()
                outputs = call(*arguments)
                seconds = time.process_time() - start
            map_ = next(argument for argument in arguments if hasattr(argument, "numel"))
            num_bytes = passes * 4 * map_.numel()
            self.calls.append((operations.Operation(name, 0.0, num_bytes), seconds))
            return outputs

        return timed


def rates_of(timed: list) -> dict:
    """Name -> seconds of a small call, and bytes a second of what large ones take more."""
    calls = [(operation, seconds) for operation, seconds in timed if not operation.flops]
    any_start = statistics.median(seconds for operation, seconds in calls if operation.num_bytes < SMALL_BYTES)
    found = {}
    for name in sorted({operation.name for operation, _ in calls}):
        of_name = sorted((operation.num_bytes, seconds) for operation, seconds in calls if operation.name == name)
        large = [call for call in of_name if call[0] >= LARGE_BYTES]
        if large:
            rate = sum(num_bytes for num_bytes, _ in large) / sum(seconds for _, seconds in large)
            num_bytes, seconds = of_name[0]
            start = max(0.0, seconds - num_bytes / rate) if num_bytes < LARGE_BYTES else any_start
            start = min(start, 0.9 * min(seconds for _, seconds in large))
            rate = sum(num_bytes for num_bytes, _ in large) / sum(seconds - start for _, seconds in large)
            found[name] = {"start_s": start, "byte_per_s": rate}
    return found


def convolutions(timed: list) -> list:
    """flop/s by shape: of what is neither, forward or backward, seen twice the mean."""
    seconds, flops = collections.defaultdict(float), collections.defaultdict(float)
    for operation, taken in timed:
        if operation.convolution is not None:
            key = operation.convolution, operation.name == "convolution_backward"
            seconds[key] += taken
            flops[key] += operation.flops
    shapes = sorted({shape for shape, _ in seconds})
    rate = {key: flops[key] / seconds[key] for key in seconds}
    return [{"shape": list(shape), "forward": rate[shape, False], "backward": rate[shape, True]} for shape in shapes]


def launch(clock: Stopwatch, start_s: float) -> float:
    """Seconds of Python and autograd, forward and backward, for an operation of a small network."""
    import torch
    from torch import nn

    layers = [layer for _ in range(20) for layer in (nn.Linear(4, 4), nn.ReLU(), nn.LayerNorm(4))]
    network, x = nn.Sequential(*layers), torch.randn(4, 4)

    def step():
        network.zero_grad()
        network(x).sum().backward()

    seconds = clock(step, 0.02)
    count = len(operations.count_network(network.to("meta"), x.to("meta")).operations)
    return max(0.0, seconds / count - start_s)


def batchnorm_relus(clock: Stopwatch) -> dict:
    """Of BatchNorm with its ReLU and pooling; explain counts three operations of it, one forward and two backward."""
    import torch
    from torch import nn

    from ssl_dist.nn.batchnorm import SyncBatchNorm
    from ssl_dist.nn.batchnorm_relu import batchnorm_relu

    layer = SyncBatchNorm(nn.BatchNorm2d(16), lambda x: x, lambda x: x[None])

    def seconds(*shape: int) -> float:
        x = torch.randn(shape).to(memory_format=torch.channels_last).requires_grad_()
        grad = torch.ones_like(batchnorm_relu(layer, x, pooled=True))
        return clock(lambda: batchnorm_relu(layer, x, pooled=True).backward(grad))

    small, large, images = seconds(2, 16, 4, 4), seconds(256, 16, 48, 48), 256
    maps = 5.75  # read and written: x five times, and three times what is a quarter of it
    return {"start_s": small / 3, "byte_per_s": maps * 4 * images * 16 * 48**2 / (large - small)}


def pairs(clock: Stopwatch) -> dict:
    """Of the kernel for the pairs of the relation head."""
    import torch
    from torch import nn

    from ssl_dist.kernels import relation
    from ssl_dist.methods.relational import couples

    def kernel(images, num_views, hidden):
        A, B = torch.randn(2, num_views * images, hidden)
        num_units, labels = num_views * (num_views - 1) // 2 * images, torch.full((images,), -1)
        share = relation.Share(couples(num_views, images), images, 0, num_units)
        bn, last = nn.BatchNorm1d(hidden), nn.Linear(hidden, 1)
        flops = relation.FLOPS_A_PAIR * share.num_pairs * hidden
        return lambda: relation.relation_loss(A, B, bn, 0.01, last, 2.0, 0.5, share, labels, lambda x: x), flops

    start, (call, flops) = clock(kernel(2, 2, 8)[0]), kernel(48, 12, 192)
    return {"start_s": start, "flop_per_s": flops / (clock(call) - start)}


def collectives(clock: Stopwatch, ranks: int) -> dict:
    """Of all-reduces: seconds that a small one waits, CPU seconds that it takes beside, and bytes a second that a rank
    sends in a large one."""
    import torch

    from ssl_dist.distributed.rank import RankInfo
    from ssl_dist.distributed.world import World
    from ssl_dist.grid import Grid

    if ranks == 1:
        return {"byte_per_s": 1e12, "latency_s": 0.0}
    world = World(RankInfo(0, ranks, 0, ranks), Grid(ranks, 1), torch.device("cpu"))
    small, large = torch.zeros(32), torch.zeros(2**20)
    taken = clock.wall(lambda: world.all_reduce_sum(small), 100)
    host_s = clock.wall(lambda: world.all_reduce_sum(small), 100, time.thread_time)
    seconds = clock.wall(lambda: world.all_reduce_sum(large), 4)
    byte_per_s = 2 * (ranks - 1) / ranks * 4 * 2**20 / max(1e-9, seconds - taken)
    return {"byte_per_s": byte_per_s, "latency_s": max(0.0, taken - host_s), "host_s": host_s}


def loader(clock: Stopwatch) -> dict:
    """Of decoding by Pillow, as the arrays reader does it (FFCV takes less), and of views."""
    import numpy as np
    from PIL import Image

    from ssl_dist import views
    from ssl_dist.config import Views, validate

    def decode(data):
        return np.asarray(Image.open(io.BytesIO(data), formats=["JPEG"]).convert("RGB"))

    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    image = np.asarray(coarse.resize((300, 300), Image.Resampling.BICUBIC), np.int16)
    image = (image + generator.integers(-12, 13, image.shape)).clip(0, 255).astype(np.uint8)
    seconds = []
    for side in (24, 300):
        file = io.BytesIO()
        Image.fromarray(image[:side, :side]).save(file, "JPEG", quality=90)
        data = file.getvalue()
        seconds.append(clock(lambda data=data: decode(data)))
    decoded = (300**2 - 24**2) / (seconds[1] - seconds[0])
    recipe = {"num": 4, "random_resized_crop": {}, "color_jitter": {}, "horizontal_flip": 0.5, "grayscale": 0.2}
    rates: list = []
    for side, source, count in ((28, 32, 64), (160, 300, 4)):
        pixels, sides = np.repeat(image[None, :source, :source], count, 0), np.full(count, source)
        images = views.Images(pixels, sides, sides, np.arange(count))
        row = {"side": side}
        for name, more in (("plain", {}), ("blurred", {"gaussian_blur": {"p": 1.0}})):
            [spec] = views.view_specs(validate(Views, {"groups": [recipe | more]}).groups, 4, side)
            views.warm_up(spec)
            epochs = iter(range(10**9))
            taken = clock(lambda s=spec, e=epochs, i=images: views.make_views(i, s, s.view_ids, 0, next(e)))
            row[name] = count * 4 * side**2 / taken
        rates.append(row)
    return {"image_s": seconds[0], "decoded": decoded, "views": rates}


if __name__ == "__main__":
    sys.exit(outcome.of_program(main))
