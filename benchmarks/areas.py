"""Which defects are found: image AUROC by the area of the defects -> results/areas.csv.

    python eval.py --type ball_screw --model_dir fast
    python benchmarks/areas.py Eval/fast/scores.csv --type ball_screw --group "_([0-9]+_[0-9]+)_crop"

Quarters of the anomalous images that have masks, by area, each against all normal test images. --group: what names the
group of an image in its file's name, such as the place that it shows: the AUROC of scores standardized by the normal
test images of each group then says what is left if groups are not told apart. Reads images' masks, trains nothing.
"""

import argparse
import re
from pathlib import Path

import numpy as np
import pandas
from pandas import DataFrame
from record import add_record_flags, append, command, commit

from dataset import decode, find_mask
from metrics import auroc
from options import category
from runtime.files import InputError
from runtime.flags import new_parser
from runtime.script import run_script

PARTS = 4


def get_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    parser.add_argument("scores", type=Path, help="scores.csv that eval.py wrote")
    parser.add_argument(
        "--data_dir", default="Data", type=Path, metavar="DIR", help="folder of the categories (default: Data)"
    )
    parser.add_argument("--type", type=category, required=True, metavar="NAME", help="category")
    parser.add_argument("--group", metavar="REGEX", help="its first bracket names the group of an image")
    add_record_flags(parser, "areas.csv")
    return parser


def main(args: argparse.Namespace) -> None:
    if not args.scores.is_file():
        raise InputError(f"{args.scores}: no such file; eval.py writes it")
    rows = pandas.read_csv(args.scores)
    rows = rows[rows.category == args.type]
    if not len(rows):
        raise InputError(f"{args.scores}: no category {args.type}")
    for found in [*by_area(rows, args.data_dir), *(within_groups(rows, args.group) if args.group else [])]:
        row = {"category": args.type, **found, "command": command(), "commit": commit(), "note": args.note}
        append(row, args.results)


def by_area(rows: DataFrame, data_dir: Path) -> list[dict]:
    """Image AUROC of all, and of quarters of the anomalous images by area: in pixels of the mask as it is stored."""
    normal, anomalous = rows[rows.label == 0], rows[rows.label == 1]
    masks = {index: find_mask(data_dir / path) for index, path in anomalous.path.items()}
    masks = {index: mask for index, mask in masks.items() if mask is not None}
    if len(masks) < PARTS:
        raise InputError(f"{len(masks)} anomalous images with a mask, {PARTS} are needed")
    area = {index: int((decode(mask) > 0).any(2).sum()) for index, mask in masks.items()}
    anomalous = anomalous.loc[sorted(area, key=area.get)]
    parts = [("all", anomalous)]
    for part in np.array_split(np.arange(len(anomalous)), PARTS):
        own = anomalous.iloc[part]
        parts.append((f"{area[own.index[0]]} to {area[own.index[-1]]} px", own))
    return [measured(name, pandas.concat([normal, own])) for name, own in parts]


def within_groups(rows: DataFrame, pattern: str) -> list[dict]:
    """Image AUROC with each group's scores standardized by its normal test images, and in each group alone."""
    names = [re.search(pattern, Path(path).name) for path in rows.path]
    if not all(names):
        missing = rows.path.iloc[names.index(None)]
        raise InputError(f"{missing}: --group {pattern} finds nothing in its name")
    groups = rows.assign(group=[name.group(1) for name in names]).groupby("group")
    parts = []
    for name, own in groups:
        normal = own.score[own.label == 0]
        if len(normal) > 1 and (own.label == 1).any():
            parts.append((name, own.assign(score=(own.score - normal.mean()) / normal.std())))
    if not parts:
        raise InputError(f"--group {pattern}: no group has two normal test images and an anomalous one")
    whole = measured("standardized within groups", pandas.concat([own for _, own in parts]))
    return [whole, *(measured(f"group {name}", own) for name, own in parts)]


def measured(part: str, rows: DataFrame) -> dict:
    counts = {"normal": int((rows.label == 0).sum()), "anomalous": int((rows.label == 1).sum())}
    return {"part": part, **counts, "image_auroc": auroc(rows.label.to_numpy(), rows.score.to_numpy())}


if __name__ == "__main__":
    run_script(main, get_parser())
