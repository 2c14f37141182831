"""Densities of normal embeddings: a Gaussian in torch, the same in scikit-learn, a kernel density estimate.

Owns the estimators, the table ``DENSITIES`` and held-out distances. K densities are fitted in one batch: embeddings
(K, N, D) in, anomaly scores (K, N) out, higher is more anomalous; without the first axis it is one density. Knows
nothing of images or networks.
Sources: Rippel et al., ICPR 2020 (the Gaussian on deep features); Ledoit and Wolf, "A well-conditioned estimator for
large-dimensional covariance matrices", J. Multivariate Analysis 88 (2004) (the shrinkage).
"""

import math

import torch
from torch import Tensor, nn

POOLED = 0.05  # share of the mean covariance in that of each of several Gaussians
FOLDS = 5
SHARED_BYTES = 48 * 2**20  # float64 embeddings that one density of all locations is fitted to, at most
AT_ONCE = 64  # Gaussians whose embeddings are brought to float64 together


class DensityError(ValueError):
    """No density can be fitted to the embeddings; the message says why."""


class NotFiniteError(DensityError):
    """The embeddings are not finite: the network is broken, not the images."""


class GaussianTorch(nn.Module):
    """Gaussians with Ledoit-Wolf covariance, computed in float64.

    Of several, each covariance is (1 - POOLED) its own and POOLED the mean of all: where the training images are all
    alike, a gray level more would else be infinitely unusual. Several are kept in float32, half the file; one in
    float64.
    Attributes (buffers): mean (K, D), factor (K, D, D) with |factor (x - mean)| the Mahalanobis distance.
    """

    unit = "Mahalanobis distance"
    several = True  # K > 1 can be
    has_gradient = True

    def __init__(self) -> None:
        super().__init__()
        for name in ("mean", "factor"):
            self.register_buffer(name, torch.empty(0, dtype=torch.float64))

    @property
    def count(self) -> int:
        """K."""
        return len(self.mean) if self.mean.ndim > 1 else 1

    def fit(self, embeddings: Tensor) -> "GaussianTorch":
        """Fit to embeddings (K, N, D), N >= 2. Raises DensityError if they are too few, not finite or all equal."""
        x = _check(embeddings)
        some = x.split(AT_ONCE) if x.ndim == 3 else [x]
        mean, covariance = map(torch.cat, zip(*(self.estimate(part.double()) for part in some)))
        dtype = torch.float64
        if mean.ndim > 1 and len(mean) > 1:
            covariance, dtype = (1 - POOLED) * covariance + POOLED * covariance.mean(0), torch.float32
        self.mean, self.factor = mean.to(dtype), whitening(covariance).to(dtype)
        return self

    def estimate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Means (K, D) and covariances (K, D, D) of float64 embeddings (K, N, D)."""
        mean = x.mean(-2)
        return mean, ledoit_wolf(x - mean[..., None, :])[0]

    def score(self, embeddings: Tensor) -> Tensor:
        """Mahalanobis distance (not squared, dimensionless) of embeddings (K, N, D): (K, N), in the buffers' dtype.
        Each depends on its own embedding alone."""
        return ((embeddings.to(self.mean) - self.mean[..., None, :]) @ self.factor.mT).norm(dim=-1)

    def log_likelihood(self, scores: Tensor) -> float:
        """Mean log likelihood of embeddings with these scores (K, N): natural logarithm, without the constant."""
        logdet = torch.linalg.slogdet(self.factor.double())[1]
        return (logdet[..., None] - scores.double().square() / 2).mean().item()


class GaussianSklearn(GaussianTorch):
    """The same Gaussians, means and covariances estimated by scikit-learn's LedoitWolf on the CPU."""

    def estimate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        from sklearn.covariance import LedoitWolf

        fits = [LedoitWolf().fit(each) for each in x.reshape(-1, *x.shape[-2:]).cpu().numpy()]
        means, covariances = (
            torch.stack([torch.from_numpy(getattr(fit, name)) for fit in fits]).to(x.device)
            for name in ("location_", "covariance_")
        )
        return means.view(*x.shape[:-2], -1), covariances.view(*x.shape[:-2], x.shape[-1], -1)


class KernelDensity(nn.Module):
    """scikit-learn's KernelDensity with a Gaussian kernel; the bandwidth by cross-validation on the normal embeddings.

    Attributes (buffers, float64): points (N, D), bandwidth () in units of the embedding.
    """

    unit = "negative log density"
    several = False
    has_gradient = False
    count = 1
    candidates = 16  # bandwidths tried, in equal ratios around the typical distance of neighbors

    def __init__(self) -> None:
        super().__init__()
        for name in ("points", "bandwidth"):
            self.register_buffer(name, torch.empty(0, dtype=torch.float64))

    def fit(self, embeddings: Tensor) -> "KernelDensity":
        """Fit to embeddings (N, D) or (1, N, D), N >= 2. Raises DensityError as GaussianTorch.fit does."""
        from sklearn.model_selection import GridSearchCV
        from sklearn.neighbors import KernelDensity as SklearnKernelDensity

        x = _check(embeddings).double().reshape(-1, embeddings.shape[-1])
        # not by matrix products, whose rounding leaves a point at some distance from itself
        distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
        distance[distance == 0] = math.inf  # the point itself and copies of it are no neighbors
        # The best bandwidth per dimension is near the neighbors' distance over sqrt(D).
        unit = distance.amin(1).median() / math.sqrt(x.shape[1])
        grid = (unit * torch.logspace(-1, 1, self.candidates, dtype=torch.float64, device=x.device)).tolist()
        search = GridSearchCV(SklearnKernelDensity(), {"bandwidth": grid}, cv=min(FOLDS, len(x)))
        search.fit(x.cpu().numpy())
        self.points = x
        self.bandwidth = torch.tensor(search.best_params_["bandwidth"], dtype=torch.float64, device=x.device)
        return self

    def score(self, embeddings: Tensor) -> Tensor:
        """Negative log density (natural logarithm, may be negative) of embeddings (..., N, D): (..., N) float64."""
        from sklearn.neighbors import KernelDensity as SklearnKernelDensity

        estimator = SklearnKernelDensity(bandwidth=self.bandwidth.item()).fit(self.points.cpu().numpy())
        x = embeddings.detach().double().reshape(-1, embeddings.shape[-1]).cpu().numpy()
        return -torch.from_numpy(estimator.score_samples(x)).to(embeddings.device).view(embeddings.shape[:-1])

    def log_likelihood(self, scores: Tensor) -> float:
        """Mean log likelihood of embeddings with these scores."""
        return -scores.mean().item()


DENSITIES = {"torch": GaussianTorch, "sklearn": GaussianSklearn, "kde": KernelDensity}


# Estimates --------------------------------------------------------------------------------------------------------


def ledoit_wolf(centered: Tensor) -> tuple[Tensor, Tensor]:
    """Ledoit and Wolf's covariances (1 - s) S + s m I of centered data X (..., N, D), and their shrinkages s in [0, 1]:
    (..., D, D) and (...,). S = X'X / N, m = tr(S) / D.

    s = min(b, d) / d is their estimate of the best shrinkage: d = |S - m I|^2 is how far S is from the target,
    b = sum_k |x_k x_k' - S|^2 / N^2 how much S itself is in error.
    """
    n, dim = centered.shape[-2:]
    sample = centered.mT @ centered / n
    scale = (sample.diagonal(dim1=-2, dim2=-1).sum(-1) / dim)[..., None, None]
    eye = torch.eye(dim, dtype=sample.dtype, device=sample.device)
    distance = (sample - scale * eye).square().sum((-2, -1))
    # sum_k |x_k x_k' - S|^2 = sum_k |x_k|^4 - n |S|^2, for the x_k x_k' average to S
    fourth = centered.square().sum(-1).square().sum(-1)
    error = ((fourth / n - sample.square().sum((-2, -1))) / n).clamp(min=0)
    shrinkage = torch.where(distance > 0, torch.minimum(error, distance) / distance, torch.ones_like(distance))
    weight = shrinkage[..., None, None]
    return (1 - weight) * sample + weight * scale * eye, shrinkage


def whitening(covariance: Tensor) -> Tensor:
    """Factors W of covariances C (..., D, D) with W'W their inverse, or the pseudo-inverse of a singular one: two
    images are not shrunk at all, and scikit-learn takes that too."""
    lower, failed = torch.linalg.cholesky_ex(covariance)
    if not failed.any():
        eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
        return torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)
    values, vectors = torch.linalg.eigh(covariance)
    noise = values.amax(-1, keepdim=True) * values.shape[-1] * torch.finfo(values.dtype).eps
    scale = torch.where(values > noise, values, math.inf).rsqrt()
    return scale[..., None] * vectors.mT


def group_by_density(embeddings: Tensor, shared: bool) -> Tensor:
    """Embeddings (N, L, D) by the densities that they belong to: (1, N*L, D) shared by all locations, or (L, N, D)."""
    return embeddings.flatten(0, 1)[None] if shared else embeddings.transpose(0, 1)


def fit_density(kind: str, embeddings: Tensor, shared: bool) -> nn.Module:
    """A density of embeddings (N, L, D): one shared by all L locations, of evenly spaced images if they are more than
    SHARED_BYTES, or one for each location."""
    count, locations, dims = embeddings.shape
    most = max(2, SHARED_BYTES // (8 * locations * dims))
    if shared and count > most:
        embeddings = embeddings[torch.arange(most, device=embeddings.device) * count // most]
    return DENSITIES[kind]().fit(group_by_density(embeddings, shared))


def held_out(kind: str, embeddings: Tensor, shared: bool) -> tuple[Tensor, float]:
    """What new normal images would score, as far as the normal ones can tell.

    Scores (N, L) of embeddings (N, L, D), each under a density fitted to the other folds (image i is in fold i modulo
    FOLDS), and their mean log likelihood. Fewer than four images are scored by a
    density of all of them: the others of so few are no distribution.
    """
    x, total, folds = embeddings, 0.0, min(FOLDS, len(embeddings))
    if len(x) < 2:
        raise DensityError(f"a density needs at least 2 images, got {len(x)}")
    fold = torch.arange(len(x), device=x.device) % folds
    scores = torch.empty(x.shape[:2], dtype=torch.float64, device=x.device)
    for k in range(folds):
        own, others = x[fold == k], x[fold != k]
        if len(x) < 4 or (others == others[0]).all():  # copies of one image are no distribution either
            others = x
        density = fit_density(kind, others, shared)
        found = density.score(group_by_density(own, shared))
        scores[fold == k] = (found.view(len(own), -1) if shared else found.T).double()
        total += density.log_likelihood(found) * len(own)
    return scores, total / len(x)


def _check(embeddings: Tensor) -> Tensor:
    """The embeddings, or a DensityError that says why no density can be fitted to them."""
    if embeddings.ndim not in (2, 3):
        raise DensityError(f"embeddings must be (K, N, D) or (N, D), got {tuple(embeddings.shape)}")
    if embeddings.shape[-2] < 2:
        raise DensityError(f"a density needs at least 2 embeddings, got {embeddings.shape[-2]}")
    x = embeddings.detach()
    if not torch.isfinite(x).all():
        raise NotFiniteError("the embeddings are not finite")
    if (x == x[..., :1, :]).all():
        raise DensityError("all embeddings are equal: the images, or what the network sees in them, do not differ")
    return x
