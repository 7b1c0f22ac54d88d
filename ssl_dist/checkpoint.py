"""Checkpoints: written whole or not at all, checked before they are used, read without running any code from them."""

import hashlib
import os
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import numpy
import torch

from ssl_dist import __version__
from ssl_dist.durable import sync_folder
from ssl_dist.errors import UserError

FORMAT = 1
KEYS = ("format", "step", "config", "method", "optimizer", "world_size", "versions", "normalize", "info", "data")
_NAME = re.compile(r"step-(\d{8,})\.pt")


def path_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}.pt"


def versions() -> dict[str, str]:
    """What a bit-exact resume depends on."""
    return {
        "ssl_dist": __version__,
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "python": ".".join(map(str, sys.version_info[:3])),
    }


def save(run: Path, state: dict[str, Any]) -> Path:
    """Write `state` as the checkpoint of its step; whatever happens meanwhile, older checkpoints stay whole.

    The checksum is put in place before the file it belongs to, so that no instant shows a checkpoint without one.
    Raises OSError (a full disk, say) after removing what it had begun.
    """
    assert tuple(state) == KEYS, f"a checkpoint holds {KEYS}, not {tuple(state)}"
    path = path_of(run, state["step"])
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        write_text(_checksum_path(path), f"{sha256(temporary)}  {path.name}\n")
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, RuntimeError):  # torch reports a failed write as RuntimeError
            raise OSError(f"{path}: cannot be written: {str(error).splitlines()[0]}") from error
        raise
    sync_folder(path.parent)
    write_text(path.parent / "LAST", path.name + "\n")
    return path


def write_text(path: Path, text: str) -> None:
    """Put a small text file in place, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _checksum_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def steps(run: Path) -> list[int]:
    """Steps of the checkpoints that lie in the run's folder, rising; nothing is said of their health."""
    folder = run / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(int(m[1]) for m in map(_NAME.fullmatch, os.listdir(folder)) if m)


def prune(run: Path, keep: int, keep_every: int | None, step: int) -> None:
    """Remove all checkpoints but the newest `keep` and those whose step is a multiple of `keep_every`.

    step: the one just saved. Later ones were passed over as damaged when the run resumed; they are set aside, so that
    they do not count as newest.
    """
    for later in [found for found in steps(run) if found > step]:
        path = path_of(run, later)
        path.rename(path.with_name(path.name + ".damaged"))
    for step in steps(run)[:-keep]:
        if keep_every is None or step % keep_every:
            path = path_of(run, step)
            path.unlink()
            _checksum_path(path).unlink(missing_ok=True)


def newest(run: Path) -> Path | None:
    """The newest checkpoint whose checksum holds; a damaged newer one is named on stderr. None: there is none at all.

    Raises `UserError` when there are checkpoints and every one of them is damaged: starting again from nothing would
    throw away a training without a word.
    """
    found = steps(run)
    for step in reversed(found):
        path = path_of(run, step)
        fault = _fault(path)
        if fault is None:
            return path
        print(f"WARNING: {path}: {fault}; passing over it to the one before", file=sys.stderr, flush=True)
    if found:
        raise UserError(
            f"{run / 'checkpoints'}: all {len(found)} checkpoints are damaged; "
            "restore one, or remove the folder to begin anew"
        )
    return None


def _fault(path: Path) -> str | None:
    try:
        expected = _checksum_path(path).read_text(encoding="ascii").split()
    except FileNotFoundError:
        return "has no checksum beside it"
    except UnicodeDecodeError:
        return "its checksum file is damaged"
    if not expected or sha256(path) != expected[0]:
        return "its SHA-256 differs from the one beside it (damaged)"
    return None


def load(path: Path) -> dict[str, Any]:
    """A checkpoint of ours: tensors and plain values only. Raises `UserError` if it is anything else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"checkpoint {path}: not found") from None
    except pickle.UnpicklingError:  # torch's text advises to run whatever the file holds
        raise UserError(f"checkpoint {path}: not a checkpoint: it holds more than tensors and plain values") from None
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"checkpoint {path}: not a readable checkpoint: {reason}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT or set(KEYS) - set(state):
        raise UserError(f"checkpoint {path}: not a checkpoint of ssl_dist (format {FORMAT})")
    return state


def restore(module: torch.nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    """Load a method's state strictly. Raises `UserError` naming the first tensor that does not fit."""
    own = module.state_dict()
    for name in dict.fromkeys([*own, *state]):
        if name not in state:
            raise UserError(f"checkpoint {path}: lacks {name}: it belongs to another method or backbone")
        if name not in own:
            raise UserError(f"checkpoint {path}: holds {name}, unknown here: it belongs to another method or backbone")
        if own[name].shape != state[name].shape:
            raise UserError(
                f"checkpoint {path}: {name} has shape {list(state[name].shape)}, here {list(own[name].shape)}: "
                "it belongs to another method or backbone"
            )
    module.load_state_dict(state, strict=True)
