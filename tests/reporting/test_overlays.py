"""Test where an image is anomalous, and how heat is drawn over it."""

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_erosion, gaussian_filter, label
from torch.nn import functional

from reporting import overlays


def slow_region(heat, threshold):
    """Top, left, bottom, right of the region around the maximum, by flooding; None where nothing is above."""
    start = tuple(int(i) for i in np.unravel_index(heat.argmax(), heat.shape))
    if not heat[start] > threshold:
        return None
    region, waiting = {start}, [start]
    while waiting:
        y, x = waiting.pop()
        for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            inside = 0 <= near[0] < heat.shape[0] and 0 <= near[1] < heat.shape[1]
            if inside and near not in region and heat[near] > threshold:
                region.add(near)
                waiting.append(near)
    ys, xs = zip(*region)
    return min(ys), min(xs), max(ys) + 1, max(xs) + 1


def test_the_region_of_a_planted_maximum():
    generator = np.random.default_rng(0)
    for _ in range(50):
        heat = generator.random((13, 9)).astype(np.float32)
        heat[generator.integers(13), generator.integers(9)] = 2
        top, left, bottom, right = slow_region(heat, 0.6)
        assert overlays.region(heat, 0.6, (13, 9)) == (left, top, right - left, bottom - top)
        assert overlays.region(heat, 0.6, (26, 90)) == (10 * left, 2 * top, 10 * (right - left), 2 * (bottom - top))
    assert overlays.region(heat, 2.0, (13, 9)) is None  # above, not at
    assert overlays.region(heat, 0.6, (1, 1)) == (0, 0, 1, 1)


@pytest.mark.parametrize("sigma", [0.01, 0.6, 3])
def test_regions_and_what_is_inside_them_are_scipys(sigma):
    generator = np.random.default_rng(1)
    for _ in range(30):
        heat = gaussian_filter(generator.random(generator.integers(1, 90, 2)), sigma)
        marked = heat > np.quantile(heat, generator.random())
        marked.flat[heat.argmax()] = True
        place = np.unravel_index(heat.argmax(), heat.shape)
        regions, _ = label(marked)
        assert np.array_equal(overlays.connected(marked, place), regions == regions[place])
        for steps in (1, 4):
            expected = binary_erosion(marked, iterations=steps, border_value=1)
            assert np.array_equal(overlays.eroded(marked, steps), expected)


@pytest.mark.parametrize("size", [(900, 900), (700, 1000), (120, 90), (256, 512), (256, 300), (1, 77)])
def test_maps_are_enlarged_as_torch_does(size):
    heat = np.random.default_rng(2).normal(size=(256, 256)).astype(np.float32)
    expected = functional.interpolate(torch.from_numpy(heat)[None, None], size, mode="bilinear")[0, 0].numpy()
    enlarged = overlays.enlarged(heat, size)
    assert (enlarged.dtype, enlarged.shape) == (np.float32, size)
    rounding = 5e-5 if torch.__version__.startswith("2.6.") else 1e-6  # torch 2.6 rounds places otherwise
    assert np.allclose(enlarged, expected, rtol=1e-6, atol=rounding)


def test_the_scale_of_an_overlay_is_the_threshold():
    gray = np.full((40, 60, 3), 100, np.uint8)
    heat = np.zeros((40, 60), np.float32)
    heat[10:30, 10:50] = 3.0
    heat[0] = 1.0  # half of the threshold: nothing
    plain = np.array(overlays.overlay(gray, heat, 2.0, None))
    assert (plain[:10] == 100).all()
    assert (plain[15, 20] != 100).any()
    lined = np.array(overlays.overlay(gray, heat, 2.0, 2.0))
    assert (lined[10, 10:50] == overlays.OUTLINE).all()
    assert (lined != plain).any(2).sum() == 2 * 40 + 2 * 18
    strong = np.array(overlays.overlay(gray, np.full_like(heat, 4), 2.0, None))
    assert np.array_equal(strong, overlays.overlay(gray, np.full_like(heat, 9), 2.0, 2.0))
    expected = 100 + overlays.OPACITY * (np.array(overlays.COLORS[-1]) - 100.0)
    assert np.abs(strong[0, 0] - expected).max() <= 1
    at_threshold = np.array(overlays.overlay(gray, np.full_like(heat, 2), 2.0, None))[0, 0].astype(int)
    red, green, blue, opacity = overlays.heat_colors()[85].astype(int)
    assert opacity == round(255 * overlays.OPACITY)
    assert np.abs(at_threshold - 100 - overlays.OPACITY * (np.array([red, green, blue]) - 100)).max() <= 2
    assert overlays.heat_range(2.0) == (1.0, 4.0)
    for threshold in (0.0, -1.0):
        assert np.array(overlays.overlay(gray, heat, threshold, threshold)).shape == gray.shape
