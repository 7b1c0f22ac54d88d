"""The pages of the manual that are made while it is built (mkdocs.yml names this file): the commands, from --help;
CONTRIBUTING.md and CHANGELOG.md, from the top of the checkout."""

import contextlib
import io
import os
import runpy
import sys
from pathlib import Path
from unittest import mock

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from ssl_dist import cli, command_line

ROOT = Path(__file__).parents[1]
WIDTH = "80"  # characters of a line of help
VERBS = ("train", "evaluate", "study", "status")  # of slurm/submit.py
SCRIPTS = """\
# Commands

What each says with `--help`. Beside `ssl-dist` there are scripts of the checkout:

| script | what it does |
|---|---|
| `bash launch/quickstart.sh` | installs what is missing, trains on handwritten digits, ends with a table |
| `bash launch/install.sh` | installs alone, into `.venv` |
| `bash launch/test.sh [--quick]` | installs the same, for all tests Slurm and Chromium too; then style and tests |
| `launch/torchrun_single.sh RANKS CONFIG [key=value ...]` | a training on several ranks of this machine |
| `launch/torchrun_single.sh RANKS evaluate RUN probe` | an evaluation on them, and so `extract` |
| `launch/torchrun_multi.sh` | the same on several machines; its first lines say how |
| `python slurm/submit.py` | on a Slurm cluster, [below](#submitpy-train) |
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """mkdocs calls it when it has found the files of docs/."""
    pages = {
        "commands.md": commands(),
        "contributing.md": _top("CONTRIBUTING.md"),
        "changelog.md": _top("CHANGELOG.md"),
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """mkdocs calls it before a page becomes HTML. Where GitHub reads \\< as <, mkdocs would begin a tag."""
    return markdown.replace(r"\<", "&lt;")


def commands() -> str:
    """The page of the commands."""
    assert cli.main  # the commands are those that it defines
    submit = runpy.run_path(str(ROOT / "slurm" / "submit.py"))["main"]
    texts = {f"ssl-dist {name}": _help([name], cli.main) for name in command_line.names()}
    for verb in VERBS:
        with mock.patch.object(sys, "argv", ["submit.py", verb, "--help"]):
            texts[f"submit.py {verb}"] = _help(None, submit)
    sections = [f"## {title}\n\n```text\n{text.rstrip()}\n```\n" for title, text in texts.items()]
    return "\n".join([SCRIPTS, *sections])


def _help(words, main) -> str:
    printed = io.StringIO()
    with (
        mock.patch.dict(os.environ, {"COLUMNS": WIDTH}),
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
    ):
        main() if words is None else main([*words, "--help"])
    return printed.getvalue()


def _top(name: str) -> str:
    """A page of the top folder, whose links begin there."""
    return (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
