"""A finished detector: one or several networks with their densities, decisions, and the file of it.

Owns how a network begins from its Config and which normal images it sees, how images are prepared and densities fitted,
the average of several networks, the threshold, the file format with its earlier versions, and which detectors belong to
which images. Knows nothing of flags or of training.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from config import CANDIDATES, DENSITY_SUMS, EACH_DIMS, VARIANTS, Config, SettingError, UnknownSettingError
from conformal import FalseAlarmGuarantee, conformal_threshold, p_values
from dataset import choose_categories
from density import DENSITIES, DensityError, has_gradient
from image_ops import NOTHING_IGNORED, fill_ignored, ignored_pixels, to_float
from localization import AXES_IMAGES, EACH_LEAST, Grid, StageDensity, bounded, embed_windows, grad_cam, upsample
from model import CutPasteNet, load_backbone_weights
from runtime.files import InputError, damage_named, load_tensors, save_tensors, say
from runtime.gpu import issued_ahead, to_device
from runtime.image_files import FULL_RANGE, decode, resized
from runtime.looks import image_statistics
from runtime.tensors import FLOATS, TensorRule, check_tensor, check_tensors, rules_of, standardization

FORMAT = "cutpaste-detector"
VERSION = 9  # raise it when an older program could no longer read the file rightly
SUFFIX = ".pt"
EXPORT_AGAIN = "an exported file must be exported again"  # wherever it lies, where a detector file has changed
CHOSEN_BEFORE = "both"  # the density of "auto" until it has been chosen
DAMAGED = "detector", "train it again"
SUM_LIMIT = 15.0  # deviations, of a sum at a place: what is higher would only glow beyond its border
CELLS = 4  # images are compared by a map of so many features down and across
WHITES = tuple(2**bits - 1 for bits in range(8, 17))  # of 16-bit images, see dataset.find_white
APPEARANCE_IMAGES = 4096  # normal images whose looks are kept
# A density is fitted to no more images than that: 20 for each of 512 dimensions estimate a Gaussian well
DENSITY_IMAGES = 10_000
PATCH_DENSITY_IMAGES = 1000  # of which all windows are held
IMAGES_AT_ONCE = 64  # that go through the network together
# Of a patch model, and their windows, whichever is less. A GPU takes more: fewer would keep it waiting for launches
PATCH_IMAGES_AT_ONCE, PATCHES_AT_ONCE = {"cpu": 4, "cuda": 32}, {"cpu": 4096, "cuda": 32768}


class BatchPrediction(NamedTuple):
    """Hold what a detector says of B images.

    scores: (B,) float64, higher is more anomalous. p_values: (B,), see conformal.p_values. maps: (B, H, W) float32 of a
    patch model, else None. What explains them is there if it was asked for, see ``Detector.predict_batch``. features:
    of the members, by stage. compared: (B, D), see ``Detector.compared``. windows: (B, 3) or None, see
    ``Detector.nearest_windows``.
    """

    scores: Tensor
    p_values: Tensor
    maps: Tensor | None
    features: tuple[dict[int, Tensor], ...] = ()
    compared: Tensor | None = None
    windows: Tensor | None = None


@dataclass(frozen=True)
class Prediction:
    """Hold what a detector says of N images, as arrays.

    scores, p_values: (N,); anomalous: (N,) bool, where p <= the detector's ``guarantee.rate``; maps: (N, H, W) or None.
    """

    scores: np.ndarray
    p_values: np.ndarray
    anomalous: np.ndarray
    maps: np.ndarray | None


class Detector(nn.Module):
    """Images in, anomaly scores and maps out. ``Detector.load(path).predict(images)`` is all that a program needs.

    The score is that of its only member, a distance; or, with ``--folds K``, the mean of the scores of K members, each
    standardized by the normal images of fold k, which member k has not seen.

    metadata: plain values that say how it was made. white: the value that is white in 16-bit images, see
    dataset.find_white. Buffers:
    threshold (): the score above which an image is called anomalous, NaN before ``fit``.
    calibration_scores (n,): scores of normal images, which the threshold and p-values follow from. Of one member they
        are by densities that have not seen the image, though the network has; with ``--holdout`` they are those of the
        images held out; of several members, each is by a network that has not seen the image either.
    fill_index (H, W): where each pixel is taken from, see image_ops.fill_ignored; empty if every pixel counts.
    appearance (n, 3): how normal images look, see looks.image_statistics; (0, 3) if it is not known.
    """

    def __init__(
        self,
        config: Config,
        networks: Sequence[CutPasteNet] = (),
        fill_index: Tensor = NOTHING_IGNORED,
        white: int = FULL_RANGE,
        density: str = "",
    ) -> None:
        super().__init__()
        self.config, self.white = config, white
        self.density = density or (CHOSEN_BEFORE if config.density == "auto" else config.density)
        self.metadata: dict = {}
        self.rate_chosen = ""  # how, in words, if labelled images have chosen the false-alarm rate
        self.train_files = ""  # dataset.files_digest of the images it was made from; empty if it is not known
        networks = [network.folded() for network in networks or [build_network(config) for _ in range(config.folds)]]
        hidden = ignored_pixels(fill_index)
        self.members = nn.ModuleList(EnsembleMember(config, network, hidden, self.density) for network in networks)
        self.register_buffer("fill_index", fill_index)
        self.register_buffer("threshold", torch.tensor(torch.nan, dtype=torch.float64))
        self.register_buffer("calibration_scores", torch.empty(0, dtype=torch.float64))
        self.register_buffer("appearance", torch.empty(0, 3))

    @property
    def device(self) -> torch.device:
        return next(self.members[0].network.parameters()).device

    @property
    def size(self) -> tuple[int, int]:
        """Return (H, W) of its images."""
        return self.config.size

    @property
    def batch_size(self) -> int:
        """Return the number of images that go through it together."""
        if self.config.patches is None:
            return IMAGES_AT_ONCE
        windows, kind = max(math.prod(level.grid.shape) for level in self.members[0].levels), self.device.type
        return max(1, min(PATCH_IMAGES_AT_ONCE[kind], PATCHES_AT_ONCE[kind] // windows))

    @property
    def unit(self) -> str:
        """Return what a score is, in words."""
        unit = self.members[0].unit
        return unit if len(self.members) == 1 else f"standardized {unit}, mean of {len(self.members)} networks"

    @property
    def guarantee(self) -> FalseAlarmGuarantee:
        """Return what its false-alarm rate promises."""
        kind = "cross" if len(self.members) > 1 else "split" if self.config.holdout else "seen"
        return FalseAlarmGuarantee(kind, len(self.calibration_scores), self.config.false_alarm_rate, self.rate_chosen)

    @property
    def comparison_level(self) -> int:
        """Return the stage whose features tell which normal image is nearest: the last one of stride 16."""
        return self.members[0].network.spec.middle[-1]

    @property
    def compared_width(self) -> int:
        """Return D, of what ``compared`` returns."""
        return self.members[0].network.spec.widths[self.comparison_level - 1] * CELLS**2

    @property
    def normals_digest(self) -> str:
        """Return what two trainings do not share: all that decides a detector decides what it says of its normal
        images."""
        return hashlib.blake2b(self.calibration_scores.cpu().numpy().tobytes(), digest_size=16).hexdigest()

    # Scoring ------------------------------------------------------------------------------------------------------

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return anomaly scores (B,) float64 and anomaly maps (B, H, W) float32, None of an image-level model.

        images: (B, 3, H, W), uint8 or float in [0, 1], on the detector's device. Higher is more anomalous; the unit is
        ``unit``. An image's score does not depend on the others of its batch. The detector must be in evaluation mode,
        as ``fit`` and ``load`` leave it.
        """
        return self.score_prepared(self.prepare(images))

    def prepare(self, images: Tensor) -> Tensor:
        """Return images (B, 3, H, W), uint8 or float in [0, 1], as the members take them, all alike: ignored pixels
        filled, float32, channels_last, normalized."""
        images = to_float(self.fill(images)).contiguous(memory_format=torch.channels_last)
        return self.members[0].network.normalized(images)

    def fill(self, images: Tensor) -> Tensor:
        """Return images (B, 3, H, W) with ignored pixels filled, as the detector sees them."""
        return fill_ignored(images, self.fill_index)

    def score_prepared(self, prepared: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what ``forward`` does of images as ``prepare`` gives them."""
        scores, maps = self.score_by_member(prepared)
        return scores.mean(0), maps

    def score_by_member(self, prepared: Tensor, projected: Sequence[list[Tensor]] = ()) -> tuple[Tensor, Tensor | None]:
        """Return the scores (K, B) float64 by each of K members, and the maps (B, H, W) float32 or None of all.

        projected: what EnsembleMember.project gives of ``prepared``, of each member, if it is there already."""
        members = zip(self.members, projected or [None] * len(self.members))
        scores, maps = zip(*(member(prepared, computed) for member, computed in members))
        return torch.stack(scores), self._mean_map(maps)

    def p_values(self, scores: Tensor) -> Tensor:
        """Return p-values (B,) float64 of scores (K, B) by each of its K members, see conformal.p_values."""
        folds = len(self.members)
        return p_values(scores, [self.calibration_scores[fold::folds] for fold in range(folds)])

    def predict_batch(self, images: Tensor, explain: bool = False) -> BatchPrediction:
        """Return scores, p-values and maps of images as ``forward`` takes them.

        explain: keep the features that ``heat`` needs, so that no network runs again, and say what normal images to
        compare them with.
        """
        return self.predict_prepared(self.prepare(images), explain)

    def predict_prepared(self, prepared: Tensor, explain: bool = False) -> BatchPrediction:
        """Return what ``predict_batch`` does of images as ``prepare`` gives them."""
        if not explain:
            scores, maps = self.score_by_member(prepared)
            return BatchPrediction(scores.mean(0), self.p_values(scores), maps)
        levels = {*self.config.levels} if self.config.dense else set()
        features = [member.features(prepared, levels) for member in self.members[1:]]
        features.insert(0, self.members[0].features(prepared, {*levels, self.comparison_level}))
        members = zip(self.members, features)
        projected = [member.project(member.embed(prepared, computed)) for member, computed in members]
        scores, maps = self.score_by_member(prepared, projected)
        said = scores.mean(0), self.p_values(scores), maps, tuple(features)
        return BatchPrediction(*said, self.compared(features[0]), self.nearest_windows(projected[0], maps))

    def heat(self, prediction: BatchPrediction, chosen: Tensor | slice = slice(None)) -> Tensor:
        """Return the maps (n, H, W) float32 of the ``chosen`` images of a batch: those of a patch model, else Grad-CAM
        of the score, from the features that ``predict_batch(explain=True)`` has kept. Raises InputError for a density
        whose score has no gradient."""
        if prediction.maps is not None:
            return prediction.maps[chosen]
        maps = []
        for member, features in zip(self.members, prediction.features, strict=True):
            maps.append(member.grad_cam({level: x[chosen] for level, x in features.items()}))
        return self._mean_map(maps)

    def compared(self, features: Mapping[int, Tensor]) -> Tensor:
        """Return what images are compared by, (B, D) float32 of unit length: the first member's features (B, C, h, w)
        at ``comparison_level``, averaged to CELLS x CELLS.

        They keep where things are, so that a part is found in the same pose; means over the image do not. And they know
        a grid turned the same way whose wires lie elsewhere, which pixels do not.
        """
        cells = functional.adaptive_avg_pool2d(features[self.comparison_level].float(), CELLS)
        return functional.normalize(cells.flatten(1), dim=1)

    def nearest_windows(self, projected: Sequence[Tensor], maps: Tensor | None) -> Tensor | None:
        """Return which normal window is nearest to the one where the map of each image (B, H, W) is highest, (B, 3)
        int64: the number of its training image, and how many pixels down and right it lies.

        projected: what EnsembleMember.project of the first member gives. None if its densities keep no normal windows,
        and of an image-level model.
        """
        member = self.members[0]
        if (level := member.nearest_level) is None or maps is None:
            return None
        images = torch.arange(maps.shape[0], device=maps.device)
        y = maps.amax(2).argmax(1)  # several times as fast as the place of the maximum among all pixels
        row, column = (
            (centers - 0.5 - torch.arange(side)[:, None]).abs().argmin(1).to(maps.device)[places]
            for centers, side, places in zip(level.grid.centers, self.size, (y, maps[images, y].argmax(1)))
        )
        window = row * level.grid.shape[1] + column
        other, number = level.density.nearest_at(projected[[*member.levels].index(level)][images, window], window)
        places = torch.cartesian_prod(*map(torch.arange, level.grid.shape)).to(maps.device)
        shifts = level.grid.stride * (places[other] - places[window])
        return torch.cat([number[:, None], shifts], 1)

    def _mean_map(self, maps: Sequence[Tensor | None]) -> Tensor | None:
        """Return the mean over members of maps (B, H, W). Where hidden, not even an image that is anomalous everywhere
        glows, see reporting/overlays.py."""
        if maps[0] is None:
            return None
        mean, hidden = torch.stack(tuple(maps)).mean(0), self.members[0].hidden
        if not hidden.numel():
            return mean
        dark = (self.threshold - self.threshold.abs() / 2).to(mean.dtype)
        return torch.where(hidden & ~(dark.isnan() | (mean < dark)), dark, mean)  # a threshold may be NaN

    @torch.inference_mode()
    def predict(self, images: Iterable[str | Path | np.ndarray]) -> Prediction:
        """Return scores, p-values, decisions and maps of N images: paths of image files, or arrays (H, W, 3) uint8 of
        any size. They are read batch by batch; all maps are held. Raises InputError, with the path, for no image."""
        rest, size = iter(images), self.config.size

        def predictions() -> Iterator[BatchPrediction]:
            while block := list(islice(rest, self.batch_size)):
                arrays = [resized(x, size) if isinstance(x, np.ndarray) else decode(x, size, self.white) for x in block]
                yield self.predict_batch(to_device(torch.from_numpy(np.stack(arrays)), self.device).permute(0, 3, 1, 2))

        batches = [
            [None if part is None else part.cpu().numpy() for part in prediction[:3]]
            for prediction in issued_ahead(predictions(), self.device)
        ]
        scores, p, maps = zip(*batches) if batches else ([np.empty(0)], [np.empty(0)], [None])
        p = np.concatenate(p)
        maps = None if maps[0] is None else np.concatenate(maps)
        return Prediction(np.concatenate(scores), p, p <= self.guarantee.rate, maps)

    def standardized_scores(self, scores: np.ndarray) -> np.ndarray:
        """Return scores in deviations from the mean of the calibration scores, so that those of detectors with other
        seeds can be averaged."""
        several = int(len(self.calibration_scores) > 1)  # one image held out has no deviation
        scale, center = (part.item() for part in torch.std_mean(self.calibration_scores, correction=several))
        return (scores - center) / max(scale, 1e-9)

    # Making one, and changing it ----------------------------------------------------------------------------------

    @staticmethod
    def load(path: str | Path, device: torch.device | str = "cpu") -> "Detector":
        """Return the detector of a file, see ``load`` of this module."""
        return load(path, device)

    def fit(
        self,
        images: Tensor,
        threshold: bool = True,
        numbers: Tensor | None = None,
        tell: Callable[[], object] = lambda: None,
    ) -> "Detector":
        """Fit every member to the normal images (N, 3, H, W) uint8 that its network was trained on, and return itself.

        threshold: choose that too, from these images alone. numbers: of the images that are meant; default: all. tell:
        called after each of several members. Raises InputError if no density can be fitted, SettingError for too few
        images.
        """
        numbers = torch.arange(len(images)) if numbers is None else numbers
        config, count = self.config, len(numbers)
        check_enough(config, count)
        held_out_scores = torch.empty(count, dtype=torch.float64, device=self.device)
        for fold, member in enumerate(self.members):
            unseen = unseen_by(config, count, fold)
            if not len(unseen):
                held_out_scores = self._fit_member(member, images, numbers, held_out=threshold)
                break
            self._fit_member(member, images, numbers[all_but(unseen, count)], held_out=False)
            scores = torch.cat([scores for scores, _ in stream(self, images, member, numbers=numbers[unseen])])
            if config.holdout:
                held_out_scores = scores
                break
            scale, member.center = torch.std_mean(scores)
            member.scale = scale.clamp(min=1e-9)  # copies of one image have none
            held_out_scores[unseen.to(self.device)] = member.standardized(scores, None)[0]
            tell()
        if threshold:
            self.calibration_scores = held_out_scores
            self.threshold, _ = conformal_threshold(held_out_scores, config.false_alarm_rate)
            blocks = batches_of(self, images, APPEARANCE_IMAGES, numbers)
            looks = [image_statistics(self.fill(block)) for block in blocks]
            self.appearance = torch.cat(looks)
        return self

    def _fit_member(self, member: "EnsembleMember", images: Tensor, numbers: Tensor, held_out: bool) -> Tensor | None:
        """Fit a member's densities to the images of these numbers, and return what ``EnsembleMember.fit`` does. The
        network runs once over them. Of more than DENSITY_IMAGES, that many are taken, evenly spaced; of a patch model
        PATCH_DENSITY_IMAGES."""
        limit = DENSITY_IMAGES if self.config.patches is None else PATCH_DENSITY_IMAGES
        self.eval()
        try:
            if any(level.dims for level in member.levels):
                member.choose_axes(stream(self, images, member.embed, AXES_IMAGES, numbers))
            taken = numbers[evenly_spaced(len(numbers), limit)].to(self.device)
            embeddings = stream(self, images, member.embed, numbers=taken.cpu())
            scores = member.fit(embeddings, len(taken), held_out, self.batch_size)
            if nearest := member.nearest_level:  # images are known by their numbers among all
                nearest.density.images = taken[nearest.density.images.long()].int()
            return scores
        except DensityError as error:
            raise InputError(f"{self.config.category}: no density can be fitted: {error}") from error

    def set_false_alarm_rate(self, rate: float, chosen: str = "") -> "Detector":
        """Decide at another false-alarm rate in [0, 1] from now on; return itself. chosen: how labelled images have
        chosen it, in words."""
        self.rate_chosen = chosen
        self.config = replace(self.config, false_alarm_rate=rate)
        self.threshold, _ = conformal_threshold(self.calibration_scores, rate)
        return self

    def ignore_region(self, ignored: Tensor) -> "Detector":
        """Let maps show nothing, from now on, where ``ignored`` (H, W) bool is set, and return itself.

        That is beside what it ignores anyway. A patch model's scores follow; calibration scores stay, so that p-values
        only grow. Raises InputError if nothing is left.
        """
        ignored = ignored.to(self.device)
        for member in self.members:
            member.hidden = ignored | member.hidden if member.hidden.numel() else ignored
            if member.hidden.all():
                raise InputError(f"{self.config.category}: every pixel is ignored, by the detector or by --ignore")
        return self

    def refit(self, images: Tensor, **changes) -> "Detector":
        """Return a detector of the same networks with other densities, fitted to ``images``, those they were trained
        on. changes: other settings. This detector stays as it is."""
        return self.changed(**changes).fit(images)

    def changed(self, chosen_density: str = "", **changes) -> "Detector":
        """Return a detector of the same networks with other settings, not yet fitted; this one stays as it is.

        chosen_density: that of a Config whose density is "auto"; default: as it is here."""
        config = Config.from_dict(self.config.to_dict() | changes)
        if not chosen_density and config.density == self.config.density:
            chosen_density = self.density
        if config.patches and config.patches.location != "auto":  # no other one has a say
            chosen_density = chosen_density.partition(" ")[0]
        networks = [member.network for member in self.members]
        other = Detector(config, networks, self.fill_index, self.white, chosen_density)
        other.metadata, other.rate_chosen = dict(self.metadata), self.rate_chosen
        if config.density != "auto":
            for name in ("density_chosen", "density_aurocs"):
                other.metadata.pop(name, None)
        return other

    def untrained(self) -> "Detector":
        """Return the untrained baseline: networks as training found them, the same kinds of density, not yet fitted."""
        networks = [initial_network(self.config, member=number) for number in range(len(self.members))]
        networks = [network.to(self.device) for network in networks]
        other = Detector(self.config, networks, self.fill_index, self.white, self.density)
        for new_member, member in zip(other.members, self.members):
            for new_level, level in zip(new_member.levels, member.levels):
                new_level.location = "shared" if level.shared else "each"
        return other

    def notes(self) -> Iterator[str]:
        """Yield what a person should know of how it was fitted."""
        if self.config.density == "auto":
            yield f"density {self.density} was chosen: {self.metadata.get('density_aurocs', 'see the log')}"
        if self.config.patches:
            levels = self.members[0].levels
            yield from (level.choice for level in levels if DENSITIES[level.kind].has_likelihood)
        if not self.guarantee.holds:
            needed = self.guarantee.needed if self.config.false_alarm_rate else "infinitely many"
            count, rate = len(self.calibration_scores), self.config.false_alarm_rate
            instead = f"the threshold is the largest of their scores, for a rate of {self.guarantee.rate:.2g}"
            yield f"a false-alarm rate of {rate:g} needs {needed} normal images, not {count}; {instead}"


class EnsembleMember(nn.Module):
    """One network with the densities of its stages: prepared images in, standardized scores and maps out.

    The way: stages of the network -> embeddings (B, L, D) of L windows, one of an image-level model -> densities, one
    for all windows or one for each -> distances (B, L) of each level -> standardized and added, if there are several
    levels -> the score: the distance itself, or the maximum of the map that distances are up-sampled to.

    Buffers: center, scale (), float64: the scores' mean and standard deviation on normal images that this member has
    not seen, 0 and 1 of a detector's only member. limit (), float64: of the sum of joined distances at a place, see
    localization.bounded. hidden (H, W) bool: where maps show nothing; may be empty.
    """

    def __init__(self, config: Config, network: CutPasteNet, hidden: Tensor, density: str) -> None:
        super().__init__()
        name, _, self.location = density.partition(" ")  # "nearest shared": the location has been chosen, too
        self.config, self.network, self.densities = config, network, DENSITY_SUMS.get(name, (name,))
        self.grids = [self._grid(level) for level in config.levels]
        numbers = range(len(self.grids))
        seen_together = [tuple(numbers)] if config.join else [(number,) for number in numbers]
        self.levels = nn.ModuleList(
            self._new_level(stages, density) for stages in seen_together for density in self.densities
        )
        self.register_buffer("center", torch.zeros((), dtype=torch.float64))
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))
        self.register_buffer("limit", torch.tensor(SUM_LIMIT, dtype=torch.float64))
        self.register_buffer("hidden", hidden)

    def _grid(self, level: int) -> Grid:
        """Return the windows of a stage."""
        config, patches = self.config, self.config.patches
        if patches is None:
            return Grid(*config.size)
        feature_stride = self.network.spec.strides[level - 1] if patches.dense else 1
        if config.join:
            return Grid(*config.size, patches.window, patches.stride, feature_stride, cells=True)
        window, stride = max(patches.window, feature_stride), max(patches.stride, feature_stride)
        return Grid(*config.size, window, stride, feature_stride)

    def _new_level(self, stages: tuple[int, ...], density: str) -> StageDensity:
        """Return a density, not yet fitted, of the stages of these numbers."""
        config, patches, grids = self.config, self.config.patches, [self.grids[stage] for stage in stages]
        if patches is None:
            return StageDensity(stages, grids, density, config.l2, "shared", None, config.join)
        width, location = self.width(stages), self.location or patches.location
        if config.join:
            dims = min(patches.dims or EACH_DIMS, width)
            by_place = len(self.densities) > 1 and DENSITIES[density].has_likelihood
            return StageDensity(stages, grids, density, config.l2, location, dims, True, by_place)
        dims = patches.max_dims if patches.max_dims < width else None
        return StageDensity(stages, grids, density, config.l2, location, dims)

    def width(self, stages: tuple[int, ...]) -> int:
        """Return how many features the stages of these numbers have."""
        return sum(self.network.spec.widths[self.config.levels[stage] - 1] for stage in stages)

    @property
    def unit(self) -> str:
        """Return what a score is before it is standardized, in words."""
        units = list(dict.fromkeys(level.density.unit for level in self.levels))
        if len(self.levels) == 1:
            return units[0]
        if len(units) == 1:
            return f"sum of {len(self.levels)} standardized {units[0]}s"
        return f"sum of standardized distances: {', '.join(units)}"

    def forward(self, prepared: Tensor, projected: list[Tensor] | None = None) -> tuple[Tensor, Tensor | None]:
        """Return standardized scores (B,) float64 and maps (B, H, W) float32 or None.

        prepared: as Detector.prepare gives them. projected: what ``project`` gives of them, if it is there already.
        """
        return self.standardized(*self.score_projected(projected or self.project(self.embed(prepared))))

    def score_projected(self, projected: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return scores (B,) and maps (B, H, W) or None, not standardized, of what ``project`` gives."""
        return self.aggregate([level.distances(x) for level, x in zip(self.levels, projected)])

    def features(self, prepared: Tensor, levels: Iterable[int]) -> dict[int, Tensor]:
        """Return the network's features (B, D, h, w) of whole images at these stages, by stage, in one pass."""
        levels = sorted({*levels})
        return dict(zip(levels, self.network.features(prepared, levels))) if levels else {}

    def embed(self, prepared: Tensor, features: dict[int, Tensor] | None = None) -> list[Tensor]:
        """Return the embeddings of all windows at each stage, (B, L, D) float32, as the network gives them."""
        config = self.config
        if features and config.dense:
            return [grid.pool(features[level]).float() for grid, level in zip(self.grids, config.levels)]
        return embed_windows(self.network, prepared, config.levels, self.grids, config.dense)

    @property
    def nearest_level(self) -> StageDensity | None:
        """Return the first of its densities that keeps normal embeddings, if there is one."""
        return next((level for level in self.levels if level.kind == "nearest"), None)

    def project(self, embeddings: Sequence[Tensor]) -> list[Tensor]:
        """Return the embeddings (B, L, D) of each stage as each level's density takes them, (B, L, d)."""
        projected: dict[tuple[int, ...], Tensor] = {}  # densities of the same stages take the same
        for level in self.levels:
            if level.stages not in projected:
                projected[level.stages] = level.project([embeddings[stage] for stage in level.stages])
        return [projected[level.stages] for level in self.levels]

    def aggregate(self, distances: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return scores (B,) and maps (B, H, W) or None of each level's distances (B, L)."""
        distances = [level.standardized(x) for level, x in zip(self.levels, distances)]
        if self.config.patches is None:
            return sum(distances)[:, 0].double(), None
        sigma = self.config.patches.sigma
        if self.config.join and len(distances) > 1:  # all at the same places
            distances = [bounded(sum(distances), self.limit)]
        maps = sum(upsample(x, level.grid, sigma) for level, x in zip(self.levels, distances))
        maps = self.lower_hidden(maps.float())
        return maps.amax((1, 2)).double(), maps

    def lower_hidden(self, maps: Tensor) -> Tensor:
        """Return maps (B, H, W) that are, where hidden, as low as anywhere."""
        return torch.where(self.hidden, maps.amin((1, 2), keepdim=True), maps) if self.hidden.numel() else maps

    def standardized(self, scores: Tensor, maps: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return both in deviations from what normal images have."""
        if maps is not None:
            maps = ((maps - self.center) / self.scale).to(maps.dtype)
        return (scores - self.center) / self.scale, maps

    def grad_cam(self, features: dict[int, Tensor]) -> Tensor:
        """Return Grad-CAM maps (B, H, W) of an image-level model from its features; of several stages the sum of their
        maps. Raises InputError with a density whose score has no gradient."""
        if not has_gradient(self.config.density):
            raise InputError(f"Grad-CAM needs the gradient of the score, which the density {self.config.density} lacks")
        embeddings = [grid.pool(features[level]).float() for grid, level in zip(self.grids, self.config.levels)]
        maps = []
        for stage, number in enumerate(self.config.levels):
            levels = [level for level in self.levels if stage in level.stages]

            def score(x: Tensor, stage: int = stage, levels: Sequence[StageDensity] = levels) -> Tensor:
                """Return the part of the score (B,) that this stage's features (B, C, h, w) have to do with."""
                seen = [*embeddings[:stage], self.grids[stage].pool(x).float(), *embeddings[stage + 1 :]]
                distances = (level.distances(level.project([seen[s] for s in level.stages])) for level in levels)
                return sum(level.standardized(x)[:, 0] for level, x in zip(levels, distances))

            maps.append(grad_cam(features[number], score, self.config.size)[1])
        return self.lower_hidden(sum(maps)) / self.scale.float()

    # Fitting ------------------------------------------------------------------------------------------------------

    def with_density(self, density: str) -> "EnsembleMember":
        """Return a member of the same network that has some of this one's fitted densities: those of ``density``. Of a
        density with a location of its own it has the axes alone."""
        other = EnsembleMember(self.config, self.network, self.hidden, density)
        fitted = {(level.stages, level.kind): level for level in self.levels}
        for new_level in other.levels:
            level = fitted[new_level.stages, new_level.kind]
            new_level.axes = level.axes
            if new_level.joined:
                new_level.origin = level.origin
            if other.location:
                continue
            new_level.density = level.density
            if len(other.levels) > 1:
                new_level.center, new_level.scale, other.limit = level.center, level.scale, self.limit
                if new_level.by_place:
                    new_level.limit = level.limit
        return other.to(next(self.network.parameters()).device)

    def choose_axes(self, embeddings: Iterable[list[Tensor]]) -> None:
        """Choose the directions that each level keeps, by batches of the stages' embeddings of normal images."""
        stages = [torch.cat(batches) for batches in zip(*embeddings)]
        for level in self.levels:
            if level.dims is not None:
                level.choose_axes([stages[stage] for stage in level.stages])

    def fit(self, embeddings: Iterable[list[Tensor]], count: int, held_out: bool, batch_size: int) -> Tensor | None:
        """Fit the densities to batches of each level's embeddings, of ``count`` normal images in all.

        held_out: return what new normal images would score (count,), by densities fitted to the other folds of these,
        ``batch_size`` of them at a time; the network has seen them all. Raises DensityError if none can be fitted.
        """
        return self.fit_projected(self.project_all(embeddings, count), held_out, batch_size)

    def fit_projected(self, projected: list[Tensor], held_out: bool, batch_size: int) -> Tensor | None:
        """Do what ``fit`` does with what ``project_all`` returns."""
        several = len(self.levels) > 1
        distances = [level.fit(x, held_out or several) for level, x in zip(self.levels, projected)]
        if several:
            for level, normal in zip(self.levels, distances):
                level.standardize(normal)
        if not held_out:
            return None
        batches = zip(*(x.split(batch_size) for x in distances))
        return torch.cat([self.aggregate(list(batch))[0] for batch in batches])

    @torch.inference_mode()
    def project_all(self, embeddings: Iterable[list[Tensor]], count: int) -> list[Tensor]:
        """Return the projected embeddings (count, L, d) of each level, each held once."""
        projected: dict[tuple[int, ...], Tensor] = {}
        done = 0
        for batch in embeddings:
            new = {level.stages: x for level, x in zip(self.levels, self.project(batch))}
            projected = projected or {stages: x.new_empty((count, *x.shape[1:])) for stages, x in new.items()}
            part = slice(done, done := done + len(batch[0]))
            for stages, x in new.items():
                projected[stages][part] = x
        return [projected[level.stages] for level in self.levels]


# Passes over images -----------------------------------------------------------------------------------------------


def evenly_spaced(count: int, limit: int | None) -> Tensor:
    """Return the numbers 0 ... count - 1, or ``limit`` of them, evenly spaced, if they are more."""
    return torch.arange(count) if limit is None or count <= limit else torch.arange(limit) * count // limit


def batches_of(
    detector: Detector, images: Tensor, limit: int | None = None, numbers: Tensor | None = None
) -> Iterator[Tensor]:
    """Yield the images (M, 3, H, W), batch by batch, brought to the detector's device.

    numbers: of the images that are taken, in this order; default: all. limit: of more images than that, as many, evenly
    spaced.
    """
    if tuple(images.shape[1:]) != (3, *detector.config.size):
        raise ValueError(f"images must be (M, 3, {', '.join(map(str, detector.config.size))}), got {(*images.shape,)}")
    numbers = torch.arange(len(images)) if numbers is None else numbers
    numbers = numbers[evenly_spaced(len(numbers), limit)]
    for part in numbers.split(detector.batch_size) if len(numbers) else ():
        block = images.index_select(0, part.to(images.device, non_blocking=True))
        yield block if block.device == detector.device else to_device(block, detector.device)


@torch.inference_mode()
def stream(
    detector: Detector,
    images: Tensor,
    function: Callable[[Tensor], object] | None = None,
    limit: int | None = None,
    numbers: Tensor | None = None,
) -> Iterator:
    """Yield what ``function`` (default: scores and maps, as of ``forward``) makes of prepared batches of images.

    images, limit, numbers: as ``batches_of`` takes them.
    """
    function, blocks = function or detector.score_prepared, batches_of(detector, images, limit, numbers)
    yield from issued_ahead((function(detector.prepare(block)) for block in blocks), detector.device)


# What a member sees --------------------------------------------------------------------------------------------------


def unseen_by(config: Config, count: int, number: int) -> Tensor:
    """Return the numbers of the normal images, of ``count``, that member ``number`` does not see: those of its fold
    (image i is in fold i modulo folds), or the evenly spaced ones that are held out."""
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
    """Raise SettingError if ``count`` images are too few for the folds (two in each, to have a deviation), for images
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
    """Return the network of a Config, its weights drawn from torch's global generator."""
    classes = VARIANTS[config.variant].num_classes
    network = CutPasteNet(config.backbone, config.head_layer, classes, config.normalize)
    return network.to(memory_format=torch.channels_last)


def initial_network(config: Config, pretrained: bool = True, member: int = 0) -> CutPasteNet:
    """Return the network as training starts from it: seeded by (seed, category, member), ImageNet weights in place if
    the Config and ``pretrained`` say so. Raises model.WeightsError if those cannot be had."""
    with torch.random.fork_rng(devices=[]):  # on the CPU, so that a seed means the same weights on every device
        torch.manual_seed(category_seed(config.seed, config.category, member))
        network = build_network(config)
    if config.pretrained and pretrained:
        load_backbone_weights(network, config.backbone, config.weights)
    return network


def category_seed(seed: int, category: str, member: int = 0) -> int:
    """Return a seed for one member of one category, so that its results do not depend on what was trained before it."""
    text = f"{seed}/{category}" + (f"/{member}" if member else "")
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:7], "big")


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
        "train_files": detector.train_files,
        "rate_chosen": detector.rate_chosen,
        "members": [
            {"network": member.network.state_dict(), "levels": member.levels.state_dict()}
            | {"center": member.center, "scale": member.scale, "limit": member.limit}
            for member in detector.members
        ],
        "threshold": detector.threshold,
        "normal_scores": detector.calibration_scores,
        "appearance": detector.appearance,
        "sources": detector.fill_index,
        "white": detector.white,
        "chosen_density": detector.density,
    }
    save_tensors(content, path)


def load_config(path: str | Path) -> Config:
    """Return the settings of a detector file; builds no network. Raises InputError as ``load`` does."""
    return _read(path)[0]


def made_from(path: str | Path) -> tuple[int | None, str]:
    """Return how many training images a detector file was made from, and dataset.files_digest of them; None and ""
    where the file does not tell. Raises InputError as ``load`` does."""
    content = _read(path)[1]
    return content["metadata"].get("train_images"), content["train_files"]


def set_since(path: str | Path) -> list[str]:
    """Return the names of the settings that a detector file was given after its training. Raises InputError as ``load``
    does."""
    content = _read(path)[1]
    rate = ["false_alarm_rate"] if content["rate_chosen"] else []
    with damage_named(path, *DAMAGED):
        return [*rate, *content["metadata"].get("refitted", "").split()]


def load(path: str | Path, device: torch.device | str = "cpu") -> Detector:
    """Read a detector file onto ``device``, wherever it was made. Raises InputError if it is missing, damaged, not a
    detector, of a newer format, or under a name that is not its category's."""
    config, content = _read(path)
    with damage_named(path, *DAMAGED):
        _check(config, content)
        networks = [load_network(config, part["network"], content["version"] >= 8) for part in content["members"]]
        detector = Detector(config, networks, content["sources"], content["white"], content["chosen_density"])
        for member, part in zip(detector.members, content["members"]):
            load_member(member, part)
        detector.threshold, detector.calibration_scores = content["threshold"], content["normal_scores"]
        detector.appearance, detector.rate_chosen = content["appearance"], content["rate_chosen"]
        detector.metadata, detector.train_files = dict(content["metadata"]), content["train_files"]
        return detector.to(device).eval()


def _check(config: Config, content: dict) -> None:
    """Raise ValueError for what does not fit the settings or cannot be; builds no network. Members are checked as they
    are loaded."""
    members, scores, metadata = content["members"], content["normal_scores"], content["metadata"]
    if len(members) != config.folds:
        raise ValueError(f"{len(members)} networks for {config.folds} folds")
    if config.folds > 1 and len({next(iter(part["network"].values())).data_ptr() for part in members}) < len(members):
        raise ValueError("several folds have one network")
    density = content["chosen_density"]
    if density not in (CANDIDATES if config.density == "auto" else (config.density,)):
        raise ValueError(f"density {density!r} for the setting {config.density}")
    sizes = dict(zip("HW", config.size))
    check_tensor("normal_scores", scores, TensorRule(("n",)), sizes)
    if 0 < len(scores) < 2 * config.folds * (config.folds > 1):
        raise ValueError(f"{len(scores)} scores of normal images for {config.folds} folds")
    if len(scores) or not torch.isnan(content["threshold"]):  # else it was never fitted
        check_tensor("threshold", content["threshold"], TensorRule(()), sizes)
    for name, rule in {
        "appearance": TensorRule(("looks", 3), (torch.float32,), least=0),
        "sources": TensorRule(("H", "W"), (torch.int32,), least=0, most=math.prod(config.size) - 1),
    }.items():
        if tuple(content[name].shape) != (0,):
            check_tensor(name, content[name], rule, sizes)
    sources = content["sources"].flatten().long()
    if (sources[sources] != sources).any():
        raise ValueError("sources: an ignored pixel is filled with another one that is ignored")
    if not isinstance(metadata, dict) or not all(isinstance(name, str) for name in metadata):
        raise ValueError("metadata are no values by name")
    for name in ("train_files", "rate_chosen"):
        if not isinstance(content[name], str):
            raise ValueError(f"{name} is no text")
    if not isinstance(metadata.get("refitted", ""), str):
        raise ValueError("metadata: refitted is no list of names")
    white = content["white"]
    if type(white) is not int or white not in WHITES:
        raise ValueError(f"white {white!r} is none of {', '.join(map(str, WHITES))}")


def load_network(config: Config, state: dict[str, Tensor], folded: bool) -> CutPasteNet:
    """Return the network of a file. folded: its BatchNorm layers are, as in all files since version 8. Raises
    ValueError, naming it, for what does not fit or cannot be."""
    with torch.random.fork_rng(devices=[]):
        network = build_network(config)
    network = network.folded() if folded else network
    rules = rules_of(network.state_dict())
    for name in [name for name in rules if name.endswith("num_batches_tracked") and name not in state]:
        del rules[name]  # which torch adds
    check_tensors(state, rules, {})
    network.load_state_dict(state)
    return network


def load_member(member: EnsembleMember, content: dict) -> None:
    """Set a member's densities to what a file holds of them. Raises ValueError, naming it, for what does not fit or
    cannot be."""
    alone = member.config.folds == 1
    for name, rule in (standardization(alone) | {"limit": TensorRule((), least=1)}).items():
        check_tensor(name, content[name], rule, {})
    buffers: dict[str, dict[str, object]] = {str(number): {} for number in range(len(member.levels))}
    for name, value in content["levels"].items():
        number, _, buffer = name.partition(".")
        if number not in buffers:
            raise ValueError(f"{name} is of a level that it has not")
        buffers[number][buffer] = value
    for number, level in enumerate(member.levels):
        level.check(buffers[str(number)], member.width(level.stages), alone=len(member.levels) == 1)
    for name, value in content["levels"].items():  # their shapes are the file's, not those of an empty density
        owner, _, buffer = name.rpartition(".")
        # What is kept in half precision is computed with in single precision
        setattr(member.levels.get_submodule(owner), buffer, value.float() if value.dtype == torch.float16 else value)
    member.center, member.scale, member.limit = content["center"], content["scale"], content["limit"]


def _read(path: str | Path) -> tuple[Config, dict]:
    """Return settings and content of a detector file, brought to this version."""
    content = load_tensors(path, "detector")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path}: not a detector file of this project; make one with run_training.py")
    version = content.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise InputError(f"{path}: detector format {version}, this program reads up to {VERSION}; update the program")
    with damage_named(path, *DAMAGED):
        content = from_version_2(content) if version < 3 else content
        content = from_version_3(content) if version < 4 else content
        content = from_version_6(content) if version < 7 else content
        content = from_version_8(content) if version < 9 else content
        try:
            config = Config.from_dict(content["config"])
        except UnknownSettingError as error:
            raise InputError(f"{path}: made by a newer program ({error}); update this one") from error
    if config.category != Path(path).stem:
        state = f"the detector of category {config.category!r} under another name"
        raise InputError(f"{path}: {state}; rename it back, a detector is only right for its own category")
    return config, content


def from_version_2(content: dict) -> dict:
    """Bring a file to version 3. Version 2 had one level, the inverse covariance of a whole image's Gaussian, "made"
    for metadata, all dimensions of a shared Gaussian that "auto" had chosen, and a quantile between two scores as its
    threshold."""
    density, config = dict(content["density"]), dict(content["config"])
    if config.get("location") == "auto" and density["projection"].shape[1] > EACH_DIMS:
        config["dims"] = density["projection"].shape[1]
    level = {"axes": density.pop("projection", torch.empty(0))}
    level |= {"center": torch.zeros((), dtype=torch.float64), "scale": torch.ones((), dtype=torch.float64)}
    if "precision" in density:  # P = V diag(l) V', so that |diag(l)^1/2 V' x|^2 = x'P x
        rules = {"mean": TensorRule(("D",), FLOATS), "precision": TensorRule(("D", "D"), FLOATS)}
        check_tensors({name: density[name] for name in rules}, rules, {})
        values, vectors = torch.linalg.eigh(density["precision"])
        factor = values.clamp(min=0).sqrt()[:, None] * vectors.T
        density = {"mean": density["mean"][None], "factor": factor[None]}
    level |= {f"density.{name}": value for name, value in density.items()}
    levels = {f"0.{name}": value for name, value in level.items()}
    threshold, _ = conformal_threshold(content["normal_scores"], config["false_alarm_rate"])
    return content | {"config": config, "metadata": content["made"], "levels": levels, "threshold": threshold}


def from_version_3(content: dict) -> dict:
    """Bring a file to version 4. Version 3 had one network, and four stages of MobileNetV2, the last one with its head
    convolution."""
    config = dict(content["config"])
    if config.get("backbone") == "mobilenet_v2" and config.get("level"):
        config["level"] = str(config["level"]).replace("4", "5")
    scale = {"center": torch.zeros((), dtype=torch.float64), "scale": torch.ones((), dtype=torch.float64)}
    return content | {"config": config, "members": [{name: content[name] for name in ("network", "levels")} | scale]}


def from_version_6(content: dict) -> dict:
    """Bring a file to version 7. Version 6 padded EfficientNet-Lite0 at both ends, and set no limit to what is
    standardized by place."""
    config, members = dict(content["config"]), []
    if config.get("backbone") == "efficientnet_lite0":
        config["backbone"] = "efficientnet_lite0_centered"
    for member in content["members"]:
        by_place = [name for name, value in member["levels"].items() if name.endswith(".center") and value.ndim]
        limits = {name.replace("center", "limit"): torch.tensor(1e9, dtype=torch.float64) for name in by_place}
        members.append(member | {"levels": member["levels"] | limits})
    return content | {"config": config, "members": members}


def from_version_8(content: dict) -> dict:
    """Bring a file to version 9. Version 8 set no limit to the sum of joined distances at a place; earlier files lack
    some values."""
    limit = {"limit": torch.tensor(1e9, dtype=torch.float64)}
    density = content["config"].get("density", Config.density)
    had_none = {"appearance": torch.empty(0, 3), "sources": NOTHING_IGNORED, "white": FULL_RANGE}
    had_none |= {"chosen_density": density, "train_files": "", "rate_chosen": ""}
    return had_none | content | {"members": [member | limit for member in content["members"]]}


def find_work(model_dir: str, data_dir: str, names: list[str], tell: bool = True) -> list[Path]:
    """Return the detector files to evaluate: of the categories asked for, or of each with both a detector and images;
    others are told. Where the folder holds folders of several seeds, those in them, by category and seed."""
    folder = Path(model_dir)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; train first, or name the folder of detectors with --model_dir")
    seeds = [path for path in folder.glob("seed*") if path.is_dir() and path.name.removeprefix("seed").isdecimal()]
    seeds.sort(key=lambda path: int(path.name.removeprefix("seed")))
    if seeds and detectors_in(folder):
        raise InputError(f"{folder}: holds detectors of its own and of several seeds; name one, such as {seeds[0]}")
    if not seeds:
        return [detector_path(folder, category) for category in find_categories(folder, data_dir, names, tell)]
    paths = [
        detector_path(seed, category) for seed in seeds for category in find_categories(seed, data_dir, names, tell)
    ]
    return sorted(paths, key=lambda path: path.stem)  # which keeps the order of seeds


def detectors_in(folder: Path) -> list[str]:
    """Return the categories of the detector files in a folder, sorted."""
    return sorted(p.stem for p in folder.glob("*" + SUFFIX) if not p.name.startswith("."))


def find_categories(folder: Path, data_dir: str, names: list[str], tell: bool) -> list[str]:
    """Return the categories with both a detector in ``folder`` and images, of those asked for; see ``find_work``."""
    trained, pictured = detectors_in(folder), choose_categories(data_dir, names)
    if names != ["all"]:
        missing = [name for name in pictured if name not in trained]
        if missing:
            raise InputError(f"{folder}: no detector for {', '.join(missing)}; train it with run_training.py --type")
        return pictured
    for name in sorted({*trained} ^ {*pictured}) if tell else ():
        has = f"a detector in {folder} but no images in {data_dir}"
        lacks = f"images in {data_dir} but no detector in {folder}"
        say(f"{name}: has {has if name in trained else lacks}; left out")
    both = [name for name in pictured if name in trained]
    if not both:
        raise InputError(f"{folder}: no detector for any category of {data_dir}; train one with run_training.py")
    return both


def scored_images(detector: Detector, count: int) -> Tensor:
    """Return the numbers (n,) of the normal images, of ``count``, that a detector's calibration scores are of, in their
    order: all, those that are held out, or the even sample that its only member's densities were fitted to."""
    config = detector.config
    if config.holdout:
        return unseen_by(config, count, 0)
    limit = DENSITY_IMAGES if config.patches is None else PATCH_DENSITY_IMAGES
    return evenly_spaced(count, limit if config.folds == 1 else None)


def scored_paths(paths: Sequence[Path], detector: Detector) -> list[Path] | None:
    """Return those of a category's training images that the calibration scores are of; None if their number says that
    the detector was made from others."""
    scored = [paths[number] for number in scored_images(detector, len(paths)).tolist()]
    return scored if len(scored) == len(detector.calibration_scores) else None
