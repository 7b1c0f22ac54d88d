"""A weighted kNN during a training: a cheap, early measure of the representation.

At most 1,000 images of the labelled training split are held out, and at most 10,000 other ones vote for their class. No
image of the test split is used. A method without labels may train on both (where the split is the one that it
pre-trains on, it does), so this is for looking at a training and choosing among its settings, not for a table.
"""

import numpy as np
import torch
from torch import Tensor

from ssl_dist.distributed.world import World
from ssl_dist.errors import UserError
from ssl_dist.kernels.neighbours import neighbours, votes
from ssl_dist.results.accuracy import target_rank
from ssl_dist.run.blueprint import RunPlan
from ssl_dist.storage.features import Features, require_labels
from ssl_dist.train.held_out import HeldOutImages

K, TEMPERATURE = 20, 0.07
NAME = f"online_knn{K}"
MEMORY_BYTES = 512 << 20  # for blocks of rows and cosines


def chosen_images(plan: RunPlan) -> HeldOutImages:
    """Of the data set's labelled training split, by its own labels. Raises `UserError` when that has none."""
    split, key = plan.dataset.uses.training, f"log.knn_every_epochs = {plan.config.log.knn_every_epochs}"
    if not plan.dataset.labelled.get(split):
        raise UserError(
            f"{key}: needs labels, and {plan.dataset.root} holds no labelled split {split}; set "
            "log.knn_every_epochs=null"
        )
    return HeldOutImages(plan, split, plan.dataset.labels(split), key)


class OnlineKNN:
    def __init__(self, plan: RunPlan, world: World):
        self.world, self.images = world, chosen_images(plan)

    def accuracy(self, features_ND: Tensor) -> float:
        """Percent of the held-out images that the others classify right, by the features of all."""
        return self.world.on_rank0(lambda: self._voted(features_ND.numpy()))

    def _voted(self, features_ND: np.ndarray) -> float:
        labels, num_queries = self.images.labels, self.images.num_queries
        parts = slice(0, -num_queries), slice(-num_queries, None)
        bank, queries = (Features(features_ND[part], labels[part], np.arange(len(labels[part])), {}) for part in parts)
        require_labels(bank, queries)
        num_classes, k = int(labels.max()) + 1, min(K, len(bank))
        bank_labels_N, labels_N = torch.from_numpy(bank.labels), torch.from_numpy(queries.labels)
        correct = 0
        device = self.world.device
        blocks = neighbours(bank, queries, k, torch.float32, MEMORY_BYTES, num_classes, device)
        for start, cosine_QK, row_QK in blocks:
            votes_QC = votes(cosine_QK, bank_labels_N[row_QK], TEMPERATURE, num_classes)
            correct += int((target_rank(votes_QC, labels_N[start : start + len(row_QK)]) < 1).sum())
        return correct * 100.0 / len(queries)
