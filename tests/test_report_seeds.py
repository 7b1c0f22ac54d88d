"""Mean and standard deviation over the seeds of runs."""

import csv
import statistics

import pytest

from ssl_dist import cli, config, report, results
from ssl_dist.errors import UserError
from ssl_dist.report import varied
from ssl_dist.report.ablation import Ablation


def run_with(folder, seed, value, lr=1e-3, weights=None, views=4, method="relational", groups=None, **changes):
    record = {
        "name": "knn5_top1", "value": value, "protocol": "kNN", "options": {}, "dataset": "digits", "split": "test",
        "data": "d", "train_data": "t", "transform": "crop", "version": 1,
        "seed": seed, "method": method, "backbone": "conv4", "checkpoint": f"c{seed}", "step": 20,
        "time": "2030-01-01T00:00:00+00:00",
    } | changes  # fmt: skip
    folder.mkdir(exist_ok=True)
    tree = {"run_dir": str(folder), "seed": seed, "data": {"name": "digits", "root": "x"}, "optim": {"lr": lr}}
    tree |= {"backbone": {"weights": weights}, "views": {"num": views}, "method": {"name": method}}
    if groups is not None:
        tree["views"]["groups"] = [{"num": num, "size": 8} for num in groups]
    (folder / "config.yaml").write_text(config.dump(config.validate(config.Config, tree)))
    results.add(folder / "results.json", [record])
    return folder


def test_mean_and_std_over_seeds(tmp_path):
    values = [90.0, 92.5, 91.0]
    runs = [run_with(tmp_path / str(seed), seed, value) for seed, value in enumerate(values)]
    [record] = report.over_seeds(runs)
    assert record["mean"] == pytest.approx(statistics.fmean(values)) and record["seeds"] == [0, 1, 2]
    assert record["std"] == pytest.approx(statistics.stdev(values))
    text = report.table([record])
    assert "91.17 ± 1.26" in text and "[1] kNN" in text


def test_what_differs_is_not_averaged(tmp_path):
    runs = [run_with(tmp_path / "a", 0, 90.0), run_with(tmp_path / "b", 1, 50.0, method="random_weights", views=None)]
    run_with(tmp_path / "a", 0, 80.0, protocol="another kNN")
    records = report.over_seeds(runs)
    assert [(r["method"], r["mean"], r["std"]) for r in records] == [
        ("relational", 90.0, None), ("relational", 80.0, None), ("random_weights", 50.0, None),
    ]  # fmt: skip
    assert "±" not in report.table(records).split("\n", 2)[2]


def test_another_config_is_no_other_seed(tmp_path):
    runs = [run_with(tmp_path / "a", 0, 90.0), run_with(tmp_path / "b", 1, 50.0, lr=0.1)]
    assert [(r["run"], r["mean"], r["seeds"]) for r in report.over_seeds(runs)] == [("a", 90.0, [0]), ("b", 50.0, [1])]


def test_other_initial_weights_are_no_other_seed(tmp_path):
    runs = [run_with(tmp_path / "a", 0, 90.0, weights="a.pt"), run_with(tmp_path / "b", 1, 50.0, weights="b.pt")]
    runs.append(run_with(tmp_path / "c", 0, 40.0))
    assert [(r["run"], r["seeds"]) for r in report.over_seeds(runs)] == [("a", [0]), ("b", [1]), ("c", [0])]


def test_other_samples_are_not_averaged(tmp_path):
    runs = [run_with(tmp_path / "a", 0, 90.0), run_with(tmp_path / "b", 1, 50.0, data="another version")]
    assert len(report.over_seeds(runs)) == 2


def test_convergence_is_no_result(tmp_path):
    run = run_with(tmp_path / "a", 0, 1.0, name="logistic_converged")
    run_with(tmp_path / "a", 0, 90.0)
    assert [r["name"] for r in report.over_seeds([run])] == ["knn5_top1"]


def test_the_newest_checkpoint_of_a_run_counts(tmp_path):
    run = run_with(tmp_path / "a", 0, 90.0)
    run_with(tmp_path / "a", 0, 95.0, checkpoint="later", step=40, time="2030-01-02T00:00:00+00:00")
    [record] = report.over_seeds([run])
    assert (record["mean"], record["step"]) == (95.0, 40)


def test_mistakes(tmp_path):
    run = run_with(tmp_path / "a", 0, 90.0)
    with pytest.raises(UserError, match="has the seed, 0, and the config of"):
        report.over_seeds([run, run])
    with pytest.raises(UserError, match="holds no results; run `ssl-dist evaluate"):
        report.over_seeds([tmp_path / "none"])


@pytest.fixture
def ablation(tmp_path):
    """K = 2, 4, 16 at two rates, two seeds each, but one of the last; and a second result of the first ones."""
    runs = []
    for lr in (1e-3, 1e-2):
        for views in (16, 2, 4):  # as a shell sorts them
            for seed in (1, 2):
                folder = tmp_path / f"k{views}-{lr}-{seed}"
                runs.append(run_with(folder, seed, 50.0 + views + seed + 1000 * lr, lr=lr, views=views))
                run_with(folder, seed, 0.5, lr=lr, views=views, name="clusters_nmi", protocol="k-means_100 %")
    return runs[:-1]


def test_groups_are_named_by_what_was_varied(ablation):
    records = report.over_seeds(ablation)
    assert [tuple(record["varied"].values()) for record in records][::2] == [
        (2, 0.001), (2, 0.01), (4, 0.001), (4, 0.01), (16, 0.001), (16, 0.01),
    ]  # fmt: skip
    lines = report.table(records).splitlines()
    assert lines[0].startswith("K   optim.lr  method      backbone") and "run" not in lines[0]
    assert [line.split()[:2] for line in lines[2:5]] == [["2", "0.001"], ["2", "0.01"], ["4", "0.001"]]
    assert varied.named(records[0]["varied"]) == "K = 2, optim.lr = 0.001"
    labels = [run.label for run in report.read(ablation)]
    assert labels[:2] == ["K = 16, optim.lr = 0.001, seed 1", "K = 16, optim.lr = 0.001, seed 2"]


def test_the_table_as_it_is_published(ablation, tmp_path, capsys):
    files = {name: tmp_path / "out" / name for name in ("t.csv", "t.tex")}
    files["t.csv"].parent.mkdir()
    words = ["--csv", str(files["t.csv"]), "--latex", str(files["t.tex"]), "--figures", str(tmp_path / "plots")]
    assert cli.main(["report", *map(str, ablation), *words]) == 0
    assert f"{tmp_path / 'plots'}: 4 plots written" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == [
        "clusters_nmi.png", "clusters_nmi.svg", "knn5_top1.png", "knn5_top1.svg",
    ]  # fmt: skip
    rows = list(csv.DictReader(files["t.csv"].open()))
    first = rows[0]
    assert (first["views.num"], first["optim.lr"], first["name"]) == ("2", "0.001", "knn5_top1") and len(rows) == 12
    assert first["seeds"] == "1 2" and first["values"] == "54.0 55.0" and float(first["mean"]) == 54.5
    assert float(first["std"]) == pytest.approx(0.5**0.5) and rows[6]["std"] == ""
    latex = files["t.tex"].read_text()
    assert "K & optim.lr & seeds & knn5\\_top1 & clusters\\_nmi \\\\" in latex and "\\begin{tabular}{llrrr}" in latex
    assert "\n2 & 0.001 & 2 & 54.50 $\\pm$ 0.71 & 0.5000 $\\pm$ 0.0000 \\\\\n" in latex
    assert "\n% relational, conv4, measured on digits test, mean" in latex
    assert "\n% clusters_nmi: k-means_100 %\n" in latex  # a comment needs no escapes


def test_plots_are_against_the_key_with_most_numbers(ablation):
    means = Ablation(report.over_seeds(ablation))
    assert means.plotted_key == "views.num"
    [(name, figure), _] = means.plots()
    [axes] = figure.axes
    lines = {container.get_label(): container[0] for container in axes.containers}
    assert name == "knn5_top1" and axes.get_xlabel() == "K" and axes.get_xscale() == "log"
    assert list(lines["optim.lr 0.001"].get_xdata()) == [2, 4, 16]
    assert list(lines["optim.lr 0.001"].get_ydata()) == [54.5, 56.5, 68.5]
    assert list(lines["optim.lr 0.01"].get_ydata()) == [63.5, 65.0, 77.5]  # of K = 4 one seed


def test_what_comes_with_a_method_is_no_choice_of_its_own(tmp_path):
    runs = [run_with(tmp_path / f"{seed}", seed, 50.0 + seed) for seed in (1, 2)]
    runs.append(run_with(tmp_path / "simclr", 1, 40.0, method="simclr", views=None))
    records = report.over_seeds(runs)
    assert [record["varied"] for record in records] == [{"method.name": "relational"}, {"method.name": "simclr"}]
    assert Ablation(records).label_heads == ["method", "seeds"] and Ablation(records).plotted_key is None
    assert report.read(runs)[0].label is None
    assert [run.label for run in report.read(runs[:2])] == ["seed 1", "seed 2"]


def test_a_method_without_the_plotted_key_has_no_line(tmp_path):
    runs = [run_with(tmp_path / f"k{views}", 1, 50.0 + views, views=views) for views in (16, 4)]
    runs.append(run_with(tmp_path / "simclr", 1, 40.0, method="simclr", views=None))
    means = Ablation(report.over_seeds(runs))
    assert [means.labels(group) for group in means.groups] == [
        ["relational", "4", "1"], ["relational", "16", "1"], ["simclr", "null", "1"],
    ]  # fmt: skip
    [(_, figure)] = means.plots()
    [line] = figure.axes[0].containers
    assert means.plotted_key == "views.num" and line.get_label() == "method relational"
    assert list(line[0].get_xdata()) == [4, 16]


def test_a_varied_size_is_one_column(tmp_path):
    """The test transform follows the config; where one run was measured under two, these are two columns."""
    runs = [run_with(tmp_path / f"{lr}", 1, 50.0, lr=lr, transform=f"crop {lr}") for lr in (1e-3, 1e-2)]
    assert [result["name"] for result in Ablation(report.over_seeds(runs)).results] == ["knn5_top1"]
    run_with(tmp_path / "0.01", 1, 60.0, lr=1e-2, transform="short side to 64, centre crop 64, mean")
    means = Ablation(report.over_seeds(runs))
    assert [means.result_head(result) for result in means.results] == [f"knn5_top1 #{n}" for n in (1, 2, 3)]


@pytest.mark.filterwarnings("error::UserWarning")  # of a plot that its legend leaves no room
def test_a_key_that_only_a_run_in_the_middle_has_is_varied(tmp_path, capsys):
    """A third group of views in B: A and B are two rows, whatever stands around them."""
    groups = {"a": (2, 2), "b": (2, 2, 2), "c": (2, 2)}
    runs = [
        run_with(tmp_path / name, 1, 50.0 + number, lr=[0.1, 0.1, 0.01][number], views=None, groups=nums)
        for number, (name, nums) in enumerate(groups.items())
    ]
    means = Ablation(report.over_seeds(runs))
    assert {"optim.lr", "views.groups.2.num"} <= set(means.keys)
    values = {group.run: means.mean(group, means.results[0]).mean for group in means.groups}
    assert values == {"a": 50.0, "b": 51.0, "c": 52.0}
    assert cli.main(["report", *map(str, runs), "--latex", str(tmp_path / "t.tex")]) == 0
    assert all(f" & {value:.2f} \\\\" in (tmp_path / "t.tex").read_text() for value in values.values())


def test_no_mean_takes_anothers_cell(tmp_path):
    runs = [run_with(tmp_path / f"{lr}", 1, 50.0, lr=lr) for lr in (1e-3, 1e-2)]
    records = [record | {"varied": {}} for record in report.over_seeds(runs)]
    means = Ablation(records)
    with pytest.raises(AssertionError, match="two means in one cell"):
        means.mean(means.groups[0], means.results[0])


def test_nothing_to_plot_against(tmp_path, capsys):
    runs = [str(run_with(tmp_path / f"{seed}", seed, 50.0 + seed)) for seed in (1, 2)]
    assert cli.main(["report", *runs, "--figures", str(tmp_path / "plots"), "--csv", str(tmp_path / "t.csv")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --figures ") and "for example of views.num" in said and said.count("\n") == 1
    assert not (tmp_path / "report.html").exists() and not (tmp_path / "t.csv").exists()
    runs.append(str(run_with(tmp_path / "3", 1, 60.0, views=8)))  # the remedy
    assert cli.main(["report", *runs, "--figures", str(tmp_path / "plots")]) == 0
