"""metrics.jsonl of a run's folder: a JSON object of numbers every `log.every_steps` steps."""

import json
from pathlib import Path

from ssl_dist.reading import is_count, is_finite, json_lines, parse_json, read_bytes
from ssl_dist.storage.durable import append_line, atomic_write

FILE = "metrics.jsonl"


def read_metrics(path: Path) -> tuple[list[dict], list[int]]:
    """The lines that have a step and an epoch, and the line numbers of the others. Raises OSError; a missing file
    holds nothing."""
    return json_lines(path, _is_metrics_line)


def append(path: Path, line: dict) -> None:
    """Add a line, whole or not at all. Raises OSError with the file's name."""
    append_line(path, json.dumps(line))


def cut_after(path: Path, step: int) -> None:
    """Drop the lines after `step` (they will be written again), and a last line torn by a kill.

    A line that cannot be read stays where it is: nobody knows its step. Raises OSError.
    """
    if not path.exists():
        return
    lines = read_bytes(path).split(b"\n")[:-1]
    kept = [line + b"\n" for line in lines if _step_of(line) <= step]
    if len(kept) < len(lines) or path.stat().st_size > sum(map(len, kept)):
        with atomic_write(path) as file:
            file.writelines(kept)


def _step_of(line: bytes) -> int:
    try:
        value = parse_json(line.decode())
    except ValueError:
        return 0
    return value["step"] if isinstance(value, dict) and is_count(value.get("step")) else 0


def _is_metrics_line(line: dict) -> bool:
    epoch = line.get("epoch")
    return is_count(line.get("step")) and is_finite(epoch) and 0 <= epoch < 2**53
