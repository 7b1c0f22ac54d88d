"""Views per CPU-second: the view kernel beside torchvision's transforms on PIL images, interleaved in one process.

    python tools/bench_views.py
    python tools/bench_views.py --images FOLDER --rounds 15

Both sides get the same decoded images and the same recipe and give uint8 CHW pixels; reading, decoding and normalising
are left out. Each round times both, one after the other, by the CPU time of this one thread; the table holds the
medians of all rounds, so that a busy machine slows both sides alike. Four cases: the defaults of `views.groups` (random
resized crop, flip, colour jitter, grayscale) at 32 px of 32 x 32 images and at 224 px of 500 x 400 images; VICReg's two
views (bicubic, Pillow's blur, solarize) at 224 px; ReLIC's global views (torchvision's blur of 3 x 3 pixels, solarize)
at 32 px. The images are noise made smooth, or, with --images, the image files of a folder (resized to the two shapes).
"""

import argparse
import random
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import rows  # beside this file
import torch
from PIL import Image, ImageFilter
from torchvision import transforms

from ssl_dist import outcome, views
from ssl_dist.config import ViewGroup, Views, validate
from ssl_dist.errors import UserError

STEPS = {"horizontal_flip": 0.5, "grayscale": 0.2}
VICREG = {"random_resized_crop": {"interpolation": "bicubic"}, **STEPS}
VICREG["color_jitter"] = {"p": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
RECIPES = {
    "default": [{"num": 1, "random_resized_crop": {}, "color_jitter": {}, **STEPS}],
    "VICReg": [
        {"num": 1, **VICREG, "gaussian_blur": {"p": 1.0}},
        {"num": 1, **VICREG, "gaussian_blur": {"p": 0.1}, "solarize": {"p": 0.2}},
    ],
    "ReLIC": [
        {
            "num": 1,
            "random_resized_crop": {"scale": [0.1, 1.0]},
            "color_jitter": {},
            **STEPS,
            "gaussian_blur": {"p": 1.0, "kernel": 3},
            "solarize": {"p": 0.2, "threshold": 127},
        }
    ],
}
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
        raise UserError(f"--images {folder}: no image files ({', '.join(sorted(SUFFIXES))}) there; name another folder")
    return np.stack([np.asarray(Image.open(path).convert("RGB").resize((width, height))) for path in paths])


def torchvision_blur(kernel: int | None, sigma: tuple[float, float]):
    if kernel is not None:
        return transforms.GaussianBlur(kernel, sigma)
    return lambda image: image.filter(ImageFilter.GaussianBlur(random.uniform(*sigma)))


def torchvision_pipeline(group: ViewGroup, size: int) -> transforms.Compose:
    crop, jitter, blur = group.random_resized_crop, group.color_jitter, group.gaussian_blur
    strengths = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    interpolation = transforms.InterpolationMode(crop.interpolation)
    steps = [
        transforms.RandomResizedCrop(size, scale=crop.scale, ratio=crop.ratio, interpolation=interpolation),
        transforms.RandomHorizontalFlip(group.horizontal_flip),
        transforms.RandomApply([transforms.ColorJitter(*strengths)], p=jitter.p),
        transforms.RandomGrayscale(group.grayscale),
    ]
    if blur is not None:
        steps.append(transforms.RandomApply([torchvision_blur(blur.kernel, blur.sigma)], p=blur.p))
    if group.solarize is not None:
        steps.append(transforms.RandomSolarize(group.solarize.threshold, group.solarize.p))
    return transforms.Compose([*steps, transforms.PILToTensor()])


def seconds(function) -> float:
    begin = time.thread_time()
    function()
    return time.thread_time() - begin


def compare(pixels, name: str, size: int, num_views: int, pil_images: int, rounds: int) -> list[list[float]]:
    """Views per CPU-second of torchvision and of the kernel, of every round.

    pixels uint8 [N, H, W, 3]. The groups of the recipe `name` share the `num_views` views of an image.
    """
    groups = validate(Views, {"groups": RECIPES[name]}).groups
    groups = [group.model_copy(update={"num": num_views // len(groups)}) for group in groups]
    specs = views.view_specs(groups, num_views, size)
    count, height, width = pixels.shape[:3]
    images = views.Images(pixels, np.full(count, height), np.full(count, width), np.arange(count))
    pipelines = [torchvision_pipeline(group, size) for group in groups]
    sources = [Image.fromarray(image) for image in pixels[:pil_images]]

    def by_torchvision():
        for pipeline in pipelines:
            for source in sources:
                pipeline(source)

    def by_kernel(epoch):
        for spec in specs:
            views.make_views(images, spec, spec.view_ids, seed=0, epoch=epoch)

    torchvision_rates, kernel_rates = [], []
    views.warm_up(specs[0])
    for epoch in range(rounds):
        torch.manual_seed(epoch)
        random.seed(epoch)
        torchvision_rates.append(len(sources) * len(pipelines) / seconds(by_torchvision))
        kernel_rates.append(count * num_views / seconds(lambda epoch=epoch: by_kernel(epoch)))
    return [torchvision_rates, kernel_rates]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of image files; without it, images are made")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each case (default %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    print(f"{'views':32s} {'torchvision PIL':>16s} {'kernel':>10s} ratio   (views per CPU-second, medians)")
    # recipe, source height and width, view size, images, views of each, images of torchvision's side
    small, large = (32, 32, 32, 128, 32, 512), (400, 500, 224, 16, 4, 16)
    found = []
    for name, case in (("default", small), ("default", large), ("VICReg", large), ("ReLIC", small)):
        height, width, size, count, num_views, pil_images = case
        if arguments.images:
            pixels = read_folder(arguments.images, count, height, width)
        else:
            pixels = smooth_noise(count, height, width)
        pil, kernel = compare(pixels, name, size, num_views, pil_images, arguments.rounds)
        label = f"{name}, {size} px of {width} x {height}"
        middles = (statistics.median(rates) for rates in (pil, kernel))
        print("{:32s} {:16,.0f} {:10,.0f} {}".format(label, *middles, rows.ratio(kernel, pil)))
        result = rows.beside(kernel, {"of torchvision on PIL images": pil}, is_rate=True)
        found.append((f"views per CPU-second, recipe {label}", result))
    rows.show(found)


if __name__ == "__main__":
    sys.exit(outcome.of_program(main))
