"""Draw the packages of ssl_dist by their imports: docs/packages.svg.

    python tools/draw_packages.py            writes it
    python tools/draw_packages.py --check    exit code 1 when it is not current

A box stands one floor above the highest box that it imports. An arrow is left out where a longer way through other
boxes says the same.
"""

import argparse
import ast
import html
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "packages.svg"
GROUND = "ground"
WIDTH, BOX, LINE, GAP, BETWEEN = (
    1180,
    210,
    15,
    22,
    46,
)  # pixels: page, box, line of text, between


def imported(tree: ast.AST, module: str = "", is_package: bool = False) -> Iterator[str]:
    """The dotted names that a file imports, at its top or inside functions; relative ones resolved against `module`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".") if is_package else module.split(".")[:-1]
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            # `from ssl_dist import keys` names ssl_dist.keys
            yield from (f"{base}.{alias.name}" for alias in node.names)


def packages(root: Path) -> dict[str, str]:
    """Packages, and modules beside them, with the first line of their docstrings."""
    paths = [*root.glob("*.py"), *root.glob("*/__init__.py")]
    docstrings = {path: ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "" for path in paths}
    return {
        path.parent.name if path.name == "__init__.py" else path.stem: text.splitlines()[0]
        for path, text in docstrings.items()
        if path != root / "__init__.py"
    }


def imports_of(root: Path, names: set[str]) -> dict[str, set[str]]:
    """Which of `names` each of them imports."""
    graph: dict[str, set[str]] = {name: set() for name in names}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] in names:
            module, is_package = ".".join([root.name, *parts]), parts[-1] == "__init__"
            for name in imported(ast.parse(path.read_text(encoding="utf-8")), module, is_package):
                head, _, rest = name.partition(".")
                if head == root.name and rest.split(".")[0] in names - {parts[0]}:
                    graph[parts[0]].add(rest.split(".")[0])
    return graph


def floors(graph: dict[str, set[str]]) -> dict[str, int]:
    """The floor of every box, 0 for those that import none. Raises ValueError for a circle."""
    floor: dict[str, int] = {}

    def of(name: str, above: tuple[str, ...] = ()) -> int:
        if name in above:
            raise ValueError(f"import each other: {' -> '.join([*above, name])}")
        if name not in floor:
            floor[name] = 1 + max((of(other, (*above, name)) for other in graph[name]), default=-1)
        return floor[name]

    for name in sorted(graph):
        of(name)
    return floor


def reduced(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The arrows that no longer way replaces."""

    def reachable(name: str) -> set[str]:
        return graph[name].union(*(reachable(other) for other in graph[name]))

    return {
        name: {one for one in others if not any(one in reachable(other) for other in others - {one})}
        for name, others in graph.items()
    }


def merged(graph: dict[str, set[str]], modules: set[str]) -> dict[str, set[str]]:
    """The graph with the modules that import no package as one box."""
    ground = {name for name in modules if graph[name] <= modules and name not in _above_packages(graph, modules)}
    result = {name: {GROUND if other in ground else other for other in others} for name, others in graph.items()}
    return {name: others for name, others in result.items() if name not in ground} | {GROUND: set()}


def _above_packages(graph: dict[str, set[str]], modules: set[str]) -> set[str]:
    """Modules that import a package, straight or through other modules."""
    above = {name for name in modules if graph[name] - modules}
    while more := {name for name in modules - above if graph[name] & above}:
        above |= more
    return above


def draw(graph: dict[str, set[str]], texts: dict[str, str]) -> str:
    """The picture as SVG: the ground at the bottom."""
    floor = floors(graph)
    rows = [sorted(name for name in graph if floor[name] == number) for number in range(max(floor.values()) + 1)]
    lines = {name: textwrap.wrap(text, 32) for name, text in texts.items()}
    place: dict[str, tuple[float, float, float]] = {}  # centre, top, bottom
    y, body = 20.0, []
    for row in reversed(rows):
        height = 30 + LINE * max(len(lines[name]) for name in row)
        x = (WIDTH - len(row) * BOX - (len(row) - 1) * GAP) / 2
        for name in row:
            place[name] = (x + BOX / 2, y, y + height)
            body.append(_box(name, lines[name], x, y, height))
            x += BOX + GAP
        y += height + BETWEEN
    arrows = [_arrow(place[name], place[other]) for name in sorted(graph) for other in sorted(reduced(graph)[name])]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y - BETWEEN + 20:g}" '
        'font-family="system-ui, sans-serif" font-size="12">\n'
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" fill="#7a8ba0"/></marker></defs>\n'
        '<rect width="100%" height="100%" fill="#ffffff"/>\n'
    )
    return head + "\n".join([*arrows, *body]) + "\n</svg>\n"


def _box(name: str, lines: list[str], x: float, y: float, height: float) -> str:
    text = "".join(
        f'<text x="{x + BOX / 2:g}" y="{y + 36 + LINE * n:g}" text-anchor="middle" fill="#44546a" font-size="11">'
        f"{html.escape(line)}</text>"
        for n, line in enumerate(lines)
    )
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{BOX}" height="{height:g}" rx="6" fill="#f4f7fb" stroke="#7a8ba0"/>'
        f'<text x="{x + BOX / 2:g}" y="{y + 19:g}" text-anchor="middle" font-weight="bold" font-size="13" '
        f'fill="#1f2d3d">{name}</text>{text}'
    )


def _arrow(start: tuple[float, float, float], end: tuple[float, float, float]) -> str:
    (x, _, y), (to_x, to_y, _) = start, end
    middle = (y + to_y) / 2
    return (
        f'<path d="M{x:g},{y:g} C{x:g},{middle:g} {to_x:g},{middle:g} {to_x:g},{to_y:g}" fill="none" stroke="#b8c4d3" '
        'stroke-width="1.4" marker-end="url(#head)"/>'
    )


def picture(root: Path = ROOT / "ssl_dist") -> str:
    texts = packages(root)
    modules = {name for name in texts if (root / f"{name}.py").exists()}
    graph = merged(imports_of(root, set(texts)), modules)
    ground = sorted(modules - graph.keys())
    return draw(graph, {name: texts[name] for name in graph if name != GROUND} | {GROUND: ", ".join(ground)})


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare: exit code 1 when it is not current")
    drawn = picture()
    if parser.parse_args().check:
        return int(not PICTURE.exists() or PICTURE.read_text(encoding="utf-8") != drawn)
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(drawn, encoding="utf-8")
    print(PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
