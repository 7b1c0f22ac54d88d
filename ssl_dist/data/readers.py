"""Open a converted data set: what is known of its splits, and the reader of one."""

from pathlib import Path
from typing import Literal

from ssl_dist.data import manifest
from ssl_dist.data.beton import Beton
from ssl_dist.data.reader import Reader, SplitInfo
from ssl_dist.errors import UserError


def splits_present(root: str | Path) -> tuple[str, ...]:
    """Names of the splits below a converted data set's folder. Raises `UserError` without a dataset.json."""
    return tuple(manifest.load(root).splits)


def require_name(root: str | Path, name: str) -> None:
    """Raises `UserError` when the data set below `root` has another name."""
    found = manifest.load(root).name
    if found != name:
        raise UserError(
            f"data.name = {name!r}: {root} holds the data set {found!r}; set data.name={found}, or data.root"
        )


def read_info(root: str | Path, split: str) -> SplitInfo:
    """What is known of a split; its file is opened and compared with dataset.json. Raises `UserError`."""
    return _open(root, split)[0]


def open_dataset(
    root: str | Path, split: str, reader: Literal["ffcv", "arrays"] = "ffcv", *, threads: int = 1
) -> Reader:
    """The reader of a split; a context manager. threads: how many decode a batch.

    Raises `UserError` for a missing, truncated or foreign file, an unknown split, a count other than dataset.json's,
    and for `reader="ffcv"` where FFCV can not be imported.
    """
    info, beton = _open(root, split)
    if reader == "arrays":
        from ssl_dist.data.arrays import ArraysReader

        return ArraysReader(info, beton, threads)
    if reader != "ffcv":
        raise UserError(f"data.reader = {reader!r}: must be ffcv or arrays")
    from ssl_dist.data.ffcv_reader import FfcvReader

    return FfcvReader(info, beton, threads)


def _open(root: str | Path, split: str) -> tuple[SplitInfo, Beton]:
    found = manifest.load(root)
    if split not in found.splits:
        raise UserError(f"data.split = {split!r}: {root} holds the splits {', '.join(found.splits)}; choose one")
    said = found.splits[split]
    beton = Beton(Path(root) / f"{split}.beton")
    if beton.count != said.count:
        raise UserError(
            f"{beton.path}: holds {beton.count} images and {manifest.FILE} says {said.count}; "
            f"convert again: `ssl-dist convert DATASET --root SOURCE --out {root}`"
        )
    info = SplitInfo(
        name=found.name,
        split=split,
        count=beton.count,
        classes=tuple(found.classes),
        max_height=int(beton.heights.max()),
        max_width=int(beton.widths.max()),
        labelled=bool((beton.labels >= 0).all()),
        mean=tuple(found.mean),
        std=tuple(found.std),
        sha256=said.sha256,
    )
    return info, beton
