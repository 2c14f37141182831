"""Tensors of a file are what their rules say, or the first that is not is named."""

import math

import pytest
import torch

from runtime.tensors import FLOATS, TensorRule, check_tensors, rules_of, standardization

RULES = {
    "points": TensorRule(("N", "D")),
    "mean": TensorRule(("D",), FLOATS, least=0),
    "count": TensorRule((), (torch.int64,), most=9),
}
GOOD = {
    "points": torch.ones(3, 2, dtype=torch.float64),
    "mean": torch.zeros(2),
    "count": torch.tensor(9),
}


def test_sizes_agree_and_are_told():
    sizes = {"D": 2}
    check_tensors(GOOD, RULES, sizes)
    assert sizes == {"D": 2, "N": 3}
    check_tensors(GOOD | {"mean": torch.zeros(2, dtype=torch.float64)}, RULES, {})


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("mean", None, "mean is no dense tensor"),
        ("mean", torch.zeros(2).to_sparse(), "mean is no dense tensor"),
        ("mean", torch.zeros(2).half(), "mean is torch.float16, not torch.float32 or torch.float64"),
        ("mean", torch.zeros(3), r"mean has the shape \(3,\), not \(2\)"),
        ("mean", torch.zeros(1, 2), r"mean has the shape \(1, 2\), not \(2\)"),
        ("points", torch.zeros((), dtype=torch.float64), r"points has the shape \(\), not \(N, D\)"),
        ("points", GOOD["points"][:1].expand(10**9, 2), "points claims 2000000000 values and holds fewer"),
        ("mean", torch.tensor([0, -1.0]), "mean has values from -1 to 0, not from 0 to inf"),
        ("mean", torch.tensor([0, math.nan]), "mean has values from nan"),
        ("mean", torch.tensor([0, math.inf]), "mean has values from 0 to inf"),
        ("count", torch.tensor(10), "count has values from 10 to 10, not from -inf to 9"),
        ("more", torch.tensor(10), "it has the unknown more"),
    ],
)
def test_what_is_wrong_is_named(name, value, words):
    with pytest.raises(ValueError, match=words):
        check_tensors(GOOD | {name: value}, RULES, {})


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="it lacks count and 2 more"):
        check_tensors({}, RULES, {})


def test_rules_of_a_module():
    state = torch.nn.BatchNorm1d(3).state_dict()
    check_tensors(state, rules_of(state), {})
    with pytest.raises(ValueError, match="running_var has values from -1 to -1"):
        check_tensors(state | {"running_var": -torch.ones(3)}, rules_of(state), {})


def test_what_stands_alone_is_not_standardized():
    zero, one, two = torch.tensor([0, 1, 2], dtype=torch.float64)
    check_tensors({"center": zero, "scale": one}, standardization(alone=True), {})
    check_tensors({"center": one, "scale": two}, standardization(alone=False), {})
    for alone, scale in ((True, two), (False, zero), (False, -one)):
        with pytest.raises(ValueError, match="scale has values from"):
            check_tensors({"center": zero, "scale": scale}, standardization(alone), {})
