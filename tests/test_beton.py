"""The file format: what is written is read, FFCV reads it too, and damage is named."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_dist.data import beton
from ssl_dist.data.beton import JPG, RAW, Beton, Digest, Writer, check_value
from ssl_dist.errors import UserError
from tests.make_images import jpeg, picture


def samples(count, seed=0):
    """(label, mode, height, width, bytes) of pictures stored both ways."""
    rng = np.random.default_rng(seed)
    content = []
    for i in range(count):
        height, width = (int(side) for side in rng.integers(1, 40, 2))
        image = picture(height, width, seed + i)
        mode = JPG if i % 3 == 0 else RAW
        content.append((int(rng.integers(-1, 5)), mode, height, width, jpeg(image) if mode == JPG else image.tobytes()))
    return content


def write(path, content, **options):
    with Writer(path, len(content), **options) as writer:
        for sample in content:
            writer.add(*sample)
        digest = writer.complete()
        writer.publish()
    return digest


def test_read_is_what_was_written(tmp_path):
    content = samples(50)
    digest = write(tmp_path / "x.beton", content)
    read = Beton(tmp_path / "x.beton")
    assert read.count == 50
    assert [(*rest, data.tobytes()) for *rest, data in read.samples()] == content
    again = Digest()
    for sample in read.samples():
        again.add(*sample)
    assert again.hexdigest() == digest
    assert os.listdir(tmp_path) == ["x.beton"]


def test_no_sample_crosses_a_page(tmp_path):
    rng = np.random.default_rng(0)
    content = [(i, JPG, 1, 1, rng.bytes(int(n))) for i, n in enumerate(rng.integers(1, 900_000, 12))]
    content.append((12, JPG, 1, 1, bytes(beton.PAGE_SIZE)))  # a whole page
    content.append((13, RAW, 2, 2, bytes(12)))
    write(tmp_path / "x.beton", content)
    read = Beton(tmp_path / "x.beton")
    assert (read.pointers // beton.PAGE_SIZE == (read.pointers + read.sizes - 1) // beton.PAGE_SIZE).all()
    assert [data.tobytes() for *_, data in read.samples()] == [data for *_, data in content]


def test_digest_covers_everything():
    base = (1, RAW, 2, 3, bytes(18))
    changed = [(2, *base[1:]), (1, JPG, *base[2:]), (1, RAW, 3, 3, bytes(18)), (1, RAW, 2, 4, bytes(18)),
              (*base[:4], bytes(17) + b"\1")]  # fmt: skip
    digests = set()
    for sample in (base, *changed):
        digest = Digest()
        digest.add(*sample)
        digests.add(digest.hexdigest())
    assert len(digests) == 6


@given(st.binary(min_size=1, max_size=300), st.data())
@settings(max_examples=50)
def test_check_value_sees_a_changed_byte_and_an_exchange(data, draw):
    data = np.frombuffer(data, np.uint8)
    value = check_value(data)
    assert 1 <= value < 1 << 24
    i, j = (draw.draw(st.integers(0, len(data) - 1)) for _ in range(2))
    changed, exchanged = data.copy(), data.copy()
    changed[i] ^= draw.draw(st.integers(1, 255))
    assert check_value(changed) != value
    exchanged[[i, j]] = data[[j, i]]
    assert (check_value(exchanged) == value) == (data[i] == data[j])


def test_a_failed_writer_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="stop"), Writer(tmp_path / "x.beton", 2) as writer:
        writer.add(*samples(1)[0])
        raise RuntimeError("stop")
    assert os.listdir(tmp_path) == []


def test_two_writers_are_refused(tmp_path):
    with Writer(tmp_path / "x.beton", 1) as writer:
        with pytest.raises(UserError, match=r"x\.beton: another process"):
            Writer(tmp_path / "x.beton", 1)
        writer.add(*samples(1)[0])
        writer.complete()
        writer.publish()
    assert Beton(tmp_path / "x.beton").count == 1


def test_a_killed_writers_leftover_is_replaced(tmp_path):
    (tmp_path / ".x.beton.tmp").write_bytes(b"rest" * 1000)
    content = samples(3)
    write(tmp_path / "x.beton", content)
    write(tmp_path / "y.beton", content)
    assert (tmp_path / "x.beton").read_bytes() == (tmp_path / "y.beton").read_bytes()


def refusal(path):
    with pytest.raises(UserError) as caught:
        Beton(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "ssl-dist convert" in message and "\n" not in message
    return message


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "x.beton"
    assert "no such file" in refusal(path)
    write(path, samples(20))
    whole = path.read_bytes()
    for size in (0, 10, 1000, beton.RECORDS_START, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert any(word in refusal(path) for word in ("truncated", "not a .beton", "bytes are not"))
    path.write_bytes(whole + b"more")
    assert "damaged" in refusal(path)
    path.write_bytes(os.urandom(len(whole)))
    assert "not a .beton" in refusal(path)
    path.write_bytes(b"PK\3\4" * 5000)
    assert "not a .beton" in refusal(path)
    path.write_bytes(whole.replace(b"image\0", b"photo\0", 1))
    assert "fields" in refusal(path)
    header = np.frombuffer(whole[: beton.HEADER.itemsize], beton.HEADER).copy()
    header["table"] = 0
    path.write_bytes(header.tobytes() + whole[beton.HEADER.itemsize :])
    assert "did not finish" in refusal(path)
    records = bytearray(whole)
    records[beton.RECORDS_START + 5 : beton.RECORDS_START + 13] = (1 << 40).to_bytes(8, "little")
    path.write_bytes(records)
    assert "contradict" in refusal(path)


def test_no_field_of_the_tables_reaches_outside_the_pages(tmp_path):
    """Each of these was a signal, or asked for all memory, when the pixels were read."""
    path = tmp_path / "x.beton"
    write(path, samples(20))
    whole, file = path.read_bytes(), Beton(path)
    table = len(whole) - 20 * beton.ALLOCATION.itemsize
    jpeg_id, raw_id = 0, 1

    def changed(**fields):
        """The file with fields of records and of allocations set alike: name = (image, value)."""
        records = np.frombuffer(whole, beton.SAMPLE, 20, beton.RECORDS_START).copy()
        allocations = np.frombuffer(whole, beton.ALLOCATION, 20, table).copy()
        for name, (image_id, value) in fields.items():
            for array in (records, allocations):
                if name in array.dtype.names:
                    array[name][image_id] = value
        front = whole[: beton.RECORDS_START] + records.tobytes()
        path.write_bytes(front + whole[len(front) : table] + allocations.tobytes())
        return refusal(path)

    for pointer in (1 << 63, (1 << 64) - 1, (1 << 64) - 4096, table + 1, 0, beton.RECORDS_START):
        assert "outside the pages" in changed(pointer=(jpeg_id, pointer)), pointer
    for size in (1 << 63, (1 << 64) - 1, len(whole), table):
        assert "outside the pages" in changed(size=(jpeg_id, size)), size
    assert "two images lie in one place" in changed(size=(jpeg_id, int(file.sizes[jpeg_id]) + 1))
    assert "two images lie in one place" in changed(pointer=(jpeg_id, int(file.pointers[2])))
    for fields in (
        {"size": (jpeg_id, 0)}, {"size": (raw_id, 1)}, {"mode": (jpeg_id, 2)}, {"label": (3, -2)}, {"width": (0, 0)},
        {"height": (jpeg_id, 0)}, {"height": (raw_id, 65535)}, {"sample_id": (3, 4)},
    ):  # fmt: skip
        assert "contradict each other" in changed(**fields), fields

    header = np.frombuffer(whole[: beton.HEADER.itemsize], beton.HEADER).copy()
    for count in (1 << 62, (1 << 64) - 1, 1 << 33):
        header["num_samples"], header["table"] = count, (len(whole) - count * 24) % (1 << 64)
        path.write_bytes(header.tobytes() + whole[beton.HEADER.itemsize :])
        assert "header speaks of" in refusal(path)
    count = (len(whole) - 4096) // beton.ALLOCATION.itemsize  # fits the file's length, and not its records
    header["num_samples"], header["table"] = count, len(whole) - count * beton.ALLOCATION.itemsize
    path.write_bytes(header.tobytes() + whole[beton.HEADER.itemsize :])
    assert f"header speaks of {count} images" in refusal(path)


def test_the_checksum_of_the_tables_covers_every_byte_of_them(tmp_path):
    path = tmp_path / "x.beton"
    write(path, samples(4))
    whole, before = path.read_bytes(), Beton(path).tables_sha256
    records = beton.RECORDS_START
    for place in (records + 16, records + 13, records - 1, len(whole) - 1 - beton.PAGE_SIZE):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        pages = place == len(whole) - 1 - beton.PAGE_SIZE
        assert (Beton(path).tables_sha256 == before) == pages, place


@pytest.mark.requires_ffcv
def test_ffcv_has_the_same_types():
    import_module("ssl_dist.data.ffcv_reader")  # makes FFCV's import quick
    from ffcv import types
    from ffcv.fields import IntField, RGBImageField

    assert types.HeaderType.itemsize == beton.HEADER.itemsize and types.CURRENT_VERSION == beton.VERSION
    assert types.FieldDescType.itemsize == beton.FIELD.itemsize
    assert types.ALLOC_TABLE_TYPE.itemsize == beton.ALLOCATION.itemsize
    theirs = types.get_metadata_type([RGBImageField(), IntField()])
    assert theirs.itemsize == beton.SAMPLE.itemsize
    assert [types.TYPE_ID_HANDLER[i] for i in (beton.IMAGE_FIELD, beton.INT_FIELD)] == [RGBImageField, IntField]


@pytest.mark.requires_ffcv
def test_ffcvs_own_reader_reads_it(tmp_path):
    import_module("ssl_dist.data.ffcv_reader")
    from ffcv.reader import Reader

    content = samples(30)
    write(tmp_path / "x.beton", content)
    reader = Reader(str(tmp_path / "x.beton"))
    assert reader.num_samples == 30 and reader.field_names == ["image", "label"]
    assert reader.page_size == beton.PAGE_SIZE
    image = reader.metadata["f0"]
    assert reader.metadata["f1"].tolist() == [label for label, *_ in content]
    for name, position in (("mode", 1), ("height", 2), ("width", 3)):
        assert image[name].tolist() == [sample[position] for sample in content]
    whole = (tmp_path / "x.beton").read_bytes()
    for i, (place, record) in enumerate(zip(reader.alloc_table, image, strict=True)):
        assert place["sample_id"] == i and place["ptr"] == record["data_ptr"]
        assert whole[place["ptr"] : place["ptr"] + place["size"]] == content[i][4]


FFCV_LOADER = """
import sys
import numpy as np
from ffcv.loader import Loader, OrderOption
from ffcv.fields.decoders import SimpleRGBImageDecoder, IntDecoder
for cache in ("os", "process"):
    loader = Loader(sys.argv[1], batch_size=4, num_workers=1, order=OrderOption.SEQUENTIAL, drop_last=False,
                    os_cache=cache == "os", pipelines={"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]})
    images, labels = zip(*((image.copy(), label.copy()) for image, label in loader))
    np.savez(f"{sys.argv[2]}/{cache}.npz", images=np.concatenate(images), labels=np.concatenate(labels))
"""


@pytest.mark.requires_ffcv
@pytest.mark.slow  # FFCV compiles its pipeline
def test_ffcvs_own_loader_reads_it(tmp_path):
    images = np.stack([picture(20, 30, i) for i in range(10)])
    content = [(i, RAW, 20, 30, image.tobytes()) for i, image in enumerate(images)]
    write(tmp_path / "x.beton", content)
    command = [sys.executable, "-c", FFCV_LOADER, tmp_path / "x.beton", tmp_path]
    subprocess.run(command, check=True, timeout=100)
    for cache in ("os", "process"):
        out = np.load(tmp_path / f"{cache}.npz")
        assert (out["images"] == images).all() and out["labels"].ravel().tolist() == list(range(10))


@pytest.mark.requires_ffcv
@pytest.mark.slow  # FFCV compiles when it is imported
def test_a_file_by_ffcvs_own_writer_is_read(tmp_path):
    script = """
import sys
from tests.make_images import picture
from ffcv.writer import DatasetWriter
from ffcv.fields import IntField, RGBImageField
if __name__ == "__main__":
    data = [(picture(10 + i, 20, i), i) for i in range(25)]
    fields = {"image": RGBImageField(write_mode="raw"), "label": IntField()}
    DatasetWriter(sys.argv[1], fields, num_workers=2).from_indexed_dataset(data, chunksize=3)
"""
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, tmp_path / "script.py", tmp_path / "x.beton"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    subprocess.run(command, check=True, timeout=100, env=environment, capture_output=True)
    read = Beton(tmp_path / "x.beton")
    assert read.labels.tolist() == list(range(25)) and (read.checks == 0).all()
    for i in range(25):
        assert (read.sample(i).reshape(10 + i, 20, 3) == picture(10 + i, 20, i)).all()
