"""Features of all images by conv4: `ssl-dist extract` beside the way of the official scripts.

    python tools/bench_extract.py --data data/cifar10 [--images FOLDER] [--rounds 5]

Ours: `ssl-dist extract RUN` on one rank, which writes a features file a split. The official way: a torchvision data set
of PIL images, ToTensor and Normalize, a DataLoader with batches of 128 and a worker a core, and the network of torch's
own layers, in evaluation mode and without gradient, as relational reasoning's linear evaluation has it; the features
stay in memory until they are saved as one array. --images: a folder with one of JPEG files for each split, which that
side decodes (ImageFolder); without it, that side has the pixels in memory, as torchvision's CIFAR10.

Both get the same random weights, cores and environment, which `ssl-dist` makes for itself. A turn is a process of its
own, from its start to its end; the two take turns. Seconds, medians: wall time, CPU time with that of the workers, and
"start", the wall time until the first split is opened (Python, imports, the network). The ratio is one of wall times,
start included, with the least and the greatest of a round.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import rows  # beside this file
from bench_step import TUNED, InFiles, InMemory, pixels_of, require_same_images

from ssl_dist import outcome
from ssl_dist.distributed.rank import available_cores

CONFIG = Path(__file__).parents[1] / "configs/cifar10/random_weights-conv4.yaml"


class Turn(NamedTuple):
    """Seconds of a process."""

    wall: float
    cpu: float
    start: float


def main() -> int | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder that `ssl-dist convert` wrote (CIFAR-10)")
    parser.add_argument("--images", type=Path, help="folder with the same images as JPEG files: SPLIT/CLASS/*.jpg")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--reader", choices=["ffcv", "arrays"], default="ffcv", help="of our side")
    parser.add_argument("--worker", choices=["official", "ours"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker == "ours":
        return ours(arguments.folder)
    if arguments.worker == "official":
        return official(arguments.folder, arguments.images)
    with tempfile.TemporaryDirectory(prefix="bench-extract-") as name:
        compare(arguments, Path(name))
    return None


def compare(arguments: argparse.Namespace, folder: Path) -> None:
    """Prepare both sides in `folder`, let them take turns, and print."""
    data, num_images = prepare(arguments, folder)
    environment = {"OMP_NUM_THREADS": str(available_cores())} | os.environ | TUNED
    turns: dict[str, list[Turn]] = {"official": [], "ours": []}
    for number in range(1 + arguments.rounds):
        for side, each in turns.items():
            seconds = turn(side, folder, environment)
            if number:  # the turn before fills the caches of files and of compiled kernels
                each.append(seconds)
    source = "JPEG files" if arguments.images else "arrays in memory"
    print(
        f"{num_images:,} images of {data}, the official side's {source}; {available_cores()} cores, "
        f"OMP_NUM_THREADS={environment['OMP_NUM_THREADS']}; seconds, medians of {arguments.rounds}"
    )
    print(f"{'':<9} {'wall':>8} {'CPU':>8} {'start':>8}")
    for side, each in turns.items():
        print(f"{side:<9}" + "".join(f" {statistics.median(values):8.2f}" for values in zip(*each, strict=True)))
    without = rows.ratio(*([turn.wall - turn.start for turn in turns[side]] for side in ("official", "ours")))
    print(f"without start {without}; the features differ by at most {difference(folder):.1e}")
    ours, official = ([turn.wall for turn in turns[side]] for side in ("ours", "official"))
    result = rows.beside(ours, {f"of a DataLoader of PIL images from {source}": official}, " s")
    rows.show([(f"extraction of {num_images:,} images of {data}, conv4, start included", result)])


def prepare(arguments: argparse.Namespace, folder: Path) -> tuple[str, int]:
    """Write a run of random weights and what the official side reads; the data set's name and its number of images."""
    import numpy as np
    import torch

    from ssl_dist.data.readers import Dataset
    from ssl_dist.run.encoder import load_encoder

    dataset = Dataset(arguments.data, reader=arguments.reader)
    splits = [dataset.uses.training, dataset.uses.evaluation]
    for split in splits:
        if arguments.images is None:
            np.save(folder / f"{split}.npy", pixels_of(arguments.data, split))
        else:
            require_same_images(arguments.images, arguments.data, split)
    words = [f"data.root={arguments.data.resolve()}", f"data.name={dataset.name}", f"data.reader={arguments.reader}"]
    command = [sys.executable, "-m", "ssl_dist", "train", str(CONFIG), *words, f"run_dir={folder}/run"]
    completed = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if completed.returncode:
        sys.exit(f"{completed.stdout[-3000:]}\nthe run ended with exit code {completed.returncode}")
    encoder = load_encoder(folder / "run")
    weights = [*encoder.backbone.state_dict().values()]
    torch.save([weights, encoder.normalize.mean, encoder.normalize.std], folder / "official.pt")
    (folder / "splits.json").write_text(json.dumps(splits))
    return dataset.name, sum(dataset.info(split).count for split in splits)


def turn(side: str, folder: Path, environment: dict[str, str]) -> Turn:
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", side, "--folder", str(folder)]
    cpu, begin = cpu_of_children(), time.monotonic()
    completed = subprocess.run(command, env=environment, capture_output=True, text=True)
    wall = time.monotonic() - begin
    if completed.returncode:
        sys.exit(f"{completed.stderr[-3000:]}\n{side} ended with exit code {completed.returncode}")
    opened = float(completed.stdout.splitlines()[0])
    return Turn(wall, cpu_of_children() - cpu, opened - begin)


def cpu_of_children() -> float:
    """Seconds of all processes that have ended: of those that were started here, and of what they started."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def say_opened() -> None:
    """Tell `turn` the time, by a clock that all processes share."""
    print(time.monotonic(), flush=True)


def ours(folder: Path) -> int:
    """`ssl-dist extract` itself."""
    from ssl_dist import cli
    from ssl_dist.evaluate import command

    extract_features = command.extract_features

    def noted(encoder, dataset, split, *rest):
        if split == dataset.uses.training:  # the first
            say_opened()
        return extract_features(encoder, dataset, split, *rest)

    command.extract_features = noted
    return cli.main(["extract", str(folder / "run")])


def official(folder: Path, images: Path | None) -> None:
    import numpy as np
    import torch
    from torchvision import transforms

    weights, mean, std = torch.load(folder / "official.pt")
    network = conv4()
    network.load_state_dict(dict(zip(network.state_dict(), weights, strict=True)))
    network.eval()
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])

    class Transformed(torch.utils.data.Dataset):
        def __init__(self, pictures: InMemory | InFiles):
            self.pictures = pictures

        def __len__(self) -> int:
            return len(self.pictures)

        def __getitem__(self, index: int) -> torch.Tensor:
            return transform(self.pictures[index])

    say_opened()
    features = []
    for split in json.loads((folder / "splits.json").read_text()):
        pictures = InMemory(np.load(folder / f"{split}.npy")) if images is None else InFiles(images / split)
        loader = torch.utils.data.DataLoader(Transformed(pictures), 128, num_workers=available_cores())
        with torch.no_grad():
            features += [network(batch).numpy() for batch in loader]
    np.save(folder / "official.npy", np.concatenate(features))


def conv4():
    """The official code's: its tensors are in the order of ours."""
    from torch import nn

    layers: list[nn.Module] = []
    for width, next_width in itertools.pairwise((3, 8, 16, 32, 64)):
        pool = nn.AdaptiveAvgPool2d(1) if next_width == 64 else nn.AvgPool2d(2)
        layers += [nn.Conv2d(width, next_width, 3, padding=1, bias=False), nn.BatchNorm2d(next_width), nn.ReLU(), pool]
    return nn.Sequential(*layers, nn.Flatten())


def difference(folder: Path) -> float:
    """The greatest one of a feature of both sides, which would show that they did not do the same work."""
    import numpy as np

    from ssl_dist.storage.features import read_features

    splits = json.loads((folder / "splits.json").read_text())
    paths = [next((folder / "run/features").glob(f"*-{split}.safetensors")) for split in splits]
    features = np.concatenate([read_features(path).features for path in paths])
    return float(np.abs(features - np.load(folder / "official.npy")).max())


if __name__ == "__main__":
    sys.exit(outcome.of_program(main))
