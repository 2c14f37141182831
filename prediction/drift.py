"""Warn when pictures have changed: compare new images with a detector's normal ones, in looks and in p-values.

Owns what is compared, the tests, and the one line that tells of a change. Knows nothing of networks or files.
Sources: the two-sample tests of Kolmogorov and Smirnov, and of Wilcoxon, Mann and Whitney.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from conformal import FalseAlarmGuarantee
from runtime.files import say
from runtime.looks import STATISTICS, image_statistics

REMEMBERED = 4096  # new images, the latest, that are compared
LEVEL = 0.01  # probability that images like the normal ones are warned about, in a stream without end
FIRST_COMPARISON = 32  # images
FEWEST_COMPARED = 5  # images that are enough at the end: they can tell, all being darker than any of 15 normal ones
SURE = 0.2  # of Kolmogorov's distribution: nothing lies below, to 12 digits


class HasPValues(Protocol):
    """Name what a comparison needs of what a model says."""

    p_values: np.ndarray


class Drift:
    """Say once, on stderr, that images are not like the normal ones. ``on_batch`` is a callback of a Scorer.

    known: what ``image_statistics`` gave for the normal images (n, 3); empty if their detector does not hold it.
    guarantee: the detector's. P-values are compared unless its network has seen the normal images: then they mean
    nothing. warn: called with the words too.

    Images are compared when 32, 64, 128, ... have come, later after every REMEMBERED new images, and at the end; never
    more than the last REMEMBERED. The j-th comparison may warn wrongly with a probability of LEVEL / (j (j + 1)), which
    its tests share equally: over all comparisons that sums to LEVEL.
    """

    def __init__(
        self,
        category: str,
        known: np.ndarray,
        guarantee: FalseAlarmGuarantee,
        warn: Callable[[str], object] = lambda words: None,
    ) -> None:
        self.category, self.known, self.guarantee, self.warn = category, known, guarantee, warn
        self.rank = round(guarantee.rate * (guarantee.count + 1))  # normal images that are called anomalous, plus one
        self.tests = (len(STATISTICS) if len(known) else 0) + (guarantee.kind != "seen")
        self.recent: deque[tuple[float, ...]] = deque(maxlen=REMEMBERED)  # statistics and p-value of an image
        self.count, self.compared, self.comparisons, self.due = 0, 0, 0, FIRST_COMPARISON
        self.warned = False

    def on_batch(
        self, paths: Sequence[str], sizes: Sequence[tuple[int, int]], pixels: np.ndarray, prediction: HasPValues
    ) -> None:
        """Remember images (B, H, W, 3) and compare when it is time; see ``scorer.Callback``."""
        if self.warned or not self.tests:
            return
        looks = image_statistics(pixels.transpose(0, 3, 1, 2))
        self.recent.extend(np.column_stack([looks, prediction.p_values]).tolist())
        self.count += len(pixels)
        if self.count >= self.due:
            self.compare()

    def on_end(self) -> None:
        """Compare what has not been compared yet: no more images come."""
        if not self.warned and self.tests and self.count > self.compared and self.count >= FEWEST_COMPARED:
            self.compare()

    def compare(self) -> None:
        self.comparisons += 1
        self.compared, self.due = self.count, min(2 * self.count, self.count + REMEMBERED)
        level = LEVEL / (self.comparisons * (self.comparisons + 1)) / self.tests
        *columns, p = np.array(self.recent).T
        changes = [
            difference(*names, new, known)
            for names, new, known in zip(STATISTICS, columns, self.known.T)
            if len(known) and same_probability(new, known) <= level
        ]
        probability, words = self.compare_p_values(p)
        if not changes and probability > level:
            return
        self.warned = True
        if words:
            changes.append(words.format("do not show it" if probability > level else "show it"))
        if not words or probability <= level:
            changes.append("the false-alarm rate is not to be relied on")
        self.recent.clear()
        words = f"the pictures have changed ({len(p)} images): {'; '.join(changes)}; see docs/decisions.md"
        say(f"{self.category}: {words}")
        self.warn(words)

    def compare_p_values(self, p: np.ndarray) -> tuple[float, str]:
        """Return the probability that p-values (m,) of normal images have a mean, among those called normal, at least
        as far from the expected one; and both means in words, empty if there is nothing to compare.

        Not by the test of Kolmogorov and Smirnov: p-values of several networks are nearer to each other than those of
        one.
        """
        total, rank = self.guarantee.count, self.rank
        known, p = total - rank, p[p > self.guarantee.rate]
        if self.guarantee.kind == "seen" or not known or not len(p):
            return 1.0, ""
        # Mann and Whitney's U / mn is the mean share, among the normal images called normal, of those at least as
        # unusual as a new one; of new images like them 1/2 is to be expected
        share = (p.mean() * (total + 1) - 1 - rank) / known
        deviations = (share - 0.5) / math.sqrt((len(p) + known + 1) / (12 * len(p) * known))
        expected = (known / 2 + 1 + rank) / (total + 1)
        words = f"p-values of the {len(p)} called normal {{}} (mean {p.mean():.2f}, expected {expected:.2f})"
        return math.erfc(abs(deviations) / math.sqrt(2)), words


def same_probability(new: np.ndarray, known: np.ndarray) -> float:
    """Return the probability that samples (m,) and (n,) of one distribution are at least as far apart as these, by the
    test of Kolmogorov and Smirnov; in the limit of many values, which is a little high for few."""
    all_values = np.concatenate([new, known])
    below_new, below_known = (np.searchsorted(np.sort(x), all_values, "right") / len(x) for x in (new, known))
    distance = np.abs(below_new - below_known).max()
    x = distance * math.sqrt(len(new) * len(known) / len(all_values))
    if x < SURE:
        return 1.0
    return 2 * math.fsum((-1) ** (k - 1) * math.exp(-2 * (k * x) ** 2) for k in range(1, 30))


def difference(lower: str, higher: str, name: str, new: np.ndarray, known: np.ndarray) -> str:
    """Return how new values (m,) of a statistic differ from known ones (n,), with mean and standard deviation of both:
    ``lower`` or ``higher``, or that what is called ``name`` varies more or less."""
    shift, widening = new.mean() - known.mean(), new.std() - known.std()
    word = higher if shift > 0 else lower
    if abs(widening) > abs(shift):
        word = f"{name} varies {'more' if widening > 0 else 'less'}"
    before = f"in training {known.mean():.4g} ± {known.std():.2g}"
    return f"{word} ({name} {new.mean():.4g} ± {new.std():.2g}, {before})"
