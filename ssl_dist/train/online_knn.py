"""A weighted kNN during a training: a cheap, early measure of the representation.

At most 1,000 images of the labelled training split are held out, and at most 10,000 other ones vote for their class. No
image of the test split is used. A method without labels may train on both (where the split is the one that it
pre-trains on, it does), so this is for looking at a training and choosing among its settings, not for a table.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from ssl_dist.data.plan import held_out, limited
from ssl_dist.distributed.world import World
from ssl_dist.errors import UserError
from ssl_dist.kernels.neighbours import neighbours, votes
from ssl_dist.progress import Progress
from ssl_dist.results.accuracy import target_rank
from ssl_dist.run.blueprint import RunPlan
from ssl_dist.run.encoder import BATCH_TIMEOUT_S, outputs, share_in_batches
from ssl_dist.storage.features import Features, require_labels

K, TEMPERATURE = 20, 0.07
NAME = f"online_knn{K}"
MAX_IMAGES, HELD_OUT_SHARE = 11_000, 1 / 11  # of the split, and of these the ones held out
MEMORY_BYTES = 512 << 20  # for blocks of rows and cosines


def labelled_split(plan: RunPlan) -> str:
    """The split that it works on. Raises `UserError` when that has no labels."""
    split = plan.dataset.uses.training
    if not plan.dataset.labelled.get(split):
        raise UserError(
            f"log.knn_every_epochs = {plan.config.log.knn_every_epochs}: needs labels, and {plan.dataset.root} holds"
            f" no labelled split {split}; set log.knn_every_epochs=null"
        )
    return split


class OnlineKNN:
    """kNN accuracy on the same images at every call; each rank computes the features of its share of them."""

    def __init__(self, plan: RunPlan, world: World):
        self.plan, self.world = plan, world
        self.split = labelled_split(plan)
        labels = plan.dataset.labels(self.split)
        ids = limited(len(labels), MAX_IMAGES)
        key = f"log.knn_every_epochs = {plan.config.log.knn_every_epochs}"
        classes, counts = np.unique(labels[ids], return_counts=True)
        ids = ids[np.isin(labels[ids], classes[counts > 1])]  # one to hold out, and one that votes for it
        if not len(ids):
            raise UserError(
                f"{key}: no two of the {sum(counts)} images that it takes of split {self.split} are of one class (of "
                f"{len(classes)}); set it to null"
            )
        queries = held_out(ids, labels[ids], HELD_OUT_SHARE, plan.config.seed, key)
        self.ids = np.concatenate([np.setdiff1d(ids, queries), queries])
        self.labels = labels[self.ids]
        self.num_queries = len(queries)

    def accuracy(self, encoder: nn.Module, to_input: Callable[[Tensor], Tensor]) -> float:
        """Percent of the held-out images that the others classify right, by an encoder in evaluation mode."""
        low, high = share_in_batches(self.world, len(self.ids))
        world, own, step = self.world, self.ids[low:high], self.world.state.step
        with (
            world.state.phase_of("the online kNN", BATCH_TIMEOUT_S),
            self.plan.dataset.open(self.split) as reader,
            Progress("online kNN", len(own), "image", quiet=True) as progress,
        ):
            data, threads = self.plan.config.data, self.plan.threads
            rows = outputs(lambda pixels: encoder(to_input(pixels)), reader, own, data, threads, world, progress)
            own_ND = torch.from_numpy(np.concatenate(list(rows)))
            features_ND = torch.zeros(len(self.ids), own_ND.shape[1])
            features_ND[low:high] = own_ND
            features_ND = world.all_reduce_sum(features_ND.to(world.device)).cpu()
            accuracy = world.on_rank0(lambda: self._voted(features_ND.numpy()))
        world.state.step = step  # an extraction counts its batches there
        return accuracy

    def _voted(self, features_ND: np.ndarray) -> float:
        parts = slice(0, -self.num_queries), slice(-self.num_queries, None)
        bank, queries = (
            Features(features_ND[part], self.labels[part], np.arange(len(self.labels[part])), {}) for part in parts
        )
        require_labels(bank, queries)
        num_classes, k = int(self.labels.max()) + 1, min(K, len(bank))
        bank_labels_N, labels_N = torch.from_numpy(bank.labels), torch.from_numpy(queries.labels)
        correct = 0
        device = self.world.device
        blocks = neighbours(bank, queries, k, torch.float32, MEMORY_BYTES, num_classes, device)
        for start, cosine_QK, row_QK in blocks:
            votes_QC = votes(cosine_QK, bank_labels_N[row_QK], TEMPERATURE, num_classes)
            correct += int((target_rank(votes_QC, labels_N[start : start + len(row_QK)]) < 1).sum())
        return correct * 100.0 / len(queries)
