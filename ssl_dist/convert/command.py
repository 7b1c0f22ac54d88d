"""`ssl-dist convert`: images from their source to one .beton a split and dataset.json.

Threads read and encode (Pillow works outside the interpreter's lock, and threads can not outlive a killed conversion);
one writer takes the samples in id order, so the bytes do not depend on the number of threads. A split is the unit of
resume: it is complete under its name or not there at all.
"""

import contextlib
import itertools
import sys
import zipfile
import zlib
from collections.abc import Generator
from functools import partial
from pathlib import Path

import numpy as np

from ssl_dist.convert.encode import Sample, encode, page_size
from ssl_dist.convert.images import Images
from ssl_dist.convert.sources import open_source
from ssl_dist.convert.statistics import Moments, constant_channels, measure
from ssl_dist.data import manifest
from ssl_dist.data.beton import JPG, MAX_SIDE, RAW, Beton, Digest, Writer
from ssl_dist.data.catalog import CATALOG, OWN_FOLDER, Entry, SplitRoles, split_roles
from ssl_dist.data.manifest import Encoding, Manifest, SplitRecord
from ssl_dist.distributed.rank import available_cores
from ssl_dist.errors import UserError, did_you_mean
from ssl_dist.progress import Progress
from ssl_dist.storage.durable import refuse_unwritable, remove_dead
from ssl_dist.thread_team import run_ahead

JPEG_QUALITY = 95
IMAGES_PER_TASK = 32  # of a thread


def convert(
    dataset: str,
    root: str | Path | None = None,
    out: str | Path | None = None,
    *,
    name: str | None = None,
    max_side: int | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> Manifest:
    """Write OUT/<split>.beton for every split of a data set and OUT/dataset.json; returns the latter.

    dataset: an entry of the catalog, or "folder" for images of one's own. root: where its images are (cifar10,
    cifar100, supercifar100 and stl10 are downloaded to it where missing; None: OUT/download). out: None: data/<name>.
    name: of a folder's data set, None: the folder's own; a name of the catalog brings that entry's facts along.
    max_side: pixels; larger images are shrunk to it; None: the catalog's, 512 for a folder. workers: threads that
    encode; None: one a core. progress: shown on standard error.

    Run again, it verifies the splits that are complete (SHA-256 over every sample) and makes those that are missing,
    damaged, of another encoding or of another list of images. Raises `UserError` for all that the user can mend.
    """
    name, entry = _name_and_entry(dataset, root, name)
    out = Path(out) if out is not None else Path("data") / name
    if root is None and entry.source in ("cifar", "stl10"):
        root = out / "download"
    workers, quiet = available_cores() if workers is None else workers, not progress
    if workers < 1:
        raise UserError(f"--workers {workers}: must be at least 1")
    encoding = _encoding(entry, max_side)
    previous = _previous_manifest(out, name, quiet)
    source = open_source(dataset, Path(root) if root is not None else None)
    roles = split_roles(name, source.splits)
    if roles.pretraining not in source.splits:
        raise UserError(f"--root {root}: has neither train/ nor unlabeled/; looked for images to train on")
    if previous is not None and (previous.encoding != encoding or previous.classes != source.classes):
        _log(f"{out}: was written with other sizes or classes; converting again", quiet)
        previous = None
    splits = dict(previous.splits) if previous is not None else {}
    with refuse_unwritable(f"--out {out}", "free space there or choose another folder"):
        out.mkdir(parents=True, exist_ok=True)
        remove_dead(out)
        # The split for pre-training comes first: no dataset.json is without its mean and standard deviation.
        for split in sorted(source.splits, key=lambda split: split != roles.pretraining):
            images, path = source.splits[split], out / f"{split}.beton"
            is_kept = split in splits and _is_intact(path, splits[split], images, quiet)
            if is_kept:  # a manifest of before has no checksum of its tables
                tables = Beton(path).tables_sha256
                splits[split] = splits[split].model_copy(update={"tables": tables})
            else:
                splits[split] = _write(path, images, len(source.classes), encoding, workers, quiet)
            if split == roles.pretraining:
                if previous is not None and is_kept:
                    moments: Moments = (previous.mean, previous.std, previous.measured_images)
                else:
                    moments = measure(Beton(path), workers)
                if constant := constant_channels(moments[1]):
                    _log(f"{path}: constant in all images: {constant}; std is 1 for it in {manifest.FILE}", quiet)
            written = {name: splits[name] for name in source.splits if name in splits}
            result = _manifest(name, entry, source.classes, written, roles, moments, encoding)
            manifest.save(out, result)
    return result


def _manifest(
    name: str,
    entry: Entry,
    classes: list[str],
    splits: dict[str, SplitRecord],
    roles: SplitRoles,
    moments: Moments,
    encoding: Encoding,
) -> Manifest:
    return Manifest(
        name=name,
        about=entry.about,
        classes=classes,
        splits=splits,
        **roles._asdict(),
        image_size=entry.image_size,
        mean=moments[0],
        std=moments[1],
        measured_images=moments[2],
        paper_mean=list(entry.paper_mean) if entry.paper_mean else None,
        paper_std=list(entry.paper_std) if entry.paper_std else None,
        encoding=encoding,
    )


def _name_and_entry(dataset: str, root: str | Path | None, name: str | None) -> tuple[str, Entry]:
    """The data set's name and its entry in the catalog, or that of a folder of one's own."""
    if dataset != "folder":
        if dataset not in CATALOG:
            names = [*CATALOG, "folder"]
            hint = did_you_mean(dataset, names).rstrip() or f"known are {', '.join(names)}"
            raise UserError(f"convert {dataset}: no such data set; {hint} (folder: any folder of images)")
        if name not in (None, dataset):
            raise UserError(f"--name {name}: only `convert folder` takes a name; leave it out")
        return dataset, CATALOG[dataset]
    if root is None:
        raise UserError("convert folder: --root must name the folder with the images")
    name = name if name is not None else Path(root).resolve().name
    if not name or "/" in name:
        raise UserError(f"--name {name!r}: must be a plain word; give the data set a name with --name")
    return name, CATALOG.get(name, OWN_FOLDER)


def _encoding(entry: Entry, max_side: int | None) -> Encoding:
    if max_side is not None and not 1 <= max_side <= MAX_SIDE:
        raise UserError(f"--max-side {max_side}: must be 1..{MAX_SIDE} pixels")
    max_side = max_side or entry.max_side
    return Encoding(raw_side=min(entry.raw_side, max_side), max_side=max_side, jpeg_quality=JPEG_QUALITY)


def _previous_manifest(out: Path, name: str, quiet: bool) -> Manifest | None:
    """The manifest of an earlier conversion into `out`. Raises `UserError` for another data set's, which is kept."""
    if not (out / manifest.FILE).exists():
        return None
    try:
        previous = manifest.load(out)
    except UserError as error:
        _log(f"{error}; doing so", quiet)
        return None
    if previous.name != name:
        raise UserError(f"--out {out}: holds the data set {previous.name!r}; choose another folder for {name!r}")
    return previous


def _is_intact(path: Path, recorded: SplitRecord, images: Images, quiet: bool) -> bool:
    """Whether a finished split has the source's images and every byte that was written."""
    if recorded.listing != images.listing() or not path.exists():
        return False
    try:
        beton = Beton(path)
    except UserError as error:
        _log(f"{error}; doing so", quiet)
        return False
    difference = manifest.difference(beton, recorded)
    if difference:
        _log(f"{path}: {difference}; converting it again", quiet)
        return False
    if not np.array_equal(beton.labels, images.labels):
        return False
    digest = Digest()
    with Progress(f"{path.stem}: verifying", beton.count, "image", quiet) as counter:
        for sample in beton.samples():
            digest.add(*sample)
            counter.update(1)
    intact = digest.hexdigest() == recorded.sha256
    _log(f"{path}: {'complete, kept' if intact else 'damaged, converting it again'}", quiet)
    return intact


def _write(path: Path, images: Images, num_classes: int, encoding: Encoding, workers: int, quiet: bool) -> SplitRecord:
    """Encode a split into its file."""
    count = len(images.names)
    with (
        Writer(path, count, page_size(encoding)) as writer,
        Progress(f"{path.stem}: converting", count, "image", quiet) as counter,
        contextlib.closing(_encoded(images, encoding, workers)) as samples,
    ):
        for label, sample in zip(images.labels, samples, strict=True):
            writer.add(int(label), sample.mode, sample.height, sample.width, sample.data)
            counter.update(1)
        digest = writer.finish()
    return _record_of(Beton(path), num_classes, digest, images.listing())


def _encoded(images: Images, encoding: Encoding, workers: int) -> Generator[Sample, None, None]:
    """Encode every image, in id order; the number that is encoded ahead of the consumer is bounded."""

    def encode_part(ids: range) -> list[Sample]:
        return [encode(_load(images, i), images.describe(i), encoding) for i in ids]

    ids = range(len(images.names))
    parts = (partial(encode_part, ids[start : start + IMAGES_PER_TASK]) for start in ids[::IMAGES_PER_TASK])
    with contextlib.closing(run_ahead(parts, workers, 3 * workers)) as encoded:
        yield from itertools.chain.from_iterable(encoded)


def _load(images: Images, i: int) -> bytes | np.ndarray:
    try:
        return images.load(i)
    except (OSError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{images.describe(i)}: can not be read ({error}); replace or remove it") from None


def _record_of(beton: Beton, num_classes: int, digest: str, listing: str) -> SplitRecord:
    labels = beton.labels[beton.labels >= 0]
    return SplitRecord(
        count=beton.count,
        labelled=len(labels) == beton.count,
        class_counts=np.bincount(labels, minlength=num_classes).tolist(),
        max_height=int(beton.heights.max()),
        max_width=int(beton.widths.max()),
        raw=int((beton.modes == RAW).sum()),
        jpeg=int((beton.modes == JPG).sum()),
        bytes=beton.path.stat().st_size,
        sha256=digest,
        tables=beton.tables_sha256,
        listing=listing,
    )


def _log(text: str, quiet: bool) -> None:
    if not quiet:
        print(text, file=sys.stderr, flush=True)
