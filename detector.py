"""A finished detector: one or several networks with their densities, decisions, and the file of it.

Owns how a network begins from its Config and which normal images it sees, how densities are fitted, the average of
several networks, the threshold, the file format with its earlier versions, and which detectors belong to which images.
Knows nothing of flags or of training.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from config import EACH_DIMS, Config, SettingError, UnknownSettingError
from conformal import FalseAlarmGuarantee, conformal_threshold, p_values
from cutpaste import VARIANTS
from dataset import choose_categories, train_paths
from density import DensityError
from image_ops import NOTHING_IGNORED, fill_ignored, ignored_pixels, image_statistics, to_float
from localization import AXES_IMAGES, EACH_LEAST, Grid, StageDensity, embed_windows, grad_cam, upsample
from model import CutPasteNet, load_backbone_weights
from runtime.files import InputError, load_tensors, save_tensors, say
from runtime.image_files import decode, resized

FORMAT = "cutpaste-detector"
VERSION = 5  # raise it when an older program could no longer read the file rightly
SUFFIX = ".pt"
MOST = 4096  # images that are remembered, of the normal ones and of the new ones
# A density is fitted to no more images than that: 20 for each of 512 dimensions estimate a Gaussian well
DENSITY_IMAGES = 10_000
PATCH_DENSITY_IMAGES = 1000  # of which all windows are held
IMAGES_AT_ONCE = 64  # that go through the network together
PATCH_IMAGES_AT_ONCE, PATCHES_AT_ONCE = 4, 4096  # of a patch model, and their windows, whichever is less


class BatchPrediction(NamedTuple):
    """What a detector says of images: scores (B,) float64, higher is more anomalous; p-values (B,), see
    conformal.p_values; anomaly maps (B, H, W) float32, or None."""

    scores: Tensor
    p_values: Tensor
    maps: Tensor | None


@dataclass(frozen=True)
class Prediction:
    """``BatchPrediction`` of images as arrays, and the decision: anomalous (N,) bool, where p <= the detector's
    ``guarantee.rate``."""

    scores: np.ndarray
    p_values: np.ndarray
    anomalous: np.ndarray
    maps: np.ndarray | None


class Detector(nn.Module):
    """Images in, anomaly scores and maps out. ``Detector.load(path).predict(images)`` is all that a program needs.

    The score of its only member, a distance; or, of ``--folds K``, the mean of the scores of K members, each
    standardized by the normal images of fold k, which member k has not seen.

    metadata: plain values that say how it was made. threshold: score above which an image is called anomalous, NaN
    before ``fit``. normal_scores: the held-out scores (n,) of normal images that it and p-values follow from. Of one
    member they are by densities that have not seen the image, though the network has; with ``--holdout`` those of the
    images held out; of several members, by a network that has not seen it either. sources: (H, W), what takes the place
    of pixels that do not count, see ignore.py. appearance: how normal images look, (n, 3), see drift.measure; (0, 3) if
    it is not known.
    """

    def __init__(
        self, config: Config, networks: Sequence[CutPasteNet] = (), fill_index: Tensor = NOTHING_IGNORED
    ) -> None:
        super().__init__()
        self.config = config
        self.metadata: dict = {}
        networks = networks or [build_network(config) for _ in range(config.folds)]
        self.members = nn.ModuleList(EnsembleMember(config, network, fill_index) for network in networks)
        self.register_buffer("threshold", torch.tensor(torch.nan, dtype=torch.float64))
        self.register_buffer("calibration_scores", torch.empty(0, dtype=torch.float64))
        self.register_buffer("appearance", torch.empty(0, 3))

    @property
    def network(self) -> CutPasteNet:
        """The first member's network."""
        return self.members[0].network

    @property
    def levels(self) -> Sequence[StageDensity]:
        """The first member's levels."""
        return self.members[0].levels

    @property
    def fill_index(self) -> Tensor:
        """What takes the place of pixels that do not count, (H, W); empty if all do."""
        return self.members[0].fill_index

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the images it takes."""
        return self.members[0].size

    @property
    def device(self) -> torch.device:
        return self.members[0].device

    @property
    def batch_size(self) -> int:
        """Images that go through it together."""
        return self.members[0].batch_size

    @property
    def unit(self) -> str:
        """What a score is."""
        unit = self.members[0].unit
        return unit if len(self.members) == 1 else f"standardized {unit}, mean of {len(self.members)} networks"

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Anomaly scores (B,) float64 and anomaly maps (B, H, W) float32 of images (B, 3, H, W), uint8 or float in
        [0, 1], on the detector's device; None for the maps of an image-level model.

        Higher is more anomalous; the unit is ``unit``. An image's score does not depend on the others of its batch. The
        detector must be in evaluation mode, as ``fit`` and ``load`` leave it.
        """
        return self.average([member(images) for member in self.members])

    def predict_batch(self, images: Tensor, grad_cam: bool = False) -> BatchPrediction:
        """The same with p-values. grad_cam: maps of an image-level model too, see Member.grad_cam."""
        found = [member.grad_cam(images) if grad_cam else member(images) for member in self.members]
        folds = len(self.members)
        p = p_values(
            torch.stack([scores for scores, _ in found]), [self.calibration_scores[k::folds] for k in range(folds)]
        )
        scores, maps = self.average(found)
        return BatchPrediction(scores, p, maps)

    def average(self, results: list[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
        """The mean over members of scores (B,) and of maps (B, H, W) or None. Where hidden, not even an image that is
        anomalous everywhere glows, see overlays.overlay."""
        scores, maps = (None if parts[0] is None else torch.stack(parts).mean(0) for parts in zip(*results))
        if maps is not None and (hidden := self.members[0].hidden).numel():
            dark = (self.threshold - self.threshold.abs() / 2).to(maps.dtype)
            maps = torch.where(hidden, torch.fmin(maps, dark), maps)  # fmin: a threshold may be NaN
        return scores, maps

    def grad_cam(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (B,) and maps (B, H, W) of an image-level model, see Member.grad_cam."""
        scores, _, maps = self.predict_batch(images, grad_cam=True)
        return scores, maps

    @torch.inference_mode()
    def predict(self, images: Iterable[str | Path | np.ndarray]) -> Prediction:
        """Scores, p-values, decisions and maps of N images: paths of image files, or arrays (H, W, 3) uint8 of any
        size. They are read block by block; all maps are held. Raises InputError, with the path, for no image."""
        found, rest = [], iter(images)
        while block := list(islice(rest, self.batch_size)):
            arrays = [resized(x, self.size) if isinstance(x, np.ndarray) else decode(x, self.size) for x in block]
            pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).to(self.device)
            found.append([None if part is None else part.cpu().numpy() for part in self.predict_batch(pixels)])
        scores, p, maps = zip(*found) if found else ([np.empty(0)], [np.empty(0)], [None])
        p = np.concatenate(p)
        maps = None if maps[0] is None else np.concatenate(maps)
        return Prediction(np.concatenate(scores), p, p <= self.guarantee.rate, maps)

    @staticmethod
    def load(path: str | Path, device: torch.device | str = "cpu") -> "Detector":
        """The detector of a file, see ``load`` of this module."""
        return load(path, device)

    @property
    def guarantee(self) -> FalseAlarmGuarantee:
        """What its false-alarm rate promises."""
        kind = "cross" if len(self.members) > 1 else "split" if self.config.holdout else "seen"
        return FalseAlarmGuarantee(kind, len(self.calibration_scores), self.config.false_alarm_rate)

    def fit(self, images: Tensor, threshold: bool = True) -> "Detector":
        """Fit every member to the normal images (N, 3, H, W) uint8 that its network was trained on; with
        ``threshold``, choose that too, from them alone. Raises InputError if no density can be fitted, SettingError for
        too few images.
        """
        config, count = self.config, len(images)
        check_enough(config, count)
        held_out = torch.empty(count, dtype=torch.float64, device=self.device)
        for number, member in enumerate(self.members):
            unseen = unseen_by(config, count, number)
            if not len(unseen):
                held_out = member.fit(images, threshold)
                break
            member.fit(images, held_out=False, seen=all_but(unseen, count))
            scores = torch.cat([batch for batch, _ in stream(member, images, numbers=unseen)])
            if config.holdout:
                held_out = scores
                break
            scale, member.center = torch.std_mean(scores)
            member.scale = scale.clamp(min=1e-9)  # copies of one image have none
            held_out[unseen.to(self.device)] = member.standardized(scores, None)[0]
        if threshold:
            self.calibration_scores = held_out
            self.threshold, _ = conformal_threshold(self.calibration_scores, self.config.false_alarm_rate)
            looks = stream(self, images, lambda block: image_statistics(fill_ignored(block, self.fill_index)), MOST)
            self.appearance = torch.cat(list(looks))
        return self

    def set_false_alarm_rate(self, rate: float) -> "Detector":
        """Itself, deciding at another false-alarm rate in [0, 1] from now on."""
        self.config = replace(self.config, false_alarm_rate=rate)
        self.threshold, _ = conformal_threshold(self.calibration_scores, rate)
        return self

    def ignore_region(self, ignored: Tensor) -> "Detector":
        """Itself, with maps that show nothing, from now on, where the mask (H, W) bool is set, beside what does not
        count anyway; a patch model's scores follow. Normal scores stay, so that p-values only grow. Raises
        InputError if nothing is left."""
        for member in self.members:
            hidden = ignored.to(self.device)
            member.hidden = hidden | member.hidden if member.hidden.numel() else hidden
            if member.hidden.all():
                raise InputError(f"{self.config.category}: every pixel is ignored, by the detector or by --ignore")
        return self

    def refit(self, images: Tensor, **changes) -> "Detector":
        """The same networks with other densities, fitted to ``images``, those they were trained on, where ``changes``
        are other settings; this detector stays as it is."""
        config = Config.from_dict(self.config.to_dict() | changes)
        other = Detector(config, [member.network for member in self.members], self.fill_index)
        other.metadata = dict(self.metadata)
        return other.fit(images)

    def untrained(self) -> "Detector":
        """The untrained baseline: networks as training found them, with the same kinds of density, not yet fitted."""
        networks = [initial_network(self.config, member=number) for number in range(len(self.members))]
        other = Detector(self.config, [network.to(self.device) for network in networks], self.fill_index)
        for new, member in zip(other.members, self.members):
            for own, level in zip(new.levels, member.levels):
                own.location = "shared" if level.shared else "each"
        return other

    def notes(self) -> Iterator[str]:
        """What a person should know of how it was fitted."""
        if self.config.patches:
            yield from (level.choice for level in self.levels)
        if not self.guarantee.holds:
            needed = self.guarantee.needed if self.config.false_alarm_rate else "infinitely many"
            count, rate = len(self.calibration_scores), self.config.false_alarm_rate
            found = f"the threshold is the largest of their scores, for a rate of {self.guarantee.rate:.2g}"
            yield f"a false-alarm rate of {rate:g} needs {needed} normal images, not {count}; {found}"


class EnsembleMember(nn.Module):
    """The way: stages of the network -> embeddings (B, L, D) of L windows, one of an image-level model -> densities,
    one for all windows or one for each -> distances (B, L) of each level -> standardized and added, if there are
    several levels -> the score: the distance itself, or the maximum of the map that distances are up-sampled to.

    Buffers: center, scale (), float64: the scores' mean and standard deviation on normal images that this member has
    not seen, 0 and 1 of a detector's only member. sources (H, W): what takes the place of pixels that do not count, see
    ignore.py; hidden (H, W) bool: where maps are to show nothing, those pixels at least; both may be empty.
    """

    def __init__(self, config: Config, network: CutPasteNet, fill_index: Tensor = NOTHING_IGNORED) -> None:
        super().__init__()
        self.config, self.network = config, network
        self.levels = nn.ModuleList(self._new_level(level) for level in config.levels)
        self.register_buffer("center", torch.zeros((), dtype=torch.float64))
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))
        self.register_buffer("fill_index", fill_index)
        self.register_buffer("hidden", ignored_pixels(fill_index))

    def _new_level(self, level: int) -> StageDensity:
        config, patches = self.config, self.config.patches
        if patches is None:
            return StageDensity(Grid(*self.size), config.density, config.l2, "shared", None)
        stride, width = (table[level - 1] for table in (self.network.spec.strides, self.network.spec.widths))
        unit = stride if patches.dense else 1
        grid = Grid(*self.size, max(patches.window, unit), max(patches.stride, unit), unit)
        dims = patches.most_dims if patches.most_dims < width else None
        return StageDensity(grid, config.density, config.l2, patches.location, dims)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the images it takes."""
        return self.config.height, self.config.width

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def batch_size(self) -> int:
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
        images = to_float(fill_ignored(images, self.fill_index)).contiguous(memory_format=torch.channels_last)
        dense = self.config.patches is None or self.config.patches.dense
        return embed_windows(self.network, images, self.config.levels, [level.grid for level in self.levels], dense)

    def aggregate(self, distances: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Scores (B,) and maps (B, H, W) or None of each level's distances (B, L)."""
        distances = [level.standardized(each) for level, each in zip(self.levels, distances)]
        if self.config.patches is None:
            return sum(distances)[:, 0].double(), None
        sigma = self.config.patches.sigma
        maps = self.lower_ignored(
            sum(upsample(each, level.grid, sigma) for level, each in zip(self.levels, distances)).float()
        )
        return maps.amax((1, 2)).double(), maps

    def lower_ignored(self, maps: Tensor) -> Tensor:
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
        images = to_float(fill_ignored(images, self.fill_index)).contiguous(memory_format=torch.channels_last)
        found = []
        for level, features in zip(
            self.levels, self.network.features(self.network.normalized(images), self.config.levels)
        ):
            score = lambda x, level=level: level.standardized(  # noqa: E731
                level.distances(level.project(level.grid.pool(x).float()))[:, 0]
            )
            found.append(grad_cam(features, score, self.size))
        scores, maps = (sum(each) for each in zip(*found))
        return self.standardized(scores, None)[0], self.lower_ignored(maps) / self.scale.float()

    # Fitting ------------------------------------------------------------------------------------------------------

    def fit(self, images: Tensor, held_out: bool, seen: Tensor | None = None) -> Tensor | None:
        """Fit the densities to normal images (N, 3, H, W) uint8. The network runs once over them, in evaluation mode,
        which it is left in. Of more than DENSITY_IMAGES, that many are taken, evenly spaced; of a patch model
        PATCH_DENSITY_IMAGES.

        seen: the numbers of the images to fit to; default: all. held_out: return what new normal images would score
        (n,), by densities fitted to the other folds of these; the network has seen them all. Raises InputError if no
        density can be fitted.
        """
        several = len(self.levels) > 1
        try:
            projected = self.eval().embed_normal(images, seen)
            found = [level.fit(x, held_out or several) for level, x in zip(self.levels, projected)]
        except DensityError as error:
            raise InputError(f"{self.config.category}: no density can be fitted: {error}") from error
        if several:
            for level, distances in zip(self.levels, found):
                level.scale, level.center = torch.std_mean(distances)
        if not held_out:
            return None
        blocks = zip(*(distances.split(self.batch_size) for distances in found))
        return torch.cat([self.aggregate(list(block))[0] for block in blocks])

    @torch.inference_mode()
    def embed_normal(self, images: Tensor, seen: Tensor | None = None) -> list[Tensor]:
        """Projected embeddings (n, L, d) of an even sample of images at each level, whose axes it chooses."""
        most = DENSITY_IMAGES if self.config.patches is None else PATCH_DENSITY_IMAGES
        if any(level.dims is not None for level in self.levels):
            first = list(stream(self, images, self.embed, AXES_IMAGES, seen))
            for level, blocks in zip(self.levels, zip(*first)):
                if level.dims is not None:
                    level.choose_axes(torch.cat(blocks))
        held: list[Tensor] = []
        done, count = 0, min(len(images if seen is None else seen), most)
        for embeddings in stream(self, images, self.embed, most, seen):
            projected = [level.project(x) for level, x in zip(self.levels, embeddings)]
            held = held or [x.new_empty((count, *x.shape[1:])) for x in projected]
            part = slice(done, done := done + len(projected[0]))
            for own, x in zip(held, projected):
                own[part] = x
        return held


@torch.inference_mode()
def stream(
    scorer: nn.Module,
    images: Tensor,
    function: Callable[[Tensor], object] | None = None,
    most: int | None = None,
    numbers: Tensor | None = None,
) -> Iterator:
    """Yield what ``function`` (default: the scorer, a detector or a member, so scores and maps) gives for images
    (M, 3, H, W), batch by batch, each brought to the scorer's device.

    numbers: of the images that are taken, in this order; default: all. most: of more images than that, as many, evenly
    spaced.
    """
    if tuple(images.shape[1:]) != (3, *scorer.size):
        raise ValueError(f"images must be (M, 3, {scorer.size[0]}, {scorer.size[1]}), got {tuple(images.shape)}")
    numbers = torch.arange(len(images)) if numbers is None else numbers
    if most is not None and len(numbers) > most:
        numbers = numbers[torch.arange(most) * len(numbers) // most]
    for part in numbers.split(scorer.batch_size) if len(numbers) else ():
        yield (function or scorer)(images.index_select(0, part.to(images.device)).to(scorer.device))


# What a member sees --------------------------------------------------------------------------------------------------


def unseen_by(config: Config, count: int, number: int) -> Tensor:
    """The numbers of the normal images, of ``count``, that member ``number`` does not see: those of its fold (image i
    is in fold i modulo folds), or the evenly spaced ones that are held out."""
    if config.folds > 1:
        return torch.arange(number, count, config.folds)
    held = max(1, round(config.holdout * count)) if config.holdout else 0
    return torch.arange(held) * count // max(1, held)


def all_but(numbers: Tensor, count: int) -> Tensor:
    """Return the others of the numbers 0 ... count - 1, ascending."""
    others = torch.ones(count, dtype=torch.bool)
    others[numbers] = False
    return others.nonzero()[:, 0]


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


# The file ---------------------------------------------------------------------------------------------------------


def detector_path(model_dir: str | Path, category: str) -> Path:
    return Path(model_dir) / (category + SUFFIX)


def save(detector: Detector, path: str | Path) -> None:
    """Write a detector file, whole or not at all. Raises OSError if it cannot be written."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "config": detector.config.to_dict(),
        "metadata": detector.metadata,
        "members": [
            {"network": member.network.state_dict(), "levels": member.levels.state_dict()}
            | {"center": member.center, "scale": member.scale}
            for member in detector.members
        ],
        "threshold": detector.threshold,
        "normal_scores": detector.calibration_scores,
        "appearance": detector.appearance,
        "sources": detector.fill_index,
    }
    save_tensors(content, path)


def load_config(path: str | Path) -> Config:
    """The settings of a detector file; builds no network. Raises InputError as ``load`` does."""
    return _read(path)[0]


def load(path: str | Path, device: torch.device | str = "cpu") -> Detector:
    """Read a detector file onto ``device``, wherever it was made. Raises InputError if it is missing, damaged, not a
    detector, of a newer format, or under a name that is not its category's."""
    config, content = _read(path)
    try:
        with torch.random.fork_rng(devices=[]):
            detector = Detector(config, fill_index=content.get("sources", NOTHING_IGNORED))
        if tuple(detector.fill_index.shape) not in ((0,), detector.size):
            raise ValueError(f"a mask of {tuple(detector.fill_index.shape)} for images of {detector.size}")
        if len(content["members"]) != len(detector.members):
            raise ValueError(f"{len(content['members'])} networks for {len(detector.members)} folds")
        for member, part in zip(detector.members, content["members"]):
            fill(member, part)
        detector.threshold, detector.calibration_scores = content["threshold"], content["normal_scores"]
        detector.appearance = content.get("appearance", detector.appearance)  # earlier files have none
        detector.metadata = dict(content["metadata"])
        return detector.to(device).eval()
    except (KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: damaged detector file ({reason}); train it again") from error


def fill(member: EnsembleMember, content: dict) -> None:
    """Set a member to what a file holds of it. Raises ValueError or RuntimeError if that does not fit."""
    member.network.load_state_dict(content["network"])
    if content["levels"].keys() != member.levels.state_dict().keys():
        raise ValueError("its densities are of another kind")
    for name, value in content["levels"].items():  # their shapes are the file's, not those of an empty density
        owner, _, buffer = name.rpartition(".")
        setattr(member.levels.get_submodule(owner), buffer, value)
    for level in member.levels:
        if level.density.count not in (1, math.prod(level.grid.shape)):
            raise ValueError(f"{level.density.count} densities for {math.prod(level.grid.shape)} windows")
    member.center, member.scale = content["center"], content["scale"]


def _read(path: str | Path) -> tuple[Config, dict]:
    """Settings and content of a detector file, brought to this version."""
    content = load_tensors(path, "detector")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path}: not a detector file of this project; make one with run_training.py")
    version = content.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise InputError(f"{path}: detector format {version}, this program reads up to {VERSION}; update the program")
    try:
        content = from_version_2(content) if version < 3 else content
        content = from_version_3(content) if version < 4 else content
        config = Config.from_dict(content["config"])
    except UnknownSettingError as error:
        raise InputError(f"{path}: made by a newer program ({error}); update this one") from error
    except (InputError, KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: damaged detector file ({error}); train it again") from error
    if config.category != Path(path).stem:
        found = f"the detector of category {config.category!r} under another name"
        raise InputError(f"{path}: {found}; rename it back, a detector is only right for its own category")
    return config, content


def from_version_2(content: dict) -> dict:
    """Version 2 had one level, the inverse covariance of a whole image's Gaussian, "made" for metadata, all dimensions
    of a shared Gaussian that "auto" had chosen, and a quantile between two scores as its threshold."""
    density, config = dict(content["density"]), dict(content["config"])
    if config.get("location") == "auto" and density["projection"].shape[1] > EACH_DIMS:
        config["dims"] = density["projection"].shape[1]
    level = {"axes": density.pop("projection", torch.empty(0))}
    level |= {"center": torch.zeros((), dtype=torch.float64), "scale": torch.ones((), dtype=torch.float64)}
    if "precision" in density:  # P = V diag(l) V', so that |diag(l)^1/2 V' x|^2 = x'P x
        values, vectors = torch.linalg.eigh(density["precision"])
        factor = values.clamp(min=0).sqrt()[:, None] * vectors.T
        density = {"mean": density["mean"][None], "factor": factor[None]}
    level |= {f"density.{name}": value for name, value in density.items()}
    levels = {f"0.{name}": value for name, value in level.items()}
    threshold, _ = conformal_threshold(content["normal_scores"], config["false_alarm_rate"])
    return content | {"config": config, "metadata": content["made"], "levels": levels, "threshold": threshold}


def from_version_3(content: dict) -> dict:
    """Version 3 had one network, and four stages of MobileNetV2, the last one with its head convolution."""
    config = dict(content["config"])
    if config.get("backbone") == "mobilenet_v2" and config.get("level"):
        config["level"] = str(config["level"]).replace("4", "5")
    scale = {"center": torch.zeros((), dtype=torch.float64), "scale": torch.ones((), dtype=torch.float64)}
    return content | {"config": config, "members": [{name: content[name] for name in ("network", "levels")} | scale]}


def find_work(model_dir: str, data_dir: str, names: list[str], tell: bool = True) -> list[Path]:
    """The detector files to evaluate: of the categories asked for, or of each with both a detector and images; others
    are told. Where the folder holds folders of several seeds, those in them, by category and seed."""
    folder = Path(model_dir)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; train first, or name the folder of detectors with --model_dir")
    seeds = [path for path in folder.glob("seed*") if path.is_dir() and path.name.removeprefix("seed").isdecimal()]
    seeds.sort(key=lambda path: int(path.name.removeprefix("seed")))
    if seeds and detectors_in(folder):
        raise InputError(f"{folder}: holds detectors of its own and of several seeds; name one, such as {seeds[0]}")
    if not seeds:
        return [detector_path(folder, category) for category in find_categories(folder, data_dir, names, tell)]
    found = [
        detector_path(seed, category) for seed in seeds for category in find_categories(seed, data_dir, names, tell)
    ]
    return sorted(found, key=lambda path: path.stem)  # which keeps the order of seeds


def detectors_in(folder: Path) -> list[str]:
    return sorted(p.stem for p in folder.glob("*" + SUFFIX) if not p.name.startswith("."))


def find_categories(folder: Path, data_dir: str, names: list[str], tell: bool) -> list[str]:
    trained, found = detectors_in(folder), choose_categories(data_dir, names)
    if names != ["all"]:
        missing = [name for name in found if name not in trained]
        if missing:
            raise InputError(f"{folder}: no detector for {', '.join(missing)}; train it with run_training.py --type")
        return found
    for name in sorted({*trained} ^ {*found}) if tell else ():
        has = f"a detector in {folder} but no images in {data_dir}"
        lacks = f"images in {data_dir} but no detector in {folder}"
        say(f"{name}: has {has if name in trained else lacks}; left out")
    both = [name for name in found if name in trained]
    if not both:
        raise InputError(f"{folder}: no detector for any category of {data_dir}; train one with run_training.py")
    return both


def scored_images(detector: Detector, count: int) -> Tensor:
    """The numbers (n,) of the normal images, of ``count``, that a detector's normal_scores are of, in their order: all,
    those that are held out, or the even sample that its only member's densities were fitted to."""
    config = detector.config
    if config.holdout:
        return unseen_by(config, count, 0)
    most = DENSITY_IMAGES if config.patches is None else PATCH_DENSITY_IMAGES
    return torch.arange(most) * count // most if config.folds == 1 and count > most else torch.arange(count)


def scored_paths(data_dir: str | Path, detector: Detector) -> list[Path] | None:
    """The training images that a detector's normal_scores are of; None if their number says that it was made from
    others."""
    paths = train_paths(data_dir, detector.config.category)
    paths = [paths[i] for i in scored_images(detector, len(paths)).tolist()]
    return paths if len(paths) == len(detector.calibration_scores) else None
