"""Checkpoints: written whole or not at all, checked before they are used, read without running any code from them."""

import hashlib
import os
import pickle
import re
import shlex
import sys
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import numpy
import torch

from ssl_dist import __version__, plugins
from ssl_dist.errors import UserError, refuse_unreadable
from ssl_dist.reading import open_regular
from ssl_dist.storage import checkpoint_state, durable, torch_file
from ssl_dist.storage.durable import write_text

FORMAT = 1
CHANGED = "it was changed: give another checkpoint, or train anew"
NO_CHECKSUM = "has no checksum beside it"
KEYS = ("format", "step", "config", "method", "optimizer", "world_size", "versions", "normalize", "info", "data")
LATER_KEYS = ("classes", "loss_scale", "probe")  # see `checkpoint_state.State`; absent in files of before and in VOC's
_NAME = re.compile(r"step-(\d{8,})\.pt")


def path_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}.pt"


def step_of(name: str) -> int:
    """The step of a checkpoint of that file name."""
    match = _NAME.fullmatch(name)
    assert match, name
    return int(match[1])


def versions() -> dict[str, str]:
    """What a bit-exact resume depends on."""
    return {
        "ssl_dist": __version__,
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "python": ".".join(map(str, sys.version_info[:3])),
        **plugins.packages(),
    }


def save(run: Path, state: dict[str, Any]) -> Path:
    """Write `state` as the checkpoint of its step; older checkpoints stay whole, whenever the process is killed.

    The checksum is put in place before the file it belongs to, so that no instant shows a checkpoint without one. Where
    the step has a file already, the checksums of both are there until the old file is replaced. Raises OSError (a full
    disk, say) after removing what it had begun.
    """
    assert state.keys() - set(LATER_KEYS) == set(KEYS), f"a checkpoint holds {KEYS}, not {tuple(state)}"
    path = path_of(run, state["step"])
    path.parent.mkdir(parents=True, exist_ok=True)
    with durable.atomic_write(path) as file:
        digest = _write(state, file)
        replaced = (_checksums(path) or []) if path.exists() else []
        _put_checksums(path, [digest, *replaced])
    if replaced:
        _put_checksums(path, [digest])
    write_text(path.parent / "LAST", path.name + "\n")
    return path


def not_finite(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """The first tensor of a module or of its optimizer's state that holds a NaN or an infinity; empty: none does."""
    tensors = module.state_dict()
    for parameter, kept in optimizer.state.items():
        tensors |= {f"optimizer.{name} of a tensor {list(parameter.shape)}": value for name, value in kept.items()}
    floats = {name: value for name, value in tensors.items() if torch.is_tensor(value) and value.is_floating_point()}
    finite = [value.isfinite().all().to(torch.uint8) for value in floats.values()]
    devices = {value.device for value in finite}  # one answer from each: a question a tensor would be a wait for a GPU
    answers = {device: iter(torch.stack([f for f in finite if f.device == device]).tolist()) for device in devices}
    return next((name for name, f in zip(floats, finite, strict=True) if not next(answers[f.device])), "")


def _write(state: dict[str, Any], file: BinaryIO) -> str:
    """Returns the SHA-256 of what was written."""
    sink = _Sink(file)
    try:
        torch.save(state, sink)  # type: ignore[arg-type]  # of a file it calls write and flush alone
    except RuntimeError:  # torch reports a failed write as one, without its errno
        if sink.error is None:
            raise
        raise sink.error from None
    durable.sync(file)  # a disk that is full shall be noticed before anything else is written
    return sink.sha256.hexdigest()


class _Sink:
    """What torch.save writes to, strictly in order: keeps the error of a write, and the SHA-256."""

    def __init__(self, file: BinaryIO):
        self.file, self.sha256 = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: memoryview) -> int:
        self.sha256.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        """`durable.sync` does it; torch asks for the method."""


def _checksum_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _put_checksums(path: Path, digests: list[str]) -> None:
    write_text(_checksum_path(path), "".join(f"{digest}  {path.name}\n" for digest in digests))


def _checksums(path: Path) -> list[str] | None:
    """The SHA-256 recorded beside the file at `path` (two while one replaces the other); None: there is no record."""
    try:
        text = _checksum_path(path).read_text(encoding="ascii", errors="replace")
    except FileNotFoundError:
        return None
    return re.findall(r"^([0-9a-f]{64})  ", text, re.MULTILINE)


def steps(run: Path) -> list[int]:
    """Steps of the checkpoints in the run's folder, rising, valid or damaged."""
    folder = run / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(step_of(name) for name in os.listdir(folder) if _NAME.fullmatch(name))


def prune(run: Path, keep: int, keep_every: int | None, step: int) -> None:
    """Remove all checkpoints but the newest `keep` and those whose step is a multiple of `keep_every`.

    step: the one just saved. Later ones were passed over as damaged when the run resumed; they are set aside, so that
    they do not count as newest. A checkpoint goes before its checksum: a checksum alone is no damaged checkpoint.
    """
    for later in [other for other in steps(run) if other > step]:
        path = path_of(run, later)
        path.rename(path.with_name(path.name + ".damaged"))
        _checksum_path(path).unlink(missing_ok=True)
    for step in steps(run)[:-keep]:
        if keep_every is None or step % keep_every:
            path = path_of(run, step)
            path.unlink()
            _checksum_path(path).unlink(missing_ok=True)


def keep_only(run: Path, step: int) -> None:
    """Remove all checkpoints but that of `step`, each before its checksum."""
    for other in steps(run):
        if other != step:
            path_of(run, other).unlink()
            _checksum_path(path_of(run, other)).unlink(missing_ok=True)
    write_text(run / "checkpoints" / "LAST", path_of(run, step).name + "\n")


def remove_leftovers(run: Path) -> None:
    """Remove what a killed save or prune left. Only for the one writer of the run's folder."""
    folder = run / "checkpoints"
    durable.remove_dead(folder)
    for path in map(folder.joinpath, os.listdir(folder)):
        if path.suffix == ".sha256" and _NAME.fullmatch(path.stem) and not os.path.lexists(path.with_suffix("")):
            path.unlink()


def newest(run: Path) -> Path | None:
    """The newest checkpoint whose checksum holds; a damaged newer one is named on stderr. None: there is none at all.

    Raises `UserError` when there are checkpoints and every one of them is damaged: starting again from nothing would
    throw away a training without a word.
    """
    checkpoint = newest_digest(run)
    return None if checkpoint is None else checkpoint[0]


def newest_digest(run: Path) -> tuple[Path, str] | None:
    """Path and SHA-256 of `newest`."""
    checkpoint = _open_newest(run)
    if checkpoint is None:
        return None
    path, file, digest = checkpoint
    file.close()
    return path, digest


def load_newest(run: Path) -> tuple[Path, dict[str, Any], str] | None:
    """Path, state and SHA-256 of `newest`: all of one file, even while a training saves and prunes."""
    checkpoint = _open_newest(run)
    if checkpoint is None:
        return None
    path, file, digest = checkpoint
    with file:
        return path, _load(path, file), digest


def _open_newest(run: Path) -> tuple[Path, BufferedReader, str] | None:
    """`newest`, opened, with its SHA-256."""
    faults: dict[Path, str] = {}
    for path in [path_of(run, step) for step in reversed(steps(run))]:
        try:
            file = open_regular(path)  # the caller closes it
        except OSError as error:
            fault, is_there = f"cannot be read: {error}", os.path.lexists(path)
        else:
            digest, fault = _examine(path, file)
            if not fault:
                for damaged, reason in faults.items():
                    warning = f"WARNING: {damaged}: {reason}; passing over it to the one before"
                    print(warning, file=sys.stderr, flush=True)
                return path, file, digest
            is_there = durable.is_at(path, file.fileno())
            file.close()
        if not is_there:  # a training has just pruned or replaced it, which is no fault: there is a newer one
            return _open_newest(run)
        faults[path] = fault
    if not faults:
        return None
    path, fault = next(iter(faults.items()))
    restore = "restore one"
    if fault == NO_CHECKSUM:  # lost in a copy, say
        restore = f"restore one with its .sha256, or, if it is whole: cd {shlex.quote(str(path.parent))}; "
        restore += f"sha256sum {path.name} > {_checksum_path(path).name}"
    raise UserError(
        f"{path.parent}: all {len(faults)} checkpoints are damaged (the newest, {path.name}: {fault}); "
        f"{restore}, or remove the folder to begin anew"
    )


def _examine(path: Path, file: BufferedReader) -> tuple[str, str]:
    """The SHA-256 of the open file, and what is wrong with it in words (empty: nothing)."""
    try:
        recorded = _checksums(path)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return "", f"cannot be read: {error}"
    if recorded is None:
        return digest, NO_CHECKSUM
    if not recorded:
        return digest, "its checksum file is damaged"
    return digest, "" if digest in recorded else "its SHA-256 differs from the one beside it (damaged)"


def load(path: Path) -> dict[str, Any]:
    """The state in a checkpoint file of ours, wherever it lies. Raises `UserError` if it is anything else or damaged.

    Where its .sha256 stands beside it, the file must be the one that was written. A file that was copied without it is
    known by the CRC-32 of its records (`torch_file`), which is as good against an accident.
    """
    return _load_file(path)[0]


def load_run(path: Path) -> tuple[Path, dict[str, Any], str]:
    """Path, state and SHA-256 of a run's newest checkpoint, or of the checkpoint file `path`; the state is that of a
    training with `info`, `normalize` and the ids of its images. Raises `UserError`."""
    if path.is_dir():
        newest = load_newest(path)
        if newest is None:
            raise UserError(f"{path}: holds no checkpoint; train first, or name a run's folder")
        path, state, digest = newest
    else:
        state, digest = _load_file(path)
    if not (state["info"] and state["normalize"] and "ids" in state["data"]):
        raise UserError(f"checkpoint {path}: not of a pre-training; name a run of `ssl-dist train`")
    return path, state, digest


def _load_file(path: Path) -> tuple[dict[str, Any], str]:
    """State and SHA-256 of a checkpoint file."""
    with _opened(path) as file:
        if _checksums(path) is None:
            digest, fault = hashlib.file_digest(file, "sha256").hexdigest(), ""
        else:
            digest, fault = _examine(path, file)
        if fault:
            raise UserError(
                f"checkpoint {path}: {fault}; copy it again with its {_checksum_path(path).name}, or name the run's "
                "folder: its newest whole checkpoint is taken"
            )
        return _load(path, file), digest


def _opened(path: Path) -> BufferedReader:
    with refuse_unreadable(f"checkpoint {path}"):
        try:
            return open_regular(path)
        except FileNotFoundError:
            raise UserError(f"checkpoint {path}: not found; name a run's folder or a step-*.pt in it") from None


def _load(path: Path, file: BufferedReader) -> dict[str, Any]:
    file.seek(0)
    if file.peek(9)[8:9] == b"{":  # after the length of its header
        raise UserError(f"checkpoint {path}: a safetensors file, of weights alone; say backbone.name=... too")
    try:
        state = torch_file.load(file)
    except pickle.UnpicklingError:  # torch's text advises to run whatever the file holds
        raise UserError(f"checkpoint {path}: not a checkpoint: it holds more than tensors and plain values") from None
    except (*torch_file.DAMAGED_FILE_ERRORS, OSError) as error:
        raise UserError(f"checkpoint {path}: not a readable checkpoint: {torch_file.reason_of(error)}") from None
    form = state.get("format") if isinstance(state, dict) else None
    if type(form) is not int or form != FORMAT or set(KEYS) - set(state):
        raise UserError(
            f"checkpoint {path}: not a checkpoint of ssl_dist (format {FORMAT}); for weights of another program say "
            "backbone.name=... too"
        )
    fault = checkpoint_state.fault_of(state)
    if not fault and _NAME.fullmatch(path.name) and step_of(path.name) != state["step"]:
        fault = f"it is of step {state['step']}"
    if fault:
        raise UserError(f"checkpoint {path}: {fault}; {CHANGED}")
    return state


def restore(module: torch.nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    """Load a method's state strictly. Raises `UserError` naming the first tensor that does not fit."""
    check_fits(module, state, path)
    module.load_state_dict(state, strict=True)


def check_fits(module: torch.nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    """Raises `UserError` naming the first tensor that does not fit `module`, which may be on the meta device."""
    own = module.state_dict()
    for name in dict.fromkeys([*own, *state]):
        if name not in state:
            raise UserError(f"checkpoint {path}: lacks {name}: it belongs to another method or backbone")
        if name not in own:
            raise UserError(f"checkpoint {path}: holds {name}, unknown here: it belongs to another method or backbone")
        here, there = own[name], state[name]
        if here.shape != there.shape:
            raise UserError(
                f"checkpoint {path}: {name} has shape {list(there.shape)}, here {list(here.shape)}: "
                "it belongs to another method or backbone"
            )
        if here.is_floating_point() != there.is_floating_point() or there.is_complex():
            raise UserError(f"checkpoint {path}: {name} is of {there.dtype}, here {here.dtype}; {CHANGED}")


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], path: Path) -> None:
    """Load what an optimizer keeps of its parameters. Its settings stay: they are the config's. Raises `UserError` for
    the state of another optimizer."""
    groups = optimizer.state_dict()["param_groups"]
    ids = [group["params"] for group in groups]
    if [group.get("params") for group in state.get("param_groups", [])] != ids:
        raise UserError(f"checkpoint {path}: optimizer.param_groups are not those of this method; {CHANGED}")
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    names = {"step", "exp_avg", "exp_avg_sq"} if isinstance(optimizer, torch.optim.Adam) else {"momentum_buffer"}
    if optimizer.defaults.get("momentum") == 0:
        names = set()
    for number, kept in state["state"].items():
        if number not in parameters or kept.keys() != names:
            raise UserError(f"checkpoint {path}: optimizer.state.{number} is not of this optimizer; {CHANGED}")
        for name, value in kept.items():
            shape = () if name == "step" else parameters[number].shape
            if not isinstance(value, torch.Tensor) or value.shape != shape or not value.is_floating_point():
                key = f"optimizer.state.{number}.{name}"
                raise UserError(f"checkpoint {path}: {key} is no tensor of shape {list(shape)}; {CHANGED}")
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
