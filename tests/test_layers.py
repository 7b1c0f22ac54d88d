"""Projectors, the moving average of a network, and dropout that is a function of what it drops."""

import copy
from functools import partial

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torchvision import models
from torchvision.ops import StochasticDepth

from ssl_dist.errors import UserError
from ssl_dist.keys import mix64
from ssl_dist.methods.base import Batch, Info, SSLMethod
from ssl_dist.nn import backbone as nn_backbone
from ssl_dist.nn.compiled import compile_network
from ssl_dist.nn.layers import KeyedDropout, KeyedDropPath, _mix64, ema_update, key_dropout, keyed_rows, mlp
from ssl_dist.run.network import refuse_random_layers

KEYS = torch.tensor([3, -(2**60), 77, 2**62 + 5])


def test_a_projector_has_batchnorm_between_its_layers():
    kinds = [type(layer) for layer in mlp([5, 7, 7, 3])]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU] * 2 + [nn.Linear]
    assert {name for name, _ in mlp([5, 7, 3]).named_parameters()} == {"0.weight", "1.weight", "1.bias", "3.weight"}
    assert [layer.bias is not None for layer in mlp([5, 7, 3], last_bias=True) if isinstance(layer, nn.Linear)] == [
        False,
        True,
    ]
    assert mlp([5, 3])(torch.zeros(1, 5)).shape == (1, 3)


def test_a_moving_average_moves_weights_and_statistics():
    online, target = (nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)) for _ in range(2))
    with torch.no_grad():
        online[1].running_mean.fill_(2.0)
        online[1].num_batches_tracked.fill_(9)
    before = target[0].weight.detach().clone()
    ema_update(target, online, 0.75)
    torch.testing.assert_close(target[0].weight, 0.75 * before + 0.25 * online[0].weight)
    assert target[1].running_mean.tolist() == [0.5, 0.5] and target[1].num_batches_tracked == 0
    ema_update(target, online, 0.0)
    assert torch.equal(target[0].weight, online[0].weight)


# ---------------------------------------------------------------------------------------------------- dropout


def test_torch_mixes_as_the_compiled_keys_do():
    for z in (0, 1, 2**63 - 1, 2**64 - 1, 0x9E3779B97F4A7C15):
        mixed = _mix64(torch.tensor(z - 2**64 if z >= 2**63 else z)).item()
        assert mixed % 2**64 == int(mix64(np.uint64(z)))


@pytest.mark.parametrize("layer", [KeyedDropout(0.3, 0), KeyedDropPath(0.3, 0)], ids=["elements", "rows"])
def test_dropped_shares_and_scale(layer):
    rows = torch.arange(20_000)
    with keyed_rows(rows):
        out = layer(torch.ones(len(rows), 4, 2, 1))
    torch.testing.assert_close(out.unique(), torch.tensor([0.0, 1 / 0.7]))
    assert (out == 0).double().mean().item() == pytest.approx(0.3, abs=0.01)
    per_row = (out == 0).flatten(1).sum(1).unique().tolist()
    assert per_row == ([0, 8] if isinstance(layer, KeyedDropPath) else list(range(9))[: len(per_row)])


def test_a_mask_belongs_to_its_row_and_layer():
    first, second, x = KeyedDropout(0.5, 0), KeyedDropout(0.5, 1), torch.ones(4, 64)
    with keyed_rows(KEYS):
        masks, other_masks = first(x), second(x)
    with keyed_rows(KEYS.flip(0)[:2]):
        assert torch.equal(first(x[:2]), masks.flip(0)[:2]), "whatever the position in the batch"
    assert not torch.equal(masks, other_masks) and not torch.equal(masks[0], masks[1])
    assert torch.equal(first.eval()(x), x), "evaluation drops nothing, and needs no keys"


def test_a_pass_without_keys_is_an_error_of_the_program():
    with pytest.raises(AssertionError, match="passes images inside"):
        KeyedDropout(0.5, 0)(torch.ones(2, 3))


class Stages(nn_backbone.Backbone):
    """Vectors, through two layers with `between` between them."""

    def __init__(self, between):
        super().__init__()
        self.first, self.between, self.second = nn.Linear(64, 64), between, nn.Linear(64, 64)

    def steps(self):
        return [("first", lambda x: self.between(self.first(x))), ("second", self.second)]

    def pooled(self, last_map):
        return last_map


@pytest.mark.parametrize("layer", [KeyedDropout, KeyedDropPath])
def test_a_compiled_network_reads_the_keys_of_each_pass(layer, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    plain = Stages(layer(0.5, 0))
    compiled = copy.deepcopy(plain)
    compile_network(compiled)
    for keys in (KEYS, KEYS.flip(0), KEYS + 1):
        with keyed_rows(keys):
            x = torch.randn(4, 64)
            assert torch.equal(compiled(x), plain(x))


def test_every_pass_of_a_network_is_compiled(monkeypatch):
    graphs = []
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=lambda graph, _: graphs.append(1) or graph))
    plain = Stages(nn.ReLU())
    compiled, x = copy.deepcopy(plain), torch.randn(4, 64)
    compile_network(compiled)
    assert not graphs, "the first call does it"
    for number, name in enumerate(plain.passes, start=1):
        for _ in range(2):
            for ours, expected in zip(
                tree_leaves(getattr(compiled, name)(x)), tree_leaves(getattr(plain, name)(x)), strict=True
            ):
                assert torch.equal(ours, expected)
        assert len(graphs) == number, name


@pytest.mark.parametrize(
    "network",
    [
        lambda: models.efficientnet_b0(),
        lambda: timm.create_model("resnet18", drop_path_rate=0.1, drop_rate=0.2),
        lambda: nn.Sequential(nn.Dropout(0.5), nn.Sequential(StochasticDepth(0.1, "row"))),
    ],
    ids=["torchvision", "timm", "torch"],
)
def test_every_dropout_is_replaced(network):
    network = network()
    key_dropout(network)
    refuse_random_layers(network, "it")
    numbers = [layer.layer for layer in network.modules() if isinstance(layer, KeyedDropout)]
    assert numbers == list(range(len(numbers))) and numbers


@pytest.mark.parametrize("layer", [nn.Dropout2d, timm.layers.DropBlock2d])
def test_what_has_no_twin_is_refused(layer):
    network = nn.Sequential(layer(0.5))
    key_dropout(network)
    with pytest.raises(UserError, match=layer.__name__):
        refuse_random_layers(network, "it")


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = KeyedDropout(0.5, 0)

    def forward(self, x):
        return self.drop(x.flatten(1))


def passed(view_ids, image_ids, step=0, together=True, seed=0):
    method = SSLMethod(Backbone(), Info(9, 0, ((2, 4),), 4, 1.0, seed=seed), None)
    method.views_together = together
    views = torch.ones(len(view_ids), len(image_ids), 3, 4, 4)
    [z] = method.represent(Batch([views], [torch.tensor(view_ids)], torch.tensor(image_ids), None, None, step))
    return z


def test_dropout_of_a_method_is_named_by_step_view_and_image():
    z = passed([0, 1], [5, 6, 7])
    assert torch.equal(passed([0, 1], [5, 6, 7], together=False), z)
    assert torch.equal(passed([1], [7]), z[1:, 2:]), "another shard, another batch: the same"
    rows = z.flatten(0, 1).tolist()
    assert len({tuple(row) for row in rows}) == 6
    for other in (passed([0, 1], [5, 6, 7], step=1), passed([0, 1], [5, 6, 7], seed=1)):
        assert not torch.equal(other, z)
