"""`ssl-dist study`: the runs it makes, the table and figure of their numbers, and what a second start leaves alone."""

import csv
import statistics

import pytest
import yaml

from ssl_dist import cli, results
from ssl_dist.data import unconverted
from ssl_dist.data.catalog import CATALOG
from ssl_dist.errors import UserError
from ssl_dist.results import mean_plots
from ssl_dist.results.means import Mean
from ssl_dist.run import folder as run_folder
from ssl_dist.study import command, dry_run, figure, numbers, spec
from ssl_dist.study.numbers import Number
from tests.test_slurm import starts, submit

DIGITS = "configs/digits/{method}-conv4.yaml"


def tree(folder, data="nowhere", **changes):
    """A study of four runs of two steps."""
    small = {
        "data.root": str(data), "data.reader": "arrays", "data.limit": 32, "optim.batch_size": 16,
        "optim.epochs": None, "optim.steps": 2,
    }  # fmt: skip
    return {
        "title": "A | <b>", "source": "Nobody", "folder": str(folder), "config": DIGITS,
        "axes": {
            "method": ["supervised", "rotation"], "K": {"key": "views.num", "values": [1, 2]},
            "seed": {"key": "seed", "values": [1, 2]},
        },
        "exclude": [{"method": "rotation", "K": 2}],
        "overrides": small,
        "measures": [{"column": "kNN", "evaluator": "knn", "result": "knn5_top1", "overrides": {"knn.k": [5]}}],
        "table": {"rows": ["method"], "columns": ["K"]},
        "figure": {"column": "kNN", "x": "K", "by": "method"},
    } | changes  # fmt: skip


def write(path, content):
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.mark.slow
def test_runs_are_made_measured_and_laid_out_once(digits, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    content = tree(out, digits, config=str(_root() / DIGITS))
    content["overrides"]["data.name"] = None  # dataset.json says it
    path = write(tmp_path / "study.yaml", content)
    assert cli.main(["study", str(path), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "supervised-2-1: method=supervised K=2 seed=1, 2 steps, new; then knn\n" in said
    assert said.endswith("6 runs, 12 steps, 12 of them left\n")
    assert cli.main(["study", str(path), "--dry-run", "--device", "h100", "--ranks", "2"]) == 0
    said = capsys.readouterr().out
    assert ", one after the other, on 2 x " in said and " of trainings; " in said and said.count("; about ") == 6
    trains, left = command.train, [3]

    def stopped_in_the_third(settings):
        left[0] -= 1
        return trains(settings) if left[0] else 75

    monkeypatch.setattr(command, "train", stopped_in_the_third)
    assert cli.main(["study", str(path)]) == 75
    assert "(1 of 2)" not in (out / "table.md").read_text() and "| rotation |  |" in (out / "table.md").read_text()
    monkeypatch.setattr(command, "train", trains)
    assert cli.main(["study", str(path)]) == 0
    table = (out / "table.md").read_text()
    of_runs = {
        run.parent.name: record["value"]
        for run in sorted(out.glob("*/results.json"))
        for record in results.read(run)
        if record["name"] == "knn5_top1"
    }
    assert of_runs.keys() == {
        f"{name}-{seed}" for name in ("supervised-1", "supervised-2", "rotation-1") for seed in "12"
    }
    pair = [of_runs["supervised-2-1"], of_runs["supervised-2-2"]]
    assert f" {statistics.fmean(pair):.2f} ± {statistics.stdev(pair):.2f} |" in table
    assert table.splitlines()[4] == "| method | K = 1 | K = 2 |" and table.splitlines()[7].endswith("| – |")
    rows = list(csv.DictReader((out / "numbers.csv").open()))
    assert [(row["method"], row["K"], row["seed"]) for row in rows][:3] == [
        ("supervised", "1", "1"), ("supervised", "1", "2"), ("supervised", "2", "1"),
    ]  # fmt: skip
    assert float(rows[2]["value"]) == of_runs["supervised-2-1"] and rows[2]["step"] == "2"
    page = (out / "table.html").read_text()
    assert "<h1>A | &lt;b&gt;</h1>" in page and "K = 2" in page and "data:image/png;base64," in page
    assert (out / "figure.svg").read_text().startswith("<?xml")
    monkeypatch.setattr(command, "train", None)  # all is there
    assert cli.main(["study", str(path)]) == 0 and (out / "table.md").read_text() == table
    (out / "rotation-1-2" / "checkpoints" / "step-00000002.pt").unlink()
    assert cli.main(["study", str(path), "--collect"]) == 0
    assert "(1 of 2)" in (out / "table.md").read_text()
    started = []

    def run(ranks, words):  # what is left, and no other, is given to the ranks
        started.append((ranks, words))
        return cli.main(words)

    monkeypatch.setattr(command, "train", trains)
    monkeypatch.setattr(command.torchrun, "run", run)
    assert cli.main(["study", str(path), "--ranks", "2"]) == 0 and (out / "table.md").read_text() == table
    [(ranks, words)] = started
    assert ranks == 2 and words[-2:] == ["--only", "rotation-1-2"]


def _root():
    return spec.Path(__file__).parents[1]


def study_of(tmp_path, **changes):
    return spec.read(write(tmp_path / "study.yaml", tree(tmp_path / "out", config=str(_root() / DIGITS), **changes)))


def numbers_of(trainings, value):
    record = {"method": "", "backbone": "", "protocol": "p"}
    return [Number(t, m, record | {"value": value(t.labels)}, 1.0) for t in trainings for m in t.measures]


def test_columns_are_of_axes_and_measures(tmp_path):
    """As a table whose columns are data sets that runs are transferred to, and a row that is measured otherwise."""
    axes = {"method": ["rotation", "supervised"], "to": ["a", "b"], "seed": {"key": "seed", "values": [1, 2, 3]}}
    measures = [
        {"column": "B", "of": {"to": "b"}, "evaluator": "knn", "result": "knn20_top1"},
        {"column": "A", "of": {"to": "a", "method": ["rotation"]}, "evaluator": "probe", "result": "probe_top1"},
        {"column": "A", "of": {"to": "a", "method": "supervised"}, "evaluator": "classify", "result": "classify_top1"},
    ]  # fmt: skip
    study, trainings = study_of(
        tmp_path, axes=axes, exclude=[], measures=measures, table={"rows": ["method"]}, figure=None
    )
    assert len(trainings) == 12
    assert {t.measures[0].evaluator for t in trainings if t.labels["method"] == "supervised"} == {"knn", "classify"}
    found = numbers_of(trainings, lambda labels: float(labels["seed"]))
    table = numbers.grid(study, trainings, found[:-1])
    assert table.rows == [("rotation",), ("supervised",)] and table.columns == [("B",), ("A",)]
    assert str(table.cells[("rotation",), ("A",)]) == "2.00 ± 1.00"
    assert str(table.cells[("supervised",), ("B",)]) == "1.50 ± 0.71 (2 of 3)"
    assert "| method | B | A |" in numbers.as_markdown(study, table)


def test_published_numbers_stand_beside_cells(tmp_path):
    """With the difference, and in a note what else differs; the same probe of another backbone stands alone."""
    axes = {
        "method": ["relational"], "backbone": {"key": "backbone.name", "values": ["conv4", "resnet8"]},
        "seed": {"key": "seed", "values": [1, 2]},
    }  # fmt: skip
    config = str(_root() / "configs/cifar10/{method}-conv4.yaml")
    measures = [{"column": "probe", "evaluator": "probe", "result": "probe_top1"}]
    table = {"rows": ["method"], "columns": ["backbone"]}
    content = {"axes": axes, "exclude": [], "overrides": {}, "measures": measures, "table": table, "figure": None}
    study, trainings = spec.read(write(tmp_path / "study.yaml", tree(tmp_path) | content | {"config": config}))
    found = []
    for training in trainings:
        record = {
            "name": "probe_top1", "value": 60.0, "method": "relational", "dataset": "cifar10", "split": "test",
            "backbone": training.config.backbone.name, "protocol": "linear probe", "options": {"recipe": "relational"},
        }  # fmt: skip
        found.append(Number(training, training.measures[0], record, 200.0))
    grid = numbers.grid(study, trainings, found)
    assert grid.text(("relational",), ("conv4", "probe")) == "60.00 ± 0.00; published 61.03, -1.03 [1]"
    assert grid.text(("relational",), ("resnet8", "probe")) == "60.00 ± 0.00"
    assert grid.notes == ["mean of 3 seeds, here of 2"]
    text = numbers.as_markdown(study, grid)
    assert "[1] mean of 3 seeds, here of 2." in text and "Published: " in text and "Patacchiola" in text


def test_cells():
    assert [str(Mean(values, 2)) for values in ((), (1.0,), (1.0, 2.0))] == ["", "1.00 (1 of 2)", "1.50 ± 0.71"]
    assert str(Mean((3.14159,), 1)) == "3.14" and str(Mean((0.5, 0.7), 2)) == "0.6000 ± 0.1414"


def test_differences_to_a_row(tmp_path):
    """Beside each mean but those of the row itself, row by row of the other axes; and what a paper says of the same."""
    heads = {"cat": {}, "dot product": {"method.options.head": "dot_product"}}
    axes = {"head": heads, "K": {"key": "views.num", "values": [2, 4]}, "seed": {"key": "seed", "values": [1, 2]}}
    table = {"rows": ["head", "K"], "difference_to": {"head": "cat"}}
    changes = {"axes": axes, "exclude": [], "table": table, "figure": None}
    content = tree(tmp_path) | changes | {"config": str(_root() / "configs/digits/relational-conv4.yaml")}
    study, trainings = spec.read(write(tmp_path / "study.yaml", content))
    found = numbers_of(trainings, lambda labels: 50.0 + labels["K"] - 3.1 * (labels["head"] != "cat"))
    grid = numbers.grid(study, trainings, found[:-2])
    column = ("kNN",)
    assert [grid.text(row, column) for row in grid.rows] == [
        "52.00 ± 0.00", "54.00 ± 0.00", "48.90 ± 0.00 (-3.10)", "",
    ]  # fmt: skip
    [paper] = grid.differences
    assert paper.startswith("Published difference: -23 to -3 %, without a relation head")
    text = numbers.as_markdown(study, grid)
    assert "In brackets the difference to the mean of head cat." in text and paper in text
    lines = list(csv.DictReader(numbers.means_as_csv(study, grid).splitlines()))
    assert [(line["head"], line["K"], line["seeds"]) for line in lines][::2] == [
        ("cat", "2", "2"),
        ("dot product", "2", "2"),
    ]
    assert lines[0]["difference"] == "" and float(lines[2]["difference"]) == pytest.approx(-3.1)
    latex = numbers.as_latex(study, grid)
    assert "dot product & 2 & 48.90 $\\pm$ 0.00 ($-$3.10) \\\\\n" in latex and "% Nobody. Mean" in latex
    study, trainings = study_of(tmp_path)
    assert not numbers.grid(study, trainings, numbers_of(trainings, lambda labels: 1.0)).differences


def test_a_figure_of_gains(tmp_path):
    gain = {"column": "kNN", "x": "method", "by": "K", "gain": {"axis": "seed", "of": 2, "over": 1}}
    study, trainings = study_of(tmp_path, figure=gain)
    found = numbers_of(trainings, lambda labels: 10.0 * labels["seed"] * labels["K"])
    axes = figure.draw(study, study.figure, found).axes[0]
    assert [bar.get_height() for bar in axes.patches] == [10, 10, 20]  # K = 1 of both methods, K = 2 of one
    assert [text.get_text() for text in axes.get_xticklabels()] == ["supervised", "rotation"]


def test_a_line_of_a_figure_is_the_mean_over_seeds(tmp_path):
    study, trainings = study_of(tmp_path)
    found = numbers_of(trainings, lambda labels: 10.0 * labels["seed"] + labels["K"])
    axes = figure.draw(study, study.figure, found).axes[0]
    assert list(axes.containers[0][0].get_ydata()) == [16, 17] and list(axes.containers[1][0].get_ydata()) == [16]
    assert axes.get_xscale() == "linear"
    for values, chosen, scale in (([1, 2, 4], None, "log"), ([1, 2, 4], False, "linear"), ([1, 2], True, "log")):
        axis = {"K": {"key": "views.num", "values": values}}
        spec_of_figure = {"column": "kNN", "x": "K", "by": "method", "logarithmic": chosen}
        study, trainings = study_of(tmp_path, axes=tree(tmp_path)["axes"] | axis, figure=spec_of_figure)
        found = numbers_of(trainings, lambda labels: 1.0)
        assert figure.draw(study, study.figure, found).axes[0].get_xscale() == scale


def test_numbers_that_would_stand_in_one_spot_stand_side_by_side():
    for places, at in (([0.0, 0.01, 0.5, 1.0], [0, 1, 2, 3]), ([0.0, 0.1, 0.5, 1.0], [0.0, 0.1, 0.5, 1.0])):
        line = mean_plots.Line("a", [(place, 1.0, 0.0) for place in places])
        axes = mean_plots.lines([line], places, ("x", "y")).axes[0]
        assert list(axes.get_xticks()) == list(axes.containers[0][0].get_xdata()) == at
        assert [text.get_text() for text in axes.get_xticklabels()] == [f"{place:g}" for place in places]


def test_a_star_stands_for_what_one_file_has_there(tmp_path):
    starred, named = (
        spec.read(write(tmp_path / "study.yaml", tree(tmp_path / "out", config=str(_root() / config))))[1]
        for config in ("configs/digits/{method}-*.yaml", DIGITS)
    )
    assert [training.config for training in starred] == [training.config for training in named]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"axes": {}}, "axes"),
        ({"rows": 1}, "rows = 1: known here: title"),
        ({"table": {"rows": ["methods"]}}, "table: methods is no axis; there are method, K, seed"),
        ({"table": {"rows": ["method"]}}, "table: axis K is in no row, column or mean; add it to rows"),
        ({"table": {"rows": ["method", "K"], "difference_to": {"seed": 1}}}, "table.difference_to: seed makes no rows"),
        (
            {"table": {"rows": ["method", "K"], "difference_to": {"K": 3}}},
            "table.difference_to.K: 3 is none of [1, 2]",
        ),
        ({"config": "no-{method}.yaml"}, "no-supervised.yaml is missing"),
        ({"config": "no-{method}-*.yaml"}, "no-supervised-*.yaml is missing"),
        ({"config": "twice-{method}-*.yaml"}, "fits twice-supervised-a.yaml, twice-supervised-b.yaml; it must fit one"),
        ({"config": "{backbone}.yaml"}, "names what is no axis; there are method, K, seed"),
        ({"config": "{method.name}.yaml"}, "names what is no axis; there are method, K, seed"),
        ({"overrides": {"run_dir": "x"}}, 'run_dir="x": a study names the folders of its runs; write folder: in'),
        (
            {"figure": {"column": "kNN", "x": "K", "by": "method", "gain": {"axis": "seed", "of": 1, "over": 9}}},
            "figure.gain.over: 9 is none of [1, 2]",
        ),
        ({"overrides": {"optim.lr": -1}}, "{'method': 'supervised', 'K': 1, 'seed': 1}: optim.lr = -1"),
        ({"figure": {"column": "probe", "x": "K", "by": "method"}}, "figure.column: probe is the column of no measure"),
        ({"figure": {"column": "kNN", "x": "k", "by": "method"}}, "figure: k is no axis"),
        ({"measures": [{"column": "kNN", "evaluator": "knnn", "result": "x"}]}, "measures.0: unknown evaluator 'knnn'"),
        (
            {"measures": [{"column": "kNN", "evaluator": "knn", "result": "x", "overrides": {"knn.kk": 1}}]},
            "measures.0: unknown key knn.kk",
        ),
        ({"exclude": [{"methods": 1}]}, "exclude.0.methods: methods is no axis"),
        ({"exclude": [{"K": [1, 2]}]}, "every combination is excluded"),
        ({"measures": [{"column": "a", "of": {"K": 3}, "evaluator": "knn", "result": "x"}]}, "3 is none of [1, 2]"),
    ],
)
def test_mistakes_are_one_line(tmp_path, changes, line):
    for name in "ab":
        write(tmp_path / f"twice-supervised-{name}.yaml", {})
    content = tree(tmp_path / "out", config=str(_root() / DIGITS)) | changes
    with pytest.raises(UserError) as caught:
        spec.read(write(tmp_path / "study.yaml", content))
    assert line in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "further", "line"),
    [
        (
            {"views.num": 8},
            [],
            "views.num=8 of overrides and views.num=1 of axis K undo one another; leave out one of them",
        ),
        ({"views": {"num": 8}}, [], 'views={"num": 8} of overrides and views.num=1 of axis K undo one another; leave'),
        ({}, ["views.num=16"], "views.num=16 of the command line and views.num=1 of axis K undo one another"),
        (
            {},
            ["views.groups=[]", "views={num: 2}"],
            "views={num: 2} of the command line and views.num=1 of axis K undo",
        ),
        ({}, ["views.number=16"], "unknown key views.number"),
        ({"views.num": 8}, ["optim.lr=1"], "views.num=8 of overrides and views.num=1 of axis K"),
    ],
)
def test_what_an_axis_sets_is_set_nowhere_else(tmp_path, overrides, further, line):
    content = tree(tmp_path / "out", config=str(_root() / DIGITS))
    own = content["overrides"]
    content["overrides"] = own | overrides
    with pytest.raises(UserError) as caught:
        spec.read(write(tmp_path / "study.yaml", content), further)
    assert line in str(caught.value) and "\n" not in str(caught.value)
    spec.read(write(tmp_path / "study.yaml", content | {"overrides": own}))
    if overrides:  # or the axis is left out
        content["axes"].pop("K")
        content |= {"exclude": [], "table": {"rows": ["method"]}, "figure": None}
        spec.read(write(tmp_path / "study.yaml", content))


def test_two_axes_of_a_combination_set_no_key_both(tmp_path):
    content = tree(tmp_path / "out", config=str(_root() / DIGITS))
    content["axes"]["method"] = {"supervised": {"method.name": "supervised"}, "rotation": {"views.num": 1}}
    content["config"] = content["config"].format(method="rotation")
    with pytest.raises(UserError, match=r"views\.num=1 of axis K and views\.num=1 of axis method undo one another"):
        spec.read(write(tmp_path / "study.yaml", content))
    content["axes"]["method"]["rotation"] = {}
    spec.read(write(tmp_path / "study.yaml", content))


def test_every_combination_has_a_folder_of_its_own(tmp_path):
    content = tree(tmp_path / "out", config=str(_root() / DIGITS), exclude=[], figure=None)
    content["overrides"].pop("data.root")
    axes, path = content["axes"], tmp_path / "study.yaml"

    def refused(first, second, folder):
        with pytest.raises(UserError) as caught:
            spec.read(write(path, content))
        assert str(caught.value) == (
            f"study {path}: method=supervised K={first} and method=supervised K={second} have one folder, "
            f"{tmp_path}/out/supervised-{folder}; leave one out, or give a value another name, as name: {{key: value}}"
        )

    axes["K"] = {"key": "data.root", "values": ["aug/1", "aug 1"]}
    refused("aug/1 seed=1", "aug 1 seed=1", "aug_1-1")
    axes["K"] = {"one": {"data.root": "aug/1"}, "another": {"data.root": "aug 1"}}
    spec.read(write(path, content))
    axes |= {"K": {"x": {}, "x-1": {"views.num": 2}}, "seed": {"1-y": {"seed": 1}, "y": {"seed": 2}}}
    refused("x seed=1-y", "x-1 seed=y", "x-1-y")
    axes["K"] = {"x": {}, "x1": {"views.num": 2}}
    spec.read(write(path, content))
    axes["K"] = {"key": "views.num", "values": [1, 2, 2]}
    refused("2 seed=1-y", "2 seed=1-y", "2-1-y")
    axes["K"]["values"].pop()
    spec.read(write(path, content))


def test_a_cell_is_of_one_measure(tmp_path):
    content = tree(tmp_path / "out", config=str(_root() / DIGITS))
    [knn] = content["measures"]
    other = {"column": "kNN", "evaluator": "logistic", "result": "logistic_top1"}

    def read(*measures, **changes):
        spec.read(write(tmp_path / "study.yaml", content | {"measures": list(measures)} | changes))

    line = (
        "measures.1.column: 'kNN' is that of measures.0 too, and method={} would have the mean of both; give it another"
    )
    for of, name in (
        ({}, "supervised K=1"),
        ({"method": "rotation"}, "rotation K=1"),
        ({"seed": [2]}, "supervised K=1"),
    ):
        with pytest.raises(UserError, match=line.format(name)):
            read(knn, other | {"of": of})
        read(knn, other | {"of": of, "column": "logistic regression"})
    read(knn | {"of": {"method": "rotation"}}, other | {"of": {"method": "supervised"}})  # a row each
    with pytest.raises(UserError, match=line.format("supervised")):  # of two runs, in one cell as K makes no rows
        read(knn | {"of": {"K": 1}}, other | {"of": {"K": 2}}, table={"rows": ["method"]}, figure=None)


def test_a_point_of_a_figure_is_a_mean_over_seeds_alone(tmp_path):
    content = tree(tmp_path / "out", config=str(_root() / DIGITS))
    content["axes"]["rate"] = {"key": "optim.lr", "values": [0.1, 0.2]}
    content["table"] = {"rows": ["method", "K", "rate"]}
    [knn] = content["measures"]

    def read(figure=content["figure"], **changes):
        spec.read(write(tmp_path / "study.yaml", content | {"figure": figure} | changes))

    line = r"figure: a point would be a mean over rate \(0\.1, 0\.2\); make it x or by, take kNN at one value of it"
    with pytest.raises(UserError, match=line):
        read()
    read(figure=None)
    read(measures=[knn | {"of": {"rate": 0.2}}])
    read(exclude=[{"rate": 0.1}])
    read(exclude=[{"rate": 0.1, "K": 1}, {"rate": 0.2, "K": 2}])  # one rate at every point
    gain = {"axis": "rate", "of": 0.2, "over": 0.1}
    read(figure=content["figure"] | {"gain": gain})
    with pytest.raises(UserError, match=r"a mean over method \(supervised, rotation\)"):
        read(figure={"column": "kNN", "x": "K", "by": "rate"})


def test_an_axis_that_sets_nothing_makes_no_rows(tmp_path):
    content = tree(tmp_path / "out", config=str(_root() / DIGITS))
    content["axes"]["seed"] = [1, 2]
    with pytest.raises(UserError) as caught:
        spec.read(write(tmp_path / "study.yaml", content))
    assert str(caught.value).endswith(
        ": method=supervised K=1 seed=1 and method=supervised K=1 seed=2 make the same training; write the axis as "
        "seed: {key: a config key, values: [...]}, name {seed} in config, or leave one value out"
    )
    content["axes"]["seed"] = [1]
    spec.read(write(tmp_path / "study.yaml", content))
    content["axes"]["seed"] = {"key": "seed", "values": [1, 2]}
    spec.read(write(tmp_path / "study.yaml", content))
    text = (_root() / DIGITS.format(method="rotation")).read_text()
    for seed in (1, 2):
        (tmp_path / f"{seed}.yaml").write_text(text)
    content |= {"config": "{seed}.yaml", "figure": None, "exclude": [], "table": {"rows": ["K"]}}
    content["axes"].pop("method")
    content["axes"]["seed"] = [1, 2]
    with pytest.raises(UserError, match="K=1 seed=1 and K=1 seed=2 make the same training"):
        spec.read(write(tmp_path / "study.yaml", content))
    (tmp_path / "2.yaml").write_text(text.replace("seed: 0", "seed: 2"))
    spec.read(write(tmp_path / "study.yaml", content))


@pytest.mark.parametrize("words", [["--dry-run", "--ranks", "0"], ["--ranks", "-1"]])
def test_what_a_study_cannot_do(tmp_path, words, capsys):
    path = write(tmp_path / "study.yaml", tree(tmp_path / "out", config=str(_root() / DIGITS)))
    assert cli.main(["study", str(path), *words]) == 2
    assert capsys.readouterr().err.startswith(f"error: --ranks {words[-1]}: at least one")


def test_a_dry_run_needs_no_data(tmp_path, capsys):
    """The figures of the papers' data sets are known; those of others are asked for in one line."""
    content = tree(tmp_path / "out") | {"config": str(_root() / "configs/stl10/{method}-resnet34.yaml")}
    content["axes"] |= {"method": ["rotation", "random_weights"], "K": {"key": "data.limit", "values": [3200]}}
    content["overrides"] = {"backbone.name": "conv4", "optim.epochs": 2, "optim.batch_size": 64}
    content["exclude"] = []
    transfer = {"data.name": "cifar10", "data.root": "no where/cifar10", "data.subset": {"per_class": 100}}
    lists = {"data.subset": "lists/some.txt"}
    content["measures"] = [
        {"column": "kNN", "evaluator": "knn", "result": "knn20_top1"},
        {"column": "a", "evaluator": "probe", "result": "probe_top1", "overrides": transfer},
        {"column": "b", "evaluator": "finetune", "result": "finetune_top1", "overrides": lists},
    ]
    path = write(tmp_path / "study.yaml", content)
    assert cli.main(["study", str(path), "--dry-run", "--device", "h100", "--ranks", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        "rotation-3200-1: method=rotation K=3200 seed=1, 100 steps, new; then knn, probe, finetune; about "
    )
    assert "0 steps, new; then knn, probe, finetune; about probe " in lines[2]
    assert lines[4:5] == ["4 runs, 200 steps, 200 of them left"] and "of trainings, " in lines[5]
    assert lines[6] == (
        "not counted: the test of what was trained, knn, finetune on lists/some.txt, which is not there"
    )
    assert lines[7].startswith("stl10 is not converted here (data/stl10): unlabeled 100,000, train 5,000, test 8,000 ")
    assert lines[8].startswith("cifar10 is not converted here (no where/cifar10): train 50,000, test 10,000 images of")
    of_probe = dry_run.Costs(dry_run.roofline.named("h100"), 8)
    _, [training, *_] = spec.read(path)
    seconds = of_probe._measure(training, training.measures[1])
    [(a_step, steps)] = of_probe._of_step.values()
    assert steps == 100 * (10 * 100 // 128) and seconds == a_step * steps  # the recipe's epochs and batches
    content["overrides"] |= {"data.name": "mine", "data.root": "data/mine"}
    assert cli.main(["study", str(write(path, content)), "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: data.root = 'data/mine': there is no dataset.json in it") and "convert" in said


def test_published_sizes_are_those_of_the_catalog():
    for name, sizes in unconverted.published_sizes().items():
        entry, dataset = CATALOG[name], unconverted.Unconverted(name, "x", "ffcv")
        assert {entry.pretraining, entry.training, entry.evaluation} <= sizes.splits.keys()
        for split, count in sizes.splits.items():
            labels = dataset.labels(split)
            assert len(labels) == dataset.info(split).count == count
            present = range(sizes.classes) if dataset.info(split).labelled else [-1]
            assert sorted(set(labels.tolist())) == list(present)


@pytest.mark.slow
def test_on_two_nodes_only_what_is_left_is_done(cluster, digits, tmp_path, monkeypatch):
    """One of two runs is complete; the other is trained and measured by two ranks, and then comes the table."""
    content = tree(tmp_path / "out", digits, config=str(_root() / DIGITS), exclude=[])
    content["axes"] |= {"method": ["relational"], "K": {"key": "views.num", "values": [4]}}
    path = write(tmp_path / "study.yaml", content)
    assert cli.main(["study", str(path), "--only", "relational-4-1"]) == 0
    size = ("--nodes", "2", "--tasks-per-node", "1", "--cpus-per-task", "1")
    submitted = submit(cluster, tmp_path, "study", str(path), *size)
    assert len(submitted) == 2
    path.write_text("nonsense")  # a later edit must not change these jobs
    for job in submitted:
        cluster.wait(job, "COMPLETED", deadline=150)
    assert [json_line["world_size"] for json_line in starts(tmp_path / "out" / "relational-4-2")] == [2]
    assert [json_line["world_size"] for json_line in starts(tmp_path / "out" / "relational-4-1")] == [1]
    [row] = [line for line in (tmp_path / "out" / "table.md").read_text().splitlines() if "relational" in line]
    assert "±" in row and "of 2" not in row


def test_a_run_of_another_config_is_refused_before_anything_is_trained(digits, tmp_path, capsys, monkeypatch):
    content = tree(tmp_path / "out", digits, config=str(_root() / DIGITS))
    content["overrides"] |= {"optim.lr": 0.1, "optim.schedule": "constant"}
    path = write(tmp_path / "study.yaml", content)
    last = spec.read(path)[1][-1]  # the first one is new and would be trained
    (last.run / "checkpoints").mkdir(parents=True)
    run_folder.accept(last.run, command.plan_of(last).config)
    (last.run / "checkpoints" / "step-00000002.pt").touch()
    monkeypatch.setattr(command, "train", None)
    head = f"error: run_dir = '{last.run}': holds a run "

    def refused(*words):
        for further in ([], ["--dry-run"], ["--collect"], ["--only", last.name]):
            assert cli.main(["study", str(path), *words, *further]) == 2
            said = capsys.readouterr().err
            assert said.startswith(head) and said.count("\n") == 1 and "; give the study another folder, or " in said
        return said[len(head) :]

    assert refused("optim.lr=0.9").startswith("with another config: optim.lr (there 0.1, now 0.9); ")
    assert refused("optim.steps=1").startswith("with another config: optim.steps (there 2, now 1); ")
    assert refused("optim.schedule=cosine", "optim.steps=3").startswith("with another config: optim.schedule (there")
    assert cli.main(["study", str(path), "optim.steps=3", "--dry-run"]) == 0  # as `train` prolongs a run
    assert f"{last.name}: {last.title}, 3 steps, 2 done; " in capsys.readouterr().out
    (last.run / "checkpoints" / "step-00000003.pt").touch()  # prolonged: config.yaml keeps the first length
    assert refused().startswith("of 3 steps, and this study trains 2; ")
    assert cli.main(["study", str(path), "optim.steps=3", "--dry-run"]) == 0
    assert f"{last.name}: {last.title}, 3 steps, complete; " in capsys.readouterr().out
    write(path, content | {"folder": str(tmp_path / "other")})
    assert cli.main(["study", str(path), "optim.lr=0.9", "--dry-run"]) == 0
    assert "complete" not in capsys.readouterr().out


def test_an_evaluator_without_the_result(digits, tmp_path):
    measures = [{"column": "a", "evaluator": "knn", "result": "knn7_top1", "overrides": {"knn.k": [5]}}]
    content = tree(tmp_path / "out", digits, config=str(_root() / DIGITS), measures=measures)
    content["axes"]["method"] = ["random_weights"]
    content["axes"]["K"] = {"key": "optim.lr", "values": [0.1]}
    content |= {"exclude": [], "figure": None}
    with pytest.raises(UserError, match="knn gives no knn7_top1, but knn5_top1, knn5_top5; name one of these"):
        command.run(write(tmp_path / "study.yaml", content), ())


@pytest.mark.parametrize("path", sorted(spec.Path("configs/studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_studies_that_come_with_the_package(path):
    study, trainings = spec.read(path)
    assert study.folder == f"runs/studies/{path.stem}" and trainings
    assert len({training.run for training in trainings}) == len(trainings)
    assert path.read_text().startswith(f"# ssl-dist study {path}\n")
