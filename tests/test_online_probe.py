"""The linear probe that learns beside a training: what it learns, on any ranks and after any stop; and that the
training does not notice."""

import json
import os
import signal
import tarfile
from functools import partialmethod

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from ssl_dist import config, views
from ssl_dist.data.normalize import normalized
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.distributed.world import one_process
from ssl_dist.errors import UserError
from ssl_dist.methods.base import Batch
from ssl_dist.run import board
from ssl_dist.run.blueprint import derive
from ssl_dist.run.encoder import load_encoder
from ssl_dist.storage import checkpoint
from ssl_dist.train import held_out, online_knn, online_probe
from ssl_dist.train.explain import explain
from ssl_dist.train.loop import claimed, fit, train
from ssl_dist.train.online_probe import OnlineProbe
from ssl_dist.train.state import TrainState
from ssl_dist.verify import command as verify
from tests import ranks
from tests.test_resume_methods import StopAfter
from tests.test_resume_of_older_run import FIXTURE

STEPS = 11  # two epochs of four steps and a part of the third


def settings(digits, run, *more, method="relational"):
    return config.load(
        f"configs/digits/{method}-conv4.yaml",
        [
            f"data.root={digits}", f"run_dir={run}", "data.reader=arrays", "data.workers=1", "data.limit=72",
            "optim.batch_size=16", "optim.epochs=null", f"optim.steps={STEPS}", "log.probe_every_epochs=1",
            "log.every_steps=100", "checkpoint.every_epochs=null", *more,
        ],
    )  # fmt: skip


def logged(run, name=online_probe.NAME):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def last_state(run):
    return checkpoint.load_run(run)[1]


def equal(one, other):
    """Whether two trees of tensors and numbers are, bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


# ---------------------------------------------------------------------------------------------------- what it learns


def of_a_file(tmp_path, count):
    """Labels of other classes, with images that have none."""
    lines = [f"{i},{i % 7}" for i in range(count) if i % 3]
    (tmp_path / "labels.csv").write_text("\n".join(["image_id,label", *lines]) + "\n")
    return [f"data.labels={{file: {tmp_path / 'labels.csv'}}}"]


@pytest.mark.parametrize(
    ("method", "kind"), [("relational", "own labels"), ("relational", "a file's"), ("relic", "own labels")]
)
def test_it_is_autograds_classifier_on_the_features_of_every_step(digits, tmp_path, method, kind):
    """By the encoders of every step's checkpoint, torch's BatchNorm, loss and gradient, image by image left out."""
    run, more = tmp_path / "run", of_a_file(tmp_path, 1442) if kind == "a file's" else []
    words = ["precision=fp64", "checkpoint.every_steps=1", "checkpoint.keep=100", "compile=false", *more]
    chosen = settings(digits, run, *words, method=method)
    assert train(chosen) == 0
    plan = derive(chosen, RankInfo())
    labels = plan.dataset.labels("train") if plan.labels is None else plan.labels
    assert (labels < 0).any() == (kind == "a file's")
    queries = set(online_probe.chosen_images(plan).queries)
    to_input, reference = normalized(plan.normalize, torch.float64, torch.device("cpu")), plan.build().eval()
    norm, linear = nn.BatchNorm1d(64, affine=False).double(), nn.Linear(64, plan.info.num_classes).double()
    nn.init.zeros_(linear.weight), nn.init.zeros_(linear.bias)
    optimizer, num_left_out = torch.optim.AdamW(linear.parameters(), lr=1e-3, weight_decay=0.0), 0
    for step in range(STEPS):
        reference.load_state_dict(checkpoint.load(checkpoint.path_of(run, step + 1))["method"])
        ids = plan.order.global_ids(step)
        with plan.open_reader() as reader:
            [images] = reader.batches([ids])
        spec, epoch = plan.specs[0], step // plan.order.steps_per_epoch
        pixels = views.make_views(images, spec, spec.view_ids[:1], plan.order.seed, epoch)
        with torch.no_grad():
            h = reference.encoder()(to_input(torch.from_numpy(pixels))[0])
        taken = [i for i, image in enumerate(ids) if labels[image] >= 0 and image not in queries]
        num_left_out += len(ids) - len(taken)
        scores = linear(norm(h))
        loss = sum(nn.functional.cross_entropy(scores[i], torch.tensor(labels[ids[i]])) for i in taken) / len(taken)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert num_left_out >= 5
    probe = last_state(run)["probe"]["classifier"]
    torch.testing.assert_close(probe["weight"], linear.weight.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(probe["bias"], linear.bias.detach(), rtol=1e-9, atol=1e-12)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(probe[f"norm.{name}"], getattr(norm, name), rtol=1e-9, atol=1e-12)


def slow_accuracy(digits, run, state):
    """Of the classifier in a state on the features of the run's encoder, one held-out image after the other."""
    plan, encoder, classifier = derive(config.load(run / "config.yaml"), RankInfo()), load_encoder(run), state["probe"]
    images, (mean, std) = online_probe.chosen_images(plan), (encoder.normalize.mean, encoder.normalize.std)
    weights, right = {name: value.double() for name, value in classifier["classifier"].items()}, 0
    with plan.dataset.open("train") as reader, torch.no_grad():
        labels = reader.labels(np.arange(reader.info.count))
        for image in images.queries:
            [(pixels, _, _, _)] = reader.batches([np.array([image])])
            x = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(
                std
            ).view(3, 1, 1)
            h = encoder.module(x).double()[0]
            x = (h - weights["norm.running_mean"]) / (weights["norm.running_var"] + 1e-5).sqrt()
            right += int((weights["weight"] @ x + weights["bias"]).argmax()) == labels[image]
    return 100 * right / images.num_queries


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    """A longer one, with the kNN beside."""
    run = tmp_path_factory.mktemp("runs") / "online"
    more = ["log.knn_every_epochs=2", "optim.steps=80", "optim.batch_size=64", "data.limit=1300", "views.num=2"]
    assert train(settings(digits, run, *more)) == 0
    return run


def test_its_accuracy_is_that_on_the_images_that_the_knn_holds_out(run, digits):
    values = logged(run)
    assert list(values) == [20, 40, 60, 80] and list(logged(run, online_knn.NAME)) == [40, 80]
    assert values[80] == pytest.approx(slow_accuracy(digits, run, last_state(run)))
    assert values[80] > 25, "ten classes of digits, of which a guess has 10"
    plan = derive(settings(digits, run, "log.knn_every_epochs=2"), RankInfo())
    probes, knns = online_probe.chosen_images(plan), online_knn.chosen_images(plan)
    assert probes.are_those_of(knns) and probes.num_queries == 130


def test_features_are_computed_once(digits, tmp_path, monkeypatch):
    asked, features = [], held_out.HeldOutImages.features

    def counted(images, *arguments, **options):
        found = features(images, *arguments, **options)
        asked.append(len(found))
        return found

    monkeypatch.setattr(held_out.HeldOutImages, "features", counted)
    assert train(settings(digits, tmp_path / "run", "log.knn_every_epochs=2")) == 0
    assert asked == [130, 1442], "the probe alone after an epoch, both after two"


def test_tensorboard_and_the_progress_have_it(run, digits, tmp_path, capsys):
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    shown = {event.step: event.value for event in events.Scalars(f"online/{online_probe.NAME}")}
    assert shown == pytest.approx(logged(run))
    assert {online_probe.NAME, online_knn.NAME} <= set(board.MEANINGS)
    assert train(settings(digits, tmp_path / "run", "log.every_steps=1")) == 0
    assert f"{online_probe.NAME} {logged(tmp_path / 'run')[8]:.4g}" in capsys.readouterr().err


def probe_of(digits, tmp_path, *more):
    plan = derive(settings(digits, tmp_path / "run", *more), RankInfo())
    return OnlineProbe(plan, one_process(), 5)


def test_a_batch_with_nothing_to_learn_from_gives_no_gradient(digits, tmp_path):
    probe = probe_of(digits, tmp_path)
    held, z = torch.from_numpy(probe.images.queries[:16].copy()), torch.randn(1, 16, 5)
    unknown = torch.full((16,), -1)
    for ids, labels in ((held, torch.zeros(16).long()), (torch.arange(16) + 10**6, unknown)):
        probe.learn(nn.Identity(), Batch([z], [torch.tensor([0])], ids, labels, ids))
        assert not probe.weight.any() and not probe.bias.any()
    assert probe.norm.num_batches_tracked == 2 and probe.norm.running_mean.all()


def test_what_it_says_before(digits, tmp_path):
    text = explain(settings(digits, tmp_path / "run", "views.num=4"), 2)
    assert "every 1 epochs, on 130 images held out of split train; in every step the network passes one view of" in text
    with pytest.raises(UserError, match="batch_size = 1: the online probe normalises over the batch; give 2 or more"):
        explain(settings(digits, tmp_path / "run", "optim.batch_size=1", method="rotation"), 1)


# ---------------------------------------------------------------------------------------------------- no trace of it

VIT = ["backbone.name=timm/test_vit", "views.groups=[{random_resized_crop: {}}]", "data.image_size=160"]


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("relational", []),
        ("relic", ["precision=bf16"]),
        ("vicreg", ["precision=fp16"]),
        ("simclr", ["backbone.name=efficientnet_b0", "optim.steps=4"]),  # with dropout
        ("simclr", ["backbone.recompute=true"]),
        ("simclr", ["optim.accumulate=4", "optim.steps=3", *VIT]),
        ("swav", []),
        ("simclr", ["compile=true"]),
    ],
    ids=["plain", "bf16", "fp16", "dropout", "recompute", "accumulate", "swav", "compile"],
)
def test_the_training_is_the_one_without_it(digits, tmp_path, monkeypatch, method, more):
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    states = []
    for every in ("1", "null"):
        run = tmp_path / every
        assert train(settings(digits, run, f"log.probe_every_epochs={every}", *more, method=method)) == 0
        states.append(last_state(run))
    assert states[0]["probe"]["classifier"]["weight"].any() and not states[1]["probe"]
    for part in ("method", "optimizer", "loss_scale"):
        assert equal(states[0][part], states[1][part]), part


def in_ranks(rank, size, digits, run, more, method):
    torch.set_num_threads(1)
    return train(settings(digits, run, *more, method=method))


@pytest.mark.slow
def test_nor_do_several_ranks_notice_it(digits, tmp_path):
    """Views that pass alone, spread over the ranks: one of them has view 0, the other waits for it."""
    states = []
    for every in ("1", "null"):
        more = ["data.view_shards=2", "views.num=2", f"log.probe_every_epochs={every}"]
        run = tmp_path / f"run-{every}"
        assert ranks.launch(in_ranks, 2, tmp_path, str(digits), str(run), more, "sfrik") == [0, 0]
        states.append(last_state(run))
    assert states[0]["probe"]["classifier"]["weight"].any()
    assert all(equal(states[0][part], states[1][part]) for part in ("method", "optimizer"))


# ---------------------------------------------------------------------------------------------------- ranks


@pytest.mark.slow
@pytest.mark.parametrize("method", ["relational", "sfrik"])
def test_any_grid_teaches_it_the_same(tmp_path, method):
    case = next(verify.cases(tmp_path, names=[method], overrides=["log.probe_every_epochs=1"], steps=3))
    rows = verify.certify([case], tmp_path)
    assert {str(row.grid) for row in rows} == {"2x1", "1x2", "4x1", "2x2", "1x4"}
    assert all(row.holds for row in rows), verify.table(rows)
    page = torch.load(next(tmp_path.glob("pages-*")) / "end.pt")
    assert page["weights"]["online_probe.weight"].any() and page["buffers"]["online_probe.norm.running_mean"].any()


@pytest.mark.slow
def test_any_world_size_measures_the_same(digits, tmp_path):
    for size in (1, 2, 4):
        more = ["precision=fp64", "log.knn_every_epochs=2"]
        run = str(tmp_path / f"run{size}")
        assert set(ranks.launch(in_ranks, size, tmp_path, str(digits), run, more, "relational")) == {0}
    assert len(logged(tmp_path / "run1")) == 2
    assert logged(tmp_path / "run1") == logged(tmp_path / "run2") == logged(tmp_path / "run4")


# ---------------------------------------------------------------------------------------------------- stops


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert train(settings(digits, run)) == 0
    return run


def check_equals(run, whole):
    for part in ("method", "optimizer", "probe"):
        assert equal(last_state(run)[part], last_state(whole)[part]), part
    assert logged(run) == logged(whole) and len(logged(whole)) == 2


def test_a_stopped_run_goes_on_with_it(digits, tmp_path, whole):
    chosen = settings(digits, tmp_path / "run")
    for until in (3, 4, 9, STEPS):
        plan, world = derive(chosen, RankInfo()), one_process()
        with claimed(plan, world):
            state = TrainState(plan, world)
            fit(state, StopAfter(state, until))
    check_equals(tmp_path / "run", whole)


def killed_in(rank, size, digits, run, step):
    """Trains, and is killed by SIGKILL in the middle of a step: weights are updated, the probe is not."""
    torch.set_num_threads(1)
    learn, left = OnlineProbe.learn, [step]

    def fatal(*arguments):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        learn(*arguments)

    OnlineProbe.learn = fatal
    train(settings(digits, run, "checkpoint.every_steps=2"))


@pytest.mark.slow
def test_a_killed_run_goes_on_with_it(digits, tmp_path, whole):
    run = tmp_path / "run"
    for step in (3, 2, 5):  # counted from where the run is: at steps 3, 4 and 7
        process = ranks._context.Process(target=killed_in, args=(0, 1, str(digits), str(run), step))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
    assert checkpoint.steps(run)[-1] == 6
    assert train(settings(digits, run)) == 0
    check_equals(run, whole)


def test_an_older_run_gets_one(digits, tmp_path, capsys):
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(tmp_path, filter="data")
    run = tmp_path / "run"
    words = [f"data.root={digits}", f"run_dir={run}", "log.probe_every_epochs=1"]
    assert train(config.load(run / "config.yaml", words)) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "probe" in line]
    assert said[0] == f"log.probe_every_epochs: {checkpoint.path_of(run, 4)} holds no probe; it begins anew"
    assert last_state(run)["probe"]["classifier"]["norm.num_batches_tracked"] == 4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda probe: probe.pop("optimizer"), r"probe\.optimizer = a dict: field required"),
        (lambda probe: probe["classifier"].update(weight=torch.zeros(10, 3)), r"weight has shape \[10, 3\]"),
        (lambda probe: probe["classifier"].pop("bias"), "lacks bias"),
        (lambda probe: probe["optimizer"]["state"].pop(0), None),
    ],
)
def test_a_changed_checkpoint_is_refused(digits, tmp_path, change, says):
    chosen = settings(digits, tmp_path / "run", "optim.steps=2")
    assert train(chosen) == 0
    state = last_state(tmp_path / "run")
    change(state["probe"])
    checkpoint.save(tmp_path / "run", state)
    longer = settings(digits, tmp_path / "run", "optim.steps=3")
    if says is None:
        assert train(longer) == 0, "AdamW begins anew for a tensor without a state, as of the method's optimizer"
        return
    with pytest.raises(UserError, match=says):
        train(longer)
