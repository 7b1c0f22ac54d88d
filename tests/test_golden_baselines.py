"""SimCLR, RotationNet, Deep InfoMax and supervised training of the official codes, number by number.

tests/golden/baselines.npz (DeepCluster has its own test), and what sfrik.npz, ffcvssl.npz and eval.npz have of them.
"""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssl_dist import backbones
from ssl_dist.clock import Clock
from ssl_dist.config import Optim
from ssl_dist.distributed.world import one_process
from ssl_dist.grid import Grid
from ssl_dist.methods import infomax, rotation, simclr, supervised
from ssl_dist.methods.base import Batch, Info
from ssl_dist.train import optim
from tests import golden_fill, thread_world

FOLDER = Path(os.environ.get("SSL_DIST_GOLDEN", Path(__file__).parent / "golden"))
FILES = {name: dict(np.load(FOLDER / f"{name}.npz")) for name in ("baselines", "sfrik", "ffcvssl", "eval")}
GOLDEN = FILES["baselines"]
TYPES = {"f32": torch.float32, "f64": torch.float64}


def keys_matching(pattern, fixture=GOLDEN):
    """What the first group of `pattern` stands for in the keys of a fixture."""
    names = sorted({m[1] for key in fixture if (m := re.match(pattern, key))})
    assert names, pattern
    return names


TEMPERATURES = keys_matching(r"simclr/t([\d.]+)/")
ENCODERS = keys_matching(r"dim/encoder_(\w+)/")
CASES = keys_matching(r"dim/(\w+)/alpha_beta_gamma$")
PAIRS = [("sfrik", f"two/{name}", "two/") for name in keys_matching(r"two/(simclr_t[\d.]+)/", FILES["sfrik"])] + [
    ("ffcvssl", name, "") for name in keys_matching(r"(simclr_t[\d.]+)/", FILES["ffcvssl"])
]

# Two arrays do not say which of the temperatures beside them they were made with: the one that fits best.
CANDIDATES = [float(name.rpartition("t")[2]) for file, name, _ in PAIRS if file == "sfrik"]


def array(key, fixture=GOLDEN, dtype=None):
    tensor = torch.from_numpy(np.asarray(fixture[key]))
    return tensor if dtype is None else tensor.to(dtype)


def close(ours, key, tolerance, fixture=GOLDEN):
    """The tolerance is relative to the largest magnitude of the array."""
    expected, ours = array(key, fixture).double(), torch.as_tensor(ours, dtype=torch.float64).detach()
    assert ours.shape == expected.shape, key
    error = (ours - expected).abs().max() / expected.abs().max().clamp_min(1e-300)
    assert error <= tolerance, f"{key}: relative error {error:.2e}"


def tensors(prefix, fixture=GOLDEN):
    names = [key.removeprefix(prefix) for key in fixture if key.startswith(prefix)]
    assert names, prefix
    return names


def filled(spec_key, renamed, fixture=GOLDEN):
    """The formula tensors of a spec under our names. renamed: pairs (how theirs begins, how ours does or None)."""
    state = {}
    theirs = golden_fill.state_dict({"x/spec": fixture[spec_key], "_meta": fixture["_meta"]}, "x")
    for name, tensor in theirs.items():
        ours = rename(name, renamed)
        if ours is not None:
            state[ours] = tensor
    return state


def rename(name, renamed):
    start, ours = next((start, ours) for start, ours in renamed if name.startswith(start))
    return None if ours is None else ours + name.removeprefix(start)


def info(feature_dim=0, num_classes=10, stages=None, batch_size=64):
    return Info(100, num_classes, ((1, 32),), batch_size, 1.0, feature_dim, stages=stages or {})


def batch_of(views_VBCHW, labels=None):
    num_views, num_images = views_VBCHW.shape[:2]
    images = torch.arange(num_images)
    return Batch([views_VBCHW], [torch.arange(num_views)], images, labels, positions=images)


def step(method, optimizer, batch):
    output = method(batch, one_process())
    optimizer.zero_grad()
    output.loss.backward()
    optimizer.step()
    return output


class Flat(nn.Module):
    """The SimCLR fixture's backbone."""

    def __init__(self, dim_in, dim_out):
        super().__init__()
        self.lin = nn.Linear(dim_in, dim_out)

    def forward(self, x):
        return self.lin(x.flatten(1))


def test_nothing_of_the_file_is_left_out():
    assert {key.split("/")[0] for key in GOLDEN} == {"_meta", "simclr", "rotnet", "dim", "deepcluster"}


# ---------------------------------------------------------------------------------------------------- simclr


def simclr_loss(z_ND, kind, temperature):
    return simclr.contrast(z_ND, simclr.Options(loss=kind, temperature=temperature), one_process())[0]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_simclr_of_relational_reasoning(temperature, dtype):
    prefix = f"simclr/t{temperature}/{dtype}"
    emb = array("simclr/emb", dtype=TYPES[dtype]).requires_grad_()
    loss = simclr_loss(torch.cat([emb[0::2], emb[1::2]]), "log_of_mean", float(temperature))
    loss.backward()
    # The original subtracts exp(1 / t) from a sum in which it dominates for small t: in f32 its digits cancel.
    cancelled = max(1e-5, np.exp(1 / float(temperature)) * 5e-8)
    tolerance = {"f64": 1e-9, "f32": min(1e-3, cancelled)}[dtype]
    close(loss, f"{prefix}/loss", tolerance)
    close(emb.grad, f"{prefix}/grad_emb", tolerance)


@pytest.mark.parametrize("dtype", TYPES)
def test_simclr_steps(dtype):
    renamed = [
        ("net.feature_extractor.", "backbone."), ("head.linear1.bias", None),  # a BatchNorm removes it; left out
        ("head.linear1.", "projector.0."), ("head.bn1.", "projector.1."), ("head.linear2.", "projector.3."),
    ]  # fmt: skip
    state = filled("simclr/steps/spec", renamed)
    widths = [len(state[f"projector.{layer}.weight"]) for layer in (0, 3)]
    options = simclr.Options(loss="log_of_mean", projector=widths, activation="leaky_relu", last_bias=True)
    feature_dim, dim_in = state["backbone.lin.weight"].shape
    method = simclr.Method(Flat(dim_in, feature_dim), info(feature_dim), options)
    method.load_state_dict(state)
    method.to(TYPES[dtype]).train()
    adam = torch.optim.Adam(method.parameters(), 1e-3)
    views = array("simclr/steps/views", dtype=TYPES[dtype])
    losses = [step(method, adam, batch_of(batch)).loss.item() for batch in views]
    close(losses, f"simclr/steps/{dtype}/losses", {"f64": 1e-9, "f32": 1e-5}[dtype])
    prefix = f"simclr/steps/{dtype}/after{len(views)}/"
    for name in tensors(prefix):
        close(method.state_dict()[rename(name, renamed)], prefix + name, {"f64": 1e-9, "f32": 1e-5}[dtype])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("file", "name", "inputs"), PAIRS)
def test_nt_xent(file, name, inputs, dtype):
    fixture, temperature = FILES[file], float(name.rpartition("t")[2])
    prefix, tolerance = f"{name}/{dtype}", {"f64": 1e-9, "f32": 1e-5}[dtype]
    views = [array(f"{inputs}{view}", fixture, TYPES[dtype]).requires_grad_() for view in "xy"]
    loss = simclr_loss(torch.cat(views), "nt_xent", temperature)
    loss.backward()
    close(loss, f"{prefix}/loss", tolerance, fixture)
    for view, tensor in zip("xy", views, strict=True):
        close(tensor.grad, f"{prefix}/grad_{view}", tolerance, fixture)
    if f"{prefix}/num_sim" in fixture:
        logits, partner = simclr.candidates(torch.cat(views), temperature)
        close(-logits.gather(1, partner[:, None]).mean(), f"{prefix}/num_sim", tolerance, fixture)
        close(logits.logsumexp(1).mean(), f"{prefix}/num_entropy", tolerance, fixture)


def test_candidates_are_the_logits_of_the_official_code():
    """Its crop c holds the anchors of the other view: first their partners, then all others in the order of rows."""
    fixture = FILES["sfrik"]
    x, y = (array(f"two/{view}", fixture, torch.float64) for view in "xy")
    crops = keys_matching(r"two/simclr_logits_f64/crop(\d+)", fixture)
    assert crops == ["0", "1"]
    for crop in map(int, crops):
        theirs = array(f"two/simclr_logits_f64/crop{crop}", fixture)

        def ours(temperature, crop=crop):
            logits, partner = simclr.candidates(torch.cat([x, y]), temperature)
            anchors = torch.arange(len(x)) + (1 - crop) * len(x)
            rest = torch.ones_like(logits[anchors], dtype=torch.bool)
            rest[torch.arange(len(x)), anchors] = rest[torch.arange(len(x)), partner[anchors]] = False
            positive = logits[anchors, partner[anchors]]
            return torch.cat([positive[:, None], logits[anchors][rest].view(len(x), -1)], 1)

        temperature = min(CANDIDATES, key=lambda t: float((ours(t) - theirs).abs().max()))
        close(ours(temperature), f"two/simclr_logits_f64/crop{crop}", 1e-9, fixture)
        assert not array(f"two/simclr_labels/crop{crop}", fixture).any()


def test_nt_xent_of_two_processes():
    fixture = FILES["sfrik"]
    x, y = (array(f"twoproc/{view}", fixture, torch.float64) for view in "xy")
    prefix, half = "twoproc/f64/simclr", len(x) // 2
    expected = float(fixture[f"{prefix}/single/loss"])
    temperature = min(CANDIDATES, key=lambda t: abs(simclr_loss(torch.cat([x, y]), "nt_xent", t).item() - expected))

    def rank(world):
        mine = slice(world.rank_info.rank * half, (world.rank_info.rank + 1) * half)
        views = torch.stack([x[mine], y[mine]]).requires_grad_()
        method = simclr.Method(nn.Identity(), info(x.shape[1]), simclr.Options(temperature=temperature))
        method.projector = nn.Identity()
        loss = method(batch_of(views), world).loss
        loss.backward()
        return loss.detach(), views.grad

    for number, (loss, grad) in enumerate(thread_world.run(rank, Grid(2, 1))):
        close(loss, f"{prefix}/rank{number}/loss", 1e-9, fixture)
        for view, tensor in zip("xy", grad, strict=True):
            close(tensor, f"{prefix}/rank{number}/grad_{view}", 1e-9, fixture)


# ---------------------------------------------------------------------------------------------------- rotation


def test_rotated_images_and_their_targets():
    images = array("rotnet/images")
    assert torch.equal(rotation.quarter_turns(images).flatten(0, 1), array("rotnet/rotated"))
    assert torch.equal(rotation.turn_targets(len(images)), array("rotnet/targets"))


@pytest.mark.parametrize("dtype", TYPES)
def test_rotation_steps(dtype):
    renamed = [("feature_extractor.", "backbone."), ("classifier.", "classifier.")]
    backbone = backbones.build("resnet8")
    method = rotation.Method(backbone, info(backbone.feature_dim), rotation.Options())
    method.load_state_dict(filled("rotnet/steps/spec", renamed))
    method.to(TYPES[dtype]).train()
    logits = []
    method.classifier.register_forward_hook(lambda _module, _inputs, out: logits.append(out))
    adam = torch.optim.Adam(method.parameters(), 1e-3)
    images = array("rotnet/steps/images", dtype=TYPES[dtype])
    outputs = [step(method, adam, batch_of(batch[None])) for batch in images]
    prefix = f"rotnet/steps/{dtype}"
    # f32: a deep network's gradient, which Adam divides by its own size
    first, later = {"f64": (1e-9, 1e-9), "f32": (1e-5, 1e-3)}[dtype]
    close(logits[0], f"{prefix}/train_logits_step1", first)
    expected = array(f"{prefix}/loss_acc").double()
    for ours, theirs in zip(outputs, expected, strict=True):
        assert ours.loss.item() == pytest.approx(theirs[0].item(), rel=later)
        assert float(ours.metrics["accuracy"]) == pytest.approx(theirs[1].item(), rel=1e-6)
    for name in tensors(f"{prefix}/after{len(images)}/"):
        close(method.state_dict()[rename(name, renamed)], f"{prefix}/after{len(images)}/{name}", later)


# ---------------------------------------------------------------------------------------------------- infomax

NETWORKS = [("global_d.", "global_net."), ("local_d.c", "local_net.l"), ("prior_d.", "prior_net.")]


def networks(spec_key):
    """What is a 1x1 convolution there is a linear layer here."""
    state = filled(spec_key, NETWORKS)
    return {name: t.flatten(1) if name.startswith("local_net.") and t.dim() == 4 else t for name, t in state.items()}


def build_infomax(backbone, feature_dim, channels, weights):
    options = infomax.Options(**dict(zip(("alpha", "beta", "gamma"), map(float, weights), strict=True)))
    return infomax.Method(backbone, info(feature_dim, stages={"first": channels}), options)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", CASES)
def test_infomax_loss(case, dtype):
    y, maps = (array(f"dim/{name}", dtype=TYPES[dtype]).requires_grad_() for name in ("y", "M"))
    weights = GOLDEN[f"dim/{case}/alpha_beta_gamma"]
    method = build_infomax(nn.Identity(), y.shape[1], maps.shape[1], weights)
    method.load_state_dict(networks(f"dim/{case}/spec"))
    method.to(TYPES[dtype])
    nets = infomax.Networks(method.global_net, method.local_net, method.prior_net)
    drawn = array("dim/prior_sample", dtype=TYPES[dtype])
    loss, terms = infomax.weighted_terms(nets, method.options, y, y.roll(1, 0), maps, drawn)
    loss.backward()
    tolerance, prefix = {"f64": 1e-9, "f32": 1e-5}[dtype], f"dim/{case}/{dtype}"
    close(loss, f"{prefix}/loss", tolerance)
    assert len(terms) == np.count_nonzero(weights)
    for name, tensor in (("grad_y", y), ("grad_M", maps)):
        if f"{prefix}/{name}" in GOLDEN:
            exact = array(f"dim/{case}/f64/{name}").double()
            # where a unit of the original lies within f32's rounding of its ReLU's kink, its f32 is that far off itself
            of_original = (array(f"{prefix}/{name}").double() - exact).abs().max() / exact.abs().max()
            close(tensor.grad, f"{prefix}/{name}", max(tolerance, 2 * float(of_original)))
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("name", ENCODERS)
def test_infomax_reads_the_first_map(name):
    backbone = golden_fill.fill(backbones.build(name), golden_fill.scale(GOLDEN)).eval()
    method = infomax.Method(backbone, info(backbone.feature_dim, stages=backbone.stages), infomax.Options())
    y, maps = backbone.forward_stages(array(f"dim/encoder_{name}/input"))
    close(y, f"dim/encoder_{name}/f32/y", 1e-5)
    close(maps[method.stage], f"dim/encoder_{name}/f32/M", 1e-5)
    sizes = [backbone.feature_dim, backbone.stages[method.stage]]
    assert sizes == GOLDEN[f"dim/encoder_{name}/y_size_M_channels"].tolist()


@pytest.mark.parametrize("dtype", TYPES)
def test_infomax_steps(dtype, monkeypatch):
    backbone = backbones.build("conv4")
    options = infomax.Options(alpha=0.0, beta=1.0, gamma=0.1)
    method = infomax.Method(backbone, info(backbone.feature_dim, stages=backbone.stages), options)
    encoder = filled("dim/steps/spec_encoder", [("feature_extractor.", "backbone.")])
    method.load_state_dict(encoder | networks("dim/steps/spec_loss_fn"))
    method.to(TYPES[dtype]).train()
    images, draws = (array(f"dim/steps/{name}", dtype=TYPES[dtype]) for name in ("images", "prior_samples"))
    adam = torch.optim.Adam(method.parameters(), 1e-4)
    losses = []
    for batch, drawn in zip(images, draws, strict=True):
        monkeypatch.setattr(method, "drawn", lambda *_, drawn=drawn: drawn)
        losses.append(step(method, adam, batch_of(batch[None])).loss.item())
    tolerance = {"f64": 1e-9, "f32": 1e-5}[dtype]
    close(losses, f"dim/steps/{dtype}/losses", tolerance)
    after = f"dim/steps/{dtype}/after{len(images)}"
    close(method.backbone.layer1.conv.weight, f"{after}/conv1", tolerance)
    close(method.local_net.l2.weight[:, :, None, None], f"{after}/local_c2_weight", tolerance)


# ---------------------------------------------------------------------------------------------------- supervised


class LinearBnRelu(nn.Module):
    def __init__(self, dim_in, dim_out):
        super().__init__()
        self.lin, self.bn = nn.Linear(dim_in, dim_out, bias=False), nn.BatchNorm1d(dim_out)

    def forward(self, x):
        return F.relu(self.bn(self.lin(x)))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", keys_matching(r"rr/supervised_totepochs(\d+)/", FILES["eval"]))
def test_supervised_epochs(case, dtype):
    """With this project's optimizer and rates: SGD, a tenth at a half and at three quarters of the training."""
    fixture, epochs, prefix = FILES["eval"], int(case), f"rr/supervised_totepochs{case}/{dtype}"
    renamed = [("feature_extractor.", "backbone."), ("classifier.", "classifier.")]
    state = filled("rr/spec", renamed, fixture)
    dim, dim_in = state["backbone.lin.weight"].shape
    num_classes = len(state["classifier.bias"])
    method = supervised.Method(LinearBnRelu(dim_in, dim), info(dim, num_classes), supervised.Options())
    method.load_state_dict(state)
    method.to(TYPES[dtype]).train()
    x, labels = array("rr/x", fixture, TYPES[dtype]), array("rr/y", fixture)
    options = Optim(name="sgd", lr=0.1, momentum=0.9, schedule="step", epochs=epochs)
    sgd = optim.build(options, [{"params": list(method.parameters())}], torch.device("cpu"))
    tolerance = {"f64": 1e-9, "f32": 1e-5}[dtype]
    history, rates = [], []
    for epoch in range(epochs):
        losses_and_accuracies = []
        for number in range(len(x)):
            rate = optim.lr(options, Clock(epoch * len(x) + number, len(x), epochs * len(x)))
            optim.set_lr(sgd, rate)
            output = step(method, sgd, batch_of(x[number][None], labels[number]))
            losses_and_accuracies.append([output.loss.item(), float(output.metrics["accuracy"])])
        history.append(np.mean(losses_and_accuracies, axis=0))
        rates.append([rate, rate])
    close(
        np.stack(history)[:, 0], f"{prefix}/epoch_loss_acc", tolerance, _column(fixture, f"{prefix}/epoch_loss_acc", 0)
    )
    close(np.stack(history)[:, 1], f"{prefix}/epoch_loss_acc", 1e-6, _column(fixture, f"{prefix}/epoch_loss_acc", 1))
    close(np.array(rates), f"{prefix}/lr_per_epoch", 1e-12, fixture)
    for name in ("classifier.weight", "feature_extractor.lin.weight"):
        close(method.state_dict()[rename(name, renamed)], f"{prefix}/{name}", tolerance, fixture)


def _column(fixture, key, column):
    return {key: fixture[key][:, column]}
