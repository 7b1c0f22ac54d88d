"""The tests' own Slurm cluster: starts in seconds, runs and interrupts jobs, leaves nothing behind."""

import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import cluster as cluster_module
from tests.cluster import PACKAGES, Cluster
from tests.network_cluster import network_unavailable_reason
from tests.processes import processes, until
from tests.programs import script

ROOT = Path(__file__).parent.parent

# Two tasks, one per node. Each runs "$1"; the exit code of the batch script is that of srun.
BATCH = """\
#SBATCH --nodes=2 --ntasks-per-node=1 --open-mode=append
srun --kill-on-bad-exit=1 bash -c "$1"
"""


@pytest.fixture
def batch(tmp_path):
    return script(tmp_path / "batch.sh", BATCH)


def is_running(cluster, job):
    """Whether the job's two tasks have started; `wait` alone returns before srun has started them."""
    return cluster.job(job)["JobState"] == "RUNNING" and cluster.output(job).count("here\n") == 2


def start(cluster, batch, command="sleep 300", **options):
    job = cluster.submit(batch, f"echo here; {command}", **options)
    until(lambda: is_running(cluster, job), lambda: cluster.diagnosis(job))
    return job


@pytest.mark.slow
def test_ready_in_seconds_and_nothing_left_behind(tmp_path, batch):
    if obstacle := cluster_module.unavailable_reason():
        pytest.skip(obstacle)
    begin = time.monotonic()
    with Cluster(tmp_path / "cluster") as cluster:
        ready = time.monotonic() - begin
        job = start(cluster, batch, "setsid sleep 300 & sleep 300")
        daemons = [daemon.pid for daemon in cluster.daemons.values()]
        pids = processes(SLURM_CONF=cluster.conf)
        assert len(daemons) == 4 and set(daemons) <= set(pids)
        assert len(cluster.pids_of(job)) >= 7 and set(cluster.pids_of(job)) < set(pids)
        begin = time.monotonic()
    stopped = time.monotonic() - begin
    print(f"ready in {ready:.2f} s, stopped in {stopped:.2f} s")
    assert ready < 10 and stopped < 10
    assert processes(SLURM_CONF=cluster.conf) == []
    assert cluster.guard.poll() is not None and not cluster.sockets.exists()
    for port in cluster.ports[:4]:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))


TESTS_TO_KILL = """\
import sys
from tests.{module} import {kind}
with {kind}(sys.argv[1]) as cluster:
    job = cluster.submit(sys.argv[2], "echo here; setsid sleep 300 & sleep 300")
    print(job, cluster.sockets, getattr(cluster, "bridge", None), flush=True)
    input()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("module", "kind"), [("cluster", "Cluster"), ("network_cluster", "NetworkCluster")])
def test_killed_tests_leave_nothing_behind(module, kind, tmp_path, batch):
    if obstacle := cluster_module.unavailable_reason() if kind == "Cluster" else network_unavailable_reason():
        pytest.skip(obstacle)
    folder = tmp_path / "cluster"
    command = [sys.executable, "-c", TESTS_TO_KILL.format(module=module, kind=kind), folder, batch]
    tests = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    job, sockets, bridge = tests.stdout.readline().split()
    sockets = Path(sockets)
    assert sockets.exists() and (bridge == "None" or Path("/sys/class/net", bridge).exists())
    output = tmp_path / f"slurm-{job}.out"
    until(lambda: output.exists() and output.read_text().count("here\n") == 2, "two tasks")
    marks = {"SLURM_CONF": folder / "slurm.conf"}
    assert len(processes(**marks)) >= 10
    guard = [pid for pid in children(tests.pid) if b"processes.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(guard) == 1
    tests.kill()
    tests.communicate()
    until(lambda: not processes(**marks), lambda: f"the end of {processes(**marks)}", 10)
    until(lambda: guard[0] not in children(1), "the end of the guard", 10)
    assert not sockets.exists()
    assert not [path for path in Path("/sys/class/net").iterdir() if path.name.split("-")[0] == bridge]


def children(parent):
    """The ids of the running child processes."""
    completed = subprocess.run(["ps", "-o", "pid=,stat=", "--ppid", str(parent)], capture_output=True, text=True)
    return [int(line.split()[0]) for line in completed.stdout.splitlines() if "Z" not in line]


@pytest.mark.slow
def test_two_clusters_side_by_side(cluster, tmp_path, batch):
    with Cluster(tmp_path / "other") as other:
        assert not set(cluster.ports) & set(other.ports)
        jobs = [start(one, batch, cwd=folder) for one, folder in ((cluster, tmp_path), (other, other.folder))]
        assert not set(cluster.pids_of(jobs[0])) & set(other.pids_of(jobs[1]))
        pids = cluster.pids_of(jobs[0])
    assert cluster.pids_of(jobs[0]) == pids
    assert cluster.job(jobs[0])["JobState"] == "RUNNING"


@pytest.mark.slow
def test_jobs_share_both_nodes(cluster, tmp_path, batch):
    names = "echo $SLURM_PROCID on $SLURMD_NODENAME of $(scontrol show hostnames $SLURM_JOB_NODELIST)"
    first = start(cluster, batch, f"{names}; sleep 300")
    second = cluster.submit(batch, names, cwd=tmp_path / "..")
    cluster.wait(second, "COMPLETED")
    one, two = cluster.nodes
    assert sorted(cluster.output(second).splitlines()) == [f"0 on {one} of {one} {two}", f"1 on {two} of {one} {two}"]
    assert cluster.job(second)["WorkDir"] == str(tmp_path.parent)
    assert cluster.job(first)["JobState"] == "RUNNING"


@pytest.mark.slow
def test_signals_reach_the_tasks_and_cancelled_stays_cancelled(cluster, batch):
    job = start(cluster, batch, "trap 'echo usr2 $SLURM_PROCID' USR2; while true; do sleep 0.1; done")
    cluster.signal(job, "USR2")
    until(
        lambda: {"usr2 0", "usr2 1"} <= set(cluster.output(job).splitlines()),
        lambda: cluster.diagnosis(job),
        10,
    )
    tasks = [cluster.pids_of(job, task) for task in (0, 1)]
    assert all(tasks) and not set(tasks[0]) & set(tasks[1])
    cluster.cancel(job)
    assert cluster.wait(job, "CANCELLED")["Restarts"] == "0"
    until(lambda: not cluster.pids_of(job), lambda: cluster.diagnosis(job), 20)
    with pytest.raises(AssertionError, match="CANCELLED"):
        cluster.wait(job, "COMPLETED")


@pytest.mark.slow
def test_a_job_of_an_array(cluster, batch):
    array = start(cluster, batch, options=["--array=0"])
    assert cluster.pids_of(f"{array}_0") and cluster.pids_of(f"{array}_0", 1)
    cluster.cancel(f"{array}_0")
    cluster.wait(f"{array}_0", "CANCELLED")


@pytest.mark.slow
def test_a_requeued_job_starts_again(cluster, batch):
    job = start(cluster, batch, '[ "${SLURM_RESTART_COUNT:-0}" = 1 ] || sleep 300')
    cluster.requeue(job)
    assert cluster.wait(job, "COMPLETED", restarts=1)["ExitCode"] == "0:0"


@pytest.mark.slow
def test_a_higher_partition_preempts_the_job(cluster, tmp_path):
    """Slurm sends the preempted job the signal that it requested; a job that ends by itself must requeue itself."""
    batch = script(tmp_path / "batch.sh", BATCH + "[ $? = 0 ] || scontrol requeue $SLURM_JOB_ID\n")
    whole_nodes = ["--cpus-per-task", cluster.cpus]
    command = (
        '[ "${SLURM_RESTART_COUNT:-0}" = 1 ] || { trap "echo stopped; exit 75" USR2; while true; do sleep 0.1; done; }'
    )
    low = start(cluster, batch, command, options=[*whole_nodes, "--signal=USR2@60"])
    high = cluster.submit(batch, "echo high", options=[*whole_nodes, "--partition=high"])
    cluster.wait(high, "COMPLETED")
    cluster.wait(low, "COMPLETED", restarts=1)
    assert "stopped" in cluster.output(low)


@pytest.mark.slow
def test_a_crashed_node_loses_its_tasks_and_restarts(cluster, batch):
    job = start(cluster, batch, '[ "${SLURM_RESTART_COUNT:-0}" = 1 ] || sleep 300')
    crashed = cluster.nodes[1]
    running_pids, crashed_pids = [processes(SLURM_CONF=cluster.conf, SLURMD_NODENAME=name) for name in cluster.nodes]
    assert set(cluster.pids_of(job, 1)) < set(crashed_pids)
    cluster.crash_node(crashed)
    assert cluster.pids_of(job, 0)
    assert not set(crashed_pids) & set(processes(SLURM_CONF=cluster.conf))
    cluster.crash_node(crashed, report=True)
    cluster.wait(job, "PENDING", restarts=1)
    assert "DOWN" in cluster.node(crashed)["State"]
    assert cluster.daemons[cluster.nodes[0]].pid in running_pids and cluster.daemons[cluster.nodes[0]].poll() is None
    cluster.start_node(crashed)
    cluster.wait(job, "COMPLETED", restarts=1)


@pytest.mark.slow
def test_clear_ends_jobs_that_ignore_signals(cluster, tmp_path):
    """A job that ignores signals and requeues itself, and a node that is down."""
    stubborn = script(
        tmp_path / "stubborn.sh", "trap '' TERM\nscontrol requeue $SLURM_JOB_ID\necho stubborn\nsleep 300 & sleep 300\n"
    )
    job = cluster.submit(stubborn)
    until(lambda: "stubborn" in cluster.output(job), lambda: cluster.diagnosis(job))
    cluster.crash_node(cluster.nodes[1])
    cluster.clear()
    assert cluster.job(job)["JobState"] == "CANCELLED" and not cluster.pids_of(job)
    assert [cluster.node(name)["State"] for name in cluster.nodes] == ["IDLE", "IDLE"]


@pytest.mark.slow
def test_a_cut_link(network_cluster, tmp_path):
    node = network_cluster.nodes[1]
    tries = f"""\
        while true; do
            timeout 0.5 bash -c '</dev/tcp/{network_cluster.address}/{network_cluster.ports[1]}' && echo up || echo down
            sleep 0.1
        done"""
    job = network_cluster.submit(script(tmp_path / "tries.sh", f"hostname\n{tries}\n"), options=[f"--nodelist={node}"])

    def last_is(word):
        last = network_cluster.output(job).split()[-1:]
        return last == [word]

    until(lambda: last_is("up"), lambda: network_cluster.diagnosis(job))
    assert network_cluster.output(job).split()[0] == node
    network_cluster.cut(node)
    until(lambda: last_is("down"), lambda: network_cluster.diagnosis(job), 10)
    network_cluster.mend(node)
    until(lambda: last_is("up"), lambda: network_cluster.diagnosis(job), 10)
    network_cluster.cut(node)
    network_cluster.clear()
    assert Path("/sys/class/net", network_cluster.link(node), "operstate").read_text() == "up\n"


def test_without_slurm_the_reason_names_the_command(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None if name == "slurmd" else name)
    reason = cluster_module.unavailable_reason()
    assert "slurmd" in reason and "munged" not in reason.split(":")[0] and "\n" not in reason
    assert f"apt-get install --no-install-recommends {PACKAGES}" in reason


def test_the_installation_has_the_packages_of_a_cluster():
    assert PACKAGES in (ROOT / "launch" / "install.sh").read_text()


def test_fields_of_a_slurm_record():
    line = (
        "JobId=3 JobName=a b UserId=root(0) CPUs/Task=1 TRES=cpu=2,node=2 ReqB:S:C:T=0:0:*:* Command=/x key=1 Power=\n"
    )
    assert cluster_module.fields(line) == {
        "JobId": "3",
        "JobName": "a b",
        "UserId": "root(0)",
        "CPUs/Task": "1",
        "TRES": "cpu=2,node=2",
        "ReqB:S:C:T": "0:0:*:*",
        "Command": "/x key=1",
        "Power": "",
    }
