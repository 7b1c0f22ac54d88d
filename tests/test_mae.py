"""MAE against a reference written from the paper: its error, masks, refusals; mutations that the certificate finds."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ssl_dist import cli, config
from ssl_dist.backbones import timm_model
from ssl_dist.config import shipped
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.errors import NotInstalled
from ssl_dist.keys import hash64
from ssl_dist.methods import mae
from ssl_dist.methods.base import Batch
from ssl_dist.nn.patches import PatchDecoder, patchified, sines, unpatchified
from ssl_dist.run.blueprint import derive
from ssl_dist.train import explain, operations
from ssl_dist.verify import command as verify
from tests import mutations

pytest.importorskip("timm")

CONFIG = "configs/digits/mae-vit_tiny_patch16_224.yaml"
SIDE = 4


@pytest.fixture
def plan_of(digits, tmp_path):
    def make(*overrides):
        place = [f"data.root={digits}", f"run_dir={tmp_path / 'run'}", "data.reader=arrays", "optim.batch_size=8"]
        return derive(config.load(CONFIG, [*place, *overrides]), RankInfo())

    return make


def images(number=3, channels=3, size=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, channels, size, size, generator=generator, dtype=torch.float64)


def batch_of(views, image_ids=None, step=0):
    ids = torch.arange(len(views)) if image_ids is None else torch.tensor(image_ids)
    return Batch([views[None]], [torch.zeros(1, dtype=torch.int64)], ids, torch.full_like(ids, -1), ids, step)


# ---------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_patches_are_taken_out_and_put_back(channels):
    x = images(channels=channels)
    patches, expected = patchified(x, SIDE), []
    for row in range(3):
        for column in range(3):
            block = x[0, :, SIDE * row : SIDE * (row + 1), SIDE * column : SIDE * (column + 1)]
            expected.append([float(block[c, i, j]) for i in range(SIDE) for j in range(SIDE) for c in range(channels)])
    assert patches[0].tolist() == expected
    assert torch.equal(unpatchified(patches, SIDE), x)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_the_error_is_that_of_hidden_patches_pixel_by_pixel(norm_pix_loss):
    patches, predicted = patchified(images(), SIDE), patchified(images(seed=1), SIDE)
    hidden = torch.ones(3, 9, dtype=torch.float64).scatter(1, torch.tensor([[0, 4], [8, 2], [5, 3]]), 0)
    errors = []
    for image in range(3):
        for patch in range(9):
            if hidden[image, patch]:
                target = patches[image, patch].tolist()
                if norm_pix_loss:
                    mean = sum(target) / len(target)
                    variance = sum((pixel - mean) ** 2 for pixel in target) / (len(target) - 1)
                    target = [(pixel - mean) / math.sqrt(variance + 1e-6) for pixel in target]
                pairs = zip(predicted[image, patch].tolist(), target, strict=True)
                errors.append(sum((a - b) ** 2 for a, b in pairs) / len(target))
    loss = mae.hidden_error(predicted, patches, hidden, norm_pix_loss)
    assert len(errors) == 21 and float(loss) == pytest.approx(sum(errors) / 21, rel=1e-12)


def test_a_patch_of_one_colour_has_a_finite_error():
    patches = torch.full((1, 2, 12), 0.3)
    loss = mae.hidden_error(torch.zeros(1, 2, 12), patches, torch.tensor([[1.0, 0.0]]))
    assert float(loss) < 1e-6


def test_positions_are_sines_and_cosines_of_column_and_row():
    found = sines(8, 2, 3)
    for row in range(2):
        for column in range(3):
            expected = [
                wave(place / 10000 ** (i / 2))
                for place in (column, row)
                for wave in (math.sin, math.cos)
                for i in (0, 1)
            ]  # fmt: skip
            assert found[3 * row + column].tolist() == pytest.approx(expected, abs=1e-15)


# ---------------------------------------------------------------------------------------------------- masks


def test_what_is_seen_is_a_function_of_seed_step_and_image(plan_of):
    method, views = plan_of().build(), torch.zeros(4, 3, 32, 32)
    seen = method._seen(batch_of(views, [7, 3, 900, 0], step=5))
    assert seen.shape == (4, 4) and all(len(set(row)) == 4 and set(row) <= set(range(16)) for row in seen.tolist())
    assert torch.equal(method._seen(batch_of(views, [0, 900, 3, 7], step=5)), seen.flip(0))
    assert torch.equal(method._seen(batch_of(views[:1], [900], step=5)), seen[2:3])
    assert not torch.equal(method._seen(batch_of(views, [7, 3, 900, 0], step=6)), seen)
    assert not torch.equal(plan_of("seed=1").build()._seen(batch_of(views, [7, 3, 900, 0], step=5)), seen)


def test_all_patches_are_hidden_alike():
    seen = mae.seen_patches(hash64(0), np.arange(4000), 16, 4)
    counts = np.bincount(seen.ravel(), minlength=16)
    assert abs(counts - 1000).max() < 5 * math.sqrt(4000 * 0.25 * 0.75)
    together = (seen == 0).any(1) & (seen == 1).any(1)
    assert together.mean() == pytest.approx(4 / 16 * 3 / 15, abs=0.015)


def test_hidden_patches_have_no_influence_on_what_is_predicted(plan_of):
    method, views = plan_of("precision=fp64").build().eval(), images(2, size=32)
    batch = batch_of(views)
    seen = method._seen(batch)
    patches = patchified(views, 8)
    hidden = torch.ones(2, 16, dtype=torch.float64).scatter(1, seen, 0)[:, :, None]
    other = unpatchified(patches * (1 - hidden) + 7 * hidden, 8)
    [predicted], [again] = method.outputs(batch), method.outputs(batch_of(other))
    torch.testing.assert_close(again, predicted)
    assert not torch.allclose(method.outputs(batch_of(other * 2))[0], predicted)


def test_the_decoder_knows_tokens_by_the_patches_that_they_are_of():
    torch.manual_seed(0)
    decoder = PatchDecoder(6, 1, (3, 3), 5, 8, 2, 2).double()
    tokens, seen = torch.randn(2, 4, 6, dtype=torch.float64), torch.tensor([[0, 4, 7], [8, 2, 1]])
    predicted = decoder(tokens, seen)
    assert predicted.shape == (2, 9, 5)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(
        decoder(torch.cat([tokens[:, :1], tokens[:, 1:][:, order]], 1), seen[:, order]), predicted
    )
    assert not torch.allclose(decoder(tokens, seen.flip(1)), predicted)


# ---------------------------------------------------------------------------------------------------- as a method


def test_what_learns(plan_of):
    """All but the positions, which are fixed in the encoder too."""
    method = plan_of().build()
    fixed = {name for name, p in method.named_parameters() if not p.requires_grad}
    assert fixed == {"backbone.model.pos_embed"}
    torch.testing.assert_close(method.backbone.model.pos_embed[0, 1:], sines(192, 4, 4).float())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["backbone={name: conv4}"], ["backbone.name", "backbone.name=timm/vit_tiny_patch16_224"]),
        (["data.image_size=36"], ["views of 36 px are not whole patches of 8 px", "a multiple of 8"]),
        (["method.options.mask_ratio=0.99"], ["method.options.mask_ratio = 0.99", "0 of 16 patches would be seen"]),
        (["method.options.mask_ratio=1.0"], ["method.options.mask_ratio"]),
        (["method.options.decoder_heads=5"], ["method.options.decoder_heads", "5 must divide decoder_dim, 64"]),
        (["method.options.decoder_dim=50"], ["method.options.decoder_dim"]),
        (["views.num=2"], ["views.num = 2"]),
    ],
)
def test_it_refuses(digits, tmp_path, capsys, overrides, words):
    place = [f"data.root={digits}", f"run_dir={tmp_path / 'run'}", "data.reader=arrays"]
    assert cli.main(["explain", CONFIG, *place, *overrides]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert all(word in line for word in words), line


def test_the_remedy_for_another_backbone_works(plan_of):
    plan_of("backbone={name: timm/vit_tiny_patch16_224}")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_memory_of_the_decoder_is_counted(plan_of, precision):
    """Its tokens are many and those of the encoder few: 8 blocks more hold at least 8 times what goes through one."""
    few, many = (
        explain.Memory.of(plan_of(f"precision={precision}", f"method.options.decoder_depth={depth}"), "cpu")
        for depth in (2, 10)
    )
    size = 2 if precision == "bf16" else 4
    of_a_block = (
        8 * 17 * 64 * size * (1 + 3 + 1 + 4 + 4)
    )  # what is normalised, its q, k and v, the value, the two layers
    assert many.activations - few.activations > 8 * of_a_block
    seen = plan_of(f"precision={precision}", "method.options.mask_ratio=0.05")
    assert explain.Memory.of(seen, "cpu").activations > 2 * few.activations


def test_products_under_autocast_are_counted_in_half_precision(plan_of):
    full, half = (operations.count(plan_of(f"precision={precision}"), "cuda") for precision in ("fp32", "bf16"))
    assert half.flops == pytest.approx(full.flops)
    assert sum(o.flops for o in full.operations if o.in_float32) == full.flops
    # what torch makes of attention on the meta device is of float32 within, for every transformer
    assert {o.name for o in half.operations if o.in_float32 and o.flops} == {"bmm"}


# ---------------------------------------------------------------------------------------------------- certificates


def without_timm(monkeypatch):
    def absent():
        raise NotInstalled("backbone.name = timm/...: timm is not installed; pip install timm")

    monkeypatch.setattr(timm_model, "timm_package", absent)


def test_verify_without_timm(tmp_path, monkeypatch, capsys):
    without_timm(monkeypatch)
    assert cli.main(["verify", "--method", "mae"]) == 2
    assert capsys.readouterr().err == "error: backbone.name = timm/...: timm is not installed; pip install timm\n"
    monkeypatch.setattr(verify.methods, "names", lambda: ["mae", "random_weights"])
    assert {case.method for case in verify.cases(tmp_path)} == {"random_weights"}
    assert "mae is left out: backbone.name = timm/...: timm is not installed" in capsys.readouterr().err


def test_a_config_is_found_whatever_the_backbone():
    digits = Path("configs/digits")
    assert shipped.of_method("mae", digits) == Path(CONFIG)
    assert shipped.of_method("simclr", digits) == digits / "simclr-conv4.yaml"
    assert shipped.of_method("sim", digits) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "mutation", [mutations.mask_by_place_in_the_batch, mutations.mask_by_rank, mutations.add_up_errors_of_a_rank]
)
def test_a_mutated_method_fails_the_certificate(tmp_path, mutation):
    [case] = [case for case in verify.cases(tmp_path, names=["mae"], steps=1) if case.config.precision == "fp64"]
    rows = verify.certify([case], tmp_path, mutation)
    assert {str(row.grid) for row in rows if not row.holds} == {"2x1", "4x1"}, verify.table(rows)
