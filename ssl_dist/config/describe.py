"""Tables of the keys of sections, with type and range, default and description, as text or Markdown."""

import itertools
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ssl_dist.config.section import MAX_INT, section_in
from ssl_dist.errors import UserError, did_you_mean
from ssl_dist.text_table import aligned

HEAD = ("key", "type", "default", "meaning")
WIDTH_SHARES = (0.5, 0.2, 0.16)  # at most, of the columns before the last, which gets the rest of the line
MIN_WIDTH = 40  # of a line
MIN_MEANING_WIDTH = 20
MARKDOWN_HEAD = """# Config keys

Written by `ssl-dist keys --markdown > docs/config.md`; `ssl-dist keys SECTION` prints one section. The key `lr` of the
section `optim` is a line below `optim:` in a config, and `optim.lr=0.01` on the command line."""
_WORDS = {bool: "true or false", int: "integer", float: "number", str: "text", dict: "mapping", type(None): "null"}


@dataclass(frozen=True)
class Table:
    """The keys of one section: rows of the cells of HEAD. title: its name; path: what precedes its keys, with a dot."""

    title: str
    path: str
    about: str
    rows: tuple[tuple[str, str, str, str], ...]


def tables(section: type[BaseModel], title: str, path: str, docstring: str | None = None) -> list[Table]:
    """The table of a section, then those of the sections in it. Of a list of sections the first stands for all."""
    rows, inner = [], []
    for key, field in section.model_fields.items():
        child = section_in(field.annotation)
        name = f"{key}.0" if typing.get_origin(field.annotation) is list else key
        if child is not None:
            inner += tables(child, f"{path}{name}", f"{path}{name}.", child.__doc__)
        meaning = _description(section, key) or (_first_paragraph(child.__doc__) if child else "")
        if child is not field.annotation:  # a section that is always there has its table alone
            rows.append((key, _type(field.annotation, field.metadata), _default(field), meaning))
    return [Table(title, path, _first_paragraph(docstring), tuple(rows)), *inner]


def find(tables: Sequence[Table], name: str) -> list[Table]:
    """The section `name` and those in it, or the key of that name; empty when there is neither."""
    sections = [table for table in tables if f"{table.title}.".startswith(f"{name}.")]
    rows_of = {table: tuple(row for row in table.rows if table.path + row[0] == name) for table in tables}
    return sections or [replace(table, rows=rows) for table, rows in rows_of.items() if rows]


def unknown(tables: Sequence[Table], name: str) -> UserError:
    """The error of a name that `find` does not find, with the nearest one."""
    names = [table.title for table in tables] + [table.path + row[0] for table in tables for row in table.rows]
    hint = did_you_mean(name, names, cutoff=0.5) or f"sections: {', '.join(table.title for table in tables)}"
    return UserError(f"keys {name}: no such section or key; {hint}".rstrip())


def as_text(tables: Sequence[Table], width: int) -> str:
    """For a terminal of `width` columns; in fewer than `MIN_WIDTH` the lines are of that length."""
    width = max(width, MIN_WIDTH)
    return "\n\n".join("\n".join(_text_lines(table, width)) for table in tables)


def _text_lines(table: Table, width: int) -> Iterator[str]:
    yield f"{table.title}: {_set_by(table)}" if table.path != f"{table.title}." else table.title
    yield from textwrap.wrap(table.about, width, initial_indent="  ", subsequent_indent="  ")
    if not table.rows:
        return
    longest = [max(len(row[column]) for row in (HEAD, *table.rows)) for column in range(len(HEAD))]
    widths = [min(int(share * width), length) for share, length in zip(WIDTH_SHARES, longest, strict=False)]
    widths.append(max(MIN_MEANING_WIDTH, width - 2 - sum(widths) - 2 * len(widths)))  # below an indent, with gaps
    lines: list[Sequence[str]] = [HEAD]
    for row in table.rows:
        cells = [textwrap.wrap(cell, width) for cell, width in zip(row, widths, strict=True)]
        lines += itertools.zip_longest(*cells, fillvalue="")
    yield from ("  " + line for line in aligned(lines))


def as_markdown(tables: Sequence[Table]) -> str:
    """A heading and a table for each section."""
    return "\n\n".join([MARKDOWN_HEAD, *("\n".join(_markdown_lines(table)) for table in tables)])


def _markdown_lines(table: Table) -> Iterator[str]:
    yield f"## {table.title}"
    if table.about:
        yield f"\n{_escaped(table.about)}"
    if table.path != f"{table.title}.":
        yield f"\n{_set_by(table)}"
    if table.rows:
        yield f"\n| {' | '.join(HEAD)} |\n|---|---|---|---|"
    for key, *cells in table.rows:
        yield f"| `{key}` | {' | '.join(map(_escaped, cells))} |"


def _set_by(table: Table) -> str:
    return f"set as {table.path}KEY=VALUE" if table.rows else "no keys"


def _escaped(text: str) -> str:
    """Markdown takes <name> for HTML and * for emphasis."""
    return text.replace("<", "\\<").replace("*", "\\*").replace("|", "\\|")


def _description(section: type[BaseModel], key: str) -> str:
    """Of a key, or where a section only changes its default, of the section that it inherits from."""
    fields = [base.model_fields.get(key) for base in section.__mro__ if issubclass(base, BaseModel)]
    return next((field.description for field in fields if field is not None and field.description), "")


def _first_paragraph(docstring: str | None) -> str:
    return " ".join((docstring or "").partition("\n\n")[0].split())


def _type(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """`integer in [1, 64] or null`, from an annotation and the constraints that pydantic keeps beside it."""
    *first, last = _alternatives(annotation, metadata)
    return f"{', '.join(first)} or {last}" if first else last


def _alternatives(annotation: Any, metadata: Sequence[Any] = ()) -> list[str]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        base, *annotations = arguments
        return _alternatives(base, [part for field in annotations for part in getattr(field, "metadata", [field])])
    if origin is Literal:
        return [_value(choice) for choice in arguments]
    if origin in (typing.Union, types.UnionType):
        return [text for argument in arguments for text in _alternatives(argument)]
    if origin is list:
        return [f"list of {_type(arguments[0])}"]
    if origin is tuple and arguments[1:] == (...,):
        return [f"[{_type(arguments[0])}, ...]"]
    if origin is tuple:
        return [f"[{', '.join(map(_type, arguments))}]"]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return ["section"]
    return [_WORDS[origin or annotation] + _range(metadata)]


def _range(metadata: Sequence[Any]) -> str:
    """The bounds among the constraints of a number."""
    bounds = {
        name: getattr(part, name) for part in metadata for name in ("ge", "gt", "le", "lt") if hasattr(part, name)
    }
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    if low is not None and high is not None:
        return f" in {'[' if 'ge' in bounds else '('}{_value(low)}, {_value(high)}{']' if 'le' in bounds else ')'}"
    if low is not None:
        return f" {'≥' if 'ge' in bounds else '>'} {_value(low)}"
    return "" if high is None else f" {'≤' if 'le' in bounds else '<'} {_value(high)}"


def _default(field: FieldInfo) -> str:
    return "must be given" if field.is_required() else _value(field.get_default(call_default_factory=True))


def _value(value: Any) -> str:
    """As in YAML; of a section what differs from its defaults."""
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_defaults=True)
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_value(part)}' for key, part in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, float) or value == MAX_INT:
        return f"{value:.6g}".replace("e+0", "e").replace("e-0", "e-")
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))
