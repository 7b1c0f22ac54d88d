"""Weights of other programs: files of the official codes, torchvision and timm, read without running code from them.

A file is a state_dict, or a dictionary that holds one (`CONTAINERS`). The backbone's tensors lie in it under a prefix
(`PREFIXES`), by the names of the program that wrote it (`NAMINGS`). All combinations are tried, so the program need not
be named.
"""

import hashlib
import itertools
import pickle
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ssl_dist.errors import UserError
from ssl_dist.reading import open_regular
from ssl_dist.storage import torch_file
from ssl_dist.storage.torch_file import DAMAGED_FILE_ERRORS

# Where a tensor's own name starts with the first, it starts with the second in the file.
TORCHVISION: dict[str, str] = {}  # and every backbone of one official code alone
TIMM = {"model.": ""}
SELA = {"conv1.": "features.0.", "bn1.": "features.1."} | {f"layer{i}.": f"features.{i + 3}." for i in (1, 2, 3, 4)}
RELIC = {"conv1.": "0.", "bn1.": "1."} | {f"layer{i}.": f"{i + 3}." for i in (1, 2, 3, 4)} | {"features.": "0."}

NAMINGS = (
    ("the backbone's own names", TORCHVISION),
    ("timm's names", TIMM),
    ("SeLa's names", SELA),
    ("ReLIC's names", RELIC),
)

# The key of a dictionary that holds the state_dict, and who saves it so.
CONTAINERS = {
    "backbone": "as relational reasoning saves it",
    "state_dict": "as SeLa and MoCo save it",
    "model": "as SFRIK and VICReg save it",
}

# What stands before the backbone's names: in SFRIK and VICReg; in ReLIC, whose evaluation reads the target; in ReLIC's
# encoder with its head; in MoCo, whose evaluation reads the query's encoder.
PREFIXES = ("", "backbone.", "target_encoder.0.", "0.", "encoder_q.")

KNOWN_FORMATS = (
    "a state_dict of torchvision, timm, SFRIK, VICReg, SeLa, ReLIC or MoCo, or a dictionary with one under "
    "backbone (relational reasoning), state_dict (SeLa, MoCo) or model (SFRIK, VICReg)"
)
# The metadata that `ssl-dist export` gives a safetensors file: names, the checkpoint's SHA-256 and step, and the mean
# and std (JSON) that its images were normalised with.
FACTS = ("backbone", "method", "checkpoint", "step", "normalize")

REMEDY = "save the network's state_dict anew, or give another file"


@dataclass(frozen=True)
class Weights:
    """A backbone's tensors by its own names, found in a file. format: the file's, in words; unused: names in the file
    of what is no part of the backbone; sha256: of the file."""

    path: Path
    format: str
    tensors: dict[str, Tensor]
    unused: list[str]
    sha256: str

    @property
    def note(self) -> str:
        """One line: what was read, and what was left."""
        shown = ", ".join(self.unused[:8]) + (f" and {len(self.unused) - 8} more" if len(self.unused) > 8 else "")
        return f"{self.path}: {self.format}; not used: {shown or 'nothing'}"


def fit(backbone: nn.Module, name: str, path: Path) -> Weights:
    """The tensors of `backbone`, which is called `name`, in the file at `path`, shapes checked; it is left as it is.

    Every tensor must be there, but for BatchNorm's counts of batches, which old files lack: they become 0. Raises
    `UserError`.
    """
    tree, sha256 = read(path)
    own = backbone.state_dict()
    container, stored = _state_dict(path, tree)
    combinations = [
        (f"{container}, {title}", prefix, {tensor: prefix + renamed(tensor, naming) for tensor in own})
        for prefix, (title, naming) in itertools.product(PREFIXES, NAMINGS)
    ]
    layout, prefix, theirs = max(combinations, key=lambda each: sum(name in stored for name in each[2].values()))
    if not stored.keys() & theirs.values():
        first = ", ".join(list(stored)[:4])
        raise UserError(f"{path}: holds no tensor of backbone {name}; it holds {first}, ...; known are {KNOWN_FORMATS}")
    tensors = {}
    for tensor, expected in own.items():
        if theirs[tensor] in stored:
            tensors[tensor] = stored[theirs[tensor]]
        elif tensor.endswith(".num_batches_tracked"):
            tensors[tensor] = torch.zeros((), dtype=torch.int64)
        else:
            missing = sum(key not in stored for key in theirs.values() if not key.endswith("num_batches_tracked"))
            raise UserError(
                f"{path}: lacks {theirs[tensor]} of backbone {name} ({missing} of its {len(own)} tensors are missing; "
                f"read as: {layout}); give the backbone.name that the file was trained with"
            )
        if tensors[tensor].shape != expected.shape:
            raise UserError(
                f"{path}: {theirs[tensor]} has shape {list(tensors[tensor].shape)}, in backbone {name} "
                f"{list(expected.shape)}; give the backbone.name that the file was trained with"
            )
        _check(path, theirs[tensor], tensors[tensor], expected)
    unused = sorted(stored.keys() - theirs.values())
    _refuse_another_network(path, name, prefix, {key: stored[key] for key in unused}, theirs.values())
    return Weights(path, layout, tensors, unused, sha256)


def _refuse_another_network(
    path: Path, name: str, prefix: str, unused: Mapping[str, Tensor], used: Collection[str]
) -> None:
    """Raises `UserError` where the file has weights within a series of numbered blocks of which the backbone uses some:
    those of a deeper network (ResNet-101 in ResNet-50), or of one whose blocks are others. Tables that are computed
    from the sizes alone are no weights. prefix: what stands before the backbone's names."""
    series = {parent for key in used for parent in _series(key.removeprefix(prefix))}
    for key, tensor in unused.items():
        is_weight = tensor.is_floating_point() and not key.endswith(("attn_mask", "relative_coords_table"))
        if is_weight and key.startswith(prefix) and not series.isdisjoint(_series(key.removeprefix(prefix))):
            raise UserError(
                f"{path}: holds {key}, which backbone {name} does not have: the weights are of another network; give "
                "the backbone.name that the file was trained with"
            )


def _series(key: str) -> list[str]:
    """The modules that a numbered part of the name lies in: `layer1.0.conv1.weight` lies in `layer1`."""
    parts = key.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts)) if parts[i].isdecimal()]


def _check(path: Path, name: str, tensor: Tensor, own: Tensor) -> None:
    """Raises `UserError` for a tensor whose values cannot be loaded into the backbone's `own`, or should not."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        kind = "meta" if tensor.is_meta else "quantized" if tensor.is_quantized else tensor.layout
        fault = f"is no dense tensor with values ({kind})"
    elif own.is_floating_point() and not tensor.is_floating_point():
        fault = f"is of {tensor.dtype}, not of floating point"
    elif not torch.isfinite(tensor).all():
        fault = "holds values that are not finite"
    else:
        return
    raise UserError(f"{path}: {name} {fault}; {REMEDY}")


def renamed(name: str, prefixes: Mapping[str, str]) -> str:
    """`name` with the first of the prefixes that it starts with replaced."""
    for own, theirs in prefixes.items():
        if name.startswith(own):
            return theirs + name.removeprefix(own)
    return name


def read(path: Path) -> tuple[Any, str]:
    """What a .safetensors file or one of torch.save holds, tensors and plain values only, and the file's SHA-256.

    Raises `UserError` when it holds anything else, is no regular file, or would take more memory than its size
    justifies (see `torch_file`); nothing in it is run.
    """
    try:
        with open_regular(path) as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            # safetensors begins with the length of its header in 8 bytes, torch's files with PK or a pickle's protocol
            is_safetensors = file.read(9)[8:] == b"{"
            file.seek(0)
            return (safetensors.torch.load(file.read()) if is_safetensors else torch_file.load(file)), sha256
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except pickle.UnpicklingError as error:
        match = re.search(r"GLOBAL (\S+)", str(error))
        what = f"the object {match[1]}" if match else "something else than tensors and plain values"
        raise UserError(
            f"{path}: not read, for it holds {what}, which could run code; save its state_dict alone where you trust it"
        ) from None
    except DAMAGED_FILE_ERRORS as error:
        reason = torch_file.reason_of(error)
        raise UserError(f"{path}: no weights that torch or safetensors can read: {reason}; {REMEDY}") from None


def facts(path: Path) -> dict[str, str]:
    """What `ssl-dist export` wrote about its file; empty for a file of others."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (safetensors.SafetensorError, OSError):
        return {}  # no safetensors file; whoever reads it next says what is wrong with it
    return metadata if set(FACTS) <= set(metadata) else {}


def _state_dict(path: Path, tree: Any) -> tuple[str, dict[str, Tensor]]:
    """The state_dict in what a file holds, and that it is one in words. Wrappers (DataParallel, torch.compile) leave
    their word in names; it is taken out."""
    if _is_state_dict(tree):
        return "a state_dict", _unwrapped(path, tree)
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds a {type(tree).__name__}; known are {KNOWN_FORMATS}")
    keys = ", ".join(map(str, list(tree)[:8]))
    if {"format", "method", "config"} <= set(tree):
        raise UserError(
            f"{path}: a checkpoint of ssl_dist; extract reads it without backbone.*, and for backbone.weights "
            "`ssl-dist export RUN --format torchvision` writes its encoder (or --format timm, seed)"
        )
    for key, words in CONTAINERS.items():
        if _is_state_dict(tree.get(key)):
            return f"a dictionary of {keys} ({words})", _unwrapped(path, tree[key])
    raise UserError(f"{path}: an unknown dictionary of {keys}; known are {KNOWN_FORMATS}")


def _is_state_dict(tree: Any) -> bool:
    return (
        isinstance(tree, dict)
        and len(tree) > 0
        and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in tree.items())
    )


def _unwrapped(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    wrappers, unwrapped = ("module", "_orig_mod"), dict[str, Tensor]()
    for key, tensor in tensors.items():
        name = ".".join(part for part in key.split(".") if part not in wrappers)
        if name in unwrapped:
            raise UserError(
                f"{path}: holds {name} twice, alone and wrapped as {key}; save the state_dict of one of them"
            )
        unwrapped[name] = tensor
    return unwrapped
