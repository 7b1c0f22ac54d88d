"""A run's folder: its lock, its config and the record of its starts. A run is identified by its folder."""

import errno
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ssl_dist import methods
from ssl_dist.config import Config, dump, load, to_tree
from ssl_dist.errors import UserError, quoted
from ssl_dist.reading import is_count, json_lines
from ssl_dist.run import plugged
from ssl_dist.storage import checkpoint, durable

# What may differ between two starts of one run: none of these changes the numbers.
# The file backbone.weights may lie elsewhere: its SHA-256 is compared with the checkpoint's. That of a plugin is, where
# the method or the backbone is of it.
FREE_KEYS = (
    "run_dir", "data.root", "data.reader", "data.workers", "data.view_shards", "backbone.weights", "backbone.recompute",
    "optim.accumulate", "checkpoint", "log", "timeout", "plugins",
)  # fmt: skip

FORMER_RANKS_TIMEOUT_S = 120.0  # in which the ranks of a former start have ended: the default timeout, 10 s, a margin


def title(run: Path) -> str:
    """Of lines on a run, among those of other runs: its name, or that of the run whose backbone it was trained on and
    its own."""
    run = run.absolute()
    of_another = run.parent.name == "evaluations"
    return f"{run.parents[1].name}: {run.name}" if of_another else run.name


def title_of_file(checkpoint: Path) -> str:
    """The same for a run's checkpoint; of another file its name."""
    return title(checkpoint.parents[1]) if checkpoint.parent.name == "checkpoints" else checkpoint.name


def claim(run: Path) -> int:
    """Create the folder, lock it as its only writer, and remove unfinished files of a killed one.

    The lock is an flock on logs/starts.jsonl: it ends with the process, and as that file is open for writing, NFS keeps
    it between machines too. Returns the descriptor that holds the lock. Raises `UserError` when the folder cannot be
    written or is taken.
    """
    starts = run / "logs" / "starts.jsonl"
    with durable.refuse_unwritable(f"run_dir = {quoted(str(run))}", "choose another folder"):
        run.mkdir(parents=True, exist_ok=True)
        if not os.access(run, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")
        for name in ("checkpoints", "logs", "tensorboard"):
            (run / name).mkdir(exist_ok=True)
        try:
            descriptor = _lock(starts)
        except BlockingIOError:
            raise UserError(
                f"run_dir = {quoted(str(run))}: another process is writing it{_last_start(starts)}; "
                "wait for it, or choose another run_dir"
            ) from None
    durable.remove_dead(run)
    checkpoint.remove_leftovers(run)
    return descriptor


def require_lock(run: Path, lock: int) -> None:
    """Raises OSError when the folder is no longer the one that `claim` has locked: it was removed while a training ran,
    and another one may have begun there."""
    if not durable.is_at(run / "logs" / "starts.jsonl", lock):
        raise OSError(errno.ESTALE, "was removed while this training ran, which writes nothing more there", str(run))


def _lock(starts: Path) -> int:
    """A job that Slurm has started again waits for the ranks of its former start, which may still be ending."""
    end = time.monotonic() + (FORMER_RANKS_TIMEOUT_S if os.environ.get("SLURM_RESTART_COUNT", "0") != "0" else 0)
    while True:
        try:
            return durable.lock(starts, os.O_WRONLY | os.O_APPEND | os.O_CREAT, wait=False)
        except BlockingIOError:
            if time.monotonic() >= end:
                raise
            time.sleep(0.5)


def _last_start(starts: Path) -> str:
    """Who started last, in words; the one that holds the lock, unless that one has only just begun."""
    lines, _ = json_lines(starts, lambda line: is_count(line.get("pid")) and isinstance(line.get("host"), str))
    return f" (the last start noted there: pid {lines[-1]['pid']} on host {lines[-1]['host']})" if lines else ""


def accept(run: Path, config: Config) -> None:
    """Keep the first config as RUN/config.yaml; refuse a later one as `check` does."""
    check(run, config)
    if not checkpoint.steps(run):  # a start that failed before its first checkpoint fixes no config
        durable.write_text(run / "config.yaml", dump(config))


def check(run: Path, config: Config, remedy: str = "choose another run_dir or restore these values") -> None:
    """Raises `UserError` when the folder holds a run whose config differs in a key that changes the numbers. remedy:
    for the message."""
    path = run / "config.yaml"
    if not checkpoint.steps(run):
        return
    if not path.exists():
        raise UserError(
            f"run_dir = {quoted(str(run))}: holds checkpoints but no config.yaml; restore it from logs/starts.jsonl, "
            "where the first line has it under config (JSON is YAML), or choose another folder"
        )
    saved = load(path)
    different = _forbidden(saved, config, _may_differ)
    if different:
        raise UserError(f"run_dir = {quoted(str(run))}: holds a run with another config: {different}; {remedy}")


def check_checkpoint(path: Path, saved: Config, config: Config) -> None:
    """Raises `UserError` when the config of a checkpoint in the run's folder differs in a key that changes the numbers:
    it was copied there from another run, or config.yaml was edited. Its training may have been meant to be longer."""

    def may_differ(key: str, saved: Config, old: object, new: object) -> bool:
        return _may_differ(key, saved, old, new) or _may_differ(key, saved, new, old)

    different = _forbidden(saved, config, may_differ)
    if different:
        raise UserError(
            f"{path}: is of a run with another config: {different}; move it away with its .sha256, restore these "
            "values, or choose another run_dir"
        )


def _forbidden(saved: Config, config: Config, may_differ: Callable[[str, Config, object, object], bool]) -> str:
    """The keys that differ and may not, with both values, in words."""
    if saved.method.name != config.method.name:  # the options of one that is not here any more cannot be spelt out
        return f"method.name (there {quoted(saved.method.name)}, now {quoted(config.method.name)})"
    found = [
        (key, old, new)
        for key, old, new in differences(spelt_out(saved), spelt_out(config))
        if not may_differ(key, saved, old, new)
    ]
    for name in plugged.used(config):
        old, new = (one.plugins[name].sha256 if name in one.plugins else None for one in (saved, config))
        if old != new:
            found.append((f"plugins.{name}.sha256", old, new))
    return "; ".join(f"{key} (there {quoted(old)}, now {quoted(new)})" for key, old, new in found)


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[tuple[str, object, object]]:
    """Keys (with dots) of two trees whose values differ, with both values."""
    old, new = flat(first), flat(second)
    return [
        (key, old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)
    ]


def spelt_out(config: Config) -> dict[str, Any]:
    """The config with every option of the method, so that a default counts as itself whether or not it is written."""
    tree, method = to_tree(config), config.method
    tree["method"]["options"] = to_tree(methods.build_options(methods.find(method.name), method.options))
    return tree


def is_free(key: str) -> bool:
    """Whether a key with dots may differ between two starts of one run."""
    return any(key == name or key.startswith(name + ".") for name in FREE_KEYS)


def _may_differ(key: str, saved: Config, old: object, new: object) -> bool:
    if is_free(key):
        return True
    if key not in ("optim.epochs", "optim.steps") or not isinstance(old, int) or not isinstance(new, int):
        return False
    # a longer training begins with the same steps where nothing in it depends on its length
    return new >= old and not spans_training(saved)


def spans_training(config: Config) -> str:
    """What in the config depends on the length of the training, in words; empty where nothing does."""
    optim, method = config.optim, config.method.name
    if optim.schedule != "constant":
        return f"optim.schedule={optim.schedule}"
    if optim.weight_decay_final not in (None, optim.weight_decay):
        return f"optim.weight_decay_final={optim.weight_decay_final:g}"
    return f"a schedule of {method}" if methods.find(method).fixed_length else ""


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, object]:
    """Keys with dots and their values."""
    values: dict[str, object] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[prefix + key] = value
    return values


def note_start(run: Path, config: Config, step: int, world_size: int) -> None:
    """Append this start to RUN/logs/starts.jsonl."""
    entry = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "step": step,
        "world_size": world_size,
        "command": sys.argv,
        "versions": checkpoint.versions(),
        "config": to_tree(config),
    }
    durable.append_line(run / "logs" / "starts.jsonl", json.dumps(entry))
