"""What explain prints for a small config on several worlds; the memory it counts against tensors of real steps."""

import re

import pytest
import torch
from torch import nn

from ssl_dist import backbones, config
from ssl_dist.distributed.world import RankInfo
from ssl_dist.errors import UserError
from ssl_dist.methods import relational
from ssl_dist.nn.batchnorm import SyncBatchNorm, synchronize
from ssl_dist.run.blueprint import derive
from ssl_dist.train import explain
from tests import grids
from tests.thread_world import ALONE

CONFIG = "configs/digits/relational-conv4.yaml"


@pytest.fixture
def load(digits, tmp_path):
    def run(*overrides):
        base = [f"data.root={digits}", f"run_dir={tmp_path / 'run'}", "data.reader=arrays"]
        return config.load(CONFIG, [*base, "optim.batch_size=12", "views.num=8", *overrides])

    return run


@pytest.fixture
def lines_of(load):
    """The lines of explain by their names; a line that begins with spaces belongs to the name above."""

    def run(world, *overrides, per_node=None):
        lines, name = {}, None
        for line in explain.explain(load(*overrides), world, per_node).splitlines():
            if not line.startswith(" "):
                name, _, line = re.match(r"(\S+( \S+)*)  +(.*)", line).group(1, 2, 3)
            lines.setdefault(name, []).append(line.strip())
        return lines

    return run


def memory(settings, world=1, device="cpu"):
    return explain.Memory.of(derive(settings, RankInfo(0, world, 0, world)), device)


# ---------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize(
    ("world", "per_node", "overrides", "ranks", "each", "who", "pairs"),
    [
        (1, None, [], "1 = 1 image shard(s) x 1 view", "12 images, 8 x", "rank 0 holds everything", "336 positive"),
        (4, None, [], "4 = 1 image shard(s) x 4 view", "12 images, 2 x", "ranks 0-3 hold views of the same", "84 pos"),
        (4, 2, [], "4 = 2 image shard(s) x 2 view", "6 images, 4 x",
         "ranks 0-1, 2-3 hold views of the same images; 2 nodes of 2 ranks, view shards inside a node", "84 positive"),
        (4, 2, ["data.view_shards=4"], "4 = 1 image shard(s) x 4 view", "12 images, 2 x",
         "ranks 0-3 hold views of the same images; 2 nodes of 2 ranks, view shards spread over several nodes", "84 p"),
        (6, 1, [], "6 = 6 image shard(s) x 1 view", "2 images, 8 x",
         "no two ranks hold the same image; 6 nodes of 1 ranks", "56 positive"),
        (32, None, ["optim.batch_size=64"], "32 = 4 image shard(s) x 8 view", "16 images, 1 x",
         "ranks 0-7, 8-15, ..., 24-31 hold views", "56 positive"),
        (16, None, [], "16 = 2 image shard(s) x 8 view", "6 images, 1 x", "ranks 0-7, 8-15 hold views", "21 positive"),
    ],
)  # fmt: skip
def test_who_holds_what(lines_of, world, per_node, overrides, ranks, each, who, pairs):
    lines = lines_of(world, *overrides, per_node=per_node)
    assert lines["ranks"][0].startswith(ranks) and lines["each rank"][0].startswith(each)
    assert lines["who holds what"][0].startswith(who) and lines["pairs a rank"][0].startswith(pairs)


def test_every_split_is_a_line_and_the_chosen_one_is_marked(lines_of):
    rows = [line.split() for line in lines_of(4, per_node=2)["splits"][1:]]
    assert [row[:6] for row in rows] == [
        ["1", "4", "x", "1", "3", "8"], ["2", "2", "x", "2", "6", "4"], ["4", "1", "x", "4", "12", "2"],
    ]  # fmt: skip
    assert [row[7:] for row in rows] == [[], ["chosen"], ["over", "nodes"]]
    assert float(rows[1][6]) == float(lines_of(4, per_node=2)["memory a rank"][0].split()[1])


def test_views_larger_than_any_stored_image_are_said(lines_of):
    """As after `convert --max-side 32` and a config of larger views."""
    assert lines_of(1)["data"][0].endswith("10 classes, stored with at most 32x32 px")
    larger = lines_of(1, "data.image_size=64")["data"][0]
    assert larger.endswith("stored with at most 32x32 px, enlarged to views of 64 px")


def test_large_worlds_stay_short(lines_of):
    lines_by_name = lines_of(64, "optim.batch_size=64", "views.num=64", per_node=8)
    assert len(lines_by_name["splits"]) == 8 and sum(map(len, lines_by_name.values())) < 40
    assert max(len(line) for lines in lines_by_name.values() for line in lines) < 160


def test_pairs_of_a_rank_are_those_that_it_scores(lines_of):
    assert lines_of(3, "views.num=3", "optim.batch_size=3")["pairs a rank"] == ["3 positive and as many negative"]
    for num_views, batch_size, world in ((5, 7, 4), (2, 3, 8), (32, 64, 3)):
        units = num_views * (num_views - 1) // 2 * batch_size
        shares = [(r + 1) * units // world - r * units // world for r in range(world)]
        text = grids.explained(relational, num_views, batch_size, world)["pairs a rank"]
        assert text.startswith(f"{min(shares)}-{max(shares)} positive")


@pytest.mark.parametrize("former", ["relational", "simclr"])
def test_another_method_on_a_config_of_one_is_told_how_to_be_reset(digits, former):
    """The remedy, taken as it stands, gives a config that can be explained."""
    name = "simclr" if former == "relational" else "relational"

    def plan(*overrides):
        fixed = [f"data.root={digits}", "data.reader=arrays"]
        return derive(config.load(f"configs/digits/{former}-conv4.yaml", [*fixed, *overrides]), RankInfo())

    with pytest.raises(UserError, match=rf"^method\.options: .*: of .*{former}.*, not of {name}; ") as caught:
        plan(f"method.name={name}")
    overrides = str(caught.value).rpartition("another method: ")[2].split()
    assert overrides[0] == f"method.name={name}" and len(overrides) == 3  # name, options and number of views
    assert plan(*overrides).num_views == (2 if name == "simclr" else 32)


def test_rates_are_shown_where_they_turn(lines_of):
    steps = ["optim.epochs=null", "optim.steps=40", "optim.lr=0.5", "optim.lr_batch=6"]
    [line] = lines_of(1, *steps, "optim.schedule=step", "optim.milestones=[0.7]")["optimizer"]
    assert line == "adam, step, rate 1 at step 0, 1 at step 10, 1 at step 20, 0.1 at step 28, 0.1 at step 39"
    [line] = lines_of(1, *steps, "optim.name=lars", "optim.warmup_epochs=0.1")["optimizer"]
    assert re.search(r"^lars, constant, rate 0 at step 0, .*, 1 at step 12, ", line), line


# ---------------------------------------------------------------------------------------------------- memory


class Net(nn.Module):
    """A network whose tensors can be counted by hand: images of 8 px."""

    feature_dim, stages = 5, ()

    in_channels = 3

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5), nn.ReLU(True)

    def forward(self, x):
        return self.relu(self.bn(self.conv(x))).mean((2, 3))


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_a_network_counted_by_hand(load, monkeypatch, precision):
    monkeypatch.setattr(backbones, "check", lambda *_: None)
    monkeypatch.setattr(backbones, "build", lambda *_: Net())
    counted = memory(load("data.image_size=8", f"precision={precision}"), 2)
    element, images = {"fp32": 4, "fp64": 8}[precision], 12 * 8 // 2
    parameters = 3 * 5 * 9 + 2 * 5 + (10 * 256 + 256) + 2 * 256 + (256 + 1)
    one_map, inputs = images * 5 * 64 * element, images * 3 * 64
    assert counted.weights == 5 * parameters * element  # adam, and DDP's buckets
    assert (counted.inputs, counted.waiting) == (inputs * element, 4 * inputs)
    assert counted.representations == 2 * 12 * 8 * 5 * element
    # kept: what conv and ReLU put out; in flight: the gradient of ReLU's input, and of BatchNorm's
    assert 4 * one_map <= counted.activations < 4.1 * one_map


def bytes_kept_by_autograd(network, images):
    """Bytes of the tensors that a real forward keeps for the backward, each storage once, without the weights."""
    given_storages = {t.untyped_storage().data_ptr() for t in [*network.parameters(), *network.buffers(), images]}
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given_storages:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = network(images)
    assert out.requires_grad
    return sum(sizes.values())


@pytest.mark.parametrize(
    ("name", "in_flight"), [("conv4", {"cuda": 0.15, "cpu": 0.4}), ("resnet8", {"cuda": 0.15, "cpu": 0.2}),
                            ("resnet32", {"cuda": 0.05, "cpu": 0.06})],
)  # fmt: skip
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_activations_are_what_a_real_step_keeps(load, name, in_flight, device):
    """On top of them come the gradients in flight: a few maps, so the less the deeper the network is. On a CPU, where
    ReLU and pooling are one operation with BatchNorm, less is kept."""
    counted = memory(load(f"backbone.name={name}", "data.image_size=32"), device=device).activations
    network, images = backbones.build(name).train(), torch.randn(12 * 8, 3, 32, 32)
    if device == "cpu":
        network = synchronize(network, lambda layer: SyncBatchNorm(layer, *ALONE))
        images = images.to(memory_format=torch.channels_last)
    real = bytes_kept_by_autograd(network, images)
    assert real < counted < (1 + in_flight[device]) * real


def test_memory_falls_with_the_ranks_but_not_with_their_split(load):
    one = memory(load("backbone.name=resnet8"))
    for shards in (1, 2, 4):
        four = memory(load("backbone.name=resnet8", f"data.view_shards={shards}"), 4)
        assert four.activations == pytest.approx(one.activations / 4, rel=0.01)
        assert (four.inputs, four.waiting) == (one.inputs / 4, one.waiting / 4)
    sizes = [four.decoded(explain.Grid(4 // wv, wv)) for wv in (1, 2, 4)]
    assert sizes[2] == 4 * sizes[0] == 2 * sizes[1] == one.decoded(explain.Grid(1, 1))


def test_a_cpu_keeps_no_map_between_batchnorm_and_pooling(load):
    """Of conv4 the outputs of its convolutions, their pooled maps, and what ReLU leaves of the last."""
    settings = load("backbone.name=conv4", "data.image_size=32")
    cpu, cuda = (memory(settings, device=device).activations for device in ("cpu", "cuda"))
    images = settings.optim.batch_size * settings.views.num
    maps = {8: 32, 16: 16, 32: 8, 64: 4}
    kept = sum(channels * side**2 for channels, side in maps.items())
    pooled = sum(channels * (side // 2) ** 2 for channels, side in maps.items() if side > 4)
    assert 1 < cpu / (4 * images * (kept + pooled)) < 1.4  # beside what the backward pass makes
    assert cuda > 1.4 * cpu


def test_half_precision_takes_half(load):
    full, half = (memory(load("backbone.name=resnet8", f"precision={p}")) for p in ("fp32", "bf16"))
    assert half.activations == pytest.approx(full.activations / 2, rel=0.05)
    assert (half.weights, half.inputs) == (full.weights, full.inputs)


def test_optimizers_differ_in_their_state(load):
    adam, sgd, lars, plain = (
        memory(load(*o)).weights
        for o in (["optim.name=adam"], ["optim.name=sgd"], ["optim.name=lars"], ["optim.name=sgd", "optim.momentum=0"])
    )
    assert adam * 3 == sgd * 4 == lars * 4 == plain * 6


def test_one_view_of_one_image_can_be_counted(load):
    """Its last maps are single values, of which a BatchNorm has no statistics where there is one rank."""
    assert memory(load("optim.batch_size=2", "views.num=2", "data.image_size=8"), 4).activations > 0


def test_what_is_not_trained_takes_its_weights(load):
    counted = memory(load("method.name=random_weights", "method.options={}", "views.num=1"))
    assert (counted.activations, counted.inputs, counted.waiting) == (0, 0, 0)
    assert counted.total(explain.Grid(1, 1)) == counted.weights == counted.parameters * 4


def test_a_frozen_copy_takes_its_weights_alone(load):
    """The target network of an average: neither gradient nor optimizer state."""
    counted = memory(load("method.name=relic", "method.options={hidden: 16, dim: 8}", "views.num=2"))
    network = counted.parameters + 64 * 16 + 16 * 8
    assert counted.weights == 4 * (4 * (network + 2) + network)  # and temperature and bias
