"""p-values and what a false-alarm rate guarantees, against slow loops and simulated calibration scores."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import beta, binom

from conformal import (
    FalseAlarmGuarantee,
    beta_quantile,
    conformal_threshold,
    leave_one_out_p_values,
    p_values,
    proportion_interval,
)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# p-values ---------------------------------------------------------------------------------------------------------


def slow_p_value(scores, normal):
    """Of one image: scores (K,) by each member; normal: of each member, the scores of its fold."""
    count, at_least = 0, 0
    for score, fold in zip(scores, normal):
        for other in fold:
            count += 1
            at_least += other >= score
    return (1 + at_least) / (1 + count)


@pytest.mark.parametrize(("count", "members"), [(12, 1), (1, 1), (13, 3), (11, 11), (200, 5)])
def test_p_values_are_those_of_a_slow_loop(count, members):
    calibration = torch.randint(0, 12, (count,), generator=seeded(count)).double()  # many ties
    normal = [calibration[k::members] for k in range(members)]
    scores = torch.randint(-2, 15, (members, 40), generator=seeded(1)).double()
    expected = [slow_p_value(scores[:, i].tolist(), [fold.tolist() for fold in normal]) for i in range(40)]
    assert p_values(scores, normal).tolist() == expected
    others = [torch.cat([calibration[:i], calibration[i + 1 :]]).tolist() for i in range(count)]
    alone = [slow_p_value([score], [rest]) for score, rest in zip(calibration.tolist(), others)]
    assert leave_one_out_p_values(calibration).tolist() == alone


def test_a_p_value_is_between_the_finest_and_one():
    normal = [torch.arange(9.0, dtype=torch.float64)]
    assert p_values(torch.tensor([[-1.0, 0, 8, 8.5]]).double(), normal).tolist() == [1, 1, 0.2, 0.1]
    assert p_values(torch.tensor([[3.0]]), [torch.empty(0)]).tolist() == [1]


@pytest.mark.parametrize("rate", [0, 0.005, 0.01, 0.2, 0.35, 1])
@pytest.mark.parametrize("count", [1, 9, 99, 100])
def test_of_one_member_the_p_value_decides_as_the_threshold(count, rate):
    normal = torch.rand(count, generator=seeded(1)).double()
    scores = torch.cat([normal, torch.linspace(-0.1, 1.1, 301).double()])
    by_p = p_values(scores[None], [normal]) <= FalseAlarmGuarantee("split", count, rate).rate
    if rate < 1:  # then the threshold is the smallest score, which is itself not above
        assert torch.equal(by_p, scores > conformal_threshold(normal, rate)[0])
    assert by_p.all() == (rate == 1)


# The threshold, and what is guaranteed ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "asked", "rank", "holds", "rate", "needed"),
    [
        (99, 0.01, 99, True, 0.01, 99),
        (98, 0.01, 98, False, 1 / 99, 99),
        (209, 0.01, 208, True, 2 / 210, 99),
        (9, 0.2, 8, True, 0.2, 4),
        (9, 0, 9, False, 0.1, math.inf),
        (9, 1, 1, True, 1, 0),
        (19, 0.05, 19, True, 0.05, 19),
    ],
)
def test_threshold_and_rate_are_whole_numbers_of_ranks(count, asked, rank, holds, rate, needed):
    scores = torch.arange(1.0, count + 1)[torch.randperm(count, generator=seeded(0))]
    assert conformal_threshold(scores, asked) == conformal_threshold(scores.numpy(), asked) == (rank, holds)
    guarantee = FalseAlarmGuarantee("split", count, asked)
    assert (guarantee.rate, guarantee.holds, guarantee.needed) == (rate, holds, needed)
    assert guarantee.finest == 1 / (count + 1)


def test_the_false_alarm_rate_holds():
    """The mean over many calibration sets of the chance that a new score lies above; a quantile between scores, as
    NumPy takes it, gives more than was asked for."""
    sets = torch.rand(4000, 60, generator=seeded(0))
    above = [1 - conformal_threshold(scores, 0.05)[0].item() for scores in sets]
    assert np.mean(above) == pytest.approx(1 - 58 / 61, abs=2e-3)
    assert np.mean(above) < 0.05 < 1 - sets.quantile(0.95, dim=1).mean()


def test_the_interval_holds_nine_of_ten_calibration_sets():
    guarantee = FalseAlarmGuarantee("split", 59, 0.05)  # 3 of 60
    sets = torch.rand(20_000, 59, generator=seeded(0)).double()
    rates = 1 - sets.sort(1).values[:, -3]  # of new uniform scores above the third largest
    low, high = guarantee.interval
    assert rates.mean() == pytest.approx(guarantee.rate, abs=1e-3)
    assert [(rates < low).double().mean(), (rates > high).double().mean()] == pytest.approx([0.05, 0.05], abs=5e-3)
    assert FalseAlarmGuarantee("split", 9, 1).interval == (1, 1)


@pytest.mark.parametrize("q", [0.05, 0.5, 0.95])
@pytest.mark.parametrize(("a", "b"), [(1, 1), (1, 99), (99, 1), (3, 207), (2000, 8000), (9999, 1)])
def test_quantiles_are_those_of_the_beta_distribution(q, a, b):
    assert beta_quantile(q, a, b) == pytest.approx(beta.ppf(q, a, b), rel=1e-9)


def test_what_is_proven_and_its_words():
    assert FalseAlarmGuarantee("split", 99, 0.01).bound == 0.01
    assert FalseAlarmGuarantee("cross", 200, 0.05).bound == pytest.approx(2 * 10 / 201 + 0.1)
    assert FalseAlarmGuarantee("seen", 200, 0.05).bound is None
    text = FalseAlarmGuarantee("cross", 60, 0.01).words()
    assert "p <= 0.0164, from 60 normal images" in text
    assert "needs 99 normal images, not 60" in text
    seen = FalseAlarmGuarantee("seen", 200, 0.01).words()
    assert "nothing is promised" in seen
    assert "needs" not in seen


@pytest.mark.parametrize(
    ("guarantee", "advice"),
    [
        (
            ("cross", 32, 0.01),
            "About 3 of 100 good parts will be called bad (0 to 9). For 1 of 100, train on 99 or more good photographs",
        ),
        (("cross", 400, 0.05), "About 5 of 100 good parts will be called bad (3 to 7)"),
        (("split", 5000, 0.001), "About 1 of 1,000 good parts will be called bad (0 to 2)"),
        (
            ("split", 20, 0.002),
            "About 5 of 100 good parts will be called bad (0 to 14). "
            "For 2 of 1,000, have --holdout keep 499 or more good photographs",
        ),
        (("seen", 200, 0.01), "How many good parts will be called bad is not known: train with --folds 5 to know"),
        (("cross", 9, 0), "About 10 of 100 good parts will be called bad (0 to 29)"),
    ],
)
def test_advice_in_plain_words(guarantee, advice):
    assert FalseAlarmGuarantee(*guarantee).advice() == advice
    assert FalseAlarmGuarantee(*guarantee, "Labels chose it").advice() == f"{advice}. Labels chose it"


@pytest.mark.parametrize(("count", "total"), [(0, 20), (3, 41), (20, 20)])
def test_the_interval_of_a_proportion_is_clopper_and_pearsons(count, total):
    low, high = proportion_interval(count, total)
    if count:  # at its ends, what was seen or more extreme is just as rare as one in forty
        assert binom.sf(count - 1, total, low) == pytest.approx(0.025)
    if count < total:
        assert binom.cdf(count, total, high) == pytest.approx(0.025)
    assert low <= count / total <= high
    assert proportion_interval(0, 0) == (None, None)
