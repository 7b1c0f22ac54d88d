"""Pictures of attention and of the patches: the right number at the right place, in a training and after it."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ssl_dist import backbones, cli, config, report
from ssl_dist.data.plan import limited
from ssl_dist.data.readers import Dataset
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.errors import UserError
from ssl_dist.results import attention
from ssl_dist.run.blueprint import derive
from ssl_dist.train.loop import train
from tests import ranks

timm = pytest.importorskip("timm")

STATISTICS = (0.0,) * 3, (1.0,) * 3
VIT = "timm/test_vit"


def vit(name="test_vit", **options):
    torch.manual_seed(0)
    options = {"image_size": 32, "patch_size": 8} | options
    return backbones.build(f"timm/{name}", **options).eval().requires_grad_(False)


def to_input(pixels):
    return pixels / 255 - 0.5


# --------------------------------------------------------------------------------------------------- the numbers


def slow_attention(backbone, image, head):
    """Of one image and head: by the equation softmax(q k / sqrt(d)), one key after the other; [h w] of the patches."""
    x = backbone._embedded(image[None])
    *before, last = backbone.model.blocks
    for block in before:
        x = block(x)
    width = last.attn.qkv.in_features
    query, key, _ = last.attn.qkv(last.norm1(x))[0].split(width, 1)
    dims = width // last.attn.num_heads
    mine = slice(head * dims, (head + 1) * dims)
    scores = [float(query[0, mine] @ key[token, mine]) / math.sqrt(dims) for token in range(len(key))]
    total = sum(math.exp(score) for score in scores)
    return [math.exp(score) / total for score in scores][backbone.num_prefix_tokens :]


@pytest.mark.parametrize("name", ["test_vit", "vit_small_patch14_reg4_dinov2"])
def test_attention_is_that_of_the_class_token_over_the_patches(name):
    """Registers are no patches."""
    backbone = vit(name).double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    found = attention.class_attention(backbone, images)
    num_heads = backbone.model.blocks[-1].attn.num_heads
    assert found.shape == (2, num_heads, 4, 4) and found.dtype == torch.float32
    for n in range(2):
        for head in (0, num_heads - 1):
            expected = torch.tensor(slow_attention(backbone, images[n], head)).view(4, 4)
            torch.testing.assert_close(found[n, head], expected, rtol=1e-5, atol=1e-7)


def slow_components(maps):
    """By numpy's singular values of one row after the other."""
    maps = np.asarray(maps, np.float64)
    number, _, height, width = maps.shape
    places = [(n, r, c) for n in range(number) for r in range(height) for c in range(width)]
    rows = np.array([maps[n, :, r, c] for n, r, c in places])
    rows -= rows.mean(0)
    axes = np.linalg.svd(rows, full_matrices=False)[2][:3]
    out = np.zeros((number, 3, height, width))
    for component, axis in enumerate(axes):
        if max(axis) < -min(axis):
            axis = -axis
        values = [float(row @ axis) for row in rows]
        for (n, r, c), value in zip(places, values, strict=True):
            out[n, component, r, c] = (value - min(values)) / (max(values) - min(values))
    return out


def test_principal_components():
    maps = torch.randn(3, 10, 2, 4) * torch.arange(1, 11)[:, None, None] + 5
    found = attention.principal_components(maps)
    np.testing.assert_allclose(found.numpy(), slow_components(maps), atol=1e-9)
    assert torch.equal(attention.principal_components(maps.clone()), found)
    torch.testing.assert_close(attention.principal_components(-maps), 1 - found), "a sign of its own"
    equal = attention.principal_components(torch.full((2, 8, 3, 3), 0.1) + 1e-9 * torch.randn(2, 8, 3, 3))
    assert equal.isfinite().all() and equal.max() < 0.1, "what rounding leaves is no colour"
    with pytest.raises(UserError, match="not finite, the weights have diverged"):
        attention.principal_components(maps.index_fill(0, torch.tensor([1]), float("nan")))


@pytest.mark.parametrize(("row", "column"), [(1, 3), (3, 0)])
def test_a_patch_is_drawn_where_it_is(row, column):
    """Without positions all patches are alike but a bright one, and so are their squares."""
    backbone = vit()
    backbone.model.pos_embed.zero_()
    pixels = np.full((2, 3, 32, 32), 20, np.uint8)
    square = slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8)
    pixels[1, :, *square] = 250
    by_name = {picture.name: picture for picture in attention.pictures(backbone, pixels, to_input, STATISTICS)}
    assert list(by_name) == ["attention", "patch_pca"]
    assert by_name["attention"].labels == ["image", "mean", "head 0", "head 1"]
    images, mean, heads = by_name["attention"].groups
    assert [group.shape for group in (images, mean, heads)] == [(number, 2, 3, 32, 32) for number in (1, 1, 2)]
    np.testing.assert_array_equal(images[0], pixels)
    for drawn in (mean[0], *heads, by_name["patch_pca"].groups[1][0]):
        assert len(np.unique(drawn[0].reshape(3, -1), axis=1).T) == 1, "the image of one colour"
        bright = drawn[1, :, *square].reshape(3, -1)
        others = np.delete(
            drawn[1].reshape(3, 4, 8, 4, 8).transpose(1, 3, 0, 2, 4).reshape(16, 3, 64), 4 * row + column, 0
        )
        colours = np.unique(bright, axis=1), np.unique(others.transpose(1, 0, 2).reshape(3, -1), axis=1)
        assert [colour.shape for colour in colours] == [(3, 1), (3, 1)] and (colours[0] != colours[1]).any()


def test_the_largest_of_a_map_is_bright_and_nothing_dark():
    shares = torch.tensor([[[0.0, 0.1], [0.2, 0.4]], [[0.01, 0.01], [0.01, 0.01]]])
    colours = attention.colour_map(shares)
    dark, bright = (
        torch.tensor(colour, dtype=torch.float64) for colour in ((0.267, 0.005, 0.329), (0.993, 0.906, 0.144))
    )
    torch.testing.assert_close(colours[0, :, 0, 0], dark, rtol=0, atol=1e-3)
    for place in (colours[0, :, 1, 1], colours[1, :, 0, 1]):
        torch.testing.assert_close(place, bright, rtol=0, atol=1e-3)


def test_the_mean_is_over_the_heads():
    backbone, pixels = vit(), np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), np.uint8)
    shares = attention.class_attention(backbone, to_input(torch.from_numpy(pixels)))
    _, mean, heads = attention.pictures(backbone, pixels, to_input, STATISTICS)[0].groups
    expected = [(shares[:, 0] + shares[:, 1]) / 2, shares[:, 0], shares[:, 1]]
    for drawn, share in zip([mean[0], *heads], expected, strict=True):
        np.testing.assert_array_equal(drawn[:, :, ::8, ::8], attention.enlarged(attention.colour_map(share), 4))
    assert (mean[0] != heads[0]).any() and (heads[0] != heads[1]).any()


def test_without_a_class_token_the_patches_alone_are_shown():
    backbone = vit("vit_base_patch16_gap_224", patch_size=16)
    made = attention.pictures(backbone, np.zeros((1, 3, 32, 32), np.uint8), to_input, STATISTICS, " after step 3")
    assert [picture.name for picture in made] == ["patch_pca"] and "of these images after step 3," in made[0].caption


# ---------------------------------------------------------------------------------------------------- a training


def settings(digits, run, *more):
    tree = {
        "run_dir": str(run), "data": {"name": "digits", "root": str(digits), "reader": "arrays", "limit": 32},
        "backbone": {"name": VIT, "patch_size": 8, "drop_path": 0.2}, "method": {"name": "simclr"},
        "optim": {"name": "adamw", "batch_size": 8, "epochs": 2},
    }  # fmt: skip
    return config.overridden(tree, more)


EVERY = "log.attention_every_epochs=1"


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    assert train(settings(digits, run, EVERY)) == 0
    return run


def state_of(run):
    return torch.load(run / "checkpoints" / "step-00000008.pt", weights_only=True)


def same(ours, theirs):
    ours, theirs = (state_of(run) for run in (ours, theirs))
    assert ours["method"].keys() == theirs["method"].keys()
    return all(torch.equal(value, theirs["method"][name]) for name, value in ours["method"].items())


def test_the_training_is_the_one_without_pictures(run, digits, tmp_path):
    assert train(settings(digits, tmp_path / "plain")) == 0
    assert same(run, tmp_path / "plain")
    metrics = [
        [line.split('"images_per_s"')[0] for line in (one / "metrics.jsonl").read_text().splitlines()]
        for one in (run, tmp_path / "plain")
    ]
    assert metrics[0] == metrics[1] and len(metrics[0]) == 2


def test_pictures_are_in_tensorboard_and_on_the_page(run, digits, tmp_path):
    """They are those of the weights after that step, of images that are always the same."""
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Images("attention")] == [4, 8] == [e.step for e in board.Images("patch_pca")]
    backbone = vit()
    weights = state_of(run)["method"]
    backbone.load_state_dict({k.removeprefix("backbone."): v for k, v in weights.items() if k.startswith("backbone.")})
    backbone.float()
    with Dataset(digits, reader="arrays").open("train") as reader:
        ids = limited(reader.info.count, 32)[limited(32, 8)]
        [(pixels, _, _, _)] = list(reader.batches([ids]))
        mean, std = (torch.tensor(values)[:, None, None] for values in (reader.info.mean, reader.info.std))
    pixels = pixels.transpose(0, 3, 1, 2)
    expected = attention.pictures(backbone, pixels, lambda x: (x / 255 - mean) / std, STATISTICS)
    for picture in expected:
        shown = Image.open(io.BytesIO(board.Images(picture.name)[-1].encoded_image_string))
        shown = np.asarray(shown).astype(int)
        for column, drawn in enumerate(np.concatenate(picture.groups)):
            left = column * 34 + 2 * ((column > 0) + (column > 1 and picture.name == "attention"))
            for n in range(8):
                square = shown[34 * n : 34 * n + 32, left : left + 32]
                assert abs(square - drawn[n].transpose(1, 2, 0)).max() <= 1, (picture.name, column, n)
    names = {"digits-train-attention.png", "digits-train-patch_pca.png"}
    assert {path.name for path in (run / "figures").iterdir()} == names
    page = report.write(report.read([run]), tmp_path / "page.html").read_text()
    assert page.count("in the last block after step 8: the mean") == 1 and "does not say of which" not in page


@pytest.mark.parametrize(
    "more", [["precision=fp64", "backbone.recompute=true"], ["precision=bf16", "optim.accumulate=2"]]
)
def test_other_arithmetic(digits, tmp_path, more):
    assert train(settings(digits, tmp_path / "run", EVERY, "optim.epochs=1", *more)) == 0
    assert len([*(tmp_path / "run" / "figures").glob("*.png")]) == 2


def in_ranks(rank, size, digits, run, *more):
    torch.set_num_threads(1)
    return train(settings(digits, run, *more))


@pytest.mark.slow
def test_rank_0_draws(digits, tmp_path):
    """And the others wait, in the same state."""
    ranks.launch(in_ranks, 2, tmp_path, digits, tmp_path / "drawn", EVERY)
    ranks.launch(in_ranks, 2, tmp_path, digits, tmp_path / "plain")
    assert same(tmp_path / "drawn", tmp_path / "plain")
    assert len([*(tmp_path / "drawn" / "figures").glob("*.png")]) == 2


def test_a_backbone_without_patches_is_refused(digits, tmp_path):
    with pytest.raises(
        UserError, match=r"log\.attention_every_epochs = 3: backbone resnet18 has no patches to show; set"
    ):
        derive(settings(digits, tmp_path, "log.attention_every_epochs=3", "backbone={name: resnet18}"), RankInfo())


# ---------------------------------------------------------------------------------------------------- afterwards


def test_pictures_of_a_finished_run_and_of_weights_of_others(run, digits, tmp_path, capsys):
    assert cli.main(["evaluate", str(run), "attention", "--split", "test", "attention.images=3"]) == 0
    paths = [run / "figures" / f"digits-test-{name}.png" for name in ("attention", "patch_pca")]
    output = capsys.readouterr()
    assert output.out == "" and all(str(path) in output.err for path in paths)
    with Image.open(paths[0]) as picture:
        assert picture.info["Checkpoint"] and picture.info["Title"] == "Attention of the class token"
        assert picture.width > picture.height, "three rows, four columns"
    assert not (run / "results.json").exists()
    page = report.write(report.read([run]), tmp_path / "page.html").read_text()
    assert page.count("<b>Attention of the class token</b>") == 2, "of the training, and of the test split"
    file = tmp_path / "vit.safetensors"
    assert cli.main(["export", str(run), str(file), "--format", "timm"]) == 0
    out = tmp_path / "out"
    words = ["evaluate", str(file), "attention", "--out", str(out), f"data.root={digits}", "data.reader=arrays"]
    assert cli.main(words) == 0
    assert len([*(out / "figures").glob("digits-test-*.png")]) == 2


def test_the_evaluator_refuses_a_backbone_without_patches(random_run, capsys):
    assert cli.main(["evaluate", str(random_run), "attention"]) == 2
    [line] = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("error: attention: backbone conv4 has no patches to show; evaluate a vision transformer")
