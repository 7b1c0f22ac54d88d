"""Submission of Slurm jobs through submitit: the checks before it, arrays, and evaluations that follow trainings.

What imports torch is imported by what needs it: a dry run does not.
"""

import argparse
import contextlib
import itertools
import json
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import submitit
from submitit.helpers import clean_env

from ssl_dist import config, evaluators
from ssl_dist.config import Config
from ssl_dist.config.section import parse_yaml
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.errors import UserError, quoted
from ssl_dist.job import Job
from ssl_dist.slurm import local, nodes
from ssl_dist.slurm.script import Executor, Site, executor, read_site
from ssl_dist.storage import durable


def train(options: argparse.Namespace) -> int:
    """`submit.py train`: check everything that can be checked here, then submit; prints a line a job."""
    site = read_site(options.site, vars(options))
    configs = variants(options.config, options.overrides, options.seeds or [], options.sweep or [])
    if not options.dry_run:
        _check_trainings(site, configs, options.then)
    if options.cluster == "local" and not options.dry_run:
        return local.run_all(site.nodes, site.ranks_per_node, configs, options.then)
    site = nodes.settle(site)
    name = Path(config.load(options.config, options.overrides).run_dir).name
    folder = _folder(configs, name)
    trainer = executor(site, folder / "%A", name)
    trainer.parameters["map_count"] = len(configs) if len(configs) > 1 else None  # of the script that is printed
    if options.dry_run:
        print(trainer.script())
        print(_elements(configs, options.then))
        return 0
    test_script(trainer.script())
    if options.then:
        test_script(_evaluator(site, folder, Path(configs[0].run_dir), options.then).script())
    trainer.parameters.pop("map_count")
    job_ids = submit_jobs(trainer, "train", {training.run_dir: _training(folder, training) for training in configs})
    for run_dir, job_id in job_ids.items():
        print(f"job {job_id}: {run_dir}", flush=True)
    for run_dir, job_id in job_ids.items() if options.then else ():
        evaluator = _evaluator(site, folder, Path(run_dir), options.then, f"afterok:{job_id}")
        next_ids = submit_jobs(evaluator, "evaluate", {run_dir: Job(("evaluate", run_dir, *options.then))})
        print(f"job {next_ids[run_dir]}: {' '.join(options.then)} of {run_dir}, after job {job_id}", flush=True)
    return 0


def _check_trainings(site: Site, configs: Sequence[Config], then: list[str] | None) -> None:
    """Everything of data and methods that can be checked here. Raises `UserError`."""
    from ssl_dist.run import folder as run_folder
    from ssl_dist.run.blueprint import derive

    for training in configs:
        rank_info = RankInfo(0, site.nodes * site.ranks_per_node, 0, site.ranks_per_node)
        plan = derive(training, rank_info)
        run_folder.check(plan.run, plan.config)
    if then is not None:
        _check_evaluation("--then", then)


def _elements(configs: Sequence[Config], then: list[str] | None) -> str:
    """What the job or the elements of the array would train, as comments of the script."""
    lines = [f"# {number}: {training.run_dir}" for number, training in enumerate(configs)]
    head = "# It trains" if len(lines) == 1 else f"# The {len(lines)} elements of the array train"
    further = f", each followed by {' '.join(then)}" if then else ""
    return "\n".join([f"{head}{further}; data and method are looked at when it is submitted:", *lines])


def evaluate(options: argparse.Namespace) -> int:
    """`submit.py evaluate`: the same for an evaluation of a run."""
    from ssl_dist.run import plugged
    from ssl_dist.storage import checkpoint

    site, run = read_site(options.site, vars(options)), options.run
    if not checkpoint.steps(run):
        raise UserError(f"{run}: holds no checkpoint; train first")
    plugged.recall_run(run)
    _check_evaluation(f"evaluate {run}", options.overrides, options.validation, options.search)
    words = [*options.overrides, *(["--search", *options.search] if options.search else [])]
    if options.validation is not None:
        words += ["--validation", options.validation]
    if options.split is not None:
        words += ["--split", options.split]
    words += [word for file in options.plugins for word in ("--plugins", str(file.absolute()))]
    evaluator = _evaluator(nodes.settle(site), run.absolute() / "slurm", run, options.overrides)
    if options.dry_run:
        print(evaluator.script())
        return 0
    test_script(evaluator.script())
    job_ids = submit_jobs(evaluator, "evaluate", {str(run): Job(("evaluate", str(run), *words))})
    print(f"job {job_ids[str(run)]}: {' '.join(words)} of {run}", flush=True)
    return 0


@contextlib.contextmanager
def _clean_environment() -> Iterator[None]:
    """Without the variables of a job, which must not reach one that is submitted from it; the path of Slurm's own
    configuration stays."""
    conf = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    with clean_env():
        os.environ |= conf
        yield


def _check_evaluation(key: str, words: list[str], validation: str | None = None, searched: Sequence[str] = ()) -> None:
    from ssl_dist.evaluate import search
    from ssl_dist.evaluate.command import parse

    chosen = [word for word in words if "=" not in word]
    if not chosen:
        raise UserError(f"{key} {' '.join(words)}: name at least one evaluator, for example knn")
    held_out = None if validation is None else search.validation(validation)
    parse(chosen, [word for word in words if "=" in word], held_out, searched)


def _folder(configs: list[Config], name: str) -> Path:
    """Where scripts and logs go: RUN/slurm, and for several runs <run_dir>-array/slurm beside them."""
    run = Path(configs[0].run_dir).absolute()
    return run / "slurm" if len(configs) == 1 else run.with_name(f"{name}-array") / "slurm"


def _training(folder: Path, training: Config) -> Job:
    """A job that trains by a copy of the resolved config, so that later edits do not reach it."""
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    path = folder / f"config-{Path(training.run_dir).name}-{stamp}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    durable.write_text(path, config.dump(training))
    return Job(("train", str(path)))


def _evaluator(site: Site, folder: Path, run: Path, words: list[str], dependency: str | None = None) -> Executor:
    """The executor of an evaluation. dependency: it starts when a training has succeeded, and is cancelled when that
    fails. Evaluators of images train on all ranks of the site; those of features need one task."""
    if not any(isinstance(evaluators.find(word), evaluators.ImageEvaluator) for word in words if "=" not in word):
        site = site.model_copy(update={"nodes": 1, "tasks_per_node": 1, "gpus_per_node": site.gpus_per_node and 1})
    further = {} if dependency is None else {"dependency": dependency, "kill-on-invalid-dep": "yes"}
    return executor(site, folder / "%A", f"{run.name}-evaluate", **further)


def submit_jobs(slurm: Executor, kind: str, jobs: dict[str, Job]) -> dict[str, str]:
    """Submit the jobs of runs, several as an array; returns their ids by run_dir. Raises `UserError` with Slurm's
    reason. RUN/slurm/jobs.jsonl keeps them for `submit.py status`."""
    try:
        with _clean_environment(), slurm.batch():
            submitted = [slurm.submit(job) for job in jobs.values()]
        job_ids = {run_dir: job.job_id for run_dir, job in zip(jobs, submitted, strict=True)}
    except submitit.core.utils.FailedJobError as error:
        raise UserError(f"sbatch refuses the job: {str(error).strip().splitlines()[-1]}") from None
    for run_dir, job_id in job_ids.items():
        entry = {"job": job_id, "kind": kind, "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        path = Path(run_dir, "slurm", "jobs.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.append_line(path, json.dumps(entry))
    return job_ids


def variants(path: str, overrides: list[str], seeds: list[int], sweep: list[str]) -> list[Config]:
    """The config for every combination of a seed and of a value of each `key=[value, value]` in `sweep`, each with a
    run_dir of its own, named by these values; the config itself where there are none."""
    axes = [_axis(word) for word in sweep] + ([("seed", seeds)] if seeds else [])
    base = config.load(path, overrides)
    if not axes:
        return [base]
    run = Path(base.run_dir)
    if not run.name:
        raise UserError(f"run_dir = {quoted(str(run))}: has no name that a seed could be added to")
    configs = []
    for values in itertools.product(*(values for _, values in axes)):
        chosen = [(key, value) for (key, _), value in zip(axes, values, strict=True)]
        name = "".join(f"-{key.rpartition('.')[2]}{value}".replace("/", "-") for key, value in chosen)
        chosen.append(("run_dir", str(run.with_name(run.name + name))))
        configs.append(config.load(path, [*overrides, *(f"{key}={json.dumps(value)}" for key, value in chosen)]))
    if len({variant.run_dir for variant in configs}) < len(configs):
        raise UserError("--seeds, --sweep: a value is given twice; name every one once")
    return configs


def _axis(word: str) -> tuple[str, list]:
    key, _, text = word.partition("=")
    values = parse_yaml(text, f"--sweep {word}") if text else None
    if not isinstance(values, list) or not values or any(isinstance(value, list | dict) for value in values):
        raise UserError(f"--sweep {word}: write key=[value, value], for example optim.lr=[1e-3,3e-3]")
    return key, values


def test_script(script: str) -> None:
    """Have sbatch check the script without submitting it. Raises `UserError` with its reason."""
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
