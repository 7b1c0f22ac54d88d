"""Files beside the code that must keep up with it."""

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import yaml
from packaging.specifiers import SpecifierSet

import ssl_dist
from ssl_dist import cli, config, methods
from ssl_dist.train import roofline

ROOT = Path(__file__).parents[1]


def test_every_methods_paper_is_cited():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == ssl_dist.__version__
    cited = {one["notes"]: one["identifiers"][0]["value"] for one in citation["references"]}
    papers = {}
    for name in methods.names():
        docstring = importlib.import_module(f"ssl_dist.methods.{name}").__doc__
        identifiers = re.findall(r"arXiv:\d+\.\d+", docstring.split("\n\n")[0])
        if identifiers:
            papers[name] = identifiers[0]
    assert cited == papers and len(papers) >= 10


def test_the_page_of_methods_has_every_method():
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?:\[(\w+)\]\((\S+)\)|(\w+)) \|", page, re.MULTILINE)
    assert sorted({linked or plain for linked, _, plain in rows} - {"method"}) == methods.names()
    for name, link, _ in rows:
        if name:
            paper = link.removeprefix("https://arxiv.org/abs/")
            assert f"arXiv:{paper}" in importlib.import_module(f"ssl_dist.methods.{name}").__doc__, name


def test_the_picture_of_the_packages_is_current():
    done = subprocess.run([sys.executable, ROOT / "tools" / "draw_packages.py", "--check"], check=False)
    assert done.returncode == 0, "run: python tools/draw_packages.py"


def test_the_page_of_config_keys_is_current(capsys):
    assert cli.main(["keys", "--markdown"]) == 0
    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert page == capsys.readouterr().out, "run: ssl-dist keys --markdown > docs/config.md"


def test_the_page_on_scaling_is_current(capsys):
    """Its first section; the others come from the same command."""
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "tools" / "scaling.py")
    scaling = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scaling)
    title, file, overrides = scaling.ROWS[0]
    settings = config.load(ROOT / "configs" / file, overrides)
    lines = scaling.table(title, settings, roofline.named("h100"), scaling.GPUS)
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert "\n".join(lines) in page, "run: python tools/scaling.py, and put its tables into docs/scaling.md"


def test_the_changelog_has_this_version():
    assert f"## {ssl_dist.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_pinned_versions_take_every_python_that_the_package_takes():
    """Debian 12 has 3.11.2; a version that wants a later 3.11 cannot be installed there."""
    oldest = re.search(r'python_requires=">=([\d.]+)"', (ROOT / "setup.py").read_text())[1]
    wanted = {d.metadata["Name"]: d.metadata["Requires-Python"] or "" for d in importlib.metadata.distributions()}
    assert len(wanted) > 100
    assert {name: text for name, text in wanted.items() if f"{oldest}.0" not in SpecifierSet(text)} == {}


def test_both_containers_hold_what_a_checkout_does():
    """But for what a container has no use for."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    top = {name.split("/")[0] for name in tracked.split()}
    unused = {
        ".ci",
        ".github",
        ".gitignore",
        ".pre-commit-config.yaml",
        "CHANGELOG.md",
        "CITATION.cff",
        "CONTRIBUTING.md",
    }
    copied = re.findall(r"^COPY (.*) \S+$", (ROOT / "launch" / "Dockerfile").read_text(), re.MULTILINE)
    assert {name for line in copied for name in line.split()} == top - unused
    recipe = (ROOT / "launch" / "apptainer.def").read_text()
    assert set(re.findall(r"^    (\S+) /opt/ssl_dist/\1$", recipe, re.MULTILINE)) == top - unused
    assert "bash launch/install.sh" in (ROOT / "launch" / "Dockerfile").read_text()
    assert "bash /opt/ssl_dist/launch/install.sh" in recipe


def test_issue_templates_are_yaml():
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        assert yaml.safe_load(path.read_text(encoding="utf-8")), path


def test_every_guarantee_names_a_test_that_is_there():
    named = re.findall(r"`(t(?:ests|ools)/\w+\.py)(?:::(\w+))?`", (ROOT / "docs" / "guarantees.md").read_text())
    assert len(named) > 30
    for path, test in named:
        text = (ROOT / path).read_text()
        assert not test or re.search(rf"^ *def {test}\(", text, re.MULTILINE), f"{path}::{test}"
