"""A run's encoder in a file that other programs load: by torchvision's or timm's names, or as relational reasoning's
official code (the "seed" of this program) saves its networks."""

import io
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ssl_dist.config import to_tree
from ssl_dist.errors import UserError
from ssl_dist.run.encoder import load_method
from ssl_dist.storage import checkpoint
from ssl_dist.storage.durable import atomic_write_or_refuse
from ssl_dist.storage.formats import TIMM, renamed
from ssl_dist.storage.weights_file import FACTS

# Backbones of ours that are those of the library, tensor by tensor and under the same name.
OF_TORCHVISION = ("resnet18", "resnet34", "resnet50", "resnet101", "efficientnet_b0", "efficientnet_v2_s")
OF_TIMM = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet200")

# Parts of a method that the official code saves beside the backbone, and the keys that it gives them.
SEED_PARTS = {"relation_module": "relation", "classifier": "classifier"}


def export(run: Path, form: str, out: Path) -> str:
    """Write the encoder of a run (or of a checkpoint file) to `out`; returns Python that loads it.

    form: torchvision or timm, a safetensors file without a classifier; seed, torch.save of {"backbone": state_dict}
    and the method's heads, and their optimizer. Raises `UserError` where the library has no such backbone.
    """
    method, encoder = load_method(run)
    name, tensors = encoder.config.backbone.name, _plain(encoder.module)
    line = _loader(form, name).format(file=str(out))
    with atomic_write_or_refuse(out) as file:
        if form == "seed":
            parts = {key: getattr(method, part) for part, key in SEED_PARTS.items() if hasattr(method, part)}
            archive = {"backbone": tensors} | {key: _plain(part) for key, part in parts.items()}
            if parts:
                optimizer = checkpoint.load(encoder.file)["optimizer"]
                archive["optimizer"] = _in_two_groups(optimizer, len(list(method.backbone.parameters())))
            whole = io.BytesIO()  # torch replaces the error of a write by one of its own
            torch.save(archive, whole)
            file.write(whole.getbuffer())
            return line
        normalize = json.dumps(to_tree(encoder.normalize))
        facts = (name, encoder.config.method.name, encoder.sha256, str(encoder.step), normalize)
        metadata = {"format": "pt", **dict(zip(FACTS, facts, strict=True))}
        file.write(safetensors.torch.save({renamed(key, TIMM): value for key, value in tensors.items()}, metadata))
    return line


def _loader(form: str, name: str) -> str:
    """Python that loads a file of this format into the library's network. Raises `UserError` when it has none."""
    if form == "seed":
        return "backbone.load_state_dict(torch.load({file!r}, weights_only=True)['backbone'])"
    names = OF_TORCHVISION if form == "torchvision" else OF_TIMM
    if name in names or (form == "timm" and name.startswith("timm/")):
        make, last = f"timm.create_model({name.removeprefix('timm/')!r}, num_classes=0)", ""
        if form == "torchvision":
            make = f"torchvision.models.{name}()"
            last = f"model.{'fc' if name.startswith('resnet') else 'classifier'} = torch.nn.Identity(); "
        return f"model = {make}; {last}model.load_state_dict(safetensors.torch.load_file({{file!r}}))"
    there = ", ".join(names) + (" and timm/<name>" if form == "timm" else "")
    raise UserError(
        f"--format {form}: {form} has no network with the tensors of backbone {name}, but of {there}; use --format seed"
    )


def _in_two_groups(optimizer: dict[str, Any], num_of_backbone: int) -> dict[str, Any]:
    """The state of an optimizer with one group as that of one with a group for the backbone and another for the head,
    which the official code makes."""
    [group] = optimizer["param_groups"]
    numbers = group["params"]
    parts = (numbers[:num_of_backbone], numbers[num_of_backbone:])
    return {"state": optimizer["state"], "param_groups": [group | {"fused": None, "params": part} for part in parts]}


def _plain(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module, each contiguous and in memory of its own."""
    return {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in module.state_dict().items()
    }
