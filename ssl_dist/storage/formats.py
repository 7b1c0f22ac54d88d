"""Where other programs keep a network in their files, and by which names: the table that `weights` looks things up in.

A file is read as one list of tensors, whose names are the keys on the way to them, joined by dots: MoCo's
`{"state_dict": {"module.encoder_q.conv1.weight": ...}}` has `state_dict.encoder_q.conv1.weight`. What wrappers add to
names is left out. A backbone's tensors then lie under one prefix, and by one naming.
"""

import re
from collections.abc import Callable, Mapping

# DataParallel and DDP, torch.compile, FSDP, activation checkpointing.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

# What stands before a backbone's names, and who saves it so. Where several hold all of a backbone, the first one
# counts: the project's own evaluation reads it.
PREFIXES = {
    "target_encoder.0.": "ReLIC's target encoder, which its evaluation reads",
    "online_encoder.0.": "ReLIC's online encoder",
    "encoder_q.": "MoCo's encoder of queries, which its evaluation reads",
    "encoder_k.": "MoCo's encoder of keys",
    "base_encoder.": "MoCo v3's base encoder, which its evaluation reads",
    "momentum_encoder.": "MoCo v3's momentum encoder",
    "teacher.backbone.": "the teacher of DINO, DINOv2 or iBOT, which their evaluations read",
    "student.backbone.": "the student of DINO, DINOv2 or iBOT",
    "teacher_embedding_model.wrapped_model._model.": "lightly-train's teacher, which it exports",
    "teacher_embedding_model.wrapped_model._features.": "lightly-train's teacher, which it exports",
    "embedding_model.wrapped_model._model.": "lightly-train",
    "embedding_model.wrapped_model._features.": "lightly-train",
    "student_embedding_model.wrapped_model._model.": "lightly-train's student",
    "student_embedding_model.wrapped_model._features.": "lightly-train's student",
    "lightly_train.models.model.": "lightly-train's whole network",
    "teacher_backbone.": "lightly's teacher, which its evaluation reads",
    "student_backbone.": "lightly's student",
    "online_network_state_dict.encoder.": "BYOL's online network, which its evaluation reads",
    "target_network_state_dict.encoder.": "BYOL's target network",
    "online_encoder.net.": "BYOL's online network",
    "target_encoder.net.": "BYOL's target network",
    "classy_state_dict.base_model.model.trunk._feature_blocks.": "VISSL",
    "classy_state_dict.base_model.model.trunk.base_net._feature_blocks.": "VISSL",
    "state_dict_ema.": "timm's average of the weights, which timm loads",
    "model_ema.": "timm's average of the weights, which timm loads",
    "backbone.": "as relational reasoning, SFRIK, VICReg, Barlow Twins, lightly and solo-learn save it",
    "momentum_backbone.": "the momentum backbone of solo-learn",
    "backbone_momentum.": "the momentum backbone of lightly",
    "encoder.": "as SimSiam and solo-learn save it",
    "": "a network alone",
    "0.": "ReLIC's encoder with its head",
}

# What may stand before those.
OUTERS = {
    "": "",
    "state_dict.": "as SeLa, MoCo, SwAV and Lightning save it",
    "model.": "as SFRIK, VICReg and MAE save it",
}

# Where a tensor's own name starts with the first, it starts with the second in the file.
TORCHVISION: dict[str, str] = {}  # and every backbone of one official code alone
TIMM = {"model.": ""}
SELA = {"conv1.": "features.0.", "bn1.": "features.1."} | {f"layer{i}.": f"features.{i + 3}." for i in (1, 2, 3, 4)}
RELIC = {"conv1.": "0.", "bn1.": "1."} | {f"layer{i}.": f"{i + 3}." for i in (1, 2, 3, 4)} | {"features.": "0."}

# Parts of a method that relational reasoning's official code saves beside the backbone, and the keys it gives them.
SEED_PARTS = {"relation_module": "relation", "classifier": "classifier"}


def renamed(name: str, prefixes: Mapping[str, str]) -> str:
    """`name` with the first of the prefixes that it starts with replaced."""
    for own, theirs in prefixes.items():
        if name.startswith(own):
            return theirs + name.removeprefix(own)
    return name


_PARTS_OF_TRANSFORMERS = (
    (r"^conv1\.", "embedder.embedder.convolution."),
    (r"^bn1\.", "embedder.embedder.normalization."),
    (r"^layer(\d)\.(\d+)\.downsample\.0\.", r"encoder.stages.\1.layers.\2.shortcut.convolution."),
    (r"^layer(\d)\.(\d+)\.downsample\.1\.", r"encoder.stages.\1.layers.\2.shortcut.normalization."),
    (r"^layer(\d)\.(\d+)\.conv(\d)\.", r"encoder.stages.\1.layers.\2.layer.\3.convolution."),
    (r"^layer(\d)\.(\d+)\.bn(\d)\.", r"encoder.stages.\1.layers.\2.layer.\3.normalization."),
)


def _of_transformers(name: str) -> str:
    """A ResNet's tensor as transformers calls it, which counts stages and layers from 0."""
    for own, theirs in _PARTS_OF_TRANSFORMERS:
        if re.match(own, name):
            name = re.sub(own, theirs, name)
            return re.sub(r"(stages|layer)\.(\d)\.", lambda m: f"{m[1]}.{int(m[2]) - 1}.", name)
    return name


OWN_NAMES = "the backbone's own names"

# The second is what lies in the file for a backbone's own name.
NAMINGS: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("timm's names", lambda name: renamed(name, TIMM)),
    (OWN_NAMES, str),
    ("SeLa's names", lambda name: renamed(name, SELA)),
    ("ReLIC's or a torch.nn.Sequential's names", lambda name: renamed(name, RELIC)),
    ("transformers' names", _of_transformers),
)


def unwrapped(name: str) -> str:
    """The name without what wrappers add to it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def rank(prefix: str) -> tuple[int, int]:
    """Where a prefix stands in the table: the lower, the rather it counts."""
    for i, known in enumerate(PREFIXES):
        for j, outer in enumerate(OUTERS):
            if prefix == outer + known:
                return i, j
    return len(PREFIXES), len(prefix)


def is_known(prefix: str) -> bool:
    """Whether the table has it."""
    return rank(prefix)[0] < len(PREFIXES)


def words(prefix: str) -> str:
    """Who saves a network under this prefix."""
    i, j = rank(prefix)
    if i == len(PREFIXES):
        return f"read under {prefix}"
    known, outer = list(PREFIXES)[i], list(OUTERS)[j]
    said = OUTERS[outer] if outer and not known else PREFIXES[known]
    return f"read under {prefix} ({said})" if prefix else said


# DINOv2 trains with its blocks in chunks: blocks.<chunk>.<block>., the block counted through.
CHUNK = re.compile(r"(^|\.)blocks\.\d+\.(\d+)\.")

# A vision transformer of transformers, whose tensors timm keeps under other names and joins.
_BLOCK = r"(?:encoder\.)?layer\.(\d+)\."
_VIT_PARTS = (
    (r"embeddings\.cls_token$", "cls_token"),
    (r"embeddings\.mask_token$", "mask_token"),
    (r"embeddings\.register_tokens$", "reg_token"),
    (r"embeddings\.position_embeddings$", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (_BLOCK + r"(?:layernorm_before|norm1)\.", r"blocks.\1.norm1."),
    (_BLOCK + r"(?:layernorm_after|norm2)\.", r"blocks.\1.norm2."),
    (_BLOCK + r"attention\.output\.dense\.", r"blocks.\1.attn.proj."),
    (_BLOCK + r"(?:intermediate\.dense|mlp\.fc1)\.", r"blocks.\1.mlp.fc1."),
    (_BLOCK + r"(?:output\.dense|mlp\.fc2)\.", r"blocks.\1.mlp.fc2."),
    (_BLOCK + r"layer_scale(\d)\.lambda1$", r"blocks.\1.ls\2.gamma"),
    (r"layernorm\.", "norm."),
)
QKV = re.compile(_BLOCK + r"attention\.attention\.query\.(weight|bias)$")


def vit_name(name: str) -> str:
    """timm's name of a tensor that transformers calls `name`, less what stands before."""
    for theirs, timms in _VIT_PARTS:
        found = re.search(theirs, name)
        if found is not None:
            return found.expand(timms) + name[found.end() :]
    return name
