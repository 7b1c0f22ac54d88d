"""Evaluations of a trained backbone, one file each, found by name: `find("knn")` is ssl_dist/evaluators/knn.py.

To add one, write a module here, or a plugin, that has the members of `FeatureEvaluator` or of `ImageEvaluator`; no
other file needs an edit. `flaw` compares modules with them.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from ssl_dist import plugins
from ssl_dist.config import Section, parse_yaml, validate
from ssl_dist.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import torch

    from ssl_dist.results.figures import FigureWriter
    from ssl_dist.storage.features import Features
    from ssl_dist.transfer.subject import EvalContext

OptionsT = TypeVar("OptionsT", bound=Section)

# What others call them, without hyphens and underscores.
_ALIASES = {
    "probe": ("linear", "lineareval", "linearevaluation", "linearprobe", "linearprobing", "lincls", "lp", "stages"),
    "logistic": ("logreg", "logisticregression", "lbfgs"),
    "finetune": ("finetuning", "ft", "semisupervised"),
    "clusters": ("kmeans", "cluster", "clustering", "nmi"),
    "knn": ("nearest", "nearestneighbours", "nearestneighbors", "neighbours", "neighbors"),
    "retrieval": ("retrieve", "recall", "map"),
    "embedding": ("tsne", "umap", "pca", "projector"),
    "classify": ("accuracy", "supervised"),
}


class FeatureEvaluator(Protocol[OptionsT]):
    """A module that works on the features of two splits, on rank 0.

    PROTOCOL: a sentence that says how it measures, with {option} where an option decides. Where more than a word
    depends on the options, the module has a function protocol(options) instead, as `ImageEvaluator` has. VERSION: of
    the code, raised when the same options give another number on the same features, so that every number is measured
    again. DRAWS = True: it draws pictures, and runs again where they are missing. Options: fields with descriptions and
    defaults. A function protocol_without_labels(options): it can look at one split alone, which is then both of its
    parts (`train is test`); the sentence is that of a split without labels.
    """

    PROTOCOL: str
    VERSION: int
    Options: type[OptionsT]

    def run(
        self,
        train: "Features",
        test: "Features",
        options: OptionsT,
        writer: "FigureWriter | None" = None,
        device: "torch.device | None" = None,
    ) -> dict[str, float]:
        """Values by name, <evaluator>_..., accuracies in percent. A search chooses by those that end in _top1.

        Features stay on disk: read their rows in blocks, by `Features.rows` or `Features.take`. writer: writes pictures
        and reads the images that they show; None: no pictures, as for a part held out of the training split. device:
        the run's, for what a GPU does sooner; None: the CPU. It changes no value. Raises `UserError` with the remedy
        for what the user can mend.
        """


@runtime_checkable
class ImageEvaluator(Protocol[OptionsT]):
    """A module that works on images, on all ranks together. VERSION, Options: as those of a `FeatureEvaluator`.
    READS_LAYERS = True: it reads `context.encoder.layer`, which users choose by layer=NAME."""

    VERSION: int
    Options: type[OptionsT]

    def protocol(self, options: OptionsT) -> str:
        """The sentence that results.json keeps beside every number: how it was measured."""

    def measure(self, context: "EvalContext", options: OptionsT) -> dict[str, float]:
        """Values by name, as those of `FeatureEvaluator.run`. Every rank calls it and returns the same.

        Raises `UserError` on every rank (`World.raise_together`), and `transfer.recipe.Stopped` on request to stop.
        """


Evaluator = FeatureEvaluator[Any] | ImageEvaluator[Any]  # one that is found by name has options of its own


def names() -> list[str]:
    """The names of all evaluators, sorted; imports none of them."""
    inside = _inside()
    return sorted(inside | plugins.found(plugins.EVALUATORS, inside).keys())


def _inside() -> set[str]:
    return {module.name for module in pkgutil.iter_modules(__path__)}


def find(name: str) -> Evaluator:
    """The evaluator's module. Raises `UserError` with the nearest name for one that does not exist."""
    inside = _inside()
    outside = plugins.found(plugins.EVALUATORS, inside)
    if name in inside:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in outside:
        plain = name.lower().replace("-", "").replace("_", "")
        own = [own for own, others in _ALIASES.items() if plain in (own, *others)]
        hint = f"did you mean {own[0]!r}? " if own else did_you_mean(name, names(), cutoff=0.5)
        known = f"known: {', '.join(names())}; --plugins FILE adds your own"
        raise UserError(f"unknown evaluator {name!r}: {hint}{plugins.absent() or known}")
    module = outside[name].load()
    if fault := flaw(module):
        raise UserError(f"{outside[name].source}: evaluator {name} {fault}; see CONTRIBUTING.md")
    return module


def flaw(module: object) -> str:
    """What a module lacks to be an evaluator, as the predicate of a sentence; empty when it is one."""
    kind, function = (ImageEvaluator, "measure") if hasattr(module, "measure") else (FeatureEvaluator, "run")
    _, *expected = inspect.signature(getattr(kind, function)).parameters.values()  # without self
    parameters = [(p.name, p.default) for p in inspect.signature(getattr(module, function)).parameters.values()]
    if parameters != [(p.name, p.default) for p in expected]:
        return f"must define {function}({', '.join(str(p.replace(annotation=p.empty)) for p in expected)})"
    options = getattr(module, "Options", None)
    if not (isinstance(options, type) and issubclass(options, Section)):
        return "must define class Options(Section), with the defaults of its options"
    if undescribed := [key for key, field in options.model_fields.items() if not field.description]:
        return f"must describe its option {undescribed[0]}: Field(..., description=...)"
    if not isinstance(getattr(module, "VERSION", None), int):
        return "must define VERSION, a number"
    if not hasattr(module, "protocol") and (function == "measure" or not hasattr(module, "PROTOCOL")):
        return "must say how it measures: protocol(options)" + (" or PROTOCOL" if function == "run" else "")
    return ""


def parse_options(chosen: Sequence[str], overrides: Sequence[str] = ()) -> dict[str, Section]:
    """The options of every chosen evaluator, from `evaluator.option=value` overrides (values are YAML).

    Raises `UserError` for an override of an evaluator that was not chosen, an unknown option or a wrong value.
    """
    return {name: build_options(name, tree) for name, tree in option_trees(chosen, overrides).items()}


def option_trees(chosen: Sequence[str], overrides: Sequence[str]) -> dict[str, dict]:
    """The overrides of every chosen evaluator, as option: value. Raises `UserError`."""
    trees: dict[str, dict] = {name: {} for name in chosen}
    for override in overrides:
        key, equals, value = override.partition("=")
        name, dot, option = key.partition(".")
        if not (equals and dot and option):
            owners = [own for own in chosen if equals and not dot and key in find(own).Options.model_fields]
            example = f"{owners[0]}.{override}" if owners else "evaluator.option=value, for example knn.k=[20,200]"
            raise UserError(f"override {override!r}: write {example}")
        if name not in trees:
            find(name)
            raise UserError(f"override {override!r}: {name} is not among the evaluators to run: {', '.join(chosen)}")
        trees[name][option] = parse_yaml(value, f"override {override!r}")
    return trees


def build_options(name: str, tree: dict) -> Section:
    """An evaluator's options. Raises `UserError` for an unknown one and for a wrong value."""
    return validate(find(name).Options, tree, f"{name}.")


def draws(evaluator: Evaluator) -> bool:
    """Whether an evaluator of features writes pictures."""
    return getattr(evaluator, "DRAWS", False)


def reads_layers(evaluator: Evaluator) -> bool:
    """Whether the evaluator reads features of another layer than the output: those of features do."""
    return not isinstance(evaluator, ImageEvaluator) or getattr(evaluator, "READS_LAYERS", False)


def works_without_labels(name: str) -> bool:
    """Whether the evaluator can look at one split alone, with labels or without."""
    return hasattr(find(name), "protocol_without_labels")


def protocol(evaluator: Evaluator, options: Section) -> str:
    """The sentence that says how the evaluator measures with these options."""
    if hasattr(evaluator, "protocol"):
        return evaluator.protocol(options)
    return evaluator.PROTOCOL.format(**options.model_dump())


def protocol_without_labels(evaluator: Evaluator, options: Section) -> str:
    """The sentence of one that `works_without_labels`, for a split that has none."""
    assert hasattr(evaluator, "protocol_without_labels")
    return evaluator.protocol_without_labels(options)
