"""Which split serves for what."""

import pytest

from ssl_dist.data.catalog import CATALOG, SplitRoles, split_roles


@pytest.mark.parametrize(
    ("name", "present", "expected"),
    [
        ("stl10", ("unlabeled", "train", "test"), ("unlabeled", "train", "test")),
        ("imagenet", ("train", "val"), ("train", "train", "val")),
        ("tiny-imagenet", ("train", "val"), ("train", "train", "val")),
        ("cifar10", ("train", "test"), ("train", "train", "test")),
        ("digits", ("train", "test"), ("train", "train", "test")),
        # a folder of one's own
        ("birds", ("train", "val", "test"), ("train", "train", "test")),
        ("birds", ("train", "val"), ("train", "train", "val")),
        ("birds", ("unlabeled", "train", "test"), ("unlabeled", "train", "test")),
        ("birds", ("unlabeled",), ("unlabeled", "train", "val")),
        # a known set of which other splits were converted
        ("stl10", ("train", "val"), ("train", "train", "val")),
        ("imagenet", ("train", "test"), ("train", "train", "test")),
    ],
)
def test_splits(name, present, expected):
    assert split_roles(name, dict.fromkeys(present, True)) == SplitRoles(*expected)


@pytest.mark.parametrize("name", ["birds", "cifar10"])
def test_a_test_split_without_labels_evaluates_nothing(name):
    assert split_roles(name, {"train": True, "val": True, "test": False}) == SplitRoles("train", "train", "val")


@pytest.mark.parametrize("name", CATALOG)
def test_entries_are_complete(name):
    entry = CATALOG[name]
    assert entry.about and "\n" not in entry.about
    assert entry.image_size <= entry.max_side and entry.raw_side <= entry.max_side
    assert (entry.paper_mean is None) == (entry.paper_std is None)


def test_papers_constants():
    """The values of the official code of relational reasoning."""
    hundred = (0.507, 0.487, 0.441), (0.267, 0.256, 0.276)
    expected = {
        "cifar10": ((0.491, 0.482, 0.447), (0.247, 0.243, 0.262)),
        "cifar100": hundred,
        "supercifar100": hundred,
        "stl10": ((0.5,) * 3, (0.5,) * 3),
        "tiny-imagenet": ((0.5,) * 3, (0.25,) * 3),
        "slimagenet64": ((0.5,) * 3, (0.25,) * 3),
    }
    for name, (mean, std) in expected.items():
        assert (CATALOG[name].paper_mean, CATALOG[name].paper_std) == (mean, std)
