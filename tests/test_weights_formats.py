"""Files as the projects of the field write them, in small: what is recognised, left and refused, and that none runs."""

import argparse
import collections
import datetime
import enum
import functools
import os
import pathlib
import pickle
import re
import subprocess
import sys
import types

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ssl_dist import backbones
from ssl_dist.config.schema import Backbone
from ssl_dist.errors import UserError
from ssl_dist.run import network
from ssl_dist.storage import hub, inert, torch_file, weights


class Block(nn.Module):
    """The names of torchvision's BasicBlock."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, bias=False), nn.BatchNorm2d(outputs)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))


class Small(nn.Module):
    """The names of torchvision's ResNets, with few channels."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
            for i in range(1, 5):
                setattr(self, f"layer{i}", nn.Sequential(Block(4, 4), Block(4, 4)))


TENSORS, OTHER = Small().state_dict(), Small(1).state_dict()
HEAD = {"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}


def under(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def sequential(tensors):
    """What torch.nn.Sequential(*net.children()) calls them: conv1, bn1, relu, maxpool, layer1, ..."""
    places = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    return {f"{places[name.partition('.')[0]]}.{name.partition('.')[2]}": tensor for name, tensor in tensors.items()}


def transformers(tensors):
    """What transformers calls the tensors of a ResNet."""
    named = {}
    for name, tensor in tensors.items():
        first, *rest, last = name.split(".")
        kind = "convolution" if "conv" in name or ".downsample.0." in name else "normalization"
        if not rest:
            named[f"resnet.embedder.embedder.{kind}.{last}"] = tensor
        else:
            layer = "shortcut" if rest[1] == "downsample" else f"layer.{int(rest[1][-1]) - 1}"
            named[f"resnet.encoder.stages.{int(first[-1]) - 1}.layers.{rest[0]}.{layer}.{kind}.{last}"] = tensor
    return named


def lightning(tensors, **more):
    return {"epoch": 9, "global_step": 90, "pytorch-lightning_version": "2.5", "state_dict": tensors, "callbacks": {},
            "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": []}], **more}  # fmt: skip


class Color(enum.Enum):
    RED = 1


class Attributes(dict):
    """A dictionary of settings with attributes, as Lightning, yacs, addict and mmcv have one."""


class Names(list):
    pass


class Node:
    """Settings that know their parent, as omegaconf's."""

    def __init__(self, parent=None):
        self.parent, self.content = parent, {}


def settings():
    root = Node()
    root.content["child"] = Node(root)
    filled = Attributes(lr=0.1, nested=Attributes(path=pathlib.PosixPath("/x")))
    filled.frozen = True
    return {
        "args": argparse.Namespace(arch="resnet18", data=pathlib.PosixPath("/data")), "best": np.float64(71.2),
        "when": datetime.datetime(2024, 1, 2), "color": Color.RED, "cfg": root, "hparams": filled,
        "names": Names(["a", "b"]), "counts": collections.defaultdict(list, a=[1]), "dtype": np.dtype("f4"),
        "call": functools.partial(print, 1), "array": np.arange(3), "point": types.SimpleNamespace(x=1),
    }  # fmt: skip


MOMENTUM = lightning(under("backbone.", TENSORS) | under("momentum_backbone.", OTHER) | under("classifier.", HEAD))

# name -> what the file holds, what the note says of it, what is left over, what else is whole in it
FORMATS = {
    "torchvision": (TENSORS | under("fc.", HEAD), "a network alone", ["fc.bias", "fc.weight"], []),
    "moco v1, v2": (
        {
            "epoch": 1,
            "arch": "resnet18",
            "optimizer": {"state": {}},
            "state_dict": under("module.encoder_q.", TENSORS | under("fc.0.", HEAD))
            | under("module.encoder_k.", OTHER)
            | {"module.queue": torch.zeros(2, 3)},
        },
        "MoCo's encoder of queries",
        ["encoder_q.fc.0.bias", "encoder_q.fc.0.weight", "queue"],
        ["state_dict.encoder_k."],
    ),
    "moco v3": (
        {
            "state_dict": under("module.base_encoder.", TENSORS)
            | under("module.momentum_encoder.", OTHER)
            | under("module.predictor.", HEAD)
        },
        "MoCo v3's base encoder",
        ["predictor.bias", "predictor.weight"],
        ["state_dict.momentum_encoder."],
    ),
    "simsiam": ({"epoch": 99, "state_dict": under("module.encoder.", TENSORS)}, "SimSiam", [], []),
    "swav": (
        {"state_dict": under("module.", TENSORS) | under("module.prototypes.", HEAD)},
        "SwAV",
        ["prototypes.bias", "prototypes.weight"],
        [],
    ),
    "barlow twins, vicreg": (
        {"epoch": 1, "model": under("module.backbone.", TENSORS) | under("module.projector.", HEAD)},
        "Barlow Twins",
        ["projector.bias", "projector.weight"],
        [],
    ),
    "byol": (
        {
            "online_network_state_dict": under("encoder.", TENSORS),
            "target_network_state_dict": under("encoder.", OTHER),
        },
        "BYOL's online network",
        [],
        ["target_network_state_dict.encoder."],
    ),
    "dino": (
        {
            "student": under("module.backbone.", OTHER),
            "teacher": under("backbone.", TENSORS) | under("head.", HEAD),
            "epoch": 1,
            **settings(),
        },
        "the teacher of DINO",
        ["head.bias", "head.weight"],
        ["student.backbone."],
    ),
    "dinov2": (
        {"model": under("student.backbone.", OTHER) | under("teacher.backbone.", TENSORS), "iteration": 5},
        "the teacher of DINO",
        [],
        ["model.student.backbone."],
    ),
    "timm's train.py": (
        {
            "epoch": 1,
            "arch": "resnet18",
            "state_dict": OTHER,
            "state_dict_ema": TENSORS,
            "metric": np.float64(1),
            "args": argparse.Namespace(a=1),
        },
        "timm's average of the weights",
        [],
        ["state_dict."],
    ),
    "lightly": (
        lightning(under("backbone.", TENSORS) | under("projection_head.layers.0.", HEAD)),
        "lightly",
        ["projection_head.layers.0.bias", "projection_head.layers.0.weight"],
        [],
    ),
    "lightly, a Sequential": (lightning(under("backbone.", sequential(TENSORS))), "Sequential's names", [], []),
    "lightly-train": (
        lightning(
            under("teacher_embedding_model.wrapped_model._features.", TENSORS)
            | under("student_embedding_model.wrapped_model._features.", OTHER)
        ),
        "lightly-train's teacher",
        [],
        ["state_dict.student_embedding_model.wrapped_model._features."],
    ),
    "solo-learn": (
        MOMENTUM,
        "read under state_dict.backbone.",
        ["classifier.bias", "classifier.weight"],
        ["state_dict.momentum_backbone."],
    ),
    "mmselfsup": (
        {"meta": {"cfg": "x", **settings()}, "state_dict": under("backbone.", TENSORS), "optimizer": {}},
        "read under state_dict.backbone.",
        [],
        [],
    ),
    "stable-pretraining": (
        lightning(under("backbone.", TENSORS) | under("projector.0.", HEAD), hyper_parameters=settings()),
        "read under state_dict.backbone.",
        ["projector.0.bias", "projector.0.weight"],
        [],
    ),
    "vissl": (
        {"classy_state_dict": {"base_model": {"model": {"trunk": under("_feature_blocks.", TENSORS), "heads": HEAD}}}},
        "VISSL",
        [],
        [],
    ),
    "compiled, in DDP": (under("module._orig_mod.", TENSORS), "a network alone", [], []),
    "FSDP": ({"model": under("_fsdp_wrapped_module.", TENSORS)}, "read under model.", [], []),
    "swa": (nn.Module.state_dict(torch.optim.swa_utils.AveragedModel(Small())), "a network alone", ["n_averaged"], []),
    "a whole network": ({"model": Small(), "epoch": 1}, "read under model.", [], []),
    "transformers": (transformers(TENSORS), "transformers' names", [], []),
    "of one's own": (
        {"nets": {"student_of_mine": {"body": TENSORS}}, "epoch": 1},
        "read under nets.student_of_mine.body.",
        [],
        [],
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_what_a_project_writes_is_recognised(tmp_path, name):
    content, words, left, whole = FORMATS[name]
    torch.save(content, tmp_path / "x", _use_new_zipfile_serialization=name != "solo-learn")
    found = weights.fit(Small(), "small", tmp_path / "x")
    assert found.tensors.keys() == TENSORS.keys()
    assert all(torch.equal(found.tensors[key], tensor) for key, tensor in TENSORS.items())
    assert words in found.note and (found.left, found.whole) == (left, whole), found.note
    for prefix in whole:
        other = weights.fit(Small(), "small", tmp_path / "x", prefix)
        assert all(torch.equal(other.tensors[key], tensor) for key, tensor in OTHER.items())


@pytest.mark.parametrize("name", ["dino", "stable-pretraining"])
def test_objects_of_classes_that_are_not_loaded_are_passed_over_and_named(tmp_path, name):
    torch.save(FORMATS[name][0], tmp_path / "x")
    passed_over = weights.fit(Small(), "small", tmp_path / "x").passed_over
    known = {"argparse.Namespace", "pathlib.PosixPath", "numpy._core.multiarray.scalar", "datetime.datetime",
             f"{__name__}.Color", f"{__name__}.Node", f"{__name__}.Attributes", "collections.defaultdict"}  # fmt: skip
    assert known <= set(passed_over)
    with open(tmp_path / "x", "rb") as file:
        tree = torch_file.load_of_others(file)[0]
    found = tree if name == "dino" else tree["hyper_parameters"]
    assert found["hparams"] == {"lr": 0.1, "nested": found["hparams"]["nested"]} and found["names"] == ["a", "b"]
    assert isinstance(found["args"], inert.Inert) and found["args"].state["arch"] == "resnet18"
    assert found["cfg"].state["content"]["child"].state["parent"] is found["cfg"]
    with pytest.raises(pickle.UnpicklingError), open(tmp_path / "x", "rb") as file:
        torch_file.load(file)  # our own files hold nothing of the kind


# ------------------------------------------------------------------------------------------------- nothing runs


class Calls:
    """A pickle that calls a function when it is read as pickle reads it."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


class Restores:
    """One that runs code of its class: a state that is set, items that are added."""

    trace = ""

    def __setstate__(self, state):
        pathlib.Path(state["trace"]).touch()


class Adds(dict):
    def __setitem__(self, key, value):
        pathlib.Path(value).touch()


def harm(trace):
    """What a pickle may do to leave a trace, each of them as long as pickle itself reads it."""
    touch = f"open({trace!r}, 'w').close()"
    restores = Restores()
    restores.trace = trace
    inner = pickle.dumps(Calls(os.mkdir, trace), protocol=2)
    return {
        "os.system": Calls(os.system, f"touch {trace}"), "os.mkdir": Calls(os.mkdir, trace),
        "eval": Calls(eval, touch), "exec": Calls(exec, touch), "open": Calls(open, trace, "w"),
        "subprocess": Calls(subprocess.Popen, ["touch", trace]), "a state": restores, "an item": Adds(a=trace),
        "a pickle within": Calls(pickle.loads, inner), "torch's storage": Calls(torch.storage._load_from_bytes, inner),
        "torch's rebuilding": Calls(torch._tensor._rebuild_from_type_v2, os.mkdir, torch.Tensor, (trace,), {}),
        "torch's rebuilding of eval": Calls(torch._tensor._rebuild_from_type_v2, eval, torch.Tensor, (touch,), {}),
        "torch.save": Calls(torch.save, {}, trace), "pathlib": Calls(pathlib.Path.touch, pathlib.PosixPath(trace)),
        "a partial": Calls(functools.reduce, eval, [touch, {}]),
    }  # fmt: skip


@pytest.mark.parametrize("what", harm(""))
def test_pickle_itself_would_do_harm(tmp_path, what):
    """Else the next test would show nothing."""
    trace = tmp_path / "trace"
    data = pickle.dumps(harm(str(trace))[what], protocol=2)
    try:
        loaded = pickle.loads(data)
        if isinstance(loaded, subprocess.Popen):
            loaded.wait()
    except (TypeError, AttributeError, RuntimeError, pickle.UnpicklingError):
        pass
    assert trace.exists()


PLACES = st.recursive(
    st.just("here"), lambda inner: st.tuples(st.sampled_from(["list", "tuple", "value", "object", "dict"]), inner)
)


def placed(thing, place):
    if place == "here":
        return thing
    kind, inner = place
    within = placed(thing, inner)
    return {
        "list": [1, within], "tuple": (within,), "value": {"a": within}, "object": types.SimpleNamespace(a=within),
        "dict": Attributes(a=within),
    }[kind]  # fmt: skip


@given(st.sampled_from([*harm("")]), PLACES, st.booleans())
def test_nothing_in_a_file_runs(tmp_path_factory, what, place, zipped):
    """Wherever it stands: the file is read with a stub in its place, or refused in one line."""
    folder = tmp_path_factory.mktemp("harm")
    content = {"state_dict": {"weight": torch.zeros(2, 2)}, "args": placed(harm(str(folder / "trace"))[what], place)}
    torch.save(content, folder / "x", _use_new_zipfile_serialization=zipped)
    try:
        found = weights.fit(nn.Linear(2, 2, bias=False), "linear", folder / "x")
        assert found.tensors["weight"].shape == (2, 2) and found.passed_over
    except UserError as error:
        assert "\n" not in str(error) and ("GLOBAL" not in str(error))
    assert sorted(path.name for path in folder.iterdir()) == ["x"]


def test_classes_that_torch_builds_itself_are_no_stubs():
    """The list of `inert` has all of torch's, so that nothing which torch builds counts as opaque."""
    from torch._weights_only_unpickler import _get_allowed_globals

    assert [name for name in _get_allowed_globals() if not inert.is_torchs(name)] == []


def test_many_stubs_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_file, "MAX_STUB_STEPS", 100)
    torch.save({str(i): Color.RED if i % 2 else Names([i]) for i in range(100)}, tmp_path / "x")
    with open(tmp_path / "x", "rb") as file:
        assert torch_file.load_of_others(file)[1] == [f"{__name__}.Color", f"{__name__}.Names"]
    torch.save({str(i): pathlib.PosixPath(str(i)) for i in range(100)}, tmp_path / "x")
    with pytest.raises(UserError, match="objects of more than 300 classes, or too many"):
        weights.fit(Small(), "small", tmp_path / "x")


# ------------------------------------------------------------------------------------------------- refused, helped


def test_what_is_missing_is_named_and_another_place_can_be_given(tmp_path):
    path = tmp_path / "x"
    torch.save({"a": {"net": TENSORS}, "b": {"net": OTHER}}, path)
    words = r"holds backbone small 2 times, under a\.net\. and b\.net\.; say backbone\.weights_prefix=a\.net\. or"
    with pytest.raises(UserError, match=words):
        weights.fit(Small(), "small", path)
    for prefix, expected in (("a.net.", TENSORS), ("b.net", OTHER), ("module.b.net", OTHER)):
        tensors = weights.fit(Small(), "small", path, prefix).tensors
        assert all(torch.equal(tensors[key], tensor) for key, tensor in expected.items())
    with pytest.raises(UserError, match=r"holds no tensor of backbone small under c; it holds a\.net\.conv1\.weight"):
        weights.fit(Small(), "small", path, "c")
    torch.save({key: tensor for key, tensor in TENSORS.items() if "layer4.1.bn" not in key}, path)
    with pytest.raises(UserError, match=r"lacks layer4\.1\.bn1\.weight, layer4\.1\.bn1\.bias and 6 more of"):
        weights.fit(Small(), "small", path)


@pytest.mark.parametrize(("held", "asked"), [("resnet8", "resnet20"), ("resnet8", "conv4"), ("conv4", "resnet18")])
def test_a_wrong_name_gets_the_right_one_suggested(tmp_path, held, asked):
    torch.save({"state_dict": under("backbone.", backbones.build(held).state_dict())}, tmp_path / "x")
    with pytest.raises(UserError, match=f"give backbone.name={held}, whose shapes it has$"):
        network.fitted(tmp_path / "x", backbones.build(asked), Backbone(name=asked))
    assert network.fitted(tmp_path / "x", backbones.build(held), Backbone(name=held)).tensors


class Positions(nn.Module):
    def __init__(self, side, dim=2):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.arange(1.0 + side * side)[None, :, None].repeat(1, 1, dim))


def test_positions_of_another_size_of_image_are_refused_and_interpolated_when_asked(tmp_path):
    timm_layers = pytest.importorskip("timm.layers")
    torch.save({"model": Positions(4).state_dict()}, tmp_path / "x")
    with pytest.raises(UserError, match=r"has 17 places, in backbone vit 10; backbone\.resize_pos_embed=true"):
        weights.fit(Positions(3), "vit", tmp_path / "x")
    found = weights.fit(Positions(3), "vit", tmp_path / "x", resize=True)
    expected = timm_layers.resample_abs_pos_embed(Positions(4).pos_embed.detach(), [3, 3], num_prefix_tokens=1)
    assert torch.equal(found.tensors["pos_embed"], expected)
    assert "model.pos_embed interpolated from 17 places to 10" in found.note
    with pytest.raises(UserError, match="has shape"):
        weights.fit(Positions(3, dim=3), "vit", tmp_path / "x", resize=True)


def test_a_vision_transformer_of_transformers_gives_what_timm_computes(tmp_path):
    """Query, key and value are three there and one here."""
    timm = pytest.importorskip("timm")
    net = timm.models.VisionTransformer(img_size=8, patch_size=4, embed_dim=6, depth=2, num_heads=2, num_classes=0)
    theirs = {}
    for name, tensor in net.state_dict().items():
        name = name.replace("blocks.", "encoder.layer.").replace("attn.proj", "attention.output.dense")
        name = name.replace("norm1", "layernorm_before").replace("norm2", "layernorm_after")
        name = name.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense")
        name = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}.get(name, name)
        name = name.replace("patch_embed.proj", "embeddings.patch_embeddings.projection")
        name = f"layernorm.{name[5:]}" if name.startswith("norm.") else name
        if "attn.qkv" in name:
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                theirs["vit." + name.replace("attn.qkv", f"attention.attention.{part}")] = rows.contiguous()
        else:
            theirs["vit." + name] = tensor
    safetensors.torch.save_file(theirs | {"classifier.weight": torch.zeros(2, 6)}, tmp_path / "model.safetensors")
    found = weights.fit(net, "timm/small", tmp_path / "model.safetensors")
    assert all(torch.equal(found.tensors[key], tensor) for key, tensor in net.state_dict().items())
    assert found.left == ["classifier.weight"]


@pytest.mark.parametrize("chunks", [0, 2])
def test_a_vision_transformer_of_dinov2_and_mae_gives_timms(tmp_path, chunks):
    """timm's backbones here have `model.` before their names. DINOv2 trains with its blocks in chunks."""
    timm = pytest.importorskip("timm")
    net = nn.Module()
    net.model = timm.models.VisionTransformer(
        img_size=8, patch_size=4, embed_dim=6, depth=4, num_heads=2, num_classes=0
    )
    theirs = {name.removeprefix("model."): tensor for name, tensor in net.state_dict().items()}
    if chunks:
        named = {
            re.sub(r"blocks\.(\d)\.", lambda m: f"blocks.{int(m[1]) // 2}.{m[1]}.", name): t
            for name, t in theirs.items()
        }
        content = {"model": under("teacher.backbone.", named) | under("teacher.dino_head.", HEAD)}
        left = ["teacher.dino_head.bias", "teacher.dino_head.weight"]
    else:
        content = {"model": theirs | {"mask_token": torch.zeros(1, 1, 6)} | under("decoder_blocks.0.attn.qkv.", HEAD)}
        left = ["decoder_blocks.0.attn.qkv.bias", "decoder_blocks.0.attn.qkv.weight", "mask_token"]
    torch.save(content | {"args": argparse.Namespace(model="mae_vit")}, tmp_path / "x")
    found = weights.fit(net, "timm/small", tmp_path / "x")
    assert all(torch.equal(found.tensors[key], tensor) for key, tensor in net.state_dict().items())
    assert found.left == left and "timm's names" in found.note


def test_names_without_end_are_refused(tmp_path):
    deep = Node()
    for _ in range(3000):
        deep, inner = Node(), deep
        deep.__dict__ = {"_modules": {"a": inner}, "_parameters": {"b": torch.zeros(1)}}
    sys.setrecursionlimit(100_000)
    try:
        torch.save(deep, tmp_path / "x")
    finally:
        sys.setrecursionlimit(1000)
    for content in (None, {"a" * 2000: {"b": torch.zeros(1)}}):
        if content is not None:
            torch.save(content, tmp_path / "x")
        with pytest.raises(UserError, match="names of more than 50 parts or 1000 letters"):
            weights.fit(Small(), "small", tmp_path / "x")


def test_names_of_the_hub(tmp_path, monkeypatch):
    """From the cache of the library; without it and without a net one line says so."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked = []

    def download(repository, file, revision, local_files_only):
        asked.append((repository, file, revision, local_files_only))
        if (tmp_path / repository / file).exists():
            return str(tmp_path / repository / file)
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nand more")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for repository, file in (("org/net", "pytorch_model.bin"), ("timm/resnet18.a1_in1k", "model.safetensors")):
        (tmp_path / repository).mkdir(parents=True)
        (tmp_path / repository / file).touch()
    assert hub.located("hf://org/net@v2") == hub.located("hf:/org/net") == tmp_path / "org/net/pytorch_model.bin"
    assert asked[1] == ("org/net", "pytorch_model.bin", "v2", True)
    with pytest.raises(
        UserError, match=r"'hf://org/net/x\.bin': not in the cache .*\(no connection\); copy its x\.bin"
    ):
        hub.located("hf://org/net/x.bin")
    with pytest.raises(UserError, match="write hf://ORG/NAME or timm:NAME"):
        hub.located("hf://net")
    pytest.importorskip("timm")
    assert hub.located("timm:resnet18.a1_in1k").parent == tmp_path / "timm/resnet18.a1_in1k"
    with pytest.raises(UserError, match=r"timm has no pretrained weights of that name .*list_pretrained"):
        hub.located("timm:resnet1")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        hub.located("hf://org/net")
