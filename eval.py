"""Score the test images of each category and say how well the detectors tell normal from anomalous.

    python eval.py --model_dir models
    python eval.py --model_dir patch_models --control 1 --save_maps 1

Prints the AUC lines of each category on stdout; writes tables, plots and anomaly maps to <eval_dir>/<name of
model_dir>/. Changes no detector, and chooses nothing by test images.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from config import (
    PATCH_SETTINGS,
    Config,
    SettingError,
    add_data_flags,
    add_given_flags,
    given_settings,
    storage,
    with_flag,
)
from dataset import TestSet, check_maps_folder, load_masks, load_test, load_train, save_maps, train_paths
from detector import Detector, find_work, load, load_config, scored_paths
from model import WeightsError
from reporting.gallery import gallery_page
from reporting.metrics import evaluate
from reporting.tables import (
    as_csv,
    decision_line,
    missing,
    normal_table,
    print_average,
    print_lines,
    print_seed_lines,
    result_row,
    score_table,
    seed_row,
)
from runtime.cli import choose_device, folder_name, html_file, new_parser, run_script, zero_or_one
from runtime.distributed import from_environment
from runtime.files import InputError, check_replaceable, say, write_files

AGREEING = ("backbone", "variant", "head_layer", "normalize", "size")
REFITTED = ("features", "level", "density", "l2", *(name for name in PATCH_SETTINGS if name != "patch_size"))


def get_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add_data_flags(parser)
    add_given_flags(parser, AGREEING, "network", "must agree with the detector, if given")
    note = "given: the density is fitted anew to train/good; default: the detector's own"
    add_given_flags(parser, REFITTED, "density and maps", note)
    add_given_flags(parser, ("false_alarm_rate",), "decisions", "given: instead of the detector's")
    add = parser.add_argument_group("output").add_argument
    add("--eval_dir", default="Eval", metavar="DIR", help="folder of tables and plots (default: Eval)")
    for name, default, help in (
        ("save_plots", True, "write plots"),
        ("control", False, "also score the untrained baseline: the network as training found it"),
        ("heatmaps", False, "maps of image-level models too, by Grad-CAM (patch models always make maps)"),
        ("save_maps", False, "write every map as a 16-bit TIFF of its image's size, in place of earlier ones"),
    ):
        text = f"{help} (default: {int(default)})"
        add(f"--{name}", type=zero_or_one, default=default, metavar="0|1", help=text)
    about = "an HTML file of all images by their scores, with heat maps of patch models"
    add("--report", type=html_file, metavar="FILE", help=about)
    return parser


def main(args: argparse.Namespace) -> None:
    here = from_environment()
    device = choose_device(args.cuda, here.local_rank)
    paths = find_work(args.model_dir, args.data_dir, args.type, here.is_main)
    for path in paths:  # all, before any hour is spent
        check_flags(args, path)
    if args.report:
        check_replaceable(args.report, "take another --report")
    out_dir = Path(args.eval_dir) / folder_name(args.model_dir)
    out_dir.mkdir(parents=True, exist_ok=True)

    with here.joined(False):
        results = []
        for path in here.shard(paths):
            seed = seed_of(args, path)
            try:
                results.append(evaluate_category(args, load(path, device), seed))
            except SettingError as error:
                raise InputError(with_flag(error)) from error
            except WeightsError as error:
                raise InputError(f"{error}; --control 1 needs the weights that training began with") from error
            if here.world_size == 1 and not seed:
                print_lines(results[-1].row)
        shards = here.gather(results)
    if shards is None:
        return  # the first rank has it
    results = [shards[number % here.world_size][number // here.world_size] for number in range(len(paths))]
    rows = [result.row for result in results]
    contents = {"results.csv": as_csv(rows)}
    if results[0].seed:
        rows = [seed_row(*zip_results(own)) for _, own in groupby(results, lambda result: result.row["category"])]
        contents["seeds.csv"] = as_csv(rows)
    if results[0].seed or here.world_size > 1:
        for row in rows:
            (print_seed_lines if results[0].seed else print_lines)(row)
    print_average(rows)
    # Only now, all at once: a bad image in the last category leaves earlier results, all but maps, as they were
    contents["scores.csv"] = as_csv([row for result in results for row in result.score_rows])
    if normal_rows := [row for result in results for row in result.normal_rows]:
        contents["normal_scores.csv"] = as_csv(normal_rows)
    for result in results:
        contents |= {str(Path(result.seed, name)): plot for name, plot in result.plots.items()}
    if args.save_plots:
        contents |= draw_summary(rows)
    files = {out_dir / name: content for name, content in contents.items()}
    if args.report:
        from reporting.gallery import render

        title = f"CutPaste: {folder_name(args.model_dir)}"
        files[Path(args.report)] = render([result.page for result in results], title).encode()
    write_files(files)
    say(f"tables{' and plots' if args.save_plots else ''} are in {out_dir}{'/' if args.save_plots else ''}")


# What there is to do ----------------------------------------------------------------------------------------------


def check_flags(args: argparse.Namespace, path: Path) -> None:
    """Hold the given flags against a detector file. Raises InputError on a contradiction, or if maps would lie among
    images."""
    config, given = load_config(path), given_settings(args)
    own = config.to_dict()
    for name in (*AGREEING, "height", "width"):
        if name in given and given[name] != own[name]:
            reason = f"{given[name]} was asked for, but {path} has {own[name]}; leave the flag out"
            raise InputError(with_flag(SettingError(name, reason)))
    if config.patches is None and (patch_only := [name for name in PATCH_SETTINGS if name in given]):
        raise InputError(f"--{patch_only[0]}: {path} is no patch model; leave the flag out or choose with --type")
    try:
        changed = Config.from_dict(own | changes(args))
    except SettingError as error:
        raise InputError(f"{with_flag(error)} ({path})") from error
    if config.patches is None and (args.heatmaps or args.save_maps) and not changed.has_gradient:
        flag = "--heatmaps" if args.heatmaps else "--save_maps"
        raise InputError(f"{path}: {flag} 1 needs a gradient, which the density {changed.density} has not; take torch")
    if args.save_maps:
        check_maps_folder(maps_folder(args, seed_of(args, path), config.category), args.data_dir)


def seed_of(args: argparse.Namespace, path: Path) -> str:
    """Return the name of the folder of a detector's seed, empty if there is one seed."""
    return path.parent.name if path.parent != Path(args.model_dir) else ""


def maps_folder(args: argparse.Namespace, seed: str, category: str) -> Path:
    return Path(args.eval_dir, folder_name(args.model_dir), seed, "maps", category)


def changes(args: argparse.Namespace) -> dict:
    """The settings of the density that were asked for."""
    return {name: value for name, value in given_settings(args).items() if name in REFITTED}


@dataclass(frozen=True)
class Result:
    """What the evaluation of one category leaves; plain, so that ranks can hand it on."""

    seed: str  # the folder of its seed, empty if there is one seed
    row: dict  # of results.csv
    score_rows: list[dict]  # of scores.csv
    normal_rows: list[dict]  # of normal_scores.csv
    page: object  # gallery.Page of the HTML report, or None
    labels: np.ndarray
    standardized: np.ndarray  # the scores in deviations from those of held-out normal images
    plots: dict[str, bytes]  # PNG files by name


def zip_results(results: Iterator[Result]) -> tuple[list[dict], np.ndarray, list[np.ndarray]]:
    """Rows, labels and scores of one category's seeds, for ``seed_row``."""
    results = list(results)
    return [each.row for each in results], results[0].labels, [each.standardized for each in results]


def evaluate_category(args: argparse.Namespace, detector: Detector, seed: str = "") -> Result:
    """Score and draw one category."""
    config, changed = detector.config, changes(args)
    category, where = config.category, (detector.config.size, args.workers, storage(args), detector.fill_index)
    train = load_train(args.data_dir, category, *where).images if changed or args.control else None
    if changed:
        detector = detector.refit(train, **changed)
        for note in detector.notes():
            say(f"{category}: {note}")
    if args.false_alarm_rate is not None:
        detector.set_false_alarm_rate(args.false_alarm_rate)
    test = load_test(args.data_dir, category, *where)
    with_maps = config.patches is not None or args.heatmaps or args.save_maps
    masks = load_masks(test, detector.config.size, args.workers).numpy() if with_maps else None
    found = evaluate(detector, test, masks)
    scores, p, maps, metrics = found
    untrained = None
    if args.control:  # its maps are large and not needed
        untrained, *_, others = evaluate(detector.untrained().fit(train, threshold=False), test, masks)
        metrics |= {f"control_{name}": value for name, value in others.items()}
    for note in missing(test, masks, metrics):
        say(f"{category}: {note}")
    if args.save_maps:
        save_maps(maps_folder(args, seed, category), Path(args.data_dir, category), test.paths, maps)
    row = result_row(detector, test, scores, p, metrics)
    say(f"{category}: {decision_line(row)}")
    plots = draw(detector, test, scores, untrained, masks, maps) if args.save_plots else {}
    score_rows = score_table(args.data_dir, category, test, scores, p, seed)
    standardized = detector.standardized_scores(scores)
    page = gallery_page(detector, test, found, seed) if args.report else None
    return Result(seed, row, score_rows, normal_rows(args, detector), page, test.labels, standardized, plots)


def normal_rows(args: argparse.Namespace, detector: Detector) -> list[dict]:
    """Rows of normal_scores.csv, if networks have judged images that they had not seen."""
    if detector.guarantee.kind == "seen":
        return []
    paths = scored_paths(train_paths(args.data_dir, detector.config.category), detector)
    if paths is None:
        found = "other training images than the detector's, so none of them in normal_scores.csv"
        say(f"{detector.config.category}: {found}")
        return []
    return normal_table(args.data_dir, detector, paths)


# Plots ------------------------------------------------------------------------------------------------------------


def draw(
    detector: Detector,
    test: TestSet,
    scores: np.ndarray,
    untrained: np.ndarray | None,
    masks: np.ndarray | None,
    maps: np.ndarray | None,
) -> dict[str, bytes]:
    """PNG files of one category by name: ROC curve, score histogram, t-SNE plot, sheet of heat maps."""
    from reporting import figures

    charts, config, threshold = {}, detector.config, detector.threshold.item()
    if len(set(test.labels.tolist())) == 2:
        charts["roc"] = figures.roc(config.category, test.labels, scores, untrained)
    line = (
        f"for {100 * config.false_alarm_rate:g} % false alarms"
        if detector.guarantee.holds
        else "the largest score of normal images"
    )
    charts["histogram"] = figures.score_histogram(
        config.category, scores, test.defect_types, threshold, line, detector.unit
    )
    if config.patches is None:
        embeddings, groups = figures.sample_views(detector, test)
        if len(embeddings) > 3:
            charts["tsne"] = figures.tsne(config.category, embeddings, groups)
    if maps is not None:
        unit = (threshold, detector.unit) if config.patches else (None, "Grad-CAM of the score (no unit)")
        cases = figures.choose_cases(test, scores, masks, maps)
        charts["heatmaps"] = figures.heat_sheet(config.category, cases, *unit)
    return {f"{config.category}/{name}.png": figures.png(figure) for name, figure in charts.items()}


def draw_summary(rows: list[dict]) -> dict[str, bytes]:
    """The chart over all categories that have an AUC."""
    from reporting import figures

    known = [row for row in rows if row["image_auroc"] is not None]
    return {"summary.png": figures.png(figures.summary(known))} if known else {}


if __name__ == "__main__":
    run_script(main, get_parser())
