"""Grids of hyper-parameters: their combinations, which one is the best, and what is refused."""

import pytest

from ssl_dist.errors import UserError
from ssl_dist.evaluate import search


def test_every_combination_once_the_last_option_fastest():
    words = ["knn.k=[[1],[5]]", "logistic.c=[0.1,1,10]", "knn.temperature=[[0.07],[0.5]]"]
    spaces = search.search_spaces(["knn", "logistic", "probe"], ["knn.precision=fp64"], words)
    assert set(spaces) == {"knn", "logistic"}
    assert [(c.options.k, c.options.temperature) for c in spaces["knn"].candidates] == [
        ([1], [0.07]), ([1], [0.5]), ([5], [0.07]), ([5], [0.5]),
    ]  # fmt: skip
    assert all(candidate.options.precision == "fp64" for candidate in spaces["knn"].candidates)
    assert [candidate.options.c for candidate in spaces["logistic"].candidates] == [0.1, 1.0, 10.0]
    assert spaces["knn"].candidates[1].words == "knn.k=[1] knn.temperature=[0.5]"
    assert spaces["logistic"].words == "logistic.c=[0.1, 1, 10]"
    assert search.search_spaces(["knn"], [], []) == {}


@pytest.mark.parametrize(
    ("searched", "line"),
    [
        (["knn.k=5"], r"--search knn\.k=5: give a list of the values to try"),
        (["knn.k=[]"], r"--search knn\.k=\[\]: give a list"),
        (["knn.k=2020-01-01"], r"--search knn\.k=.*: give a list"),
        (["knn.k=[[1]]", "knn.k=[[2]]"], r"--search knn\.k=\[\[2\]\]: knn\.k is given twice"),
        (["knn.precision=[fp32]"], r"knn\.precision is given twice"),
        (["knn.kk=[1]"], r"unknown key knn\.kk = 1: did you mean 'k'"),
        (["knn.k=[[5],[0]]"], r"knn\.k.* = 0: input should be greater"),
        (["knn.k=[5]"], r"knn\.k = 5: input should be a valid list"),
        (["logistic.c=[1]"], "logistic is not among the evaluators to run: knn"),
        (["kmn.k=[1]"], "did you mean 'knn'"),
        (["data.root=[a]"], "unknown evaluator 'data'"),
        (["knn"], r"--search knn: write evaluator\.option=\[value, value\]"),
        (["k=[1]"], r"--search k=\[1\]: write"),
        (["knn.k=[1"], "not valid YAML"),
    ],
)
def test_mistakes(searched, line):
    with pytest.raises(UserError, match=line) as caught:
        search.search_spaces(["knn"], ["knn.precision=fp64"], searched)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, float("nan"), float("inf")])
def test_shares_that_leave_nothing(share):
    with pytest.raises(UserError, match=r"--validation .*between 0 and 1"):
        search.check_share(share)


def test_the_best_has_the_highest_top1_and_comes_first():
    def tried(*scores):
        return [
            {"a_top1": score, "a_top5": 100 - score, "a_train_top1": 99.0 - score, "a_train_b_top1": 99.0}
            for score in scores
        ]

    assert search.best_index(tried(50.0, 70.0, 60.0)) == 1
    assert search.best_index(tried(50.0, 70.0, 70.0)) == 1
    assert search.top1({"clusters_majority_top1": 90.0, "clusters_hungarian_top1": 30.0}) == 30, "purity grows with K"
    assert search.top1({"knn5_top1": 3.0, "knn20_top1": 4.0, "knn5_top5": 9.0}) == 4.0
    with pytest.raises(UserError, match="this evaluator gives a_top5, a_train_top1; leave it out"):
        search.top1({"a_top5": 1.0, "a_train_top1": 2.0})
