"""Images a second of a DataLoader that makes SimCLR's views: ssl_dist.MultiView beside torchvision's transforms (v2) on
PIL images, and lightly's where it is installed, interleaved in one run; and levels in place of floats.

    python tools/bench_multi_view.py
    python tools/bench_multi_view.py --images FOLDER --views 8 --workers 8

Every side gets the same JPEG files, which Pillow decodes once an image; the recipe is SimCLR's with its blur, and
tensors are normalised: in the workers, and for `dtype=torch.uint8` by the loop (`MultiView.to_float`), which waits for
batches otherwise. A round passes all images through each side once, in workers that live on; the table has the medians
of the rounds, without the first, which starts the workers.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import rows  # beside this file
import torch
from bench_views import smooth_noise  # beside this file
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

import ssl_dist
from ssl_dist import outcome
from ssl_dist.run.embedder import IMAGENET, files_of

MEAN, STD = IMAGENET.mean, IMAGENET.std
FLOATS, LEVELS = "ssl_dist.MultiView", "the same, uint8"


class Photos(Dataset):
    """The files as PIL images, transformed."""

    def __init__(self, files: list[Path], transform: Callable | None = None):
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int):
        image = Image.open(self.files[index]).convert("RGB")
        return image if self.transform is None else self.transform(image)


def _blurred(image: Image.Image) -> Image.Image:
    """By Pillow, as the kernel blurs and most published scripts do."""
    return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def by_torchvision(size: int, num_views: int) -> Callable:
    one = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.08, 1.0)),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.Lambda(_blurred)], p=0.5),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    return lambda image: torch.stack([one(image) for _ in range(num_views)])


def by_lightly(size: int, num_views: int) -> Callable | None:
    try:
        from lightly.transforms import SimCLRTransform
    except ImportError:
        return None
    transform = SimCLRTransform(input_size=size)
    return lambda image: torch.stack([view for _ in range(num_views // 2) for view in transform(image)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of images (default: smooth noise of 500 x 400 pixels)")
    parser.add_argument("--count", type=int, default=256, help="of the images that are made")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--views", type=int, default=2, help="of an image; even")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.images is None:
            for number, pixels in enumerate(smooth_noise(options.count, 400, 500)):
                Image.fromarray(pixels).save(Path(folder, f"{number:05d}.jpg"), quality=90)
        files = files_of(options.images or folder)
        views = ssl_dist.MultiView("simclr", options.views, options.size, (MEAN, STD))
        levels = ssl_dist.MultiView("simclr", options.views, options.size, (MEAN, STD), dtype=torch.uint8)
        sides: dict[str, Dataset] = {
            "torchvision v2": Photos(files, by_torchvision(options.size, options.views)),
            FLOATS: views.over(Photos(files)),
            LEVELS: levels.over(Photos(files)),
        }
        if lightly := by_lightly(options.size, options.views):
            sides["lightly"] = Photos(files, lightly)
        views(Image.open(files[0]))  # compiles
        loaders = {
            name: DataLoader(dataset, 32, num_workers=options.workers, persistent_workers=True)
            for name, dataset in sides.items()
        }
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(1 + options.rounds):
            for name, loader in loaders.items():
                begin = time.perf_counter()
                floats = (levels.to_float(batch) if name == LEVELS else batch for batch in loader)
                assert sum(len(batch) for batch in floats) == len(files)
                if number:  # the pass before starts the workers
                    rates[name].append(len(files) / (time.perf_counter() - begin))
    print(f"{len(files)} images, {options.views} views of {options.size} px, {options.workers} workers")
    base = statistics.median(rates["torchvision v2"])
    for name, values in rates.items():
        middle = statistics.median(values)
        print(f"{name:20} {middle:8.1f} images/s  {middle / base:5.2f} x")
    if "lightly" not in sides:
        print("lightly is not installed")
    what = f"images a second of a DataLoader, {len(files):,} images, {options.views} views of SimCLR, {options.size} px"
    ours = {name: rates.pop(name) for name in (FLOATS, LEVELS)}
    others = {f"of {name}": values for name, values in rates.items()}
    moved = {FLOATS: "", LEVELS: ", moved as uint8"}
    rows.show(
        [
            (f"{what}, {options.workers} worker(s){moved[name]}", rows.beside(ours[name], others, is_rate=True))
            for name in ours
        ]
    )
    return 0


if __name__ == "__main__":
    sys.exit(outcome.of_program(main))
