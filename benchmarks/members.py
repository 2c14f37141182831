"""A detector of several networks against each of them -> results/members.csv.

    python run_training.py --type bottle --model_dir folds --folds 5
    python benchmarks/members.py folds --type bottle

Scores the test images by each network alone and by all of them; trains nothing.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from record import add_record_flags, append, command, commit

import config as options
from dataset import load_test
from detector import detector_path, load, stream
from reporting.metrics import auroc
from runtime import cache
from runtime.cli import int_at_least, new_parser, run_script
from runtime.files import InputError

KEPT = ("backbone", "recipe", "pretrained", "height", "width", "patch_size", "epochs", "batch_size", "folds", "seed")
MADE = ("command", "device", "amp", "torch")


def get_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    parser.add_argument("model_dir", type=Path, help="folder of detectors")
    parser.add_argument("--data_dir", default="Data", metavar="DIR", help="of the categories (default: Data)")
    parser.add_argument("--type", type=options.categories, required=True, metavar="NAMES", help="categories")
    parser.add_argument("--workers", type=int_at_least(0), default=2, metavar="N", help="threads that decode images")
    add_record_flags(parser, "members.csv")
    return parser


def main(args: argparse.Namespace) -> None:
    for category in args.type:
        detector = load(detector_path(args.model_dir, category))
        if len(detector.members) == 1:
            raise InputError(f"{args.model_dir}: {category} has one network; train it with --folds")
        test = load_test(args.data_dir, category, detector.size, args.workers, cache.IN_MEMORY)
        made = [detector, *detector.members]
        scores = [torch.cat([some for some, _ in stream(each, test.images)]).numpy() for each in made]
        whole, *alone = (auroc(test.labels, each) for each in scores)
        values, metadata = detector.config.to_dict(), detector.metadata
        row = {"category": category, "ensemble": whole, "members_mean": float(np.mean(alone))}
        row |= {"members": " ".join(f"{each:.4f}" for each in alone)}
        row |= {name: values[name] for name in KEPT} | {f"train_{name}": metadata[name] for name in MADE}
        append(row | {"command": command(), "commit": commit(), "note": args.note}, args.results)


if __name__ == "__main__":
    run_script(main, get_parser())
