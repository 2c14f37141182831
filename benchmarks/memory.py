"""Memory and speed of training against the number of images -> results/memory.csv.

    python benchmarks/memory.py
    python benchmarks/memory.py --count 1000 10000

Makes small images in a temporary folder, all different (10,000 and 100,000 take 2 GB of disk and minutes), and trains
on them with run_training.py, in a process of its own for each number: from a file that is mapped, and the largest
number once more with all images in memory.

Peak memory is the most that such a process held at any time, decoding and density included. peak_mb is all of it, with
the pages of mapped files, which the system takes back when it needs them; anonymous_mb is without them, seen on Linux
every few milliseconds. Steps per second are the median of what TensorBoard shows, so that neither decoding nor the
first steps count. Adds one row per run to the CSV file and prints all as one JSON object. Not for Windows, which knows
no os.wait4.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from pathlib import Path

import numpy as np
from PIL import Image
from record import MAXRSS, ROOT, add_record_flags, append, command, commit

from detector import detector_path, load
from runtime.cli import int_at_least, new_parser, number, run_script, side
from runtime.files import InputError, say

CATEGORY = "many"
LOOK_EVERY = 0.02  # seconds between two looks at the memory


def get_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add = parser.add_argument_group("what is trained").add_argument
    count = "images to train on (default: 10000 100000)"
    add("--count", type=int_at_least(2), nargs="+", default=[10_000, 100_000], metavar="N", help=count)
    add("--size", type=side, default=64, metavar="S", help="side of the images in pixels (default: 64)")
    add("--steps", type=int_at_least(1), default=150, metavar="N", help="steps of each run (default: 150)")
    add("--batch_size", type=int_at_least(2), default=32, metavar="N", help="images per step (default: 32)")
    add = parser.add_argument_group("how").add_argument
    add("--memory_gb", type=number(0, 1e6), default=0.0, metavar="GB", help="run_training.py's (default: 0, map all)")
    add("--folder", type=Path, metavar="DIR", help="where the temporary folder goes (default: the system's place)")
    add_record_flags(parser, "memory.csv")
    return parser


def main(args: argparse.Namespace) -> None:
    origin = {"command": command(), "commit": commit(), "note": args.note}
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
    held = "peak_mb" if many["anonymous_mb"] is None else "anonymous_mb"
    result = {
        "peak_growth_mb": round(many[held] - few[held], 1),
        "speed_ratio": round(many["steps_per_second"] / few["steps_per_second"], 3),
        "mapped": rows,
        "in_memory": compared,
    }
    print(json.dumps(result, indent=1))


def make_images(folder: Path, count: int, side: int) -> None:
    """Add images to a folder until there are ``count``: smooth colors, another draw for each."""
    folder.mkdir(parents=True, exist_ok=True)
    present = len(os.listdir(folder))
    say(f"making {count - present} images of {side} x {side}")
    for index in range(present, count):
        colors = np.random.default_rng(index).integers(0, 256, (5, 5, 3), np.uint8)
        Image.fromarray(colors).resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{index:07}.bmp")


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
    peak, anonymous = watched([sys.executable, str(ROOT / "run_training.py"), "--no-pretrained", *words])
    made = load(detector_path(models, CATEGORY)).metadata
    return {
        "images": count,
        "size": args.size,
        "decoded_mb": round(count * 3 * args.size**2 / 1e6, 3),
        "memory_gb": memory_gb,
        "peak_mb": peak,
        "anonymous_mb": anonymous,
        "steps_per_second": round(median_speed(logs / models.name / CATEGORY) / min(args.batch_size, count), 3),
        "steps": args.steps,
        "batch_size": args.batch_size,
        "train_seconds": made["train_seconds"],
        "processor": made["device"],
        "threads": made["threads"],
        "amp": made["amp"],
        "torch": made["torch"],
    }


def watched(words: list[str], allowed: Collection[int] = (0,)) -> tuple[float, float | None]:
    """Run a command and return its peak memory in millions of bytes: all of it, and without mapped files (None where
    the system does not tell). Raises InputError if it ends with another exit code than those allowed."""
    process = subprocess.Popen(words, stdout=sys.stderr)
    pid, anonymous = 0, 0
    while not pid:
        anonymous = max(anonymous, anonymous_bytes(process.pid))
        time.sleep(LOOK_EVERY)
        # A process counts what the one that started it had held: that one must stay the smaller of the two
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in allowed:
        raise InputError(f"{Path(words[1]).name} ended with {process.returncode}; its own message says why")
    return round(usage.ru_maxrss * MAXRSS / 1e6, 1), round(anonymous / 1e6, 1) or None


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that is no file's; 0 where the system does not tell."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    _, _, rest = status.partition("RssAnon:")  # a process that has ended, but has not been waited for, has none
    return int(rest.split()[0]) * 1024 if rest else 0


def median_speed(logdir: Path) -> float:
    """Images per second as TensorBoard shows them, the median."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(logdir))
    events.Reload()
    return statistics.median(event.value for event in events.Scalars("images_per_second"))


if __name__ == "__main__":
    run_script(main, get_parser())
