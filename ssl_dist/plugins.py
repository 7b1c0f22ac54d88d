"""Methods, backbones and evaluators from outside of the package: of files that a user names, and of installed packages.

A file is what one of the package is. With a class `Method` it is a method, with a function `run` or `measure` an
evaluator, either by the name of the file; with a dict `BACKBONES` it has those backbones. A package names its own by
entry points: ssl_dist.methods (a class), ssl_dist.backbones (what builds one) and ssl_dist.evaluators (a module).

A file is executed as it is read, and nothing of it is pickled: it is code of the user's own, named by the user.
"""

import hashlib
import importlib.metadata
import json
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

from ssl_dist.errors import UserError, quoted, refuse_unreadable

METHODS, BACKBONES, EVALUATORS = "methods", "backbones", "evaluators"
AS_IT_IS = "restore it, or --plugins FILE takes it as it is now"
ANEW = "restore it, or begin a run with it as it is now: --plugins FILE and another run_dir"
_MODULES = "ssl_dist_plugins"  # precedes the names of the files' modules


@dataclass(frozen=True)
class File:
    """A file that was executed."""

    path: Path
    sha256: str
    module: ModuleType

    @property
    def source(self) -> str:
        """As results name it."""
        return f"{self.path.name} (SHA-256 {self.sha256[:12]})"

    def provided(self, name: str, kind: str) -> dict[str, Any]:
        """What it has of this kind, by name. name: its own."""
        attributes = vars(self.module)
        if kind == BACKBONES:
            backbones = attributes.get("BACKBONES", {})
            if not isinstance(backbones, dict) or not all(map(is_name, backbones)):
                raise UserError(f"plugin {self.path}: BACKBONES must be a dict of names (letters, digits, _ - .)")
            for called, build in backbones.items():
                if not callable(build):
                    raise UserError(f"plugin {self.path}: BACKBONES[{called!r}] is no function; give what builds one")
            return backbones
        if "Method" in attributes:
            return {name: attributes["Method"]} if kind == METHODS else {}
        is_evaluator = kind == EVALUATORS and ("run" in attributes or "measure" in attributes)
        return {name: self.module} if is_evaluator else {}


@dataclass(frozen=True)
class Plugin:
    """What has a name. source: where it is, for people; file: the name of its file, None: it is of a package."""

    source: str
    file: str | None
    load: Callable[[], Any]


_files: dict[str, File] = {}
_chosen: set[str] = set()  # files to take as they are, whatever a run has recorded
_absent: dict[str, str] = {}  # files that a run has recorded: why they are not loaded
_packages: dict[str, str] = {}  # that something was taken of: their versions


def is_name(name: object) -> bool:
    """Whether a method, a backbone or an evaluator may be called so."""
    return isinstance(name, str) and name[:1].isalnum() and name.replace("-", "_").replace(".", "_").isidentifier()


def name_of(file: str | Path) -> str:
    """What a file is called: its stem. Raises `UserError` when no method could be called so."""
    name = Path(file).stem
    if not name.isidentifier():
        raise UserError(f"plugin {file}: {quoted(name)} is no name of Python's; rename it, for example to my_method.py")
    return name


def choose(files: Sequence[str | Path]) -> list[str]:
    """Load files and take them as they are now, whatever a run has recorded of them. Returns the overrides that name
    them in a config. Raises `UserError`."""
    by_name = {name_of(file): file for file in files}
    if len(by_name) < len(files):
        raise UserError(f"--plugins {' '.join(map(str, files))}: two files have one name; rename one")
    for name, file in by_name.items():
        load(name, file)
        _chosen.add(name)
    return [f"plugins.{name}={json.dumps({'file': str(_files[name].path)})}" for name in by_name]


def load(name: str, file: str | Path) -> File:
    """Execute the file, unless it was as it is. Raises `UserError` when it cannot be, or has nothing to give."""
    path = Path(file).absolute()
    with refuse_unreadable(f"plugin {file}", "give a Python file"):
        text = path.read_bytes()
    return _execute(name, path, text, hashlib.sha256(text).hexdigest())


def load_recorded(name: str, file: str, sha256: str, record: str, remedy: str, folder: Path | None = None) -> None:
    """Load a file as a run has recorded it, unless one of this name is loaded. One that is gone or has changed is not
    executed, and `absent` says so. record: what names the file, for people; remedy: where it has changed; folder: the
    run's, from which no code is taken: it may have come from elsewhere."""
    path = Path(file)
    if name in _files:
        return
    if not path.is_absolute() or (folder is not None and path.resolve().is_relative_to(folder.resolve())):
        _absent[name] = (
            f"{file}, which {record} names, lies within the run's folder; --plugins FILE takes it from there"
        )
        return
    if not path.is_file():
        _absent[name] = f"{file}, which {record} names, is gone; give its place by --plugins FILE"
        return
    text = path.read_bytes()
    if hashlib.sha256(text).hexdigest() != sha256:
        _absent[name] = changed(file, record, remedy)
        return
    _execute(name, path, text, sha256)


def changed(file: str, record: str, remedy: str) -> str:
    """The sentence on a file that is no longer what it was."""
    return f"{file} has changed since {record} was written; {remedy}"


def _execute(name: str, path: Path, text: bytes, sha256: str) -> File:
    known = _files.get(name)
    if known is not None and known.sha256 == sha256:
        _files[name] = File(path, sha256, known.module)
        return _files[name]
    module = ModuleType(f"{_MODULES}.{name}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where pydantic and dataclasses look up the names of annotations
    try:
        exec(compile(text, str(path), "exec"), vars(module))
    except SyntaxError as error:
        where = f"line {error.lineno}: " if error.lineno else ""
        raise UserError(f"plugin {error.filename or path}: {where}{error.msg}; mend it") from None
    except ImportError as error:
        raise UserError(f"plugin {path}: {error}; mend the import, or install what it names") from None
    except (Exception, SystemExit) as error:  # whatever code of the user's raises
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f"line {lines[-1]}: " if lines else ""
        raise UserError(f"plugin {path}: {where}{type(error).__name__}: {error}; mend it") from error
    new = File(path, sha256, module)
    if not any(new.provided(name, kind) for kind in (METHODS, BACKBONES, EVALUATORS)):
        raise UserError(
            f"plugin {path}: has no class Method, no BACKBONES and no function run or measure; CONTRIBUTING.md says "
            "what a method, a backbone and an evaluator are"
        )
    _files[name] = new
    _absent.pop(name, None)
    return new


@cache
def _entry_points(kind: str) -> tuple[importlib.metadata.EntryPoint, ...]:
    return tuple(importlib.metadata.entry_points(group=f"ssl_dist.{kind}"))


def _all(kind: str) -> Iterator[tuple[str, Plugin]]:
    for called, file in _files.items():
        for name, value in file.provided(called, kind).items():
            yield name, Plugin(str(file.path), called, partial(_same, value))
    for point in _entry_points(kind):
        yield point.name, Plugin(f"package {_package(point)}", None, partial(_import, point))


def _same(value: Any) -> Any:
    return value


def _package(point: importlib.metadata.EntryPoint) -> str:
    return "of no name" if point.dist is None else f"{point.dist.name} {point.dist.version}"


def _import(point: importlib.metadata.EntryPoint) -> Any:
    try:
        value = point.load()
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"package {_package(point)}: its entry point {point.name} = {point.value}: {error}; install another version"
        ) from None
    if point.dist is not None:
        _packages[point.dist.name] = point.dist.version
    return value


def found(kind: str, inside: Collection[str]) -> dict[str, Plugin]:
    """What is there of a kind, by name. inside: the names in the package itself. Raises `UserError` for a name that two
    have."""
    by_name: dict[str, Plugin] = {}
    for name, plugin in _all(kind):
        other = "ssl_dist itself" if name in inside else by_name[name].source if name in by_name else None
        if other is not None:
            what = f"{kind.removesuffix('s')} {quoted(name)}"
            raise UserError(f"{plugin.source}: has {what}, and so has {other}; give it another name")
        by_name[name] = plugin
    return by_name


def source_of(kind: str, name: str) -> str:
    """Where something comes from, as results name it; empty when it is of the package itself."""
    plugin = dict(_all(kind)).get(name)
    if plugin is None:
        return ""
    return plugin.source if plugin.file is None else _files[plugin.file].source


def file_of(kind: str, name: str) -> str | None:
    """The name of the file that has it; None: it is none of a file."""
    plugin = dict(_all(kind)).get(name)
    return None if plugin is None else plugin.file


def file(name: str) -> File | None:
    """The file that is called so, where it is loaded."""
    return _files.get(name)


def files() -> list[File]:
    """All that are loaded."""
    return [*_files.values()]


def is_chosen(name: str) -> bool:
    """Whether `choose` has loaded the file."""
    return name in _chosen


def absent() -> str:
    """Why files that runs have recorded are not loaded, for the message of a name that is not found; else empty."""
    return "; ".join(_absent.values())


def hashes() -> dict[str, str]:
    """Of all files that are loaded, the SHA-256 by name: the same on every rank."""
    return {name: file.sha256 for name, file in _files.items()}


def packages() -> dict[str, str]:
    """The packages that something was taken of, and their versions."""
    return dict(_packages)
