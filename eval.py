"""Score the test images of each category, and say how well the detectors tell normal from anomalous images.

    python eval.py --model_dir models
    python eval.py --model_dir patch_models --control 1 --save_maps 1

Prints the AUC lines of each category on stdout. Writes tables, plots and anomaly maps to <eval_dir>/<name of
model_dir>/. Changes no detector, and chooses nothing by test images, unless --set_rate asks for it.
"""

import argparse
import math
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from config import (
    REFITTED,
    Config,
    SettingError,
    add_data_flags,
    add_given_flags,
    given_settings,
    refitted,
    storage,
    with_flag,
)
from runtime.cli import Rule, check_usage, choose_device, folder_name, html_file, new_parser, run_script, zero_or_one
from runtime.files import InputError, check_replaceable, check_writable, csv_table, say, write_files

AGREEING = ("backbone", "variant", "head_layer", "normalize", "size")  # settings that flags may repeat
MANY_BAD = 0.2  # share of good parts; a rate above it is only written if a person says it


costs = Rule(
    tuple,
    "the costs of a miss and of a false alarm, numbers of at least 0 and not both 0, such as 50:1",
    lambda value: len(value) == 2 and all(0 <= cost < 1e12 for cost in value) and any(value),
    lambda text: tuple(map(float, text.split(":"))),
)


def get_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add_data_flags(parser)
    add_given_flags(parser, AGREEING, "network", "must agree with the detector, if given")
    note = "given: the density is fitted anew to train/good; default: the detector's own"
    add_given_flags(parser, REFITTED, "density and maps", note)
    add_given_flags(parser, ("false_alarm_rate",), "decisions", "given: instead of the detector's")
    add = parser.add_argument_group("costs").add_argument
    about = (
        "of a missed anomalous part and of a false alarm, such as 50:1: say which rate costs least on the test images"
    )
    add("--costs", type=costs, metavar="MISS:FALSE_ALARM", help=about)
    about = "write that rate, or --false_alarm_rate, into the detector, which says from then on how it was chosen"
    add("--set_rate", action="store_true", help=about)
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


if __name__ == "__main__":
    check_usage(get_parser())  # at once: what is imported below takes seconds

import numpy as np
import torch

from conformal import BY_HAND
from dataset import TrainSet, check_maps_folder, load_masks, load_test, load_train, save_maps, train_paths
from density import has_gradient
from detector import EXPORT_AGAIN, Detector, find_work, load, load_config, save, scored_paths
from model import WeightsError
from reporting.gallery import Page, facts_of, gallery_page, render
from reporting.metrics import Evaluation, evaluate
from reporting.tables import (
    cost_columns,
    decision_line,
    missed_line,
    missing,
    normal_table,
    print_average,
    print_lines,
    print_seed_lines,
    result_row,
    score_table,
    seed_row,
)
from runtime.distributed import from_environment
from training.choice import with_settings


def main(args: argparse.Namespace) -> None:
    ranks = from_environment()
    device = choose_device(args.cuda, ranks.local_rank)
    paths = find_work(args.model_dir, args.data_dir, args.type, ranks.is_main)
    if args.set_rate and (bool(args.costs) == (args.false_alarm_rate is not None) or changes(args)):
        raise argparse.ArgumentTypeError(
            "--set_rate goes with either --costs or --false_alarm_rate, and with a detector as it is: no other density"
        )
    for path in paths:  # all of them, before any hour is spent
        check_flags(args, path)
    out_dir = Path(args.eval_dir) / folder_name(args.model_dir)
    check_writable(out_dir)
    if args.report:
        check_replaceable(args.report, "take another --report")
        check_writable(Path(args.report).parent)

    with ranks.joined(False):
        results = []
        for path in ranks.shard(paths):
            results.append(evaluate_category(args, path, device))
            if ranks.world_size == 1 and not results[-1].seed:
                print_lines(results[-1].row)  # now, not after all categories
        shards = ranks.gather(results)
    if shards is None:
        return  # the first rank has the results of all
    results = [shards[i % ranks.world_size][i // ranks.world_size] for i in range(len(paths))]
    contents = csv_files(results)
    if results[0].seed:
        rows = seed_rows(results)
        contents["seeds.csv"] = csv_table(rows)
        for row in rows:
            print_seed_lines(row)
    else:
        rows = [result.row for result in results]
        for row in rows if ranks.world_size > 1 else ():
            print_lines(row)
    print_average(rows)
    if args.save_plots:
        from reporting.figures import summary_plot

        contents |= {str(Path(result.seed, name)): png for result in results for name, png in result.plots.items()}
        contents |= summary_plot(rows)
    files = {out_dir / name: content for name, content in contents.items()}
    if args.report:
        title = f"CutPaste: {folder_name(args.model_dir)}"
        files[Path(args.report)] = render([result.page for result in results], title).encode()
    note = replaced(args, paths, out_dir)
    # Only now and all at once: a bad image in the last category leaves earlier files, all but maps, as they were
    write_files(files)
    for path, result in zip(paths, results) if args.set_rate else ():
        set_rate(path, result)
    say(f"tables{' and plots' if args.save_plots else ''} are in {out_dir}{'/' if args.save_plots else ''}{note}")


# One category -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """Hold what the evaluation of one detector leaves; plain, so that ranks can send it."""

    seed: str  # the name of the seed's folder, empty if there is one seed
    row: dict  # of results.csv
    chosen: str  # how its false-alarm rate was chosen, in words, if it is to be written into the detector
    score_rows: list[dict]  # of scores.csv
    normal_rows: list[dict]  # of normal_scores.csv
    plots: dict[str, bytes]  # PNG files by name
    page: Page | None  # of the HTML report
    labels: np.ndarray  # (M,)
    standardized: np.ndarray  # (M,): scores as deviations from the calibration scores


def evaluate_category(args: argparse.Namespace, path: Path, device: torch.device) -> Result:
    """Evaluate the detector of a file, with the changes that the flags ask for; write its maps, and nothing else.

    Raises InputError that names the flag where the changes cannot be.
    """
    detector, seed = load(path, device), seed_of(args, path)
    category, size, changed = detector.config.category, detector.config.size, changes(args)
    where = (args.data_dir, category, size, args.workers, storage(args), detector.fill_index, detector.white)
    test, train = load_test(*where), load_train(*where) if changed or args.control else None
    try:
        if changed:
            detector = with_settings(detector, changed, train.images).fit(train.images)
            for note in detector.notes():
                say(f"{category}: {note}")
        if args.control:
            baseline = detector.untrained().fit(train.images, threshold=False)
    except SettingError as error:
        raise InputError(with_flag(error)) from error
    except WeightsError as error:
        raise InputError(f"{error}; --control 1 needs the weights that training began with") from error
    if args.false_alarm_rate is not None:
        detector.set_false_alarm_rate(args.false_alarm_rate, BY_HAND if args.set_rate else "")

    with_maps = detector.config.patches is not None or args.heatmaps or args.save_maps
    masks = load_masks(test, size, args.workers).numpy() if with_maps else None
    evaluation, untrained = evaluate(detector, test, masks), None
    if args.control:
        untrained = replace(evaluate(baseline, test, masks), maps=None)  # large, and shown nowhere
    for note in missing(evaluation):
        say(f"{category}: {note}")
    if args.save_maps:
        save_maps(maps_folder(args, seed, category), Path(args.data_dir, category), test.paths, evaluation.maps)
    costs = cost_columns(evaluation, args.costs) if args.costs else {}
    chosen = choose_rate(args, evaluation, costs) if args.set_rate else ""
    row = result_row(evaluation, untrained) | costs
    if detector.rate_chosen not in ("", BY_HAND):
        say(f"{category}: {detector.rate_chosen}; on the same images, decisions look better than on new ones")
    say(f"{category}: {decision_line(row)}")
    as_trained = not (changed or detector.rate_chosen or args.false_alarm_rate is not None)
    if as_trained and not args.costs and (words := missed_line(row)):
        say(f"{category}: {words}")
    plots = {}
    if args.save_plots:
        from reporting.figures import evaluation_plots  # matplotlib takes a second to import

        plots = evaluation_plots(evaluation, untrained)
    return Result(
        seed,
        row,
        chosen,
        score_table(evaluation, args.data_dir, seed),
        normal_rows(args, detector, train),
        plots,
        report_page(args, evaluation, seed, path) if args.report else None,
        test.labels,
        detector.standardized_scores(evaluation.scores),
    )


def report_page(args: argparse.Namespace, evaluation: Evaluation, seed: str, path: Path) -> Page:
    """Return the page of a category in the report. path: of the detector's file."""
    detector, folder = evaluation.detector, Path(args.data_dir, evaluation.category, "test")
    warnings = [f"{note[0].upper()}{note[1:]}." for note in missing(evaluation)]
    page = gallery_page(evaluation, seed, args.costs, args.workers)
    made = detector.config.to_dict(), detector.metadata, f"torch {torch.__version__}"
    return replace(page, facts=facts_of(*made, path, [folder]), warnings=warnings)


def choose_rate(args: argparse.Namespace, evaluation: Evaluation, costs: dict) -> str:
    """Let an evaluated detector decide at the rate that costs least, and return how it was chosen, in words; without
    such a rate, or where it is above MANY_BAD, it stays as it is, and the words are empty. costs: the columns of
    ``cost_columns``."""
    if not args.costs:
        return BY_HAND  # --false_alarm_rate
    if not costs:
        return ""
    rate, (miss, false_alarm), labels = costs["cheapest_rate"], args.costs, evaluation.test.labels
    if rate > MANY_BAD:
        reason = f"about {100 * rate:.0f} of 100 good parts would be called bad; a cheaper miss brings it down"
        anyway = f"--false_alarm_rate {math.ceil(1000 * rate - 1e-6) / 1000:g} --set_rate writes it nevertheless"
        say(f"{evaluation.category}: {rate:.3g} is not written into the detector: {reason}, {anyway}")
        return ""
    count = f"{(labels == 0).sum()} normal and {(labels == 1).sum()} anomalous labelled images"
    chosen = f"The rate was chosen by {count}, at costs of {miss:g} for a miss and {false_alarm:g} for a false alarm"
    evaluation.detector.set_false_alarm_rate(rate, chosen)
    return chosen


def set_rate(path: Path, result: Result) -> None:
    """Write the rate of an evaluation into a detector file, if --set_rate has chosen it."""
    if not result.chosen:
        return
    rate = result.row["false_alarm_rate"]
    save(load(path).set_false_alarm_rate(rate, result.chosen), path)
    say(f"{result.row['category']}: {path} decides at {rate:.3g} from now on; {EXPORT_AGAIN}")


def normal_rows(args: argparse.Namespace, detector: Detector, train: TrainSet | None) -> list[dict]:
    """Return the rows of normal_scores.csv: none if the networks have seen the images of the calibration scores, or if
    the training images are not the detector's. train: the training images, if they are loaded."""
    if detector.guarantee.kind == "seen":
        return []
    category = detector.config.category
    paths = scored_paths(train.paths if train else train_paths(args.data_dir, category), detector)
    if paths is None:
        say(f"{category}: other training images than the detector's, so none of them in normal_scores.csv")
        return []
    return normal_table(detector, paths, args.data_dir)


# All categories ---------------------------------------------------------------------------------------------------


def csv_files(results: list[Result]) -> dict[str, bytes]:
    """Return the CSV files by name, over all categories and seeds."""
    rows = {
        "results.csv": [result.row for result in results],
        "scores.csv": [row for result in results for row in result.score_rows],
        "normal_scores.csv": [row for result in results for row in result.normal_rows],
    }
    return {name: csv_table(rows[name]) for name in rows if rows[name]}


def seed_rows(results: list[Result]) -> list[dict]:
    """Return the rows of seeds.csv, one for each category. results: by category, then by seed."""
    rows = []
    for _, group in groupby(results, lambda result: result.row["category"]):
        seeds = list(group)
        scores = [result.standardized for result in seeds]
        rows.append(seed_row([result.row for result in seeds], seeds[0].labels, scores))
    return rows


def replaced(args: argparse.Namespace, paths: list[Path], out_dir: Path) -> str:
    """Return in words that earlier tables are replaced by those of other densities than the detectors' own; empty if
    they are not."""
    if not changes(args) or not (out_dir / "results.csv").exists():
        return ""
    stored_settings = [load_config(path).to_dict() for path in paths]
    given = given_settings(args)
    if all(refitted(Config.from_dict(settings), given).to_dict() == settings for settings in stored_settings):
        return ""
    return ", of other densities than the detectors' own, in place of earlier ones; another --eval_dir keeps both"


# Flags ------------------------------------------------------------------------------------------------------------


def check_flags(args: argparse.Namespace, path: Path) -> None:
    """Compare the given flags with a detector file. Raises InputError on a contradiction, or if maps would lie among
    images."""
    config, given = load_config(path), given_settings(args)
    settings = config.to_dict()
    for name in (*AGREEING, "height", "width"):
        if name in given and given[name] != settings[name]:
            reason = f"{given[name]} was asked for, but {path} has {settings[name]}; leave the flag out"
            raise InputError(with_flag(SettingError(name, reason)))
    try:
        changed = refitted(config, given)
    except SettingError as error:
        raise InputError(f"{with_flag(error)} ({path})") from error
    if config.patches is None and (args.heatmaps or args.save_maps) and not has_gradient(changed.density):
        flag = "--heatmaps" if args.heatmaps else "--save_maps"
        raise InputError(f"{path}: {flag} 1 needs a gradient; the density {changed.density} has none, take torch")
    if args.save_maps:
        check_maps_folder(maps_folder(args, seed_of(args, path), config.category), args.data_dir)


def changes(args: argparse.Namespace) -> dict:
    """Return the settings of the density that the flags ask for."""
    return {name: value for name, value in given_settings(args).items() if name in REFITTED}


def seed_of(args: argparse.Namespace, path: Path) -> str:
    """Return the name of the folder of a detector's seed, empty if there is one seed."""
    return path.parent.name if path.parent != Path(args.model_dir) else ""


def maps_folder(args: argparse.Namespace, seed: str, category: str) -> Path:
    return Path(args.eval_dir, folder_name(args.model_dir), seed, "maps", category)


if __name__ == "__main__":
    run_script(main, get_parser())
