"""Supervised classification, the upper end of every table: cross-entropy on the labels of the training split.

With pseudo-labels in place of the labels (`data.labels`) and `rotation` it is the retraining of self-labelling (Asano,
Rupprecht & Vedaldi, ICLR 2020, arXiv:1911.05371): the label is told from the upright image and, as a second task, the
turn from the image turned by quarters (methods/rotation.py). One view of an image by default; with K of them it is the
supervised baseline of figure 2b of relational reasoning (arXiv:2006.05849).
"""

from collections.abc import Callable

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ssl_dist.config import Section
from ssl_dist.errors import UserError
from ssl_dist.methods.base import Backbone, Batch, Info, Output, SSLMethod, World, accuracy
from ssl_dist.methods.rotation import TURNS, turn_targets, turned
from ssl_dist.nn.layers import at_least_float32


class Options(Section):
    rotation: bool = Field(False, description="also tell by how many quarters an image is turned; both losses weigh 1")


class Method(SSLMethod[Options]):
    needs_labels = True
    num_views = 1
    free_views = True

    def __init__(self, backbone: Backbone, info: Info, options: Options):
        super().__init__(backbone, info, options)
        if info.num_classes < 1:
            raise UserError("data.split: supervised needs labels and there are none; choose a labelled split")
        self.num_views = info.views_of_one_group("supervised")
        self.classifier = nn.Linear(info.feature_dim, info.num_classes)
        if options.rotation:
            self.rotation_classifier = nn.Linear(info.feature_dim, TURNS)

    def represent(self, batch: Batch, network: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
        """Of every view [V_local, B_local, D]; with rotation of its four turns, [4 * V_local, B_local, D], the upright
        ones first."""
        return super().represent(turned(batch) if self.options.rotation else batch, network)

    def logits(self, images: Tensor) -> dict[str, Tensor]:
        return {"output": at_least_float32(self.classifier(self.backbone(images)))}

    def forward(self, batch: Batch, world: World) -> Output:
        """Metrics: accuracy of the labels in percent; with rotation the accuracy of the turns and both losses too."""
        h_RBD = self.represent(batch)[0]
        upright_VBD = h_RBD[: len(batch.view_ids[0])]
        logits, labels = self.classifier(upright_VBD.flatten(0, 1)), batch.labels.repeat(len(upright_VBD))
        logits = at_least_float32(logits)
        loss = F.cross_entropy(logits, labels)
        metrics = {"accuracy": accuracy(logits, labels, world)}
        if self.options.rotation:
            turns = at_least_float32(self.rotation_classifier(h_RBD.flatten(0, 1)))
            target = turn_targets(len(logits), h_RBD.device)
            rotation_loss = F.cross_entropy(turns, target)
            metrics["accuracy_rotation"] = accuracy(turns, target, world)
            metrics |= {
                "loss_labels": world.all_reduce_mean(loss.detach()),
                "loss_rotation": world.all_reduce_mean(rotation_loss.detach()),
            }
            loss = loss + rotation_loss
        return Output(loss, metrics, representations=world.gather_images(h_RBD[0].detach()))
