"""Peak memory of a rank in a real training, for several grids of ranks, beside what `ssl-dist explain` counts.

    python tools/bench_memory.py --data data/cifar10 [--grids 1x1 1x4] [--steps 3] [--plain] [--tuned] [key=value ...]

Every grid (image shards x view shards) is a training of a few steps under launch/torchrun_single.sh in a temporary run
folder. The kernel keeps each process's largest resident memory (VmHWM), which is read until the ranks end. "imports"
is that of a process that imports the package with its readers and explains the config; it is taken off. --tuned, the
default, has the allocator settings of the launch scripts, which keep what is freed; --plain has glibc's own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import rows  # beside this file

from ssl_dist import config, outcome
from ssl_dist.data import manifest

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_CONFIG = str(ROOT / "configs/cifar10/relational-conv4.yaml")
DEFAULT_SETTINGS = ["backbone.name=resnet32", "views.num=32", "optim.batch_size=64"]
MARK = "SSL_DIST_BENCH_MEMORY"  # in the environment of the ranks, so that they are known among all processes
ALLOCATORS = {
    "tuned": {},  # the launch script sets it
    "plain": {"GLIBC_TUNABLES": "glibc.malloc.check=0"},  # a set variable is left alone, and this one changes nothing
}
WORKER = """
import json, sys
import ssl_dist.train.loop, ssl_dist.run.plots, ssl_dist.data.arrays
from ssl_dist import config
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.run.blueprint import derive
from ssl_dist.train import explain
wanted = config.load(sys.argv[1], sys.argv[3:])
if wanted.data.reader == "ffcv":
    import ssl_dist.data.ffcv_reader
size = int(sys.argv[2])
b = derive(wanted, RankInfo(0, size, 0, size))
estimate = explain.Memory.of(b, "cpu").total(b.grid)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps([int(status["VmHWM"].split()[0]) / 1024, estimate / 2**20]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder that `ssl-dist convert` wrote")
    parser.add_argument("--config", help="default: configs/cifar10/relational-conv4.yaml with resnet32 and K = 32")
    parser.add_argument("--grids", nargs="+", default=[(1, 1), (1, 4)], type=grid, help="Wi x Wv (default 1x1 1x4)")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--plain", action="store_true", help="without the launch scripts' allocator settings")
    parser.add_argument("--tuned", action="store_true", help="with them; the default, to be named for both")
    arguments, overrides = parser.parse_known_args()  # overrides may stand behind options
    unknown = [text for text in overrides if text.startswith("-") or "=" not in text]
    if unknown:
        parser.error(f"not a key=value: {unknown[0]}")
    file, chosen = arguments.config or DEFAULT_CONFIG, [] if arguments.config else DEFAULT_SETTINGS
    chosen += ["precision=fp32", *overrides]
    name = manifest.load(arguments.data).name
    settings = [
        f"data.root={arguments.data.resolve()}", f"data.name={name}", "optim.epochs=null",
        f"optim.steps={arguments.steps}", "checkpoint.every_epochs=null", *chosen,
    ]  # fmt: skip
    wanted = config.load(file, settings)  # a mistake in it shows here, in one line
    allocators = [a for a in ALLOCATORS if getattr(arguments, a)] or ["tuned"]
    print(f"{file} {' '.join(chosen)}, {arguments.steps} steps; MiB", flush=True)
    row = "{:<9} {:>7} {:>8} {:>8} {:>8} {:>12} {:>8} {:>9} {:>8} {:>8}"
    columns = "allocator", "grid", "largest", "mean", "imports", "largest-imp.", "ratio", "explain", "ratio", "meas/exp"
    print(row.format(*columns), flush=True)
    found = []
    for allocator in allocators:
        first, results = None, []
        for images, views in arguments.grids:
            rank_settings = [*settings, f"data.view_shards={views}"]
            imports, estimate = imports_and_estimate(file, images * views, rank_settings)
            peaks = train(file, images * views, rank_settings, ALLOCATORS[allocator])
            largest = max(peaks)
            own = largest - imports
            first = first or (own, estimate)
            print(row.format(
                allocator, f"{images}x{views}", f"{largest:.0f}", f"{sum(peaks) / len(peaks):.0f}", f"{imports:.0f}",
                f"{own:.0f}", f"{own / first[0]:.3f}", f"{estimate:.0f}", f"{estimate / first[1]:.3f}",
                f"{own / estimate:.2f}",
            ), flush=True)  # fmt: skip
            less = f": {rows.ratio(first[:1], [own])} less" if results else ""
            results.append(f"{own:,.0f} MiB on {images}x{views} (explain counts {estimate:,.0f}){less}")
        num_views = f"K = {wanted.num_views}, " if wanted.num_views else ""  # which some methods fix
        sizes = f"{wanted.method.name}, {wanted.backbone.name}, M = {wanted.optim.batch_size}, {num_views}fp32"
        what = f"peak memory of a rank of image shards x view shards, {sizes}, without imports, {allocator} allocator"
        found.append((what, ", ".join(results)))
    rows.show(found)


def grid(text: str) -> tuple[int, int]:
    images, views = map(int, text.split("x"))
    return images, views


def imports_and_estimate(config: str, world_size: int, settings: list[str]) -> tuple[float, float]:
    """MiB of a process after its imports, and of a rank as `ssl-dist explain` counts."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", WORKER, config, str(world_size), *settings, f"run_dir={folder}/run"]
        completed = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if completed.returncode:
        sys.exit(f"explaining {config} failed with exit code {completed.returncode}")
    imports, estimate = json.loads(completed.stdout)
    return imports, estimate


def train(config: str, world_size: int, settings: list[str], environment: dict[str, str]) -> list[float]:
    """Peak memory of every rank in MiB."""
    mark = uuid.uuid4().hex
    inherited = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "output"), "w+", encoding="utf-8") as output:
        process = subprocess.Popen(
            [ROOT / "launch/torchrun_single.sh", str(world_size), config, *settings, f"run_dir={folder}/run"],
            env=inherited | {"PYTHON": sys.executable, MARK: mark} | environment, stdout=output, stderr=output,
        )  # fmt: skip
        peaks: dict[str, float] = {}
        try:
            while process.poll() is None:
                for rank, mib in ranks(mark):
                    peaks[rank] = max(peaks.get(rank, 0), mib)
                time.sleep(0.05)
        finally:
            process.terminate()  # where this script is interrupted; torchrun ends its ranks
            process.wait()
        if process.returncode or len(peaks) != world_size:
            output.seek(0)
            sys.exit(f"{output.read()[-3000:]}\nthe training ended with exit code {process.returncode}")
    return list(peaks.values())


def ranks(mark: str) -> list[tuple[str, float]]:
    """(rank, VmHWM in MiB) of the processes of the launch script with this value of MARK."""
    peaks = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            pairs = (entry.partition("=") for entry in (process / "environ").read_text(errors="replace").split("\0"))
            variables = {name: value for name, _, value in pairs}
            status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        except OSError:  # it has ended, or is another user's
            continue
        if variables.get(MARK) == mark and "RANK" in variables and "VmHWM" in status:
            peaks.append((variables["RANK"], int(status["VmHWM"].split()[0]) / 1024))
    return peaks


if __name__ == "__main__":
    sys.exit(outcome.of_program(main))
