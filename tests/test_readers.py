"""Both readers: the pixels that Pillow shows, in the caller's order, in memory of its own, and no thread left."""

import itertools
import json
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_dist.convert.command import convert
from ssl_dist.data import readers
from ssl_dist.data.beton import JPG, RAW, RECORDS_START, SAMPLE, Beton, Writer
from ssl_dist.data.readers import Dataset
from ssl_dist.errors import UserError
from ssl_dist.thread_team import ThreadTeam
from tests.make_images import jpeg, odd_folder, picture, with_noise_before_marker

READERS = [pytest.param("ffcv", marks=pytest.mark.requires_ffcv), "arrays"]
COUNT = 11


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """The odd pictures, converted: nine JPEG and raw images of many sizes. Copy it before damaging it."""
    folder = tmp_path_factory.mktemp("odd")
    convert("folder", odd_folder(folder / "source"), folder / "out", workers=2, progress=False)
    return folder / "out"


@pytest.fixture
def own(odd, tmp_path):
    """A copy that a test may damage."""
    for path in odd.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


def stored(root, split="train"):
    """Pillow's decode of what is stored."""
    file = Beton(root / f"{split}.beton")
    shown = []
    for i in range(file.count):
        data = file.sample(i)
        if file.modes[i] == RAW:
            shown.append(np.asarray(data).reshape(file.heights[i], file.widths[i], 3))
        else:
            path = root / "one.jpg"
            path.write_bytes(data.tobytes())
            shown.append(np.asarray(Image.open(path).convert("RGB")))
    return shown


def numbers(*lists):
    return [np.array(ids, np.int64) for ids in lists]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("reader", READERS)
def test_pixels_are_pillows(odd, reader, threads):
    expected = stored(odd)
    assert len(expected) == COUNT and {JPG, RAW} == set(Beton(odd / "train.beton").modes)
    steps = numbers(range(COUNT), [3], [10, 0, 10, 5, 5], [], [1, 2])
    with Dataset(odd, reader=reader).open("train") as opened, ThreadTeam(threads) as team:
        batches = list(opened.batches(steps, team))
    assert len(batches) == len(steps)
    # All batches are compared at the end: a buffer used twice would show.
    for ids, (pixels, heights, widths, image_ids) in zip(steps, batches, strict=True):
        assert image_ids.tolist() == ids.tolist() and heights.dtype == widths.dtype == image_ids.dtype == np.int64
        assert pixels.shape == (len(ids), 150, 300, 3)
        assert pixels.dtype == np.uint8 and pixels.flags.writeable and pixels.flags.c_contiguous
        for i, image_id in enumerate(ids):
            image = expected[image_id]
            height, width = image.shape[:2]
            assert (heights[i], widths[i]) == (height, width)
            assert (pixels[i, :height, :width] == image).all()
            assert not pixels[i, height:].any() and not pixels[i, :, width:].any()


@pytest.mark.parametrize("reader", READERS)
def test_batches_are_fresh(odd, reader):
    with Dataset(odd, reader=reader).open("val") as opened:
        batches = [pixels for pixels, *_ in opened.batches(numbers([0, 1]) * 12)]
    assert all(not np.shares_memory(a, b) for a, b in itertools.combinations(batches, 2))
    batches[0][:] = 0
    assert batches[1].any()


@pytest.mark.parametrize("reader", READERS)
def test_info_and_labels(odd, reader):
    with Dataset(odd, reader=reader).open("train") as opened:
        assert opened.info == Dataset(odd).info("train")
        assert opened.info.classes == ("cat", "dog") and opened.info.count == COUNT and opened.info.labelled
        assert (opened.info.max_height, opened.info.max_width) == (150, 300)
        assert opened.labels(np.arange(COUNT)).tolist() == [0] * 5 + [1] * 6
        assert opened.labels(np.array([9, 0])).tolist() == [1, 0] and opened.labels(np.array([0])).dtype == np.int64
    assert Dataset(odd).splits == ("train", "val")


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("reader", READERS)
def test_any_way_to_stop(odd, reader, threads):
    before = threading.active_count()

    def broken():
        yield np.arange(4)
        raise RuntimeError("the plan failed")

    with Dataset(odd, reader=reader).open("train") as opened, ThreadTeam(threads) as team:
        endless = (np.array([i % COUNT] * 4) for i in itertools.count())
        for number, _ in enumerate(opened.batches(endless, team)):
            if number == 3:
                break
        assert next(endless)[0] == 4, "ids are read one batch at a time"
        for _ in range(2):
            assert len(list(opened.batches(numbers([0, 1, 2], [3]), team))) == 2
        with pytest.raises(RuntimeError, match="the plan failed"):
            list(opened.batches(broken(), team))
        unfinished = opened.batches(endless, team)
        next(unfinished)
    assert threading.active_count() == before
    with pytest.raises(ValueError, match="closed"):
        next(unfinished)
    with pytest.raises(ValueError, match="closed"):
        opened.labels(np.array([0]))
    opened.close()


@pytest.mark.parametrize("ids", [[-1], [COUNT], [[0]]])
@pytest.mark.parametrize("reader", READERS)
def test_ids_out_of_range(odd, reader, ids):
    with Dataset(odd, reader=reader).open("train") as opened, pytest.raises(IndexError, match=r"0\.\.10"):
        next(opened.batches([np.array(ids)]))


# -------------------------------------------------------------------------------------------------------- damage


def damage(root, image_id, change):
    """Overwrite the bytes of a stored image."""
    file = Beton(root / "train.beton")
    start, size = int(file.pointers[image_id]), int(file.sizes[image_id])
    with open(file.path, "r+b") as target:
        target.seek(start)
        data = change(target.read(size))
        assert len(data) == size
        target.seek(start)
        target.write(data)


CHANGES = {
    "zeros": lambda data: bytes(len(data)),
    "noise": lambda data: np.random.default_rng(0).bytes(len(data)),
    "half": lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
    "one bit in the middle": lambda data: data[:300] + bytes([data[300] ^ 8]) + data[301:],
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("image_id", [0, 9])  # JPEG, raw
@pytest.mark.parametrize("reader", READERS)
def test_damaged_images_are_named(own, reader, image_id, change, threads):
    damage(own, image_id, CHANGES[change])
    with Dataset(own, reader=reader).open("train") as opened, ThreadTeam(threads) as team:
        with pytest.raises(UserError, match=rf"train\.beton: image {image_id} is damaged.*ssl-dist convert") as caught:
            list(opened.batches(numbers([1, 2], [3, 4, 5, image_id, 6], [7]), team))
        assert "\n" not in str(caught.value)
        # the others can still be read
        assert len(list(opened.batches(numbers([1, 2], [5]), team))) == 2


def without_check_values(root):
    """As FFCV's own writer leaves them."""
    content = list(Beton(root / "train.beton").samples())
    writer = Writer(root / "train.beton", len(content))
    with writer:
        for *rest, data in content:
            writer.add(*rest, data.tobytes())
        writer._records["check"] = 0
        writer.complete()
        writer.publish()
    record(root)


def record(root, **changes):
    """Make dataset.json tell of train.beton as it is now, but for `changes`."""
    file, described = Beton(root / "train.beton"), json.loads((root / "dataset.json").read_text())
    sides = {"max_height": int(file.heights.max()), "max_width": int(file.widths.max())}
    counts = np.bincount(file.labels, minlength=len(described["classes"])).tolist()
    facts = {"class_counts": counts, "raw": int((file.modes == RAW).sum()), "tables": file.tables_sha256}
    described["splits"]["train"] |= sides | facts | changes
    (root / "dataset.json").write_text(json.dumps(described))


@pytest.mark.parametrize("reader", READERS)
def test_without_check_values_the_decoder_judges(own, reader):
    without_check_values(own)
    damage(own, 0, CHANGES["zeros"])
    with Dataset(own, reader=reader).open("train") as opened:
        assert len(list(opened.batches(numbers([1, 2, 9])))) == 1
        with pytest.raises(UserError, match=r"image 0 is damaged \(Pillow"):
            list(opened.batches(numbers([0])))


@pytest.mark.parametrize("reader", READERS)
def test_a_jpeg_of_another_size_is_refused(own, reader):
    without_check_values(own)
    smaller = jpeg(picture(20, 20), quality=30)
    damage(own, 0, lambda data: smaller + bytes(len(data) - len(smaller)))
    with Dataset(own, reader=reader).open("train") as opened, pytest.raises(UserError, match="image 0 is damaged"):
        list(opened.batches(numbers([0])))


@pytest.mark.parametrize("reader", READERS)
def test_a_jpeg_that_only_earns_a_warning_is_shown(own, reader):
    data = with_noise_before_marker(jpeg(picture(70, 90)))
    with Writer(own / "train.beton", COUNT) as writer:
        for _ in range(COUNT):
            writer.add(0, JPG, 70, 90, data)
        writer.complete()
        writer.publish()
    record(own)
    with Dataset(own, reader=reader).open("train") as opened:
        ((pixels, *_),) = opened.batches(numbers([4]))
    assert (pixels[0] == stored(own)[0]).all()


def exchange_labels(root, *ids):
    """Write the label of the first image to the second and the reverse; every check value still holds."""
    places = [RECORDS_START + image_id * SAMPLE.itemsize + SAMPLE.fields["label"][1] for image_id in ids]
    whole = bytearray((root / "train.beton").read_bytes())
    labels = [whole[place : place + 8] for place in places]
    assert labels[0] != labels[1]
    for place, label in zip(places, reversed(labels), strict=True):
        whole[place : place + 8] = label
    (root / "train.beton").write_bytes(whole)


@pytest.mark.parametrize("reader", READERS)
def test_labels_that_were_changed_are_refused(own, reader):
    exchange_labels(own, 0, COUNT - 1)
    message = refusal(own, reader=reader)
    assert "train.beton: its labels and tables are not those that were written" in message and "convert" in message
    record(own, tables=None)  # as written before there was a checksum: such an exchange shows in nothing
    assert Dataset(own, reader=reader).labels("train")[0] == 1


def test_a_file_and_what_dataset_json_says_of_it(own):
    """Also without a checksum of the tables, as it was written before."""
    count, sides = Beton(own / "train.beton").count, Beton(own / "train.beton").heights
    for changes, words in (
        ({"class_counts": [4, 7]}, ["5 of its images have the label 0", "says 4"]),
        ({"class_counts": [count + 0, 0]}, ["have the label 0", f"says {count}"]),
        ({"max_height": int(sides.max()) + 1}, ["sizes differ"]),
        ({"raw": 0}, ["sizes differ"]),
    ):
        record(own, tables=None, **changes)
        message = refusal(own)
        assert all(word in message for word in [*words, "dataset.json", "ssl-dist convert"]), message
    described = json.loads((own / "dataset.json").read_text()) | {"classes": ["only"]}
    described["splits"]["train"]["class_counts"] = [count]
    described["splits"]["val"]["class_counts"] = [4]
    (own / "dataset.json").write_text(json.dumps(described))
    assert "has the label 1" in (message := refusal(own)) and "names 1 classes" in message


# ------------------------------------------------------------------------------------------------------ mistakes


def refusal(root, split="train", reader="arrays"):
    with pytest.raises(UserError) as caught:
        Dataset(root, reader=reader).open(split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_mistakes_are_named(own, tmp_path_factory):
    message = refusal(tmp_path_factory.mktemp("empty"))
    assert "dataset.json" in message and "ssl-dist convert" in message
    assert "'test'" in (message := refusal(own, "test")) and "data.split=train or data.split=val" in message
    with pytest.raises(UserError, match=r"data\.split=train or"):
        Dataset(own).info("test")
    assert "must be ffcv or arrays" in refusal(own, reader="hdf5")

    described = json.loads((own / "dataset.json").read_text())
    described["splits"]["train"]["count"] = 12
    (own / "dataset.json").write_text(json.dumps(described))
    message = refusal(own)
    assert "holds 11 images" in message and "says 12" in message and "ssl-dist convert" in message

    whole = (own / "val.beton").read_bytes()
    (own / "val.beton").write_bytes(whole[:-100])
    assert "val.beton" in (message := refusal(own, "val")) and "truncated" in message
    (own / "val.beton").unlink()
    assert "no such file" in refusal(own, "val")

    for text in ("{", "[1]", "{}"):
        (own / "dataset.json").write_text(text)
        assert "dataset.json" in (message := refusal(own)) and "ssl-dist convert" in message
    (own / "dataset.json").write_text(json.dumps(described | {"colour": 1}))
    assert "colour" in refusal(own)


def test_without_ffcv_the_remedy_is_named(odd, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "ffcv"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "ffcv", None)
    monkeypatch.delitem(sys.modules, "ssl_dist.data.ffcv_reader", raising=False)
    message = refusal(odd, reader="ffcv")
    for word in ("libopencv-dev", "libturbojpeg0-dev", "pkg-config", "pip install ffcv", "data.reader=arrays"):
        assert word in message


@pytest.mark.requires_ffcv
def test_ffcv_leaves_the_numbers_of_threads_alone(odd):
    torch.set_num_threads(2)
    with Dataset(odd, reader="ffcv").open("train") as opened, ThreadTeam(3) as team:
        assert torch.get_num_threads() == 2
        list(opened.batches(numbers([0]), team))
    assert torch.get_num_threads() == 2


def test_the_arrays_reader_needs_no_ffcv():
    package = Path(readers.__file__).parents[1]
    for path in [*(package / "data").glob("*.py"), *(package / "convert").glob("*.py")]:
        if path.name != "ffcv_reader.py":
            assert "import ffcv" not in path.read_text().replace("import FfcvReader", ""), path


@pytest.mark.requires_ffcv
def test_the_types_of_numba_stay_as_they_are(digits):
    """FFCV would change uint8[::1] in place, and every function compiled for it would be lost."""
    from numba import types

    before = types.uint8[::1].key
    with Dataset(digits, reader="ffcv").open("test") as reader:
        list(reader.batches([np.arange(2)]))
    assert types.uint8[::1].key == before and types.uint8[::1].mutable
