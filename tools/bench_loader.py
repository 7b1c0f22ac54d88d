"""Images a second of a training's loader: ours on an FFCV file, beside a DataLoader of torchvision's transforms (v2) on
the same images as files, and FFCV-SSL's loader on the same FFCV file, interleaved.

    python tools/bench_loader.py [--views 8] [--images FOLDER]
    pip install --no-deps --target FOLDER https://github.com/facebookresearch/FFCV-SSL/archive/refs/heads/main.zip
    python tools/bench_loader.py --ffcv-ssl FOLDER

All give uint8 views of JPEG images in random order: a random resized crop, a flip, colour jitter, grayscale. No blur:
FFCV-SSL's leaves its compiled code for SciPy. Ours and torchvision's side decode an image once; FFCV-SSL has a decoder
for each view. A turn is four passes over all images, by as many threads or workers, in a process that lives on; the
sides take turns, after one turn that compiles. The table has medians: images by wall time, and views by the CPU time of
all threads and workers. The environment is that which `ssl-dist` makes for itself. --images: a folder of image files,
which become JPEG files of up to 512 pixels a side for all (default: smooth noise of 500 x 400 pixels, which decodes
faster than photographs).
"""

import argparse
import itertools
import json
import multiprocessing
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
from bench_step import TUNED

from ssl_dist import outcome
from ssl_dist.distributed.rank import available_cores
from ssl_dist.errors import UserError
from ssl_dist.run.embedder import files_of

CONFIG = Path(__file__).parents[1] / "configs/photos/relational-resnet18-224px.yaml"
COLOUR = "ffcv/transforms/colorjitter.py"  # FFCV itself has none
LARGEST = 512  # pixels of a side, as `ssl-dist convert folder` stores them
PASSES = 4  # in one go where a side can: what begins and ends a pass counts little then
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
    if options.ffcv_ssl is not None and not (options.ffcv_ssl / COLOUR).exists():
        raise UserError(f"--ffcv-ssl {options.ffcv_ssl}: give the folder in which pip has installed it, with {COLOUR}")
    with tempfile.TemporaryDirectory(prefix="bench-loader-") as name, ExitStack() as stack:
        file = beton(Path(name), options)
        names = [name for name in SIDES if name != "FFCV-SSL" or options.ffcv_ssl is not None]
        sides = {name: started(name, file, options, stack) for name in names}
        rates: dict[str, list[float]] = {side: [] for side in sides}
        efforts: dict[str, list[float]] = {side: [] for side in sides}
        for number in range(1 + options.rounds):
            for side, process in sides.items():
                images, seconds, of_cpu = turn(process, file.with_name(f"{side}.log"))
                if number:
                    rates[side].append(images / seconds)
                    efforts[side].append(images * options.views / of_cpu)
    print(f"{images // PASSES} images, {options.views} views of {options.size} px, {options.threads} threads; medians")
    print(f"{'':<14} {'images/s':>10} {'views per CPU-second':>22}")
    for side in sides:
        print(f"{side:<14} {statistics.median(rates[side]):10.1f} {statistics.median(efforts[side]):22.0f}")
    sizes = f"{images // PASSES} JPEG images of at most {LARGEST} px, {options.views} views of {options.size} px"
    case = f"of a training's loader, {sizes}, {options.threads} thread(s)"
    rows.show([(f"images a second {case}", against(rates)), (f"views per CPU-second {case}", against(efforts))])


def against(values: dict[str, list[float]]) -> str:
    others = {f"of {name}": v for name, v in values.items() if name != "ours"}
    return rows.beside(values["ours"], others, is_rate=True)


def beton(folder: Path, options: argparse.Namespace) -> Path:
    """The .beton file, and beside it the images in it as files, which files.txt lists."""
    from bench_views import smooth_noise  # beside this file
    from PIL import Image

    own = folder / "images" / "train" / "all"
    own.mkdir(parents=True)
    if options.images is None:
        images = map(Image.fromarray, smooth_noise(options.count, 400, 500))
    else:
        images = (Image.open(path).convert("RGB") for path in files_of(options.images))
    for number, image in enumerate(images):
        image.thumbnail((LARGEST, LARGEST))
        image.save(own / f"{number:05d}.jpg", quality=90)
    words = ["convert", "folder", "--root", str(folder / "images"), "--name", "photos", "--out", str(folder / "data")]
    completed = subprocess.run([sys.executable, "-m", "ssl_dist", *words], capture_output=True, text=True)
    if completed.returncode:
        sys.exit(completed.stderr[-3000:])
    (folder / "data" / "files.txt").write_text("\n".join(map(str, sorted(own.iterdir()))))
    return folder / "data" / "train.beton"


def started(side: str, file: Path, options: argparse.Namespace, stack: ExitStack) -> subprocess.Popen:
    """A process of a side, which ends with the context."""
    numbers = [options.views, options.size, options.batch, options.threads]
    command = [sys.executable, "-c", WORKER, side, str(file), *map(str, numbers)]
    here = [str(Path(__file__).parent), *sys.path]
    path = [str(options.ffcv_ssl.resolve()), *here] if side == "FFCV-SSL" else here
    environment = os.environ | TUNED | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    pipe, said = subprocess.PIPE, stack.enter_context(file.with_name(f"{side}.log").open("w"))
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=said, text=True, env=environment)
    stack.enter_context(process)
    stack.callback(process.terminate)
    return process


def turn(process: subprocess.Popen, log: Path) -> tuple[int, float, float]:
    """Images, seconds and CPU seconds of a turn. log: of what the process says."""
    assert process.stdin is not None and process.stdout is not None
    try:
        print(file=process.stdin, flush=True)
        line = process.stdout.readline()
    except BrokenPipeError:
        line = ""
    if not line:
        sys.exit(f"{log.read_text()[-3000:]}\n{log.stem} ended with exit code {process.wait()}")
    return tuple(json.loads(line))


# ---------------------------------------------------------------------------------------------- the workers

WORKER = "import sys, bench_loader; bench_loader.work(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))"


def work(side: str, file: str, views: int, size: int, batch: int, threads: int) -> None:
    """Take a turn for every line that comes in."""
    one_turn = SIDES[side](file, views, size, batch, threads)
    for _ in sys.stdin:
        begin, cpu = time.perf_counter(), cpu_seconds()
        images = sum(one_turn())
        print(json.dumps([images, time.perf_counter() - begin, cpu_seconds() - cpu]), flush=True)


def cpu_seconds() -> float:
    """Of this process and of its workers."""
    stats = [Path(f"/proc/{child.pid}/stat").read_text() for child in multiprocessing.active_children()]
    ticks = sum(int(number) for stat in stats for number in stat.rpartition(")")[2].split()[11:13])  # utime, stime
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def ours(file: str, num_views: int, size: int, batch: int, threads: int) -> Callable[[], Iterator[int]]:
    """The loader of a training, begun anew for each turn: what it makes ahead would be made in the turn of others."""
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
    steps, turns = PASSES * plan.order.steps_per_epoch, itertools.count()

    def one_turn() -> Iterator[int]:
        start = steps * next(turns)
        with TrainLoader(plan.open_reader(), plan.order, plan.specs, plan.grid, 0, threads, False) as loader:
            for made in loader.batches(start, start + steps):
                yield len(made.image_ids)

    return one_turn


def torchvision(file: str, num_views: int, size: int, batch: int, threads: int) -> Callable[[], Iterator[int]]:
    """A DataLoader whose workers decode with Pillow and live on."""
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision.transforms import v2

    one = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=SCALE),
            v2.RandomHorizontalFlip(FLIP),
            v2.RandomApply([v2.ColorJitter(*JITTER[1:])], p=JITTER[0]),
            v2.RandomGrayscale(GRAYSCALE),
            v2.PILToTensor(),
        ]
    )
    files = Path(file).with_name("files.txt").read_text().splitlines()

    class Photos(Dataset):
        def __len__(self) -> int:
            return PASSES * len(files)

        def __getitem__(self, index: int) -> torch.Tensor:
            image = Image.open(files[index % len(files)]).convert("RGB")
            return torch.stack([one(image) for _ in range(num_views)])

    loader = DataLoader(Photos(), batch, shuffle=True, drop_last=True, num_workers=threads, persistent_workers=True)
    return lambda: (len(views) for views in loader)


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
    return lambda: (len(batch[0]) for _ in range(PASSES) for batch in loader)


SIDES = {"ours": ours, "torchvision v2": torchvision, "FFCV-SSL": ffcv_ssl}

if __name__ == "__main__":
    sys.exit(outcome.of_program(main))
