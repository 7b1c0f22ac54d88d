"""Memory that a rank of a real training has in use at its peak, for several grids of ranks, beside what `ssl-dist
explain` counts.

    python tools/bench_memory.py --data data/cifar10 [--grids 1x1 1x4] [--steps 4] [key=value ...]

Every grid (image shards x view shards) is a training of a few steps under torchrun in a temporary run folder. In use is
what a rank has asked of malloc and has not freed (mallinfo2 of glibc 2.33, read 2,000 times a second), at its most from
the second optimizer step to the last, less what is left when the training has ended: tensors and batches, as
torch.cuda.max_memory_allocated has it of a GPU. Resident is the largest VmHWM, with Python, libraries, the mapped file
of images, the picture of the first views and the gaps between what is in use.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import astuple, dataclass
from pathlib import Path

import rows  # beside this file

from ssl_dist import config, outcome
from ssl_dist.data import manifest
from ssl_dist.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_CONFIG = str(ROOT / "configs/cifar10/relational-conv4.yaml")
DEFAULT_SETTINGS = ["backbone.name=resnet32", "views.num=32", "optim.batch_size=64"]
READ_EVERY_S = 0.0005
# The fields of glibc's struct mallinfo2.
MALLINFO2 = (
    "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
)  # fmt: skip


@dataclass(frozen=True)
class Peaks:
    """MiB of a rank."""

    in_use: float
    counted: float
    resident: float


def main() -> int | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder that `ssl-dist convert` wrote")
    parser.add_argument("--config", help="default: configs/cifar10/relational-conv4.yaml with resnet32 and K = 32")
    parser.add_argument("--grids", nargs="+", default=[(1, 1), (1, 4)], type=grid, help="Wi x Wv (default 1x1 1x4)")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)  # the folder that a rank writes its peaks to
    arguments, overrides = parser.parse_known_args()  # overrides may stand behind options
    if arguments.steps < 3:
        raise UserError(f"--steps {arguments.steps}: give 3 or more; the first two are not read")
    unknown = [text for text in overrides if text.startswith("-") or "=" not in text]
    if unknown:
        parser.error(f"not a key=value: {unknown[0]}")
    if arguments.rank is not None:
        return rank(arguments.rank, arguments.config, overrides)
    file, chosen = arguments.config or DEFAULT_CONFIG, [] if arguments.config else DEFAULT_SETTINGS
    chosen += ["precision=fp32", *overrides]
    name = manifest.load(arguments.data).name
    settings = [
        f"data.root={arguments.data.resolve()}", f"data.name={name}", "optim.epochs=null",
        f"optim.steps={arguments.steps}", "checkpoint.every_epochs=null", *chosen,
    ]  # fmt: skip
    wanted = config.load(file, settings)  # a mistake in it shows here, in one line
    print(f"{file} {' '.join(chosen)}, {arguments.steps} steps; MiB", flush=True)
    row = "{:>7} {:>9} {:>9} {:>9} {:>9} {:>9}"
    print(row.format("grid", "in use", "ratio", "explain", "use/exp", "resident"), flush=True)
    results: list[str] = []
    first = 0.0
    for images, views in arguments.grids:
        ranks = train(file, images * views, [*settings, f"data.view_shards={views}"], arguments.data)
        most = max(ranks, key=lambda peaks: peaks.in_use)
        first = first or most.in_use
        print(row.format(
            f"{images}x{views}", f"{most.in_use:.0f}", f"{most.in_use / first:.3f}", f"{most.counted:.0f}",
            f"{most.in_use / most.counted:.3f}", f"{max(peaks.resident for peaks in ranks):.0f}",
        ), flush=True)  # fmt: skip
        less = f": {rows.ratio([first], [most.in_use])} less" if results else ""
        results.append(
            f"{most.in_use:,.0f} MiB on {images}x{views} (explain counts {most.counted:,.0f}; resident with Python and "
            f"libraries {max(peaks.resident for peaks in ranks):,.0f}){less}"
        )
    num_views = f"K = {wanted.num_views}, " if wanted.num_views else ""  # which some methods fix
    sizes = f"{wanted.method.name}, {wanted.backbone.name}, M = {wanted.optim.batch_size}, {num_views}fp32"
    rows.show([(f"peak memory in use of a rank of image shards x view shards, {sizes}", ", ".join(results))])
    return None


def grid(text: str) -> tuple[int, int]:
    images, views = map(int, text.split("x"))
    return images, views


def train(file: str, world_size: int, settings: list[str], data: Path) -> list[Peaks]:
    """The peaks of every rank of a training."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}", __file__,
            "--rank", folder, "--data", data, "--config", file, *settings, f"run_dir={folder}/run",
        ]  # fmt: skip
        completed = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        written = [Path(folder, f"{number}.json") for number in range(world_size)]
        if completed.returncode or not all(path.exists() for path in written):
            sys.exit(f"{completed.stdout[-3000:]}\nthe training ended with exit code {completed.returncode}")
        return [Peaks(*json.loads(path.read_text(encoding="utf-8"))) for path in written]


class InUse:
    """As a context manager: reads what this process has in use, in MiB, until it is left."""

    class _MallInfo2(ctypes.Structure):
        _fields_ = [(name, ctypes.c_size_t) for name in MALLINFO2]

    def __init__(self) -> None:
        self._steps = 0
        self._most: dict[int, float] = {}  # by the number of optimizer steps before; its reader alone writes it
        self._mallinfo2 = ctypes.CDLL(None).mallinfo2
        self._mallinfo2.restype = self._MallInfo2
        self._end = threading.Event()
        self._reader = threading.Thread(target=self._read)

    def now(self) -> float:
        """In all arenas, and mapped by itself."""
        info = self._mallinfo2()
        return (info.uordblks + info.hblkhd) / 2**20

    def _read(self) -> None:
        while not self._end.wait(READ_EVERY_S):
            steps = self._steps
            self._most[steps] = max(self._most.get(steps, 0.0), self.now())

    @property
    def peak(self) -> float:
        """From the second step to the last: the first loads what is loaded once, and a picture of the views is drawn
        behind it."""
        return max(most for steps, most in self._most.items() if 2 <= steps < self._steps)

    def _at_step(self, *_: object) -> None:
        self._steps += 1

    def __enter__(self) -> "InUse":
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self._hook = register_optimizer_step_post_hook(self._at_step)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()
        self._end.set()
        self._reader.join()


def rank(folder: Path, file: str, settings: list[str]) -> int:
    """What torchrun starts: a training that is watched."""
    from ssl_dist import process

    process.prepare()
    from ssl_dist import cli
    from ssl_dist.distributed.rank import RankInfo
    from ssl_dist.run.blueprint import derive
    from ssl_dist.train import explain

    own, size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    with InUse() as memory:
        if code := cli.main(["train", file, *settings]):
            return code
    gc.collect()
    left = memory.now()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    plan = derive(config.load(file, settings), RankInfo(own, size, own, size))
    counted = explain.Memory.of(plan, "cpu").total(plan.grid) / 2**20
    peaks = Peaks(memory.peak - left, counted, int(status["VmHWM"].split()[0]) / 1024)
    (folder / f"{own}.json").write_text(json.dumps(astuple(peaks)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(outcome.of_program(main))
