"""Which detectors and which images belong together.

Owns what is evaluated: categories with both a detector and images; and which training images a detector's normal scores
are of. Knows nothing of flags.
"""

from pathlib import Path

import torch
from torch import Tensor

from dataset import choose_categories, train_paths
from detector import SUFFIX, Detector, detector_path
from member import DENSITY_IMAGES, PATCH_DENSITY_IMAGES, unseen_by
from runtime.files import InputError, say


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
    return paths if len(paths) == len(detector.normal_scores) else None
