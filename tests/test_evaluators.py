"""Finding evaluators by name, their options, and the order of ties in top-n."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_dist import evaluators
from ssl_dist.errors import UserError
from ssl_dist.results.accuracy import target_rank, top1_and_top5


def test_every_name_is_an_evaluator_with_its_interface_and_documented_options():
    assert {"knn", "logistic"} <= set(evaluators.names())
    for name in evaluators.names():
        module = evaluators.find(name)
        assert not evaluators.flaw(module), name
        sentence = evaluators.protocol(module, module.Options())
        assert sentence and "{" not in sentence


def test_a_misspelt_name_gets_the_nearest():
    with pytest.raises(UserError, match=r"unknown evaluator 'logistics': did you mean 'logistic'\? known: .*knn"):
        evaluators.find("logistics")
    with pytest.raises(UserError, match="unknown evaluator 'results'"):
        evaluators.find("results")


def test_the_names_of_others_get_ours():
    """Every alias leads to an evaluator that is there."""
    words = [(alias, own) for own, aliases in evaluators._ALIASES.items() for alias in aliases]
    for word, own in [("linear_eval", "probe"), ("k-means", "clusters"), ("t-SNE", "embedding"), *words]:
        with pytest.raises(UserError, match=f"unknown evaluator '{word}': did you mean '{own}'"):
            evaluators.find(word)
    assert evaluators._ALIASES.keys() <= set(evaluators.names())


def test_options():
    options = evaluators.parse_options(["knn", "logistic"], ["knn.k=[20,200]", "logistic.c=1e-1"])
    assert options["knn"].k == [20, 200] and options["logistic"].c == 0.1
    assert "C=0.1" in evaluators.protocol(evaluators.find("logistic"), options["logistic"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("knn.kk=[5]", "unknown key knn.kk"),
        ("knn.k=[0]", "knn.k"),
        ("knn.k=[]", "knn.k"),
        ("knn.temperature=[0.001]", "knn.temperature"),
        ("knn.precision=bf16", "knn.precision"),
        ("logistic.c=1", "logistic is not among the evaluators to run: knn"),
        ("kmn.k=[1]", "did you mean 'knn'"),
        ("k=[1]", "write knn.k=[1]"),
        ("lr=1", "write evaluator.option=value"),
        ("knn.k", "write evaluator.option=value"),
        ("knn.k=[1", "not valid YAML"),
    ],
)
def test_wrong_options_are_refused(override, message):
    with pytest.raises(UserError) as caught:
        evaluators.parse_options(["knn"], [override])
    assert message in str(caught.value) and "\n" not in str(caught.value)


@settings(max_examples=50)
@given(st.lists(st.lists(st.integers(0, 2), min_size=4, max_size=4), min_size=1, max_size=5), st.data())
def test_target_rank(scores, data):
    targets = data.draw(st.lists(st.integers(-1, 3), min_size=len(scores), max_size=len(scores)))
    expected = []
    for row, target in zip(scores, targets, strict=True):
        order = sorted(range(4), key=lambda c: (-row[c], c))
        expected.append(order.index(target) if target >= 0 else 2**63 - 1)
    assert target_rank(torch.tensor(scores), torch.tensor(targets)).tolist() == expected


def test_scores_that_are_no_numbers_are_never_right():
    scores = torch.tensor([[math.nan] * 3, [0.0, math.nan, 1.0], [math.nan, 0.0, 1.0], [0.0, -math.inf, math.inf]])
    assert target_rank(scores, torch.tensor([0, 2, 0, 2])).tolist() == [2**63 - 1] * 3 + [0]
    assert top1_and_top5([(scores[:3], torch.tensor([0, 2, 0]))]) == (0.0, 0.0)
