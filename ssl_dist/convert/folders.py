"""Image folders, and tiny-ImageNet as it is downloaded."""

import difflib
import re
import unicodedata
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from ssl_dist.convert.images import FileImages, Images, Source, ZipImages
from ssl_dist.convert.walk import EXTENSIONS, NO_SPLIT, STRAY, LeftOut, Walk, entries, is_hidden, subfolders
from ssl_dist.errors import UserError, quoted, refuse_unreadable

FOLDER_SPLITS = ("unlabeled", "train", "val", "test")
LAYOUTS = "layouts: ROOT/<class>/, ROOT/{train,test}/<class>/, ROOT/unlabeled/ without classes"
# Other names that people give to splits; in the end they may be classes, so they are asked about.
SPLIT_SYNONYMS = {
    "training": "train", "trainset": "train", "testing": "test", "testset": "test", "valid": "val",
    "validation": "val", "valset": "val", "validset": "val", "unlabelled": "unlabeled",
}  # fmt: skip


class NoImages(UserError):
    """A folder holds no image, or no folder of a class."""


class WithoutClass(UserError):
    """Images lie where only class folders belong."""


def image_folder(root: Path, unlabeled: bool = False, extensions: tuple[str, ...] = EXTENSIONS) -> Source:
    """ROOT/{train,val,test}/<class>/**/<image> and ROOT/unlabeled/**/<image>; without any of them, ROOT/<class>/ is
    the split train. The names of splits may be in any case. Classes are the sorted folder names of the split train (the
    first present without it); ids follow the order of torchvision's ImageFolder: class, folder, file name. unlabeled:
    ROOT/**/<image> is the split unlabeled, whatever its folders are called. extensions: of image files.

    Raises `UserError` for another layout, a folder that can not be read or that looks like a split and has another
    name, and a class without images."""
    if not root.is_dir():
        raise NoImages(f"--root {root}: there is no such folder")
    left_out = LeftOut()
    folders = {"unlabeled": root} if unlabeled else _split_folders(root, left_out, extensions)
    walks = {split: Walk(root, folder, folders.values(), left_out, extensions) for split, folder in folders.items()}
    listed = {split: _list_classes(folder, walks[split]) for split, folder in folders.items() if split != "unlabeled"}
    classes = list(listed.get("train", next(iter(listed.values()), {})))
    number_of = {_composed(name): number for number, name in enumerate(classes)}
    splits: dict[str, Images] = {}
    if "unlabeled" in folders:
        names = walks["unlabeled"].image_files(folders["unlabeled"])
        if not names:
            raise _empty(folders["unlabeled"], walks["unlabeled"])
        splits["unlabeled"] = FileImages(root, names, np.full(len(names), -1, np.int64))
    for split, by_class in listed.items():
        unknown = [name for name in by_class if _composed(name) not in number_of]
        if unknown:
            raise UserError(
                f"{folders[split] / unknown[0]}: a class that the other splits do not have; remove it or add it to them"
            )
        names = [name for names in by_class.values() for name in names]
        labels = [number_of[_composed(name)] for name in by_class]
        splits[split] = FileImages(root, names, np.repeat(labels, [len(names) for names in by_class.values()]))
    return Source(classes, splits, left_out.lines(), _look_alikes(classes))


def _composed(name: str) -> str:
    """A name in the form in which an accent is one character with its letter (NFC): macOS writes it as two."""
    return unicodedata.normalize("NFC", name)


def _look_alikes(classes: list[str]) -> list[str]:
    """A line for every two classes that may be meant to be one: they differ in capitals or blanks alone."""
    first: dict[str, str] = {}
    pairs = [(first.setdefault(_composed(" ".join(name.split())).casefold(), name), name) for name in classes]
    return [
        f"{quoted(one)} and {quoted(other)} are two classes; where they are one, move their images into one folder"
        for one, other in pairs
        if one != other
    ]


def _split_folders(root: Path, left_out: LeftOut, extensions: tuple[str, ...]) -> dict[str, Path]:
    """Split -> its folder, in the order of `FOLDER_SPLITS`; the root itself is the split train where none is there."""
    names, images = entries(root, root, left_out, extensions)
    present = _named_as_splits(names)
    for split, named in present.items():
        if len(named) > 1:
            raise UserError(f"--root {root}: {' and '.join(named)} are both the split {split}; rename or remove one")
    others = [name for name in names if [name] not in present.values()]
    is_complete = "train" in present or "unlabeled" in present  # then the others are not even read
    inside = {name: [] if is_complete else subfolders(root, root / name) for name in others}
    meant = {name: _split_meant(name, bool(inside[name])) for name in others}
    likely = {name: split for name, split in meant.items() if split is not None and split not in present}
    if likely and not is_complete:
        looks = ", ".join(f"{name}/ looks like the split {split}" for name, split in likely.items())
        raise UserError(
            f"--root {root}: {looks}; rename to that, or, where it is a class, move all classes into {root / 'train'}/"
        )
    if present:
        for name in others:
            hint = f" (rename it to {likely[name]} to have it converted)" if name in likely else ""
            left_out.add(NO_SPLIT, f"{name}/{hint}")
        for name in images:
            left_out.add(STRAY, name)
        return {split: root / name for split, (name,) in present.items()}
    below = [name for name in others if _named_as_splits(inside[name])]
    if below:
        raise UserError(f"--root {root}: the splits lie one level below; use --root {root / below[0]}")
    return {"train": root}


def _named_as_splits(names: list[str]) -> dict[str, list[str]]:
    """Split -> the names that are its own in any case; splits without one are left out."""
    by_split = {split: [name for name in names if name.lower() == split] for split in FOLDER_SPLITS}
    return {split: named for split, named in by_split.items() if named}


def _split_meant(folder: str, holds_folders: bool) -> str | None:
    """The split that a folder by its name may be meant to be: for a synonym in any case, and, where it holds folders as
    a split does, for a name that begins like a split's or hardly differs from it."""
    name = re.sub(r"[\W_]+", "", folder.lower())
    if name in SPLIT_SYNONYMS or not holds_folders:
        return SPLIT_SYNONYMS.get(name)
    begun = [split for split in FOLDER_SPLITS if name.startswith(split)]
    near = begun or difflib.get_close_matches(name, [*FOLDER_SPLITS, *SPLIT_SYNONYMS], n=1, cutoff=0.75)
    return SPLIT_SYNONYMS.get(near[0], near[0]) if near else None


def _empty(folder: Path, walk: Walk) -> NoImages:
    return NoImages(
        f"{folder}: holds no image ({', '.join(walk.extensions)}){walk.passed_over(folder)}; fill or remove the folder"
    )


def _list_classes(folder: Path, walk: Walk) -> dict[str, list[str]]:
    """Class name -> its image files, relative to the root."""
    names, stray = walk.folders(folder)
    if stray:
        verb = "image lies" if len(stray) == 1 else "images lie"
        raise WithoutClass(f"{folder}: {len(stray)} {verb} in no class folder ({stray[0]}); {LAYOUTS}")
    if not names:
        layout = f"one folder a class, with images ({', '.join(walk.extensions)})"
        remedy = f"or in it {', '.join(FOLDER_SPLITS)}"
        raise NoImages(f"{folder}: holds no class folder{walk.passed_over(folder)}; looked for {layout}; {remedy}")
    written = {_composed(name): name for name in names}
    for name in names:
        if (other := written[_composed(name)]) != name:
            raise UserError(
                f"{folder}: {name!a} and {other!a} are one name in two forms; move the images of both into one folder"
            )
    by_class = {name: walk.image_files(folder / name) for name in names}
    for name, files in by_class.items():
        if not files:
            raise _empty(folder / name, walk)
    return by_class


def tiny_imagenet(root: Path) -> Source:
    """tiny-imagenet-200.zip as downloaded, the folder in it, or an image folder with train/ and val/. The labels of
    val/ come from val_annotations.txt; test/ has none published and is left out."""
    inner = "tiny-imagenet-200"
    for folder in (root, root / inner):
        if (folder / "val" / "val_annotations.txt").is_file():
            left_out, inside = LeftOut(), folder / "train"
            train = Walk(folder, inside, [inside], left_out).image_files(inside) if inside.is_dir() else []
            with refuse_unreadable(folder / "val" / "val_annotations.txt", "unpack the archive again"):
                annotations = (folder / "val" / "val_annotations.txt").read_text(encoding="utf-8")
            return _tiny_source(train, annotations, folder, partial(FileImages, folder), left_out)
    for path in (root, root / f"{inner}.zip"):
        if path.is_file():
            return _tiny_archive(path, f"{inner}/")
    if (root / "train").is_dir():
        return image_folder(root)
    raise UserError(
        f"--root {root}: looked for {inner}.zip, for the folder {inner} with val/val_annotations.txt, and for train/ "
        "with class folders; name the archive as downloaded or the folder it was unpacked to"
    )


def _tiny_archive(path: Path, inside: str) -> Source:
    try:
        archive = zipfile.ZipFile(path)
        annotations = archive.read(f"{inside}val/val_annotations.txt").decode()
    except (zipfile.BadZipFile, KeyError, OSError, UnicodeDecodeError, RuntimeError, zlib.error) as error:
        raise UserError(f"{path}: not a complete archive of tiny-ImageNet ({error}); download it again") from None
    below = [name.removeprefix(inside) for name in archive.namelist()]
    images = [name for name in below if name.lower().endswith(EXTENSIONS) and not any(map(is_hidden, name.split("/")))]
    train = sorted(name for name in images if name.startswith("train/"))
    return _tiny_source(train, annotations, path, partial(ZipImages, archive, inside), LeftOut())


def _tiny_source(
    train: list[str],
    annotations: str,
    where: Path,
    images: Callable[[list[str], list[int]], Images],
    left_out: LeftOut,
) -> Source:
    """train: paths train/<class>/...; annotations: lines <file>, <class>, <box>, parted by tabs."""
    if not train:
        raise UserError(f"{where}: holds no image below train/; unpack the archive again")
    classes = sorted({name.split("/")[1] for name in train})
    index = {name: i for i, name in enumerate(classes)}
    rows = [line.split("\t") for line in annotations.splitlines() if line.strip()]
    unknown = [row for row in rows if len(row) < 2 or row[1] not in index]
    if unknown or not rows:
        line = "\t".join(unknown[0]) if unknown else "no line"
        raise UserError(
            f"{where}: val_annotations.txt: {quoted(line)} names no class of train/; download the archive again"
        )
    return Source(
        classes,
        {
            "train": images(train, [index[name.split("/")[1]] for name in train]),
            "val": images([f"val/images/{row[0]}" for row in rows], [index[row[1]] for row in rows]),
        },
        left_out.lines(),
    )
