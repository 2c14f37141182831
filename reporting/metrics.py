"""Score a test set, and say how good the scores are: image AUROC, AUPRC, best F1, pixel AUROC, AUPRO.

Higher scores mean more anomalous; label 1 is anomalous. Image metrics come from scikit-learn's curves.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dataset import TestSet
from detector import Detector, stream
from runtime.files import InputError

RESAMPLES = 1000
AUPRO_LIMIT = 0.3  # largest false-positive rate that enters the AUPRO: the field's standard


# The evaluation ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """Hold what a detector says of a test set, and how good that is. Passed whole to tables, figures and the report."""

    detector: Detector
    test: TestSet
    scores: np.ndarray  # (M,) float64, higher is more anomalous, in the detector's unit
    p_values: np.ndarray  # (M,) float64
    maps: np.ndarray | None  # (M, H, W) float32: anomaly maps
    masks: np.ndarray | None  # (M, H, W) uint8: ground truth, 1 is defective; None where there are no maps
    metrics: dict[str, float]  # those of image_metrics and pixel_metrics that the labels and masks allow

    @property
    def category(self) -> str:
        return self.detector.config.category


def evaluate(detector: Detector, test: TestSet, masks: np.ndarray | None = None) -> Evaluation:
    """Score the test images; make anomaly maps too if there are masks (M, H, W) to compare them with.

    Image metrics need both normal and anomalous images, pixel metrics both normal and defective pixels; else they are
    left out.
    """
    explain = masks is not None and detector.config.patches is None  # heat of an image-level model is Grad-CAM
    scores, p_values, done = np.empty(len(test.labels)), np.empty(len(test.labels)), 0
    maps = None if masks is None else np.empty(masks.shape, dtype=np.float32)
    for prediction in stream(detector, test.images, lambda prepared: detector.predict_prepared(prepared, explain)):
        part = slice(done, done := done + len(prediction.scores))
        scores[part], p_values[part] = prediction.scores.cpu().numpy(), prediction.p_values.cpu().numpy()
        if maps is not None:
            maps[part] = detector.heat(prediction).cpu().numpy()
    check_scores(detector, scores)
    metrics = image_metrics(test.labels, scores) if 0 < test.labels.sum() < len(test.labels) else {}
    if masks is not None:
        known = test.known(masks)
        truth = masks[known]
        if truth.any() and not truth.all():
            metrics |= pixel_metrics(truth, maps if known.all() else maps[known])
    return Evaluation(detector, test, scores, p_values, maps, masks, metrics)


def check_scores(detector: Detector, scores: np.ndarray) -> None:
    """Raise InputError if a score is not finite: the detector's network cannot be used."""
    if not np.isfinite(scores).all():
        count = int((~np.isfinite(scores)).sum())
        raise InputError(f"{detector.config.category}: {count} of {len(scores)} scores are not finite; train it again")


# Images -----------------------------------------------------------------------------------------------------------


def image_metrics(labels, scores) -> dict[str, float]:
    """Return image_auroc, image_auprc (average precision) and best_f1, fractions in [0, 1].

    labels: (N,) of 0 (normal) and 1 (anomalous); scores: (N,) finite. The best F1 is taken over all thresholds, so it
    is an upper bound that knows the test labels, not a decision rule.
    Raises ValueError if one of the classes is missing or a score is not finite.
    """
    from sklearn.metrics import average_precision_score

    return {
        "image_auroc": auroc(labels, scores),
        "image_auprc": min(1.0, float(average_precision_score(labels, scores))),  # rounding can reach beyond
        "best_f1": best_f1(labels, scores),
    }


def auroc(labels, scores) -> float:
    """Return the area under the ROC curve, in [0, 1]; equal scores count half."""
    from sklearn.metrics import roc_auc_score

    labels, scores = _check(labels, scores)
    return float(roc_auc_score(labels, scores))


def best_f1(labels, scores) -> float:
    """Return the largest F1 of the anomalous class over all thresholds, in [0, 1]."""
    from sklearn.metrics import precision_recall_curve

    labels, scores = _check(labels, scores)
    precision, recall, _ = precision_recall_curve(labels, scores)
    total = precision + recall
    f1 = np.divide(2 * precision * recall, total, out=np.zeros_like(total), where=total > 0)
    return float(f1.max())


def _check(labels, scores) -> tuple[np.ndarray, np.ndarray]:
    labels, scores = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if labels.shape != scores.shape or labels.ndim != 1:
        raise ValueError(f"labels {labels.shape} and scores {scores.shape} must be two arrays of one length")
    if set(np.unique(labels)) != {0, 1}:
        raise ValueError(f"labels must hold both 0 (normal) and 1 (anomalous), got {sorted(set(labels.tolist()))}")
    if not np.isfinite(scores).all():
        raise ValueError("a score is not finite")
    return labels, scores


# Costs ------------------------------------------------------------------------------------------------------------


class Cheapest(NamedTuple):
    """Hold the p-value level that costs least on labelled images: anomalous where p <= rate."""

    rate: float
    low: float  # the ends of the interval that holds it for 90 of 100 sets of as many images
    high: float
    missed: int
    false_alarms: int
    cost: float


def cheapest_rate(labels: np.ndarray, p_values: np.ndarray, count: int, costs: tuple[float, float]) -> Cheapest:
    """Return the level k / (count + 1), k >= 1, at which the labelled images cost least; of equal ones the smallest.

    labels, p_values: (M,), of both kinds. count: n, the number of calibration scores. costs: of a missed anomalous
    image, of a false alarm. The interval is by the bootstrap: RESAMPLES draws of as many images of each kind.
    """
    ranks = np.rint(np.asarray(p_values) * (count + 1)).astype(int)
    levels = np.unique(np.append(ranks[labels == 1], 1))  # between them nothing gets cheaper
    kinds = [(ranks[labels == 1, None] > levels, costs[0]), (ranks[labels == 0, None] <= levels, costs[1])]
    missed, false_alarms = (wrong.sum(0) for wrong, _ in kinds)
    total = missed * costs[0] + false_alarms * costs[1]
    rng, drawn = np.random.default_rng(0), np.zeros((RESAMPLES, len(levels)))
    for wrong, cost in kinds:
        drawn += cost * rng.multinomial(len(wrong), np.full(len(wrong), 1 / len(wrong)), RESAMPLES) @ wrong
    best, chosen = total.argmin(), levels[drawn.argmin(1)]
    low, high = np.quantile(chosen, (0.05, 0.95), method="inverted_cdf") / (count + 1)
    rate = levels[best] / (count + 1)
    return Cheapest(
        float(rate), float(low), float(high), int(missed[best]), int(false_alarms[best]), float(total[best])
    )


# Pixels -----------------------------------------------------------------------------------------------------------


def pixel_metrics(masks, maps) -> dict[str, float]:
    """Return pixel_auroc and aupro, fractions in [0, 1], of all pixels of all test images together.

    masks: (M, H, W) of 0 (normal) and 1 (defective); maps: (M, H, W) float32, finite.
    AUPRO: the area under the curve of per-region overlap (the share of each defect that is found, averaged over the
    defects; pixels that touch, also at a corner, are one defect) against the false-positive rate, up to AUPRO_LIMIT,
    divided by that limit.
    Both are exact: each distinct score is a threshold. The curves only rise at scores of defective pixels, so only
    those scores are visited; normal pixels are sorted and counted.
    Raises ValueError if all pixels are of one kind or a score is not finite.
    """
    from sklearn.metrics import auc

    masks, maps = np.asarray(masks) > 0, np.asarray(maps, dtype=np.float32)
    if masks.shape != maps.shape or masks.ndim != 3:
        raise ValueError(f"masks {masks.shape} and maps {maps.shape} must be two arrays (M, H, W)")
    if masks.all() or not masks.any():
        raise ValueError("both normal and defective pixels are needed")
    if not np.isfinite(maps).all():
        raise ValueError("a score is not finite")
    normal = maps[~masks]
    normal.sort()  # in place: it is nearly as large as all maps
    thresholds, index = np.unique(maps[masks], return_inverse=True)  # (K,), ascending
    # (2, K): normal pixels above and at or above each threshold, from the highest down
    false = len(normal) - np.stack([np.searchsorted(normal, thresholds, side) for side in ("right", "left")])[:, ::-1]
    fpr = np.concatenate([[0], false.T.reshape(-1), [len(normal)]]) / len(normal)

    def curve(weights: np.ndarray | None) -> np.ndarray:
        """Return the share of the defective pixels' weights that is detected at each point of ``fpr``."""
        detected = np.concatenate([[0], np.cumsum(np.bincount(index, weights)[::-1])])
        before_and_after = np.stack([detected[:-1], detected[1:]], 1).reshape(-1)
        return np.concatenate([[0], before_and_after, detected[-1:]]) / detected[-1]

    weights = np.concatenate([region_weights(mask) for mask in masks])
    return {"pixel_auroc": float(auc(fpr, curve(None))), "aupro": area_to(AUPRO_LIMIT, fpr, curve(weights))}


def region_weights(mask: np.ndarray) -> np.ndarray:
    """Return for each of P defective pixels of a mask (H, W), row by row, 1 / size of its region: (P,) float64."""
    from scipy.ndimage import label

    regions, _ = label(mask, np.ones((3, 3), dtype=int))  # diagonal neighbors too, as in MVTec's evaluation
    regions = regions[mask]
    return 1 / np.bincount(regions)[regions] if len(regions) else np.zeros(0)


def area_to(limit: float, x: np.ndarray, y: np.ndarray) -> float:
    """Return the area under a curve from x = 0 to ``limit``, divided by it; straight lines between points, x rising."""
    from sklearn.metrics import auc

    inside = x <= limit
    end = np.interp(limit, x, y)
    return float(auc(np.append(x[inside], limit), np.append(y[inside], end)) / limit)
