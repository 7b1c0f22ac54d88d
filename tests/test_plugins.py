"""Methods, backbones and evaluators of plugins, those of CONTRIBUTING.md: found, recorded, refused, certified."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from ssl_dist import backbones, cli, config, evaluators, methods, plugins, results
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.errors import UserError
from ssl_dist.run import plugged
from ssl_dist.run.blueprint import derive
from ssl_dist.run.encoder import load_encoder
from ssl_dist.storage.features import Features
from ssl_dist.train import preflight
from ssl_dist.verify import command as verify

EXAMPLES = dict(re.findall(r"`(\w+\.py)`:\n\n```python\n(.*?)```", Path("CONTRIBUTING.md").read_text(), re.DOTALL))
OWN = ["method.name=barlow", "method.options={}", "views.num=null", "backbone.name=tiny"]


@pytest.fixture(autouse=True)
def registry():
    """Afterwards nothing is loaded, as when a process begins."""
    forget()
    yield
    forget()


def forget():
    for known in (plugins._files, plugins._chosen, plugins._absent, plugins._packages):
        known.clear()
    plugins._entry_points.cache_clear()


@pytest.fixture
def files(tmp_path):
    """The examples as files: name -> path."""
    assert {*EXAMPLES} == {"barlow.py", "tiny.py", "nearest_mean.py"}
    folder = tmp_path / "own"
    folder.mkdir()
    return {Path(name).stem: written(folder / name, text) for name, text in EXAMPLES.items()}


def written(path, text):
    path.write_text(text)
    return path


@pytest.fixture
def command(digits, tmp_path, capsys):
    """Runs a command of ssl-dist as a process of its own would; returns its exit code and what it prints."""

    def run(verb, *words, **chosen):
        forget()
        words = [str(word) for word in words]
        if verb in ("train", "explain"):
            fixed = [f"data.root={digits}", "data.reader=arrays", "data.limit=64", "optim.batch_size=32",
                     "optim.steps=1", f"run_dir={tmp_path / 'run'}"]  # fmt: skip
            words = ["configs/digits/simclr-conv4.yaml", *fixed, *OWN, *words]
        code = cli.main([verb, *words, *(word for file in chosen.get("own", []) for word in ("--plugins", str(file)))])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


@pytest.fixture
def run(command, files, tmp_path):
    assert command("train", own=[files["barlow"], files["tiny"]])[0] == 0
    return tmp_path / "run"


# -------------------------------------------------------------------------------------------------- found


def test_a_run_finds_its_plugins_again(run, command, files):
    recorded = yaml.safe_load((run / "config.yaml").read_text())["plugins"]
    assert {name: each["file"] for name, each in recorded.items()} == {n: str(files[n]) for n in ("barlow", "tiny")}
    code, printed = command("evaluate", run, "nearest_mean", own=[files["nearest_mean"]])
    assert code == 0 and f"plugins: {files['nearest_mean']}, {files['barlow']}, {files['tiny']}" in printed
    [record] = results.read(run / "results.json")
    assert (record["method"], record["backbone"]) == ("barlow", "tiny")
    assert re.search(r"; by nearest_mean\.py \(SHA-256 [0-9a-f]{12}\)$", record["protocol"])
    assert command("extract", run, "--split", "test")[0] == 0
    code, printed = command("train", "optim.steps=2", own=[files["barlow"], files["tiny"]])
    assert code == 0 and "resumes after step 1" in printed


def test_an_evaluator_that_was_edited_measures_again(run, command, files):
    for number in (1, 2):
        assert command("evaluate", run, "nearest_mean", own=[files["nearest_mean"]])[0] == 0
        assert command("evaluate", run, "nearest_mean", own=[files["nearest_mean"]])[0] == 0
        assert len(results.read(run / "results.json")) == number
        written(files["nearest_mean"], EXAMPLES["nearest_mean.py"] + "\n# edited")


def test_keys_has_the_options_of_plugins(command, files):
    assert "| `redundancy` | number > 0 | 0.005 |" in command("keys", "--markdown", own=[files["barlow"]])[1]
    code, printed = command("keys", "nearest_mean", own=[files["nearest_mean"]])
    assert code == 0 and "(Mensink et al. 2012)" in printed


def test_backbones_of_a_file_have_their_widths(files):
    plugins.choose([files["tiny"]])
    wide = backbones.build("tiny_wide")
    assert wide(torch.zeros(2, 3, 32, 32)).shape == (2, 128) and "tiny" in backbones.names()
    with pytest.raises(UserError, match="backbone tiny has no such option"):
        backbones.check("tiny", zero_init_residual=True)


def test_a_package_names_its_own_by_entry_points(files, tmp_path, monkeypatch):
    package = tmp_path / "site" / "my_package"
    package.mkdir(parents=True)
    for name, text in EXAMPLES.items():
        written(package / name, text)
    metadata = tmp_path / "site" / "my_package-1.5.dist-info"
    metadata.mkdir()
    written(metadata / "METADATA", "Name: my_package\nVersion: 1.5\n")
    toml = Path("CONTRIBUTING.md").read_text().partition("```toml\n")[2].partition("```")[0]
    lines = [line.strip().replace('[project.entry-points."', "[").replace('"]', "]") for line in toml.splitlines()]
    written(metadata / "entry_points.txt", "\n".join(lines).replace('"', ""))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    forget()
    assert methods.find("barlow").__module__ == "my_package.barlow" and "barlow" in methods.names()
    assert type(backbones.build("tiny")).__name__ == "Tiny"
    assert evaluators.find("nearest_mean") is sys.modules["my_package.nearest_mean"]
    assert plugins.source_of(plugins.EVALUATORS, "nearest_mean") == "package my_package 1.5"
    assert plugins.packages() == {"my_package": "1.5"}
    plugins.choose([files["barlow"]])
    with pytest.raises(UserError, match=r"package my_package 1\.5: has method 'barlow', and so has .*own/barlow\.py;"):
        methods.find("barlow")


# -------------------------------------------------------------------------------------------------- recorded


@pytest.mark.parametrize("fate", ["gone", "has changed since"])
def test_a_recorded_file_that_is_not_what_it_was(run, command, files, fate):
    """Its advice is obeyed."""
    tiny = files["tiny"].rename(files["tiny"].with_name("kept.py"))
    moved = tiny.parent / "moved" / "tiny.py"
    moved.parent.mkdir()
    written(moved, EXAMPLES["tiny.py"])
    if fate != "gone":
        written(files["tiny"], EXAMPLES["tiny.py"] + "\nprint('executed')")
    for words in (["evaluate", run, "knn"], ["extract", run], ["export", run, "--format", "timm", "--out", run / "x"]):
        code, printed = command(*words)
        assert code == 2 and f"{files['tiny']}" in printed and fate in printed and "executed" not in printed
        assert re.match(r"error: backbone\.name = 'tiny': no such backbone; ", printed) and "--plugins FILE" in printed
    assert command("extract", run, own=[moved if fate == "gone" else files["tiny"]])[0] == 0
    assert command("evaluate", run, "knn", own=[moved])[0] == 0


def test_a_training_does_not_go_on_with_another_file(run, command, files, tmp_path):
    written(files["tiny"], EXAMPLES["tiny.py"] + "\n# edited")
    own = [files["barlow"], files["tiny"]]
    code, printed = command("train", "optim.steps=2", own=own)
    assert code == 2 and "holds a run with another config: plugins.tiny.sha256 (there '" in printed
    assert command("train", f"run_dir={tmp_path / 'another'}", own=own)[0] == 0
    forget()
    code = cli.main(["train", str(run / "config.yaml")])
    assert code == 2
    written(files["tiny"], EXAMPLES["tiny.py"])  # and of an evaluator it does not matter
    own.append(files["nearest_mean"])
    assert command("train", "optim.steps=2", own=own)[0] == 0


def test_a_run_is_not_read_by_another_version_that_is_loaded(run, files):
    """As where one process trains with both, and nobody has chosen the newer one."""
    forget()
    plugins.load("tiny", written(files["tiny"], EXAMPLES["tiny.py"] + "\n# edited"))
    with pytest.raises(UserError, match=r"tiny\.py has changed since .*step-00000001\.pt was written; restore it, or"):
        load_encoder(run)
    plugins.choose([files["tiny"]])
    assert load_encoder(run).config.backbone.name == "tiny"


@pytest.mark.parametrize("place", ["in the run", "relative"])
def test_no_code_is_taken_from_the_folder_of_a_run(run, command, files, monkeypatch, place):
    tiny = files["tiny"].rename(run / "tiny.py")
    text = (run / "config.yaml").read_text()
    recorded = "tiny.py" if place == "relative" else str(tiny)
    (run / "config.yaml").write_text(text.replace(str(files["tiny"]), recorded))
    monkeypatch.chdir(run)
    forget()
    plugged.recall_run(run)
    assert "tiny" not in plugins.hashes() and "lies within the run's folder" in plugins.absent()


def test_ranks_must_have_the_same_files(digits, files):
    def facts():
        given = [f"data.root={digits}", "data.reader=arrays", *OWN, f"plugins=[{files['barlow']},{files['tiny']}]"]
        return preflight._facts(derive(config.load("configs/digits/simclr-conv4.yaml", given), RankInfo()))

    first, hashes = facts(), plugins.hashes()
    assert first["plugins.tiny"] == hashes["tiny"]
    moved = files["tiny"].parent / "moved"
    moved.mkdir()
    files["tiny"] = files["tiny"].rename(moved / "tiny.py")
    assert facts() == first, "wherever it lies"
    written(files["tiny"], EXAMPLES["tiny.py"] + "\n# edited")
    assert facts() != first
    ranks = [("rank 0", hashes), ("rank 1", plugins.hashes())]
    world = SimpleNamespace(all_gather_object=lambda own: ranks, rank_info="rank 0")
    with pytest.raises(UserError, match=r"plugins\.tiny: rank 0 has one of SHA-256 \w{12}, rank 1 has one of SHA-256"):
        plugged.require_same(world)
    ranks[1] = ("rank 1", {"barlow": hashes["barlow"]})
    with pytest.raises(UserError, match=r"plugins\.tiny: .*, rank 1 has none; give all ranks the same file"):
        plugged.require_same(world)
    ranks[1] = ("rank 1", hashes)
    plugged.require_same(world)


# -------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("missing.py", None, "missing.py: cannot be read: No such file or directory; give a Python file"),
        ("my-own.py", "", "'my-own' is no name of Python's; rename it"),
        ("own.py", "x = 1", "own.py: has no class Method, no BACKBONES and no function run or measure"),
        ("own.py", "\ndef f(:", "own.py: line 2: invalid syntax"),
        ("own.py", "import nowhere_at_all", "own.py: No module named 'nowhere_at_all'; mend the import, or install"),
        ("own.py", "BACKBONES = {'timm/x': 1}", "BACKBONES must be a dict of names"),
        ("own.py", "BACKBONES = {'own': 1}", "BACKBONES['own'] is no function"),
        ("own.py", "def f():\n    1 / 0\nf()", "own.py: line 2: ZeroDivisionError: division by zero; mend it"),
        ("own.py", "import sys\nsys.exit(0)", "own.py: line 2: SystemExit: 0; mend it"),
        ("own.py", "\0", "own.py: source code string cannot contain null bytes; mend it"),
    ],
)
def test_a_file_that_is_none(command, tmp_path, name, text, message):
    if text is not None:
        written(tmp_path / name, text)
    code, printed = command("explain", own=[tmp_path / name])
    assert code == 2 and message in printed and printed.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "text", "find", "message"),
    [
        ("simclr", EXAMPLES["barlow.py"], methods.find, "simclr.py: has method 'simclr', and so has ssl_dist itself;"),
        ("knn", EXAMPLES["nearest_mean.py"], evaluators.find, "has evaluator 'knn', and so has ssl_dist itself;"),
        ("own", "BACKBONES = {'conv4': dict}", backbones.check, "has backbone 'conv4', and so has ssl_dist itself;"),
        ("own", "class Method: pass", methods.find, "own.py: method own must be a subclass of"),
        ("own", "BACKBONES = {'own': dict}", backbones.build, "own.py: backbone own must be a ssl_dist.nn.backbone."),
    ],
)
def test_what_cannot_have_its_name(tmp_path, name, text, find, message):
    plugins.choose([written(tmp_path / f"{name}.py", text)])
    with pytest.raises(UserError) as caught:
        find("conv4" if "conv4" in text else name)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("    writer: FigureWriter | None = None,\n", "", "define run(train, test, options, writer=None, device=None)"),
        ("VERSION = 1", "", "must define VERSION"),
        ("PROTOCOL", "PROTO", "must say how it measures: protocol(options) or PROTOCOL"),
        ("Options(Section)", "Options", "must define class Options(Section)"),
        (', description="rows are L2-normalised first"', "", "must describe its option normalize"),
    ],
)
def test_an_evaluator_that_lacks_something(files, old, new, message):
    assert old in EXAMPLES["nearest_mean.py"]
    plugins.choose([written(files["nearest_mean"], EXAMPLES["nearest_mean.py"].replace(old, new))])
    with pytest.raises(UserError, match=re.escape(message)):
        evaluators.find("nearest_mean")


def test_two_files_of_one_name(files, tmp_path):
    other = written(tmp_path / "tiny.py", EXAMPLES["tiny.py"])
    with pytest.raises(UserError, match="two files have one name; rename one"):
        plugins.choose([files["tiny"], other])
    tree = {"run_dir": "x", "data": {"root": "x"}, "plugins": [str(files["tiny"]), str(other)]}
    with pytest.raises(UserError, match=r"two files have one name; write \{NAME: \{file: FILE\}, \.\.\.\}"):
        config.overridden(tree, [])
    tree["plugins"] = {"tiny": {"file": str(files["tiny"])}, "second": {"file": str(other)}}
    plugged.pinned(config.overridden(tree, []))
    with pytest.raises(UserError, match="'tiny', and so has"):  # now they have two names, and one for their backbones
        backbones.names()


def test_what_is_not_found_is_told_how_to_add_it():
    with pytest.raises(UserError, match=r"methods: .*--plugins FILE adds your own"):
        methods.find("barlow")
    with pytest.raises(UserError, match="--plugins FILE adds your own"):
        backbones.check("tiny_own_one")
    with pytest.raises(UserError, match="--plugins FILE adds your own"):
        evaluators.find("nearest_mean")


# -------------------------------------------------------------------------------------------------- right


def test_the_example_of_an_evaluator_is_right(files):
    generator = np.random.default_rng(0)
    labels = np.array([0, 1, 2] * 10)
    means = generator.normal(size=(3, 8))
    parts = []
    for split in ("train", "test"):
        rows = (means[labels] + generator.normal(size=(30, 8))).astype(np.float32)
        parts.append(Features(rows, labels, np.arange(30), {"split": split, "classes": json.dumps(["a", "b", "c"])}))
    plugins.choose([files["nearest_mean"]])
    evaluator = evaluators.find("nearest_mean")
    x, y = (part.features.astype(float) / np.linalg.norm(part.features, axis=1)[:, None] for part in parts)
    correct = 0
    for row, label in zip(y, labels, strict=True):
        distances = [np.linalg.norm(row - x[labels == other].mean(0)) for other in range(3)]
        correct += int(np.argmin(distances) == label)
    values = evaluator.run(*parts, evaluator.Options())
    assert values == {"nearest_mean_top1": pytest.approx(100 * correct / 30)} and 30 < 100 * correct / 30 < 100


@pytest.mark.slow
def test_the_examples_are_certified(files, tmp_path):
    """As those inside, on ranks that are processes of their own."""
    own = plugins.choose([files["barlow"], files["tiny"]])
    cases = [*verify.cases(tmp_path, None, ["barlow"], [*own, "backbone.name=tiny"], steps=2)]
    rows = verify.certify(cases, tmp_path, sizes=(2,))
    assert [row.case.config.precision for row in rows] == ["fp64", "fp32"] and all(row.holds for row in rows)
