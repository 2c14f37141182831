import math

import numpy as np
import pytest

from metrics import auroc, best_f1, image_metrics


def drawn(seed, count=40, levels=None):
    """Labels of both classes and scores that know something of them; few levels make ties."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    labels[:2] = 0, 1
    scores = rng.normal(size=count) + labels
    return labels, scores if levels is None else np.floor(scores * levels)


def pairs_ranked_right(labels, scores):
    """The share of (normal, anomalous) pairs in which the anomalous one scores higher; a tie counts half."""
    won = total = 0
    for normal in scores[labels == 0]:
        for anomalous in scores[labels == 1]:
            won += 1 if anomalous > normal else 0.5 if anomalous == normal else 0
            total += 1
    return won / total


def precision_and_recall(labels, scores, threshold):
    hits = sum(1 for label, score in zip(labels, scores) if score >= threshold and label == 1)
    return hits / sum(1 for score in scores if score >= threshold), hits / sum(labels)


def average_precision_by_hand(labels, scores):
    """Precision at each threshold, weighted by the recall it adds."""
    total, before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        precision, recall = precision_and_recall(labels, scores, threshold)
        total += precision * (recall - before)
        before = recall
    return total


def best_f1_by_hand(labels, scores):
    values = []
    for threshold in set(scores):
        precision, recall = precision_and_recall(labels, scores, threshold)
        values.append(0 if precision + recall == 0 else 2 * precision * recall / (precision + recall))
    return max(values)


@pytest.mark.parametrize("levels", [None, 2, 1, 0.3])
@pytest.mark.parametrize("seed", range(5))
def test_metrics_equal_loops(seed, levels):
    labels, scores = drawn(seed, levels=levels)
    assert levels is None or len(set(scores)) < len(scores) / 2
    assert auroc(labels, scores) == pytest.approx(pairs_ranked_right(labels, scores), abs=1e-12)
    assert best_f1(labels, scores) == pytest.approx(best_f1_by_hand(labels, scores), abs=1e-12)
    figures = image_metrics(labels, scores)
    assert list(figures) == ["image_auroc", "image_auprc", "best_f1"]
    assert figures["image_auroc"] == auroc(labels, scores)
    assert figures["image_auprc"] == pytest.approx(average_precision_by_hand(labels, scores), abs=1e-12)
    assert figures["best_f1"] == best_f1(labels, scores)
    assert all(type(value) is float for value in figures.values())


def test_by_hand():
    """Of six pairs four are right and one is a tie; the best threshold is 2: two hits, one false alarm."""
    labels, scores = [0, 0, 1, 0, 1], [0, 2, 2, 3, 5]
    assert auroc(labels, scores) == pytest.approx(4.5 / 6)
    assert best_f1(labels, scores) == pytest.approx(2 / 3)
    assert image_metrics(labels, scores)["image_auprc"] == pytest.approx(1 * 0.5 + 2 / 4 * 0.5)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([1, 2, 3, 4], (1, 1, 1)),
        ([4, 3, 2, 1], (0, (1 / 3 + 2 / 4) / 2, 2 / 3)),
        ([7, 7, 7, 7], (0.5, 0.5, 2 / 3)),
    ],
)
def test_perfect_inverted_and_constant(scores, expected):
    assert tuple(image_metrics([0, 0, 1, 1], scores).values()) == pytest.approx(expected)


def test_nothing_but_the_order_matters():
    labels, scores = drawn(0)
    assert image_metrics(labels, np.exp(scores)) == image_metrics(labels, scores)
    assert auroc(labels, -scores) == pytest.approx(1 - auroc(labels, scores))
    permutation = np.random.default_rng(1).permutation(len(labels))
    assert image_metrics(labels[permutation], scores[permutation]) == pytest.approx(image_metrics(labels, scores))


def test_lists_bools_and_float32():
    labels, scores = drawn(3)
    expected = image_metrics(labels, scores.astype(np.float32))
    assert image_metrics(labels.astype(bool), scores.astype(np.float32)) == expected
    assert image_metrics(labels.tolist(), scores.astype(np.float32).tolist()) == expected


def test_inputs_stay_as_they_are():
    labels, scores = drawn(0)
    labels_before, scores_before = labels.copy(), scores.copy()
    image_metrics(labels, scores)
    assert np.array_equal(labels, labels_before)
    assert np.array_equal(scores, scores_before)


@pytest.mark.parametrize("metric", [auroc, best_f1, image_metrics])
@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([0, 0, 0], [1, 2, 3], r"both 0 .* and 1 .*got \[0\]"),
        ([1, 1], [1, 2], r"got \[1\]"),
        ([0, 1, 2], [1, 2, 3], r"got \[0, 1, 2\]"),
        ([-1, 1], [1, 2], r"got \[-1, 1\]"),
        ([], [], "both"),
        ([0, 1], [1, math.nan], "not finite"),
        ([0, 1], [1, math.inf], "not finite"),
        ([0, 1], [1, 2, 3], r"\(2,\).*\(3,\)"),
        ([[0, 1]], [[1, 2]], r"\(1, 2\)"),
    ],
)
def test_errors(metric, labels, scores, message):
    with pytest.raises(ValueError, match=message):
        metric(labels, scores)
