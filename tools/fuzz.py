"""Damaged and crafted files of every kind that a user may hand over, given to the commands that read them.

    python tools/fuzz.py --minutes 60 --seed 0 [--reader config results ...] [--keep DIR]

Each input is a valid file that was changed: bytes, text, or the values that it holds (of JSON, YAML and checkpoints,
whose checksum is made anew). A forked process runs the command on it. Four rules hold for every input: the exit code is
0, 1, 2 or 75; standard error has one line that begins with "error:", of at most 500 characters, where the code is not
0; there is no traceback, no signal and no run of over 20 s of CPU or 120 s in all; memory grows by less than 2 GB.
Input n of a reader is a function of (seed, reader, n). Ends with 1 when a rule is broken; --keep: where such inputs go.
"""

import argparse
import contextlib
import faulthandler
import hashlib
import importlib.util
import io
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # a forked process waits for ever for OpenMP threads of its parent

ROOT = Path(__file__).resolve().parent.parent
MAX_CPU_SECONDS, MAX_SECONDS = 20, 120  # the latter for a run that waits: others may use the machine too
MAX_BYTES, MAX_LINE = 2 * 10**9, 500
CODES = (0, 1, 2, 75)
FORMATS = ("ppm", "bmp", "tiff", "webp")  # beside JPEG and PNG
SUBMIT = "slurm/submit.py"
CONFIG = ROOT / "configs" / "digits" / "relational-conv4.yaml"

ODD_VALUES = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    -(2**63) - 1,
    10**400,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\0",
    "\ud800",
    "a\nb",
    "²",
    "é" * 300,
    "x" * 100_000,
    [],
    [[]],
    [0] * 1000,
    {},
    {"": 0},
    {"x": {"x": []}},
    [None],
]
ODD_TEXTS = [
    b"",
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\n",
    b"\n\n",
    b"{",
    b"]",
    b":",
    b"- ",
    b"? ",
    b"&a ",
    b"*a",
    b"<<: ",
    b"!!int x",
    b"!!python/object/apply:os.system [id]",
    b"!!binary x",
    b"!!timestamp 2001-99-99",
    b"0x_",
    b"0b_",
    b"1" * 5000,
    b"1e999",
    b"\xc2\xb2",
    b"\xf0\x9f\xa6\x8a",
    b"2001-99-99",
    b"[" * 5000,
    b"{a: " * 2000,
    b"\r\n",
    b"\t",
    b"%",
    b"'",
    b'"',
    b"#",
    b"~",
    b"&lol [" + b"*lol," * 50,
    b"-1",
    b".nan",
    b"<!DOCTYPE x [<!ENTITY a 'b'>]>",
    b"&a;",
    b"</annotation>",
    b",",
    b",,,,",
]


# ------------------------------------------------------------------------------------------ inputs


def changed_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to four changes at random places."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at, kind = rng.randrange(len(data) + 1), rng.randrange(8)
        if kind == 0:
            del data[at:]
        elif kind == 1:
            del data[at : at + rng.choice([1, 4, 100])]
        elif kind == 2:
            data[at:at] = rng.choice(ODD_TEXTS)
        elif kind == 3:
            piece = rng.randrange(len(data) + 1)
            data[at:at] = data[piece : piece + rng.choice([1, 8, 100])]
        elif kind == 4 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 5:
            number = rng.choice([0, 1, 0x7FFFFFFF, 2**32 - 1, 2**63, 2**64 - 1])
            data[at : at + 8] = number.to_bytes(8, "little")
        elif kind == 6:
            data[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", bytes(4), b"\x7f\xff\xff\xff"])
        else:
            data[at : at + rng.choice([1, 8, 100])] = rng.choice(ODD_TEXTS)
    return bytes(data)


def changed_tree(tree: Any, rng: random.Random, odd: list[Any] = ODD_VALUES) -> Any:
    """A tree of lists and mappings in which one node is another value, gone, doubled or under another name."""
    if not isinstance(tree, dict | list) or not tree or rng.random() < 0.1:
        return rng.choice(odd)
    if isinstance(tree, list):
        at = rng.randrange(len(tree))
        kind = rng.random()
        if kind < 0.1:
            return tree[:at] + tree[at + 1 :]
        if kind < 0.2:
            return [*tree, tree[at]]
        return [*tree[:at], changed_tree(tree[at], rng, odd), *tree[at + 1 :]]
    key = rng.choice(list(tree))
    kind = rng.random()
    if kind < 0.1:
        return {k: v for k, v in tree.items() if k != key}
    if kind < 0.2:
        return tree | {rng.choice(["", "x", "a\nb", "²", f"{key}x", 7]): tree[key]}
    return tree | {key: changed_tree(tree[key], rng, odd)}


def changed_json(data: bytes, rng: random.Random) -> bytes:
    return json.dumps(changed_tree(json.loads(data), rng)).encode()


def changed_json_line(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = changed_json(lines[at], rng)
    return b"\n".join(lines) + b"\n"


def changed_yaml(data: bytes, rng: random.Random) -> bytes:
    import yaml

    text = yaml.safe_dump(changed_tree(yaml.safe_load(data), rng), allow_unicode=False)
    return text.encode("utf-8", "surrogatepass")


def changed_state(data: bytes, rng: random.Random) -> bytes:
    """A file of torch.save whose values are others."""
    import torch

    odd = [
        *ODD_VALUES,
        torch.zeros(()),
        torch.zeros(3),
        torch.full((2, 2), float("nan")),
        torch.arange(4),
        torch.zeros(0),
    ]
    state = torch.load(io.BytesIO(data), weights_only=True)
    file = io.BytesIO()
    torch.save(changed_tree(state, rng, odd), file)
    return file.getvalue()


def changed_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Another header before the same tensors."""
    size = int.from_bytes(data[:8], "little")
    header = changed_json(data[8 : 8 + size], rng)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def changed_metadata(data: bytes, rng: random.Random) -> bytes:
    """Another metadata in the header before the same tensors: also inside its values that are JSON."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    key = rng.choice([*header["__metadata__"]])
    value = header["__metadata__"][key].encode()
    changed = changed_json(value, rng) if value[:1] == b"{" else changed_bytes(value, rng)
    header["__metadata__"][key] = changed.decode(errors="replace")
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def changed_tar(data: bytes, rng: random.Random) -> bytes:
    """A field of a member's header is another, with the checksum that belongs to it; or its contents are others."""
    data = bytearray(data)
    at = 512 * rng.choice([block for block in range(len(data) // 512) if data[512 * block + 257 :][:5] == b"ustar"])
    if rng.random() < 0.3:
        data[at + 512 : at + 512 + 16] = rng.choice(ODD_TEXTS)[:16].ljust(16, b"\0")
        return bytes(data)
    start, end = rng.choice([(0, 100), (124, 136), (124, 136), (136, 148), (156, 157), (157, 257), (345, 500)])
    texts = [b"8" * 500, b"7" * 500, b"\xff" * 500, b"\x80" + b"\x7f" * 500, *b"xgLKS1235", *ODD_TEXTS]
    text = rng.choice(texts)
    data[at + start : at + end] = (bytes([text]) if isinstance(text, int) else text)[: end - start].ljust(
        end - start, b"\0"
    )
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = f"{sum(data[at : at + 512]):06o}\0 ".encode()
    return bytes(data)


# ------------------------------------------------------------------------------------------ readers


@dataclass
class Reader:
    """A file of the template, the command that reads it, and the ways to change it beside that of its bytes. command:
    of ssl-dist, or of slurm/submit.py where it begins so; {0} stands for the folder, a copy of the template. after:
    called when the file is written."""

    name: str
    file: str
    command: str
    changes: list[Callable[[bytes, random.Random], bytes]] = field(default_factory=list)
    after: Callable[[Path], None] = lambda path: None

    def inputs(self, template: Path, seed: int) -> Iterator[bytes]:
        data = (template / self.file).read_bytes()
        for number in itertools.count():
            rng = random.Random(f"{seed} {self.name} {number}")
            changes = [changed_bytes, *self.changes, *self.changes]
            yield rng.choice(changes)(data, rng)


def sign(path: Path) -> None:
    """The checksum beside a checkpoint."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_name(path.name + ".sha256").write_text(f"{digest}  {path.name}\n")


def perform(words: list[str]) -> int:
    """Exit code of ssl-dist, or of slurm/submit.py where the words begin so."""
    from ssl_dist import cli

    if words[0] != SUBMIT:
        return cli.main(words)
    spec = importlib.util.spec_from_file_location("submit", ROOT / SUBMIT)
    assert spec is not None and spec.loader is not None
    submit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(submit)
    sys.argv = words
    return submit.main()


def quietly(command: str) -> None:
    """Run a command that must succeed, in this process."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        code = perform(command.split())
    if code:
        sys.exit(f"{command}: {errors.getvalue()}")


def pictures(root: Path) -> Path:
    """train/ and test/ of two classes of small pictures, and one of every further format in train/cat."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, label, i in itertools.product(("train", "test"), ("cat", "dog"), range(4)):
        path = root / split / label / f"{i}.{'png' if i % 2 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20 + i, 24, 3), np.uint8)).save(path)
    for suffix in FORMATS:
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(root / "train" / "cat" / f"a.{suffix}")
    return root


def shards(root: Path, source: Path) -> Path:
    """The pictures of a folder, also as a tar shard, parquet, and as datasets saves them: <root>/wds, pq, saved."""
    import pyarrow
    import pyarrow.parquet

    files = [path for path in sorted(source.rglob("*.*")) if path.suffix in (".png", ".jpg")]
    for folder in ("wds", "pq", "saved/train"):
        (root / folder).mkdir(parents=True)
    rows = [
        {"image": {"bytes": f.read_bytes(), "path": f.name}, "label": i % 2, "x": str(i)} for i, f in enumerate(files)
    ]
    with tarfile.open(root / "wds" / "train-000.tar", "w") as archive:
        for i, (file, row) in enumerate(zip(files, rows, strict=True)):
            members = {file.suffix: row["image"]["bytes"], ".cls": b"%d" % row["label"], ".json": b'{"a": "x"}'}
            for suffix, data in members.items():
                member = tarfile.TarInfo(f"{i}{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pyarrow.Table.from_pylist(rows).replace_schema_metadata(metadata)
    pyarrow.parquet.write_table(table, root / "pq" / "train.parquet", row_group_size=3)
    with pyarrow.ipc.new_stream(root / "saved" / "train" / "data-0.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    (root / "saved" / "train" / "state.json").write_text('{"_data_files": [{"filename": "data-0.arrow"}]}')
    (root / "saved" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    return root


def make_template(here: Path) -> list[Reader]:
    """A small data set, a run on it that is evaluated, and what else commands read; the readers of these files."""
    import torch

    from ssl_dist import backbones
    from ssl_dist.train import roofline

    source, data, run = pictures(here / "source"), here / "data", here / "run"
    quietly(f"convert folder --root {source} --out {data} --name pets --workers 1")
    quietly(
        f"train {ROOT}/configs/digits/supervised-conv4.yaml data.name=pets data.root={data} data.reader=arrays "
        f"data.workers=1 optim.batch_size=4 optim.epochs=null optim.steps=3 log.every_steps=1 run_dir={run}"
    )
    quietly(f"evaluate {run} knn probe knn.k=[1] probe.epochs=1 probe.batch_size=4")
    quietly(f"export {run} {here}/weights.pth --format seed")
    quietly(f"export {run} {here}/hub --format huggingface")
    shutil.copy(run / "config.yaml", here / "config.yaml")
    (here / "ids.txt").write_text("# ids\n0\n1\n\n2\n3\n5\n")
    (here / "labels.csv").write_text("image_id,label\n" + "".join(f"{i},{i % 2}\n" for i in range(8 + len(FORMATS))))
    shutil.copy(ROOT / "slurm" / "site.yaml", here)
    (here / "rates.json").write_text(roofline.named("a100").model_dump_json())
    voc(here / "voc")
    shards(here, source)
    torch.save(backbones.build("resnet18").state_dict(), here / "resnet18.pth")

    [checkpoint] = (path.relative_to(here) for path in run.glob("checkpoints/step-*.pt"))
    [head] = (path.relative_to(here) for path in run.glob("evaluations/probe-*/checkpoints/step-*.pt"))
    explain = "explain {0}/config.yaml data.root={0}/data run_dir={0}/new"
    resume = "train {0}/run/config.yaml data.root={0}/data run_dir={0}/run"
    extract = "extract {0}/run data.root={0}/data --out {0}/new"
    knn = "evaluate {0}/run data.root={0}/data knn knn.k=[1]"
    report = "report {0}/run --out {0}/report.html"
    convert = "convert folder --root {0}/source --out {0}/new --name pets --workers 1"
    webdataset = "convert webdataset --root {0}/wds --out {0}/new --name pets --workers 1"
    parquet = "convert parquet --root {0}/pq --out {0}/new --name pets --workers 1"
    saved = "convert huggingface --root {0}/saved --out {0}/new --name pets --workers 1"
    detect = (
        "voc detection {0}/resnet18.pth --root {0}/voc --out {0}/new backbone.name=resnet18 train_split=train "
        "test_split=val steps=1 batch_size=1 min_sizes=[48] test_size=48 boxes_per_image=8 statistics_steps=0"
    )
    return [
        Reader("config", "config.yaml", explain, [changed_yaml]),
        Reader("rates", "rates.json", f"{explain} --rates {{0}}/rates.json", [changed_json]),
        Reader("dataset", "data/dataset.json", explain, [changed_json]),
        Reader("beton", "data/train.beton", extract),
        Reader("ids", "ids.txt", f"{explain} data.subset={{0}}/ids.txt"),
        Reader("labels", "labels.csv", f"{explain} data.labels.file={{0}}/labels.csv"),
        Reader("config of a run", "run/config.yaml", report, [changed_yaml]),
        Reader("results", "run/results.json", report, [changed_json]),
        Reader("results to add to", "run/results.json", f"{knn} knn.precision=fp64", [changed_json]),
        Reader("metrics", "run/metrics.jsonl", report, [changed_json_line]),
        Reader("metrics of a resume", "run/metrics.jsonl", resume, [changed_json_line]),
        Reader("starts", "run/logs/starts.jsonl", report, [changed_json_line]),
        Reader("starts of a resume", "run/logs/starts.jsonl", resume, [changed_json_line]),
        Reader("checkpoint", str(checkpoint), extract, [changed_state], sign),
        Reader("checkpoint of a resume", str(checkpoint), resume, [changed_state], sign),
        Reader("checksum", f"{checkpoint}.sha256", extract),
        Reader("features", "run/features/pets-test.safetensors", knn, [changed_safetensors]),
        Reader("head", str(head), f"evaluate {{0}}/run data.root={{0}}/data classify classify.head={{0}}/"
               f"{head.parent.parent}", [changed_state], sign),
        Reader("weights", "weights.pth", f"{explain} backbone.weights={{0}}/weights.pth", [changed_state]),
        Reader("export", "hub/model.safetensors", "extract {0}/hub data.root={0}/data data.reader=arrays --out {0}/new",
               [changed_safetensors, changed_metadata]),
        Reader("results for a card", "run/results.json", "export {0}/run {0}/new --format huggingface", [changed_json]),
        Reader("picture", "source/train/cat/1.png", convert),
        Reader("photo", "source/train/dog/2.jpg", convert),
        *(Reader(suffix, f"source/train/cat/a.{suffix}", convert) for suffix in FORMATS),
        Reader("tar", "wds/train-000.tar", webdataset, [changed_tar]),
        Reader("tar with .json", "wds/train-000.tar", f"{webdataset} --label-key a --skip-damaged", [changed_tar]),
        Reader("parquet", "pq/train.parquet", f"{parquet} --skip-damaged"),
        Reader("arrow", "saved/train/data-0.arrow", f"{saved} --skip-damaged"),
        Reader("state of datasets", "saved/train/state.json", saved, [changed_json]),
        Reader("splits of datasets", "saved/dataset_dict.json", saved, [changed_json]),
        Reader("annotation", "voc/Annotations/a.xml", detect),
        Reader("site of Slurm", "site.yaml", f"{SUBMIT} train {{0}}/config.yaml data.root={{0}}/data run_dir={{0}}/new "
               "optim.batch_size=8 --site {0}/site.yaml --cpus-per-task 2 --dry-run", [changed_yaml]),
        Reader("list of images", "voc/ImageSets/Main/train.txt", detect),
    ]  # fmt: skip


def voc(root: Path) -> Path:
    """A folder in VOC's format with one image a split."""
    import numpy as np
    from PIL import Image

    for split, name in (("train", "a"), ("val", "b")):
        for path in (root / "JPEGImages", root / "Annotations", root / "ImageSets" / "Main"):
            path.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 50, 3), 90, np.uint8)).save(root / "JPEGImages" / f"{name}.jpg")
        (root / "Annotations" / f"{name}.xml").write_text(
            f"<annotation><filename>{name}.jpg</filename><size><width>50</width><height>40</height><depth>3</depth></size>"
            "<object><name>cat</name><difficult>0</difficult><bndbox><xmin>5</xmin><ymin>6</ymin><xmax>30</xmax>"
            "<ymax>35</ymax></bndbox></object></annotation>\n"
        )
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text(f"{name}\n")
    return root


# ------------------------------------------------------------------------------------------ running


def outcome_of(words: list[str], folder: Path) -> tuple[int | None, str]:
    """Run the command in a forked process; its exit code (None: stopped after MAX_SECONDS) and standard error."""
    log, start = folder / "stderr", time.monotonic()
    pid = os.fork()
    if pid == 0:
        code = 120
        try:
            os.setsid()
            null, error = os.open(os.devnull, os.O_RDWR), os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
            os.dup2(null, 0), os.dup2(null, 1), os.dup2(error, 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            faulthandler.enable(2)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MAX_BYTES, used + MAX_BYTES))
            resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_SECONDS, MAX_CPU_SECONDS + 5))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            try:
                code = perform(words)
            except SystemExit as ended:  # argparse
                code = ended.code if isinstance(ended.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(ValueError, OSError):
                sys.stderr.flush()
            os._exit(code)
    while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        if time.monotonic() - start > MAX_SECONDS:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None, ""
        time.sleep(0.002)
    text = log.read_text(errors="replace") if log.exists() else ""
    log.unlink(missing_ok=True)
    return os.waitstatus_to_exitcode(ended[1]), text


def broken_rule(code: int | None, text: str) -> str:
    """The rule that an exit code and a text on standard error break; empty for none."""
    if code is None:
        return f"no end within {MAX_SECONDS} s"
    if "Traceback (most recent call last)" in text:
        return f"traceback: {text.strip().splitlines()[-1][:300]}"
    if code < 0:
        return f"signal {signal.Signals(-code).name}"  # SIGXCPU: over MAX_CPU_SECONDS
    if code not in CODES:
        return f"exit code {code}"
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    if code in (1, 2) and len(lines) != 1:
        return f"exit code {code} with {len(lines)} lines that begin with error: {text[-300:]!r}"
    if longest := max((len(line) for line in lines), default=0) if code else 0:
        return f"a line of {longest} characters" if longest > MAX_LINE else ""
    return ""


def run_input(reader: Reader, data: bytes, template: Path, folder: Path) -> tuple[int | None, str]:
    """The outcome of this input of a reader, in a copy of the template."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder)
    path = folder / reader.file
    path.write_bytes(data)
    reader.after(path)
    try:
        return outcome_of([word.format(folder) for word in reader.command.split()], folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def fuzz(
    seed: int, seconds: float, names: list[str] | None = None, keep: Path | None = None, most: int | None = None
) -> dict[str, tuple[int, dict[str, int]]]:
    """Reader -> inputs tried, and broken rules with how often. The readers take turns until the time is over, or each
    has had `most` inputs."""
    results: dict[str, tuple[int, dict[str, int]]] = {}
    with tempfile.TemporaryDirectory(prefix="ssl_dist-fuzz-") as name:
        template, folder = Path(name) / "template", Path(name) / "copy"
        all_readers = make_template(template)
        chosen = [reader for reader in all_readers if names is None or reader.name in names]
        for command in {reader.command: None for reader in chosen}:  # with valid files; imports what forks then have
            shutil.copytree(template, folder)
            quietly(command.format(folder))
            shutil.rmtree(folder)
        streams = {reader.name: reader.inputs(template, seed) for reader in chosen}
        end = time.monotonic() + seconds
        for number in itertools.count() if most is None else range(most):
            for reader in chosen:
                if time.monotonic() > end:
                    return results
                data = next(streams[reader.name])
                fault = broken_rule(*run_input(reader, data, template, folder))
                count, faults = results.get(reader.name, (0, {}))
                if fault:
                    faults[fault] = faults.get(fault, 0) + 1
                    print(f"{reader.name} {number}: {fault}", flush=True)
                    if keep is not None:
                        keep.mkdir(parents=True, exist_ok=True)
                        (keep / f"{reader.name.replace(' ', '-')}-{number}").write_bytes(data)
                results[reader.name] = count + 1, faults
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", nargs="+", help="names of readers (default: all)")
    parser.add_argument("--inputs", type=int, help="of each reader at the most")
    parser.add_argument("--keep", type=Path, help="folder for the inputs that break a rule")
    arguments = parser.parse_args()
    results = fuzz(arguments.seed, 60 * arguments.minutes, arguments.reader, arguments.keep, arguments.inputs)
    print(f"\nseed {arguments.seed}\n{'reader':<20} {'inputs':>7} {'failures':>8}  different")
    for name, (count, faults) in results.items():
        print(f"{name:<20} {count:>7} {sum(faults.values()):>8}  {len(faults)}")
    total, failures = (
        sum(figures) for figures in zip(*((c, sum(f.values())) for c, f in results.values()), strict=True)
    )
    print(f"{'all':<20} {total:>7} {failures:>8}")
    return 1 if failures else 0


if __name__ == "__main__":
    from ssl_dist import outcome

    sys.exit(outcome.of_program(main))
