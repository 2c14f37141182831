import math

import numpy as np
import pytest
import torch
from sklearn.covariance import LedoitWolf

import density
from density import (
    DENSITIES,
    POOLED,
    DensityError,
    GaussianSklearn,
    GaussianTorch,
    KernelDensity,
    NotFiniteError,
    fit_density,
    group_by_density,
    held_out,
    ledoit_wolf,
    whitening,
)


def embeddings(count, dim, seed=0):
    """Correlated, of unequal scale and away from zero, as a network's features are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    scale = torch.linspace(0.1, 3, dim, dtype=torch.float64)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) @ mixing * scale + 5


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
    most = max(logs)
    return most + math.log(sum(math.exp(value - most) for value in logs)) - math.log(len(logs))


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


def test_ledoit_wolf_by_hand():
    """S = diag(2, 1/2), m = 5/4; d = 2 (3/4)^2 = 9/8, b = 4 (2^2 + (1/2)^2) / 4^2 = 17/16, s = b / d = 17/18."""
    covariance, shrinkage = ledoit_wolf(torch.tensor([[2, 0], [-2, 0], [0, 1], [0, -1]], dtype=torch.float64))
    assert shrinkage.item() == pytest.approx(17 / 18)
    assert covariance.tolist() == [pytest.approx([23.25 / 18, 0]), pytest.approx([0, 21.75 / 18])]


def test_shrinkage_is_at_most_1():
    """S = diag(0.605, 1/2), nearly a sphere: d = 0.0055 is less than b = 0.11."""
    covariance, shrinkage = ledoit_wolf(torch.tensor([[1.1, 0], [-1.1, 0], [0, 1], [0, -1]], dtype=torch.float64))
    assert shrinkage.item() == 1
    assert torch.allclose(covariance, 0.5525 * torch.eye(2, dtype=torch.float64))


def test_ledoit_wolf_of_a_sphere_is_the_target():
    covariance, shrinkage = ledoit_wolf(torch.tensor([[1, 0], [-1, 0], [0, 1], [0, -1]], dtype=torch.float64))
    assert shrinkage.item() == 1
    assert torch.equal(covariance, 0.5 * torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["torch", "sklearn"])
def test_score_by_hand(kind):
    x = torch.tensor([[2, 0], [-2, 0], [0, 1], [0, -1]], dtype=torch.float64) + torch.tensor([10, 20])
    density = DENSITIES[kind]().fit(x)
    points = torch.tensor([[10, 20], [12, 20], [10, 21], [13, 24]], dtype=torch.float64)
    a, b = 18 / 23.25, 18 / 21.75
    expected = [0, math.sqrt(4 * a), math.sqrt(b), math.sqrt(9 * a + 16 * b)]
    assert density.mean.tolist() == [10, 20]
    assert density.score(points).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("shape", [(20, 40), (200, 12), (50, 50), (6, 1)])
def test_gaussian_torch_equals_sklearn(shape):
    x = embeddings(*shape)
    new = embeddings(10, shape[1], seed=1)
    density, expected = GaussianTorch().fit(x), LedoitWolf().fit(x.numpy())
    centered = x - x.mean(0)
    covariance, shrinkage = ledoit_wolf(centered)
    if shape[1] > 1:  # of a single dimension there is nothing to shrink: 0 and 1 give the same covariance
        assert shrinkage.item() == pytest.approx(expected.shrinkage_, rel=1e-6)
    largest = np.abs(expected.covariance_).max()
    assert np.allclose(density.mean, expected.location_, rtol=1e-9)
    assert np.allclose(covariance, expected.covariance_, rtol=1e-6, atol=1e-9 * largest)
    assert np.allclose(density.factor.mT @ density.factor, np.linalg.inv(expected.covariance_), rtol=1e-6, atol=1e-9)
    for points in (x, new):
        assert np.allclose(density.score(points), np.sqrt(expected.mahalanobis(points.numpy())), rtol=1e-6)


@pytest.mark.parametrize("shape", [(3, 8), (20, 40), (200, 12)])
def test_torch_and_sklearn_are_interchangeable(shape):
    x, new = embeddings(*shape), embeddings(10, shape[1], seed=1)
    first, second = GaussianTorch().fit(x), GaussianSklearn().fit(x)
    states = first.state_dict(), second.state_dict()
    assert list(states[0]) == list(states[1]) == ["mean", "factor"]
    for name in states[0]:
        assert states[0][name].shape == states[1][name].shape
        assert states[0][name].dtype == states[1][name].dtype == torch.float64
        assert torch.allclose(states[0][name], states[1][name], rtol=1e-6, atol=1e-9)
    assert torch.allclose(first.score(new), second.score(new), rtol=1e-6)


@pytest.mark.parametrize("kind", ["torch", "sklearn"])
def test_mahalanobis_distance_is_not_squared(kind):
    density = DENSITIES[kind]().fit(embeddings(40, 6))
    step = embeddings(5, 6, seed=1) - density.mean
    assert torch.allclose(density.score(density.mean + 3 * step), 3 * density.score(density.mean + step))


def test_score_without_shrinkage_does_not_depend_on_units():
    """With many images the shrinkage vanishes, and a distance in standard deviations has no unit."""
    x = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    units = torch.tensor([1, 2, 5])
    new = embeddings(10, 3)
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


# Kernel density ---------------------------------------------------------------------------------------------------


def test_kde_score_equals_log_sum_exp():
    x, new = embeddings(15, 3), embeddings(6, 3, seed=1)
    density = KernelDensity().fit(x)
    expected = [-log_density_by_hand(x.tolist(), at, density.bandwidth.item()) for at in new.tolist()]
    assert density.score(new).tolist() == pytest.approx(expected, rel=1e-6)


def test_kde_score_by_hand():
    """Two equal kernels of width 2 and one dimension: the density between them is theirs at distance 1."""
    density = KernelDensity()
    density.points = torch.tensor([[0.0], [2.0]], dtype=torch.float64)
    density.bandwidth = torch.tensor(2.0, dtype=torch.float64)
    expected = -math.log(math.exp(-1 / 8) / math.sqrt(2 * math.pi * 4))
    assert density.score(torch.tensor([[1.0]])).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("count", "dim", "seed"), [(20, 2, 0), (23, 3, 1), (12, 1, 2), (3, 2, 3)])
def test_kde_bandwidth_has_the_best_cross_validated_likelihood(count, dim, seed):
    x = embeddings(count, dim, seed).tolist()
    nearest = [min(math.dist(a, b) for b in x if b != a) for a in x]
    unit = sorted(nearest)[(count - 1) // 2] / math.sqrt(dim)  # torch's median: the lower one of the middle
    grid = [unit * 10 ** (-1 + 2 * k / 15) for k in range(16)]
    folds = np.array_split(np.arange(count), min(5, count))

    def likelihood(bandwidth):
        parts = []
        for fold in folds:
            points = [x[i] for i in range(count) if i not in fold]
            parts.append(sum(log_density_by_hand(points, x[i], bandwidth) for i in fold))
        return sum(parts) / len(parts)

    best = max(grid, key=likelihood)
    assert KernelDensity().fit(torch.tensor(x, dtype=torch.float64)).bandwidth.item() == pytest.approx(best)


def test_kde_bandwidth_is_in_units_of_the_embedding():
    x = embeddings(20, 3)
    bandwidth = KernelDensity().fit(x).bandwidth
    assert KernelDensity().fit(10 * x).bandwidth.item() == pytest.approx(10 * bandwidth.item())


def test_kde_keeps_its_points_in_order():
    x = embeddings(10, 3)
    assert torch.equal(KernelDensity().fit(x).points, x)


def test_kde_with_copies_of_an_image():
    x = embeddings(8, 3)
    density = KernelDensity().fit(torch.cat([x, x[:3]]))
    assert density.bandwidth > 0
    assert torch.isfinite(density.score(embeddings(5, 3, seed=1))).all()


# All densities ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DENSITIES)
def test_outlier_scores_higher(kind):
    x = embeddings(24, 4)
    density = DENSITIES[kind]().fit(x)
    away = x.mean(0) + torch.tensor([[0.0], [10.0], [30.0], [90.0]]) * x.std(0)
    assert (density.score(away).diff() > 0).all()
    assert density.score(away)[1:].min() > density.score(x).max()


@pytest.mark.parametrize("kind", DENSITIES)
def test_score_of_a_row_does_not_depend_on_the_others(kind):
    density = DENSITIES[kind]().fit(embeddings(20, 6))
    new = embeddings(9, 6, seed=1)
    together = density.score(new)
    assert together.shape == (9,)
    assert together.dtype == torch.float64
    for i in range(9):
        assert density.score(new[i : i + 1]).item() == pytest.approx(together[i].item(), rel=1e-12)
    assert torch.allclose(density.score(new.flip(0)), together.flip(0), rtol=1e-12)


@pytest.mark.parametrize("kind", DENSITIES)
def test_fit_and_score_change_no_input(kind):
    x, new = embeddings(20, 6), embeddings(9, 6, seed=1)
    x_before, new_before = x.clone(), new.clone()
    DENSITIES[kind]().fit(x).score(new)
    assert torch.equal(x, x_before)
    assert torch.equal(new, new_before)


@pytest.mark.parametrize("kind", DENSITIES)
def test_float32_is_computed_in_float64(kind):
    x = embeddings(20, 6).float()
    new = embeddings(9, 6, seed=1).float()
    scores = DENSITIES[kind]().fit(x).score(new)
    assert scores.dtype == torch.float64
    assert torch.equal(scores, DENSITIES[kind]().fit(x.double()).score(new.double()))


@pytest.mark.parametrize("kind", ["torch", "sklearn"])
def test_order_of_gaussian_rows_does_not_matter(kind):
    x, new = embeddings(20, 6), embeddings(9, 6, seed=1)
    assert torch.allclose(DENSITIES[kind]().fit(x).score(new), DENSITIES[kind]().fit(x.flip(0)).score(new), rtol=1e-9)


# Several at once --------------------------------------------------------------------------------------------------


def several(images, locations, dim, seed=0, spread=1.0):
    """Normal embeddings (N, L, D) whose mean and deviation differ from location to location by ``spread``."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    scale = (spread * torch.rand(locations, 1, generator=generator, dtype=torch.float64)).exp()
    mean = 3 * spread * torch.randn(locations, dim, generator=generator, dtype=torch.float64)
    noise = torch.randn(images, locations, dim, generator=generator, dtype=torch.float64)
    return mean + scale * (noise @ mix) + 5


def mahalanobis(x, mean, covariance):
    d = x - mean
    return np.sqrt(np.einsum("...i,ij,...j->...", d, np.linalg.inv(covariance), d))


def by_scikit_learn(x):
    """Means and covariances of embeddings (N, L, D), a Gaussian for each location."""
    fits = [LedoitWolf().fit(x[:, location]) for location in range(x.shape[1])]
    pooled = np.mean([fit.covariance_ for fit in fits], axis=0)
    return [(fit.location_, (1 - POOLED) * fit.covariance_ + POOLED * pooled) for fit in fits]


@pytest.mark.parametrize("kind", ["torch", "sklearn"])
def test_gaussians_shared_or_for_each_location_against_scikit_learn(kind):
    x, new = several(12, 7, 6), several(5, 7, 6, seed=1)
    shared, each = fit_density(kind, x, True), fit_density(kind, x, False)
    assert (shared.count, each.count, each.factor.shape) == (1, 7, (7, 6, 6))
    assert (shared.mean.dtype, each.mean.dtype) == (torch.float64, torch.float32)
    one = LedoitWolf().fit(x.reshape(-1, 6).numpy())
    expected = mahalanobis(new.numpy(), one.location_, one.covariance_)
    assert np.allclose(shared.score(group_by_density(new, True)).view(5, 7), expected, rtol=1e-6)
    for found, own, fit in zip(
        each.score(group_by_density(new, False)), new.numpy().swapaxes(0, 1), by_scikit_learn(x)
    ):
        assert np.allclose(found, mahalanobis(own, *fit), rtol=1e-4)


@pytest.mark.parametrize("kind", DENSITIES)
def test_one_density_with_or_without_the_first_axis(kind):
    x, new = embeddings(20, 6), embeddings(9, 6, seed=1)
    one, batch = DENSITIES[kind]().fit(x), DENSITIES[kind]().fit(x[None])
    assert one.count == batch.count == 1
    assert torch.allclose(batch.score(new[None]), one.score(new)[None], rtol=1e-12)


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


def test_whitening_inverts_and_pseudo_inverts():
    covariances = torch.stack([embeddings(20, 4, seed).T.cov() for seed in (0, 1)])
    for given in (covariances, torch.stack([covariances[0], torch.diag(torch.tensor([2.0, 1, 0, 0]).double())])):
        factor = whitening(given)
        assert torch.allclose(factor.mT @ factor, torch.linalg.pinv(given, hermitian=True), rtol=1e-6, atol=1e-9)


# Held-out scores and the threshold --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DENSITIES)
@pytest.mark.parametrize("count", [13, 4, 3])
def test_held_out_scores_equal_explicit_loop(kind, count):
    """Of one window an image. Three images are scored by a density of all of them."""
    x = embeddings(count, 3)
    scores, _ = held_out(kind, x[:, None], True)
    assert scores.shape == (count, 1)
    assert scores.dtype == torch.float64
    for i in range(count):
        others = [x[j] for j in range(count) if count < 4 or j % min(5, count) != i % min(5, count)]
        expected = DENSITIES[kind]().fit(torch.stack(others)).score(x[i : i + 1])
        assert scores[i].item() == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("images", [13, 4])
@pytest.mark.parametrize("shared", [True, False])
def test_held_out_scores_of_windows_are_those_of_a_fit_without_the_fold(shared, images):
    x = several(images, 4, 5)
    found, _ = held_out("torch", x, shared)
    for image in range(images):
        fitted = fit_density("torch", x[torch.arange(images) % 5 != image % 5], shared)
        expected = fitted.score(group_by_density(x[image : image + 1], shared)).reshape(-1)
        assert torch.allclose(found[image], expected.double(), rtol=1e-5)
    whole = fit_density("torch", x, shared).score(group_by_density(x, shared))
    assert found.mean() > whole.mean()


def test_likelihoods_are_those_of_scipy():
    from scipy.stats import multivariate_normal

    y, sums = several(13, 3, 4).numpy(), {True: 0.0, False: 0.0}
    for image in range(13):
        others = y[np.arange(13) % 5 != image % 5]
        one = LedoitWolf().fit(others.reshape(-1, 4))
        for own, fit in zip(y[image], by_scikit_learn(others)):
            sums[False] += multivariate_normal(*fit).logpdf(own)
            sums[True] += multivariate_normal(one.location_, one.covariance_).logpdf(own)
    for shared, total in sums.items():
        _, likelihood = held_out("torch", torch.from_numpy(y), shared)
        assert likelihood - 2 * math.log(2 * math.pi) == pytest.approx(total / (13 * 3), rel=1e-6)
    scores, likelihood = held_out("kde", torch.from_numpy(y[:, :1]), True)
    assert likelihood == pytest.approx(-scores.mean().item())


def test_held_out_outlier_does_not_hide_itself():
    x = embeddings(20, 4)
    x[7] += 100 * x.std(0)
    assert held_out("torch", x[:, None], True)[0][7] > 5 * GaussianTorch().fit(x).score(x)[7]


# Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DENSITIES)
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(1, 4), "at least 2 embeddings, got 1"),
        (torch.randn(0, 4), "at least 2 embeddings, got 0"),
        (torch.tensor([[1.0, 2], [math.nan, 3], [0, 1]]), "not finite"),
        (torch.tensor([[1.0, 2], [math.inf, 3], [0, 1]]), "not finite"),
        (torch.tensor([[1.0, 2], [-math.inf, 3], [0, 1]]), "not finite"),
        (torch.ones(5, 4), "all embeddings are equal"),
        (torch.randn(5), r"must be \(K, N, D\) or \(N, D\), got \(5,\)"),
    ],
)
def test_what_no_density_can_be_fitted_to(kind, x, message):
    with pytest.raises(NotFiniteError if "finite" in message else DensityError, match=message):
        DENSITIES[kind]().fit(x)


def test_bandwidth_is_near_the_neighbors_of_many_embeddings_and_copies_do_not_count():
    """Embeddings as a network makes them: long, not negative. Each is there twice."""
    x = (torch.randn(60, 512, generator=torch.Generator().manual_seed(0)) * 0.3 + 1).relu()
    nearest = sorted(min(math.dist(a, b) for b in x.tolist() if b != a) for a in x.tolist())
    unit = nearest[29] / math.sqrt(512)
    assert unit / 10 * 0.999 <= KernelDensity().fit(x).bandwidth.item() <= unit * 10 * 1.001
    grid_of_copies = KernelDensity().fit(x.repeat_interleave(2, 0)).bandwidth.item()
    assert unit / 10 * 0.999 <= grid_of_copies <= unit * 10 * 1.001


def test_two_images_suffice_and_both_gaussians_agree():
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    new = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    one, other = (kind().fit(x).score(new) for kind in (GaussianTorch, GaussianSklearn))
    assert torch.allclose(one, other, rtol=1e-6)
    assert torch.isfinite(one).all()
