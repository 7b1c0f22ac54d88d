"""A Slurm cluster of the tests' own on this machine: a controller, two nodes, and nothing left of them afterwards.

A node is called like its address (127.0.0.2), so a job's list of nodes resolves without /etc/hosts. Both see the same
files and processes. All that belongs to a cluster, also what its jobs start, has the cluster's SLURM_CONF in its
environment; by that it is found and killed. A program that clears its environment escapes.
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

PACKAGES = "slurmctld slurmd slurm-client munge iproute2"  # of Debian; launch/install.sh names the same
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
KEEPER = Path(__file__).with_name("processes.py")
FINAL = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}

# Ports below those that the kernel gives to clients and below torchrun's 29500, in blocks: a cluster has one.
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
NodeName=DEFAULT CPUs={cpus} RealMemory=8000
{nodes}
PartitionName=DEFAULT Nodes={names} MaxTime=INFINITE State=UP
PartitionName=main Default=YES PriorityTier=1 GraceTime=10
PartitionName=high PriorityTier=10 PreemptMode=OFF
"""
# cred_expire: a requeued job waits that long; 5 s is the least that Slurm takes
# MinJobAge: finished jobs can be asked for an hour long; there is no accounting


def why_not():
    """Why no Cluster can be started here, with the remedy; None if one can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if missing:
        return f"no Slurm here ({', '.join(missing)} not found): apt-get install --no-install-recommends {PACKAGES}"
    return None


def claim_ports():
    """A block of free ports, and the socket on its first port that keeps it from other clusters while it is open."""
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
        # What somebody's own Slurm set for the tests must not reach this one
        clean = {name: value for name, value in os.environ.items() if not re.match("SLURM|SBATCH|SRUN|SCANCEL", name)}
        self.environment = clean | {"SLURM_CONF": str(self.conf), "PATH": PATH}

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.claim, self.ports = claim_ports()
        self.sockets = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # a socket's path has 107 bytes at most
        try:
            self.place_nodes()
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_):
        self.stop()

    # What NetworkCluster does in another way

    def place_nodes(self):
        self.address, self.nodes = "127.0.0.1", ("127.0.0.2", "127.0.0.3")

    def remove_nodes(self):
        """The command that undoes `place_nodes`; may fail."""
        return ["true"]

    def slurmd(self, name):
        """The command of a node."""
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
        )
        self.conf.write_text(text)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)

        # Kills what outlives this process. Started before anything that it could have to kill, and deaf to Ctrl-C.
        keeper = ["setpriv", "--pdeathsig", "TERM", sys.executable, KEEPER, os.getpid(), self.conf, self.sockets]
        self.keeper = subprocess.Popen([str(word) for word in (*keeper, *self.remove_nodes())], start_new_session=True)
        files = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        options = ["--foreground", "--force", "--num-threads=2", f"--socket={self.sockets}/munge", *files]
        self._start_daemon("munged", ["munged", *options])
        until((self.sockets / "munge").exists, lambda: f"munged's socket: {self.logs()}", 10)
        self._start_daemon("slurmctld", ["slurmctld", "-D", "-i"])
        for name in self.nodes:
            self._start_daemon(name, self.slurmd(name))
        self._wait_until_idle()

    def _start_daemon(self, name, command, **environment):
        """It dies with this process. A node's SLURMD_NODENAME is in its slurmstepd too, and Slurm gives it to tasks."""
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
        """At once, whatever runs; no process and no port stays."""
        for daemon in self.daemons.values():
            daemon.kill()
            daemon.wait()
        self.daemons.clear()
        kill(SLURM_CONF=self.conf)
        if hasattr(self, "keeper"):
            self.keeper.kill()
            self.keeper.wait()
        remove(self.sockets, *self.remove_nodes())
        self.claim.close()

    def clear(self):
        """Back to two idle nodes and no job that is not over: what a test may have left is killed."""
        for name in self.nodes:
            if self.daemons[name].poll() is not None:
                self.start_node(name)

        gentle = time.monotonic() + 0.5  # seconds; a step whose srun is killed needs 3 to end

        def is_empty():
            if not (left := self.run("squeue", "-h", "-o", "%A")):
                return True
            self.run("scancel", "--user", str(os.geteuid()))  # again and again: some queue themselves when told to end
            for job in set(left.split()) if time.monotonic() > gentle else ():
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
        """What a command prints on stdout, such as run("squeue"); with `check`, it must succeed."""
        done = subprocess.run(
            [str(word) for word in command],
            env=self.environment | {name: str(value) for name, value in environment.items()},
            cwd=cwd,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=DEADLINE,
        )
        assert not check or done.returncode == 0, f"{command} gave {done.returncode}: {done.stderr}{self.logs()}"
        return done.stdout.strip()

    def submit(self, script, *arguments, options=(), cwd=None, **environment):
        """The id of a new job. `options` are sbatch's. Its output goes to `cwd` unless the script says otherwise."""
        cwd = cwd or Path(script).parent
        return self.run("sbatch", "--parsable", *options, script, *arguments, cwd=cwd, **environment)

    def job(self, job):
        """What Slurm knows of a job (of an array: 14_0), running or over: JobState, Restarts, ExitCode, StdOut ..."""
        return fields(self.run("scontrol", "show", "job", "-o", job))

    def output(self, job):
        path = Path(self.job(job)["StdOut"])
        return path.read_text() if path.exists() else ""

    def wait(self, job, states, restarts=0, deadline=DEADLINE):
        """What Slurm says of the job when it is first seen in one of these states (one, or several) after as many
        `restarts`. Fails at once when the job is over in another state."""
        states = {states} if isinstance(states, str) else set(states)

        def arrived():
            now = self.job(job)
            is_there = now["JobState"] in states and int(now["Restarts"]) >= restarts
            assert is_there or now["JobState"] not in FINAL, f"not {states}, {restarts} restarts: {self.story(job)}"
            return now if is_there else None

        return until(arrived, lambda: f"{states}, {restarts} restarts: {self.story(job)}", deadline)

    def story(self, job):
        """All there is to say when a job went wrong."""
        return f"{self.job(job)}\n== output\n{self.output(job)[-4000:]}{self.logs()}"

    def signal(self, job, name):
        """To all tasks of the job's steps, as `#SBATCH --signal` does; not to the batch script."""
        self.run("scancel", f"--signal={name}", job)

    def cancel(self, job):
        self.run("scancel", job)

    def requeue(self, job):
        self.run("scontrol", "requeue", job)

    def pids_of(self, job, task=None):
        """The job's processes, the eldest first: batch script, srun, tasks and their children. Or of one task of the
        step that runs, by its rank."""
        job = self.job(job)["JobId"]  # else than the id of a job of an array, 14_0
        wanted = {"SLURM_CONF": self.conf, "SLURM_JOB_ID": job}
        if task is not None:  # the batch script too has a SLURM_PROCID, but no step
            steps = re.findall(r"\.(\d+)$", self.run("squeue", "-h", "--steps", "-o", "%i", "-j", job), re.MULTILINE)
            assert steps, f"no step runs: {self.story(job)}"
            wanted |= {"SLURM_PROCID": task, "SLURM_STEP_ID": steps[-1]}
        return processes(**wanted)

    # Nodes

    def node(self, name):
        """What Slurm knows of a node. Its State is such as IDLE, MIXED (jobs, but room for more), MIXED+NOT_RESPONDING
        or DOWN+NOT_RESPONDING."""
        return fields(self.run("scontrol", "show", "node", "-o", name))

    def is_up(self, name):
        return self.node(name)["State"] in ("IDLE", "MIXED", "ALLOCATED")

    def crash_node(self, name, tell=False):
        """Kill everything of the node at once: slurmd, slurmstepd, batch scripts, tasks.

        Slurm sees it within 20 s and queues the node's jobs again; with `tell` it hears of it now. A node that is back
        before Slurm has seen anything is not missed: a job that only had tasks there, not its batch script, hangs.
        """
        kill(SLURM_CONF=self.conf, SLURMD_NODENAME=name)
        self.daemons[name].wait()
        if tell:
            self.run("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=crashed")

    def start_node(self, name):
        """After a crash; returns when the node may have jobs again."""
        self._start_daemon(name, self.slurmd(name))
        until(lambda: self.is_up(name), lambda: f"{self.node(name)} {self.logs()}")
