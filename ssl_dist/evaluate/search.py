"""Search for the options of an evaluation: all combinations, measured on images held out of the training split.

The test split has no part in the choice: every combination learns from the rest of the training split, the one with the
highest top-1 on the held-out part is chosen, and it alone, fitted again on the whole training split, is measured on the
test split, once.
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pydantic import Field

from ssl_dist import evaluators
from ssl_dist.config import ClassSubset, Section, parse_yaml, validate
from ssl_dist.errors import UserError

HeldOut = float | ClassSubset | str  # of the training images: a share, or those chosen as by data.subset
DEFAULT_SHARE = 0.1  # of the training images that are held out, unless --validation says otherwise


class Candidate(NamedTuple):
    """One combination in words, evaluator.option=value, and all options of the evaluator."""

    words: str
    options: Section


class SearchSpace(NamedTuple):
    """An evaluator's combinations; in words, evaluator.option=[value, value]."""

    words: str
    candidates: list[Candidate]


def _assignments(evaluator: str, values: Mapping[str, object]) -> str:
    return " ".join(f"{evaluator}.{option}={_as_yaml(value)}" for option, value in values.items())


def _as_yaml(value: object) -> str:
    """The value as it could be written in YAML; a date, which YAML has and JSON has not, as text."""
    return json.dumps(value, default=str)


def check_share(share: float, text: str | None = None) -> None:
    """Raises `UserError` unless the share, written as `text`, is between 0 and 1."""
    if not 0 < share < 1:
        raise UserError(
            f"--validation {text or f'{share:g}'}: give the share of training images to hold out, between 0 "
            "and 1, or choose them: '{per_class: 260, start: 260}', or a file with one id a line"
        )


class _Chosen(Section):
    images: ClassSubset | str = Field(description="{per_class: n, start: m}, or a file with one id a line")


def validation(text: str) -> HeldOut:
    """What `--validation TEXT` says. Raises `UserError`."""
    value = parse_yaml(text, f"--validation {text}")
    if isinstance(value, str | dict):
        return validate(_Chosen, {"images": value}, f"--validation {text}: ").images
    check_share(float(value) if isinstance(value, int | float) else math.nan, text)
    return float(value)


def search_spaces(chosen: Sequence[str], fixed: Sequence[str], searched: Sequence[str]) -> dict[str, SearchSpace]:
    """All combinations for every evaluator named in `searched`, the last option varying fastest.

    fixed: overrides evaluator.option=value; searched: evaluator.option=[value, value, ...], both YAML. Raises
    `UserError` for what is no list, an unknown option, a wrong value, and an option that is given twice.
    """
    keys = {override.partition("=")[0] for override in fixed}
    for override in searched:
        key, equals, _ = override.partition("=")
        if not equals or "." not in key:
            raise UserError(
                f"--search {override}: write evaluator.option=[value, value], for example logistic.c=[0.1,1]"
            )
        if key in keys:
            raise UserError(f"--search {override}: {key} is given twice; name it once")
        keys.add(key)
    trees, axes = evaluators.option_trees(chosen, fixed), evaluators.option_trees(chosen, searched)
    return {name: _search_space(name, trees[name], axes[name]) for name in axes if axes[name]}


def _search_space(name: str, tree: dict, axes: dict[str, list]) -> SearchSpace:
    for option, values in axes.items():
        if not isinstance(values, list) or not values:
            raise UserError(
                f"--search {name}.{option}={_as_yaml(values)}: give a list of the values to try, such as [1, 2]"
            )
    candidates = []
    for combination in itertools.product(*axes.values()):
        searched = dict(zip(axes, combination, strict=True))
        options = evaluators.build_options(name, tree | searched)
        candidates.append(Candidate(_assignments(name, searched), options))
    return SearchSpace(_assignments(name, axes), candidates)


def best_index(candidate_values: Sequence[dict[str, float]]) -> int:
    """The candidate, by its number, whose values hold the highest top-1; of equal ones the first."""
    scores = [top1(values) for values in candidate_values]
    return scores.index(max(scores))


def top1(values: dict[str, float]) -> float:
    """The score that a combination is chosen by: its top-1, the highest of several (numbers of neighbours, stages).

    Raises `UserError` when there is none.
    """
    # Fitting the training images well is no merit, nor is the purity of clusters, which grows with their number.
    scores = [
        value
        for name, value in values.items()
        if name.endswith("_top1") and "_train_" not in name and "_majority_" not in name
    ]
    if not scores:
        raise UserError(f"--search: chooses by top-1, and this evaluator gives {', '.join(values)}; leave it out")
    return max(scores)
