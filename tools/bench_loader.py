"""Images a second of a loader that makes views of an FFCV file: ours beside FFCV-SSL's, interleaved.

    python tools/bench_loader.py [--views 8] [--images FOLDER]
    pip install --no-deps --target FOLDER https://github.com/facebookresearch/FFCV-SSL/archive/refs/heads/main.zip
    python tools/bench_loader.py --ffcv-ssl FOLDER

Both read one .beton file of JPEG images, in random order, and give uint8 views: a random resized crop, a flip, colour
jitter, grayscale. No blur: FFCV-SSL's leaves its compiled code for SciPy. Ours decodes an image once; FFCV-SSL has a
decoder for each view. A turn is a pass over all images in a process that lives on; the two take turns, after one that
compiles. The table has medians: images by wall time, and views by the CPU time of all threads. Without --ffcv-ssl ours
is measured alone. --images: a folder as `ssl-dist convert folder` reads it (default: smooth noise of 500 x 400 pixels).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import rows  # beside this file

from ssl_dist import outcome
from ssl_dist.distributed.rank import available_cores

CONFIG = Path(__file__).parents[1] / "configs/photos/relational-resnet18-224px.yaml"
SCALE, JITTER, FLIP, GRAYSCALE = (0.08, 1.0), (0.8, 0.8, 0.8, 0.8, 0.2), 0.5, 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of images")
    parser.add_argument("--count", type=int, default=256, help="of the images that are made")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--views", type=int, default=2, help="of an image")
    parser.add_argument("--batch", type=int, default=32, help="images")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ffcv-ssl", type=Path, metavar="FOLDER", help="in which it is installed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-loader-") as name, ExitStack() as stack:
        file = beton(Path(name), options)
        sides = {"ours": started("ours", file, options, stack)}
        if options.ffcv_ssl is not None:
            sides["FFCV-SSL"] = started("FFCV-SSL", file, options, stack)
        rates: dict[str, list[float]] = {side: [] for side in sides}
        efforts: dict[str, list[float]] = {side: [] for side in sides}
        for number in range(1 + options.rounds):
            for side, process in sides.items():
                images, seconds, cpu_seconds = turn(process, side)
                if number:
                    rates[side].append(images / seconds)
                    efforts[side].append(images * options.views / cpu_seconds)
    print(f"{images} images, {options.views} views of {options.size} px, {options.threads} threads; medians")
    print(f"{'':<10} {'images/s':>10} {'views per CPU-second':>22}")
    for side in sides:
        print(f"{side:<10} {statistics.median(rates[side]):10.1f} {statistics.median(efforts[side]):22.0f}")
    case = f"of a loader of a .beton file, {options.views} views of {options.size} px, {options.threads} thread(s)"
    found = [(f"images a second {case}", against(rates)), (f"views per CPU-second {case}", against(efforts))]
    rows.show(found)


def against(values: dict[str, list[float]]) -> str:
    ours = values.pop("ours")
    return rows.beside(ours, {f"of {name}": v for name, v in values.items()}, is_rate=True) if values else alone(ours)


def alone(ours: list[float]) -> str:
    return rows.figure(statistics.median(ours))


def beton(folder: Path, options: argparse.Namespace) -> Path:
    """The file that both sides read."""
    from bench_views import smooth_noise  # beside this file
    from PIL import Image

    source = options.images
    if source is None:
        source = folder / "images"
        (source / "train" / "noise").mkdir(parents=True)
        for number, pixels in enumerate(smooth_noise(options.count, 400, 500)):
            Image.fromarray(pixels).save(source / "train" / "noise" / f"{number:05d}.jpg", quality=90)
    words = ["convert", "folder", "--root", str(source), "--name", "photos", "--out", str(folder / "data")]
    completed = subprocess.run([sys.executable, "-m", "ssl_dist", *words], capture_output=True, text=True)
    if completed.returncode:
        sys.exit(completed.stderr[-3000:])
    return folder / "data" / "train.beton"


def started(side: str, file: Path, options: argparse.Namespace, stack: ExitStack) -> subprocess.Popen:
    """A process of a side, which ends with the context."""
    numbers = [options.views, options.size, options.batch, options.threads]
    command = [sys.executable, "-c", WORKER, side, str(file), *map(str, numbers)]
    here = [str(Path(__file__).parent), *sys.path]
    path = [str(options.ffcv_ssl.resolve()), *here] if side == "FFCV-SSL" else here
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    said = (file.parent / f"{side}.log").open("w+")
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=said, text=True, env=environment)
    stack.enter_context(process)
    stack.callback(process.terminate)
    process.said = said  # type: ignore[attr-defined]
    return process


def turn(process: subprocess.Popen, side: str) -> tuple[int, float, float]:
    """Images, seconds and CPU seconds of a pass."""
    assert process.stdin is not None and process.stdout is not None
    try:
        print(file=process.stdin, flush=True)
        line = process.stdout.readline()
    except BrokenPipeError:
        line = ""
    if not line:
        process.said.seek(0)  # type: ignore[attr-defined]
        sys.exit(f"{process.said.read()[-3000:]}\n{side} ended with exit code {process.wait()}")  # type: ignore[attr-defined]
    return tuple(json.loads(line))


# ---------------------------------------------------------------------------------------------- the workers

WORKER = "import sys, bench_loader; bench_loader.work(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))"


def work(side: str, file: str, views: int, size: int, batch: int, threads: int) -> None:
    """Make a pass for every line that comes in."""
    one_pass = (ours if side == "ours" else ffcv_ssl)(file, views, size, batch, threads)
    for _ in sys.stdin:
        begin, cpu = time.perf_counter(), time.process_time()
        images = sum(one_pass())
        print(json.dumps([images, time.perf_counter() - begin, time.process_time() - cpu]), flush=True)


def ours(file: str, num_views: int, size: int, batch: int, threads: int) -> Callable[[], Iterator[int]]:
    """The loader of a training."""
    from ssl_dist import config, views
    from ssl_dist.data.loader import TrainLoader
    from ssl_dist.distributed.rank import RankInfo
    from ssl_dist.run.blueprint import derive

    jitter = dict(zip(("p", "brightness", "contrast", "saturation", "hue"), JITTER, strict=True))
    recipe = {
        "random_resized_crop": {"scale": SCALE},
        "horizontal_flip": FLIP,
        "color_jitter": jitter,
        "grayscale": GRAYSCALE,
    }
    overrides = [
        f"data.root={Path(file).parent}", "data.name=photos", f"data.image_size={size}", f"views.num={num_views}",
        f"views.groups=[{json.dumps(recipe)}]", f"optim.batch_size={batch}", "run_dir=none",
    ]  # fmt: skip
    plan = derive(config.load(str(CONFIG), overrides), RankInfo())
    for spec in plan.specs:
        views.warm_up(spec, plan.split.pixels)
    steps = plan.order.steps_per_epoch
    loader = TrainLoader(plan.open_reader(), plan.order, plan.specs, plan.grid, 0, threads, False)
    batches = loader.batches(0, 10**9)  # endless
    return lambda: (len(next(batches).image_ids) for _ in range(steps))


def ffcv_ssl(file: str, num_views: int, size: int, batch: int, threads: int) -> Callable[[], Iterator[int]]:
    """Its loader, as examples/train_ssl.py has it, without what needs a GPU."""
    from ffcv import transforms
    from ffcv.fields.basics import IntDecoder
    from ffcv.loader import Loader, OrderOption

    def of_view() -> list:
        return [
            transforms.RandomResizedCrop((size, size), scale=SCALE),
            transforms.RandomHorizontalFlip(FLIP),
            transforms.RandomColorJitter(*JITTER),
            transforms.RandomGrayscale(GRAYSCALE),
            transforms.ToTensor(),
            transforms.ToTorchImage(),
        ]

    others = {f"image_{number}": "image" for number in range(num_views - 1)}
    loader = Loader(
        file,
        batch_size=batch,
        num_workers=threads,
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=True,
        pipelines={name: of_view() for name in ("image", *others)} | {"label": [IntDecoder(), transforms.ToTensor()]},
        custom_field_mapper=others,
    )
    return lambda: (len(batch[0]) for batch in loader)


if __name__ == "__main__":
    sys.exit(outcome.of_program(main))
