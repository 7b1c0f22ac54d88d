"""A folder of config.json and model.safetensors, as timm and the Hugging Face hub keep a model."""

import json
from typing import Any

from ssl_dist.export.libraries import OF_TIMM
from ssl_dist.export.preprocessing import FILE, preprocessing, timm_settings
from ssl_dist.export.trained import Trained
from ssl_dist.storage.hub import FILES

CONFIG, WEIGHTS = "config.json", FILES[0]


def is_of_timm(backbone: str) -> bool:
    """Whether timm has a network with the tensors of this backbone."""
    return backbone in OF_TIMM or backbone.startswith("timm/")


def folder(trained: Trained) -> dict[str, bytes]:
    """The files of the folder by their names: weights, config and preprocessing."""
    config: dict[str, Any] = {"num_features": trained.feature_dim}
    if is_of_timm(trained.backbone):
        config = _timm_config(trained) | config
    steps = preprocessing(trained.encoder)
    config["ssl_dist"] = {
        key: value for key, value in trained.facts.items() if key not in ("normalize", "preprocessing")
    }
    config["ssl_dist"]["preprocessing"] = steps
    return {WEIGHTS: trained.safetensors(), CONFIG: as_json(config), FILE: as_json(steps)}


def _timm_config(trained: Trained) -> dict[str, Any]:
    """What `timm.create_model("local-dir:...")` reads: the architecture and its arguments, and in pretrained_cfg what
    its loader and `timm.data.resolve_model_data_config` ask for."""
    name, settings = trained.backbone.removeprefix("timm/"), timm_settings(trained.encoder)
    arguments = trained.timm_arguments
    if name == trained.backbone:
        settings |= {"first_conv": "conv1", "classifier": "fc"}
    else:
        own: dict[str, Any] = trained.encoder.module.model.pretrained_cfg  # type: ignore[assignment, union-attr]
        settings |= {key: own[key] for key in ("first_conv", "classifier") if own.get(key) is not None}
        size = list(own["input_size"][1:])
        settings["fixed_input_size"] = bool(own.get("fixed_input_size")) and size == settings["input_size"][1:]
        if own.get("fixed_input_size") and not settings["fixed_input_size"]:
            # else timm would make another network, for images of input_size
            arguments = {"img_size": size} | arguments
    more = {"model_args": arguments} if arguments else {}
    return {"architecture": name, "num_classes": 0, **more, "pretrained_cfg": {**settings, "num_classes": 0}}


def as_json(tree: dict[str, Any]) -> bytes:
    return (json.dumps(tree, indent=2, ensure_ascii=False) + "\n").encode()
