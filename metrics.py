"""Figures of merit: labels and scores in, floats out. Higher scores mean more anomalous; label 1 is anomalous.

Owns image AUROC, AUPRC and best F1, each from scikit-learn's curves.
"""

import numpy as np


def image_metrics(labels, scores) -> dict[str, float]:
    """image_auroc, image_auprc (average precision) and best_f1, fractions in [0, 1].

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
    """Area under the ROC curve, in [0, 1]; equal scores count half."""
    from sklearn.metrics import roc_auc_score

    labels, scores = _check(labels, scores)
    return float(roc_auc_score(labels, scores))


def best_f1(labels, scores) -> float:
    """The largest F1 of the anomalous class over all thresholds, in [0, 1]."""
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
