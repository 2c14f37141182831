"""What the settings of anomaly maps cost and bring, on trained patch models -> results/maps.csv.

    python benchmarks/maps.py --model_dir patch_models
    python benchmarks/maps.py --model_dir patch_models --level 1 2,3 --window 16 32

Fits the densities of each detector anew under every combination of the settings given, to the training images, and
holds maps against the masks of the test images. Each combination runs in a process of its own, so that its peak memory
is its own; combinations that cannot be are left out. Trains nothing; the detectors stay as they are. Adds one row per
combination and category to the CSV file.
"""

import argparse
import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from record import add_record_flags, append, command, commit, peak_mb, wait

import config as options
from config import PATCH_SETTINGS, Config, PatchConfig, SettingError, settings_of, with_flag
from dataset import load_masks, load_test, load_train
from detector import Detector, detector_path, find_work, load, load_config, save, stream
from reporting.metrics import evaluate
from reporting.tables import record
from runtime.cli import choose_device, device_name, int_at_least, keep_memory, new_parser, run_script
from runtime.files import InputError, say

SETTINGS = ("level", *(name for name in PATCH_SETTINGS if name != "patch_size"), "l2", "density")
TIMED = 8  # images that are timed at once


def get_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    options.add_data_flags(parser)
    note = "each of several values in turn; default: the detector's own"
    add = parser.add_argument_group("density and maps", note).add_argument
    for each in (*settings_of(PatchConfig), *settings_of(Config)):
        if each.name in SETTINGS:
            rule = each.metadata["rule"]
            help = f"{each.metadata['help']} ({rule.words})"
            add(f"--{each.name}", type=rule, nargs="+", metavar="VALUE", help=help)
    add = parser.add_argument_group("how").add_argument
    add("--repeats", type=int_at_least(1), default=3, metavar="N", help="of the timing; the median counts (default: 3)")
    add_record_flags(parser, "maps.csv")
    return parser


def main(args: argparse.Namespace) -> None:
    choose_device(args.cuda)  # an error now
    origin = {"bench_command": command(), "commit": commit(), "note": args.note}
    configs = {}
    for path in find_work(args.model_dir, args.data_dir, args.type):
        category = path.stem
        configs[category] = load_config(path)
        if configs[category].patches is None:
            raise InputError(f"{path}: no patch model; choose others with --type or --model_dir")
    given = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    for values in itertools.product(*given.values()):
        changes = dict(zip(given, values))
        shown = "".join(f" --{name} {as_typed(value)}" for name, value in changes.items())
        for category, config in configs.items():
            try:
                Config.from_dict(config.to_dict() | changes)
            except SettingError as error:
                say(f"{category}{shown}: left out: {with_flag(error)}")
                continue
            # a process of its own; it counts what this one had held as its own peak: no image is read here
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                row = pool.submit(measure, args, category, changes).result()
            if isinstance(row, str):
                say(f"{category}{shown}: left out: {row}")
                continue
            append(row | origin, args.results)
            columns = ["image_auroc", "pixel_auroc", "aupro", "location_chosen", "seconds_per_image"]
            say(f"{category}{shown}: " + ", ".join(f"{name} {row[name]}" for name in columns))


def measure(args: argparse.Namespace, category: str, changes: dict) -> dict | str:
    """One category under one combination of settings: a row, or why the combination cannot be."""
    keep_memory()
    device = choose_device(args.cuda)
    trained = load(detector_path(args.model_dir, category), device)
    where = (args.data_dir, category, trained.size, args.workers, options.storage(args))
    try:
        config = Config.from_dict(trained.config.to_dict() | changes)
        train, test = load_train(*where), load_test(*where)
        detector, fitted = timed_fit(config, trained, train, threshold=False)
    except SettingError as error:
        return with_flag(error)
    detector.metadata = trained.metadata
    *_, metrics = evaluate(detector, test, load_masks(test, trained.size, args.workers).numpy())
    images = test.images[:TIMED].to(device)
    seconds = statistics.median(timed_maps(detector, images) for _ in range(args.repeats))
    peak = peak_mb(device)
    row = {"category": category, **{name: metrics.get(name) for name in ("image_auroc", "pixel_auroc", "aupro")}}
    row |= {
        "seconds_per_image": float(f"{seconds / len(images):.3g}"),
        "fit_seconds": float(f"{fitted:.3g}"),
        "fit_threshold_seconds": float(f"{timed_fit(config, trained, train, threshold=True)[1]:.3g}"),
        "peak_mb": round(peak),
        "file_mb": float(f"{file_mb(detector):.3g}"),
        "dims": each_level(level.density.mean.shape[-1] for level in detector.levels),
    }
    for kind in detector.levels[0].likelihoods:
        row[f"likelihood_{kind}"] = each_level(level.likelihoods[kind] for level in detector.levels)
    row = record(detector, row)
    return row | {"cores": os.cpu_count(), "bench_device": device_name(device), "bench_torch": str(torch.__version__)}


def as_typed(value: object) -> str:
    """A setting as its flag takes it."""
    return each_level(value) if isinstance(value, tuple) else str(int(value) if isinstance(value, bool) else value)


def each_level(values: Iterable) -> str:
    """A value for each level, in one cell."""
    return ",".join(map(str, values))


def timed_fit(config: Config, trained: Detector, images: torch.Tensor, threshold: bool) -> tuple[Detector, float]:
    """The trained network with densities fitted under ``config``, and the seconds that it took."""
    began = time.perf_counter()
    detector = Detector(config, [member.network for member in trained.members], trained.fill_index).fit(
        images, threshold
    )
    wait(detector.device)
    return detector, time.perf_counter() - began


def timed_maps(detector: Detector, images: torch.Tensor) -> float:
    """Seconds from resident images to finished maps."""
    wait(detector.device)
    began = time.perf_counter()
    for _ in stream(detector, images):
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
    run_script(main, get_parser())
