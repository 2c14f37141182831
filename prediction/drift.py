"""Have the pictures changed? New images against the normal ones of a detector, in looks and in p-values.

Owns what is compared, the tests, and the one line that tells of a change. Knows nothing of networks or files.
Sources: the two-sample tests of Kolmogorov and Smirnov, and of Wilcoxon, Mann and Whitney.
"""

import math
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from conformal import FalseAlarmGuarantee
from image_ops import STATISTICS, image_statistics
from runtime.files import say

LEVEL = 0.01  # probability that images like the normal ones are warned about, in a stream without end
REMEMBERED = 4096  # new images that are compared, the latest
FIRST, LEAST = 32, 8  # images until the first comparison; at the end of the files these are enough


class JudgedImages(Protocol):
    """What a detector says of them, as far as it matters here."""

    p_values: Tensor


class Drift:
    """A follower of scoring.Scorer that says once, on stderr, that images are not like the normal ones.

    known: what ``image_statistics`` gave for the normal images (n, 3); empty, if their detector does not hold it.
    guarantee: the detector's; p-values are compared unless its network has seen the normal images, as they mean nothing
    then.

    Images are compared when 32, 64, 128, ... have come, from REMEMBERED on each time that as many have, the last
    REMEMBERED of them; and at the end. The j-th comparison spends 1 / (j (j + 1)) of LEVEL, in equal parts on its
    tests.
    """

    def __init__(self, category: str, known: Tensor, guarantee: FalseAlarmGuarantee) -> None:
        self.category, self.known, self.guarantee = category, known.cpu().numpy(), guarantee
        self.rank = round(guarantee.rate * (guarantee.count + 1))  # normal images that are called anomalous, and one
        self.tests = (len(STATISTICS) if len(known) else 0) + (guarantee.kind != "seen")
        self.recent: deque[tuple[float, ...]] = deque(maxlen=REMEMBERED)  # looks, p-value
        self.count, self.compared, self.comparisons, self.due = 0, 0, 0, FIRST
        self.warned = False

    def on_batch(self, paths: Sequence[str], pixels: Tensor, prediction: JudgedImages) -> None:
        """Images (B, 3, H, W) that a detector has judged."""
        if self.warned or not self.tests:
            return
        self.recent.extend(torch.column_stack([image_statistics(pixels), prediction.p_values]).tolist())
        self.count += len(pixels)
        if self.count >= self.due:
            self.compare()

    def on_end(self) -> None:
        """There are no more images."""
        if not self.warned and self.tests and self.count > self.compared and self.count >= LEAST:
            self.compare()

    def compare(self) -> None:
        self.comparisons += 1
        self.compared, self.due = self.count, min(2 * self.count, self.count + REMEMBERED)
        level = LEVEL / (self.comparisons * (self.comparisons + 1)) / self.tests
        *looks, p = np.array(self.recent).T
        found = [
            difference(*kind, new, known)
            for kind, new, known in zip(STATISTICS, looks, self.known.T)
            if len(known) and same_probability(new, known) <= level
        ]
        probability, words = self.ranked(p)
        if not found and probability > level:
            return
        self.warned = True
        if words:
            found.append(words.format("do not show it" if probability > level else "show it"))
        if not words or probability <= level:
            found.append("the false-alarm rate is not to be relied on")
        self.recent.clear()
        say(f"{self.category}: the pictures have changed ({len(p)} images): {'; '.join(found)}; see docs/decisions.md")

    def ranked(self, p: np.ndarray) -> tuple[float, str]:
        """Of normal images to have p-values whose mean, among those called normal, is as far from what is expected; and
        both means in words, empty if there is nothing to compare. Not by Kolmogorov and Smirnov: p-values of several
        networks are nearer to each other than those of one."""
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
    """Of samples (m,) and (n,) of one distribution to be at least as far apart as these, by the test of Kolmogorov and
    Smirnov; in the limit of many values, which is a little high for few."""
    from scipy.special import kolmogorov  # scipy.stats takes a second to import, for each command

    all_values = np.concatenate([new, known])
    below_new, below_known = (np.searchsorted(np.sort(x), all_values, "right") / len(x) for x in (new, known))
    distance = np.abs(below_new - below_known).max()
    return float(kolmogorov(distance * math.sqrt(len(new) * len(known) / len(all_values))))


def difference(lower: str, higher: str, name: str, new: np.ndarray, known: np.ndarray) -> str:
    """In words, with mean and standard deviation of both."""
    shift, widening = new.mean() - known.mean(), new.std() - known.std()
    word = higher if shift > 0 else lower
    if abs(widening) > abs(shift):
        word = f"{name} varies {'more' if widening > 0 else 'less'}"
    before = f"in training {known.mean():.4g} ± {known.std():.2g}"
    return f"{word} ({name} {new.mean():.4g} ± {new.std():.2g}, {before})"
