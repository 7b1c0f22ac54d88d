"""One split: its images to a .beton, and the comparison of a .beton with the source that it was made of."""

import contextlib
import hashlib
import itertools
import os
import sys
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from ssl_dist.convert.encode import Sample, encode, page_size
from ssl_dist.convert.images import Images, Loader
from ssl_dist.data import manifest
from ssl_dist.data.beton import JPG, RAW, Beton, Digest, Writer
from ssl_dist.data.manifest import Encoding, SplitRecord
from ssl_dist.data.pillow import UnfitImage
from ssl_dist.errors import MAX_MESSAGE, UserError
from ssl_dist.progress import Progress
from ssl_dist.thread_team import run_ahead

IMAGES_PER_TASK = 32  # of a thread
MAX_NAMED = 20  # images that can not be converted, on the terminal
# What reading a file or a member of an archive raises where it is damaged, gone or locked.
UNREADABLE = (OSError, zipfile.BadZipFile, zlib.error, KeyError, RuntimeError, EOFError, ValueError)

T = TypeVar("T")


class UnfitImages(UserError):
    """Images of a split that can not be converted: position in `images.names` -> reason."""

    def __init__(self, split: str, images: Images, reasons: dict[int, str]) -> None:
        super().__init__(f"{split}: {len(reasons)} of {len(images.names)} images can not be converted")
        self.images, self.reasons = images, reasons

    @property
    def are_all(self) -> bool:
        return len(self.reasons) == len(self.images.names)

    def are_refused(self, options: "Options") -> bool:
        """Whether the split can not be converted without them."""
        return self.are_all or not options.skip_damaged

    def named(self, number: int) -> list[str]:
        """The first of them, as a user finds them, with the reason."""
        first = itertools.islice(self.reasons.items(), number)
        return [f"{self.images.describe(i)}: {reason}" for i, reason in first]


@dataclass(frozen=True)
class Options:
    """How every split is made. workers: threads; quiet: report nothing on standard error; skip_damaged: leave out what
    can not be read; recheck: read the source's images even where nothing tells that they changed."""

    encoding: Encoding
    workers: int
    quiet: bool
    skip_damaged: bool
    recheck: bool

    def report(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------- a finished split and its source


def kept(path: Path, recorded: SplitRecord, images: Images, options: Options) -> SplitRecord | None:
    """The record of a finished split that has every byte that was written and is made of the source's images; None: it
    must be made again, and the reason was reported.

    What is compared: the names, the labels and what `Images.stamps` tells; where that differs or is not known, the
    bytes of all images of the source. Images that were left out are tried again: --max-pixels may let them in now.
    """
    stamps = images.stamps()
    unchanged = stamps is not None and stamps == recorded.stamps and not options.recheck
    reason = _difference(path, recorded, images, options) or _readable_now(path, recorded, images, options)
    if not reason and not unchanged and _contents(path.stem, images, options) != recorded.contents:
        reason = f"{path}: the images of the source are others than those that it was made of"
    if reason:
        options.report(f"{reason}; converting it again")
        return None
    compared = "names, sizes and times" if unchanged else "the bytes"
    recheck = "; --recheck compares their bytes" if unchanged else ""
    options.report(f"{path}: complete, kept: {compared} of the source's images are as they were{recheck}")
    return recorded.model_copy(update={"stamps": stamps, "tables": Beton(path).tables_sha256})


def _difference(path: Path, recorded: SplitRecord, images: Images, options: Options) -> str:
    """Why the file is not whole, or not that of the source's names and labels; empty: it is."""
    if recorded.listing != images.listing():
        return f"{path}: the source lists other images"
    if recorded.contents is None:
        return f"{path}: was written before the bytes of its images were recorded"
    if recorded.skipped and not options.skip_damaged:
        return f"{path}: {len(recorded.skipped)} images were left out of it by --skip-damaged, which is not given now"
    try:
        beton = Beton(path)
    except UserError as error:
        return str(error)
    difference = manifest.difference(beton, recorded)
    if difference:
        return f"{path}: {difference}"
    is_stored = np.array([printable(name) not in recorded.skipped for name in images.names])
    if not np.array_equal(beton.labels, images.labels[is_stored]):
        return f"{path}: the source gives its images other classes"
    digest = Digest()
    with Progress(f"{path.stem}: verifying", beton.count, "image", options.quiet) as counter:
        for sample in beton.samples():
            digest.add(*sample)
            counter.update(1)
    return "" if digest.hexdigest() == recorded.sha256 else f"{path}: damaged"


def _readable_now(path: Path, recorded: SplitRecord, images: Images, options: Options) -> str:
    """The first image that was left out of the file and can be stored now, in words; empty: there is none."""
    if not recorded.skipped:
        return ""
    for i, load in enumerate(itertools.chain.from_iterable(images.loaders(IMAGES_PER_TASK))):
        if printable(images.names[i]) in recorded.skipped and not isinstance(
            _encoded(options.encoding, load)[1], UnfitImage
        ):
            return f"{path}: {images.describe(i)} was left out of it and can be read now"
    return ""


def _contents(split: str, images: Images, options: Options) -> str:
    """SHA-256 of the SHA-256 of every image of the source, in id order."""
    total = hashlib.sha256()
    with (
        Progress(f"{split}: reading the source", len(images.names), "image", options.quiet) as counter,
        contextlib.closing(_in_threads(lambda load: _load(load)[0], images, options)) as digests,
    ):
        for digest in digests:
            total.update(digest)
            counter.update(1)
    return total.hexdigest()


# --------------------------------------------------------------------------------------------------- writing a split


@contextlib.contextmanager
def written(
    path: Path, images: Images, num_classes: int, options: Options
) -> Iterator[tuple[Beton, SplitRecord, np.ndarray]]:
    """The split's complete file, under a temporary name, its record, and 64 bits of the SHA-256 of every image of the
    source, uint64 [N], 0 of those that are left out; a block that ends well puts the file in its place.

    Raises `UnfitImages` of all images that can not be converted, unless these are to be left out.
    """
    count, contents, unfit, turned = len(images.names), hashlib.sha256(), dict[int, str](), 0
    digests = np.zeros(count, np.uint64)
    stamps = images.stamps()  # asked before the images are read: what changes meanwhile is noticed by the next run

    with Writer(path, count, page_size(options.encoding), options.encoding.pixels) as writer:
        with (
            Progress(f"{path.stem}: converting", count, "image", options.quiet) as counter,
            contextlib.closing(_in_threads(partial(_encoded, options.encoding), images, options)) as results,
        ):
            for i, (digest, sample) in enumerate(results):
                contents.update(digest)
                if isinstance(sample, UnfitImage):
                    unfit[i] = str(sample)
                elif not unfit or options.skip_damaged:
                    digests[i] = int.from_bytes(digest[:8])
                    writer.add(int(images.labels[i]), sample.mode, sample.height, sample.width, sample.data)
                    turned += sample.turned
                counter.update(1)
        if unfit:
            error = UnfitImages(path.stem, images, unfit)
            if error.are_refused(options):
                raise error
            options.report(f"{error} and are left out; {manifest.FILE} names all of them:\n{_first(error)}")
        if turned:
            options.report(f"{path.stem}: {turned} images are turned upright, as their EXIF orientation says")
        sha256 = writer.complete()
        beton = Beton(writer.temporary)
        labels = beton.labels[beton.labels >= 0]
        yield (
            beton,
            SplitRecord(
                count=beton.count,
                labelled=len(labels) == beton.count,
                class_counts=np.bincount(labels, minlength=num_classes).tolist(),
                max_height=int(beton.heights.max()),
                max_width=int(beton.widths.max()),
                raw=int((beton.modes == RAW).sum()),
                jpeg=int((beton.modes == JPG).sum()),
                bytes=beton.path.stat().st_size,
                sha256=sha256,
                tables=beton.tables_sha256,
                listing=images.listing(),
                stamps=stamps,
                contents=contents.hexdigest(),
                turned=turned,
                skipped={printable(images.names[i]): reason for i, reason in unfit.items()},
            ),
            digests,
        )
        writer.publish()


def unfit_images(split: str, images: Images, options: Options) -> UnfitImages | None:
    """The images for which a split would be refused; nothing is written."""
    encoded = _in_threads(partial(_encoded, options.encoding), images, options)
    with (
        Progress(f"{split}: reading", len(images.names), "image", options.quiet) as counter,
        contextlib.closing(encoded) as results,
    ):
        reasons = dict[int, str]()
        for i, (_, sample) in enumerate(results):
            if isinstance(sample, UnfitImage):
                reasons[i] = str(sample)
            counter.update(1)
    error = UnfitImages(split, images, reasons)
    return error if reasons and error.are_refused(options) else None


def refusal(errors: Sequence[UnfitImages]) -> UserError:
    """One error that names the images of all splits, the first `MAX_NAMED` of them, or, where that would be too long,
    the first, after the names were printed."""
    number = sum(len(error.reasons) for error in errors)
    remedy = "replace or remove it, or leave it out with --skip-damaged"
    if any(error.are_all for error in errors):
        remedy = "give --root a folder with images that can be read"
    named = list(itertools.islice((name for error in errors for name in error.named(MAX_NAMED)), MAX_NAMED))
    if number == 1:
        return UserError(f"{named[0]}; {remedy}")
    what = "; ".join(map(str, errors))
    short = (f"{error.images.names[i]} ({reason})" for error in errors for i, reason in error.reasons.items())
    message = f"{what}: {', '.join(itertools.islice(short, MAX_NAMED))}; {remedy}"
    if number > MAX_NAMED or len(message) > MAX_MESSAGE:
        print("\n".join([*named, *_more(number)]), file=sys.stderr, flush=True)
        message = f"{what}, named above, the first is {named[0]}; {remedy}"
    return UserError(message)


def _first(error: UnfitImages) -> str:
    return "\n".join([*error.named(MAX_NAMED), *_more(len(error.reasons))])


def _more(number: int) -> list[str]:
    return [f"... and {number - MAX_NAMED} more"] if number > MAX_NAMED else []


def _encoded(encoding: Encoding, load: Loader) -> tuple[bytes, Sample | UnfitImage]:
    """SHA-256 of an image's bytes at the source, and what is stored of it, or why nothing can be."""
    digest, item = _load(load)
    try:
        return digest, item if isinstance(item, UnfitImage) else encode(item, encoding)
    except UnfitImage as error:
        return digest, error


def _load(load: Loader) -> tuple[bytes, bytes | np.ndarray | UnfitImage]:
    """SHA-256 of an image's bytes at the source, and these; in their place why they can not be read."""
    try:
        item = load()
    except UNREADABLE as error:
        reason = error.strerror if isinstance(error, OSError) else None
        return hashlib.sha256().digest(), UnfitImage(f"can not be read ({reason or error})")
    return hashlib.sha256(item if isinstance(item, bytes) else item.tobytes()).digest(), item


def _in_threads(work: Callable[[Loader], T], images: Images, options: Options) -> Generator[T, None, None]:
    """work(loader) of every image, in id order; the number that is done ahead of the consumer is bounded."""

    def part(loaders: list[Loader]) -> list[T]:
        return [work(load) for load in loaders]

    parts = (partial(part, loaders) for loaders in images.loaders(IMAGES_PER_TASK))
    with contextlib.closing(run_ahead(parts, options.workers, 3 * options.workers)) as results:
        yield from itertools.chain.from_iterable(results)


def printable(name: str) -> str:
    """A name of a file as JSON can hold it, also where it is no UTF-8."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
