"""The configs that the package brings: the folder configs/ of the repository, in an installed package inside of it."""

from pathlib import Path

_INSIDE, _BESIDE = Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs"
CONFIGS = _INSIDE if _INSIDE.is_dir() else _BESIDE


def found(path: str | Path) -> Path:
    """The file itself where there is one; else, of configs/<name>, the one that the package brings. So a command that
    names it works in any folder."""
    path = Path(path)
    if path.parts[:1] == (CONFIGS.name,) and not path.exists():
        own = CONFIGS.joinpath(*path.parts[1:])
        return own if own.is_file() else path
    return path


def of_method(name: str, folder: Path) -> Path | None:
    """The config of a method in a folder, <method>-<backbone>.yaml: the first by name, None where there is none."""
    return min(folder.glob(f"{name}-*.yaml"), default=None)
