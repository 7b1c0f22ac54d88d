"""What ranks show each other: states in mapped files, endings, and what is concluded from them."""

import json
import os
import subprocess
import sys

import pytest

from ssl_dist.distributed.heartbeat import Board, State, archive_endings
from ssl_dist.distributed.rank import Place


@pytest.fixture
def logs(tmp_path):
    (tmp_path / "board").mkdir()
    return tmp_path


def pair(logs, start="s1"):
    """Both ranks of two: their states, and the board as rank 0 sees it."""
    boards = [Board(logs, start, Place(rank, 2)) for rank in range(2)]
    states = [State(Place(rank, 2)) for rank in range(2)]
    for rank, state in enumerate(states):
        state.move_to(boards[rank].path(rank), start)
    return states, boards[0]


def exchange(state, name):
    with state.exchange(name):
        pass


def test_a_state_is_seen_by_others_at_once(logs):
    (_, other), board = pair(logs)
    other.step = 7
    exchange(other, "all_reduce")
    record = board.record(1)
    assert record["step"] == 7 and record["exchange"] == 1 and record["pid"] == os.getpid()
    assert board.name(1).endswith(f"(pid {os.getpid()}) at step 7")


def test_what_was_done_before_moving_to_the_file_is_kept(logs):
    state = State(Place(1, 2))
    exchange(state, "barrier")
    state.move_to(Board(logs, "s1", Place(1, 2)).path(1), "s1")
    assert Board(logs, "s1", Place(0, 2)).record(1)["exchange"] == 1


def test_an_exchange_that_fails_counts_as_not_ended(logs):
    (_, other), board = pair(logs)
    with pytest.raises(RuntimeError), other.exchange("all_reduce"):
        raise RuntimeError
    assert board.record(1)["inside"] == 1
    exchange(other, "all_reduce")
    assert board.record(1)["inside"] == 0


def test_records_of_another_start_and_torn_ones_are_nobodys(logs):
    pair(logs, "old")
    board = Board(logs, "new", Place(0, 2))
    assert board.record(1) is None and board.name(1) == "rank 1" and board.pulses() == {}
    board.path(1).write_bytes(b"torn")
    assert board.record(1) is None
    assert Board(logs, "new", Place(0, 3)).record(2) is None


def test_pulses_of_those_that_have_not_ended(logs):
    (_, other), board = pair(logs)
    assert board.pulses() == {1: 0}
    other.pulse()
    assert board.pulses() == {1: 1}
    Board(logs, "s1", Place(1, 2)).leave(other, "it broke", None, 1)
    assert board.pulses() == {}, "who has said that it ends is not silent"


def test_a_rank_whose_process_has_ended_is_gone(logs):
    (_, other), board = pair(logs)
    assert not board.is_gone(1)
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    other.record["pid"] = process.pid
    assert not board.is_gone(1)
    other.record["launcher"] = os.getppid()
    assert not board.is_sibling(1), "it has another parent than this process"
    process.kill()
    process.stdin.close()
    while not board.is_gone(1):  # a zombie until it is waited for
        pass
    process.wait()
    assert board.is_gone(1)
    other.record["machine"] = b"elsewhere"
    assert not board.is_gone(1), "nobody can tell from another machine, even one of the same name"


def test_a_skipped_exchange_is_found_by_its_number(logs):
    (own, other), board = pair(logs)
    for state in (own, other):
        for _ in range(9):
            exchange(state, "all_reduce")
    assert board.disagreement(own) is None
    exchange(own, "all_gather")
    assert board.disagreement(own) is None, "the other may be on its way"
    exchange(other, "broadcast")
    said = board.disagreement(own)
    assert "number 10 was all_gather at test_board.py:" in said and "on rank 0 and broadcast at test_board.py:" in said
    for state in (own, other):
        exchange(state, "all_reduce")
    assert "number 10" in board.disagreement(own), "one skipped before is still among the last"


def test_endings(logs):
    (own, _), board = pair(logs)
    own.step = 4
    assert board.ending(0) is None
    board.leave(own, "it broke", behind=1, code=1, traceback="Traceback ...")
    ending = board.ending(0)
    assert (ending.step, ending.cause, ending.behind, ending.code) == (4, "it broke", 1, 1)
    assert Board(logs, "later", Place(1, 2)).ending(0) is None
    archive_endings(logs)
    assert board.ending(0) is None
    [line] = (logs / "faults.jsonl").read_text().splitlines()
    assert json.loads(line)["cause"] == "it broke"


def test_an_ending_that_cannot_be_written_hides_nothing(logs, capsys):
    (own, _), board = pair(logs)
    board.logs = logs / "gone"
    board.leave(own, "it broke", None, 1)
    assert "was not written" in capsys.readouterr().err


def test_phases(logs):
    state = State(Place())
    with state.phase_of("the save", 9.0):
        assert (state.phase, state.bound) == ("the save", 9.0)
    assert (state.phase, state.bound) == ("", 0.0)
    with pytest.raises(OSError), state.phase_of("the save", 9.0):
        raise OSError
    assert state.phase == "the save", "named in what is said of the error"


def test_endings_that_name_themselves_come_first(logs):
    place = [Place(rank, 4) for rank in range(4)]
    for rank, behind in ((1, 2), (2, None), (3, 2)):
        Board(logs, "s1", place[rank]).leave(State(place[rank]), f"of {rank}", behind, 1)
    assert [ending.rank for ending in Board(logs, "s1", place[0]).endings()] == [2, 1, 3]
    assert Board(logs, "s2", place[0]).endings() == []
    assert Board(logs / "gone", "s1", place[0]).endings() == []
