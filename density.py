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
from torch.onnx import is_in_onnx_export

from config import DENSITY_SUMS
from runtime.tensors import FLOATS, TINY, TensorRule

POOLED = 0.05  # share of the mean covariance in the covariance of each of several Gaussians
FOLDS = 5  # of held-out scores and of the cross-validation of KernelDensity
SHARED_BYTES = 48 * 2**20  # largest size, as float64, of the embeddings that a shared density is fitted to
GAUSSIANS_AT_ONCE = 64  # whose embeddings are converted to float64 together, to bound the memory
LOCAL_POINTS, SHARED_POINTS = 100, 4096  # normal embeddings that stand for all: for each location, or for all of them
COVER_POOL = 50_000  # embeddings that they are chosen from
LEFT_OUT_AT_ONCE = 8  # images whose nearest others are searched together in a shared memory
LEFT_OUT_BYTES = 2**21  # of the distances between images at locations whose memories are reduced together


class DensityError(ValueError):
    """No density can be fitted to the embeddings; the message says why."""


class NotFiniteError(DensityError):
    """The embeddings are not finite: the network is broken, not the images."""


class Density(nn.Module):
    """The base of every density. shape (h, w): the windows down and across whose embeddings it takes, row by row."""

    unit = ""  # of its scores, in words
    several = True  # K may be more than 1
    has_gradient = True  # of its scores, which Grad-CAM needs
    has_likelihood = True

    def __init__(self, shape: tuple[int, int] = (1, 1)) -> None:
        super().__init__()
        self.shape = shape

    @property
    def rules(self) -> dict[str, TensorRule]:
        """Return what the buffers in a file must be: of K densities of D dimensions."""
        return {}


class GaussianTorch(Density):
    """Gaussians with Ledoit-Wolf covariance, computed in float64.

    If K > 1, each covariance is (1 - POOLED) times its own plus POOLED times the mean of all: without it, where all
    training images are alike, one gray level more would be infinitely unusual. K > 1 Gaussians are kept in float32,
    which halves the file; a single one in float64.
    Attributes (buffers): mean (K, D), factor (K, D, D) with |factor (x - mean)| the Mahalanobis distance.
    """

    unit = "Mahalanobis distance"

    def __init__(self, shape: tuple[int, int] = (1, 1)) -> None:
        super().__init__(shape)
        for name in ("mean", "factor"):
            self.register_buffer(name, torch.empty(0, dtype=torch.float64))

    @property
    def rules(self) -> dict[str, TensorRule]:
        return {"mean": TensorRule(("K", "D"), FLOATS), "factor": TensorRule(("K", "D", "D"), FLOATS)}

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

    @property
    def width(self) -> int:
        """Return D, the number of dimensions."""
        return self.mean.shape[-1]


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


class KernelDensity(Density):
    """scikit-learn's KernelDensity with a Gaussian kernel, its bandwidth chosen by cross-validation on the normal
    embeddings.

    Attributes (buffers, float64): points (N, D), bandwidth () in the unit of the embeddings.
    """

    unit = "negative log density"
    several = False
    has_gradient = False
    count = 1
    candidates = 16  # bandwidths to try, in equal ratios around the typical distance between neighbors

    def __init__(self, shape: tuple[int, int] = (1, 1)) -> None:
        super().__init__(shape)
        for name in ("points", "bandwidth"):
            self.register_buffer(name, torch.empty(0, dtype=torch.float64))

    @property
    def rules(self) -> dict[str, TensorRule]:
        return {"points": TensorRule(("N", "D")), "bandwidth": TensorRule((), least=TINY)}

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
        if is_in_onnx_export():
            return self.score_in_torch(embeddings)
        from sklearn.neighbors import KernelDensity as SklearnKernelDensity

        estimator = SklearnKernelDensity(bandwidth=self.bandwidth.item()).fit(self.points.cpu().numpy())
        x = embeddings.detach().double().reshape(-1, embeddings.shape[-1]).cpu().numpy()
        return -torch.from_numpy(estimator.score_samples(x)).to(embeddings.device).view(embeddings.shape[:-1])

    def score_in_torch(self, embeddings: Tensor) -> Tensor:
        """Return what ``score`` does, up to rounding, by operations that ONNX knows: each embedding against each
        point, (..., N, number of points) at once."""
        x, (count, dims) = embeddings.double(), self.points.shape
        squares = x.square().sum(-1, keepdim=True) + self.points.square().sum(-1) - 2 * x @ self.points.T
        kernels = (squares / (-2 * self.bandwidth.square())).logsumexp(-1)
        return math.log(count) + dims * (self.bandwidth.log() + math.log(2 * math.pi) / 2) - kernels

    def log_likelihood(self, scores: Tensor) -> float:
        """Return the mean log likelihood of embeddings with these scores."""
        return -scores.mean().item()


class Nearest(Density):
    """The distance to the nearest normal embedding.

    K > 1, one memory for each location: it is searched for embeddings of the location itself and of the (up to) eight
    around it, so that parts may lie a little differently. K = 1: one memory for all locations.
    A memory of more than ``LOCAL_POINTS`` (K > 1) or ``SHARED_POINTS`` embeddings is reduced to those that cover the
    others best, see ``cover``. It is kept in half precision if K > 1, which halves the file; distances are computed in
    float32.
    Attributes (buffers): points (K, D, M), the memories; squares (K, M), the squared lengths of their embeddings;
    locations, images (K, M) int32, of what a point is the embedding.
    """

    unit = "distance to the nearest normal embedding"
    has_likelihood = False

    def __init__(self, shape: tuple[int, int] = (1, 1)) -> None:
        super().__init__(shape)
        for name in ("points", "squares"):
            self.register_buffer(name, torch.empty(0))
        for name in ("locations", "images"):
            self.register_buffer(name, torch.empty(0, dtype=torch.int32))
        neighbors, inverse = neighborhoods(*shape)
        self.register_buffer("neighbors", neighbors, persistent=False)
        self.register_buffer("inverse", inverse, persistent=False)

    @property
    def rules(self) -> dict[str, TensorRule]:
        return {
            "points": TensorRule(("K", "D", "M"), (torch.float16, torch.float32)),
            "squares": TensorRule(("K", "M"), (torch.float32,), least=0),
            "locations": TensorRule(("K", "M"), (torch.int32,), least=0, most=math.prod(self.shape) - 1),
            "images": TensorRule(("K", "M"), (torch.int32,), least=0),
        }

    @property
    def count(self) -> int:
        """Return K, the number of memories."""
        return len(self.points) if self.points.ndim > 1 else 1

    @property
    def width(self) -> int:
        """Return D, the number of dimensions."""
        return self.points.shape[1]

    def fit(self, embeddings: Tensor) -> "Nearest":
        """Fit to embeddings (K, N, D) of N images, or of all windows of N / (h w) images if K = 1. Raises DensityError
        as GaussianTorch.fit does."""
        x = _checked(embeddings)
        x = x.float()[None] if x.ndim == 2 else x.float()
        (count, rows, _), windows = x.shape[:2] + x.shape[2:], math.prod(self.shape)
        numbers = torch.arange(rows, device=x.device)
        if count > 1:
            images, locations = (
                numbers.expand(count, -1),
                torch.arange(count, device=x.device)[:, None].expand(-1, rows),
            )
        else:
            images, locations = numbers[None] // windows, numbers[None] % windows
        x = x.half().float() if count > 1 else x
        limit = LOCAL_POINTS if count > 1 else SHARED_POINTS
        if rows > limit:
            chosen = cover(x, limit)
            x = x.gather(1, chosen[..., None].expand(-1, -1, x.shape[-1]))
            images, locations = images.gather(1, chosen), locations.gather(1, chosen)
        self.points, self.squares = x.mT.contiguous(), x.square().sum(-1)
        self.images, self.locations = images.int().contiguous(), locations.int().contiguous()
        return self

    def score(self, embeddings: Tensor) -> Tensor:
        """Return the distances (K, N) float32, in the unit of the embeddings, of embeddings (K, N, D)."""
        if embeddings.ndim == 2:
            return self.distances(embeddings[None])[0]
        return self.distances(embeddings)

    def distances(self, embeddings: Tensor, left_out: Tensor | None = None) -> Tensor:
        """Return the distances (K, N) float32 to the nearest normal embeddings of embeddings (K, N, D).

        left_out: (N,), the number of an image for each, whose embeddings do not count. The nearest one is searched by
        matrix products, whose rounding does not matter then: its distance is computed directly.
        """
        x = embeddings.to(self.points)
        (count, batch, dims), reach = x.shape, self.neighbors.shape[1] if self.count > 1 else 1
        queries = -2 * x
        if reach > 1:  # (K, J*N, D): whom each memory may be near to
            queries = queries.index_select(0, self.neighbors.flatten()).view(count, reach * batch, dims)
        closeness = self.closeness(queries)  # less the query's own square
        if left_out is not None:
            left = self.images[:, None] == left_out.repeat(reach)[:, None]  # (K, J*N, M)
            closeness = closeness.masked_fill(left, math.inf)
        closeness = closeness.flatten(0, 1)
        # Of the nearest of the memories around, (K, N): memory * J + place of the query among its neighbors
        entries = torch.arange(count, device=x.device)[:, None].expand(-1, batch)
        if reach > 1:
            best = closeness.amin(1).view(-1, batch).index_select(0, self.inverse.flatten()).view(count, reach, batch)
            entries = self.inverse.gather(1, best.min(1).indices)  # argmin would take up to five times as long
        memories, rows = entries // reach, entries * batch + torch.arange(batch, device=x.device)
        points = closeness.index_select(0, rows.flatten()).min(1).indices.view(count, batch)
        return (x - self.points.mT[memories, points]).norm(dim=-1)

    def nearest_at(self, embeddings: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Return which normal embedding is nearest to each of embeddings (N, D), one of each window of these numbers
        (N,): its window, and its image's number, both (N,) int64."""
        x = embeddings.to(self.points)
        if self.count > 1:
            memories = self.neighbors[places]  # (N, J)
            products = (x[:, None, None] @ self.points[memories])[:, :, 0]  # (N, J, M)
        else:
            memories = torch.zeros_like(places)[:, None]
            products = (x @ self.points).transpose(0, 1)
        closeness, rows = self.squares[memories] - 2 * products, torch.arange(x.shape[0], device=x.device)
        best = closeness.amin(2).argmin(1)
        memory, point = memories[rows, best], closeness[rows, best].argmin(1)
        return self.locations[memory, point].long(), self.images[memory, point].long()

    def closeness(self, queries: Tensor) -> Tensor:
        """Return |point|^2 - 2 x point (K, Q, M) of queries -2 x (K, Q, D) and the points of their memories."""
        if is_in_onnx_export():  # ONNX Runtime adds in the product, by one dimension more, faster than after it
            ones = torch.ones_like(queries[..., :1])
            return torch.cat([queries, ones], 2) @ torch.cat([self.points, self.squares[:, None]], 1)
        return (queries @ self.points).add_(self.squares[:, None])

    def leave_one_out(self, embeddings: Tensor) -> Tensor:
        """Return the distances (K, N) float64 of the embeddings (K, N, D) that it was fitted to, each by memories
        fitted to the other images alone.

        K > 1: exactly those of a fit without the image, see ``covers_without``. K = 1: the image's own embeddings do
        not count. That is the same if all embeddings are kept. Else it is an estimate, a little too high, because a fit
        without the image would choose others in place of those.
        """
        (count, rows), windows = embeddings.shape[:2], math.prod(self.shape)
        if count == 1:
            images = torch.arange(rows, device=embeddings.device) // windows
            parts = zip(embeddings.split(LEFT_OUT_AT_ONCE * windows, 1), images.split(LEFT_OUT_AT_ONCE * windows))
            return torch.cat([self.distances(part, numbers) for part, numbers in parts], 1).double()
        x, squares = embeddings.to(self.points), []
        for part in torch.arange(count, device=x.device).split(max(1, LEFT_OUT_BYTES // (4 * rows**2))):
            points = x[part].half().float()
            covers = covers_without(points, self.images[part].long())
            # In float64, so that the rounding of matrix products does not matter
            for memory, normal, cover_points in zip(part, points.double(), covers):
                used = cover_points.any(0).nonzero()[:, 0]
                normal, queries = normal[used], x[self.neighbors[memory]].double()  # (M, D), (J, N, D)
                lengths = torch.where(cover_points[:, used], normal.square().sum(1), math.inf)  # (N, M), squared
                closeness = (queries.flatten(0, 1) @ (-2 * normal.T)).view(-1, rows, len(used)).add_(lengths)
                squares.append(closeness.amin(2) + queries.square().sum(2))
        return torch.stack(squares).view(-1, rows)[self.inverse].amin(1).clamp(min=0).sqrt()

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.count > 1:  # exactly: see ``fit``
            destination[prefix + "points"] = destination[prefix + "points"].half()


DENSITIES = {"torch": GaussianTorch, "sklearn": GaussianSklearn, "kde": KernelDensity, "nearest": Nearest}


def has_gradient(kind: str) -> bool:
    """Return whether scores of a density, or of a sum of some, have a gradient, which Grad-CAM needs. All have that
    ``auto`` chooses from."""
    return kind == "auto" or all(DENSITIES[name].has_gradient for name in DENSITY_SUMS.get(kind, (kind,)))


# Nearest embeddings -----------------------------------------------------------------------------------------------


def neighborhoods(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return which windows lie around each window of a grid, itself included, and where it is among the neighbors of
    each of those: (h*w, 9) int64 both, numbers of windows, and numbers of window * 9 + place in its row.

    Beyond the border the window itself stands in, in both.
    """
    if height * width == 1:
        return torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)
    window = torch.arange(height * width)[:, None]
    down, across = (step.flatten() for step in torch.meshgrid(torch.arange(-1, 2), torch.arange(-1, 2), indexing="ij"))
    y, x = window // width + down, window % width + across
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    neighbors = torch.where(inside, y * width + x, window)
    # Seen from the neighbor, this window lies on the opposite side
    return neighbors, torch.where(inside, neighbors * 9 + 8 - torch.arange(9), window * 9 + 4)


def cover(points: Tensor, count: int) -> Tensor:
    """Choose ``count`` of N points for each of K sets such that no point is far from the chosen ones: (K, count) int64.

    points: (K, N, D). Greedy k-centers: first the point nearest to the mean, then, again and again, the one that is
    furthest from all that are chosen. Of more than COVER_POOL points, so many random ones are looked at, always the
    same.
    """
    pool = None
    if points.shape[1] > COVER_POOL:
        pool = torch.randperm(points.shape[1], generator=torch.Generator().manual_seed(0))[:COVER_POOL]
        pool = pool.sort().values.to(points.device)
        points = points[:, pool]
    dimensions = points.permute(2, 0, 1).contiguous()  # (D, K, N)
    # In float64 the sum is exact if the points have half precision: ``covers_without`` relies on that
    mean = (dimensions.sum(2, keepdim=True, dtype=torch.float64) / dimensions.shape[2]).float()
    chosen = [squared_distances(dimensions, mean).argmin(1)]
    nearest = torch.full_like(dimensions[0], math.inf)
    for _ in range(count - 1):
        centers = dimensions.gather(2, chosen[-1][None, :, None].expand(len(dimensions), -1, 1))
        nearest = torch.minimum(nearest, squared_distances(dimensions, centers))
        chosen.append(nearest.argmax(1))
    numbers = torch.stack(chosen, 1)
    return numbers if pool is None else pool[numbers]


def covers_without(points: Tensor, chosen: Tensor) -> Tensor:
    """Return which of N points stand for the others of each of K sets when one is left out: (K, N, N) bool, of a set,
    the point left out, and all that are equal to a point that ``cover`` chooses from the others.

    points: (K, N, D). chosen: (K, count), what ``cover`` chooses from all of them, in this order.
    Leaving out a point changes nothing if it was not chosen and the same point is nearest to the mean of the others. If
    it was chosen after others, these stay, and later choices are made anew. If the first choice changes, all are.
    """
    (sets, count, _), choices = points.shape, chosen.shape[1]
    if choices >= count - 1:  # all others are kept
        return ~torch.eye(count, dtype=torch.bool, device=points.device).expand(sets, -1, -1)
    x = points.mT.contiguous()  # (K, D, N)
    squares = torch.stack([squared_distances(values[:, None], values[..., None]) for values in x])  # (K, N, N)
    first = torch.stack([nearest_to_mean_without(values) for values in x])  # (K, N)
    states = squares.gather(1, chosen[..., None].expand(-1, -1, count)).cummin(1).values  # (K, choices, N)

    # A row for each point that makes a difference: the distances of all points from the nearest that is chosen without
    # it. First the rows that begin anew, then those of the points chosen second, third ..., which join later
    anew = (first != chosen[:, :1]).nonzero()
    numbers = torch.arange(sets, device=points.device).repeat(choices - 1)
    row_sets, left_out = torch.cat([anew, torch.stack([numbers, chosen[:, 1:].T.flatten()], 1)]).unbind(1)
    nearest = torch.cat([squares[anew[:, 0], first[anew.unbind(1)]], states[:, :-1].transpose(0, 1).flatten(0, 1)])
    nearest[torch.arange(len(nearest), device=points.device), left_out] = -math.inf  # never the furthest
    for step in range(1, choices):
        active = slice(len(anew) + step * sets)
        furthest = row_sets[active] * count + nearest[active].max(1).indices
        torch.minimum(nearest[active], squares.flatten(0, 1).index_select(0, furthest), out=nearest[active])

    covers = (states[:, -1:] == 0).repeat(1, count, 1)
    for rows in (slice(len(anew), None), slice(len(anew))):  # who begins anew may have a second row, which is wrong
        covers[row_sets[rows], left_out[rows]] = nearest[rows] == 0
    return covers


def nearest_to_mean_without(points: Tensor) -> Tensor:
    """Return for each of N points (D, N) which of the others is the nearest to their mean: (N,) int64."""
    total, count = points.sum(1, keepdim=True, dtype=torch.float64), points.shape[1]
    mean, means = total / count, ((total - points) / (count - 1)).float()
    # Without a point the mean is not far away: only points near to it can be the nearest
    spreads, moves = ((x - mean).norm(dim=0) for x in (points, means))
    near = (spreads <= 1.01 * (spreads.kthvalue(2).values + 2 * moves.max())).nonzero()[:, 0]
    squares = squared_distances(points[:, None, near], means[..., None])  # (N, fewer)
    squares[near, torch.arange(len(near), device=near.device)] = math.inf
    return near[squares.min(1).indices]


def squared_distances(points: Tensor, centers: Tensor) -> Tensor:
    """Return the squared distances of points from centers, (D, ...) both, broadcast. They are summed dimension by
    dimension, so that they depend on the two alone: not on the other points, not on the number of threads."""
    difference = points[0] - centers[0]
    total = difference.square()
    for values, center in zip(points[1:], centers[1:]):
        torch.sub(values, center, out=difference)
        total.addcmul_(difference, difference)
    return total


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


def fit_density(kind: str, embeddings: Tensor, shared: bool, shape: tuple[int, int] | None = None) -> Density:
    """Fit a density of ``DENSITIES`` to embeddings (N, L, D): one shared by all L locations, or one for each.

    shape: (h, w), h w = L; default: one row of windows. A shared Gaussian of embeddings that would take more than
    SHARED_BYTES is fitted to evenly spaced images.
    """
    count, locations, dims = embeddings.shape
    limit = max(2, SHARED_BYTES // (8 * locations * dims))
    if shared and count > limit and kind != "nearest":  # which chooses for itself
        embeddings = embeddings[torch.arange(limit, device=embeddings.device) * count // limit]
    return DENSITIES[kind](shape or (1, locations)).to(embeddings.device).fit(group_by_density(embeddings, shared))


def held_out(
    kind: str, embeddings: Tensor, shared: bool, shape: tuple[int, int] | None = None, fitted: Density | None = None
) -> tuple[Tensor, float]:
    """Estimate the scores of new normal images: score normal images by densities that were not fitted to them.

    Image i of embeddings (N, L, D) is in fold i modulo FOLDS; a fold is scored by the density of all other folds.
    Nearest embeddings leave out image by image instead, see ``Nearest.leave_one_out``. fitted: the density of all of
    them, if it is there already. Returns the scores (N, L) float64, higher is more anomalous, and their mean log
    likelihood, NaN if the density has none. Fewer than four images are scored by the density of all of them, because
    one to two others are no distribution. Raises DensityError.
    """
    x, total, folds = embeddings, 0.0, min(FOLDS, len(embeddings))
    if len(x) < 2:
        raise DensityError(f"a density needs at least 2 images, got {len(x)}")
    ungrouped = lambda scores, count: (scores.view(count, -1) if shared else scores.T).double()  # noqa: E731
    if kind == "nearest":
        density = fitted or fit_density(kind, x, shared, shape)
        return ungrouped(density.leave_one_out(group_by_density(x, shared)), len(x)), math.nan
    fold = torch.arange(len(x), device=x.device) % folds
    scores = torch.empty(x.shape[:2], dtype=torch.float64, device=x.device)
    for k in range(folds):
        inside, others = x[fold == k], x[fold != k]
        if len(x) < 4 or (others == others[0]).all():  # copies of one image are no distribution either
            others = x
        density = fit_density(kind, others, shared, shape)
        fold_scores = density.score(group_by_density(inside, shared))
        scores[fold == k] = ungrouped(fold_scores, len(inside))
        total += density.log_likelihood(fold_scores) * len(inside) if density.has_likelihood else math.nan
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
