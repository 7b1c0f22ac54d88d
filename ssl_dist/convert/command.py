"""`ssl-dist convert`: images from their source to one .beton a split and dataset.json.

Threads read and encode (Pillow works outside the interpreter's lock, and threads can not outlive a killed conversion);
one writer takes the samples in id order, so the bytes do not depend on the number of threads. A split is the unit of
resume: it is complete under its name or not there at all.
"""

import contextlib
import sys
import zipfile
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ssl_dist.convert.encode import Sample, encode, page_size
from ssl_dist.convert.images import Images
from ssl_dist.convert.sources import open_source
from ssl_dist.convert.statistics import measure
from ssl_dist.data import manifest
from ssl_dist.data.beton import JPG, MAX_SIDE, RAW, Beton, Digest, Writer
from ssl_dist.data.catalog import CATALOG, Entry, facts
from ssl_dist.data.manifest import Encoding, Manifest, SplitFacts
from ssl_dist.distributed.rank import available_cores
from ssl_dist.errors import UserError, did_you_mean
from ssl_dist.progress import Progress
from ssl_dist.storage.durable import refuse_unwritable

JPEG_QUALITY = 95
CHUNK = 32  # images a thread takes at once


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
    encode; None: one a core. progress: tell about it on standard error.

    Run again, it verifies the splits that are complete (SHA-256 over every sample) and makes those that are missing,
    damaged, of another encoding or of another list of images. Raises `UserError` for all that the user can mend.
    """
    name, entry = _named(dataset, root, name)
    out = Path(out) if out is not None else Path("data") / name
    if root is None and entry is not None and entry.source in ("cifar", "stl10"):
        root = out / "download"
    workers, quiet = available_cores() if workers is None else workers, not progress
    if workers < 1:
        raise UserError(f"--workers {workers}: must be at least 1")
    encoding = _encoding(entry, max_side)
    previous = _previous(out, name, quiet)
    source = open_source(dataset, Path(root) if root is not None else None)
    uses = facts(name, source.splits)
    if uses.pretraining not in source.splits:
        raise UserError(f"--root {root}: has neither train/ nor unlabeled/; looked for images to train on")
    if previous is not None and (previous.encoding != encoding or previous.classes != source.classes):
        _say(f"{out}: was written with other sizes or classes; converting again", quiet)
        previous = None
    splits: dict[str, SplitFacts] = dict(previous.splits) if previous is not None else {}
    with refuse_unwritable(f"--out {out}", "free space there or choose another folder"):
        out.mkdir(parents=True, exist_ok=True)
        # The split for pre-training comes first: no dataset.json is without its mean and standard deviation.
        for split in sorted(source.splits, key=lambda split: split != uses.pretraining):
            images, path = source.splits[split], out / f"{split}.beton"
            kept = split in splits and _still_good(path, splits[split], images, quiet)
            if not kept:
                digest = _write(path, images, encoding, workers, quiet)
                splits[split] = _split_facts(Beton(path), len(source.classes), digest, images.listing())
            if split == uses.pretraining:
                before = (previous.mean, previous.std, previous.measured_images) if kept else None
                mean, std, number = before or measure(Beton(path), workers)
            written = Manifest(
                name=name,
                about=entry.about if entry is not None else "images of a folder",
                classes=source.classes,
                splits={split: splits[split] for split in source.splits if split in splits},
                pretraining=uses.pretraining,
                training=uses.training,
                evaluation=uses.evaluation,
                image_size=entry.image_size if entry is not None else None,
                mean=mean,
                std=std,
                measured_images=number,
                paper_mean=list(entry.paper_mean) if entry is not None and entry.paper_mean else None,
                paper_std=list(entry.paper_std) if entry is not None and entry.paper_std else None,
                encoding=encoding,
            )
            manifest.save(out, written)
    return written


def _named(dataset: str, root: str | Path | None, name: str | None) -> tuple[str, Entry | None]:
    """The data set's name and its entry in the catalog."""
    if dataset != "folder":
        if dataset not in CATALOG:
            known = [*CATALOG, "folder"]
            hint = did_you_mean(dataset, known).rstrip() or f"known are {', '.join(known)}"
            raise UserError(f"convert {dataset}: no such data set; {hint} (folder: any folder of images)")
        if name not in (None, dataset):
            raise UserError(f"--name {name}: only `convert folder` takes a name; leave it out")
        return dataset, CATALOG[dataset]
    if root is None:
        raise UserError("convert folder: --root must name the folder with the images")
    name = name if name is not None else Path(root).resolve().name
    if not name or "/" in name:
        raise UserError(f"--name {name!r}: must be a plain word; give the data set a name with --name")
    return name, CATALOG.get(name)


def _encoding(entry: Entry | None, max_side: int | None) -> Encoding:
    if max_side is not None and not 1 <= max_side <= MAX_SIDE:
        raise UserError(f"--max-side {max_side}: must be 1..{MAX_SIDE} pixels")
    max_side = max_side or (entry.max_side if entry is not None else Entry.max_side)
    raw_side = entry.raw_side if entry is not None else Entry.raw_side
    return Encoding(raw_side=min(raw_side, max_side), max_side=max_side, jpeg_quality=JPEG_QUALITY)


def _previous(out: Path, name: str, quiet: bool) -> Manifest | None:
    """What an earlier conversion left in `out`; another data set is not written over."""
    if not (out / manifest.FILE).exists():
        return None
    try:
        previous = manifest.load(out)
    except UserError as error:
        _say(f"{error}; doing so", quiet)
        return None
    if previous.name != name:
        raise UserError(f"--out {out}: holds the data set {previous.name!r}; choose another folder for {name!r}")
    return previous


def _still_good(path: Path, said: SplitFacts, images: Images, quiet: bool) -> bool:
    """Whether a finished split has the source's images and every byte that was written."""
    if said.listing != images.listing() or not path.exists():
        return False
    try:
        beton = Beton(path)
    except UserError as error:
        _say(f"{error}; doing so", quiet)
        return False
    if not np.array_equal(beton.labels, images.labels):
        return False
    digest = Digest()
    with Progress(f"{path.stem}: verifying", beton.count, "image", quiet) as counter:
        for sample in beton.samples():
            digest.add(*sample)
            counter.update(1)
    good = digest.hexdigest() == said.sha256
    _say(f"{path}: {'complete, kept' if good else 'damaged, converting it again'}", quiet)
    return good


def _write(path: Path, images: Images, encoding: Encoding, workers: int, quiet: bool) -> str:
    """Encode a split into its file; returns the digest."""
    count = len(images.names)
    with (
        Writer(path, count, page_size(encoding)) as writer,
        Progress(f"{path.stem}: converting", count, "image", quiet) as counter,
        contextlib.closing(_encoded(images, encoding, workers)) as samples,
    ):
        for label, sample in zip(images.labels, samples, strict=True):
            writer.add(int(label), sample.mode, sample.height, sample.width, sample.data)
            counter.update(1)
        return writer.finish()


def _encoded(images: Images, encoding: Encoding, workers: int) -> Iterator[Sample]:
    """Every image in id order; a bounded number of them is under way."""

    def work(ids: range) -> list[Sample]:
        return [encode(_load(images, i), images.describe(i), encoding) for i in ids]

    count = len(images.names)
    pending: deque = deque()
    with ThreadPoolExecutor(workers, "encode") as pool:
        try:
            for start in range(0, count, CHUNK):
                pending.append(pool.submit(work, range(start, min(start + CHUNK, count))))
                if len(pending) > 3 * workers:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _load(images: Images, i: int) -> bytes | np.ndarray:
    try:
        return images.load(i)
    except (OSError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{images.describe(i)}: can not be read ({error}); replace or remove it") from None


def _split_facts(beton: Beton, num_classes: int, digest: str, listing: str) -> SplitFacts:
    known = beton.labels[beton.labels >= 0]
    return SplitFacts(
        count=beton.count,
        labelled=len(known) == beton.count,
        class_counts=np.bincount(known, minlength=num_classes).tolist(),
        max_height=int(beton.heights.max()),
        max_width=int(beton.widths.max()),
        raw=int((beton.modes == RAW).sum()),
        jpeg=int((beton.modes == JPG).sum()),
        bytes=beton.path.stat().st_size,
        sha256=digest,
        listing=listing,
    )


def _say(text: str, quiet: bool) -> None:
    if not quiet:
        print(text, file=sys.stderr, flush=True)
