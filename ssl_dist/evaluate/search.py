"""Hyper-parameters of an evaluation: a grid of them, measured on images held out of the training split.

The test split says nothing about the choice: every combination learns from the rest of the training split, the one with
the highest top-1 on the held-out part is chosen, and it alone, fitted again on the whole training split, meets the test
split, once.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass

from ssl_dist import evaluators
from ssl_dist.config import Section
from ssl_dist.errors import UserError

SHARE = 0.1  # of the training images, held out unless --validation says otherwise


@dataclass(frozen=True)
class Candidate:
    """One combination: the evaluator's options, and those that were searched over, as evaluator.option: value."""

    options: Section
    values: dict[str, object]

    def __str__(self) -> str:
        return _words(self.values)


@dataclass(frozen=True)
class Grid:
    """An evaluator's combinations. axes: evaluator.option: the values to try."""

    axes: dict[str, list]
    candidates: list[Candidate]

    def __str__(self) -> str:
        return _words(self.axes)


def _words(values: dict[str, object]) -> str:
    return " ".join(f"{key}={_shown(value)}" for key, value in values.items())


def _shown(value: object) -> str:
    """As it could be written in YAML; a date, which YAML has and JSON has not, as text."""
    return json.dumps(value, default=str)


def check_share(share: float) -> None:
    """Raises `UserError` unless it is a share that leaves something on both sides."""
    if not 0 < share < 1:
        raise UserError(f"--validation {share:g}: give the share of training images to hold out, between 0 and 1")


def grids(chosen: Sequence[str], fixed: Sequence[str], searched: Sequence[str]) -> dict[str, Grid]:
    """Of every evaluator named in `searched` all combinations, the last option varying fastest.

    fixed: overrides evaluator.option=value; searched: evaluator.option=[value, value, ...], both YAML. Raises
    `UserError` for what is no list, an unknown option, a wrong value, and an option that is given twice.
    """
    seen = {word.partition("=")[0] for word in fixed}
    for word in searched:
        key, equals, _ = word.partition("=")
        if not equals or "." not in key:
            raise UserError(f"--search {word}: write evaluator.option=[value, value], for example logistic.c=[0.1,1]")
        if key in seen:
            raise UserError(f"--search {word}: {key} is given twice; name it once")
        seen.add(key)
    trees, axes = evaluators.option_trees(chosen, fixed), evaluators.option_trees(chosen, searched)
    return {name: _grid(name, trees[name], wanted) for name, wanted in axes.items() if wanted}


def _grid(name: str, tree: dict, axes: dict[str, list]) -> Grid:
    for option, values in axes.items():
        if not isinstance(values, list) or not values:
            raise UserError(
                f"--search {name}.{option}={_shown(values)}: give a list of the values to try, such as [1, 2]"
            )
    candidates = []
    for values in itertools.product(*axes.values()):
        these = dict(zip(axes, values, strict=True))
        options = evaluators.build_options(name, tree | these)
        candidates.append(Candidate(options, {f"{name}.{option}": value for option, value in these.items()}))
    return Grid({f"{name}.{option}": values for option, values in axes.items()}, candidates)


def best(tried: Sequence[dict[str, float]]) -> int:
    """Which of these values of one evaluator has the highest top-1; of equal ones the first."""
    scores = [top1(values) for values in tried]
    return scores.index(max(scores))


def top1(values: dict[str, float]) -> float:
    """What a combination is chosen by: its top-1, the highest where it has several (numbers of neighbours, stages).

    Raises `UserError` when there is none.
    """
    # Fitting the training images well is no merit, nor is the purity of clusters, which grows with their number.
    found = [
        value
        for name, value in values.items()
        if name.endswith("_top1") and "_train_" not in name and "_majority_" not in name
    ]
    if not found:
        raise UserError(f"--search: chooses by top-1, and this evaluator gives {', '.join(values)}; leave it out")
    return max(found)
