"""SeLa: self-labelling via simultaneous clustering and representation learning (Asano, Rupprecht & Vedaldi, ICLR 2020,
arXiv:1911.05371).

The network is trained to predict labels that it gives the images itself. From time to time all images are labelled anew
by the optimal transport from the images to clusters of equal size (equations 4 to 8, by Sinkhorn-Knopp); in between the
loss is the cross-entropy with the labels (equation 2), the mean over heads that each have labels of their own.

The labels come from views of the images through the network in training mode, dropout and batch statistics at work:
that is how the official code, and so the published numbers, were made. `labels_from: test` takes test images in
evaluation mode. The times of relabelings are spread over the whole training: one that is made longer has others.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ssl_dist.config import PositiveFloat, PositiveInt, Section
from ssl_dist.errors import UserError
from ssl_dist.kernels import sinkhorn
from ssl_dist.kernels.ranks import FromHost, Ranks
from ssl_dist.methods.base import Backbone, Batch, Clock, Extract, Info, Output, Rows, SSLMethod, World
from ssl_dist.nn.layers import at_least_float32
from ssl_dist.nn.pseudolabels import PseudoLabels

BLOCK_BYTES = 2**26  # of activations and of scores in float64 that are computed at once
SCORES = {"fp64": torch.float64, "fp32": torch.float32}


class Options(Section):
    clusters: PositiveInt = Field(3000, description="K, labels of every head")
    heads: PositiveInt = Field(1, description="linear heads on the backbone, each with labels of its own")
    lamb: PositiveFloat = Field(25.0, description="lambda of the transport: labels follow the network more closely")
    tolerance: PositiveFloat = Field(0.1, description="Sinkhorn-Knopp ends at this error, a sum over all images")
    sinkhorn_dtype: Literal["fp64", "fp32"] = Field(
        "fp64", description="of the scores of all images, what a relabeling holds; fp32 halves it; sums are fp64"
    )
    sinkhorn_device: Literal["model", "cpu"] = Field(
        "model",
        description="where those scores lie and Sinkhorn-Knopp runs; cpu: in the host's memory, for a GPU without room",
    )
    relabelings: PositiveInt = Field(
        100, description="times for new labels over the training; the first at its start, the last after its end"
    )
    schedule: Literal["quadratic", "linear"] = Field(
        "quadratic", description="of these times: dense at the start, or even (the paper's CIFAR)"
    )
    relabel: Literal["all", "one"] = Field(
        "all", description="heads that get new labels at a time: all, or that of the epoch's number (the paper's CIFAR)"
    )
    labels_from: Literal["augmented", "test"] = Field(
        "augmented", description="images behind new labels: views through the network in training mode, or test images"
    )


def relabel_times(total_epochs: float, count: int, schedule: str) -> np.ndarray:
    """When new labels are due, in epochs, rising, float64 [count]. The official code's times for a training that ends
    after `total_epochs`: the last lies behind the end."""
    share = np.linspace(0, 1, count)
    return (total_epochs + 0.01) * share**2 if schedule == "quadratic" else (total_epochs + 1.0001) * share


def relabel_steps(times: np.ndarray, steps_per_epoch: float) -> np.ndarray:
    """The steps before which labels are made, int64 [len(times)], rising: the first step at each time or after it, and
    the next one when that step is taken already."""
    order = np.arange(len(times))
    return np.maximum.accumulate(np.ceil(times * steps_per_epoch).astype(np.int64) - order) + order


def heads_loss(logits_HBK: list[Tensor], labels_HB: Tensor) -> Tensor:
    """Cross-entropy per image, the mean over the heads, [B]."""
    losses = [F.cross_entropy(z, y, reduction="none") for z, y in zip(logits_HBK, labels_HB, strict=True)]
    return torch.stack(losses).mean(0)


class Method(SSLMethod[Options]):
    num_views = 1
    fixed_length = True  # the relabelings
    sinkhorn: Tensor  # of the last relabeling: iterations of a head, error

    def __init__(self, backbone: Backbone, info: Info, options: Options):
        super().__init__(backbone, info, options)
        if not 2 <= options.clusters <= info.num_images:
            raise UserError(
                f"method.options.clusters = {options.clusters}: give 2 or more, and no more than the images, "
                f"{info.num_images}"
            )
        self.heads = nn.ModuleList(nn.Linear(info.feature_dim, options.clusters) for _ in range(options.heads))
        self.labels = PseudoLabels(options.heads, info.num_images, options.clusters, info.seed)
        self.register_buffer("sinkhorn", torch.zeros(2))

    def explain(self, world_size: int, device: str) -> dict[str, str]:
        options = self.options
        image_bytes = SCORES[options.sinkhorn_dtype].itemsize * options.clusters
        total = image_bytes * self.info.num_images / 2**20
        place = ", in the host's memory" if options.sinkhorn_device == "cpu" and device != "cpu" else ""
        return {
            "labels": f"{options.heads} head(s) x {options.clusters} clusters, {options.relabelings} relabelings",
            "a relabeling": (
                f"holds {image_bytes / 1024:.1f} KiB of scores ({options.sinkhorn_dtype}) and a feature vector an "
                f"image; scores of all: {total:,.0f} MiB, {total / world_size:,.0f} a rank{place}"
            ),
        }

    @classmethod
    def warm_up(cls, options: Options, dtype: torch.dtype) -> None:
        if options.sinkhorn_device == "cpu" or not torch.cuda.is_available():
            sinkhorn.warm_up(SCORES[options.sinkhorn_dtype])

    def before_step(self, clock: Clock, extract: Extract, world: World) -> list[nn.Parameter]:
        """New labels when they are due: a function of the step, so nothing is kept of the schedule."""
        times = relabel_times(clock.total_epochs, self.options.relabelings, self.options.schedule)
        if clock.step in relabel_steps(times, clock.steps_per_epoch):
            augmented = self.options.labels_from == "augmented"
            rows = extract(self.backbone, augmented, training=augmented)
            heads = range(len(self.heads))
            self.relabel([clock.epoch % len(heads)] if self.options.relabel == "one" else heads, rows, world)
        return []

    @torch.no_grad()
    def relabel(self, heads: Sequence[int], rows: Rows, world: World) -> None:
        """Give these heads new labels, one after the other: the scores of one head are what memory is needed for."""
        options, features = self.options, rows.values.flatten(1)
        on_host = options.sinkhorn_device == "cpu" and features.device.type != "cpu"
        ranks: Ranks = FromHost(world, features.device) if on_host else world
        device = torch.device("cpu") if on_host else features.device
        scores = torch.empty(len(features), options.clusters, dtype=SCORES[options.sinkhorn_dtype], device=device)
        size = max(1, BLOCK_BYTES // (8 * max(features.shape[1], options.clusters)))
        labels, iterations, error = [], 0, 0.0
        for head in heads:
            weight, bias = (parameter.double() for parameter in self.heads[head].parameters())
            for start in range(0, len(features), size):
                part = slice(start, start + size)
                with world.state.phase_of(f"the scores of head {head} from image {start} on", sinkhorn.CHECK_TIMEOUT_S):
                    block = torch.addmm(bias, features[part].double(), weight.T)
                    scores[part].copy_(block - block.amax(1, keepdim=True))  # the largest are exact in fp32
            assignment = sinkhorn.sinkhorn_knopp(
                scores, self.info.num_images, options.lamb, options.tolerance, ranks, f"of head {head}"
            )
            labels.append(assignment.labels.to(features.device))
            iterations, error = iterations + assignment.iterations, max(error, assignment.error)
        self.labels.replace(heads, labels, rows.positions, world)
        self.sinkhorn.copy_(torch.tensor([iterations / len(labels), error], dtype=torch.float64))

    def forward(self, batch: Batch, world: World) -> Output:
        """Metrics: the share of images whose label the heads predict, in percent, and what the last relabeling was."""
        [z_VBD] = self.represent(batch)
        logits_HBK = [at_least_float32(head(z_VBD.flatten(0, 1))) for head in self.heads]
        labels_HB = self.labels.of(batch.positions)
        correct = torch.stack([z.detach().argmax(1) for z in logits_HBK]) == labels_HB
        metrics = {
            "accuracy": 100 * world.all_reduce_mean(correct.double().mean()),
            "sinkhorn_iterations": self.sinkhorn[0].clone(),
            "sinkhorn_error": self.sinkhorn[1].clone(),
        }
        # Ranks hold equally many images, so the mean of their means is that of the global batch.
        loss = heads_loss(logits_HBK, labels_HB).mean()
        return Output(loss, metrics | self.labels.metrics(), {}, world.gather_images(z_VBD[0].detach()))
