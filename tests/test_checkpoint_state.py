"""Checkpoints that were changed and carry a right checksum, files named directly, and another normalisation."""

import copy
import dataclasses
import functools
import hashlib
import json
import math
import re
import shutil
import subprocess
from collections import OrderedDict

import pytest
import torch
from torch import nn

from ssl_dist import config
from ssl_dist.errors import UserError
from ssl_dist.methods.base import Info
from ssl_dist.run.encoder import load_method
from ssl_dist.run.labels import export_labels
from ssl_dist.storage import checkpoint, checkpoint_state
from ssl_dist.train.loop import train


def settings(digits, run, *more):
    own = [f"data.root={digits}", f"run_dir={run}", "data.reader=arrays", "data.limit=32", "optim.batch_size=16",
           "views.num=2", "optim.epochs=null", "checkpoint.every_epochs=null", "checkpoint.every_steps=1"]  # fmt: skip
    return config.load("configs/digits/relational-conv4.yaml", [*own, "optim.steps=1", *more])


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    assert train(settings(digits, run)) == 0
    return run


@pytest.fixture(scope="module")
def state(trained):
    return checkpoint.load(checkpoint.newest(trained))


def written(run, state):
    """The checkpoint of a state, with the checksum that belongs to it."""
    path = checkpoint.path_of(run, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_name(path.name + ".sha256").write_text(f"{digest}  {path.name}\n")
    return path


def refusal(action, path):
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < 500, message
    return message


WRONG = (None, True, -1, 1.5, 10**15, math.nan, "x" * 1000, [], [1], {"a": 1}, {1: {2: 3}}, torch.zeros(2), (1,))


@pytest.mark.parametrize("key", checkpoint.KEYS)
def test_no_value_of_another_type_is_used(state, tmp_path, key):
    for value in WRONG:
        if isinstance(value, type(state[key])) and key in ("step", "world_size") and value == 1:
            continue
        path = written(tmp_path, state | {key: value})
        message = refusal(lambda path=path: load_method(path), path)
        assert key in message or key == "config", (key, value, message)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("info", "num_images", 0), ("info", "num_images", 10**13), ("info", "view_groups", ((2,),)),
        ("info", "view_groups", [[2, 32]]), ("info", "total_epochs", math.inf), ("info", "stages", {"a": "b"}),
        ("info", "more", 1), ("normalize", "std", [0.2, 0.0, 0.2]), ("normalize", "mean", [0.5]),
        ("normalize", "mean", [math.nan] * 3), ("method", "backbone.layer1.conv.weight", None),
        ("method", "backbone.layer1.conv.weight", 1), ("method", 3, torch.zeros(1)), ("method", "more", torch.zeros(1)),
        ("method", "backbone.layer1.bn.bias", torch.zeros(9)),
        ("method", "backbone.layer1.bn.bias", torch.zeros(8).long()),
        ("method", "backbone.layer1.bn.bias", torch.zeros(8).cfloat()), ("versions", "torch", 2), ("data", "ids", 3),
        ("method", "backbone.layer1.bn.bias", torch.zeros(8).to_sparse()), ("config", "seed", "x"),
        ("method", "backbone.layer1.bn.bias", torch.zeros(8, device="meta")), ("config", "backbone", 3),
        ("config", "method", {"name": 3}),
        ("config", "seed", torch.zeros(2)), ("optimizer", "state", []), ("optimizer", "param_groups", {}),
    ],
)  # fmt: skip
def test_no_wrong_value_within_is_used(state, tmp_path, section, key, value):
    path = written(tmp_path, state | {section: {**state[section], key: value}})
    assert str(key) in refusal(lambda: load_method(path), path)


def test_sizes_that_ask_for_all_memory(state, tmp_path):
    """Nothing is made before the tensors are found to fit; those of this method have no size of `info`."""
    supervised = {**state["config"], "method": {"name": "supervised", "options": {}}}
    info = state["info"] | {"num_classes": 10**11}
    path = written(tmp_path, state | {"config": supervised, "info": info})
    assert "belongs to another method" in refusal(lambda: load_method(path), path)


def test_lacking_and_renamed(state, tmp_path):
    for key in ("ids",):
        path = written(tmp_path, state | {"data": {k: v for k, v in state["data"].items() if k != key}})
        assert "not of a pre-training" in refusal(lambda path=path: load_method(path), path)
    path = written(tmp_path, state | {"step": 7})
    assert "it is of step 7" in refusal(lambda: load_method(path), path)
    assert load_method(path.rename(tmp_path / "best.pt"))[1].step == 7, "under a name of the user's it is used"


def test_the_schema_knows_the_fields_of_info():
    fields = {field.name: field.default is dataclasses.MISSING for field in dataclasses.fields(Info)}
    fields["stages"] = False  # a default that is made
    known = checkpoint_state.RunInfo.model_fields
    assert {name: field.is_required() for name, field in known.items()} == fields


def optimizers():
    net = nn.Linear(2, 3)
    net(torch.ones(1, 2)).sum().backward()
    for make in (
        lambda: torch.optim.Adam(net.parameters()), lambda: torch.optim.SGD(net.parameters(), 0.1, momentum=0.9),
        lambda: torch.optim.SGD(net.parameters(), 0.1),
    ):  # fmt: skip
        optimizer = make()
        optimizer.step()
        yield make, optimizer.state_dict()


def test_an_optimizer_takes_its_own_state_alone(tmp_path):
    path = tmp_path / "x.pt"
    for make, good in optimizers():
        fresh = make()
        checkpoint.restore_optimizer(fresh, copy.deepcopy(good), path)
        assert str(fresh.state_dict()) == str(good)
        changed = [{}, good | {"param_groups": []}, good | {"param_groups": [{"params": [1, 0]}]}]
        changed += [good | {"param_groups": [{}]}, good | {"state": {5: good["state"].get(0, {})}}]
        for name in good["state"].get(0, {}):
            entry = good["state"][0]
            for value in (None, 1.0, "x", torch.zeros(7), torch.zeros(3, 2).long(), torch.zeros(3, 2).cfloat()):
                changed.append(good | {"state": {0: entry | {name: value}}})
            changed.append(good | {"state": {0: {k: v for k, v in entry.items() if k != name}}})
        changed.append(good | {"state": {0: {"other": torch.zeros(3, 2)}}})
        for bad in changed:
            action = functools.partial(checkpoint.restore_optimizer, make(), bad, path)
            assert "optimizer." in refusal(action, path)


def test_the_settings_of_a_resumed_optimizer_are_the_configs(trained, state, digits, tmp_path):
    bad = copy.deepcopy(state["optimizer"])
    bad["param_groups"][0] |= {"betas": "x", "eps": None, "lr": "high"}
    runs = [shutil.copytree(trained, tmp_path / name) for name in ("changed", "whole")]
    written(runs[0], state | {"optimizer": bad})
    for run in runs:
        assert train(settings(digits, run, "optim.steps=2")) == 0
    changed, whole = (checkpoint.load(checkpoint.path_of(run, 2))["method"] for run in runs)
    assert all(torch.equal(changed[name], whole[name]) for name in whole)


# ------------------------------------------------------------------------------------------ a file named directly


def flipped(path, tensor):
    """The file with a bit of a tensor changed."""
    data = bytearray(path.read_bytes())
    place = data.index(tensor.numpy().tobytes()[:64])
    data[place + 5] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("with_checksum", [True, False])
def test_a_flipped_bit_is_found_wherever_the_file_lies(trained, state, tmp_path, with_checksum):
    source = checkpoint.newest(trained)
    path = tmp_path / "copied.pt"
    shutil.copy(source, path)
    checksum = path.with_name(path.name + ".sha256")
    if with_checksum:
        shutil.copy(source.with_name(source.name + ".sha256"), checksum)
    assert load_method(path)[1].step == 1
    flipped(path, state["method"]["backbone.layer1.bn.running_mean"])
    words = ["SHA-256 differs", "copied.pt.sha256"] if with_checksum else ["CRC-32"]
    for action in (load_method, checkpoint.load, lambda path: export_labels(path, tmp_path / "x.csv", [])):
        message = refusal(functools.partial(action, path), path)
        assert all(word in message for word in words), message
    shutil.copy(source, path)
    assert load_method(path)[1].step == 1, "as the message says: copied again it is used"


def test_a_checksum_that_is_no_checksum(trained, tmp_path):
    path = tmp_path / "copied.pt"
    shutil.copy(checkpoint.newest(trained), path)
    path.with_name(path.name + ".sha256").write_text("nothing\n")
    assert "its checksum file is damaged" in refusal(lambda: load_method(path), path)


# --------------------------------------------------------------------------------------------------- another run's


def test_a_checkpoint_of_another_run_is_refused(trained, digits, tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(trained, run)
    assert train(settings(digits, other, "optim.steps=2", "seed=1")) == 0
    names = ("step-00000002.pt", "step-00000002.pt.sha256")
    for name in names:
        shutil.copy(other / "checkpoints" / name, run / "checkpoints" / name)
    message = refusal(lambda: train(settings(digits, run, "optim.steps=3")), checkpoint.path_of(run, 2))
    assert "another config: seed (there 1, now 0)" in message
    for name in names:
        (run / "checkpoints" / name).unlink()
    assert train(settings(digits, run, "optim.steps=2")) == 0, "as the message says"


def test_what_was_lost_in_a_copy_is_made_again_as_the_messages_say(trained, digits, tmp_path):
    run = tmp_path / "my run"
    shutil.copytree(trained, run)
    (run / "checkpoints" / "step-00000001.pt.sha256").unlink()
    (run / "config.yaml").unlink()
    message = refusal(lambda: train(settings(digits, run, "optim.steps=2")), run)
    assert "no config.yaml; restore it from logs/starts.jsonl, where the first line has it under config" in message
    first = json.loads((run / "logs" / "starts.jsonl").read_text().splitlines()[0])
    (run / "config.yaml").write_text(json.dumps(first["config"]))
    message = refusal(lambda: train(settings(digits, run, "optim.steps=2")), run)
    command = re.search(r"if it is whole: (cd .*), or remove", message)[1]
    subprocess.run(command, shell=True, check=True)
    assert train(settings(digits, run, "optim.steps=2")) == 0


def test_a_longer_training_that_is_shortened_again_goes_on(trained, digits, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    assert train(settings(digits, run, "optim.steps=3")) == 0
    assert train(settings(digits, run, "optim.steps=2")) == 0, "it is done"


# ------------------------------------------------------------------------------------- mean and standard deviation


def test_a_resume_with_another_normalisation_is_refused(trained, digits, tmp_path):
    run, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(trained, run)
    shutil.copytree(digits, data)
    whole = (data / "dataset.json").read_text()
    tree = json.loads(whole)
    (data / "dataset.json").write_text(json.dumps(tree | {"mean": [0.5, 0.5, 0.5]}))
    with pytest.raises(UserError) as caught:
        train(settings(data, run, "optim.steps=2"))
    message = str(caught.value)
    assert "[0.5, 0.5, 0.5]" in message and str(tree["mean"]) in message and f"{data}/dataset.json" in message
    assert checkpoint.steps(run) == [1]
    (data / "dataset.json").write_text(whole)
    assert train(settings(data, run, "optim.steps=2")) == 0, "as the message says"


def test_ordered_dictionaries_of_before(state, tmp_path):
    """`state_dict` gives one, and checkpoints hold it as it is."""
    assert isinstance(OrderedDict(state["method"]), dict)
    assert checkpoint_state.fault_of(state | {"method": OrderedDict(state["method"])}) == ""


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_value_that_is_not_finite_is_found(value):
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    assert checkpoint.not_finite(net, optimizer) == ""
    moment = optimizer.state[net[0].weight]["exp_avg"]
    moment[1, 2] = value
    assert checkpoint.not_finite(net, optimizer) == "optimizer.exp_avg of a tensor [4, 3]"
    net[1].running_var[3] = value
    assert checkpoint.not_finite(net, optimizer) == "1.running_var"
