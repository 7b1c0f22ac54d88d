"""The shape of the package: imports point one way, what is wrapped is named in one file, files stay readable."""

import ast
import graphlib
import importlib.metadata
import importlib.util
import itertools
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ssl_dist"

SPEC = importlib.util.spec_from_file_location("draw_packages", ROOT / "tools" / "draw_packages.py")
draw_packages = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(draw_packages)
imported = draw_packages.imported

# From the ground up, a line a floor. A module may import its own package and the floors below, never its own floor or
# one above: so no circle can close. A new package must be given its place here.
FLOORS = [
    {
        "errors",
        "keys",
        "clock",
        "device",
        "grid",
        "progress",
        "text_table",
        "thread_team",
        "numba_cache",
        "plugins",
        "process",
        "reading",
        "terminal",
        "torchrun",
    },
    {"config", "storage", "kernels"},
    {"nn"},
    {"backbones", "distributed", "views"},
    {"data"},
    {"convert", "methods"},
    {"run", "losses"},
    {"results"},
    {"train"},
    {"export", "transfer", "verify", "voc"},
    {"evaluators"},
    {"evaluate", "report", "doctor", "outcome", "command_line", "key_tables"},
    {"study", "pretraining", "quickstart"},
    {"cli"},
    {"__main__", "job"},
    {"slurm"},
]
GROUND = FLOORS[0]
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}
STRANGERS = {"methods", "data", "backbones"}

# What only these files may import, because everything else goes through it.
WRAPPED = {"torch.distributed": ("distributed/world.py", "distributed/rendezvous.py"), "ffcv": ("data/ffcv_reader.py",)}

LONGEST = 400  # lines; the aim is 250


def files():
    return sorted(PACKAGE.rglob("*.py"))


def dotted(path):
    """ssl_dist/views/make.py -> ssl_dist.views.make; a package stands for its __init__.py."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def named(tree, module="", is_package=False):
    """What a file imports, and every dotted expression in it such as `torch.distributed.barrier`."""
    yield from imported(tree, module, is_package)
    yield from (ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute))


def part_of(name):
    """ssl_dist.views.make -> views; None for the package itself (its version) and for other packages."""
    head, _, rest = name.partition(".")
    part = rest.split(".")[0]
    return part if head == "ssl_dist" and part and not part.startswith("__version") else None


def breaches(module, names):
    """The imports of `module` that point the wrong way, as text."""
    own = part_of(module)
    if own is None:  # ssl_dist/__init__.py hands on names of every floor, when they are asked for
        return []
    messages = []
    for name in names:
        other = part_of(name)
        if other is None or other == own:
            continue
        if other not in FLOOR_OF:
            messages.append(f"{module} imports {name}, which has no floor")
        elif FLOOR_OF[other] > FLOOR_OF[own]:
            messages.append(f"{module} imports {name} of a higher floor")
        elif FLOOR_OF[other] == FLOOR_OF[own] and own not in GROUND:
            messages.append(f"{module} imports {name} of its own floor")
        elif {own, other} <= STRANGERS:
            messages.append(f"{module} imports {name}, a stranger to it")
    return messages


def test_no_files_import_each_other_in_a_circle():
    """Not within a package either, its __init__.py included."""
    modules = {dotted(path): path for path in files() if path.parent != PACKAGE or path.name != "__init__.py"}
    graph = {}
    for module, path in modules.items():
        names = imported(ast.parse(path.read_text(encoding="utf-8")), module, path.name == "__init__.py")
        targets = {name if name in modules else name.rpartition(".")[0] for name in names}
        graph[module] = sorted(targets & modules.keys())
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"import each other: {' -> '.join(error.args[1])}")


def is_within(name, package):
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("path", files(), ids=dotted)
def test_imports_point_one_way(path):
    module, is_package = dotted(path), path.name == "__init__.py"
    own = part_of(module)
    assert own is None or own in FLOOR_OF, f"give {own} a place in FLOORS, in {__file__}"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert breaches(module, list(imported(tree, module, is_package))) == []
    for wrapped, homes in WRAPPED.items():
        if path not in [PACKAGE / home for home in homes]:
            names = {name for name in named(tree, module, is_package) if is_within(name, wrapped)}
            assert not names, f"{module} names {names}; only {homes} may"


@pytest.mark.parametrize(
    ("module", "line", "fault"),
    [
        ("ssl_dist.keys", "import ssl_dist.train", "higher floor"),
        ("ssl_dist.data.beton", "from ssl_dist import methods", "higher floor"),
        ("ssl_dist.data.beton", "from ssl_dist.backbones import conv4", "stranger"),
        ("ssl_dist.views.make", "def f():\n    from ssl_dist.distributed.world import World", "own floor"),
        ("ssl_dist.data.beton", "from ..train import optim", "higher floor"),
        ("ssl_dist.views.make", "from . import color", ""),
        ("ssl_dist.grid", "from ssl_dist.errors import UserError", ""),
        ("ssl_dist.train.loop", "from ssl_dist import utils", "no floor"),
        ("ssl_dist.train.loop", "from ssl_dist import __version__, distributed", ""),
    ],
)
def test_a_breach_is_seen(module, line, fault):
    messages = breaches(module, list(imported(ast.parse(line), module)))
    assert len(messages) == bool(fault)
    assert all(fault in text for text in messages)


@pytest.mark.parametrize(
    ("line", "package"),
    [
        ("import torch.distributed as dist", "torch.distributed"),
        ("from torch import distributed", "torch.distributed"),
        ("from torch.distributed import barrier", "torch.distributed"),
        ("import torch\ntorch.distributed.barrier()", "torch.distributed"),
        ("def f():\n    from ffcv.loader import Loader", "ffcv"),
    ],
)
def test_a_wrapped_package_is_seen(line, package):
    assert any(is_within(name, package) for name in named(ast.parse(line)))
    assert not any(is_within(name, "ffcv_reader") for name in named(ast.parse(line)))


def test_every_package_imported_is_in_setup():
    """A package that only another one happens to bring would vanish with it."""
    assignments = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and node.targets[0].id in ("REQUIRES", "EXTRAS")
    }
    listed = itertools.chain(assignments["REQUIRES"], *assignments["EXTRAS"].values())
    listed = {re.split(r"[<>=~! \[]", requirement)[0].lower() for requirement in listed}
    owners = importlib.metadata.packages_distributions()
    for path in files():
        for name in imported(ast.parse(path.read_text(encoding="utf-8")), dotted(path), path.name == "__init__.py"):
            head = name.split(".")[0]
            if head != "ssl_dist" and head not in sys.stdlib_module_names:
                distributions = {owner.lower() for owner in owners.get(head, [head])}
                assert distributions & listed, f"{path.name} imports {head}: add it to setup.py"


@pytest.mark.parametrize("path", files(), ids=dotted)
def test_no_file_is_too_long_to_read(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST, f"{path.name} has {lines} lines: is it still one subject?"
