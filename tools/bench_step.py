"""Time of a training step beside a straightforward port of the official relational-reasoning loop.

    python tools/bench_step.py --data data/cifar10 [--views 32] [--images 64] [--rounds 5] [--steps 6]

The port: torchvision views of PIL images made by two DataLoader workers, K tensors a batch, pairs built by
concatenation block after block, Linear-BatchNorm-LeakyReLU-Linear, focal BCE, one Adam. Ours: the loop of `ssl_dist
train` on the same images, eager, fp32, with its own loader. Both read a data set that `ssl-dist convert` wrote. Each
side is a process of its own; the two take turns in one run, in the default environment and in one that has for the
port, too, what `ssl-dist` sets in its process (allocator and idle threads). Wall time, medians, ratios. --beside
compiled: the same loop with `compile=true` in the port's place. --beside official: the official code's own dataset,
transforms, network and training loop, out of a checkout:

    git clone https://github.com/mpatacchiola/self-supervised-relational-reasoning official
    python tools/bench_step.py --data data/cifar10 --beside official --official official
"""

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import rows  # beside this file

from ssl_dist import outcome, process
from ssl_dist.data import manifest
from ssl_dist.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

TUNED = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592",
}
ENVIRONMENTS = {"default": {}, "tuned": TUNED}
OTHERS = {
    "port": "of a port of the official loop",
    "official": "of the official code's own files",
    "compiled": "with compile=true",
}
LOOP = "methods/relationnet.py"  # of the official code
SKIPPED = 3  # steps at the start of a turn that live on batches made ahead


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder that `ssl-dist convert` wrote (CIFAR-10)")
    parser.add_argument("--views", type=int, default=32)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--backbone", default="conv4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="timed steps a turn")
    parser.add_argument("--reader", choices=["ffcv", "arrays"], default="ffcv", help="of our side")
    parser.add_argument("--environments", nargs="+", choices=list(ENVIRONMENTS), default=list(ENVIRONMENTS))
    parser.add_argument("--beside", choices=list(OTHERS), default="port")
    parser.add_argument("--official", type=Path, metavar="FOLDER", help="checkout of the official code")
    parser.add_argument("--worker", choices=list(SIDES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.beside == "official" and not (arguments.official and (arguments.official / LOOP).exists()):
        given = f" {arguments.official}" if arguments.official else ""
        raise UserError(f"--official{given}: give a checkout of the official code, which has {LOOP}")
    if arguments.worker:
        if arguments.worker in ("ours", "compiled"):
            process.prepare()  # as the program does
        serve(SIDES[arguments.worker](arguments))
        return
    manifest.load(Path(arguments.data))  # a mistake in it shows here, in one line
    print(f"{arguments.backbone}, M = {arguments.images}, K = {arguments.views}, fp32, eager; ms per step, medians")
    found = []
    for name in arguments.environments:
        environment = {k: v for k, v in os.environ.items() if k not in TUNED} | ENVIRONMENTS[name]
        sides = {side: start(side, environment) for side in (arguments.beside, "ours")}
        times: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(arguments.rounds):
            for side, worker in sides.items():
                worker.stdin.write("turn\n")
                worker.stdin.flush()
                if not (seconds := worker.stdout.readline()):
                    sys.exit(worker.wait())  # it has said why
                times[side].append(1000 * statistics.median(json.loads(seconds)))
        for worker in sides.values():
            worker.stdin.close()
            worker.wait()
        other = times[arguments.beside]
        ratios = [a / b for a, b in zip(other, times["ours"], strict=True)]
        print(
            f"{name} environment: {arguments.beside} {statistics.median(other):.0f}, "
            f"ours {statistics.median(times['ours']):.0f}, ratio {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f}-{max(ratios):.2f})"
        )
        what = f"training step, {arguments.backbone}, M = {arguments.images}, K = {arguments.views}, fp32"
        result = rows.beside(times["ours"], {OTHERS[arguments.beside]: other}, " ms")
        found.append((f"{what}, {name} environment", result))
    rows.show(found)


def start(side: str, environment: dict[str, str]) -> subprocess.Popen:
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", side]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def serve(side) -> None:
    """Run a turn for every line on stdin; print the seconds of its steps as JSON."""
    for _ in sys.stdin:
        print(json.dumps(side.turn()), flush=True)


class InMemory:
    """Images as torchvision's CIFAR10 has them, pixels uint8 [N, H, W, 3] in memory: each access makes one of PIL."""

    def __init__(self, pixels: "np.ndarray"):
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> "Image":
        from PIL import Image

        return Image.fromarray(self.pixels[index])


class InFiles:
    """Images as torchvision's ImageFolder has them, in a folder a class: each access reads a file."""

    def __init__(self, folder: Path):
        from torchvision.datasets import ImageFolder

        self.folder = ImageFolder(folder)

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> "Image":
        return self.folder[index][0]


def pixels_of(data: str | Path, split: str, limit: int | None = None) -> "np.ndarray":
    """Those of the first images of a converted split, all of one size, uint8 [N, H, W, 3]."""
    import numpy as np

    from ssl_dist.data.readers import Dataset

    with Dataset(data, reader="arrays").open(split) as reader:
        [(pixels, _, _, _)] = list(reader.batches([np.arange(reader.info.count)[:limit]]))
    return pixels


def require_same_images(images: Path, data: Path, split: str) -> None:
    """Raises `UserError` unless a folder of image files has as many images of the split as the converted data set."""
    from ssl_dist.data import manifest
    from ssl_dist.run.embedder import files_of

    found, count = len(files_of(images / split)), manifest.load(data).splits[split].count
    if found != count:
        raise UserError(
            f"--images {images}: holds {found} images in {split}, and {data} {count}; give the folder that it was made "
            "from"
        )


class Port:
    """A straightforward port of the official training loop. images: None: the first ones of the training split."""

    def __init__(self, arguments, images: InMemory | InFiles | None = None):
        import torch
        from torch import nn
        from torchvision import transforms

        from ssl_dist import backbones
        from ssl_dist.data.readers import Dataset

        self.torch, self.arguments = torch, arguments
        self.images = InMemory(pixels_of(arguments.data, "train", 4096)) if images is None else images
        self.info = Dataset(arguments.data).info("train")
        jitter = transforms.ColorJitter(0.8, 0.8, 0.8, 0.2)
        self.transform = transforms.Compose([
            transforms.RandomResizedCrop(32),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([jitter], 0.8),
            transforms.RandomGrayscale(0.2),
            transforms.ToTensor(),
            transforms.Normalize(self.info.mean, self.info.std),
        ])  # fmt: skip
        self.backbone = backbones.build(arguments.backbone)
        width = 2 * self.backbone.feature_dim
        self.head = nn.Sequential(nn.Linear(width, 256), nn.BatchNorm1d(256), nn.LeakyReLU(), nn.Linear(256, 1))
        self.optimizer = torch.optim.Adam([*self.backbone.parameters(), *self.head.parameters()], 1e-3)
        self.loader = torch.utils.data.DataLoader(
            self, arguments.images, shuffle=True, num_workers=2, drop_last=True, collate_fn=self.collate
        )

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index]
        return [self.transform(image) for _ in range(self.arguments.views)]

    def collate(self, samples):
        return [self.torch.stack(view) for view in zip(*samples, strict=True)]

    def turn(self) -> list[float]:
        seconds, last = [], time.perf_counter()
        for number, views in enumerate(self.loader):
            self.step(views)
            now = time.perf_counter()
            if number >= SKIPPED:
                seconds.append(now - last)
            last = now
            if len(seconds) == self.arguments.steps:
                break
        return seconds

    def step(self, views):
        torch = self.torch
        features = self.backbone(torch.cat(views)).chunk(len(views))
        pairs, targets, shift = [], [], 1
        for a in range(len(views)):
            for b in range(a + 1, len(views)):
                pairs.append(torch.cat([features[a], features[b]], 1))
                pairs.append(torch.cat([features[a], torch.roll(features[b], shift, 0)], 1))
                targets += [torch.ones(len(features[a])), torch.zeros(len(features[a]))]
                shift = shift + 1 if shift + 1 < len(features[a]) else 1
        logits, target = self.head(torch.cat(pairs)).squeeze(1), torch.cat(targets)
        bce = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
        p = torch.sigmoid(logits)
        loss = (0.5 * (1 - (target * p + (1 - target) * (1 - p))) ** 2 * bce).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        (torch.round(p) == target).float().mean().item()


class Official:
    """The official code's own files, with the first 4,096 images and two workers, as the port. Left out: the download
    of CIFAR-10, its labels, which the loop does not use, and memory pinned for a GPU."""

    def __init__(self, arguments):
        sys.path.insert(0, str(arguments.official.resolve()))
        import torch
        from datamanager import DataManager, MultiCIFAR10
        from methods.relationnet import Model

        self.steps = arguments.steps
        dataset = MultiCIFAR10.__new__(MultiCIFAR10)
        dataset.repeat_augmentations, dataset.target_transform = arguments.views, None
        dataset.transform = DataManager(0).get_train_transforms("relationnet", "cifar10")
        dataset.data = pixels_of(arguments.data, "train", 4096)
        dataset.targets = [0] * len(dataset.data)
        self.loader = torch.utils.data.DataLoader(dataset, arguments.images, shuffle=True, num_workers=2)
        self.model = Model(self._backbone(arguments.backbone), "cpu")

    @staticmethod
    def _backbone(name: str):
        if name == "conv4":
            from backbones.conv4 import Conv4

            return Conv4()
        if name == "resnet32":
            from backbones.resnet_small import BasicBlock, ResNet

            return ResNet(BasicBlock, [5, 5, 5], channels=[16, 32, 64], flatten=True)
        raise UserError(f"--backbone {name}: --beside official has conv4 and resnet32")

    def turn(self) -> list[float]:
        got = []  # when the loop got a batch, and the time of the step before ends

        def batches():
            for number, batch in enumerate(self.loader):
                got.append(time.perf_counter())
                if number == SKIPPED + self.steps:
                    break
                yield batch

        with contextlib.redirect_stdout(sys.stderr):
            self.model.train(0, batches())
        return [b - a for a, b in itertools.pairwise(got)][SKIPPED:]


class Ours:
    """`ssl_dist.train.fit` itself, stopped after the steps of a turn."""

    compiled = False

    def __init__(self, arguments):
        from ssl_dist import config
        from ssl_dist.data.readers import Dataset

        self.temporary = tempfile.TemporaryDirectory(prefix="bench-step-")  # removed when this process ends
        self.arguments, self.folder = arguments, Path(self.temporary.name)
        tree = {
            "run_dir": str(self.folder / "run"),
            "data": {"name": Dataset(arguments.data).name, "root": arguments.data, "reader": arguments.reader},
            "views": {"num": arguments.views},
            "backbone": {"name": arguments.backbone},
            "optim": {"batch_size": arguments.images, "epochs": None, "steps": 1},
            "checkpoint": {"every_epochs": None},
            "compile": self.compiled,
        }
        self.config = config.validate(config.Config, tree)
        self.steps = 0

    def turn(self) -> list[float]:
        from ssl_dist.distributed.rank import RankInfo
        from ssl_dist.distributed.world import one_process
        from ssl_dist.run.blueprint import derive
        from ssl_dist.train.loop import claimed
        from ssl_dist.train.state import TrainState

        num_steps = SKIPPED + self.arguments.steps
        changed = self.config.model_copy(
            update={
                "optim": self.config.optim.model_copy(update={"steps": num_steps}),
                "run_dir": str(self.folder / f"run-{self.steps}"),
            }
        )
        self.steps += 1
        with one_process() as world, claimed(blueprint := derive(changed, RankInfo()), world):
            return self.steps_of(TrainState(blueprint, world))

    def steps_of(self, run) -> list[float]:
        from ssl_dist.distributed.signals import StopRequest
        from ssl_dist.train.loop import fit

        ends = []
        after_step = run.method.after_step

        def note(clock):
            ends.append(time.perf_counter())
            return after_step(clock)

        run.method.after_step = note
        with StopRequest() as stop:
            fit(run, stop)
        return [b - a for a, b in itertools.pairwise(ends)][SKIPPED - 1 :]


class Compiled(Ours):
    compiled = True


SIDES = {"port": Port, "official": Official, "compiled": Compiled, "ours": Ours}

if __name__ == "__main__":
    sys.exit(outcome.of_program(main))
