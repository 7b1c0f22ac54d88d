"""Where each data set's images come from: folders and archives, torchvision's files, scikit-learn's digits."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from ssl_dist.convert.folders import image_folder, tiny_imagenet
from ssl_dist.convert.images import Images, PixelImages, Source
from ssl_dist.convert.tables import huggingface, parquet
from ssl_dist.convert.transfer_sets import transfer_set
from ssl_dist.convert.walk import EXTENSIONS
from ssl_dist.convert.webdataset import webdataset
from ssl_dist.data.catalog import CATALOG, OWN_FOLDER, OWN_SOURCES
from ssl_dist.errors import UserError

Opened = TypeVar("Opened")
TABLES = {"parquet": parquet, "huggingface": huggingface}
SHARDS = ("webdataset", *TABLES)


def open_source(
    dataset: str,
    root: Path | None,
    out: Path | None = None,
    unlabeled: bool = False,
    image_key: str | None = None,
    label_key: str | None = None,
    extensions: tuple[str, ...] = EXTENSIONS,
) -> Source:
    """The source of a catalog entry or of images of one's own. unlabeled, extensions: of the latter, see
    `image_folder`; image_key, label_key: of shards and tables, see `webdataset` and `parquet`. Raises `UserError` when
    `root` does not hold it, and when `out`, where the conversion goes, lies in an image folder, whose class it would be
    for the next one."""
    kind = OWN_SOURCES.get(dataset, CATALOG.get(dataset, OWN_FOLDER)).source
    if kind == "digits":
        return digits()
    if root is None:
        raise UserError(f"convert {dataset}: --root must name the folder with its images")
    if kind == "cifar":
        return cifar(dataset, root)
    if kind == "stl10":
        return stl10(root)
    if kind == "svhn":
        return svhn(root)
    if kind == "transfer":
        return transfer_set(dataset, root)
    if kind == "tiny-imagenet":
        return tiny_imagenet(root)
    if kind == "webdataset":
        return webdataset(root, unlabeled, image_key, label_key, extensions)
    if kind in TABLES:
        return TABLES[kind](root, unlabeled, image_key, label_key)
    if out is not None and out.resolve().is_relative_to(root.resolve()):
        raise UserError(f"--out {out}: lies in the source, --root {root}; choose a folder outside of it")
    return image_folder(root, unlabeled, extensions)


def _fetch(
    dataset: str, root: Path, folder: str, archive: str, open_split: Callable[[Path], Opened]
) -> tuple[Path, Opened]:
    """`open_split(root)` with torchvision's own check and download; one line where neither helps. folder: that the
    archive unpacks to; empty: the archive itself is read."""
    if folder and root.name == folder:
        root = root.parent
    try:
        return root, open_split(root)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        looked_for = f"{folder}/ and {archive}" if folder else archive
        raise UserError(
            f"{dataset}: --root {root}: looked for {looked_for}, and the download failed ({reason}); put "
            f"{archive} there, or convert images with `ssl-dist convert folder --name {dataset} --root DIR`"
        ) from None


def cifar(dataset: str, root: Path) -> Source:
    """CIFAR-10, CIFAR-100 or CIFAR-100 with its coarse labels, in the order of the original batches."""
    import pickle

    from torchvision.datasets import CIFAR10, CIFAR100

    cls = CIFAR10 if dataset == "cifar10" else CIFAR100
    splits: dict[str, Images] = {}
    for split, train in (("train", True), ("test", False)):
        root, data = _fetch(dataset, root, cls.base_folder, cls.filename, partial(cls, train=train, download=True))
        labels, classes = data.targets, data.classes
        if dataset == "supercifar100":
            # torchvision keeps the fine labels only; the files' checksums were verified above.
            folder = root / cls.base_folder
            labels = pickle.loads((folder / split).read_bytes(), encoding="latin1")["coarse_labels"]
            classes = pickle.loads((folder / "meta").read_bytes(), encoding="latin1")["coarse_label_names"]
        splits[split] = PixelImages(data.data, labels)
    return Source(list(classes), splits)


def stl10(root: Path) -> Source:
    """STL-10: 100,000 unlabeled, 5,000 training and 8,000 test images, mapped from the binary files."""
    from torchvision.datasets import STL10

    root, data = _fetch("stl10", root, STL10.base_folder, STL10.filename, partial(STL10, split="test", download=True))
    splits: dict[str, Images] = {}
    for split in ("unlabeled", "train", "test"):
        folder = root / STL10.base_folder
        # Column-major pictures: [N, 3, W, H] in the file.
        pixels = np.memmap(folder / f"{split}_X.bin", np.uint8, "r").reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)
        labelled = split != "unlabeled"
        labels = np.fromfile(folder / f"{split}_y.bin", np.uint8) - 1 if labelled else np.full(len(pixels), -1)
        splits[split] = PixelImages(pixels, labels)
    return Source(list(data.classes), splits)


def svhn(root: Path) -> Source:
    """The house numbers of Netzer et al. (2011): 73,257 digits to train on, 26,032 test images, and, where
    extra_32x32.mat is there (it is not downloaded), 531,131 more, easier ones."""
    from torchvision.datasets import SVHN

    splits: dict[str, Images] = {}
    for split in ("train", "test", "extra"):
        archive = SVHN.split_list[split][1]
        if split != "extra" or (root / archive).exists():
            _, data = _fetch("svhn", root, "", archive, partial(SVHN, split=split, download=True))
            splits[split] = PixelImages(data.data.transpose(0, 2, 3, 1), data.labels)
    return Source([str(digit) for digit in range(10)], splits)


def digits() -> Source:
    """scikit-learn's handwritten digits, 0..16 grey levels of 8x8, enlarged to 32x32 RGB (bicubic).

    Every fifth image of each digit, in the order of the file, is a test image: 1,442 for training, 355 for testing.
    """
    from PIL import Image
    from sklearn.datasets import load_digits

    data = load_digits()
    grey = np.rint(data.images * (255 / 16)).astype(np.uint8)
    large = [np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC)) for image in grey]
    pixels = np.repeat(np.stack(large)[..., None], 3, axis=3)
    labels = data.target.astype(np.int64)
    position = np.empty(len(labels), np.int64)  # of an image among those of its digit
    for digit in range(10):
        members = labels == digit
        position[members] = np.arange(members.sum())
    test = position % 5 == 4
    return Source(
        [str(digit) for digit in range(10)],
        {"train": PixelImages(pixels[~test], labels[~test]), "test": PixelImages(pixels[test], labels[test])},
    )
