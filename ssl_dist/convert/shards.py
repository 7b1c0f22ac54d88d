"""Sources in a few large files (shards): which files there are, and the split that each belongs to by its name."""

import glob
import itertools
import os
import re
import shlex
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ssl_dist.convert.walk import EXTENSIONS, HIDDEN, NO_SPLIT, LeftOut, is_hidden
from ssl_dist.errors import UserError, quoted, refuse_unreadable

# The words of the Hugging Face hub ("File names and splits" in its documentation), and those of a folder of images. A
# word stands between what are no letters: imagenet1k-train-0000.tar, data/validation-00000-of-00001.parquet, val/0.tar.
SPLIT_OF_WORD = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
    "unlabeled": "unlabeled", "unlabelled": "unlabeled", "unsupervised": "unlabeled",
}  # fmt: skip
ORDER = ("unlabeled", "train", "val", "test")
PART = re.compile(r"(?P<head>.*?)[-_.]?(?P<number>\d+)-of-(?P<total>\d+)(?P<tail>\D.*)?", re.DOTALL)
MAX_NUMBERS = 1_000_000  # that a range in a pattern may have
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
CLASS_NAMES = "classnames.txt"  # beside tars, as clip_benchmark has it: a name a line
OTHER_FILES = "files of other kinds"
LINKED_FOLDERS = "links to folders"
# Suffix of the files -> the source that reads them; what datasets saved is known by a file beside its .arrow.
SOURCE_OF = {".tar": "webdataset", ".parquet": "parquet"}
SAVED = ("dataset_dict.json", "state.json")


class NoShards(UserError):
    """None of the files that a source is made of is there."""


class Compression(NamedTuple):
    """suffixes: of tars; magic: how a file begins; unpack: what puts the tar in its place."""

    suffixes: tuple[str, ...]
    magic: bytes
    unpack: str


COMPRESSIONS = (
    Compression((".tar.gz", ".tgz"), b"\x1f\x8b", "gunzip"),
    Compression((".tar.bz2", ".tbz2", ".tbz"), b"BZh", "bunzip2"),
    Compression((".tar.xz", ".txz"), b"\xfd7zXZ\0", "unxz"),
    Compression((".tar.zst", ".tzst"), b"\x28\xb5\x2f\xfd", "unzstd --rm"),
    Compression((".tar.lz4",), b"\x04\x22\x4d\x18", "unlz4 --rm"),
)


@dataclass(frozen=True)
class Shards:
    """splits: split -> its files, sorted, relative to `folder`."""

    folder: Path
    splits: dict[str, list[str]]
    left_out: LeftOut


def find(root: Path, suffix: str, unlabeled: bool = False) -> Shards:
    """The files with a suffix below a folder, or those of a pattern with *, ?, [] or {000..127}, or one file.

    A file is of the split that the innermost folder with a word of `SPLIT_OF_WORD` names, else of the one that its name
    does; both may not name different ones. Where some have such a word, <split>-00000-of-00001 names a further split,
    and what is left is of none; where none has, all are the split train. unlabeled: all are the split unlabeled.

    Raises `NoShards`, and `UserError` for a name of two splits, a split in two folders, and parts that are missing.
    """
    folder, names, left_out, is_pattern = _files(root, suffix)
    if unlabeled:
        return Shards(folder, {"unlabeled": names}, left_out)
    if not is_pattern:
        _require_all_parts(folder, names)
    places = {name: _split_named(folder, name) for name in names}
    if not any(places.values()):
        return Shards(folder, {"train": names}, left_out)
    splits, homes = defaultdict[str, list[str]](list), defaultdict[str, set[str]](set)
    for name, place in places.items():
        if place is None and (part := PART.fullmatch(os.path.basename(name))) and part["head"]:
            place = part["head"], os.path.dirname(name)
        if place is None:
            left_out.add(NO_SPLIT.replace("folders", "files"), name)
            continue
        splits[place[0]].append(name)
        homes[place[0]].add(place[1])
    for split, several in homes.items():
        if len(several) > 1 and not is_pattern:
            first, second, *_ = sorted(several)
            raise UserError(
                f"--root {root}: the split {split} lies in {first or os.curdir}/ and in {second}/, as two data sets "
                f"would; name one, for example --root {folder / second}"
            )
    order = sorted(splits, key=lambda split: (ORDER.index(split) if split in ORDER else len(ORDER), split))
    return Shards(folder, {split: splits[split] for split in order}, left_out)


def default_name(root: Path) -> str:
    """What a source is called after: its folder, its file without suffixes, or the folder of a pattern."""
    if root.is_file():
        return root.name.split(".")[0]
    return (root if root.exists() else Path(*_fixed_parts(root))).resolve().name


def refuse_unfetched(path: Path, start: bytes) -> None:
    """Raises `UserError` for a file of which git has brought the pointer alone. start: its first bytes."""
    if start.startswith(LFS_POINTER):
        raise UserError(f"{path}: a pointer of git-lfs, not the file; fetch the files with `git lfs pull` there")


def refuse_compressed(path: Path, start: bytes = b"") -> None:
    """Raises `UserError` for a tar of which no image can be read alone, by its name or its first bytes; not where it
    lies unpacked beside."""
    by_content = next((kind for kind in COMPRESSIONS if start.startswith(kind.magic)), None)
    by_name, suffix = next(
        ((kind, end) for kind in COMPRESSIONS for end in kind.suffixes if path.name.lower().endswith(end)), (None, "")
    )
    kind = by_content or by_name
    if kind is None or (by_name and path.with_name(f"{path.name.removesuffix(suffix)}.tar").exists()):
        return
    name, renamed = shlex.quote(str(path)), shlex.quote(f"{path}{kind.suffixes[0].removeprefix('.tar')}")
    unpack = f"{kind.unpack} {name}" if by_name == kind else f"mv {name} {renamed} && {kind.unpack} {renamed}"
    raise UserError(f"{path}: a compressed tar, of which no image can be read alone; unpack it: `{unpack}`")


def other_source(root: Path) -> tuple[str, str] | None:
    """What lies below a folder, in words, and the source that reads it; None: nothing that is known."""
    if root.is_file():
        source = SOURCE_OF.get(root.suffix)
        return None if source is None else (f"is a {root.suffix} file", source)
    if any((root / name).is_file() for name in SAVED):
        return "holds a data set that datasets saved (save_to_disk)", "huggingface"
    left_out = LeftOut()
    names = list(_walk(root, left_out)) if root.is_dir() else []
    for suffix, source in SOURCE_OF.items():
        if number := sum(name.endswith(suffix) for name in names):
            return f"holds {number} {suffix} {'file' if number == 1 else 'files'}", source
    if number := sum(name.lower().endswith(EXTENSIONS) for name in names):
        return f"holds {number} image{'s' * (number > 1)}", "folder"
    return None


# ------------------------------------------------------------------------------------------------------------- files


def _files(root: Path, suffix: str) -> tuple[Path, list[str], LeftOut, bool]:
    """The folder, its files of the suffix, sorted, what else is there, and whether a pattern chose them."""
    left_out = LeftOut()
    if root.is_dir():
        names = list(_walk(root, left_out))
        found = [name for name in names if name.endswith(suffix)]
        for name in names:
            if suffix == ".tar":
                refuse_compressed(root / name)
            if not name.endswith(suffix) and name != CLASS_NAMES:
                left_out.add(OTHER_FILES, name)
        if not found:
            raise NoShards(f"--root {root}: holds no {suffix} file")
        return root, sorted(found), left_out, False
    if root.is_file():
        if suffix == ".tar":
            refuse_compressed(root)
        if root.suffix != suffix:
            raise NoShards(f"--root {root}: no {suffix} file")
        return root.parent, [root.name], left_out, True
    fixed = Path(*_fixed_parts(root))
    if fixed == root:
        raise NoShards(f"--root {root}: there is no such folder, file or pattern of files")
    paths = list[str]()
    for pattern in _alternatives(str(root)):
        found = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
        if not found:
            raise NoShards(f"--root {root}: {pattern}: there is no such file; fetch it, or name those that are there")
        paths += found
    names = sorted({os.path.relpath(path, fixed) for path in paths})
    for name in names:
        if not name.endswith(suffix) or not (fixed / name).is_file():
            raise NoShards(f"--root {root}: {fixed / name}: no {suffix} file; give a pattern of those alone")
    return fixed, names, left_out, True


def _walk(root: Path, left_out: LeftOut) -> Iterator[str]:
    """Files below a folder, relative to it."""

    def refuse(error: OSError) -> None:
        with refuse_unreadable(error.filename, "make it readable or remove it"):
            raise error

    for here, folders, files in os.walk(root, onerror=refuse):
        relative = os.path.relpath(here, root)
        for name in [*folders, *files]:
            if is_hidden(name):
                left_out.add(HIDDEN, os.path.normpath(os.path.join(relative, name)))
        for name in folders:
            if not is_hidden(name) and os.path.islink(os.path.join(here, name)):
                left_out.add(LINKED_FOLDERS, os.path.normpath(os.path.join(relative, name)))
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        yield from (os.path.normpath(os.path.join(relative, name)) for name in sorted(files) if not is_hidden(name))


def _fixed_parts(root: Path) -> Sequence[str]:
    """The folders of a pattern before the first that is none."""
    return tuple(itertools.takewhile(lambda part: not re.search(r"[*?\[{]", part), root.parts))


def _alternatives(pattern: str) -> list[str]:
    """A pattern without braces for each choice of {a,b} and of {000..127}, as shells and webdataset expand them."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", match[1]):
        low, high = int(numbers[1][:18]), int(numbers[2][:18])
        if not low <= high < low + MAX_NUMBERS:
            raise UserError(f"--root {quoted(pattern)}: {match[0]} must go up, by less than {MAX_NUMBERS:,} numbers")
        choices = [f"{number:0{len(numbers[1])}d}" for number in range(low, high + 1)]
    elif "," in match[1]:
        choices = match[1].split(",")
    else:
        raise UserError(f"--root {quoted(pattern)}: {match[0]} is neither {{000..127}} nor {{a,b}}; write it so")
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [alternative for choice in choices for alternative in _alternatives(f"{head}{choice}{tail}")]


def _require_all_parts(folder: Path, names: list[str]) -> None:
    """Raises `UserError` where not all of x-00000-of-00003.tar, x-00001-of-00003.tar, ... are there."""
    there, totals = defaultdict[tuple[str, str], set[int]](set), dict[str, str]()
    for name in names:
        if part := PART.fullmatch(name):
            there[part["head"], part["total"]].add(int(part["number"][:18]))
            if totals.setdefault(part["head"], part["total"]) != part["total"]:
                raise UserError(
                    f"{folder / name}: one of {part['total']}, beside those of {totals[part['head']]}: two versions of "
                    "one data set; remove the older files"
                )
    for (head, total), numbers in there.items():
        count = int(total[:18])
        if len(numbers) < count and numbers <= set(range(min(count, max(numbers) + 1))):
            missing = next(number for number in itertools.count() if number not in numbers)
            first = f"{head}-{missing:0{len(total)}d}-of-{total}"
            raise UserError(
                f"{folder}: {count - len(numbers)} of {count} files are missing, {first} the first; fetch them or take "
                f"those there are: --root '{folder / head}*'"
            )


def _split_named(folder: Path, name: str) -> tuple[str, str] | None:
    """(split, the folder that holds it) by the words of a file's path."""
    parts = name.split(os.sep)
    for depth in [*range(len(parts) - 2, -1, -1), len(parts) - 1]:
        named = _splits_in(parts[depth])
        if len(named) > 1:
            raise UserError(
                f"{folder / name}: {quoted(parts[depth])} names the splits {' and '.join(sorted(named))}; put the "
                "files of each split into a folder with its name"
            )
        if named:
            split, own = named.pop(), _splits_in(parts[-1])
            if own and split not in own:
                other = " and ".join(sorted(own))
                raise UserError(
                    f"{folder / name}: its folder {quoted(parts[depth])} names the split {split}, and its own name "
                    f"{other}; put it into a folder {min(own)}/, or if it is of {split}, rename it without that word"
                )
            return split, os.path.join(*parts[: depth + (depth < len(parts) - 1)], "").rstrip(os.sep)
    return None


def _splits_in(part: str) -> set[str]:
    """The splits that words of one part of a path name."""
    return {SPLIT_OF_WORD[word] for word in re.split(r"[^a-z]+", part.lower()) if word in SPLIT_OF_WORD}
