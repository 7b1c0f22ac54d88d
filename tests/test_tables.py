"""Images in parquet files and in what datasets saved: columns, labels, memory, and files that are damaged."""

import json
import os
import sys

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from ssl_dist.convert import shards
from ssl_dist.convert.sources import open_source
from ssl_dist.data.beton import Beton
from ssl_dist.data.readers import Dataset
from ssl_dist.errors import UserError
from tests import make_shards
from tests.conversions import refusal, run
from tests.make_images import jpeg, picture, save
from tests.test_webdataset import png

PHOTOS = [jpeg(picture(9, 9, i)) for i in range(6)]
HUB = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(path, columns, **options):
    """By pyarrow, without what datasets adds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.table(columns), path, **options)
    return path.parent


def opened(root, **options):
    return open_source("parquet", root, None, **options)


def labels(source, split="train"):
    return source.splits[split].labels.tolist()


def hub(images, names=None):
    """A column as the hub's Image."""
    names = names or [None] * len(images)
    return pa.array([{"bytes": data, "path": name} for data, name in zip(images, names, strict=True)], HUB)


# ----------------------------------------------------------------------------------------------------------- columns


@pytest.mark.parametrize(
    "image",
    [pa.array(PHOTOS), pa.array(PHOTOS, pa.large_binary()), hub(PHOTOS), hub(PHOTOS, [f"{i}.jpg" for i in range(6)])],
    ids=["binary", "large binary", "struct", "struct with names"],
)
@pytest.mark.parametrize(
    ("label", "classes", "numbers"),
    [
        (pa.array([0, 2, 2, 0, 2, 0]), ["0", "1", "2"], [0, 2, 2, 0, 2, 0]),
        (pa.array([0, 2, 2, 0, 2, 0], pa.uint8()), ["0", "1", "2"], [0, 2, 2, 0, 2, 0]),
        (pa.array(list("babbab")), ["a", "b"], [1, 0, 1, 1, 0, 1]),
        (pa.array(list("babbab"), pa.large_string()), ["a", "b"], [1, 0, 1, 1, 0, 1]),
        (pa.array(list("babbab")).dictionary_encode(), ["a", "b"], [1, 0, 1, 1, 0, 1]),
        (pa.array([1, None, 0, -1, 1, 0]), ["0", "1"], [1, -1, 0, -1, 1, 0]),
        (pa.array(["b", None, "a", "b", "b", "a"]), ["a", "b"], [1, -1, 0, 1, 1, 0]),
    ],
    ids=["int", "uint8", "text", "large text", "dictionary", "int with null", "text with null"],
)
def test_types_of_columns(tmp_path, image, label, classes, numbers):
    write(tmp_path / "train.parquet", {"id": pa.array(range(6)), "picture": image, "label": label}, row_group_size=4)
    source = opened(tmp_path)
    assert source.classes == classes and labels(source) == numbers
    loaded = [load() for part in source.splits["train"].loaders(3) for load in part]
    assert loaded == PHOTOS
    assert "columns that are not read (1): id" in source.left_out
    assert any("images have no label" in note for note in source.notes) == (-1 in numbers)


@pytest.mark.parametrize(
    ("columns", "options", "words"),
    [
        ({"image": pa.array(["a.jpg"])}, {}, "no column holds images as bytes; name the images' by --image-key; there"),
        ({"a": pa.array([b"x"]), "b": pa.array([b"y"])}, {}, "a, b hold bytes; name the images' by --image-key"),
        (
            {"a": pa.array([b"x"])},
            {"image_key": "b"},
            "--image-key 'b': no column of images as bytes; there are a (bin",
        ),
        ({"a": pa.array([b"x"])}, {"label_key": "b"}, "--label-key 'b': no such column; give another, or --unlabeled"),
        ({"a": pa.array([b"x"]), "label": pa.array([1.5])}, {}, "'label': is of type double, no whole number and no"),
        ({"a": pa.array([b"x"]), "label": pa.array([[1]])}, {}, "'label': is of type list<"),
        ({"a": pa.array([b"x"]), "label": pa.array([True])}, {}, "'label': is of type bool"),
        ({"a": pa.array([b"x"]), "label": pa.array(["a\nb"])}, {}, "row 0: the label 'a\\nb' is no name"),
        ({"a": pa.array([b"x"]), "label": pa.array([-5])}, {}, "the label -5: at most 100000 classes"),
        ({"a": pa.array([b"x"]), "label": pa.array([2**40])}, {}, "the label 1099511627776: at most 100000 classes"),
    ],
)
def test_columns_that_do_not_fit(tmp_path, columns, options, words):
    write(tmp_path / "in" / "train.parquet", columns)
    message = refusal("parquet", tmp_path / "in", tmp_path / "out", **options)
    assert words in message and not (tmp_path / "out").exists()


def test_names_of_columns_that_are_odd(tmp_path):
    table = pa.Table.from_arrays([pa.array(PHOTOS), pa.array(PHOTOS)], names=["image", "image"])
    (tmp_path / "in").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "in" / "train.parquet")
    message = refusal("parquet", tmp_path / "in", tmp_path / "out")
    assert "train.parquet: two columns have the name 'image'" in message
    write(tmp_path / "dots" / "train.parquet", {"image": pa.array(PHOTOS), "image.path": pa.array([0] * 6)})
    source = opened(tmp_path / "dots", label_key="image.path")
    assert labels(source) == [0] * 6 and next(source.splits["train"].loaders(1))[0]() == PHOTOS[0]
    root = make_shards.saved(tmp_path / "saved", {"train": [(PHOTOS[0], "jpg", 0)] * 2})
    for path in root.glob("*/*.arrow"):
        path.write_bytes(path.read_bytes().replace(b"label", b"lab\xa0l"))
    assert "can not be read (" in refusal("huggingface", root, tmp_path / "out")


def test_which_of_several_columns(tmp_path):
    """`image` before others, and with --image-key any; `label` before a ClassLabel, and of several of these one."""
    rows = {"mask": hub(PHOTOS[:2]), "image": hub(PHOTOS[2:4]), "label": pa.array([0, 1]), "x": pa.array(["a", "b"])}
    write(tmp_path / "train.parquet", rows)
    for key, expected in ((None, PHOTOS[2:4]), ("mask", PHOTOS[:2])):
        [part] = opened(tmp_path, image_key=key).splits["train"].loaders(9)
        assert [load() for load in part] == expected
    assert opened(tmp_path, label_key="x").classes == ["a", "b"]
    assert opened(tmp_path, unlabeled=True).splits["unlabeled"].labels.tolist() == [-1, -1]
    features = datasets.Features(
        img=datasets.Image(), fine=datasets.ClassLabel(names=list("abc")), coarse=datasets.ClassLabel(names=["x", "y"])
    )
    rows = [{"img": {"bytes": data, "path": None}, "fine": 2, "coarse": 1} for data in PHOTOS]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "cifar" / "train.parquet")
    message = refusal("parquet", tmp_path / "cifar", tmp_path / "out")
    assert "fine, coarse hold labels; name those to take by --label-key" in message
    source = opened(tmp_path / "cifar", label_key="fine")
    assert source.classes == ["a", "b", "c"] and labels(source) == [2] * 6
    without = datasets.Dataset.from_list(rows, features=features).remove_columns("coarse")
    without.to_parquet(tmp_path / "cifar" / "train.parquet")
    assert opened(tmp_path / "cifar").classes == ["a", "b", "c"]


@pytest.mark.parametrize("kind", ["parquet", "huggingface"])
def test_another_column_of_the_same_rows_is_converted(tmp_path, kind, capsys):
    """Rows without a path have the same names in both columns, and the file is the same."""
    images = [save(tmp_path / f"{i}.png", picture(8, 8, i)).read_bytes() for i in range(2)]
    rows = {"image": pa.array(images), "mask": pa.array(images[::-1])}
    if kind == "parquet":
        root = write(tmp_path / "in" / "train.parquet", rows)
    else:
        root = tmp_path / "in"
        datasets.Dataset(pa.table(rows)).save_to_disk(root)
    for key in ("image", "mask", "mask"):
        capsys.readouterr()
        run(kind, root, tmp_path / "out", image_key=key, progress=True)
        first = picture(8, 8, 0 if key == "image" else 1)
        assert Beton(tmp_path / "out" / "unlabeled.beton").sample(0).tobytes() == first.tobytes()
    assert "complete, kept: names, sizes and times" in capsys.readouterr().err


def test_a_class_label_without_a_name(tmp_path):
    meta = {"info": {"features": {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["a", "b"]}}}}

    def message(numbers, names):
        meta["info"]["features"]["label"]["names"] = names
        table = pa.table({"image": hub(PHOTOS[:2]), "label": pa.array(numbers)})
        (tmp_path / "in").mkdir(exist_ok=True)
        pyarrow.parquet.write_table(
            table.replace_schema_metadata({"huggingface": json.dumps(meta)}), tmp_path / "in" / "train.parquet"
        )
        return refusal("parquet", tmp_path / "in", tmp_path / "out")

    assert "the label 2: there are 2 class names" in message([0, 2], ["a", "b"])
    assert "the class 'a' of label stands twice" in message([0, 1], ["a", "a"])
    assert "the class names of label are [1, 2], no list of text" in message([0, 1], [1, 2])


def test_without_labels(tmp_path, capsys):
    write(tmp_path / "in" / "data.parquet", {"image": pa.array(PHOTOS), "class": pa.array(range(6))})
    converted = run("parquet", tmp_path / "in", tmp_path / "out", progress=True)
    assert list(converted.splits) == ["unlabeled"]
    said = capsys.readouterr().err
    assert "no column is known to hold labels; --label-key names one" in said and "not read (1): class" in said
    assert run("parquet", tmp_path / "in", tmp_path / "out", label_key="class").classes == list("012345")


def test_files_of_one_set_must_be_alike(tmp_path):
    write(tmp_path / "in" / "train-0.parquet", {"image": pa.array(PHOTOS), "label": pa.array(range(6))})
    write(tmp_path / "in" / "train-1.parquet", {"image": hub(PHOTOS), "label": pa.array(range(6))})
    message = refusal("parquet", tmp_path / "in", tmp_path / "out")
    assert "train-1.parquet: types or class names of image and label are not those of train-0.parquet" in message
    write(tmp_path / "in" / "train-1.parquet", {"label": pa.array(range(6))})
    assert "train-1.parquet: --image-key 'image': no column" in refusal("parquet", tmp_path / "in", tmp_path / "out")


# -------------------------------------------------------------------------------------------------------------- rows


def test_rows_without_bytes(tmp_path):
    """Nothing, a name, an address; and a path to a file, which is read and whose change is noticed."""
    save(tmp_path / "photos" / "a.png", picture(9, 9, 7))
    paths = [None, "x.jpg", "https://x.org/a.jpg", str(tmp_path / "photos" / "a.png"), "../photos/a.png"]
    rows = {"image": hub([None] * 5 + PHOTOS[:1], [*paths, None]), "label": pa.array([0] * 6)}
    write(tmp_path / "in" / "train.parquet", rows)
    message = refusal("parquet", tmp_path / "in", tmp_path / "out")
    for words in (
        "holds no image)",
        "no image, only the name 'x.jpg')",
        "holds an address, 'https://x.org/a.jpg', and",
    ):
        assert words in message
    record = run("parquet", tmp_path / "in", tmp_path / "out", skip_damaged=True).splits["train"]
    assert list(record.skipped) == [f"train.parquet/{row}" for row in ("0", "1/x.jpg", "2/a.jpg")]
    file = Beton(tmp_path / "out" / "train.beton")
    assert file.count == 3 and file.sample(0).tobytes() == file.sample(1).tobytes() == picture(9, 9, 7).tobytes()
    save(tmp_path / "photos" / "a.png", picture(9, 9, 8))
    again = run("parquet", tmp_path / "in", tmp_path / "out", skip_damaged=True).splits["train"]
    assert again.sha256 != record.sha256
    write(tmp_path / "in" / "train.parquet", {"image": pa.array([*PHOTOS[:1], None]), "label": pa.array([0, 0])})
    assert "train.parquet/1: can not be read (the row holds no image)" in refusal(
        "parquet", tmp_path / "in", tmp_path / "out"
    )


def test_rows_come_in_order_whatever_the_groups(tmp_path):
    pixels = [png(np.full((8, 8, 3), i, np.uint8)) for i in range(100)]
    for part, (low, high, group) in enumerate(((0, 50, 7), (50, 50, 1), (50, 51, 1), (51, 100, 200))):
        columns = {"image": pa.array(pixels[low:high], pa.binary()), "label": pa.array(range(low, high), pa.int64())}
        write(tmp_path / "in" / f"t-{part}.parquet", columns, row_group_size=group)
    run("parquet", tmp_path / "in", tmp_path / "out")
    file = Beton(tmp_path / "out" / "train.beton")
    assert [int(file.sample(i)[0]) for i in range(100)] == file.labels.tolist() == list(range(100))
    names = Dataset(tmp_path / "out").files("train")
    assert [names[i] for i in (49, 50, 51)] == ["t-0.parquet/49", "t-2.parquet/0", "t-3.parquet/0"]


def test_memory_does_not_grow_with_a_row_group(tmp_path):
    """48 MB of pictures in one row group; Arrow never holds a quarter of them, for it has pages of 16 rows."""
    rng, rows = np.random.default_rng(0), 400
    data = [PHOTOS[0] + rng.bytes(120_000) for _ in range(rows)]
    columns = {"image": pa.array(data), "label": pa.array([0] * rows)}
    write(tmp_path / "train.parquet", columns, row_group_size=rows, write_batch_size=16, use_dictionary=False)
    assert pyarrow.parquet.ParquetFile(tmp_path / "train.parquet").num_row_groups == 1
    del columns
    before, held = pa.total_allocated_bytes(), []
    for i, part in enumerate(opened(tmp_path).splits["train"].loaders(32)):
        assert [load() for load in part] == data[32 * i : 32 * i + len(part)]
        held.append(pa.total_allocated_bytes() - before)
    assert len(held) == 13 and 1e6 < max(held) < 12e6


# ----------------------------------------------------------------------------------------------- what datasets saved


def test_one_dataset_is_the_split_train(tmp_path):
    table = make_shards.table({"train": [(data, "jpg", i % 2) for i, data in enumerate(PHOTOS)]})["train"]
    table.save_to_disk(tmp_path / "in" / "photos")
    assert "; one lies in " in refusal("huggingface", tmp_path / "in", tmp_path / "out")
    converted = run("huggingface", tmp_path / "in" / "photos", tmp_path / "out")
    assert (converted.name, list(converted.splits), converted.classes) == ("photos", ["train"], ["class0", "class1"])
    table.select([4, 1]).save_to_disk(tmp_path / "chosen")
    run("huggingface", tmp_path / "chosen", tmp_path / "out2")
    assert Beton(tmp_path / "out2" / "train.beton").labels.tolist() == [0, 1]
    assert Dataset(tmp_path / "out2").files("train")[0].endswith("/0004.jpg")


def test_names_of_splits_that_datasets_saved(tmp_path):
    row = [(PHOTOS[0], "jpg", 0)]
    root = make_shards.saved(tmp_path / "in", {"train": row * 2, "validation": row * 2, "extra": row * 2})
    assert list(run("huggingface", root, tmp_path / "out").splits) == ["train", "val", "extra"]
    everything = run("huggingface", root, tmp_path / "all", unlabeled=True).splits
    assert list(everything) == ["unlabeled"] and everything["unlabeled"].count == 6
    make_shards.saved(tmp_path / "two", {"train": row * 2, "validation": row * 2, "val": row * 2})
    assert "are the split val" in refusal("huggingface", tmp_path / "two", tmp_path / "none")


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("dataset_dict.json", lambda data: b"[", "dataset_dict.json: no JSON"),
        ("dataset_dict.json", lambda data: b'{"splits": ["../x"]}', "splits = ['../x']: no list of names"),
        ("train/state.json", lambda data: b"{}", "_data_files = None: no list of files"),
        ("train/state.json", lambda data: b'{"_data_files": [{"filename": "/etc/passwd"}]}', "no list of files beside"),
        ("train/state.json", lambda data: b'{"_data_files": [{"filename": "a.arrow"}]}', "a.arrow: cannot be read"),
        ("train/state.json", lambda data: b'{"_indices_files": [1]}', "save it after `.flatten_indices()`"),
        ("train/data-00001-of-00002.arrow", lambda data: data[:-8], "has no mark of its end, as a file that was cut"),
        ("train/data-00001-of-00002.arrow", lambda data: data[: len(data) // 2], "arrow: can not be read ("),
        ("train/data-00001-of-00002.arrow", lambda data: b"", "arrow: can not be read ("),
        ("train/data-00001-of-00002.arrow", lambda data: shards.LFS_POINTER, "a pointer of git-lfs"),
    ],
)
def test_damage_in_what_datasets_saved(tmp_path, file, change, words):
    root = make_shards.saved(tmp_path / "in", {"train": [(data, "jpg", 0) for data in PHOTOS]})
    path = root / file
    path.write_bytes(change(path.read_bytes()))
    message = refusal("huggingface", root, tmp_path / "out")
    assert words in message and str(path.parent) in message and not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------- damaged parquet


@pytest.mark.parametrize("at", [0, 3, 0.2, 0.5, 0.9, -1])
def test_a_parquet_file_that_was_cut(tmp_path, at):
    root = write(tmp_path / "in" / "train.parquet", {"image": pa.array(PHOTOS), "label": pa.array([0] * 6)})
    path = root / "train.parquet"
    data = path.read_bytes()
    path.write_bytes(data[: int(at * len(data)) if isinstance(at, float) else at])
    message = refusal("parquet", root, tmp_path / "out")
    assert message.startswith(f"{path}: can not be read (") and "fetch or write it again" in message


def test_damage_within_is_found_by_the_checksums_where_there_are_some(tmp_path):
    """A page that does not unpack ends the conversion, and no split is left half written."""
    columns = {"image": pa.array(PHOTOS * 50), "label": pa.array([0] * 300)}
    root = write(tmp_path / "in" / "train.parquet", columns, use_dictionary=False, compression="snappy")
    path = root / "train.parquet"
    offset = pyarrow.parquet.ParquetFile(path).metadata.row_group(0).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[offset : offset + 300] = bytes(300)
    path.write_bytes(data)
    message = refusal("parquet", root, tmp_path / "out")
    assert message.startswith(f"{path}: can not be read (") and "fetch or write it again" in message
    assert not (tmp_path / "out").exists() or os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("rows", [4, 7])
def test_a_file_that_is_replaced_during_the_conversion(tmp_path, rows):
    """By one with other rows: no image gets the label of another."""
    root = write(tmp_path / "in" / "train.parquet", {"image": pa.array(PHOTOS), "label": pa.array([0] * 6)})
    images = opened(root).splits["train"]
    write(root / "train.parquet", {"image": pa.array([*PHOTOS, *PHOTOS][:rows]), "label": pa.array([0] * rows)})
    with pytest.raises(UserError, match="another number of rows than before"):
        list(images.loaders(2))


def test_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for kind in ("parquet", "huggingface"):
        message = refusal(kind, tmp_path, tmp_path / "out")
        assert message == f"convert {kind}: pyarrow is not installed; pip install pyarrow (our extra `parquet`)"


def test_the_command_line(tmp_path, capsys):
    from ssl_dist import cli

    rows = {"img": pa.array(PHOTOS), "mask": pa.array(PHOTOS), "kind": pa.array(list("ababab"))}
    root = write(tmp_path / "in" / "train.parquet", rows)
    words = ["convert", "parquet", "--root", str(root), "--out", str(tmp_path / "out"), "--name", "mine"]
    assert cli.main(words) == 0 and list(Dataset(tmp_path / "out").splits) == ["unlabeled"]
    assert cli.main([*words, "--image-key", "mask", "--label-key", "kind"]) == 0
    assert Dataset(tmp_path / "out").info("train").classes == ("a", "b")
    assert cli.main([*words, "--image-key", "x"]) == 2
    with pytest.raises(UserError):
        Dataset(tmp_path / "out").info("x")
