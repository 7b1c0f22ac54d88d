"""dataset.json: what `convert` records of a folder of .beton files, and every reader checks."""

import json
from pathlib import Path
from typing import Literal

from pydantic import Field

from ssl_dist.config import Section, validate
from ssl_dist.errors import UserError
from ssl_dist.storage.durable import write_text

FILE = "dataset.json"


class Encoding(Section):
    """How images were stored: as pixels if both sides are at most raw_side, else as JPEG no larger than max_side."""

    raw_side: int
    max_side: int
    jpeg_quality: int


class SplitRecord(Section):
    """One split: <split>.beton. class_counts: images of every class; raw, jpeg: images stored so; sha256: see
    `beton.Digest`; listing: SHA-256 of the names of its images at the source."""

    count: int
    labelled: bool
    class_counts: list[int]
    max_height: int
    max_width: int
    raw: int
    jpeg: int
    bytes: int
    sha256: str
    listing: str


class Manifest(Section):
    """The data set. mean, std: per channel, pixels in [0, 1], measured on `measured_images` images, evenly spaced, of
    the split for pre-training; every image counts the same. pretraining, training, evaluation: `catalog.SplitRoles`."""

    format: Literal[1] = 1
    name: str
    about: str
    classes: list[str]
    splits: dict[str, SplitRecord]
    pretraining: str
    training: str
    evaluation: str
    image_size: int | None
    mean: tuple[float, float, float] = Field(strict=False)
    std: tuple[float, float, float] = Field(strict=False)
    measured_images: int
    paper_mean: list[float] | None
    paper_std: list[float] | None
    encoding: Encoding


def load(root: str | Path) -> Manifest:
    """The manifest of a converted data set. Raises `UserError` where there is none or it can not be read."""
    path = Path(root) / FILE
    remedy = f"write it with `ssl-dist convert DATASET --root SOURCE --out {root}`"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"data.root = {str(root)!r}: there is no {FILE} in it; {remedy}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can not be read ({error}); {remedy}") from None
    if not isinstance(tree, dict) or "splits" not in tree:
        raise UserError(f"{path}: not the {FILE} of a converted data set; {remedy}")
    return validate(Manifest, tree, f"{path}: ")


def save(root: Path, manifest: Manifest) -> None:
    """Replace dataset.json in one step."""
    write_text(root / FILE, json.dumps(manifest.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n")
