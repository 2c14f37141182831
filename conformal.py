"""Decisions about new images from normal scores alone: p-values, the threshold, and what a false-alarm rate promises.

Tensors and numbers in and out; knows nothing of images, networks or files.
Sources: Vovk, "Cross-conformal predictors", Ann. Math. Artif. Intell. 74 (2015); Barber, Candes, Ramdas, Tibshirani,
"Predictive inference with the jackknife+", Ann. Statist. 49 (2021) (CV+ and its bound); Vovk, "Conditional validity of
inductive conformal predictors", ACML 2012 (the Beta distribution of split conformal prediction).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = {  # where normal scores come from: what the rate is worth
    "split": "no network has seen the normal images that it is compared with: the rate holds on average",
    "cross": "each normal image is scored by a network that has not seen it: the rate is what to expect",
    "seen": "the network has seen the normal images that it is compared with: nothing is promised for new ones",
}
INTERVAL = 0.9  # share of calibration sets whose rate lies within what is reported
ROUNDING = 1e-9  # of rate * (n + 1), which is meant to be a whole number where it is nearly one


# p-values ---------------------------------------------------------------------------------------------------------


def p_values(scores: Tensor, normal: Sequence[Tensor]) -> Tensor:
    """Conformal p-values (B,) in [1 / (n + 1), 1], float64, of new images: the share of normal images, the new one
    counted among them, whose score is at least the new image's under the same member.

    scores: (K, B), the new images' by each of K members. normal: of each member, the scores (n_k,) of the normal images
    that are compared with it. One member: split conformal prediction; several, each with its fold: cross-conformal.
    A p-value is small where few normal images look as unusual; it is no probability of a defect.
    """
    at_least = torch.zeros(scores.shape[1], dtype=torch.int64, device=scores.device)
    for own, known in zip(scores, normal, strict=True):
        at_least += len(known) - torch.searchsorted(known.to(own).sort().values, own.contiguous())
    return (1 + at_least).double() / (1 + sum(map(len, normal)))


def leave_one_out_p_values(scores: Tensor) -> Tensor:
    """Of normal scores (n,) themselves, in [1 / n, 1], float64: (1 + the number of others at least as high) / n."""
    return (len(scores) - torch.searchsorted(scores.sort().values, scores.contiguous())).double() / len(scores)


def conformal_threshold(scores: Tensor, rate: float) -> tuple[Tensor, bool]:
    """The ceil((1 - rate)(n + 1))-th smallest of n normal scores (n,), as in split conformal prediction: a new score,
    exchangeable with them, lies above it with a probability of at most ``rate``. False, with the largest score, if n
    is too small for that: n >= 1 / rate - 1 is needed."""
    rank = max(1, math.ceil((1 - rate) * (len(scores) + 1) - ROUNDING))
    return scores.sort().values[min(rank, len(scores)) - 1], rank <= len(scores)


# What is promised -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FalseAlarmGuarantee:
    """What calling an image anomalous where p <= ``rate`` promises.

    kind: of KINDS. count: n, of normal scores. asked: the false-alarm rate that was asked for.
    """

    kind: str
    count: int
    asked: float

    @property
    def finest(self) -> float:
        """The smallest p-value that can be."""
        return 1 / (self.count + 1)

    @property
    def holds(self) -> bool:
        """Whether there are normal images enough for the rate that was asked for."""
        return self.asked * (self.count + 1) >= 1 - ROUNDING

    @property
    def needed(self) -> float:
        """Normal images that the rate needs; infinity for a rate of 0."""
        return math.ceil(1 / self.asked - 1 - ROUNDING) if self.asked else math.inf

    @property
    def rate(self) -> float:
        """The largest p-value that is called anomalous: what was asked for, or the finest if that is larger. A whole
        number of (n + 1)-ths, so it is the expected rate too."""
        return max(1, math.floor(self.asked * (self.count + 1) + ROUNDING)) / (self.count + 1)

    @property
    def interval(self) -> tuple[float, float]:
        """Between which the rate lies for INTERVAL of all sets of n normal images; it depends on the set at hand. Of
        several folds it is that of as many images held out, which is only nearly theirs."""
        rank = round(self.rate * (self.count + 1))
        tail = (1 - INTERVAL) / 2
        return beta_quantile(tail, rank, self.count + 1 - rank), beta_quantile(1 - tail, rank, self.count + 1 - rank)

    @property
    def bound(self) -> float | None:
        """What is proven of the expected rate: of folds twice the rate and sqrt(2 / n), of images held out the rate."""
        if self.kind == "seen":
            return None
        return self.rate if self.kind == "split" else min(1.0, 2 * self.rate + math.sqrt(2 / self.count))

    def words(self) -> str:
        """All of it in a few sentences."""
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
        return text


def proportion_interval(count: int, total: int) -> tuple[float | None, float | None]:
    """Clopper and Pearson's 95 % interval of a share, of which ``count`` of ``total`` were seen; None of none."""
    if not total:
        return None, None
    return beta_quantile(0.025, count, total - count + 1), beta_quantile(0.975, count + 1, total - count)


def beta_quantile(q: float, a: float, b: float) -> float:
    """Of Beta(a, b); where a or b is 0 all lies at 0 or at 1."""
    from scipy.special import betaincinv  # scipy.stats takes a second to import, for each command

    return float(betaincinv(a, b, q)) if a and b else float(b == 0)
