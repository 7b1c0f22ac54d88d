"""Small image folders of every kind of picture that data sets contain."""

import io
import pickle
import struct
import zlib

import numpy as np
import tifffile
from PIL import Image

TALL, WIDE = (150, 70), (90, 200)  # height, width


def picture(height, width, seed=0):
    """A colourful picture that a JPEG keeps well, uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 4, 3), np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(path, **options)
    return path


def jpeg(image, **options):
    """The bytes of a JPEG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", **options)
    return file.getvalue()


def with_noise_before_marker(data):
    """A JPEG that libjpeg reads and warns of: extraneous bytes before the end marker."""
    assert data.endswith(b"\xff\xd9")
    return data[:-2] + b"\x12\x34\x56" + b"\xff\xd9"


def odd_folder(root):
    """train and val of two classes with pictures of all kinds and sizes. Returns the root."""
    tall, wide = picture(*TALL, 1), picture(*WIDE, 2)
    train = root / "train"
    save(train / "cat" / "a.jpg", tall, quality=90)
    save(train / "cat" / "b.JPEG", wide, quality=80, progressive=True)
    save(train / "cat" / "c.png", Image.fromarray(tall).convert("RGBA"))
    save(train / "cat" / "d.png", Image.fromarray(wide).convert("P"))
    save(train / "cat" / "deep" / "e.bmp", picture(65, 65, 3))
    save(train / "dog" / "f.jpg", Image.fromarray(tall).convert("L"))
    save(train / "dog" / "g.jpg", Image.fromarray(wide).convert("CMYK"))
    save(train / "dog" / "h.png", picture(1, 1, 4))
    save(train / "dog" / "i.jpg", picture(1, 300, 5))
    save(train / "dog" / "j.webp", picture(33, 64, 6), lossless=True)
    save(train / "dog" / "k.png", Image.fromarray(picture(80, 81, 7)).convert("1"))
    (train / "dog" / "notes.txt").write_text("no image")
    save(root / "val" / "cat" / "a.jpg", picture(100, 100, 8))
    save(root / "val" / "dog" / "b.jpg", picture(31, 64, 9))
    return root


def simple_folder(root, per_class=6, splits=("train", "test"), size=(12, 10)):
    """PNG pictures of one size in two classes of every split."""
    for s, split in enumerate(splits):
        for c, name in enumerate(("blue", "red")):
            for i in range(per_class):
                save(root / split / name / f"{i:03d}.png", picture(*size, seed=100 * s + 10 * c + i))
    return root


def tiny_imagenet(root):
    """The layout of tiny-imagenet-200 with three classes; val's order of names is not that of its labels."""
    names = ["n03", "n01", "n02"]
    for c, name in enumerate(names):
        for i in range(2):
            save(root / "train" / name / "images" / f"{name}_{i}.JPEG", picture(64, 64, 10 * c + i))
        (root / "train" / name / f"{name}_boxes.txt").write_text("box")
    lines = []
    for i in range(12):
        save(root / "val" / "images" / f"val_{i}.JPEG", picture(64, 64, 50 + i))
        lines.append(f"val_{i}.JPEG\t{names[i % 3]}\t0\t0\t62\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    save(root / "test" / "images" / "test_0.JPEG", picture(64, 64, 99))
    return root


def cifar_files(root, hundred=False, per_file=4):
    """The pickled batches of CIFAR-10 or CIFAR-100 with random pictures; returns pixels and labels of train and test.

    Labels: for CIFAR-100 (fine, coarse)."""
    rng = np.random.default_rng(0)
    folder = root / ("cifar-100-python" if hundred else "cifar-10-batches-py")
    folder.mkdir(parents=True)
    files = {"train": ["train"], "test": ["test"]}
    if not hundred:
        files = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
    splits = {}
    for split, names in files.items():
        pixels, labels = [], []
        for name in names:
            planes = rng.integers(0, 256, (per_file, 3, 32, 32), np.uint8)
            fine, coarse = (rng.integers(0, n, per_file).tolist() for n in (100 if hundred else 10, 20))
            entry = {"data": planes.reshape(per_file, -1)}
            entry |= {"fine_labels": fine, "coarse_labels": coarse} if hundred else {"labels": fine}
            (folder / name).write_bytes(pickle.dumps(entry))
            pixels.append(planes.transpose(0, 2, 3, 1))
            labels += list(zip(fine, coarse, strict=True)) if hundred else fine
        splits[split] = np.concatenate(pixels), labels
    meta = {"label_names": [f"class{i}" for i in range(10)]}
    if hundred:
        meta = {"fine_label_names": [f"f{i}" for i in range(100)], "coarse_label_names": [f"c{i}" for i in range(20)]}
    (folder / ("meta" if hundred else "batches.meta")).write_bytes(pickle.dumps(meta))
    return splits


def stl10_files(root):
    """The binary files of STL-10; returns pixels uint8 [N, 96, 96, 3] of each split and the labels (from 0)."""
    rng = np.random.default_rng(1)
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    splits = {}
    for split, count in (("unlabeled", 5), ("train", 3), ("test", 2)):
        pixels = rng.integers(0, 256, (count, 96, 96, 3), np.uint8)
        pixels.transpose(0, 3, 2, 1).tofile(folder / f"{split}_X.bin")
        labels = rng.integers(0, 10, count)
        if split != "unlabeled":
            (labels + 1).astype(np.uint8).tofile(folder / f"{split}_y.bin")
        splits[split] = pixels, labels
    (folder / "class_names.txt").write_text("\n".join(f"class{i}" for i in range(10)))
    return splits


def png16(pixels):
    """A PNG file of uint16 [H, W] or [H, W, C], which Pillow writes of gray only."""
    height, width = pixels.shape[:2]
    color = {1: 0, 2: 4, 3: 2, 4: 6}[pixels[0, 0].size]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, color, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    written = (struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


def tiff(pixels, **options):
    """A TIFF file as tifffile writes it."""
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, **options)
    return file.getvalue()
