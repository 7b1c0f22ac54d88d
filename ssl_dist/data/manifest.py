"""dataset.json: what `convert` records of a folder of .beton files, and every reader checks."""

import json
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import AfterValidator, Field, model_validator

from ssl_dist.config import NonNegativeInt, PositiveInt, Section, validate
from ssl_dist.data.beton import RAW, Beton
from ssl_dist.data.catalog import SplitRoles, split_roles
from ssl_dist.errors import UserError
from ssl_dist.reading import parse_json, read_text
from ssl_dist.storage.durable import write_text
from ssl_dist.views import MAX_CHANNELS, PixelFormat

FILE = "dataset.json"
CONSTANT_STD = 1.0  # stands for the standard deviation of a channel that has the same value in every pixel

Share = Annotated[float, Field(ge=0, le=1)]
Std = Annotated[Share, AfterValidator(lambda std: std or CONSTANT_STD)]
FileName = Annotated[str, Field(pattern=r"^[^/\x00]+$")]


class Encoding(Section):
    """How images were stored: as pixels if both sides are at most raw_side, else as JPEG no larger than max_side;
    orientation: what was done about that in their EXIF; channels: as `--channels` said (null: none, RGB); bits: of a
    channel."""

    raw_side: int
    max_side: int
    jpeg_quality: int
    orientation: Literal["applied", "ignored"] = "ignored"  # before there was a choice
    channels: Annotated[int, Field(ge=1, le=MAX_CHANNELS)] | None = None
    bits: Literal[8, 16] = 8

    @property
    def pixels(self) -> PixelFormat:
        """What the pixels of every image are."""
        return PixelFormat(3 if self.channels is None else self.channels, self.bits)


class SplitRecord(Section):
    """One split: <split>.beton. class_counts: images of every class; raw, jpeg: images stored so; sha256: see
    `beton.Digest`; tables: SHA-256 of the rest of the file, labels among it (null: written before there was one);
    listing: SHA-256 of the names of its images at the source; stamps, contents: of what tells cheaply that they were
    replaced, and of their bytes (see `convert.images`; null: written before there were these, or nothing tells);
    turned: images whose EXIF orientation was applied; files: SHA-256 of <split>-files.txt (`data.file_names`; null:
    there is none); skipped: name -> reason of the images that `--skip-damaged` left out."""

    count: PositiveInt
    labelled: bool
    class_counts: list[NonNegativeInt]
    max_height: PositiveInt
    max_width: PositiveInt
    raw: NonNegativeInt
    jpeg: NonNegativeInt
    bytes: Annotated[int, Field(ge=1)]
    sha256: str
    tables: str | None = None
    listing: str
    stamps: str | None = None
    contents: str | None = None
    turned: NonNegativeInt = 0
    files: str | None = None
    skipped: dict[str, str] = Field(default_factory=dict)


class Manifest(Section):
    """The data set. mean, std: per channel, pixels in [0, 1], measured on `measured_images` images, evenly spaced, of
    the split for pre-training; every image counts the same. A std of 0, which was written of a constant channel before,
    is read as `CONSTANT_STD`. pretraining, training, evaluation: `catalog.SplitRoles`."""

    format: Literal[1] = 1
    name: str
    about: str
    classes: list[str]
    splits: dict[FileName, SplitRecord] = Field(min_length=1)
    pretraining: str
    training: str
    evaluation: str
    image_size: int | None
    mean: tuple[Share, ...] = Field(strict=False)
    std: tuple[Std, ...] = Field(strict=False)
    measured_images: int
    paper_mean: list[float] | None
    paper_std: list[float] | None
    encoding: Encoding

    @property
    def uses(self) -> SplitRoles:
        """The splits for pre-training, training and evaluation, of those that are here."""
        return split_roles(self.name, {split: any(record.class_counts) for split, record in self.splits.items()})

    @model_validator(mode="after")
    def _channels_are_measured(self) -> Self:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.encoding.pixels.channels:
                raise ValueError(f"{name}: has {len(values)} values of {self.encoding.pixels.channels} channels")
        return self

    @model_validator(mode="after")
    def _classes_are_counted(self) -> Self:
        for split, record in self.splits.items():
            if len(record.class_counts) != len(self.classes):
                raise ValueError(
                    f"splits.{split}.class_counts: counts {len(record.class_counts)} classes of {len(self.classes)}"
                )
        return self


def load(root: str | Path) -> Manifest:
    """The manifest of a converted data set. Raises `UserError` where there is none or it can not be read."""
    path = Path(root) / FILE
    remedy = f"write it with `ssl-dist convert DATASET --root SOURCE --out {root}`"
    try:
        tree = parse_json(read_text(path))
    except FileNotFoundError:
        here = "" if Path(root).is_absolute() else f", looked for from {Path.cwd()}"
        raise UserError(
            f"data.root = {str(root)!r}: there is no {FILE} in it{here}; set data.root, or {remedy}"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can not be read ({error}); {remedy}") from None
    if not isinstance(tree, dict) or "splits" not in tree:
        raise UserError(f"{path}: not the {FILE} of a converted data set; {remedy}")
    try:
        return validate(Manifest, tree, f"{path}: ")
    except UserError as error:
        raise UserError(f"{error}; {remedy}") from None


def difference(beton: Beton, record: SplitRecord) -> str:
    """In what a split's file is not the one that was recorded, in words; empty: in nothing that shows without reading
    the samples' bytes."""
    num_classes, highest = len(record.class_counts), int(beton.labels.max())
    if beton.count != record.count:
        return f"holds {beton.count} images and {FILE} says {record.count}"
    if highest >= num_classes:
        image_id = int(beton.labels.argmax())
        return f"image {image_id} has the label {highest} and {FILE} names {num_classes} classes"
    counts = np.bincount(beton.labels[beton.labels >= 0], minlength=num_classes)
    other = np.flatnonzero(counts != record.class_counts)
    if len(other):
        own, recorded = counts[other[0]], record.class_counts[other[0]]
        return f"{own} of its images have the label {other[0]} and {FILE} says {recorded}"
    sides = int(beton.heights.max()), int(beton.widths.max())
    if sides != (record.max_height, record.max_width) or (beton.modes == RAW).sum() != record.raw:
        return f"its images are not those of {FILE} (sizes differ)"
    if record.tables not in (None, beton.tables_sha256):
        return f"its labels and tables are not those that were written (their SHA-256 is not the one in {FILE})"
    return ""


def save(root: Path, manifest: Manifest) -> None:
    """Replace dataset.json in one step."""
    write_text(root / FILE, json.dumps(manifest.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n")
