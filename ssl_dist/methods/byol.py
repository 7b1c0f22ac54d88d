"""BYOL: bootstrap your own latent (Grill et al., NeurIPS 2020, arXiv:2006.07733).

Two views of every image pass an online and a target network. From its embedding of the one view the online network
predicts the target's embedding of the other. The target is a moving average of the online network and has no gradient.
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ssl_dist.config import PositiveInt, Probability, Section
from ssl_dist.methods.base import Backbone, Batch, Clock, Info, Output, SSLMethod, World
from ssl_dist.nn.layers import ema_update, full_precision, mlp, rising_decay, target_network


class Options(Section):
    projector: list[PositiveInt] = Field(
        default_factory=lambda: [4096, 256],
        min_length=1,
        description="widths of the projector's layers; the last is that of the embeddings",
    )
    predictor: PositiveInt = Field(4096, description="hidden units of the predictor")
    tau: Probability = Field(0.996, description="share of the target that the first average keeps; rises to 1")


def regression(predicted_ND: Tensor, target_ND: Tensor) -> Tensor:
    """The squared distance of the unit vectors, 2 - 2 cos, a mean over the rows (equation 2)."""
    return 2 - 2 * F.cosine_similarity(predicted_ND, target_ND, dim=1).mean()


def symmetric(predicted_VBD: Tensor, target_VBD: Tensor) -> Tensor:
    """The sum of both directions, each view predicting the target's other one."""
    return regression(predicted_VBD[0], target_VBD[1]) + regression(predicted_VBD[1], target_VBD[0])


class Method(SSLMethod[Options]):
    num_views = 2
    views_together = False
    fixed_length = True  # tau

    def __init__(self, backbone: Backbone, info: Info, options: Options):
        super().__init__(backbone, info, options)
        info.require_two_images("the projector's BatchNorm needs another image")
        dim = options.projector[-1]
        self.projector = self.mlp_on_features(options.projector)
        self.predictor = mlp([dim, options.predictor, dim])
        self.target_backbone = target_network(backbone)
        self.target_projector = target_network(self.projector)

    def explain(self, world_size: int, device: str) -> dict[str, str]:
        return {"target": f"a moving average from tau {self.options.tau:g} on"}

    def forward(self, batch: Batch, world: World) -> Output:
        """Metrics: the mean cosine of prediction and target, and tau of the coming average."""
        with torch.no_grad():
            target_VBD = torch.cat(self.represent(batch, lambda x: self.target_projector(self.target_backbone(x))))
        predicted_VBD = torch.cat(self.represent(batch, lambda x: self.predictor(self.projector(self.backbone(x)))))
        with full_precision(predicted_VBD.device):
            # Ranks hold equally many images, so the mean of their means is that of the global batch.
            loss = symmetric(predicted_VBD, target_VBD)
        cosine = 1 - world.all_reduce_mean(loss.detach()) / 4
        metrics: dict[str, float | Tensor] = {"cosine": cosine, "tau": self._tau(batch.step)}
        return Output(loss, metrics, representations=world.gather_views(target_VBD))

    def _tau(self, step: int) -> float:
        """Of the average after step number `step`."""
        total = round(self.info.steps_per_epoch * self.info.total_epochs)
        return rising_decay(step / total, self.options.tau)

    def after_step(self, clock: Clock) -> None:
        """The target follows the online network (step: clock.step - 1)."""
        tau = self._tau(clock.step - 1)
        ema_update(self.target_backbone, self.backbone, tau)
        ema_update(self.target_projector, self.projector, tau)
