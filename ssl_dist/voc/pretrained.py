"""The backbone to transfer: a run's encoder, a file of `ssl-dist export`, or weights of others."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ssl_dist import backbones
from ssl_dist.config import Normalize, parse_yaml, validate
from ssl_dist.config.schema import Backbone as BackboneSection
from ssl_dist.data.catalog import CATALOG
from ssl_dist.errors import UserError, quoted
from ssl_dist.nn.backbone import Backbone
from ssl_dist.run import encoder as run_encoder
from ssl_dist.run import network
from ssl_dist.run.blueprint import check_constants
from ssl_dist.storage import hub, weights_file

KEYS = ("backbone.name", "backbone.weights_prefix", "views.normalize")


@dataclass(frozen=True)
class Pretrained:
    """A backbone in evaluation mode with what its input needs and where it comes from. seed: None where not known."""

    backbone: Backbone
    name: str
    method: str
    normalize: Normalize
    sha256: str
    step: int
    seed: int | None


def load(path: Path, overrides: Sequence[str]) -> Pretrained:
    """What `path` holds: a run's folder, its checkpoint, or a file of weights. Raises `UserError`.

    overrides: of a file of weights `backbone.name` (needed unless `ssl-dist export` wrote the file) and
    `views.normalize` (unless given: that of the export, else ImageNet's).
    """
    values = dict(override.partition("=")[::2] for override in overrides)
    path = hub.located(str(path)) if hub.is_name(str(path)) else hub.file_in(path)
    metadata = {} if path.is_dir() else weights_file.facts(path)
    name = values.get("backbone.name", metadata.get("backbone"))
    if name is None:
        if values:
            raise UserError(
                f"override {quoted(overrides[0])}: is for files of weights, and needs backbone.name=... too"
            )
        encoder = run_encoder.load_encoder(path)
        if encoder.channels != 3:
            raise UserError(
                f"{path}: its network takes images of {encoder.channels} channels, and VOC's are RGB; give another run"
            )
        settings = encoder.config
        backbone = _filled(network.build_backbone(settings, 3), encoder.module.state_dict())
        return Pretrained(
            backbone, settings.backbone.name, settings.method.name, encoder.normalize, encoder.sha256, encoder.step,
            settings.seed,
        )  # fmt: skip
    if path.is_dir():
        raise UserError(f"override {quoted(overrides[0])}: {path} is a folder, whose run tells it; leave it out")
    normalize, step = _normalize_and_step(path, values, metadata)
    section = BackboneSection(name=name, weights_prefix=values.get("backbone.weights_prefix"))
    fitted = network.fitted(path, backbones.build(name), section)
    print(fitted.note, file=sys.stderr, flush=True)
    backbone = _filled(backbones.build(name), fitted.tensors)
    return Pretrained(backbone, name, metadata.get("method", path.name), normalize, fitted.sha256, step, None)


def _filled(backbone: Backbone, tensors: dict[str, torch.Tensor]) -> Backbone:
    backbone.load_state_dict(tensors)
    return backbone.float().eval()


def _normalize_and_step(path: Path, values: dict[str, str], metadata: dict[str, str]) -> tuple[Normalize, int]:
    """How images are normalised, and the step in the file's metadata (0: none). values: those of the overrides."""
    imagenet = CATALOG["imagenet"]
    normalize, step = Normalize(mean=imagenet.paper_mean, std=imagenet.paper_std), 0
    if metadata:
        try:
            tree, step = json.loads(metadata["normalize"]), int(metadata["step"])
        except ValueError:
            raise UserError(f"{path}: damaged metadata (normalize, step); export it again") from None
        normalize = validate(Normalize, tree, f"{path}: normalize.")
    if "views.normalize" in values:
        tree = parse_yaml(values["views.normalize"], f"override 'views.normalize={values['views.normalize']}'")
        if not isinstance(tree, dict):
            raise UserError(f"views.normalize = {quoted(tree)}: write {{mean: [r, g, b], std: [r, g, b]}}")
        normalize = validate(Normalize, tree, "views.normalize.")
        check_constants(normalize, 3, "leave it out")
    return normalize, step
