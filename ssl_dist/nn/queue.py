"""A queue of embeddings of the batches before, as MoCo and NNCLR keep it: state of a method, equal on every rank."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_dist.keys import INIT, METHOD, hash64, normals


class Queue(nn.Module):
    """Unit vectors [size, dim]; at first random ones of the run's seed. Where a batch goes is a function of the step,
    so the rows are all there is to save."""

    rows: Tensor

    def __init__(self, size: int, dim: int, seed: int):
        super().__init__()
        drawn = torch.from_numpy(normals(hash64(seed, METHOD, INIT), size * dim)).view(size, dim)
        self.register_buffer("rows", F.normalize(drawn, dim=1).to(torch.get_default_dtype()))

    @torch.no_grad()
    def push(self, new_MD: Tensor, step: int) -> None:
        """The M vectors of the global batch of step number `step`, which are normalised, in the place of the oldest."""
        size, count = len(self.rows), len(new_MD)
        last = new_MD[-size:]  # of a batch that is larger than the queue
        first = step * count + count - len(last)
        places = (first + torch.arange(len(last), device=new_MD.device)) % size
        self.rows[places] = F.normalize(last, dim=1).to(self.rows.dtype)
