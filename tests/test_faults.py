"""Real faults in one of two real ranks under torchrun: all ranks end in time and report which rank failed, where and
why.

`pytest -s tests/test_faults.py` prints the seconds and the error lines.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from ssl_dist.storage import checkpoint
from tests import faulty_rank
from tests.forked_torchrun import ForkedTorchrun
from tests.messages import naming
from tests.processes import kill, running, send
from tests.ranks import free_port, launch
from tests.test_train import CONFIG, fingerprint, in_ranks, metrics, overrides, run_training

ROOT = Path(__file__).parent.parent
TIMEOUT = 8  # seconds without progress, the run's own
pytestmark = pytest.mark.slow


OWN = [f"timeout={TIMEOUT}", "checkpoint.every_steps=2", "checkpoint.every_epochs=null", "log.every_steps=1"]


def training(data, run, *more):
    return ["train", CONFIG, *overrides(data, run, *OWN, *more)]


@pytest.fixture
def torchrun(tmp_path):
    """Starts ranks under torchrun, forked or each a program of its own; none of them outlives its test."""
    mark = {"SSL_DIST_TEST": uuid.uuid4().hex}
    with contextlib.ExitStack() as processes:
        yield lambda *arguments, **options: processes.enter_context(_torchrun(mark, *arguments, **options))
        kill(**mark)
        send([int(path.read_text()) for path in tmp_path.glob("pid-*")], signal.SIGKILL)


def _torchrun(mark, folder, fault, arguments, restarts=0, ranks=2, forked=True):
    environment = mark | {"PYTHONPATH": str(ROOT), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    environment |= {"SSL_DIST_EXIT_FILE": str(folder / "exit-code"), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    options = [
        "--nproc-per-node", str(ranks), "--max-restarts", str(restarts), "--rdzv-backend", "c10d",
        "--rdzv-endpoint", f"localhost:{free_port()}", "--local-addr", "127.0.0.1", "--shutdown-timeout", "10",
        "--log-dir", str(folder / "torchrun"), "--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2",
    ]  # fmt: skip
    words = [fault, str(folder), *map(str, arguments)]
    if forked:
        return ForkedTorchrun(options, faulty_rank.main, words, environment, folder / "stderr")
    command = [sys.executable, ROOT / "launch/torchrun.py", *options, ROOT / "tests/faulty_rank.py", *words]
    return subprocess.Popen(command, env=os.environ | environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds=150.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"the condition did not hold within {seconds:g} s"
        time.sleep(0.02)


def seconds_until_all_ended(folder, fault_at=None):
    """From the fault until no process of a rank is alive."""
    wait_for(lambda: fault_at or ((folder / "fault").exists() and (folder / "fault").read_text()))
    pids = [int(path.read_text()) for path in folder.glob("pid-*")]
    wait_for(lambda: not running(pids))
    return time.time() - (fault_at or float((folder / "fault").read_text()))


def error_lines(stderr):
    return [line for line in stderr.splitlines() if line.startswith(("error:", "WARNING"))]


FOUR_RANKS = ("killed", "frozen", "stuck_in_user_code")  # of which one is faulty; the other faults meet one of two
LOST_RANK_1 = r"rank [023] on \S+ at step 3: lost rank 1 on .* step 3"
FAULTS = {  # patterns of the ranks' error lines: rank, step, cause and place
    "killed": [LOST_RANK_1],
    "stuck_in_user_code": [
        naming("rank 1", "step 3", "8 s", "faulty_rank.py") + r":\d+ in stuck_in_user_code",
        r"rank [023] on \S+ at step 3: rank 1 on .* step 3: no progress for 8 s",
    ],
    "stuck_in_c": [LOST_RANK_1],
    "frozen": [LOST_RANK_1],
    "frozen_unseen": [LOST_RANK_1],
    "loader_exception": [
        naming("rank 1", "step 3", "ValueError: planned failure in the loader"),
        naming("rank 0", "step 3", "rank 1", "step 3", "ValueError: planned failure in the loader"),
    ],
    "skipped_collective": [r"number \d+ was all_reduce at \w+.py:\d+ on rank 0 and all_reduce at \w+.py:\d+ on rank 1"],
    "not_finite": [naming("rank 1", "step 3", "loss", "nan") + r".*step-00000002\.pt; begin anew"],
    "stuck_in_the_save": [
        naming("rank 0", "step 4", "8 s", "save of step 4", "faulty_rank.py") + r":\d+ in stuck",
        naming("rank 1", "step 4", "rank 0", "step 4", "8 s", "save"),
    ],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_all_ranks_end_in_time_and_name_the_cause(fault, digits, tmp_path, torchrun):
    ranks, more = (4, ["data.view_shards=2"]) if fault in FOUR_RANKS else (2, [])
    process = torchrun(tmp_path, fault, training(digits, tmp_path / "run", *more), ranks=ranks)
    seconds = seconds_until_all_ended(tmp_path)
    _, stderr = process.communicate(timeout=150)
    errors = error_lines(stderr)
    print(f"\n{fault}: {seconds:.1f} s\n  " + "\n  ".join(errors))
    assert process.returncode == 1, stderr
    for pattern in FAULTS[fault]:
        assert re.search(pattern, "\n".join(errors)), f"{pattern!r} not in:\n{stderr}"
    assert len(errors) <= ranks
    if fault in FOUR_RANKS:
        for line in errors:  # none blames a healthy rank
            rank_name, cause = re.fullmatch(r"error: (rank \d) on \S+ at step \d+: (.*)", line).groups()
            blames_itself = rank_name == "rank 1" and "no progress" in cause
            assert blames_itself or cause.startswith(("lost rank 1 on", "rank 1 on")), line
    assert seconds < TIMEOUT + 10
    reports = [json.loads(path.read_text()) for path in (tmp_path / "run" / "logs").glob("error-*.json")]
    assert reports and all(report["step"] in (3, 4) and report["host"] for report in reports)
    assert any(
        report["cause"] in (tmp_path / "run/logs" / f"rank-{report['rank']}.log").read_text() for report in reports
    )
    assert checkpoint.newest(tmp_path / "run").name == "step-00000002.pt"


def test_slow_pictures_are_no_fault(digits, tmp_path, torchrun):
    process = torchrun(tmp_path, "slow_pictures", training(digits, tmp_path / "run", "timeout=3"))
    _, stderr = process.communicate(timeout=150)
    assert process.returncode == 0, stderr


def test_torchrun_restarts_the_ranks_and_they_resume_exactly(digits, tmp_path, torchrun):
    """The ranks are programs of their own, as a user's are."""
    process = torchrun(tmp_path, "killed", training(digits, tmp_path / "run"), restarts=1, forked=False)
    _, stderr = process.communicate(timeout=150)
    assert process.returncode == 0, stderr
    starts = [json.loads(line) for line in (tmp_path / "run/logs/starts.jsonl").read_text().splitlines()]
    assert [start["step"] for start in starts] == [0, 2]
    [fault] = map(json.loads, (tmp_path / "run/logs/faults.jsonl").read_text().splitlines())
    assert fault["rank"] == 0 and "lost rank 1" in fault["cause"] and fault["behind"] == 1
    assert not list((tmp_path / "run/logs").glob("error-*.json")), "the reports of an earlier start are removed"
    assert launch(in_ranks, 2, tmp_path, digits, tmp_path / "whole", *OWN) == [0, 0]
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def has_two_steps(run):
    return (run / "metrics.jsonl").exists() and len(metrics(run)) >= 2


@pytest.mark.parametrize(
    ("name", "signalled_ranks"),
    [("SIGTERM", [1]), ("SIGTERM", [0, 1]), ("SIGINT", [1]), ("SIGUSR2", [0]), ("SIGUSR2", [0, 1])],
)
def test_a_signal_to_one_rank_or_all_stops_them_after_the_same_step(name, signalled_ranks, digits, tmp_path, torchrun):
    run = tmp_path / "run"
    process = torchrun(
        tmp_path, "none", training(digits, run, "optim.steps=3000", "checkpoint.every_steps=null"), restarts=3
    )
    wait_for(lambda: has_two_steps(run))
    for rank in signalled_ranks:
        os.kill(int((tmp_path / f"pid-{rank}").read_text()), getattr(signal, name))
    _, stderr = process.communicate(timeout=150)
    # 0 to torchrun, or it would start them again; the launch script returns what is in the file
    assert process.returncode == 0 and (tmp_path / "exit-code").read_text() == "75\n", stderr
    [step] = checkpoint.steps(run)
    assert 2 <= step < 3000 and f"stopping after step {step}" in stderr
    assert metrics(run)[-1]["step"] == step
    starts = (run / "logs/starts.jsonl").read_text().splitlines()
    assert len(starts) == 1


def test_ranks_whose_torchrun_was_killed_save_and_end(digits, tmp_path, torchrun):
    run = tmp_path / "run"
    words = training(digits, run, "optim.steps=3000", "checkpoint.every_steps=null")
    process = torchrun(tmp_path, "none", words, forked=False)
    wait_for(lambda: has_two_steps(run))
    process.kill()
    process.wait()
    seconds = seconds_until_all_ended(tmp_path, fault_at=time.time())
    assert len(checkpoint.steps(run)) == 1 and seconds < TIMEOUT + 10


@pytest.fixture
def small_disk(tmp_path):
    """A folder with room for some checkpoints and no more."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2800k", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_in_a_save_ends_all_ranks_and_keeps_the_older_checkpoints(digits, tmp_path, small_disk, torchrun):
    run = small_disk / "run"
    more = ["optim.steps=12", "checkpoint.every_steps=1", "checkpoint.keep=10", "log.images_every_epochs=100"]
    process = torchrun(tmp_path, "none", training(digits, run, *more))
    _, stderr = process.communicate(timeout=150)
    [error] = error_lines(stderr)
    print(f"\nfull disk:\n  {error}")
    pattern = (
        naming("rank 0") + r".* at step (\d+): \S+step-(\d+)\.pt: No space left on device, .* step \1; .*step-(\d+)\.pt"
    )
    match = re.search(pattern, error)
    assert process.returncode == 1 and match, stderr
    assert int(match[1]) == int(match[2]) == int(match[3]) + 1
    assert checkpoint.newest(run) == checkpoint.path_of(run, int(match[3]))


def test_an_extraction_whose_rank_was_killed_ends(digits, tmp_path, torchrun):
    assert run_training(digits, tmp_path / "run", "optim.steps=1") == 0
    process = torchrun(tmp_path, "killed_in_the_extraction", ["extract", tmp_path / "run"])
    seconds = seconds_until_all_ended(tmp_path)
    _, stderr = process.communicate(timeout=150)
    # torchrun terminates the other rank, which ends at once: an extraction has nothing to save
    assert process.returncode == 1 and "SIGKILL" in stderr and seconds < TIMEOUT
    assert not list((tmp_path / "run" / "features").glob("*.safetensors"))
