"""One walk through the folders of a source: its image files in a fixed order, and what was left out and why."""

import os
import stat
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from ssl_dist.errors import refuse_unreadable

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's
# Folders that systems and programs put beside one's own.
SYSTEM_FOLDERS = {
    "@eaDir", "@Recycle", "#recycle", "$RECYCLE.BIN", "__MACOSX", "lost+found", "System Volume Information",
}  # fmt: skip

HIDDEN = "hidden files and folders, and those that systems make"
OTHER_SUFFIX = f"files of other suffixes than {', '.join(EXTENSIONS)}"
PHONE_SUFFIXES = {".heic", ".heif"}  # of images that Pillow does not read
NO_TARGET = "links to nothing"
NO_FILE = "neither files nor folders"
INTO_SOURCE = "links to a folder that holds a split, or lies in one"
READ_ALREADY = "folders that were read under another name"
NO_SPLIT = "folders beside the splits"
STRAY = "images beside the splits"
EXAMPLES = 3  # names that a line gives; but every folder beside the splits is named


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name in SYSTEM_FOLDERS


class LeftOut:
    """What a walk passed over, by reason. Paths are relative to the source."""

    def __init__(self) -> None:
        self._paths: dict[str, dict[str, None]] = {}  # reason -> paths, each once, in order

    def add(self, reason: str, path: str) -> None:
        self._paths.setdefault(reason, {})[path] = None

    def below(self, folder: str) -> dict[str, list[str]]:
        """Reason -> what was left out of a folder, itself included."""
        prefix = "" if folder == os.curdir else f"{folder}{os.sep}"
        found = {
            reason: [path for path in paths if path == folder or path.startswith(prefix)]
            for reason, paths in self._paths.items()
        }
        return {reason: paths for reason, paths in found.items() if paths}

    def lines(self) -> list[str]:
        """A line a reason: how many, and the first names."""
        return [
            f"{_kinds(paths)}: {OTHER_SUFFIX}: {_examples(reason, paths)}"
            if reason == OTHER_SUFFIX
            else f"{reason} ({len(paths)}): {_examples(reason, paths)}"
            for reason, paths in self._paths.items()
        ]


def _examples(reason: str, paths: Collection[str]) -> str:
    number = len(paths) if reason == NO_SPLIT else EXAMPLES
    return ", ".join(list(paths)[:number]) + (", ..." if len(paths) > number else "")


def _kinds(paths: Collection[str]) -> str:
    """How many files of every suffix, the most frequent first, and for a phone's what makes images of them."""
    suffixes = Counter(os.path.splitext(path)[1].lower() or "no suffix" for path in paths)
    remedies = dict.fromkeys(PHONE_SUFFIXES, " (make JPEG of them first: `heif-convert A.heic A.jpg`)")
    remedies[".npy"] = " (--channels N reads arrays of images)"
    return ", ".join(f"{count} {suffix}{remedies.get(suffix, '')}" for suffix, count in suffixes.most_common())


class Walk:
    """A walk through one split. A folder is read once, whatever links lead to it; a link from inside into a split, its
    own or another, is not followed: its images would count twice, and under a wrong class.

    root: of the source; split: the folder of this split; splits: those of all splits; extensions: of image files. What
    is passed over goes to `left_out`. Every method raises `UserError` for a folder that can not be read.
    """

    def __init__(
        self,
        root: Path,
        split: Path,
        splits: Collection[Path],
        left_out: LeftOut,
        extensions: tuple[str, ...] = EXTENSIONS,
    ):
        self.root, self.left_out, self.extensions = root, left_out, extensions
        self._splits = [Path(os.path.realpath(folder)) for folder in splits]
        state = os.stat(split)
        self._visited = {(state.st_dev, state.st_ino)}

    def folders(self, folder: Path) -> tuple[list[str], list[str]]:
        """Names of the sub-folders that the walk enters, and of the image files of `folder`, both sorted."""
        folders, images = entries(self.root, folder, self.left_out, self.extensions)
        return [name for name in folders if self._enters(folder / name)], images

    def image_files(self, folder: Path) -> list[str]:
        """Image files below `folder`, relative to the root, in the order of torchvision's ImageFolder."""
        found: list[tuple[str, list[str]]] = []
        waiting = [folder]
        while waiting:
            here = waiting.pop()
            folders, images = self.folders(here)
            found.append((os.path.relpath(here, self.root), images))
            waiting += [here / name for name in reversed(folders)]
        return [os.path.normpath(os.path.join(path, name)) for path, names in sorted(found) for name in names]

    def passed_over(self, folder: Path) -> str:
        """What was left out of a folder, for a message about it; empty: nothing."""
        found = self.left_out.below(os.path.relpath(folder, self.root))
        words = [
            _kinds(paths) if reason == OTHER_SUFFIX else f"{reason} ({len(paths)})" for reason, paths in found.items()
        ]
        return f", but {', '.join(words)}" if words else ""

    def _enters(self, folder: Path) -> bool:
        """Whether a folder is to be read, now and no other time."""
        name = os.path.relpath(folder, self.root)
        if folder.is_symlink():
            target = Path(os.path.realpath(folder))
            if any(target.is_relative_to(split) or split.is_relative_to(target) for split in self._splits):
                self.left_out.add(INTO_SOURCE, name)
                return False
        with refuse_unreadable(folder, "make it readable or remove it"):
            state = os.stat(folder)
        if (state.st_dev, state.st_ino) in self._visited:
            self.left_out.add(READ_ALREADY, name)
            return False
        self._visited.add((state.st_dev, state.st_ino))
        return True


def entries(
    root: Path, folder: Path, left_out: LeftOut, extensions: tuple[str, ...] = EXTENSIONS
) -> tuple[list[str], list[str]]:
    """Names of the sub-folders and of the image files of `folder`, both sorted; all else goes to `left_out`. An image
    that is a link to nothing is among them: reading it will tell. Raises `UserError` for a folder that can not be
    read."""
    folders, images = [], []
    with refuse_unreadable(folder, "make it readable or remove it"), os.scandir(folder) as scan:
        for entry in sorted(scan, key=lambda entry: entry.name):
            mode = _mode(entry)
            looks_like_image = entry.name.lower().endswith(extensions)
            if is_hidden(entry.name):
                reason = HIDDEN
            elif stat.S_ISDIR(mode):
                folders.append(entry.name)
                continue
            elif looks_like_image and (mode == 0 or stat.S_ISREG(mode)):
                images.append(entry.name)
                continue
            elif mode == 0:
                reason = NO_TARGET
            else:
                reason = OTHER_SUFFIX if stat.S_ISREG(mode) else NO_FILE
            left_out.add(reason, os.path.relpath(os.path.join(folder, entry.name), root))
    return folders, images


def subfolders(root: Path, folder: Path) -> list[str]:
    """Names of the folders in `folder`, sorted, without those that a walk passes over by name."""
    return entries(root, folder, LeftOut())[0]


def _mode(entry: os.DirEntry[str]) -> int:
    """The type of what is there, links followed, as in `st_mode`; 0: a link to nothing, or round in a circle."""
    try:
        if not entry.is_symlink() and entry.is_file():
            return stat.S_IFREG  # known without another question to the disk
        return entry.stat().st_mode
    except PermissionError:
        raise
    except OSError:
        return 0
