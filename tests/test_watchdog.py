"""The watchdog of one rank, in real processes. Faults among several ranks: test_faults.py."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

HEAD = """
import pathlib, sys, time
from ssl_dist.errors import Fault, UserError
from ssl_dist.distributed.heartbeat import Heartbeat
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.distributed.watchdog import Watchdog

logs = pathlib.Path(sys.argv[1])
(logs / "board").mkdir()
with Watchdog(RankInfo(), timeout=0.5) as watchdog, watchdog.reporting():
    state = watchdog.state
    watchdog.publish(logs, "s1")
    state.phase, state.bound = "", 0.0
    state.step = 3
    print("begun", flush=True)
"""


def start(folder, body):
    code = HEAD + textwrap.indent(textwrap.dedent(body), "    ")
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
    )  # fmt: skip


def ended(process, seconds=30):
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def ending(folder):
    return json.loads((folder / "error-0.json").read_text())


def test_a_rank_without_progress_ends_and_reports_where_it_is(tmp_path):
    code, _, err = ended(start(tmp_path, "time.sleep(60)"))
    assert code == 1
    [line] = err.splitlines()
    assert line.startswith("error: rank 0 on ") and " at step 3: no progress for 0.5 s, at <string>:" in line
    assert "no progress" in ending(tmp_path)["cause"] and ending(tmp_path)["step"] == 3
    log = (tmp_path / "rank-0.log").read_text()
    assert "no progress" in log and "most recent call first" in log, "with the stacks of all threads"


@pytest.mark.slow
def test_steps_are_progress_and_so_is_another_phase(tmp_path):
    body = """
    for step in range(4, 12):
        time.sleep(0.2)
        state.step = step
    with state.phase_of("the save", 30.0):
        time.sleep(1.5)
    for phase in ("the wait for images", "", "the wait for images"):
        state.phase = phase
        time.sleep(0.3)
    """
    code, _, err = ended(start(tmp_path, body))
    assert (code, err) == (0, "") and not (tmp_path / "error-0.json").exists()


def test_a_file_system_that_fails_does_not_end_the_watch(tmp_path):
    body = """
    class Pages:
        def flush(self):
            raise OSError(116, "Stale file handle")
    state._pages = Pages()
    time.sleep(60)
    """
    code, _, err = ended(start(tmp_path, body))
    assert code == 1 and "no progress" in err


def test_a_phase_is_not_shorter_than_the_timeout(tmp_path):
    body = """
    with state.phase_of("a short phase", 0.1):
        time.sleep(0.3)
    """
    assert ended(start(tmp_path, body))[0] == 0


def test_the_line_that_waits_is_named_not_the_library(tmp_path):
    code, _, err = ended(start(tmp_path, "import queue; queue.Queue().get()"))
    assert code == 1 and "at <string>:" in err and "; raise timeout if a step may take that long" in err


def test_a_phase_has_its_own_bound(tmp_path):
    body = """
    with state.phase_of("the save of step 3", 1.0):
        time.sleep(60)
    """
    code, _, err = ended(start(tmp_path, body))
    assert code == 1 and "no progress for 1 s in the save of step 3" in err


@pytest.mark.slow
def test_a_suspended_process_has_not_hung(tmp_path):
    body = """
    for step in range(4, 14):
        for _ in range(4):  # a sleep that ends while the process is stopped leaves most of the step to be taken
            time.sleep(0.08)
        state.step = step
    """
    process = start(tmp_path, body)
    assert process.stdout.readline() == "begun\n"
    for _ in range(4):
        process.send_signal(signal.SIGSTOP)
        time.sleep(1)
        process.send_signal(signal.SIGCONT)
        time.sleep(0.3)
    code, _, err = ended(process)
    assert (code, err) == (0, "")


@pytest.mark.parametrize(
    ("body", "code", "cause", "shown"),
    [
        ("raise ValueError('planned')", 1, "ValueError: planned", "error: rank 0 on"),
        ("raise UserError('optim.lr = -1: no')", 2, "optim.lr = -1: no", "UserError"),
        ("raise Fault('rank 0 on x at step 3: broken')", 1, "rank 0 on x at step 3: broken", "Fault"),
    ],
)
def test_the_exit_report_is_left_for_the_others(tmp_path, body, code, cause, shown):
    returned, _, err = ended(start(tmp_path, body))
    assert returned == 1 and shown in err
    assert (ending(tmp_path)["cause"], ending(tmp_path)["code"], ending(tmp_path)["behind"]) == (cause, code, None)
    assert cause in (tmp_path / "rank-0.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("is_waiting", [True, False])
def test_a_rank_that_waits_in_a_long_phase_for_one_that_has_ended_does_not_wait_for_its_bound(tmp_path, is_waiting):
    """Its own work, such as a save, it brings to an end."""
    body = """
    watchdog.rank_info = RankInfo(0, 2)
    watchdog.publish(logs, "s1")
    Heartbeat(logs, "s1", RankInfo(1, 2)).write_exit_report(state, "No space left on device", None, 1)
    with state.phase_of("the save of step 3", 60.0):
        {}
    """
    work = "with state.collective('broadcast'):\n            time.sleep(30)" if is_waiting else "time.sleep(6)"
    code, _, err = ended(start(tmp_path, body.format(work)))
    if is_waiting:
        assert code == 1 and re.search("^error: rank 0 .* rank 1 .* ended at step 3: No space left on device$", err)
        assert ending(tmp_path)["behind"] == 1
    else:
        assert (code, err) == (0, "")


def test_ranks_notice_that_their_launcher_died(tmp_path):
    launcher = """
    import os, subprocess, sys
    os.environ["TORCHELASTIC_RUN_ID"] = "x"
    code = '''
    import pathlib, time
    from ssl_dist.distributed.rank import RankInfo
    from ssl_dist.distributed.watchdog import Watchdog
    notice = pathlib.Path({notice!r})
    with Watchdog(RankInfo(), 5.0, lambda: notice.write_text("died")):
        print("begun", flush=True)
        end = time.monotonic() + 20
        while not notice.exists() and time.monotonic() < end:
            time.sleep(0.05)
    '''
    subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    time.sleep(60)
    """
    notice = tmp_path / "notice"
    code = "import textwrap, time\n" + textwrap.dedent(launcher).replace("{notice!r}", repr(str(notice)))
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
    )  # fmt: skip
    assert process.stdout.readline() == "begun\n"
    process.kill()
    process.wait()
    end = time.monotonic() + 15
    while not notice.exists():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("own", "in_collective", "other_numbers", "is_straggler"),
    [
        (5, False, [6, 6], True),  # the others have gone on
        (5, False, [5, 5], True),  # in user code, as far as can be seen
        (5, True, [6, 5], False),  # a ring may end on one rank before another
        (5, True, [5, 4], False),
        (5, False, [5, 4], False),  # waits for a GPU, which waits for the one that is behind
        (5, False, [4, 4], False),
        (5, False, [6, 4], False),
    ],
)
def test_who_is_a_straggler(tmp_path, own, in_collective, other_numbers, is_straggler):
    from ssl_dist.distributed.heartbeat import Heartbeat, RankState
    from ssl_dist.distributed.rank import RankInfo
    from ssl_dist.distributed.watchdog import Watchdog

    (tmp_path / "board").mkdir()
    for rank, number in enumerate(other_numbers, 1):
        state = RankState(RankInfo(rank, 3))
        state.record["collective"] = number
        state.move_to(Heartbeat(tmp_path, "s1", RankInfo(rank, 3)).path(rank), "s1")
    watchdog = Watchdog(RankInfo(0, 3), 60.0)
    watchdog.state.record["collective"], watchdog.state.record["in_collective"] = own, in_collective
    assert watchdog._is_straggler(Heartbeat(tmp_path, "s1", RankInfo(0, 3))) == is_straggler
    watchdog.state.has_device_ended = lambda: False  # a call of NCCL returns at once, and its work waits on the GPU
    assert not watchdog._is_straggler(Heartbeat(tmp_path, "s1", RankInfo(0, 3)))
