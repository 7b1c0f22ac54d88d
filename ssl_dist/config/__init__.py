"""The configuration of a run: its sections, the recipe of the views, and how both are read strictly."""

from ssl_dist.config.recipe import ColorJitter, GaussianBlur, Interpolation, RandomResizedCrop, Resize, ViewGroup
from ssl_dist.config.schema import (
    ClassSubset,
    Config,
    Data,
    DatasetName,
    Normalize,
    Optim,
    PluginFile,
    Views,
    dump,
    load,
    overridden,
)
from ssl_dist.config.section import (
    FiniteFloat,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Probability,
    Section,
    parse_yaml,
    to_tree,
    validate,
)

__all__ = [
    "ClassSubset", "ColorJitter", "Config", "Data", "DatasetName", "FiniteFloat", "GaussianBlur", "Interpolation",
    "NonNegativeFloat", "NonNegativeInt", "Normalize", "Optim", "PluginFile", "PositiveFloat", "PositiveInt",
    "Probability", "RandomResizedCrop", "Resize", "Section", "ViewGroup", "Views", "dump", "load", "overridden",
    "parse_yaml", "to_tree", "validate",
]  # fmt: skip
