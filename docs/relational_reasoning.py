"""Relational reasoning in one file: from images to a linear evaluation, by pieces of ssl_dist and a loop of its own.

    python docs/relational_reasoning.py [--steps 200] [--views 8]

Trains conv4 on handwritten digits, on a CPU in about a minute, and compares it with random weights. `ssl-dist train`
does it with checkpoints, on any number of ranks and on GPUs; this file is for reading and for changing.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ssl_dist import backbones, views
from ssl_dist.config import ColorJitter, Normalize, RandomResizedCrop, ViewGroup
from ssl_dist.convert.command import convert
from ssl_dist.data.normalize import normalized
from ssl_dist.data.plan import DataOrder
from ssl_dist.data.readers import Dataset
from ssl_dist.distributed.world import one_process
from ssl_dist.methods import relational
from ssl_dist.methods.base import Batch, Info

SIZE, BATCH_SIZE, SEED = 32, 64, 0
CPU = torch.device("cpu")


def pretrain(dataset: Dataset, num_views: int, num_steps: int) -> nn.Module:
    """The backbone after so many steps of K views of 64 images."""
    recipe = ViewGroup(random_resized_crop=RandomResizedCrop(), color_jitter=ColorJitter())
    [spec] = views.view_specs([recipe], num_views, SIZE)
    info = dataset.info("train")
    order = DataOrder(np.arange(info.count), BATCH_SIZE, SEED)
    to_input = normalized(Normalize(mean=info.mean, std=info.std), torch.float32, CPU)

    torch.manual_seed(SEED)
    backbone = backbones.build("conv4")
    facts = Info(info.count, 0, ((num_views, SIZE),), BATCH_SIZE, 1.0, backbone.feature_dim, seed=SEED)
    method, world = relational.Method(backbone, facts, relational.Options()), one_process()
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-3)

    with dataset.open("train") as reader:
        batches = reader.batches(order.global_ids(step) for step in range(num_steps))
        for step, images in enumerate(batches):
            # An image is decoded once; a view is a function of the seed, the epoch, the image and the view's number.
            epoch = step // order.steps_per_epoch
            pixels = torch.from_numpy(views.make_views(images, spec, spec.view_ids, SEED, epoch))
            ids = torch.from_numpy(images.ids)
            unknown = torch.full_like(ids, -1)
            batch = Batch([to_input(pixels)], [torch.from_numpy(spec.view_ids)], ids, unknown, ids, step)
            output = method(batch, world)
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
            if step % 50 == 0 or step == num_steps - 1:
                accuracy = float(output.metrics["accuracy"])
                print(
                    f"step {step + 1}: loss {float(output.loss.detach()):.4f}, pairs told apart {accuracy:.1f} %",
                    flush=True,
                )
    return backbone


def features(backbone: nn.Module, dataset: Dataset, split: str) -> tuple[Tensor, Tensor]:
    """Features [N, 64] of the images as they are, and their labels [N]."""
    info = dataset.info(split)
    to_input = normalized(Normalize(mean=info.mean, std=info.std), torch.float32, CPU)
    rows = []
    with dataset.open(split) as reader, torch.no_grad():
        for images in reader.batches(np.array_split(np.arange(info.count), 8)):
            pixels = torch.from_numpy(images.pixels).permute(0, 3, 1, 2).contiguous()  # the digits fill 32 x 32 pixels
            rows.append(backbone.eval()(to_input(pixels)))
    return torch.cat(rows), torch.from_numpy(dataset.labels(split))


def linear_evaluation(backbone: nn.Module, dataset: Dataset) -> float:
    """Accuracy in percent of a linear layer on the frozen features, trained for 100 epochs."""
    (x, y), (test_x, test_y) = (features(backbone, dataset, split) for split in ("train", "test"))
    torch.manual_seed(SEED)
    layer = nn.Linear(x.shape[1], int(y.max()) + 1)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
    for _ in range(100):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(layer(x[rows]), y[rows]).backward()
            optimizer.step()
    return 100 * float((layer(test_x).argmax(1) == test_y).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/digits"), help="folder of the digits, made if missing")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--views", type=int, default=8, help="K")
    arguments = parser.parse_args()
    if not (arguments.data / "dataset.json").exists():
        convert("digits", None, arguments.data, progress=False)
    dataset = Dataset(arguments.data, reader="arrays")
    torch.manual_seed(SEED)
    print(f"random weights: {linear_evaluation(backbones.build('conv4'), dataset):.2f} %", flush=True)
    backbone = pretrain(dataset, arguments.views, arguments.steps)
    print(f"relational reasoning, {arguments.steps} steps: {linear_evaluation(backbone, dataset):.2f} %")


if __name__ == "__main__":
    main()
