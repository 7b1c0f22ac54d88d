"""A file or folder of `ssl-dist export`, read back: its metadata names the backbone and how images are prepared."""

from pathlib import Path

from pydantic import Field

from ssl_dist import config
from ssl_dist.config import Normalize, PositiveInt, Section, validate
from ssl_dist.config.recipe import Interpolation
from ssl_dist.errors import UserError
from ssl_dist.reading import parse_json
from ssl_dist.run.encoder import Encoder, load_others
from ssl_dist.storage import hub, weights_file
from ssl_dist.storage.weights_file import PREPROCESSING


class _Steps(Section):
    """Those of `export.preprocessing` that a config has keys for."""

    resize: PositiveInt = Field(description="the short side in pixels")
    interpolation: Interpolation = Field(description="of the resize")
    crop: PositiveInt = Field(description="side of the square in the centre")


def is_exported(path: Path) -> bool:
    """Whether a file, or a folder that is no run's, was written by `ssl-dist export` with all that is needed here."""
    return PREPROCESSING in _facts(path)


def overrides(path: Path) -> list[str]:
    """What it says, as the key=value that a file of another program needs: the backbone, and the test transform. Raises
    `UserError` where it is damaged."""
    facts = _facts(path)
    steps = _tree(path, facts, PREPROCESSING)
    chosen = validate(_Steps, {key: steps.get(key) for key in _Steps.model_fields}, f"{path}: {PREPROCESSING}.")
    return [
        f"backbone.name={facts['backbone']}",
        *([f"backbone.patch_size={facts['patch_size']}"] if "patch_size" in facts else []),
        f"data.image_size={chosen.crop}",
        f"data.eval_resize={chosen.resize}",
        f"data.eval_interpolation={chosen.interpolation}",
    ]


def read(path: Path) -> Encoder:
    """The encoder in it. Raises `UserError` where it is damaged."""
    facts, root = _facts(path), str(path.parent)
    tree = {"run_dir": root, "data": {"root": root}, "method": {"name": facts["method"]}}
    normalize = validate(Normalize, _tree(path, facts, "normalize"), f"{path}: normalize.")
    return load_others(path, config.overridden(tree, overrides(path)), normalize)[0]


def _facts(path: Path) -> dict[str, str]:
    file = hub.file_in(path)
    return weights_file.facts(file) if file.is_file() else {}


def _tree(path: Path, facts: dict[str, str], key: str) -> dict:
    try:
        tree = parse_json(facts[key])
    except ValueError:
        tree = None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: damaged metadata ({key}); export it again")
    return tree
