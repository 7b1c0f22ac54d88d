"""The ids of images that a list names, as a file for `data.subset`: lists of 1 % and 10 % of ImageNet, for example.

    python tools/list_ids.py 1percent.txt --root imagenet --split train --out one-percent.txt
    ssl-dist evaluate RUN finetune finetune.recipe=sfrik_1 data.subset=one-percent.txt

These two are imagenet_subsets/1percent.txt and 10percent.txt in github.com/google-research/simclr.

A line names one image: its file name, with or without folders before it and an extension behind. ROOT is the folder
that `ssl-dist convert` was given; an id is the place of an image in the order in which convert reads them.
"""

import argparse
import sys
from pathlib import Path

from ssl_dist import outcome
from ssl_dist.convert.listed import Places, images_of
from ssl_dist.errors import refuse_unreadable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("list", type=Path, help="text file, an image a line")
    parser.add_argument("--root", type=Path, required=True, help="the image folder that was converted")
    parser.add_argument("--split", default="train")
    parser.add_argument("--out", type=Path, required=True, help="file to write, an id a line")
    arguments = parser.parse_args()
    ids = ids_of(arguments.list, arguments.root, arguments.split)
    arguments.out.write_text("".join(f"{i}\n" for i in ids))
    print(f"{arguments.out}: {len(ids)} ids")


def ids_of(listed: Path, root: Path, split: str) -> list[int]:
    """Ids, ascending, of the images that a file names. Raises `UserError` for a name that no image has, or two have."""
    places = Places(images_of(root, split, "--split").names)
    with refuse_unreadable(listed):
        lines = listed.read_text(encoding="utf-8").splitlines()
    named = ((number, line.strip()) for number, line in enumerate(lines, 1) if line.strip())
    return sorted({places.of(name, f"{listed} line {number}") for number, name in named})


if __name__ == "__main__":
    sys.exit(outcome.of_program(main))
