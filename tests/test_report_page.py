"""The page of a run and of several: what it shows, what it says of what is missing, and that no text becomes code."""

import base64
import io
import json
import math
import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ssl_dist import cli, config, report, results
from ssl_dist.convert.command import convert
from ssl_dist.errors import UserError
from ssl_dist.report import comparison, page
from ssl_dist.report import run as runs
from ssl_dist.storage import checkpoint
from ssl_dist.train import online_knn, online_probe
from tests import kills
from tests.make_images import save
from tests.test_verdicts import healthy

EVIL = "<script>alert('x')</script>\"'&"


def make_run(folder, method="relational", seed=0, value=50.0, num_lines=40, **changes):
    """A run as a training and an evaluation leave it, but for the weights."""
    folder.mkdir(parents=True)
    tree = {"run_dir": str(folder), "seed": seed, "data": {"name": "cifar10", "root": "data/cifar10"},
            "views": {"num": 8}, "method": {"name": method}, "optim": {"epochs": 2}} | changes  # fmt: skip
    (folder / "config.yaml").write_text(config.dump(config.validate(config.Config, tree)))
    state = {key: {} for key in checkpoint.KEYS} | {"format": checkpoint.FORMAT, "step": 780}
    checkpoint.save(folder, state)
    lines = healthy(num_lines=num_lines, every=20)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results.add(folder / "results.json", [record(folder, value=value, seed=seed, method=method)])
    png(folder / "views.png", Title="views")
    png(folder / "figures" / "cifar10-test-retrieval.png", Title="Nearest images", Description="Queries, left.",
        Evaluator="retrieval", Checkpoint=digest(folder))  # fmt: skip
    return folder


def digest(folder):
    return checkpoint.newest_digest(folder)[1]


def record(folder, **changes):
    return {
        "name": "knn20_top1", "value": 50.0, "protocol": "weighted kNN", "options": {}, "dataset": "cifar10",
        "split": "test", "data": "d", "train_data": "t", "transform": "crop", "version": 1,
        "seed": 0, "method": "relational", "backbone": "conv4",
        "checkpoint": digest(folder), "step": 780, "time": "2030-01-01T00:00:00+00:00",
    } | changes  # fmt: skip


def png(path, size=(6, 4), **texts):
    path.parent.mkdir(exist_ok=True)
    info = PngInfo()
    for key, text in texts.items():
        info.add_itxt(key, text)
    Image.fromarray(np.zeros((*size[::-1], 3), np.uint8)).save(path, pnginfo=info)


class Parsed(HTMLParser):
    """Text, and the tags with their attributes."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.words, self.tags, self.is_code = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.is_code = tag in ("style", "script")
        if tag in ("td", "th", "p", "div", "summary"):
            self.words.append(" ")

    def handle_endtag(self, tag):
        self.is_code = False

    def handle_data(self, data):
        if not self.is_code:
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", "".join(self.words))

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(*folders):
    return Parsed(report.write(report.read(folders), None).read_text(encoding="utf-8"))


def test_the_page_of_a_run(tmp_path):
    run = make_run(tmp_path / "a run")
    shown = page_of(run)
    assert (run / "report.html").exists()
    for words in ("relational · conv4 · cifar10", "step 780 of 780", "step-00000780.pt", digest(run)[:16], "no illness",
                  "The training is complete.", "The representations are alive.", "knn20_top1", "50.00", "weighted kNN",
                  "linear evaluation, top-1", "61.03", "first post", "issue 2 of github.com/mpatacchiola",
                  "200 epochs of batches of 64", "Nearest images", "Queries, left.", "throughput (images/s)",
                  "effective rank", "views.num", "optim.epochs"):  # fmt: skip
        assert words in shown.text, words
    assert len(shown.all("svg")) == 7 and len(shown.all("polyline")) >= 9
    pictures = [image["src"] for image in shown.all("img")]
    assert len(pictures) == 2
    for source in pictures:
        head, data = source.split(",")
        assert head == "data:image/png;base64" and Image.open(io.BytesIO(base64.b64decode(data))).size == (6, 4)


def test_a_folder_whose_name_is_no_utf8(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run").rename(tmp_path / "run-\udce9")
    stdout = io.TextIOWrapper(io.BytesIO(), "utf-8")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert cli.main(["report", str(run)]) == 0
    assert b"run-\xe9/report.html: open it" in stdout.buffer.getvalue()
    assert "run-\\udce9" in (run / "report.html").read_text(encoding="utf-8")


def test_keys_that_are_set_come_first(tmp_path):
    text = page_of(make_run(tmp_path / "run")).text
    changed, usual = re.fullmatch(r".* \d keys set(.*?) \d+ keys at the default(.*)", text).groups()
    assert "optim.epochs 2 200" in changed and "views.num 8 null" in changed and "optim.lr" not in changed
    assert "optim.lr 0.001" in usual and "method.options.gamma 2" in usual and "optim.epochs" not in usual


def test_nothing_outside_the_page_is_named(tmp_path):
    shown = page_of(make_run(tmp_path / "run"))
    for tag, attributes in shown.tags:
        for name, value in attributes.items():
            assert name not in ("srcset", "action", "style") and not name.startswith("on"), (tag, name)
            assert name not in ("src", "href") or value.startswith(("data:image/png;base64,", "#")), (tag, value[:80])
    assert not {tag for tag, _ in shown.tags} & {"link", "iframe", "object", "base", "form"}
    [policy] = [meta["content"] for meta in shown.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in policy


def test_every_text_is_escaped(tmp_path):
    run = make_run(tmp_path / "<script>alert(1)<" / "script>", data={"name": "cifar10", "root": EVIL})
    results.add(run / "results.json", [record(run, name=EVIL, protocol=EVIL, dataset=EVIL, split=EVIL)])
    png(run / "figures" / "x.png", Title=EVIL, Description=EVIL, Checkpoint=digest(run))
    starts = {"time": EVIL, "host": EVIL, "world_size": EVIL, "step": EVIL, "versions": {"torch": EVIL}}
    (run / "logs").mkdir()
    (run / "logs" / "starts.jsonl").write_text(
        json.dumps(starts) + "\n" + json.dumps(starts | {"versions": "x"}) + "\n"
    )
    lines = [line | {EVIL: 1.0} for line in healthy(20)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.rename(run, evil := tmp_path / "<img src=x onerror=alert(1)>")
    other = make_run(tmp_path / "other")
    for shown in (page_of(evil), page_of(evil, other)):
        assert shown.text.count("<script>alert(") >= 5 and "<img src=x onerror" in shown.text
        assert len(shown.all("script")) == 1
        assert all(image["src"].startswith("data:image/png;base64,") for image in shown.all("img"))


def test_a_run_that_has_just_begun(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    tree = {"run_dir": str(run), "data": {"name": "cifar10", "root": "x"}}
    (run / "config.yaml").write_text(config.dump(config.validate(config.Config, tree)))
    assert cli.main(["report", str(run)]) == 0
    out = capsys.readouterr().out
    assert f"Nothing is measured yet; `ssl-dist evaluate {run} knn logistic` does it." in out
    assert f"{run / 'report.html'}: open" in out
    shown = page_of(run)
    for words in ("There is no checkpoint yet", "No step is logged yet", f"ssl-dist train {run / 'config.yaml'}",
                  "Nothing is measured yet", f"ssl-dist evaluate {run} knn logistic", "no picture of the views yet",
                  "There are no pictures yet", "No step was logged"):  # fmt: skip
        assert words in shown.text, words


def test_what_the_data_set_says(tmp_path, capsys):
    """A run on photos without labels is told what can measure it, and how many photos were left out."""
    for i in range(3):
        save(tmp_path / "photos" / f"{i}.png", np.full((9, 9, 3), i, np.uint8))
    (tmp_path / "photos" / "1.png").write_text("no image")
    convert("folder", tmp_path / "photos", tmp_path / "data", unlabeled=True, skip_damaged=True, progress=False)
    (tmp_path / "run").mkdir()
    tree = {"run_dir": str(tmp_path / "run"), "data": {"root": str(tmp_path / "data")}}
    (tmp_path / "run" / "config.yaml").write_text(config.dump(config.validate(config.Config, tree)))
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    measure = f"`ssl-dist evaluate {tmp_path / 'run'} retrieval clusters embedding --split unlabeled`"
    out, shown = capsys.readouterr().out, page_of(tmp_path / "run")
    assert f"Nothing is measured yet; {measure} does it." in out and "knn" not in out
    assert shown.text.count("Of split unlabeled, 1 image could not be read and was left out") == 1
    assert f"There are no pictures yet; {measure.strip('`')} draws some" in shown.text


def test_an_untrained_network(tmp_path):
    run = make_run(tmp_path / "run", method="random_weights", views={})
    (run / "metrics.jsonl").unlink()
    shown = page_of(run)
    assert "random_weights does not train: there is nothing to judge." in shown.text and not shown.all("svg")
    assert "No published number is known here for random_weights · conv4 · cifar10" in shown.text


def test_a_torn_last_line_is_of_a_run_that_goes_on(tmp_path):
    run = make_run(tmp_path / "run")
    whole = page_of(run)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 800, "ep')
    assert page_of(run).text.replace("at", "") == whole.text.replace("at", "")


def test_verdicts_have_badges_and_are_counted(tmp_path):
    run = make_run(tmp_path / "run")
    lines = healthy(num_lines=40, data_wait=lambda t: 0.6, effective_rank=lambda t: 3.0, lr=lambda t: 0.05)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = report.write(report.read([run]), None).read_text()
    assert '<span class="badge error">1 ill</span><span class="badge warning">2 look</span>' in text
    assert text.count('<span class="badge error">ill</span>') == 1
    assert text.count('<span class="badge warning">look</span>') == 2
    assert '<span class="badge ok">fine</span>' in text
    assert ">slow above</text>" in text and ">collapsed below</text>" in text  # the limits in the charts


@pytest.mark.parametrize(("name", "words"), [(online_knn.NAME, "online knn20"), (online_probe.NAME, "online probe")])
def test_what_is_measured_now_and_then(tmp_path, name, words):
    run = make_run(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    for step in (390, 780):
        line = {"step": step, "epoch": step / 390, name: 40.0 + step / 390}
        lines.insert(step // 20 + 1, json.dumps(line))
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    shown = page_of(run)
    assert f"{words} (% of held-out images)" in shown.text and "no illness" in shown.text
    [svg] = [svg for svg in shown.all("svg") if svg["aria-label"].startswith("online")]
    [curve] = json.loads(svg["data-curves"])
    assert (curve["x"], curve["y"]) == ([1.0, 2.0], [41.0, 42.0])


def test_the_trainings_of_evaluators(tmp_path):
    run = make_run(tmp_path / "run")
    assert "Trainings of evaluators" not in page_of(run).text
    for number in range(2):
        make_run(run / "evaluations" / f"probe-{number}", method="linear_probe", views={})
    (run / "evaluations" / "torn").mkdir()
    (run / "evaluations" / "torn" / "config.yaml").write_text("optim: [")
    shown = page_of(run)
    assert "Trainings of evaluators" in shown.text and "not valid YAML" in shown.text
    loss, accuracy = [svg for svg in shown.all("svg") if "probe-" in svg["data-curves"]]
    assert loss["aria-label"] == "loss over the epochs" and accuracy["aria-label"] == "accuracy over the epochs"
    assert [curve["name"] for curve in json.loads(loss["data-curves"])] == ["probe-0", "probe-1"]


def test_damage_is_reported(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[3] = lines[3][:20]
    lines[5] = "[]"
    (run / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b"\n\xff\n")
    (run / "views.png").write_bytes((run / "views.png").read_bytes()[:40])
    (run / "figures" / "empty.png").touch()
    (run / "results.json").write_text("{")
    newer = checkpoint.path_of(run, 800)
    newer.write_bytes(b"damaged")
    shown = page_of(run)
    for words in ("3 lines of metrics.jsonl cannot be read and are left out: line 4, 6, 41",
                  "views.png: cannot be shown", "empty.png: cannot be shown",
                  "results.json: cannot be read: not JSON; move it away",
                  "A newer checkpoint, of step 800, is damaged", "Nearest images"):  # fmt: skip
        assert words in shown.text, words
    assert cli.main(["report", str(run)]) == 0 and "results.json: cannot be read" in capsys.readouterr().out
    checkpoint.path_of(run, 780).unlink()
    assert "No checkpoint can be used" in page_of(run).text


def test_odd_numbers_are_no_error(tmp_path):
    run = make_run(tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    odd = [1e308, -1e308, math.inf, -math.inf, math.nan, 10**400, True, None, "x", [1], {}]
    for number, value in enumerate(odd):
        for key in lines[0]:
            if key not in ("step", "epoch"):
                lines[number][key] = value
    bad = [{"step": 10**400, "epoch": 1.0}, {"step": 1, "epoch": math.nan}, {"step": -1, "epoch": 0.0}, {"step": 1}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, *bad]))
    text = page_of(run).text
    assert "4 lines of metrics.jsonl cannot be read" in text and "The loss is not a number since step 1." in text


def test_what_belongs_to_another_checkpoint(tmp_path):
    run = make_run(tmp_path / "run")
    png(run / "figures" / "old.png", Title="Old picture", Checkpoint="ab" * 32)
    png(run / "figures" / "mine.png")
    results.add(run / "results.json", [record(run, name="logistic_top1", checkpoint="ab" * 32, step=390)])
    shown = page_of(run)
    assert "Left out, being of another checkpoint: old.png" in shown.text and "Old picture" not in shown.text
    assert "it does not say of which checkpoint" in shown.text
    assert "logistic_top1 (step 390)" in shown.text


def test_a_part_held_out_is_not_put_beside_a_paper(tmp_path):
    run = make_run(tmp_path / "run")
    linear = {"name": "probe_top1", "options": {"recipe": "relational"}}
    of_validation = record(run, **linear, value=77.77, split="train[held out 10%]")
    results.add(run / "results.json", [of_validation])
    assert page_of(run).text.count("77.77") == 1, "in the table of results and nowhere else"
    results.add(run / "results.json", [of_validation | {"split": "test", "value": 66.66}])
    shown = page_of(run).text
    assert shown.count("77.77") == 1 and shown.count("66.66") == 3


def test_the_result_beside_a_published_one(tmp_path):
    run = make_run(tmp_path / "run")
    linear = {"name": "probe_top1", "options": {"recipe": "relational", "epochs": None}}
    others = [{"name": "probe_top5"}, {"split": "train[held out 10%]"}, {"options": {"recipe": "sfrik"}},
              {"name": "logistic_top1"}, {"protocol": "linear probe; fitted on 20 images a class of train"},
              {"dataset": "cifar100"}]  # fmt: skip
    results.add(run / "results.json", [record(run, **(linear | other)) for other in others])
    shown = page_of(run).text
    assert re.search(r"61\.03\s*–\s*not measured yet:\s*ssl-dist evaluate \S+ probe probe.recipe=relational", shown)
    results.add(run / "results.json", [record(run, **linear, value=55.0)])
    differ = r"200 epochs, here 2\s*K = 32, here 8\s*mean of 3 seeds, here of one"
    assert re.search(r"61\.03\s*55\.00\s*probe_top1\s*" + differ, page_of(run).text)


def test_numbers_stand_beside_the_first_run_that_they_may_stand_beside(tmp_path):
    of_a_part = make_run(tmp_path / "part", data={"name": "cifar10", "root": "x", "limit": 100})
    whole = [make_run(tmp_path / f"seed{seed}", seed=seed) for seed in range(2)]
    shown = comparison.with_published(report.read([of_a_part, *whole]))
    assert [run.name for run in shown] == ["seed0"]
    assert "trained on a part of the images" in page_of(of_a_part).text


def test_not_converged_is_reported(tmp_path):
    run = make_run(tmp_path / "run")
    results.add(run / "results.json", [record(run, name="logistic_converged", value=0.0)])
    assert re.search(r"logistic_converged\s*not converged", page_of(run).text)


def test_several_runs(tmp_path, capsys):
    folders = [make_run(tmp_path / f"seed{seed}", seed=seed, value=50.0 + seed) for seed in range(3)]
    folders.append(make_run(tmp_path / "deep" / "vicreg", method="vicreg", views={}, value=49.0))
    assert cli.main(["report", *map(str, folders)]) == 0
    out = capsys.readouterr().out
    assert "51.00 ± 1.00" in out and str(tmp_path / "report.html") in out
    shown = Parsed((tmp_path / "report.html").read_text())
    for words in ("4 runs side by side", "seed0", "vicreg", "51.00 ± 1.00", "0, 1, 2", "loss · relational",
                  "loss · vicreg", "method.options.sim_coeff", "other keys are the same"):  # fmt: skip
        assert words in shown.text, words
    assert "optim.lr" not in shown.text.split("Config")[-1]
    [rank] = [svg for svg in shown.all("svg") if svg["aria-label"].startswith("effective rank")]
    assert [curve["name"] for curve in json.loads(rank["data-curves"])] == ["seed0", "seed1", "seed2", "vicreg"]
    assert len(shown.all("img")) == 8


def test_the_best_accuracy_of_several_is_bold(tmp_path):
    folders = [make_run(tmp_path / f"run{seed}", seed=seed, value=50.0 + seed) for seed in range(2)]
    results.add(folders[0] / "results.json", [record(folders[0], name="logistic_top1", value=77.0)])
    text = report.write(report.read(folders), None).read_text()
    assert "<b>51.00</b>" in text and "<b>50.00</b>" not in text
    assert ">77.00<" in text and "<b>77.00</b>" not in text  # there is nothing to compare it with


@pytest.mark.parametrize(
    "changed", [{"data": "f" * 64}, {"train_data": "f" * 64}, {"version": 7}, {"transform": "16 px"}]
)
def test_numbers_of_other_images_or_another_version_are_not_in_one_row(tmp_path, changed):
    first, second = make_run(tmp_path / "a", value=50.0), make_run(tmp_path / "b", value=90.0, seed=1)
    records = json.loads((second / "results.json").read_text())
    (second / "results.json").write_text(json.dumps([each | changed for each in records]))
    rows = comparison.result_rows([runs.read(folder) for folder in (first, second)])
    assert [row["best"] for row in rows] == [None] * len(rows) and len({row["remark"] for row in rows}) == 2
    text = page_of(first, second).text
    assert all(row["remark"] in text for row in rows)


def test_numbers_of_several_sizes_are_all_shown_with_their_size(tmp_path):
    """A later number at another size does not take the place of the first one."""
    run = make_run(tmp_path / "run", value=50.0)
    later = record(run, value=90.0, transform="centre crop 16, mean (0, 0, 0)", time="2031-01-01T00:00:00+00:00")
    assert "(crop)" not in page_of(run).text
    results.add(run / "results.json", [later])
    text = page_of(run).text
    assert "50.00" in text and "(crop)" in text and "90.00" in text and "(centre crop 16)" in text
    records = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps([{**records[0], "transform": None}, records[1]]))
    assert [each["value"] for each in runs.read(run).records] == [90], "it may have been of the same size"


def test_runs_of_one_name_are_distinguished(tmp_path):
    folders = [make_run(tmp_path / name / "run", seed=seed) for seed, name in enumerate("ab")]
    text = page_of(*folders).text
    assert "a/run" in text and "b/run" in text and (tmp_path / "report.html").exists()


def test_several_runs_of_which_some_lack_results(tmp_path, capsys):
    full, bare = make_run(tmp_path / "full"), make_run(tmp_path / "bare", seed=1)
    (bare / "results.json").unlink()
    out = tmp_path / "pages" / "both.html"
    assert cli.main(["report", str(full), str(bare), "--out", str(out)]) == 0
    assert f"{bare}: Nothing is measured yet" in capsys.readouterr().out
    assert "Nothing is measured yet" in Parsed(out.read_text()).text and not (tmp_path / "report.html").exists()


def test_mistakes(tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    run = make_run(tmp_path / "run")
    for words, message in [
        ([tmp_path / "folder"], "folder: not a run's folder"),
        ([tmp_path / "none"], "none: not a run's folder"),
        ([run, tmp_path / "folder"], "folder: not a run's folder"),
        ([run, run], "has the seed, 0, and the config of"),
        ([run, "--out", tmp_path], "is not a regular file; give another file with --out"),
        ([run, "--out", run / "config.yaml" / "x.html"], "cannot be written"),
        ([run, "--out", "/dev/null"], "is not a regular file"),
    ]:
        assert cli.main(["report", *map(str, words)]) == 2
        out, error = capsys.readouterr()
        assert message in error and error.count("\n") == 1 and out == "", error
    assert not (run / "report.html").exists()


def test_old_or_new_page_at_every_kill(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    (prepared / "report.html").write_text("old")
    monkeypatch.setattr(page, "of", lambda _: "new")
    contents = set()
    for run in kills.every_kill(prepared, tmp_path, lambda run: report.write([run], run / "report.html")):
        contents.add((run / "report.html").read_text())
    assert contents == {"old", "new"}


def test_reading_changes_nothing(tmp_path):
    run = make_run(tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    runs.read(run)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_faulty_config_is_named(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "config.yaml").write_text("optim: [")
    with pytest.raises(UserError, match="not valid YAML"):
        runs.read(run)


def test_the_script_and_style_are_those_of_the_policy(tmp_path):
    """A change to page.js must reach the policy: the hash is taken of what is written."""
    text = page.of(report.read([make_run(tmp_path / "run")]))
    shown = Parsed(text)
    [policy] = [meta["content"] for meta in shown.all("meta") if "http-equiv" in meta]
    assert policy.count("'sha256-") == 2
    assert Path(page.__file__).with_name("page.js").read_text() in text
