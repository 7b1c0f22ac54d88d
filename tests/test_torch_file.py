"""Files of torch.save: what torch writes is read, and what would grow, hang or end the process is refused before."""

import io
import os
import pickle
import resource
import struct
import time
import zipfile
from collections import Counter, OrderedDict

import pytest
import torch

from ssl_dist import backbones
from ssl_dist.errors import UserError
from ssl_dist.storage import checkpoint, torch_file, weights_file


def archive(path, pickled, records=(), compression=zipfile.ZIP_STORED):
    """A file as torch.save makes it, of a pickle and of records name -> bytes."""
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n", **dict(records)}.items():
            file.writestr(f"archive/{name}", data)
    return path


def storage(key=b"0", count=4, kind=b"FloatStorage"):
    """The opcodes that put a storage on the stack."""
    number = b"J" + struct.pack("<i", count)
    names = b"X\x07\0\0\0storagectorch\n" + kind + b"\nX" + struct.pack("<I", len(key)) + key + b"X\x03\0\0\0cpu"
    return b"(" + names + number + b"tQ"


def tensor(stored, shape):
    size = b"(" + b"".join(b"J" + struct.pack("<i", side) for side in shape) + b"t"
    stride = b"(" + b"K\0" * len(shape) + b"t"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + stored + b"K\0" + size + stride + b"\x89}tR"


def doubling_key(times):
    """A dictionary with a key that holds itself twice, `times` over: 2 ** times values to hash."""
    return b"\x80\x02}" + b"K\0q\0" + b"h\0h\0\x86q\0" * times + b"K\1s."


def doubling_text(size, times):
    """A list with `times` copies that are made of one text."""
    text = b"X" + struct.pack("<I", size) + b"a" * size + b"q\1"
    return b"\x80\x02](" + text + b"c_codecs\nencode\n(h\1X\x06\0\0\0latin1tR" * times + b"e."


GROWING = {
    "a key that doubles": doubling_key(40),
    "a deep key": b"\x80\x02}" + b"K\0" + b"\x85" * 200_000 + b"K\1s.",
    "a deep list": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "a list in itself": b"\x80\x02]q\0h\0a.",
    "a list that grows in a tuple": b"\x80\x02]q\0\x85q\1h\0K\1a.",
    "copies of a text": doubling_text(100_000, 2000),
    "a byte array": b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\0\0\0\0\x02\x85R.",
    "a storage by its length": b"\x80\x02ctorch\nFloatStorage\nJ\xff\xff\xff\x7f\x85R.",
    "a tensor by its length": b"\x80\x02ctorch\nFloatTensor\nJ\xff\xff\xff\x7f\x85\x81.",
    "a byte array behind a call": b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n"
    b"(c__builtin__\nbytearray\nctorch\nTensor\nJ\xff\xff\xff\x7f\x85}tR.",
    "an opcode of another protocol": pickle.dumps({"a": b"x" * 10}, protocol=4),
    "a stack that is empty": b"\x80\x020s.",
    "no end": b"\x80\x02]",
}


@pytest.fixture
def little_memory():
    """A gigabyte more than now: what takes it fails at once instead of the machine."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def refused(path):
    start = time.perf_counter()
    with pytest.raises(UserError) as caught:
        weights_file.read(path)
    assert time.perf_counter() - start < 5
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 500, message
    with pytest.raises(UserError) as caught:
        checkpoint.load(path)
    assert str(caught.value).startswith(f"checkpoint {path}: ") and len(str(caught.value)) < 500
    return message


@pytest.mark.timeout(30)
@pytest.mark.parametrize("what", GROWING)
def test_a_pickle_that_would_grow_is_refused(tmp_path, what, little_memory):
    assert "no weights that torch or safetensors can read" in refused(archive(tmp_path / "x.pth", GROWING[what]))


@pytest.mark.timeout(30)
@pytest.mark.parametrize("what", ["a key that doubles", "copies of a text", "a deep key", "a byte array"])
def test_a_pickle_that_would_grow_in_the_form_of_before_is_refused(tmp_path, what, little_memory):
    """Such a file has five pickles; the fourth is what it holds."""
    path = tmp_path / "x.pth"
    torch.save({}, path, _use_new_zipfile_serialization=False)
    first = path.read_bytes()
    small = pickle.dumps({}, protocol=2)
    assert first.count(small) == 1
    path.write_bytes(first.replace(small, GROWING[what]))
    refused(path)


def test_an_archive_that_unpacks_to_much_is_refused(tmp_path, little_memory):
    pickled = b"\x80\x02" + tensor(storage(count=1 << 26), [1 << 26]) + b"."
    path = archive(tmp_path / "x.pth", pickled, {"data/0": bytes(1 << 28)}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 20 and "unpack to 268,4" in refused(path)


def test_a_tensor_that_is_longer_than_its_bytes_is_refused(tmp_path):
    path = tmp_path / "x.pth"
    archive(path, b"\x80\x02" + tensor(storage(count=4), [4]) + b".", {"data/0": bytes(16)})
    assert weights_file.read(path)[0].shape == (4,)
    for count, size in ((5, 16), (1 << 30, 16), (4, 15), (-1, 16)):
        archive(path, b"\x80\x02" + tensor(storage(count=count), [4]) + b".", {"data/0": bytes(size)})
        assert "is read as" in (message := refused(path)) or "no length" in message
    archive(path, b"\x80\x02" + tensor(storage(b"7"), [4]) + b".", {"data/0": bytes(16)})
    assert "data/7 has 0 bytes" in refused(path)
    torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    assert whole.count(b"K\x03Nt") == 1  # the length, and no view
    path.write_bytes(whole.replace(b"K\x03Nt", b"J\xff\xff\xff\x7fNt"))
    assert "its tensors have 8,589,934,588 bytes and it has" in refused(path)


@pytest.mark.timeout(20)
def test_what_has_no_end_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(UserError, match="not a regular file"):
            weights_file.read(path)
        with pytest.raises(UserError, match="not a regular file"):
            checkpoint.load(path)


def test_what_torch_writes_of_plain_values_is_read(tmp_path):
    base = torch.arange(6.0)
    tree = {
        "state_dict": OrderedDict(a=base[:3], b=base[3:]), "epoch": 3, "name": "x" * 1000, 7: None, (1, (2, 3)): True,
        "half": base.half(), "bf16": base.bfloat16(), "long": base.long(), "bool": base > 2, "complex": base.cfloat(),
        "double": base.double(), "scalar": torch.tensor(1), "empty": torch.zeros(0, 3), "strided": base.view(2, 3).t(),
        "parameter": torch.nn.Parameter(base), "sparse": base.view(2, 3).to_sparse(), "meta": base.to("meta"),
        "size": base.shape, "device": torch.device("cpu"), "dtype": torch.float32, "counter": Counter("abca"),
        "set": {1, 2}, "bytes": b"abc", "long number": 1 << 60, "lists": [[[1.5, -2]] * 3] * 4,
        "float8": base.to(torch.float8_e4m3fn),
        "adam": torch.optim.Adam([torch.nn.Parameter(base)]).state_dict(),
    }  # fmt: skip
    for zipped in (True, False):
        content = {key: value for key, value in tree.items() if zipped or key != "float8"}
        torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
        read = weights_file.read(tmp_path / "x.pth")[0]
        assert read.keys() == content.keys() and read["lists"] == tree["lists"] and read["adam"] == tree["adam"]
        for key, value in content.items():
            if isinstance(value, torch.Tensor):
                assert read[key].dtype == value.dtype and read[key].shape == value.shape
            else:
                assert str(read[key]) == str(value)
        assert torch.equal(read["state_dict"]["b"], base[3:]) and torch.equal(read["strided"], base.view(2, 3).t())


def test_the_walk_costs_little():
    sink = io.BytesIO()
    torch.save(backbones.build("resnet50").state_dict(), sink)
    with zipfile.ZipFile(sink) as file:
        pickled = file.read("archive/data.pkl")
    start = time.perf_counter()
    torch_file._walk(io.BytesIO(pickled), len(pickled))
    assert time.perf_counter() - start < 0.5
