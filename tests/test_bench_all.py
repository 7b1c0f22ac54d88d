"""tools/bench_all.py and the page that it writes; rows.py, by which benchmarks say what they found."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from ssl_dist import outcome
from tests.tool_module import TOOLS, tool_module

ROOT = TOOLS.parent
PAGE = ROOT / "docs" / "benchmarks.md"
RATIO = re.compile(r"(?<![\w.])(\d[\d.,]*) ?[x×](?!\w| ?\d)")  # 4.8x or 19 x, not 500 x 400

bench_all = tool_module("bench_all")
rows = tool_module("rows")
Bench, Row = bench_all.Bench, bench_all.Row

FAKES = {
    "bench_good": "import sys\nprint('human')\nprint('| case of', len(sys.argv), 'words | 2 ms |')",
    "bench_failing": "import sys\nprint('| case | 3 ms |')\nsys.exit('a rank has died')",
    "bench_silent": "print('case: 3 ms')",
    "bench_empty": "print('| first | 3 ms |')\nprint('| second | nanx of 3 ms |')",
    "bench_rival": "import sys\nprint('| beside', sys.argv[1][-3:], '| 6 ms |')",
    "bench_data": "import sys\nprint('| of', sys.argv[1][-6:], '| 4 ms |')",
}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A checkout with benchmarks of a line each."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "docs").mkdir()
    for name, text in FAKES.items():
        (tmp_path / "tools" / f"{name}.py").write_text(f"{text}\n")
    git = ["git", "-c", "user.name=x", "-c", "user.email=x", "-C", tmp_path]
    for words in (["init", "-q"], ["add", "tools"], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *words], check=True)
    benches = {"bench_good": Bench(["", "--more words"], "--few"), "bench_failing": Bench([""], "")}
    benches |= {"bench_silent": Bench([""], ""), "bench_empty": Bench([""], ""), "bench_data": Bench(["CIFAR10"], "")}
    benches |= {"bench_rival": Bench(["FFCV_SSL"], "")}
    monkeypatch.setattr(bench_all, "ROOT", tmp_path)
    monkeypatch.setattr(bench_all, "BENCHES", benches)
    return tmp_path


def run(*words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bench_all.py", *map(str, words)])
        return outcome.of_program(bench_all.main)


def old_row(bench, what="old"):
    return Row(what, "1 ms", f"python tools/{bench}.py", "2020-01-01", "abc1234 + changes", "an abacus, 1 core")


def write(path, *old):
    path.write_text(bench_all.page(old))


def test_rows_of_others_are_kept_and_failures_have_none(root, digits, capfd):
    page = root / "docs" / "benchmarks.md"
    write(page, *map(old_row, bench_all.BENCHES))
    assert run("--only", "bench_good", "bench_failing", "bench_silent", "bench_empty") == 1
    good, more, *kept = bench_all.read(page)
    assert kept == [old_row("bench_data"), old_row("bench_rival")]
    assert good[:3] == ("case of 1 words", "2 ms", "python tools/bench_good.py")
    assert more[:3] == ("case of 3 words", "2 ms", "python tools/bench_good.py --more words")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", good.date) and re.fullmatch(r"[0-9a-f]{7,}", good.commit)
    assert re.search(r", \d+ cores, .*; Linux.*; Python 3.*, torch .*, torchvision .*, numba .*, numpy ", good.machine)
    said = capfd.readouterr().err
    for line in (r"bench_failing.py: \d+ s, no row: exit code 1\n    a rank has died", r"silent.py: \d+ s, no row: it"):
        assert re.search(line, said)
    assert "no row: without a figure: | second | nanx of 3 ms |" in said

    (root / "tools" / "bench_good.py").write_text("print('| case | 5 ms |')\n")
    (root / "ssl").mkdir()
    folders = ["--cifar10", digits, "--ffcv-ssl", root / "ssl"]
    assert run("--only", "bench_good", "bench_data", "bench_rival", *folders) == 0
    good, _, data, rival = bench_all.read(page)
    assert good.result == "5 ms" and good.commit == f"{more.commit} + changes"
    assert data[:3] == ("of digits", "4 ms", "python tools/bench_data.py data/cifar10")
    assert rival[:3] == ("beside ssl", "6 ms", "python tools/bench_rival.py ffcv-ssl")


def test_quick_figures_stay_out_of_docs(root, capfd):
    page = root / "docs" / "benchmarks.md"
    write(page, old_row("bench_good"))
    before = page.read_text()
    assert run("--quick", "--only", "bench_good") == 0
    assert "| case of 2 words | 2 ms | `python tools/bench_good.py --few` | " in capfd.readouterr().out
    assert run("--quick", "--out", page) == 2
    assert run("--quick", "--out", root / "quick.md", "--only", "bench_good") == 0
    assert page.read_text() == before and len(bench_all.read(root / "quick.md")) == 1


def test_a_mistake_is_one_line_before_anything_is_measured(root, digits, capfd):
    write(root / "broken.md", old_row("bench_good"))
    (root / "broken.md").write_text((root / "broken.md").read_text().replace("machine 1 |", "machine 2 |"))
    for words, line in (
        (["--only", "bench_god"], "--only bench_god: did you mean 'bench_good'?"),
        ([], "--cifar10: bench_data needs it"),
        (["--cifar10", "nowhere"], "data.root = 'nowhere'"),
        (["--cifar10", digits], "--ffcv-ssl: bench_rival needs it; give the folder in which pip"),
        (["--cifar10", digits, "--photos", "nowhere"], "--photos nowhere: there is no such folder"),
        (["--only", "bench_good", "--out", root / "broken.md"], f"{root}/broken.md line "),
    ):
        assert run(*words) == 2
        said = capfd.readouterr().err
        assert said.startswith(f"error: {line}") and said.count("\n") == 1


def test_the_page_is_as_the_tool_writes_it():
    found = bench_all.read(PAGE)
    assert found and bench_all.page(found) == PAGE.read_text()


def test_every_benchmark_is_run():
    names = {path.stem for path in TOOLS.glob("bench_*.py")}
    assert names == bench_all.BENCHES.keys() | bench_all.WITHOUT_ROW.keys()


def test_the_readme_quotes_the_page():
    assert RATIO.findall("4.8x, 19 x and 500 x 400 px, 2xlarge") == ["4.8", "19"]
    measured = RATIO.findall("\n".join(row.result for row in bench_all.read(PAGE)))
    assert measured
    quoted = RATIO.findall(Path(ROOT, "README.md").read_text(encoding="utf-8"))
    assert {*quoted} <= {*measured}, "README.md quotes a speed that docs/benchmarks.md does not have"


def test_what_stands_beside_one_another(capsys):
    text = rows.beside([100, 200, 150], {"of a port": [800, 900, 600], "of another": [15, 14, 13.25]}, " ms")
    assert text == "150 ms beside 800 ms of a port: 4.5x (4.0-8.0), 14 ms of another: 0.09x (0.07-0.15)"
    assert rows.beside([170_000], {"of PIL": [2450]}, is_rate=True) == "170,000 beside 2,450 of PIL: 69x"
    rows.show([("case", text)])
    assert bench_all.FOUND.fullmatch(capsys.readouterr().out.strip()).groups() == ("case", text)
