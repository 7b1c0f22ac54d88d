"""The operations and collectives that are counted for a step, beside those of real steps."""

import copy
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ssl_dist import config, methods
from ssl_dist.config import shipped
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.distributed.world import one_process
from ssl_dist.grid import Grid
from ssl_dist.methods.base import Batch
from ssl_dist.run.blueprint import derive
from ssl_dist.train import operations
from tests import thread_world


@pytest.fixture
def plan_of(digits, tmp_path):
    """(method, ranks, overrides) -> its plan for small digits."""

    def make(method="relational", ranks=1, *overrides):
        few = ["optim.batch_size=8", *(["views.num=4"] if method in ("relational", "sfrik") else []), *overrides]
        base = [f"data.root={digits}", f"run_dir={tmp_path / 'run'}", "data.reader=arrays", *few]
        settings = config.load(shipped.of_method(method, Path("configs/digits")), base)
        return derive(settings, RankInfo(0, ranks, 0, ranks))

    return make


def random_batch(plan, grid, rank):
    """A rank's part of a batch of noise, equal on every grid."""
    images = grid.image_range(rank, plan.config.optim.batch_size)
    generator, groups, ids = torch.Generator().manual_seed(0), [], []
    for spec in plan.specs:
        views = grid.view_range(rank, spec.num)
        shape = (spec.num, plan.config.optim.batch_size, 3, spec.size, spec.size)
        group = torch.randn(shape, generator=generator)
        groups.append(group[views.start : views.stop, images.start : images.stop])
        ids.append(torch.from_numpy(spec.view_ids[views.start : views.stop].copy()))
    rows = torch.arange(images.start, images.stop)
    return Batch(groups, ids, rows, torch.zeros_like(rows), rows)


def step_of(method, batch, world):
    method(batch, world).loss.backward()


@pytest.mark.parametrize("method", ["simclr", "vicreg", "rotation"])
def test_flops_are_those_of_a_real_step(plan_of, method):
    plan = plan_of(method)
    real, world = plan.build().train(), one_process()
    with FlopCounterMode(display=False) as counter:
        step_of(real, random_batch(plan, Grid(1, 1), 0), world)
    step = operations.count(plan, "cpu")
    assert sum(o.flops for o in step.operations[: step.update]) == counter.get_total_flops() > 1e6


def test_bytes_and_flops_counted_by_hand():
    with torch.device("meta"):
        network = nn.Sequential(
            nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5), nn.ReLU(True), nn.Flatten()
        )
        step = operations.count_network(network, torch.empty(2, 3, 8, 8))
    images, weight, maps, channels = 4 * 2 * 3 * 64, 4 * 5 * 27, 4 * 2 * 5 * 64, 4 * 5
    found = {o.name: o for o in step.operations}
    assert list(found) == [
        "convolution", "add_", "native_batch_norm", "relu_",
        "threshold_backward", "native_batch_norm_backward", "convolution_backward",
    ]  # fmt: skip
    assert step.backward == 4
    forward, backward = found["convolution"], found["convolution_backward"]
    assert (forward.num_bytes, forward.flops) == (images + weight + maps, 2 * 27 * 2 * 5 * 64)
    assert (backward.num_bytes, backward.flops) == (
        images + 2 * weight + maps,
        forward.flops,
    )  # images need no gradient
    assert forward.convolution == backward.convolution == (3, 5, 3, 8)
    assert found["relu_"].num_bytes == 2 * maps and found["threshold_backward"].num_bytes == 3 * maps
    # moments, then the map: x is read twice, and so is the gradient; vectors over channels count too
    assert found["native_batch_norm"].num_bytes == 3 * maps + 6 * channels
    assert 5 * maps < found["native_batch_norm_backward"].num_bytes < 5 * maps + 12 * channels


def test_a_kernel_of_our_own_counts_its_pairs(plan_of):
    """K = 4, M = 8: 96 pairs of 256 hidden units. The aggregation max has torch's operations on them."""
    step = operations.count(plan_of(), "cpu")
    [pairs] = [o for o in step.operations if o.name == "relation"]
    assert pairs.flops == 14 * 96 * 256
    other = operations.count(plan_of("relational", 1, "method.options.aggregation=max"), "cpu")
    assert "relation" not in [o.name for o in other.operations]
    hidden = 4 * 96 * 256  # bytes of a tensor of pairs x hidden units, of which there are a few
    more = sum(o.num_bytes for o in other.operations[: other.update])
    assert more - sum(o.num_bytes for o in step.operations[: step.update]) > 10 * hidden


def test_half_precision_halves_the_maps_and_leaves_the_loss(plan_of):
    full, half = (operations.count(plan_of("simclr", 1, f"precision={p}"), "cuda") for p in ("fp32", "bf16"))
    assert full.flops == half.flops
    for name in ("convolution", "native_batch_norm", "threshold_backward"):
        of_full, of_half = (sum(o.num_bytes for o in s.operations if o.name == name) for s in (full, half))
        assert of_half == pytest.approx(of_full / 2, rel=0.02), name
    [full_loss], [half_loss] = ([o for o in s.operations if o.name == "_log_softmax"] for s in (full, half))
    assert full_loss == half_loss


@pytest.mark.parametrize(("name", "tensors"), [("sgd", 1), ("adam", 2)])
def test_a_fused_optimizer_reads_and_writes_its_state_once(plan_of, name, tensors):
    plan = plan_of("simclr", 1, f"optim.name={name}")
    step = operations.count(plan, "cuda")
    num_bytes = 4 * sum(p.numel() for p in plan.build().parameters() if p.requires_grad)
    assert [o.num_bytes for o in step.operations[step.update :]] == [(3 + 2 * tensors) * num_bytes]


@pytest.mark.parametrize("method", methods.names())
def test_every_method_is_counted(plan_of, method):
    step = operations.count(plan_of(method, 2), "cuda")
    if method == "random_weights":
        assert not step.operations
    else:
        assert 0 < step.backward < step.update < len(step.operations) and step.flops > 1e6
        gradients = [c for c in step.collectives if c.purpose == "gradients"]
        assert gradients and all(c.overlapped for c in gradients)


class Recorded(thread_world.ThreadWorld):
    """Notes the collectives of rank 0 as (name, bytes of the result)."""

    seen: ClassVar[list] = []

    def all_reduce_sum(self, x):
        self._note("all_reduce", 1, x)
        return sum(super()._all_gather(x))

    def _all_gather(self, x):
        self._note("all_gather", self.grid.size, x)
        return super()._all_gather(x)

    def _note(self, name, times, x):
        if self.rank_info.rank == 0:
            self.seen.append((name, times * x.numel() * x.element_size()))


@pytest.mark.parametrize(
    ("method", "grid", "more"),
    [
        ("relational", Grid(2, 1), []), ("relational", Grid(1, 2), []), ("simclr", Grid(2, 1), []),
        ("vicreg", Grid(2, 1), []), ("infomax", Grid(2, 1), []),
        ("simclr", Grid(2, 1), ["backbone.name=timm/test_efficientnet"]),
    ],
)  # fmt: skip
def test_collectives_are_those_of_a_real_step(plan_of, monkeypatch, method, grid, more):
    plan = plan_of(method, 2, f"data.view_shards={grid.views}", *more)
    real = plan.build()
    monkeypatch.setattr(Recorded, "seen", [])
    monkeypatch.setattr(thread_world, "ThreadWorld", Recorded)

    def rank(world):
        own = world.synchronize_batchnorm(copy.deepcopy(real)).train()
        step_of(own, random_batch(plan, grid, world.rank_info.rank), world)

    thread_world.run(rank, grid)
    step = operations.count(plan, "cpu")
    counted = [(c.name, c.num_bytes) for c in step.collectives if c.purpose not in ("gradients", "flags")]
    assert sorted(counted) == sorted(Recorded.seen)


def test_the_online_probe_is_a_forward_pass_of_one_view(plan_of):
    plain, probed = (
        operations.count(plan_of("relational", 2, "precision=bf16", f"log.probe_every_epochs={every}"), "cpu")
        for every in ("null", "1")
    )
    network = plan_of().build().backbone
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.empty(8, 3, 32, 32))
    more, products = probed.flops - plain.flops, 2 * 2 * 8 * 64 * 10  # scores of 8 images, and the gradient
    assert probed.backward > plain.backward and more == counter.get_total_flops() + products
    sums = [c.num_bytes for c in probed.collectives if c.purpose == "the online probe"]
    assert sums == [4 * 64, 4 * 64, 4 * (10 * 64 + 10 + 1)]
    assert len(probed.collectives) == len(plain.collectives) + 3


def test_gradients_go_in_buckets(plan_of):
    """simclr on resnet18: 11.3 million numbers are 45 MB, two buckets of 25 MiB at most."""
    step = operations.count(plan_of("simclr", 2, "backbone.name=resnet18"), "cuda")
    sizes = [c.num_bytes for c in step.collectives if c.purpose == "gradients"]
    assert sizes[0] == 25 * 2**20 and len(sizes) == 2
    assert sum(sizes) == 4 * sum(p.numel() for p in plan_of("simclr", 2, "backbone.name=resnet18").build().parameters())
