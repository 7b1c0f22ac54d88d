"""kNN or retrieval on a features file of ImageNet's size: time, and peak memory of a process that does nothing else.

    python tools/bench_knn.py [--images 1280000] [--queries 5000] [--features 512] [--memory-mb 512] [--folder DIR]
    python tools/bench_knn.py --evaluator retrieval --images 50000 --queries 10000 --features 64 --classes 10

Random features are written to a temporary folder, chunk by chunk, and taken out of the kernel's page cache; then a
fresh process runs the evaluator on the mapped files, `knn` with k = 20 and 200. Its memory is the kernel's own account
(/proc/PID/status), read every 20 ms until it ends:
    resident   VmHWM, the largest resident size, exact: the two below, at their worst moment
    anonymous  the largest RssAnon: memory of its own, which only swap could give back
    mapped     the largest RssFile: pages of files (libraries, and of the features file what is being read), which the
               kernel takes back when it wants them
"imports" is what was resident when the packages were loaded and no file was open.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rows  # beside this file

from ssl_dist import outcome
from ssl_dist.storage.features import METADATA, write_features

NAMES = {"knn": "kNN", "retrieval": "retrieval"}
OPTIONS = {"knn": {"k": [20, 200]}, "retrieval": {}}
WORKER = """
import json, sys, time
from pathlib import Path
import torch
from ssl_dist import evaluators
from ssl_dist.storage.features import read_features
folder, memory, threads = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
evaluator = evaluators.find(sys.argv[4])
options = evaluator.Options(memory_mb=memory, **json.loads(sys.argv[5]))
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps(int(status["VmRSS"].split()[0]) / 1024), flush=True)
start, cpu = time.perf_counter(), time.process_time()
parts = (read_features(folder / f"{name}.safetensors") for name in ("train", "test"))
values = evaluator.run(*parts, options)
print(json.dumps([time.perf_counter() - start, time.process_time() - cpu, values]), flush=True)
"""


@dataclass(frozen=True)
class Drawn:
    """Rows of standard normal numbers, float32 [N, D], made when a slice of them is asked for."""

    shape: tuple[int, int]
    seed: int
    dtype = np.dtype(np.float32)

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.shape[1] * 4

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(len(self))
        generator = np.random.default_rng((self.seed, start))
        return generator.standard_normal((stop - start, self.shape[1]), np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluator", choices=tuple(OPTIONS), default="knn")
    parser.add_argument("--images", type=int, default=1_280_000, help="rows of the training file")
    parser.add_argument("--queries", type=int, default=5000, help="rows of the test file")
    parser.add_argument("--features", type=int, default=512, help="D")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--memory-mb", type=int, default=512, help="of the evaluator (default 512, as its own)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch (default: all cores)")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        size = write(Path(folder, "train.safetensors"), arguments.images, arguments, seed=0)
        write(Path(folder, "test.safetensors"), arguments.queries, arguments, seed=1)
        imports, peaks, (wall, cpu, values) = measure(Path(folder), arguments)
    print(
        f"{arguments.evaluator} of {arguments.queries} queries on {arguments.images} x {arguments.features}"
        f" ({size / 2**20:.0f} MiB), {arguments.threads} thread(s), memory_mb={arguments.memory_mb}"
    )
    print(f"wall {wall:.0f} s, CPU {cpu:.0f} s; {', '.join(f'{name} {value:.2f}' for name, value in values.items())}")
    print(
        f"MiB at the peak: resident {peaks['VmHWM']:.0f}, anonymous {peaks['RssAnon']:.0f}, mapped"
        f" {peaks['RssFile']:.0f}; imports {imports:.0f}"
    )
    what = (
        f"{NAMES[arguments.evaluator]} of {arguments.queries:,} queries on {arguments.images:,} x {arguments.features}"
        f" random features in a file of {size / 2**20:,.0f} MiB, {arguments.threads} thread(s)"
    )
    result = (
        f"{rows.figure(cpu)} s of CPU time, {rows.figure(wall)} s wall; peak resident {peaks['VmHWM']:,.0f} MiB"
        f" (anonymous {peaks['RssAnon']:,.0f}, mapped {peaks['RssFile']:,.0f}), of which imports {imports:,.0f}"
    )
    rows.show([(what, result)])


def write(path: Path, count: int, arguments, seed: int) -> int:
    """The file, on disk and in no cache; returns its bytes."""
    labels = np.random.default_rng(seed).integers(0, arguments.classes, count)
    metadata = dict.fromkeys(METADATA, "random") | {"classes": "[]", "split": path.stem}
    write_features(path, Drawn((count, arguments.features), seed), labels, np.arange(count), metadata)
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path.stat().st_size


def measure(folder: Path, arguments) -> tuple[float, dict[str, float], list]:
    """MiB of the imports, MiB at the peaks, and what the process measured itself."""
    words = [str(folder), str(arguments.memory_mb), str(arguments.threads), arguments.evaluator]
    words.append(json.dumps(OPTIONS[arguments.evaluator]))
    process = subprocess.Popen([sys.executable, "-c", WORKER, *words], stdout=subprocess.PIPE, text=True)
    peaks: dict[str, float] = {}
    while process.poll() is None:
        for name, mib in memory(process.pid):
            peaks[name] = max(peaks.get(name, 0), mib)
        time.sleep(0.02)
    output_lines = process.stdout.read().splitlines()
    if process.returncode:
        sys.exit(f"the evaluation ended with exit code {process.returncode}")
    return json.loads(output_lines[0]), peaks, json.loads(output_lines[-1])


def memory(pid: int) -> list[tuple[str, float]]:
    """The memory figures of /proc/PID/status in MiB; none for a process that has just ended."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    names = ("VmHWM", "RssAnon", "RssFile")
    return [(name, int(status[name].split()[0]) / 1024) for name in names if name in status]


if __name__ == "__main__":
    sys.exit(outcome.of_program(main))
