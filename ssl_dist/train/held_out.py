"""Images on which a training is measured while it goes on: some are held out, and asked; others may answer."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from ssl_dist.data.plan import held_out, limited
from ssl_dist.distributed.world import World
from ssl_dist.errors import UserError
from ssl_dist.progress import Progress
from ssl_dist.run.blueprint import RunPlan
from ssl_dist.run.encoder import BATCH_TIMEOUT_S, outputs, share_in_batches

MAX_IMAGES, HELD_OUT_SHARE = 11_000, 1 / 11  # labelled ones of the split, and of these the ones held out


class HeldOutImages:
    """The same images at every call. ids: int64 [n] of a split, those that may answer, then `num_queries` held out, of
    every class; labels: int64 [n] theirs."""

    def __init__(self, plan: RunPlan, split: str, labels: np.ndarray, key: str):
        """labels: of all images of the split, -1: none. key: the setting that asks for it, for errors."""
        self.plan, self.split = plan, split
        labelled = np.flatnonzero(labels >= 0)
        ids = labelled[limited(len(labelled), MAX_IMAGES)]
        classes, counts = np.unique(labels[ids], return_counts=True)
        ids = ids[np.isin(labels[ids], classes[counts > 1])]  # one to hold out, and one that votes for it
        if not len(ids):
            raise UserError(
                f"{key}: no two of the {sum(counts)} images that it takes of split {split} are of one class (of "
                f"{len(classes)}); set it to null"
            )
        queries = held_out(ids, labels[ids], HELD_OUT_SHARE, plan.config.seed, key)
        self.ids = np.concatenate([np.setdiff1d(ids, queries), queries])
        self.labels = labels[self.ids]
        self.num_queries = len(queries)

    @property
    def queries(self) -> np.ndarray:
        return self.ids[-self.num_queries :]

    def are_those_of(self, other: "HeldOutImages") -> bool:
        return self.split == other.split and np.array_equal(self.ids, other.ids)

    def features(
        self, encoder: nn.Module, to_input: Callable[[Tensor], Tensor], world: World, queries_only: bool = False
    ) -> Tensor:
        """Features float32 [n, D] of all, or of those held out, on every rank's host, by an encoder in evaluation mode.
        Each rank computes its share."""
        ids, step = self.queries if queries_only else self.ids, world.state.step
        low, high = share_in_batches(world, len(ids))
        own, data, threads = ids[low:high], self.plan.config.data, self.plan.threads
        with (
            world.state.phase_of("features of held-out images", BATCH_TIMEOUT_S),
            self.plan.dataset.open(self.split) as reader,
            Progress("features of held-out images", len(own), "image", quiet=True) as progress,
        ):
            rows = outputs(lambda pixels: encoder(to_input(pixels)), reader, own, data, threads, world, progress)
            own_ND = torch.from_numpy(np.concatenate(list(rows)))
            features_ND = torch.zeros(len(ids), own_ND.shape[1])
            features_ND[low:high] = own_ND
            features_ND = world.all_reduce_sum(features_ND.to(world.device)).cpu()
        world.state.step = step  # an extraction counts its batches there
        return features_ND
