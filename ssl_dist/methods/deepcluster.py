"""DeepCluster (Caron, Bojanowski, Joulin & Douze, ECCV 2018, arXiv:1807.05520), as the baseline of the relational
reasoning paper.

Before every epoch the features of all images are whitened, normalised and clustered by k-means; the network is trained
to predict the clusters, whose numbers mean nothing from one epoch to the next, so the last layer is drawn anew. The
loss is a cross-entropy in which an image of a cluster of n_c images weighs 1 - n_c / N.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ssl_dist.config import PositiveInt, Section
from ssl_dist.errors import UserError
from ssl_dist.kernels.kmeans import kmeans, whiten
from ssl_dist.keys import INIT, METHOD, RELABEL, hash64, normals
from ssl_dist.methods.base import Backbone, Batch, Clock, Extract, Info, Output, Rows, SSLMethod, World, accuracy
from ssl_dist.nn.layers import at_least_float32
from ssl_dist.nn.pseudolabels import PseudoLabels

LAST_LAYER_STD = 0.01  # of the weights that are drawn anew
WIDE_FEATURES = 512  # from so many features on only half of the components are kept


class Options(Section):
    clusters: PositiveInt | None = Field(None, description="k; null: 10 for every class of the data set")
    components: PositiveInt | None = Field(
        None,
        description="principal components that are clustered; null: all features, from 512 features on half of them",
    )
    hidden: PositiveInt = Field(256, description="hidden units of the head")
    features_of: Literal["test", "augmented"] = Field(
        "test", description="images that are clustered: test images, as in the paper, or views, as in the official code"
    )
    starts: PositiveInt = Field(5, description="starts of k-means, the best of which counts")
    iterations: PositiveInt = Field(30, description="iterations of a start at most")


def weighted_cross_entropy(logits_BK: Tensor, labels_B: Tensor, weight_K: Tensor) -> tuple[Tensor, Tensor]:
    """Of these images, the sum of weight x cross-entropy and the sum of the weights; the loss is their quotient."""
    weight_B = weight_K[labels_B]
    return (weight_B * F.cross_entropy(logits_BK, labels_B, reduction="none")).sum(), weight_B.sum()


class Method(SSLMethod[Options]):
    num_views = 1
    weight: Tensor  # of an image of each cluster
    distance: Tensor  # of the last clustering: the mean squared distance to the centres

    def __init__(self, backbone: Backbone, info: Info, options: Options):
        super().__init__(backbone, info, options)
        if options.clusters is None and not info.num_classes:
            raise UserError("method.options.clusters = null: these images have no classes; give a number of clusters")
        self.num_clusters = options.clusters or 10 * info.num_classes
        if not 2 <= self.num_clusters <= info.num_images:
            raise UserError(
                f"method.options.clusters = {self.num_clusters}: give 2 or more, and no more than the images, "
                f"{info.num_images}"
            )
        info.require_two_images("the head's BatchNorm needs another image")
        wide = info.feature_dim >= WIDE_FEATURES
        self.components = options.components or (info.feature_dim // 2 if wide else info.feature_dim)
        if self.components > info.feature_dim:
            raise UserError(
                f"method.options.components = {self.components}: give no more than the backbone's features, "
                f"{info.feature_dim}"
            )
        if self.components >= info.num_images:
            raise UserError(
                f"method.options.components = {self.components}: whitened, {info.num_images} images would all be "
                "equally far from one another; give fewer components than images"
            )
        self.head = self.mlp_on_features([options.hidden, self.num_clusters], last_bias=True, activation=nn.LeakyReLU)
        self.labels = PseudoLabels(1, info.num_images, self.num_clusters, info.seed)
        self.register_buffer("weight", torch.ones(self.num_clusters))
        self.register_buffer("distance", torch.zeros(()))

    def before_step(self, clock: Clock, extract: Extract, world: World) -> list[nn.Parameter]:
        """At the start of an epoch: new labels and a new last layer, which is returned."""
        if clock.step % clock.steps_per_epoch:
            return []
        rows = extract(self.backbone, augmented=self.options.features_of == "augmented")
        labels, distance = self.cluster(rows, clock.epoch, world)
        self.labels.replace([0], [labels], rows.positions, world)
        self.weight.copy_(1 - self.labels.sizes(0).double() / self.info.num_images)
        self.distance.fill_(distance / self.info.num_images)
        return self.draw_last_layer(clock.epoch)

    def cluster(self, rows: Rows, epoch: int, world: World) -> tuple[Tensor, float]:
        """The clusters of this rank's rows, and the sum of the squared distances of all rows to their centres."""
        x_ND = whiten(rows.values.flatten(1), self.components, world)
        key = hash64(self.info.seed, METHOD, RELABEL, epoch)
        count, options = self.info.num_images, self.options
        return kmeans(x_ND, rows.positions, count, self.num_clusters, key, world, options.starts, options.iterations)

    @torch.no_grad()
    def draw_last_layer(self, epoch: int) -> list[nn.Parameter]:
        weight, bias = self.head[-1].parameters()
        drawn = LAST_LAYER_STD * normals(hash64(self.info.seed, METHOD, INIT, epoch), weight.numel())
        weight.copy_(torch.from_numpy(drawn).view_as(weight))
        bias.zero_()
        return [weight, bias]

    def forward(self, batch: Batch, world: World) -> Output:
        """Metrics: the share of images whose cluster the head predicts, in percent; what the last clustering was, with
        the mean squared distance to the centres (between unit vectors)."""
        [z_VBD] = self.represent(batch)
        logits_BK = at_least_float32(self.head(z_VBD.flatten(0, 1)))
        [labels_B] = self.labels.of(batch.positions)
        loss_share, weight_share = weighted_cross_entropy(logits_BK, labels_B, self.weight)
        metrics = {"accuracy": accuracy(logits_BK, labels_B, world), "cluster_distance": self.distance.clone()}
        loss = world.scale_for_ddp_mean(loss_share / world.all_reduce_sum(weight_share))
        return Output(loss, metrics | self.labels.metrics(), {}, world.gather_images(z_VBD[0].detach()))
