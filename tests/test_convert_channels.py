"""Images of C channels with 8 or 16 bits: from their files through a training to features and pictures."""

import io
import json
import sys
from concurrent.futures import ThreadPoolExecutor

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import ssl_dist
from ssl_dist import backbones, cli, config
from ssl_dist.convert.channels import read_channels
from ssl_dist.convert.command import usage
from ssl_dist.data import manifest
from ssl_dist.data.beton import RAW, Beton
from ssl_dist.data.pillow import UnfitImage
from ssl_dist.data.readers import Dataset
from ssl_dist.errors import UserError
from ssl_dist.evaluate.command import evaluate
from ssl_dist.run.encoder import load_encoder
from ssl_dist.storage import weights
from ssl_dist.train.loop import train
from ssl_dist.voc import pretrained
from tests.conversions import refusal, run
from tests.make_images import jpeg, png16, tiff

LIMIT = 10**6


def levels(*shape, bits=16, seed=0):
    return np.random.default_rng(seed).integers(0, 1 << bits, shape, dtype=f"u{bits // 8}")


def npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def write_folder(root, make, per_class=(6, 3), classes=2):
    """root/{train,test}/c<label>/<number>.<suffix> of make(split, label, number) -> (suffix, bytes)."""
    for split, count in zip(("train", "test"), per_class, strict=True):
        for label, number in np.ndindex(classes, count):
            suffix, data = make(split, label, number)
            path = root / split / f"c{label}" / f"{number:03}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return root


# ------------------------------------------------------------------------------------------------ files


PIXELS = levels(5, 7, 4)
EIGHT = levels(5, 7, 4, bits=8)
PLANES = np.moveaxis(PIXELS, -1, 0)
RGB, BLACK, WHITE = {"photometric": "rgb"}, {"photometric": "minisblack"}, {"photometric": "miniswhite"}


@pytest.mark.parametrize(
    ("data", "expected"),
    {
        "npy": (npy(PIXELS), PIXELS),
        "npy of 8 bits": (npy(EIGHT), EIGHT),
        "npy by columns": (npy(np.asfortranarray(PIXELS)), PIXELS),
        "npy of other ends": (npy(PIXELS.astype(">u2")), PIXELS),
        "npy of one plane": (npy(EIGHT[..., 0]), EIGHT[..., :1]),
        "tiff of pages": (tiff(PLANES, **BLACK), PIXELS),
        "tiff of samples": (tiff(EIGHT, planarconfig="contig", **BLACK), EIGHT),
        "tiff of planes": (tiff(PLANES, planarconfig="separate", **BLACK), PIXELS),
        "tiff of rgb": (tiff(PIXELS[..., :3], **RGB), PIXELS[..., :3]),
        "tiff packed": (tiff(PLANES, compression="lzw", **BLACK), PIXELS),
        "tiff of other ends": (tiff(PLANES, byteorder=">", **BLACK), PIXELS),
        "tiff of 16 bits whose white is zero": (tiff(PLANES, **WHITE), 65535 - PIXELS),
        "tiff of 8 bits whose white is zero": (
            data := tiff(EIGHT[..., 0], **WHITE),
            np.asarray(Image.open(io.BytesIO(data)))[..., None],
        ),
        "tiff of 4 bits whose white is zero": (
            tiff(EIGHT[..., 0] >> 4, bitspersample=4, **WHITE),
            15 - (EIGHT[..., :1] >> 4),
        ),
        "big tiff": (tiff(PLANES, bigtiff=True, **BLACK), PIXELS),
        "png of gray": (png16(PIXELS[..., 0]), PIXELS[..., :1]),
        "png of rgb": (png16(PIXELS[..., :3]), PIXELS[..., :3]),
        "png of rgba": (png16(PIXELS), PIXELS),
        "jpeg": (jpeg(EIGHT[..., :3]), np.asarray(Image.open(io.BytesIO(jpeg(EIGHT[..., :3]))))),
    }.values(),
)
def test_files_are_read_as_they_are(data, expected):
    read = read_channels(data, expected.shape[2], LIMIT)
    assert read.dtype.itemsize == expected.dtype.itemsize
    np.testing.assert_array_equal(read, expected)


@pytest.mark.parametrize(
    ("data", "reason"),
    {
        "others": (npy(PIXELS[..., :3]), "has 3 channels, not the 4 of --channels"),
        "first axis": (npy(PLANES), r"save it as \[H, W, C\], numpy.moveaxis"),
        "floats": (npy(PIXELS.astype(np.float32)), "holds float32; save it as uint8 or uint16"),
        "signed": (npy(PIXELS.astype(np.int16)), "holds int16"),
        "objects": (npy(np.array([{}], object), allow_pickle=True), "Python objects, which are never unpickled"),
        "many": (npy(PIXELS[None]), r"holds an array \[1, 5, 7, 4\]; save one image"),
        "cut": (npy(PIXELS)[:-1], "holds 279 bytes of an array .*: damaged"),
        "claims": (npy(PIXELS).replace(b"(5, 7, 4), }   ", b"(5000, 7, 4), }"), "damaged"),
        "header": (npy(PIXELS)[:20], "can not be read"),
        "version": (b"\x93NUMPY\x09\x00" + bytes(200), "version"),
        "pages": (tiff(PIXELS, **BLACK), "has 5 channels, not the 4"),  # [H, W, C] taken for five pages of 7 x 4
        "tiff of floats": (tiff(PLANES.astype(np.float32), **BLACK), "holds float32"),
        "tiff of samples whose white is zero": (
            tiff(PIXELS, planarconfig="contig", **WHITE),
            "4 samples whose white is zero; save them as MinIsBlack",
        ),
        "tiff that is cut": (tiff(PIXELS, planarconfig="contig", compression="zlib", **BLACK)[:-40], "can not be read"),
        "large": (tiff(levels(4, 2000, 2000, bits=8), compression="zlib", **BLACK), "--max-pixels 4000000 reads it"),
        "large png": (png16(levels(1001, 1000)), "--max-pixels 1001000 reads it"),
        "cut png": (png16(PIXELS)[:90], "can not be read"),
        "text": (b"no picture", "can not be read"),
        "empty": (npy(PIXELS[:0]), "0 pixels"),
    }.values(),
)
def test_what_is_not_read(data, reason):
    with pytest.raises(UnfitImage, match=reason):
        read_channels(data, 4, LIMIT)


class Finalized:
    """Garbage in a circle whose collection runs Python: there another thread may take over."""

    def __init__(self):
        self.itself = self

    def __del__(self):
        sum(range(10))


def test_arrays_are_read_on_several_threads():
    # CPython 3.11.7 raises SystemError in about one of 1,000 reads that are not serialized: gh-106905.
    interval = sys.getswitchinterval()
    data = npy(PIXELS)

    def read(_):
        Finalized()
        return read_channels(data, PIXELS.shape[2], LIMIT).shape

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            shapes = set(threads.map(read, range(20_000)))
    finally:
        sys.setswitchinterval(interval)
    assert shapes == {PIXELS.shape}


def test_small_copies_and_masks_in_a_tiff_are_no_channels():
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for plane in PLANES:
            writer.write(plane)
            writer.write(plane[::2, ::2], subfiletype=1)
    np.testing.assert_array_equal(read_channels(file.getvalue(), 4, LIMIT), PIXELS)
    with pytest.raises(UnfitImage, match="pages of several sizes"):
        file = io.BytesIO()
        with tifffile.TiffWriter(file) as writer:
            writer.write(PLANES[0])
            writer.write(PLANES[1, 1:])
        read_channels(file.getvalue(), 2, LIMIT)


def test_png_of_16_bits():
    """Pillow reads gray of them, and of colour the upper bytes: the same file by both. One bit that differs is seen."""
    image = Image.fromarray(levels(9, 8))
    file = io.BytesIO()
    image.save(file, "PNG")
    np.testing.assert_array_equal(read_channels(file.getvalue(), 1, LIMIT)[..., 0], np.asarray(image))
    pixels = levels(9, 8, 3)
    for data in (png16(pixels), imagecodecs.png_encode(pixels)):
        raw = Image.open(io.BytesIO(data)).convert("RGB")
        np.testing.assert_array_equal(read_channels(data, 3, LIMIT), pixels)
        np.testing.assert_array_equal(pixels >> 8, np.asarray(raw))
        damaged = bytearray(data)
        damaged[60] ^= 1
        with pytest.raises(UnfitImage, match="can not be read"):
            read_channels(bytes(damaged), 3, LIMIT)


def test_pages_that_lead_in_a_circle_come_to_an_end():
    data = bytearray(tiff(PLANES, **BLACK))
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        first, last = file.pages[0].offset, file.pages[3].offset
    at = last + 2 + 12 * int.from_bytes(data[last : last + 2], "little")  # where the last page names the next
    data[at : at + 4] = first.to_bytes(4, "little")
    with pytest.raises(UnfitImage, match="has more than 256 pages"):
        read_channels(bytes(data), 4, LIMIT)


@pytest.mark.parametrize(("library", "data"), [("tifffile", tiff(PLANES, **BLACK)), ("imagecodecs", png16(PIXELS))])
def test_without_the_library_its_extra_is_named(monkeypatch, library, data):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=rf"{library}, which is not installed; pip install 'ssl_dist\[tiff\]'"):
        read_channels(data, 4, LIMIT)


# ------------------------------------------------------------------------------------------------ a data set


@pytest.mark.parametrize("bits", [8, 16])
def test_what_is_stored_is_the_source_in_its_order(tmp_path, bits):
    def pixels(split, label, number):
        return levels(12, 9 + number, 5, bits=bits, seed=hash((split == "train", label, number)) % 1000)

    source = write_folder(tmp_path / "source", lambda *image: (".npy", npy(pixels(*image))))
    out = tmp_path / "out"
    made = run("folder", source, out, channels=5)
    assert made.encoding.pixels == (5, bits) and len(made.mean) == len(made.std) == 5
    file, (height, width) = Beton(out / "train.beton"), (12, 14)
    assert (file.modes == RAW).all() and file.pixels == (5, bits) and file.labels.tolist() == [0] * 6 + [1] * 6
    dataset = Dataset(out, reader="arrays")
    with dataset.open("train") as reader:
        [batch] = reader.batches([np.arange(12)])
    assert batch.pixels.shape == (12, height, width, 5)
    everything = []
    for i in range(12):
        expected = pixels("train", i // 6, i % 6)
        np.testing.assert_array_equal(batch.pixels[i, :12, : 9 + i % 6], expected)
        assert not batch.pixels[i, :, 9 + i % 6 :].any()
        everything.append((expected / ((1 << bits) - 1)).reshape(-1, 5))
    mean = np.mean([part.mean(0) for part in everything], 0)
    square = np.mean([(part**2).mean(0) for part in everything], 0)
    np.testing.assert_allclose(made.mean, mean, atol=2e-6)
    np.testing.assert_allclose(made.std, np.sqrt(square - mean**2), atol=2e-6)
    assert json.loads((out / "dataset.json").read_text())["encoding"]["bits"] == bits
    # Again: kept; damaged: made again, to the same bytes; of other channels: refused, and nothing is changed.
    before = (out / "train.beton").read_bytes()
    damaged = bytearray(before)
    damaged[file.pointers[3] + 5] ^= 1
    (out / "train.beton").write_bytes(damaged)
    with Dataset(out, reader="arrays").open("train") as reader, pytest.raises(UserError, match="image 3 is damaged"):
        list(reader.batches([np.arange(12)]))
    assert run("folder", source, out, channels=5).splits == made.splits
    assert (out / "train.beton").read_bytes() == before
    assert "has 5 channels, not the 4 of --channels" in refusal("folder", source, out, channels=4)
    assert (out / "train.beton").read_bytes() == before and manifest.load(out).encoding.channels == 5
    with pytest.raises(UserError, match=r"reads RGB with 8 bits, and .* 5 channels of .*; set data.reader=arrays"):
        Dataset(out).open("train")


def test_larger_images_are_shrunk_channel_by_channel(tmp_path):
    large = levels(40, 30, 4)
    source = write_folder(tmp_path / "source", lambda *_: (".tif", tiff(np.moveaxis(large, -1, 0), **BLACK)), (1, 1))
    run("folder", source, tmp_path / "out", channels=4, max_side=20)
    file = Beton(tmp_path / "out" / "train.beton")
    small = file.sample(0).view(np.uint16).reshape(20, 15, 4)
    for c in range(4):
        plane = Image.fromarray(large[..., c].astype(np.float32)).resize((15, 20), Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(small[..., c], np.clip(np.rint(plane), 0, 65535))


def test_refusals(tmp_path):
    def mixed(split, label, number):
        return ".npy", npy(PIXELS if (split, label, number) == ("train", 0, 0) else EIGHT)

    source, out = write_folder(tmp_path / "source", mixed, (2, 1)), tmp_path / "out"
    assert "has 8 bits a channel, and the first image has 16; save all alike" in refusal(
        "folder", source, out, channels=4
    )
    assert "--channels 0: must be 1..32" in refusal("folder", source, out, channels=0)
    assert "--channels 33: must be 1..32" in refusal("folder", source, out, channels=33)
    assert "only images of one's own" in refusal("digits", None, out, channels=4)
    assert "2 .npy (--channels N reads arrays of images)" in refusal("folder", source / "train" / "c0", out)
    assert not out.exists()
    photos = write_folder(tmp_path / "deep", lambda *_: (".png", png16(PIXELS[..., :3])), (2, 1))
    assert "has 16 bits a channel; convert's --channels 3 keeps them" in refusal("folder", photos, out)
    assert run("folder", photos, out, channels=3).encoding.pixels == (3, 16)


# ------------------------------------------------------------------------------------------------ a training


def scene(label, number, channels, informative):
    """One texture in every channel, with another gain; the class is the gain of one channel. Float [16, 16, C]."""
    rng = np.random.default_rng([label, number])
    coarse = Image.fromarray(rng.random((4, 4)).astype(np.float32))
    gains = np.linspace(0.4, 0.9, channels)
    gains[informative] = (0.2, 0.9)[label]
    texture = np.asarray(coarse.resize((16, 16), Image.Resampling.BICUBIC)).clip(0, 1)[..., None]
    return (texture * gains + rng.normal(0, 0.02, (16, 16, channels))).clip(0, 1)


def of_satellite(split, label, number):
    return ".npy", npy((scene(label, number + 500 * (split == "test"), 13, 9) * 255).astype(np.uint8))


def of_microscope(split, label, number):
    """12 of 16 bits."""
    planes = np.moveaxis(scene(label, number + 500 * (split == "test"), 5, 4) * 4095, -1, 0)
    return ".tif", tiff(planes.astype(np.uint16), **BLACK)


CONFIG = {
    "data": {"reader": "arrays", "image_size": 16, "workers": 1},
    "views": {
        "groups": [{"random_resized_crop": {"scale": [0.5, 1.0]}, "horizontal_flip": 0.5, "color_jitter": {"p": 0.8}}]
    },
    "method": {"name": "simclr"},
    "optim": {"epochs": 4, "batch_size": 32},
}
LOSSLESS = ["views.groups.0.color_jitter.saturation=0", "views.groups.0.color_jitter.hue=0"]


def settings(root, run_dir, *overrides):
    tree = json.loads(json.dumps(CONFIG)) | {"run_dir": str(run_dir)}
    tree["data"]["root"] = str(root)
    return config.overridden(tree, overrides)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of data set and run, by name."""
    folder, found = tmp_path_factory.mktemp("channels"), {}
    for name, make, channels in (("satellite", of_satellite, 13), ("microscope", of_microscope, 5)):
        source = write_folder(folder / f"{name}-source", make, (48, 20))
        run("folder", source, folder / name, channels=channels, name=name)
        assert train(settings(folder / name, folder / f"{name}-run", *LOSSLESS)) == 0
        found[name] = folder / name, folder / f"{name}-run"
    return found


def knn(run_dir):
    _, records = evaluate(run_dir, ["knn"], ["knn.k=[5]"])
    return {record["name"]: record["value"] for record in records}["knn5_top1"]


def test_classes_that_one_channel_tells_apart_and_three_others_do_not(trained, tmp_path):
    (data, run_dir), (_, other) = trained["satellite"], trained["microscope"]
    assert knn(run_dir) > 95 and knn(other) > 95
    source = data.with_name("satellite-source")
    for path in source.rglob("*.npy"):
        to = tmp_path / "rgb" / path.relative_to(source)
        to.parent.mkdir(parents=True, exist_ok=True)
        np.save(to, np.load(path)[..., :3])
    run("folder", tmp_path / "rgb", tmp_path / "data", channels=3, name="rgb")
    assert train(settings(tmp_path / "data", tmp_path / "run", *LOSSLESS)) == 0
    assert knn(tmp_path / "run") < 75
    with pytest.raises(UserError, match=r"its images have 3 channels of .* takes \d+; give images of as many"):
        evaluate(run_dir, ["knn"], [f"data.root={tmp_path / 'data'}"])


def test_what_a_training_says_and_shows(trained, tmp_path, capsys):
    data, run_dir = trained["microscope"]
    assert train(settings(data, tmp_path / "run", *LOSSLESS, "optim.steps=2", "optim.epochs=null")) == 0
    said = capsys.readouterr().err
    assert "pixels  5 channels of 16 bits, normalised by mean and std: those of dataset.json" in said
    assert "pictures show channels 0, 1 and 2 of 5" in said
    assert (run_dir / "views.png").stat().st_size > 1000
    encoder = load_encoder(run_dir)
    assert encoder.normalize.mean == manifest.load(data).mean and encoder.module.in_channels == 5
    evaluate(run_dir, ["retrieval", "probe"], ["probe.epochs=1", "probe.batch_size=32"])
    picture = Image.open(next((run_dir / "figures").glob("*nearest.png")))
    assert "pictures show channels 0, 1 and 2 of 5" in picture.text["Description"]


def test_the_embedder_of_such_a_run(trained):
    data, run_dir = trained["microscope"]
    model = ssl_dist.load(run_dir, device="cpu")
    source = data.with_name("microscope-source") / "test"
    files = sorted(source.rglob("*.tif"))
    arrays = np.stack([read_channels(path.read_bytes(), 5, LIMIT) for path in files])
    assert model.channels == 5
    rows = model.embed(source, progress=False)
    np.testing.assert_array_equal(model.embed(arrays, progress=False), rows)
    np.testing.assert_array_equal(model.embed(torch.from_numpy(arrays).movedim(-1, 1), progress=False), rows)
    for wrong in (arrays[..., :3], Image.new("RGB", (16, 16)), arrays.astype(np.float32)):
        with pytest.raises(ValueError, match=r"give uint8 or uint16 \[H, W, 5\]"):
            model(wrong)
    with pytest.raises(ValueError, match="uint8 and of uint16"):
        model([arrays[0], arrays[0].astype(np.uint8)])
    with pytest.raises(UserError, match="normalize: is of 3 channels, and the network takes 5"):
        ssl_dist.load(run_dir, device="cpu", normalize=([0.5] * 3, [0.2] * 3))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "views.groups.0.color_jitter.saturation: needs red, green and blue with 8 bits"),
        (
            [*LOSSLESS, "views.normalize={mean: [0.5, 0.5, 0.5], std: [0.2, 0.2, 0.2]}"],
            "is of 3 channels, and the images",
        ),
        ([*LOSSLESS, "data.reader=ffcv"], "set data.reader=arrays"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(trained, tmp_path, overrides, message):
    chosen = settings(trained["satellite"][0], tmp_path / "run", *overrides, "optim.steps=1", "optim.epochs=null")
    with pytest.raises(UserError, match=message):
        train(chosen)
    assert not (tmp_path / "run").exists()


def test_voc_is_for_rgb(trained):
    with pytest.raises(UserError, match="takes images of 13 channels, and VOC's are RGB"):
        pretrained.load(trained["satellite"][1], [])


def test_the_command_that_convert_ends_with_is_taken(trained, capsys):
    data = trained["satellite"][0]
    last = usage(data, manifest.load(data)).splitlines()[-1]
    assert "color_jitter.hue=0" in last and "data.reader=arrays" in last
    words = last.split()[2:]
    assert cli.main(["explain", *words, "optim.batch_size=8"]) == 0
    assert "13 channels of 8 bits" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ networks


@pytest.mark.parametrize(
    "name", ["conv4", "resnet8", "resnet18", "resnet18_small_stem", "resnetv2_50", "alexnet_small", "efficientnet_b0",
             "timm/vit_tiny_patch16_224", "timm/resnet18"]
)  # fmt: skip
def test_backbones_take_other_channels(name):
    with torch.device("meta"):
        backbone, usual = backbones.build(name, in_channels=13).eval(), backbones.build(name)
        assert backbone(torch.empty(2, 13, 224, 224)).shape == (2, backbone.feature_dim)
    assert (backbone.in_channels, usual.in_channels) == (13, 3)
    first = next(layer for layer in backbone.modules() if isinstance(layer, torch.nn.Conv2d))
    assert first.weight.shape[1] == 13


@pytest.mark.parametrize("channels", [1, 2, 5, 13])
def test_the_first_layer_of_weights_for_rgb_is_adapted_as_timm_does(tmp_path, channels):
    from timm.models import adapt_input_conv

    usual = backbones.build("resnet18")
    torch.save(usual.state_dict(), tmp_path / "resnet18.pth")
    found = weights.fit(backbones.build("resnet18", in_channels=channels), "resnet18", tmp_path / "resnet18.pth")
    expected = adapt_input_conv(channels, usual.conv1.weight.detach())
    torch.testing.assert_close(found.tensors["conv1.weight"], expected, rtol=1e-6, atol=1e-8)
    assert torch.equal(found.tensors["layer4.1.conv2.weight"], usual.layer4[1].conv2.weight)
    assert f"conv1.weight of 3 channels adapted to {channels} as timm does" in found.note


def test_weights_of_other_channels_than_three_are_not_adapted(tmp_path):
    torch.save(backbones.build("conv4", in_channels=5).state_dict(), tmp_path / "five.pth")
    for channels in (3, 13):
        with pytest.raises(
            UserError, match=f"is of images of 5 channels, and these have {channels}; only weights of 3"
        ):
            weights.fit(backbones.build("conv4", in_channels=channels), "conv4", tmp_path / "five.pth")
