"""Strict typed sections: what a config and the options of methods and evaluators are made of, and YAML to fill them.

Unknown keys, wrong types and values out of range raise `UserError` with one line that names the key, the value and the
remedy, with the nearest name for a misspelt one.
"""

import re
import types
import typing
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from ssl_dist.errors import UserError, did_you_mean

MAX_INT = 10**9  # of two of them the product, in bytes of float64, still is an int64
PositiveInt = Annotated[int, Field(ge=1, le=MAX_INT)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MAX_INT)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1)]

AnySection = TypeVar("AnySection", bound=BaseModel)


class Section(BaseModel):
    """A part of the config: unknown keys are refused, nothing is coerced silently (an int may stand for a float)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


class _Loader(yaml.SafeLoader):
    """The safe loader; `1e-3` is a number (PyYAML follows YAML 1.1, where it is text) and no key may stand twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                line = key_node.start_mark.line + 1
                raise UserError(f"{self.name}: line {line}: key {key!r} is not a word; keys are names such as optim")
            if key in keys:
                raise UserError(
                    f"{self.name}: line {key_node.start_mark.line + 1}: key {key!r} stands twice; remove one"
                )
            keys.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str, source: str) -> Any:
    """One YAML document. Raises `UserError` naming `source` and the line."""
    loader = None
    try:
        loader = _Loader(text)
        loader.name = source
        return loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        raise UserError(
            f"{source}:{line} not valid YAML: {getattr(error, 'problem', 'a character that is not text')}"
        ) from None
    finally:
        if loader is not None:
            loader.dispose()


def validate(section: type[AnySection], tree: dict, prefix: str = "") -> AnySection:
    """`tree` as a `section`; the first fault becomes a one-line `UserError` whose key starts with `prefix`."""
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        raise UserError(_describe(section, error, prefix)) from None


def _describe(section: type[BaseModel], error: ValidationError, prefix: str) -> str:
    """The first fault in one line: of a value that may be of several types, that of the type which got furthest."""
    faults = error.errors()
    paths = [_path(section, fault["loc"], fault["type"] == "extra_forbidden") for fault in faults]
    related = [i for i, path in enumerate(paths) if path[: len(paths[0])] == paths[0]]
    deepest = max(related, key=lambda i: len(paths[i]))
    fault, path = faults[deepest], paths[deepest]
    key = prefix + ".".join(str(part) for part in path)
    fields = fields_along(section, path)
    if fault["type"] == "extra_forbidden":
        around = section_in(fields[-1].annotation) if fields else section
        names = list(around.model_fields) if around else []
        hint = did_you_mean(str(path[-1]), names, cutoff=0.5).rstrip() or f"known here: {', '.join(names)}"
        return f"unknown key {key} = {_show(fault['input'])}: {hint}"
    if fault["type"] == "missing":
        return f"missing key {key}: it must be given"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error" and isinstance(fault["input"], dict | BaseModel):
        return f"{key}.{message}" if key else message
    remedy = fields[-1].description if fields else None
    if len(path) == len(paths[0]):
        message = " or ".join(dict.fromkeys(faults[i]["msg"].removeprefix("Value error, ") for i in related))
    text = f"{key} = {_show(fault['input'])}: {message[0].lower()}{message[1:]}"
    return f"{text} ({remedy})" if remedy else text


def _show(value: Any) -> str:
    """A value as the user would write it in YAML."""
    return {"None": "null", "True": "true", "False": "false"}.get(repr(value), repr(value))


def _path(section: type[BaseModel], location: Sequence[int | str], ends_unknown: bool) -> list[int | str]:
    """The keys that lead to the fault, without the alternatives of unions that pydantic puts between them."""
    unknown = len(location) - 1 if ends_unknown else None  # that one is the user's word
    return [
        part
        for i, part in enumerate(location)
        if i == unknown or part in section.model_fields or not _is_union_tag(part)
    ]


def _is_union_tag(part: int | str) -> bool:
    """pydantic names the alternative of a union in the location, for example 'ClassSubset' or 'literal[...]'."""
    return isinstance(part, str) and (not part.isidentifier() or part[:1].isupper() or part in ("str", "int", "float"))


def fields_along(section: type[BaseModel], path: Sequence[int | str]) -> list[FieldInfo]:
    """The fields on the way down `path`, as far as there are such; numbers of list items have none."""
    fields: list[FieldInfo] = []
    for part in path:
        if not isinstance(part, int):
            around = section_in(fields[-1].annotation) if fields else section
            if around is None or part not in around.model_fields:
                break
            fields.append(around.model_fields[part])
    return fields


def section_in(annotation: Any) -> type[BaseModel] | None:
    """The section inside an annotation such as `ColorJitter | None` or `list[ViewGroup]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, list, Annotated):
        return next(filter(None, map(section_in, typing.get_args(annotation))), None)
    return None


def to_tree(config: Section) -> dict:
    """Plain values only (dicts, lists, numbers, text): what config.yaml and checkpoints hold."""
    return config.model_dump(mode="json")
