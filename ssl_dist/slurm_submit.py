"""Trainings as Slurm jobs, through submitit: the batch script, what is checked before, the chain to an evaluation.

What decides about queueing again stands in the batch script after srun, because there the exit code of all tasks and
the state of the job are known: 75 (asked to stop, saved) always, a crash at most `crashes` times, a mistake of the user
(2) or a job that was cancelled never.
"""

import argparse
import contextlib
import itertools
import json
import os
import secrets
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import submitit
from pydantic import Field, model_validator
from submitit.helpers import clean_env
from submitit.slurm.slurm import SlurmExecutor

from ssl_dist import config, durable, evaluators, runfolder
from ssl_dist import job_here as here
from ssl_dist.blueprint import derive
from ssl_dist.config import Config, NonNegativeInt, PositiveFloat, PositiveInt
from ssl_dist.errors import UserError
from ssl_dist.evaluate import split_overrides
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

    @model_validator(mode="after")
    def _time_to_train(self):
        if self.seconds <= 2 * self.signal_seconds:
            raise ValueError(
                f"time: {self.time} must be more than twice signal_seconds, {self.signal_seconds}: the training would "
                "be told to save before it has begun"
            )
        return self

    @property
    def seconds(self) -> int:
        days, _, clock = self.time.rpartition("-")
        hours, minutes, seconds = map(int, clock.split(":"))
        return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds

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
        "unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE  # of where this was submitted",
        'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # srun does not take it from sbatch",
        "export OMP_NUM_THREADS=$SRUN_CPUS_PER_TASK OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}",
        "export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.mmap_threshold=4294967296:"
        "glibc.malloc.trim_threshold=8589934592}",
        "export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}",
        # a port of its own for every job, where the site has set some aside
        'if scontrol show config | grep -q "^MpiParams.*ports="; then export SLURM_RESV_PORTS=1; fi',
    ]


def teardown_lines(crashes: int, folder: Path) -> list[str]:
    """What the batch script does after srun; crashes are counted in a file of `folder`. A job that was cancelled or
    preempted is not RUNNING any more: the one stays away, the other Slurm itself queues again.

    An element of an array is named by its number in the array: the last one's own job number is that of the array.
    """
    return [
        "code=$?  # the highest of all tasks",
        "job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} job=${job:-$SLURM_JOB_ID}",
        f"log={shlex.quote(str(folder))}/crashes-$job.txt",
        "again() {  # Slurm's controller may be away for a while",
        '    for _ in 1 2 3 4 5 6; do scontrol requeue "$job" && sleep 60 && return; sleep 10; done',
        "}",
        'if [ "$code" != 0 ] && [ "$code" != 2 ]; then',
        "    for _ in 1 2 3 4 5 6; do",
        '        state=$(scontrol show job -o "$job" | grep -o "JobState=[A-Z]*") && break',
        "        sleep 10",
        "    done",
        '    [ "$code" = 75 ] || echo "$(date) exit code $code" >>"$log"',
        '    if [ "$state" != JobState=RUNNING ]; then',
        '        echo "exit code $code: not queued again from here: ${state:-no answer from Slurm}"',
        f'    elif [ "$code" = 75 ] || [ "$(wc -l <"$log")" -le {crashes} ]; then',
        '        echo "exit code $code: queued again"',
        "        again",
        "    else",
        '        echo "exit code $code: not queued again after as many crashes: $log"',
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


def executor(site: Site, folder: Path, name: str, **more) -> Executor:
    """submitit's executor with what the site wants; `more` are further options of sbatch."""
    made = Executor(folder)
    made.update_parameters(
        job_name=name,
        partition=site.partition,
        account=site.account,
        qos=site.qos,
        constraint=site.constraint,
        nodes=site.nodes,
        ntasks_per_node=site.ranks_per_node,
        gpus_per_node=site.gpus_per_node,
        cpus_per_task=site.cpus_per_task,
        mem=None if site.mem_gb is None else f"{int(site.mem_gb * 1024)}MB",
        time=-(-site.seconds // 60),
        setup=setup_lines(site),
        teardown=teardown_lines(site.crashes, folder.parent),
        stderr_to_stdout=True,
        srun_args=["--kill-on-bad-exit=0", "--wait=30"],  # the others have 30 s to say which one failed
        additional_parameters={"requeue": True, "signal": f"USR2@{site.signal_seconds}", **site.sbatch, **more},
        wckey=None,
    )
    return made


# ---------------------------------------------------------------------------------------------------- submitting


def train(options: argparse.Namespace) -> int:
    """`submit.py train`: check everything that can be checked here, then submit; prints a line a job."""
    site = read_site(options.site, vars(options))
    wanted = variants(options.config, options.overrides, options.seeds or [], options.sweep or [])
    for settings in wanted:
        place = Place(0, site.nodes * site.ranks_per_node, 0, site.ranks_per_node)
        blueprint = derive(settings, place)
        runfolder.check(blueprint.run, settings)
    _check_evaluation(options.then)
    if options.cluster == "local":
        return here.run_all(site.nodes, site.ranks_per_node, wanted, options.then)
    name = Path(config.load(options.config, options.overrides).run_dir).name
    folder = _folder(wanted, name)
    made = executor(site, folder / "%A", name)
    made.parameters["map_count"] = len(wanted) if len(wanted) > 1 else None  # of the script that is shown and tried
    if options.dry_run:
        print(made.script())
        return 0
    _try(made.script())
    if options.then:
        _try(_evaluator(site, folder, wanted[0]).script())
    made.parameters.pop("map_count")
    with _outside_of_jobs():
        numbers = _submit(made, [_training(folder, settings) for settings in wanted])
        for number, settings in zip(numbers, wanted, strict=True):
            _note(settings, number, "train")
            print(f"job {number}: {settings.run_dir}", flush=True)
        for number, settings in zip(numbers, wanted, strict=True) if options.then else ():
            evaluation = Job(("evaluate", settings.run_dir, *options.then))
            [after] = _submit(_evaluator(site, folder, settings, f"afterok:{number}"), [evaluation])
            _note(settings, after, "evaluate")
            print(f"job {after}: {' '.join(options.then)} of {settings.run_dir}, after job {number}", flush=True)
    return 0


@contextlib.contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """What a job sets for its own steps must not reach one that is submitted from it; where Slurm is, it must."""
    conf = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    with clean_env():
        os.environ |= conf
        yield


def _check_evaluation(then: list[str] | None) -> None:
    if then is None:
        return
    chosen = [word for word in then if "=" not in word]
    if not chosen:
        raise UserError(f"--then {' '.join(then)}: name at least one evaluator, for example knn")
    _, others = split_overrides([word for word in then if "=" in word])
    evaluators.parse_options(chosen, others)


def _folder(wanted: list[Config], name: str) -> Path:
    """Where scripts and logs go: RUN/slurm, and for several runs <run_dir>-array/slurm beside them."""
    run = Path(wanted[0].run_dir).absolute()
    return run / "slurm" if len(wanted) == 1 else run.with_name(f"{name}-array") / "slurm"


def _training(folder: Path, settings: Config) -> Job:
    """The job trains by a copy of the resolved config: what is edited meanwhile is another training."""
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    path = folder / f"config-{Path(settings.run_dir).name}-{stamp}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    durable.write_text(path, config.dump(settings))
    return Job(("train", str(path)))


def _evaluator(site: Site, folder: Path, settings: Config, dependency: str | None = None) -> Executor:
    """One task, started when the training has ended well; Slurm cancels it when the training fails."""
    one = site.model_copy(update={"nodes": 1, "tasks_per_node": 1, "gpus_per_node": site.gpus_per_node and 1})
    more = {} if dependency is None else {"dependency": dependency, "kill-on-invalid-dep": "yes"}
    return executor(one, folder / "%A", f"{Path(settings.run_dir).name}-evaluate", **more)


def _submit(made: Executor, jobs: list[Job]) -> list[str]:
    """The numbers of the new jobs; several are an array. Raises `UserError` with Slurm's reason."""
    try:
        with made.batch():
            submitted = [made.submit(job) for job in jobs]
        return [job.job_id for job in submitted]
    except submitit.core.utils.FailedJobError as error:
        raise UserError(f"sbatch refuses the job: {str(error).strip().splitlines()[-1]}") from None


def variants(path: str, overrides: list[str], seeds: list[int], sweep: list[str]) -> list[Config]:
    """The config for every choice of a seed and of a value of each `key=[value, value]` in `sweep`, each with a run_dir
    of its own, named by what was chosen; the config itself where there is nothing to choose."""
    axes = [_axis(word) for word in sweep] + ([("seed", seeds)] if seeds else [])
    run = Path(config.load(path, overrides).run_dir)
    if axes and not run.name:
        raise UserError(f"run_dir = {str(run)!r}: has no name that a seed could be added to")
    found = []
    for values in itertools.product(*(values for _, values in axes)):
        chosen = [(key, value) for (key, _), value in zip(axes, values, strict=True)]
        name = "".join(f"-{key.rpartition('.')[2]}{value}".replace("/", "-") for key, value in chosen)
        more = [f"{key}={json.dumps(value)}" for key, value in chosen]
        found.append(
            config.load(path, [*overrides, *more, f"run_dir={json.dumps(str(run.with_name(run.name + name)))}"])
        )
    runs = [settings.run_dir for settings in found]
    if len(set(runs)) < len(runs):
        raise UserError("--seeds, --sweep: a value is given twice; name every one once")
    return found


def _axis(word: str) -> tuple[str, list]:
    key, _, text = word.partition("=")
    values = parse_yaml(text, f"--sweep {word}") if text else None
    if not isinstance(values, list) or not values or any(isinstance(value, list | dict) for value in values):
        raise UserError(f"--sweep {word}: write key=[value, value], for example optim.lr=[1e-3,3e-3]")
    return key, values


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
