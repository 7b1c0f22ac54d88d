"""launch/torchrun_*.sh: what they start, with which environment, how they end and what they say.

Most tests put a script in the place of Python, so that explain and torchrun do what the test wants at once.
"""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.programs import DEADLINE, run, script, wait_for

LAUNCH = Path(__file__).parent.parent / "launch"
SINGLE, MULTI = LAUNCH / "torchrun_single.sh", LAUNCH / "torchrun_multi.sh"

AWAIT_SIGNAL = "for _ in {1..200}; do [ -e signals ] || sleep 0.1; done"  # gives up after 20 s


@pytest.fixture
def python(tmp_path):
    """In the place of Python. As torchrun it notes its arguments and environment and does what $TORCHRUN says."""
    return script(
        tmp_path / "python",
        f"""\
        cd {tmp_path}
        if [ "$2" = ssl_dist ]; then
            echo "$*" >explained
            echo "the plan" || true
            exit "${{EXPLAIN_CODE:-0}}"
        fi
        trap 'echo TERM >>signals' TERM
        trap 'echo USR2 >>signals' USR2
        printf '%s\\n' "$@" >arguments
        env >environment
        eval "$TORCHRUN"
        """,
    )


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ([SINGLE], "usage"),
        ([SINGLE, "2"], "usage"),
        ([SINGLE, "two", "c.yaml"], "NPROC=two"),
        ([SINGLE, "0", "c.yaml"], "NPROC=0"),
        ([MULTI, "2", "0", "host:29400", "2"], "usage"),
        ([MULTI, "x", "0", "host:29400", "2", "c.yaml"], "NNODES=x"),
        ([MULTI, "2", "2", "host:29400", "2", "c.yaml"], "NODE_RANK=2"),
        ([MULTI, "2", "1", "host", "2", "c.yaml"], "ENDPOINT=host"),
    ],
)
def test_wrong_arguments_get_one_line_and_2(command, named, python):
    answer = run(*command, PYTHON=python)
    assert answer.returncode == 2
    assert named in answer.stderr and answer.stderr.count("\n") == 1
    assert not (python.parent / "arguments").exists()


def test_a_mistake_that_explain_finds_ends_before_torchrun(python):
    answer = run(SINGLE, 2, "c.yaml", "optim.lr=-1", PYTHON=python, EXPLAIN_CODE=2, TORCHRUN="exit 0")
    assert answer.returncode == 2
    assert (
        python.parent / "explained"
    ).read_text() == "-m ssl_dist explain c.yaml optim.lr=-1 --world 2 --ranks-per-node 2\n"
    assert not (python.parent / "arguments").exists()


def test_an_evaluation(python):
    answer = run(SINGLE, 2, "evaluate", "runs/a b", "probe", "probe.lr=0.1", PYTHON=python, TORCHRUN="exit 0")
    assert answer.returncode == 0 and not (python.parent / "explained").exists()
    arguments = (python.parent / "arguments").read_text().splitlines()
    assert arguments[-6:] == ["-m", "ssl_dist", "evaluate", "runs/a b", "probe", "probe.lr=0.1"]


def test_one_machine(python):
    command = (SINGLE, 2, "c.yaml", "run_dir=with space", "seed=1")
    answer = run(*command, PYTHON=python, RESTARTS=3, TORCHRUN="exit 0")
    assert answer.returncode == 0, answer.stderr
    assert "the plan" in answer.stdout
    arguments = (python.parent / "arguments").read_text().splitlines()
    assert arguments[0] == str(LAUNCH / "torchrun.py")
    assert arguments[-6:] == ["-m", "ssl_dist", "train", "c.yaml", "run_dir=with space", "seed=1"]
    options = dict(zip(arguments[1:-6:2], arguments[2:-6:2], strict=True))
    assert "SIGUSR2" in options["--signals-to-handle"].split(",")
    options = {name: options[name] for name in options if name not in ("--signals-to-handle", "--log-dir")}
    assert options == {
        "--nnodes": "1",
        "--nproc-per-node": "2",
        "--max-restarts": "3",
        "--rdzv-backend": "c10d",
        "--rdzv-endpoint": "localhost:0",
        "--rdzv-conf": "is_host=true",
        "--rdzv-id": "ssl_dist",
        "--local-addr": "127.0.0.1",
        "--shutdown-timeout": "10",
    }


def test_one_of_several_machines(python):
    answer = run(MULTI, 3, 1, "gpu-a:29400", 4, "c.yaml", PYTHON=python, TORCHRUN="exit 0")
    assert answer.returncode == 0, answer.stderr
    assert (python.parent / "explained").read_text().endswith("--world 12 --ranks-per-node 4\n")
    assert "the plan" not in answer.stdout  # machine 0 shows it
    arguments = (python.parent / "arguments").read_text().splitlines()
    for name, value in {"--nnodes": "3", "--rdzv-endpoint": "gpu-a:29400", "--rdzv-conf": "is_host=false"}.items():
        assert arguments[arguments.index(name) + 1] == value
    assert "--local-addr" not in arguments


def environment_of(python):
    return dict(line.split("=", 1) for line in (python.parent / "environment").read_text().splitlines() if "=" in line)


def test_environment_of_the_ranks(python):
    run(SINGLE, 2, "c.yaml", PYTHON=python, TORCHRUN="exit 0")
    environment = environment_of(python)
    assert environment["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert not Path(environment["SSL_DIST_EXIT_FILE"]).parent.exists()  # nothing is left behind


def test_what_the_user_set_stays(python):
    own = {"OMP_NUM_THREADS": "7", "TORCH_CPP_LOG_LEVEL": "INFO"}
    run(SINGLE, 2, "c.yaml", PYTHON=python, TORCHRUN="exit 0", **own)
    assert own.items() <= environment_of(python).items()


@pytest.mark.parametrize(
    ("rank", "torchrun", "code"),
    [
        ("0", 0, 0),
        ("75", 1, 75),
        ("2", 1, 2),
        ("1", 1, 1),
        (None, 1, 1),
        (None, 137, 137),
        ("0", 1, 1),  # rank 0 was done, but another rank failed
        ("75", 0, 75),  # what ranks say of a stop or a mistake is 0 to torchrun, or it would start them again
        ("2", 0, 2),
        ("141", 0, 141),  # nobody reads its table
        (None, 0, 0),
    ],
)
def test_exit_codes(rank, torchrun, code, python):
    write = "" if rank is None else f'echo {rank} >"$SSL_DIST_EXIT_FILE"; '
    answer = run(SINGLE, 2, "c.yaml", PYTHON=python, TORCHRUN=f"{write}exit {torchrun}")
    assert answer.returncode == code
    assert ("the same command goes on" in answer.stderr) == (code == 75)


@pytest.mark.parametrize("streams", [">&- 2>&-", ">/dev/full 2>&1"])
def test_what_the_script_says_may_reach_nobody(streams, python):
    body = 'echo 75 >"$SSL_DIST_EXIT_FILE"; exit 1'
    environment = os.environ | {"PYTHON": str(python), "TORCHRUN": body}
    assert subprocess.run(["bash", "-c", f"{SINGLE} 2 c.yaml {streams}"], env=environment, check=False).returncode == 75


@pytest.mark.parametrize(
    ("sent", "passed_on"),
    [(signal.SIGTERM, "TERM"), (signal.SIGINT, "TERM"), (signal.SIGHUP, "TERM"), (signal.SIGUSR2, "USR2")],
)
@pytest.mark.parametrize("rank", [75, 0])
def test_a_signal_reaches_torchrun_once_and_its_answer_is_awaited(sent, passed_on, rank, python):
    body = f'{AWAIT_SIGNAL}; sleep 0.5; echo {rank} >"$SSL_DIST_EXIT_FILE"; exit 1'
    process = subprocess.Popen(
        [SINGLE, "2", "c.yaml"],
        env=os.environ | {"PYTHON": str(python), "TORCHRUN": body},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(python.parent / "environment", "SSL_DIST_EXIT_FILE")
        process.send_signal(sent)
        wait_for(python.parent / "signals")
        process.send_signal(sent)
        assert process.wait(DEADLINE) == rank
        assert (python.parent / "signals").read_text() == f"{passed_on}\n"
    finally:
        process.kill()
        process.wait()


def test_torchrun_does_not_outlive_a_killed_script(python):
    body = f"{AWAIT_SIGNAL}; touch ended"
    process = subprocess.Popen(
        [SINGLE, "2", "c.yaml"], env=os.environ | {"PYTHON": str(python), "TORCHRUN": body}, stdout=subprocess.DEVNULL
    )
    wait_for(python.parent / "environment", "SSL_DIST_EXIT_FILE")
    process.kill()
    process.wait()
    wait_for(python.parent / "ended")
    assert (python.parent / "signals").read_text() == "TERM\n"


PROGRAM = """\
import os, signal, sys, time
if sys.argv[1] == "explain":
    sys.exit(0)
rank, stop, kind = os.environ["RANK"], [], sys.argv[-1]
for name in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(name, lambda number, frame: stop.append(number))
with open(f"started-{rank}", "w") as file:
    file.write(os.environ["WORLD_SIZE"])
while kind == "wait" and not stop:
    time.sleep(0.02)
with open(f"ended-{rank}", "w") as file:
    file.write(str(stop))
code = 75 if stop else int(kind)
if os.environ["LOCAL_RANK"] == "0":
    print(f"rank {rank} ends", file=sys.stderr)
    with open(os.environ["SSL_DIST_EXIT_FILE"], "w") as file:
        file.write(str(code))
sys.exit(0 if code in (2, 75) else code)
"""


@pytest.fixture
def ranks(tmp_path):
    """Starts scripts on a program without torch: it waits for a signal or ends with an exit code, by its arguments."""
    (tmp_path / "ssl_dist").mkdir()
    (tmp_path / "ssl_dist" / "__main__.py").write_text(PROGRAM)
    processes = []

    def start(*command, **env):
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=tmp_path,
            env=os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)} | env,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.slow  # the real torchrun
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_real_ranks_are_stopped(sent, ranks, tmp_path):
    process = ranks(SINGLE, 2, "c.yaml", "wait")
    for rank in range(2):
        wait_for(tmp_path / f"started-{rank}", "2")
    process.send_signal(sent)
    _, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == 75, errors
    assert "rank 0 ends" in errors and "Traceback" not in errors
    expected = str([int(signal.SIGUSR2 if sent == signal.SIGUSR2 else signal.SIGTERM)])
    assert [(tmp_path / f"ended-{rank}").read_text() for rank in range(2)] == [expected, expected]


@pytest.mark.slow
@pytest.mark.parametrize("code", [0, 1, 2])
def test_real_ranks_end_by_themselves(code, ranks):
    process = ranks(SINGLE, 2, "c.yaml", code)
    _, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == code
    assert "rank 0 ends" in errors and "Traceback (" not in errors
    assert ("Root Cause" in errors) == (code == 1)


@pytest.mark.slow
def test_two_machines(ranks, tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    addresses = ["localhost", "127.0.0.1"]  # torchrun's own order is that of the names
    machines = [
        ranks(MULTI, 2, i, f"127.0.0.1:{port}", 1, "c.yaml", "wait", LOCAL_ADDR=address)
        for i, address in enumerate(addresses)
    ]
    for rank in range(2):
        wait_for(tmp_path / f"started-{rank}", "2")
    for machine in machines:
        machine.send_signal(signal.SIGTERM)
    for number, machine in enumerate(machines):
        _, errors = machine.communicate(timeout=DEADLINE)
        assert machine.returncode == 75, errors
        assert f"rank {number} ends" in errors
