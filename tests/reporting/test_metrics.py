"""Metrics against slow loops and cases worked out by hand."""

import itertools
import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from reporting.metrics import auroc, best_f1, image_metrics, pixel_metrics, region_weights


def drawn(seed, count=40, levels=None):
    """Labels of both classes and scores that know something of them; few levels make ties."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    labels[:2] = 0, 1
    scores = rng.normal(size=count) + labels
    return labels, scores if levels is None else np.floor(scores * levels)


def pairs_ranked_right(labels, scores):
    """The share of (normal, anomalous) pairs in which the anomalous one scores higher; a tie counts half."""
    pairs = list(itertools.product(scores[labels == 0], scores[labels == 1]))
    return sum((anomalous > normal) + 0.5 * (anomalous == normal) for normal, anomalous in pairs) / len(pairs)


def precisions_and_recalls(labels, scores):
    """Yield both at each threshold, the highest first."""
    for threshold in sorted(set(scores), reverse=True):
        hits = sum(1 for label, score in zip(labels, scores) if score >= threshold and label == 1)
        yield hits / sum(1 for score in scores if score >= threshold), hits / sum(labels)


def average_precision_by_hand(labels, scores):
    """Precision at each threshold, weighted by the recall it adds."""
    total, before = 0.0, 0.0
    for precision, recall in precisions_and_recalls(labels, scores):
        total += precision * (recall - before)
        before = recall
    return total


def best_f1_by_hand(labels, scores):
    return max(2 * p * r / (p + r) if p + r else 0 for p, r in precisions_and_recalls(labels, scores))


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


# Pixels -----------------------------------------------------------------------------------------------------------


def slow_aupro(masks: np.ndarray, maps: np.ndarray, limit: float) -> float:
    """Threshold by threshold, region by region: the definition, as a loop."""
    regions = []
    for number, mask in enumerate(masks):
        left = {(int(y), int(x)) for y, x in zip(*np.nonzero(mask))}
        while left:
            todo, region = [left.pop()], []
            while todo:
                y, x = todo.pop()
                region.append((y, x))
                near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
                left -= near
                todo += near
            regions.append((number, region))
    curve = [(0.0, 0.0)]
    for threshold in sorted(set(maps.reshape(-1).tolist()), reverse=True):
        overlaps = [np.mean([maps[n][p] >= threshold for p in region]) for n, region in regions]
        curve.append((float((maps[masks == 0] >= threshold).mean()), float(np.mean(overlaps))))
    area = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if x0 >= limit:
            break
        if x1 > limit:
            x1, y1 = limit, y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
        area += (x1 - x0) * (y0 + y1) / 2
    return area / limit


def example(seed: int, levels: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Masks of a few blobs, one image without any, and maps of them with noise; ``levels``: how many scores differ."""
    random = np.random.default_rng(seed)
    masks = np.zeros((4, 14, 19), dtype=np.uint8)
    for mask in masks[:3]:
        for _ in range(3):
            y, x = random.integers(0, 10), random.integers(0, 15)
            mask[y : y + random.integers(1, 5), x : x + random.integers(1, 5)] = 1
    maps = masks + random.normal(size=masks.shape)
    if levels is not None:
        maps = np.floor(maps * levels / 4)
    return masks, maps.astype(np.float32)


@pytest.mark.parametrize("levels", [None, 9, 2])
@pytest.mark.parametrize("seed", range(4))
def test_pixel_metrics_against_oracles(seed, levels):
    masks, maps = example(seed, levels)
    metrics = pixel_metrics(masks, maps)
    assert metrics["pixel_auroc"] == pytest.approx(roc_auc_score(masks.reshape(-1), maps.reshape(-1)), abs=1e-12)
    assert metrics["aupro"] == pytest.approx(slow_aupro(masks, maps, 0.3), abs=1e-12)


def test_aupro_counts_regions_not_pixels():
    """Two of three pixels found are the whole of one region and nothing of the other."""
    masks = np.zeros((1, 4, 25), dtype=np.uint8)
    masks[0, 0, :2] = masks[0, 3, 20] = 1
    maps = np.zeros(masks.shape, dtype=np.float32)
    maps[0, 0, :2] = 1
    metrics = pixel_metrics(masks, maps)
    # the rest, at score 0, is a straight line from (0, 1/2) to (1, 1) and from (0, 2/3) to (1, 1)
    assert metrics["aupro"] == pytest.approx(0.5 + 0.5 * 0.3 / 2)
    assert metrics["pixel_auroc"] == pytest.approx((2 / 3 + 1) / 2)


def test_diagonal_neighbors_are_one_region():
    mask = np.array([[1, 0, 0, 0], [0, 1, 0, 1]], dtype=bool)
    assert region_weights(mask).tolist() == [0.5, 0.5, 1.0]


def test_perfect_and_inverted_maps():
    masks, _ = example(0, None)
    maps = masks.astype(np.float32)
    assert pixel_metrics(masks, maps) == {"pixel_auroc": 1.0, "aupro": 1.0}
    assert pixel_metrics(masks, -maps) == {"pixel_auroc": 0.0, "aupro": 0.0}


@pytest.mark.parametrize(("metrics", "inputs"), [(image_metrics, drawn(0)), (pixel_metrics, example(1, None))])
def test_inputs_stay_as_they_are(metrics, inputs):
    before = [array.copy() for array in inputs]
    metrics(*inputs)
    assert all(np.array_equal(array, copy) for array, copy in zip(inputs, before))


def test_pixel_metrics_refuse():
    masks, maps = example(0, None)
    wrong = maps.copy()
    wrong[0, 0, 0] = np.nan
    for arguments, words in (
        ((masks * 0, maps), "normal and defective"),
        ((masks * 0 + 1, maps), "normal and defective"),
        ((masks[0], maps[0]), r"\(M, H, W\)"),
        ((masks, maps[:, :-1]), r"\(M, H, W\)"),
        ((masks, wrong), "not finite"),
    ):
        with pytest.raises(ValueError, match=words):
            pixel_metrics(*arguments)
