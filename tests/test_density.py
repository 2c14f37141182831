"""Densities against slow loops, scikit-learn and SciPy; what holds of every density, once over the table."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.covariance import LedoitWolf

import density
from config import DENSITY_NAMES
from density import (
    DENSITIES,
    POOLED,
    DensityError,
    GaussianSklearn,
    GaussianTorch,
    KernelDensity,
    NotFiniteError,
    cover,
    covers_without,
    fit_density,
    group_by_density,
    held_out,
    ledoit_wolf,
    whitening,
)

every_density = pytest.mark.parametrize("kind", DENSITIES)
every_gaussian = pytest.mark.parametrize("kind", ["torch", "sklearn"])
CROSS = torch.tensor([[2, 0], [-2, 0], [0, 1], [0, -1]], dtype=torch.float64)


def embeddings(count, dim, seed=0):
    """Correlated, of unequal scale and away from zero, as a network's features are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    scale = torch.linspace(0.1, 3, dim, dtype=torch.float64)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) @ mixing * scale + 5


def several(images, locations, dim, seed=0):
    """Normal embeddings (N, L, D) whose mean and deviation differ from location to location."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    scale = torch.rand(locations, 1, generator=generator, dtype=torch.float64).exp()
    mean = 3 * torch.randn(locations, dim, generator=generator, dtype=torch.float64)
    noise = torch.randn(images, locations, dim, generator=generator, dtype=torch.float64)
    return mean + scale * (noise @ mix) + 5


def naive_ledoit_wolf(x):
    """(1 - s) S + s m I and s, with |x_k x_k' - S|^2 summed image by image and entry by entry."""
    n, dim = x.shape
    sample, target = np.zeros((dim, dim)), np.zeros((dim, dim))
    for row in x:
        sample += np.outer(row, row) / n
    for i in range(dim):
        target[i, i] = sum(sample[j, j] for j in range(dim)) / dim
    error = distance = 0.0
    for i in range(dim):
        for j in range(dim):
            distance += (sample[i, j] - target[i, j]) ** 2
            for row in x:
                error += (row[i] * row[j] - sample[i, j]) ** 2
    shrinkage = min(error / n**2, distance) / distance
    return (1 - shrinkage) * sample + shrinkage * target, shrinkage


def log_density_by_hand(points, at, bandwidth):
    """Mean of the Gaussian kernels around the points, in logarithms."""
    logs = []
    for point in points:
        square = sum((a - p) ** 2 for a, p in zip(at, point))
        norm = len(at) / 2 * math.log(2 * math.pi) + len(at) * math.log(bandwidth)
        logs.append(-square / (2 * bandwidth**2) - norm)
    largest = max(logs)
    return largest + math.log(sum(math.exp(value - largest) for value in logs)) - math.log(len(logs))


def neighbor_distance(x):
    """The typical distance between neighbors: torch's median, the lower one of the middle. Copies are no neighbors."""
    return sorted(min(math.dist(a, b) for b in x if b != a) for a in x)[(len(x) - 1) // 2]


# Gaussian ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (30, 3), (3, 9)])
def test_ledoit_wolf_equals_naive_loops(shape):
    x = embeddings(*shape)
    x = x - x.mean(0)
    covariance, shrinkage = ledoit_wolf(x)
    expected, expected_shrinkage = naive_ledoit_wolf(x.numpy())
    assert 0 < shrinkage.item() <= 1
    assert shrinkage.item() == pytest.approx(expected_shrinkage, rel=1e-9)
    assert np.allclose(covariance, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("length", "shrinkage", "diagonal"),
    [
        (2, 17 / 18, (23.25 / 18, 21.75 / 18)),  # S = diag(2, 1/2), m = 5/4; d = 9/8, b = 4 (2^2 + (1/2)^2) / 4^2
        (1.1, 1, (0.5525, 0.5525)),  # at most 1: S = diag(0.605, 1/2), nearly a sphere: d = 0.0055, b = 0.11
        (1, 1, (0.5, 0.5)),  # a sphere is its own target
    ],
)
def test_ledoit_wolf_by_hand(length, shrinkage, diagonal):
    covariance, found = ledoit_wolf(CROSS * torch.tensor([length / 2, 1]))
    assert found.item() == pytest.approx(shrinkage)
    assert torch.allclose(covariance, torch.tensor(diagonal).double().diag())


@every_gaussian
def test_score_by_hand_is_not_squared(kind):
    gaussian = DENSITIES[kind]().fit(CROSS + torch.tensor([10, 20]))
    points = torch.tensor([[10, 20], [12, 20], [10, 21], [13, 24], [19, 32]], dtype=torch.float64)
    a, b = 18 / 23.25, 18 / 21.75
    distance = math.sqrt(9 * a + 16 * b)
    assert gaussian.mean.tolist() == [10, 20]
    assert gaussian.score(points).tolist() == pytest.approx([0, math.sqrt(4 * a), math.sqrt(b), distance, 3 * distance])


@pytest.mark.parametrize("shape", [(2, 5), (3, 8), (20, 40), (200, 12), (50, 50), (6, 1)])
def test_both_gaussians_are_scikit_learns(shape):
    x, new = embeddings(*shape), embeddings(10, shape[1], seed=1)
    first, second, expected = GaussianTorch().fit(x), GaussianSklearn().fit(x), LedoitWolf().fit(x.numpy())
    assert list(first.state_dict()) == list(second.state_dict()) == ["mean", "factor"]
    covariance, shrinkage = ledoit_wolf(x - x.mean(0))
    if shape[1] > 1:  # of a single dimension there is nothing to shrink: 0 and 1 give the same covariance
        assert shrinkage.item() == pytest.approx(expected.shrinkage_, rel=1e-6, abs=1e-12)
    largest = np.abs(expected.covariance_).max()
    assert np.allclose(covariance, expected.covariance_, rtol=1e-6, atol=1e-9 * largest)
    for gaussian in (first, second):
        assert gaussian.mean.dtype == gaussian.factor.dtype == torch.float64
        assert np.allclose(gaussian.mean, expected.location_, rtol=1e-9)
        for points in (x, new):
            distances = np.sqrt(expected.mahalanobis(points.numpy()))
            assert np.allclose(gaussian.score(points), distances, rtol=1e-6, atol=1e-9)
    if shape[0] > 2:
        assert torch.allclose(first.factor, second.factor, rtol=1e-6, atol=1e-9)
        inverse = np.linalg.inv(expected.covariance_)
        assert np.allclose(first.factor.mT @ first.factor, inverse, rtol=1e-6, atol=1e-9)


def test_the_flag_knows_every_density():
    assert [*DENSITIES] == DENSITY_NAMES


def test_score_without_shrinkage_does_not_depend_on_units():
    """With many images the shrinkage vanishes, and a distance in standard deviations has no unit."""
    x = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    units, new = torch.tensor([1, 2, 5]), embeddings(10, 3)
    first, second = GaussianTorch().fit(x).score(new), GaussianTorch().fit(x * units).score(new * units)
    assert torch.allclose(first, second, rtol=1e-2)
    assert torch.allclose(first, new.norm(dim=1), rtol=3e-2)


def test_constant_dimension_is_harmless():
    """A feature that never fires on normal images, but does on an anomalous one."""
    x = embeddings(20, 5)
    x[:, 2] = 0
    new = x.mean(0).repeat(2, 1)
    new[1, 2] = 100
    scores = GaussianTorch().fit(x).score(new)
    assert scores[0] == pytest.approx(0, abs=1e-6)
    assert 0 < scores[1] < math.inf


def test_whitening_inverts_and_pseudo_inverts():
    covariances = torch.stack([embeddings(20, 4, seed).T.cov() for seed in (0, 1)])
    for matrices in (covariances, torch.stack([covariances[0], torch.diag(torch.tensor([2.0, 1, 0, 0]).double())])):
        factor = whitening(matrices)
        assert torch.allclose(factor.mT @ factor, torch.linalg.pinv(matrices, hermitian=True), rtol=1e-6, atol=1e-9)


# Kernel density ---------------------------------------------------------------------------------------------------


def test_kde_score_equals_log_sum_exp():
    x, new = embeddings(15, 3), embeddings(6, 3, seed=1)
    kde = KernelDensity().fit(x)
    expected = [-log_density_by_hand(x.tolist(), at, kde.bandwidth.item()) for at in new.tolist()]
    assert torch.equal(kde.points, x)
    assert kde.score(new).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("count", "dim", "seed"), [(20, 2, 0), (13, 3, 1), (12, 1, 2), (3, 2, 3)])
def test_kde_bandwidth_has_the_best_cross_validated_likelihood(count, dim, seed):
    """In the unit of the embeddings."""
    x = embeddings(count, dim, seed)
    points, unit = x.tolist(), neighbor_distance(x.tolist()) / math.sqrt(dim)
    grid = [unit * 10 ** (-1 + 2 * k / 15) for k in range(16)]
    folds = np.array_split(np.arange(count), min(5, count))

    def likelihood(bandwidth):
        parts = []
        for fold in folds:
            others = [points[i] for i in range(count) if i not in fold]
            parts.append(sum(log_density_by_hand(others, points[i], bandwidth) for i in fold))
        return sum(parts) / len(parts)

    best = max(grid, key=likelihood)
    for scale in (1, 10):
        assert KernelDensity().fit(scale * x).bandwidth.item() == pytest.approx(scale * best)


def test_kde_bandwidth_is_near_the_neighbors_and_copies_do_not_count():
    """Embeddings as a network makes them: long, not negative. Then each is there twice."""
    x = (torch.randn(30, 512, generator=torch.Generator().manual_seed(0)) * 0.3 + 1).relu()
    unit = neighbor_distance(x.tolist()) / math.sqrt(512)
    for points in (x, x.repeat_interleave(2, 0)):
        kde = KernelDensity().fit(points)
        assert unit / 10 * 0.999 <= kde.bandwidth.item() <= unit * 10 * 1.001
        assert torch.isfinite(kde.score(x + 0.1)).all()


# All densities ----------------------------------------------------------------------------------------------------


@every_density
def test_what_holds_of_every_density(kind):
    """No input is changed; a row has the score that it has alone; float32 is computed in float64, by all but the
    nearest embeddings; with or without the first axis it is one density; the order of rows does not matter."""
    dtype, exact = (torch.float32, 1e-5) if kind == "nearest" else (torch.float64, 1e-12)
    x, new = embeddings(20, 6), embeddings(9, 6, seed=1)
    x_before, new_before = x.clone(), new.clone()
    fitted = DENSITIES[kind]().fit(x)
    scores = fitted.score(new)
    assert torch.equal(x, x_before)
    assert torch.equal(new, new_before)
    assert (scores.shape, scores.dtype, fitted.count) == ((9,), dtype, 1)
    assert torch.allclose(torch.cat([fitted.score(row) for row in new.split(1)]), scores, rtol=exact)
    batch = DENSITIES[kind]().fit(x[None])
    assert batch.count == 1
    assert torch.allclose(batch.score(new[None]), scores[None], rtol=exact)
    rounded, rounded_new = x.float(), new.float()
    scores = DENSITIES[kind]().fit(rounded).score(rounded_new)
    assert scores.dtype == dtype
    assert torch.equal(scores, DENSITIES[kind]().fit(rounded.double()).score(rounded_new.double()))
    if kind != "kde":  # whose folds are made of neighboring rows
        assert torch.allclose(DENSITIES[kind]().fit(x.flip(0)).score(new), fitted.score(new), rtol=max(exact, 1e-9))


@every_density
def test_outlier_scores_higher(kind):
    x = embeddings(24, 4)
    fitted = DENSITIES[kind]().fit(x)
    away = x.mean(0) + torch.tensor([[0.0], [10.0], [30.0], [90.0]]) * x.std(0)
    assert (fitted.score(away).diff() > 0).all()
    assert fitted.score(away)[1:].min() > fitted.score(x).max()


@every_density
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(1, 4), "at least 2 embeddings, got 1"),
        (torch.randn(0, 4), "at least 2 embeddings, got 0"),
        *((torch.tensor([[1.0, 2], [value, 3], [0, 1]]), "not finite") for value in (math.nan, math.inf, -math.inf)),
        (torch.ones(5, 4), "all embeddings are equal"),
        (torch.randn(5), r"must be \(K, N, D\) or \(N, D\), got \(5,\)"),
    ],
)
def test_what_no_density_can_be_fitted_to(kind, x, message):
    with pytest.raises(NotFiniteError if "finite" in message else DensityError, match=message):
        DENSITIES[kind]().fit(x)


# Several at once --------------------------------------------------------------------------------------------------


def mahalanobis(x, mean, covariance):
    d = x - mean
    return np.sqrt(np.einsum("...i,ij,...j->...", d, np.linalg.inv(covariance), d))


def by_scikit_learn(x):
    """Means and covariances of embeddings (N, L, D), a Gaussian for each location."""
    fits = [LedoitWolf().fit(x[:, location]) for location in range(x.shape[1])]
    pooled = np.mean([fit.covariance_ for fit in fits], axis=0)
    return [(fit.location_, (1 - POOLED) * fit.covariance_ + POOLED * pooled) for fit in fits]


@every_gaussian
def test_gaussians_shared_or_for_each_location_against_scikit_learn(kind):
    x, new = several(12, 7, 6), several(5, 7, 6, seed=1)
    shared, each = fit_density(kind, x, True), fit_density(kind, x, False)
    assert (shared.count, each.count, each.factor.shape) == (1, 7, (7, 6, 6))
    assert (shared.mean.dtype, each.mean.dtype) == (torch.float64, torch.float32)
    one = LedoitWolf().fit(x.reshape(-1, 6).numpy())
    expected = mahalanobis(new.numpy(), one.location_, one.covariance_)
    assert np.allclose(shared.score(group_by_density(new, True)).view(5, 7), expected, rtol=1e-6)
    scores = each.score(group_by_density(new, False))
    for location, fit in enumerate(by_scikit_learn(x)):
        assert np.allclose(scores[location], mahalanobis(new[:, location].numpy(), *fit), rtol=1e-4)


def test_a_location_that_never_changes_is_no_infinity():
    x = several(12, 4, 5)
    x[:, 2] = x[0, 2]
    assert torch.isfinite(fit_density("torch", x, False).score(group_by_density(x + 0.1, False))).all()


def test_a_shared_density_is_fitted_to_no_more_images_than_fit(monkeypatch):
    x = several(20, 5, 3)
    monkeypatch.setattr(density, "SHARED_BYTES", 8 * 3 * 5 * 8)
    few = fit_density("torch", x, True)
    expected = GaussianTorch().fit(x[torch.arange(8) * 20 // 8].flatten(0, 1)[None])
    assert torch.equal(few.mean, expected.mean)
    assert fit_density("torch", x, False).mean.shape == (5, 3)


# Nearest embeddings -----------------------------------------------------------------------------------------------


def nearest_by_loops(x, new, shape, radius):
    """Distances of new (M, L, D) from the nearest of x (N, L, D) in at most so many windows' distance, its window and
    image."""
    results = {}
    for row, place in np.ndindex(new.shape[:2]):
        y, x_place = divmod(place, shape[1])
        options = [
            ((new[row, place] - x[image, other]).norm().item(), other, image)
            for image, other in np.ndindex(x.shape[:2])
            if max(abs(other // shape[1] - y), abs(other % shape[1] - x_place)) <= radius
        ]
        results[row, place] = min(options)
    return results


@pytest.mark.parametrize(("shared", "radius"), [(False, 1), (True, 9)])
def test_nearest_embeddings_against_a_loop(shared, radius):
    """Their distances, windows and images, at the border too."""
    x, new, shape = several(6, 12, 3), several(4, 12, 3, seed=1), (3, 4)
    x = x.half().float()  # as they are kept
    density = fit_density("nearest", x, shared, shape)
    distances = density.score(group_by_density(new.float(), shared))
    distances = distances.view(4, 12) if shared else distances.T
    for (row, place), expected in nearest_by_loops(x, new.float(), shape, radius).items():
        assert math.isclose(distances[row, place].item(), expected[0], rel_tol=1e-5)
        where = density.nearest_at(new[row, place][None], torch.tensor([place]))
        assert tuple(part.item() for part in where) == expected[1:]


def test_cover_is_greedy():
    points = several(30, 2, 3).transpose(0, 1)
    chosen = cover(points, 7)
    for one, numbers in zip(points, chosen.tolist()):
        expected = [int((one - one.mean(0)).norm(dim=1).argmin())]
        while len(expected) < 7:
            distances = torch.cdist(one, one[expected]).amin(1)
            expected.append(int(distances.argmax()))
        assert numbers == expected
    assert len({*cover(points[:1], 30)[0].tolist()}) == 30


def test_few_embeddings_that_cover_all_are_kept(monkeypatch):
    monkeypatch.setattr(density, "LOCAL_POINTS", 8)
    x = several(30, 4, 3)
    fitted = fit_density("nearest", x, False, (2, 2))
    assert fitted.points.shape == (4, 3, 8)
    assert torch.equal(fitted.images.long(), cover(x.transpose(0, 1).half().float(), 8))


def with_copies(x):
    """Embeddings (N, L, D), a third of which are copies of others; at one location there are no others."""
    x, third = x.clone(), len(x) // 3
    x[:third] = x[third : 2 * third]
    x[:, 1] = x[torch.arange(len(x)) % third, 1]
    return x


ALIKE = pytest.mark.parametrize("change", [torch.clone, with_copies, torch.round, lambda x: (x / 8).round()])


@ALIKE
def test_covers_without_one_are_chosen_from_the_others(change):
    """And their copies; among copies and many equal distances too. An image may decide the first choice, or be chosen,
    or change nothing."""
    points = change(several(30, 12, 3).float()).transpose(0, 1)
    chosen, cases = cover(points, 8), set()
    covers = covers_without(points, chosen)
    for image in range(30):
        others = torch.tensor([i for i in range(30) if i != image])
        expected = others[cover(points[:, others], 8)]
        for one, own, row, without in zip(points, chosen, covers[:, image], expected):
            assert torch.equal(row[others], (one[others, None] == one[without]).all(2).any(1))
            cases.add((image in own, bool(own[0] != without[0])))  # chosen; the first choice changes
    assert cases >= {(True, True), (True, False), (False, False)}
    assert (False, True) in cases or change is not torch.clone


@ALIKE
@pytest.mark.parametrize("count", [30, 10, 9, 8, 4])  # 8 are kept, if there are so many
def test_leaving_one_out_is_a_fit_to_the_others(monkeypatch, change, count):
    """Compare every image, at every location, beside the border too; in any number of parts."""
    monkeypatch.setattr(density, "LOCAL_POINTS", 8)
    x, shape = change(several(count, 12, 3).float()), (3, 4)
    fitted = fit_density("nearest", x, False, shape)
    left_out = fitted.leave_one_out(x.transpose(0, 1))
    assert (left_out.shape, left_out.dtype) == ((12, count), torch.float64)
    for image in range(count):
        others = x[[i for i in range(count) if i != image]]
        expected = fit_density("nearest", others, False, shape).score(x[image : image + 1].transpose(0, 1))
        assert torch.allclose(left_out[:, image], expected[:, 0].double(), rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(density, "LEFT_OUT_BYTES", 4 * count**2 * 5)
    assert torch.equal(fitted.leave_one_out(x.transpose(0, 1)), left_out)


def test_leaving_one_out_does_not_depend_on_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(density, "LOCAL_POINTS", 8)
    x, before, results = several(190, 4, 4).float(), torch.get_num_threads(), []  # 190^2: enough for two threads
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(fit_density("nearest", x, False, (2, 2)).leave_one_out(x.transpose(0, 1)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_a_shared_memory_leaves_out_all_windows_of_an_image():
    x = several(5, 4, 3).float()
    left_out = fit_density("nearest", x, True, (2, 2)).leave_one_out(group_by_density(x, True)).view(5, 4)
    for image in range(5):
        others = x[[i for i in range(5) if i != image]].flatten(0, 1)
        assert torch.allclose(left_out[image], torch.cdist(x[image], others).amin(1).double(), rtol=1e-5)


# Held-out scores --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "shared", "images", "locations"),
    [
        *((kind, True, images, 1) for kind in DENSITIES for images in (7, 4, 3)),
        *((kind, shared, images, 4) for kind in ("torch", "nearest") for shared in (True, False) for images in (13, 4)),
    ],
)
def test_held_out_scores_are_those_of_a_fit_without_the_fold(kind, shared, images, locations):
    """Three images are scored by a density of all of them; nearest embeddings leave out image by image."""
    x = several(images, locations, 3)
    scores, _ = held_out(kind, x, shared)
    assert (scores.shape, scores.dtype) == ((images, locations), torch.float64)
    for image in range(images):
        others = [i for i in range(images) if images < 4 or i % min(5, images) != image % min(5, images)]
        others = [i for i in range(images) if i != image] if kind == "nearest" else others
        expected = fit_density(kind, x[others], shared).score(group_by_density(x[image : image + 1], shared))
        exact = 1e-9 if shared and kind != "nearest" else 1e-5
        assert torch.allclose(scores[image], expected.flatten().double(), rtol=exact)
    if images > 3:
        together = fit_density(kind, x, shared).score(group_by_density(x, shared))
        assert scores.mean() > together.mean()


def test_likelihoods_are_those_of_scipy():
    y, sums = several(13, 3, 4).numpy(), {True: 0.0, False: 0.0}
    for fold in range(5):
        inside, others = y[fold::5], y[np.arange(13) % 5 != fold]
        one = LedoitWolf().fit(others.reshape(-1, 4))
        for location, fit in enumerate(by_scikit_learn(others)):
            sums[False] += multivariate_normal(*fit).logpdf(inside[:, location]).sum()
            sums[True] += multivariate_normal(one.location_, one.covariance_).logpdf(inside[:, location]).sum()
    for shared, total in sums.items():
        _, likelihood = held_out("torch", torch.from_numpy(y), shared)
        assert likelihood - 2 * math.log(2 * math.pi) == pytest.approx(total / (13 * 3), rel=1e-6)
    scores, likelihood = held_out("kde", torch.from_numpy(y[:, :1]), True)
    assert likelihood == pytest.approx(-scores.mean().item())
