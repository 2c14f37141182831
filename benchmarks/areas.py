"""Which defects are found: image AUROC by the area of the defects -> results/areas.csv.

    python eval.py --type ball_screw --model_dir fast
    python benchmarks/areas.py Eval/fast --type ball_screw --group "_([0-9]+_[0-9]+)_crop"

Quarters of the anomalous images that have masks, by area, each against all normal test images. --group: what names the
group of an image in its file's name, such as the place that it shows; the AUROC over pairs of images of the same group
then says what is left if groups are not told apart. Reads images' masks, trains nothing.
"""

import argparse
import re
from pathlib import Path

import numpy as np
import pandas
from pandas import DataFrame
from record import add_record_flags, append, command, commit, read

from config import category
from dataset import find_mask
from reporting.metrics import auroc
from runtime.cli import Rule, new_parser, run_script
from runtime.files import InputError
from runtime.image_files import decode_mask

QUARTERS = ("smallest quarter", "second quarter", "third quarter", "largest quarter")
KEPT = ("recipe", "height", "width", "epochs", "seed", "device", "amp", "torch", "train_command", "eval_command")


def _is_group(text: str) -> bool:
    try:
        return re.compile(text).groups == 1
    except re.error:
        return False


def get_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    parser.add_argument("folder", type=Path, help="what eval.py wrote: scores.csv and results.csv")
    parser.add_argument(
        "--data_dir", default="Data", type=Path, metavar="DIR", help="of the categories (default: Data)"
    )
    parser.add_argument("--type", type=category, required=True, metavar="NAME", help="category")
    group = Rule(str, "a regular expression with one bracket", _is_group)
    parser.add_argument("--group", type=group, metavar="REGEX", help="its bracket names the group of an image")
    add_record_flags(parser, "areas.csv")
    return parser


def main(args: argparse.Namespace) -> None:
    scores, results = args.folder / "scores.csv", args.folder / "results.csv"
    if not (scores.is_file() and results.is_file()):
        raise InputError(f"{args.folder}: no scores.csv and results.csv in it; eval.py writes them")
    rows = pandas.read_csv(scores)
    rows = rows[rows.category == args.type]
    made = [row for row in read(results) if row["category"] == args.type]
    if not (len(rows) and made):
        raise InputError(f"{args.folder}: no category {args.type} in its tables")
    kept = {name: made[-1].get(name) for name in KEPT}
    for found in [*by_area(rows, args.data_dir), *(within_groups(rows, args.group) if args.group else [])]:
        row = {"category": args.type, **found, **kept, "command": command(), "commit": commit(), "note": args.note}
        append(row, args.results)


def by_area(rows: DataFrame, data_dir: Path) -> list[dict]:
    """Image AUROC of all, and of quarters of the anomalous images by area: in pixels of the mask as it is stored."""
    normal, anomalous = rows[rows.label == 0], rows[rows.label == 1]
    masks = {index: find_mask(data_dir / path) for index, path in anomalous.path.items()}
    area = {index: int(decode_mask(mask).sum()) for index, mask in masks.items() if mask is not None}
    if len(area) < len(QUARTERS):
        category = rows.category.iloc[0]
        raise InputError(f"{category}: {len(area)} anomalous images with a mask, {len(QUARTERS)} are needed")
    anomalous = anomalous.loc[sorted(area, key=area.get)]
    parts = [measured("all", rows)]
    for name, part in zip(QUARTERS, np.array_split(np.arange(len(anomalous)), len(QUARTERS))):
        own = anomalous.iloc[part]
        bounds = {"least_area": area[own.index[0]], "most_area": area[own.index[-1]]}
        parts.append(measured(name, pandas.concat([normal, own])) | bounds)
    return parts


def within_groups(rows: DataFrame, pattern: str) -> list[dict]:
    """Image AUROC of each group that has both kinds of images, and of all pairs of images of the same group."""
    names = [re.search(pattern, Path(path).name) for path in rows.path]
    if not all(names):
        missing = rows.path.iloc[names.index(None)]
        raise InputError(f"{missing}: --group {pattern} finds nothing in its name")
    groups = rows.assign(group=[name.group(1) for name in names]).groupby("group")
    parts = [measured(f"group {name}", own) for name, own in groups if own.label.nunique() == 2]
    if not parts:
        raise InputError(f"--group {pattern}: no group has both normal and anomalous test images")
    pairs = [part["normal"] * part["anomalous"] for part in parts]
    counts = {name: sum(part[name] for part in parts) for name in ("normal", "anomalous")}
    whole = np.average([part["image_auroc"] for part in parts], weights=pairs)
    return [{"part": "within groups", **counts, "image_auroc": float(whole)}, *parts]


def measured(part: str, rows: DataFrame) -> dict:
    counts = {"normal": int((rows.label == 0).sum()), "anomalous": int((rows.label == 1).sum())}
    return {"part": part, **counts, "image_auroc": auroc(rows.label.to_numpy(), rows.score.to_numpy())}


if __name__ == "__main__":
    run_script(main, get_parser())
