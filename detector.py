"""A finished detector: network, densities and threshold as one module, and the file that holds it.

Owns the file format, saving, loading, how a network begins from its Config, and how images are streamed through a
detector. Knows nothing of folders of images, of flags or of training.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from config import EACH_DIMS, Config, SettingError, UnknownSettingError
from cutpaste import VARIANTS, to_float
from density import DensityError, conformal_threshold
from gradcam import grad_cam
from localization import AXES_IMAGES, EACH_LEAST, Grid, Level, embed_windows, upsample
from model import CutPasteNet, load_backbone_weights
from runtime.cache import ImageArray, iterate
from runtime.files import InputError, load_tensors, save_tensors

FORMAT = "cutpaste-detector"
VERSION = 3  # raise it when an older program could no longer read the file rightly
SUFFIX = ".pt"

# A density is fitted to no more images than that: 20 for each of 512 dimensions estimate a Gaussian well
DENSITY_IMAGES = 10_000
PATCH_DENSITY_IMAGES = 1000  # of which all windows are held
IMAGES_AT_ONCE = 64  # that go through the network together
PATCH_IMAGES_AT_ONCE, PATCHES_AT_ONCE = 4, 4096  # of a patch model, and their windows, whichever is less


class Detector(nn.Module):
    """Images in, anomaly scores and maps out.

    The way: stages of the network -> embeddings (B, L, D) of L windows, one of an image-level model -> densities, one
    for all windows or one for each -> distances (B, L) of each level -> standardized and added, if there are several
    levels -> the score: the distance itself, or the maximum of the map that distances are up-sampled to.

    metadata: plain values that say how it was made. threshold: score above which an image is called anomalous, NaN
    before ``fit``. normal_scores: the held-out scores (N,) of normal images that it follows from.
    """

    def __init__(self, config: Config, network: CutPasteNet | None = None) -> None:
        super().__init__()
        self.config = config
        self.metadata: dict = {}
        self.network = build_network(config) if network is None else network
        self.levels = nn.ModuleList(self._new_level(level) for level in config.levels)
        self.register_buffer("threshold", torch.tensor(torch.nan, dtype=torch.float64))
        self.register_buffer("normal_scores", torch.empty(0, dtype=torch.float64))

    def _new_level(self, level: int) -> Level:
        config, patches = self.config, self.config.patches
        if patches is None:
            return Level(Grid(*self.size), config.density, config.l2, "shared", None)
        stride, width = (table[level - 1] for table in (self.network.spec.strides, self.network.spec.widths))
        grid = Grid(*self.size, patches.window, patches.stride, stride if patches.dense else 1)
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
        """What a score is."""
        unit = self.levels[0].density.unit
        return unit if len(self.levels) == 1 else f"sum of {len(self.levels)} standardized {unit}s"

    # Scoring ------------------------------------------------------------------------------------------------------

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Anomaly scores (B,) float64 and anomaly maps (B, H, W) float32 of images (B, 3, H, W), uint8 or float in
        [0, 1], on the detector's device; None for the maps of an image-level model.

        Higher is more anomalous; the unit is that of the density, of several levels a sum of standardized ones. An
        image's score does not depend on the others of its batch. The detector must be in evaluation mode, as ``fit``
        and ``load`` leave it.
        """
        embeddings = self.embed(images)
        return self.aggregate([level.distances(level.project(x)) for level, x in zip(self.levels, embeddings)])

    def embed(self, images: Tensor) -> list[Tensor]:
        """Embeddings of all windows at each level, (B, L, D) float32 each, as the network gives them."""
        images = to_float(images).contiguous(memory_format=torch.channels_last)
        dense = self.config.patches is None or self.config.patches.dense
        return embed_windows(self.network, images, self.config.levels, [level.grid for level in self.levels], dense)

    def aggregate(self, distances: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Scores (B,) and maps (B, H, W) or None, as ``forward`` gives them, of each level's distances (B, L)."""
        distances = [level.standardized(each) for level, each in zip(self.levels, distances)]
        if self.config.patches is None:
            return sum(distances)[:, 0].double(), None
        sigma = self.config.patches.sigma
        maps = sum(upsample(each, level.grid, sigma) for level, each in zip(self.levels, distances)).float()
        return maps.amax((1, 2)).double(), maps

    def grad_cam(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (B,) and Grad-CAM maps (B, H, W) of an image-level model, see gradcam.py. Raises InputError with a
        density whose score has no gradient."""
        (level,) = self.levels
        if not level.density.has_gradient:
            raise InputError(f"Grad-CAM needs the gradient of the score, which the density {level.kind} has not")
        images = to_float(images).contiguous(memory_format=torch.channels_last)
        (features,) = self.network.features(self.network.normalized(images), self.config.levels)
        score = lambda x: level.distances(level.project(level.grid.pool(x).float()))[:, 0]  # noqa: E731
        return grad_cam(features, score, self.size)

    # Fitting ------------------------------------------------------------------------------------------------------

    def fit(self, images: ImageArray, threshold: bool = True) -> "Detector":
        """Fit the densities to normal images (N, 3, H, W) uint8; with ``threshold``, choose that too, from them alone.
        The network runs once over them, in evaluation mode, which it is left in.

        Of more than DENSITY_IMAGES, that many are taken, evenly spaced; of a patch model PATCH_DENSITY_IMAGES.
        Raises InputError if no density can be fitted, SettingError for too few images.
        """
        check_enough(self.config, len(images))
        several = len(self.levels) > 1
        try:
            projected = self.eval().embed_normal(images)
            held_out = [level.fit(x, threshold or several) for level, x in zip(self.levels, projected)]
        except DensityError as error:
            raise InputError(f"{self.config.category}: no density can be fitted: {error}") from error
        if several:
            for level, distances in zip(self.levels, held_out):
                level.scale, level.center = torch.std_mean(distances)
        if threshold:
            blocks = zip(*(distances.split(self.at_once) for distances in held_out))
            self.normal_scores = torch.cat([self.aggregate(list(block))[0] for block in blocks])
            self.threshold, _ = conformal_threshold(self.normal_scores, self.config.false_alarm_rate)
        return self

    @torch.inference_mode()
    def embed_normal(self, images: ImageArray) -> list[Tensor]:
        """Projected embeddings (n, L, d) of an even sample of images at each level, whose axes it chooses."""
        most = DENSITY_IMAGES if self.config.patches is None else PATCH_DENSITY_IMAGES
        if any(level.dims is not None for level in self.levels):
            first = list(stream(self, images, self.embed, AXES_IMAGES))
            for level, blocks in zip(self.levels, zip(*first)):
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

    def refit(self, images: ImageArray, **changes) -> "Detector":
        """The same network with other densities, fitted to ``images``, where ``changes`` are other settings; this
        detector stays as it is."""
        other = Detector(Config.from_dict(self.config.to_dict() | changes), self.network)
        other.metadata = dict(self.metadata)
        return other.fit(images)

    def untrained(self) -> "Detector":
        """The untrained baseline: the network as training found it, with the same kinds of density, not yet fitted."""
        other = Detector(self.config, initial_network(self.config).to(self.device))
        for own, level in zip(other.levels, self.levels):
            own.location = "shared" if level.shared else "each"
        return other

    def notes(self) -> Iterator[str]:
        """What a person should know of how it was fitted."""
        if self.config.patches:
            yield from (level.choice for level in self.levels)
        count, rate = len(self.normal_scores), self.config.false_alarm_rate
        if not conformal_threshold(self.normal_scores, rate)[1]:
            needed = math.ceil(1 / rate - 1 - 1e-9) if rate else "infinitely many"
            found = f"the threshold is the largest of their scores, for a rate of {1 / (count + 1):.2g}"
            yield f"a false-alarm rate of {rate:g} needs {needed} normal images, not {count}; {found}"


def check_enough(config: Config, count: int) -> None:
    """Raises SettingError if ``count`` images are too few for one Gaussian for each location, if it was asked for."""
    if config.patches and config.patches.location == "each" and count < EACH_LEAST:
        reason = f"{count} training images, one Gaussian for each location needs {EACH_LEAST}"
        raise SettingError("location", f"{config.category}: {reason}; take shared or auto")


@torch.inference_mode()
def stream(
    detector: Detector, images: ImageArray, function: Callable[[Tensor], object] | None = None, most: int | None = None
) -> Iterator:
    """What ``function`` (default: the detector, so scores and maps) gives for images (M, 3, H, W), block by block, each
    brought to the detector's device. most: of more images than that, as many, evenly spaced."""
    if tuple(images.shape[1:]) != (3, *detector.size):
        raise ValueError(f"images must be (M, 3, {detector.size[0]}, {detector.size[1]}), got {tuple(images.shape)}")
    if most is None or len(images) <= most:
        blocks = iterate(images, detector.at_once)
    else:
        blocks = (images[part] for part in (torch.arange(most) * len(images) // most).split(detector.at_once))
    for block in blocks:
        yield (function or detector)(block.to(detector.device))


# How a network begins ---------------------------------------------------------------------------------------------


def build_network(config: Config) -> CutPasteNet:
    """The network of a Config, its weights drawn from torch's global generator."""
    classes = VARIANTS[config.variant].num_classes
    network = CutPasteNet(config.backbone, config.head_layer, classes, config.normalize)
    return network.to(memory_format=torch.channels_last)


def initial_network(config: Config, pretrained: bool = True) -> CutPasteNet:
    """The network as training starts from it: seeded by (seed, category), ImageNet weights in place if the Config and
    ``pretrained`` say so. Raises model.WeightsError if those cannot be had."""
    with torch.random.fork_rng(devices=[]):  # on the CPU, so that a seed means the same weights on every device
        torch.manual_seed(category_seed(config.seed, config.category))
        network = build_network(config)
    if config.pretrained and pretrained:
        load_backbone_weights(network, config.backbone, config.weights)
    return network


def category_seed(seed: int, category: str) -> int:
    """A seed for one category, so that its results do not depend on the categories trained before it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{category}".encode()).digest()[:7], "big")


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
        "network": detector.network.state_dict(),
        "levels": detector.levels.state_dict(),
        "threshold": detector.threshold,
        "normal_scores": detector.normal_scores,
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
            detector = Detector(config)
        detector.network.load_state_dict(content["network"])
        if content["levels"].keys() != detector.levels.state_dict().keys():
            raise ValueError("its densities are of another kind")
        for name, value in content["levels"].items():  # their shapes are the file's, not those of an empty density
            owner, _, buffer = name.rpartition(".")
            setattr(detector.levels.get_submodule(owner), buffer, value)
        for level in detector.levels:
            if level.density.count not in (1, math.prod(level.grid.shape)):
                raise ValueError(f"{level.density.count} densities for {math.prod(level.grid.shape)} windows")
        detector.threshold, detector.normal_scores = content["threshold"], content["normal_scores"]
        detector.metadata = dict(content["metadata"])
        return detector.to(device).eval()
    except (KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: damaged detector file ({reason}); train it again") from error


def _read(path: str | Path) -> tuple[Config, dict]:
    """Settings and content of a detector file, brought to this version."""
    content = load_tensors(path, "detector", lambda content: content.get("version", 0) > 2)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path}: not a detector file of this project; make one with run_training.py")
    version = content.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise InputError(f"{path}: detector format {version}, this program reads up to {VERSION}; update the program")
    try:
        content = content if version == VERSION else _from_version_2(content)
        config = Config.from_dict(content["config"])
    except UnknownSettingError as error:
        raise InputError(f"{path}: made by a newer program ({error}); update this one") from error
    except (InputError, KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: damaged detector file ({error}); train it again") from error
    if config.category != Path(path).stem:
        found = f"the detector of category {config.category!r} under another name"
        raise InputError(f"{path}: {found}; rename it back, a detector is only right for its own category")
    return config, content


def _from_version_2(content: dict) -> dict:
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
