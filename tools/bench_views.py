"""Views per CPU-second: the view kernel beside torchvision's transforms on PIL images, interleaved in one process.

    OMP_NUM_THREADS=1 python tools/bench_views.py
    OMP_NUM_THREADS=1 python tools/bench_views.py --images FOLDER --rounds 15

Both sides get the same decoded images and the same recipe (random resized crop, flip, colour jitter, grayscale: the
defaults of `views.groups`) and give uint8 CHW pixels; reading, decoding and normalising are left out. Each round times
both, one after the other, by the CPU time of this one thread; the table holds the medians of all rounds, so that a
busy machine slows both sides alike. Two cases: 32 px views of 32 x 32 images, 224 px views of 500 x 400 images. The
images are noise made smooth, or, with --images, the image files of a folder (resized to those two shapes).
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from ssl_dist.config import ViewGroup, Views
from ssl_dist.data import views

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}


def smooth_noise(count: int, height: int, width: int) -> np.ndarray:
    """uint8 [count, height, width, 3]: a coarse grid of random colours, enlarged, and a little grain."""
    generator = np.random.default_rng(0)
    images = []
    for _ in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        large = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
        images.append(np.clip(large + generator.integers(-12, 13, large.shape), 0, 255).astype(np.uint8))
    return np.stack(images)


def read_folder(folder: Path, count: int, height: int, width: int) -> np.ndarray:
    """uint8 [<= count, height, width, 3]: the first image files below `folder`, resized."""
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)[:count]
    if not paths:
        sys.exit(f"--images {folder}: no image files ({', '.join(sorted(SUFFIXES))}) there; name another folder")
    return np.stack([np.asarray(Image.open(path).convert("RGB").resize((width, height))) for path in paths])


def torchvision_pipeline(group: ViewGroup, size: int) -> transforms.Compose:
    crop, jitter = group.random_resized_crop, group.color_jitter
    strengths = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=crop.scale, ratio=crop.ratio),
            transforms.RandomHorizontalFlip(group.horizontal_flip),
            transforms.RandomApply([transforms.ColorJitter(*strengths)], p=jitter.p),
            transforms.RandomGrayscale(group.grayscale),
            transforms.PILToTensor(),
        ]
    )


def seconds(function) -> float:
    begin = time.thread_time()
    function()
    return time.thread_time() - begin


def compare(pixels: np.ndarray, size: int, num_views: int, pil_images: int, rounds: int) -> tuple[float, float, float]:
    """Views per CPU-second of torchvision and of the kernel, and the median ratio of the rounds."""
    group = Views().groups[0]
    (spec,) = views.view_specs([group], num_views, size)
    count, height, width = pixels.shape[:3]
    heights, widths, ids = np.full(count, height), np.full(count, width), np.arange(count)
    out = np.empty((num_views, count, 3, size, size), np.uint8)
    transform = torchvision_pipeline(group, size)
    sources = [Image.fromarray(image) for image in pixels[:pil_images]]
    views.warm_up(spec)

    torchvision_rates, kernel_rates = [], []
    for epoch in range(rounds):
        torch.manual_seed(epoch)
        taken = seconds(lambda: [transform(source) for source in sources])
        torchvision_rates.append(len(sources) / taken)
        taken = seconds(
            lambda epoch=epoch: views.make_views(
                pixels, heights, widths, ids, spec, spec.view_ids, seed=0, epoch=epoch, out=out
            )
        )
        kernel_rates.append(count * num_views / taken)
    ratios = [kernel / pil for kernel, pil in zip(kernel_rates, torchvision_rates, strict=True)]
    return statistics.median(torchvision_rates), statistics.median(kernel_rates), statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of image files; without it, images are made")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each case (default %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    print(f"{'views':24s} {'torchvision PIL':>16s} {'kernel':>10s} {'ratio':>7s}   (views per CPU-second, medians)")
    # source height and width, view size, images, views of each, images of torchvision's side
    for height, width, size, count, num_views, pil_images in ((32, 32, 32, 128, 32, 512), (400, 500, 224, 16, 4, 16)):
        if arguments.images:
            pixels = read_folder(arguments.images, count, height, width)
        else:
            pixels = smooth_noise(count, height, width)
        pil, kernel, ratio = compare(pixels, size, num_views, pil_images, arguments.rounds)
        print(f"{f'{size} px of {width} x {height}':24s} {pil:16,.0f} {kernel:10,.0f} {ratio:6.1f}x")


if __name__ == "__main__":
    main()
