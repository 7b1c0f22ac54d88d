"""The ranks' environment variables from srun's, the site's file, the batch scripts."""

import argparse
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ssl_dist import job
from ssl_dist.distributed import world as world_module
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.distributed.world import choose_device
from ssl_dist.errors import UserError
from ssl_dist.slurm import submit
from ssl_dist.slurm.script import Site, executor, read_site, setup_lines, teardown_lines

ROOT = Path(__file__).parent.parent
SRUN = {
    "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "77",
    "MASTER_ADDR": "node-a",
}  # fmt: skip


def test_environment_of_a_task():
    variables = job.environment(SRUN)
    assert variables == {
        "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_PORT": "29677",
        "SSL_DIST_BY_SRUN": "1",
    }  # fmt: skip
    assert job.environment({}) == {}, "no srun"
    assert job.environment(SRUN | {"RANK": "0"}) == {}, "torchrun inside of a job"


def test_a_port_of_its_own_for_every_job():
    assert job.port({"SLURM_STEP_RESV_PORTS": "21003-21004", "SLURM_JOB_ID": "1"}) == 21003
    ports = {job.port({"SLURM_JOB_ID": str(number)}) for number in range(500, 1500)}
    assert job.port({"SLURM_JOB_ID": "1"}) != job.port({"SLURM_JOB_ID": "1", "SLURM_RESTART_COUNT": "1"})
    assert len(ports) == 1000 and min(ports) > 29500 and max(ports) < 32768


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"SLURM_NTASKS": "7"}, "7 tasks on 2 nodes"), ({"MASTER_ADDR": None}, "MASTER_ADDR is not set")],
)
def test_what_cannot_be(changed, message):
    slurm = {name: value for name, value in (SRUN | changed).items() if value is not None}
    with pytest.raises(UserError, match=message):
        job.environment(slurm)


def test_a_signal_before_training_listens_asks_for_another_start():
    code = "import os, signal; from ssl_dist import cli, job\n"
    code += "cli.main = lambda _: os.kill(os.getpid(), signal.SIGUSR2)\n"
    code += "job.run(['train'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert done.returncode == 75


def test_a_signal_to_an_evaluation_is_no_stop_after_a_save():
    code = "import os, signal; from ssl_dist import cli, job\n"
    code += "cli.main = lambda _: os.kill(os.getpid(), signal.SIGUSR2)\n"
    code += "job.run(['evaluate'])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == -signal.SIGUSR2


def test_uneven_tasks_are_a_users_mistake():
    slurm = SRUN | {"SLURM_NTASKS": "7", "PATH": "/bin:/usr/bin"}
    command = [sys.executable, "-m", "ssl_dist.job", "train", "x.yaml"]
    done = subprocess.run(command, cwd=ROOT, env=slurm, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: --tasks-per-node: 7 tasks on 2 nodes"), done.stderr


def test_cores_of_a_rank(monkeypatch):
    cores = RankInfo(0, 1, 0, 1).cores
    assert RankInfo(0, 4, 0, 4).cores == max(1, cores // 4)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    assert RankInfo(0, 4, 0, 4).cores == max(1, cores // 4), "torchrun in a job"
    monkeypatch.setenv("SSL_DIST_BY_SRUN", "1")
    assert RankInfo(0, 4, 0, 4).cores == 6


def test_any_code_but_0_ends_the_tasks_process(monkeypatch):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGCONT)]
    monkeypatch.setattr(job.cli, "main", lambda arguments: {"good": 0, "bad": 2}[arguments[0]])
    try:
        assert job.Job(("good",))() == 0
        with pytest.raises(SystemExit, match="2"):
            job.Job(("bad",))()
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGUSR2, signal.SIGCONT), before, strict=True):
            signal.signal(number, handler)


@pytest.mark.parametrize(
    ("rank_info", "visible", "on_node", "chosen"),
    [
        (RankInfo(5, 8, 1, 4), 4, None, "cuda:1"),  # torchrun, or srun that shows all GPUs to every task
        (RankInfo(5, 8, 1, 4), 1, "4", "cuda:0"),  # srun --gpus-per-task=1: a task sees its own
        (RankInfo(5, 8, 1, 4), 1, None, None),  # torchrun in a job with CUDA_VISIBLE_DEVICES=0
        (RankInfo(5, 8, 1, 4), 1, "1", None),  # four ranks would share one GPU
        (RankInfo(5, 8, 1, 4), 0, None, "cpu"),
    ],
)
def test_the_gpu_of_a_rank(monkeypatch, rank_info, visible, on_node, chosen):
    monkeypatch.setattr(world_module.torch.cuda, "is_available", lambda: visible > 0)
    monkeypatch.setattr(world_module.torch.cuda, "device_count", lambda: visible)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", on_node or "4")
    monkeypatch.delenv("SSL_DIST_BY_SRUN", raising=False)
    if on_node:
        monkeypatch.setenv("SSL_DIST_BY_SRUN", "1")
    if chosen is None:
        with pytest.raises(UserError, match="4 ranks on this node but 1 GPU"):
            choose_device(rank_info)
    else:
        assert str(choose_device(rank_info)) == chosen


# ---------------------------------------------------------------------------------------------------- the site


def test_the_example_of_a_site_names_every_key():
    site = read_site(ROOT / "slurm" / "site.yaml", {})
    text = (ROOT / "slurm" / "site.yaml").read_text()
    assert all(f"\n{name}: " in text for name in Site.model_fields)
    assert site.ranks_per_node == 8


def test_options_come_before_the_site(tmp_path):
    file = tmp_path / "site.yaml"
    file.write_text("partition: gpu\ngpus_per_node: 8\n")
    site = read_site(file, {"tasks_per_node": 3, "partition": None, "verb": "train"})
    assert (site.partition, site.tasks_per_node, site.gpus_per_node, site.ranks_per_node) == ("gpu", 3, None, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partitoin: x", "partitoin.*partition"),
        ("- a", "must be a mapping"),
        ("time: soon", "time"),
        ("a: [", "YAML"),
        ("mem_gb: 1.0e+308", "mem_gb"),
        ("mem_gb: 1.0e-4", "mem_gb"),  # in MB it is 0, which is all of a node for Slurm
    ],
)
def test_a_sites_mistakes(tmp_path, text, message):
    file = tmp_path / "site.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        read_site(file, {})


# ---------------------------------------------------------------------------------------------------- the script


@pytest.mark.parametrize(
    ("time", "minutes"), [("00:10:00", 10), ("24:00:00", 1440), ("2-01:30:00", 2970), ("00:05:30", 6)]
)
def test_script(tmp_path, time, minutes):
    site = Site(
        partition="gpu", nodes=2, gpus_per_node=8, cpus_per_task=4, mem_gb=1.5, time=time, setup=["module load x"],
        sbatch={"exclude": "n3"},
    )  # fmt: skip
    lines = executor(site, tmp_path / "%A", "name").script().splitlines()
    for line in (
        "--partition=gpu", "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=4",
        "--mem=1536MB", f"--time={minutes}", "--requeue", "--exclude=n3", "--signal=USR2@120", "--job-name=name",
        "--open-mode=append",
    ):  # fmt: skip
        assert f"#SBATCH {line}" in lines
    [srun] = [number for number, line in enumerate(lines) if line.startswith("srun ")]
    assert lines.index("module load x") < srun
    assert "#SBATCH --gres" not in "\n".join(lines)
    assert lines[srun:].index('exit "$code"') > 0 and "--kill-on-bad-exit=0 --wait=30" in lines[srun]


def test_the_plain_script_has_the_same_lines(tmp_path):
    plain = (ROOT / "slurm" / "train.sbatch").read_text()
    shared = setup_lines(Site()) + teardown_lines(3, tmp_path)
    for line in shared:
        line = line.replace(f"{tmp_path}/", "").replace("-le 3 ]", '-le "${CRASHES:-3}" ]')
        assert line.replace("  # ", " # ") in plain, line


@pytest.mark.parametrize(
    ("code", "state", "crashes", "again"),
    [
        (0, "RUNNING", 0, False), (75, "RUNNING", 0, True), (75, "RUNNING", 9, True), (75, "CANCELLED", 0, False),
        (1, "RUNNING", 0, True), (137, "RUNNING", 2, True), (1, "RUNNING", 3, False), (1, "CANCELLED", 0, False),
        (2, "RUNNING", 0, False), (75, "PREEMPTED", 0, False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("array", [{}, {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}])
@pytest.mark.parametrize("failures", [0, 2])
def test_what_is_queued_again(tmp_path, code, state, crashes, again, array, failures):
    """The controller does not answer the first `failures` questions of each kind."""
    job_name = "5_2" if array else "7"
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, body in {
        "scontrol": f"""
            echo >>{tmp_path}/$1; [ $(wc -l <{tmp_path}/$1) -gt {failures} ] || exit 1
            if [ $1 = show ]; then [ $4 = {job_name} ] && echo "JobId=7 JobState={state} x=y"
            else echo "$*" >>{tmp_path}/asked; fi""",
        "sleep": "true",
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    (tmp_path / f"crashes-{job_name}.txt").write_text("crash\n" * crashes)
    script = "\n".join([f"(exit {code})", *teardown_lines(3, tmp_path)])
    environment = {"PATH": f"{tools}:/usr/bin:/bin", "SLURM_JOB_ID": "7"} | array
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, check=False)
    commands = (tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else ""
    assert done.returncode == code and commands == (f"requeue {job_name}\n" if again else "")


def test_the_job_that_submitit_pickles_is_a_name_and_words():
    import pickletools

    import cloudpickle

    operations = list(pickletools.genops(cloudpickle.dumps(job.Job(("train", "config.yaml")))))
    names = {argument for operation, argument, _ in operations if isinstance(argument, str)}
    assert {"ssl_dist.job", "Job", "train", "config.yaml"} <= names
    assert argparse.__name__ not in names


def test_seeds_and_sweeps():
    file = str(ROOT / "configs" / "digits" / "relational-conv4.yaml")
    [alone] = submit.variants(file, ["run_dir=runs/x/"], [], [])
    assert alone.run_dir == "runs/x/"
    assert submit.variants(file, ["run_dir=."], [], [])[0].run_dir == "."
    with pytest.raises(UserError, match="no name that a seed"):
        submit.variants(file, ["run_dir=."], [1], [])
    configs = submit.variants(file, ["run_dir=runs/x/"], [0, 7], ["optim.lr=[1e-3, 3e-3]"])
    assert [(c.run_dir, c.optim.lr, c.seed) for c in configs] == [
        ("runs/x-lr0.001-seed0", 1e-3, 0), ("runs/x-lr0.001-seed7", 1e-3, 7),
        ("runs/x-lr0.003-seed0", 3e-3, 0), ("runs/x-lr0.003-seed7", 3e-3, 7),
    ]  # fmt: skip
    names = submit.variants(file, [], [], ["method.options.aggregation=[cat, sum]"])
    assert [c.run_dir for c in names] == [f"runs/digits-relational-conv4-aggregation{name}" for name in ("cat", "sum")]
    for seeds, sweep in (([1, 1], []), ([], ["optim.lr=[1, 1]"])):
        with pytest.raises(UserError, match="given twice"):
            submit.variants(file, [], seeds, sweep)
    with pytest.raises(UserError, match="seed"):
        submit.variants(file, [], [-1], [])
