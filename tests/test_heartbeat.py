"""What ranks share with each other: states in mapped files, exit reports, and what is concluded from them."""

import json
import os
import subprocess
import sys

import pytest

from ssl_dist.distributed.heartbeat import Heartbeat, RankState, archive_exit_reports
from ssl_dist.distributed.rank import RankInfo


@pytest.fixture
def logs(tmp_path):
    (tmp_path / "board").mkdir()
    return tmp_path


def pair(logs, start="s1"):
    """Both ranks of two: their states, and the heartbeat as rank 0 sees it."""
    heartbeats = [Heartbeat(logs, start, RankInfo(rank, 2)) for rank in range(2)]
    states = [RankState(RankInfo(rank, 2)) for rank in range(2)]
    for rank, state in enumerate(states):
        state.move_to(heartbeats[rank].path(rank), start)
    return states, heartbeats[0]


def collective(state, name):
    with state.collective(name):
        pass


def test_a_state_is_seen_by_others_at_once(logs):
    (_, other), heartbeat = pair(logs)
    other.step = 7
    collective(other, "all_reduce")
    record = heartbeat.record(1)
    assert record["step"] == 7 and record["collective"] == 1 and record["pid"] == os.getpid()
    assert heartbeat.name(1).endswith(f"(pid {os.getpid()}) at step 7")


def test_collectives_before_moving_to_the_file_are_kept(logs):
    state = RankState(RankInfo(1, 2))
    collective(state, "barrier")
    state.move_to(Heartbeat(logs, "s1", RankInfo(1, 2)).path(1), "s1")
    assert Heartbeat(logs, "s1", RankInfo(0, 2)).record(1)["collective"] == 1


def test_a_collective_that_fails_counts_as_not_ended(logs):
    (_, other), heartbeat = pair(logs)
    with pytest.raises(RuntimeError), other.collective("all_reduce"):
        raise RuntimeError
    assert heartbeat.record(1)["in_collective"] == 1
    collective(other, "all_reduce")
    assert heartbeat.record(1)["in_collective"] == 0


def test_records_of_another_start_and_torn_ones_are_ignored(logs):
    pair(logs, "old")
    heartbeat = Heartbeat(logs, "new", RankInfo(0, 2))
    assert heartbeat.record(1) is None and heartbeat.name(1) == "rank 1" and heartbeat.beats() == {}
    heartbeat.path(1).write_bytes(b"torn")
    assert heartbeat.record(1) is None
    assert Heartbeat(logs, "new", RankInfo(0, 3)).record(2) is None


def test_beats_of_ranks_that_have_not_ended(logs):
    (_, other), heartbeat = pair(logs)
    assert heartbeat.beats() == {1: 0}
    other.beat()
    assert heartbeat.beats() == {1: 1}
    Heartbeat(logs, "s1", RankInfo(1, 2)).write_exit_report(other, "it broke", None, 1)
    assert heartbeat.beats() == {}, "a rank with an exit report is not silent"


def test_a_rank_whose_process_has_ended_is_gone(logs):
    (_, other), heartbeat = pair(logs)
    assert not heartbeat.is_gone(1)
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    other.record["pid"] = process.pid
    assert not heartbeat.is_gone(1)
    other.record["launcher"] = os.getppid()
    assert heartbeat.sibling_pid(1) is None, "it has another parent than this process"
    process.kill()
    process.stdin.close()
    while not heartbeat.is_gone(1):  # a zombie until it is waited for
        pass
    process.wait()
    assert heartbeat.is_gone(1)
    other.record["machine"] = b"elsewhere"
    assert not heartbeat.is_gone(1), "unknown of another machine, even one of the same name"


def test_a_skipped_collective_is_named_by_its_number(logs):
    (own, other), heartbeat = pair(logs)
    for state in (own, other):
        for _ in range(9):
            collective(state, "all_reduce")
    assert heartbeat.disagreement(own) is None
    collective(own, "all_gather")
    assert heartbeat.disagreement(own) is None, "the other may not have reached it yet"
    collective(other, "broadcast")
    message = heartbeat.disagreement(own)
    assert "number 10 was all_gather at test_heartbeat.py:" in message
    assert "on rank 0 and broadcast at test_heartbeat.py:" in message
    for state in (own, other):
        collective(state, "all_reduce")
    assert "number 10" in heartbeat.disagreement(own), "one skipped before is still among the last"


def test_exit_reports(logs):
    (own, _), heartbeat = pair(logs)
    own.step = 4
    assert heartbeat.exit_report(0) is None
    heartbeat.write_exit_report(own, "it broke", blamed_rank=1, code=1, traceback="Traceback ...")
    report = heartbeat.exit_report(0)
    assert (report.step, report.cause, report.blamed_rank, report.code) == (4, "it broke", 1, 1)
    assert json.loads((logs / "error-0.json").read_text())["behind"] == 1, "the keys of the file stay"
    assert Heartbeat(logs, "later", RankInfo(1, 2)).exit_report(0) is None
    archive_exit_reports(logs)
    assert heartbeat.exit_report(0) is None
    [line] = (logs / "faults.jsonl").read_text().splitlines()
    assert json.loads(line)["cause"] == "it broke"


def test_an_exit_report_that_cannot_be_written_hides_nothing(logs, capsys):
    (own, _), heartbeat = pair(logs)
    heartbeat.logs = logs / "gone"
    heartbeat.write_exit_report(own, "it broke", None, 1)
    assert "was not written" in capsys.readouterr().err


def test_phases(logs):
    state = RankState(RankInfo())
    with state.phase_of("the save", 9.0):
        assert (state.phase, state.bound) == ("the save", 9.0)
    assert (state.phase, state.bound) == ("", 0.0)
    with pytest.raises(OSError), state.phase_of("the save", 9.0):
        raise OSError
    assert state.phase == "the save", "named in the message of the error"


def test_exit_reports_that_blame_no_other_rank_come_first(logs):
    rank_info = [RankInfo(rank, 4) for rank in range(4)]
    for rank, blamed in ((1, 2), (2, None), (3, 2)):
        Heartbeat(logs, "s1", rank_info[rank]).write_exit_report(RankState(rank_info[rank]), f"of {rank}", blamed, 1)
    assert [report.rank for report in Heartbeat(logs, "s1", rank_info[0]).exit_reports()] == [2, 1, 3]
    assert Heartbeat(logs, "s2", rank_info[0]).exit_reports() == []
    assert Heartbeat(logs / "gone", "s1", rank_info[0]).exit_reports() == []


DAMAGED = ["", "5", "[]", "{", '{"rank": 0}', "[" * 10**5, "\udcff", '{"rank": "0", "behind": null}']


@pytest.mark.parametrize("text", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_exit_report_is_none_and_is_kept(text, logs):
    _, heartbeat = pair(logs)
    (logs / "error-1.json").write_bytes(text.encode(errors="surrogateescape"))
    assert heartbeat.exit_report(1) is None and heartbeat.exit_reports() == []
    archive_exit_reports(logs)
    [fault] = map(json.loads, (logs / "faults.jsonl").read_text().splitlines())
    assert fault == {"damaged": "error-1.json", "text": text.replace("\udcff", "\ufffd")}
    assert not (logs / "error-1.json").exists()
