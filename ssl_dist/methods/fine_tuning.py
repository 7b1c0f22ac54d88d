"""Fine-tuning: a linear classifier on the backbone's output, and the whole network trained with it.

The rate of the classifier differs from the backbone's in every published recipe: it begins from random weights.
"""

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ssl_dist.config import PositiveFloat, Section
from ssl_dist.errors import UserError
from ssl_dist.methods.base import Backbone, Batch, Info, Output, SSLMethod, World, accuracy
from ssl_dist.methods.linear_probe import OUTPUT
from ssl_dist.nn.layers import at_least_float32


class Options(Section):
    head_lr: PositiveFloat = Field(1.0, description="learning rate of the classifier, as a factor of the backbone's")
    init: PositiveFloat | None = Field(
        None, description="classifier's weights from N(0, init), intercepts 0 (SFRIK and VICReg: 0.01); null: torch's"
    )


class Method(SSLMethod[Options]):
    needs_labels = True
    num_views = 1

    def __init__(self, backbone: Backbone, info: Info, options: Options):
        super().__init__(backbone, info, options)
        if info.num_classes < 1:
            raise UserError("data.split: fine-tuning needs labels and there are none; choose a labelled split")
        self.classifier = nn.Linear(info.feature_dim, info.num_classes)
        if options.init is not None:
            nn.init.normal_(self.classifier.weight, 0, options.init)
            nn.init.zeros_(self.classifier.bias)

    def parameter_groups(self) -> list[dict]:
        backbone = {"params": [p for p in self.backbone.parameters() if p.requires_grad]}
        return [backbone, {"params": list(self.classifier.parameters()), "lr_factor": self.options.head_lr}]

    def logits(self, images: Tensor) -> dict[str, Tensor]:
        """[N, C] of the classifier, at least float32, from images [N, C, S, S]."""
        return {OUTPUT: at_least_float32(self.classifier(self.backbone(images)))}

    def forward(self, batch: Batch, world: World) -> Output:
        """Metrics: accuracy in percent."""
        with self.keyed(batch, batch.view_ids[0]):
            logits_BC = self.logits(batch.views[0][0])[OUTPUT]
        return Output(F.cross_entropy(logits_BC, batch.labels), {"accuracy": accuracy(logits_BC, batch.labels, world)})
