"""Trainings on a real Slurm of two nodes: what happens to them, in what order, and that the weights do not notice."""

import json
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ssl_dist import config
from ssl_dist.storage import checkpoint
from tests.processes import send, until
from tests.test_train import CONFIG, fingerprint, metrics, overrides, run_training, weights

ROOT = Path(__file__).parent.parent
SUBMIT = [sys.executable, str(ROOT / "slurm" / "submit.py")]
OWN = [
    "optim.steps=90", "checkpoint.every_epochs=null", "log.every_steps=1", "log.images_every_epochs=1000",
    "precision=fp64", "timeout=15",
]  # fmt: skip
TWO_NODES = ("--nodes", "2", "--tasks-per-node", "1", "--time", "00:10:00")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def training(data, run, *more):
    return ["train", str(ROOT / CONFIG), *overrides(data, run, *OWN, *more)]


def submit(cluster, folder, *words):
    """The ids of the jobs that submit.py names, in its order."""
    return re.findall(r"^job (\S+):", cluster.run(*SUBMIT, *words, cwd=folder), re.MULTILINE)


def step_of(run):
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def has_begun(cluster, job, run, steps=10):
    """Wait until the training has taken some steps."""
    until(lambda: step_of(run) >= steps, lambda: cluster.story(job))


def starts(run):
    return [json.loads(line) for line in (run / "logs" / "starts.jsonl").read_text().splitlines()]


def output(cluster, job):
    """What all tasks of the job have said."""
    folder = Path(cluster.job(job)["StdOut"]).parent
    return "".join(path.read_text() for path in sorted(folder.glob("*.out")))


@pytest.fixture(scope="module")
def two_nodes(_cluster, digits, tmp_path_factory):
    """A run of two nodes that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("two-nodes")
    [job] = submit(_cluster, folder, *training(digits, folder / "run"), *TWO_NODES)
    _cluster.wait(job, "COMPLETED", deadline=120)
    return folder / "run"


def assert_undisturbed(run, two_nodes):
    assert fingerprint(run) == fingerprint(two_nodes)
    assert metrics(run) == metrics(two_nodes)


def test_two_nodes_equal_one_process(two_nodes, digits, tmp_path):
    assert run_training(digits, tmp_path / "one", *OWN, "optim.steps=20") == 0
    assert run_training(digits, tmp_path / "one", *OWN) == 0
    one, two = weights(tmp_path / "one"), weights(two_nodes)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
    assert starts(two_nodes)[0]["world_size"] == 2
    [folder] = (two_nodes / "slurm").glob("[0-9]*")
    left = sorted(path.name.partition("_")[2] for path in folder.iterdir())
    assert {"0_log.out", "1_log.out", "submission.sh"} <= set(left), left
    [kept] = (two_nodes / "slurm").glob("config-*.yaml")
    assert config.load(kept) == config.load(two_nodes / "config.yaml")


def test_usr2_saves_and_the_job_is_queued_again_and_finishes(cluster, two_nodes, digits, tmp_path):
    run = tmp_path / "run"
    [job] = submit(cluster, tmp_path, *training(digits, run), *TWO_NODES)
    has_begun(cluster, job, run)
    cluster.signal(job, "USR2")
    cluster.wait(job, "COMPLETED", restarts=1, deadline=120)
    first, second = starts(run)
    assert first["step"] == 0 and 10 <= second["step"] < 90
    assert f"stopping after step {second['step']}" in output(cluster, job)
    assert_undisturbed(run, two_nodes)


def test_preemption_by_a_higher_partition(cluster, two_nodes, digits, tmp_path):
    run = tmp_path / "run"
    [job] = submit(cluster, tmp_path, *training(digits, run), *TWO_NODES)
    has_begun(cluster, job, run)
    script = tmp_path / "urgent.sh"
    script.write_text("#!/bin/bash\nsleep 2\n")
    options = ("--partition", "high", "--nodes", "2", "--exclusive")
    urgent = cluster.submit(script, options=options)
    cluster.wait(urgent, "COMPLETED")
    cluster.wait(job, "COMPLETED", restarts=1, deadline=120)
    assert starts(run)[1]["step"] >= 10, "it had saved before it left"
    assert_undisturbed(run, two_nodes)


def test_a_killed_task_is_named_and_the_job_queued_again(cluster, two_nodes, digits, tmp_path):
    run = tmp_path / "run"
    [job] = submit(cluster, tmp_path, *training(digits, run, "checkpoint.every_steps=5"), *TWO_NODES)
    has_begun(cluster, job, run)
    send(cluster.pids_of(job, task=1), signal.SIGKILL)
    cluster.wait(job, "COMPLETED", restarts=1, deadline=120)
    assert re.search(r"lost rank 1 on \S+ \(pid \d+\) at step \d+: no sign of life", output(cluster, job))
    assert len((run / "slurm" / f"crashes-{job}.txt").read_text().splitlines()) == 1
    assert starts(run)[1]["step"] % 5 == 0 and starts(run)[1]["step"] > 0
    assert_undisturbed(run, two_nodes)


def test_a_crash_that_comes_again_ends_the_job(cluster, digits, tmp_path):
    run = tmp_path / "run"
    site = tmp_path / "site.yaml"
    site.write_text("crashes: 0\nnodes: 2\ntasks_per_node: 1\n")
    [job] = submit(cluster, tmp_path, *training(digits, run), "--site", site)
    has_begun(cluster, job, run)
    send(cluster.pids_of(job, task=0), signal.SIGKILL)
    assert cluster.wait(job, "FAILED", deadline=90)["Restarts"] == "0"


def test_the_crash_of_a_node(cluster, two_nodes, digits, tmp_path):
    run = tmp_path / "run"
    [job] = submit(cluster, tmp_path, *training(digits, run, "checkpoint.every_steps=5"), *TWO_NODES)
    has_begun(cluster, job, run)
    cluster.crash_node(cluster.nodes[1])
    until(lambda: cluster.job(job)["JobState"] == "PENDING", lambda: cluster.story(job), 90)
    cluster.start_node(cluster.nodes[1])
    cluster.wait(job, "COMPLETED", restarts=1, deadline=150)
    assert_undisturbed(run, two_nodes)


def test_scancel_saves_and_stays_cancelled(cluster, digits, tmp_path):
    run = tmp_path / "run"
    [job] = submit(cluster, tmp_path, *training(digits, run), *TWO_NODES)
    has_begun(cluster, job, run)
    cluster.cancel(job)
    cluster.wait(job, "CANCELLED")
    until(lambda: checkpoint.steps(run), lambda: cluster.story(job))
    time.sleep(8)  # longer than a requeue takes here
    assert cluster.job(job)["JobState"] == "CANCELLED" and cluster.job(job)["Restarts"] == "0"
    assert len(starts(run)) == 1


def test_seeds_are_an_array_and_each_is_evaluated(cluster, digits, tmp_path):
    run = tmp_path / "run"
    more = ["--seeds", "3", "4", "--then", "knn", "knn.k=[5]"]
    jobs = submit(cluster, tmp_path, *training(digits, run, "optim.steps=20", "precision=fp32"), *TWO_NODES, *more)
    array = jobs[0].partition("_")[0]
    assert jobs[:2] == [f"{array}_0", f"{array}_1"] and len(jobs) == 4
    assert all(cluster.job(job)["Dependency"].startswith(f"afterok:{array}_") for job in jobs[2:])
    for job in jobs[2:]:
        cluster.wait(job, "COMPLETED", deadline=150)
    found = [json.loads((tmp_path / f"run-seed{seed}" / "results.json").read_text()) for seed in (3, 4)]
    assert [records[0]["seed"] for records in found] == [3, 4]
    runs = [tmp_path / f"run-seed{seed}" for seed in (3, 4)]
    assert "±" in cluster.run(sys.executable, "-m", "ssl_dist", "report", *runs, PYTHONPATH=ROOT)
    told = cluster.run(*SUBMIT, "status", *runs, cwd=tmp_path)
    assert len(re.findall(r"COMPLETED", told)) == 4 and told.count("20/20") == 2, told


def test_every_element_of_an_array_is_queued_again(cluster, digits, tmp_path):
    """The last one has the array's own job number."""
    words = training(digits, tmp_path / "run", "optim.steps=150", "precision=fp32", "data.view_shards=1")
    jobs = submit(cluster, tmp_path, *words, *TWO_NODES, "--seeds", "0", "1")
    runs = [tmp_path / f"run-seed{seed}" for seed in (0, 1)]
    for job, run in zip(jobs, runs, strict=True):
        has_begun(cluster, job, run, steps=2)
    cluster.signal(jobs[0].partition("_")[0], "USR2")
    for job, run in zip(jobs, runs, strict=True):
        cluster.wait(job, "COMPLETED", restarts=1, deadline=150)
        assert len(starts(run)) == 2 and starts(run)[1]["step"] > 0 and checkpoint.steps(run)[-1] == 150


def test_what_is_edited_later_is_another_training(cluster, digits, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text((ROOT / CONFIG).read_text())
    words = ["train", str(file), *training(digits, tmp_path / "run", "optim.steps=5")[2:]]
    [job] = submit(cluster, tmp_path, *words, *TWO_NODES, "--partition", "main")
    file.write_text("nonsense")
    cluster.wait(job, "COMPLETED", deadline=90)


def test_a_failing_training_cancels_its_evaluation(cluster, digits, tmp_path):
    site = tmp_path / "site.yaml"
    site.write_text("crashes: 0\nnodes: 2\ntasks_per_node: 1\n")
    more = ["optim.name=sgd", "optim.lr=1e38", "optim.steps=60"]
    parent, child = submit(
        cluster, tmp_path, *training(digits, tmp_path / "run", *more), "--site", site, "--then", "knn"
    )
    cluster.wait(parent, "FAILED", deadline=90)
    cluster.wait(child, "CANCELLED")
    assert "the loss is not finite" in output(cluster, parent)


def test_two_jobs_side_by_side_on_one_node(cluster, digits, tmp_path):
    site = tmp_path / "site.yaml"
    site.write_text(f"nodes: 1\ntasks_per_node: 2\nsbatch: {{nodelist: {cluster.nodes[0]}}}\n")
    more = ["optim.steps=30000", "data.view_shards=1"]
    jobs = {
        name: submit(cluster, tmp_path, *training(digits, tmp_path / name, *more), "--site", site)[0] for name in "ab"
    }
    for name, job in jobs.items():
        has_begun(cluster, job, tmp_path / name)
    both = [cluster.job(job) for job in jobs.values()]
    assert [(job["JobState"], job["NodeList"]) for job in both] == [("RUNNING", cluster.nodes[0])] * 2
    before = [step_of(tmp_path / name) for name in jobs]
    until(lambda: all(step_of(tmp_path / n) > k for n, k in zip(jobs, before, strict=True)), "both to go on")
    for job in jobs.values():
        cluster.cancel(job)
        cluster.wait(job, "CANCELLED")
    first, second = (metrics(tmp_path / name)[:10] for name in jobs)
    assert first == second, "they did not meet"


def test_status_of_a_running_and_a_waiting_job(cluster, digits, tmp_path):
    whole = ("--nodes", "2", "--tasks-per-node", "4")
    [first] = submit(cluster, tmp_path, *training(digits, tmp_path / "a", "optim.steps=3000"), *TWO_NODES)
    [second] = submit(cluster, tmp_path, *training(digits, tmp_path / "b"), *whole)
    has_begun(cluster, first, tmp_path / "a")
    until(lambda: cluster.job(second)["Reason"] != "None", "a reason")
    told = cluster.run(*SUBMIT, "status", tmp_path / "a", tmp_path / "b", cwd=tmp_path).splitlines()
    assert re.search(rf"^{first} +train +RUNNING +\S+/a +\d+/3000 +\d+\.\d +[\d.]+ +\d+:\d\d", told[1]), told
    assert re.search(rf"^{second} +train +PENDING +\S+/b .*(Resources|Priority)$", told[2]), told


def test_the_plain_script_does_the_same(cluster, two_nodes, digits, tmp_path):
    run = tmp_path / "run"
    options = ("--nodes", "2", "--ntasks-per-node", "1", "--time", "00:10:00")
    script = ROOT / "slurm" / "train.sbatch"
    job = cluster.submit(script, *training(digits, run)[1:], options=options, cwd=tmp_path, PYTHON=sys.executable)
    has_begun(cluster, job, run)
    cluster.signal(job, "USR2")
    cluster.wait(job, "COMPLETED", restarts=1, deadline=120)
    assert_undisturbed(run, two_nodes)


@pytest.mark.timeout(400)
def test_the_time_limit(cluster, digits, tmp_path):
    """The limit comes; the training has saved before, and goes on in the next start."""
    run = tmp_path / "run"
    site = tmp_path / "site.yaml"
    site.write_text('nodes: 2\ntasks_per_node: 1\ntime: "00:01:00"\nsignal_seconds: 20\n')
    [job] = submit(cluster, tmp_path, *training(digits, run, "optim.steps=100000"), "--site", site)
    cluster.wait(job, "PENDING", restarts=1, deadline=150)
    saved = checkpoint.steps(run)
    assert len(saved) == 1 and saved[0] > 10
    cluster.wait(job, "RUNNING", restarts=1)
    until(lambda: len(starts(run)) == 2, lambda: cluster.story(job))
    assert starts(run)[1]["step"] == saved[0]


@pytest.mark.timeout(400)
def test_a_cut_link_ends_both_sides_and_only_the_next_start_writes(network_cluster, digits, tmp_path):
    cluster, run = network_cluster, tmp_path / "run"
    [job] = submit(cluster, tmp_path, *training(digits, run, "checkpoint.every_steps=5"), *TWO_NODES)
    has_begun(cluster, job, run)
    ranks = [pid for task in range(2) for pid in cluster.pids_of(job, task=task)]
    cluster.cut(cluster.nodes[1])
    cut_at = time.monotonic()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks), lambda: cluster.story(job), 60)
    assert time.monotonic() - cut_at < 15 + 10 + 10  # the run's timeout, what is allowed on top, and looking
    before = checkpoint.steps(run)
    cluster.mend(cluster.nodes[1])
    cluster.wait(job, "COMPLETED", restarts=1, deadline=200)
    assert starts(run)[1]["step"] == before[-1]


# ---------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("more", "said"),
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
def test_mistakes_are_told_before_anything_is_submitted(cluster, digits, tmp_path, more, said, monkeypatch, capsys):
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    answer = mistake([*training(digits, tmp_path / "run"), *TWO_NODES, *more], monkeypatch, capsys)
    assert re.search(said, answer)
    assert cluster.run("squeue", "-h") == "" and not (tmp_path / "run").exists()


def mistake(words, monkeypatch, capsys):
    """The one line that submit.py says of them."""
    monkeypatch.setattr(sys, "argv", ["submit.py", *words])
    assert runpy.run_path(SUBMIT[1])["main"]() == 2
    [line] = capsys.readouterr().err.splitlines()
    return line


def test_without_slurm(digits, tmp_path, monkeypatch, capsys):
    words = [*training(digits, tmp_path / "run"), *TWO_NODES]
    monkeypatch.setenv("PATH", "/nowhere")
    assert "sbatch: not found; run this on a machine of the cluster" in mistake(words, monkeypatch, capsys)
    assert "none.yaml: cannot be read" in mistake(["train", "none.yaml", *TWO_NODES], monkeypatch, capsys)
    assert "scontrol: not found" in mistake(["status"], monkeypatch, capsys)
    monkeypatch.setattr(sys, "argv", ["submit.py", *words, "--dry-run"])
    assert runpy.run_path(SUBMIT[1])["main"]() == 0 and "#SBATCH --nodes=2" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 75)])
def test_here_signals_reach_the_ranks_and_codes_come_back(digits, tmp_path, number, code):
    run = tmp_path / "run"
    words = [*training(digits, run, "optim.steps=3000"), "--tasks-per-node", "2", "--cluster", "local"]
    process = subprocess.Popen([*SUBMIT, *words], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    until(lambda: step_of(run) > 2, "a beginning")
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code and "stopping after step" in said and "Traceback" not in said
    assert checkpoint.steps(run)


def test_here_a_failure_is_a_failure_and_nothing_follows(digits, tmp_path):
    words = training(digits, tmp_path / "run", "optim.name=sgd", "optim.lr=1e38")
    more = ["--tasks-per-node", "2", "--cluster", "local", "--then", "knn"]
    done = subprocess.run([*SUBMIT, *words, *more], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "the loss is not finite" in done.stderr and "features" not in done.stderr


def test_the_same_job_here(digits, tmp_path):
    words = [*training(digits, tmp_path / "run", "optim.steps=4"), "--tasks-per-node", "2", "--cluster", "local"]
    done = subprocess.run([*SUBMIT, *words, "--then", "knn", "knn.k=[5]"], cwd=tmp_path, check=False)
    assert done.returncode == 0
    assert starts(tmp_path / "run")[0]["world_size"] == 2 and checkpoint.steps(tmp_path / "run") == [4]
    assert json.loads((tmp_path / "run" / "results.json").read_text())


def test_a_search_is_one_job(cluster, digits, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    assert run_training(digits, run) == 0
    words = ["evaluate", str(run), "knn", "data.subset={per_class: 20}", "--search", "knn.k=[[1],[5]]"]
    [job] = submit(cluster, tmp_path, *words, "--validation", "0.25")
    cluster.wait(job, "COMPLETED", deadline=100)
    found = [r["split"] for r in json.loads((run / "results.json").read_text()) if r["name"].endswith("top1")]
    assert found == ["train[held out 25%]", "train[held out 25%]", "test"]
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    for more, said in (
        (["--validation", "2"], "--validation 2: give the share"),
        (["--search", "knn.kk=[1]"], "unknown key knn.kk"),
        (["data.subset=3"], "data.subset = 3"),
    ):
        capsys.readouterr()
        assert said in mistake(["evaluate", str(run), "knn", *more], monkeypatch, capsys)


def test_a_fine_tuning_on_two_nodes_survives_a_stop(cluster, digits, tmp_path):
    """Evaluated here by one process and there by two ranks, with a stop in between: the same accuracies."""
    values = {}
    for name in ("here", "there"):
        assert run_training(digits, tmp_path / name, "precision=fp64", "timeout=15") == 0
    words = ["finetune", "finetune.epochs=12", "finetune.batch_size=32"]
    command = [sys.executable, "-m", "ssl_dist", "evaluate", str(tmp_path / "here"), *words]
    subprocess.run(command, check=True, cwd=ROOT)
    run = tmp_path / "there"
    [job] = submit(cluster, tmp_path, "evaluate", str(run), *words, *TWO_NODES)
    until(lambda: list(run.glob("evaluations/*/checkpoints/step-*.pt")), lambda: cluster.story(job))
    cluster.signal(job, "USR2")
    cluster.wait(job, "COMPLETED", restarts=1, deadline=150)
    for name in ("here", "there"):
        values[name] = [r["value"] for r in json.loads((tmp_path / name / "results.json").read_text())]
    assert values["here"] == values["there"] and len(values["here"]) == 2
    told = cluster.run(*SUBMIT, "status", run, cwd=tmp_path)
    assert "evaluate" in told and "COMPLETED" in told
