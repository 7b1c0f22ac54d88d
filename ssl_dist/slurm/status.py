"""`submit.py status`: a line for every job, from Slurm's answer and the files of its run."""

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ssl_dist import config, text_table
from ssl_dist.errors import UserError, refuse_unreadable
from ssl_dist.progress import duration
from ssl_dist.reading import is_finite, json_lines
from ssl_dist.run.metrics import FILE, read_metrics
from ssl_dist.storage import checkpoint

HEAD = ("job", "what", "state", "run", "step", "epoch", "images/s", "time left", "checkpoint", "why")


def table(runs: Sequence[Path]) -> str:
    """A line for every job noted in RUN/slurm/jobs.jsonl of the runs (none: of all in runs/). Raises `UserError`."""
    if shutil.which("scontrol") is None:
        raise UserError("scontrol: not found; run this on a machine of the cluster")
    job_files = [run / "slurm" / "jobs.jsonl" for run in runs] or sorted(Path("runs").glob("*/slurm/jobs.jsonl"))
    if not job_files:
        raise UserError("runs/*/slurm: no job was submitted from here; name the runs")
    for path in job_files:
        if not path.exists():
            raise UserError(f"{path.parent.parent}: no job of this run was submitted from here")
    rows: list[Sequence[str]] = [HEAD]
    for path in job_files:
        with refuse_unreadable(path):
            entries, _ = json_lines(path, lambda line: all(isinstance(line.get(key), str) for key in ("job", "kind")))
        for entry in entries:
            rows.append(_row(path.parent.parent, entry["job"], entry["kind"]))
    return "\n".join(text_table.aligned(rows))


def job_of(job: str) -> dict[str, str]:
    """The fields of `scontrol show job`; empty where Slurm has forgotten the job."""
    done = subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, text=True, check=False)
    if done.returncode and "Invalid job id" not in done.stderr:
        raise UserError(f"scontrol show job {job}: {done.stderr.strip()}")
    return dict(re.findall(r"(\S+?)=(\S*)", done.stdout)) if done.returncode == 0 else {}


def _row(run: Path, job: str, kind: str) -> tuple[str, ...]:
    fields = job_of(job)
    state = fields.get("JobState", "gone")
    restarts = int(fields.get("Restarts", 0))
    if restarts:
        state += f" (start {restarts + 1})"
    reason = fields.get("Reason", "None")
    progress = _progress(run) if kind == "train" else ("", "", "", "")
    steps = checkpoint.steps(run)
    return (job, kind, state, str(run), *progress, str(steps[-1]) if steps else "", "" if reason == "None" else reason)


def _progress(run: Path) -> tuple[str, str, str, str]:
    """Step, epoch, images a second and the time left, from the last line of metrics.jsonl and the length."""
    try:
        lines, optim = read_metrics(run / FILE)[0], _optim(run)
    except (OSError, UserError):
        return "", "", "", ""
    speeds = ("seconds_per_step", "images_per_s")
    shown = [line for line in lines if line["epoch"] > 0 and all(is_finite(line.get(key)) for key in speeds)]
    if not shown:  # nothing yet
        return "", "", "", ""
    last = shown[-1]
    total = optim.steps or round(optim.epochs * last["step"] / last["epoch"])
    left = (total - last["step"]) * last["seconds_per_step"]
    return (
        f"{last['step']}/{total}", f"{last['epoch']:.1f}", f"{last['images_per_s']:.4g}",
        duration(left) if left > 0 else "0:00",
    )  # fmt: skip


def _optim(run: Path) -> config.Optim:
    """The section `optim` of the newest start: config.yaml keeps that of the first, and a run may be prolonged."""
    starts, _ = json_lines(
        run / "logs" / "starts.jsonl",
        lambda line: isinstance(line.get("config"), dict) and isinstance(line["config"].get("optim"), dict),
    )
    if not starts:
        return config.load(run / "config.yaml").optim
    return config.validate(config.Optim, starts[-1]["config"]["optim"], f"{run}/logs/starts.jsonl: optim.")
