"""Weights of other programs: files of the official codes, torchvision, timm and other libraries, read without running
code from them.

A file is recognised by what it holds: `formats` has the places where programs keep a network and the names they use,
all combinations are tried, and the one with most of the backbone's tensors is taken. So the program need not be named.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ssl_dist.errors import UserError
from ssl_dist.storage import formats
from ssl_dist.storage.weights_file import REMEDY, Content, content, some

RIGHT_NAME = "give the backbone.name that the file was trained with"


class NoFit(UserError):
    """A file's tensors are not those of the backbone."""


@dataclass(frozen=True)
class Weights:
    """A backbone's tensors by its own names, found in a file. format: the file's, in words; unused: names beside them
    in the file of what is no part of the backbone; sha256: of the file; whole: other prefixes under which the file has
    all of the backbone; left: of `unused`, what does not lie under those; passed_over: classes of objects in it that
    became stubs; adapted: what was changed, in words."""

    path: Path
    format: str
    tensors: dict[str, Tensor]
    unused: list[str]
    sha256: str
    whole: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)
    adapted: str = ""

    @property
    def note(self) -> str:
        """One line: what was read, and what was left."""
        parts = [f"{self.path}: {self.format}; not used: {some(self.left, 8) or 'nothing'}"]
        if self.adapted:
            parts.append(self.adapted)
        if self.whole:
            parts.append(f"also whole in it: {some(self.whole, 4)} (backbone.weights_prefix takes one)")
        if self.passed_over:
            parts.append(f"objects passed over: {some(self.passed_over, 4)}")
        return "; ".join(parts)


def fit(backbone: nn.Module, name: str, path: Path, prefix: str | None = None, resize: bool = False) -> Weights:
    """The tensors of `backbone`, which is called `name`, in the file at `path`, shapes checked; it is left as it is.

    Every tensor must be there, but for BatchNorm's counts of batches, which old files lack: they become 0. prefix: what
    stands before the backbone's names in the file; None: it is found. resize: positional embeddings for images of
    another size are interpolated. Raises `UserError`, `NoFit` where the file is of another network.
    """
    return match(content(path), backbone, name, prefix, resize)


def match(there: Content, backbone: nn.Module, name: str, prefix: str | None = None, resize: bool = False) -> Weights:
    """What `fit` returns, of a file that is read."""
    path, own = there.path, backbone.state_dict()
    layout, whole = _layout(there, own, name, prefix)
    stored, theirs, tensors, changed = there.tensors, layout.theirs, dict[str, Tensor](), list[str]()
    missing = [key for own_name, key in theirs.items() if key not in stored and not own_name.endswith(_COUNT)]
    if missing:
        raise NoFit(
            f"{path}: lacks {some(missing, 2)} of backbone {name} ({len(missing)} of its {len(own)} tensors are "
            f"missing; {layout.words}); {RIGHT_NAME}"
        )
    for tensor, expected in own.items():
        found = stored[theirs[tensor]] if theirs[tensor] in stored else torch.zeros((), dtype=torch.int64)
        if found.shape != expected.shape and _is_of_places(tensor, found, expected):
            if not resize:
                raise UserError(
                    f"{path}: {theirs[tensor]} is of images of another size: it has {found.shape[1]} places, in "
                    f"backbone {name} {expected.shape[1]}; backbone.resize_pos_embed=true interpolates it as timm "
                    "does, or give the backbone.name of that size"
                )
            changed.append(f"{theirs[tensor]} interpolated from {found.shape[1]} places to {expected.shape[1]}")
            _check(path, theirs[tensor], found, expected)
            found = _resized(found, expected)
        if _is_of_other_channels(found, expected, getattr(backbone, "in_channels", 3)):
            _check(path, theirs[tensor], found, expected)
            found = _of_channels(found, expected.shape[1], f"{path}: {theirs[tensor]}")
            changed.append(f"{theirs[tensor]} of 3 channels adapted to {expected.shape[1]} as timm does")
        if found.shape != expected.shape:
            raise NoFit(
                f"{path}: {theirs[tensor]} has shape {list(found.shape)}, in backbone {name} {list(expected.shape)}; "
                f"{RIGHT_NAME}"
            )
        _check(path, theirs[tensor], found, expected)
        tensors[tensor] = found
    used = set(theirs.values())
    _refuse_another_network(path, name, layout.prefix, there, used)
    homes = {there.homes[key] for key in used & stored.keys()}
    beside = {key: key.removeprefix(home) for key, home in there.homes.items() if home in homes and key not in used}
    left = sorted(short for key, short in beside.items() if not key.startswith(tuple(whole)))
    adapted = "; ".join(changed)
    return Weights(
        path, layout.words, tensors, sorted(beside.values()), there.sha256, whole, left, there.stubs, adapted
    )


# ------------------------------------------------------------------------------------------------- recognised

_COUNT = ".num_batches_tracked"


@dataclass(frozen=True)
class _Layout:
    """One way to read a file. theirs: the name in it of each of the backbone's tensors; held: how many it has."""

    prefix: str
    naming: str
    theirs: dict[str, str]
    held: int

    @property
    def words(self) -> str:
        return f"{formats.words(self.prefix)}, {self.naming}"


def _layout(there: Content, own: Mapping[str, Tensor], name: str, prefix: str | None) -> tuple[_Layout, list[str]]:
    """The way to read the file that gives most of the backbone's tensors `own`, of several the one that stands first in
    the table; and the prefixes of others that give all of them. Raises `UserError`."""
    layouts = _layouts(there.tensors, own, prefix)
    if not layouts:
        given = "" if prefix is None else f" under {prefix}"
        raise NoFit(
            f"{there.path}: holds no tensor of backbone {name}{given}; it holds {some(there.tensors, 3)}; "
            f"docs/weights.md has what is known, backbone.weights_prefix says where else to look; {RIGHT_NAME}"
        )
    best = max(layouts, key=lambda each: each.held)
    needed = sum(not key.endswith(_COUNT) for key in own)
    equal = [each for each in layouts if each.held == best.held and each.prefix != best.prefix]
    if best.held < needed:
        return best, []
    if not formats.is_known(best.prefix) and equal:
        one, other = best.prefix, equal[0].prefix
        raise UserError(
            f"{there.path}: holds backbone {name} {1 + len(equal)} times, under {one} and {other}; say "
            f"backbone.weights_prefix={one} or another"
        )
    return best, [each.prefix for each in equal]


def _layouts(stored: Mapping[str, Tensor], own: Mapping[str, Tensor], prefix: str | None) -> list[_Layout]:
    """The ways to read the file that give some of the backbone's tensors, the table's first ones first."""
    layouts = dict[tuple[str, ...], _Layout]()
    for title, rename in formats.NAMINGS:
        names = {tensor: rename(tensor) for tensor in own}
        if title != formats.OWN_NAMES and all(theirs == tensor for tensor, theirs in names.items()):
            continue
        prefixes = _prefixes(stored, [*names.values()]) if prefix is None else {_with_dot(formats.unwrapped(prefix))}
        for before in sorted(prefixes):
            theirs = {tensor: before + key for tensor, key in names.items()}
            held = sum(key in stored for key in theirs.values())
            if held:
                layouts.setdefault(tuple(theirs.values()), _Layout(before, title, theirs, held))
    return sorted(layouts.values(), key=lambda each: (formats.rank(each.prefix), each.prefix))


def _with_dot(prefix: str) -> str:
    return f"{prefix.rstrip('.')}." if prefix else ""


def _prefixes(stored: Mapping[str, Tensor], names: list[str]) -> set[str]:
    """What stands in the file before one of some names of the backbone: the longest ones and some more."""
    probes = {*sorted(names, key=len)[-3:], *names[:: max(1, len(names) // 4)]}
    return {
        key.removesuffix(probe)
        for key in stored
        for probe in probes
        if key.endswith(probe) and (len(key) == len(probe) or key[-len(probe) - 1] == ".")
    }


def _refuse_another_network(path: Path, name: str, prefix: str, there: Content, used: Collection[str]) -> None:
    """Raises `NoFit` where the file has weights within a series of numbered blocks of which the backbone uses some:
    those of a deeper network (ResNet-101 in ResNet-50), or of one whose blocks are others. Tables that are computed
    from the sizes alone are no weights. prefix: what stands before the backbone's names."""
    series = {parent for key in used for parent in _series(key.removeprefix(prefix))}
    for key, tensor in there.tensors.items():
        if key in used or not key.startswith(prefix):
            continue
        is_weight = tensor.is_floating_point() and not key.endswith(("attn_mask", "relative_coords_table"))
        if is_weight and not series.isdisjoint(_series(key.removeprefix(prefix))):
            raise NoFit(
                f"{path}: holds {key}, which backbone {name} does not have: the weights are of another network; "
                f"{RIGHT_NAME}"
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


# ------------------------------------------------------------------------------------------------- adapted


def _is_of_other_channels(found: Tensor, own: Tensor, in_channels: int) -> bool:
    """Whether the two are a network's first layer, a convolution [O, C, h, w], for images of different channels."""
    alike = found.ndim == own.ndim == 4 and (found.shape[0], found.shape[2:]) == (own.shape[0], own.shape[2:])
    return alike and found.shape[1] != own.shape[1] == in_channels


def _of_channels(weights: Tensor, channels: int, where: str) -> Tensor:
    """The first layer [O, 3, h, w] for images of so many channels, as timm's `adapt_input_conv` makes it: the three in
    turn, times 3 / channels, so that the sums keep their size; for one channel their sum. Raises `UserError` for one of
    other channels."""
    if weights.shape[1] != 3:
        raise UserError(
            f"{where} is of images of {weights.shape[1]} channels, and these have {channels}; only weights of 3 are "
            "adapted, give such"
        )
    if channels == 1:
        return weights.float().sum(1, keepdim=True)
    return weights.float()[:, [c % 3 for c in range(channels)]] * (3 / channels)


def _is_of_places(name: str, found: Tensor, own: Tensor) -> bool:
    """Whether the two are positional embeddings [1, places, D] of square images of different sizes."""
    same = found.ndim == own.ndim == 3 and found.shape[::2] == own.shape[::2]
    return name.endswith("pos_embed") and same and _num_prefix_tokens(found, own) is not None


def _num_prefix_tokens(found: Tensor, own: Tensor) -> int | None:
    """How many places of both are of no patch (a class, registers): what is left must be squares."""
    return next(
        (n for n in range(6) if all(math.isqrt(p.shape[1] - n) ** 2 == p.shape[1] - n > 0 for p in (found, own))), None
    )


def _resized(found: Tensor, own: Tensor) -> Tensor:
    """Positional embeddings [1, P, D] as timm interpolates them (bicubic, antialiased) to the places of `own`."""
    from timm.layers import resample_abs_pos_embed

    num_prefix_tokens = _num_prefix_tokens(found, own)
    assert num_prefix_tokens is not None, "both are squares"
    side = math.isqrt(own.shape[1] - num_prefix_tokens)
    return resample_abs_pos_embed(found.float(), [side, side], num_prefix_tokens=num_prefix_tokens)
