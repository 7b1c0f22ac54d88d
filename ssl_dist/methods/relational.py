"""Self-supervised relational reasoning (Patacchiola & Storkey, NeurIPS 2020, arXiv:2006.05849).

K views of every image of a mini-batch are encoded; a relation head scores pairs of representations. Two views of one
image are a positive pair, views of two images a negative one; the loss is a focal binary cross-entropy over all pairs.

Semi-supervised: where the labels of both images of a negative pair are known and equal, the pair is positive. Ablations
(`head`): the score of a pair is the dot product of its representations, or of what an encoder makes of each of them.
"""

import math
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ssl_dist.config import NonNegativeFloat, PositiveInt, Probability, Section
from ssl_dist.device import to_device
from ssl_dist.errors import UserError
from ssl_dist.kernels import relation, relation_cuda
from ssl_dist.kernels.ranks import Ranks
from ssl_dist.keys import LABELLED, METHOD, hash64, uniform_rows
from ssl_dist.methods.base import Backbone, Batch, Info, Output, SSLMethod, World
from ssl_dist.nn.backbone import freeze_offset
from ssl_dist.nn.batchnorm import update_running
from ssl_dist.nn.layers import full_precision

ENCODING_DIM = 64  # of the encoder's output, as of the SimCLR baseline's head in the same paper


class Options(Section):
    aggregation: Literal["cat", "sum", "mean", "max"] = Field(
        "cat", description="how the two representations of a pair become the input of the relation head"
    )
    gamma: NonNegativeFloat = Field(2.0, description="focusing exponent of the loss; 0: plain binary cross-entropy")
    alpha: Probability | None = Field(0.5, description="weight of positives, 1 - alpha of negatives; null: 1 for both")
    hidden: PositiveInt = Field(256, description="hidden units of the relation head, or of the encoder")
    head: Literal["relation", "encoder", "dot_product"] = Field(
        "relation",
        description="what scores a pair: the relation head on both representations; or a dot product, of what an MLP "
        "to 64 dimensions makes of each (encoder) or of the representations themselves",
    )
    negatives: Literal["in_turn", "random"] = Field(
        "in_turn",
        description="the other image of a negative pair: by a shift that rises from one pair of views to the next, as "
        "in the official code, or that is drawn for each",
    )
    labelled: Probability = Field(
        0.0, description="semi-supervised: share of the images (drawn by key) whose label makes further positive pairs"
    )


# ---------------------------------------------------------------------------------------------------- pairs


def couples(num_views: int, num_images: int, key: np.uint64 | None = None) -> np.ndarray:
    """Pairs of views a < b and the shift of their negatives: int64 [K(K-1)/2, 3], rows (a, b, shift).

    Image m of view a is paired with image m - shift of view b. The shift rises by one from couple to couple and begins
    again at 1 when it reaches M, as in the official code; with a key each is drawn from 1 .. M - 1, so that the other
    image is a random one (section 3). Raises ValueError when there are no two views.
    """
    if num_views < 2:
        raise ValueError(f"{num_views} views have no pairs")
    a, b = np.triu_indices(num_views, 1)
    shifts = np.arange(len(a)) % max(num_images - 1, 1)
    if key is not None:
        shifts = (uniform_rows(key, np.arange(len(a)), 1)[:, 0] * max(num_images - 1, 1)).astype(np.int64)
    return np.stack([a, b, 1 + shifts], axis=1).astype(np.int64)


def unit_rows(
    couples_Q3: np.ndarray, num_images: int, lo: int = 0, hi: int | None = None, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """The units lo..hi-1 as rows k*M + m of the representations: left, right of the positive pair, right of the
    negative pair, each int64 [hi - lo]. Unit q*M + m is image m of couple q; it is one positive and one negative pair.
    """
    table = to_device(couples_Q3, torch.device(device))
    unit = torch.arange(lo, len(table) * num_images if hi is None else hi, device=device)
    image = unit % num_images
    a, b, shift = table[unit // num_images].unbind(1)
    return a * num_images + image, b * num_images + image, b * num_images + (image - shift) % num_images


def relation_pairs(num_views: int, num_images: int) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs in the paper's order: left, right (rows k*M + m) and target (1 positive), each int64 [M(K^2 - K)].

    For every couple of views first its M positive pairs, then its M negative ones.
    """
    left, positive, negative = (
        rows.view(-1, num_images) for rows in unit_rows(couples(num_views, num_images), num_images)
    )
    right = torch.stack([positive, negative], 1)
    target = torch.tensor([1, 0])[:, None].expand_as(right[0]).expand_as(right)
    return left[:, None].expand_as(right).flatten(), right.flatten(), target.flatten()


def focal_bce(logits: Tensor, target: Tensor, gamma: float = 2.0, alpha: float | None = 0.5) -> Tensor:
    """Focal binary cross-entropy per element (Lin et al. 2017): weight * (1 - pt)^gamma * BCE, equation 5.

    target holds 0 and 1; pt is the probability given to it; weight is alpha for target 1 and 1 - alpha for 0.
    """
    toward = torch.where(target > 0, logits, -logits)
    loss = -F.logsigmoid(toward)
    if gamma:
        loss = loss * torch.exp(gamma * F.logsigmoid(-toward))  # log(1 - pt) does not underflow
    if alpha is None:
        return loss
    return loss * torch.where(target > 0, logits.new_full((), alpha), logits.new_full((), 1 - alpha))


# ---------------------------------------------------------------------------------------------------- head


class RelationModule(nn.Module):
    """Linear, BatchNorm, LeakyReLU, Linear to one logit. Scores pairs of rows of a matrix of representations."""

    def __init__(self, feature_dim: int, hidden: int, aggregation: str):
        super().__init__()
        self.aggregation = aggregation
        self.linear1 = nn.Linear(feature_dim * 2 if aggregation == "cat" else feature_dim, hidden)
        self.bn1 = nn.BatchNorm1d(hidden)
        self.act = nn.LeakyReLU(0.01)
        self.linear2 = nn.Linear(hidden, 1)

    def forward(self, z_ND: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """Logits of the pairs (left, right) of rows of z, [number of pairs]."""
        if self.aggregation == "max":
            hidden = F.linear(torch.maximum(z_ND[left], z_ND[right]), self.linear1.weight, self._bias())
        else:
            weight_left, weight_right = self._halves()
            hidden = F.linear(z_ND, weight_left, self._bias())[left] + F.linear(z_ND, weight_right)[right]
        return self.linear2(self.act(self.bn1(hidden))).squeeze(1)

    def obstacle(self, device: str) -> str:
        """What stands in the way of `sweep` on a device (cpu or cuda), in words; empty where nothing does."""
        if self.aggregation == "max":
            return "max does not split over the members of a pair"
        return relation_cuda.obstacle() if device == "cuda" else ""

    def sweep(
        self, z_ND: Tensor, share: relation.Share, labels_M: Tensor, gamma: float, alpha: float | None, ranks: Ranks
    ) -> tuple[Tensor, Tensor]:
        """The share's part of the mean focal loss over all pairs and its logits [2, units], by the fused kernels.

        For training. As the BatchNorm takes any shift away, z is centred first.
        """
        kernels = relation_cuda if z_ND.is_cuda else relation
        weight_left, weight_right = self._halves()
        centre = z_ND.detach().mean(0)
        centred = z_ND - centre
        A, B = F.linear(centred, weight_left, self._bias()), F.linear(centred, weight_right)
        loss, logits, mean, var = kernels.relation_loss(
            A, B, self.bn1, self.act.negative_slope, self.linear2, gamma, alpha, share, labels_M, ranks.all_reduce_sum
        )
        with torch.no_grad():
            update_running(self.bn1, mean + F.linear(centre, weight_left + weight_right), var, share.num_pairs)
        return loss, logits

    def _halves(self) -> tuple[Tensor, Tensor]:
        """The first layer of a pair (i, j) is z_i @ left.T + z_j @ right.T + bias; max does not split so."""
        weight = self.linear1.weight
        if self.aggregation == "cat":
            left, right = weight.chunk(2, dim=1)
            return left, right
        return (weight / 2, weight / 2) if self.aggregation == "mean" else (weight, weight)

    def _bias(self) -> Tensor:
        """In training BatchNorm removes the bias of linear1, so that its gradient is 0; computed through the sums it
        is rounding noise, which Adam makes as large as the learning rate and different for every number of ranks."""
        bias = self.linear1.bias
        return bias.detach() + 0 * bias if self.training else bias


class DotProduct(nn.Module):
    """The ablation of the head: the score of a pair is the dot product of its rows, over their width.

    A plain sum over many rectified features is far from 0 for every pair: it saturates the sigmoid, and Adam's first
    steps amplify rounding threefold each.
    """

    def forward(self, z_ND: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return (z_ND[left] * z_ND[right]).sum(1) / z_ND.shape[1]


def targets(couples_Q3: np.ndarray, labels_M: Tensor, lo: int, hi: int, some_known: bool = True) -> Tensor:
    """bool [2, hi - lo] of the units lo..hi-1: true of pairs of one image, and of two whose labels are known (0 or
    more) and equal. some_known: whether any is."""
    if not some_known:
        return (torch.arange(2, device=labels_M.device) == 0)[:, None].expand(2, hi - lo)
    left, _, negative = unit_rows(couples_Q3, len(labels_M), lo, hi, labels_M.device)
    one, other = labels_M[left % len(labels_M)], labels_M[negative % len(labels_M)]
    return torch.stack([torch.ones_like(left, dtype=torch.bool), (one == other) & (one >= 0)])


def mean_loss(
    head: RelationModule | DotProduct,
    z_KMD: Tensor,
    pairs: relation.Share,
    labels_M: Tensor,
    target: Tensor,
    gamma: float,
    alpha: float | None,
    ranks: Ranks,
    fused: bool = True,
) -> tuple[Tensor, Tensor]:
    """What a share of the units adds to the mean focal loss over all pairs of the representations of the global batch,
    and the logits of its pairs, [2, units]. labels, target: as of `targets`. fused: by kernels that keep nothing of the
    size pairs x hidden, where the head has them."""
    z_ND = z_KMD.flatten(0, 1)
    if fused and isinstance(head, RelationModule) and head.training and not head.obstacle(z_ND.device.type):
        return head.sweep(z_ND, pairs, labels_M, gamma, alpha, ranks)
    left, positive, negative = unit_rows(pairs.couples, pairs.num_images, pairs.lo, pairs.hi, z_ND.device)
    logits = head(z_ND, left.repeat(2), torch.cat([positive, negative])).view(2, -1)
    return focal_bce(logits, target, gamma, alpha).sum() / pairs.num_pairs, logits.detach()


# ---------------------------------------------------------------------------------------------------- method


class Method(SSLMethod[Options]):
    free_views = True

    def __init__(self, backbone: Backbone, info: Info, options: Options):
        super().__init__(backbone, info, options)
        info.views_of_one_group("relational")
        self.num_views = info.views_compared("relational")
        info.require_two_images("a negative pair needs another image")
        if options.labelled and not info.num_classes:
            raise UserError(
                f"method.options.labelled = {options.labelled:g}: some images of this split have no label; set "
                "method.options.labelled=0, choose a labelled one by data.split, or give data.labels"
            )
        self.relation_module: RelationModule | DotProduct
        if options.head == "relation":
            self.relation_module = RelationModule(info.feature_dim, options.hidden, options.aggregation)
            freeze_offset(backbone)  # as in `mlp_on_features`
        else:
            self.relation_module = DotProduct()
        if options.head == "encoder":
            self.encoding = self.mlp_on_features([options.hidden, ENCODING_DIM], activation=nn.LeakyReLU)
        self.fused = True  # False: torch operations everywhere (slower; the two are held together by tests)

    def explain(self, world_size: int, device: str) -> dict[str, str]:
        options, num_views = self.options, self.num_views
        num_units = num_views * (num_views - 1) // 2 * self.info.batch_size
        loss = f"focal binary cross-entropy, gamma {options.gamma:g}, alpha {options.alpha}"
        least, most = num_units // world_size, -(-num_units // world_size)
        share = f"{most}" if least == most else f"{least}-{most}"
        text = f"{share} positive and as many negative"
        if isinstance(self.relation_module, RelationModule):
            obstacle = self.relation_module.obstacle(device)
            if obstacle:  # pairs x hidden: kept 3 times, 1 in flight
                num_bytes = 4 * 2 * most * options.hidden * 4
                text += f"; scoring them by torch operations ({obstacle}) takes about {num_bytes / 2**20:.1f} MiB"
            elif device == "cuda":
                num_bytes = relation_cuda.memory(num_views * self.info.batch_size, most, options.hidden)
                text += f"; scoring them by Triton takes about {num_bytes / 2**20:.1f} MiB"
        return {
            "pairs": f"{num_units} positive and {num_units} negative a step ({options.aggregation}), {loss}",
            "pairs a rank": text,
        }

    @classmethod
    def warm_up(cls, options: Options, dtype: torch.dtype) -> None:
        if options.aggregation != "max" and not torch.cuda.is_available():
            relation.warm_up(dtype)

    def embed(self, images: Tensor) -> Tensor:
        z = self.backbone(images)
        return self.encoding(z) if self.options.head == "encoder" else z

    def forward(self, batch: Batch, world: World) -> Output:
        """This rank scores its even share of the pairs of the whole global batch.

        Metrics: accuracy over all pairs, over positives and over negatives, in percent; a pair is called positive
        when its probability is above 1/2. Histograms: this rank's probabilities.
        """
        z_KMD = self.gathered(batch, world, self.embed)
        num_views, num_images, _ = z_KMD.shape
        labels_M = torch.full((num_images,), -1, device=z_KMD.device)
        if self.options.labelled:
            labels_M = world.gather_images(self._revealed_labels(batch))
        num_units = num_views * (num_views - 1) // 2 * num_images
        lo, hi = world.share(num_units)
        # The head is a small part of the work and its sums run over all pairs: never in half precision.
        with full_precision(z_KMD.device):
            loss_share, logits, target = self.relate(z_KMD, labels_M, lo, hi, world, batch.step)
        correct = (logits > 0) == target
        counts = torch.stack([(correct & target).sum(), target.sum(), (correct & ~target).sum(), (~target).sum()])
        correct_positive, num_positive, correct_negative, num_negative = world.all_reduce_sum(counts)
        metrics = {
            "accuracy": 100 * (correct_positive + correct_negative) / (2 * num_units),
            "accuracy_positive": 100 * correct_positive / num_positive,
            "accuracy_negative": 100 * correct_negative / num_negative,  # NaN when labels leave no negative pair
        }
        if self.options.labelled:
            metrics["positive_share"] = 100 * num_positive / (2 * num_units)
        positive, negative = score = logits.sigmoid()
        if self.options.labelled:
            positive, negative = score.where(target, math.nan).flatten(), score.where(~target, math.nan).flatten()
        histograms = {"relation_score_positive": positive, "relation_score_negative": negative}
        return Output(world.scale_for_ddp_mean(loss_share), metrics, histograms, z_KMD.detach())

    def _revealed_labels(self, batch: Batch) -> Tensor:
        """Labels int64 [B_local] of the images whose label the method may see, -1 for the others."""
        draws = uniform_rows(hash64(self.info.seed, LABELLED), batch.image_ids.numpy(), 1)[:, 0]
        revealed = to_device(draws < self.options.labelled, batch.labels.device)
        return torch.where(revealed, batch.labels, -1)

    def relate(
        self, z_KMD: Tensor, labels_M: Tensor, lo: int, hi: int, world: World, step: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the units lo..hi-1 add to the mean loss over all pairs; logits and targets (bool) of their pairs, [2,
        hi - lo]: row 0 views of one image, row 1 views of two."""
        options = self.options
        key = hash64(self.info.seed, METHOD, step) if options.negatives == "random" else None
        couples_Q3 = couples(z_KMD.shape[0], z_KMD.shape[1], key)
        target = targets(couples_Q3, labels_M, lo, hi, some_known=options.labelled > 0)
        pairs = relation.Share(couples_Q3, z_KMD.shape[1], lo, hi)
        loss, logits = mean_loss(
            self.relation_module, z_KMD, pairs, labels_M, target, options.gamma, options.alpha, world, self.fused
        )
        return loss, logits, target
