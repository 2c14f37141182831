"""How many images predict.py scores in a second, beside decoding alone and scoring alone -> results/predict.csv.

    python benchmarks/predicting.py models/bottle.pt Data/bottle/test/good
    python benchmarks/predicting.py models/bottle.pt Data/bottle/test/good --count 1000 10000

Makes copies of the images of a folder under other names (hard links where the disk has them), one in a hundred broken,
and scores them by predict.py in a process of its own. start_seconds is what it takes for one image, most of it imports;
images per second are of what comes after. Decoding alone reads the same files by as many threads, scoring alone judges
as many images that are there already. Peak memory is the process's; it should not grow with the number of images.
Adds one row per number to the CSV file. Not for Windows, which knows no os.wait4.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from memory import watched
from record import ROOT, add_record_flags, append, command, commit, wait

from detector import Detector, load
from runtime.cli import choose_device, device_name, int_at_least, new_parser, run_script, zero_or_one
from runtime.files import InputError, say
from runtime.image_files import decode, find_images

BROKEN_EVERY = 100
SCORED_ALONE = 1000  # images at most: the speed is the same for more


def get_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    parser.add_argument("detector", type=Path, help="detector file")
    parser.add_argument("images", type=Path, help="folder of images that are copied")
    add = parser.add_argument_group("how").add_argument
    count = "images to score (default: 1000)"
    add("--count", type=int_at_least(2), nargs="+", default=[1000], metavar="N", help=count)
    workers = "threads that decode (default: one per core, 8 at most)"
    add("--workers", type=int_at_least(1), default=min(8, os.cpu_count() or 1), metavar="N", help=workers)
    add("--cuda", type=zero_or_one, default=False, metavar="0|1", help="use the GPU (default: 0)")
    add("--heatmaps", type=zero_or_one, default=False, metavar="0|1", help="draw heat maps as well (default: 0)")
    add_record_flags(parser, "predict.csv")
    return parser


def main(args: argparse.Namespace) -> None:
    sources = find_images(args.images)
    if not sources:
        raise InputError(f"{args.images}: no image found")
    device = choose_device(args.cuda)
    with tempfile.TemporaryDirectory(prefix="cutpaste-predict-") as folder:
        _, _, start = timed(args, make_copies(sources, Path(folder, "one"), 1), Path(folder))
        folders = {count: make_copies(sources, Path(folder, str(count)), count) for count in sorted(set(args.count))}
        # All before this process takes memory, which those that it starts would count as theirs
        taken = {count: timed(args, copies, Path(folder)) for count, copies in folders.items()}
        detector = load(args.detector, device)
        shared = described(args, detector, sources)
        for count, (peak, anonymous, seconds) in taken.items():
            row = {
                "images": count,
                "broken": count // BROKEN_EVERY,
                "start_seconds": round(start, 2),
                "seconds": round(seconds, 2),
                "images_per_second": round(count / max(seconds - start, 1e-9), 2),
                "decoded_per_second": round(decoding_speed(folders[count], detector.size, args.workers), 2),
                "scored_per_second": round(scoring_speed(detector, sources, min(count, SCORED_ALONE)), 2),
                "peak_mb": peak,
                "anonymous_mb": anonymous,
            }
            append(row | shared, args.results)
            print(f"{count}: {row['images_per_second']} images per second, {peak} MB")


def described(args: argparse.Namespace, detector: Detector, sources: list[Path]) -> dict:
    """What a row says of the detector, the images and the machine."""
    height, width = detector.size
    return {
        "detector": args.detector.stem,
        "backbone": detector.config.backbone,
        "patch_model": detector.config.patches is not None,
        "height": height,
        "width": width,
        "file_kb": round(sum(path.stat().st_size for path in sources) / len(sources) / 1e3, 1),
        "heatmaps": args.heatmaps,
        "workers": args.workers,
        "threads": torch.get_num_threads(),
        "device": device_name(detector.device),
        "torch": torch.__version__,
        "command": command(),
        "commit": commit(),
        "note": args.note,
    }


def make_copies(sources: list[Path], folder: Path, count: int) -> Path:
    """A folder of ``count`` files, copies of the images in turn; every BROKEN_EVERY-th is cut in half."""
    folder.mkdir()
    for number in range(count):
        source = sources[number % len(sources)]
        target = folder / f"{number:07}{source.suffix}"
        if number % BROKEN_EVERY == BROKEN_EVERY - 1:
            content = source.read_bytes()
            target.write_bytes(content[: len(content) // 2])
            continue
        try:
            os.link(source.resolve(), target)
        except OSError:  # another disk, or one without links
            shutil.copyfile(source, target)
    return folder


def timed(args: argparse.Namespace, images: Path, folder: Path) -> tuple[float, float | None, float]:
    """Peak memory in MB, all of it and without files, and the seconds that predict.py takes for a folder of images."""
    say(f"scoring {len(os.listdir(images))} images")
    output = folder / f"{images.name}.csv"
    words = ["--output", output, "--workers", args.workers, "--cuda", int(args.cuda)]
    words += ["--heatmaps", folder / f"heat_{images.name}"] if args.heatmaps else []
    script = [sys.executable, ROOT / "predict.py", args.detector, images, *words]
    start = time.perf_counter()
    peak, anonymous = watched([*map(str, script)], allowed=(0, 1))  # 1 if some are broken: below the rows tell
    seconds = time.perf_counter() - start
    if not output.exists() or output.read_bytes().count(b"\n") != len(os.listdir(images)) + 1:
        raise InputError("predict.py has not scored every image; its own message says why")
    return peak, anonymous, seconds


def decoding_speed(folder: Path, size: tuple[int, int], workers: int) -> float:
    """Files that are decoded in a second, broken ones among them."""

    def work(path: Path) -> None:
        with suppress(InputError):
            decode(path, size)

    paths = find_images(folder)
    start = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(work, paths):
            pass
    return len(paths) / (time.perf_counter() - start)


@torch.inference_mode()
def scoring_speed(detector: Detector, sources: list[Path], count: int) -> float:
    """Images that are judged in a second once they are in memory, after a first batch."""
    block = [decode(sources[number % len(sources)], detector.size) for number in range(detector.batch_size)]
    pixels = torch.stack([torch.from_numpy(each).permute(2, 0, 1) for each in block])
    detector.predict_batch(pixels.to(detector.device))
    wait(detector.device)
    batches = -(-count // len(pixels))
    start = time.perf_counter()
    for _ in range(batches):
        detector.predict_batch(pixels.to(detector.device)).scores.cpu()
    wait(detector.device)
    return batches * len(pixels) / (time.perf_counter() - start)


if __name__ == "__main__":
    run_script(main, get_parser())
