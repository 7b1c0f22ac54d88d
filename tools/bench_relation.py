"""The relation head: the fused CPU kernel beside the official way, interleaved in one process.

    python tools/bench_relation.py
    python tools/bench_relation.py --views 32 --features 512 --rounds 3

Each side takes representations of K views of 64 images to the loss and back to their gradient and the head's. The
official way concatenates the two members of every pair and sends all pairs through Linear, BatchNorm, LeakyReLU and
Linear; "torch" is our path for GPUs (the first layer computed once per representation). Each round times the three one
after the other by the CPU time of its one thread; the table holds the medians, so that a busy machine slows all alike.
"""

import argparse
import statistics
import sys
import time

import rows  # beside this file
import torch
import torch.nn.functional as F
from torch import nn

from ssl_dist import outcome
from ssl_dist.distributed.world import one_process
from ssl_dist.methods.base import Info
from ssl_dist.methods.relational import Method, Options, couples

NUM_IMAGES = 64


class GivenRepresentations(nn.Module):
    """Stands in for a backbone: returns the given representations."""

    def __init__(self, feature_dim: int):
        super().__init__()
        self.feature_dim = feature_dim


def official(method: Method, z_KMD: torch.Tensor) -> torch.Tensor:
    """Pairs by concatenation, view by view, and the focal loss of the paper."""
    num_views, num_images, _ = z_KMD.shape
    pairs, targets = [], []
    for a, b, shift in couples(num_views, num_images).tolist():
        pairs += [torch.cat([z_KMD[a], z_KMD[b]], 1), torch.cat([z_KMD[a], z_KMD[b].roll(shift, 0)], 1)]
        targets += [torch.ones(num_images), torch.zeros(num_images)]
    head, target = method.relation_module, torch.cat(targets)
    logits = head.linear2(head.act(head.bn1(head.linear1(torch.cat(pairs))))).squeeze(1)
    p = torch.sigmoid(logits)
    pt = p * target + (1 - p) * (1 - target)
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (0.5 * (1 - pt) ** 2 * bce).mean()


def ours(method: Method, z_KMD: torch.Tensor, fused: bool) -> torch.Tensor:
    num_views, num_images, _ = z_KMD.shape
    method.fused = fused
    unknown = torch.full((num_images,), -1)
    return method.relate(z_KMD, unknown, 0, num_views * (num_views - 1) // 2 * num_images, one_process())[0]


def cpu_time(side, method: Method, z_KMD: torch.Tensor) -> tuple[float, float]:
    """Milliseconds, and the loss."""
    z_KMD = z_KMD.clone().requires_grad_()
    method.zero_grad()
    start = time.process_time()
    loss = side(method, z_KMD)
    loss.backward()
    return 1000 * (time.process_time() - start), loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--views", type=int, nargs="+", default=[4, 8, 16, 32], help="K")
    parser.add_argument("--features", type=int, nargs="+", default=[64, 512], help="width of a representation")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # idle ones would spin, which is CPU time
    sides = {
        "official": official,
        "torch": lambda method, z: ours(method, z, fused=False),
        "fused": lambda method, z: ours(method, z, fused=True),
    }
    print(f"M = {NUM_IMAGES}, {torch.get_num_threads()} thread(s), medians of {arguments.rounds} rounds, CPU ms")
    print("   d   K    pairs  official     torch     fused   torch is   fused is")
    found = []
    for features in arguments.features:
        for num_views in arguments.views:
            torch.manual_seed(0)
            info = Info(NUM_IMAGES, 0, ((num_views, 32),), NUM_IMAGES, 1.0, features)
            method = Method(GivenRepresentations(features), info, Options()).train()
            z_KMD = torch.randn(num_views, NUM_IMAGES, features)
            losses = [cpu_time(side, method, z_KMD)[1] for side in sides.values()]  # also warms up
            if max(losses) - min(losses) > 1e-5:
                raise SystemExit(f"the three do not agree: {losses}")
            times = {name: [] for name in sides}
            for _ in range(arguments.rounds):
                for name, side in sides.items():
                    times[name].append(cpu_time(side, method, z_KMD)[0])
            middle = {name: statistics.median(values) for name, values in times.items()}
            pairs = num_views * (num_views - 1) * NUM_IMAGES
            columns = "".join(f"{value:10.1f}" for value in middle.values())
            gains = "".join(f"{middle['official'] / middle[name]:10.1f}x" for name in ("torch", "fused"))
            print(f"{features:4} {num_views:3} {pairs:8}{columns}{gains}", flush=True)
            what = (
                f"relation head, forward and backward, M = {NUM_IMAGES}, K = {num_views}, {features} features, CPU time"
            )
            others = {"by concatenation": times["official"], "of our path for GPUs": times["torch"]}
            found.append((what, rows.beside(times["fused"], others, " ms")))
    rows.show(found)


if __name__ == "__main__":
    sys.exit(outcome.of_program(main))
