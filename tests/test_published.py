"""published.yaml: every row says what it is and where it was read; and which rows stand beside a run."""

import pytest

from ssl_dist import backbones, config, methods
from ssl_dist.data.catalog import CATALOG
from ssl_dist.report import published


def settings(method, dataset, backbone, **data):
    tree = {"run_dir": "x", "data": {"name": dataset, "root": "x"} | data, "method": {"name": method},
            "backbone": {"name": backbone}}  # fmt: skip
    return config.validate(config.Config, tree)


@pytest.mark.parametrize("row", published.read(), ids=lambda row: f"{row.method}-{row.dataset}-{row.backbone}")
def test_a_row_is_of_what_there_is_and_names_its_source(row):
    assert row.method in methods.names() and row.dataset in CATALOG
    assert row.backbone is None or row.backbone in backbones.names()
    assert 0 < row.value < 100 and len(row.source) > 20 and len(row.protocol) > 10


def test_no_row_stands_twice():
    keys = [(row.method, row.dataset, row.backbone, row.variant, row.result) for row in published.read()]
    assert len(keys) == len(set(keys))


def test_the_rows_beside_a_run():
    values = lambda *names, **data: [row.value for row in published.beside(settings(*names, **data))]  # noqa: E731
    assert values("sfrik", "imagenet", "resnet50") == [70.3]
    assert values("sfrik", "imagenet", "resnet50", subset={"per_class": 260}) == []
    assert values("sfrik", "imagenet", "resnet50", limit=1000) == []
    assert values("sfrik", "imagenet", "resnet18") == [] == values("sfrik", "cifar10", "resnet50")
    assert values("relational", "cifar10", "conv4") == [61.03]  # of a source that names no backbone
    assert values("relic", "stl10", "resnet18") == [77.12] and values("sela", "cifar10", "alexnet") == [83.4, 77.6]
