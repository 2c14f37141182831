"""How far from a defect the map of each stage of a patch model is raised -> results/reach.csv.

    python benchmarks/reach.py maps_as_they_are/grid.pt maps_tuned/grid.pt

The densities of every stage are fitted anew to the images that each detector was trained on. Of each stage's map, and
of their sum: image and pixel AUROC, and, over the anomalous test images with a mask, the mean within the mask and in
rings around it, in deviations of the maps of normal test images.
"""

import argparse
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from record import add_record_flags, append, command, commit
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from dataset import load_masks, load_test, load_train
from detector import Detector, load, stream
from localization import upsample
from reporting.metrics import auroc, pixel_metrics
from runtime.cli import int_at_least, new_parser, run_script
from runtime.files import InputError

RINGS = (0, 8, 16, 32, 64)  # pixels from the mask
KEPT = ("backbone", "pretrained", "patch_size", "height", "width", "epochs", "batch_size", "seed")


def get_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    parser.add_argument("detectors", nargs="+", type=Path, metavar="DETECTOR", help="files of patch models")
    parser.add_argument("--data_dir", default="Data", metavar="DIR", help="of the categories (default: Data)")
    parser.add_argument("--workers", type=int_at_least(0), default=2, metavar="N", help="threads that decode images")
    add_record_flags(parser, "reach.csv")
    return parser


def main(args: argparse.Namespace) -> None:
    for path in args.detectors:
        detector = load(path)
        config = detector.config
        if config.patches is None or config.folds > 1:
            raise InputError(f"{path}: a patch model of one network is needed")
        where = args.data_dir, config.category, detector.size, args.workers
        detector = detector.refit(load_train(*where), features="all", level=None)
        test = load_test(*where)
        masks = load_masks(test, detector.size, args.workers).numpy().astype(bool)
        names = [*(str(level) for level in detector.config.levels), "all"]
        for name, maps in zip(names, stage_maps(detector, test.images)):
            scores = maps.max((1, 2))
            row = {"category": config.category, "stage": name, "image_auroc": auroc(test.labels, scores)}
            row |= {"pixel_auroc": pixel_metrics(masks, maps)["pixel_auroc"]} | profile(maps, masks, test.labels)
            row |= {key: value for key, value in config.to_dict().items() if key in KEPT}
            row |= {"train_command": detector.metadata["command"], "command": command(), "commit": commit()}
            append(row | {"note": args.note}, args.results)


def stage_maps(detector: Detector, images: Tensor) -> list[np.ndarray]:
    """The standardized maps (M, H, W) of each stage, and their sum."""
    member, sigma = detector.members[0], detector.config.patches.sigma

    def look(some: Tensor) -> list[Tensor]:
        distances = [level.distances(level.project(x)) for level, x in zip(member.levels, member.embed(some))]
        return [upsample(level.standardized(d), level.grid, sigma) for level, d in zip(member.levels, distances)]

    found = [torch.cat(parts).float().numpy() for parts in zip(*stream(detector, images, look))]
    return [*found, sum(found)]


def profile(maps: np.ndarray, masks: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The mean of maps (M, H, W) within the masks and in rings around them, in deviations of normal images' maps."""
    normal, marked = maps[labels == 0], masks.any((1, 2))
    away = np.stack([distance_transform_edt(~mask) for mask in masks[marked]])
    values = (maps[marked] - normal.mean()) / normal.std()
    row = {"within": values[away == 0].mean()}
    for low, high in pairwise(RINGS):
        row[f"to_{high}_px"] = values[(away > low) & (away <= high)].mean()
    return row


if __name__ == "__main__":
    run_script(main, get_parser())
