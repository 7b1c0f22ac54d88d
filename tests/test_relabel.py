"""Outputs for all training images: every position once, the same on any number of ranks, in both modes."""

import numpy as np
import pytest
import torch
from torch import nn

from ssl_dist import config
from ssl_dist.clock import Clock
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.distributed.world import World
from ssl_dist.nn.layers import KeyedDropout
from ssl_dist.run.blueprint import derive
from ssl_dist.train import relabel
from ssl_dist.train.state import TrainState
from tests import ranks

CONFIG = "configs/digits/relational-conv4.yaml"
LIMIT, BATCH = 54, 12  # four batches of 12 and a tail of 6


def make(data, run, rank_info):
    overrides = [f"data.root={data}", f"run_dir={run}", f"data.limit={LIMIT}", "data.reader=arrays", "precision=fp64"]
    overrides += [
        f"optim.batch_size={BATCH}",
        "data.view_shards=1",
        "data.eval_resize=36",
        "data.eval_interpolation=bicubic",
    ]
    blueprint = derive(config.load(CONFIG, overrides), rank_info)
    run = TrainState(blueprint, World(rank_info, blueprint.grid, torch.device("cpu")))
    run.method.backbone.layer4 = nn.Sequential(run.method.backbone.layer4, KeyedDropout(0.5, 0))
    return run


def outputs(rank, size, data, run, kinds):
    """For every kind of extraction: positions and values of this rank, then the running mean of the first layer."""
    training = make(data, run, RankInfo(rank, size, rank, size))
    extract = training.extract_at(Clock(7, 4, 100))
    extractions = []
    for augmented, in_training in kinds:
        training.method.train()
        rows = extract(training.method.backbone, augmented=augmented, training=in_training)
        assert training.method.training and training.method.backbone.training
        mean = training.method.backbone.layer1.bn.running_mean
        extractions.append((rows.positions.numpy(), rows.values.numpy(), mean.numpy().copy()))
    return extractions


KINDS = [(False, False), (True, False), (False, True), (True, True)]


def join(parts):
    positions, values, means = (np.concatenate(column) for column in zip(*parts, strict=True))
    assert sorted(positions.tolist()) == list(range(LIMIT)), "every position once"
    return values[np.argsort(positions)], means.reshape(len(parts), -1)


@pytest.fixture(scope="module")
def one_process(digits, tmp_path_factory):
    return outputs(0, 1, digits, tmp_path_factory.mktemp("run") / "run", KINDS)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
def test_any_number_of_ranks_gives_the_same(size, one_process, digits, tmp_path):
    of_ranks = ranks.run(outputs, size, tmp_path, digits, tmp_path / "run", KINDS)
    for kind, whole in enumerate(one_process):
        values, means = join([rank[kind] for rank in of_ranks])
        expected, [mean] = join([whole])
        in_training = KINDS[kind][1]  # the others pass in the same batches on any number of ranks: equal to the bit
        np.testing.assert_allclose(values, expected, rtol=0, atol=1e-12 * np.abs(expected).max() if in_training else 0)
        np.testing.assert_allclose(means, np.broadcast_to(mean, means.shape), rtol=1e-12)


def test_the_modes_differ_and_only_training_moves_statistics(one_process):
    values = [value for _, value, _ in one_process]
    for i in range(4):
        for j in range(i):
            assert np.abs(values[i] - values[j]).max() > 1e-3, (i, j)
    means = [mean for _, _, mean in one_process]
    assert (means[0] == 0).all() and (means[1] == 0).all() and (means[2] != 0).any()


def test_the_test_transform_is_that_of_extraction(one_process, digits, tmp_path):
    """In evaluation mode without augmentation: exactly what the features file would hold, row by row."""
    run = make(digits, tmp_path / "run", RankInfo())
    from ssl_dist.views.make import test_views

    with run.plan.open_reader() as reader:
        [images] = reader.batches([run.plan.order.train_ids])
    images = test_views(images, 32, resize=36, interpolation="bicubic")
    with torch.no_grad():
        expected = run.method.backbone.eval()(run._normalize(torch.from_numpy(images)))
    np.testing.assert_allclose(one_process[0][1], expected.numpy(), rtol=1e-12)


def test_augmented_views_depend_on_the_step(digits, tmp_path):
    run = make(digits, tmp_path / "run", RankInfo())
    at = [run.extract_at(Clock(step, 4, 100))(run.method.backbone, augmented=True).values for step in (1, 1, 2)]
    assert torch.equal(at[0], at[1]) and not torch.equal(at[0], at[2])


def test_the_watchdog_sees_a_new_phase_every_batch_wherever_it_looks(digits, tmp_path, monkeypatch):
    """Its time limit is of a batch: reading and making views are in it, and no two batches have one phase."""
    run = make(digits, tmp_path / "run", RankInfo())
    state, phases_and_bounds = run.world.state, []
    make_test_views = relabel.views.test_views

    def views(*arguments, **options):
        phases_and_bounds.append((state.phase, state.bound))
        return make_test_views(*arguments, **options)

    def network(images):
        phases_and_bounds.append((state.phase, state.bound))
        return images.flatten(1)

    monkeypatch.setattr(relabel, "BATCH_SIZE", 20)
    monkeypatch.setattr(relabel.views, "test_views", views)
    state.phase, state.bound = "the first step", 300.0
    module = nn.Identity()
    module.forward = network
    run.extract_at(Clock(0, 4, 100))(module)
    assert {bound for _, bound in phases_and_bounds} == {relabel.BATCH_TIMEOUT_S}
    in_views, in_network = phases_and_bounds[::2], phases_and_bounds[1::2]
    assert in_views == in_network and len(set(in_views)) == len(in_views) == 3
    assert (state.phase, state.bound) == ("the first step", 300.0)
