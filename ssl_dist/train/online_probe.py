"""A linear classifier that learns beside a training, from the features that the network has at each step.

After every step the network that evaluation reads passes view 0 of the batch in evaluation mode, and the classifier
takes one step on the labels; nothing of it reaches the network. The images that the online kNN holds out it never
learns from, and they measure it. No image of the test split is used. The features move while it learns and it sees one
augmented view: this is for looking at a training, and `ssl-dist evaluate RUN probe` for a table.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ssl_dist.device import to_device
from ssl_dist.distributed.world import World
from ssl_dist.errors import UserError
from ssl_dist.methods.base import Batch
from ssl_dist.nn.batchnorm import update_running
from ssl_dist.nn.layers import full_precision
from ssl_dist.results.accuracy import target_rank
from ssl_dist.run.blueprint import RunPlan
from ssl_dist.storage import checkpoint
from ssl_dist.train.held_out import HeldOutImages

NAME = "online_probe"
# Features of variance 1 need no rate of their own, and AdamW's step does not depend on the number of classes or images;
# its default rate learns a linear map in some hundred steps and follows features that move. Decay is left out: no image
# is seen often enough to be learnt by heart.
LR, WEIGHT_DECAY = 1e-3, 0.0


def chosen_images(plan: RunPlan) -> HeldOutImages:
    """Of the split that is trained on, by the labels that its batches have. Raises `UserError` when there are none."""
    split, key = plan.split.split, f"log.probe_every_epochs = {plan.config.log.probe_every_epochs}"
    if not plan.split.labelled:
        raise UserError(
            f"{key}: needs labels, and split {split} of {plan.dataset.root}, which is trained on, has none; set "
            "log.probe_every_epochs=null"
        )
    plan.info.require_two_images("the online probe normalises over the batch")
    return HeldOutImages(plan, split, plan.dataset.labels(split) if plan.labels is None else plan.labels, key)


class OnlineProbe(nn.Module):
    """Features [N, D] -> BatchNorm without affine parameters -> Linear, [N, C]. Every rank has the same weights: what
    is summed over images is summed over the ranks."""

    def __init__(self, plan: RunPlan, world: World, feature_dim: int):
        super().__init__()
        self.world, self.images, self.batch_size = world, chosen_images(plan), plan.config.optim.batch_size
        made: dict[str, Any] = {"dtype": plan.dtype, "device": world.device}
        self.weight = nn.Parameter(torch.zeros(plan.info.num_classes, feature_dim, **made))
        self.bias = nn.Parameter(torch.zeros(plan.info.num_classes, **made))
        self.norm = nn.BatchNorm1d(feature_dim, affine=False, **made).eval()
        fused = world.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, fused=fused)

    @torch.no_grad()
    def learn(self, encoder: nn.Module, batch: Batch) -> None:
        """One step on view 0 of the batch, by an encoder in evaluation mode. Every rank takes part; one that holds
        other views has no row to add."""
        view_ids = batch.view_ids[0].tolist()
        if 0 in view_ids:
            z_BD = encoder(batch.views[0][view_ids.index(0)]).flatten(1).to(self.weight.dtype)
        else:
            z_BD = self.weight.new_empty(0, self.weight.shape[1])
        learnt_from = ~np.isin(batch.image_ids.numpy()[: len(z_BD)], self.images.queries)
        with full_precision(z_BD.device):
            self._step(z_BD, batch.labels[: len(z_BD)], to_device(learnt_from, z_BD.device))

    def _step(self, z_BD: Tensor, labels_B: Tensor, learnt_from_B: Tensor) -> None:
        """The gradient of the mean cross-entropy over the labelled images of the global batch that are learnt from:
        with p = softmax(x W^T + b) and y the one-hot labels, the mean of (p - y) x^T and of p - y."""
        x_BD = self._normalized(z_BD)
        classes_C = torch.arange(len(self.bias), device=labels_B.device)
        error_BC = self._scores(x_BD).softmax(1) - (labels_B[:, None] == classes_C).to(x_BD.dtype)
        taken_B = (learnt_from_B & (labels_B >= 0)).to(x_BD.dtype)
        error_BC = error_BC * taken_B[:, None]
        sums = [(error_BC.T @ x_BD).flatten(), error_BC.sum(0), taken_B.sum()[None]]
        of_weight, of_bias, count = self.world.all_reduce_sum(torch.cat(sums)).split([len(part) for part in sums])
        count = count.clamp_min(1)  # a batch may have none to learn from
        self.weight.grad = of_weight.view_as(self.weight) / count
        self.bias.grad = of_bias / count
        self.optimizer.step()

    def _normalized(self, z_BD: Tensor) -> Tensor:
        """By the moments of the global batch, which the running ones follow."""
        mean_D = self.world.all_reduce_sum(z_BD.sum(0)) / self.batch_size
        var_D = self.world.all_reduce_sum((z_BD - mean_D).square().sum(0)) / self.batch_size
        update_running(self.norm, mean_D, var_D, self.batch_size)
        return (z_BD - mean_D) * (var_D + self.norm.eps).rsqrt()

    def _scores(self, x_ND: Tensor) -> Tensor:
        return nn.functional.linear(x_ND, self.weight, self.bias)

    @torch.no_grad()
    def accuracy(self, features_QD: Tensor) -> float:
        """Percent of the held-out images that it classifies right, by their features."""
        scores_QC = self._scores(self.norm(features_QD.to(self.weight))).cpu()
        labels_Q = torch.from_numpy(self.images.labels[-self.images.num_queries :])
        return 100 * float((target_rank(scores_QC, labels_Q) < 1).double().mean())

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"classifier": self.state_dict(), "optimizer": self.optimizer.state_dict()}

    def restore(self, state: dict[str, Any], path: Path) -> None:
        """What `state` gave, of the checkpoint at `path`. Raises `UserError` where it does not fit."""
        checkpoint.restore(self, state["classifier"], path)
        checkpoint.restore_optimizer(self.optimizer, state["optimizer"], path)
