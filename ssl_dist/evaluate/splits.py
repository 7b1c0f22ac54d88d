"""Which splits an evaluation learns from and is measured on; and what may look at a split without labels."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ssl_dist import evaluators
from ssl_dist.data.readers import Dataset
from ssl_dist.errors import UserError, quoted
from ssl_dist.evaluate.search import DEFAULT_SHARE
from ssl_dist.results import suggestion


class Splits(NamedTuple):
    """Names of splits. Where both are one, the split stands alone: it is searched, grouped or mapped by itself."""

    train: str
    test: str


def choose(
    run: Path,
    dataset: Dataset,
    chosen: Sequence[str],
    overrides: Sequence[str],
    wanted: str | None,
    holds_out: bool,
    parts: Sequence[str] = (),
) -> Splits:
    """The splits of an evaluation by the evaluators `chosen`.

    overrides: as the user wrote them, for the commands in messages. wanted: `--split`, None: the split for evaluation.
    holds_out: whether all is measured on a part of the training split. parts: options that choose images of the
    training split, as the user wrote them. A labelled split is measured by what the labelled training split teaches.
    Without labels, or without another split, it stands alone, which only evaluators with `protocol_without_labels` can.
    Raises `UserError`.
    """
    train, test = dataset.uses.training, dataset.uses.evaluation
    root, present = dataset.root, dataset.splits
    if wanted is not None and wanted not in present:
        words = " or ".join(f"--split {split}" for split in present)
        raise UserError(f"--split {wanted}: {root} holds no such split; give {words}")
    if wanted is not None and holds_out:
        raise UserError(f"--split {wanted}: --validation measures on a part of {train}; leave one of the two out")
    has_train = dataset.labelled.get(train, False)
    needing = [name for name in chosen if not evaluators.works_without_labels(name)]
    if has_train and (holds_out or dataset.labelled.get(wanted or test)) and wanted != train:
        return Splits(train, wanted or test)
    alone = wanted or (test if test in present else dataset.uses.pretraining)
    if needing or holds_out:
        what = needing[0] if needing else "--validation"
        raise UserError(_needs_labels(run, dataset, what, overrides, alone, wanted is not None))
    if parts:
        raise UserError(f"{parts[0]}: chooses images to learn from, and split {alone} stands alone; leave it out")
    return Splits(alone, alone)


def _needs_labels(run: Path, dataset: Dataset, who: str, overrides: Sequence[str], alone: str, is_wanted: bool) -> str:
    """Of `who`, an evaluator or --validation, that needs labels, or a labelled split besides the one that it learns
    from. is_wanted: whether the user named the split."""
    train, root = dataset.uses.training, dataset.root
    without = f"without labels: `{_command(run, suggestion.WITHOUT_LABELS, overrides, '--split', alone)}`"
    if not dataset.labelled.get(train):
        what = f"{root} holds no labelled split to learn from ({train}), only {', '.join(dataset.splits)}"
        return f"{who}: needs labels, and {what}; {without}; or give another data.root"
    if is_wanted and alone != train:
        return f"{who}: needs labels, and split {quoted(alone)} has none; {without}"
    share = _command(run, [who], overrides, "--validation", f"{DEFAULT_SHARE:g}")
    what = f"{root} holds no labelled split to measure on (test or val)"
    if is_wanted:
        what = f"--split {train} gives the same images"
    return f"{who}: learns from {train}, and {what}; measure on a share of it: `{share}`"


def _command(run: Path, chosen: Sequence[str], overrides: Sequence[str], *options: str) -> str:
    """`ssl-dist evaluate` with these evaluators, and what the user set of the data and of them."""
    others = {*evaluators.names()} - {*chosen}
    kept = [word for word in overrides if re.split(r"[.=]", word)[0] not in others]
    if "--split" in options:  # it stands alone
        kept = [word for word in kept if not word.startswith("data.subset=")]
    return shlex.join(["ssl-dist", "evaluate", str(run), *chosen, *kept, *options])


def extracted(dataset: Dataset, wanted: Sequence[str]) -> list[str]:
    """The splits that `ssl-dist extract` passes through the backbone: those that are asked for, else those for training
    and evaluation as far as they are there, else all. Raises `UserError` for one that is not there."""
    for split in wanted:
        if split not in dataset.splits:
            words = " ".join(f"--split {name}" for name in dataset.splits)
            raise UserError(f"{dataset.root}: holds no split {quoted(split)}; its splits are extracted by {words}")
    usual = [split for split in (dataset.uses.training, dataset.uses.evaluation) if split in dataset.splits]
    return [*wanted] or usual or [*dataset.splits]
