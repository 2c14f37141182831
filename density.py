"""Densities of normal embeddings: a Gaussian in torch, the same in scikit-learn, a kernel density estimate.

Owns the estimators and the table ``DENSITIES``. Embeddings (N, D) in, anomaly scores (N,) float64 out, higher is more
anomalous. Knows nothing of images or networks.
Sources: Rippel et al., ICPR 2020 (the Gaussian on deep features); Ledoit and Wolf, "A well-conditioned estimator for
large-dimensional covariance matrices", J. Multivariate Analysis 88 (2004) (the shrinkage).
"""

import math

import torch
from torch import Tensor, nn


class GaussianTorch(nn.Module):
    """Gaussian with Ledoit-Wolf covariance, float64, on the embeddings' device.

    Attributes (buffers): mean (D,), precision (D, D), shrinkage () in [0, 1], all float64.
    """

    def __init__(self) -> None:
        super().__init__()
        for name in ("mean", "precision", "shrinkage"):
            self.register_buffer(name, torch.empty(0, dtype=torch.float64))

    def fit(self, embeddings: Tensor) -> "GaussianTorch":
        """Fit to embeddings (N, D), N >= 2. Raises ValueError if they are too few, not finite or all equal."""
        x = _check(embeddings)
        self.mean = x.mean(0)
        covariance, self.shrinkage = ledoit_wolf(x - self.mean)
        factor, failed = torch.linalg.cholesky_ex(covariance)
        # Two images are not shrunk at all: the pseudo-inverse then, as scikit-learn takes it
        self.precision = torch.linalg.pinv(covariance, hermitian=True) if failed else torch.cholesky_inverse(factor)
        return self

    def score(self, embeddings: Tensor) -> Tensor:
        """Mahalanobis distance (not squared, dimensionless) of each of (N, D): (N,) float64, higher is more
        anomalous. Each distance depends on its own embedding alone."""
        x = embeddings.to(self.mean) - self.mean
        return ((x @ self.precision) * x).sum(1).clamp(min=0).sqrt()


class GaussianSklearn(GaussianTorch):
    """The same Gaussian, its mean and covariance estimated by scikit-learn's LedoitWolf on the CPU."""

    def fit(self, embeddings: Tensor) -> "GaussianSklearn":
        from sklearn.covariance import LedoitWolf

        estimator = LedoitWolf().fit(_check(embeddings).cpu().numpy())
        device = embeddings.device
        self.mean = torch.from_numpy(estimator.location_).to(device)
        self.precision = torch.from_numpy(estimator.precision_).to(device)
        self.shrinkage = torch.tensor(estimator.shrinkage_, dtype=torch.float64, device=device)
        return self


class KernelDensity(nn.Module):
    """scikit-learn's KernelDensity with a Gaussian kernel; the bandwidth by cross-validation on the normal embeddings.

    Attributes (buffers, float64): points (N, D), bandwidth () in units of the embedding.
    """

    candidates = 16  # bandwidths tried, in equal ratios around the typical distance of neighbours
    folds = 5

    def __init__(self) -> None:
        super().__init__()
        for name in ("points", "bandwidth"):
            self.register_buffer(name, torch.empty(0, dtype=torch.float64))

    def fit(self, embeddings: Tensor) -> "KernelDensity":
        """Fit to embeddings (N, D), N >= 2. Raises ValueError as GaussianTorch.fit does."""
        from sklearn.model_selection import GridSearchCV
        from sklearn.neighbors import KernelDensity as SklearnKernelDensity

        x = _check(embeddings)
        # not by matrix products, whose rounding leaves a point at some distance from itself
        distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
        distance[distance == 0] = math.inf  # the point itself and copies of it are no neighbours
        # The best bandwidth per dimension is near the neighbours' distance over sqrt(D).
        unit = distance.amin(1).median() / math.sqrt(x.shape[1])
        grid = (unit * torch.logspace(-1, 1, self.candidates, dtype=torch.float64, device=x.device)).tolist()
        folds = min(self.folds, len(x))
        search = GridSearchCV(SklearnKernelDensity(), {"bandwidth": grid}, cv=folds)
        search.fit(x.cpu().numpy())
        self.points = x
        self.bandwidth = torch.tensor(search.best_params_["bandwidth"], dtype=torch.float64, device=x.device)
        return self

    def score(self, embeddings: Tensor) -> Tensor:
        """Negative log density (natural logarithm, may be negative) of each of (N, D): (N,) float64."""
        from sklearn.neighbors import KernelDensity as SklearnKernelDensity

        estimator = SklearnKernelDensity(bandwidth=self.bandwidth.item()).fit(self.points.cpu().numpy())
        log_density = estimator.score_samples(embeddings.double().cpu().numpy())
        return -torch.from_numpy(log_density).to(embeddings.device)


DENSITIES = {"torch": GaussianTorch, "sklearn": GaussianSklearn, "kde": KernelDensity}


def ledoit_wolf(centered: Tensor) -> tuple[Tensor, Tensor]:
    """Shrunk covariance of centred data X (N, D): (D, D), and the shrinkage as a 0-d tensor; see ``shrunk``."""
    n = len(centered)
    return shrunk(centered.T @ centered / n, centered.square().sum(1).square().sum(), n)


def shrunk(sample: Tensor, fourth: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Ledoit and Wolf's covariances (1 - s) S + s m I, with m = tr(S) / D, and their shrinkages s in [0, 1].

    sample: S (..., D, D) = X'X / n of centred data X (n, D); fourth: (...,), the sum of |x_k|^4 over the data.
    s = min(b, d) / d is Ledoit and Wolf's estimate of the best shrinkage: d = |S - m I|^2 is how far S is from the
    target, b = sum_k |x_k x_k' - S|^2 / n^2 how much S itself is in error.
    """
    dim = sample.shape[-1]
    scale = (sample.diagonal(dim1=-2, dim2=-1).sum(-1) / dim)[..., None, None]
    eye = torch.eye(dim, dtype=sample.dtype, device=sample.device)
    distance = (sample - scale * eye).square().sum((-2, -1))
    # sum_k |x_k x_k' - S|^2 = sum_k |x_k|^4 - n |S|^2, for the x_k x_k' average to S
    error = ((fourth / n - sample.square().sum((-2, -1))) / n).clamp(min=0)
    shrinkage = torch.where(distance > 0, torch.minimum(error, distance) / distance, torch.ones_like(distance))
    weight = shrinkage[..., None, None]
    return (1 - weight) * sample + weight * scale * eye, shrinkage


def held_out_scores(kind: str, embeddings: Tensor, folds: int = 5) -> Tensor:
    """Score each normal embedding (N, D) by a density fitted on the other folds: (N,) float64, in order.

    What a new normal image would score, as far as the normal images can tell; the basis of a threshold.
    Fold of image i is i modulo ``folds``. With fewer than four images every image is scored by all of them.
    """
    x = _check(embeddings)
    folds = min(folds, len(x))
    if len(x) < 4:
        return DENSITIES[kind]().fit(x).score(x)
    fold = torch.arange(len(x), device=x.device) % folds
    scores = torch.empty(len(x), dtype=torch.float64, device=x.device)
    for k in range(folds):
        others = x[fold != k]
        if (others == others[0]).all():  # copies of one image are no distribution
            others = x
        scores[fold == k] = DENSITIES[kind]().fit(others).score(x[fold == k])
    return scores


def _check(embeddings: Tensor) -> Tensor:
    """float64 embeddings, or a ValueError that says why no density can be fitted to them."""
    if embeddings.ndim != 2:
        raise ValueError(f"embeddings must be (N, D), got {tuple(embeddings.shape)}")
    if len(embeddings) < 2:
        raise ValueError(f"a density needs at least 2 embeddings, got {len(embeddings)}")
    x = embeddings.detach().double()
    if not torch.isfinite(x).all():
        raise ValueError("the embeddings are not finite")
    if (x == x[0]).all():
        raise ValueError("all embeddings are equal: the images, or what the network sees in them, do not differ")
    return x
