"""Whitening, k-means and an epoch of the official DeepCluster: tests/golden/baselines.npz, deepcluster/*."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ssl_dist.clock import Clock
from ssl_dist.config import Normalize
from ssl_dist.data.normalize import normalized
from ssl_dist.distributed.world import one_process
from ssl_dist.kernels import kmeans
from ssl_dist.keys import hash64
from ssl_dist.methods import deepcluster
from ssl_dist.methods.base import Batch, Info, Rows
from tests import golden_fill

FOLDER = Path(os.environ.get("SSL_DIST_GOLDEN", Path(__file__).parent / "golden"))
GOLDEN = {
    key: value for key, value in np.load(FOLDER / "baselines.npz").items() if key.startswith(("deepcluster", "_"))
}
GRAM = 1e-3  # the official whitening works in float32; the cosines are about 1
F32 = 1e-5  # the epoch was trained in float32


def array(name):
    return torch.from_numpy(np.asarray(GOLDEN[f"deepcluster/{name}"]))


def close(ours, name, tolerance):
    expected, ours = array(name).double(), torch.as_tensor(ours).detach().double()
    assert ours.shape == expected.shape, name
    error = (ours - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"{name}: relative error {error:.2e}"


def close_but_for_signs(ours, name):
    """Columns up to their signs, the largest components first."""
    expected = array(name).double()
    ours = ours.flip(1)[:, : expected.shape[1]]
    close(ours * torch.sign((ours * expected).sum(0)), name, GRAM)


def test_whitening_of_narrow_features():
    features = array("small_d/features")
    assert features.shape[1] < deepcluster.WIDE_FEATURES
    x = kmeans.whiten(features, features.shape[1], one_process())
    close(x @ x.T, "small_d/gram", GRAM)
    close_but_for_signs(x, "small_d/whitened_l2")


def test_whitening_of_wide_features():
    features = array("large_d/features").float()
    assert features.shape[1] >= deepcluster.WIDE_FEATURES
    x = kmeans.whiten(features, features.shape[1] // 2, one_process())
    assert list(x.shape) == array("large_d/out_shape").tolist()
    gram = array("large_d/gram_first64")
    close(x[: len(gram)] @ x[: len(gram)].T, "large_d/gram_first64", GRAM)
    close_but_for_signs(x, "large_d/whitened_l2_first16cols")


def test_kmeans_finds_the_groups():
    x, expected = array("blobs/x").double(), array("blobs/labels")
    num_clusters = len(expected.unique())
    for seed in range(5):
        labels, _ = kmeans.kmeans(x, torch.arange(len(x)), len(x), num_clusters, hash64(seed), one_process())
        assert len(set(zip(labels.tolist(), expected.tolist(), strict=True))) == num_clusters
        assert len(set(zip(labels.tolist(), array("blobs/true_group").tolist(), strict=True))) == num_clusters


class Toy(nn.Module):
    def __init__(self, inputs, feature_dim):
        super().__init__()
        self.lin, self.feature_dim = nn.Linear(inputs, feature_dim), feature_dim

    def forward(self, x):
        return self.lin(x.flatten(1))


NAMES = {"feature_extractor": "backbone", "classifier.linear1": "head.0", "classifier.bn1": "head.1"}
NAMES["classifier.linear2"] = "head.3"
LEFT_OUT = "classifier.linear1.bias"  # a BatchNorm follows, which takes it away


def ours(name):
    theirs = next(theirs for theirs in NAMES if name.startswith(theirs + "."))
    return NAMES[theirs] + name.removeprefix(theirs)


def test_an_epoch(monkeypatch):
    """From the authors' features, clusters and last layer on: weights, losses and the network after the epoch."""
    images, clusters = array("train/images"), array("train/pseudolabels")
    batch_size, num_clusters = map(int, array("train/batch_size_k"))
    feature_dim = array("train/features").shape[1]
    drawn = array("train/linear2_after_reset.weight")
    info = Info(len(images), num_clusters, ((1, images.shape[-1]),), batch_size, 1.0, feature_dim)
    options = deepcluster.Options(clusters=num_clusters, hidden=drawn.shape[1])
    method = deepcluster.Method(Toy(images[0].numel(), feature_dim), info, options).train()
    filled = golden_fill.state_dict(GOLDEN, "deepcluster/train")
    state = {ours(name): value for name, value in filled.items() if name != LEFT_OUT}
    missing, unexpected = method.load_state_dict(state, strict=False)
    assert not unexpected and {name.split(".")[0] for name in missing} == {"labels", "weight", "distance"}
    clustered = []

    def find_clusters(x_ND, *_):
        clustered.append(x_ND)
        return clusters, 0.0

    def draw(key, count):
        return drawn.double().flatten().numpy() / deepcluster.LAST_LAYER_STD

    monkeypatch.setattr(deepcluster, "kmeans", find_clusters)
    monkeypatch.setattr(deepcluster, "normals", draw)

    def extract(network, augmented=False, training=False):
        assert not training
        network.eval()
        with torch.no_grad():
            rows = Rows(torch.arange(len(images)), network(images))
        network.train()
        close(rows.values, "train/features", F32)
        return rows

    world, clock = one_process(), Clock(0, len(images) // batch_size, len(images) // batch_size)
    adam, losses, accuracies = torch.optim.Adam(method.parameters(), 1e-3), [], []
    while not clock.done:
        redrawn = method.before_step(clock, extract, world)
        assert len(redrawn) == (2 if clock.step == 0 else 0)
        if redrawn:
            assert redrawn[0] is method.head[3].weight and redrawn[1] is method.head[3].bias
            close(method.weight, "train/class_weights", F32)
            close(redrawn[0], "train/linear2_after_reset.weight", F32)
            assert torch.equal(redrawn[1], array("train/linear2_after_reset.bias"))
            assert torch.equal(method.labels.of_images[0].long(), clusters)
        positions = torch.arange(batch_size) + clock.step * batch_size
        batch = Batch([images[positions][None]], [torch.zeros(1).long()], positions, None, positions, clock.step)
        output = method(batch, world)
        adam.zero_grad()
        output.loss.backward()
        adam.step()
        losses.append(output.loss.item())
        accuracies.append(float(output.metrics["accuracy"]))
        clock = clock.after_step()
    assert len(clustered) == 1 and clustered[0].shape == (len(images), feature_dim)
    close(losses, "train/batch_losses", F32)
    close([np.mean(losses), np.mean(accuracies)], "train/epoch_loss_acc", F32)
    prefix = "deepcluster/train/after_epoch/"
    names = [key.removeprefix(prefix) for key in GOLDEN if key.startswith(prefix)]
    assert names
    for name in names:
        close(method.get_parameter(ours(name)), f"train/after_epoch/{name}", F32)


def test_views_are_made_of_pixels():
    """The official code makes 8-bit images of values that are normalised already: they wrap around. Ours are made of
    the pixels, and normalised once."""
    values, wrapped = array("topil_wrap/in").double(), array("topil_wrap/uint8_out")
    assert torch.equal((values * 255).float().to(torch.int64).remainder(256).to(torch.uint8), wrapped)
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16).contiguous()
    mean, std = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
    normal = normalized(Normalize(mean=mean, std=std), torch.float64, torch.device("cpu"))(pixels)
    shape = (1, 3, 1, 1)
    back = normal * torch.tensor(std).double().view(shape) + torch.tensor(mean).double().view(shape)
    torch.testing.assert_close(back * 255, pixels.double(), rtol=1e-6, atol=1e-4)


def test_a_golden_file_with_other_sizes_is_not_passed_over():
    groups = {key.split("/")[1] for key in GOLDEN if key.startswith("deepcluster/")}
    assert groups == {"small_d", "large_d", "blobs", "train", "topil_wrap"}


@pytest.mark.parametrize("images", deepcluster.Options.model_fields["features_of"].annotation.__args__)
def test_images_that_are_clustered(images):
    """The official code clusters views, in evaluation mode (its comment says otherwise): features_of: augmented."""
    extractions = []

    def extract(network, augmented=False, training=False):
        extractions.append((augmented, training))
        return Rows(torch.arange(8), torch.randn(8, 3))

    info = Info(8, 0, ((1, 4),), 4, 1.0, 3)
    method = deepcluster.Method(Toy(48, 3), info, deepcluster.Options(clusters=2, features_of=images))
    method.before_step(Clock(0, 2, 4), extract, one_process())
    assert extractions == [(images == "augmented", False)]
