"""What the sections of benchmarks/reproduce.sh will cost, before they are started: GPU hours of training.

    python benchmarks/plan.py --gpu_seconds_per_step 0.1
    python benchmarks/plan.py --gpu_seconds_per_step 0.1 --data_dir Data

The seconds are those of one step of resnet18, 3way, 256 x 256, batch 32, as benchmarks/speed.py --only step --cuda 1
gives them (step_seconds). Other steps are scaled by the multiply-adds of their forward passes. So it is an estimate:
networks of many small convolutions, as EfficientNet, and small crops take longer than their multiply-adds say.
Densities and evaluation are not in it.
"""

import argparse
import shlex
import subprocess
from collections import Counter
from itertools import pairwise

import torch
from record import ROOT
from torch.utils.flop_counter import FlopCounterMode

import run_training
from config import Config, config_of
from cutpaste import VARIANTS
from dataset import choose_categories
from model import CutPasteNet
from runtime.cli import int_at_least, new_parser, number, run_script

REFERENCE = Config(pretrained=False)  # the paper's recipe
FORWARD = 1 / 3  # the forward pass's share of a step: the backward pass costs two of them


def get_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add = parser.add_argument
    seconds = "of a step of resnet18, 3way, 256 x 256, batch 32, on one GPU"
    add("--gpu_seconds_per_step", type=number(1e-6, 1e6), required=True, metavar="S", help=seconds)
    which = parser.add_mutually_exclusive_group().add_argument
    which("--categories", type=int_at_least(1), default=15, metavar="N", help="how many (default: 15)")
    which("--data_dir", metavar="DIR", help="count the categories of this folder instead")
    return parser


def main(args: argparse.Namespace) -> None:
    categories = len(choose_categories(args.data_dir, ["all"])) if args.data_dir else args.categories
    hours = Counter()
    for section, command in commands(dry_run()):
        hours[section] += categories * reference_steps(command) * args.gpu_seconds_per_step / 3600
    print(f"{'section':<12} {'GPU hours':>10}")
    for section, cost in [*hours.items(), ("total", hours.total())]:
        print(f"{section:<12} {cost:>10,.1f}")


def dry_run() -> str:
    """Every command of reproduce.sh, one a line, each section's after a line with its name."""
    script = ["bash", ROOT / "benchmarks/reproduce.sh", "--dry_run"]
    return subprocess.run(script, capture_output=True, text=True, check=True).stdout


def commands(text: str) -> list[tuple[str, list[str]]]:
    """The trainings of a dry run: section, and the words after "run_training.py"."""
    found, section = [], ""
    for line in text.splitlines():
        words = shlex.split(line)
        if words[0] == "#":
            section = words[1]
        elif "run_training.py" in words:
            found.append((section, words[words.index("run_training.py") + 1 :]))
    return found


def reference_steps(words: list[str]) -> float:
    """The cost of a training of one category, in steps of the reference."""
    config = config_of(run_training.get_parser().parse_args(words), "any")
    given = dict(pairwise(words))
    networks = len(given.get("--seed", "0").split(",")) * int(given.get("--folds", "1"))
    frozen = min(config.frozen_steps, config.epochs)
    steps = config.epochs - frozen + FORWARD * frozen
    return networks * steps * step_flops(config) / step_flops(REFERENCE)


def step_flops(config: Config) -> int:
    """Floating point operations of the forward pass of one step. Nothing is computed: tensors on the device "meta"
    have shapes alone."""
    side = config.patches and config.patches.patch_size
    classes = VARIANTS[config.variant].num_classes  # a view each
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = CutPasteNet(config.backbone, config.head_layer, classes, config.normalize).eval()
        network.head(network.embed(torch.empty(1, 3, side or config.height, side or config.width)))
    return config.batch_size * classes * counter.get_total_flops()


if __name__ == "__main__":
    run_script(main, get_parser())
