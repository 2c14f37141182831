"""Where the defect is: embeddings all over an image -> Gaussians, shared or one per location -> anomaly map.

Owns the grid of windows and their embeddings, the densities of a patch model, fitted in a stream, and the up-sampling
of scores to maps. Images and embeddings come in blocks; nothing grows with their number. Reads no file.
Sources: CutPaste (CVPR 2021), sections 2.4, 4.2 and A.5; Ledoit and Wolf (2004) for the shrinkage.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from cache import blocks
from cutpaste import to_float
from density import shrunk
from model import CutPasteNet, stage_features, stage_stride

GRID_KEYS = ("window", "stride", "level", "dense")  # settings that a Grid is made of, beside the image's size
LOCATIONS = ("auto", "shared", "each")
EACH_DIMS = 64  # of the projection that one Gaussian per location is fitted in: the file stays small
IMAGES_AT_ONCE = 4
WINDOWS_AT_ONCE = 512
PROJECTION_IMAGES = 32  # normal images that the projection is taken from
PATCH_DENSITY_IMAGES = 1000  # that the Gaussians are fitted to, and scored under those of the other folds, at most
FOLDS = 5
POOLED = 0.05  # share of the mean covariance in each location's
EACH_LEAST = 8  # images that one Gaussian per location needs


# Where the embeddings stand ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """Windows of ``window`` x ``window`` pixels, ``stride`` apart, in images of ``height`` x ``width``.

    A window's embedding is the mean of what stage ``level`` of the backbone makes of it. dense: the network runs once
    over the whole image, so that a feature near a window's border has seen beyond it; else each window goes through the
    network alone, as in the paper (with the last stage). What does not divide by the stride is left over at the
    borders.
    """

    height: int
    width: int
    window: int
    stride: int
    level: int
    dense: bool

    def __post_init__(self) -> None:
        if not 1 <= self.window <= min(self.height, self.width):
            raise ValueError(f"window {self.window}: larger than the image, {self.width}x{self.height}")
        if self.stride < 1:
            raise ValueError(f"stride {self.stride}: at least 1")
        for name in ("window", "stride"):
            if getattr(self, name) % self.unit:
                value = getattr(self, name)
                raise ValueError(f"{name} {value}: a multiple of {self.unit} is needed with --level {self.level}")

    @property
    def unit(self) -> int:
        """Windows begin at multiples of that many pixels."""
        return stage_stride(self.level) if self.dense else 1

    @property
    def shape(self) -> tuple[int, int]:
        """(h, w), the number of windows down and across."""
        return tuple((side - self.window) // self.stride + 1 for side in (self.height, self.width))

    @property
    def corner(self) -> tuple[int, int]:
        """(y, x) of the first window: what is left over is at both borders."""
        left = ((side - self.window) % self.stride for side in (self.height, self.width))
        return tuple(rest // 2 // self.unit * self.unit for rest in left)

    @property
    def centers(self) -> tuple[Tensor, Tensor]:
        """Of the windows, down (h,) and across (w,): pixels, float64; a pixel's own centre is at +0.5.

        dense: of what the features have seen. The stem and each halving are padded alike on both sides, which puts
        feature i at pixel unit * i, not in the middle of unit pixels.
        """
        return tuple(
            first + self.window / 2 - (self.unit - 1) / 2 + self.stride * torch.arange(count, dtype=torch.float64)
            for first, count in zip(self.corner, self.shape)
        )


def embed_windows(network: CutPasteNet, images: Tensor, grid: Grid) -> Tensor:
    """Embeddings of every window of images (M, 3, H, W), float in [0, 1]: (M, h*w, D) float32, row by row.

    The image is normalised as a whole, as in training. The network must be in evaluation mode.
    """
    images = network.normalized(images)
    if grid.dense:
        features = stage_features(network.backbone, images, grid.level)
        (y, x), (h, w) = (corner // grid.unit for corner in grid.corner), grid.shape
        means = functional.avg_pool2d(features[:, :, y:, x:], grid.window // grid.unit, grid.stride // grid.unit)
        return means[:, :, :h, :w].flatten(2).mT.float()
    y, x = grid.corner
    parts = []
    for image in images:  # one at a time: their windows overlap, a copy of all is many times the image
        windows = image[:, y:, x:].unfold(1, grid.window, grid.stride).unfold(2, grid.window, grid.stride)
        for part in windows.permute(1, 2, 0, 3, 4).flatten(0, 1).split(WINDOWS_AT_ONCE):  # (n, 3, window, window)
            part = part.contiguous(memory_format=torch.channels_last)
            parts.append(stage_features(network.backbone, part, grid.level).mean((2, 3)))
    return torch.cat(parts).view(len(images), -1, parts[0].shape[1]).float()


@torch.inference_mode()
def embedding_blocks(
    network: CutPasteNet, images: Tensor, grid: Grid, l2: bool, device: torch.device
) -> Iterator[Tensor]:
    """Embeddings of images (N, 3, H, W), uint8 or float in [0, 1], some images at a time: (m, L, D) float32 on
    ``device``, each of length 1 with ``l2``. In evaluation mode; the network is left in the mode it was in."""
    training = network.training
    network.eval()
    try:
        for block in blocks(images, IMAGES_AT_ONCE):
            block = to_float(block.to(device)).contiguous(memory_format=torch.channels_last)
            embeddings = embed_windows(network, block, grid)
            yield functional.normalize(embeddings, dim=2) if l2 else embeddings
    finally:
        network.train(training)


# Densities --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """What K Gaussians of D dimensions need to know of N embeddings each, as sums: they add and subtract. float64."""

    count: int
    first: Tensor  # (K, D), sum of x
    second: Tensor  # (K, D, D), sum of x x'
    square: Tensor  # (K, D), sum of |x|^2 x
    fourth: Tensor  # (K,), sum of |x|^4

    @classmethod
    def of(cls, x: Tensor) -> "Moments":
        """Of embeddings (K, N, D)."""
        x = x.double()
        norm = x.square().sum(2, keepdim=True)
        return cls(x.shape[1], x.sum(1), x.mT @ x, (norm * x).sum(1), norm.square().sum((1, 2)))

    def _with(self, other: "Moments", sign: int) -> "Moments":
        pairs = ((getattr(self, name), getattr(other, name)) for name in ("first", "second", "square", "fourth"))
        return Moments(self.count + sign * other.count, *(torch.add(a, b, alpha=sign) for a, b in pairs))

    def __add__(self, other: "Moments") -> "Moments":
        return self._with(other, 1)

    def __sub__(self, other: "Moments") -> "Moments":
        return self._with(other, -1)

    def pooled(self) -> "Moments":
        """One Gaussian's, of the embeddings of all K."""
        first, second, square, fourth = (
            x.sum(0, keepdim=True) for x in (self.first, self.second, self.square, self.fourth)
        )
        return Moments(self.count * len(self.first), first, second, square, fourth)

    def covariances(self) -> tuple[Tensor, Tensor]:
        """Means (K, D) and Ledoit and Wolf's covariances (K, D, D)."""
        n = self.count
        mean = self.first / n
        covariance = self.second / n - mean[:, :, None] * mean[:, None]
        # sum |x - m|^4, multiplied out by |x - m|^2 = |x|^2 - 2 m'x + |m|^2
        norm = mean.square().sum(1)
        squares = self.second.diagonal(dim1=1, dim2=2).sum(1)
        along = (mean[:, None] @ self.second @ mean[:, :, None])[:, 0, 0]
        fourth = self.fourth - 4 * (self.square * mean).sum(1) + 4 * along + 2 * norm * squares - 3 * n * norm.square()
        return mean, shrunk(covariance, fourth.clamp(min=0), n)[0]


def distances(x: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
    """Mahalanobis distance (not squared, dimensionless) of embeddings (K, N, D) under K Gaussians: (K, N)."""
    return ((x.to(mean) - mean[:, None]) @ factor.mT).norm(dim=2)


class PatchGaussian(nn.Module):
    """The density of a patch model: one Gaussian for all locations, or one for each.

    Each location has as many embeddings as there are images, and its covariance at D = 512 would be a megabyte: there
    the embeddings are projected first, on the EACH_DIMS directions in which normal ones vary most. A Gaussian for all
    locations keeps all dimensions.

    Attributes (buffers, float32): projection (D, d), mean (K, d), factor (K, d, d), with K = 1 or L, see ``gaussians``.
    likelihoods: of "shared" and "each", what "auto" has decided by; empty otherwise. It is not saved.
    """

    def __init__(self) -> None:
        super().__init__()
        for name in ("projection", "mean", "factor"):
            self.register_buffer(name, torch.empty(0))
        self.likelihoods: dict[str, float] = {}

    @property
    def location(self) -> str:
        return "shared" if len(self.mean) == 1 else "each"

    @property
    def choice(self) -> str:
        """Which kind it is, and what "auto" decided by, in words."""
        words = "one Gaussian for each location" if self.location == "each" else "one Gaussian for all locations"
        if self.likelihoods:
            found = ", ".join(f"{kind} {value:.1f}" for kind, value in self.likelihoods.items())
            words += f" (mean log likelihood of held-out normal images: {found})"
        return words

    def fit(self, passes: Callable[[int], Iterator[Tensor]], location: str, held_out: bool = True) -> Tensor | None:
        """Fit to normal images. passes(n) gives the embeddings (m, L, D) of n evenly spaced ones (all, if there are no
        more), some images at a time, anew at each call.

        location "auto": the kind under which images are likelier when the Gaussians are fitted to the other folds, in
        the projection; "shared" with fewer than EACH_LEAST images.
        Returns the scores (n, L) of the images, each under Gaussians fitted to the other folds (image i is in fold i
        modulo FOLDS); None with held_out False. Raises ValueError if no Gaussian can be fitted.
        """
        basis = principal_axes(passes(PROJECTION_IMAGES))
        projections = {"shared": basis, "each": basis[:, :EACH_DIMS]}
        kinds = ("shared", "each") if location == "auto" else (location,)
        folds: dict[str, list[Moments]] = {kind: [] for kind in kinds}
        images = 0
        for x in _one_by_one(passes(PATCH_DENSITY_IMAGES)):
            for kind, own in folds.items():
                new = Moments.of(arranged(x @ projections[kind], kind))
                if images < FOLDS:
                    own.append(new)
                else:
                    own[images % FOLDS] += new
            images += 1
        if images < EACH_LEAST:
            if location == "each":
                raise ValueError(f"{images} images, one Gaussian for each location needs {EACH_LEAST}")
            kinds = ("shared",)
        if len(kinds) > 1:
            pooled = [fold.pooled() for fold in folds["each"]]
            self.likelihoods = {"shared": likelihood(pooled), "each": likelihood(folds["each"])}
            kinds = (max(self.likelihoods, key=self.likelihoods.get),)
        (kind,) = kinds
        own = folds.pop(kind)
        folds.clear()  # memory: with one Gaussian per location the largest thing here
        total = sum(own[1:], own[0])
        self.projection = projections[kind].float()
        self.mean, self.factor = (x.float() for x in gaussians(total))
        if not held_out:
            return None
        few = images < 4  # the others of so few are no distribution
        others = []
        while own:
            fold = own.pop(0)
            others.append(gaussians(total if few else total - fold))
        return torch.stack(
            [
                distances(arranged(x @ projections[kind], kind), *others[number % FOLDS]).reshape(-1)
                for number, x in enumerate(_one_by_one(passes(PATCH_DENSITY_IMAGES)))
            ]
        )

    def score(self, embeddings: Tensor) -> Tensor:
        """Mahalanobis distance (not squared, dimensionless) of embeddings (m, L, D): (m, L), higher is more
        anomalous."""
        x = arranged(embeddings.to(self.mean) @ self.projection, self.location)
        found = distances(x, self.mean, self.factor)
        return found.view(len(embeddings), -1) if self.location == "shared" else found.T


def _one_by_one(blocks: Iterator[Tensor]) -> Iterator[Tensor]:
    """Embeddings (m, L, D) image by image: (1, L, D) float64."""
    for block in blocks:
        yield from block.double().split(1)


def likelihood(folds: list[Moments]) -> float:
    """Mean log likelihood (natural logarithm, per embedding, without the constant) of each fold's embeddings under the
    Gaussians of the other folds; the moments say it, no embedding is needed."""
    total, sums = sum(folds[1:], folds[0]), 0.0
    for fold in folds:
        mean, factor = gaussians(total - fold)
        shift = fold.first / fold.count - mean
        spread = fold.second / fold.count - (fold.first[:, :, None] * fold.first[:, None]) / fold.count**2
        # the mean of (x - mean)' W'W (x - mean) over the fold
        squared = ((factor @ spread) * factor).sum((1, 2)) + (factor @ shift[:, :, None]).square().sum((1, 2))
        logdet = factor.diagonal(dim1=1, dim2=2).log().sum(1)
        sums += fold.count * (logdet - squared / 2).mean().item()
    return sums / total.count


def gaussians(moments: Moments) -> tuple[Tensor, Tensor]:
    """Means (K, D) and factors W (K, D, D), lower triangular: |W (x - mean)| is the Mahalanobis distance.

    The covariance is Ledoit and Wolf's, for each of several Gaussians (1 - POOLED) of it and POOLED of the mean over
    all: a location where the training images are all alike would else find a grey level infinitely far away.
    Raises ValueError if a covariance cannot be inverted.
    """
    mean, covariance = moments.covariances()
    if len(mean) > 1:
        covariance = (1 - POOLED) * covariance + POOLED * covariance.mean(0)
    lower, failed = torch.linalg.cholesky_ex(covariance)
    if failed.any() or not torch.isfinite(lower).all():
        raise ValueError("the embeddings are all equal")
    eye = torch.eye(mean.shape[1], dtype=mean.dtype, device=mean.device)
    return mean, torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)


def arranged(x: Tensor, location: str) -> Tensor:
    """Embeddings (m, L, d) by the Gaussians that they belong to: (1, m*L, d) or (L, m, d)."""
    return x.flatten(0, 1)[None] if location == "shared" else x.transpose(0, 1)


def principal_axes(embeddings: Iterator[Tensor]) -> Tensor:
    """An orthonormal basis (D, D) of embeddings (m, L, D), block by block: in its first directions they vary most."""
    total = None
    for block in embeddings:
        own = Moments.of(block.flatten(0, 1)[None])
        total = own if total is None else total + own
    if not torch.isfinite(total.fourth).all():  # eigh may raise an error of another kind, or go on
        raise ValueError("the embeddings are not finite")
    mean = total.first[0] / total.count
    return torch.linalg.eigh(total.second[0] / total.count - mean[:, None] * mean)[1].flip(1)


# Maps -------------------------------------------------------------------------------------------------------------


def upsample(scores: Tensor, grid: Grid, sigma: float) -> Tensor:
    """Scores (M, h, w) of the windows of a grid -> maps (M, H, W): each pixel the mean of all scores, weighted by a
    Gaussian of ``sigma`` pixels around it.

    It is the paper's transposed convolution with a Gaussian kernel, divided by the sum of weights (without which maps
    are darker at the border and striped for small sigma). Pixels further out than the centres of the outermost windows
    continue the map as it is there. The kernel is separable, so it comes to a matrix for each side.
    """
    down, across = (
        weights(side, centers.to(scores.device), sigma).to(scores)
        for side, centers in zip((grid.height, grid.width), grid.centers)
    )
    return down @ scores @ across.T


def weights(side: int, centers: Tensor, sigma: float) -> Tensor:
    """Of each window (h) for each pixel of a side: (side, h) float64, rows that sum to 1."""
    pixels = torch.arange(side, dtype=torch.float64, device=centers.device) + 0.5
    # From pixels without a window on either side the nearest score alone would be seen, less smoothed than any other
    pixels = pixels.clamp(centers[0], centers[-1])
    return (-(pixels[:, None] - centers).square() / (2 * sigma**2)).softmax(1)
