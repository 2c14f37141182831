"""Score the test images of each category and say how well the detectors tell normal from anomalous.

Reads detectors from --model_dir and images and masks from --data_dir; writes tables, plots and anomaly maps to
--eval_dir/<name of model_dir>/ and the AUC lines of each category to stdout. Trains nothing, changes no detector.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

import options
import ranks
from dataset import InputError, TestSet, choose_categories, load_masks, load_test, load_train, read_size
from detector import PATCH_KEYS, SUFFIX, Detector, detector_path, load, write_file, write_files
from localization import GRID_KEYS, Grid
from metrics import image_metrics, pixel_metrics
from options import say

if TYPE_CHECKING:
    from plots import Figure

# Lines on stdout for columns of results.csv
LINES = {
    "image_auroc": "AUC",
    "pixel_auroc": "pixel AUROC",
    "aupro": "AUPRO",
    "control_auroc": "control AUC",
    "control_pixel_auroc": "control pixel AUROC",
}
SAMPLE_VIEWS = 60  # normal test images whose augmented views enter the t-SNE plot, at most
WORST = 2  # normal images with the highest and anomalous ones with the lowest scores on a sheet of heat maps


def get_parser() -> argparse.ArgumentParser:
    parser = options.new_parser(
        "Evaluate trained detectors: AUROC per category on stdout, tables and plots in Eval/.",
        "The AUROC needs normal and anomalous images in test/. Nothing here chooses a model or a threshold.",
    )
    options.add_data_flags(parser)
    options.add_density_flags(parser, None, "the detector's own")
    options.add_map_flags(parser, dict.fromkeys(PATCH_KEYS, "given: fit the density anew; default: the detector's own"))
    options.add_network_flags(parser, defaults=None)
    parser.add_argument("--eval_dir", default="Eval", metavar="DIR", help="folder of tables and plots (default: Eval)")
    parser.add_argument("--save_plots", type=options.zero_or_one, default=True, metavar="0|1", help="default: 1")
    parser.add_argument(
        "--control",
        type=options.zero_or_one,
        default=False,
        metavar="0|1",
        help="also score the network as training found it, with the same density (default: 0)",
    )
    parser.add_argument(
        "--heatmaps",
        type=options.zero_or_one,
        default=False,
        metavar="0|1",
        help="anomaly maps of image-level models too, by Grad-CAM (default: 0; patch models always make maps)",
    )
    parser.add_argument(
        "--save_maps",
        type=options.zero_or_one,
        default=False,
        metavar="0|1",
        help="write every anomaly map as a 16-bit TIFF of its image's size, in place of earlier ones (default: 0)",
    )
    return parser


def main(args: argparse.Namespace) -> None:
    here = ranks.from_environment()
    device = options.choose_device(args.cuda, here.local)
    categories = find_work(args.model_dir, args.data_dir, args.type, here.first)
    detectors = [open_detector(args, category, device) for category in categories]  # all, before any hour is spent
    out_dir = Path(args.eval_dir) / options.folder_name(args.model_dir)
    out_dir.mkdir(parents=True, exist_ok=True)

    with here.joined(False):
        results = []
        for detector in ranks.share(detectors, here):
            results.append(evaluate_category(args, detector))
            if here.count == 1:
                print_lines(results[-1].row)
        shares = here.gather(results)
    if shares is None:
        return  # the first rank has it
    results = [shares[number % here.count][number // here.count] for number in range(len(detectors))]
    rows = [result.row for result in results]
    if here.count > 1:
        for row in rows:
            print_lines(row)
    print_average(rows)
    # Only now, all at once: a bad image in the last category leaves earlier results (but maps, too large to be kept
    # until now) as they were
    contents = {
        "results.csv": as_csv(rows),
        "scores.csv": as_csv([row for result in results for row in result.score_rows]),
    }
    for result in results:
        contents |= result.plots
    if args.save_plots:
        contents |= as_png(draw_summary(rows))
    write_files({out_dir / name: content for name, content in contents.items()})
    say(f"tables{' and plots' if args.save_plots else ''} are in {out_dir}{'/' if args.save_plots else ''}")


# What there is to do ----------------------------------------------------------------------------------------------


def find_work(model_dir: str, data_dir: str, names: list[str], tell: bool = True) -> list[str]:
    """The categories to evaluate: those asked for, or each with both a detector and images; others are told."""
    folder = Path(model_dir)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; train first, or name the folder of detectors with --model_dir")
    trained = sorted(p.stem for p in folder.glob("*" + SUFFIX) if not p.name.startswith("."))
    found = choose_categories(data_dir, names)
    if names != ["all"]:
        missing = [name for name in found if name not in trained]
        if missing:
            raise InputError(f"{folder}: no detector for {', '.join(missing)}; train it with run_training.py --type")
        return found
    for name in trained:
        if name not in found and tell:
            say(f"{name}: has a detector in {folder} but no images in {data_dir}; not evaluated")
    for name in found:
        if name not in trained and tell:
            say(f"{name}: has images in {data_dir} but no detector in {folder}; not evaluated")
    both = [name for name in found if name in trained]
    if not both:
        raise InputError(f"{folder}: no detector for any category of {data_dir}; train one with run_training.py")
    return both


def open_detector(args: argparse.Namespace, category: str, device: torch.device) -> Detector:
    """Load one detector and hold the given flags against it. Raises InputError on a contradiction."""
    path = detector_path(args.model_dir, category)
    detector = load(path, device)
    given = {"variant": args.variant, "head_layer": args.head_layer, "normalize": args.normalize}
    if args.size is not None:
        given["height"], given["width"] = args.size
    for name, value in given.items():
        own = detector.config[name]
        if value is not None and value != own:
            flag = "size" if name in ("height", "width") else name
            raise InputError(f"--{flag}: {name} {value} was asked for, but {path} has {own}; leave the flag out")
    changes = changed(args)
    if detector.grid is None:
        if patch_only := [name for name in changes if name in PATCH_KEYS]:
            raise InputError(f"--{patch_only[0]}: {path} is no patch model; leave the flag out or choose with --type")
        if (args.heatmaps or args.save_maps) and changes.get("density", detector.config["density"]) == "kde":
            flag = "--heatmaps" if args.heatmaps else "--save_maps"
            raise InputError(f"{path}: {flag} 1 needs a gradient, which the density kde has not; take torch")
    else:
        if changes.get("density", "torch") != "torch":
            raise InputError(f"--density {args.density}: {path} is a patch model, whose density is torch")
        try:
            Grid(*detector.size, *((detector.config | changes)[name] for name in GRID_KEYS))
        except ValueError as error:
            raise InputError(f"--{error} ({path})") from error
    return detector


def changed(args: argparse.Namespace) -> dict:
    """The settings of the density that were asked for on the command line."""
    return {name: value for name in ("density", "l2", *PATCH_KEYS) if (value := getattr(args, name)) is not None}


# Evaluation -------------------------------------------------------------------------------------------------------


def evaluate(
    detector: Detector, test: TestSet, masks: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray | None, dict[str, float]]:
    """Scores (M,) float64 of the test images, anomaly maps (M, H, W) float32 if there are masks (M, H, W) to hold them
    against, and the metrics: of images only if there are both normal and anomalous ones, of pixels only if a mask marks
    some."""
    if masks is None:
        scores, maps = detector(test.images).cpu().numpy(), None
    else:
        scores, maps = np.empty(len(masks)), np.empty(masks.shape, dtype=np.float32)
        done = 0
        for some, their_maps in detector.maps(test.images):
            part = slice(done, done := done + len(some))
            scores[part], maps[part] = some.cpu().numpy(), their_maps.cpu().numpy()
    metrics = image_metrics(test.labels, scores) if 0 < test.labels.sum() < len(test.labels) else {}
    if masks is not None:
        known = test.with_truth
        truth = masks[known]
        if truth.any() and not truth.all():
            metrics |= pixel_metrics(truth, maps if known.all() else maps[known])
    return scores, maps, metrics


@dataclass(frozen=True)
class Result:
    """What the evaluation of one category leaves; plain, so that ranks can hand it on."""

    row: dict  # of results.csv
    score_rows: list[dict]  # of scores.csv
    plots: dict[str, bytes]  # PNG files by name


def evaluate_category(args: argparse.Namespace, detector: Detector) -> Result:
    """Score and draw one category."""
    category, changes = detector.config["category"], changed(args)
    train = None
    if changes or args.control:
        train = load_train(args.data_dir, category, detector.size, args.workers, options.storage(args))
    if changes:
        detector = detector.refit(train, **changes)
        if detector.grid is not None:
            say(f"{category}: {detector.density.choice}")
    test = load_test(args.data_dir, category, detector.size, args.workers, options.storage(args))
    with_maps = detector.grid is not None or args.heatmaps or args.save_maps
    masks = load_masks(test, detector.size, args.workers).numpy() if with_maps else None
    scores, maps, metrics = evaluate(detector, test, masks)
    if "image_auroc" not in metrics:
        kind = "anomalous" if not test.labels.any() else "normal"
        say(f"{category}: no {kind} test image, so no AUC; the scores are in scores.csv")
    control = None
    if args.control:
        untrained = detector.untrained().fit(train, threshold=False)
        control, control_metrics = evaluate(untrained, test, masks)[::2]  # its maps are large and not needed
        metrics |= {f"control_{name}": value for name, value in control_metrics.items()}
    if with_maps:
        tell_of_masks(category, test, masks)
    if args.save_maps:
        folder = Path(args.eval_dir) / options.folder_name(args.model_dir) / "maps"
        save_maps(folder / category, Path(args.data_dir) / category, test, maps)
    row = result_row(detector, test, scores, metrics)
    plots = as_png(draw(detector, test, scores, control)) if args.save_plots else {}
    if args.save_plots and with_maps:
        plots |= as_png(draw_maps(detector, test, scores, masks, maps))
    return Result(row, score_table(args.data_dir, detector, test, scores), plots)


def tell_of_masks(category: str, test: TestSet, masks: np.ndarray) -> None:
    """Say where the pixel metrics are missing, or of fewer images."""
    missing = int((~test.with_truth).sum())
    if missing and missing == test.labels.sum():
        say(f"{category}: no masks in ground_truth, so image metrics only")
        return
    if missing:
        say(f"{category}: {missing} anomalous images without a mask, left out of the pixel metrics")
    share = masks[test.with_truth].mean()
    if share in (0, 1) and test.labels.any():
        say(f"{category}: the masks mark {'every' if share else 'no'} pixel, so image metrics only")


def save_maps(folder: Path, images: Path, test: TestSet, maps: np.ndarray) -> None:
    """Write maps (M, H, W) as float16 TIFF files of their images' sizes, in place of those in the folder, as MVTec's
    evaluation script reads them: <folder>/test/<defect type>/<name>.tiff. images: folder of the category's images."""
    import io
    import shutil

    import tifffile

    targets = [(folder / path.relative_to(images)).with_suffix(".tiff") for path in test.paths]
    taken = set()
    for target, path in zip(targets, test.paths):
        if target in taken:
            raise InputError(
                f"{path}: another image of that name beside it, --save_maps 1 would mix them up; rename it"
            )
        taken.add(target)
    if folder.is_dir():
        shutil.rmtree(folder)  # maps of images that may have gone
    for path, target, values in zip(test.paths, targets, maps):
        size = read_size(path)
        values = functional.interpolate(torch.from_numpy(values)[None, None], size, mode="bilinear")[0, 0]
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, values.clamp(max=torch.finfo(torch.float16).max).half().numpy())
        write_file(buffer.getvalue(), target)


def print_lines(row: dict) -> None:
    """The lines of one category on stdout."""
    for column, name in LINES.items():
        if row[column] is not None:
            print(f"{row['category']} {name}: {row[column]}", flush=True)


def print_average(rows: list[dict]) -> None:
    for column, name in LINES.items():
        values = [row[column] for row in rows if row[column] is not None]
        if values:
            print(f"average {name}: {float(np.mean(values))}", flush=True)


def result_row(detector: Detector, test: TestSet, scores: np.ndarray, metrics: dict) -> dict:
    """One row of results.csv: figures as fractions, counts, and how detector and figures were made."""
    normal, anomalous = test.labels == 0, test.labels == 1
    above = scores > detector.threshold.item()
    row = {"category": detector.config["category"]}
    row |= {name: metrics.get(name) for name in ("image_auroc", "image_auprc", "best_f1")}
    row["control_auroc"] = metrics.get("control_image_auroc")
    row |= {name: metrics.get(name) for name in ("pixel_auroc", "aupro", "control_pixel_auroc")}
    row |= {
        "test_normal": int(normal.sum()),
        "test_anomalous": int(anomalous.sum()),
        "threshold": detector.threshold.item(),
        "normal_above_threshold": int(above[normal].sum()),
        "anomalous_above_threshold": int(above[anomalous].sum()),
    }
    row |= {name: value for name, value in detector.config.items() if name not in row}
    if detector.grid is not None:
        row["location_chosen"] = detector.density.location
    made = {("train_command" if name == "command" else name): value for name, value in detector.made.items()}
    return row | made | {"eval_command": options.command_line(), "eval_torch": str(torch.__version__)}


def score_table(data_dir: str, detector: Detector, test: TestSet, scores: np.ndarray) -> list[dict]:
    """Rows of scores.csv. Paths are relative to the data folder."""
    return [
        {
            "category": detector.config["category"],
            "path": path.relative_to(data_dir).as_posix(),
            "label": int(label),
            "defect_type": kind,
            "score": float(score),
        }
        for path, label, kind, score in zip(test.paths, test.labels, test.defect_types, scores)
    ]


def as_csv(rows: list[dict]) -> bytes:
    import pandas

    return pandas.DataFrame(rows).to_csv(index=False).encode()


def as_png(figures: dict[str, "Figure"]) -> dict[str, bytes]:
    import plots

    return {name: plots.png(figure) for name, figure in figures.items()}


# Plots ------------------------------------------------------------------------------------------------------------


def draw(detector: Detector, test: TestSet, scores: np.ndarray, control: np.ndarray | None) -> dict[str, "Figure"]:
    """ROC curve, score histogram and t-SNE plot of one category, by the names of their files."""
    import plots

    figures = {}
    category, kind = detector.config["category"], detector.config["density"]
    if len(set(test.labels.tolist())) == 2:
        figures[f"{category}/roc.png"] = plots.roc(category, test.labels, scores, control)
    unit = "negative log density" if kind == "kde" else "Mahalanobis distance (higher is more anomalous)"
    threshold, rate = detector.threshold.item(), detector.config["false_alarm_rate"]
    histogram = plots.score_histogram(category, scores, test.defect_types, threshold, rate, unit)
    figures[f"{category}/histogram.png"] = histogram
    if detector.grid is None:
        embeddings, groups = sample_views(detector, test)
        if len(embeddings) > 3:
            figures[f"{category}/tsne.png"] = plots.tsne(category, embeddings, groups)
    return figures


def draw_maps(
    detector: Detector, test: TestSet, scores: np.ndarray, masks: np.ndarray, maps: np.ndarray
) -> dict[str, "Figure"]:
    """A sheet of images, masks and heat maps."""
    import plots

    cases, known = [], test.with_truth
    for index, role in choose_cases(test, scores):
        name = "normal" if not test.labels[index] else test.defect_types[index].replace("_", " ")
        image = test.images[index].permute(1, 2, 0).numpy() / 255
        title = f"{name}, {role}\n{test.paths[index].name}: score {scores[index]:.3g}"
        cases.append((title, image, masks[index] if known[index] else None, maps[index]))
    category = detector.config["category"]
    if detector.grid is None:
        figure = plots.heat_sheet(category, cases, None, "Grad-CAM of the score (no unit)")
    else:
        figure = plots.heat_sheet(category, cases, detector.threshold.item(), "Mahalanobis distance")
    return {f"{category}/heatmaps.png": figure}


def choose_cases(test: TestSet, scores: np.ndarray) -> list[tuple[int, str]]:
    """What a sheet shows, by number, and why: of each kind the image with the median score, and the worst mistakes."""
    cases = {}
    for kind in dict.fromkeys(test.defect_types):
        own = np.flatnonzero(np.array(test.defect_types) == kind)
        cases[own[np.argsort(scores[own])[len(own) // 2]]] = "median"
    for label, sign, role in ((0, -1, "highest"), (1, 1, "lowest")):
        own = np.flatnonzero(test.labels == label)
        cases |= dict.fromkeys(own[np.argsort(sign * scores[own])][:WORST], role)
    return [(int(index), role) for index, role in cases.items()]


def draw_summary(rows: list[dict]) -> dict[str, "Figure"]:
    """The chart over all categories that have an AUC."""
    import plots

    known = [row for row in rows if row["image_auroc"] is not None]
    if not known:
        return {}
    controls = [row["control_auroc"] for row in known]
    controls = None if None in controls else controls
    return {"summary.png": plots.summary([r["category"] for r in known], [r["image_auroc"] for r in known], controls)}


def sample_views(detector: Detector, test: TestSet) -> tuple[np.ndarray, list[str]]:
    """Embeddings of the test images and of CutPaste views of the normal ones, which the network has never seen, and
    the group of each."""
    from cutpaste import VARIANTS, apply, make_params

    parts = [detector.embed(test.images)]
    groups = ["anomalous" if label else "normal" for label in test.labels]
    normal = test.images[np.flatnonzero(test.labels == 0)[:SAMPLE_VIEWS]]
    if len(normal):
        generator = torch.Generator().manual_seed(0)
        variant = detector.config["variant"]
        views, labels = apply(normal, make_params(variant, len(normal), *detector.size, generator))
        names = {"patch": "CutPaste", "scar": "CutPaste-Scar", "patch or scar": "CutPaste or Scar"}
        parts.append(detector.embed(views[labels > 0]))
        groups += [names[VARIANTS[variant].views[label]] for label in labels[labels > 0].tolist()]
    return torch.cat(parts).cpu().numpy(), groups


if __name__ == "__main__":
    options.run_script(main, get_parser())
