"""published.yaml: every row says what it is and where it was read; and which results may stand beside its number."""

import pytest

from ssl_dist import backbones, config, evaluators, methods
from ssl_dist.data.catalog import CATALOG
from ssl_dist.report import published, scores
from ssl_dist.report.run import Run

ROWS = published.read()
OTHER_METHODS = {"moco_v2"}  # that a source compares its own with
# What every evaluator trains; what is not here measures nothing that was published.
TRAINED = {"probe": "linear classifier", "logistic_calibrated": "linear classifier", "finetune": "whole network",
           "knn": "nothing", "classify": "nothing"}  # fmt: skip


def settings(method, dataset, backbone, options=None, **data):
    tree = {"run_dir": "x", "data": {"name": dataset, "root": "x"} | data, "backbone": {"name": backbone},
            "method": {"name": method, "options": options or {}}}  # fmt: skip
    return config.validate(config.Config, tree)


def of_row(row, **data):
    """The config of a run of the row's method, data set, backbone and variant."""
    return settings(row.method, row.dataset, row.backbone, row.options, **data)


def result(row, **changes):
    """A result that was measured as the row's number."""
    name = row.protocol.results[0].replace("*", "5") if row.protocol.results else "probe_top1"
    options = {"epochs": None, "lr": None} | row.protocol.options
    return {
        "name": name, "value": 50.0, "protocol": "as in the paper", "options": options, "split": row.split or "test",
        "dataset": row.measured_on or row.dataset, "method": row.method, "backbone": row.backbone, "step": 780,
    } | changes  # fmt: skip


def name_of(row):
    return f"{row.method}-{row.dataset}-{row.backbone}-{row.value}"


def test_differences_name_their_source():
    for row in published.differences_between():
        fields = methods.find(row.method).Options.model_fields.keys()
        assert {*row.options, *row.before} <= fields and row.lowest <= row.highest
        assert len(row.source) > 20 and row.line


comparable = [row for row in ROWS if row.protocol.results]


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_a_row_is_of_what_there_is_and_names_its_source(row):
    assert row.method in {*methods.names(), *OTHER_METHODS} and row.backbone in backbones.names()
    assert 0 < row.value < 100 and len(row.source) > 20 and row.line and len(row.protocol.text) > 10
    assert row.split in (None, CATALOG[row.measured_on or row.dataset].evaluation) and row.dataset in CATALOG
    if row.method in methods.names():
        assert row.options.keys() <= methods.find(row.method).Options.model_fields.keys()
    protocol = row.protocol
    assert (protocol.evaluator is None) == (not protocol.results), "an evaluator and the names of its results"
    if protocol.evaluator is not None:
        assert protocol.trained == TRAINED[protocol.evaluator]
        assert all(name.startswith(protocol.evaluator) and name.endswith("_top1") for name in protocol.results)
        evaluators.build_options(protocol.evaluator, protocol.options)
        assert row.split is not None


def test_no_row_stands_twice():
    keys = [(row.method, row.dataset, row.backbone, row.variant, row.result) for row in ROWS]
    assert len(keys) == len(set(keys))


def test_a_number_and_the_place_where_it_was_read():
    """Some of them, once more by hand: methods' names, data sets and numbers are easily confused."""
    told = {(row.method, row.dataset, row.backbone): [] for row in ROWS}
    for row in ROWS:
        told[row.method, row.dataset, row.backbone].append((row.value, row.std))
    assert told["relational", "cifar100", "resnet32"] == [(46.2, None)]
    assert told["simclr", "cifar100", "resnet32"] == [(42.13, 0.35)]
    assert told["supervised", "stl10", "resnet34"] == [(69.82, 3.36)]
    assert told["rotation", "slimagenet64", "resnet34"] == [(7.2, None)]
    assert [value for value, _ in told["sela", "imagenet", "resnet50"]] == [
        30.5, 0.657, 0.42, 0.162, 63.5, 38.1, 0.757, 0.528, 0.276, 68.8, 67.2,
    ]  # fmt: skip
    assert told["relic", "cifar10", "resnet18"] == [(71.07, None)]


def test_the_rows_beside_a_run():
    values = lambda *names, **data: [row.value for row in published.beside(settings(*names, **data))]  # noqa: E731
    assert values("sfrik", "imagenet", "resnet50") == [70.3]
    assert values("sfrik", "imagenet", "resnet18") == [] == values("sfrik", "cifar10", "resnet50")
    assert values("relational", "cifar10", "conv4") == [61.03]
    assert values("relational", "cifar10", "resnet32") == [75, 67.8]
    assert values("relic", "stl10", "resnet18") == [77.12, 76.1]
    assert values("sela", "cifar10", "alexnet") == [83.4, 77.6]


def test_a_number_never_stands_beside_another_backbone_or_data_set():
    for one in ROWS:
        for other in ROWS:
            if one.method in OTHER_METHODS or (one.backbone, one.dataset) == (other.backbone, other.dataset):
                continue
            run = settings(one.method, other.dataset, one.backbone)
            assert (other in published.beside(run)) == ((one.method, one.backbone) == (other.method, other.backbone))
            assert not published.agrees(other, result(other, backbone=one.backbone, dataset=one.dataset))


@pytest.mark.parametrize(
    "part", [{"subset": {"per_class": 260}}, {"limit": 1000}, {"split": "train_of_mine"}, {"labels": {"file": "x.csv"}}]
)
def test_a_run_on_a_part_of_the_images_meets_no_number(part):
    for row in ROWS:
        if row.method in methods.names():
            assert published.beside(of_row(row)) and not published.beside(of_row(row, **part))
            assert not published.measured_alike(row, of_row(row, **part), [result(row)])


def test_a_split_that_the_method_does_not_train_on_by_itself():
    assert published.beside(settings("relational", "stl10", "resnet34", split="unlabeled"))
    assert not published.beside(settings("relational", "stl10", "resnet34", split="train")), "5,000 of 105,000 images"
    assert published.beside(settings("supervised", "stl10", "resnet34", split="train"))


@pytest.mark.parametrize("row", comparable, ids=name_of)
def test_a_result_agrees_in_all_that_counts(row):
    run = of_row(row)
    alike = lambda **changes: published.measured_alike(row, run, [result(row, **changes)])  # noqa: E731
    assert alike() == [result(row)]
    assert alike(options={"epochs": 5} | row.protocol.options), "it is named, see below"
    trained = {"knn": "knn20_top1", "finetune": "finetune_top1", "probe": "probe_top1", "logistic": "logistic_top1",
               "classify": "classify_top1", "logistic_calibrated": "logistic_calibrated_top1"}  # fmt: skip
    for evaluator, name in trained.items():
        assert bool(alike(name=name)) == (evaluator == row.protocol.evaluator and "conv" not in row.protocol.results[0])
    for name in ("probe_top5", "logistic_train_top1", "knn20_top5", "clusters_nmi", "finetune_top5"):
        assert not alike(name=name)
    for split in ("train[held out 10%]", "train", "train[held out 260 images a class from number 260]", "unlabeled"):
        assert not alike(split=split)
    assert not alike(dataset="cifar100" if row.dataset != "cifar100" else "cifar10")
    assert not alike(protocol="as in the paper; fitted on 20 images a class of train")
    for key in row.protocol.options:
        assert not alike(options=row.protocol.options | {key: "another"})
        assert not alike(options={}), "a record that does not tell"
    for key in row.options:
        other = settings(row.method, row.dataset, row.backbone, row.options | {key: "another"})
        assert not published.measured_alike(row, other, [result(row)])


def test_a_transfer_is_measured_on_the_data_set_that_it_names():
    row = next(row for row in ROWS if row.dataset == "cifar100").model_copy(update={"measured_on": "cifar10"})
    assert published.agrees(row, result(row)) and result(row)["dataset"] == "cifar10"
    assert not published.agrees(row, result(row, dataset="cifar100"))


def test_where_the_source_does_not_tell_the_images_nothing_agrees():
    row = next(row for row in ROWS if row.split is None)
    opened = row.model_copy(update={"protocol": comparable[0].protocol})
    assert not published.agrees(opened, result(opened, name="probe_top1"))


# ---------------------------------------------------------------------------------------------------- on the page


def run_of(row, tmp_path, epoch=2.0, **sections):
    tree = config.to_tree(of_row(row)) | {"run_dir": str(tmp_path)} | sections
    lines = [{"step": 390, "epoch": epoch / 2}, {"step": 780, "epoch": epoch}]
    return Run(tmp_path, "run", config.validate(config.Config, tree), trains=True, lines=lines)


def test_what_differs_is_named(tmp_path):
    row = next(row for row in ROWS if (row.method, row.backbone) == ("relational", "conv4"))
    short = run_of(row, tmp_path, views={"num": 8}, optim={"batch_size": 128})
    first_three = ["200 epochs, here 2", "batches of 64, here of 128", "K = 32, here 8"]
    assert scores.differences(short, row, result(row)) == [*first_three, "mean of 3 seeds, here of one"]
    equal = run_of(row, tmp_path, 200.0, views={"num": 32}, optim={"batch_size": 64})
    assert scores.differences(equal, row, result(row)) == ["mean of 3 seeds, here of one"]
    assert scores.differences(equal, row, result(row, step=390))[0] == "200 epochs, here 100", "of its checkpoint"
    changed = result(row, options={"recipe": "relational", "epochs": 5, "lr": None})
    assert scores.differences(equal, row, changed)[1:] == ["here probe.epochs=5"]
    begun = run_of(row, tmp_path, 200.0, views={"num": 32}, optim={"batch_size": 64},
                   backbone={"name": "conv4", "weights": "w"})  # fmt: skip
    assert "here it began from weights of a file" in scores.differences(begun, row, result(row))
    equal.lines.clear()
    assert scores.differences(equal, row, result(row))[0] == "200 epochs, here unknown"


def test_crops_that_differ_are_named(tmp_path):
    row = next(row for row in ROWS if row.protocol.crops == 10)
    run = run_of(row, tmp_path)
    assert "10 crops of a test image, here 1" in scores.differences(run, row, result(row, protocol="centre crop"))
    for ten in ({"protocol": "the mean over ten crops"}, {"options": {"recipe": "sela_alexnet", "crops": 10}}):
        assert not any("crops" in words for words in scores.differences(run, row, result(row, **ten)))


def test_why_no_result_stands_there(tmp_path):
    by_value = {row.value: row for row in ROWS}
    why = lambda value: scores.missing(run_of(by_value[value], tmp_path), by_value[value])  # noqa: E731
    assert why(61.03) == f"not measured yet: `ssl-dist evaluate {tmp_path} probe probe.recipe=relational`"
    assert why(89.67) == f"not measured yet: `ssl-dist evaluate {tmp_path} finetune finetune.recipe=relational_stl10`"
    assert why(69.82) == f"not measured yet: `ssl-dist evaluate {tmp_path} classify`"
    assert why(67.8) == why(0.505) == "the source does not tell which images were measured"
    row = by_value[42.1]
    ten_heads = run_of(row, tmp_path, method={"name": "sela", "options": {"heads": 10, "clusters": 3000}})
    assert scores.missing(ten_heads, row) == "of another variant: heads 1, clusters 1000"
    transfer = by_value[46.2].model_copy(update={"measured_on": "cifar10"})
    told = scores.missing(run_of(by_value[46.2], tmp_path), transfer)
    assert told.endswith("probe.recipe=relational data.name=cifar10 data.root=data/cifar10`")
