"""Real kills of a real training under torchrun, at instants drawn from a seed; what comes out must be what an
uninterrupted training gives.

    python tools/kill_series.py --seed 0 --kills 20

Series 1 keeps two ranks: weights, buffers, optimizer (SHA-256) and metrics.jsonl must be equal bit for bit. Series 2
changes the number of ranks (1, 2, 4) and the view shards at every start: weights and buffers to a relative difference
of 1e-5, in float64. In both, every image must have been seen exactly once an epoch, a step taken again must see the
same images and views, and every start must go on after the newest checkpoint. SIGKILL meets one rank, or all of them
with their launcher: in start-up, in a step, or a random moment after a save has begun. Ends with 1 when anything fails.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
M, K, STEPS_PER_EPOCH = 16, 4, 8
GRIDS = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]  # ranks, view shards
BOUND = 1e-5  # largest relative difference of series 2
LONGEST_SAVE = 0.03  # seconds; the delay of a kill in a save is drawn below it
SPEED = ("images_per_s", "views_per_s", "data_wait", "seconds_per_step")


# ------------------------------------------------------------------------------------------ in a rank


def rank_main(folder: Path, plan: dict, arguments: list[str]) -> int:
    """Run `ssl-dist` as a rank that records the images of every step and kills itself as planned."""
    from ssl_dist import cli
    from ssl_dist.train.state import TrainState

    rank = int(os.environ["RANK"])
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    record = open(folder / f"seen-{rank}.jsonl", "a", encoding="utf-8")  # noqa: SIM115 - open to the end
    first_step = []

    def kill_after(delay: float) -> None:
        def kill():
            time.sleep(delay)
            (folder / "killed").write_text(str(time.time()))
            pids = [os.getppid(), *(int(path.read_text()) for path in folder.glob("pid-*"))]
            for pid in pids if plan["who"] == "all" else []:
                if pid != os.getpid():
                    os.kill(pid, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=kill, daemon=True).start()

    def is_planned(when: str, step: int) -> bool:
        return plan.get("when") == when and plan["rank"] == rank and step - first_step[0] == plan["after"]

    forward, save = TrainState.forward, TrainState._save

    def recording(self, batch):
        first_step.append(batch.step)
        line = {"step": batch.step, "images": batch.image_ids.tolist(), "views": batch.view_ids[0].tolist()}
        record.write(json.dumps(line) + "\n")
        record.flush()
        if is_planned("step", batch.step):
            kill_after(plan["delay"])
        return forward(self, batch)

    def saving(self, clock):
        if is_planned("save", clock.step - 1):
            kill_after(plan["delay"])
        save(self, clock)

    TrainState.forward, TrainState._save = recording, saving
    return cli.main(arguments)


# ------------------------------------------------------------------------------------------ around them


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(folder: Path, ranks: int, plan: dict, arguments: list[str]) -> subprocess.Popen:
    folder.mkdir(parents=True)
    environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    environment |= {"OMP_NUM_THREADS": "1", "SSL_DIST_EXIT_FILE": str(folder / "exit-code")}
    command = [
        sys.executable, str(ROOT / "launch/torchrun.py"), "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d",
        "--rdzv-endpoint", f"localhost:{free_port()}", "--local-addr", "127.0.0.1", "--shutdown-timeout", "10",
        "--log-dir", str(folder / "torchrun"),
        str(ROOT / "tools/kill_series.py"), "--as-rank", str(folder), json.dumps(plan), *arguments,
    ]  # fmt: skip
    log = open(folder / "stderr", "w")  # noqa: SIM115 - the process keeps it
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=log)


def processes_of(launcher: int) -> list[int]:
    """The process ids of the launcher's children that are alive."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(parent) == launcher and state not in "ZX":
            pids.append(int(path.parent.name))
    return pids


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def run_once(folder: Path, ranks: int, plan: dict, arguments: list[str]) -> tuple[int, float]:
    """Start, kill as planned, wait for the end. Returns the launcher's exit code and the seconds from kill to end."""
    process = launch(folder, ranks, plan, arguments)
    if plan.get("when") == "start-up":
        time.sleep(plan["delay"])
        children = processes_of(process.pid)
        (folder / "killed").write_text(str(time.time()))
        pids_of_all = [process.pid, *children]
        for pid in pids_of_all if plan["who"] == "all" else children[plan["rank"] % max(1, len(children)) :][:1]:
            os.kill(pid, signal.SIGKILL)
    code = process.wait()
    pids = [int(path.read_text()) for path in folder.glob("pid-*")]
    end = time.monotonic() + 120
    while any(map(is_alive, pids)):
        if time.monotonic() > end:
            sys.exit(f"{folder}: ranks {[p for p in pids if is_alive(p)]} are still alive 120 s after their launcher")
        time.sleep(0.02)
    killed = folder / "killed"
    return code, time.time() - float(killed.read_text()) if killed.exists() else 0.0


def state_of(run: Path) -> dict:
    """Everything of the newest checkpoint that a training goes on with, tensors by name."""
    from ssl_dist.storage import checkpoint

    state = checkpoint.load(checkpoint.newest(run))
    tensors = {f"method.{name}": value for name, value in state["method"].items()}
    for number, entry in state["optimizer"]["state"].items():
        tensors |= {f"optimizer.{number}.{name}": value for name, value in entry.items()}
    return {"step": state["step"], "tensors": tensors}


def digest(state: dict) -> str:
    content = hashlib.sha256(str(state["step"]).encode())
    for name, value in sorted(state["tensors"].items()):
        content.update(name.encode() + value.numpy().tobytes())
    return content.hexdigest()


def difference(state: dict, expected: dict) -> float:
    """The largest relative difference of a weight or buffer; each is measured against the largest of its tensor, and
    a tensor against 1e-3 at least (a bias before a BatchNorm holds rounding noise only)."""
    worst = 0.0
    for name, value in expected["tensors"].items():
        if name.startswith("method."):
            scale = max(value.double().abs().max().item(), 1e-3)
            worst = max(worst, (state["tensors"][name] - value).double().abs().max().item() / scale)
    return worst


def metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in SPEED} for line in lines]


def coverage_faults(starts: list[Path], num_steps: int) -> list[str]:
    """What contradicts this: the ranks of a start train on the M x K cells of a step exactly once, on the same ones in
    every start, and on every image once an epoch. A killed start may have only a part of its last step."""
    faults, cells = [], {}
    for start in starts:
        taken = defaultdict(list)
        for path in start.glob("seen-*.jsonl"):
            for line in path.read_text().splitlines():
                if line.endswith("}"):
                    entry = json.loads(line)
                    taken[entry["step"]] += [(i, v) for i in entry["images"] for v in entry["views"]]
        for step, pairs in taken.items():
            if len(pairs) != len(set(pairs)):
                faults.append(f"{start.name}: step {step} saw a view twice")
            if len(pairs) == M * K:
                if cells.setdefault(step, set(pairs)) != set(pairs):
                    faults.append(f"{start.name}: step {step}, taken again, saw something else")
            elif step in cells and not set(pairs) <= cells[step]:
                faults.append(f"{start.name}: step {step}, taken again, saw something else")
    for epoch in range(num_steps // STEPS_PER_EPOCH):
        steps = range(epoch * STEPS_PER_EPOCH, (epoch + 1) * STEPS_PER_EPOCH)
        if missing := [step for step in steps if step not in cells]:
            faults.append(f"epoch {epoch}: steps {missing} were never taken by all ranks")
        images = sorted(image for step in steps for image, view in cells.get(step, ()) if view == 0)
        if images != sorted(set(images)) or len(images) != M * STEPS_PER_EPOCH:
            faults.append(f"epoch {epoch}: not every image was seen exactly once")
    return faults


def drawn_plan(draw: random.Random, ranks: int) -> dict:
    when = draw.choices(["start-up", "step", "save"], [0.15, 0.45, 0.4])[0]
    delay = {"start-up": (0.5, 6.0), "step": (0.0, 0.15), "save": (0.0, LONGEST_SAVE)}[when]
    rank = 0 if when == "save" else draw.randrange(ranks)  # the first rank is the one that writes
    who = draw.choice(["one", "all"])
    return {"when": when, "who": who, "rank": rank, "after": draw.randint(1, 4), "delay": draw.uniform(*delay)}


def series(name: str, folder: Path, seed: int, kills: int, num_steps: int, grids: list, arguments: list[str]):
    """Train with kills until `num_steps`. Returns the run's folder, and what was wrong."""
    draw, run, starts, faults = random.Random(f"{seed} {name}"), folder / name / "run", [], []
    torn = slowest = 0
    while len(starts) <= 10 * kills:
        num_killed = sum((start / "killed").exists() for start in starts)
        ranks, shards = draw.choice(grids)
        plan = drawn_plan(draw, ranks) if num_killed < kills else {}
        before = newest_step(run)
        starts.append(folder / name / f"start-{len(starts)}")
        code, seconds = run_once(starts[-1], ranks, plan, [*arguments, f"run_dir={run}", f"data.view_shards={shards}"])
        unfinished = len(list((run / "checkpoints").glob("*.tmp"))) + len(list((run / "checkpoints").glob(".*.tmp")))
        torn, slowest = torn + (unfinished > 0), max(slowest, seconds)
        was_killed = (starts[-1] / "killed").exists()
        what = f"{plan['when']}, {plan['who']} (rank {plan['rank']})" if was_killed else "to the end"
        print(
            f"{name} start {len(starts)}: {ranks} rank(s), {shards} view shard(s), after step {before}: {what}; saved "
            f"{newest_step(run)}" + (f", last process gone after {seconds:.1f} s" if was_killed else "")
            + (", a save was broken off" if unfinished else ""), flush=True,
        )  # fmt: skip
        first = [
            json.loads(p.read_text().partition("\n")[0]) for p in starts[-1].glob("seen-*.jsonl") if p.stat().st_size
        ]
        if any(entry["step"] != before for entry in first):
            faults.append(f"start {len(starts)} began at step {first[0]['step']}, not after the saved step {before}")
        if not was_killed:
            if code != 0 or newest_step(run) != num_steps:
                print((starts[-1] / "stderr").read_text(), file=sys.stderr)
                faults.append(f"start {len(starts)} ended with {code} at step {newest_step(run)} without a kill")
            break
    print(f"{name}: {num_killed} kills, {torn} saves broken off, slowest end {slowest:.1f} s after the kill")
    return run, faults + coverage_faults(starts, num_steps)


def newest_step(run: Path) -> int:
    """The step at which a start will resume. LAST may name the checkpoint before, after a kill between the two."""
    from ssl_dist.storage import checkpoint

    newest = checkpoint.newest(run)
    return 0 if newest is None else int(newest.stem.split("-")[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the kills and of the training")
    parser.add_argument("--kills", type=int, default=20, help="in each series")
    parser.add_argument("--series", type=int, nargs="+", choices=(1, 2), default=(1, 2))
    parser.add_argument("--keep", type=Path, help="folder to work in and to keep (default: a temporary one)")
    options = parser.parse_args()
    from ssl_dist.convert.command import convert

    folder = options.keep or Path(tempfile.mkdtemp(prefix="kill-series-"))
    convert("digits", None, folder / "digits", workers=1, progress=False)
    epochs = 2 + options.kills * 3 // STEPS_PER_EPOCH
    arguments = [
        "train", str(ROOT / "configs/digits/relational-conv4.yaml"), f"seed={options.seed}", "precision=fp64",
        f"data.root={folder / 'digits'}", "data.reader=arrays", f"data.limit={M * STEPS_PER_EPOCH}", f"views.num={K}",
        f"optim.batch_size={M}", f"optim.epochs={epochs}", "checkpoint.every_steps=1", "log.every_steps=1",
        "timeout=15",
    ]  # fmt: skip
    num_steps = epochs * STEPS_PER_EPOCH
    whole = folder / "whole" / "run"
    code, _ = run_once(folder / "whole" / "start", 2, {}, [*arguments, f"run_dir={whole}", "data.view_shards=2"])
    if code:
        sys.exit((folder / "whole" / "start" / "stderr").read_text())
    expected = state_of(whole)
    print(f"uninterrupted, 2 ranks, 2 view shards: step {expected['step']}, sha256 {digest(expected)}", flush=True)
    failed = False
    for number in options.series:
        name, grids = f"series-{number}", [(2, 2)] if number == 1 else GRIDS
        run, faults = series(name, folder, options.seed, options.kills, num_steps, grids, arguments)
        final_state = state_of(run)
        if number == 1:
            faults += ["weights, buffers or optimizer differ"] if digest(final_state) != digest(expected) else []
            faults += ["metrics.jsonl differs"] if metrics(run) != metrics(whole) else []
            print(f"{name}: step {final_state['step']}, sha256 {digest(final_state)}")
        else:
            worst = difference(final_state, expected)
            faults += [f"weights or buffers differ by {worst:.3g}, more than {BOUND:g}"] if not worst <= BOUND else []
            print(f"{name}: step {final_state['step']}, largest relative difference {worst:.3g}")
        for fault in faults:
            print(f"{name}: FAULT: {fault}")
        print(f"{name}: {'FAILED' if faults else 'passed: every image once an epoch, every start after the last save'}")
        failed |= bool(faults)
    if options.keep is None and not failed:
        shutil.rmtree(folder)
    elif failed:
        print(f"what was left behind: {folder}")
    return int(failed)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if sys.argv[1:2] == ["--as-rank"]:
        sys.exit(rank_main(Path(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4:]))
    from ssl_dist import outcome

    sys.exit(outcome.of_program(main))
