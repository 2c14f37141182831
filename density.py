"""Densities of normal embeddings: Gaussians in torch or scikit-learn, a kernel density estimate, nearest embeddings.

Owns the estimators, the table ``DENSITIES`` and held-out scores. K densities are fitted in one batch: embeddings
(K, N, D) in, anomaly scores (K, N) out, higher is more anomalous; without the first axis it is one density. Knows
nothing of images or networks.
Sources: Rippel et al., ICPR 2020 (the Gaussian on deep features); Ledoit and Wolf, "A well-conditioned estimator for
large-dimensional covariance matrices", J. Multivariate Analysis 88 (2004) (the shrinkage); Roth et al., "Towards total
recall in industrial anomaly detection", CVPR 2022 (nearest normal embeddings, and few of them that cover all).
"""

import math

import torch
from torch import Tensor, nn

POOLED = 0.05  # share of the mean covariance in the covariance of each of several Gaussians
FOLDS = 5  # of held-out scores and of the cross-validation of KernelDensity
SHARED_BYTES = 48 * 2**20  # largest size, as float64, of the embeddings that a shared density is fitted to
GAUSSIANS_AT_ONCE = 64  # whose embeddings are converted to float64 together, to bound the memory
NEAREST_BYTES = 60 * 10**6  # largest size, in the file, of the embeddings that the nearest ones are searched in
CORESET = 4096  # embeddings that stand for all, where one memory is for all locations
CORESET_POOL = 50_000  # of which they are chosen


class DensityError(ValueError):
    """No density can be fitted to the embeddings; the message says why."""


class NotFiniteError(DensityError):
    """The embeddings are not finite: the network is broken, not the images."""


class GaussianTorch(nn.Module):
    """Gaussians with Ledoit-Wolf covariance, computed in float64.

    If K > 1, each covariance is (1 - POOLED) times its own plus POOLED times the mean of all: without it, where all
    training images are alike, one gray level more would be infinitely unusual. K > 1 Gaussians are kept in float32,
    which halves the file; a single one in float64.
    Attributes (buffers): mean (K, D), factor (K, D, D) with |factor (x - mean)| the Mahalanobis distance.
    """

    unit = "Mahalanobis distance"
    several = True  # K may be more than 1
    has_gradient = True

    def __init__(self) -> None:
        super().__init__()
        for name in ("mean", "factor"):
            self.register_buffer(name, torch.empty(0, dtype=torch.float64))

    @property
    def count(self) -> int:
        """Return K, the number of Gaussians."""
        return len(self.mean) if self.mean.ndim > 1 else 1

    def fit(self, embeddings: Tensor) -> "GaussianTorch":
        """Fit to embeddings (K, N, D), N >= 2. Raises DensityError if they are too few, not finite or all equal."""
        x = _checked(embeddings)
        parts = x.split(GAUSSIANS_AT_ONCE) if x.ndim == 3 else [x]
        mean, covariance = map(torch.cat, zip(*(self.estimate(part.double()) for part in parts)))
        dtype = torch.float64
        if mean.ndim > 1 and len(mean) > 1:
            covariance, dtype = (1 - POOLED) * covariance + POOLED * covariance.mean(0), torch.float32
        self.mean, self.factor = mean.to(dtype), whitening(covariance).to(dtype)
        return self

    def estimate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return means (K, D) and covariances (K, D, D) of float64 embeddings (K, N, D)."""
        mean = x.mean(-2)
        return mean, ledoit_wolf(x - mean[..., None, :])[0]

    def score(self, embeddings: Tensor) -> Tensor:
        """Return Mahalanobis distances (K, N), not squared, without a unit, of embeddings (K, N, D), in the dtype of
        the buffers. A distance depends on its own embedding alone."""
        return ((embeddings.to(self.mean) - self.mean[..., None, :]) @ self.factor.mT).norm(dim=-1)

    def log_likelihood(self, scores: Tensor) -> float:
        """Return the mean log likelihood of embeddings with these scores (K, N): natural logarithm, without the
        constant -D / 2 log(2 pi)."""
        logdet = torch.linalg.slogdet(self.factor.double())[1]
        return (logdet[..., None] - scores.double().square() / 2).mean().item()


class GaussianSklearn(GaussianTorch):
    """The same Gaussians, estimated by scikit-learn's LedoitWolf on the CPU."""

    def estimate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        from sklearn.covariance import LedoitWolf

        fits = [LedoitWolf().fit(samples) for samples in x.reshape(-1, *x.shape[-2:]).cpu().numpy()]
        means, covariances = (
            torch.stack([torch.from_numpy(getattr(fit, name)) for fit in fits]).to(x.device)
            for name in ("location_", "covariance_")
        )
        return means.view(*x.shape[:-2], -1), covariances.view(*x.shape[:-2], x.shape[-1], -1)


class KernelDensity(nn.Module):
    """scikit-learn's KernelDensity with a Gaussian kernel, its bandwidth chosen by cross-validation on the normal
    embeddings.

    Attributes (buffers, float64): points (N, D), bandwidth () in the unit of the embeddings.
    """

    unit = "negative log density"
    several = False
    has_gradient = False
    count = 1
    candidates = 16  # bandwidths to try, in equal ratios around the typical distance between neighbors

    def __init__(self) -> None:
        super().__init__()
        for name in ("points", "bandwidth"):
            self.register_buffer(name, torch.empty(0, dtype=torch.float64))

    def fit(self, embeddings: Tensor) -> "KernelDensity":
        """Fit to embeddings (N, D) or (1, N, D), N >= 2. Raises DensityError as GaussianTorch.fit does."""
        from sklearn.model_selection import GridSearchCV
        from sklearn.neighbors import KernelDensity as SklearnKernelDensity

        x = _checked(embeddings).double().reshape(-1, embeddings.shape[-1])
        # Not by matrix products: their rounding gives a point a distance to itself
        distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
        distance[distance == 0] = math.inf  # a point and its copies are no neighbors
        # The best bandwidth per dimension is near the distance between neighbors over sqrt(D)
        unit = distance.amin(1).median() / math.sqrt(x.shape[1])
        grid = (unit * torch.logspace(-1, 1, self.candidates, dtype=torch.float64, device=x.device)).tolist()
        search = GridSearchCV(SklearnKernelDensity(), {"bandwidth": grid}, cv=min(FOLDS, len(x)))
        search.fit(x.cpu().numpy())
        self.points = x
        self.bandwidth = torch.tensor(search.best_params_["bandwidth"], dtype=torch.float64, device=x.device)
        return self

    def score(self, embeddings: Tensor) -> Tensor:
        """Return negative log densities (..., N) float64 (natural logarithm, may be below 0) of embeddings
        (..., N, D)."""
        from sklearn.neighbors import KernelDensity as SklearnKernelDensity

        estimator = SklearnKernelDensity(bandwidth=self.bandwidth.item()).fit(self.points.cpu().numpy())
        x = embeddings.detach().double().reshape(-1, embeddings.shape[-1]).cpu().numpy()
        return -torch.from_numpy(estimator.score_samples(x)).to(embeddings.device).view(embeddings.shape[:-1])

    def log_likelihood(self, scores: Tensor) -> float:
        """Return the mean log likelihood of embeddings with these scores."""
        return -scores.mean().item()


DENSITIES = {"torch": GaussianTorch, "sklearn": GaussianSklearn, "kde": KernelDensity}


# Estimates --------------------------------------------------------------------------------------------------------


def ledoit_wolf(centered: Tensor) -> tuple[Tensor, Tensor]:
    """Return Ledoit and Wolf's covariances (1 - s) S + s m I (..., D, D) of centered data X (..., N, D), and their
    shrinkages s in [0, 1], (...,). S = X'X / N, m = tr(S) / D.

    s = min(b, d) / d is their estimate of the best shrinkage: d = |S - m I|^2 is the distance of S from the target,
    b = sum_k |x_k x_k' - S|^2 / N^2 the error of S itself.
    """
    n, dim = centered.shape[-2:]
    sample = centered.mT @ centered / n
    scale = (sample.diagonal(dim1=-2, dim2=-1).sum(-1) / dim)[..., None, None]
    eye = torch.eye(dim, dtype=sample.dtype, device=sample.device)
    distance = (sample - scale * eye).square().sum((-2, -1))
    # sum_k |x_k x_k' - S|^2 = sum_k |x_k|^4 - n |S|^2, because the mean of the x_k x_k' is S
    fourth = centered.square().sum(-1).square().sum(-1)
    error = ((fourth / n - sample.square().sum((-2, -1))) / n).clamp(min=0)
    shrinkage = torch.where(distance > 0, torch.minimum(error, distance) / distance, torch.ones_like(distance))
    weight = shrinkage[..., None, None]
    return (1 - weight) * sample + weight * scale * eye, shrinkage


def whitening(covariance: Tensor) -> Tensor:
    """Return factors W (..., D, D) of covariances (..., D, D) such that W'W is the inverse, or the pseudo-inverse if
    one is singular: the covariance of two images is not shrunk at all, and scikit-learn inverts it in the same way."""
    lower, failed = torch.linalg.cholesky_ex(covariance)
    if not failed.any():
        eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
        return torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)
    values, vectors = torch.linalg.eigh(covariance)
    noise = values.amax(-1, keepdim=True) * values.shape[-1] * torch.finfo(values.dtype).eps
    scale = torch.where(values > noise, values, math.inf).rsqrt()
    return scale[..., None] * vectors.mT


def group_by_density(embeddings: Tensor, shared: bool) -> Tensor:
    """Return embeddings (N, L, D) as a density takes them: (1, N*L, D) if one is shared by all L locations, else
    (L, N, D)."""
    return embeddings.flatten(0, 1)[None] if shared else embeddings.transpose(0, 1)


def fit_density(kind: str, embeddings: Tensor, shared: bool) -> nn.Module:
    """Fit a density of ``DENSITIES`` to embeddings (N, L, D): one shared by all L locations, or one for each.

    A shared density is fitted to evenly spaced images if all of them would take more than SHARED_BYTES.
    """
    count, locations, dims = embeddings.shape
    limit = max(2, SHARED_BYTES // (8 * locations * dims))
    if shared and count > limit:
        embeddings = embeddings[torch.arange(limit, device=embeddings.device) * count // limit]
    return DENSITIES[kind]().fit(group_by_density(embeddings, shared))


def held_out(kind: str, embeddings: Tensor, shared: bool) -> tuple[Tensor, float]:
    """Estimate the scores of new normal images: score normal images by densities that were not fitted to them.

    Image i of embeddings (N, L, D) is in fold i modulo FOLDS; a fold is scored by the density of all other folds.
    Returns the scores (N, L) float64, higher is more anomalous, and their mean log likelihood. Fewer than four images
    are scored by the density of all of them, because one to two others are no distribution. Raises DensityError.
    """
    x, total, folds = embeddings, 0.0, min(FOLDS, len(embeddings))
    if len(x) < 2:
        raise DensityError(f"a density needs at least 2 images, got {len(x)}")
    fold = torch.arange(len(x), device=x.device) % folds
    scores = torch.empty(x.shape[:2], dtype=torch.float64, device=x.device)
    for k in range(folds):
        inside, others = x[fold == k], x[fold != k]
        if len(x) < 4 or (others == others[0]).all():  # copies of one image are no distribution either
            others = x
        density = fit_density(kind, others, shared)
        fold_scores = density.score(group_by_density(inside, shared))
        scores[fold == k] = (fold_scores.view(len(inside), -1) if shared else fold_scores.T).double()
        total += density.log_likelihood(fold_scores) * len(inside)
    return scores, total / len(x)


def _checked(embeddings: Tensor) -> Tensor:
    """Return the embeddings without a gradient. Raises DensityError if no density can be fitted to them."""
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
