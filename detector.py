"""A finished detector: network, density and threshold as one module, and the file that holds it.

Owns the file format, saving, loading, and how a network begins from its configuration. Knows nothing of folders of
images or of training.
"""

import hashlib
import io
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from cache import blocks, release
from cutpaste import VARIANTS
from dataset import InputError
from density import DENSITIES, held_out_scores
from gradcam import GradCAM
from localization import (
    EACH_LEAST,
    GRID_KEYS,
    IMAGES_AT_ONCE,
    LOCATIONS,
    Grid,
    PatchGaussian,
    embedding_blocks,
    upsample,
)
from model import BACKBONES, LEVELS, NORMALIZATIONS, CutPasteNet, embed, load_backbone_weights

FORMAT = "cutpaste-detector"
VERSION = 2  # raise it when an older program could no longer read the file rightly
SUFFIX = ".pt"

# The density is fitted to no more images than that: 20 for each of 512 dimensions estimate a Gaussian well, and neither
# time nor memory grows with the folder.
DENSITY_IMAGES = 10_000

# What the configuration must hold for a network to be built and an image to be scored; training adds its own.
CONFIG_KEYS = {
    "category": str,
    "backbone": tuple(BACKBONES),
    "variant": tuple(VARIANTS),
    "head_layer": int,
    "normalize": NORMALIZATIONS,
    "height": int,
    "width": int,
    "density": tuple(DENSITIES),
    "l2": bool,
    "false_alarm_rate": float,
    "seed": int,
    "pretrained": bool,
}
PATCH_KEYS = {
    "window": int,
    "stride": int,
    "level": LEVELS,
    "dense": bool,
    "location": LOCATIONS,
    "sigma": float,
}  # with a patch_size
CAM_AT_ONCE = 32


class Detector(nn.Module):
    """Images in, anomaly scores out, and anomaly maps. With a ``patch_size`` in its configuration it is a patch model:
    its density is one of patches, and its score the maximum of its map.

    config: plain values, CONFIG_KEYS at least. made: plain values that say how it was made (command, versions, ...).
    threshold: score above which an image is called anomalous, the (1 - false_alarm_rate) quantile of the scores that
    normal images get from densities fitted on the other ones; NaN before ``fit``. normal_scores: those scores (N,).
    """

    def __init__(self, config: dict, network: CutPasteNet | None = None) -> None:
        super().__init__()
        self.config = dict(config)
        self.made: dict = {}
        self.network = network if network is not None else build_network(config)
        self.density = PatchGaussian() if self.grid else DENSITIES[config["density"]]()
        self.register_buffer("threshold", torch.tensor(torch.nan, dtype=torch.float64))
        self.register_buffer("normal_scores", torch.empty(0, dtype=torch.float64))

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the images it takes."""
        return self.config["height"], self.config["width"]

    @property
    def grid(self) -> Grid | None:
        """The windows of a patch model; None of an image-level model."""
        if self.config.get("patch_size") is None:
            return None
        return Grid(*self.size, *(self.config[name] for name in GRID_KEYS))

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def forward(self, images: Tensor) -> Tensor:
        """Anomaly scores (M,) float64 of images (M, 3, H, W), uint8 or float in [0, 1], on any device.

        Higher is more anomalous: the Mahalanobis distance (not squared, dimensionless), or with the density "kde" the
        negative log density; of a patch model the maximum of the map. An image's score does not depend on the others.
        """
        if self.grid:
            return torch.cat([scores for scores, _ in self.maps(images)])
        return self.density.score(self.embed(images))

    def maps(self, images: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Scores (m,) float64 and anomaly maps (m, H, W) float32 of images (M, 3, H, W), some at a time.

        Of a patch model Mahalanobis distances around each pixel, whose maximum is the score; of an image-level model
        Grad-CAM of the score (see gradcam.py). Higher is more anomalous. Raises InputError with the density "kde",
        which has no gradient.
        """
        self.check(images)
        if self.grid:
            for embeddings in embedding_blocks(self.network, images, self.grid, self.config["l2"], self.device):
                maps = self.map_of(self.density.score(embeddings))
                yield maps.amax((1, 2)).double(), maps
            return
        if self.config["density"] == "kde":
            raise InputError("Grad-CAM needs the gradient of the score, which the density kde has not; use torch")
        with GradCAM(self.network) as cam:
            for block in blocks(images, CAM_AT_ONCE):
                yield cam(block.to(self.device), lambda embeddings: self.density.score(self.scaled(embeddings)))

    def map_of(self, scores: Tensor) -> Tensor:
        """Maps (m, H, W) float32 of a patch model's scores (m, L)."""
        return upsample(scores.view(-1, *self.grid.shape), self.grid, self.config["sigma"]).float()

    def check(self, images: Tensor) -> None:
        if tuple(images.shape[1:]) != (3, *self.size):
            raise ValueError(f"images must be (M, 3, {self.size[0]}, {self.size[1]}), got {tuple(images.shape)}")

    def embed(self, images: Tensor) -> Tensor:
        """Embeddings (M, D) of whole images, as the density of an image-level model takes them: pooled features,
        brought to length 1 where config says l2."""
        self.check(images)
        return self.scaled(embed(self.network, images, self.device))

    def scaled(self, embeddings: Tensor) -> Tensor:
        return functional.normalize(embeddings.double(), dim=1) if self.config["l2"] else embeddings.double()

    def embed_sample(self, images: Tensor, most: int) -> Tensor:
        """Embeddings of all images (N, 3, H, W), or of ``most`` evenly spaced ones: (min(N, most), D)."""
        if len(images) <= most:
            return self.embed(images)
        parts = []
        for chosen in (torch.arange(most) * len(images) // most).split(64):  # a copy of so many at a time
            parts.append(self.embed(images[chosen.to(images.device)]))
            release(images)
        return torch.cat(parts)

    def fit(self, images: Tensor, threshold: bool = True) -> "Detector":
        """Fit the density to normal images (N, 3, H, W); with ``threshold``, choose that too, from them alone.

        Of more than DENSITY_IMAGES, that many are taken, evenly spaced; of a patch model localization's
        PATCH_DENSITY_IMAGES.
        Raises InputError if no density fits, for embeddings that are not finite or all equal, or too few images.
        """
        self.check(images)
        check_enough(self.config, len(images))
        try:
            scores = (self._fit_patches if self.grid else self._fit_images)(images, threshold)
        except ValueError as error:
            category = self.config["category"]
            raise InputError(f"{category}: {error}; no density can be fitted, train anew with a lower --lr") from error
        if threshold:
            self.normal_scores = scores
            self.threshold = scores.quantile(1 - self.config["false_alarm_rate"])
        return self

    def _fit_images(self, images: Tensor, held_out: bool) -> Tensor | None:
        """Fit the density of whole images. Returns their held-out scores (n,) float64, if asked for."""
        embeddings = self.embed_sample(images, DENSITY_IMAGES)
        self.density = DENSITIES[self.config["density"]]().fit(embeddings)
        return held_out_scores(self.config["density"], embeddings) if held_out else None

    def _fit_patches(self, images: Tensor, held_out: bool) -> Tensor | None:
        """The same of a patch model: its images are read several times instead of their embeddings being held."""

        def passes(most: int) -> Iterator[Tensor]:
            arguments = self.grid, self.config["l2"], self.device
            if len(images) <= most:
                yield from embedding_blocks(self.network, images, *arguments)
                return
            for chosen in (torch.arange(most) * len(images) // most).split(64):
                yield from embedding_blocks(self.network, images[chosen.to(images.device)], *arguments)
                release(images)

        self.density = PatchGaussian()
        scores = self.density.fit(passes, self.config["location"], held_out)
        if not held_out:
            return None
        return torch.cat([self.map_of(some).amax((1, 2)) for some in scores.split(IMAGES_AT_ONCE)]).double()

    def refit(self, images: Tensor, **changes) -> "Detector":
        """The same network with another density, fitted to ``images``, where ``changes`` says how its configuration
        differs; this detector stays as it is."""
        other = Detector(self.config | changes, self.network)
        other.made = dict(self.made)
        return other.fit(images)

    def untrained(self) -> "Detector":
        """The control: the network as training found it, to be fitted (it is not yet) with the same kind of density."""
        chosen = {"location": self.density.location} if self.grid else {}
        return Detector(self.config | chosen, initial_network(self.config).to(self.device))


def check_enough(config: dict, count: int) -> None:
    """Raises InputError if one Gaussian for each location was asked for and the ``count`` images are too few for it."""
    if config.get("location") == "each" and count < EACH_LEAST:
        raise InputError(
            f"{config['category']}: {count} training images, one Gaussian for each location needs {EACH_LEAST}; "
            "use --location shared or auto"
        )


def build_network(config: dict) -> CutPasteNet:
    """The network of a configuration, its weights drawn from torch's global generator."""
    num_classes = VARIANTS[config["variant"]].num_classes
    network = CutPasteNet(config["backbone"], config["head_layer"], num_classes, config["normalize"])
    return network.to(memory_format=torch.channels_last)


def initial_network(config: dict) -> CutPasteNet:
    """The network as training starts from it: seeded by (seed, category), ImageNet weights in place if pretrained.

    Raises model.WeightsError if those cannot be had.
    """
    with torch.random.fork_rng(devices=[]):  # on the CPU, so that a seed means the same weights on every device
        torch.manual_seed(category_seed(config["seed"], config["category"]))
        network = build_network(config)
    if config["pretrained"]:
        load_backbone_weights(network, config["backbone"], config.get("weights"))
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
        "config": detector.config,
        "made": detector.made,
        "network": detector.network.state_dict(),
        "density": detector.density.state_dict(),
        "threshold": detector.threshold,
        "normal_scores": detector.normal_scores,
    }
    save_file(content, path)


def load(path: str | Path, device: torch.device | str = "cpu") -> Detector:
    """Read a detector file onto ``device``, wherever it was made.

    Raises InputError if the file is missing, damaged, not a detector, of a newer format, or under a name that is not
    its category's.
    """
    content = load_file(path, "detector")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path}: not a detector file of this project; make one with run_training.py")
    if not isinstance(content.get("version"), int) or content["version"] > VERSION:
        raise InputError(
            f"{path}: detector format {content.get('version')}, this program reads up to {VERSION}; update the program"
        )
    config = content.get("config")
    patches = isinstance(config, dict) and config.get("patch_size") is not None
    for key, allowed in (CONFIG_KEYS | PATCH_KEYS if patches else CONFIG_KEYS).items():
        value = config.get(key) if isinstance(config, dict) else None
        if not (value in allowed if isinstance(allowed, tuple) else isinstance(value, allowed)):
            raise InputError(f"{path}: damaged detector file ({key} is {value!r}); train it again")
    if config["category"] != Path(path).stem:
        raise InputError(
            f"{path}: the detector of category {config['category']!r} under another name; rename it back, "
            "a detector is only right for its own category"
        )
    try:
        with torch.random.fork_rng(devices=[]):
            detector = Detector(config)
        detector.network.load_state_dict(content["network"])
        for name, value in content["density"].items():
            detector.density.get_buffer(name)  # AttributeError for a name that the density does not have
            setattr(detector.density, name, value)
        if detector.grid and len(detector.density.mean) not in (1, math.prod(detector.grid.shape)):
            raise ValueError(f"{len(detector.density.mean)} Gaussians for {detector.grid.shape} windows")
        detector.threshold, detector.normal_scores = content["threshold"], content["normal_scores"]
        detector.made = dict(content["made"])
        return detector.to(device).eval()
    except (KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: damaged detector file ({reason}); train it again") from error


def save_file(content: dict, path: str | Path) -> None:
    """Write tensors and plain values to ``path``: to a temporary name first, flushed, then put in place."""
    buffer = io.BytesIO()
    torch.save(content, buffer)  # to memory: torch's own writer hides a full disk behind a RuntimeError
    with buffer.getbuffer() as view:  # released here: Python 3.13 complains of a buffer that goes before its view
        write_file(view, path)


def write_file(content: bytes | memoryview, path: str | Path) -> None:
    """Put a file in place, whole or not at all. Raises OSError, naming it, if it cannot be written."""
    write_files({Path(path): content})


def write_files(contents: dict[Path, bytes | memoryview]) -> None:
    """Put files in place together: none is replaced before all are written. Raises OSError, naming the bad one."""
    for path, content in contents.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(part_path(path), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            for other in contents:
                part_path(other).unlink(missing_ok=True)
            reason = f"cannot be written ({error.strerror}); nothing was replaced"
            raise OSError(error.errno, reason, str(path)) from error
    for path in contents:
        os.replace(part_path(path), path)


def part_path(path: Path) -> Path:
    """The temporary name that a file is written under."""
    return path.with_name(f".{path.name}.part")


def remove_file(path: Path) -> None:
    """Remove a file, if it is there, and what a killed process left of it."""
    path.unlink(missing_ok=True)
    part_path(path).unlink(missing_ok=True)


def load_file(path: str | Path, what: str) -> object:
    """Read what ``save_file`` wrote, onto the CPU. Raises InputError, naming the file, if that is not possible."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch.load has no error of its own: a text file may end in an IndexError
        raise InputError(f"{path}: truncated, damaged or not a {what} file; restore it or train again") from error
