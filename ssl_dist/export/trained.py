"""What is exported: a run's network with what is known of its training."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ssl_dist.backbones.timm_model import TimmModel
from ssl_dist.config import Config, to_tree
from ssl_dist.errors import UserError
from ssl_dist.export.preprocessing import preprocessing
from ssl_dist.methods.base import SSLMethod
from ssl_dist.nn.backbone import Backbone
from ssl_dist.run import network
from ssl_dist.run.encoder import Encoder, encoder_of
from ssl_dist.storage.formats import TIMM, renamed
from ssl_dist.storage.weights_file import FACTS, PREPROCESSING


@dataclass(frozen=True)
class Trained:
    """A method as a checkpoint has it, its encoder, and what else stands in the checkpoint."""

    method: SSLMethod
    encoder: Encoder
    state: dict[str, Any]

    @property
    def config(self) -> Config:
        return self.encoder.config

    @property
    def backbone(self) -> str:
        """The backbone's name in a config."""
        return self.config.backbone.name

    @property
    def feature_dim(self) -> int:
        """D, the numbers that the encoder makes of an image."""
        module = self.encoder.module
        assert isinstance(module, Backbone), "what a method evaluates is a backbone"
        return module.feature_dim

    @property
    def timm_arguments(self) -> dict[str, Any]:
        """What `timm.create_model` must be told of a network of timm's beside its name, for these tensors to fit."""
        if isinstance(self.encoder.module, TimmModel):
            return self.encoder.module.arguments
        return {} if self.encoder.channels == 3 else {"in_chans": self.encoder.channels}

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Those of the encoder, by the names that torchvision has, or timm in its own networks."""
        return {renamed(name, TIMM): tensor for name, tensor in plain(self.encoder.module).items()}

    @property
    def facts(self) -> dict[str, str]:
        """The metadata of an exported file, which `run.exported` reads back."""
        encoder = self.encoder
        normalize = json.dumps(to_tree(encoder.normalize))
        facts = (self.backbone, encoder.config.method.name, encoder.sha256, str(encoder.step), normalize)
        patch_size = encoder.config.backbone.patch_size
        more = {} if patch_size is None else {"patch_size": str(patch_size)}
        return {**dict(zip(FACTS, facts, strict=True)), PREPROCESSING: json.dumps(preprocessing(encoder)), **more}

    def safetensors(self) -> bytes:
        """A safetensors file of the encoder, without a classifier."""
        return safetensors.torch.save(self.tensors, {"format": "pt", **self.facts})


def read(run: Path) -> Trained:
    """Of a run's folder, or of a checkpoint file. Raises `UserError`, also where nothing was ever trained."""
    restored = network.restored(run)
    if restored.state["step"] == 0 and restored.config.backbone.weights is None:
        raise UserError(
            f"{restored.file}: holds random weights, of step 0 ({restored.config.method.name}); export a run that has "
            "trained, or one that begins from backbone.weights"
        )
    return Trained(restored.method, encoder_of(restored), restored.state)


def plain(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module, each contiguous and in memory of its own."""
    return {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in module.state_dict().items()
    }
