"""Map where an image is unusual: windows -> embeddings -> distances -> anomaly map; Grad-CAM.

Owns the grid of windows (a whole image is the grid with one window), the embeddings of windows, the densities of one
stage, the up-sampling of distances to maps, and Grad-CAM of image-level models. Tensors in, tensors out.
Sources: CutPaste (CVPR 2021), sections 2.4, 4.2 and A.5; Selvaraju et al., "Grad-CAM", ICCV 2017.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from density import DENSITIES, NotFiniteError, fit_density, group_by_density, held_out
from model import CutPasteNet

EACH_LEAST = 8  # images that one Gaussian for each location needs
AXES_IMAGES = 32  # normal images that the principal axes are taken from
WINDOWS_AT_ONCE = 512  # that go through the network alone


@dataclass(frozen=True)
class Grid:
    """Windows of ``window`` x ``window`` pixels, ``stride`` apart, in images of ``height`` x ``width``; what does not
    divide by the stride is left over at the borders. window None: one window, the whole image.

    feature_stride: windows begin at multiples of that many pixels: the stride of the stage whose features are averaged
    over a window, 1 where each window goes through the network alone.
    """

    height: int
    width: int
    window: int | None = None
    stride: int = 1
    feature_stride: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """(h, w), the number of windows down and across."""
        if self.window is None:
            return 1, 1
        return tuple((side - self.window) // self.stride + 1 for side in (self.height, self.width))

    @property
    def corner(self) -> tuple[int, int]:
        """(y, x) of the first window: what is left over is at both borders."""
        left = ((side - self.window) % self.stride for side in (self.height, self.width))
        return tuple(rest // 2 // self.feature_stride * self.feature_stride for rest in left)

    @property
    def centers(self) -> tuple[Tensor, Tensor]:
        """Return the centers of the windows, down (h,) and across (w,): pixels, float64; a pixel's own center is at
        +0.5.

        With a feature_stride, of what the features have seen: the stem and each halving are padded alike on both sides,
        which puts feature i at pixel feature_stride * i, not in the middle of so many pixels.
        """
        return tuple(
            first
            + self.window / 2
            - (self.feature_stride - 1) / 2
            + self.stride * torch.arange(count, dtype=torch.float64)
            for first, count in zip(self.corner, self.shape)
        )

    def pool(self, features: Tensor) -> Tensor:
        """Return the mean over each window of features (B, C, h', w') of a whole image, one every ``feature_stride``
        pixels: (B, L, C), row by row."""
        if self.window is None:
            return functional.adaptive_avg_pool2d(features, 1).flatten(2).mT
        (y, x), (h, w) = (corner // self.feature_stride for corner in self.corner), self.shape
        means = functional.avg_pool2d(
            features[:, :, y:, x:], self.window // self.feature_stride, self.stride // self.feature_stride
        )
        return means[:, :, :h, :w].flatten(2).mT

    def cut(self, images: Tensor) -> Tensor:
        """Return the windows of images (B, 3, H, W), image by image: (B*L, 3, window, window)."""
        y, x = self.corner
        windows = images[:, :, y:, x:].unfold(2, self.window, self.stride).unfold(3, self.window, self.stride)
        return windows.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)


def embed_windows(network: CutPasteNet, images: Tensor, levels: Sequence[int], grids: Sequence[Grid], dense: bool):
    """Return the embeddings of every window of images at each stage of ``levels``: a list of (B, L, D) float32.

    images: (B, 3, H, W), normalized as a whole, as in training, see CutPasteNet.normalized. grids: one for each level.
    dense: run the network once over the whole image, so that a feature near a window's border has seen beyond it; else
    on each window alone, as in the paper. The network must be in evaluation mode.
    """
    if dense:
        return [grid.pool(features).float() for grid, features in zip(grids, network.features(images, levels))]
    parts = [
        [x.mean((2, 3)) for x in network.features(part.contiguous(memory_format=torch.channels_last), levels)]
        for part in grids[0].cut(images).split(WINDOWS_AT_ONCE)
    ]
    return [torch.cat(stage).unflatten(0, (len(images), -1)).float() for stage in zip(*parts)]


class StageDensity(nn.Module):
    """Hold what a detector knows of one stage: where its windows are, which directions of their embeddings count, the
    density of those, and how its distances are standardized before those of several levels are added.

    dims: directions kept, None: all. Buffers: axes (D, d), principal axes of normal embeddings, empty where all are
    kept; center, scale (): the distances' mean and standard deviation on held-out normal images, 0 and 1 of a single
    level.
    likelihoods: of "shared" and "each", what "auto" has decided by; empty otherwise. It is not saved.
    """

    def __init__(self, grid: Grid, density: str, l2: bool, location: str, dims: int | None) -> None:
        super().__init__()
        self.grid, self.kind, self.l2, self.location, self.dims = grid, density, l2, location, dims
        self.density = DENSITIES[density]()
        self.likelihoods: dict[str, float] = {}
        self.register_buffer("axes", torch.empty(0))
        self.register_buffer("center", torch.zeros((), dtype=torch.float64))
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))

    @property
    def shared(self) -> bool:
        """Return whether one density is for all locations."""
        return self.density.count == 1

    @property
    def choice(self) -> str:
        """Return which kind of density it is, and what "auto" decided by, in words."""
        words = "one Gaussian for all locations" if self.shared else "one Gaussian for each location"
        if self.likelihoods:
            likelihoods = ", ".join(f"{kind} {value:.1f}" for kind, value in self.likelihoods.items())
            words += f" (mean log likelihood of held-out normal images: {likelihoods})"
        return words

    def choose_axes(self, embeddings: Tensor) -> None:
        """Keep the ``dims`` directions in which normal embeddings (n, L, D) vary most."""
        self.axes = torch.empty(0)
        self.axes = principal_axes(self.project(embeddings))[:, : self.dims].float()

    def project(self, embeddings: Tensor) -> Tensor:
        """Return embeddings (B, L, D) as the density takes them, (B, L, d): L2-normalized if so set, along the axes.
        float64 of one window, float32 of many."""
        x = embeddings.double()
        if self.l2:
            x = functional.normalize(x, dim=2)
        if self.axes.numel():
            x = x @ self.axes.double()
        return x if self.grid.window is None else x.float()

    def distances(self, projected: Tensor) -> Tensor:
        """Return the density's scores of projected embeddings (B, L, d): (B, L), higher is more anomalous."""
        scores = self.density.score(group_by_density(projected, self.shared))
        return scores.unflatten(1, projected.shape[:2])[0] if self.shared else scores.T

    def standardized(self, distances: Tensor) -> Tensor:
        return (distances - self.center) / self.scale

    def fit(self, projected: Tensor, with_held_out: bool) -> Tensor | None:
        """Fit the density to projected embeddings (n, L, d) of normal images.

        location "auto": the kind under which images are likelier when the density is fitted to the other folds;
        "shared" with fewer than EACH_LEAST images.
        Returns the held-out distances (n, L) float64, see density.held_out; None if they are not asked for. Raises
        DensityError if no density can be fitted.
        """
        kinds = ("shared", "each") if self.location == "auto" else (self.location,)
        if len(projected) < EACH_LEAST or projected.shape[1] == 1:
            kinds = ("shared",)
        tried = {}
        if len(kinds) > 1 or with_held_out:
            tried = {kind: held_out(self.kind, projected, kind == "shared") for kind in kinds}
        if len(kinds) > 1:
            self.likelihoods = {kind: likelihood for kind, (_, likelihood) in tried.items()}
            kinds = (max(self.likelihoods, key=self.likelihoods.get),)
        self.density = fit_density(self.kind, projected, kinds[0] == "shared")
        return tried[kinds[0]][0] if with_held_out else None


def principal_axes(embeddings: Tensor) -> Tensor:
    """Return an orthonormal basis (D, D) float64 of embeddings (n, L, D): in its first directions they vary most."""
    x = embeddings.double().flatten(0, 1)
    if not torch.isfinite(x).all():
        raise NotFiniteError("the embeddings are not finite")
    x = x - x.mean(0)
    return torch.linalg.eigh(x.T @ x)[1].flip(1)


# Maps -------------------------------------------------------------------------------------------------------------


def upsample(distances: Tensor, grid: Grid, sigma: float) -> Tensor:
    """Return maps (B, H, W) from distances (B, L) of a grid's windows: each pixel the mean of all, weighted by a
    Gaussian of ``sigma`` pixels around it.

    It is the paper's transposed convolution with a Gaussian kernel, divided by the sum of weights (without which maps
    are darker at the border and striped for small sigma). Pixels further out than the centers of the outermost windows
    continue the map as it is there. The kernel is separable, so it comes to a matrix for each side.
    """
    down, across = (
        weights(side, centers.to(distances.device), sigma).to(distances)
        for side, centers in zip((grid.height, grid.width), grid.centers)
    )
    return down @ distances.unflatten(1, grid.shape) @ across.T


def weights(side: int, centers: Tensor, sigma: float) -> Tensor:
    """Return the weight of each window (h,) for each pixel of a side: (side, h) float64, rows that sum to 1."""
    pixels = torch.arange(side, dtype=torch.float64, device=centers.device) + 0.5
    # From pixels without a window on either side the nearest score alone would be seen, less smoothed than any other
    pixels = pixels.clamp(centers[0], centers[-1])
    return (-(pixels[:, None] - centers).square() / (2 * sigma**2)).softmax(1)


@torch.inference_mode(False)
@torch.enable_grad()
def grad_cam(features: Tensor, score: Callable[[Tensor], Tensor], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return scores (B,) of images and their maps (B, H, W) float32 of ``size`` (H, W), from the features (B, C, h, w)
    that a stage makes of them.

    score: features (B, C, h, w) -> (B,), each from its own image alone, differentiable; higher is more anomalous.
    A map is at least 0: the channels weighted by the mean of the score's gradient, summed, what is negative set to 0
    (it speaks for a normal image), bilinearly enlarged. Its unit is the score's, per feature. Works wherever gradients
    are off, and leaves none on any parameter.
    """
    features = features.detach().clone().requires_grad_()  # the graph begins here; a clone is no inference tensor
    scores = score(features)
    (gradient,) = torch.autograd.grad(scores.sum(), features)  # a score has a gradient in its own image alone
    gradient = gradient.nan_to_num(0, 0, 0)  # a distance of 0 has none
    maps = (gradient.mean((2, 3), keepdim=True) * features.detach()).sum(1, keepdim=True).relu()
    maps = functional.interpolate(maps, size, mode="bilinear", align_corners=False)
    return scores.detach(), maps[:, 0].float()
