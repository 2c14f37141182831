"""Memory and speed of training against the number of images -> results/memory.csv.

    python benchmarks/memory.py                        10,000 and 100,000 images: 2 GB of disk, minutes
    python benchmarks/memory.py --count 1000 10000     fewer

Makes small images in a temporary folder, all different, and trains on them with run_training.py, in a process of its
own for each number: from a file that is mapped, and the largest number once more with all images in memory. Peak memory
is the most that such a process held at any time, decoding and density included; steps per second are the median of what
TensorBoard shows, so that neither decoding nor the first steps count. One row per run goes to the CSV file, all of them
as one JSON object to stdout. Not for Windows, which knows no os.wait4.
"""

import argparse
import csv
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from detector import load  # noqa: E402
from options import number, run_script, say, whole  # noqa: E402

CATEGORY = "many"
MAXRSS = 1 if sys.platform == "darwin" else 1024  # bytes in the unit of ru_maxrss


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--count", type=whole(2), nargs="+", default=[10_000, 100_000], metavar="N", help="images to train on")
    add("--size", type=whole(32), default=64, metavar="S", help="side of the images in pixels (default: 64)")
    add("--steps", type=whole(1), default=150, metavar="N", help="parameter updates of each run (default: 150)")
    add("--batch_size", type=whole(2), default=32, metavar="N", help="images per update (default: 32)")
    add("--memory_gb", type=number(0, 1e6), default=0.0, metavar="GB", help="run_training.py's (default: 0, map all)")
    add("--folder", type=Path, metavar="DIR", help="where the temporary folder goes (default: the system's place)")
    add("--results", type=Path, default=ROOT / "results/memory.csv", metavar="FILE", help="the CSV file to append to")
    add("--note", default="", metavar="TEXT", help="what else is to be known of the machine at the time")
    return parser


def main(args: argparse.Namespace) -> None:
    origin = {
        "command": f"python benchmarks/memory.py {shlex.join(sys.argv[1:])}".rstrip(),
        "commit": commit(),  # before the first row changes the tree
        "note": args.note,
    }
    if args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    with tempfile.TemporaryDirectory(prefix="cutpaste-memory-", dir=args.folder) as folder:
        for count in sorted(set(args.count)):
            make_images(Path(folder) / "Data" / CATEGORY / "train/good", count, args.size)
            rows.append(measure(Path(folder), count, args, args.memory_gb) | origin)
            append(rows[-1], args.results)
        enough = math.ceil(rows[-1]["decoded_mb"] / 1e3)
        compared = measure(Path(folder), count, args, enough) | origin
        append(compared, args.results)
    few, many = rows[0], rows[-1]
    result = {
        "peak_growth_mb": round(many["peak_mb"] - few["peak_mb"], 1),
        "speed_ratio": round(many["steps_per_second"] / few["steps_per_second"], 3),
        "mapped": rows,
        "in_memory": compared,
    }
    print(json.dumps(result, indent=1))


def make_images(folder: Path, count: int, side: int) -> None:
    """Add images to a folder until there are ``count``: smooth colours, another draw for each."""
    folder.mkdir(parents=True, exist_ok=True)
    present = len(os.listdir(folder))
    say(f"making {count - present} images of {side} x {side}")
    for index in range(present, count):
        colours = np.random.default_rng(index).integers(0, 256, (5, 5, 3), np.uint8)
        Image.fromarray(colours).resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{index:07}.bmp")


def measure(folder: Path, count: int, args: argparse.Namespace, memory_gb: float) -> dict:
    """Train in a process of its own. Returns what it took."""
    models, logs = folder / f"models_{count}_{memory_gb:g}", folder / "logdirs"
    flags = {
        **{"data_dir": folder / "Data", "model_dir": models, "logdir": logs, "cache_dir": folder / "cache"},
        **{"memory_gb": f"{memory_gb:g}", "size": args.size, "batch_size": args.batch_size, "epochs": args.steps},
        **{"variant": "3way", "test_epochs": -1, "threads": 1},
    }
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    say(f"training on {count} images, --memory_gb {memory_gb:g}")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run_training.py"), "--no-pretrained", *words], stdout=sys.stderr
    )
    # A process counts what the one that started it had held: that one must stay the smaller of the two
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"run_training.py ended with {process.returncode}")
    made = load(models / f"{CATEGORY}.pt").made
    return {
        "images": count,
        "size": args.size,
        "decoded_mb": round(count * 3 * args.size**2 / 1e6, 3),
        "memory_gb": memory_gb,
        "peak_mb": round(usage.ru_maxrss * MAXRSS / 1e6, 1),
        "steps_per_second": round(median_speed(logs / models.name / CATEGORY) / min(args.batch_size, count), 3),
        "steps": args.steps,
        "batch_size": args.batch_size,
        "train_seconds": made["train_seconds"],
        "processor": made["device"],
        "threads": made["threads"],
        "amp": made["amp"],
        "torch": made["torch"],
    }


def median_speed(logdir: Path) -> float:
    """Images per second as TensorBoard shows them, the median."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(logdir))
    events.Reload()
    return statistics.median(event.value for event in events.Scalars("images_per_second"))


def commit() -> str:
    """The checkout's commit, "-dirty" if files were changed since; nothing outside a checkout."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()

    dirty = "-dirty" if git("status", "--porcelain", "--untracked-files=no") else ""
    return git("rev-parse", "--short", "HEAD") + dirty


def append(row: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    run_script(main, get_parser())
