"""The ids of images by their names at the source: for lists of others, which name files."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from ssl_dist.convert.images import Images
from ssl_dist.convert.sources import open_source
from ssl_dist.errors import UserError


def images_of(root: Path, split: str, title: str) -> Images:
    """A split's images in an image folder, in the order in which `convert` reads them, that of torchvision's
    ImageFolder: an image's id is its place, where `convert` left none out. title: what gave the split, for an error.
    Raises `UserError` when the folder has no such split."""
    splits = open_source("folder", root).splits
    if split not in splits:
        raise UserError(f"{title} {split}: {root} has {', '.join(splits)}")
    return splits[split]


class Places:
    """Places of images among `names` by their file names, with or without folders before and an extension behind."""

    def __init__(self, names: Sequence[str]):
        self._by_stem: dict[str, list[tuple[int, PurePosixPath]]] = defaultdict(list)
        for number, name in enumerate(names):
            path = PurePosixPath(name)
            self._by_stem[path.stem].append((number, path))

    def named(self, name: str) -> list[int]:
        """The places of all images that `name` may mean: what stands behind its last dot may be an extension or not.
        Those of the very name come alone."""
        path = PurePosixPath(name)
        folders = path.parent.parts
        hits = [
            (number, other)
            for stem in dict.fromkeys((path.stem, path.name))
            for number, other in self._by_stem.get(stem, [])
            if not folders or other.parent.parts[-len(folders) :] == folders
        ]
        exact = [number for number, other in hits if other.name == path.name]
        return exact or [number for number, _ in hits]

    def of(self, name: str, where: str) -> int:
        """The place of the image that `name` means. Raises `UserError`, which begins with `where`, when no image has
        the name, or two have."""
        hits = self.named(name)
        if len(hits) != 1:
            several = f"{len(hits)} images have this name, give its folder and extension too"
            raise UserError(f"{where}: {name!r}: {several if hits else 'no image has this name'}")
        return hits[0]
