"""What is measured of the representation while it is trained: a kNN, and a linear probe that learns beside it."""

from collections.abc import Callable

from torch import Tensor, nn

from ssl_dist.clock import Clock
from ssl_dist.distributed.world import World
from ssl_dist.run.blueprint import RunPlan
from ssl_dist.train import online_knn, online_probe
from ssl_dist.train.online_knn import OnlineKNN
from ssl_dist.train.online_probe import OnlineProbe


class OnlineMeasures:
    """Those that the config asks for; None: not asked for."""

    def __init__(self, plan: RunPlan, world: World, feature_dim: int):
        self.settings, self.world = plan.config.log, world
        self.knn = None if self.settings.knn_every_epochs is None else OnlineKNN(plan, world)
        self.probe = None if self.settings.probe_every_epochs is None else OnlineProbe(plan, world, feature_dim)

    def due(self, clock: Clock) -> list[str]:
        """The names of those to measure now."""
        every = {online_knn.NAME: self.settings.knn_every_epochs, online_probe.NAME: self.settings.probe_every_epochs}
        return [name for name, epochs in every.items() if clock.due(every_epochs=epochs)]

    def measure(self, names: list[str], encoder: nn.Module, to_input: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Percent of the held-out images that each classifies right, by an encoder in evaluation mode. Every rank takes
        part."""
        values: dict[str, float] = {}
        queries_QD = None
        if online_knn.NAME in names and self.knn is not None:
            images = self.knn.images
            features_ND = images.features(encoder, to_input, self.world)
            values[online_knn.NAME] = self.knn.accuracy(features_ND)
            if self.probe is not None and self.probe.images.are_those_of(images):
                queries_QD = features_ND[-images.num_queries :]
        if online_probe.NAME in names and self.probe is not None:
            if queries_QD is None:
                queries_QD = self.probe.images.features(encoder, to_input, self.world, queries_only=True)
            values[online_probe.NAME] = self.probe.accuracy(queries_QD)
        return values
