"""Files of weights: what torch.save and safetensors wrote, as tensors by name, read without running code from them."""

import hashlib
import pickle
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ssl_dist.errors import UserError
from ssl_dist.reading import open_regular
from ssl_dist.storage import formats, torch_file
from ssl_dist.storage.inert import Inert
from ssl_dist.storage.torch_file import DAMAGED_FILE_ERRORS

# The metadata that `ssl-dist export` gives a safetensors file: names, the checkpoint's SHA-256 and step, and the mean
# and std (JSON) that its images were normalised with.
FACTS = ("backbone", "method", "checkpoint", "step", "normalize")
PREPROCESSING = "preprocessing"  # also there (JSON), but in files of before: the whole of how images are prepared

MAX_NAME = 1000  # letters of a tensor's name, which has all keys on the way
REMEDY = "save the network's state_dict anew, or give another file"


class OwnCheckpoint(UserError):
    """A file is no other program's, but a checkpoint of ours."""


@dataclass(frozen=True)
class Content:
    """The tensors of a file by their names, which are the keys on the way to them joined by dots, without what wrappers
    add. homes: the same of the dictionary that each lies in; keys: of the file's own dictionary; stubs: classes of
    objects that became stubs."""

    path: Path
    sha256: str
    tensors: dict[str, Tensor]
    homes: dict[str, str]
    keys: list[str]
    stubs: list[str]


def read(path: Path) -> tuple[Any, str]:
    """What a .safetensors file or one of torch.save holds, tensors and plain values only, and the file's SHA-256.

    Raises `UserError` when it holds anything else, is no regular file, or would take more memory than its size
    justifies (see `torch_file`); nothing in it is run.
    """
    tree, _, sha256 = _read(path, lambda file: (torch_file.load(file), []))
    return tree, sha256


def content(path: Path) -> Content:
    """The tensors of a file. Objects of other classes in it become stubs; else it is refused as by `read`."""
    tree, stubs, sha256 = _read(path, torch_file.load_of_others)
    keys = [str(key) for key in dict.keys(tree)] if isinstance(tree, dict) else []
    if {"format", "method", "config"} <= set(keys):
        raise OwnCheckpoint(
            f"{path}: a checkpoint of ssl_dist; extract reads it without backbone.*, backbone.weights takes it as it "
            "is, and `ssl-dist export RUN --format torchvision` writes its encoder for others (or --format timm, seed)"
        )
    tensors, homes = _flat(path, tree)
    if not tensors:
        what = f"a dictionary of {some(keys, 8)} without" if keys else f"a {_kind(tree)}, and no"
        raise UserError(f"{path}: holds {what} tensors by name; docs/weights.md has what is known")
    _out_of_chunks(tensors, homes)
    _to_timms_vit(tensors, homes)
    return Content(path, sha256, tensors, homes, keys, stubs)


def _read(path: Path, load: Callable[[BinaryIO], tuple[Any, list[str]]]) -> tuple[Any, list[str], str]:
    try:
        with open_regular(path) as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            # safetensors begins with the length of its header in 8 bytes, torch's files with PK or a pickle's protocol
            is_safetensors = file.read(9)[8:] == b"{"
            file.seek(0)
            tree, stubs = (safetensors.torch.load(file.read()), []) if is_safetensors else load(file)
            return tree, stubs, sha256
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"the object {found[1]}" if found else "something else than tensors and plain values"
        raise UserError(
            f"{path}: not read, for it holds {what}, which could run code; save its state_dict alone where you trust it"
        ) from None
    except DAMAGED_FILE_ERRORS as error:
        reason = torch_file.reason_of(error)
        if "TorchScript archive" in reason:
            reason = "it is a TorchScript archive, which holds code"
        raise UserError(f"{path}: no weights that torch or safetensors can read: {reason}; {REMEDY}") from None


def facts(path: Path) -> dict[str, str]:
    """What `ssl-dist export` wrote about its file; empty for a file of others."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (safetensors.SafetensorError, OSError):
        return {}  # no safetensors file; whoever reads it next says what is wrong with it
    return metadata if set(FACTS) <= set(metadata) else {}


def _flat(path: Path, tree: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors in a tree of dictionaries and of whole networks by name, and what each one's dictionary is called."""
    tensors, homes, networks = dict[str, Tensor](), dict[str, str](), set[int]()

    def collect(node: object, before: str, depth: int = 0) -> None:
        for key, value in _entries(node):
            if depth > torch_file.MAX_DEPTH or len(before) + len(key) > MAX_NAME:
                raise UserError(
                    f"{path}: has names of more than {torch_file.MAX_DEPTH} parts or {MAX_NAME} letters; {REMEDY}"
                )
            name = formats.unwrapped(before + key)
            if isinstance(value, Tensor):
                if name in tensors:
                    raise UserError(
                        f"{path}: holds {name} twice, alone and wrapped as {before}{key}; save the state_dict of one "
                        "of them"
                    )
                tensors[name] = value
                homes[name] = formats.unwrapped(before.removesuffix(".")) + "." if before else ""
            elif isinstance(value, dict) or (isinstance(value, Inert) and id(value) not in networks):
                networks.add(id(value))
                collect(value, f"{before}{key}.", depth + 1)

    collect(tree, "")
    return tensors, {name: home.removeprefix(".") for name, home in homes.items()}


def _entries(node: object) -> list[tuple[str, object]]:
    """What a dictionary holds by names, or a network that was pickled whole, whose class became a stub."""
    if isinstance(node, Inert):
        state = node.state
        if not isinstance(state, dict) or not isinstance(dict.get(state, "_modules"), dict):
            return []
        parts = (dict.get(state, key) for key in ("_parameters", "_buffers", "_modules"))
        return [entry for part in parts if isinstance(part, dict) for entry in _entries(part)]
    if not isinstance(node, dict):
        return []
    # A pickle may put anything in the place of an OrderedDict's methods, not in the place of dict's.
    return [(str(key), value) for key, value in dict.items(node) if isinstance(key, str | int)]


def _out_of_chunks(tensors: dict[str, Tensor], homes: dict[str, str]) -> None:
    """Give blocks that lie in chunks, as DINOv2 trains them, the names that they have without. Networks whose blocks
    are counted anew in every stage have two of one such name, and are left as they are."""
    plain = {name: formats.CHUNK.sub(r"\1blocks.\2.", name) for name in tensors if formats.CHUNK.search(name)}
    if len({*plain.values()}) == len(plain) and not tensors.keys() & plain.values():
        for name, other in plain.items():
            tensors[other], homes[other] = tensors.pop(name), homes.pop(name)


def _to_timms_vit(tensors: dict[str, Tensor], homes: dict[str, str]) -> None:
    """Add to the tensors of a vision transformer of transformers the same by timm's names; query, key and value are one
    there."""
    for name in [name for name in tensors if (found := formats.QKV.search(name))]:
        parts = [name.replace("query", part) for part in ("query", "key", "value")]
        if all(part in tensors and tensors[part].shape == tensors[name].shape for part in parts):
            found = formats.QKV.search(name)
            assert found is not None, "it was found before"
            joined = f"blocks.{found[1]}.attn.qkv.{found[2]}"
            tensors[joined], homes[joined] = torch.cat([tensors.pop(part) for part in parts]), ""
            for part in parts:
                del homes[part]
    if any(name.endswith("attn.qkv.weight") and homes[name] == "" for name in tensors):
        for name in list(tensors):
            timms = formats.vit_name(name)
            if timms != name and timms not in tensors:
                tensors[timms], homes[timms] = tensors.pop(name), ""
                del homes[name]


def some(names: Collection[str], most: int) -> str:
    """The first of some names, and how many more there are."""
    shown = ", ".join([*names][:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def _kind(tree: object) -> str:
    return f"{type(tree).__module__}.{type(tree).__qualname__}" if isinstance(tree, Inert) else type(tree).__name__
