"""The page in a real browser: no error, every picture decoded, nothing fetched; and it can be read on a phone."""

import time
from pathlib import Path

import pytest

from ssl_dist import config, report
from ssl_dist.evaluate.command import evaluate
from ssl_dist.train.loop import train
from tests.browser import Browser, unavailable_reason
from tests.test_report_page import EVIL, make_run, png, record, results

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(unavailable_reason()), reason=unavailable_reason())]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Of a run, of three, and of one in which every text is an attack and some files are damaged."""
    folder = tmp_path_factory.mktemp("pages")
    runs = [make_run(folder / f"run{seed}", seed=seed, value=50.0 + seed) for seed in range(3)]
    evil = make_run(folder / "<img src=x onerror=alert(1)>", data={"name": "cifar10", "root": EVIL})
    results.add(evil / "results.json", [record(evil, name=EVIL, protocol=EVIL, dataset=EVIL)])
    png(evil / "figures" / "x.png", Title=EVIL, Description=EVIL)
    (evil / "views.png").write_bytes(b"torn")
    return {
        "one": report.write(report.read(runs[:1]), None),
        "three": report.write(report.read(runs), None),
        "evil": report.write(report.read([evil, runs[0]]), folder / "evil.html"),
    }


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize(("name", "num_pictures"), [("one", 2), ("three", 6), ("evil", 4)])
def test_the_page_is_whole(browser, pages, name, num_pictures, width):
    browser.load(pages[name], width=width, dark=width == 400)
    pictures = browser.value("[...document.images].map(i => i.complete && i.naturalWidth > 0)")
    assert pictures == [True] * num_pictures
    assert browser.requests() == [pages[name].resolve().as_uri()]
    assert browser.value("[...document.querySelectorAll('svg')].every(s => s.getBoundingClientRect().height > 100)")
    assert browser.value("document.documentElement.scrollWidth") == width  # wide tables scroll in boxes of their own
    style = browser.value("getComputedStyle(document.body).backgroundColor")
    assert style == ("rgb(20, 23, 27)" if width == 400 else "rgb(255, 255, 255)")  # the policy let the style through
    assert browser.errors() == []


def test_nine_runs_need_no_sideways_scroll(browser, tmp_path):
    """Each table has room at 1280 px, whether what was varied names the runs or long names of folders do."""
    views = [{"num": num} for num in (2, 4, 8)]
    values = [(seed, num) for num in range(3) for seed in range(3)]
    runs = [
        make_run(tmp_path / f"digits-relational-conv4-views-{num}-seed-{seed}", seed=seed, value=50.0 + seed + num,
                 views=views[num])
        for seed, num in values
    ]  # fmt: skip
    read = report.read(runs)
    for labels in (["K = 2, seed 0", "K = 2, seed 1"], [read[0].name, read[1].name]):
        browser.load(report.write(read, tmp_path / "nine.html"), width=1280)
        wide = "[...document.querySelectorAll('.scroll:not(.views)')].filter(e => e.scrollWidth > e.clientWidth).length"
        assert browser.value(wide) == 0 and browser.value("document.documentElement.scrollWidth") == 1280
        heads = browser.value("[...document.querySelectorAll('.of-runs')].map(t => t.tHead.innerText)")
        assert all(label.replace("-", "") in heads[0].replace("\xa0", " ").replace("-", "") for label in labels)
        rows = browser.value("[...document.querySelectorAll('.of-runs')][1].tBodies[0].innerText.split('\\n')")
        assert [row.split("\t")[0] for row in rows] == ["2", "4", "8"]
        plots = browser.value("[...document.querySelectorAll('#results img')].map(i => i.naturalWidth > 0)")
        assert plots and all(plots) and browser.errors() == []
        for run in read:
            run.label = None


def test_the_values_under_the_pointer(browser, pages):
    browser.load(pages["one"])
    box = browser.value(
        "(() => { const s = document.querySelector('svg'); s.scrollIntoView({block: 'center'});"
        " const b = s.getBoundingClientRect(); return [b.x, b.y, b.width, b.height]; })()"
    )
    browser.hover(box[0] + 0.9 * box[2], box[1] + box[3] / 2)
    end = time.monotonic() + 10
    while not (reading := browser.value("document.querySelector('.reading').textContent")):
        assert time.monotonic() < end
    epoch, value = reading.removeprefix("epoch ").split("\n")
    assert 1.6 < float(epoch) < 2 and 0.04 < float(value) < 0.06
    assert browser.value("document.querySelector('.cursor').classList.contains('shown')")
    assert browser.value("document.querySelector('svg').getBoundingClientRect().y") == box[1]  # nothing has moved
    assert browser.errors() == []


def test_a_click_enlarges_a_picture(browser, pages):
    browser.load(pages["one"])
    assert browser.value(
        "(() => { const b = document.querySelector('button.picture'); b.click();"
        " return b.closest('figure').classList.contains('large'); })()"
    )


def test_the_browser_would_notice(browser, tmp_path):
    """The checks above can fail: an error, a request and a broken picture are seen, and a policy that forbids them."""
    bad = tmp_path / "bad.html"
    bad.write_text("<img src='other.png'><img src='data:image/png;base64,AAAA'><script>undefined.x</script>")
    browser.load(bad)
    assert len(browser.requests()) == 2 and "Cannot read properties" in str(browser.errors())
    assert browser.value("[...document.images].map(i => i.naturalWidth)") == [0, 0]
    bad.write_text("<meta http-equiv=Content-Security-Policy content=\"default-src 'none'\"><style>p {}</style>")
    browser.load(bad)
    assert "Content Security Policy" in str(browser.errors())


def test_a_real_run_from_training_to_page(browser, digits, tmp_path):
    """What the loop, the evaluators and the FigureWriter write is what the page reads."""
    run = tmp_path / "run"
    place = [f"data.root={digits}", f"run_dir={run}", "data.reader=arrays"]
    length = ["optim.steps=40", "optim.epochs=null", "log.every_steps=1", "log.knn_every_epochs=1"]
    assert train(config.load(ROOT / "configs" / "digits" / "relational-conv4.yaml", [*place, *length])) == 0
    assert evaluate(run, ["knn", "retrieval", "probe"], ["probe.epochs=1"])[0] == 0
    page = report.write(report.read([run]), None)
    browser.load(page)
    text = browser.value("document.body.innerText")
    for words in ("relational · conv4 · digits", "step 40 of 40", "The training is complete.", "knn20_top1",
                  "retrieval_map", "probe_top1", "online knn20", "effective rank", "Queries and their nearest images",
                  "Trainings of evaluators", "1 start"):  # fmt: skip
        assert words in text, words
    assert "no picture" not in text.lower() and "cannot" not in text
    pictures = browser.value("[...document.images].map(i => i.naturalWidth > 0)")
    assert len(pictures) >= 4 and all(pictures) and browser.errors() == [] and len(browser.requests()) == 1
