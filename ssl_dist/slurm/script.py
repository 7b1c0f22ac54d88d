"""The batch script of a Slurm job: the site's settings, the lines before srun, and those that decide what follows it.

After srun the exit code of all tasks and the state of the job are known: a job is queued again after 75 (asked to stop,
saved) always, after a crash at most `crashes` times, after a mistake of the user (2) or when it was cancelled never.
"""

import shlex
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator
from submitit.slurm.slurm import SlurmExecutor

from ssl_dist.config import NonNegativeInt, PositiveInt
from ssl_dist.config.section import Section, read_yaml, validate
from ssl_dist.errors import UserError

# Keys of a site that are submitit's, too.
_SAME_IN_SUBMITIT = ("partition", "account", "qos", "constraint", "nodes", "cpus_per_task")
OneLine = Annotated[str, Field(pattern=r"^[^\x00-\x1f]+$")]  # a line of the script holds it
GRES = r"^[A-Za-z][\w.-]*(:[\w.-]+)?$"  # without the number
TIME = r"^(\d+-)?\d{1,2}:\d{2}:\d{2}$"


class Site(Section):
    """The settings of every job of a site or user. Each key but the last six is also an option of the command."""

    partition: OneLine | None = None
    account: OneLine | None = None
    qos: OneLine | None = None
    constraint: OneLine | None = None
    nodes: PositiveInt = 1
    gpus_per_node: PositiveInt | None = Field(None, description="GPUs of a node, and a rank on each")
    tasks_per_node: PositiveInt | None = Field(None, description="ranks of a node, on its CPUs; null: one for each GPU")
    gres: Annotated[str, Field(pattern=GRES)] | None = Field(
        None, description="how the site wants GPUs asked for, as in gpu:h100; null: by number"
    )
    cpus_per_task: PositiveInt | None = Field(
        None, description="cores of a rank, also the threads it uses; null: the share of its GPU in the node's"
    )
    mem_gb: Annotated[float, Field(ge=0.001, le=1e6)] | None = Field(None, description="memory of a node")  # 0 is all
    time: Annotated[str, Field(pattern=TIME)] = Field("24:00:00", description="limit of one start, HH:MM:SS")
    array_parallelism: PositiveInt | None = Field(None, description="elements of an array that run at a time")
    signal_seconds: PositiveInt = Field(120, description="lead of the signal before the time limit, for the save")
    crashes: NonNegativeInt = Field(3, description="how often a job that crashed is queued again")
    python: str | None = Field(None, description="the start of Python in a task, as it stands in a shell")
    srun: list[str] = Field(default_factory=list, description="more options of srun")
    setup: list[str] = Field(default_factory=list, description="shell lines before the start: modules, variables")
    sbatch: dict[OneLine, OneLine | int | bool] = Field(default_factory=dict, description="more options of sbatch")

    @model_validator(mode="after")
    def _time_to_train(self) -> Self:
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


def read_site(file: str | Path | None, options: dict[str, Any]) -> Site:
    """The site's file, overridden by the options of the command line. Raises `UserError`."""
    tree: Any = {}
    if file is not None:
        tree = read_yaml(file, f"--site {file}", "slurm/site.yaml is an example") or {}
        if not isinstance(tree, dict):
            raise UserError(
                f"--site {file}: must be a mapping of keys such as partition; slurm/site.yaml is an example"
            )
        validate(Site, tree, f"--site {file}: ")
    overrides = {name: value for name, value in options.items() if name in Site.model_fields and value is not None}
    if "gpus_per_node" in overrides or "tasks_per_node" in overrides:
        tree = {name: value for name, value in tree.items() if name not in ("gpus_per_node", "tasks_per_node")}
    site = validate(Site, tree | overrides)
    if "gres" in overrides and site.gpus_per_node is None:
        raise UserError(f"--gres {site.gres}: says how GPUs are asked for, and none are; give --gpus-per-node too")
    return site


def setup_lines(site: Site) -> list[str]:
    """The batch script before srun. The settings are those of launch/torchrun_multi.sh, for its reasons."""
    return [
        *site.setup,
        "unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE  # of where this was submitted",
        'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # srun does not take it from sbatch",
        "export OMP_NUM_THREADS=$SRUN_CPUS_PER_TASK",
        "export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}",
        # a port of its own for every job, where the site has set some aside
        'if scontrol show config | grep -q "^MpiParams.*ports="; then export SLURM_RESV_PORTS=1; fi',
    ]


def teardown_lines(crashes: int, folder: Path) -> list[str]:
    """The batch script after srun; crashes are counted in a file of `folder`. A job that was cancelled or preempted is
    not RUNNING any more: the former stays out of the queue, the latter Slurm itself queues again.

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
    """submitit's executor, which works without Slurm too: a dry run needs none."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def script(self) -> str:
        return self._make_submission_file_text(self._submitit_command_str, "dry-run")


def executor(site: Site, folder: Path, name: str, **options: str) -> Executor:
    """submitit's executor by the site's settings; `options` are further ones of sbatch."""
    slurm = Executor(folder, python=site.python)
    given = site.model_dump(include=set(_SAME_IN_SUBMITIT))
    if site.gres is None:
        given["gpus_per_node"] = site.gpus_per_node
    elif site.gpus_per_node is not None:
        given["gres"] = f"{site.gres}:{site.gpus_per_node}"
    if site.array_parallelism is not None:
        given["array_parallelism"] = site.array_parallelism
    slurm.update_parameters(
        job_name=name,
        **given,
        ntasks_per_node=site.ranks_per_node,
        mem=None if site.mem_gb is None else f"{int(site.mem_gb * 1024)}MB",
        time=-(-site.seconds // 60),
        setup=setup_lines(site),
        teardown=teardown_lines(site.crashes, folder.parent),
        stderr_to_stdout=True,
        srun_args=["--kill-on-bad-exit=0", "--wait=30", *site.srun],  # the others have 30 s to say which one failed
        additional_parameters={"requeue": True, "signal": f"USR2@{site.signal_seconds}", **site.sbatch, **options},
        wckey=None,
    )
    return slurm
