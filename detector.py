"""A finished detector: one or several members, their average and the threshold as one module, and the file of it.

Owns the file format, saving and loading. Knows nothing of folders of images, of flags or of training.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import earlier
from config import Config, UnknownSettingError
from conformal import Promise, conformal_threshold, p_values
from dataset import decode, resized
from drift import MOST, measure
from ignore import ALL_COUNT, filled
from localization import Level
from member import Member, build_network, check_enough, initial_network, member_images, stream, unseen_by
from model import CutPasteNet
from runtime.cache import ImageArray, subset
from runtime.files import InputError, load_tensors, save_tensors

FORMAT = "cutpaste-detector"
VERSION = 4  # raise it when an older program could no longer read the file rightly
SUFFIX = ".pt"


class Judged(NamedTuple):
    """What a detector says of images: scores (B,) float64, higher is more anomalous; p-values (B,), see
    conformal.p_values; anomaly maps (B, H, W) float32, or None."""

    scores: Tensor
    p_values: Tensor
    maps: Tensor | None


@dataclass(frozen=True)
class Prediction:
    """``Judged`` of images as arrays, and the decision: anomalous (N,) bool, where p <= the detector's
    ``promise.rate``."""

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

    def __init__(self, config: Config, networks: Sequence[CutPasteNet] = (), sources: Tensor = ALL_COUNT) -> None:
        super().__init__()
        self.config = config
        self.metadata: dict = {}
        networks = networks or [build_network(config) for _ in range(config.folds)]
        self.members = nn.ModuleList(Member(config, network, sources) for network in networks)
        self.register_buffer("threshold", torch.tensor(torch.nan, dtype=torch.float64))
        self.register_buffer("normal_scores", torch.empty(0, dtype=torch.float64))
        self.register_buffer("appearance", torch.empty(0, 3))

    @property
    def network(self) -> CutPasteNet:
        """The first member's network."""
        return self.members[0].network

    @property
    def levels(self) -> Sequence[Level]:
        """The first member's levels."""
        return self.members[0].levels

    @property
    def sources(self) -> Tensor:
        """What takes the place of pixels that do not count, (H, W); empty if all do."""
        return self.members[0].sources

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the images it takes."""
        return self.members[0].size

    @property
    def device(self) -> torch.device:
        return self.members[0].device

    @property
    def at_once(self) -> int:
        """Images that go through it together."""
        return self.members[0].at_once

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

    def judge(self, images: Tensor, grad_cam: bool = False) -> Judged:
        """The same with p-values. grad_cam: maps of an image-level model too, see Member.grad_cam."""
        found = [member.grad_cam(images) if grad_cam else member(images) for member in self.members]
        folds = len(self.members)
        p = p_values(torch.stack([scores for scores, _ in found]), [self.normal_scores[k::folds] for k in range(folds)])
        scores, maps = self.average(found)
        return Judged(scores, p, maps)

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
        scores, _, maps = self.judge(images, grad_cam=True)
        return scores, maps

    @torch.inference_mode()
    def predict(self, images: Iterable[str | Path | np.ndarray]) -> Prediction:
        """Scores, p-values, decisions and maps of N images: paths of image files, or arrays (H, W, 3) uint8 of any
        size. They are read block by block; all maps are held. Raises InputError, with the path, for no image."""
        found, rest = [], iter(images)
        while block := list(islice(rest, self.at_once)):
            arrays = [resized(x, self.size) if isinstance(x, np.ndarray) else decode(x, self.size) for x in block]
            pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).to(self.device)
            found.append([None if part is None else part.cpu().numpy() for part in self.judge(pixels)])
        scores, p, maps = zip(*found) if found else ([np.empty(0)], [np.empty(0)], [None])
        p = np.concatenate(p)
        maps = None if maps[0] is None else np.concatenate(maps)
        return Prediction(np.concatenate(scores), p, p <= self.promise.rate, maps)

    @staticmethod
    def load(path: str | Path, device: torch.device | str = "cpu") -> "Detector":
        """The detector of a file, see ``load`` of this module."""
        return load(path, device)

    @property
    def promise(self) -> Promise:
        """What its false-alarm rate promises."""
        kind = "cross" if len(self.members) > 1 else "split" if self.config.holdout else "seen"
        return Promise(kind, len(self.normal_scores), self.config.false_alarm_rate)

    def fit(self, images: ImageArray, threshold: bool = True) -> "Detector":
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
            member.fit(member_images(images, number, config), held_out=False)
            scores = torch.cat([some for some, _ in stream(member, subset(images, unseen))])
            if config.holdout:
                held_out = scores
                break
            scale, member.center = torch.std_mean(scores)
            member.scale = scale.clamp(min=1e-9)  # copies of one image have none
            held_out[unseen.to(self.device)] = member.standardized(scores, None)[0]
        if threshold:
            self.normal_scores = held_out
            self.threshold, _ = conformal_threshold(self.normal_scores, self.config.false_alarm_rate)
            looks = stream(self, images, lambda block: measure(filled(block, self.sources)), MOST)
            self.appearance = torch.cat(list(looks))
        return self

    def at_rate(self, rate: float) -> "Detector":
        """Itself, deciding at another false-alarm rate in [0, 1] from now on."""
        self.config = replace(self.config, false_alarm_rate=rate)
        self.threshold, _ = conformal_threshold(self.normal_scores, rate)
        return self

    def hide(self, mask: Tensor) -> "Detector":
        """Itself, with maps that show nothing, from now on, where the mask (H, W) bool is set, beside what does not
        count anyway; a patch model's scores follow. Normal scores stay, so that p-values only grow. Raises
        InputError if nothing is left."""
        for member in self.members:
            hidden = mask.to(self.device)
            member.hidden = hidden | member.hidden if member.hidden.numel() else hidden
            if member.hidden.all():
                raise InputError(f"{self.config.category}: every pixel is ignored, by the detector or by --ignore")
        return self

    def refit(self, images: ImageArray, **changes) -> "Detector":
        """The same networks with other densities, fitted to ``images``, those they were trained on, where ``changes``
        are other settings; this detector stays as it is."""
        config = Config.from_dict(self.config.to_dict() | changes)
        other = Detector(config, [member.network for member in self.members], self.sources)
        other.metadata = dict(self.metadata)
        return other.fit(images)

    def untrained(self) -> "Detector":
        """The untrained baseline: networks as training found them, with the same kinds of density, not yet fitted."""
        networks = [initial_network(self.config, member=number) for number in range(len(self.members))]
        other = Detector(self.config, [network.to(self.device) for network in networks], self.sources)
        for new, member in zip(other.members, self.members):
            for own, level in zip(new.levels, member.levels):
                own.location = "shared" if level.shared else "each"
        return other

    def notes(self) -> Iterator[str]:
        """What a person should know of how it was fitted."""
        if self.config.patches:
            yield from (level.choice for level in self.levels)
        if not self.promise.holds:
            needed = self.promise.needed if self.config.false_alarm_rate else "infinitely many"
            count, rate = len(self.normal_scores), self.config.false_alarm_rate
            found = f"the threshold is the largest of their scores, for a rate of {self.promise.rate:.2g}"
            yield f"a false-alarm rate of {rate:g} needs {needed} normal images, not {count}; {found}"


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
        "normal_scores": detector.normal_scores,
        "appearance": detector.appearance,
        "sources": detector.sources,
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
            detector = Detector(config, sources=content.get("sources", ALL_COUNT))
        if tuple(detector.sources.shape) not in ((0,), detector.size):
            raise ValueError(f"a mask of {tuple(detector.sources.shape)} for images of {detector.size}")
        if len(content["members"]) != len(detector.members):
            raise ValueError(f"{len(content['members'])} networks for {len(detector.members)} folds")
        for member, part in zip(detector.members, content["members"]):
            fill(member, part)
        detector.threshold, detector.normal_scores = content["threshold"], content["normal_scores"]
        detector.appearance = content.get("appearance", detector.appearance)  # earlier files have none
        detector.metadata = dict(content["metadata"])
        return detector.to(device).eval()
    except (KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: damaged detector file ({reason}); train it again") from error


def fill(member: Member, content: dict) -> None:
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
    content = load_tensors(path, "detector", lambda content: content.get("version", 0) > 2)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path}: not a detector file of this project; make one with run_training.py")
    version = content.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise InputError(f"{path}: detector format {version}, this program reads up to {VERSION}; update the program")
    try:
        content = earlier.from_version_2(content) if version < 3 else content
        content = earlier.from_version_3(content) if version < 4 else content
        config = Config.from_dict(content["config"])
    except UnknownSettingError as error:
        raise InputError(f"{path}: made by a newer program ({error}); update this one") from error
    except (InputError, KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: damaged detector file ({error}); train it again") from error
    if config.category != Path(path).stem:
        found = f"the detector of category {config.category!r} under another name"
        raise InputError(f"{path}: {found}; rename it back, a detector is only right for its own category")
    return config, content
