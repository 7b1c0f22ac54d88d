"""Linear probes and fine-tuning against numbers of the official codes (relational reasoning, SeLa): eval.npz."""

import json
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
from ssl_dist.evaluators import finetune, probe
from ssl_dist.methods import fine_tuning, linear_probe
from ssl_dist.methods.base import Batch, Info
from ssl_dist.train import optim
from tests import golden_fill

FOLDER = Path(os.environ.get("SSL_DIST_GOLDEN", Path(__file__).parent / "golden"))
GOLDEN = dict(np.load(FOLDER / "eval.npz"))
TYPES = {"f64": torch.float64, "f32": torch.float32}
TOLERANCE = {"f64": 1e-9, "f32": 1e-5}
ACCURACY = 1e-6  # the official codes add accuracies up in float32, whatever the network computes in
FACTS = json.loads(str(GOLDEN["facts"]))
NUM_BATCHES, NUM_CLASSES = len(GOLDEN["rr/x"]), len(GOLDEN["rr/lineval/f64/classifier.bias"])
CASES = sorted({match[1] for key in GOLDEN if (match := re.match(r"rr/finetune_totepochs(\d+)/", key))}, key=int)
DIM, DIM_IN = GOLDEN[f"rr/finetune_totepochs{CASES[0]}/f64/feature_extractor.lin.weight"].shape


class LinearBnRelu(nn.Module):
    """The fixture's backbone."""

    def __init__(self):
        super().__init__()
        self.lin, self.bn = nn.Linear(DIM_IN, DIM, bias=False), nn.BatchNorm1d(DIM)

    def forward(self, x):
        return F.relu(self.bn(self.lin(x)))


def close(actual, key, tolerance, column=None):
    """column: that one alone of an array [..., columns]."""
    expected = torch.from_numpy(np.asarray(GOLDEN[key] if column is None else GOLDEN[key][..., column])).double()
    actual = torch.as_tensor(np.asarray(actual) if isinstance(actual, list) else actual.detach()).double()
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"{key}: {error:.2g}"


def close_losses_and_accuracies(actual, key, tolerance):
    """Arrays [..., (loss, accuracy)]."""
    actual = torch.as_tensor(np.asarray(actual))
    close(actual[..., 0], key, tolerance, column=0)
    close(actual[..., 1], key, ACCURACY, column=1)


def filled(module, options):
    info = Info(len(GOLDEN["rr/y"]), NUM_CLASSES, ((1, 1),), GOLDEN["rr/x"].shape[1], 1.0, feature_dim=DIM)
    method = module.Method(LinearBnRelu(), info, options)
    head = "heads.output." if module is linear_probe else "classifier."
    renamed = {"feature_extractor.": "backbone.", "classifier.": head}
    tensors = golden_fill.state_dict(GOLDEN, "rr")
    method.load_state_dict(
        {re.sub(r"^\w+\.", lambda match: renamed[match[0]], name): tensor for name, tensor in tensors.items()}
    )
    return method


def batches(dtype):
    for x, labels in zip(GOLDEN["rr/x"], GOLDEN["rr/y"], strict=True):
        number = torch.arange(len(labels))
        yield Batch([torch.from_numpy(x).to(dtype)[None]], [torch.zeros(1)], number, torch.from_numpy(labels), number)


def trained(method, recipe, epochs, dtype, total=None):
    """Epochs of mean loss and accuracy, and of both groups' rates."""
    options = Optim(**{**recipe.optim, "epochs": total or epochs})
    optimizer = optim.build(options, method.parameter_groups(), torch.device("cpu"))
    history, rates = [], []
    for epoch in range(epochs):
        losses_and_accuracies = []
        for number, batch in enumerate(batches(dtype)):
            clock = Clock(epoch * NUM_BATCHES + number, NUM_BATCHES, options.epochs * NUM_BATCHES)
            optim.set_lr(optimizer, optim.lr(options, clock))
            output = method(batch, one_process())
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
            losses_and_accuracies.append([output.loss.item(), float(output.metrics["accuracy"])])
        history.append(np.mean(losses_and_accuracies, axis=0))
        rates.append([group["lr"] for group in optimizer.param_groups])
    return np.stack(history), np.stack(rates)


def evaluated(method, dtype):
    """Mean loss and accuracy in evaluation mode."""
    method.eval()
    with torch.no_grad():
        pairs = [(method.logits(batch.views[0][0])["output"], batch.labels) for batch in batches(dtype)]
    losses = [F.cross_entropy(z, labels).item() for z, labels in pairs]
    return [np.mean(losses), 100 * np.mean([(z.argmax(1) == labels).double().mean().item() for z, labels in pairs])]


@pytest.mark.parametrize("dtype", TYPES)
def test_linear_evaluation(dtype):
    prefix, recipe = f"rr/lineval/{dtype}", probe.RECIPES["relational"]
    method = filled(linear_probe, linear_probe.Options(**recipe.options)).to(TYPES[dtype]).train()
    history, _ = trained(method, recipe, len(GOLDEN[f"{prefix}/epoch_loss_acc"]), TYPES[dtype])
    close_losses_and_accuracies(history, f"{prefix}/epoch_loss_acc", TOLERANCE[dtype])
    for name in ("weight", "bias"):
        close(getattr(method.heads["output"], name), f"{prefix}/classifier.{name}", TOLERANCE[dtype])
    close_losses_and_accuracies(evaluated(method, TYPES[dtype]), f"{prefix}/test_loss_acc", TOLERANCE[dtype])
    group, (expected,) = recipe.optim, FACTS["rr.standard.param_groups"]["optimizer_lineval"]
    assert (group["name"], group["lr"], group.get("weight_decay", 0)) == (
        "adam",
        expected["lr"],
        expected["weight_decay"],
    )


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", CASES)
def test_fine_tuning(case, dtype):
    """The official schedule falls to a tenth at int(.5 T) and int(.75 T); with its T of 200 it never does in 100
    epochs, so the recipe is of a constant rate."""
    prefix, recipe = f"rr/finetune_totepochs{case}/{dtype}", finetune.RECIPES["relational"]
    falling = recipe.optim | {"schedule": "step", "milestones": [0.5, 0.75]}
    epochs = len(GOLDEN[f"{prefix}/epoch_loss_acc"])
    method = filled(fine_tuning, fine_tuning.Options(**recipe.options)).to(TYPES[dtype]).train()
    history, rates = trained(method, finetune.Recipe("", falling), epochs, TYPES[dtype], total=int(case))
    close_losses_and_accuracies(history, f"{prefix}/epoch_loss_acc", TOLERANCE[dtype])
    close(torch.from_numpy(rates), f"{prefix}/lr_backbone_head_per_epoch", 1e-12)
    state = method.state_dict()
    for name, own in (
        ("classifier.weight", "classifier.weight"),
        ("feature_extractor.lin.weight", "backbone.lin.weight"),
        ("feature_extractor.bn.running_var", "backbone.bn.running_var"),
    ):
        close(state[own], f"{prefix}/{name}", TOLERANCE[dtype])
    close_losses_and_accuracies(evaluated(method, TYPES[dtype]), f"{prefix}/test_loss_acc", TOLERANCE[dtype])
    groups = FACTS["rr.standard.param_groups"]["optimizer_finetune"]
    assert [recipe.optim["lr"], recipe.optim["lr"] * recipe.options["head_lr"]] == [group["lr"] for group in groups]
    assert {recipe.optim["weight_decay"]} == {group["weight_decay"] for group in groups}


def rates_of(recipe, epochs):
    options = Optim(**recipe.optim)
    assert options.epochs == epochs
    return [optim.lr(options, Clock(7 * epoch + 3, 7, 7 * epochs)) for epoch in range(epochs)]


@pytest.mark.parametrize(
    ("key", "recipe"),
    [("sela_lp/lr_per_epoch_alexnet", "sela_alexnet"), ("sela_lp/lr_per_epoch_resnet_base0.1", "sela_resnet")],
)
def test_rates_of_selas_probes(key, recipe):
    close(rates_of(probe.RECIPES[recipe], len(GOLDEN[key])), key, 1e-12)


COSINES = [key for key in GOLDEN if key.startswith("cosine_lr/")]


@pytest.mark.parametrize("key", COSINES)
def test_cosines_by_epoch(key):
    epochs, peak = re.match(r"cosine_lr/T(\d+)_lr(.+)", key).groups()
    options = Optim(name="sgd", lr=float(peak), epochs=int(epochs), schedule="epoch_cosine")
    rates = [optim.lr(options, Clock(7 * epoch + 3, 7, 7 * int(epochs))) for epoch in range(int(epochs))]
    close(rates, key, 1e-12)


def test_heads_on_alexnets_maps_are_selas():
    backbone = backbones.build("alexnet")
    expected = FACTS["sela.probe_predictors"]
    classes = expected[0][0][0]
    info = Info(1, classes, ((1, 224),), 1, 1.0, feature_dim=backbone.feature_dim, stages=backbone.stages)
    with torch.device("meta"):
        heads = linear_probe.Method(backbone.to("meta"), info, linear_probe.Options(stages="all")).heads
    assert len(heads) == len(expected)
    for head, (shape, pooling, norm) in zip(heads.values(), expected, strict=True):
        pool, own_norm, _, linear = head
        assert (linear.out_features, linear.in_features) == (shape[0], np.prod(shape[1:]))
        assert str(pool) == pooling and str(own_norm).startswith("BatchNorm2d") == norm.startswith("BatchNorm2d")
        assert own_norm.affine is False


def test_a_frozen_batchnorm_is_the_one_that_sela_absorbs():
    """SeLa folds the BatchNorms into the convolutions before it probes; frozen ones compute the same."""
    values = {key.rsplit("in/")[1]: torch.from_numpy(np.array(GOLDEN[key])) for key in GOLDEN if "absorb_bn/in" in key}
    out_channels, in_channels, *kernel = values["0.weight"].shape
    layers = nn.Sequential(nn.Conv2d(in_channels, out_channels, kernel), nn.BatchNorm2d(out_channels))
    layers.load_state_dict(values)
    x = torch.randn(2, in_channels, 9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    folded = [torch.from_numpy(GOLDEN[f"sela_absorb_bn/out/{name}"]).double() for name in ("weight", "bias")]
    expected = F.conv2d(x, *folded)
    assert (layers.double().eval()(x) - expected).abs().max() <= 1e-6 * expected.abs().max()
