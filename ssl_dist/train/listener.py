"""Who is told of a training as it goes: a tracker of experiments, a notebook."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


def _ignore(_: object) -> None:
    pass


@dataclass(frozen=True)
class Listener:
    """What is called on rank 0, in the training's thread: the loop waits for it, and what it raises ends the training.

    on_log: with each line of metrics.jsonl, a dict of numbers with `step` and `epoch`; on_checkpoint: with the file of
    each checkpoint, when it is whole.
    """

    on_log: Callable[[dict[str, float]], object] = _ignore
    on_checkpoint: Callable[[Path], object] = _ignore


SILENT = Listener()
