"""Trainings as Slurm jobs, through submitit: the batch script, what is checked before, the chain to an evaluation.

What decides about queueing again stands in the batch script after srun, because there the exit code of all tasks and
the state of the job are known: 75 (asked to stop, saved) always, a crash at most `crashes` times, a mistake of the user
(2) or a job that was cancelled never.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import submitit
from pydantic import Field
from submitit.slurm.slurm import SlurmExecutor

from ssl_dist import config, evaluators, runfolder
from ssl_dist.blueprint import derive
from ssl_dist.config import Config, NonNegativeInt, PositiveFloat, PositiveInt
from ssl_dist.errors import UserError
from ssl_dist.job import Job
from ssl_dist.place import Place
from ssl_dist.section import Section, parse_yaml, validate

TIME = r"^(\d+-)?\d{1,2}:\d{2}:\d{2}$"


class Site(Section):
    """What every job of a site or user wants. Each key but the last four is also an option of the command."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    nodes: PositiveInt = 1
    gpus_per_node: PositiveInt | None = Field(None, description="GPUs of a node, and a rank on each")
    tasks_per_node: PositiveInt | None = Field(None, description="ranks of a node, on its CPUs; null: one for each GPU")
    cpus_per_task: PositiveInt | None = Field(None, description="cores of a rank, also the threads it uses")
    mem_gb: PositiveFloat | None = Field(None, description="memory of a node")
    time: Annotated[str, Field(pattern=TIME)] = Field("24:00:00", description="limit of one start, HH:MM:SS")
    signal_seconds: PositiveInt = Field(120, description="lead of the signal before the time limit, for the save")
    crashes: NonNegativeInt = Field(3, description="how often a job that crashed is queued again")
    setup: list[str] = Field(default_factory=list, description="shell lines before the start: modules, variables")
    sbatch: dict[str, str | int | bool] = Field(default_factory=dict, description="more options of sbatch")

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or self.gpus_per_node or 1


def read_site(file: str | Path | None, options: dict) -> Site:
    """The site's file with the options of the command line before it. Raises `UserError`."""
    tree = {}
    if file is not None:
        try:
            tree = parse_yaml(Path(file).read_text(encoding="utf-8"), str(file)) or {}
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not a text file"
            raise UserError(f"--site {file}: cannot be read: {reason}; slurm/site.yaml is an example") from None
        if not isinstance(tree, dict):
            raise UserError(
                f"--site {file}: must be a mapping of keys such as partition; slurm/site.yaml is an example"
            )
    given = {name: value for name, value in options.items() if name in Site.model_fields and value is not None}
    if "gpus_per_node" in given or "tasks_per_node" in given:
        tree = {name: value for name, value in tree.items() if name not in ("gpus_per_node", "tasks_per_node")}
    return validate(Site, tree | given)


# ---------------------------------------------------------------------------------------------------- the script


def setup_lines(site: Site) -> list[str]:
    """What the batch script does before srun. The settings are those of launch/torchrun_multi.sh, for its reasons."""
    return [
        *site.setup,
        'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1} OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}",
        "export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.mmap_threshold=4294967296:"
        "glibc.malloc.trim_threshold=8589934592}",
        "export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}",
        # a port of its own for every job, where the site has set some aside
        'if scontrol show config | grep -q "^MpiParams.*ports="; then export SLURM_RESV_PORTS=1; fi',
    ]


def teardown_lines(crashes: int, folder: Path) -> list[str]:
    """What the batch script does after srun; crashes are counted in a file of `folder`. A job that was cancelled or
    preempted is not RUNNING any more: the one stays away, the other Slurm itself queues again."""
    return [
        "code=$?  # the highest of all tasks",
        f"log={shlex.quote(str(folder))}/crashes-$SLURM_JOB_ID.txt",
        'state=$(scontrol show job -o "$SLURM_JOB_ID" | grep -o "JobState=[A-Z]*")',
        'if [ "$code" != 0 ] && [ "$code" != 2 ] && [ "$state" = JobState=RUNNING ]; then',
        '    [ "$code" = 75 ] || echo "$(date) exit code $code" >>"$log"',
        f'    if [ "$code" = 75 ] || [ "$(wc -l <"$log")" -le {crashes} ]; then',
        '        echo "exit code $code: queued again" && scontrol requeue "$SLURM_JOB_ID" && sleep 60',
        "    fi",
        "fi",
        'exit "$code"',
    ]


class Executor(SlurmExecutor):
    """submitit's, which is also made where there is no Slurm: a dry run works on any machine."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def script(self) -> str:
        return self._make_submission_file_text(self._submitit_command_str, "dry-run")


def executor(site: Site, folder: Path, name: str, **parameters) -> Executor:
    made = Executor(folder)
    limit = site.time.split("-")
    hours, minutes, seconds = map(int, limit[-1].split(":"))
    days = int(limit[0]) if len(limit) == 2 else 0
    wanted = {
        "job_name": name,
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "constraint": site.constraint,
        "nodes": site.nodes,
        "ntasks_per_node": site.ranks_per_node,
        "gpus_per_node": site.gpus_per_node,
        "cpus_per_task": site.cpus_per_task,
        "mem": None if site.mem_gb is None else f"{int(site.mem_gb * 1024)}MB",
        "time": ((days * 24 + hours) * 60 + minutes) + (seconds > 0),
        "signal_delay_s": site.signal_seconds,
        "setup": setup_lines(site),
        "teardown": teardown_lines(site.crashes, folder.parent),
        "stderr_to_stdout": True,
        "srun_args": ["--kill-on-bad-exit=0", "--wait=30"],  # the others have 30 s to say which one failed
        "additional_parameters": {"requeue": True, **site.sbatch},
        "wckey": None,
    } | parameters
    made.update_parameters(**wanted)
    return made


# ---------------------------------------------------------------------------------------------------- submitting


def train(options: argparse.Namespace) -> int:
    """`submit.py train`: check everything that can be checked here, then submit; prints a line a job."""
    site = read_site(options.site, vars(options))
    seeds = options.seeds or [None]
    wanted = [_of_seed(options.config, options.overrides, seed) for seed in seeds]
    for settings, _ in wanted:
        place = Place(0, site.nodes * site.ranks_per_node, 0, site.ranks_per_node)
        blueprint = derive(settings, place)
        _ = blueprint.grid
        runfolder.check(blueprint.run, settings)
    if options.then:
        chosen = [word for word in options.then if "=" not in word]
        if not chosen:
            raise UserError(f"--then {' '.join(options.then)}: name at least one evaluator, for example knn")
        evaluators.parse_options(chosen, [word for word in options.then if "=" in word])
    base = Path(config.load(options.config, options.overrides).run_dir)
    folder = base / "slurm" if options.seeds is None else base.with_name(base.name + "-seeds") / "slurm"
    jobs = [Job(tuple(arguments)) for _, arguments in wanted]
    if options.cluster == "local":
        return _run_here(site, folder, jobs, [Path(settings.run_dir) for settings, _ in wanted], options.then)
    made = executor(site, (folder / "%A").absolute(), base.name)
    if len(jobs) > 1:
        made.parameters["map_count"] = len(jobs)  # of the script that is shown and tried; submitit sets its own
    if options.dry_run:
        print(made.script())
        return 0
    _try(made.script())
    made.parameters.pop("map_count", None)
    with made.batch():
        submitted = [made.submit(job) for job in jobs]
    for job, (settings, _) in zip(submitted, wanted, strict=True):
        _note(settings, job.job_id, "train")
        (job.paths.folder / f"{job.job_id}_config.yaml").write_text(config.dump(settings), encoding="utf-8")
        print(f"job {job.job_id}: {settings.run_dir}")
    for job, (settings, _) in zip(submitted, wanted, strict=True):
        if options.then:
            _evaluate_after(site, folder, job.job_id, settings, options.then)
    return 0


def _of_seed(path: str, overrides: list[str], seed: int | None) -> tuple[Config, list[str]]:
    """The config of one training and the arguments of its command."""
    more = list(overrides)
    if seed is not None:
        if seed < 0:
            raise UserError(f"--seeds {seed}: a seed is 0 or more")
        more += [f"seed={seed}", f"run_dir={config.load(path, overrides).run_dir}-seed{seed}"]
    settings = config.load(path, more)
    return settings, ["train", str(Path(path).absolute()), *more]


def _evaluate_after(site: Site, folder: Path, job_id: str, settings: Config, then: list[str]) -> None:
    """One task, started when the training has ended well; Slurm cancels it when the training fails."""
    one = site.model_copy(update={"nodes": 1, "tasks_per_node": 1, "gpus_per_node": site.gpus_per_node and 1})
    more = {"requeue": True, "kill-on-invalid-dep": "yes", **site.sbatch}
    name = f"{Path(settings.run_dir).name}-evaluate"
    made = executor(one, (folder / "%A").absolute(), name, dependency=f"afterok:{job_id}", additional_parameters=more)
    job = made.submit(Job(("evaluate", settings.run_dir, *then)))
    _note(settings, job.job_id, "evaluate")
    print(f"job {job.job_id}: {' '.join(then)} of {settings.run_dir}, after job {job_id}")


def _try(script: str) -> None:
    """Have sbatch look at the script without submitting it. Raises `UserError` with its reason."""
    if shutil.which("sbatch") is None:
        raise UserError("sbatch: not found; run this on a machine of the cluster, or with --cluster local or --dry-run")
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(script)
        file.flush()
        done = subprocess.run(["sbatch", "--test-only", file.name], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1].removeprefix("sbatch: ")
        raise UserError(
            f"sbatch refuses the job: {reason}; see --partition, --account, --time, --nodes and the site file"
        )


def _note(settings: Config, job_id: str, kind: str) -> None:
    """RUN/slurm/jobs.jsonl, from which `submit.py status` knows the jobs of a run."""
    path = Path(settings.run_dir) / "slurm" / "jobs.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"job": job_id, "kind": kind, "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z")}) + "\n")


def _run_here(site: Site, folder: Path, jobs: list[Job], runs: list[Path], then: list[str] | None) -> int:
    """The same job objects in processes of this machine, one job after another."""
    if site.nodes > 1:
        raise UserError(f"--nodes {site.nodes}: with --cluster local there is one node, this machine")
    for job, run in zip(jobs, runs, strict=True):
        for step, tasks in [(job, site.ranks_per_node)] + ([(Job(("evaluate", str(run), *then)), 1)] if then else []):
            made = submitit.AutoExecutor(folder / "local-%j", cluster="local")
            made.update_parameters(tasks_per_node=tasks, timeout_min=365 * 24 * 60)
            here = made.submit(step)
            print(f"{' '.join(step.arguments[:2])}: {here.paths.folder}", file=sys.stderr, flush=True)
            code = here._process.wait()
            if code:
                print(here.stderr() or here.stdout() or "", file=sys.stderr)
                return code
    return 0
