"""Photos as people have them: flat folders, on their side, of kinds that no one reads; and the way back to a file."""

import json
import os
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from ssl_dist import cli, config
from ssl_dist.convert.command import PHOTOS_BATCH_SIZE, usage
from ssl_dist.convert.encode import encode
from ssl_dist.data import file_names, manifest
from ssl_dist.data.beton import Beton
from ssl_dist.data.manifest import Encoding
from ssl_dist.data.pillow import TURNS
from ssl_dist.data.readers import Dataset
from ssl_dist.errors import UserError
from tests.conversions import refusal, run, shown
from tests.make_images import picture, save

ORIENTATION = 0x0112
CONFIGS = Path(__file__).parents[1]


def exif(orientation):
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags


def command_in(message):
    """The words of the command between backticks."""
    return shlex.split(message.split("`")[1])


# ------------------------------------------------------------------------------------------------------- orientation


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_all_orientations_are_pillows(tmp_path, kind):
    """Against `ImageOps.exif_transpose`, with pixels (small images) and JPEG (large ones)."""
    sizes = ((40, 60), (70, 90))
    for value in range(1, 9):
        for height, width in sizes:
            save(tmp_path / "in" / f"{value}-{height}.{kind}", picture(height, width, value), exif=exif(value))
    for name, options in (("out", {}), ("old", {"ignore_orientation": True})):
        record = run("folder", tmp_path / "in", tmp_path / name, unlabeled=True, name="photos", **options)
        turns = not options
        assert record.splits["unlabeled"].turned == (14 if turns else 0)
        assert record.encoding.orientation == ("applied" if turns else "ignored")
        file = Beton(tmp_path / name / "unlabeled.beton")
        for i, path in enumerate(sorted((tmp_path / "in").iterdir())):
            there = Image.open(path)
            expected = np.asarray((ImageOps.exif_transpose(there) if turns else there).convert("RGB"))
            got = shown(file, i, tmp_path)
            assert got.shape == expected.shape, path
            if max(got.shape) <= 64 or (kind == "jpg" and (path.name[0] == "1" or not turns)):
                assert np.array_equal(got, expected), path
            else:  # compressed anew
                assert np.abs(got.astype(int) - expected).mean() < 4, path
                (tmp_path / "one.jpg").write_bytes(file.sample(i).tobytes())
                assert Image.open(tmp_path / "one.jpg").getexif().get(ORIENTATION) is None  # or viewers turn it again
    assert set(TURNS) == set(range(2, 9))
    for reader in ("arrays", "ffcv"):
        pytest.importorskip("ffcv") if reader == "ffcv" else None
        with Dataset(tmp_path / "out", reader=reader).open("unlabeled") as opened:
            (batch,) = opened.batches([np.arange(16)])
        for i in range(16):
            height, width = batch.heights[i], batch.widths[i]
            assert np.array_equal(batch.pixels[i, :height, :width], shown(file_of(tmp_path / "out"), i, tmp_path))


def file_of(root):
    return Beton(root / "unlabeled.beton")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # as a conversion does
@pytest.mark.parametrize("tags", [b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0nonsense", exif(9), exif(0)])
def test_an_orientation_that_is_none(tmp_path, tags):
    """The pixels are sound, so they are taken as they lie, and a JPEG keeps its bytes."""
    path = save(tmp_path / "a.jpg", picture(70, 90), exif=tags)
    sample = encode(path.read_bytes(), Encoding(raw_side=64, max_side=512, jpeg_quality=95, orientation="applied"))
    assert sample.data == path.read_bytes() and not sample.turned


def test_another_choice_of_orientation_is_converted_again(tmp_path, capsys):
    save(tmp_path / "in" / "a.jpg", picture(70, 90), exif=exif(6))
    for ignore, size in ((False, (90, 70)), (True, (70, 90)), (False, (90, 70))):
        run("folder", tmp_path / "in", tmp_path / "out", unlabeled=True, ignore_orientation=ignore, progress=True)
        file = file_of(tmp_path / "out")
        assert (int(file.heights[0]), int(file.widths[0])) == size
        assert ("1 images are turned upright" in capsys.readouterr().err) == (not ignore)


# ------------------------------------------------------------------------------------------------------------ folders


@pytest.mark.parametrize("layout", ["flat", "beside classes", "in train"])
def test_a_folder_without_classes_is_told_the_command_that_takes_it(tmp_path, layout, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root, out = Path("my photos"), Path("out")
    save(root / ("train" if layout == "in train" else "") / "a.png", picture(70, 70))
    save(root / ("train" if layout == "in train" else "") / "b.png", picture(70, 70))
    if layout == "beside classes":
        save(root / "cat" / "c.png", picture(70, 70))
    message = refusal("folder", root, out, name="mine")
    for words in ("(a.png)", "ROOT/<class>/", "ROOT/{train,test}/<class>/", "ROOT/unlabeled/"):
        assert words in message
    program, *words = command_in(message)
    assert program == "ssl-dist" and cli.main(words) == 0
    record = manifest.load(out)
    assert (record.name, record.pretraining, record.splits["unlabeled"].labelled) == ("mine", "unlabeled", False)
    assert record.splits["unlabeled"].count == (3 if layout == "beside classes" else 2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        f"out: done: unlabeled ({record.splits['unlabeled'].count} images); use it with data.root=out data.name=mine"
    )
    _, verb, *words = shlex.split(lines[1])
    assert verb == "train"
    assert words[0] == "configs/photos/simclr-resnet18-96px.yaml", "which the package brings"
    assert cli.main(["explain", *words, "data.reader=arrays"]) == 0
    without_name = [word for word in words if not word.startswith("data.name")]
    assert cli.main(["explain", *without_name, "data.reader=arrays"]) == 0
    explained = capsys.readouterr().out
    assert explained.count("mine, split unlabeled") == 2 and "simclr" in lines[1]
    assert config.load(CONFIGS / "configs/photos/simclr-resnet18-96px.yaml").optim.batch_size == PHOTOS_BATCH_SIZE


def test_unlabeled_is_of_folders_alone(tmp_path):
    assert "--unlabeled" in refusal("digits", None, tmp_path / "out", unlabeled=True)


def test_photos_of_a_phone_are_counted_and_the_remedy_is_named(tmp_path, capsys):
    save(tmp_path / "in" / "a.png", picture(9, 9))
    for name in ("1.heic", "2.HEIC", "3.heif", "c.gif", "d.mp4", "Thumbs.db"):
        (tmp_path / "in" / name).write_bytes(b"x")
    run("folder", tmp_path / "in", tmp_path / "out", unlabeled=True, progress=True)
    line = next(line for line in capsys.readouterr().err.splitlines() if "ignored" in line)
    assert "ignored: 2 .heic (make JPEG of them first: `heif-convert A.heic A.jpg`)" in line
    assert all(words in line for words in ("1 .heif (make", "1 .gif", "1 .mp4", "1 .db"))
    (tmp_path / "in" / "named.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    message = refusal("folder", tmp_path / "in", tmp_path / "none", unlabeled=True)
    assert "named.jpg: HEIC, AVIF or a film, whatever its name says; make JPEG" in message
    os.remove(tmp_path / "in" / "named.jpg")
    os.remove(tmp_path / "in" / "a.png")
    assert "2 .heic (make JPEG" in refusal("folder", tmp_path / "in", tmp_path / "none", unlabeled=True)


def test_what_is_left_out_is_explained(tmp_path, capsys):
    for name in ("a", "b", "c"):
        save(tmp_path / "in" / f"{name}.png", picture(9, 9))
    (tmp_path / "in" / "b.png").write_text("no image")
    record = run("folder", tmp_path / "in", tmp_path / "out", unlabeled=True, skip_damaged=True)
    assert list(record.splits["unlabeled"].skipped) == ["b.png"]
    words = shlex.split(usage(tmp_path / "out", record).splitlines()[1])[2:]
    assert cli.main(["explain", *words, "data.reader=arrays"]) == 0
    assert capsys.readouterr().out.count("(1 damaged ones left out by convert --skip-damaged") == 1


# --------------------------------------------------------------------------------------------- from an id to its file

ODD = ["a b ü.png", "back\\slash.png", "line\nfeed.png", "re\rturn.png", "n\\nx.png", os.fsdecode(b"caf\xe9.png")]


def test_every_image_has_its_file_in_a_line(tmp_path):
    for i, name in enumerate(ODD):
        save(tmp_path / "in" / "sub" / name, picture(9, 9, i))
    (tmp_path / "in" / "sub" / "bad.png").write_text("no image")
    run("folder", tmp_path / "in", tmp_path / "out", unlabeled=True, skip_damaged=True)
    lines = Dataset(tmp_path / "out").files("unlabeled")
    assert (tmp_path / "out" / "unlabeled-files.txt").read_bytes().count(b"\n") == len(lines) == len(ODD)
    file = file_of(tmp_path / "out")
    for i, line in enumerate(lines):
        there = Image.open(tmp_path / "in" / file_names.unescaped(line))
        assert np.array_equal(shown(file, i, tmp_path), np.asarray(there))
    assert "sub/a b ü.png" in lines and "sub/line\\nfeed.png" in lines and "sub/caf\\xe9.png" in lines


def test_the_list_of_files_is_checked_and_written_anew(tmp_path):
    save(tmp_path / "in" / "a.png", picture(9, 9))
    save(tmp_path / "in" / "b.png", picture(9, 9))
    run("folder", tmp_path / "in", tmp_path / "out", unlabeled=True)
    path = tmp_path / "out" / "unlabeled-files.txt"
    path.write_text("b.png\na.png\n")
    with pytest.raises(UserError, match=r"not the list that was written.*convert again"):
        Dataset(tmp_path / "out").files("unlabeled")
    path.unlink()
    assert Dataset(tmp_path / "out").files("unlabeled") is None
    tree = json.loads((tmp_path / "out" / "dataset.json").read_text())
    del tree["splits"]["unlabeled"]["files"]  # of before there was one
    (tmp_path / "out" / "dataset.json").write_text(json.dumps(tree))
    assert Dataset(tmp_path / "out").files("unlabeled") is None
    run("folder", tmp_path / "in", tmp_path / "out", unlabeled=True)
    assert Dataset(tmp_path / "out").files("unlabeled") == ["a.png", "b.png"]


def test_images_without_files_have_no_list(tmp_path):
    run("digits", None, tmp_path / "digits")
    assert Dataset(tmp_path / "digits").files("test") is None and not list((tmp_path / "digits").glob("*.txt"))
