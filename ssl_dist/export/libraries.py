"""A backbone's tensors in one file, by the names of another library's network, or as relational reasoning's official
code (the "seed" of this program) saves its networks.

detectron2's and mmengine's own loaders read files of torch.save alone: theirs hold tensors and plain values, so that
torch.load(..., weights_only=True) reads them, too.
"""

import io
import re
from typing import Any

import torch
from torch import Tensor

from ssl_dist.export.trained import Trained, plain
from ssl_dist.storage.formats import SEED_PARTS

# Backbones of ours that are those of the library, tensor by tensor and under the same name.
OF_TORCHVISION = ("resnet18", "resnet34", "resnet50", "resnet101", "efficientnet_b0", "efficientnet_v2_s")
OF_TIMM = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet200")
# What ResNet(depth) of detectron2, mmdet and mmpretrain computes with strides in its 3x3 convolutions.
OF_DETECTORS = ("resnet18", "resnet34", "resnet50", "resnet101")

_DETECTRON2 = (
    (r"^(?=conv1|bn1)", "stem."),
    (r"^layer(\d)", lambda found: f"res{int(found[1]) + 1}"),
    (r"bn(\d)", r"conv\1.norm"),
    (r"downsample\.0", "shortcut"),
    (r"downsample\.1", "shortcut.norm"),
)


def torchvision(trained: Trained, out: str) -> tuple[bytes, str]:
    """A safetensors file; and Python that loads it from `out`."""
    name = trained.backbone
    last = f"model.{'fc' if name.startswith('resnet') else 'classifier'} = torch.nn.Identity(); "
    return trained.safetensors(), f"model = torchvision.models.{name}(); {last}{_load(out)}"


def timm(trained: Trained, out: str) -> tuple[bytes, str]:
    """A safetensors file; and Python that loads it from `out`."""
    model = trained.backbone.removeprefix("timm/")
    more = "".join(f", {key}={value!r}" for key, value in trained.timm_arguments.items())
    return trained.safetensors(), f"model = timm.create_model({model!r}, num_classes=0{more}); {_load(out)}"


def _load(out: str) -> str:
    return f"model.load_state_dict(safetensors.torch.load_file({out!r}))"


def detectron2(trained: Trained, out: str) -> tuple[bytes, str]:
    """A .pth file of what `DetectionCheckpointer` looks for: the model by detectron2's names, which it is told to find
    below whatever the user's model calls its backbone. And Python that configures a ResNet which loads it."""
    tensors = {
        detectron2_name(name): tensor
        for name, tensor in trained.tensors.items()
        if not name.endswith("num_batches_tracked")  # which its frozen BatchNorm has not
    }
    depth = _depth(trained)
    mean, std = _of_255(trained)
    options = [
        "MODEL.WEIGHTS", out, "MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.STRIDE_IN_1X1", False,
        *(["MODEL.RESNETS.RES2_OUT_CHANNELS", 64] if depth < 50 else []),
        "INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", mean, "MODEL.PIXEL_STD", std,
    ]  # fmt: skip
    content = {"model": tensors, "__author__": "ssl_dist", "matching_heuristics": True}
    return _saved(content), f"cfg.merge_from_list({options})"


def detectron2_name(name: str) -> str:
    """detectron2's name of a tensor of torchvision's ResNet, as tools/convert-torchvision-to-d2.py there has it."""
    for theirs, detectron2s in _DETECTRON2:
        name = re.sub(theirs, detectron2s, name)
    return name


def mmdet(trained: Trained, out: str) -> tuple[bytes, str]:
    """A .pth file for init_cfg of mmengine's networks, whose ResNet has torchvision's names. And Python of a config."""
    mean, std = _of_255(trained)
    content = {"meta": {key: trained.facts[key] for key in sorted(trained.facts)}, "state_dict": trained.tensors}
    backbone = (
        f"dict(type='ResNet', depth={_depth(trained)}, style='pytorch', "
        f"init_cfg=dict(type='Pretrained', checkpoint={out!r}))"
    )
    images = f"dict(type='DetDataPreprocessor', mean={mean}, std={std}, bgr_to_rgb=True)"
    return _saved(content), f"model = dict(backbone={backbone}, data_preprocessor={images})"


def _depth(trained: Trained) -> int:
    return int(trained.backbone.removeprefix("resnet"))


def _of_255(trained: Trained) -> tuple[list[float], list[float]]:
    """Mean and std of pixels in 0..255."""
    normalize = trained.encoder.normalize
    mean, std = ([round(255 * value, 4) for value in values] for values in (normalize.mean, normalize.std))
    return mean, std


def seed(trained: Trained, out: str) -> tuple[bytes, str]:
    """torch.save of {"backbone": state_dict} and the method's heads, and their optimizer; and Python that loads the
    backbone from `out`."""
    method = trained.method
    parts = {key: getattr(method, part) for part, key in SEED_PARTS.items() if hasattr(method, part)}
    archive: dict[str, Any] = {"backbone": plain(trained.encoder.module)}
    archive |= {key: plain(part) for key, part in parts.items()}
    if parts:
        number = len(list(method.backbone.parameters()))
        archive["optimizer"] = _in_two_groups(trained.state["optimizer"], number)
    line = f"backbone.load_state_dict(torch.load({out!r}, weights_only=True)['backbone'])"
    return _saved(archive), line


def _in_two_groups(optimizer: dict[str, Any], num_of_backbone: int) -> dict[str, Any]:
    """The state of an optimizer with one group as that of one with a group for the backbone and another for the head,
    which the official code makes."""
    [group] = optimizer["param_groups"]
    numbers = group["params"]
    parts = (numbers[:num_of_backbone], numbers[num_of_backbone:])
    return {"state": optimizer["state"], "param_groups": [group | {"fused": None, "params": part} for part in parts]}


def _saved(content: dict[str, Any] | dict[str, Tensor]) -> bytes:
    whole = io.BytesIO()  # torch replaces the error of a write by one of its own
    torch.save(content, whole)
    return whole.getvalue()
