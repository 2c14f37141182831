"""How often new normal images are called anomalous, over many random splits -> results/false_alarms.csv.

    python run_training.py --type solar_mono --model_dir as_it_is --epochs 0 --level 4
    python benchmarks/false_alarms.py as_it_is/solar_mono.pt --splits 200

All normal images of the category, of train/good and test/good, are embedded once by the network of an image-level
detector, which must not have been trained on them (--epochs 0). Each split draws those that are known, as many as
train/good has; the others are new. The rows compare what is promised for the known ones (conformal.Promise) with the
share of new ones that is called anomalous, its mean over the splits and the interval that holds 90 % of them.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from record import add_record_flags, append, command, commit
from torch import Tensor

from conformal import FalseAlarmGuarantee, p_values
from dataset import load_test, load_train
from density import fit_density, held_out
from detector import Detector, load, stream
from runtime.cli import int_at_least, new_parser, number, run_script
from runtime.files import InputError

RATES = (0.01, 0.05, 0.1)


def get_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("detector", type=Path, help="file of an image-level detector of one network, made with --epochs 0")
    add("--data_dir", default="Data", metavar="DIR", help="of the category (default: Data)")
    add("--splits", type=int_at_least(2), default=200, metavar="N", help="random splits (default: 200)")
    add("--folds", type=int_at_least(2), default=5, metavar="K", help="folds of cross-conformal (default: 5)")
    add("--holdout", type=number(0.01, 0.9), default=0.25, metavar="X", help="share held out by split (default: 0.25)")
    add("--seed", type=int_at_least(0), default=0, metavar="N", help="of the splits")
    add("--workers", type=int_at_least(0), default=2, metavar="N", help="threads that decode images")
    add_record_flags(parser, "false_alarms.csv")
    return parser


def main(args: argparse.Namespace) -> None:
    detector = load(args.detector)
    config = detector.config
    if config.epochs or config.patches or len(detector.members) > 1 or len(config.levels) > 1:
        raise InputError(f"{args.detector}: an image-level detector of one level, made with --epochs 0, is needed")
    normal, known = normal_embeddings(args, detector)
    generator = torch.Generator().manual_seed(args.seed)
    found: dict[str, list[np.ndarray]] = {}
    promises: dict[str, int] = {}
    for _ in range(args.splits):
        order = torch.randperm(len(normal), generator=generator)
        old, new = normal[order[:known]], normal[order[known:]]
        for kind, (p, count) in ways(old, new, config.density, args.folds, args.holdout).items():
            found.setdefault(kind, []).append(p.numpy())
            promises[kind] = count
    for kind, values in found.items():
        for rate in RATES:
            guarantee = FalseAlarmGuarantee(kind, promises[kind], rate)
            shares = (np.stack(values) <= guarantee.rate).mean(1)
            low, high = guarantee.interval
            row = {"category": config.category, "way": kind, "folds": args.folds if kind == "cross" else ""}
            row |= {"holdout": args.holdout if kind == "split" else "", "known": known, "new": len(normal) - known}
            row |= {"normal_scores": guarantee.count, "asked": rate, "promised": guarantee.rate}
            row |= {"promised_low": low, "promised_high": high, "splits": args.splits, "observed": shares.mean()}
            row |= {"standard_error": shares.std(ddof=1) / args.splits**0.5}
            row |= dict(zip(("observed_low", "observed_high"), np.quantile(shares, [0.05, 0.95])))
            row |= {"backbone": config.backbone, "level": config.levels[0], "density": config.density}
            row |= {"height": config.height, "width": config.width, "seed": args.seed}
            append(row | {"command": command(), "commit": commit(), "note": args.note}, args.results)


def normal_embeddings(args: argparse.Namespace, detector: Detector) -> tuple[Tensor, int]:
    """Embeddings (N, 1, D) of all normal images of the category, and how many are in train/good."""
    category, member = detector.config.category, detector.members[0]
    where = args.data_dir, category, detector.size, args.workers
    train, test = load_train(*where), load_test(*where)
    found = [[x for (x,) in stream(member, some, member.embed)] for some in (train, test.images)]
    known, tested = map(torch.cat, found)
    return torch.cat([known, tested[torch.from_numpy(test.labels == 0)]]).clone(), len(train)


def ways(old: Tensor, new: Tensor, density: str, folds: int, holdout: float) -> dict[str, tuple[Tensor, int]]:
    """p-values (M,) of new embeddings (M, 1, D), by normal scores of the known ones (N, 1, D) in each of three ways,
    and how many scores there are: held out, by folds, and as of a detector of one network without either, whose
    normal scores are by densities of the other folds, new ones by that of all."""
    score = lambda fitted, x: fit_density(density, fitted, True).score(x[:, 0][None])[0].double()  # noqa: E731
    held = round(holdout * len(old))
    normal = score(old[held:], old[:held])
    found = {"split": (p_values(score(old[held:], new)[None], [normal]), held)}
    fold = torch.arange(len(old)) % folds
    pairs = [(score(old[fold != k], new), score(old[fold != k], old[fold == k])) for k in range(folds)]
    found["cross"] = p_values(torch.stack([scores for scores, _ in pairs]), [own for _, own in pairs]), len(old)
    found["seen"] = p_values(score(old, new)[None], [held_out(density, old, True)[0][:, 0]]), len(old)
    return found


if __name__ == "__main__":
    run_script(main, get_parser())
