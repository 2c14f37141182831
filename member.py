"""One network with the densities of its levels: images -> embeddings -> distances -> scores and maps.

Owns how a network begins from its Config, which normal images it sees, how densities are fitted to them, and how images
are streamed. A detector is one or several of these. Knows nothing of files, folders, flags or training.
"""

import hashlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from config import Config, SettingError
from cutpaste import VARIANTS, to_float
from density import DensityError
from gradcam import grad_cam
from ignore import ALL_COUNT, filled, ignored_by
from localization import AXES_IMAGES, EACH_LEAST, Grid, Level, embed_windows, upsample
from model import CutPasteNet, load_backbone_weights
from runtime.cache import ImageArray, iterate, subset
from runtime.files import InputError

# A density is fitted to no more images than that: 20 for each of 512 dimensions estimate a Gaussian well
DENSITY_IMAGES = 10_000
PATCH_DENSITY_IMAGES = 1000  # of which all windows are held
IMAGES_AT_ONCE = 64  # that go through the network together
PATCH_IMAGES_AT_ONCE, PATCHES_AT_ONCE = 4, 4096  # of a patch model, and their windows, whichever is less


class Member(nn.Module):
    """The way: stages of the network -> embeddings (B, L, D) of L windows, one of an image-level model -> densities,
    one for all windows or one for each -> distances (B, L) of each level -> standardized and added, if there are
    several levels -> the score: the distance itself, or the maximum of the map that distances are up-sampled to.

    Buffers: center, scale (), float64: the scores' mean and standard deviation on normal images that this member has
    not seen, 0 and 1 of a detector's only member. sources (H, W): what takes the place of pixels that do not count, see
    ignore.py; hidden (H, W) bool: where maps are to show nothing, those pixels at least; both may be empty.
    """

    def __init__(self, config: Config, network: CutPasteNet, sources: Tensor = ALL_COUNT) -> None:
        super().__init__()
        self.config, self.network = config, network
        self.levels = nn.ModuleList(self._new_level(level) for level in config.levels)
        self.register_buffer("center", torch.zeros((), dtype=torch.float64))
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))
        self.register_buffer("sources", sources)
        self.register_buffer("hidden", ignored_by(sources))

    def _new_level(self, level: int) -> Level:
        config, patches = self.config, self.config.patches
        if patches is None:
            return Level(Grid(*self.size), config.density, config.l2, "shared", None)
        stride, width = (table[level - 1] for table in (self.network.spec.strides, self.network.spec.widths))
        unit = stride if patches.dense else 1
        grid = Grid(*self.size, max(patches.window, unit), max(patches.stride, unit), unit)
        dims = patches.most_dims if patches.most_dims < width else None
        return Level(grid, config.density, config.l2, patches.location, dims)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the images it takes."""
        return self.config.height, self.config.width

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def at_once(self) -> int:
        """Images that go through it together."""
        if self.config.patches is None:
            return IMAGES_AT_ONCE
        windows = max(math.prod(level.grid.shape) for level in self.levels)
        return max(1, min(PATCH_IMAGES_AT_ONCE, PATCHES_AT_ONCE // windows))

    @property
    def unit(self) -> str:
        """What a score is, before it is standardized."""
        unit = self.levels[0].density.unit
        return unit if len(self.levels) == 1 else f"sum of {len(self.levels)} standardized {unit}s"

    # Scoring ------------------------------------------------------------------------------------------------------

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Standardized scores (B,) float64 and maps (B, H, W) float32 or None, as Detector.forward gives them."""
        embeddings = self.embed(images)
        return self.standardized(
            *self.aggregate([level.distances(level.project(x)) for level, x in zip(self.levels, embeddings)])
        )

    def embed(self, images: Tensor) -> list[Tensor]:
        """Embeddings of all windows at each level, (B, L, D) float32 each, as the network gives them."""
        images = to_float(filled(images, self.sources)).contiguous(memory_format=torch.channels_last)
        dense = self.config.patches is None or self.config.patches.dense
        return embed_windows(self.network, images, self.config.levels, [level.grid for level in self.levels], dense)

    def aggregate(self, distances: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Scores (B,) and maps (B, H, W) or None of each level's distances (B, L)."""
        distances = [level.standardized(each) for level, each in zip(self.levels, distances)]
        if self.config.patches is None:
            return sum(distances)[:, 0].double(), None
        sigma = self.config.patches.sigma
        maps = self.hide(sum(upsample(each, level.grid, sigma) for level, each in zip(self.levels, distances)).float())
        return maps.amax((1, 2)).double(), maps

    def hide(self, maps: Tensor) -> Tensor:
        """Maps (B, H, W) that are, where hidden, as low as anywhere."""
        return torch.where(self.hidden, maps.amin((1, 2), keepdim=True), maps) if self.hidden.numel() else maps

    def standardized(self, scores: Tensor, maps: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The same in deviations from what normal images have."""
        if maps is not None:
            maps = ((maps - self.center) / self.scale).to(maps.dtype)
        return (scores - self.center) / self.scale, maps

    def grad_cam(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Standardized scores (B,) and Grad-CAM maps (B, H, W) of an image-level model, see gradcam.py; of several
        levels the sum of their maps. Raises InputError with a density whose score has no gradient."""
        if not self.levels[0].density.has_gradient:
            raise InputError(f"Grad-CAM needs the gradient of the score, which the density {self.config.density} lacks")
        images = to_float(filled(images, self.sources)).contiguous(memory_format=torch.channels_last)
        found = []
        for level, features in zip(
            self.levels, self.network.features(self.network.normalized(images), self.config.levels)
        ):
            score = lambda x, level=level: level.standardized(  # noqa: E731
                level.distances(level.project(level.grid.pool(x).float()))[:, 0]
            )
            found.append(grad_cam(features, score, self.size))
        scores, maps = (sum(each) for each in zip(*found))
        return self.standardized(scores, None)[0], self.hide(maps) / self.scale.float()

    # Fitting ------------------------------------------------------------------------------------------------------

    def fit(self, images: ImageArray, held_out: bool) -> Tensor | None:
        """Fit the densities to normal images (N, 3, H, W) uint8. The network runs once over them, in evaluation mode,
        which it is left in. Of more than DENSITY_IMAGES, that many are taken, evenly spaced; of a patch model
        PATCH_DENSITY_IMAGES.

        held_out: return what new normal images would score (n,), by densities fitted to the other folds of these; the
        network has seen them all. Raises InputError if no density can be fitted.
        """
        several = len(self.levels) > 1
        try:
            projected = self.eval().embed_normal(images)
            found = [level.fit(x, held_out or several) for level, x in zip(self.levels, projected)]
        except DensityError as error:
            raise InputError(f"{self.config.category}: no density can be fitted: {error}") from error
        if several:
            for level, distances in zip(self.levels, found):
                level.scale, level.center = torch.std_mean(distances)
        if not held_out:
            return None
        blocks = zip(*(distances.split(self.at_once) for distances in found))
        return torch.cat([self.aggregate(list(block))[0] for block in blocks])

    @torch.inference_mode()
    def embed_normal(self, images: ImageArray) -> list[Tensor]:
        """Projected embeddings (n, L, d) of an even sample of images at each level, whose axes it chooses."""
        most = DENSITY_IMAGES if self.config.patches is None else PATCH_DENSITY_IMAGES
        if any(level.dims is not None for level in self.levels):
            first = list(stream(self, images, self.embed, AXES_IMAGES))
            for level, blocks in zip(self.levels, zip(*first)):
                if level.dims is not None:
                    level.choose_axes(torch.cat(blocks))
        held: list[Tensor] = []
        done, count = 0, min(len(images), most)
        for embeddings in stream(self, images, self.embed, most):
            projected = [level.project(x) for level, x in zip(self.levels, embeddings)]
            held = held or [x.new_empty((count, *x.shape[1:])) for x in projected]
            part = slice(done, done := done + len(projected[0]))
            for own, x in zip(held, projected):
                own[part] = x
        return held


@torch.inference_mode()
def stream(
    scorer: nn.Module, images: ImageArray, function: Callable[[Tensor], object] | None = None, most: int | None = None
) -> Iterator:
    """What ``function`` (default: the scorer, a detector or a member, so scores and maps) gives for images
    (M, 3, H, W), block by block, each brought to the scorer's device. most: of more images than that, as many, evenly
    spaced."""
    if tuple(images.shape[1:]) != (3, *scorer.size):
        raise ValueError(f"images must be (M, 3, {scorer.size[0]}, {scorer.size[1]}), got {tuple(images.shape)}")
    if most is None or len(images) <= most:
        blocks = iterate(images, scorer.at_once)
    else:
        blocks = (images[part] for part in (torch.arange(most) * len(images) // most).split(scorer.at_once))
    for block in blocks:
        yield (function or scorer)(block.to(scorer.device))


# What a member sees --------------------------------------------------------------------------------------------------


def unseen_by(config: Config, count: int, number: int) -> Tensor:
    """The numbers of the normal images, of ``count``, that member ``number`` does not see: those of its fold (image i
    is in fold i modulo folds), or the evenly spaced ones that are held out."""
    if config.folds > 1:
        return torch.arange(number, count, config.folds)
    held = max(1, round(config.holdout * count)) if config.holdout else 0
    return torch.arange(held) * count // max(1, held)


def member_images(images: ImageArray, number: int, config: Config) -> ImageArray:
    """The normal images that member ``number`` sees."""
    unseen = unseen_by(config, len(images), number)
    if not len(unseen):
        return images
    seen = torch.ones(len(images), dtype=torch.bool)
    seen[unseen] = False
    return subset(images, seen.nonzero()[:, 0])


def check_enough(config: Config, count: int) -> None:
    """Raises SettingError if ``count`` images are too few for the folds (two in each, to have a deviation), for images
    held out, or for one Gaussian for each location, if it was asked for."""
    if config.folds > 1 and count < 2 * config.folds:
        reason = f"{count} training images make at most {count // 2} folds of two, {config.folds} were asked for"
        raise SettingError("folds", f"{config.category}: {reason}")
    seen = count - len(unseen_by(config, count, 0))
    if config.holdout and seen < 2:
        reason = f"{count} training images leave {seen} to learn from, at least 2 are needed"
        raise SettingError("holdout", f"{config.category}: {reason}")
    if config.patches and config.patches.location == "each" and seen < EACH_LEAST:
        reason = f"{seen} training images, one Gaussian for each location needs {EACH_LEAST}"
        raise SettingError("location", f"{config.category}: {reason}; take shared or auto")


# How a network begins ---------------------------------------------------------------------------------------------


def build_network(config: Config) -> CutPasteNet:
    """The network of a Config, its weights drawn from torch's global generator."""
    classes = VARIANTS[config.variant].num_classes
    network = CutPasteNet(config.backbone, config.head_layer, classes, config.normalize)
    return network.to(memory_format=torch.channels_last)


def initial_network(config: Config, pretrained: bool = True, member: int = 0) -> CutPasteNet:
    """The network as training starts from it: seeded by (seed, category, member), ImageNet weights in place if the
    Config and ``pretrained`` say so. Raises model.WeightsError if those cannot be had."""
    with torch.random.fork_rng(devices=[]):  # on the CPU, so that a seed means the same weights on every device
        torch.manual_seed(category_seed(config.seed, config.category, member))
        network = build_network(config)
    if config.pretrained and pretrained:
        load_backbone_weights(network, config.backbone, config.weights)
    return network


def category_seed(seed: int, category: str, member: int = 0) -> int:
    """A seed for one member of one category, so that its results do not depend on what was trained before it."""
    text = f"{seed}/{category}" + (f"/{member}" if member else "")
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
