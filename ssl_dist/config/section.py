"""Strict typed sections: what a config and the options of methods and evaluators are made of, and YAML to fill them.

Unknown keys, wrong types and values out of range raise `UserError` with one line that names the key, the value and the
remedy, with the nearest name for a misspelt one.
"""

import os
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from ssl_dist.errors import UserError, did_you_mean, quoted, refuse_unreadable
from ssl_dist.reading import read_text

MAX_INT = 10**9  # of two of them the product, in bytes of float64, still is an int64
PositiveInt = Annotated[int, Field(ge=1, le=MAX_INT)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MAX_INT)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# A path in a YAML file or behind "=" is none that a shell expands.
PathText = Annotated[str, AfterValidator(os.path.expanduser)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1)]

AnySection = TypeVar("AnySection", bound=BaseModel)


class Section(BaseModel):
    """A part of the config: unknown keys are refused, nothing is coerced silently (an int may stand for a float)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())

    @classmethod
    def hint(cls, path: Sequence[int | str], value: object) -> str:
        """What to write in the place of the unknown key at `path`, where it is known; else nothing."""
        return ""


# Of a YAML text. PyYAML takes a second for some 50,000 characters, and every alias stands for all that it names.
MAX_CHARACTERS, MAX_DEPTH, MAX_VALUES = 100_000, 40, 20_000
_TAG = "tag:yaml.org,2002:"
_SCALARS = ("str", "int", "float", "bool", "null")


class _Loader(yaml.SafeLoader):
    """The safe loader, with limits. `1e-3` is a number (PyYAML follows YAML 1.1, where it is text), a date is text, and
    no key may stand twice. What is made of a document are dicts, lists, text, finite numbers and their like."""

    def __init__(self, text: str, source: str):
        super().__init__(text)
        self.name = source
        self._depth = 0
        self._extents: dict[int, tuple[int, int]] = {}  # by the node's id: its values, aliases counted, and its depth
        self._flattened: set[int] = set()

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Raises `UserError` before recursion or memory has an end."""
        mark, is_alias = self.peek_event().start_mark, self.check_event(yaml.AliasEvent)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._refused(mark, f"nested deeper than {MAX_DEPTH} levels; write it flatter")
        node = super().compose_node(parent, index)
        assert node is not None, "an event of a node is next"
        self._depth -= 1
        if id(node) not in self._extents:
            if is_alias:
                raise self._refused(mark, "an alias inside what it names; write the value out")
            parts = node.value if isinstance(node, yaml.CollectionNode) else []
            nodes = [part for pair in parts for part in pair] if isinstance(node, yaml.MappingNode) else parts
            extents = [self._extents[id(part)] for part in nodes]
            self._extents[id(node)] = (
                1 + sum(n for n, _ in extents),
                1 + max((depth for _, depth in extents), default=0),
            )
        num_values, depth = self._extents[id(node)]
        if num_values > MAX_VALUES:
            raise self._refused(mark, f"more than {MAX_VALUES:,} values, aliases counted; write fewer")
        if self._depth + depth > MAX_DEPTH:
            raise self._refused(mark, f"nested deeper than {MAX_DEPTH} levels by aliases; write it flatter")
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        kind = node.tag.removeprefix(_TAG)
        nodes = {"seq": yaml.SequenceNode, "map": yaml.MappingNode} | dict.fromkeys(_SCALARS, yaml.ScalarNode)
        if not isinstance(node, nodes.get(kind, ())):
            shown = f"!!{kind}" if node.tag.startswith(_TAG) else node.tag
            raise self._refused(node.start_mark, f"the tag {quoted(shown)} has no place here; write the plain value")
        if not isinstance(node, yaml.ScalarNode):
            return super().construct_object(node, deep)
        meant = self.resolve(yaml.ScalarNode, node.value, (True, False)).removeprefix(_TAG)
        try:
            if kind not in ("str", meant) and (kind, meant) != ("float", "int"):
                raise ValueError
            value = super().construct_object(node, deep)
            if isinstance(value, int) and abs(value) >= 10**30:
                raise ValueError
        except (ValueError, OverflowError):
            what = {
                "int": "a whole number of at most 30 digits",
                "float": "a number",
                "bool": "true or false",
                "null": "a null",
            }
            raise self._refused(node.start_mark, f"{quoted(node.value)} is not {what[kind]}; write one") from None
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            raise self._refused(node.start_mark, f"{quoted(value)} holds half a character, not text; write it whole")
        if isinstance(value, str) and "\0" in value:
            raise self._refused(node.start_mark, f"{quoted(value)} holds a NUL character, which no name can; remove it")
        return value

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Put the keys of `<<: *alias` in their place, after a look at those that are written out."""
        if id(node) in self._flattened:
            return
        self._flattened.add(id(node))
        keys = set()
        for key_node, _ in node.value:
            if key_node.tag == _TAG + "merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise self._refused(
                    key_node.start_mark, f"key {quoted(key)} is not a word; keys are names such as optim"
                )
            if key in keys:
                raise self._refused(key_node.start_mark, f"key {quoted(key)} stands twice; remove one")
            keys.add(key)
        super().flatten_mapping(node)

    def _refused(self, mark: yaml.Mark, reason: str) -> UserError:
        return UserError(f"{self.name}: line {mark.line + 1}: {reason}")


_Loader.add_implicit_resolver(
    _TAG + "float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_TAG + "timestamp", _TAG + "value")]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def read_yaml(path: str | Path, target: str, remedy: str) -> Any:
    """The YAML document in a file. target: the file as messages name it. Raises `UserError`."""
    with refuse_unreadable(target, remedy):
        return parse_yaml(read_text(path, 4 * MAX_CHARACTERS), str(path))


def parse_yaml(text: str, source: str) -> Any:
    """One YAML document. Raises `UserError` naming `source` and the line."""
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"{source}: has {len(text):,} characters; at most {MAX_CHARACTERS:,} are read")
    loader = None
    try:
        loader = _Loader(text, source)
        return loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        raise UserError(
            f"{source}:{line} not valid YAML: {getattr(error, 'problem', 'a character that is not text; write UTF-8')}"
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
        hint = section.hint(path, fault["input"]) if issubclass(section, Section) else ""
        hint = hint or did_you_mean(str(path[-1]), names, cutoff=0.5).rstrip() or f"known here: {', '.join(names)}"
        return f"unknown key {key} = {_show(fault['input'])}: {hint}"
    if fault["type"] == "missing":
        return f"missing key {key}: it must be given"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error" and isinstance(fault["input"], dict | BaseModel):
        return f"{key}.{message}" if path else prefix + message
    remedy = fields[-1].description if fields else None
    around = section_in(fields[-1].annotation) if fields and fault["type"] == "model_type" else None
    if around is not None and isinstance(fault["input"], str) and "name" in around.model_fields:
        return f"{key} = {_show(fault['input'])}: is a section; write {key}.name={fault['input']}"
    if len(path) == len(paths[0]):
        message = " or ".join(dict.fromkeys(faults[i]["msg"].removeprefix("Value error, ") for i in related))
    text = f"{key} = {_show(fault['input'])}: {message[0].lower()}{message[1:]}"
    return f"{text} ({remedy})" if remedy else text


def _show(value: Any) -> str:
    """A value as the user would write it in YAML."""
    shown = quoted(value)
    return {"None": "null", "True": "true", "False": "false"}.get(shown, shown)


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
