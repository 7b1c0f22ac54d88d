"""Trainings on a real Slurm cluster of two nodes: after interruptions of every kind the weights are the same."""

import contextlib
import io
import json
import re
import runpy
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
import torch

from ssl_dist import cli, config
from ssl_dist.errors import UserError
from ssl_dist.slurm.script import read_site
from ssl_dist.storage import checkpoint
from tests import ranks
from tests.processes import running, send, until
from tests.test_train import CONFIG, fingerprint, in_ranks, metrics, overrides, run_training, weights

ROOT = Path(__file__).parent.parent
SUBMIT = [sys.executable, str(ROOT / "slurm" / "submit.py")]
OPTIONS = [
    "optim.steps=60", "checkpoint.every_epochs=null", "log.every_steps=1", "log.images_every_epochs=1000",
    "precision=fp64", "timeout=15",
]  # fmt: skip
FIRST_STEPS = 5  # after which a start counts as running
TWO_NODES = ("--nodes", "2", "--tasks-per-node", "1", "--cpus-per-task", "1", "--time", "00:10:00")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def training(data, run, *more):
    return ["train", str(ROOT / CONFIG), *overrides(data, run, *OPTIONS, *more)]


def submit(cluster, folder, *words):
    """The ids of the jobs that submit.py names, in its order."""
    return job_ids(submit_py(cluster, folder, *words))


def submit_py(cluster, folder, *words):
    """The output of submit.py, called in this process, because another one would have to import torch."""
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        for name, value in cluster.environment.items():
            patch.setenv(name, value)
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["submit.py", *map(str, words)])
        assert runpy.run_path(SUBMIT[1])["main"]() == 0
    return output.getvalue()


def job_ids(output):
    return re.findall(r"^job (\S+):", output, re.MULTILINE)


def step_of(run):
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def wait_for_steps(cluster, job, run, steps=FIRST_STEPS):
    """Wait until the training has taken some steps."""
    until(lambda: step_of(run) >= steps, lambda: cluster.diagnosis(job), 120)


def starts(run):
    path = run / "logs" / "starts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def output(cluster, job):
    """The output of all tasks of the job."""
    folder = Path(cluster.job(job)["StdOut"]).parent
    return "".join(path.read_text() for path in sorted(folder.glob("*.out")))


@pytest.fixture(scope="module")
def two_nodes(_cluster, digits, tmp_path_factory):
    """The folder of an uninterrupted run on two nodes."""
    folder = tmp_path_factory.mktemp("two-nodes")
    [job] = job_ids(_cluster.run(*SUBMIT, *training(digits, folder / "run"), *TWO_NODES, cwd=folder))
    _cluster.wait(job, "COMPLETED", deadline=120)
    return folder / "run"


def assert_equal_runs(run, two_nodes):
    assert fingerprint(run) == fingerprint(two_nodes)
    assert metrics(run) == metrics(two_nodes)


def test_two_nodes_equal_one_process(two_nodes, digits, tmp_path):
    assert run_training(digits, tmp_path / "one", *OPTIONS, "optim.steps=20") == 0
    assert run_training(digits, tmp_path / "one", *OPTIONS) == 0
    one, two = weights(tmp_path / "one"), weights(two_nodes)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
    assert starts(two_nodes)[0]["world_size"] == 2
    [folder] = (two_nodes / "slurm").glob("[0-9]*")
    names = sorted(path.name.partition("_")[2] for path in folder.iterdir())
    assert {"0_log.out", "1_log.out", "submission.sh"} <= set(names), names
    [saved_config] = (two_nodes / "slurm").glob("config-*.yaml")
    assert config.load(saved_config) == config.load(two_nodes / "config.yaml")


class InterruptedJob:
    """A job of two nodes and its run, which several tests interrupt one after another."""

    def __init__(self, cluster, job, run):
        self.cluster, self.job, self.run = cluster, job, run

    def wait_until_running(self):
        """Wait until the newest start has taken steps that no start before it had; returns the number of starts."""
        count = int(self.cluster.wait(self.job, "RUNNING", deadline=120)["Restarts"]) + 1
        until(lambda: len(starts(self.run)) == count, lambda: self.cluster.diagnosis(self.job), 120)
        least = max(step_of(self.run), starts(self.run)[-1]["step"]) + FIRST_STEPS
        wait_for_steps(self.cluster, self.job, self.run, least)
        return count

    def wait_for_next_start(self, count):
        """Wait for the start after the first `count`; returns the step that it begins at."""
        until(lambda: len(starts(self.run)) > count, lambda: self.cluster.diagnosis(self.job), 120)
        assert len(starts(self.run)) == count + 1 and self.cluster.job(self.job)["Restarts"] == str(count)
        return starts(self.run)[-1]["step"]


VIEW_SHARDS = "data.view_shards=2"  # else ranks on one machine share views, and ranks on two machines share images


@pytest.fixture(scope="class")
def interrupted(_cluster, digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupted")
    file = folder / "mine.yaml"
    file.write_text((ROOT / CONFIG).read_text())
    more = [VIEW_SHARDS, "optim.steps=30000", "checkpoint.every_steps=5", "--partition", "main"]
    [job] = submit(_cluster, folder, "train", file, *training(digits, folder / "run", *more)[2:], *TWO_NODES)
    file.write_text("nonsense")  # a later edit must not change this job
    yield InterruptedJob(_cluster, job, folder / "run")
    _cluster.clear()


class TestOneInterruptedTraining:
    """One job, interrupted in every way one after another; the weights are those of an uninterrupted run."""

    def test_usr2_saves_and_the_job_is_requeued(self, interrupted):
        count = interrupted.wait_until_running()
        interrupted.cluster.signal(interrupted.job, "USR2")
        step = interrupted.wait_for_next_start(count)
        assert step >= starts(interrupted.run)[-2]["step"] + FIRST_STEPS
        assert f"stopping after step {step}" in output(interrupted.cluster, interrupted.job)

    def test_preemption_by_a_higher_partition(self, interrupted, tmp_path):
        count = interrupted.wait_until_running()
        script = tmp_path / "urgent.sh"
        script.write_text("#!/bin/bash\nsleep 2\n")
        options = ("--partition", "high", "--nodes", "2", "--exclusive")
        urgent = interrupted.cluster.submit(script, options=options)
        interrupted.cluster.wait(urgent, "COMPLETED")
        step = interrupted.wait_for_next_start(count)
        assert step >= starts(interrupted.run)[-2]["step"] + FIRST_STEPS, "the preempted job has saved"
        assert f"stopping after step {step}" in output(interrupted.cluster, interrupted.job)

    def test_a_killed_task_is_named_and_the_job_requeued(self, interrupted):
        count = interrupted.wait_until_running()
        send(interrupted.cluster.pids_of(interrupted.job, task=1), signal.SIGKILL)
        step = interrupted.wait_for_next_start(count)
        text = output(interrupted.cluster, interrupted.job)
        assert re.search(r"lost rank 1 on \S+ \(pid \d+\) at step \d+: no sign of life", text)
        assert len((interrupted.run / "slurm" / f"crashes-{interrupted.job}.txt").read_text().splitlines()) == 1
        assert step % 5 == 0 and step > starts(interrupted.run)[-2]["step"]

    def test_a_crashed_node_requeues_the_job(self, interrupted):
        count = interrupted.wait_until_running()
        cluster = interrupted.cluster
        cluster.crash_node(cluster.nodes[1])
        until(
            lambda: cluster.job(interrupted.job)["JobState"] == "PENDING",
            lambda: cluster.diagnosis(interrupted.job),
            90,
        )
        cluster.start_node(cluster.nodes[1])
        step = interrupted.wait_for_next_start(count)
        assert step % 5 == 0 and step > starts(interrupted.run)[-2]["step"]

    def test_scancel_saves_and_stays_cancelled(self, interrupted):
        count = interrupted.wait_until_running()
        interrupted.cluster.cancel(interrupted.job)
        interrupted.cluster.wait(interrupted.job, "CANCELLED")
        step = starts(interrupted.run)[-1]["step"] + FIRST_STEPS
        until(
            lambda: checkpoint.steps(interrupted.run)[-1] >= step,
            lambda: interrupted.cluster.diagnosis(interrupted.job),
        )
        time.sleep(8)  # longer than a requeue takes here
        record = interrupted.cluster.job(interrupted.job)
        assert record["JobState"] == "CANCELLED" and record["Restarts"] == str(count - 1)
        assert len(starts(interrupted.run)) == count
        assert f"stopping after step {step_of(interrupted.run)}" in output(interrupted.cluster, interrupted.job)

    def test_the_weights_are_those_of_an_uninterrupted_run(self, interrupted, digits, tmp_path):
        """Two ranks without Slurm, up to the same step."""
        steps = checkpoint.steps(interrupted.run)[-1]
        more = [*OPTIONS, VIEW_SHARDS, f"optim.steps={steps}"]
        assert ranks.launch(in_ranks, 2, tmp_path, digits, tmp_path / "run", *more) == [0, 0]
        assert_equal_runs(interrupted.run, tmp_path / "run")


def test_a_crash_above_the_limit_ends_the_job(cluster, digits, tmp_path):
    run = tmp_path / "run"
    site = tmp_path / "site.yaml"
    site.write_text("crashes: 0\nnodes: 1\ntasks_per_node: 1\ncpus_per_task: 1\n")
    [job] = submit(cluster, tmp_path, *training(digits, run), "--site", site)
    wait_for_steps(cluster, job, run)
    send(cluster.pids_of(job, task=0), signal.SIGKILL)
    assert cluster.wait(job, "FAILED", deadline=90)["Restarts"] == "0"


def test_an_array_is_requeued_and_each_seed_evaluated(cluster, digits, tmp_path, capsys):
    """The last element has the array's own job number."""
    words = training(digits, tmp_path / "run", "optim.steps=90", "precision=fp32", "data.view_shards=1")
    more = ["--time", "00:10:00", "--cpus-per-task", "1", "--seeds", "3", "4", "--then", "knn", "knn.k=[5]"]
    jobs = submit(cluster, tmp_path, *words, *more, "--array-parallelism", "2")
    assert cluster.job(jobs[0])["ArrayTaskThrottle"] == "2"
    array, runs = jobs[0].partition("_")[0], [tmp_path / f"run-seed{seed}" for seed in (3, 4)]
    assert jobs[:2] == [f"{array}_0", f"{array}_1"] and len(jobs) == 4
    assert all(cluster.job(job)["Dependency"].startswith(f"afterok:{array}_") for job in jobs[2:])
    for job, run in zip(jobs[:2], runs, strict=True):
        wait_for_steps(cluster, job, run, steps=2)
    cluster.signal(array, "USR2")
    for job, run in zip(jobs[:2], runs, strict=True):
        cluster.wait(job, "COMPLETED", restarts=1, deadline=150)
        assert len(starts(run)) == 2 and starts(run)[1]["step"] > 0 and checkpoint.steps(run)[-1] == 90
    for job in jobs[2:]:
        cluster.wait(job, "COMPLETED", deadline=150)
    records_of_runs = [json.loads((run / "results.json").read_text()) for run in runs]
    assert [records[0]["seed"] for records in records_of_runs] == [3, 4]
    assert cli.main(["report", *map(str, runs)]) == 0 and "±" in capsys.readouterr().out
    status = submit_py(cluster, tmp_path, "status", *runs)
    assert len(re.findall(r"COMPLETED", status)) == 4 and status.count("90/90") == 2, status


def test_a_failing_training_cancels_its_evaluation(cluster, digits, tmp_path):
    """In the partition with GPUs, by the site's way to ask for them and through its interpreter."""
    site = tmp_path / "site.yaml"
    site.write_text(
        "crashes: 0\npartition: gpu\ngpus_per_node: 1\ngres: gpu\nsrun: ['--export=ALL,BY_SRUN=it']\n"
        f"python: sh -c 'echo started by $BY_SRUN; exec {sys.executable} \"$@\"' prefix\n"
    )
    more = ["optim.name=sgd", "optim.lr=1e38"]
    parent, child = submit(
        cluster, tmp_path, *training(digits, tmp_path / "run", *more), "--site", site, "--then", "knn"
    )
    cluster.wait(parent, "FAILED", deadline=90)
    cluster.wait(child, "CANCELLED")
    said = output(cluster, parent)
    assert "the loss is not finite" in said and "started by it" in said
    record = cluster.job(parent)
    assert record["TresPerNode"] == "gres/gpu:1" or record["TresPerNode"] == "gres:gpu:1", record["TresPerNode"]
    assert record["CPUs/Task"] == "2", "half of the node's cores, as it has two GPUs"


@pytest.fixture(scope="class")
def jobs(_cluster, digits, tmp_path_factory):
    """The folder, and name -> job."""
    folder = tmp_path_factory.mktemp("several")
    site = folder / "site.yaml"
    site.write_text(f"nodes: 1\ntasks_per_node: 2\ncpus_per_task: 1\nsbatch: {{nodelist: {_cluster.nodes[0]}}}\n")
    more = ["optim.steps=30000", "data.view_shards=1"]
    jobs = {}
    for name in "ab":
        [jobs[name]] = submit(_cluster, folder, *training(digits, folder / name, *more), "--site", site)
    both_nodes = ("--nodes", "2", "--tasks-per-node", "4", "--cpus-per-task", "1")
    [jobs["c"]] = submit(_cluster, folder, *training(digits, folder / "c"), *both_nodes)
    for name in "ab":
        wait_for_steps(_cluster, jobs[name], folder / name, steps=10)
    yield folder, jobs
    _cluster.clear()


class TestSeveralJobs:
    """Two jobs on one node, and one that waits for both nodes."""

    def test_side_by_side_on_one_node(self, _cluster, jobs):
        folder, jobs = jobs
        both = [_cluster.job(jobs[name]) for name in "ab"]
        assert [(job["JobState"], job["NodeList"]) for job in both] == [("RUNNING", _cluster.nodes[0])] * 2
        before = {name: step_of(folder / name) for name in "ab"}
        until(lambda: all(step_of(folder / name) > step for name, step in before.items()), "both jobs to take a step")
        first, second = (metrics(folder / name)[:10] for name in "ab")
        assert first == second, "the two jobs do not interfere"

    def test_status(self, _cluster, jobs):
        folder, jobs = jobs
        until(lambda: _cluster.job(jobs["c"])["Reason"] != "None", "the reason why it waits")
        lines = submit_py(_cluster, folder, "status", folder / "a", folder / "c").splitlines()
        assert re.search(rf"^{jobs['a']} +train +RUNNING +\S+/a +\d+/30000 +\d+\.\d +[\d.]+ +\d+:\d\d", lines[1]), lines
        assert re.search(rf"^{jobs['c']} +train +PENDING +\S+/c .*(Resources|Priority)$", lines[2]), lines


def test_the_plain_script_does_the_same(cluster, two_nodes, digits, tmp_path):
    run = tmp_path / "run"
    options = ("--nodes", "2", "--ntasks-per-node", "1", "--time", "00:10:00")
    script = ROOT / "slurm" / "train.sbatch"
    refused = cluster.submit(script, CONFIG, options=options, cwd=tmp_path)
    assert cluster.wait(refused, "FAILED")["ExitCode"] == "2:0"
    options += ("--cpus-per-task", "1")
    job = cluster.submit(script, *training(digits, run)[1:], options=options, cwd=tmp_path, PYTHON=sys.executable)
    wait_for_steps(cluster, job, run)
    cluster.signal(job, "USR2")
    cluster.wait(job, "COMPLETED", restarts=1, deadline=120)
    assert_equal_runs(run, two_nodes)


@pytest.mark.timeout(400)
def test_the_time_limit(cluster, digits, tmp_path):
    """Before the time limit the training saves; the next start resumes it."""
    run = tmp_path / "run"
    site = tmp_path / "site.yaml"
    site.write_text('nodes: 1\ntasks_per_node: 1\ncpus_per_task: 1\ntime: "00:01:00"\nsignal_seconds: 20\n')
    [job] = submit(cluster, tmp_path, *training(digits, run, "optim.steps=100000"), "--site", site)
    cluster.wait(job, "PENDING", restarts=1, deadline=150)
    saved = checkpoint.steps(run)
    assert len(saved) == 1 and saved[0] > 10
    cluster.wait(job, "RUNNING", restarts=1)
    until(lambda: len(starts(run)) == 2, lambda: cluster.diagnosis(job))
    assert starts(run)[1]["step"] == saved[0]


@pytest.mark.timeout(400)
def test_a_cut_link_ends_both_ranks_and_only_the_next_start_writes(network_cluster, digits, tmp_path):
    cluster, run = network_cluster, tmp_path / "run"
    more = ["optim.steps=160", "checkpoint.every_steps=80"]
    [job] = submit(cluster, tmp_path, *training(digits, run, *more), *TWO_NODES)
    wait_for_steps(cluster, job, run)
    ranks = [pid for task in range(2) for pid in cluster.pids_of(job, task=task)]
    wait_for_steps(cluster, job, run, 81)  # not in a save, for which a rank waits for minutes
    cluster.cut(cluster.nodes[1])
    cut_at = time.monotonic()

    def what_runs():
        paths = [*(run / "slurm").rglob("*.out"), *(run / "logs").glob("rank-*.log"), *(run / "logs").glob("error-*")]
        logs = "".join(f"\n== {path.name}\n{path.read_text()[-2000:]}" for path in paths)
        return f"the end of {running(ranks)}{logs}\n{cluster.diagnosis(job)}"

    until(lambda: not running(ranks), what_runs, 60)
    assert time.monotonic() - cut_at < 15 + 10 + 10  # the run's timeout, what is allowed on top, and the polling
    before = checkpoint.steps(run)
    cluster.mend(cluster.nodes[1])
    cluster.wait(job, "COMPLETED", restarts=1, deadline=200)
    assert starts(run)[1]["step"] == before[-1]


# ---------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--partition", "nowhere"], "sbatch refuses the job: .*partition"),
        (["optim.lr=-1"], "optim.lr"),
        (["--nodes", "3", "--tasks-per-node", "1"], "3 ranks cannot share"),
        (["--then", "knn.k=[5]"], "name at least one evaluator"),
        (["--then", "nn"], "did you mean 'knn'"),
        (["--seeds", "-1"], "seed"),
        (["--seeds", "1", "1"], "name every one once"),
        (["--time", "00:04:00"], "must be more than twice signal_seconds"),
        (["--sweep", "optim.lr"], "write key=.value, value."),
        (["--sweep", "optim.rl=[1,2]"], "optim.rl"),
        (["--time", "soon"], "time"),
        (["--site", "none.yaml"], "--site none.yaml: cannot be read"),
        (["data.view_shards=3"], "data.view_shards"),
    ],
)
def test_mistakes_are_reported_before_anything_is_submitted(
    cluster, digits, tmp_path, arguments, message, monkeypatch, capsys
):
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    line = error_line([*training(digits, tmp_path / "run"), *TWO_NODES, *arguments], monkeypatch, capsys)
    assert re.search(message, line)
    assert cluster.run("squeue", "-h") == "" and not (tmp_path / "run").exists()


def test_what_a_job_must_ask_of_its_nodes(cluster, monkeypatch, capsys):
    """And what the message advises is taken."""
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    train = ["train", str(ROOT / CONFIG), "--dry-run"]
    for words, message, remedy in (
        (["--tasks-per-node", "2"], "--cpus-per-task: .*a node of the default partition has 4", "--cpus-per-task 2"),
        (["--partition", "gpu"], "--gpus-per-node: the nodes of partition gpu have 2 GPUs", "--gpus-per-node 2"),
        (["--partition", "gpu", "--gpus-per-node", "3"], "no node of partition gpu has more than 2", None),
    ):
        line = error_line([*train, *words], monkeypatch, capsys)
        assert re.search(message, line)
        if remedy:
            assert remedy in line and run_submit([*train, *words, *remedy.split()], monkeypatch) == 0
            assert "#SBATCH --cpus-per-task=2\n" in capsys.readouterr().out
    assert run_submit([*train, "--partition", "gpu", "--tasks-per-node", "1", "--cpus-per-task", "1"], monkeypatch) == 0
    assert "partition gpu have GPUs, and these ranks run on CPUs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("foo: 1", {}, "unknown key --site FILE: foo = 1"),
        ("nodes: two", {"nodes": 1}, "--site FILE: nodes = 'two': input should be a valid integer"),
        ('partition: "a\\nb"', {}, "--site FILE: partition = 'a\\nb'"),
        ('sbatch: {"a\\nb": 1}', {}, "--site FILE: sbatch"),
        ("gres: gpu:h100:4", {}, "--site FILE: gres = 'gpu:h100:4'"),
        (
            "nodes: 1",
            {"gres": "gpu:h100"},
            "--gres gpu:h100: says how GPUs are asked for, and none are; give --gpus-per-node too",
        ),
        ("gpus_per_node: 1", {"gres": ""}, "gres = ''"),
        ("gpus_per_node: 1", {"gres": "gpu:h100 --exclusive"}, "gres = 'gpu:h100 --exclusive'"),
        ("nodes: 1", {"array_parallelism": 0}, "array_parallelism = 0"),
    ],
)
def test_a_site_that_is_none(tmp_path, text, words, message):
    file = tmp_path / "site.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        read_site(file, words)
    assert message in str(caught.value).replace(str(file), "FILE")


def test_a_dry_run_names_the_elements_and_needs_no_data(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    words = ["train", str(ROOT / CONFIG), "data.root=/nowhere", "run_dir=runs/a", "--gpus-per-node", "8", "--dry-run"]
    assert "--cpus-per-task 8" in error_line(words, monkeypatch, capsys)
    words += ["--cpus-per-task", "8", "--seeds", "1", "2", "--sweep", "optim.lr=[0.1,0.2]"]
    assert run_submit(words, monkeypatch) == 0
    elements = [f"# {i}: runs/a-lr{lr}-seed{seed}" for i, (lr, seed) in enumerate(product((0.1, 0.2), (1, 2)))]
    assert capsys.readouterr().out.splitlines()[-4:] == elements


def error_line(words, monkeypatch, capsys):
    """The one line of submit.py's stderr."""
    monkeypatch.setattr(sys, "argv", ["submit.py", *words])
    assert runpy.run_path(SUBMIT[1])["main"]() == 2
    [line] = capsys.readouterr().err.splitlines()
    return line


def test_without_slurm(digits, tmp_path, monkeypatch, capsys):
    words = [*training(digits, tmp_path / "run"), *TWO_NODES]
    monkeypatch.setenv("PATH", "/nowhere")
    assert "sbatch: not found; run this on a machine of the cluster" in error_line(words, monkeypatch, capsys)
    assert "none.yaml: cannot be read" in error_line(["train", "none.yaml", *TWO_NODES], monkeypatch, capsys)
    assert "scontrol: not found" in error_line(["status"], monkeypatch, capsys)
    monkeypatch.setattr(sys, "argv", ["submit.py", *words, "--dry-run"])
    assert runpy.run_path(SUBMIT[1])["main"]() == 0 and "#SBATCH --nodes=2" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("number", "tasks"), [(signal.SIGTERM, 2), (signal.SIGINT, 1)])
def test_local_signals_reach_the_ranks_and_exit_codes_are_returned(digits, tmp_path, number, tasks):
    run = tmp_path / "run"
    words = [*training(digits, run, "optim.steps=3000"), "--tasks-per-node", str(tasks), "--cluster", "local"]
    process = subprocess.Popen([*SUBMIT, *words], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    until(lambda: step_of(run) > 2, "the first steps")
    process.send_signal(number)
    _, stderr = process.communicate(timeout=150)
    assert process.returncode == 75 and "stopping after step" in stderr and "Traceback" not in stderr
    assert checkpoint.steps(run)


def run_submit(words, monkeypatch):
    """The exit code of submit.py in this process."""
    monkeypatch.setattr(sys, "argv", ["submit.py", *words])
    return runpy.run_path(SUBMIT[1])["main"]()


def test_a_local_failure_is_returned_and_no_evaluation_follows(digits, tmp_path, monkeypatch, capfd):
    words = training(digits, tmp_path / "run", "optim.name=sgd", "optim.lr=1e38")
    more = ["--tasks-per-node", "1", "--cluster", "local", "--then", "knn"]
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGCONT)]
    assert run_submit([*words, *more], monkeypatch) == 1
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR2, signal.SIGCONT)] == handlers
    errors = capfd.readouterr().err
    assert "the loss is not finite" in errors and "features" not in errors


def test_the_same_job_runs_locally(digits, tmp_path, monkeypatch):
    words = [*training(digits, tmp_path / "run", "optim.steps=4"), "--tasks-per-node", "2", "--cluster", "local"]
    assert run_submit([*words, "--then", "knn", "knn.k=[5]"], monkeypatch) == 0
    assert starts(tmp_path / "run")[0]["world_size"] == 2 and checkpoint.steps(tmp_path / "run") == [4]
    assert json.loads((tmp_path / "run" / "results.json").read_text())


def test_a_search_is_one_job(cluster, digits, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    assert run_training(digits, run) == 0
    words = ["evaluate", str(run), "knn", "data.subset={per_class: 20}", "--search", "knn.k=[[1],[5]]"]
    [job] = submit(cluster, tmp_path, *words, "--validation", "0.25", "--cpus-per-task", "1")
    cluster.wait(job, "COMPLETED", deadline=100)
    splits = [r["split"] for r in json.loads((run / "results.json").read_text()) if r["name"].endswith("top1")]
    assert splits == ["train[held out 25%]", "train[held out 25%]", "test"]
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    for arguments, message in (
        (["--validation", "2"], "--validation 2: give the share"),
        (["--search", "knn.kk=[1]"], "unknown key knn.kk"),
        (["data.subset=3"], "data.subset = 3"),
    ):
        capsys.readouterr()
        assert message in error_line(["evaluate", str(run), "knn", *arguments], monkeypatch, capsys)


def test_a_fine_tuning_on_two_nodes_resumes_after_a_stop(cluster, digits, tmp_path):
    """One process, and two ranks with a stop in between: the same accuracies."""
    values = {}
    for name in ("one_process", "two_ranks"):
        assert run_training(digits, tmp_path / name, "precision=fp64", "timeout=15") == 0
    words = ["finetune", "finetune.epochs=8", "finetune.batch_size=32", "data.subset={per_class: 40}"]
    assert cli.main(["evaluate", str(tmp_path / "one_process"), *words]) == 0
    run = tmp_path / "two_ranks"
    [job] = submit(cluster, tmp_path, "evaluate", str(run), *words, *TWO_NODES)
    until(lambda: list(run.glob("evaluations/*/checkpoints/step-*.pt")), lambda: cluster.diagnosis(job))
    cluster.signal(job, "USR2")
    cluster.wait(job, "COMPLETED", restarts=1, deadline=150)
    for name in ("one_process", "two_ranks"):
        values[name] = [r["value"] for r in json.loads((tmp_path / name / "results.json").read_text())]
    assert values["one_process"] == values["two_ranks"] and len(values["one_process"]) == 2
    status = submit_py(cluster, tmp_path, "status", run)
    assert "evaluate" in status and "COMPLETED" in status
