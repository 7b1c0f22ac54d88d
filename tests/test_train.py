"""The loop on real files: handwritten digits, converted, decoded, augmented, trained on, by one and by two ranks."""

import contextlib
import hashlib
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ssl_dist import config
from ssl_dist.errors import Fault, UserError
from ssl_dist.storage import checkpoint
from ssl_dist.train import optim
from tests import ranks

CONFIG = "configs/digits/relational-conv4.yaml"


def overrides(data, run, *more):
    return [
        f"data.root={data}", f"run_dir={run}", "data.limit=48", "data.reader=arrays", "optim.batch_size=16",
        "optim.epochs=null", "optim.steps=6", "checkpoint.every_epochs=1", "log.every_steps=2", "timeout=20", *more,
    ]  # fmt: skip


def run_training(data, run, *more):
    from ssl_dist.train.loop import train

    return train(config.load(CONFIG, overrides(data, run, *more)))


def in_ranks(rank, size, data, run, *more):
    return run_training(data, run, *more)


def weights(run):
    return checkpoint.load(checkpoint.newest(Path(run)))["method"]


def fingerprint(run):
    state = checkpoint.load(checkpoint.newest(Path(run)))
    digest = hashlib.sha256()
    for name, value in sorted(state["method"].items()):
        digest.update(name.encode() + value.numpy().tobytes())
    for key, entry in sorted(state["optimizer"]["state"].items()):
        digest.update(str(key).encode() + b"".join(v.numpy().tobytes() for _, v in sorted(entry.items())))
    return state["step"], digest.hexdigest()


def metrics(run):
    """Lines of metrics.jsonl without what depends on the clock on the wall."""
    times = ("images_per_s", "views_per_s", "data_wait", "seconds_per_step")
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in times} for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(digits, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert run_training(digits, run) == 0
    return run


@pytest.mark.parametrize("more", [(), ("log.knn_every_epochs=1",), ("data.subset={per_class: 6, start: 0}",)])
def test_the_data_set_is_opened_once(digits, tmp_path, monkeypatch, more):
    """dataset.json and the file of the training split; its pictures, kNN and labels use what is open."""
    from ssl_dist.data import manifest, readers

    opened = []
    load, beton = manifest.load, readers.Beton
    monkeypatch.setattr(manifest, "load", lambda root: (opened.append("dataset.json"), load(root))[1])
    monkeypatch.setattr(readers, "Beton", lambda path: (opened.append(path.name), beton(path))[1])
    assert run_training(digits, tmp_path / "run", "optim.steps=1", *more) == 0
    assert (tmp_path / "run" / "views.png").exists()
    assert opened == ["dataset.json", "train.beton"]


def test_a_run_leaves_what_it_should(uninterrupted):
    run = uninterrupted
    assert checkpoint.steps(run) == [3, 6]
    assert [line["step"] for line in metrics(run)] == [1, 2, 4, 6]
    last = metrics(run)[-1]
    for name in ("loss", "lr", "accuracy", "accuracy_positive", "accuracy_negative", "feature_std", "effective_rank"):
        assert name in last
    assert 0 <= last["accuracy"] <= 100 and last["epoch"] == 2.0
    for name in ("config.yaml", "views.png", "loss.png", "logs/starts.jsonl", "checkpoints/LAST"):
        assert (run / name).stat().st_size > 0
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    tags = board.Tags()
    assert {"train/loss", "train/accuracy", "speed/views_per_s", "speed/data_wait"} <= set(tags["scalars"])
    assert tags["images"] == ["views"] and any("score" in name for name in tags["histograms"])
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 4, 6]
    assert {"views", "config", "loss", "lr", "accuracy", "images_per_s", "data_wait"} <= set(describing(board)), (
        "MEANINGS"
    )
    assert "over positives" in describing(board)["accuracy_positive"], "the method's own words"
    state = checkpoint.load(checkpoint.newest(run))
    assert state["step"] == 6 and state["world_size"] == 1
    assert any(name.startswith("backbone.") for name in state["method"])


def describing(board):
    """The descriptions in TensorBoard, by the last part of their tags."""
    found = {tag: board.SummaryMetadata(tag).summary_description for tags in board.Tags().values()
             if isinstance(tags, list) for tag in tags}  # fmt: skip
    return {tag.removesuffix("/text_summary").rpartition("/")[2]: text for tag, text in found.items() if text}


def test_tensorboard_has_the_settings_as_text_and_as_hyperparameters(uninterrupted):
    from tensorboard.plugins.hparams import metadata

    board = EventAccumulator(str(uninterrupted / "tensorboard"))
    board.Reload()
    [text] = board.Tensors("config/text_summary")
    assert "  aggregation: cat\n" in text.tensor_proto.string_val[0].decode()
    start = metadata.parse_session_start_info_plugin_data(
        board.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    ).hparams
    assert (start["method.name"].string_value, start["optim.steps"].number_value) == ("relational", 6)
    assert start["channels_last"].bool_value is True and not {"optim.epochs", "run_dir", "log.every_steps"} & {*start}
    assert start["views.groups.0.color_jitter.brightness"].number_value == 0.8
    assert start["optim.milestones"].string_value == "[0.5, 0.75]"
    end = board.SummaryMetadata(metadata.SESSION_END_INFO_TAG).plugin_data.content
    assert metadata.parse_session_end_info_plugin_data(end).status == 1  # success


def test_the_same_command_again_is_done_at_once_and_says_how_to_go_on(uninterrupted, digits, tmp_path, capfd):
    before = fingerprint(uninterrupted)
    assert run_training(digits, uninterrupted) == 0
    assert fingerprint(uninterrupted) == before
    first = capfd.readouterr().err.splitlines()[0]
    assert first.startswith(f"{uninterrupted}: is complete, 6 steps; nothing is left to train. To go on: ")
    run = shutil.copytree(uninterrupted, tmp_path / "run")
    assert run_training(digits, run, re.search(r"To go on: (\S+);", first)[1]) == 0
    assert checkpoint.steps(run)[-1] == 12
    assert f"folder  {run}: resumes after step 6\n" in capfd.readouterr().err


@pytest.mark.parametrize("schedule", ["optim.schedule=cosine", "optim.weight_decay_final=0.4"])
def test_a_schedule_that_spans_the_training_is_said_of_a_finished_run(digits, tmp_path, capfd, schedule):
    for _ in range(2):
        assert run_training(digits, tmp_path / "run", "optim.steps=1", schedule) == 0
    assert f"Its length is that of {schedule}: a longer training needs another run_dir" in capfd.readouterr().err


def test_the_commands_that_train_ends_with_work(digits, tmp_path, capfd):
    """Also of a folder whose name has a space, and of a data set without a test split."""
    from ssl_dist import cli

    no_test = tmp_path / "no_test"
    shutil.copytree(digits, no_test)
    (no_test / "test.beton").unlink()
    tree = json.loads((no_test / "dataset.json").read_text())
    del tree["splits"]["test"]
    (no_test / "dataset.json").write_text(json.dumps(tree))
    for data, run in ((digits, tmp_path / "a run"), (no_test, tmp_path / "b")):
        assert run_training(data, run, "optim.steps=1") == 0
        lines = capfd.readouterr().err.splitlines()
        assert lines[:5] == [
            "train   relational on conv4, views of an image: 4 of 32 px",
            f"images  digits, split train: 48 of 1,442, 10 classes; {data}",
            "ranks   1 on the CPU, fp32",
            "length  1 step = 0.3333 epochs of 16 images a step; adam, rate 0.001",
            f"folder  {run}: new",
        ]
        start = lines.index(f"{run}: complete; next")
        evaluate, report, board = map(shlex.split, lines[start + 1 :])
        for program, *arguments in (evaluate, report):
            assert program == "ssl-dist" and cli.main(arguments) == 0
        assert json.loads((run / "results.json").read_text()) and (run / "report.html").exists()
        assert board[:2] == ["tensorboard", "--logdir"] and list(Path(board[2]).glob("tensorboard/events*"))
        capfd.readouterr()


def test_resume_is_bit_exact_in_weights_optimizer_and_metrics(uninterrupted, digits, tmp_path):
    run = tmp_path / "run"
    run_training(digits, run, "optim.steps=2", "checkpoint.every_steps=1")
    run_training(digits, run, "optim.steps=5")
    # what a kill leaves behind: a line of a step that was not saved, torn in the middle
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "loss": 9.9}\n{"step": 7, "lo')
    run_training(digits, run)
    assert fingerprint(run) == fingerprint(uninterrupted)
    expected = {line["step"]: line for line in metrics(uninterrupted)}
    assert all(expected.get(line["step"], line) == line for line in metrics(run))
    assert metrics(run)[-1] == metrics(uninterrupted)[-1]


@pytest.mark.parametrize(
    "more",
    [
        ["data.workers=3"],
        pytest.param(["data.reader=ffcv"], marks=pytest.mark.requires_ffcv),
        ["channels_last=false", "log.every_steps=1"],
    ],
)
def test_threads_and_readers_do_not_matter(uninterrupted, digits, tmp_path, more):
    run_training(digits, tmp_path / "run", *more)
    if "channels_last=false" not in more:
        assert fingerprint(tmp_path / "run") == fingerprint(uninterrupted)
    assert metrics(tmp_path / "run")[-1]["loss"] == pytest.approx(metrics(uninterrupted)[-1]["loss"], rel=1e-3)


@pytest.mark.parametrize("more", ["data.view_shards=1", "data.view_shards=2 backbone.recompute=true"])
def test_two_ranks_equal_one_in_float64(digits, tmp_path, more):
    run_training(digits, tmp_path / "one", "precision=fp64", "optim.steps=3")
    codes = ranks.launch(
        in_ranks, 2, tmp_path, digits, tmp_path / "two", "precision=fp64", "optim.steps=3", *more.split()
    )
    assert codes == [0, 0]
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    a, b = metrics(tmp_path / "one")[-1], metrics(tmp_path / "two")[-1]
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-9) and a["accuracy"] == b["accuracy"]


def test_bf16_stays_close_and_keeps_float32_weights(uninterrupted, digits, tmp_path):
    run_training(digits, tmp_path / "run", "precision=bf16", "optim.steps=2")
    state = weights(tmp_path / "run")
    assert all(v.dtype in (torch.float32, torch.int64) for v in state.values())
    expected = {line["step"]: line for line in metrics(uninterrupted)}
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(expected[1]["loss"], rel=2e-2)


def test_fp16_resumes_bit_for_bit_with_the_scale_of_its_loss(digits, tmp_path, monkeypatch):
    """So high a scale overflows twice, rises after two good steps, and overflows again."""
    monkeypatch.setattr(optim, "LossScaler", partial(optim.LossScaler, init_scale=2.0**24, growth_interval=2))
    for run, stops in (("whole", [6]), ("parts", [3, 6])):
        for steps in stops:
            run_training(digits, tmp_path / run, "precision=fp16", "log.every_steps=1", f"optim.steps={steps}")
    scales = [math.log2(line["loss_scale"]) for line in metrics(tmp_path / "whole")]
    assert scales == [23, 22, 22, 23, 23, 22]
    assert fingerprint(tmp_path / "parts") == fingerprint(tmp_path / "whole")
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    state = checkpoint.load(checkpoint.newest(tmp_path / "parts"))
    assert state["loss_scale"] == {"scale": 2.0 ** scales[-1], "growth_tracker": 0}
    assert all(v.dtype in (torch.float32, torch.int64) for v in state["method"].values())


def test_fp16_without_any_finite_gradient_takes_no_good_checkpoints_place(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(optim, "LEAST_LOSS_SCALE", 2.0**20)
    with pytest.raises(Fault, match=r"at step 6: no gradient is finite, .* down to 65536; nothing is saved"):
        run_training(digits, tmp_path / "run", "precision=fp16", "checkpoint.every_epochs=null")


def test_random_weights_are_saved_and_done(digits, tmp_path):
    from ssl_dist.train.loop import train

    settings = config.load("configs/digits/random_weights-conv4.yaml", [f"data.root={digits}", f"run_dir={tmp_path}/r"])
    assert train(settings) == 0
    assert checkpoint.steps(tmp_path / "r") == [0]
    relational = weights_of_first_step(digits, tmp_path)
    for name, value in weights(tmp_path / "r").items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(value, relational[name]), "the same seed draws the same backbone for every method"


def weights_of_first_step(digits, tmp_path):
    from ssl_dist.distributed.world import RankInfo
    from ssl_dist.run.blueprint import derive

    return derive(config.load(CONFIG, overrides(digits, tmp_path / "none")), RankInfo()).build().state_dict()


def test_a_non_finite_loss_ends_the_run_with_step_and_remedy(digits, tmp_path):
    from ssl_dist.errors import Fault

    with pytest.raises(Fault, match=r"the loss is not finite .*newest checkpoint.*another run_dir"):
        run_training(
            digits, tmp_path / "run", "optim.name=sgd", "optim.lr=1e38", "checkpoint.every_steps=1", "optim.steps=50"
        )


def test_weights_that_are_not_finite_take_no_good_checkpoints_place(digits, tmp_path, monkeypatch):
    from ssl_dist.errors import Fault
    from ssl_dist.train import optim

    options = ("checkpoint.every_steps=1", "checkpoint.keep=1")
    rate = optim.lr
    monkeypatch.setattr(optim, "lr", lambda options, clock: math.inf if clock.step == 2 else rate(options, clock))
    with pytest.raises(Fault, match=r"step 3: .* is not finite after this step; .*step-00000002\.pt; begin anew"):
        run_training(digits, tmp_path / "run", *options)
    assert checkpoint.steps(tmp_path / "run") == [2]
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())


def test_nothing_is_written_to_a_folder_that_was_made_anew(digits, tmp_path, monkeypatch):
    from ssl_dist.errors import Fault
    from ssl_dist.run import folder
    from ssl_dist.train import optim

    run, rate, locks = tmp_path / "run", optim.lr, []

    def begin_anew(options, clock):
        if clock.step == 2:
            shutil.rmtree(run)
            locks.append(folder.claim(run))  # another process would: the lock went with the folder
        return rate(options, clock)

    monkeypatch.setattr(optim, "lr", begin_anew)
    with pytest.raises(Fault, match=f"{run}: was removed while this training ran"):
        run_training(digits, run)
    assert checkpoint.steps(run) == [] and not (run / "metrics.jsonl").exists()
    os.close(locks[0])


def test_another_config_is_refused_before_anything_changes(uninterrupted, digits):
    before = fingerprint(uninterrupted)
    with pytest.raises(UserError, match=r"another config: optim\.lr \(there 0\.001, now 0\.5\)"):
        run_training(digits, uninterrupted, "optim.lr=0.5")
    assert fingerprint(uninterrupted) == before


@pytest.mark.slow
def test_sigterm_saves_the_step_exits_75_and_resumes_exactly(digits, tmp_path):
    more = ["optim.steps=60", "checkpoint.every_epochs=null", "log.every_steps=1"]
    command = [sys.executable, "-m", "ssl_dist", "train", CONFIG, *overrides(digits, tmp_path / "run", *more)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": "."})
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "metrics.jsonl").exists() or not metrics(tmp_path / "run"):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 75 and "stopping after step" in stderr
    [step] = checkpoint.steps(tmp_path / "run")
    assert step < 60, "it ended before the signal came"
    assert run_training(digits, tmp_path / "run", *more) == 0
    assert run_training(digits, tmp_path / "whole", *more) == 0
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")


@pytest.mark.slow
def test_three_ranks_resume_bit_for_bit(digits, tmp_path):
    more = ["data.limit=48", "optim.batch_size=12", "data.view_shards=1", "checkpoint.every_steps=1"]
    assert ranks.launch(in_ranks, 3, tmp_path, digits, tmp_path / "whole", *more) == [0, 0, 0]
    for steps in ("optim.steps=2", "optim.steps=3", "optim.steps=6"):
        assert ranks.launch(in_ranks, 3, tmp_path, digits, tmp_path / "parts", *more, steps) == [0, 0, 0]
    assert fingerprint(tmp_path / "parts") == fingerprint(tmp_path / "whole")


def test_other_images_under_the_same_name_are_refused(digits, tmp_path):
    run_training(digits, tmp_path / "run", "optim.steps=2")
    other = tmp_path / "other"
    shutil.copytree(digits, other)
    tree = json.loads((other / "dataset.json").read_text())
    tree["splits"]["train"]["sha256"] = "0" * 64
    (other / "dataset.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match="not the images"):
        run_training(other, tmp_path / "run")
    ids = tmp_path / "ids.txt"
    for start in (0, 1):
        ids.write_text("\n".join(map(str, range(start, 40 + start))))
        arguments = [digits, tmp_path / "listed", f"data.subset={ids}", "data.limit=null", f"optim.steps={2 + start}"]
        if start == 0:
            assert run_training(*arguments) == 0
        else:
            with pytest.raises(UserError, match=r"data\.subset file"):
                run_training(*arguments)


def damaged_in_rank_1(rank, size, data, run):
    """Only the second rank holds the image whose bytes were changed."""
    from ssl_dist import cli

    arguments = overrides(data, run, "data.view_shards=1", "timeout=10")
    stdout = io.StringIO()
    with contextlib.redirect_stderr(stdout):
        try:
            code = cli.main(["train", CONFIG, *arguments])
        except RuntimeError as error:  # lost contact
            code = type(error).__name__
    return code, stdout.getvalue()


def test_an_error_on_one_rank_alone_is_reported_by_that_rank(digits, tmp_path):
    from ssl_dist.data.beton import Beton
    from ssl_dist.distributed.world import RankInfo
    from ssl_dist.run.blueprint import derive

    order = derive(config.load(CONFIG, overrides(digits, tmp_path / "none")), RankInfo()).order
    bad = int(order.global_ids(0)[-1])
    other = tmp_path / "other"
    shutil.copytree(digits, other)
    path = other / "train.beton"
    data = bytearray(path.read_bytes())
    data[Beton(path).pointers[bad] + 7] ^= 0xFF
    path.write_bytes(data)
    (code0, _), (code1, stderr) = ranks.launch(damaged_in_rank_1, 2, tmp_path, other, tmp_path / "run")
    assert code1 == 2 and f"image {bad} is damaged" in stderr
    assert code0 != 0


@pytest.mark.slow
def test_a_compiled_backbone_trains_the_same(digits, tmp_path):
    states = []
    for compiled in ("true", "false"):
        run = tmp_path / compiled
        settings = config.load(CONFIG, overrides(digits, run, f"compile={compiled}", "optim.steps=3", "timeout=300"))
        from ssl_dist.train.loop import train

        assert train(settings) == 0
        states.append(checkpoint.load_run(run)[1]["method"])
    assert list(states[0]) == list(states[1]), "no word of the compiler in the names"
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=1e-3, atol=1e-4)
