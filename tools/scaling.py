"""The tables of docs/scaling.md: what bounds a step on 1 to 512 GPUs, estimated as `ssl-dist explain` does.

    python tools/scaling.py [--device h100] [--rows conv4 ...] [--gpus 1 8 64 512] > tables.md

Nodes have 8 GPUs. No data is needed: of a data set the number of its images counts, and how large they are.
"""

import argparse
import sys
from pathlib import Path

from ssl_dist import outcome
from ssl_dist.config import Config, load
from ssl_dist.data.unconverted import Unconverted
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.run.blueprint import RunPlan, derive
from ssl_dist.train import operations, roofline
from ssl_dist.train.operations import Step
from ssl_dist.train.roofline import Device, Times

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
PER_NODE, GPUS = 8, [1, 8, 64, 512]
AT_224 = ["backbone.name=resnet50", "data.name=imagenet", "data.image_size=224", "precision=bf16"]
ROWS = [  # title, config, overrides
    ("relational, conv4, 32 px, K = 32, M = 64, fp32", "cifar10/relational-conv4.yaml", []),
    (
        "relational, conv4, 32 px, K = 32, M = 4,096, bf16",
        "cifar10/relational-conv4.yaml",
        ["optim.batch_size=4096", "precision=bf16"],
    ),
    (
        "relational, resnet50, 224 px, K = 8, M = 2,048, bf16",
        "slimagenet64/relational-resnet34.yaml",
        [*AT_224, "views.num=8", "optim.batch_size=2048"],
    ),
    ("vicreg, resnet50, 224 px, M = 2,048, bf16", "imagenet/vicreg-resnet50.yaml", []),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="h100", help="of ssl_dist/train/devices.yaml (default %(default)s)")
    parser.add_argument("--rows", nargs="+", help="parts of their titles (default: all)")
    parser.add_argument("--gpus", nargs="+", type=int, default=GPUS)
    arguments = parser.parse_args()
    device = roofline.named(arguments.device)
    for title, config, overrides in ROWS:
        if arguments.rows is None or any(part in title for part in arguments.rows):
            print("\n".join(table(title, load(CONFIGS / config, overrides), device, arguments.gpus)), flush=True)


def table(title: str, config: Config, device: Device, gpus: list[int]) -> list[str]:
    """The lines of a row's section, in Markdown."""
    lines = [
        f"## {title}",
        "",
        "| GPUs | a GPU has | arithmetic | memory | network | starting | upload | loader | ms a step | images/s "
        "| of linear | bound by |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    shown, first_rate = [], 0.0
    for count in gpus:
        plan = plan_of(config, count)
        step = operations.count(plan, "cuda")
        times = roofline.estimate(step, plan, device)
        rate = config.optim.batch_size / times.step
        first_rate = first_rate or rate / count
        parts = [times.arithmetic, times.memory, times.network, times.host, times.upload, times.loader, times.step]
        milliseconds = " | ".join(figure(1e3 * seconds) for seconds in parts)
        views = plan.num_views // plan.grid.views
        images = config.optim.batch_size // plan.grid.images
        share = f"{images:,} image{'s' * (images > 1)} x {views} view{'s' * (views > 1)}"
        linear = f"{figure(100 * rate / count / first_rate)} %"
        lines.append(f"| {count} | {share} | {milliseconds} | {rate:,.0f} | {linear} | {times.bound} |")
        if count > 1:
            shown += ["", *arithmetic(count, step, times, device, config.precision)]
    return [*lines, *shown, ""]


def plan_of(config: Config, count: int) -> RunPlan:
    """On `count` GPUs, for a data set of which nothing is read."""
    dataset = Unconverted(config.data.name, config.data.root, config.data.reader)
    return derive(config, RankInfo(0, count, 0, min(count, PER_NODE)), dataset)


def arithmetic(count: int, step: Step, times: Times, device: Device, precision: roofline.Precision) -> list[str]:
    """How the figures of a row of the table come about, as a list."""
    by_arithmetic, by_memory = [], []
    for operation in step.operations:
        flops_s, bytes_s = device.seconds(operation, precision)
        (by_arithmetic if flops_s >= bytes_s else by_memory).append(operation)
    flops, num_bytes = sum(o.flops for o in by_arithmetic), sum(o.num_bytes for o in by_memory)
    peak, share = device.flop_per_s[precision] / 1e12, device.efficiency.get(precision, 1.0)
    memory_peak, memory_share = device.byte_per_s / 1e12, device.efficiency.get("memory", 1.0)
    starts = [f"{len(some)} x {1e6 * device.start_s:g} us" for some in (by_arithmetic, by_memory)]
    calls = f"({len(step.operations)} operations + {len(step.collectives)} collectives)"
    products = [
        ("arithmetic", f"{figure(flops / 1e9)} GFLOP / ({peak:g} TFLOP/s x {share}) + {starts[0]}", times.arithmetic),
        (
            "memory",
            f"{figure(num_bytes / 1e9)} GB / ({memory_peak:g} TB/s x {memory_share}) + {starts[1]}",
            times.memory,
        ),
        ("starting", f"{calls} x {1e6 * device.launch_s:g} us", times.host),
    ]
    lines = [f"On each of {count} GPUs:", ""]
    lines += [f"- {name}: {product} = {figure(1e3 * seconds)} ms" for name, product, seconds in products]
    for purpose in dict.fromkeys(c.purpose for c in step.collectives):
        some = [c for c in step.collectives if c.purpose == purpose]
        seconds = sum(device.sending(c, PER_NODE) for c in some)
        hidden = ", behind the backward pass" if some[0].overlapped else ""
        sent = sum(c.sent for c in some) / 1e6
        number = f"{len(some)} collective{'s' * (len(some) > 1)}"
        lines.append(f"- {purpose}: {number}, {figure(sent)} MB sent, {figure(1e3 * seconds)} ms{hidden}")
    return lines


def figure(number: float) -> str:
    """Three digits."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


if __name__ == "__main__":
    sys.exit(outcome.of_program(main))
