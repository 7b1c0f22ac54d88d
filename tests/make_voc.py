"""Small folders in VOC's format: coloured shapes of four of its classes on grey noise, with boxes and masks."""

import numpy as np
from PIL import Image

from ssl_dist.voc.data import CLASSES, VOID

# class -> colour and shape
LOOKS = {"bird": ((220, 40, 40), "box"), "bus": ((40, 60, 230), "box"), "cat": ((30, 200, 60), "disc"),
         "sofa": ((230, 220, 50), "disc")}  # fmt: skip


def annotation(objects, width, height):
    """The XML text. objects: (name, (xmin, ymin, xmax, ymax) counted from 1, difficult)."""
    parts = [f"<annotation><folder>VOC</folder><size><width>{width}</width><height>{height}</height></size>"]
    for name, box, difficult in objects:
        corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
        part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
        parts.append(
            f"<object><name>{name}</name><truncated>0</truncated><difficult>{int(difficult)}</difficult>"
            f"<bndbox>{corners}</bndbox>{part}</object>"
        )
    return "\n".join([*parts, "</annotation>\n"])


def draw(rng, names, width, height, marks_difficult):
    """Pixels, mask and objects of one image; no two shapes overlap (each has a column of its own)."""
    pixels = rng.integers(90, 130, (height, width, 3), np.uint8)
    mask = np.zeros((height, width), np.uint8)
    objects = []
    column = width // len(names)
    for place, name in enumerate(names):
        w, h = int(rng.integers(column // 2, column - 2)), int(rng.integers(height // 3, height * 2 // 3))
        x, y = place * column + int(rng.integers(1, column - w)), int(rng.integers(1, height - h))
        colour, shape = LOOKS[name]
        ys, xs = np.mgrid[:height, :width]
        inside = (xs >= x) & (xs < x + w) & (ys >= y) & (ys < y + h)
        if shape == "disc":
            inside &= ((xs - x - w / 2 + 0.5) / (w / 2)) ** 2 + ((ys - y - h / 2 + 0.5) / (h / 2)) ** 2 <= 1
        pixels[inside] = colour
        rim = inside & ~(
            np.roll(inside, 1, 0) & np.roll(inside, -1, 0) & np.roll(inside, 1, 1) & np.roll(inside, -1, 1)
        )
        mask[inside], mask[rim] = CLASSES.index(name) + 1, VOID
        objects.append((name, (x + 1, y + 1, x + w, y + h), marks_difficult and place > 0))
    return pixels, mask, objects


def voc_folder(root, splits=(("trainval", 12), ("test", 8)), size=(96, 72), seed=0):
    """ROOT in VOC's format; every image has one or two of the four classes, in every sixth the second is difficult.

    The splits stand in ImageSets/Main and in ImageSets/Segmentation. Returns the root."""
    rng = np.random.default_rng(seed)
    for folder in ("JPEGImages", "Annotations", "SegmentationClass", "ImageSets/Main", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    names, number = list(LOOKS), 0
    for split, count in splits:
        ids, labels = [], []
        for i in range(count):
            chosen = [names[i % 4]] + ([names[(i + 1 + i // 4) % 4]] if i % 2 and i // 4 % 3 < 3 else [])
            chosen = list(dict.fromkeys(chosen))
            width, height = size if i % 3 else size[::-1]
            pixels, mask, objects = draw(rng, chosen, width, height, i % 6 == 5)
            number += 1
            id = f"{seed:02d}{number:04d}"
            Image.fromarray(pixels).save(root / "JPEGImages" / f"{id}.jpg", quality=95)
            picture = Image.fromarray(mask, "P")
            picture.putpalette([(13 * c) % 256 for c in range(768)])
            picture.save(root / "SegmentationClass" / f"{id}.png")
            (root / "Annotations" / f"{id}.xml").write_text(annotation(objects, width, height))
            ids.append(id)
            labels.append({name: 0 if all(d for n, _, d in objects if n == name) else 1 for name, _, _ in objects})
        lines = "".join(f"{id}\n" for id in ids)
        for kind in ("Main", "Segmentation"):
            (root / "ImageSets" / kind / f"{split}.txt").write_text(lines)
        for name in CLASSES:
            rows = (f"{id} {label.get(name, -1):2d}\n" for id, label in zip(ids, labels, strict=True))
            (root / "ImageSets" / "Main" / f"{name}_{split}.txt").write_text("".join(rows))
    return root
