"""Extraction: each image once, in order, the same at any world size and for any count that nothing divides."""

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ssl_dist import backbones, methods
from ssl_dist.data.readers import Dataset
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.distributed.world import World, one_process
from ssl_dist.errors import UserError
from ssl_dist.grid import Grid
from ssl_dist.run import encoder as run_encoder
from ssl_dist.run.encoder import (
    BATCH_SIZE,
    Encoder,
    extract_features,
    features_path,
    is_fresh,
    load_encoder,
    share_in_batches,
)
from ssl_dist.storage import checkpoint, durable
from ssl_dist.storage.features import read_features, write_features
from tests import ranks


def source(digits, reader="arrays"):
    return Dataset(digits, reader=reader)


def test_features_are_the_encoders_of_every_image_in_order(random_run, digits, tmp_path):
    encoder = load_encoder(random_run)
    path = extract_features(encoder, source(digits), "test", tmp_path, one_process(), threads=1)
    extracted = read_features(path)
    with Dataset(digits, reader="arrays").open("test") as reader:
        ids = np.arange(reader.info.count)
        [(pixels, _, _, _)] = list(reader.batches([ids]))
        labels = reader.labels(ids)
        mean, std = torch.tensor(reader.info.mean), torch.tensor(reader.info.std)
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        expected = encoder.module.eval()(images)
    np.testing.assert_allclose(extracted.features, expected.numpy(), rtol=1e-4, atol=1e-5)
    assert np.array_equal(extracted.labels, labels) and np.array_equal(extracted.image_ids, ids)
    assert extracted.metadata["checkpoint"] == encoder.sha256 and extracted.metadata["step"] == "0"
    assert json.loads(extracted.metadata["classes"]) == [str(n) for n in range(10)]


def test_the_resize_of_evaluation_reaches_the_features_and_their_file(random_run, digits, tmp_path):
    encoder, read = load_encoder(random_run), {}
    for interpolation in ("bilinear", "bicubic"):
        data = encoder.config.data.model_copy(update={"eval_resize": 40, "eval_interpolation": interpolation})
        other = replace(encoder, config=encoder.config.model_copy(update={"data": data}))
        path = extract_features(other, source(digits), "test", tmp_path / interpolation, one_process(), threads=1)
        assert is_fresh(path, other, source(digits), "test")
        assert not is_fresh(path, encoder, source(digits), "test")
        read[interpolation] = read_features(path)
    transforms = [read[interpolation].metadata["transform"] for interpolation in read]
    assert transforms[0].startswith("short side to 40, centre crop 32, ")
    assert transforms[1].startswith("short side to 40 bicubic, centre crop 32, ")
    assert np.abs(read["bilinear"].features - read["bicubic"].features).max() > 1e-4


def in_ranks(rank, size, run, folder, split):
    from ssl_dist.evaluate.command import extract

    torch.set_num_threads(1)
    return [str(p) for p in extract(Path(run), [split], [], Path(folder))]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [1, 255, 256, 257, 355, 5000])
def test_ranks_share_whole_batches(size, count):
    """The batches must not depend on the number of ranks: another size of batch rounds differently."""
    worlds = [World(RankInfo(rank, size, rank, size), Grid(size, 1), torch.device("cpu")) for rank in range(size)]
    ranges = [share_in_batches(world, count) for world in worlds]
    edges = [0, *(high for _, high in ranges)]
    assert [low for low, _ in ranges] == edges[:-1] and edges[-1] == count
    assert all(edge % BATCH_SIZE == 0 or edge == count for edge in edges)


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_world_size_writes_the_same_file(random_run, digits, tmp_path, size):
    """To the bit: two batches of 256, so that the third rank has none."""
    torch.set_num_threads(1)  # as many as each rank; conftest.py puts the number back
    alone = extract_features(load_encoder(random_run), source(digits), "test", tmp_path / "a", one_process(), 1)
    assert read_features(alone).features.shape[0] % 7, "the count should not divide evenly"
    (tmp_path / "b").mkdir()
    for name in ("digits-test.safetensors", "digits-test.part-0", "digits-test.part-7"):
        (tmp_path / "b" / f".{name}.01234567.tmp").write_bytes(b"left by an extraction that was killed")
    ranks.launch(in_ranks, size, tmp_path, random_run, tmp_path / "b", "test")
    a, b = read_features(alone), read_features(tmp_path / "b" / alone.name)
    assert np.array_equal(a.features, b.features)
    assert np.array_equal(a.labels, b.labels) and a.metadata == b.metadata
    assert [p.name for p in (tmp_path / "b").iterdir()] == [alone.name], "no part is left behind"


def test_parts_of_killed_processes_are_removed_and_those_of_running_ones_are_not(random_run, digits, tmp_path):
    encoder = load_encoder(random_run)
    path = features_path(tmp_path, source(digits), "test")
    dead = [tmp_path / ".digits-test.part-1.01234567.tmp", tmp_path / ".digits-test.safetensors.89abcdef.tmp"]
    for file in dead:
        file.touch()
    with durable.temporary(run_encoder._part_of(path, 0, "00000000")) as part:  # of a process that is at it
        part.write(b"rows")
        extract_features(encoder, source(digits), "test", tmp_path, one_process(), 1)
        assert sorted(os.listdir(tmp_path)) == [".digits-test.part-0.00000000.tmp", path.name]
    assert os.listdir(tmp_path) == [path.name]


def test_a_folder_that_cannot_be_made_is_refused_before_the_work(random_run, digits, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"{tmp_path}/file/f: cannot be written: .*give another --out"):
        extract_features(load_encoder(random_run), source(digits), "test", tmp_path / "file" / "f", one_process(), 1)


def test_the_sha256_is_of_the_bytes_that_were_loaded(random_run, tmp_path, monkeypatch):
    """Also when a training prunes the checkpoint between the check and the load."""
    copy = tmp_path / "run"
    shutil.copytree(random_run, copy)
    path = checkpoint.newest(copy)
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    assert load_encoder(path).sha256 == expected
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **options: (path.unlink(), load(*args, **options))[1])
    assert load_encoder(copy).sha256 == expected and not path.exists()


@pytest.mark.requires_ffcv
def test_readers_agree(random_run, digits, tmp_path):
    encoder = load_encoder(random_run)
    files = [
        extract_features(encoder, source(digits, reader), "test", tmp_path / reader, one_process(), threads)
        for reader, threads in (("arrays", 1), ("ffcv", 2))
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_freshness(random_run, digits, tmp_path):
    encoder = load_encoder(random_run)
    path = features_path(tmp_path, source(digits), "test")

    def fresh(encoder=encoder):
        return is_fresh(path, encoder, source(digits), "test")

    assert not fresh()
    extract_features(encoder, source(digits), "test", tmp_path, one_process(), 1)
    assert fresh()
    assert not fresh(Encoder(encoder.module, encoder.config, encoder.normalize, "0" * 64, 0, encoder.file))
    backbone = encoder.config.backbone.model_copy(update={"name": "other"})  # that takes the same weights
    assert not fresh(replace(encoder, config=encoder.config.model_copy(update={"backbone": backbone})))
    extracted = read_features(path)
    write_features(
        path, extracted.features, extracted.labels, extracted.image_ids, extracted.metadata | {"data": "0" * 64}
    )
    assert not fresh(), "features of other samples under the same name"
    path.write_bytes(path.read_bytes()[:-1])
    assert not fresh(), "a damaged file is extracted again"


def test_what_is_no_run(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        load_encoder(tmp_path)


def test_every_method_and_backbone_is_found_by_name():
    assert {"relational", "random_weights"} <= set(methods.names())
    assert backbones.build("conv4").feature_dim == 64
