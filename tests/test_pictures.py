"""What a method draws of some images while it trains: in TensorBoard, in the run's folder, on its page; and that the
training is the same with it and without."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ssl_dist import config
from ssl_dist.config import Normalize
from ssl_dist.data.normalize import normalized, pixels_of
from ssl_dist.methods import mae, simclr
from ssl_dist.report import report
from ssl_dist.storage import checkpoint
from ssl_dist.train.loop import train


def settings(digits, run, name, *more):
    return config.load(
        f"configs/digits/{name}.yaml",
        [
            f"data.root={digits}", f"run_dir={run}", "data.reader=arrays", "data.workers=1", "data.limit=32",
            "optim.batch_size=16", "optim.epochs=2", "log.images_every_epochs=1", "log.every_steps=1", *more,
        ],
    )  # fmt: skip


def columns_of(board, name, number):
    """The last picture of a name, column by column [number, images, 3, 32, 32]."""
    picture = np.asarray(Image.open(io.BytesIO(board.Images(name)[-1].encoded_image_string)))
    padded = np.pad(picture, ((0, 2), (0, 2), (0, 0))).reshape(8, 34, number, 34, 3)
    return padded[:, :32, :, :32].transpose(2, 0, 4, 1, 3).astype(int)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_mae_draws_what_it_sees_and_predicts(digits, tmp_path, precision):
    pytest.importorskip("timm")
    run = tmp_path / "run"
    assert train(settings(digits, run, "mae-vit_tiny_patch16_224", f"precision={precision}")) == 0
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Images("reconstruction")] == [1, 2, 4]
    seen, predicted, image = columns_of(board, "reconstruction", 3)
    [views] = columns_of(board, "views", 1)
    np.testing.assert_array_equal(image, views)
    cells = [column.reshape(8, 3, 4, 8, 4, 8) for column in (seen, predicted, image)]
    gray = (cells[0] == round(255 * 0.3091)).all((1, 3, 5))  # the mean of the digits, what is hidden
    assert (gray.sum((1, 2)) >= 12).all()
    same = [(cell == cells[2]).all((1, 3, 5)) for cell in cells[:2]]
    assert (same[0] | gray).all() and (same[0].sum((1, 2)) >= 4).all()
    assert (same[1] >= (same[0] & ~gray)).all(), "what is seen is not predicted"
    assert (~same[1]).sum() > 8 * 6
    with Image.open(run / "figures" / "reconstruction.png") as picture:
        assert picture.text["Title"] == "reconstruction" and picture.text["Description"] == "drawn after step 4"
    report([run], run / "page.html")
    page = (run / "page.html").read_text(encoding="utf-8")
    assert "<h3>training</h3>" in page and "drawn after step 4" in page and "of which checkpoint" not in page


def test_they_come_after_their_epochs_whichever_steps_are_logged(digits, tmp_path):
    run = tmp_path / "run"
    assert train(settings(digits, run, "simclr-conv4", "log.every_steps=3")) == 0
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [1, 3, 4]
    assert [event.step for event in board.Images("views")] == [1, 2, 4]


def drawing(self, batch):
    """Passes the images, which would move BatchNorm's running statistics in training mode."""
    assert not self.training and not torch.is_grad_enabled()
    self.backbone(batch.views[0].flatten(0, 1))
    return {"twice": {"one": batch.views[0][0], "other": batch.views[0][1]}}


@pytest.mark.parametrize("more", [[], ["compile=true"]], ids=["eager", "compiled"])
def test_pictures_leave_the_training_as_it_is(digits, tmp_path, monkeypatch, more):
    if more:
        monkeypatch.setattr(torch, "compile", lambda function: function)
    states = []
    for number in range(2):
        run = tmp_path / str(number)
        assert train(settings(digits, run, "simclr-conv4", *more)) == 0
        states.append(checkpoint.load(checkpoint.newest(run)))
        assert (run / "figures" / "twice.png").exists() == (number == 1)
        monkeypatch.setattr(simclr.Method, "pictures", drawing)
    for part in ("method", "optimizer"):
        one, other = (torch.utils._pytree.tree_leaves(state[part]) for state in states)
        assert all(
            torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, other, strict=True)
        )


def test_maes_pictures_leave_its_training_as_it_is(digits, tmp_path, monkeypatch):
    pytest.importorskip("timm")
    states = []
    for number in range(2):
        assert (
            train(settings(digits, tmp_path / str(number), "mae-vit_tiny_patch16_224", "backbone.drop_path=0.1")) == 0
        )
        states.append(checkpoint.load(checkpoint.newest(tmp_path / str(number)))["method"])
        monkeypatch.setattr(mae.Method, "pictures", lambda self, batch: {})
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_pixels_come_back(dtype):
    constants = Normalize(mean=(0.3, 0.5), std=(0.1, 0.7))
    highest = 255 if dtype == torch.uint8 else 65535
    pixels = torch.arange(2 * highest + 2).remainder(highest + 1).reshape(1, 1, 2, 1, highest + 1).to(dtype)
    images = normalized(constants, torch.float64, torch.device("cpu"))(pixels)
    assert torch.equal(pixels_of(images, constants, dtype).int(), pixels.int())
    assert pixels_of(torch.tensor([-100.0, 100.0])[:, None, None], constants, dtype).flatten().tolist() == [0, highest]
