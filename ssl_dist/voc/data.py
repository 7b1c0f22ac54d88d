"""Folders in the format of PASCAL VOC, such as VOCdevkit/VOC2007 and VOC2012.

    ROOT/ImageSets/Main/<split>.txt              a line an image: its id
    ROOT/ImageSets/Main/<class>_<split>.txt      a line an image: its id and 1, -1 or 0 (only difficult objects)
    ROOT/ImageSets/Segmentation/<split>.txt
    ROOT/JPEGImages/<id>.jpg
    ROOT/Annotations/<id>.xml                    boxes
    ROOT/SegmentationClass/<id>.png              a class index a pixel: 0 background, 1 .. 20, 255 void

torchvision's VOCDetection wants the year's own path below a VOCdevkit and returns untyped trees; this reader takes any
such folder, joins several (07+12) and names the file that is damaged.
"""

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssl_dist.config import Normalize
from ssl_dist.data.pillow import CONVERTIBLE_MODES, DAMAGED_IMAGE_ERRORS, open_picture, reason_of
from ssl_dist.errors import UserError, did_you_mean, quoted, refuse_unreadable

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
VOID = 255  # in masks: pixels at the borders of objects, which count neither way

_ID = re.compile(r"\w[\w.-]*")  # no path
_MAX_XML_BYTES = 1 << 20  # those of VOC have a few thousand


@dataclass(frozen=True)
class Objects:
    """The objects of an image. boxes float32 [n, 4]: x0, y0, x1, y1 in pixels from the left and upper edge, so that the
    annotation's first and last column (counted from 1) both lie inside; labels int64 [n]: index in CLASSES; difficult
    bool [n]."""

    boxes: np.ndarray
    labels: np.ndarray
    difficult: np.ndarray


@dataclass(frozen=True)
class Sample:
    """An image of a folder; its files are read by `image`, `objects` and `mask`."""

    root: Path
    id: str

    @property
    def image_path(self) -> Path:
        return self.root / "JPEGImages" / f"{self.id}.jpg"

    @property
    def annotation_path(self) -> Path:
        return self.root / "Annotations" / f"{self.id}.xml"

    @property
    def mask_path(self) -> Path:
        return self.root / "SegmentationClass" / f"{self.id}.png"

    def image(self) -> Image.Image:
        """The image, RGB. Raises `UserError`."""
        image = _picture(self.image_path)
        if image.mode not in CONVERTIBLE_MODES:
            raise UserError(f"{self.image_path}: pixels of mode {quoted(image.mode)} do not fit 8 bits; save it as RGB")
        return image.convert("RGB")

    def objects(self) -> Objects:
        """The objects in the annotation. Raises `UserError` naming the file."""
        path = self.annotation_path
        objects = [_object(node, path) for node in parse_xml(path).findall("object")]
        boxes, labels, difficult = zip(*objects, strict=True) if objects else ((), (), ())
        return Objects(
            np.array(boxes, np.float32).reshape(-1, 4), np.array(labels, np.int64), np.array(difficult, np.bool_)
        )

    def mask(self, size: tuple[int, int]) -> Image.Image:
        """Class indices, one byte a pixel. size: (width, height) of the image."""
        path = self.mask_path
        mask = _picture(path)
        if mask.mode not in ("P", "L"):
            raise UserError(f"{path}: pixels of mode {quoted(mask.mode)}; a mask has one class index a pixel (P or L)")
        if mask.size != size:
            shapes = (f"{width}x{height}" for width, height in (mask.size, size))
            raise UserError(f"{path}: is {' pixels, its image '.join(shapes)}; they must be equal")
        indices = np.array(mask)
        wrong = indices[(indices > len(CLASSES)) & (indices != VOID)]
        if wrong.size:
            raise UserError(f"{path}: holds class index {wrong[0]}; known are 0 to {len(CLASSES)} and {VOID} (void)")
        return Image.fromarray(indices)


@dataclass(frozen=True)
class Split:
    """The images of a split, of one folder or of several one after the other."""

    name: str
    samples: tuple[Sample, ...]

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def dataset(self) -> str:
        """The name of the (first) folder."""
        return self.samples[0].root.name

    @property
    def title(self) -> str:
        """VOC2007+VOC2012 trainval, for example."""
        roots = dict.fromkeys(sample.root.name for sample in self.samples)
        return f"{'+'.join(roots)} {self.name}"

    def digest(self, truth: Callable[[Sample], bytes] = lambda _: b"") -> str:
        """SHA-256 of ids, files of images and what `truth` gives for each."""
        parts = ((sample.id.encode(), file_bytes(sample.image_path), truth(sample)) for sample in self.samples)
        digests = (hashlib.sha256(part).digest() for of_sample in parts for part in of_sample)
        return hashlib.sha256(b"".join(digests)).hexdigest()

    @cached_property
    def labels(self) -> np.ndarray:
        """int8 [N, 20]: 1 the class is there, -1 it is not, 0 only in objects marked difficult."""
        columns = []
        for name in CLASSES:
            table: dict[Sample, int] = {}
            for root in dict.fromkeys(sample.root for sample in self.samples):
                table |= {Sample(root, id): label for id, label in _labels(root, name, self.name).items()}
            missing = [sample for sample in self.samples if sample not in table]
            if missing:
                path = _list_path(missing[0].root, "Main", f"{name}_{self.name}")
                raise UserError(f"{path}: has no line for image {missing[0].id} of {self.name}.txt; restore the file")
            columns.append([table[sample] for sample in self.samples])
        return np.array(columns, np.int8).T


def read_split(roots: Sequence[Path], kind: str, name: str) -> Split:
    """The split `name` of all `roots`. kind: Main (classification, detection) or Segmentation. Raises `UserError`."""
    samples: list[Sample] = []
    for root in roots:
        path = _list_path(root, kind, name)
        if not path.is_file():
            _refuse_root(root, kind, path)
        lines = [line.split() for line in _text(path).splitlines() if line.strip()]
        for line in lines:
            if len(line) != 1 or not _ID.fullmatch(line[0]):
                raise UserError(f"{path}: {quoted(' '.join(line))} is not an image's id; a line holds one")
        samples += [Sample(root, line[0]) for line in lines]
    repeated = len(samples) - len(set(samples))
    if repeated:
        raise UserError(f"split {name}: {repeated} images stand in it twice; remove the repeated lines or --root")
    if not samples:
        raise UserError(f"{path}: lists no image")
    return Split(name, tuple(samples))


def check_disjoint(train: Split, test: Split) -> None:
    """Raises `UserError` when an image to train on is also tested."""
    both = set(train.samples) & set(test.samples)
    if both:
        raise UserError(
            f"train_split = {quoted(train.name)}, test_split = {quoted(test.name)}: {len(both)} images are in both, "
            f"{min(sample.id for sample in both)} for one; choose splits without a common image"
        )


def _refuse_root(root: Path, kind: str, path: Path) -> None:
    years = sorted(child.name for child in root.glob("VOC*") if (child / "ImageSets").is_dir())
    inner = root / "VOCdevkit"
    if years or (inner.is_dir() and root.is_dir()):
        example = root / years[0] if years else inner / "VOC2007"
        raise UserError(f"--root {root}: the folder of a year is wanted, for example {example}")
    if not (root / "ImageSets").is_dir() or not (root / "JPEGImages").is_dir():
        raise UserError(
            f"--root {root}: no folder in VOC's format (ImageSets, JPEGImages, Annotations); give one such as "
            "VOCdevkit/VOC2007"
        )
    splits = sorted(file.stem for file in path.parent.glob("*.txt") if "_" not in file.stem)
    raise UserError(
        f"{path}: there is no such split; there are {', '.join(splits) or 'none'}; choose by train_split and test_split"
    )


def to_tensor(image: Image.Image) -> Tensor:
    """float32 [3, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)


def normalized(image: Image.Image, normalize: Normalize) -> Tensor:
    """float32 [3, H, W]."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (normalize.mean, normalize.std))
    return to_tensor(image).sub_(mean).div_(std)


def _list_path(root: Path, kind: str, name: str) -> Path:
    return root / "ImageSets" / kind / f"{name}.txt"


def _labels(root: Path, class_name: str, split: str) -> dict[str, int]:
    path = _list_path(root, "Main", f"{class_name}_{split}")
    table = {}
    for line in _text(path).splitlines():
        words = line.split()
        if not words:
            continue
        if len(words) != 2 or words[1] not in ("1", "-1", "0"):
            raise UserError(f"{path}: {quoted(line)} is not an id with 1, -1 or 0 (difficult)")
        table[words[0]] = int(words[1])
    return table


def _text(path: Path) -> str:
    try:
        return file_bytes(path).decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not text") from None


def file_bytes(path: Path) -> bytes:
    with refuse_unreadable(path):
        return path.read_bytes()


def _picture(path: Path) -> Image.Image:
    try:
        image = open_picture(path)
        image.load()
    except DAMAGED_IMAGE_ERRORS as error:
        reason = getattr(error, "strerror", None) or reason_of(error)
        raise UserError(f"{path}: can not be read as an image ({reason}); restore the file") from None
    return image


# ---------------------------------------------------------------------------------------------- annotations


class _NoDoctype(ElementTree.TreeBuilder):
    """Refuses a document type: VOC has none, and in it entities would be defined that grow without bound."""

    def doctype(self, name: str, pubid: str | None, system: str) -> None:
        raise ValueError("it has a document type (DTD), which is not read")


def parse_xml(path: Path) -> ElementTree.Element:
    """The root element of an annotation. Raises `UserError` for what is no plain XML."""
    data = file_bytes(path)
    if len(data) > _MAX_XML_BYTES:
        raise UserError(f"{path}: {len(data)} bytes, an annotation has at most {_MAX_XML_BYTES}; restore the file")
    try:
        return ElementTree.fromstring(data, ElementTree.XMLParser(target=_NoDoctype()))
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise UserError(f"{path}: no annotation in XML: {error}; restore the file") from None


def _object(node: ElementTree.Element, path: Path) -> tuple[tuple[float, ...], int, bool]:
    """Box, label and whether it is difficult."""
    name = (node.findtext("name") or "").strip()
    if name not in CLASSES:
        hint = did_you_mean(name, CLASSES, who="it")
        raise UserError(f"{path}: unknown class {quoted(name)}: {hint}known are {', '.join(CLASSES)}")
    corners = [_number(node, f"bndbox/{key}", path) for key in ("xmin", "ymin", "xmax", "ymax")]
    x0, y0, x1, y1 = corners[0] - 1, corners[1] - 1, *corners[2:]  # counted from 1, the last pixel inside
    if x1 <= x0 or y1 <= y0:
        raise UserError(f"{path}: the box of a {name}, {' '.join(f'{c:g}' for c in corners)}, holds no pixel")
    return (x0, y0, x1, y1), CLASSES.index(name), _number(node, "difficult", path, default="0") != 0


def _number(node: ElementTree.Element, key: str, path: Path, default: str = "") -> float:
    text = (node.findtext(key) or default).strip()
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{path}: {key} of an object is {quoted(text)}, not a number")
    return value
