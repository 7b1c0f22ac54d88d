"""Sinkhorn-Knopp, relabeling and whole trainings of the official SeLa: tests/golden/sela.npz."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssl_dist.clock import Clock
from ssl_dist.distributed.world import one_process
from ssl_dist.kernels import sinkhorn
from ssl_dist.methods import sela
from ssl_dist.methods.base import Batch, Info, Rows

FOLDER = Path(os.environ.get("SSL_DIST_GOLDEN", Path(__file__).parent / "golden"))
GOLDEN = dict(np.load(FOLDER / "sela.npz"))
TOLERANCES = {"main": 0.1, "main_f32": 0.1, "cifar": 0.01}  # where the two official codes end
CIFAR_LAMBDA = 10.0
ERROR = 1e-3  # relative, of Sinkhorn's error: a sum of differences of numbers near 1
NOISE = 1e-12  # an error that is itself rounding
LOOP = 1e-7  # relative, of parameters after a whole training


def keys_matching(pattern):
    return sorted({match.groups() for key in GOLDEN if (match := re.match(pattern, key))})


def array(key):
    return torch.from_numpy(np.asarray(GOLDEN[key]))


def close(ours, key, tolerance):
    expected, ours = array(key).double(), torch.as_tensor(ours).detach().double()
    assert ours.shape == expected.shape, key
    error = (ours - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"{key}: relative error {error:.2e}"


def check_ends(error, iterations, expected):
    assert iterations == expected[1] and iterations % 10 == 1
    assert error == pytest.approx(expected[0], rel=ERROR, abs=NOISE)


# ---------------------------------------------------------------------------------------------------- Sinkhorn-Knopp


@pytest.mark.parametrize(("scores", "lamb", "code"), keys_matching(r"sk/(\w+)/lamb(\d+)/(\w+)/labels"))
def test_sinkhorn_knopp(scores, lamb, code):
    prefix, P = f"sk/{scores}/lamb{lamb}/{code}", array(f"sk/{scores}")
    A = P.log()
    result = sinkhorn.sinkhorn_knopp(A, len(P), float(lamb), TOLERANCES[code], one_process(), "")
    assert torch.equal(result.labels, array(f"{prefix}/labels"))
    check_ends(result.error, result.iterations, GOLDEN[f"{prefix}/err_iters"])
    if code == "main":
        Q_KN = (result.rows[:, None] * A * result.columns).T
        close(Q_KN, f"{prefix}/Q", 1e-9)
        first, second = Q_KN.topk(2, 0).values
        torch.testing.assert_close((first - second) / first, array(f"{prefix}/rel_margin_top2"), rtol=1e-6, atol=1e-9)
        assert torch.equal(result.labels.bincount(minlength=P.shape[1]), array(f"{prefix}/label_histogram"))
    if code == "cifar":
        close(F.nll_loss(P.log(), result.labels), f"{prefix}/cost", 1e-9)


# ---------------------------------------------------------------------------------------------------- relabeling


class Trunk(nn.Module):
    """The fixtures' backbone: relu(Linear(x))."""

    def __init__(self, inputs, feature_dim):
        super().__init__()
        self.features, self.feature_dim = nn.Linear(inputs, feature_dim), feature_dim

    def forward(self, x):
        return F.relu(self.features(x))


def make(prefix, num_images, dtype=torch.float32, batch_size=1, **options):
    """The method with a fixture's weights, and the names of its heads there: `top_layer`, or `top_layer0`, ..."""
    names = {key.removeprefix(prefix) for key in GOLDEN if key.startswith(prefix)}
    heads = sorted(name.removesuffix(".weight") for name in names if re.match(r"top_layer\d*\.weight", name))
    feature_dim, inputs = GOLDEN[f"{prefix}features.weight"].shape
    clusters = len(GOLDEN[f"{prefix}{heads[0]}.bias"])
    info = Info(num_images, 0, ((1, inputs),), batch_size, 1.0, feature_dim)
    method = sela.Method(Trunk(inputs, feature_dim), info, sela.Options(clusters=clusters, heads=len(heads), **options))
    ours = {f"top_layer{head if len(heads) > 1 else ''}": f"heads.{head}" for head in range(len(heads))}
    state = {
        ours.get(name.rpartition(".")[0], "backbone.features") + "." + name.rpartition(".")[2]: array(prefix + name)
        for name in names
    }
    missing, unexpected = method.to(dtype).load_state_dict(state, strict=False)
    assert not unexpected and {name.split(".")[0] for name in missing} == {"labels", "sinkhorn"}
    return method.train(), ours


def extract_from(images):
    """All images in their order; the official code takes the network in training mode, the loader's own images."""

    def extract(network, augmented=False, training=False):
        assert augmented and training and network.training
        with torch.no_grad():
            return Rows(torch.arange(len(images)), network(images))

    return extract


def every_step(step):
    """A clock and options with which labels are due at every step."""
    return Clock(step, 1, step + 1), {"relabelings": 100 * (step + 1)}


class RecordedSinkhorn:
    """Sinkhorn-Knopp as it is, which keeps its results."""

    def __init__(self, monkeypatch):
        self.results, self.original = [], sinkhorn.sinkhorn_knopp
        monkeypatch.setattr(sinkhorn, "sinkhorn_knopp", self)

    def __call__(self, *arguments):
        self.results.append(self.original(*arguments))
        return self.results[-1]


@pytest.mark.parametrize(("case", "lamb"), keys_matching(r"(multi\w*)/lamb(\d+)/labels"))
def test_labels_of_all_heads(case, lamb, monkeypatch):
    recorded, images = RecordedSinkhorn(monkeypatch), array("multi/X")
    clock, options = every_step(0)
    method, _ = make(f"{case}/model/", len(images), lamb=float(lamb), **options)
    assert method.before_step(clock, extract_from(images), one_process()) == []
    assert torch.equal(method.labels.of_images.long(), array(f"{case}/lamb{lamb}/labels"))
    for result, expected in zip(recorded.results, GOLDEN[f"{case}/lamb{lamb}/err_iters"], strict=True):
        check_ends(result.error, result.iterations, expected)
    if f"{case}/lamb{lamb}/PS_pre" in GOLDEN:
        close(method.backbone(images), f"{case}/lamb{lamb}/PS_pre", 1e-6)  # made in float32 there, too


@pytest.mark.parametrize(("epoch",), keys_matching(r"cifar_opt_sk/epoch(\d+)/labels_after"))
def test_one_head_at_a_time(epoch, monkeypatch):
    recorded, images = RecordedSinkhorn(monkeypatch), array("multi/X")
    clock, options = every_step(int(epoch))
    method, _ = make(
        "multi/model/", len(images), lamb=CIFAR_LAMBDA, tolerance=TOLERANCES["cifar"], relabel="one", **options
    )
    method.labels.of_images.copy_(array("cifar_opt_sk/labels_before"))
    method.before_step(clock, extract_from(images), one_process())
    assert torch.equal(method.labels.of_images.long(), array(f"cifar_opt_sk/epoch{epoch}/labels_after"))
    for result, expected in zip(recorded.results, GOLDEN[f"cifar_opt_sk/epoch{epoch}/err_iters"], strict=True):
        check_ends(result.error, result.iterations, expected)


# ---------------------------------------------------------------------------------------------------- schedule


@pytest.mark.parametrize(("case",), keys_matching(r"nopts_main/(\d+)/"))
def test_steps_with_new_labels(case):
    """The official code trains epochs + 1 epochs, and keeps its times in images, behind a sentinel."""
    prefix = f"nopts_main/{case}"
    epochs, count, num_images, batch_size, num_batches = map(int, GOLDEN[f"{prefix}/epochs_nopts_N_bs_loaderlen"])
    times = sela.relabel_times(epochs + 1, count, "quadratic")
    np.testing.assert_allclose(times * num_images, GOLDEN[f"{prefix}/optimize_times_list"][:0:-1], rtol=1e-12)
    steps = sela.relabel_steps(times, num_images / batch_size)
    taken = steps[steps < (epochs + 1) * num_batches]
    assert taken.tolist() == GOLDEN[f"{prefix}/niter_of_sk_calls"].tolist()


@pytest.mark.parametrize(("epochs", "count"), keys_matching(r"nopts_main/formula_epochs(\d+)_nopts(\d+)"))
def test_quadratic_times(epochs, count):
    times = sela.relabel_times(int(epochs) + 1, int(count), "quadratic")
    np.testing.assert_allclose(times, GOLDEN[f"nopts_main/formula_epochs{epochs}_nopts{count}"], rtol=1e-12)


@pytest.mark.parametrize(("epochs", "count"), keys_matching(r"nopts_cifar/epochs(\d+)_nopts(\d+)/"))
def test_linear_times(epochs, count):
    """Here the official code trains `epochs` epochs."""
    times = sela.relabel_times(int(epochs), int(count), "linear")
    expected = GOLDEN[f"nopts_cifar/epochs{epochs}_nopts{count}/times_in_epochs"]
    np.testing.assert_allclose(times, expected[:0:-1], rtol=1e-12)


# ---------------------------------------------------------------------------------------------------- a whole training


@pytest.mark.parametrize(("case",), keys_matching(r"loop/(\w+)/X"))
def test_training(case, monkeypatch):
    prefix, recorded = f"loop/{case}", RecordedSinkhorn(monkeypatch)
    images = array(f"{prefix}/X").double()
    *sizes, num_heads, lr = GOLDEN[f"{prefix}/epochs_nopts_bs_K_hc_lr"].tolist()
    epochs, count, batch_size, clusters, num_heads = map(int, (*sizes, num_heads))
    per_epoch = len(images) // batch_size
    method, names = make(
        f"{prefix}/init/", len(images), torch.float64, batch_size, lamb=25.0, tolerance=0.1, relabelings=count
    )
    assert (len(method.heads), method.options.clusters) == (num_heads, clusters)
    sgd = torch.optim.SGD(method.parameters(), lr, momentum=0.9, weight_decay=1e-5)
    extract, world, clock = extract_from(images), one_process(), Clock(0, per_epoch, (epochs + 1) * per_epoch)
    relabeled, losses = {}, []
    while not clock.done:
        calls = len(recorded.results)
        method.before_step(clock, extract, world)
        if len(recorded.results) > calls:
            relabeled[clock.step] = method.labels.of_images.clone()
        positions = torch.arange(batch_size) + clock.step % per_epoch * batch_size
        views = [images[positions][None]]
        output = method(Batch(views, [torch.zeros(1).long()], positions, None, positions, clock.step), world)
        sgd.zero_grad()
        output.loss.backward()
        sgd.step()
        losses.append(output.loss.item())
        clock = clock.after_step()
    assert list(relabeled) == GOLDEN[f"{prefix}/sk_niter"].tolist()
    assert torch.equal(torch.stack(list(relabeled.values())).long(), array(f"{prefix}/labels_after_each_sk"))
    for result, expected in zip(recorded.results, GOLDEN[f"{prefix}/sk_err_iters"], strict=True):
        check_ends(result.error, result.iterations, expected)
    close(np.reshape(losses, (-1, per_epoch)).mean(1), f"{prefix}/epoch_loss_f64", 1e-9)
    for name in (key.removeprefix(f"{prefix}/final/") for key in GOLDEN if key.startswith(f"{prefix}/final/")):
        layer, _, kind = name.rpartition(".")
        close(method.get_parameter(f"{names.get(layer, 'backbone.features')}.{kind}"), f"{prefix}/final/{name}", LOOP)
