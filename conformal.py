"""Decisions from the scores of normal images alone: p-values, the threshold, and what a false-alarm rate guarantees.

Tensors and numbers in and out; knows nothing of images, networks or files. Imports torch only where tensors come in.
Sources: Vovk, "Cross-conformal predictors", Ann. Math. Artif. Intell. 74 (2015); Barber, Candes, Ramdas, Tibshirani,
"Predictive inference with the jackknife+", Ann. Statist. 49 (2021) (CV+ and its bound); Vovk, "Conditional validity of
inductive conformal predictors", ACML 2012 (the Beta distribution of split conformal prediction).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

KINDS = {  # where the calibration scores come from: what the rate is worth
    "split": "no network has seen the normal images that it is compared with: the rate holds on average",
    "cross": "each normal image is scored by a network that has not seen it: the rate is what to expect",
    "seen": "the network has seen the normal images that it is compared with: nothing is promised for new ones",
}
POWERS_OF_TEN = [10**exponent for exponent in range(2, 12)]  # of parts, so that some will be called bad
INTERVAL = 0.9  # share of calibration sets whose rate lies in the reported interval
ROUNDING = 1e-9  # tolerance of rate * (n + 1): nearly a whole number means that whole number
BY_HAND = "The rate was set by hand"


# p-values ---------------------------------------------------------------------------------------------------------


def p_values(scores: "Tensor", normal: "Sequence[Tensor]") -> "Tensor":
    """Return conformal p-values (B,) of new images, float64 in [1 / (n + 1), 1]: the share of normal images, the new
    one counted among them, that score at least as high as the new image under the same ensemble member.

    scores: (K, B), of the new images by each of K members. normal: for each member the calibration scores (n_k,) that
    its scores are compared with. One member: split conformal prediction; K members, a fold each: cross-conformal.
    A small p-value means that few normal images look as unusual. It is not the probability of a defect.
    """
    import torch

    at_least = torch.zeros(scores.shape[1], dtype=torch.int64, device=scores.device)
    for member_scores, calibration in zip(scores, normal, strict=True):
        # Each compared with each, not searched in order: ONNX knows no such search, and they are few
        at_least += (calibration.to(member_scores)[:, None] >= member_scores).sum(0)
    return (1 + at_least).double() / (1 + sum(map(len, normal)))


def leave_one_out_p_values(scores: "Tensor") -> "Tensor":
    """Return leave-one-out p-values of the calibration scores (n,), float64 in [1 / n, 1]:
    (1 + number of others at least as high) / n."""
    import torch

    return (len(scores) - torch.searchsorted(scores.sort().values, scores.contiguous())).double() / len(scores)


def conformal_threshold(scores: "Tensor | np.ndarray", rate: float) -> "tuple[Tensor | np.floating, bool]":
    """Return the ceil((1 - rate)(n + 1))-th smallest of n calibration scores (n,), as in split conformal prediction,
    and whether n >= 1 / rate - 1, which the rate needs. If n is smaller, return the largest score and False.

    A new score, exchangeable with them, lies above the threshold with a probability of at most ``rate``.
    """
    rank = max(1, math.ceil((1 - rate) * (len(scores) + 1) - ROUNDING))
    return scores[scores.argsort()][min(rank, len(scores)) - 1], rank <= len(scores)


# What is guaranteed -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FalseAlarmGuarantee:
    """How often normal images are called anomalous if that is done where p <= ``rate``.

    kind: a key of KINDS. count: n, the number of calibration scores. asked: the false-alarm rate asked for, in [0, 1].
    chosen: how that was chosen, in words, if labelled images have chosen it, or BY_HAND.
    """

    kind: str
    count: int
    asked: float
    chosen: str = ""

    @property
    def finest(self) -> float:
        """Return the smallest possible p-value."""
        return 1 / (self.count + 1)

    @property
    def holds(self) -> bool:
        """Return whether there are enough normal images for the rate that was asked for."""
        return self.asked * (self.count + 1) >= 1 - ROUNDING

    @property
    def needed(self) -> float:
        """Return how many normal images the rate needs; infinity for a rate of 0."""
        return math.ceil(1 / self.asked - 1 - ROUNDING) if self.asked else math.inf

    @property
    def rate(self) -> float:
        """Return the largest p-value that is called anomalous: the rate asked for, or the finest p-value if that is
        larger, rounded down to a multiple of 1 / (n + 1). So it is the expected false-alarm rate too."""
        return max(1, math.floor(self.asked * (self.count + 1) + ROUNDING)) / (self.count + 1)

    @property
    def interval(self) -> tuple[float, float]:
        """Return the interval that holds the rate for INTERVAL of all sets of n calibration scores: the rate depends
        on the set at hand. Exact for held-out images ("split"), nearly so for folds ("cross")."""
        rank = round(self.rate * (self.count + 1))
        tail = (1 - INTERVAL) / 2
        return beta_quantile(tail, rank, self.count + 1 - rank), beta_quantile(1 - tail, rank, self.count + 1 - rank)

    @property
    def bound(self) -> float | None:
        """Return the proven bound of the expected rate: for "split" the rate, for "cross" twice the rate plus
        sqrt(2 / n), for "seen" None."""
        if self.kind == "seen":
            return None
        return self.rate if self.kind == "split" else min(1.0, 2 * self.rate + math.sqrt(2 / self.count))

    def advice(self) -> str:
        """Return in plain words how many good parts will be called bad, and what to do for the rate asked for."""
        if self.kind == "seen":
            text = "How many good parts will be called bad is not known: train with --folds 5 to know"
        else:
            parts = next(parts for parts in POWERS_OF_TEN if round(parts * self.rate) >= 1)
            low, high = self.interval
            bad = f"About {parts * self.rate:.0f} of {parts:,} good parts will be called bad"
            text = f"{bad} ({math.floor(parts * low)} to {math.ceil(parts * high)})"
        if not self.holds and self.asked:
            parts = next(parts for parts in POWERS_OF_TEN if round(parts * self.asked) >= 1)
            enough = "have --holdout keep" if self.kind == "split" else "train on"
            text += f". For {parts * self.asked:.0f} of {parts:,}, {enough} {self.needed:,} or more good photographs"
        return f"{text}. {self.chosen}" if self.chosen else text

    def words(self) -> str:
        """Return all of it in a few sentences, for who wants to know."""
        low, high = (f"{100 * value:.2g}" for value in self.interval)
        text = f"anomalous where p <= {self.rate:.3g}, from {self.count} normal images (finest p: {self.finest:.2g}); "
        text += KINDS[self.kind]
        if self.kind != "seen":
            text += f", {100 * self.rate:.2g} % false alarms, between {low} and {high} % for 90 of 100 such sets"
        if self.kind == "cross":
            text += f"; proven are at most {100 * self.bound:.2g} %"
        if not self.holds:
            needed = "infinitely many" if math.isinf(self.needed) else self.needed
            text += f". A rate of {self.asked:g} needs {needed} normal images, not {self.count}"
        if self.chosen:
            text += f". {self.chosen}"
        return text


def proportion_interval(count: int, total: int) -> tuple[float | None, float | None]:
    """Return Clopper and Pearson's 95 % interval of a proportion, from ``count`` of ``total``; (None, None) if total is
    0."""
    if not total:
        return None, None
    from scipy.stats import binomtest  # imported late: it takes a second

    interval = binomtest(count, total).proportion_ci(method="exact")
    return float(interval.low), float(interval.high)


def beta_quantile(q: float, a: int, b: int) -> float:
    """Return the quantile ``q`` of Beta(a, b), of whole numbers: 0 where a is 0, 1 where b is 0.

    It is at most x as often as a or more of a + b - 1 throws hit, each with probability x. scipy takes half a second to
    import.
    """
    if not (a and b):
        return float(b == 0)
    throws, low, high = a + b - 1, 0.0, 1.0
    ways = [math.lgamma(throws + 1) - math.lgamma(k + 1) - math.lgamma(throws - k + 1) for k in range(a)]
    for _ in range(60):  # bits
        x = (low + high) / 2
        hit, miss = math.log(x), math.log1p(-x)
        fewer = math.fsum(math.exp(way + k * hit + (throws - k) * miss) for k, way in enumerate(ways))
        low, high = (x, high) if 1 - fewer < q else (low, x)
    return x
