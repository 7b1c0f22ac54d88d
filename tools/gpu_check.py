"""The first minutes on a machine with a GPU: what the tests can only pretend there, measured.

    python tools/gpu_check.py --minutes 8 --out gpu.json [--only methods speed ...]

Sections, in the order of their worth; one that no longer fits into the minutes is left out, and what is measured is in
the JSON file at any time:
  methods   every method in fp32, bf16, fp16 and fp64: the first loss against the CPU in float64, how often a step waits
            for the GPU; in fp32 two deterministic trainings, and a resumed one, must be equal bit for bit
  ranks     one process and two ranks that share the GPU over gloo against the CPU in float64 (`verify --device cuda`),
            and NCCL's collectives in a group of one
  speed     milliseconds of a step with the loader and with views that lie on the device, and peak memory; beside them a
            plain loop of torchvision's transforms in a DataLoader
  head      the relation head by Triton and by torch operations: milliseconds, memory, and how far they differ
  evaluate  whether the bits of exact cosines are the CPU's; kNN of 10,000 rows among 50,000, retrieval, k-means and
            logistic regression: seconds on the CPU and on the GPU, and whether they agree
  feeding   views a second by threads, and how fast they get into pinned memory and to the GPU
  hang      seconds until a process ends whose GPU never does
  tf32      features and kNN with and without TensorFloat-32
Images are random; nothing is read from the network. --device pretended runs the same code without a GPU, small; with
TRITON_INTERPRET=1 in the environment Triton's kernels, too.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ssl_dist import cli, config, outcome, views
from ssl_dist.config import Config
from ssl_dist.convert.command import convert
from ssl_dist.distributed.rank import RankInfo, available_cores
from ssl_dist.distributed.signals import StopRequest
from ssl_dist.distributed.world import World
from ssl_dist.errors import UserError
from ssl_dist.kernels.exact_cosines import cosines, slices
from ssl_dist.kernels.neighbours import neighbours
from ssl_dist.run.blueprint import derive
from ssl_dist.storage import checkpoint
from ssl_dist.storage.features import Features
from ssl_dist.thread_team import ThreadTeam
from ssl_dist.train.loop import fit
from ssl_dist.train.loop import train as train_run
from ssl_dist.train.state import TrainState
from ssl_dist.verify import command as verify

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
Row = dict[str, Any]


@dataclass
class Check:
    """What the sections share. pretended: small sizes; folder: for data sets and runs; gpu: a context in which there is
    one."""

    device: torch.device
    pretended: bool
    folder: Path
    end: float  # by the monotonic clock
    gpu: Callable[[], contextlib.AbstractContextManager[object]]

    @property
    def seconds_left(self) -> float:
        return self.end - time.monotonic()


class Steps(TrainState):
    """A training that writes nothing, and keeps its losses, and how long every step took and waited."""

    def __init__(self, settings: Config, device: torch.device, batch: Any = None):
        rank_info = RankInfo()
        plan = derive(settings, rank_info)
        self.losses: list[torch.Tensor] = []
        self.starts: list[float] = []
        self.waits: list[str] = []
        self.batch = batch
        super().__init__(plan, World(rank_info, plan.grid, device))

    def to_device(self, host: Any) -> Any:
        self.starts.append(time.perf_counter())
        if self.batch is None:
            return super().to_device(host)
        if self.batch == "kept":
            self.batch = super().to_device(host)
        return self.batch

    def forward(self, batch: Any) -> Any:
        output = super().forward(batch)
        self.losses.append(output.loss.detach())
        return output

    def log(self) -> Any:
        return contextlib.nullcontext()

    def show_images(self, *_: Any) -> None:
        pass

    def write(self, *_: Any) -> None:
        pass

    def save(self, *_: Any) -> None:
        pass

    def finish(self, *_: Any) -> None:
        self.starts.append(time.perf_counter())

    def run(self) -> "Steps":
        assert fit(self, StopRequest()) == 0
        return self

    def median_ms(self, skip: int) -> float:
        return 1000 * float(np.median(np.diff(self.starts)[skip:]))


def overridden(settings: Config, *overrides: str) -> Config:
    return config.overridden(config.to_tree(settings), list(overrides))


def number(value: torch.Tensor) -> float:
    return float(value.item())


# ------------------------------------------------------------------------------------------------- methods


def check_methods(check: Check) -> Iterator[Row]:
    seen = set[str]()
    names = ["supervised"] if check.pretended else []
    for case in verify.cases(check.folder, names=names, steps=3):
        if case.method in seen or case.config.precision != "fp64" or not case.trains:
            continue
        seen.add(case.method)
        few = ["method.options.clusters=8"] if case.method == "deepcluster" else []
        settings = overridden(case.config, *few, "log.every_steps=1000")
        expected = number(Steps(overridden(settings, "optim.steps=1"), CPU).run().losses[0])
        for precision in ("fp32", "bf16", "fp16", "fp64") if not check.pretended else ("fp32", "fp16"):
            with check.gpu(), counted_waits(check) as waits:
                steps = Steps(overridden(settings, f"precision={precision}", "optim.steps=3"), check.device).run()
                first = number(steps.losses[0])
            yield {
                "method": case.method, "precision": precision, "first loss": first,
                "relative to the CPU": abs(first - expected) / abs(expected), "waits of 3 steps": len(waits),
                "step ms": steps.median_ms(1), "where": sorted(set(waits))[:6],
            }  # fmt: skip
        with check.gpu():
            row = bit_equal(check, overridden(settings, "precision=fp32", "deterministic=true"))
            torch.use_deterministic_algorithms(False)
        yield row


def bit_equal(check: Check, settings: Config) -> Row:
    """Whether a training gives the same bits twice, and when it is stopped and resumed."""
    row: Row = {"method": settings.method.name, "precision": "fp32, deterministic"}
    runs = {name: check.folder / "runs" / f"{settings.method.name}-{name}" for name in ("once", "again", "resumed")}
    saves = ["checkpoint.every_steps=2", "checkpoint.every_epochs=null", "checkpoint.keep=9", "optim.steps=4"]
    digests = {}
    for name, run in runs.items():
        mine = overridden(settings, *saves, f"run_dir={run}")
        try:
            assert train_run(mine) == 0
        except UserError as error:
            return row | {"refused": str(error)}
        if name == "resumed":  # as if it had ended after its second step
            for path in (run / "checkpoints").glob("step-00000004*"):
                path.unlink()
            assert train_run(mine) == 0
        digests[name] = digest(checkpoint.load_newest(run)[1]["method"])
    return row | {"twice": digests["once"] == digests["again"], "resumed": digests["once"] == digests["resumed"]}


def digest(state: dict[str, torch.Tensor]) -> str:
    sha = hashlib.sha256()
    for name in sorted(state):
        sha.update(name.encode() + state[name].contiguous().cpu().numpy().tobytes())
    return sha.hexdigest()


@contextlib.contextmanager
def counted_waits(check: Check) -> Iterator[list[str]]:
    """The places that made the host wait for the GPU, as torch's debug mode warns of them."""
    places: list[str] = []
    if check.pretended:
        yield places
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places += [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]


# ------------------------------------------------------------------------------------------------- ranks


def check_ranks(check: Check) -> Iterator[Row]:
    prepare = None
    if check.pretended:
        from tests.pretended_training import pretend_in_a_rank as prepare
    names = ["relational"] if check.pretended else ["relational", "simclr", "vicreg", "relic"]
    folder = check.folder / "certificate"
    folder.mkdir()
    cases, seen = [], set()
    few = ["views.num=2", "optim.batch_size=4"] if check.pretended else []
    for case in verify.cases(folder, names=names, steps=3):
        if (case.method, case.config.precision) not in seen:  # the options as they are come first
            seen.add((case.method, case.config.precision))
            cases.append(replace(case, config=overridden(case.config, *few), device="cuda"))
    for row in verify.certify(cases, folder, prepare, sizes=(2,)):
        yield {"case": row.case.title, "grid": str(row.grid), "holds": row.holds, **row.figures}
    if not check.pretended:
        yield nccl_alone()


def nccl_alone() -> Row:
    import torch.distributed as dist

    store = dist.HashStore()
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    try:
        x, objects = torch.arange(5.0, device="cuda"), ["a"]
        dist.all_reduce(x)
        out = torch.empty(5, device="cuda")
        dist.all_gather_into_tensor(out, x)
        dist.broadcast_object_list(objects, src=0)
        dist.barrier()
        return {"case": "NCCL, a group of one", "holds": bool(torch.equal(out.cpu(), torch.arange(5.0)))}
    finally:
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------- speed


def pictures(check: Check, side: int, count: int) -> Path:
    """A converted data set of random pictures, smooth as photographs are, and its folder of JPEGs beside it."""
    from PIL import Image

    root = check.folder / f"pictures-{side}"
    rng = np.random.default_rng(0)
    for i in range(count):
        path = root / "source" / "train" / f"class{i % 4}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8))
        small.resize((side, side), Image.Resampling.BICUBIC).save(path, quality=90)
    convert("folder", root / "source", root / "data", name="pictures", max_side=max(side, 64), progress=False)
    return root


SPEED = [  # method, backbone, M, K, px, stored px
    ("relational", "conv4", 64, 32, 32, 32),
    ("relational", "conv4", 512, 8, 32, 32),
    ("relational", "resnet18", 64, 16, 32, 32),
    ("simclr", "resnet50", 64, 2, 224, 256),
    ("simclr", "timm/vit_small_patch16_224", 64, 2, 224, 256),
]


def check_speed(check: Check) -> Iterator[Row]:
    roots = {side: pictures(check, side, 600 if not check.pretended else 16) for side in {row[-1] for row in SPEED}}
    rows = SPEED if not check.pretended else [("relational", "conv4", 8, 2, 32, 32)]
    for method, backbone, M, K, side, stored in rows:
        variants = [("fp32", False), ("bf16", False), ("bf16", True)] if not check.pretended else [("fp32", False)]
        for precision, compiled in variants:
            steps = 40 if not check.pretended else 4
            settings = config.load(ROOT / "configs/digits/relational-conv4.yaml", [
                "data.name=pictures", f"data.root={roots[stored] / 'data'}", "data.reader=arrays",
                f"data.image_size={side}", f"method={{name: {method}}}", f"backbone.name={backbone}",
                f"optim.batch_size={M}", "optim.epochs=null",
                f"views.num={K if method == 'relational' else 'null'}", f"precision={precision}",
                f"compile={str(compiled).lower()}", "log.every_steps=100000", "run_dir=none", f"optim.steps={steps}",
            ])  # fmt: skip
            what = f"{method} {backbone} M={M} K={K} {side} px"
            row: Row = {"what": what, "precision": precision, "compile": compiled}
            for title, batch in (("ms, views on the device", "kept"), ("ms, with the loader", None)):
                if not check.pretended:
                    torch.cuda.reset_peak_memory_stats()
                row[title] = Steps(settings, check.device, batch).run().median_ms(steps // 2)
                if not check.pretended:
                    row["peak MiB"] = torch.cuda.max_memory_allocated() / 2**20
            row["images/s"] = 1000 * M / row["ms, with the loader"]
            yield row
        if method == "simclr" and backbone == "resnet50":
            yield plain_loop(check, roots[stored] / "source", M)


def plain_loop(check: Check, source: Path, M: int, steps: int = 30) -> Row:
    """SimCLR as most scripts have it: torchvision's transforms on PIL images in a DataLoader, bf16 autocast."""
    from torch import nn
    from torch.utils.data import DataLoader
    from torchvision import datasets, models, transforms

    transform = transforms.Compose([
        transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(),
        transforms.RandomApply([transforms.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8), transforms.RandomGrayscale(0.2),
        transforms.GaussianBlur(23), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.25] * 3),
    ])  # fmt: skip
    images = datasets.ImageFolder(source / "train", lambda image: torch.stack([transform(image), transform(image)]))
    loader = DataLoader(images, M, True, num_workers=available_cores(), drop_last=True, pin_memory=True)
    network = models.resnet50()
    network.fc = nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 128))
    network.to(check.device, memory_format=torch.channels_last)
    optimizer, starts = torch.optim.Adam(network.parameters(), fused=True), []
    while len(starts) < steps:
        for batch, _ in loader:
            starts.append(time.perf_counter())
            x = batch.transpose(0, 1).flatten(0, 1).to(check.device, non_blocking=True)
            x = x.contiguous(memory_format=torch.channels_last)
            with torch.autocast("cuda", torch.bfloat16):
                z = F.normalize(network(x).float(), dim=1)
            logits = z @ z.T / 0.5 - 1e9 * torch.eye(len(z), device=z.device)
            target = torch.arange(len(z), device=z.device).roll(len(z) // 2)
            loss = F.cross_entropy(logits, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
    ms = 1000 * float(np.median(np.diff(starts)[steps // 2 :]))
    what = f"plain loop: resnet50 M={M} K=2 224 px"
    return {"what": what, "precision": "bf16", "ms, with the loader": ms, "images/s": 1000 * M / ms}


# ------------------------------------------------------------------------------------------------- head


def check_head(check: Check) -> Iterator[Row]:
    from ssl_dist.distributed.world import one_process
    from ssl_dist.methods.base import Info
    from ssl_dist.methods.relational import Method, Options

    sizes = [(64, 32), (256, 32), (1024, 8), (1024, 32)] if not check.pretended else [(3, 3)]
    for M, K in sizes:
        method = Method(torch.nn.Identity(), Info(M, 0, ((K, 32),), M, 1.0, 64), Options()).to(check.device).train()
        z = torch.randn(K, M, 64).to(check.device).requires_grad_()
        unknown, found = torch.full((M,), -1, device=check.device), []
        for title, fused in (("torch operations", False), (method.relation_module.obstacle("cuda") or "Triton", True)):
            method.fused = fused

            def step(method: Any = method, z: Any = z, unknown: torch.Tensor = unknown) -> list[torch.Tensor]:
                method.zero_grad()
                z.grad = None
                loss, logits, _ = method.relate(z, unknown, 0, z[:, :, 0].numel() * (len(z) - 1) // 2, one_process())
                loss.backward()
                return [loss.detach(), logits, z.grad, *(p.grad for p in method.parameters())]

            ms, mib = timed(check, step)
            found.append(step())
            yield {"head": title, "M": M, "K": K, "ms": ms, "peak MiB": mib}
        largest = max(number((a - b).abs().max() / b.abs().max().clamp_min(1e-6)) for b, a in zip(*found, strict=True))
        yield {"head": "difference, relative to the largest", "M": M, "K": K, "holds": largest < 1e-4, "is": largest}


def timed(check: Check, step: Callable[[], object], rounds: int = 20) -> tuple[float, float]:
    """Median milliseconds and peak memory."""
    if check.pretended:
        start = time.perf_counter()
        step()
        return 1000 * (time.perf_counter() - start), 0.0
    for _ in range(3):
        step()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return float(np.median(times)), torch.cuda.max_memory_allocated() / 2**20


# ------------------------------------------------------------------------------------------------- feeding


def check_feeding(check: Check) -> Iterator[Row]:
    for side, stored, count in ((32, 32, 512), (224, 256, 64)) if not check.pretended else ((32, 32, 8),):
        [group] = config.load(ROOT / "configs/digits/relational-conv4.yaml", ["data.root=x"]).views.groups
        [spec] = views.view_specs([group], 8, side)
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 256, (count, stored, stored, 3), np.uint8)
        sides, ids = np.full(count, stored), np.arange(count)
        views.warm_up(spec)
        for threads in sorted({1, available_cores()}):
            with ThreadTeam(threads) as team:
                out = torch.empty((8, count, 3, side, side), dtype=torch.uint8, pin_memory=True)
                start, done = time.perf_counter(), 0
                while time.perf_counter() - start < (2 if not check.pretended else 0.01):
                    images = views.Images(pixels, sides, sides, ids)
                    views.make_views(images, spec, spec.view_ids, 0, done, team, out.numpy())
                    done += 1
                rate = done * 8 * count / (time.perf_counter() - start)
            row: Row = {"views": f"{side} px from {stored} px", "threads": threads, "views/s": rate}
            if not check.pretended:
                ms, _ = timed(check, lambda out=out: out.to(check.device, non_blocking=True))
                row["GB/s to the GPU"] = out.numel() / ms / 1e6
            yield row


# ------------------------------------------------------------------------------------------------- hang, tf32


HANG = """
import sys, time, torch
from ssl_dist import cli
from ssl_dist.methods.supervised import Method
forward = Method.forward
def hangs(self, batch, world):
    if world.state.step == 3:
        print(time.time(), flush=True)
        torch.cuda._sleep(1 << 62)
    return forward(self, batch, world)
Method.forward = hangs
sys.exit(cli.main(sys.argv[1:]))
"""


def check_hang(check: Check) -> Iterator[Row]:
    data = digits(check)
    words = ["train", str(ROOT / "configs/digits/supervised-conv4.yaml"), f"data.root={data}", "data.reader=arrays",
             f"run_dir={check.folder / 'hang'}", "timeout=5"]  # fmt: skip
    if check.pretended:
        return
    done = subprocess.run([sys.executable, "-c", HANG, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    seconds = time.time() - float(done.stdout.splitlines()[-1])
    yield {"exit code": done.returncode, "seconds to the end, timeout 5": seconds, "said": lines[:2]}


def digits(check: Check) -> Path:
    root = check.folder / "digits"
    if not root.exists():
        convert("digits", None, root, workers=1, progress=False)
    return root


def check_tf32(check: Check) -> Iterator[Row]:
    from ssl_dist.storage.features import read_features

    data, run = digits(check), check.folder / "tf32"
    words = [f"data.root={data}", "data.reader=arrays", f"run_dir={run}", "optim.epochs=null"]
    steps = 40 if not check.pretended else 2
    command = ["train", str(ROOT / "configs/digits/supervised-conv4.yaml"), *words, f"optim.steps={steps}"]
    features = []
    with contextlib.redirect_stdout(sys.stderr):
        assert cli.main([*command, *(["data.limit=64"] if check.pretended else [])]) == 0
        for tf32 in (False, True):
            assert cli.main(["evaluate", str(run), "knn", f"tf32={str(tf32).lower()}"]) == 0
            stored = read_features(run / "features" / "digits-test.safetensors")
            features.append(torch.from_numpy(stored.features.copy()))
    numbers = {(r["transform"].endswith("TensorFloat-32"), r["name"]): r["value"]
               for r in json.loads((run / "results.json").read_text()) if r["name"] == "knn20_top1"}  # fmt: skip
    exact, rounded = features
    yield {
        "kNN-20, fp32": numbers[False, "knn20_top1"], "kNN-20, tf32": numbers[True, "knn20_top1"],
        "largest difference of a feature, relative": number((exact - rounded).abs().max() / exact.abs().max()),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------- evaluate


EVALUATED: dict[str, tuple[dict[str, Any], int]] = {  # options, and rows of the test split
    "retrieval": ({}, 2000),
    "clusters": ({"starts": 1, "iterations": 20, "limit": 20_000}, 10_000),
    "logistic": ({}, 10_000),
}


def check_evaluate(check: Check) -> Iterator[Row]:
    from ssl_dist import evaluators
    from ssl_dist.evaluators import knn

    shrink = 100 if check.pretended else 1
    train, test = made_features(50_000 // shrink, 0), made_features(10_000 // shrink, 1)
    few = torch.from_numpy(train.rows(0, min(3000, len(train)))).clone()
    few[-3:] = 1.0  # these have the largest sums
    one, two = (cosines(*[slices(few, 2, device)] * 2).cpu() for device in (CPU, check.device))
    yield {"what": "bits of exact cosines", "holds": torch.equal(one, two)}
    for dtype, rounding in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        k, memory, found, seconds = 21, knn.Options().memory_mb << 20, [], []
        for device in (CPU, check.device):
            start = time.perf_counter()
            found.append([each[1:] for each in neighbours(train, test, k, dtype, memory, device=device)])
            seconds.append(time.perf_counter() - start)
        cosine, row, other = (torch.cat(parts) for parts in (*zip(*found[0], strict=True), [r for _, r in found[1]]))
        gap = -cosine.diff(dim=1)
        is_close = (gap <= rounding) | F.pad(gap[:, :-1] <= rounding, (1, 0))  # of the first k - 1, to one beside it
        differs = (row != other)[:, :-1]
        yield {
            "what": f"the 20 nearest, {str(dtype)[6:]}", "CPU s": seconds[0], "GPU s": seconds[1],
            "other rows, %": 100 * number(differs.double().mean()), "holds": not bool((differs & ~is_close).any()),
        }  # fmt: skip
    for name, (options, count) in EVALUATED.items():
        evaluator, part = evaluators.find(name), test.subset(np.arange(count // shrink))
        values, seconds = [], []
        for device in (CPU, check.device):
            start = time.perf_counter()
            values.append(evaluator.run(train, part, evaluator.Options(**options), None, device))
            seconds.append(time.perf_counter() - start)
        apart = max(abs(value - values[1][key]) for key, value in values[0].items())
        yield {
            "what": name, "CPU s": seconds[0], "GPU s": seconds[1], "largest difference": apart, "holds": apart <= 0.05,
        }  # fmt: skip


def made_features(count: int, seed: int, dim: int = 512, classes: int = 20) -> Features:
    """Classes that overlap, and every fiftieth row of the first class the same one."""
    labels = np.arange(count) % classes
    centres = np.random.default_rng(99).standard_normal((classes, dim), np.float32)
    rows = 0.1 * centres[labels] + np.random.default_rng(seed).standard_normal((count, dim), np.float32)
    rows[:: 50 * classes] = rows[0]
    return Features(rows, labels, np.arange(count), {"classes": "[]"})


# ------------------------------------------------------------------------------------------------- running


def on_gpu(section: Callable[[Check], Iterator[Row]]) -> Callable[[Check], Iterator[Row]]:
    """The section in a context that has a GPU."""

    def inside(check: Check) -> Iterator[Row]:
        with check.gpu():
            yield from section(check)

    return inside


SECTIONS: dict[str, tuple[Callable[[Check], Iterator[Row]], float]] = {  # and the seconds that it needs at the least
    "methods": (check_methods, 60),
    "ranks": (check_ranks, 60),
    "speed": (on_gpu(check_speed), 60),
    "head": (on_gpu(check_head), 10),
    "evaluate": (on_gpu(check_evaluate), 40),
    "feeding": (on_gpu(check_feeding), 15),
    "hang": (check_hang, 40),
    "tf32": (on_gpu(check_tf32), 20),
}


def machine(device: torch.device, pretended: bool) -> Row:
    name = "pretended" if pretended else torch.cuda.get_device_name(device)
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": name, "cores": available_cores(), "torch": torch.__version__, "python": platform.python_version(),
        "commit": commit or "unknown",
    }  # fmt: skip


def perform(check: Check, names: list[str], out: Path | None) -> dict[str, Any]:
    """The rows of every section. A fault in one section is a row, and the others go on: minutes on a GPU are rare."""
    results: dict[str, Any] = {"machine": machine(check.device, check.pretended)}
    print(json.dumps(results["machine"]), flush=True)
    for name in names:
        section, least = SECTIONS[name]
        start, rows = time.monotonic(), results.setdefault(name, [])
        if check.seconds_left < (least if not check.pretended else 0):
            rows.append({"left out": f"{check.seconds_left:.0f} s are left"})
        else:
            try:
                for row in section(check):
                    rows.append(row)
                    print(name, " ".join(f"{key}={shown(value)}" for key, value in row.items()), flush=True)
                    if check.seconds_left < 0:
                        rows.append({"left out": "the rest: no time is left"})
                        break
            except Exception:  # whatever it is, it is a result
                rows.append({"failed": traceback.format_exc()})
                print(name, rows[-1]["failed"], flush=True)
        print(f"{name}: {time.monotonic() - start:.1f} s", flush=True)
        if out is not None:
            out.write_text(json.dumps(results, indent=1))
    return results


def is_wrong(row: Row) -> bool:
    """Whether a section has failed there, or what must be equal is not."""
    return "failed" in row or any(row.get(name) is False for name in ("holds", "twice", "resumed"))


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if math.isfinite(value) else str(value)
    return str(value).replace(" ", "_")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--out", type=Path, help="JSON file of all rows")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--device", choices=("cuda", "pretended"), default="cuda")
    arguments = parser.parse_args()
    pretended = arguments.device == "pretended"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic; read when CUDA starts
    if not pretended and not torch.cuda.is_available():
        print("error: no GPU is visible; --device pretended runs without one", file=sys.stderr)
        return 2
    gpu: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    if pretended:
        import pytest

        sys.path.insert(0, str(ROOT))
        from tests import pretended_cuda

        gpu = partial(pretended_cuda.pretended, pytest.MonkeyPatch(), 1)
    with tempfile.TemporaryDirectory(prefix="ssl_dist-gpu-") as folder:
        end = time.monotonic() + 60 * arguments.minutes
        check = Check(torch.device("cuda", 0), pretended, Path(folder), end, gpu)
        results = perform(check, arguments.only, arguments.out)
    failed = [name for name in arguments.only if any(map(is_wrong, results[name]))]
    print(f"failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(outcome.of_program(main))
