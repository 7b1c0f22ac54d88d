"""Supervised classification, the upper end of every table: cross-entropy on the labels of the training split.

With pseudo-labels in place of the labels (`data.labels`) and `rotation` it is the retraining of self-labelling (Asano,
Rupprecht & Vedaldi, ICLR 2020, arXiv:1911.05371): the label is told from the upright image and, as a second task, the
turn from the image turned by quarters (methods/rotation.py).
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

    def __init__(self, backbone: Backbone, info: Info, options: Options):
        super().__init__(backbone, info, options)
        if info.num_classes < 1:
            raise UserError("data.split: supervised needs labels and there are none; choose a labelled split")
        self.classifier = nn.Linear(info.feature_dim, info.num_classes)
        if options.rotation:
            self.rotation_classifier = nn.Linear(info.feature_dim, TURNS)

    def represent(self, batch: Batch, network: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
        """Of every image [1, B_local, D]; with rotation of its four turns, [4, B_local, D], the upright ones first."""
        return super().represent(turned(batch) if self.options.rotation else batch, network)

    def logits(self, images: Tensor) -> dict[str, Tensor]:
        return {"output": at_least_float32(self.classifier(self.backbone(images)))}

    def forward(self, batch: Batch, world: World) -> Output:
        """Metrics: accuracy of the labels in percent; with rotation the accuracy of the turns and both losses too."""
        h_VBD = self.represent(batch)[0]
        logits = at_least_float32(self.classifier(h_VBD[0]))
        loss = F.cross_entropy(logits, batch.labels)
        metrics = {"accuracy": accuracy(logits, batch.labels, world)}
        if self.options.rotation:
            turns = at_least_float32(self.rotation_classifier(h_VBD.flatten(0, 1)))
            target = turn_targets(h_VBD.shape[1], h_VBD.device)
            rotation_loss = F.cross_entropy(turns, target)
            metrics["accuracy_rotation"] = accuracy(turns, target, world)
            metrics |= {
                "loss_labels": world.all_reduce_mean(loss.detach()),
                "loss_rotation": world.all_reduce_mean(rotation_loss.detach()),
            }
            loss = loss + rotation_loss
        return Output(loss, metrics, representations=world.gather_images(h_VBD[0].detach()))
