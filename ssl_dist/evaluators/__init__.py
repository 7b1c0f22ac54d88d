"""Evaluations of a trained backbone, one file each, found by name: `find("knn")` is ssl_dist/evaluators/knn.py.

An evaluator of features defines
    PROTOCOL: str                                 a sentence that names the protocol, with {option} where one decides;
                                                  or protocol(options) -> str where more than a word depends on them
    class Options(config.Section)                 documented fields
    run(train, test, options, album=None) -> dict[str, float]
                                                  features of two splits -> values by name; accuracies in percent.
                                                  With an album (results/figures.py) it draws pictures as well
    DRAWS = True                                  if it does: it runs again where its pictures are missing
One of images has `protocol(options)`, and instead of `run` it has `measure(subject, options)`, which all ranks call
together (transfer/subject.py). Neither needs an edit elsewhere.
"""

import importlib
import pkgutil
from collections.abc import Sequence
from types import ModuleType

from ssl_dist.config import Section, parse_yaml, validate
from ssl_dist.errors import UserError, did_you_mean


def names() -> list[str]:
    """The evaluators there are, sorted. Nothing is imported to find out."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(name: str) -> ModuleType:
    """The evaluator's module. Raises `UserError` with the nearest name for one that does not exist."""
    if name not in names():
        hint = did_you_mean(name, names(), cutoff=0.5)
        raise UserError(f"unknown evaluator {name!r}: {hint}known: {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")


def parse_options(chosen: Sequence[str], overrides: Sequence[str] = ()) -> dict[str, Section]:
    """The options of every chosen evaluator, from `evaluator.option=value` overrides (values are YAML).

    Raises `UserError` for an override of an evaluator that was not chosen, an unknown option or a wrong value.
    """
    return {name: build_options(name, tree) for name, tree in option_trees(chosen, overrides).items()}


def option_trees(chosen: Sequence[str], overrides: Sequence[str]) -> dict[str, dict]:
    """What the overrides say of every chosen evaluator, as option: value. Raises `UserError`."""
    trees: dict[str, dict] = {name: {} for name in chosen}
    for override in overrides:
        key, equals, value = override.partition("=")
        name, dot, option = key.partition(".")
        if not (equals and dot and option):
            raise UserError(f"override {override!r}: write evaluator.option=value, for example knn.k=[20,200]")
        if name not in trees:
            find(name)
            raise UserError(f"override {override!r}: {name} is not among the evaluators to run: {', '.join(chosen)}")
        trees[name][option] = parse_yaml(value, f"override {override!r}")
    return trees


def build_options(name: str, tree: dict) -> Section:
    """An evaluator's options. Raises `UserError` for an unknown one and for a wrong value."""
    return validate(find(name).Options, tree, f"{name}.")


def sees_images(evaluator: ModuleType) -> bool:
    """Whether it works on images; the others read features files."""
    return hasattr(evaluator, "measure")


def draws(evaluator: ModuleType) -> bool:
    """Whether an evaluator of features leaves pictures."""
    return getattr(evaluator, "DRAWS", False)


def protocol(evaluator: ModuleType, options: Section) -> str:
    """The sentence that says how the evaluator measured."""
    if hasattr(evaluator, "PROTOCOL"):
        return evaluator.PROTOCOL.format(**options.model_dump())
    return evaluator.protocol(options)
