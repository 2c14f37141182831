"""Are the good photographs all good, and are they enough? Answers from the normal images of each category.

    python run_training.py --model_dir five --patch_size 64 --epochs 0 --folds 5
    python check_data.py --model_dir five

Prints three lines for each category on stdout and writes to <eval_dir>/<name of model_dir>/<category>/:

    duplicates.csv      pictures that are there twice: kind exact (the same pixels at the detector's size) or near
                        (encoded again, lighter, moved by a pixel), two paths, similarity; within train/good, and
                        between it and test, whose figures are then too good
    suspicious.csv      training images, the most unusual first, by a network that has not seen them, if there is one
                        (--folds, --holdout); p_value: share of them, itself counted in, that look as unusual
    suspicious.png      the first twelve and their heat maps
    enough.csv, .png    what new normal images score when the densities are fitted to fewer images

Trains nothing and changes no detector.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

import options
from conformal import own_p_values
from dataset import TestSet, load_test, load_train, train_paths
from detector import Detector, load
from duplicates import Pair, find_duplicates
from enough import curve_rows, fit_subsets, verdict
from matching import find_work, scored_images, scored_paths
from report import as_csv, normal_table
from runtime.cache import ImageArray
from runtime.files import InputError, say, write_files
from runtime.flags import new_parser
from runtime.script import choose_device, folder_name, run_script

SHOWN, NAMED = 12, 3  # of the most unusual images: on the sheet, on stdout


def get_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    options.add_data_flags(parser)
    add = parser.add_argument_group("output").add_argument
    add("--eval_dir", default="Eval", metavar="DIR", help="folder of tables and plots (default: Eval)")
    return parser


def main(args: argparse.Namespace) -> None:
    device = choose_device(args.cuda)
    work: dict[str, Path] = {}
    for path in find_work(args.model_dir, args.data_dir, args.type):
        work.setdefault(path.stem, path)  # of several seeds the first
    out_dir = Path(args.eval_dir) / folder_name(args.model_dir)
    for category, path in work.items():
        detector = load(path, device)
        if scored_paths(args.data_dir, detector) is None:
            count = len(train_paths(args.data_dir, category))
            found = f"made from other images than the {count} of {Path(args.data_dir, category, 'train/good')}"
            raise InputError(f"{path}: {found}; train it again")
        where = (args.data_dir, category, detector.size, args.workers, options.storage(args))
        images = load_train(*where)
        test = load_test(*where) if Path(args.data_dir, category, "test").is_dir() else None
        files = check_duplicates(args.data_dir, category, images, test)
        files |= check_suspicious(args.data_dir, detector, images)
        files |= check_enough(detector, images, test)
        write_files({out_dir / category / name: content for name, content in files.items()})
    say(f"tables and plots are in {out_dir}/")


# One category, one question: files by name out, a line on stdout --------------------------------------------------


def check_duplicates(data_dir: str, category: str, images: ImageArray, test: TestSet | None) -> dict[str, bytes]:
    inside, between = find_duplicates(images, None if test is None else test.images)
    line = f"{category} duplicates: {counted(inside)} within train"
    print(line + ("" if test is None else f", {counted(between)} between train and test"), flush=True)
    train = [path.relative_to(data_dir).as_posix() for path in train_paths(data_dir, category)]
    tested = [] if test is None else [path.relative_to(data_dir).as_posix() for path in test.paths]
    rows = [(pair.kind, train[pair.first], train[pair.second], pair.similarity) for pair in inside]
    rows += [(pair.kind, train[pair.first], tested[pair.second], pair.similarity) for pair in between]
    columns = ("kind", "path", "other", "similarity")
    return {"duplicates.csv": as_csv([dict(zip(columns, row)) for row in rows], columns)}


def counted(pairs: list[Pair]) -> str:
    exact = sum(pair.kind == "exact" for pair in pairs)
    return f"{exact} exact and {len(pairs) - exact} near"


def check_suspicious(data_dir: str, detector: Detector, images: ImageArray) -> dict[str, bytes]:
    """By normal_scores, and maps by the member that has not seen the image."""
    import plots

    config, scores = detector.config, detector.normal_scores.cpu()
    rows = normal_table(data_dir, detector, scored_paths(data_dir, detector))
    order = scores.argsort(descending=True)
    p = own_p_values(scores)[order].tolist()
    rows = [row | {"p_value": value} for row, value in zip(rows, p)]
    named = ", ".join(f"{Path(row['path']).name} ({row['score']:.3g})" for row in rows[:NAMED])
    print(f"{config.category} suspicious: {named}", flush=True)
    if config.holdout:
        say(f"{config.category}: {len(rows)} of {len(images)} images were held out; only they are judged")
    elif len(detector.members) == 1:
        seen = "the network has seen all these images, the density of a map too: defects may look normal to them"
        say(f"{config.category}: {seen}; train with --folds 5 to be sure")
    with_map = config.patches is not None or config.has_gradient
    cases = []
    for row, number in zip(rows[:SHOWN], scored_images(detector, len(images))[order].tolist()):
        image = images[number : number + 1]
        title = f"{Path(row['path']).name}\nscore {row['score']:.3g}, p {row['p_value']:.2g}"
        heat = unseen_map(detector, image, number) if with_map else None
        cases.append((title, image[0].permute(1, 2, 0).numpy() / 255, None, heat))
    level = detector.threshold.item() if config.patches else None
    unit = ("standardized " if len(detector.members) > 1 else "") + detector.members[0].unit
    unit = unit if config.patches else "Grad-CAM of the score (no unit)"
    what = "the most unusual training images, heat maps"
    sheet = plots.heat_sheet(config.category, cases, level, unit, what, with_masks=False)
    return {"suspicious.csv": as_csv(rows), "suspicious.png": plots.png(sheet)}


@torch.inference_mode()
def unseen_map(detector: Detector, image: torch.Tensor, number: int) -> np.ndarray:
    """Map (H, W) float32 of normal image ``number`` (1, 3, H, W) uint8 by the member that has not seen it."""
    member = detector.members[number % len(detector.members)]  # as member.unseen_by has it
    image = image.to(detector.device)
    _, maps = member(image) if detector.config.patches else member.grad_cam(image)
    return maps[0].cpu().numpy()


def check_enough(detector: Detector, images: ImageArray, test: TestSet | None) -> dict[str, bytes]:
    import plots

    category, labels = detector.config.category, None if test is None else test.labels
    if len(detector.members) > 1:
        say(f"{category}: the curve is of the first of {len(detector.members)} networks, alone")
    found = fit_subsets(detector, images, None if test is None else test.images)
    if not found:
        print(f"{category} enough: {len(images)} images are too few to tell", flush=True)
        return {}
    rows = [{"category": category} | row for row in curve_rows(found, labels)]
    print(f"{category} enough: {verdict(rows)}", flush=True)
    return {"enough.csv": as_csv(rows), "enough.png": plots.png(plots.enough(category, rows))}


if __name__ == "__main__":
    run_script(main, get_parser())
