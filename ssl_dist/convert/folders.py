"""Image folders, and tiny-ImageNet as it is downloaded."""

import os
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from ssl_dist.convert.images import FileImages, Images, Source, ZipImages
from ssl_dist.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's
FOLDER_SPLITS = ("unlabeled", "train", "val", "test")


def image_folder(root: Path) -> Source:
    """ROOT/{train,val,test}/<class>/**/<image> and ROOT/unlabeled/**/<image>; without any of them, ROOT/<class>/ is
    the split train. Classes are the sorted folder names of the split train (the first present without it); ids follow
    the order of torchvision's ImageFolder: class, folder, file name."""
    if not root.is_dir():
        raise UserError(f"--root {root}: there is no such folder")
    present = [split for split in FOLDER_SPLITS if (root / split).is_dir()]
    if not present:
        below = [folder for folder in _folders(root) if any((root / folder / s).is_dir() for s in FOLDER_SPLITS)]
        if below:
            raise UserError(f"--root {root}: the splits lie one level below; use --root {root / below[0]}")
        folders = {"train": root}
    else:
        folders = {split: root / split for split in present}
    listed = {split: _list_classes(folder, root) for split, folder in folders.items() if split != "unlabeled"}
    classes = list(listed.get("train", next(iter(listed.values()), {})))
    splits: dict[str, Images] = {}
    if "unlabeled" in folders:
        names = _image_files(folders["unlabeled"], root)
        if not names:
            raise UserError(f"{folders['unlabeled']}: holds no image ({', '.join(EXTENSIONS)})")
        splits["unlabeled"] = FileImages(root, names, np.full(len(names), -1, np.int64))
    for split, by_class in listed.items():
        unknown = [name for name in by_class if name not in classes]
        if unknown:
            raise UserError(
                f"{folders[split] / unknown[0]}: a class that the other splits do not have; remove it or add it to them"
            )
        names = [name for names in by_class.values() for name in names]
        labels = [classes.index(name) for name in by_class]
        splits[split] = FileImages(root, names, np.repeat(labels, [len(names) for names in by_class.values()]))
    return Source(classes, splits)


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def _image_files(folder: Path, root: Path) -> list[str]:
    """Image files below `folder`, relative to `root`, in the order of torchvision's ImageFolder."""
    files: list[str] = []
    for path, _, names in sorted(os.walk(folder, followlinks=True)):
        relative = os.path.relpath(path, root)
        files += [os.path.normpath(os.path.join(relative, name)) for name in sorted(names) if _is_image(name)]
    return files


def _list_classes(folder: Path, root: Path) -> dict[str, list[str]]:
    """Class name -> its image files, relative to `root`."""
    stray = sorted(entry.name for entry in os.scandir(folder) if entry.is_file() and _is_image(entry.name))
    names = _folders(folder)
    if not names:
        layout = f"one folder a class, with images ({', '.join(EXTENSIONS)})"
        remedy = "images without classes belong in unlabeled/" if stray else f"or in it {', '.join(FOLDER_SPLITS)}"
        raise UserError(f"{folder}: holds no class folder; looked for {layout}; {remedy}")
    if stray:
        raise UserError(f"{folder / stray[0]}: lies outside of every class folder; move or remove it")
    by_class = {name: _image_files(folder / name, root) for name in names}
    empty = [name for name, files in by_class.items() if not files]
    if empty:
        raise UserError(f"{folder / empty[0]}: holds no image ({', '.join(EXTENSIONS)}); fill or remove the folder")
    return by_class


def tiny_imagenet(root: Path) -> Source:
    """tiny-imagenet-200.zip as downloaded, the folder in it, or an image folder with train/ and val/. The labels of
    val/ come from val_annotations.txt; test/ has none published and is left out."""
    inner = "tiny-imagenet-200"
    for folder in (root, root / inner):
        if (folder / "val" / "val_annotations.txt").is_file():
            train = _image_files(folder / "train", folder)
            annotations = (folder / "val" / "val_annotations.txt").read_text()
            return _tiny_source(train, annotations, folder, partial(FileImages, folder))
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
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise UserError(f"{path}: not a complete archive of tiny-ImageNet ({error}); download it again") from None
    below = [name.removeprefix(inside) for name in archive.namelist()]
    train = sorted(name for name in below if name.startswith("train/") and _is_image(name.rpartition("/")[2]))
    return _tiny_source(train, annotations, path, partial(ZipImages, archive, inside))


def _tiny_source(
    train: list[str], annotations: str, where: Path, images: Callable[[list[str], list[int]], Images]
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
        raise UserError(f"{where}: val_annotations.txt: {line!r} names no class of train/; download the archive again")
    return Source(
        classes,
        {
            "train": images(train, [index[name.split("/")[1]] for name in train]),
            "val": images([f"val/images/{row[0]}" for row in rows], [index[row[1]] for row in rows]),
        },
    )
