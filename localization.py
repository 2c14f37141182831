"""Map where an image is unusual: windows -> embeddings -> distances -> anomaly map; Grad-CAM.

Owns the grid of windows (a whole image is the grid with one window), the embeddings of windows, the densities of one
stage, the up-sampling of distances to maps, and Grad-CAM of image-level models. Tensors in, tensors out.
Sources: CutPaste (CVPR 2021), sections 2.4, 4.2 and A.5; Selvaraju et al., "Grad-CAM", ICCV 2017.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.onnx import is_in_onnx_export

from density import DENSITIES, NotFiniteError, fit_density, group_by_density, held_out
from model import CutPasteNet
from runtime.tensors import FLOATS, TensorRule, check_tensors, standardization

NEGLIGIBLE = 1e-30  # share of a pixel that a window has
EACH_LEAST = 8  # images that one Gaussian for each location needs
AXES_IMAGES = 32  # normal images that the principal axes are taken from
WHITENED = 0.25  # of joined stages: a direction in which normal embeddings have variance v gets v ** (1 - WHITENED)
PLACE_SOFTENED = 0.1  # of the deviation over all places, added to that of each place
PLACE_LIMIT = 15.0  # deviations: a place that hardly varies does not decide alone, however far a distance is
WINDOWS_AT_ONCE = 512  # that go through the network alone


@dataclass(frozen=True)
class Grid:
    """Windows of ``window`` x ``window`` pixels, ``stride`` apart, in images of ``height`` x ``width``; what does not
    divide by the stride is left over at the borders. window None: one window, the whole image.

    feature_stride: windows begin at multiples of that many pixels: the stride of the stage whose features are averaged
    over a window, 1 where each window goes through the network alone.
    cells: the windows' centers, not the windows, lie inside the image: one in each cell of ``stride`` pixels, whatever
    the stage, so that several stages share them. Features beyond the border count as 0: a window there is worth as much
    as the share of it that lies inside, or its few pixels, which vary more, would decide every score.
    """

    height: int
    width: int
    window: int | None = None
    stride: int = 1
    feature_stride: int = 1
    cells: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(h, w), the number of windows down and across."""
        if self.window is None:
            return 1, 1
        if self.cells:
            return (self.height - 1) // self.stride + 1, (self.width - 1) // self.stride + 1
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
        which puts feature i at pixel feature_stride * i, not in the middle of so many pixels. Cells are taken as they
        are: what a trained network tells of a cell is shown best in its middle.
        """
        if self.cells:
            return tuple(self.stride * (0.5 + torch.arange(count, dtype=torch.float64)) for count in self.shape)
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
        if self.cells:
            return self._pool_cells(features)
        (y, x), (h, w) = (corner // self.feature_stride for corner in self.corner), self.shape
        means = functional.avg_pool2d(
            features[:, :, y:, x:], self.window // self.feature_stride, self.stride // self.feature_stride
        )
        return means[:, :, :h, :w].flatten(2).mT

    def _pool_cells(self, features: Tensor) -> Tensor:
        """Average over an odd number of features, at least three, so that with the average over a cell that follows
        about ``window`` pixels are seen; where a feature is larger than a cell, take the means at the cells' centers,
        linearly between two features."""
        together = max(1, self.stride // self.feature_stride)  # features across a cell
        size = max(3, (self.window // self.feature_stride - together + 1) // 2 * 2 + 1)
        means = functional.avg_pool2d(features, size, 1, size // 2)
        if together > 1:
            means = functional.avg_pool2d(means, together, ceil_mode=True)
        elif self.feature_stride > self.stride:
            down, across = (
                between(count, side, self.stride / self.feature_stride).to(means)
                for count, side in zip(self.shape, features.shape[2:])
            )
            means = down @ means @ across.T
        return means.flatten(2).mT

    def cut(self, images: Tensor) -> Tensor:
        """Return the windows of images (B, 3, H, W), image by image: (B*L, 3, window, window)."""
        y, x = self.corner
        windows = images[:, :, y:, x:].unfold(2, self.window, self.stride).unfold(3, self.window, self.stride)
        return windows.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)


def between(count: int, side: int, step: float) -> Tensor:
    """Return weights (count, side) float64 of a row of ``side`` values, each the middle of its cell, at the middles of
    cells of ``step`` times their size: linear between two values, the nearest value beyond the outer ones."""
    points = ((torch.arange(count, dtype=torch.float64) + 0.5) * step - 0.5).clamp(0, side - 1)
    return (1 - (points[:, None] - torch.arange(side)).abs()).clamp(min=0)


def embed_windows(network: CutPasteNet, images: Tensor, levels: Sequence[int], grids: Sequence[Grid], dense: bool):
    """Return the embeddings of every window of images at each stage of ``levels``: a list of (B, L, D) float32.

    images: (B, 3, H, W), normalized as a whole, as in training, see CutPasteNet.normalized. grids: one for each level.
    dense: run the network once over the whole image, so that a feature near a window's border has seen beyond it; else
    on each window alone, as in the paper. The network must be in evaluation mode.
    """
    if dense:
        return [grid.pool(features).float() for grid, features in zip(grids, network.features(images, levels))]
    windows = grids[0].cut(images)  # a graph of another number of images has no other number of parts
    parts = [
        [x.mean((2, 3)) for x in network.features(part.contiguous(memory_format=torch.channels_last), levels)]
        for part in ([windows] if is_in_onnx_export() else windows.split(WINDOWS_AT_ONCE))
    ]
    return [torch.cat(stage).unflatten(0, (images.shape[0], -1)).float() for stage in zip(*parts)]


class StageDensity(nn.Module):
    """Hold what a detector knows of one stage, or of several that are seen together: where the windows are, which
    directions of their embeddings count, the density of those, and how its distances are standardized before they are
    added to others.

    stages: numbers, from 0, of those of the detector's stages whose embeddings it takes. grids: of each of them, with
    windows at the same places. dims: directions kept, None: all. joined: see ``choose_axes``. by_place: distances are
    standardized place by place.
    Buffers: axes (D, d), directions of normal embeddings, empty where all are kept as they are; origin (d,), if joined:
    the mean of normal embeddings along them; center, scale () or (L,): the distances' mean and standard deviation on
    held-out normal images, 0 and 1 if nothing is added; limit (), if by place: of deviations.
    likelihoods: of "shared" and "each", what "auto" has decided by; empty otherwise. It is not saved.
    """

    def __init__(
        self,
        stages: Sequence[int],
        grids: Sequence[Grid],
        density: str,
        l2: bool,
        location: str,
        dims: int | None,
        joined: bool = False,
        by_place: bool = False,
    ) -> None:
        super().__init__()
        self.stages, self.grid, self.kind, self.l2, self.location = tuple(stages), grids[0], density, l2, location
        self.dims, self.joined, self.by_place = dims, joined, by_place
        self.density = DENSITIES[density](self.grid.shape)
        self.likelihoods: dict[str, float] = {}
        self.register_buffer("axes", torch.empty(0))
        if joined:
            self.register_buffer("origin", torch.zeros(()))
        if by_place:
            self.register_buffer("limit", torch.tensor(PLACE_LIMIT, dtype=torch.float64))
        self.register_buffer("center", torch.zeros((), dtype=torch.float64))
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))

    @property
    def shared(self) -> bool:
        """Return whether one density is for all locations."""
        return self.density.count == 1

    @property
    def choice(self) -> str:
        """Return which kind of density it is, and what "auto" decided by, in words."""
        what = "Gaussian" if self.density.has_likelihood else "memory of normal embeddings"
        words = f"one {what} for all locations" if self.shared else f"one {what} for each location"
        if self.likelihoods:
            likelihoods = ", ".join(f"{kind} {value:.1f}" for kind, value in self.likelihoods.items())
            words += f", which fits held-out normal images better (mean log likelihood: {likelihoods})"
        return words

    def check(self, tensors: dict[str, object], width: int, alone: bool) -> None:
        """Raise ValueError, naming it, for a buffer of a file that is not as it must be.

        tensors: the buffers by name. width: of the features of its stages. alone: no other level is added to this one.
        """
        axes, windows = tensors.get("axes"), math.prod(self.grid.shape)
        all_kept = self.dims is None and isinstance(axes, Tensor) and axes.ndim == 1
        sizes = {"width": width, "D": self.dims or width, "L": windows}
        rules = {"axes": TensorRule((0,) if all_kept else ("width", "D"), FLOATS)}
        if self.joined:
            rules["origin"] = TensorRule(() if all_kept else ("D",), (torch.float32,))
        rules |= standardization(alone, ("L",) if self.by_place else ())
        rules |= {"limit": TensorRule((), least=0)} if self.by_place else {}
        rules |= {f"density.{name}": rule for name, rule in self.density.rules.items()}
        check_tensors(tensors, rules, sizes)
        if sizes.get("K", 1) not in (1, windows):
            raise ValueError(f"{sizes['K']} densities for {windows} windows")

    def choose_axes(self, embeddings: Sequence[Tensor]) -> None:
        """Choose the ``dims`` directions to keep by embeddings (n, L, D) of normal images, one tensor for each stage.

        Joined: those in which an image differs most from the others at the same place, the stages scaled to the same
        variance first; small variances are raised a little, see WHITENED. Else those in which embeddings vary most.
        """
        self.axes = torch.empty(0)
        if self.joined:
            self.origin = torch.zeros(())
        x = self.project(embeddings)
        if not self.joined:
            self.axes = principal_axes(x)[:, : self.dims].float()
            return
        widths = [stage.shape[2] for stage in embeddings]
        scales = [part.double().flatten(0, 1).std(0).mean() * part.shape[2] ** 0.5 for part in x.split(widths, 2)]
        scale = torch.cat([(1 / value.clamp(min=1e-9)).expand(width) for value, width in zip(scales, widths)])
        values, axes = principal_components((x - x.mean(0)) * scale)
        values = values[: self.dims].clamp(min=values[0] * 1e-6)
        axes = scale[:, None] * axes[:, : self.dims] * values ** (-WHITENED / 2)
        self.axes, self.origin = axes.float(), (x.double().mean((0, 1)) @ axes).float()

    def project(self, embeddings: Sequence[Tensor]) -> Tensor:
        """Return embeddings, (B, L, D) of each stage, as the density takes them, (B, L, d): L2-normalized if so set,
        side by side, along the axes. float64 of one window, float32 of many."""
        parts = [x if self.joined and self.grid.window else x.double() for x in embeddings]
        if self.l2:
            parts = [functional.normalize(x, dim=2) for x in parts]
        x = torch.cat(parts, 2) if len(parts) > 1 else parts[0]
        if self.axes.numel():
            x = x @ self.axes.to(x.dtype)
        if self.joined:
            x = x - self.origin
        return x if self.grid.window is None else x.float()

    def distances(self, projected: Tensor) -> Tensor:
        """Return the density's scores of projected embeddings (B, L, d): (B, L), higher is more anomalous."""
        scores = self.density.score(group_by_density(projected, self.shared))
        return scores.unflatten(1, projected.shape[:2])[0] if self.shared else scores.T

    def standardize(self, distances: Tensor) -> None:
        """Let ``standardized`` be in deviations of held-out distances (n, L) of normal images, from now on."""
        self.scale, self.center = torch.std_mean(distances)
        if self.by_place:
            scale, self.center = torch.std_mean(distances, 0)
            self.scale = scale + PLACE_SOFTENED * self.scale  # a place that hardly varies is no judge alone

    def standardized(self, distances: Tensor) -> Tensor:
        """Return distances (B, L) in deviations from those of normal images; by place, at most ``limit``."""
        deviations = (distances - self.center) / self.scale
        return deviations.clamp(max=self.limit) if self.by_place else deviations

    def fit(self, projected: Tensor, with_held_out: bool) -> Tensor | None:
        """Fit the density to projected embeddings (n, L, d) of normal images.

        location "auto": the kind under which images are likelier when the density is fitted to the other folds; "each"
        of a density without a likelihood; "shared" with fewer than EACH_LEAST images.
        Returns the held-out distances (n, L) float64, see density.held_out; None if they are not asked for. Raises
        DensityError if no density can be fitted.
        """
        shape, compared = self.grid.shape, self.density.has_likelihood
        kinds = (("shared", "each") if compared else ("each",)) if self.location == "auto" else (self.location,)
        if len(projected) < EACH_LEAST or projected.shape[1] == 1:
            kinds = ("shared",)
        tried = {}
        if len(kinds) > 1:
            tried = {kind: held_out(self.kind, projected, kind == "shared", shape) for kind in kinds}
            self.likelihoods = {kind: likelihood for kind, (_, likelihood) in tried.items()}
            kinds = (max(self.likelihoods, key=self.likelihoods.get),)
        (kind,) = kinds
        self.density = fit_density(self.kind, projected, kind == "shared", shape)
        if not with_held_out:
            return None
        scores, _ = tried.get(kind) or held_out(self.kind, projected, kind == "shared", shape, self.density)
        return scores


def principal_axes(embeddings: Tensor) -> Tensor:
    """Return an orthonormal basis (D, D) float64 of embeddings (n, L, D): in its first directions they vary most."""
    return principal_components(embeddings)[1]


def principal_components(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Return the variances (D,) of embeddings (n, L, D) along their principal axes, largest first, and the axes
    (D, D), both float64."""
    x = embeddings.double().flatten(0, 1)
    if not torch.isfinite(x).all():
        raise NotFiniteError("the embeddings are not finite")
    x = x - x.mean(0)
    values, axes = torch.linalg.eigh(x.T @ x)
    return values.flip(0) / len(x), axes.flip(1)


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


def bounded(deviations: Tensor, limit: Tensor) -> Tensor:
    """Return deviations as they are up to half of ``limit``; those above keep their order, grow ever more slowly, and
    never exceed it."""
    above = deviations.clamp(min=limit / 2)
    return torch.where(deviations < above, deviations, limit - limit.square() / (4 * above))


def weights(side: int, centers: Tensor, sigma: float) -> Tensor:
    """Return the weight of each window (h,) for each pixel of a side: (side, h) float64, rows that sum to 1."""
    pixels = torch.arange(side, dtype=torch.float64, device=centers.device) + 0.5
    # From pixels without a window on either side the nearest score alone would be seen, less smoothed than any other
    pixels = pixels.clamp(centers[0], centers[-1])
    shares = (-(pixels[:, None] - centers).square() / (2 * sigma**2)).softmax(1)
    # Shares of windows far away change no sum, but numbers as small as these are multiplied twenty times slower
    return torch.where(shares < NEGLIGIBLE, 0, shares)


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
