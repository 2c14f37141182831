"""What the settings of anomaly maps cost and bring, on trained detectors -> results/maps.csv.

    python benchmarks/maps.py --model_dir patch_models                                     as the detectors are
    python benchmarks/maps.py --model_dir patch_models --level 1 2 --window 16 32          every combination

Fits the density of each detector anew under each combination of settings, to the training images, and holds maps
against the masks of the test images. Each combination runs in a process of its own, so that its peak memory is its own;
combinations that cannot be are left out. Trains nothing; the detectors stay as they are. One row per combination and
category goes to the CSV file.
"""

import argparse
import itertools
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

import torch  # noqa: E402
from speed import append, commit, device_name, peak_mb, wait  # noqa: E402

import localization  # noqa: E402
import options  # noqa: E402
from dataset import InputError, load_masks, load_test, load_train  # noqa: E402
from detector import PATCH_KEYS, Detector, detector_path, load, save  # noqa: E402
from eval import evaluate, find_work  # noqa: E402
from localization import GRID_KEYS, LOCATIONS, Grid  # noqa: E402
from model import LEVELS  # noqa: E402

TIMED = 8  # images that are timed at once


def get_parser() -> argparse.ArgumentParser:
    parser = options.new_parser("Measure anomaly maps under combinations of settings.", __doc__.split("\n\n")[2])
    options.add_data_flags(parser)
    add, whole = parser.add_argument, options.whole
    add("--window", type=whole(8), nargs="+", metavar="P")
    add("--stride", type=whole(1), nargs="+", metavar="P")
    add("--level", type=int, choices=LEVELS, nargs="+")
    add("--dense", type=options.zero_or_one, nargs="+", metavar="0|1")
    add("--location", choices=LOCATIONS, nargs="+")
    add("--sigma", type=options.number(0.1, 1e3), nargs="+", metavar="P")
    add("--l2", type=options.zero_or_one, nargs="+", metavar="0|1")
    add("--dims", type=whole(1), nargs="+", metavar="N", help="of the projection for one Gaussian per location")
    add("--repeats", type=whole(1), default=3, metavar="N", help="of the timing; the median counts (default: 3)")
    add("--results", default=ROOT / "results/maps.csv", type=Path, metavar="FILE")
    add("--note", default="", help="for the row: what else ran on the machine, say")
    return parser


def main(args: argparse.Namespace) -> None:
    options.choose_device(args.cuda)  # an error now
    command = options.command_line().replace("maps.py", "benchmarks/maps.py", 1)
    origin = {"bench_command": command, "commit": commit(), "note": args.note}
    given = {name: getattr(args, name) for name in (*PATCH_KEYS, "l2", "dims") if getattr(args, name) is not None}
    for values in itertools.product(*given.values()):
        for category in find_work(args.model_dir, args.data_dir, args.type):
            # a process of its own; it counts what this one had held as its own peak: no image is read here
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, spawn) as pool:
                row = pool.submit(measure, args, category, dict(zip(given, values))).result()
            if row is None:
                options.say(f"{category}: {values} cannot be; left out")
                continue
            row |= origin
            append(row, args.results)
            shown = ["image_auroc", "pixel_auroc", "aupro", "location_chosen", "seconds_per_image"]
            options.say(f"{category} {values}: " + ", ".join(f"{name} {row[name]}" for name in shown))


def measure(args: argparse.Namespace, category: str, changes: dict) -> dict | None:
    """One category under one combination: a row, or None for windows that cannot be."""
    options.keep_memory()
    device = options.choose_device(args.cuda)
    localization.EACH_DIMS = changes.pop("dims", localization.EACH_DIMS)
    trained = load(detector_path(args.model_dir, category), device)
    config = trained.config | changes
    if trained.grid is None:
        raise InputError(f"{args.model_dir}: the detector of {category} is no patch model")
    try:
        Grid(*trained.size, *(config[name] for name in GRID_KEYS))
    except ValueError:
        return None
    storage = options.storage(args)
    train = load_train(args.data_dir, category, trained.size, args.workers, storage)
    test = load_test(args.data_dir, category, trained.size, args.workers, storage)
    masks = load_masks(test, trained.size, args.workers).numpy()
    began = time.perf_counter()
    detector = Detector(config, trained.network).eval().fit(train, threshold=False)  # which would embed all once more
    fitted = time.perf_counter() - began
    _, _, metrics = evaluate(detector, test, masks)
    images = test.images[:TIMED].to(device)
    seconds = statistics.median(timed(detector, images) for _ in range(args.repeats))
    row = {"category": category, **{name: metrics.get(name) for name in ("image_auroc", "pixel_auroc", "aupro")}}
    row |= {
        "seconds_per_image": float(f"{seconds / len(images):.3g}"),
        "fit_seconds": float(f"{fitted:.3g}"),
        "peak_mb": round(peak_mb(device)),
        "file_mb": float(f"{file_mb(detector):.3g}"),
    }
    row |= {"location_chosen": detector.density.location, "dims": detector.density.mean.shape[1]}
    row |= {f"likelihood_{kind}": value for kind, value in detector.density.likelihoods.items()}
    row |= {name: value for name, value in config.items() if name not in row}
    made = {("train_command" if name == "command" else name): value for name, value in trained.made.items()}
    return row | made | {"cores": os.cpu_count(), "bench_device": device_name(device), "bench_torch": torch.__version__}


def timed(detector: Detector, images: torch.Tensor) -> float:
    """Seconds from resident images to finished maps."""
    wait(detector.device)
    began = time.perf_counter()
    for _ in detector.maps(images):
        pass
    wait(detector.device)
    return time.perf_counter() - began


def file_mb(detector: Detector) -> float:
    """Size of the detector's file, in millions of bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "detector.pt"
        save(detector, path)
        return path.stat().st_size / 1e6


if __name__ == "__main__":
    options.run_script(main, get_parser())
