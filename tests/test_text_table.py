"""Text tables, byte for byte as four commands print them."""

import csv
import json
from types import SimpleNamespace

from ssl_dist import config, report, results, text_table
from ssl_dist.grid import Grid
from ssl_dist.run import folder
from ssl_dist.slurm import status
from ssl_dist.verify import command as verify

RECORD = {
    "name": "knn20_top1", "value": 97.514, "protocol": "kNN", "options": {}, "dataset": "digits", "split": "test",
    "data": "d", "seed": 0, "method": "relational", "backbone": "conv4", "checkpoint": "c", "step": 40, "time": "t",
}  # fmt: skip


def test_of_results():
    records = [
        RECORD,
        RECORD | {"name": "logistic_top1", "value": 8.0, "protocol": "linear", "method": "simclr", "step": 1200},
        RECORD | {"name": "logistic_converged", "value": 0.0, "protocol": "linear"},
        RECORD | {"name": "clusters_nmi", "value": 0.17352},
    ]
    expected = """\
method      backbone  step  data set  split  result                      value
-----------------------------------------------------------------------------------
relational  conv4       40  digits    test   knn20_top1                  97.51  [1]
simclr      conv4     1200  digits    test   logistic_top1                8.00  [2]
relational  conv4       40  digits    test   logistic_converged  NOT CONVERGED  [2]
relational  conv4       40  digits    test   clusters_nmi               0.1735  [1]

[1] kNN
[2] linear"""
    assert results.table(records) == expected


def test_of_seeds():
    record = RECORD | {"run": "first", "mean": 91.1667, "std": 1.2583, "seeds": [0, 1, 2]}
    other = record | {"run": "another-run", "std": None, "seeds": [4], "protocol": "linear", "name": "logistic_top1"}
    expected = """\
run          method      backbone  step  data set  split  result         mean ± std    seeds
-------------------------------------------------------------------------------------------------
first        relational  conv4     40    digits    test   knn20_top1     91.17 ± 1.26  3      [1]
another-run  relational  conv4     40    digits    test   logistic_top1  91.17         1      [2]

[1] kNN
[2] linear"""
    assert report.table([record, other]) == expected


def test_of_jobs(tmp_path, monkeypatch):
    monkeypatch.setattr(status.shutil, "which", lambda _: "/usr/bin/scontrol")
    answers = {"17": {"JobState": "PENDING", "Reason": "Priority"}, "1234": {"JobState": "RUNNING", "Restarts": "1"}}
    monkeypatch.setattr(status, "job_of", lambda job: answers.get(job, {}))
    monkeypatch.chdir(tmp_path)
    note = tmp_path / "runs" / "digits" / "slurm" / "jobs.jsonl"
    note.parent.mkdir(parents=True)
    jobs = [{"job": job, "kind": kind} for job, kind in (("17", "train"), ("1234", "evaluate"), ("9", "train"))]
    note.write_text("".join(json.dumps(job) + "\n" for job in jobs))
    expected = """\
job   what      state              run          step  epoch  images/s  time left  checkpoint  why
17    train     PENDING            runs/digits                                                Priority
1234  evaluate  RUNNING (start 2)  runs/digits
9     train     gone               runs/digits"""
    assert status.table([]) == expected


def test_the_length_of_a_prolonged_run_is_that_of_its_newest_start(monkeypatch, tmp_path):
    """config.yaml keeps the first; a start that is being noted does not count."""
    monkeypatch.setattr(status.shutil, "which", lambda _: "/usr/bin/scontrol")
    monkeypatch.setattr(status, "job_of", lambda job: {"JobState": "RUNNING"})
    run = tmp_path / "run"
    for name in ("slurm", "logs"):
        (run / name).mkdir(parents=True)
    (run / "slurm" / "jobs.jsonl").write_text('{"job": "17", "kind": "train"}\n')
    line = {"step": 150, "epoch": 15.0, "seconds_per_step": 2.0, "images_per_s": 32.0}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")

    def of_length(steps):
        tree = {"run_dir": "run", "data": {"name": "digits", "root": "d"}, "optim": {"epochs": None, "steps": steps}}
        return config.validate(config.Config, tree)

    (run / "config.yaml").write_text(config.dump(of_length(100)))
    assert status.table([run]).splitlines()[1].split()[4:] == ["150/100", "15.0", "32", "0:00"], "no start is noted"
    for steps in (100, 200):
        folder.note_start(run, of_length(steps), 0, 1)
    with open(run / "logs" / "starts.jsonl", "a") as file:
        file.write('{"config": {"optim": {"st')
    assert status.table([run]).splitlines()[1].split()[4:] == ["150/200", "15.0", "32", "1:40"]


def test_of_a_certificate():
    def row(method, variant, precision, figures, holds):
        case = SimpleNamespace(method=method, variant=variant, config=SimpleNamespace(precision=precision))
        return SimpleNamespace(case=case, grid=Grid(2, 1), figures=figures, holds=holds)

    equal = dict.fromkeys(("loss", "head", "deep", "buffers", "weights"), 1e-16)
    rows = [
        row("relational", "", "fp64", equal, True),
        row("deepcluster", "multicrop", "fp32", {"loss": 0.25}, False),
    ]
    expected = """\
method       variant    precision  grid  loss     head     deep     buffers  weights
relational              fp64       2x1   1.0e-16  1.0e-16  1.0e-16  1.0e-16  1.0e-16  equal
deepcluster  multicrop  fp32       2x1   2.5e-01  -        -        -        -        DIFFERENT"""
    assert verify.table(rows) == expected


def test_other_forms():
    head, rows = ["a|b", "mean"], [["x_1 & 50%", "91.17 ± 1.26 (-3.1)"], ["[2], lr 1e-3", "–"]]
    assert text_table.as_markdown(head, rows, {1}) == [
        "| a\\|b | mean |", "|---|---:|", "| x_1 & 50% | 91.17 ± 1.26 (-3.1) |", "| [2], lr 1e-3 | – |",
    ]  # fmt: skip
    assert (
        text_table.as_latex(head, rows, {1}, ["of\nnobody"])
        == r"""% \usepackage{booktabs}
% of nobody
\begin{tabular}{lr}
\toprule
a\textbar{}b & mean \\
\midrule
x\_1 \& 50\% & 91.17 $\pm$ 1.26 ($-$3.1) \\
{}[2], lr 1e-3 & -- \\
\bottomrule
\end{tabular}
"""
    )
    assert text_table.in_latex(r"a\b{c}$#~^<") == (
        r"a\textbackslash{}b\{c\}\$\#\textasciitilde{}\textasciicircum{}\textless{}"
    )
    assert list(csv.reader(text_table.as_csv(head, [['a,"b', None]]).splitlines())) == [head, ['a,"b', ""]]
