"""Features of layers by name: what they are, in files, evaluations and probes; and that two never mix."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import ssl_dist
from ssl_dist import backbones, cli, config, methods, report, results
from ssl_dist.data.readers import Dataset
from ssl_dist.distributed.world import one_process
from ssl_dist.errors import UserError
from ssl_dist.evaluate.command import evaluate, parse
from ssl_dist.evaluators import knn
from ssl_dist.methods.base import Info
from ssl_dist.nn import features
from ssl_dist.report import published
from ssl_dist.run.encoder import extract_features, features_path, is_fresh, load_encoder
from ssl_dist.storage.features import read_features
from ssl_dist.train.loop import train
from tests import ranks

DINO = "blocks.8.class+blocks.9.class+blocks.10.class+blocks.11.class"
MAPS = "layer2+layer4"  # of conv4: 16 and 64 channels


def transformer(**options):
    torch.manual_seed(0)
    return backbones.build("timm/vit_tiny_patch16_224", image_size=32, patch_size=8, **options).eval()


@torch.no_grad()
def test_dinos_linear_protocol():
    """Of a ViT-S the class tokens of four blocks, each after the last normalisation; of a ViT-B that of the last and
    the mean of its patches."""
    pytest.importorskip("timm")
    backbone, images = transformer(), torch.randn(3, 3, 32, 32)
    x, by_block = backbone._embedded(images), []
    for block in backbone.model.blocks:
        x = block(x)
        by_block.append(backbone.model.norm(x))
    expected = [torch.cat([by_block[number][n, 0] for number in (8, 9, 10, 11)]) for n in range(3)]
    torch.testing.assert_close(features.of_layer(backbone, DINO, images), torch.stack(expected))
    expected = [torch.cat([by_block[11][n, 0], sum(by_block[11][n, 1:]) / 16]) for n in range(3)]
    torch.testing.assert_close(features.of_layer(backbone, "class+patches", images), torch.stack(expected))
    assert features.width(DINO, backbone.stages, 192) == 4 * 192


@torch.no_grad()
def test_maps_of_any_backbone():
    backbone, images = backbones.build("resnet18").eval(), torch.randn(2, 3, 32, 32)
    output, maps = backbone.forward_stages(images)
    found = features.of_layer(backbone, "layer2+output", images)
    places = [maps["layer2"][:, :, row, column] for row in range(4) for column in range(4)]
    torch.testing.assert_close(found, torch.cat([sum(places) / 16, output], 1))
    torch.testing.assert_close(features.of_layer(backbone, "layer4", images), output)
    assert features.width("layer2+output", backbone.stages, 512) == found.shape[1] == 640


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            "layer5",
            "layer = 'layer5': is no layer here; did you mean 'layer4'? layers, or several joined by +: output, ",
        ),
        ("layer1+lyer2", "'lyer2' of it is no layer here; did you mean 'layer2'?"),
        ("layer1+", "'' of it is no layer here; layers"),
    ],
)
def test_a_layer_that_is_not_there(layer, message):
    with pytest.raises(UserError) as raised:
        features.width(layer, backbones.build("resnet18").stages, 512)
    assert message in str(raised.value)


def test_names_of_files():
    assert features.named("a-test", "output") == "a-test" and features.named("a-test", DINO) == f"a-test-{DINO}"
    long = ["+".join(f"blocks.{n}.class" for n in range(first, 40)) for first in (0, 1)]
    names = {features.named("a-test", layer) for layer in [*long, "a/b", "a_b"]}
    assert len(names) == 4 and max(map(len, names)) <= 110 and not any("/" in name for name in names)


# ------------------------------------------------------------------------------------------------ features files


def test_features_of_a_layer_are_in_a_file_of_their_own(random_run, digits, tmp_path, capsys):
    words = ["extract", str(random_run), "--split", "test", "--out", str(tmp_path)]
    assert cli.main([*words, f"layer={MAPS}"]) == cli.main(words) == 0
    path = tmp_path / f"digits-test-{MAPS}.safetensors"
    assert capsys.readouterr().out.split() == [str(path), str(tmp_path / "digits-test.safetensors")]
    extracted = read_features(path)
    assert extracted.metadata["layer"] == MAPS and extracted.dim == 16 + 64
    model = ssl_dist.load(random_run, MAPS, device="cpu")
    with Dataset(digits, reader="arrays").open("test") as reader:
        [(pixels, _, _, _)] = list(reader.batches([np.arange(reader.info.count)]))
        np.testing.assert_array_equal(model.embed(pixels, progress=False), extracted.features)
    parts = [ssl_dist.load(random_run, name, device="cpu").embed(pixels, progress=False) for name in MAPS.split("+")]
    np.testing.assert_array_equal(np.concatenate(parts, 1), extracted.features)
    assert model.dim == 80 and f"layer {MAPS}" in repr(model)


def test_a_file_of_another_layer_is_not_fresh(random_run, digits, tmp_path):
    encoder, source = load_encoder(random_run), Dataset(digits, reader="arrays")
    other = encoder.with_layer("layer4")
    path = extract_features(other, source, "test", tmp_path, one_process(), 1)
    assert is_fresh(path, other, source, "test")
    usual = features_path(tmp_path, source, "test")
    shutil.copy(path, usual)
    assert not is_fresh(usual, encoder, source, "test") and not is_fresh(
        path, other.with_layer("layer3"), source, "test"
    )


def in_ranks(rank, size, run, folder):
    from ssl_dist.evaluate.command import extract

    torch.set_num_threads(1)
    return [str(path) for path in extract(Path(run), ["test"], [f"layer={MAPS}"], Path(folder))]


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_world_size_writes_the_same_file(random_run, digits, tmp_path, size):
    torch.set_num_threads(1)
    encoder, source = load_encoder(random_run).with_layer(MAPS), Dataset(digits, reader="arrays")
    alone = extract_features(encoder, source, "test", tmp_path / "a", one_process(), 1)
    ranks.launch(in_ranks, size, tmp_path, random_run, tmp_path / "b")
    assert (tmp_path / "b" / alone.name).read_bytes() == alone.read_bytes()
    assert [path.name for path in (tmp_path / "b").iterdir()] == [alone.name]


@pytest.mark.parametrize("command", ["extract", "evaluate"])
def test_a_wrong_name_is_a_mistake_of_one_line(random_run, tmp_path, command, capsys):
    more = ["knn"] if command == "evaluate" else ["--out", str(tmp_path)]
    assert cli.main([command, str(random_run), *more, "layer=lyer4"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line == (
        "error: layer = 'lyer4': is no layer here; did you mean 'layer4'? layers, or several joined by +: output, "
        "layer1, layer2, layer3, layer4"
    )


# --------------------------------------------------------------------------------------------------- evaluations


@pytest.fixture(scope="module")
def run(random_run, tmp_path_factory):
    """Measured by kNN on two layers."""
    run = shutil.copytree(random_run, tmp_path_factory.mktemp("layers") / "run")
    for more in ([], ["layer=layer1"]):
        assert evaluate(run, ["knn"], ["knn.k=[5]", *more])[0] == 0
    return run


def test_every_number_says_its_layer(run):
    records = results.read(run / "results.json")
    assert [(record["name"], record["layer"]) for record in records] == [
        (f"knn5_top{top}", layer) for layer in ("output", "layer1") for top in (1, 5)
    ]
    assert records[0]["value"] != records[2]["value"]
    train_features, test_features = (
        read_features(run / "features" / f"digits-{split}-layer1.safetensors") for split in ("train", "test")
    )
    expected = knn.run(train_features, test_features, knn.Options(k=[5]))
    assert {record["name"]: record["value"] for record in records[2:]} == expected
    assert records[2]["protocol"] == f"{records[0]['protocol']}; layer layer1 in the output's place"
    table = results.table(records)
    assert "  knn5_top1  " in table and "  knn5_top1 (layer1)  " in table
    before = (run / "results.json").read_bytes()
    assert evaluate(run, ["knn"], ["knn.k=[5]", "layer=layer1"])[1] == records[2:]
    assert (run / "results.json").read_bytes() == before, "measured already"


def test_a_record_of_before_is_of_the_output(run, tmp_path):
    old = [{key: value for key, value in each.items() if key != "layer"} for each in results.read(run / "results.json")]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(old[:1]))
    [record] = results.read(path)
    assert record["layer"] == "output"
    assert len(results.add(path, [record | {"value": 1.0}])) == 1, "measured again: in its place"
    assert len(results.add(path, [record | {"layer": "layer1"}])) == 2


def test_pages_tables_and_tensorboard_tell_layers_apart(run, tmp_path):
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    board = EventMultiplexer().AddRunsFromDirectory(str(run)).Reload()
    tags = {f"digits-test/knn5_top{top}{layer}" for top in (1, 5) for layer in ("", "-layer1")}
    assert set(board.Runs()["tensorboard/results"]["scalars"]) == tags
    about = board.SummaryMetadata("tensorboard/results", "digits-test/knn5_top1-layer1").summary_description
    assert about.endswith("layer layer1 in the output's place")
    records = [record for record in report.over_seeds([run]) if record["name"] == "knn5_top1"]
    assert [record["layer"] for record in records] == ["output", "layer1"]
    assert "  knn5_top1 (layer1)  " in report.table(records)
    page = report.write(report.read([run]), tmp_path / "page.html").read_text()
    assert ">knn5_top1<" in page and ">knn5_top1 (layer1)<" in page
    other = shutil.copytree(run, tmp_path / "other")
    page = report.write(report.read([run, other]), tmp_path / "page.html").read_text()
    assert page.count("knn5_<wbr>top1 (layer1)") == 1
    names = {path.name for path in (run / "figures").glob("*.png")}
    assert {"digits-test-knn-confusion.png", "digits-test-knn-confusion-layer1.png"} <= names


def test_no_published_number_is_of_a_layer():
    [row] = [row for row in published.read() if (row.method, row.dataset) == ("relational", "slimagenet64")][:1]
    record = {
        "method": row.method, "backbone": row.backbone, "dataset": row.dataset, "split": row.split, "protocol": "",
        "name": row.protocol.results[0], "options": row.protocol.options, "layer": "output",
    }  # fmt: skip
    assert published.agrees(row, record) and not published.agrees(row, record | {"layer": "layer3"})


def test_evaluators_without_layers_refuse_them():
    with pytest.raises(UserError, match="layer = 'layer1': finetune reads no layer by name; leave it out"):
        parse(["knn", "finetune"], ["layer=layer1"])
    assert parse(["knn", "probe", "retrieval"], ["layer=layer1"]).data == {"layer": "layer1"}
    assert parse(["finetune"], ["layer=output"])


# -------------------------------------------------------------------------------------------------------- probes


def probe_of(backbone, **options):
    info = Info(64, 5, ((1, 32),), 8, 1.0, feature_dim=backbone.feature_dim, stages=backbone.stages)
    method_class = methods.find("linear_probe")
    return method_class(backbone, info, methods.build_options(method_class, options))


def test_a_probe_on_a_layer_and_on_maps_of_tokens():
    pytest.importorskip("timm")
    backbone, images = transformer(), torch.randn(4, 3, 32, 32)
    probe = probe_of(backbone, layer=DINO).eval()
    assert probe.heads["output"].in_features == 4 * 192
    expected = probe.heads["output"](features.of_layer(backbone, DINO, images))
    torch.testing.assert_close(probe.logits(images), {"output": expected})
    several = probe_of(backbone, stages=["class", "patches"])
    linear = {name: several.heads[name][-1].in_features for name in several.names}
    assert linear == {"class": 192, "patches": 192 * 16}, "one pixel, and a grid of 4 x 4"
    assert [x.shape for x in several.logits(images).values()] == [(4, 5), (4, 5)]
    for options, message in (
        ({"layer": "clas"}, "method.options.layer = 'clas': is no layer here; did you mean 'class'?"),
        ({"layer": "class", "stages": "all"}, "leave one of the two out"),
        ({"stages": ["patch"]}, "did you mean 'patches'? name some of them"),
    ):
        with pytest.raises(UserError) as raised:
            probe_of(backbone, **options)
        assert message in str(raised.value)


def test_a_transformer_with_patches_of_its_own_is_probed_and_exported(digits, tmp_path, capsys):
    """At the training's size of images and at another one, whose positions are interpolated."""
    pytest.importorskip("timm")
    settings = {
        "run_dir": str(tmp_path / "run"),
        "data": {"name": "digits", "root": str(digits), "reader": "arrays", "limit": 64},
        "backbone": {"name": "timm/vit_tiny_patch16_224", "patch_size": 8}, "method": {"name": "supervised"},
        "optim": {"batch_size": 32, "steps": 1, "epochs": None},
    }  # fmt: skip
    assert train(config.validate(config.Config, settings)) == 0
    words = ["probe.epochs=1", "data.subset={per_class: 5}", "probe.batch_size=50"]
    code, records = evaluate(tmp_path / "run", ["probe"], [*words, "layer=class+patches"])
    assert code == 0 and [(record["name"], record["layer"]) for record in records] == [
        ("probe_top1", "class+patches"), ("probe_top5", "class+patches")
    ]  # fmt: skip
    [folder] = (tmp_path / "run" / "evaluations").iterdir()
    assert config.load(folder / "config.yaml").method.options == {"layer": "class+patches"}
    assert evaluate(tmp_path / "run", ["probe"], [*words, "data.image_size=48"])[0] == 0
    exported = tmp_path / "vit.safetensors"
    assert cli.main(["export", str(tmp_path / "run"), str(exported), "--format", "timm"]) == 0
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(
        ssl_dist.load(exported, device="cpu")(images), ssl_dist.load(tmp_path / "run", device="cpu")(images)
    )
