"""The features file: round trip, what is refused, and that reading it costs no memory."""

import json
import os

import numpy as np
import pytest
from safetensors.numpy import load_file, safe_open, save_file

from ssl_dist.errors import UserError
from ssl_dist.storage.features import Features, check_pair, read_features, require_labels, write_features

METADATA = {
    "classes": json.dumps(["cat", "dög", "emu"]),
    "dataset": "pets",
    "split": "train",
    "transform": "centre crop 32",
    "data": "cd" * 32,
    "checkpoint": "ab" * 32,
    "step": "12",
    "layer": "output",
    "method": "relational",
    "backbone": "conv4",
}


def _arrays(count=7, dim=5):
    features = np.random.default_rng(0).standard_normal((count, dim), dtype=np.float32)
    return features, np.arange(count, dtype=np.int64) % 3, np.arange(count, dtype=np.int64)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "features" / "pets-train.safetensors"


@pytest.fixture
def written(path):
    write_features(path, *_arrays(), METADATA)
    return path


def _refused(path) -> str:
    with pytest.raises(UserError) as caught:
        read_features(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


def test_round_trip(written):
    features, labels, image_ids = _arrays()
    read = read_features(written)
    np.testing.assert_array_equal(read.features, features)
    np.testing.assert_array_equal(read.labels, labels)
    np.testing.assert_array_equal(read.image_ids, image_ids)
    assert read.features.dtype == np.float32 and read.labels.dtype == read.image_ids.dtype == np.int64
    assert read.metadata == METADATA and read.classes == ["cat", "dög", "emu"]
    assert len(read) == 7 and read.dim == 5
    np.testing.assert_array_equal(read.rows(2, 5), features[2:5])
    assert os.listdir(written.parent) == [written.name]


def test_what_is_read_writes_itself(written, tmp_path):
    Features.read(written).write(tmp_path / "copy.safetensors")
    assert (tmp_path / "copy.safetensors").read_bytes() == written.read_bytes()
    with pytest.raises(ValueError, match="image_ids"):
        Features.read(written).subset(np.array([2, 3])).write(tmp_path / "part.safetensors")


def test_safetensors_reads_what_is_written(written):
    features, labels, image_ids = _arrays()
    tensors = load_file(written)
    assert set(tensors) == {"features", "labels", "image_ids"}
    np.testing.assert_array_equal(tensors["features"], features)
    np.testing.assert_array_equal(tensors["labels"], labels)
    np.testing.assert_array_equal(tensors["image_ids"], image_ids)
    with safe_open(written, "numpy") as file:
        assert file.metadata() == METADATA


def test_reads_what_safetensors_writes(path):
    features, labels, image_ids = _arrays()
    path.parent.mkdir()
    save_file({"features": features, "labels": labels, "image_ids": image_ids}, path, METADATA)
    np.testing.assert_array_equal(read_features(path).features, features)


def test_numbers_are_aligned_whatever_the_length_of_the_header(path):
    for length in range(8):
        write_features(path, *_arrays(), METADATA | {"split": "x" * length})
        read = read_features(path)
        assert read.features.flags.aligned and read.features.ctypes.data % 8 == 0


def test_many_rows_are_written_in_chunks(path, monkeypatch):
    monkeypatch.setattr("ssl_dist.storage.features._CHUNK_BYTES", 64)
    features, labels, image_ids = _arrays(101, 5)
    write_features(path, features, labels, image_ids, METADATA)
    np.testing.assert_array_equal(read_features(path).features, features)


def test_truncated_files_are_refused(written):
    whole = written.read_bytes()
    for length in [*range(0, len(whole), 5), len(whole) - 1]:
        written.write_bytes(whole[:length])
        _refused(written)
    written.write_bytes(whole + b"x")
    assert "truncated or damaged" in _refused(written)


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "file"
    assert "cannot be read" in _refused(path)
    assert "cannot be read" in _refused(tmp_path)
    for content in (
        b"",
        b"\x89PNG\r\n\x1a\n" + b"\0" * 100,
        b"\x02\0\0\0\0\0\0\0[]",
        b"\x04\0\0\0\0\0\0\0null",
        b"x" * 99,
    ):
        path.write_bytes(content)
        assert "not a features file" in _refused(path)
    save_file({"weight": np.zeros(3, np.float32)}, path)
    assert "tensor labels is missing" in _refused(path)


@pytest.mark.parametrize("spoil", ["shape", "data_offsets", "both"])
def test_a_damaged_header_is_refused(written, spoil):
    whole = written.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    if spoil != "data_offsets":
        header["features"]["shape"] = 35 if spoil == "both" else [7, 6]
    if spoil != "shape":
        header["features"]["data_offsets"] = [112, 10**15] if spoil == "data_offsets" else "no"
    text = json.dumps(header).encode()
    written.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])
    assert "damaged header" in _refused(written)


def _with(**changes):
    features, labels, image_ids = _arrays()
    parts = {"features": features, "labels": labels, "image_ids": image_ids, "metadata": dict(METADATA)} | changes
    return parts


WRONG = {
    "half precision": (_with(features=_arrays()[0].astype(np.float16)), "features is F16"),
    "short labels": (_with(labels=np.zeros(7, np.int32)), "labels is I32"),
    "one axis": (_with(features=np.zeros(7, np.float32)), "not [N, D]"),
    "no images": (_with(features=np.zeros((0, 5), np.float32)), "not [N, D]"),
    "too few labels": (_with(labels=np.zeros(6, np.int64)), "labels has shape [6]"),
    "unsorted ids": (_with(image_ids=np.array([0, 2, 1, 3, 4, 5, 6])), "row 1 has 2"),
    "ids twice": (_with(image_ids=np.array([0, 1, 1, 2, 3, 4, 5])), "row 2 has 1"),
    "ids missing": (_with(image_ids=np.array([0, 1, 2, 3, 4, 5, 7])), "row 6 has 7"),
    "no split": (_with(metadata={k: v for k, v in METADATA.items() if k != "split"}), "metadata split is missing"),
    "classes no list": (_with(metadata=METADATA | {"classes": "cat, dog"}), "metadata classes is 'cat, dog'"),
    "label out of range": (_with(labels=np.full(7, 3)), "image 0 has label 3 of 3 classes"),
    "label below -1": (_with(labels=np.full(7, -2)), "image 0 has label -2"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_contents_are_refused(path, name):
    parts, message = WRONG[name]
    path.parent.mkdir()
    save_file({name: parts[name] for name in ("features", "labels", "image_ids")}, path, parts["metadata"])
    assert message in _refused(path)


@pytest.mark.parametrize("name", [name for name in WRONG if not name.startswith("label ")])
def test_wrong_arrays_are_not_written(path, name):
    with pytest.raises(ValueError, match=r"pets-train\.safetensors") as caught:
        write_features(path, *(WRONG[name][0][part] for part in ("features", "labels", "image_ids", "metadata")))
    assert not isinstance(caught.value, UserError)
    assert not path.exists()


def test_features_that_are_not_finite_leave_the_old_file(written):
    features, labels, image_ids = _arrays()
    features[4, 2] = np.nan
    before = written.read_bytes()
    with pytest.raises(UserError, match="features of image 4 are not finite"):
        write_features(written, features, labels, image_ids, METADATA)
    assert written.read_bytes() == before
    assert os.listdir(written.parent) == [written.name]
    whole = Features(features, labels, image_ids, METADATA)
    with pytest.raises(UserError, match="features of image 4 are not finite"):
        whole.rows(3, 6)
    with pytest.raises(UserError, match=r"\(part\): the features of image 4 are not finite"):
        whole.subset(np.array([0, 1, 4, 6]), "part").rows(1, 4)


@pytest.mark.parametrize("mapped", [True, False])
def test_rows_by_number_and_parts_of_a_file(written, mapped):
    whole = read_features(written) if mapped else Features(*_arrays(), METADATA, "the file")
    features, labels, image_ids = _arrays()
    np.testing.assert_array_equal(whole.take(np.array([5, 0, 5])), features[[5, 0, 5]])
    numbers = np.array([1, 3, 4, 6])
    part = whole.subset(numbers, "train[some]")
    assert len(part) == 4 and part.dim == whole.dim and part.features.shape == (4, whole.dim)
    np.testing.assert_array_equal(part.labels, labels[numbers])
    np.testing.assert_array_equal(part.image_ids, image_ids[numbers])
    np.testing.assert_array_equal(part.rows(1, 9), features[[3, 4, 6]])
    np.testing.assert_array_equal(part.take(np.array([3, 0])), features[[6, 1]])
    assert part.metadata == METADATA | {"split": "train[some]"} and part.source == f"{whole.source} (train[some])"
    assert part.classes == whole.classes
    again = part.subset(np.array([2, 0]))
    np.testing.assert_array_equal(again.rows(0, 2), features[[4, 1]])
    assert again.image_ids.tolist() == [4, 1] and again.metadata == part.metadata and again.source == part.source
    copy = part.rows(0, 2)
    copy[:] = 0
    np.testing.assert_array_equal(part.rows(0, 2), features[[1, 3]])


def test_the_file_is_on_disk_before_it_gets_its_name(path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    write_features(path, *_arrays(), METADATA)
    assert calls == ["fsync", "replace", "fsync"], "the file, its name, the folder"


def test_an_unwritable_folder_is_the_users_mistake(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write_features(tmp_path / "file" / "x.safetensors", *_arrays(), METADATA)


def test_pairs():
    def part(dim=4, **changes):
        return Features(
            np.zeros((3, dim), np.float32), np.arange(3), np.arange(3), METADATA | changes, changes.get("split", "a")
        )

    check_pair(part(), part(split="test", step="13"))
    for name in ("checkpoint", "layer", "dataset", "transform"):
        with pytest.raises(UserError, match=rf"a and b do not belong together: {name} is .* and 'other'"):
            check_pair(part(), part(split="b", **{name: "other"}))
    with pytest.raises(UserError, match="4 and 5 features an image"):
        check_pair(part(), part(dim=5))


def test_labels_where_they_are_needed():
    def part(*labels):
        return Features(
            np.zeros((len(labels), 2), np.float32), np.array(labels), np.arange(len(labels)), {}, "the file"
        )

    require_labels(part(0, 1), part(0, 0))
    with pytest.raises(UserError, match=r"the file: 1 of 3 images have no label"):
        require_labels(part(0, 1), part(0, -1, 1))
    with pytest.raises(UserError, match="the file: all images have label 4"):
        require_labels(part(4, 4), part(0, 1))


def _mapped_mib() -> float:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("RssFile"))


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's account of memory")
def test_reading_a_large_file_holds_no_memory(path):
    count, dim = 65536, 256  # 64 MiB
    write_features(path, np.ones((count, dim), np.float32), *[np.arange(count)] * 2, METADATA | {"classes": "[]"})
    before = _mapped_mib()
    read = read_features(path)
    highest = 0.0
    for start in range(0, count, 4096):  # 4 MiB
        assert read.rows(start, start + 4096).min() == 1
        highest = max(highest, _mapped_mib() - before)
    every_second = read.subset(np.arange(0, count, 2))
    for start in range(0, count // 2, 2048):
        assert every_second.rows(start, start + 2048).min() == 1
        highest = max(highest, _mapped_mib() - before)
    assert highest < 8
