"""What an evaluator of images works on."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ssl_dist.data.readers import read_info
from ssl_dist.dist import World
from ssl_dist.features import Encoder, Source
from ssl_dist.watchdog import Watchdog


@dataclass(frozen=True)
class Subject:
    """A run's encoder, the data set it is measured on, and the ranks that do it together.

    train_ids: the images of the training split that may be used, None: all; test_ids: those of the split `test` that
    are counted, None: all.
    """

    run: Path
    encoder: Encoder
    source: Source
    train: str
    test: str
    world: World
    dog: Watchdog
    train_ids: np.ndarray | None = None
    test_ids: np.ndarray | None = None

    @property
    def metadata(self) -> dict[str, str]:
        """What results.json keeps of it."""
        return {
            "dataset": self.source.name,
            "split": self.test,
            "data": read_info(self.source.root, self.test).sha256,
            "checkpoint": self.encoder.sha256,
            "step": str(self.encoder.step),
            "method": self.encoder.config.method.name,
            "backbone": self.encoder.config.backbone.name,
        }

    def digest(self, settings: dict) -> str:
        """Eight letters that stand for these settings on these images by this checkpoint."""
        parts = [json.dumps(settings, sort_keys=True), self.encoder.sha256, self.train, self.source.name]
        parts += [read_info(self.source.root, self.train).sha256]
        digest = hashlib.sha256("\n".join(parts).encode())
        if self.train_ids is not None:
            digest.update(self.train_ids.tobytes())
        return digest.hexdigest()[:8]
