"""The pictures: that the right thing stands at the right place. Their looks are judged by eye."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from ssl_dist.errors import UserError
from ssl_dist.run import mosaic, plots


def read(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def centre_of(picture, color):
    """Mean (row, column) of the pixels of a colour."""
    positions = np.argwhere(abs(picture - np.array(color)).max(2) <= 2)
    assert len(positions) > 100, color
    return positions.mean(0)


@pytest.mark.parametrize("size", [4, 32, 224])
def test_views_stand_in_columns_and_images_in_rows(tmp_path, size):
    num_views, num_images = 3, 2
    views = np.zeros((num_views, num_images, 3, size, size), np.uint8)
    for view in range(num_views):
        for image in range(num_images):
            views[view, image] = np.array([40 + 60 * view, 40 + 100 * image, 200])[:, None, None]
    plots.views_grid(tmp_path / "new" / "views.png", [views])
    picture = read(tmp_path / "new" / "views.png")
    centres = np.array(
        [[centre_of(picture, (40 + 60 * v, 40 + 100 * i, 200)) for v in range(num_views)] for i in range(num_images)]
    )
    assert (np.diff(centres[:, :, 0], axis=0) > 20).all() and (np.diff(centres[:, :, 1], axis=1) > 20).all()
    assert np.ptp(centres[:, :, 0], axis=1).max() < 2 and np.ptp(centres[:, :, 1], axis=0).max() < 2


def test_a_view_stands_upright(tmp_path):
    view = np.zeros((1, 1, 3, 32, 32), np.uint8)
    view[..., :16, :] = np.array([200, 40, 40])[:, None, None]
    view[..., 16:, :] = np.array([40, 40, 200])[:, None, None]
    plots.views_grid(tmp_path / "views.png", [view])
    picture = read(tmp_path / "views.png")
    assert centre_of(picture, (200, 40, 40))[0] < centre_of(picture, (40, 40, 200))[0] - 40


def test_groups_of_views_stand_side_by_side(tmp_path):
    """Each image has one row, and a smaller view is shown smaller, in the middle of it."""
    large, small = (np.zeros((2, 3, 3, size, size), np.uint8) for size in (96, 48))
    large[:, 1], small[:, 1] = 150, np.array([40, 200, 40])[:, None, None]
    page, middles = mosaic.of_views([large, small])
    assert page.shape == (3 * 102 - 6, 96 + 6 + 96 + 12 + 48 + 6 + 48, 3) and middles == [47.5, 149.5, 233.5, 287.5]
    rows, columns = np.nonzero((page == (40, 200, 40)).all(2))
    assert (rows.min(), rows.max()) == (102 + 24, 102 + 71) and columns.min() == 210 and len(rows) == 2 * 48**2
    plots.views_grid(tmp_path / "views.png", [large, small])
    picture = read(tmp_path / "views.png")
    assert abs(centre_of(picture, (40, 200, 40))[0] - centre_of(picture, (150, 150, 150))[0]) < 2


def test_many_views_stay_within_a_page(tmp_path):
    plots.views_grid(tmp_path / "views.png", [np.zeros((64, 2, 3, 32, 32), np.uint8)])
    assert read(tmp_path / "views.png").shape[1] < 3200


def metrics(path, lines, tail=""):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return path


def channels_that_stand_out(picture):
    """Which of red, green and blue are the strongest by far at many pixels: lines are thin, their colours blend."""
    order = np.sort(picture, axis=2)
    stand_out = order[:, :, 2] - order[:, :, 1] > 25
    return {"RGB"[c] for c in range(3) if (stand_out & (picture.argmax(2) == c)).sum() > 100}


def test_loss_curve(tmp_path):
    plain = [{"step": s, "epoch": s / 10, "loss": 1 / s} for s in range(1, 50)]
    plots.loss_curve(tmp_path / "loss.png", metrics(tmp_path / "metrics.jsonl", plain, tail='{"step": 50, "ep'))
    picture = read(tmp_path / "loss.png")
    assert channels_that_stand_out(picture) == {"B"}  # the loss

    # It falls: the first loss stands higher than the last.
    rows, columns = np.nonzero(abs(picture - np.array([0x1F, 0x4E, 0x79])).max(2) <= 2)
    inside = columns > 100  # right of the axis' label
    rows, columns = rows[inside], columns[inside]
    assert rows[columns == columns.min()].mean() < rows[columns == columns.max()].mean() - 100

    both = [line | {"accuracy": 80, "accuracy_positive": 70, "accuracy_negative": 90} for line in plain]
    plots.loss_curve(tmp_path / "loss.png", metrics(tmp_path / "metrics.jsonl", [{"event": "resumed"}, *both]))
    assert channels_that_stand_out(read(tmp_path / "loss.png")) == {"R", "G", "B"}  # negatives, positives, loss


def test_metrics_that_cannot_be_drawn_are_refused(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for content, message in (
        (None, "holds no loss"),
        ("", "holds no loss"),
        ('{"a": 1}\n{"b"\n', "holds no loss"),
        ("a folder", "cannot be read"),
    ):
        if content == "a folder":
            path.unlink()
            path.mkdir()
        elif content is not None:
            path.write_text(content)
        with pytest.raises(UserError, match=message) as caught:
            plots.loss_curve(tmp_path / "loss.png", path)
        assert str(path) in str(caught.value)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=re.escape(str(tmp_path / "file"))):
        plots.views_grid(tmp_path / "file" / "x.png", [np.zeros((1, 1, 3, 4, 4), np.uint8)])
