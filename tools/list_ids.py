"""The ids of images that a list names, as a file for `data.subset`: lists of 1 % and 10 % of ImageNet, for example.

    python tools/list_ids.py 1percent.txt --root imagenet --split train --out one-percent.txt
    ssl-dist evaluate RUN finetune finetune.recipe=sfrik_1 data.subset=one-percent.txt

A line names one image: its file name, with or without folders before it and an extension behind. ROOT is the folder
that `ssl-dist convert` was given; an id is the place of an image in the order in which convert reads them.
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path, PurePosixPath

from ssl_dist.convert.sources import open_source
from ssl_dist.errors import UserError, refuse_unreadable


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("list", type=Path, help="text file, an image a line")
    parser.add_argument("--root", type=Path, required=True, help="the image folder that was converted")
    parser.add_argument("--split", default="train")
    parser.add_argument("--out", type=Path, required=True, help="file to write, an id a line")
    arguments = parser.parse_args()
    try:
        ids = ids_of(arguments.list, arguments.root, arguments.split)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    arguments.out.write_text("".join(f"{i}\n" for i in ids))
    print(f"{arguments.out}: {len(ids)} ids")
    return 0


def ids_of(listed: Path, root: Path, split: str) -> list[int]:
    """Ids, ascending, of the images that a file names. Raises `UserError` for a name that no image has, or two have."""
    splits = open_source("folder", root).splits
    if split not in splits:
        raise UserError(f"--split {split}: {root} has {', '.join(splits)}")
    by_stem = defaultdict(list)
    for number, path in enumerate(splits[split].names):
        by_stem[PurePosixPath(path).stem].append((number, PurePosixPath(path)))
    ids = set()
    with refuse_unreadable(listed):
        lines = listed.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name = PurePosixPath(line.strip())
        folders = name.parent.parts
        hits = [i for i, path in by_stem[name.stem] if not folders or path.parent.parts[-len(folders) :] == folders]
        if len(hits) != 1:
            what = "no image has this name" if not hits else f"{len(hits)} images have this name, give its folder too"
            raise UserError(f"{listed} line {number}: {line.strip()!r}: {what}")
        ids.add(hits[0])
    return sorted(ids)


if __name__ == "__main__":
    sys.exit(main())
