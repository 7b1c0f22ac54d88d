"""All benchmarks, one after the other, and docs/benchmarks.md, the page of what they found.

    python tools/bench_all.py --cifar10 data/cifar10 --cifar10-files FOLDER --photos FOLDER --ffcv-ssl FOLDER \\
        --official FOLDER
    python tools/bench_all.py --cifar10 data/cifar10 --only bench_ranks bench_views

--only: the rows of the other benchmarks stay as they are, each with its date, commit and machine. A command that fails
has no row, also none of before, and the exit code is 1. The page is written after every benchmark. --quick runs the
smallest inputs, whose figures measure nothing: the page is printed, or written to --out, and never into docs/.
"""

import argparse
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from bench_rates import processor  # beside this file

from ssl_dist import outcome
from ssl_dist.data import manifest
from ssl_dist.distributed.rank import available_cores
from ssl_dist.errors import UserError, did_you_mean, refuse_unreadable
from ssl_dist.storage.durable import atomic_write_or_refuse
from ssl_dist.text_table import as_markdown

ROOT = Path(__file__).resolve().parent.parent
# Among the arguments: folders
CIFAR10, CIFAR10_FILES, PHOTOS, FFCV_SSL, OFFICIAL = "CIFAR10", "CIFAR10_FILES", "PHOTOS", "FFCV_SSL", "OFFICIAL"


class Folder(NamedTuple):
    option: str
    about: str
    shown: str  # in the page


FOLDERS = {
    CIFAR10: Folder("--cifar10", "that `ssl-dist convert` wrote", "data/cifar10"),
    CIFAR10_FILES: Folder("--cifar10-files", "of CIFAR-10's images as JPEG files, SPLIT/CLASS/*.jpg", "cifar10-files"),
    PHOTOS: Folder("--photos", "of photographs", "photos"),
    FFCV_SSL: Folder("--ffcv-ssl", "in which pip has installed FFCV-SSL (tools/bench_loader.py)", "ffcv-ssl"),
    OFFICIAL: Folder("--official", "that is a checkout of the official code (tools/bench_step.py)", "official"),
}


class Bench(NamedTuple):
    full: Sequence[str]  # the arguments of each command
    quick: str  # of one on the smallest input; any converted set of 32 px may take CIFAR-10's place


BENCHES = {
    "bench_views": Bench([""], "--rounds 1"),
    "bench_multi_view": Bench(
        [f"--images {PHOTOS}", f"--images {PHOTOS} --views 8"], "--count 8 --size 32 --rounds 1 --workers 1"
    ),
    "bench_loader": Bench(
        [f"--images {PHOTOS} --ffcv-ssl {FFCV_SSL} --views {views}" for views in (2, 8)],
        "--count 8 --size 32 --batch 4 --rounds 1 --threads 1",
    ),
    "bench_step": Bench(
        [
            f"--data {CIFAR10}",
            f"--data {CIFAR10} --backbone resnet32 --views 8 --environments tuned",
            *(
                f"--data {CIFAR10} --environments tuned --beside official --official {OFFICIAL}{case}"
                for case in ("", " --backbone resnet32 --views 8")
            ),
            f"--data {CIFAR10} --beside compiled --environments tuned",
        ],
        f"--data {CIFAR10} --reader arrays --views 2 --images 8 --rounds 1 --steps 1 --environments tuned",
    ),
    "bench_minutes": Bench(
        [f"--data {CIFAR10}"],
        f"--data {CIFAR10} --reader arrays --views 2 --marks 10 101 --max-minutes 0.001",
    ),
    "bench_extract": Bench(
        [f"--data {CIFAR10}", f"--data {CIFAR10} --images {CIFAR10_FILES}"],
        f"--data {CIFAR10} --reader arrays --rounds 1",
    ),
    "bench_ranks": Bench(
        [f"--data {CIFAR10}"],
        f"--data {CIFAR10} --rounds 1 --steps 5 data.reader=arrays backbone.name=conv4 views.num=2",
    ),
    "bench_memory": Bench(
        [
            f"--data {CIFAR10}",
            f"--data {CIFAR10} --config configs/cifar10/relational-conv4.yaml --grids 1x1 2x1",
            f"--data {CIFAR10} --config configs/cifar10-short/mocov3-conv4.yaml backbone.name=resnet20 --grids 1x1",
            f"--data {CIFAR10} --config configs/cifar10-short/mae-vit_tiny_patch16_224.yaml --grids 1x1",
            f"--data {CIFAR10} --config configs/cifar10-short/supervised-conv4.yaml backbone.name=resnet50 --grids 1x1",
        ],
        f"--data {CIFAR10} --grids 1x1 --steps 3 data.reader=arrays backbone.name=conv4 views.num=2",
    ),
    "bench_relation": Bench([""], "--views 2 4 --features 16 --rounds 1"),
    "bench_sinkhorn": Bench([""], "--images 300 --clusters 10 --features 8 --processes 2 --rounds 1"),
    "bench_neighbours": Bench([""], "--images 300 --queries 20 --features 8 --rounds 1 --threads 1"),
    "bench_knn": Bench(
        ["", "--evaluator retrieval --images 50000 --queries 10000 --features 64 --classes 10 --threads 1"],
        "--images 500 --queries 20 --features 8 --classes 5 --threads 1",
    ),
    "bench_prediction": Bench(
        [f"--data {CIFAR10}", "--published"],
        f"--data {CIFAR10} --ranks 1 --rounds 1 --steps 1 --cases vicreg",
    ),
}
WITHOUT_ROW = {
    "bench_all": "runs the others",
    "bench_rates": "measures what `ssl-dist explain` reads; bench_prediction has rows of what comes of it",
}

HEAD = """\
# Benchmarks

Speed and memory beside other programs, as `python tools/bench_all.py` measured them and wrote this page. Times are wall
time unless CPU time is named. What stands beside one another is the median of rounds in which the sides take turns, and
the range behind a ratio is that of the rounds. Ratios depend on the processor: each row names its machine, which stands
below. What is compared, and how, is said at the beginning of each file. [Measured](measured.md) has the accuracies.
"""
COLUMNS = ("what", "result", "command", "measured")
HEADING = as_markdown(COLUMNS, [])[0]
ROW = re.compile(
    r"\| ([^|]+) \| ([^|]+) \| `(python tools/\w+\.py[^|`]*)` \| ([^|,]+), commit ([^|,]+), machine (\d+) \|"
)
# What a benchmark prints: with a figure above 0, and none that is no number.
FOUND = re.compile(r"(?!.*\b(?:nan|inf)x?\b)\| ([^|]+) \| ([^|]*[1-9][^|]*) \|")


class Row(NamedTuple):
    what: str
    result: str
    command: str
    date: str
    commit: str
    machine: str

    @property
    def bench(self) -> str:
        return Path(self.command.split()[1]).stem


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, about, _ in FOLDERS.values():
        parser.add_argument(option, type=Path, metavar="FOLDER", help=about)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="such as bench_step (default: all)")
    parser.add_argument("--quick", action="store_true", help="the smallest inputs")
    parser.add_argument("--out", type=Path, help="page to write (default: docs/benchmarks.md; none with --quick)")
    arguments = parser.parse_args()
    for name in arguments.only or ():
        if name not in BENCHES:
            raise UserError(f"--only {name}: {did_you_mean(name, BENCHES)}the benchmarks are {', '.join(BENCHES)}")
    commands = {
        name: [bench.quick] if arguments.quick else bench.full
        for name, bench in BENCHES.items()
        if name in (arguments.only or BENCHES)
    }
    if arguments.cifar10:
        manifest.load(arguments.cifar10)  # one that is missing shows before an hour of measuring
    given = arguments.cifar10, arguments.cifar10_files, arguments.photos, arguments.ffcv_ssl, arguments.official
    folders = dict(zip(FOLDERS, given, strict=True))
    for word, folder in folders.items():
        name = next((name for name, all_words in commands.items() if word in " ".join(all_words).split()), None)
        if name and folder is None:
            raise UserError(f"{FOLDERS[word].option}: {name} needs it; give the folder {FOLDERS[word].about}")
        if folder and not folder.is_dir():
            raise UserError(
                f"{FOLDERS[word].option} {folder}: there is no such folder; give the one {FOLDERS[word].about}"
            )
    out = arguments.out or (None if arguments.quick else ROOT / "docs" / "benchmarks.md")
    if arguments.quick and out and out.resolve().is_relative_to(ROOT / "docs"):
        raise UserError(f"--out {out}: --quick measures nothing that docs/ could show; give a file elsewhere")
    rows = [row for row in read(out) if row.bench in BENCHES] if out else []
    where_and_when = (datetime.date.today().isoformat(), commit(), machine())
    has_failed = False
    for name, all_words in commands.items():
        rows = [row for row in rows if row.bench != name]
        for words in all_words:
            shown = [FOLDERS[word].shown if word in FOLDERS else word for word in words.split()]
            command = " ".join(["python", f"tools/{name}.py", *shown])
            print(f"{command}:", end=" ", file=sys.stderr, flush=True)
            start = time.monotonic()
            found, flaw = measured(name, words, folders)
            print(f"{time.monotonic() - start:.0f} s{flaw}", file=sys.stderr, flush=True)
            has_failed |= bool(flaw)
            rows += [Row(what, result, command, *where_and_when) for what, result in found]
        rows.sort(key=lambda row: list(BENCHES).index(row.bench))
        if out:
            with atomic_write_or_refuse(out) as file:
                file.write(page(rows).encode())
    if out is None:
        print(page(rows), end="")
    return 1 if has_failed else 0


def measured(name: str, arguments: str, folders: Mapping[str, Path | None]) -> tuple[list[tuple[str, str]], str]:
    """(what, result) of every row that a benchmark printed; or none, and why not."""
    words = [str(folder.resolve()) if (folder := folders.get(word)) else word for word in arguments.split()]
    # The number of threads is the benchmark's to choose: another one would not stand in the command.
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *words]
    completed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in completed.stdout.splitlines() if line.startswith("| ")]
    matches = {line: FOUND.fullmatch(line) for line in lines}
    if completed.returncode:
        flaw = f"exit code {completed.returncode}"
    elif not lines:
        flaw = "it printed none"
    elif None in matches.values():
        flaw = f"without a figure: {next(line for line, match in matches.items() if match is None)}"
    else:
        return [(match[1], match[2]) for match in matches.values() if match], ""
    return [], "\n    ".join([f", no row: {flaw}", *completed.stderr.splitlines()[-5:]])


def page(rows: Sequence[Row]) -> str:
    """docs/benchmarks.md: a table for each benchmark, and the machines."""
    machines = list(dict.fromkeys(row.machine for row in rows))
    lines = [HEAD]
    for bench in dict.fromkeys(row.bench for row in rows):
        cells = []
        for row in (row for row in rows if row.bench == bench):
            when = f"{row.date}, commit {row.commit}, machine {machines.index(row.machine) + 1}"
            cells.append((row.what, row.result, f"`{row.command}`", when))
        lines += [f"## {bench}", "", *as_markdown(COLUMNS, cells), ""]
    return "\n".join([*lines, "## Machines", "", *(f"{i}. {text}" for i, text in enumerate(machines, 1)), ""])


def read(path: Path) -> list[Row]:
    """The rows of a page, none where there is no page. Raises `UserError` for one that `page` does not write."""
    if not path.exists():
        return []
    with refuse_unreadable(path):
        text = path.read_text(encoding="utf-8")
    machines = dict(re.findall(r"^(\d+)\. (.+)$", text, re.MULTILINE))
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("| ") and line != HEADING:
            match = ROW.fullmatch(line)
            if match is None or match[6] not in machines:
                raise UserError(f"{path} line {number}: not a row as this program writes it; mend it or take it out")
            *cells, machine_number = match.groups()
            rows.append(Row._make([*cells, machines[machine_number]]))
    return rows


def commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    # The page itself is written between two measurements, and changes none.
    changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs/benchmarks.md")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (" + changes" if changes else "")


def machine() -> str:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    packages = ("torch", "torchvision", "numba", "numpy")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    hardware = f"{processor()}, {available_cores()} cores, {' and '.join(gpus) or 'no GPU'}"
    return f"{hardware}; {platform.platform()}; Python {platform.python_version()}, {', '.join(versions)}"


if __name__ == "__main__":
    sys.exit(outcome.of_program(main))
