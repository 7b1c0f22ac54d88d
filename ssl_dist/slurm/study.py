"""`submit.py study`: an array with an element for every run of a study that is left, and a job that lays it all out.

Each element trains and measures its run. They read a copy of the study and of its configs, so that later edits do not
reach them.
"""

import argparse
import secrets
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

from ssl_dist import config
from ssl_dist.config import to_tree
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.job import Job
from ssl_dist.reading import json_lines
from ssl_dist.run.blueprint import derive
from ssl_dist.slurm import nodes
from ssl_dist.slurm.script import executor, read_site
from ssl_dist.slurm.status import job_of
from ssl_dist.slurm.submit import submit_jobs, test_script
from ssl_dist.storage import durable
from ssl_dist.study import command, dry_run, spec
from ssl_dist.study.spec import Study, Training

OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "")


def submit(options: argparse.Namespace) -> int:
    """Check everything that can be checked here, then submit; prints a line a job. Runs that are complete or whose job
    is not over are left out."""
    site = read_site(options.site, vars(options))
    described, trainings = spec.read(options.file, options.overrides)
    for training in trainings:
        rank_info = RankInfo(0, site.nodes * site.ranks_per_node, 0, site.ranks_per_node)
        plan = (dry_run.plan_of if options.dry_run else derive)(training.config, rank_info)
        command.check_run(training, plan)
    waiting = {training.name: job for training in trainings if (job := _job_not_over(training.run))}
    left = [training for training in trainings if training.name not in waiting and not command.is_complete(training)]
    site, folder = nodes.settle(site), Path(described.folder).absolute() / "slurm"
    trainer = executor(site, folder / "%A", folder.parent.name)
    if options.dry_run:
        trainer.parameters["map_count"] = len(left) if len(left) > 1 else None
        print(trainer.script())
        print(dry_run.describe(options.file, options.overrides))
        return 0
    test_script(trainer.script())
    file = _copy(folder, described, trainings)
    for name, job in waiting.items():
        print(f"job {job}: {name}, which is not over", flush=True)
    jobs = {str(training.run): Job(("study", str(file), "--only", training.name)) for training in left}
    job_ids = submit_jobs(trainer, "study", jobs) if jobs else {}
    for run_dir, job_id in job_ids.items():
        print(f"job {job_id}: {run_dir}", flush=True)
    after = ":".join([*job_ids.values(), *waiting.values()])
    one_task = site.model_copy(update={"nodes": 1, "tasks_per_node": 1, "gpus_per_node": site.gpus_per_node and 1})
    further = {"dependency": f"afterany:{after}"} if after else {}
    collector = executor(one_task, folder / "%A", f"{folder.parent.name}-collect", **further)
    collected = submit_jobs(collector, "collect", {described.folder: Job(("study", str(file), "--collect"))})
    print(f"job {collected[described.folder]}: the table in {described.folder}, after these", flush=True)
    return 0


def _job_not_over(run: Path) -> str:
    """The newest job of a run, where Slurm has not ended it; else empty."""
    path = run / "slurm" / "jobs.jsonl"
    entries = json_lines(path, lambda line: isinstance(line.get("job"), str))[0] if path.exists() else []
    if not entries:
        return ""
    job = entries[-1]["job"]
    return "" if job_of(job).get("JobState", "") in OVER else job


def _copy(folder: Path, described: Study, trainings: Sequence[Training]) -> Path:
    """The study and its configs in the folder, as they are now: a study whose axes set nothing any more."""
    copy = folder / f"study-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    copy.mkdir(parents=True)
    for training in trainings:
        durable.write_text(copy / f"{training.name}.yaml", config.dump(training.config))
    template = "-".join(f"{{{axis}}}" for axis in described.axes) + ".yaml"
    axes = {axis: described.values(axis) for axis in described.axes}
    tree = to_tree(described) | {"axes": axes, "config": template, "overrides": {}}
    tree["folder"] = str(Path(described.folder).absolute())
    durable.write_text(copy / "study.yaml", yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
    return copy / "study.yaml"
