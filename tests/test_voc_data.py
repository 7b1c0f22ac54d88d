"""Folders in VOC's format: what is read, and what is refused by the name of the file."""

import time

import numpy as np
import pytest
from PIL import Image

from ssl_dist.errors import UserError
from ssl_dist.voc.data import CLASSES, VOID, Sample, check_disjoint, parse_xml, read_split
from tests.make_voc import annotation, voc_folder


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    return voc_folder(tmp_path_factory.mktemp("data") / "VOC2007")


@pytest.fixture
def one(tmp_path):
    """A folder of one image of 8 x 6 pixels, to damage."""
    root = voc_folder(tmp_path / "VOC2007", (("trainval", 1), ("test", 1)), size=(60, 40))
    return read_split([root], "Main", "trainval").samples[0]


def refusal(action, *arguments):
    with pytest.raises(UserError) as caught:
        action(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_labels_of_the_lists_are_those_of_the_annotations(voc):
    for name in ("trainval", "test"):
        split = read_split([voc], "Main", name)
        labels = split.labels
        assert labels.shape == (len(split), 20) and labels.dtype == np.int8 and set(np.unique(labels)) == {-1, 0, 1}
        for sample, row in zip(split.samples, labels, strict=True):
            objects = sample.objects()
            for label in range(20):
                mine = objects.difficult[objects.labels == label]
                assert row[label] == (-1 if not len(mine) else 0 if mine.all() else 1)


def test_boxes_hold_the_pixels_of_the_mask(voc):
    """Counted from 1 with the last one inside in the file; from the edge here. Parts of objects are passed over."""
    split = read_split([voc], "Segmentation", "trainval")
    for sample in split.samples:
        image, objects = sample.image(), sample.objects()
        mask = np.array(sample.mask(image.size))
        assert image.mode == "RGB" and mask.shape == image.size[::-1]
        assert set(np.unique(mask)) == {0, VOID, *(objects.labels + 1)}
        boxed = np.zeros_like(mask, np.bool_)
        for x0, y0, x1, y1 in objects.boxes.astype(int):
            ys, xs = np.nonzero(mask[y0:y1, x0:x1])
            assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == (0, 0, x1 - x0, y1 - y0)
            boxed[y0:y1, x0:x1] = True
        assert not mask[~boxed].any()


def test_several_folders_are_joined(voc, tmp_path):
    other = voc_folder(tmp_path / "VOC2012", (("trainval", 5),), seed=1)
    both = read_split([voc, other], "Main", "trainval")
    assert len(both) == 17 and both.samples[12].root == other and both.title == "VOC2007+VOC2012 trainval"
    alone = read_split([other], "Main", "trainval")
    np.testing.assert_array_equal(both.labels[12:], alone.labels)
    assert both.digest() != read_split([voc], "Main", "trainval").digest()
    check_disjoint(both, read_split([voc], "Main", "test"))
    assert "12 images are in both" in refusal(check_disjoint, both, read_split([voc], "Main", "trainval"))
    assert "twice" in refusal(read_split, [voc, voc], "Main", "trainval")


def test_the_digests_of_images_and_of_annotations(voc, tmp_path):
    again = voc_folder(tmp_path / "again")
    first, second = (read_split([root], "Main", "test") for root in (voc, again))
    assert first.digest() == second.digest() == first.digest()
    truth = [split.digest(lambda sample: sample.annotation_path.read_bytes()) for split in (first, second)]
    assert truth[0] == truth[1] != first.digest()
    path = second.samples[0].annotation_path
    path.write_text(path.read_text() + " ")
    assert second.digest(lambda sample: sample.annotation_path.read_bytes()) != truth[0]
    Image.new("RGB", (5, 5)).save(second.samples[0].image_path)
    assert second.digest() != first.digest()


@pytest.mark.parametrize("harm", ["none", "empty", "parent", "devkit's parent", "file"])
def test_a_folder_that_is_no_voc(voc, tmp_path, harm):
    root = {"none": tmp_path / "none", "empty": tmp_path, "parent": voc.parent, "file": tmp_path / "file"}.get(harm)
    (tmp_path / "file").touch()
    if harm == "devkit's parent":
        (tmp_path / "VOCdevkit").mkdir()
        root = tmp_path
    line = refusal(read_split, [root], "Main", "trainval")
    assert f"--root {root}" in line and "VOC2007" in line


def test_a_split_that_is_not_there(voc):
    line = refusal(read_split, [voc], "Main", "val")
    assert str(voc / "ImageSets" / "Main" / "val.txt") in line and "there are test, trainval;" in line


@pytest.mark.parametrize("text", ["../../etc/passwd\n", "a b\n", "", "\xff\xfe", "/etc/x\n"])
def test_a_list_that_names_no_images(one, text):
    path = one.root / "ImageSets" / "Main" / "trainval.txt"
    path.write_bytes(text.encode("latin-1"))
    assert str(path) in refusal(read_split, [one.root], "Main", "trainval")


@pytest.mark.parametrize("text", ["000001 2\n", "000001\n", "", "other 1\n"])
def test_a_list_of_a_class_that_is_damaged(one, text):
    path = one.root / "ImageSets" / "Main" / "cow_trainval.txt"
    path.write_text(text)
    split = read_split([one.root], "Main", "trainval")
    assert str(path) in refusal(lambda: split.labels)
    path.unlink()
    assert str(path) in refusal(lambda: read_split([one.root], "Main", "trainval").labels)


BOMB = '<!DOCTYPE a [<!ENTITY e0 "aaaaaaaaaa">' + "".join(
    f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">' for i in range(1, 11)
) + "]><annotation>&e10;</annotation>"  # fmt: skip


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("text", [
    BOMB,
    '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/hostname">]><annotation>&x;</annotation>',
    '<!DOCTYPE a SYSTEM "http://localhost/a.dtd"><annotation/>',
    "<!DOCTYPE a><annotation/>",
])  # fmt: skip
def test_a_document_type_is_refused(one, text, encoding):
    one.annotation_path.write_bytes(text.encode(encoding))
    start = time.monotonic()
    line = refusal(parse_xml, one.annotation_path)
    assert str(one.annotation_path) in line and "DTD" in line and time.monotonic() - start < 5


@pytest.mark.parametrize(
    "text",
    ["", "<annotation>", "no xml", "\0", "<?xml version='1.0' encoding='klingon'?><annotation/>", "&x;", "<a>&x;</a>"],
)  # fmt: skip
def test_xml_that_is_damaged(one, text):
    one.annotation_path.write_text(text)
    assert f"{one.annotation_path}: no annotation in XML" in refusal(one.objects)


def test_an_annotation_that_is_cut_short_missing_or_huge(one):
    data = one.annotation_path.read_bytes()
    one.annotation_path.write_bytes(data[: len(data) // 2])
    assert f"{one.annotation_path}: no annotation in XML" in refusal(one.objects)
    one.annotation_path.write_bytes(data + b" " * (1 << 20))
    assert "bytes" in refusal(one.objects)
    one.annotation_path.unlink()
    assert f"{one.annotation_path}: cannot be read: No such file" in refusal(one.objects)


@pytest.mark.parametrize(
    ("objects", "words"),
    [
        ([("bird", ("x", 1, 5, 5), 0)], "bndbox/xmin of an object is 'x'"),
        ([("bird", ("", 1, 5, 5), 0)], "bndbox/xmin of an object is ''"),
        ([("bird", ("nan", 1, 5, 5), 0)], "'nan'"),
        ([("bird", (5, 1, 4, 5), 0)], "holds no pixel"),
        ([("bird", (1, 6, 4, 5), 0)], "holds no pixel"),
        ([("birt", (1, 1, 4, 5), 0)], "unknown class 'birt': did it mean 'bird'?"),
        ([("", (1, 1, 4, 5), 0)], "unknown class ''"),
    ],
)
def test_an_object_that_is_damaged(one, objects, words):
    one.annotation_path.write_text(annotation(objects, 60, 40))
    line = refusal(one.objects)
    assert words in line and str(one.annotation_path) in line


def test_objects_as_voc_writes_them(one):
    one.annotation_path.write_text(
        "<?xml version='1.0'?>\n<annotation><object><name> tvmonitor\n</name><bndbox><ymax>7.5</ymax><xmax>5</xmax>"
        "<ymin>1</ymin><xmin>5</xmin></bndbox></object></annotation>"
    )
    objects = one.objects()
    assert objects.boxes.tolist() == [[4, 0, 5, 7.5]] and objects.labels.tolist() == [CLASSES.index("tvmonitor")]
    assert objects.difficult.tolist() == [False]
    one.annotation_path.write_text("<annotation></annotation>")
    objects = one.objects()
    assert objects.boxes.shape == (0, 4) and objects.labels.shape == objects.difficult.shape == (0,)


def test_images_that_are_damaged(one):
    data = one.image_path.read_bytes()
    for harm in (data[: len(data) // 2], b"", b"no picture"):
        one.image_path.write_bytes(harm)
        assert f"{one.image_path}: can not be read as an image" in refusal(one.image)
    one.image_path.unlink()
    assert str(one.image_path) in refusal(one.image)
    Image.new("I;16", (4, 4)).save(one.image_path, "PNG")
    assert "16" in refusal(one.image)
    assert Sample(one.root, one.id).mask_path == one.mask_path


def test_masks_that_are_damaged(one):
    size = one.image().size
    data = one.mask_path.read_bytes()
    one.mask_path.write_bytes(data[: len(data) // 2])
    assert f"{one.mask_path}: can not be read as an image" in refusal(one.mask, size)
    Image.new("L", (3, 3)).save(one.mask_path)
    assert "is 3x3 pixels, its image" in refusal(one.mask, size)
    Image.new("L", size, 21).save(one.mask_path)
    assert "class index 21" in refusal(one.mask, size)
    Image.new("RGB", size).save(one.mask_path)
    assert "mode 'RGB'" in refusal(one.mask, size)
