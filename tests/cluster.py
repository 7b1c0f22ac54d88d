"""A Slurm cluster of the tests' own on this machine: a controller and two nodes, removed afterwards.

A node's name is its address (127.0.0.2), so a job's list of nodes resolves without /etc/hosts. Both see the same
files and processes. All processes of a cluster, also those that its jobs start, have the cluster's SLURM_CONF in their
environment and are found and killed by it. A program that clears its environment is not found.
"""

import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.processes import DEADLINE, PATH, kill, processes, remove, send, until

PACKAGES = "slurmctld slurmd slurm-client munge iproute2"  # of Debian; the same as in launch/install.sh
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
GUARD = Path(__file__).with_name("processes.py")
FINAL = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}

# Ports below the kernel's ephemeral ones and below torchrun's 29500; each cluster has one block of them.
FIRST_PORT, LAST_PORT, BLOCK = 20000, 29440, 64

CONF = """\
ClusterName=tests
SlurmctldHost={host}({address})
SlurmctldPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={sockets}/munge,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={sockets}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
MailProg=/bin/true
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
MpiParams=ports={ports[8]}-{ports[63]}
ReturnToService=2
SlurmdTimeout=10
MessageTimeout=5
TCPTimeout=2
KillWait=5
MinJobAge=3600
BatchStartTimeout=10
JobRequeue=1
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=DEFAULT CPUs={cpus} RealMemory=8000
{nodes}
PartitionName=DEFAULT Nodes={names} MaxTime=INFINITE State=UP
PartitionName=main Default=YES PriorityTier=1 GraceTime=10
PartitionName=high PriorityTier=10 PreemptMode=OFF
PartitionName=gpu Nodes={gpu_node}
"""
# Two GPUs by the names of other devices: Slurm counts them, and ranks find no CUDA.
GRES = "".join(f"NodeName={{gpu_node}} Name=gpu File=/dev/{device}\n" for device in ("null", "zero"))
# cred_expire: a requeued job waits that long; 5 s is Slurm's minimum
# MinJobAge: finished jobs can be queried for an hour; there is no accounting


def unavailable_reason():
    """Why no Cluster can be started here, with the remedy; None if one can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if missing:
        return f"no Slurm here ({', '.join(missing)} not found): apt-get install --no-install-recommends {PACKAGES}"
    return None


def claim_ports():
    """A block of free ports, and the open socket on its first port that reserves the block."""
    blocks = [range(start, start + BLOCK) for start in range(FIRST_PORT, LAST_PORT, BLOCK)]
    begin = os.getpid() % len(blocks)
    for ports in blocks[begin:] + blocks[:begin]:
        claim = socket.socket()
        try:
            claim.bind(("", ports[0]))
            for port in ports[1:]:
                with socket.socket() as probe:
                    probe.bind(("", port))
            return claim, ports
        except OSError:
            claim.close()
    raise OSError(f"no {BLOCK} free ports in a row between {FIRST_PORT} and {LAST_PORT}")


def fields(line):
    """'JobId=3 JobName=a b State=UP' -> the values by their names."""
    words = re.split(r"(?:^| )([A-Z][\w:/]*)=", line.strip())
    return dict(zip(words[1::2], words[2::2], strict=True))


class Cluster:
    """Starts on entry in about a second and stops on exit. `folder`: its slurm.conf, logs and state."""

    cpus = 4  # of a node

    def __init__(self, folder):
        self.folder = Path(folder)
        self.conf = self.folder / "slurm.conf"
        self.daemons = {}  # by the name of the log; a slurmd's is its node's
        # Variables of a Slurm job in which the tests may run must not reach this cluster
        clean = {name: value for name, value in os.environ.items() if not re.match("SLURM|SBATCH|SRUN|SCANCEL", name)}
        self.environment = clean | {"SLURM_CONF": str(self.conf), "PATH": PATH}

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.claim, self.ports = claim_ports()
        self.sockets = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # a socket's path has 107 bytes at most
        try:
            self.set_up_network()
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_):
        self.stop()

    # Overridden by NetworkCluster

    def set_up_network(self):
        self.address, self.nodes = "127.0.0.1", ("127.0.0.2", "127.0.0.3")

    def network_removal(self):
        """The command that undoes `set_up_network`; it may fail."""
        return ["true"]

    def slurmd(self, name):
        """The command that starts a node."""
        return ["slurmd", "-D", "-N", name]

    # The cluster

    def start(self):
        (self.folder / "state").mkdir()
        for name in self.nodes:
            (self.sockets / name).mkdir()
        nodes = [
            f"NodeName={name} NodeAddr={name} NodeHostname=localhost Port={self.ports[2 + i]}"
            for i, name in enumerate(self.nodes)
        ]
        nodes[-1] += " Gres=gpu:2"
        text = CONF.format(
            host=socket.gethostname().split(".")[0],
            address=self.address,
            folder=self.folder,
            sockets=self.sockets,
            ports=self.ports,
            user=pwd.getpwuid(os.geteuid()).pw_name,
            cpus=self.cpus,
            nodes="\n".join(nodes),
            names=",".join(self.nodes),
            gpu_node=self.nodes[-1],
        )
        self.conf.write_text(text)
        (self.folder / "gres.conf").write_text(GRES.format(gpu_node=self.nodes[-1]))
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)

        # Kills what outlives this process. Started before any process that it may have to kill; ignores Ctrl-C.
        command = ["setpriv", "--pdeathsig", "TERM", sys.executable, GUARD, os.getpid(), self.conf, self.sockets]
        command += self.network_removal()
        self.guard = subprocess.Popen([str(word) for word in command], start_new_session=True)
        files = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        options = ["--foreground", "--force", "--num-threads=2", f"--socket={self.sockets}/munge", *files]
        self._start_daemon("munged", ["munged", *options])
        until((self.sockets / "munge").exists, lambda: f"munged's socket: {self.logs()}", 10)
        self._start_daemon("slurmctld", ["slurmctld", "-D", "-i"])
        for name in self.nodes:
            self._start_daemon(name, self.slurmd(name))
        self._wait_until_idle()

    def _start_daemon(self, name, command, **environment):
        """Start a daemon that is killed when this process ends. A node's SLURMD_NODENAME is also in the environment of
        its slurmstepd, and Slurm passes it to tasks."""
        if name in self.nodes:
            environment["SLURMD_NODENAME"] = name
        with open(self.folder / f"{name}.log", "ab") as log:
            self.daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                env=self.environment | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _wait_until_idle(self):
        def is_idle():
            dead = [name for name, daemon in self.daemons.items() if daemon.poll() is not None]
            assert not dead, f"{dead} ended: {self.logs()}"
            return self.run("sinfo", "-h", "-o", "%D %t", "-p", "main", check=False) == f"{len(self.nodes)} idle"

        until(is_idle, lambda: f"idle nodes: {self.run('sinfo', '-N', '-l', check=False)} {self.logs()}")

    def stop(self):
        """Kill all processes of the cluster and free its ports, without waiting for jobs."""
        for daemon in self.daemons.values():
            daemon.kill()
            daemon.wait()
        self.daemons.clear()
        kill(SLURM_CONF=self.conf)
        if hasattr(self, "guard"):
            self.guard.kill()
            self.guard.wait()
        remove(self.sockets, *self.network_removal())
        self.claim.close()

    def clear(self):
        """Kill what a test has left queued or running; returns when no job is left and both nodes are idle."""
        for name in self.nodes:
            if self.daemons[name].poll() is not None:
                self.start_node(name)

        kill_from = time.monotonic() + 0.5  # cancelled first: a step whose srun is killed needs 3 s to end

        def is_empty():
            if not (queued := self.run("squeue", "-h", "-o", "%A")):
                return True
            self.run("scancel", "--user", str(os.geteuid()))  # repeatedly: some jobs requeue themselves on SIGTERM
            for job in set(queued.split()) if time.monotonic() > kill_from else ():
                send(self.pids_of(job), signal.SIGKILL)
            return False

        until(is_empty, lambda: f"an empty queue: {self.run('squeue')} {self.logs()}")
        self._wait_until_idle()

    def logs(self, lines=8):
        """The last lines of every daemon, for messages."""
        files = sorted(self.folder.glob("*.log"))
        return "".join(f"\n== {path.name}\n" + "\n".join(path.read_text().splitlines()[-lines:]) for path in files)

    # Clients

    def run(self, *command, check=True, cwd=None, **environment):
        """The stdout of a command, such as run("squeue"); with `check`, it must succeed."""
        completed = subprocess.run(
            [str(word) for word in command],
            env=self.environment | {name: str(value) for name, value in environment.items()},
            cwd=cwd,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=DEADLINE,
        )
        assert not check or completed.returncode == 0, (
            f"{command} gave {completed.returncode}: {completed.stderr}{self.logs()}"
        )
        return completed.stdout.strip()

    def submit(self, script, *arguments, options=(), cwd=None, **environment):
        """The id of a new job. `options` are sbatch's. Its output goes to `cwd` unless the script says otherwise."""
        cwd = cwd or Path(script).parent
        return self.run("sbatch", "--parsable", *options, script, *arguments, cwd=cwd, **environment)

    def job(self, job):
        """Slurm's record of a job (of an array: 14_0), running or ended: JobState, Restarts, ExitCode, StdOut ..."""
        return fields(self.run("scontrol", "show", "job", "-o", job))

    def output(self, job):
        path = Path(self.job(job)["StdOut"])
        return path.read_text() if path.exists() else ""

    def wait(self, job, states, restarts=0, deadline=DEADLINE):
        """Wait until the job is in one of these states (one, or several) after at least as many `restarts`; return its
        record. Fails at once when the job has ended in another state."""
        states = {states} if isinstance(states, str) else set(states)

        def record_in_state():
            record = self.job(job)
            is_reached = record["JobState"] in states and int(record["Restarts"]) >= restarts
            assert is_reached or record["JobState"] not in FINAL, (
                f"not {states}, {restarts} restarts: {self.diagnosis(job)}"
            )
            return record if is_reached else None

        return until(record_in_state, lambda: f"{states}, {restarts} restarts: {self.diagnosis(job)}", deadline)

    def diagnosis(self, job):
        """The job's record, its output and the daemons' logs, for messages."""
        return f"{self.job(job)}\n== output\n{self.output(job)[-4000:]}{self.logs()}"

    def signal(self, job, name):
        """To all tasks of the job's steps, as `#SBATCH --signal` does; not to the batch script."""
        self.run("scancel", f"--signal={name}", job)

    def cancel(self, job):
        self.run("scancel", job)

    def requeue(self, job):
        self.run("scontrol", "requeue", job)

    def pids_of(self, job, task=None):
        """The job's processes, oldest first: batch script, srun, tasks and their children. Or of one task of the
        step that runs, by its rank."""
        job = self.job(job)["JobId"]  # unlike the id of a job of an array, 14_0
        environment = {"SLURM_CONF": self.conf, "SLURM_JOB_ID": job}
        if task is not None:  # the batch script too has a SLURM_PROCID, but no step
            steps = re.findall(r"\.(\d+)$", self.run("squeue", "-h", "--steps", "-o", "%i", "-j", job), re.MULTILINE)
            assert steps, f"no step runs: {self.diagnosis(job)}"
            environment |= {"SLURM_PROCID": task, "SLURM_STEP_ID": steps[-1]}
        return processes(**environment)

    # Nodes

    def node(self, name):
        """Slurm's record of a node. Its State is such as IDLE, MIXED (jobs, but room for more), MIXED+NOT_RESPONDING
        or DOWN+NOT_RESPONDING."""
        return fields(self.run("scontrol", "show", "node", "-o", name))

    def is_up(self, name):
        return self.node(name)["State"] in ("IDLE", "MIXED", "ALLOCATED")

    def crash_node(self, name, report=False):
        """Kill everything of the node at once: slurmd, slurmstepd, batch scripts, tasks.

        Slurm notices within 20 s and requeues the node's jobs; with `report` it is notified at once. If the node is
        started again before Slurm notices, a job that had only tasks there, not its batch script, hangs.
        """
        kill(SLURM_CONF=self.conf, SLURMD_NODENAME=name)
        self.daemons[name].wait()
        if report:
            self.run("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=crashed")

    def start_node(self, name):
        """Start the node after a crash; returns when it accepts jobs again."""
        self._start_daemon(name, self.slurmd(name))
        until(lambda: self.is_up(name), lambda: f"{self.node(name)} {self.logs()}")
