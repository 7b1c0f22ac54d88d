"""Files of the official codes, torchvision and timm: read into a backbone, or refused in one line and never run."""

import hashlib
import json
import math
import os
import pickle
import random
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision

from ssl_dist import backbones, cli, config
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.errors import UserError
from ssl_dist.run.blueprint import derive
from ssl_dist.storage import formats, weights, weights_file
from ssl_dist.storage.features import read_features
from tests import golden_fill, test_golden_backbones
from tests.test_golden_backbones import GOLDEN, NETS, Network

FIXTURE_OF = re.compile("rr_(conv4|resnet8|resnet34)|sfrik_.*|relic_.*|sela_(resnetv2|alexnet_3).*")


def optimizer_of(tensors):
    """What torch.optim saves: numbers and tensors by the index of a parameter."""
    exp_avg = {i: {"step": torch.tensor(3.0), "exp_avg": t} for i, t in enumerate(list(tensors.values())[:2])}
    return {"state": exp_avg, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0, 1]}]}


def under(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def official_files(net, tensors):
    """The forms in which the official code of `net` leaves its weights, name -> content; tensors: by its own names."""
    head = {"linear1.weight": torch.zeros(2, 2), "linear2.weight": torch.zeros(2, 2)}
    projector = under("projector.", {"0.weight": torch.zeros(4, 4), "1.running_mean": torch.zeros(4)})
    if net.startswith("rr_"):
        return {
            "relational": {"backbone": tensors, "relation": head, "optimizer": optimizer_of(tensors)},
            "simclr": {"backbone": tensors, "head": head, "optimizer": optimizer_of(tensors)},
            "infomax": {"backbone": tensors, "loss_fn": head, "optimizer": optimizer_of(tensors)},
            "rotation": {"classifier": head, "backbone": tensors, "optimizer": optimizer_of(tensors)},
            "random": {"backbone": tensors},
            "two GPUs": {"backbone": under("module.", tensors), "relation": head},
        }
    if net.startswith("sfrik_"):
        both = under("module.", under("backbone.", tensors) | projector)
        return {
            "backbone alone": tensors,
            "checkpoint": {"epoch": 100, "model": both, "optimizer": optimizer_of(tensors)},
        }
    if net.startswith("relic_"):
        whole = under("0.", tensors) | {"1.block.0.weight": torch.zeros(8, 8)}
        other = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
        return {
            "encoder": tensors,
            "encoder and head": whole,
            "model": under("online_encoder.", other) | under("target_encoder.", whole) | {"tau": torch.tensor(0.0)},
        }
    saved = {"epoch": 401, "arch": "alexnet", "optimizer": optimizer_of(tensors), "L": torch.zeros(1, 9).long()}
    parallel = {name.replace("features.", "features.module.", 1): tensor for name, tensor in tensors.items()}
    return {
        "published": tensors,
        "checkpoint": saved | {"state_dict": tensors},
        "two GPUs": saved | {"state_dict": under("module.", tensors)},
        "two GPUs for the features": saved | {"state_dict": parallel},
    }


def name_of(net):
    return test_golden_backbones.ours(net)[0]


@pytest.mark.parametrize("net", [net for net in NETS if FIXTURE_OF.fullmatch(net)])
def test_files_of_the_official_codes(net, tmp_path):
    """Every form gives every tensor of the backbone, and the backbone then computes what the official network did."""
    network = Network(net)
    tensors = test_golden_backbones.filled(net)
    heads = {name for name in tensors if name.startswith("top_layer")}
    expected = {
        name.removeprefix("backbone."): tensors[network.official(name)]
        for name in network.state_dict()
        if name.startswith("backbone.")
    }
    for form, content in official_files(net, tensors).items():
        path = tmp_path / "file.pth"
        torch.save(content, path, _use_new_zipfile_serialization=form != "published")  # SeLa's are of 2019
        fitted = weights.fit(network.backbone, name_of(net), path)
        assert fitted.tensors.keys() == expected.keys(), form
        assert all(torch.equal(tensor, expected[name]) for name, tensor in fitted.tensors.items()), form
        assert heads <= set(fitted.unused), form
        path.unlink()
    network.backbone.load_state_dict(fitted.tensors)
    for name, head in network.heads.items():
        head.load_state_dict({key: tensors[f"{name.replace('-', '.')}.{key}"] for key in ("weight", "bias")})
    network.double().eval()
    with torch.no_grad():
        out = network(golden_fill.image(GOLDEN, net).double())
    eval_out = torch.from_numpy(GOLDEN[f"{net}/f64/eval_out"])
    assert (out - eval_out).abs().max() <= 1e-9 * eval_out.abs().max()


def test_the_form_and_the_unused_tensors_are_named(tmp_path):
    tensors = backbones.build("resnet18").state_dict()
    path = tmp_path / "model.pth"

    def note(content, suffix=path):
        torch.save(content, suffix)
        return weights.fit(backbones.build("resnet18"), "resnet18", suffix).note

    head = {"top_layer0.weight": torch.zeros(1), "top_layer0.bias": torch.zeros(1)}
    sela = {formats.renamed(name, formats.SELA): tensor for name, tensor in tensors.items()}
    line = note({"epoch": 3, "state_dict": sela | head, "L": torch.zeros(1)})
    assert line == (
        f"{path}: read under state_dict. (as SeLa, MoCo, SwAV and Lightning save it), SeLa's names; "
        "not used: top_layer0.bias, top_layer0.weight"
    )
    assert note(tensors) == f"{path}: a network alone, the backbone's own names; not used: nothing"
    line = note({"model": under("module.backbone.", tensors) | under("module.projector.", {"0.weight": torch.ones(1)})})
    assert "read under model.backbone. (as relational" in line and "not used: projector.0.weight" in line
    line = note({formats.renamed(name, formats.RELIC): tensor for name, tensor in tensors.items()})
    assert "ReLIC's or a torch.nn.Sequential's names" in line
    line = note(tensors | {f"more.{i}": torch.zeros(1) for i in range(10)})
    assert line.endswith("more.6, more.7 and 2 more")


def test_moco_v2s_file_gives_the_encoder_of_queries(tmp_path):
    """As moco_v2_800ep_pretrain.pth.tar: two encoders, each with its MLP, and the queue."""
    queries, keys = (torchvision.models.resnet18(num_classes=8).state_dict() for _ in range(2))
    mlp = {"fc.0.weight": torch.zeros(4, 4), "fc.0.bias": torch.zeros(4), "fc.2.weight": torch.zeros(4, 4)}
    saved = under("module.encoder_q.", queries | mlp) | under("module.encoder_k.", keys | mlp)
    saved |= {"module.queue": torch.zeros(4, 6), "module.queue_ptr": torch.zeros(1).long()}
    torch.save({"epoch": 800, "arch": "resnet18", "state_dict": saved, "optimizer": {}}, tmp_path / "moco.pth.tar")
    fitted = weights.fit(backbones.build("resnet18"), "resnet18", tmp_path / "moco.pth.tar")
    assert all(torch.equal(tensor, queries[name]) for name, tensor in fitted.tensors.items())
    assert {"queue", "encoder_q.fc.0.weight", "encoder_k.conv1.weight"} <= set(fitted.unused)
    assert "MoCo's encoder of queries" in fitted.note and "also whole in it: state_dict.encoder_k. (" in fitted.note


def test_files_of_torchvision_and_timm(tmp_path):
    images = torch.randn(2, 3, 64, 64)
    theirs = torchvision.models.resnet18().eval()
    old = {name: t for name, t in theirs.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "resnet18.pth")  # as files before PyTorch 0.4.1
    safetensors.torch.save_file(theirs.state_dict(), tmp_path / "resnet18.safetensors")
    theirs.fc = torch.nn.Identity()
    for file in ("resnet18.pth", "resnet18.safetensors"):
        ours = backbones.build("resnet18").eval()
        fitted = weights.fit(ours, "resnet18", tmp_path / file)
        assert fitted.unused == ["fc.bias", "fc.weight"]
        ours.load_state_dict(fitted.tensors)
        assert int(ours.bn1.num_batches_tracked) == 0
        torch.testing.assert_close(ours(images), theirs(images))

    timm = pytest.importorskip("timm")
    theirs = timm.create_model("convnext_atto", num_classes=7).eval()
    safetensors.torch.save_file(theirs.state_dict(), tmp_path / "timm.safetensors")
    ours = backbones.build("timm/convnext_atto").eval()
    fitted = weights.fit(ours, "timm/convnext_atto", tmp_path / "timm.safetensors")
    assert fitted.unused == ["head.fc.bias", "head.fc.weight"]
    ours.load_state_dict(fitted.tensors)
    theirs.reset_classifier(0)
    torch.testing.assert_close(ours(images), theirs(images))


DEEPER = ("resnet18", "resnet34", {}), ("resnet32", "resnet56", {})
OTHER_BLOCKS = ("resnet18", "resnet18", {"layer1.0.se.fc1.weight": torch.zeros(4, 64, 1, 1)})


@pytest.mark.parametrize(("name", "stored", "more"), [*DEEPER, OTHER_BLOCKS])
def test_weights_of_another_network_that_has_all_tensors_are_refused_and_the_remedy_helps(tmp_path, name, stored, more):
    path, tensors = tmp_path / "file.pth", backbones.build(stored).state_dict()
    torch.save({"model": under("module.backbone.", tensors | more)}, path)
    with torch.device("meta"), pytest.raises(UserError, match=f"which backbone {name} does not have"):
        weights.fit(backbones.build(name), name, path)
    if not more:  # the backbone that the file was trained with
        with torch.device("meta"):
            assert not weights.fit(backbones.build(stored), stored, path).unused


def test_tables_within_blocks_that_a_backbone_computes_itself_are_passed_over(tmp_path):
    tensors = backbones.build("resnet18").state_dict()
    tables = {
        "layer1.0.relative_position_index": torch.zeros(3, dtype=torch.int64),
        "layer1.1.attn_mask": torch.ones(2),
    }
    torch.save(tensors | tables, tmp_path / "file.pth")
    with torch.device("meta"):
        assert weights.fit(backbones.build("resnet18"), "resnet18", tmp_path / "file.pth").unused == sorted(tables)


def test_a_network_that_stands_in_a_file_alone_and_wrapped_is_refused(tmp_path):
    tensors = backbones.build("conv4").state_dict()
    torch.save(tensors | under("module.", {name: t + 1 for name, t in tensors.items()}), tmp_path / "file.pth")
    with pytest.raises(UserError, match=r"holds layer1\.conv\.weight twice, alone and wrapped as module\.layer1"):
        weights.fit(backbones.build("conv4"), "conv4", tmp_path / "file.pth")


class Shell:
    """What a pickle can do when it is loaded by pickle itself."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle", "within a state_dict"])
def test_a_malicious_file_is_refused_and_not_run(tmp_path, form):
    path, trace = tmp_path / "weights.pth", tmp_path / "ran"
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(Shell(trace), protocol=2))
    else:
        tree = {"backbone": backbones.build("conv4").state_dict(), "optimizer": Shell(trace)}
        if form == "within a state_dict":
            tree = tree["backbone"] | {"more": Shell(trace)}
        torch.save(tree, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(UserError, match=r"not read, for it holds the object (posix|nt)\.system") as caught:
        weights.fit(backbones.build("conv4"), "conv4", path)
    assert "\n" not in str(caught.value) and not trace.exists()
    if form == "bare pickle":
        pickle.loads(path.read_bytes())
        assert trace.exists(), "the file should do harm when it is run"


def test_files_that_are_no_weights_of_the_backbone(tmp_path):
    conv4, path = backbones.build("conv4"), tmp_path / "file"
    tensors = conv4.state_dict()

    def refused(content):
        if content is not None:
            torch.save(content, path)
        with pytest.raises(UserError) as caught:
            weights.fit(conv4, "conv4", path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
        return str(caught.value)

    def without(name):
        return {key: tensor for key, tensor in tensors.items() if key != name}

    assert "cannot be read: No such file" in refused(None)
    assert "holds a list" in refused([1, 2])
    assert "holds a Tensor" in refused(torch.zeros(3))
    assert "holds a dictionary of backbone without tensors" in refused({"backbone": {}})
    line = refused(backbones.build("resnet8").state_dict())
    assert "holds no tensor of backbone conv4; it holds conv1.weight, bn1.weight" in line
    line = refused(without("layer3.conv.weight"))
    assert "lacks layer3.conv.weight of backbone conv4 (1 of its 24 tensors are missing" in line
    line = refused(tensors | {"layer2.bn.bias": torch.zeros(17)})
    assert "layer2.bn.bias has shape [17], in backbone conv4 [16]" in line
    name, other = "layer1.conv.weight", tensors["layer1.conv.weight"]
    for bad, words in (
        (other.to_sparse(), "is no dense tensor with values (torch.sparse_coo)"),
        (other.to("meta"), "is no dense tensor with values (meta)"),
        (other.long(), "is of torch.int64, not of floating point"),
        (other.cfloat(), "is of torch.complex64, not of floating point"),
        (other * math.nan, "holds values that are not finite"),
    ):
        assert f"{name} {words}" in refused(tensors | {name: bad})
    line = refused({"format": 1, "method": {}, "config": {}})
    assert "a checkpoint of ssl_dist" in line and "ssl-dist export" in line
    for content in (b"", b"no weights at all", b"PK\x03\x04 torn", b"\x10\0\0\0\0\0\0\0{ not json", b"\x80\x02."):
        path.write_bytes(content)
        assert "no weights that torch or safetensors can read" in refused(None) or "not read" in refused(None), content
    torch.save(tensors, path)
    path.write_bytes(path.read_bytes()[:-100])
    assert "no weights that torch or safetensors can read" in refused(None)
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        weights_file.read(tmp_path)


def test_damage_anywhere_in_a_file_is_one_line(tmp_path):
    """Bytes changed, lost and added at random: a file is read, or refused in one line."""
    tensors, draw, path = (
        {"a.weight": torch.zeros(3, 2), "b": torch.ones(4).long()},
        random.Random(0),
        tmp_path / "file",
    )
    whole = [safetensors.torch.save(tensors), pickle.dumps({"a": [1, 2, (3, 4)], "b": "x" * 10}, protocol=2)]
    for zipped in (True, False):
        torch.save({"backbone": tensors, "epochs": [1, "2"]}, path, _use_new_zipfile_serialization=zipped)
        whole.append(path.read_bytes())
    refused = 0
    for content in whole * 300:
        damaged = bytearray(content)
        for _ in range(draw.choice((1, 2, 5, 20))):
            where = draw.randrange(len(damaged))
            kind = draw.random()
            if kind < 0.6:
                damaged[where] = draw.randrange(256)
            elif kind < 0.8:
                del damaged[where : where + draw.randrange(1, 30)]
                damaged += b"." if not damaged else b""
            else:
                damaged[where:where] = draw.randbytes(draw.randrange(1, 8))
        path.write_bytes(damaged)
        with warnings.catch_warnings(action="ignore"):
            try:
                weights_file.read(path)
            except UserError as error:
                assert "\n" not in str(error)
                refused += 1
    assert 0 < refused < 1200


# ------------------------------------------------------------------------------------------------- in use


def images_of(digits):
    return [f"data.root={digits}", "data.name=digits", "data.reader=arrays"]


@pytest.fixture
def official(tmp_path):
    """A file of the official code of relational reasoning, and its backbone."""
    torch.manual_seed(7)
    conv4 = golden_fill.fill(backbones.build("conv4"), 3)
    torch.save({"backbone": conv4.state_dict(), "relation": {"linear2.bias": torch.zeros(1)}}, tmp_path / "seed.tar")
    return tmp_path / "seed.tar", conv4.eval()


def test_extract_reads_a_file_of_others(official, digits, tmp_path, capsys):
    path, conv4 = official
    data = [
        *images_of(digits),
        "backbone.name=conv4",
        "views.normalize={mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25]}",
    ]
    assert cli.main(["extract", str(path), "--out", str(tmp_path / "out"), "--split", "test", *data]) == 0
    captured = capsys.readouterr()
    assert f"{path}: read under backbone. (as relational" in captured.err and "not used: nothing" in captured.err
    assert "(data.image_size not given: give what it was trained with)" in captured.err
    assert "images: short side to 32, centre crop 32, mean (0.5, 0.5, 0.5)" in captured.err
    extracted = read_features(Path(captured.out.strip()))
    from ssl_dist.data.readers import Dataset

    with Dataset(digits, reader="arrays").open("test") as reader:
        [(pixels, _, _, _)] = list(reader.batches([np.arange(64)]))
    with torch.no_grad():
        expected = conv4((torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25)
    np.testing.assert_allclose(extracted.features[:64], expected.numpy(), rtol=1e-4, atol=1e-5)
    assert extracted.metadata["backbone"] == "conv4" and extracted.metadata["method"] == "seed.tar"
    assert "mean (0.5, 0.5, 0.5)" in extracted.metadata["transform"]


def test_evaluate_takes_a_file_of_others_as_it_takes_a_run(official, digits, tmp_path, capsys):
    """Features of another network of the same file are others."""
    student = {name: tensor.flip(0) for name, tensor in official[1].state_dict().items()}
    path, out = tmp_path / "dino.pth", tmp_path / "out"
    torch.save({"student": under("backbone.", student), "teacher": under("backbone.", official[1].state_dict())}, path)
    arguments = ["evaluate", str(path), "knn", "knn.k=[20]", *images_of(digits)]
    assert cli.main([*arguments, "backbone.name=conv4"]) == 2 and "say with --out" in capsys.readouterr().err
    assert cli.main([*arguments, "backbone.name=resnet8", "--out", str(out)]) == 2 and not out.exists()
    assert "give backbone.name=conv4, whose shapes it has" in capsys.readouterr().err
    assert cli.main(arguments) == 2 and "say backbone.name=... and --out" in capsys.readouterr().err
    for more, words in (
        ([], "the teacher of DINO"),
        (["backbone.weights_prefix=student.backbone"], "the student of DINO"),
    ):
        assert cli.main([*arguments, "backbone.name=conv4", *more, "--out", str(out)]) == 0
        shown = capsys.readouterr().err
        assert words in shown and "(data.image_size and views.normalize not given: " in shown
    sized = ["data.image_size=32", "views.normalize=none"]
    assert cli.main([*arguments, "backbone.name=conv4", *sized, "--out", str(out)]) == 0
    assert "not given" not in capsys.readouterr().err
    records = json.loads((out / "results.json").read_text())
    records = records["results"] if isinstance(records, dict) else records
    assert len({record["checkpoint"] for record in records}) == 2 and {record["method"] for record in records} == {
        "dino.pth"
    }


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["backbone.name=resnet8"], "holds no tensor of backbone resnet8"),
        (["backbone.name=conv5"], "no such backbone"),
        (["backbone.name=conv4", "data.limit=3"], "data.limit=3"),
        (["backbone.name=conv4", "data.image_size=4"], "it takes 32 px (data.image_size=32"),
        ([], "backbone.name"),
    ],
)
def test_extract_refuses(official, digits, tmp_path, capsys, more, words):
    arguments = ["extract", str(official[0]), "--out", str(tmp_path / "out"), *images_of(digits), *more]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1, error


def test_extract_without_the_place_of_the_images(official, capsys, tmp_path):
    assert cli.main(["extract", str(official[0]), "--out", str(tmp_path), "backbone.name=conv4"]) == 2
    assert "missing key data.root" in capsys.readouterr().err


def settings(digits, run, *more):
    return config.load(
        "configs/digits/relational-conv4.yaml",
        [*images_of(digits), f"run_dir={run}", "data.limit=32", "optim.batch_size=16", "optim.epochs=null",
         "checkpoint.every_epochs=null", "checkpoint.every_steps=1", *more],
    )  # fmt: skip


def test_a_training_begins_from_a_file_and_goes_on_without_asking_where_it_lies(official, digits, tmp_path, capsys):
    from ssl_dist.storage.checkpoint import load, path_of
    from ssl_dist.train.loop import train

    (path, conv4), run = official, tmp_path / "run"
    tiny = "optim.lr=1e-9"
    assert train(settings(digits, run, "optim.steps=1", tiny, f"backbone.weights={path}")) == 0
    assert f"backbone.weights: {path}: read under backbone. (as relational" in capsys.readouterr().err
    first = load(path_of(run, 1))
    for name, tensor in conv4.state_dict().items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(first["method"][f"backbone.{name}"], tensor, rtol=0, atol=1e-6)
    assert first["data"]["weights"] == weights_file.read(path)[1]

    moved = path.rename(tmp_path / "moved.tar")
    assert train(settings(digits, run, "optim.steps=2", tiny, f"backbone.weights={moved}")) == 0
    other = {"backbone": backbones.build("conv4").state_dict()}
    torch.save(other, path)
    for weights_key in (f"backbone.weights={path}", "backbone.weights=null"):
        with pytest.raises(UserError, match=r"backbone\.weights = .*not the file that .* began from"):
            train(settings(digits, run, "optim.steps=3", tiny, weights_key))
    with pytest.raises(UserError, match=r"backbone\.weights = .*/none.*not a file"):
        train(settings(digits, run, "optim.steps=3", tiny, f"backbone.weights={tmp_path}/none"))


def test_weights_of_others_are_evaluated_through_a_run_that_does_not_train(official, digits, tmp_path, capsys):
    from ssl_dist.run.encoder import load_encoder
    from ssl_dist.train.loop import train

    (path, conv4), run = official, tmp_path / "run"
    overrides = [*images_of(digits), f"run_dir={run}", f"backbone.weights={path}"]
    assert train(config.load("configs/digits/random_weights-conv4.yaml", overrides)) == 0
    path.unlink()  # the run holds all that is needed
    module = load_encoder(run).module
    assert all(torch.equal(tensor, conv4.state_dict()[name]) for name, tensor in module.state_dict().items())
    assert json.loads((run / "logs" / "starts.jsonl").read_text())["config"]["backbone"]["weights"] == str(path)

    checkpoint = run / "checkpoints" / "step-00000000.pt"
    capsys.readouterr()
    for ours in (run, checkpoint):  # a run of ours, or its checkpoint, is one to begin from too
        plan = derive(settings(digits, tmp_path / "next", "optim.steps=1", f"backbone.weights={ours}"), RankInfo())
        tensors = plan.build().backbone.state_dict()
        assert all(torch.equal(tensor, conv4.state_dict()[name]) for name, tensor in tensors.items())
        assert plan.initial_weights.note.startswith(
            f"{checkpoint}: the encoder of a run (random_weights, conv4, step 0);"
        )
        assert plan.initial_weights.path == checkpoint  # which is what `build` reads, whatever the run saves meanwhile
        assert plan.data_identity["weights"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
        with pytest.raises(UserError, match=r"give backbone\.name=conv4, which the run has"):
            derive(
                settings(digits, run, "optim.steps=1", f"backbone.weights={ours}", "backbone.name=resnet8"), RankInfo()
            )


def test_explain_names_what_the_file_holds(official, digits, tmp_path):
    from ssl_dist.train.explain import explain

    text = explain(settings(digits, tmp_path / "run", "optim.steps=1", f"backbone.weights={official[0]}"), 1, None)
    assert "weights" in text and "read under backbone. (as relational" in text
