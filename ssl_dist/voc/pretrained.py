"""The backbone to transfer: a run's encoder, a file of `ssl-dist export`, or weights of others."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch

from ssl_dist import backbones
from ssl_dist.backbones.base import Backbone
from ssl_dist.config import Normalize, parse_yaml, validate
from ssl_dist.data.catalog import CATALOG
from ssl_dist.errors import UserError
from ssl_dist.run import encoder as run_encoder
from ssl_dist.run import export
from ssl_dist.storage import weights

KEYS = ("backbone.name", "views.normalize")


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
    given = dict(override.partition("=")[::2] for override in overrides)
    facts = {} if path.is_dir() else _facts(path)
    name = given.get("backbone.name", facts.get("backbone"))
    if name is None:
        if given:
            raise UserError(f"override {overrides[0]!r}: is for files of weights, and needs backbone.name=... too")
        encoder = run_encoder.load_encoder(path)
        settings = encoder.config
        backbone = _filled(settings.backbone.name, encoder.module.state_dict())
        return Pretrained(
            backbone, settings.backbone.name, settings.method.name, encoder.normalize, encoder.sha256, encoder.step,
            settings.seed,
        )  # fmt: skip
    if path.is_dir():
        raise UserError(f"override {overrides[0]!r}: {path} is a folder, whose run tells it; leave it out")
    normalize, step = _input(path, given, facts)
    found = weights.fit(backbones.build(name), name, path)
    print(found.note, file=sys.stderr, flush=True)
    backbone = _filled(name, found.tensors)
    return Pretrained(
        backbone, name, facts.get("method", path.name), normalize, found.sha256, step, None
    )  # fmt: skip


def _filled(name: str, tensors: dict[str, torch.Tensor]) -> Backbone:
    backbone = backbones.build(name)
    backbone.load_state_dict(tensors)
    return backbone.float().eval()


def _facts(path: Path) -> dict[str, str]:
    """What `ssl-dist export` tells of its file; nothing for a file of others."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            facts = file.metadata() or {}
    except (safetensors.SafetensorError, OSError):
        return {}  # no safetensors file; whoever reads it next says what is wrong with it
    return facts if set(export.FACTS) <= set(facts) else {}


def _input(path: Path, given: dict[str, str], facts: dict[str, str]) -> tuple[Normalize, int]:
    """How images are normalised, and the step that the file tells (0: none)."""
    known = CATALOG["imagenet"]
    normalize, step = Normalize(mean=known.paper_mean, std=known.paper_std), 0
    if facts:
        try:
            normalize, step = json.loads(facts["normalize"]), int(facts["step"])
        except ValueError:
            raise UserError(f"{path}: damaged metadata (normalize, step); export it again") from None
        normalize = validate(Normalize, normalize, f"{path}: normalize.")
    if "views.normalize" in given:
        tree = parse_yaml(given["views.normalize"], f"override 'views.normalize={given['views.normalize']}'")
        if not isinstance(tree, dict):
            raise UserError(f"views.normalize = {tree!r}: write {{mean: [r, g, b], std: [r, g, b]}}")
        normalize = validate(Normalize, tree, "views.normalize.")
    return normalize, step
