"""Have the pictures changed: how images look, tests whose level holds, one warning, through predict.py."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp, kstwobign, mannwhitneyu

from config import Config
from conformal import FalseAlarmGuarantee, p_values
from dataset import load_train
from detector import Detector, initial_network, load, save
from prediction.drift import REMEMBERED, Drift, difference, same_probability
from runtime.files import load_tensors, save_tensors
from runtime.image_files import find_images
from runtime.looks import image_statistics

GUARANTEE = FalseAlarmGuarantee("split", 99, 0.05)
CHANGED = "brick: the pictures have changed ("


@pytest.fixture(scope="module")
def detector(data):
    """A detector of brick with images held out, untrained."""
    small = {"backbone": "mobilenet_v2", "level": (3,), "features": "level", "pretrained": False}
    config = Config("brick", height=32, width=32, false_alarm_rate=0.2, holdout=0.5, **small)
    return Detector(config, [initial_network(config)]).fit(load_train(data, "brick", (32, 32), 0).images)


def pictures(count, generator, bright=128.0):
    """(count, 3, 8, 8) uint8 of noise, each with its own mean and deviation."""
    noise = torch.randn(count, 3, 8, 8, generator=generator)
    mean, deviation = bright + 9 * torch.randn(count, generator=generator), 9 + torch.rand(count, generator=generator)
    return (mean[:, None, None, None] + deviation[:, None, None, None] * noise).clamp(0, 255).byte()


def feed(drift, pixels, p):
    """A batch of images (B, 3, H, W), with p-values (B,) or one for all of them."""
    p_values = np.broadcast_to(np.asarray(p), len(pixels))
    drift.on_batch([], [], pixels.permute(0, 2, 3, 1).numpy(), SimpleNamespace(p_values=p_values))


def looks_of(pixels):
    """How images (B, 3, H, W) look, as a Drift knows it."""
    return image_statistics(pixels).numpy()


def p_values_of(scores, normal):
    """Return what a detector says that has these calibration scores."""
    return p_values(scores[None], [normal])


def test_how_images_look_is_what_a_slow_loop_finds():
    images = pictures(3, torch.Generator().manual_seed(0))
    images[2] = 77  # flat
    expected = np.zeros((3, 3))
    for number, image in enumerate(images.numpy()):
        gray = sum(weight * plane.astype(float) for weight, plane in zip((0.2989, 0.587, 0.114), image))
        edges = [
            gray[y - 1, x] + gray[y + 1, x] + gray[y, x - 1] + gray[y, x + 1] - 4 * gray[y, x]
            for y in range(1, 7)
            for x in range(1, 7)
        ]
        strength = math.sqrt(sum(edge**2 for edge in edges) / 36)
        expected[number] = gray.mean(), gray.std(), strength / max(gray.std(), 1)
    for looks in (image_statistics(images), image_statistics(images.numpy())):  # of a tensor and of an array
        assert np.allclose(looks, expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(
        image_statistics(images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)), image_statistics(images)
    )
    halved = image_statistics(images[:2] // 2)
    assert torch.allclose(halved[:, :2], image_statistics(images[:2])[:, :2] / 2, rtol=0.02)
    assert torch.allclose(halved[:, 2], image_statistics(images[:2])[:, 2], rtol=0.02)  # darker is not less sharp


def test_images_like_the_normal_ones_are_seldom_warned_about(capsys):
    """Of 150 streams of 256 images at most 5: with a probability of 1 % it would be more once in 250 times."""
    generator, warned = torch.Generator().manual_seed(1), 0
    for _ in range(150):
        drift = Drift("brick", looks_of(pictures(60, generator)), GUARANTEE)
        normal = torch.randn(99, generator=generator)
        for _ in range(4):
            feed(drift, pictures(64, generator), p_values_of(torch.randn(64, generator=generator), normal))
        drift.on_end()
        assert drift.warned or drift.comparisons == 3  # after 64, 128 and 256
        warned += drift.warned
    assert warned <= 5
    assert capsys.readouterr().err.count(CHANGED) == warned


def test_looks_are_tested_like_kolmogorov_and_smirnov_test():
    generator = np.random.default_rng(0)
    for new, known, shift in ((1000, 3000, 0.05), (1000, 3000, 0.1), (32, 209, 0.5), (32, 209, 0)):
        pair = generator.normal(size=new).round(2) + shift, generator.normal(size=known).round(2)  # with equal ones
        exact = ks_2samp(*pair, method="exact").pvalue
        assert exact * 0.99 < same_probability(*pair) < exact * 1.35 + 0.01
        limit = kstwobign.sf(ks_2samp(*pair).statistic * math.sqrt(new * known / (new + known)))
        assert same_probability(*pair) == pytest.approx(limit, rel=1e-9)


def test_p_values_are_tested_like_mann_and_whitney_test_scores():
    """A p-value says how many normal scores are as high, so the test of p-values is that of the scores below the
    threshold: of 99 at 5 % the fifth largest, which decides and is compared with no more."""
    generator = torch.Generator().manual_seed(2)
    normal = torch.randn(99, generator=generator)
    scores = torch.randn(50, generator=generator) + 0.3
    p = p_values_of(scores, normal).numpy()
    drift = Drift("brick", np.empty((0, 3)), GUARANTEE)
    below, limit = normal.sort().values[:94], normal.sort().values[94]
    kept = scores[scores <= limit]
    assert 0 < (p > GUARANTEE.rate).sum() == len(kept) < 50
    exact = mannwhitneyu(kept, below, method="asymptotic", use_continuity=False).pvalue
    expected = np.mean([1 + (94 - rank) + 5 for rank in range(95)]) / 100
    probability, words = drift.compare_p_values(p)
    assert math.isclose(probability, exact, rel_tol=1e-6)
    assert 1e-4 < exact < 0.5
    means = f"(mean {p[p > 0.05].mean():.2f}, expected {expected:.2f})"
    assert words == f"p-values of the {len(kept)} called normal {{}} {means}"
    assert drift.compare_p_values(np.full(50, 0.01)) == (1.0, "")  # all are called anomalous


def test_p_values_count_only_where_the_network_has_not_seen_the_normal_images(capsys):
    for kind, warns in (("split", True), ("cross", True), ("seen", False)):
        drift = Drift("brick", np.empty((0, 3)), FalseAlarmGuarantee(kind, 99, 0.01))
        feed(drift, torch.zeros(64, 3, 8, 8, dtype=torch.uint8), 0.1)
        assert drift.warned == warns
        words = "p-values of the 64 called normal show it (mean 0.10, expected 0.51); the false-alarm rate is not to be"
        assert capsys.readouterr().err.count(words) == warns


def test_a_change_is_told_once_with_its_size(capsys):
    generator = torch.Generator().manual_seed(3)
    known, normal = looks_of(pictures(100, generator)), torch.randn(99, generator=generator)
    drift = Drift("brick", known, GUARANTEE)
    for _ in range(8):
        feed(drift, pictures(16, generator, bright=100.0), p_values_of(torch.full((16,), 9.0), normal))  # all anomalous
    drift.on_end()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{CHANGED}32 images): darker (mean gray 9")
    assert f"in training {known[:, 0].mean():.4g} ± {known[:, 0].std():.2g})" in line
    assert "contrast" not in line
    assert "p-values" not in line
    assert line.endswith("; the false-alarm rate is not to be relied on; see docs/decisions.md")
    drift = Drift("brick", known, GUARANTEE)
    feed(drift, pictures(64, generator, bright=100.0), p_values_of(torch.randn(64, generator=generator), normal))
    assert " called normal do not show it (mean 0." in (line := capsys.readouterr().err)
    assert "relied" not in line  # the detector sees nothing of it


def test_five_images_are_enough_for_a_large_change_at_the_end(capsys):
    """And no fewer; of images like the normal ones five are hardly ever warned about: of 2,000 sets at most 20."""
    generator = torch.Generator().manual_seed(6)
    known = looks_of(pictures(15, generator))
    for count, bright, warns in ((5, 77.0, True), (4, 77.0, False), (5, 128.0, False)):
        drift = Drift("brick", known, FalseAlarmGuarantee("seen", 15, 0.05))
        feed(drift, pictures(count, generator, bright), 1.0)
        drift.on_end()
        assert drift.warned == warns
        assert capsys.readouterr().err.count(f"{CHANGED}{count} images): darker (mean gray ") == warns
    warned = 0
    for _ in range(2000):
        normal, looks = torch.randn(99, generator=generator), torch.randn(105, 3, generator=generator).numpy()
        drift = Drift("brick", looks[5:], GUARANTEE)
        p = p_values_of(torch.randn(5, generator=generator), normal)
        drift.recent.extend(np.column_stack([looks[:5], p]).tolist())
        drift.count = 5
        drift.on_end()
        warned += drift.warned
    assert warned <= 20
    assert drift.comparisons == 1


def test_of_a_long_stream_only_the_latest_images_are_compared():
    """A change that comes late is seen among as many images as are remembered."""
    generator = torch.Generator().manual_seed(4)
    drift = Drift("brick", looks_of(pictures(300, generator)), FalseAlarmGuarantee("seen", 99, 0.05))
    for count in range(512, 4 * REMEMBERED + 1, 512):
        feed(drift, pictures(512, generator), 1.0)
        assert drift.count == count
        assert len(drift.recent) == min(count, REMEMBERED)
    assert (drift.comparisons, drift.warned) == (7, False)  # 512, ... 4096, and three times as many more
    for _ in range(REMEMBERED // 512):
        feed(drift, pictures(512, generator, bright=120.0), 1.0)
    assert drift.warned
    assert not drift.recent


def test_words_of_a_difference():
    kind, known = ("darker", "brighter", "mean gray"), np.array([99.0, 101.0])
    assert difference(*kind, known - 5, known) == "darker (mean gray 95 ± 1, in training 100 ± 1)"
    assert difference(*kind, known + 5, known).startswith("brighter (")
    assert difference(*kind, np.array([90.0, 111.0]), known).startswith("mean gray varies more (mean gray 100.5 ± 10,")
    assert difference(*kind, np.array([100.0, 100.0]), known).startswith("mean gray varies less (")


def test_through_the_script(detector, data, tmp_path, script):
    """Darkened pictures, pictures as they were, and a detector file without the looks of normal images."""
    paths = find_images(data / "brick/train/good")
    for folder, factor in (("same", 1.0), ("dark", 0.7)):
        (tmp_path / folder).mkdir()
        for number in range(24):
            pixels = np.asarray(Image.open(paths[number % len(paths)])) * factor
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / folder / f"{number}.png")
    save(detector, tmp_path / "brick.pt")
    known = load(tmp_path / "brick.pt").appearance
    assert torch.equal(known, image_statistics(load_train(data, "brick", (32, 32), 0).images))
    assert known.shape == (8, 3)
    assert not script("predict", tmp_path / "brick.pt", tmp_path / "same").err.count(CHANGED)
    done = script("predict", tmp_path / "brick.pt", tmp_path / "dark")
    assert done.code == 0, done.err
    assert done.err.count(f"{CHANGED}24 images): darker (mean gray ") == 1  # at the end of the files
    content = load_tensors(tmp_path / "brick.pt", "detector")
    del content["appearance"]
    save_tensors(content | {"version": 8}, tmp_path / "brick.pt")  # earlier files have none
    earlier = script("predict", tmp_path / "brick.pt", tmp_path / "dark")
    assert earlier.code == 0, earlier.err
    assert earlier.out == done.out
    assert "darker" not in earlier.err


def test_without_a_threshold_nothing_is_known_of_looks(detector):
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(256, (8, 3, 32, 32), generator=generator, dtype=torch.uint8)
    assert detector.untrained().fit(images, threshold=False).appearance.shape == (0, 3)
