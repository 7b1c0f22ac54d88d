"""The manual: it builds without a warning (tools/docs_pages.py makes some of its pages), asks no other host for
anything, and its blocks do what they say."""

import glob
import html
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest

from ssl_dist import cli, command_line, config
from tests import make_shards
from tests.browser import Browser, unavailable_reason
from tests.make_images import jpeg, picture, save, tiff
from tests.test_public_names import PUBLIC

ROOT = Path(__file__).parents[1]
# All in one folder, in this order: what one page makes, the next may use.
RUN_PAGES = [
    "docs/index.md", "README.md", "docs/photos.md", "docs/vit.md", "docs/cluster.md", "docs/notebook.md",
    "docs/resume.md", "docs/another_data_set.md", "docs/ablation.md", "docs/world_size.md", "docs/train.md",
    "docs/evaluate.md", "docs/weights.md", "docs/voc.md", "docs/measured.md",
]  # fmt: skip
TESTED_ELSEWHERE = {"CONTRIBUTING.md": "test_plugins.py"}
WITHOUT_BLOCKS = ["docs/acceptance.md", "docs/methods.md", "docs/architecture.md", "docs/benchmarks.md",
                  "docs/catalog.md", "docs/config.md", "docs/guarantees.md", "docs/python.md"]  # fmt: skip
PARSED_PAGES = ["docs/gpu.md", "docs/sela.md", "docs/scaling.md"]
SMALLER = {  # of the configs that the blocks name and the files that the pages show: less of the same
    "runs/vit\ndata: {root: data/photos, image_size: 224": "runs/vit\ndata: {root: data/photos, image_size: 160",
    "vit_small_patch16_224": "test_vit",
    "warmup_epochs: 10": "warmup_epochs: 0.1",
    "epochs: 200": "epochs: 1",
    "epochs: 40": "epochs: 1",
    "epochs: 10}": "epochs: 1}",
    "batch_size: 64": "batch_size: 8",
    "name: resnet18": "name: conv4",
    "values: [0, 1]": "values: [0]",
    "data: {name: digits,": "data: {name: digits, limit: 64,",
    "data: {root: data/photos,": "data: {root: data/photos, limit: 8,",
}
BLOCK = re.compile(
    r"(?:`(?P<file>\w+\.yaml)`:\n\n)?(?:<!-- (?P<mark>[\w ]+): .*? -->\n)?"
    r"```(?P<kind>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with the smaller configs and two folders of photos, in which we are."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for path in [*tmp_path.glob("configs/digits/*"), *tmp_path.glob("configs/photos/*")]:
        path.write_text(smaller(path.read_text()))
    for i in range(40):
        save(tmp_path / "photos" / f"{i}.jpg", picture(60, 80, seed=i))
        save(tmp_path / "flowers" / ("train", "test")[i % 2] / "ab"[i // 20] / f"{i}.jpg", picture(40, 40, seed=i))
    for i in range(40):
        cell = np.random.default_rng(i).integers(0, 4096, (5, 60, 60), dtype=np.uint16)
        path = tmp_path / "cells" / ("train", "test")[i % 2] / "ab"[i // 20] / f"{i}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tiff(cell, photometric="minisblack"))
    flowers = {
        split: [(jpeg(picture(40, 40, seed=start + i)), "jpg", i // 5) for i in range(10)]
        for split, start in (("train", 0), ("test", 10))
    }
    make_shards.shards(tmp_path / "flowers-shards", flowers)
    make_shards.parquet(tmp_path / "flowers-parquet", flowers)
    make_shards.saved(tmp_path / "flowers-saved", flowers)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")  # no Slurm that answers
    return tmp_path


def smaller(text):
    for long, short in SMALLER.items():
        text = text.replace(long, short)
    return text


def blocks(path):
    """(line, kind, mark, file, text) of the blocks of a page."""
    page = path.read_text(encoding="utf-8")
    for match in BLOCK.finditer(page):
        line = page.count("\n", 0, match.start("text")) + 1
        yield line, match["kind"], match["mark"], match["file"], match["text"]


def commands(text):
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words.pop(0)
        if words:
            yield [name for word in words for name in (sorted(glob.glob(word)) or [word])]


def parse(words):
    """Programs, files and configs are there, and the program takes the words."""
    program, *rest = words
    if program == "ssl-dist":
        parsed = command_line.parse(rest)
        if hasattr(parsed, "config") and Path(parsed.config).parts[0] == "configs":
            config.load(parsed.config, parsed.overrides)
    elif program in ("python", "bash"):
        assert (ROOT / rest[0]).is_file(), rest[0]
        if rest[0] == "slurm/submit.py":
            submit(rest, perform=False)
    elif program.startswith("launch/torchrun"):
        assert (ROOT / program).is_file()
        arguments = rest[1 if "single" in program else 4 :]
        parse(["ssl-dist", *([] if arguments[0] in command_line.names() else ["train"]), *arguments])
    else:
        assert program in ("tensorboard", "docker", "apptainer"), words


def submit(words, perform):
    main = runpy.run_path(str(ROOT / words[0]))["main"]
    if not perform:
        main.__globals__["_perform"] = lambda options, others: 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        return main()


def perform(words):
    if words[0] == "ssl-dist":
        assert cli.main(words[1:]) == 0, words
    else:
        assert words[:2] == ["python", "slurm/submit.py"], f"{words}: mark the block as parsed"
        assert submit(words[1:], perform=True) == 0


@pytest.mark.slow
def test_every_block_does_what_it_says(workplace):
    counts = {"": 0, "python": 0, "yaml": 0}
    for name in RUN_PAGES:
        page = ROOT / name
        namespace = {}
        for line, kind, mark, file, text in blocks(page):
            try:
                if kind == "python":
                    exec(compile(text, str(page), "exec"), namespace)
                elif kind == "yaml":
                    Path(file).write_text(smaller(text))
                elif kind == "":
                    for words in commands(text):
                        if mark == "parsed":
                            parse(words)
                        else:
                            perform([*words, "--dry-run"] if mark == "dry run" else words)
            except (Exception, SystemExit):
                pytest.fail(f"{name}:{line}\n{text}\n{traceback.format_exc()}")
            counts[kind] = counts.get(kind, 0) + 1
    assert counts[""] > 20 and counts["python"] >= 6 and counts["yaml"] == 2
    assert "tabular" in Path("runs/ablation/table.tex").read_text() and Path("runs/vit/report.html").is_file()


def test_the_commands_of_other_pages_are_taken(monkeypatch):
    monkeypatch.chdir(ROOT)
    pages = {
        str(page.relative_to(ROOT)) for page in [*ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    }
    listed = {*RUN_PAGES, *PARSED_PAGES, *WITHOUT_BLOCKS, *TESTED_ELSEWHERE}
    assert pages == listed, "a new page goes into the navigation of mkdocs.yml and into one of the lists above"
    assert not [name for name in WITHOUT_BLOCKS if [*blocks(ROOT / name)]]
    for name in PARSED_PAGES:
        for line, kind, _, _, text in blocks(ROOT / name):
            for words in commands(text) if kind == "" else ():
                try:
                    parse([word for word in words if word != "..."])
                except (Exception, SystemExit):
                    pytest.fail(f"{name}:{line} {words}\n{traceback.format_exc()}")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("manual") / "site"
    done = subprocess.run(["bash", ROOT / "tools" / "build_docs.sh", folder], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_no_page_asks_another_host_for_anything(site):
    """Links that a reader follows are the only addresses."""
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        for tag in re.findall(r"<(?!a\b)\w+[^>]*>", page.read_text(encoding="utf-8")):
            assert not re.search(r"""\b(?:src|href|srcset|data|action)=["']?(?:https?:)?//""", tag), (
                f"{page.name}: {tag}"
            )
    for sheet in site.rglob("*.css"):
        assert not re.search(r"""(?:url\(|@import)\s*["']?(?:https?:)?//""", sheet.read_text(encoding="utf-8")), sheet


@pytest.mark.slow
def test_tables_lose_no_text(site):
    """Marks that GitHub reads otherwise than mkdocs: \\<, {...} at the end of a cell."""
    for name in ("config", "catalog", "guarantees", "weights"):
        page = html.unescape(re.sub(r"<[^>]*>", "", (site / f"{name}.html").read_text(encoding="utf-8")))
        for line in (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8").splitlines():
            for cell in re.split(r"(?<!\\)\|", line)[1:-1] if line.startswith("| ") else ():
                text = re.sub(r"\[(.*?)\]\(.*?\)|`|\\(?=[^\w\s])", r"\1", cell).strip()
                assert text in page, f"{name}: {text}"


@pytest.mark.slow
def test_every_public_name_is_in_the_reference(site):
    text = (site / "python.html").read_text(encoding="utf-8")
    for name, members in PUBLIC.items():
        assert re.search(rf"^ *ssl_dist\.{name}$", text, re.M), f"{name}: not in docs/python.md"
        for member in {*members} - {"evaluate", "extract"}:  # the last are commands
            assert re.search(rf'id="[\w.]+\.{member}"', text), f"{name}.{member}"


@pytest.mark.slow
@pytest.mark.skipif(bool(unavailable_reason()), reason=unavailable_reason())
def test_pages_can_be_read_on_a_phone_and_searched_from_the_disk(site, tmp_path):
    with Browser(tmp_path / "profile") as browser:
        for name, width in (("index", 400), ("vit", 400), ("config", 400), ("python", 1280)):
            browser.load(site / f"{name}.html", width=width)
            assert browser.value("document.documentElement.scrollWidth") == width
            assert browser.value("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        found = browser.value("""new Promise(done => {
            document.querySelector("#__search").click();
            const query = document.querySelector(".md-search__input");
            const list = document.querySelector(".md-search-result__list");
            query.value = "vision transformer";
            query.focus();
            const ask = setInterval(() => {
                query.dispatchEvent(new Event("keyup", {bubbles: true}));
                if (list.innerText) { clearInterval(ask); done(list.innerText); }
            }, 100);
            setTimeout(() => done("nothing"), 20000);
        })""")
        assert "A vision transformer" in found
        assert browser.errors() == [] and all(url.startswith(site.as_uri()) for url in browser.requests())
