"""`ssl-dist convert`: images from their source to one .beton a split and dataset.json.

Threads read and encode (Pillow works outside the interpreter's lock, and threads can not outlive a killed conversion);
one writer takes the samples in id order, so the bytes do not depend on the number of threads. A split is the unit of
resume: it is complete under its name or not there at all.
"""

import hashlib
import itertools
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError

from ssl_dist import config
from ssl_dist.config import DatasetName
from ssl_dist.convert.channels import SUFFIX, read_channels
from ssl_dist.convert.encode import MAX_PIXELS, pillow_limited_to, pixel_limit
from ssl_dist.convert.folders import NoImages, WithoutClass
from ssl_dist.convert.images import Images, Source
from ssl_dist.convert.shards import NoShards, default_name, other_source
from ssl_dist.convert.sources import SHARDS, open_source
from ssl_dist.convert.split import UNREADABLE, Options, UnfitImages, kept, printable, refusal, unfit_images, written
from ssl_dist.convert.statistics import Moments, constant_channels, measure
from ssl_dist.convert.walk import EXTENSIONS
from ssl_dist.data import file_names, manifest
from ssl_dist.data.beton import MAX_SIDE, Beton
from ssl_dist.data.catalog import CATALOG, OWN_SOURCES, Entry, SplitRoles, split_roles
from ssl_dist.data.manifest import Encoding, Manifest, SplitRecord
from ssl_dist.data.pillow import UnfitImage
from ssl_dist.distributed.rank import available_cores
from ssl_dist.errors import UserError, did_you_mean, quoted, refuse_unreadable
from ssl_dist.storage.durable import refuse_unwritable, remove_dead, write_text
from ssl_dist.views import MAX_CHANNELS
from ssl_dist.views.pixels import steps_of_colour

JPEG_QUALITY = 95
CONFIG_FOR_PHOTOS, PHOTOS_BATCH_SIZE = "configs/photos/simclr-resnet18-96px.yaml", 64  # and that of the config


def convert(
    dataset: str,
    root: str | Path | None = None,
    out: str | Path | None = None,
    *,
    name: str | None = None,
    max_side: int | None = None,
    max_pixels: int | None = None,
    workers: int | None = None,
    skip_damaged: bool = False,
    unlabeled: bool = False,
    image_key: str | None = None,
    label_key: str | None = None,
    ignore_orientation: bool = False,
    channels: int | None = None,
    recheck: bool = False,
    progress: bool = True,
) -> Manifest:
    """Write OUT/<split>.beton for every split of a data set and OUT/dataset.json; returns the latter.

    dataset: an entry of the catalog, or, for images of one's own, "folder", "webdataset", "parquet" or "huggingface".
    root: where its images are, for webdataset and parquet also a pattern of files (cifar10, cifar100, supercifar100,
    stl10 and svhn are downloaded to it where missing; None: OUT/download). out: None: data/<name>. name: of images of
    one's own, None: the folder's, with _ for what a name can not hold; a name of the catalog brings that entry's facts
    along.
    max_side: pixels; larger images are shrunk to it; None: the catalog's, 512 for a folder. max_pixels: of the largest
    picture that is read; None: 178,956,970. workers: threads that encode; None: one a core. skip_damaged: images that
    can not be read are left out, and named in dataset.json. unlabeled: all images of one's own are one split without
    labels. image_key, label_key: of shards and tables, see `webdataset` and `parquet`. ignore_orientation: store images
    of one's own as their files hold them, where EXIF says that they lie on their side; those of the catalog always are,
    as their papers read them. channels: of images of one's own, which then may be npy and of 8 or 16 bits
    (`convert.channels`), and are stored as they are; None: RGB. recheck: see below. progress: shown on standard error.

    Run again, it verifies the splits that are complete (SHA-256 over every sample) and makes those that are missing,
    damaged, of another encoding or of other images: of another name, or, where size, times or inode of a file differ
    from what they were, and with `recheck` always, of other bytes. Raises `UserError` for all that the user can mend.
    """
    name, entry = _name_and_entry(dataset, root, name)
    out = Path(out) if out is not None else Path("data") / name
    if root is None and entry.source in ("cifar", "stl10", "svhn"):
        root = out / "download"
    options = Options(
        encoding=_encoding(entry, max_side, ignore_orientation, channels),
        workers=available_cores() if workers is None else workers,
        quiet=not progress,
        skip_damaged=skip_damaged,
        recheck=recheck,
    )
    if options.workers < 1:
        raise UserError(f"--workers {workers}: must be at least 1")
    max_pixels = MAX_PIXELS if max_pixels is None else max_pixels
    if not 1 <= max_pixels <= MAX_SIDE**2:
        raise UserError(f"--max-pixels {max_pixels}: must be 1..{MAX_SIDE**2}")
    previous = _previous_manifest(out, name, options)
    if unlabeled and dataset not in OWN_SOURCES and entry.source != "folder":
        raise UserError(f"--unlabeled: only images of one's own are taken without their classes, not {dataset}")
    for option, key in (("--image-key", image_key), ("--label-key", label_key)):
        if key is not None and dataset not in SHARDS:
            raise UserError(f"{option} {quoted(key)}: only of {', '.join(SHARDS)}, not of {dataset}; leave it out")
    if channels is not None and dataset not in OWN_SOURCES and entry.source != "folder":
        raise UserError(f"--channels {channels}: only images of one's own are taken with other channels, not {dataset}")
    extensions = EXTENSIONS if channels is None else (*EXTENSIONS, SUFFIX)
    if dataset in SHARDS:
        options.report(f"--root {root}: reading the names and labels of its images")
    source = _source(dataset, root, out, name, unlabeled, image_key, label_key, extensions)
    for line in source.left_out:
        options.report(f"--root {root}: ignored: {line}")
    for line in source.notes:
        options.report(f"--root {root}: {line}")
    roles = split_roles(name, {split: bool((images.labels >= 0).any()) for split, images in source.splits.items()})
    if roles.pretraining not in source.splits:
        raise UserError(f"--root {root}: has neither train/ nor unlabeled/; looked for images to train on")
    if channels is not None:
        with pillow_limited_to(max_pixels):
            bits = _bits_of_first(source.splits[roles.pretraining], channels)
        options = replace(options, encoding=options.encoding.model_copy(update={"bits": bits}))
    if previous is not None and (previous.encoding != options.encoding or previous.classes != source.classes):
        options.report(f"{out}: was written with other sizes, classes, channels or orientations; converting again")
        previous = None
    splits = dict(previous.splits) if previous is not None else {}
    digests: dict[str, np.ndarray] = {}
    with (
        refuse_unwritable(f"--out {out}", "free space there or choose another folder"),
        pillow_limited_to(max_pixels),
    ):
        is_new = not out.exists()
        out.mkdir(parents=True, exist_ok=True)
        remove_dead(out)
        unfit: list[UnfitImages] = []
        # The split for pre-training comes first: no dataset.json is without its mean and standard deviation.
        for split in sorted(source.splits, key=lambda split: split != roles.pretraining):
            images, path = source.splits[split], out / f"{split}.beton"
            if unfit:  # to name those of this split, too
                unfit += filter(None, [unfit_images(split, images, options)])
                continue
            record = kept(path, splits[split], images, options) if split in splits else None
            if record is not None and previous is not None:
                if split == previous.pretraining == roles.pretraining:
                    moments: Moments = (previous.mean, previous.std, previous.measured_images)
                elif split == roles.pretraining:  # what was measured was another split
                    moments = measure(Beton(path), options.workers)
            else:
                # All that takes time is done before the file takes its place: dataset.json follows at once. Who is
                # killed between the two leaves a pair of which readers and the next run see that it is none.
                try:
                    with written(path, images, len(source.classes), options) as (beton, record, digests[split]):
                        if split == roles.pretraining:
                            moments = measure(beton, options.workers)
                except UnfitImages as error:
                    unfit.append(error)
                    continue
            if split == roles.pretraining and (constant := constant_channels(moments[1])):
                options.report(f"{path}: constant in all images: {constant}; std is 1 for it in {manifest.FILE}")
            splits[split] = _with_files(out, split, images, record)
            done = {name: splits[name] for name in source.splits if name in splits}
            result = _manifest(name, entry, source.classes, done, roles, moments, options.encoding)
            manifest.save(out, result)
        if unfit:
            if is_new and not any(out.iterdir()):
                out.rmdir()
            raise refusal(unfit)
    for line in _repeated(source.splits, digests, roles):
        options.report(f"--root {root}: {line}")
    return result


def _with_files(out: Path, split: str, images: Images, record: SplitRecord) -> SplitRecord:
    """The record with the SHA-256 of the list of the split's files, which is written where it is not there."""
    names = images.files()
    if names is None:
        return record
    content = file_names.text(name for name in names if printable(name) not in record.skipped)
    path = file_names.path_of(out, split)
    if not path.is_file() or path.read_bytes() != content.encode():
        write_text(path, content)
    return record.model_copy(update={"files": hashlib.sha256(content.encode()).hexdigest()})


def usage(out: Path, converted: Manifest) -> str:
    """What `convert` says at its end: the keys by which a config takes the data set, and a command where one fits."""
    splits = ", ".join(f"{split} ({record.count} images)" for split, record in converted.splits.items())
    pixels = converted.encoding.pixels
    reader = [] if pixels.is_rgb else ["data.reader=arrays"]
    keys = shlex.join([f"data.root={out}", f"data.name={converted.name}", *reader])
    lines = [f"{out}: done: {splits}; use it with {keys}"]
    if converted.name not in CATALOG:
        words = [f"run_dir=runs/{converted.name}"]
        if not pixels.is_rgb:
            words += steps_of_colour(config.load(CONFIG_FOR_PHOTOS, [f"data.root={out}"]).views.groups)
        run = shlex.join(words)
        count = converted.splits[converted.pretraining].count
        fewer = "" if count >= PHOTOS_BATCH_SIZE else f" optim.batch_size={1 << (count.bit_length() - 1)}"
        lines.append(f"ssl-dist train {CONFIG_FOR_PHOTOS} {keys} {run}{fewer}")
    return "\n".join(lines)


def _repeated(splits: dict[str, Images], digests: dict[str, np.ndarray], roles: SplitRoles) -> Iterator[str]:
    """A line for every split that has an image in two classes, and for one to train on that has images of the one that
    is evaluated; digests: of the splits that were read, by image. Equal are those of which every byte is."""
    for split, own in digests.items():
        unique, inverse = np.unique(own, return_inverse=True)
        lowest, highest = np.full(len(unique), np.iinfo(np.int64).max), np.full(len(unique), -1)
        np.minimum.at(lowest, inverse, splits[split].labels)
        np.maximum.at(highest, inverse, splits[split].labels)
        twice = np.flatnonzero((own != 0) & (lowest < highest)[inverse])
        if len(twice):
            first = splits[split].describe(int(twice[0]))
            yield f"{split}: {len(twice)} images stand in several classes, {first} for one; leave each in its own"
    tested = digests.get(roles.evaluation)
    for split in dict.fromkeys((roles.pretraining, roles.training)):
        if tested is not None and split in digests and split != roles.evaluation:
            both = np.flatnonzero((tested != 0) & np.isin(tested, digests[split]))
            if len(both):
                number, first = f"{len(both)} of its {len(tested)}", splits[roles.evaluation].describe(int(both[0]))
                yield f"{roles.evaluation}: {number} images are in {split}, too, {first} for one; remove those there"


def _bits_of_first(images: Images, channels: int) -> int:
    """Bits of a channel of the first image that can be read."""
    for load in itertools.chain.from_iterable(images.loaders(1)):
        try:
            item = load()
            return 8 * (read_channels(item, channels, pixel_limit()) if isinstance(item, bytes) else item).itemsize
        except (UnfitImage, *UNREADABLE):
            continue
    return 8  # what is wrong with each is said where they are converted


def _source(
    dataset: str,
    root: str | Path | None,
    out: Path,
    name: str,
    unlabeled: bool,
    image_key: str | None,
    label_key: str | None,
    extensions: tuple[str, ...],
) -> Source:
    """The images. Raises `UserError` also for classes that no dataset.json can name, before anything is written."""
    try:
        with refuse_unreadable(f"--root {root}", "make it readable"):
            source = open_source(
                dataset, Path(root) if root is not None else None, out, unlabeled, image_key, label_key, extensions
            )
    except WithoutClass as error:
        words = ["ssl-dist", "convert", dataset, "--root", str(root), "--unlabeled", "--out", str(out), "--name", name]
        command = shlex.join(words if dataset == "folder" else words[:-2])
        raise UserError(f"{error}; take all as one unlabeled split: `{command}`") from None
    except (NoImages, NoShards):
        assert root is not None  # there is a folder that holds none
        there = other_source(Path(root))
        if there is None or there[1] == dataset or (there[1] == "folder" and dataset not in SHARDS):
            raise
        options = ["--unlabeled"] if unlabeled else []
        words = ["convert", there[1], "--root", str(root), *options, "--out", str(out), "--name", name]
        raise UserError(f"--root {root}: {there[0]}: `{shlex.join(['ssl-dist', *words])}`") from None
    for name in source.classes:
        try:
            name.encode()
        except UnicodeEncodeError:  # half characters stand for bytes of a folder's name that are no UTF-8
            raise UserError(
                f"--root {root}: the name of class {os.fsencode(name)!r} is not UTF-8; rename its folder in every split"
            ) from None
    return source


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
    """The data set's name and its entry in the catalog, or that of images of one's own."""
    if dataset not in OWN_SOURCES:
        if dataset not in CATALOG:
            names = [*CATALOG, *OWN_SOURCES]
            hint = did_you_mean(dataset, names).rstrip() or f"known are {', '.join(names)}"
            raise UserError(f"convert {dataset}: no such data set; {hint} (folder: any folder of images)")
        if name not in (None, dataset):
            raise UserError(f"--name {name}: only {', '.join(OWN_SOURCES)} take a name; leave it out")
        return dataset, CATALOG[dataset]
    if root is None:
        raise UserError(f"convert {dataset}: --root must name the folder with the images")
    if name is None:
        name = default_name(Path(root))
        if not _is_dataset_name(name):
            name = _dataset_name(name)
    elif not _is_dataset_name(name):
        raise UserError(
            f"--name {quoted(name)}: no data.name (letters, digits, _ . and -); give --name {_dataset_name(name)}"
        )
    return name, CATALOG.get(name, OWN_SOURCES[dataset])


def _dataset_name(name: str) -> str:
    """The nearest name that a data set may have."""
    return re.sub(r"[^a-zA-Z0-9_.-]+", "_", name).lstrip("_.-") or "photos"


def _is_dataset_name(name: str) -> bool:
    try:
        TypeAdapter(DatasetName).validate_python(name)
    except ValidationError:
        return False
    return True


def _encoding(entry: Entry, max_side: int | None, ignore_orientation: bool, channels: int | None) -> Encoding:
    if max_side is not None and not 1 <= max_side <= MAX_SIDE:
        raise UserError(f"--max-side {max_side}: must be 1..{MAX_SIDE} pixels")
    max_side = max_side or entry.max_side
    if channels is not None:
        if not 1 <= channels <= MAX_CHANNELS:
            raise UserError(f"--channels {channels}: must be 1..{MAX_CHANNELS}")
        return Encoding(raw_side=max_side, max_side=max_side, jpeg_quality=JPEG_QUALITY, channels=channels)
    return Encoding(
        raw_side=min(entry.raw_side, max_side),
        max_side=max_side,
        jpeg_quality=JPEG_QUALITY,
        orientation="ignored" if ignore_orientation else entry.orientation,
    )


def _previous_manifest(out: Path, name: str, options: Options) -> Manifest | None:
    """The manifest of an earlier conversion into `out`. Raises `UserError` for another data set's, which is kept."""
    if not (out / manifest.FILE).exists():
        return None
    try:
        previous = manifest.load(out)
    except UserError as error:
        options.report(f"{error}; doing so")
        return None
    if previous.name != name:
        raise UserError(f"--out {out}: holds the data set {previous.name!r}; choose another folder for {name!r}")
    if any(record.tables is None for record in previous.splits.values()):
        previous = previous.model_copy(update={"splits": _with_tables(out, previous.splits)})
        with refuse_unwritable(f"--out {out}", "make it writable or choose another folder"):
            manifest.save(out, previous)
    return previous


def _with_tables(out: Path, splits: dict[str, SplitRecord]) -> dict[str, SplitRecord]:
    """Records of before there was `tables`, with it: so a new file can not pass for the one that they tell of."""
    bound = dict(splits)
    for split, record in splits.items():
        try:
            beton = Beton(out / f"{split}.beton")
        except UserError:  # there is none that belongs to the record; the comparison with the source says so
            continue
        if not manifest.difference(beton, record):
            bound[split] = record.model_copy(update={"tables": beton.tables_sha256})
    return bound
