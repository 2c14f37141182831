"""Score images with a finished detector, whatever folders they are in.

    python predict.py models/bottle.pt photos
    python predict.py models/bottle.pt a.png b.png --format jsonl
    find photos -name '*.jpg' | python predict.py models/bottle.pt - --output scores.csv
    python predict.py models/bottle.pt inbox --watch --output scores.csv --heatmaps heat
    python predict.py --model_dir models photos        (photos/bottle, photos/screw, ...)
    python predict.py bottle.onnx photos               (what export.py has written; torch is not needed)

A row for each image, in the order of the command line, folders with their sub-folders by name:

    path        as it was given; if it begins with = + - @, after ./ so that no spreadsheet computes it
    score       higher is more anomalous
    p_value     share of normal images that look at least as unusual
    anomalous   1 if p_value is at most the false-alarm rate; else 0
    x y width height    of what a patch model calls anomalous: the strongest region of its map, in pixels of the file
    error       why the image could not be scored; the columns from score to height are empty then
    time        with --watch: when the image was scored
    bytes modified    size and time of the image file when it was scored

While watching, stderr tells of each anomalous image, and the report is made anew every minute; Ctrl-C ends it well.
The same command again continues an --output FILE where it stopped. Images that could not be scored, and those whose
file has changed since, are scored again; drawings and the report are made of all, if they are missing. Exit code: 0
done, 1 failed or some image could not be scored, 2 wrong usage, 3 with --fail_on_anomaly 1 if some image is anomalous.
"""

import argparse
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from config import FORMATS, SUFFIXES
from runtime.cli import (
    Interrupts,
    check_usage,
    choose_device,
    html_file,
    int_at_least,
    new_parser,
    number,
    one_of,
    progress_bar,
    run_script,
    size,
    zero_or_one,
)
from runtime.files import InputError, check_replaceable, check_writable, say, write_file

if TYPE_CHECKING:  # torch takes seconds to import, and an exported detector needs none
    import torch

    from config import Config
    from detector import Detector
    from reporting.gallery import Gallery

REPORT_SECONDS = 60  # between two reports while watching
NAMED_ERRORS = 5  # files that could not be scored, of each detector, that stderr names
FILES = (*SUFFIXES, ".json", ".normals")  # of a detector


def get_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    parser.usage = "%(prog)s DETECTOR IMAGE_OR_FOLDER ... [flags]\n       %(prog)s --model_dir DIR FOLDER [flags]"
    words = "a detector file, .pt or .onnx (not with --model_dir); then images, folders, or - for paths on stdin"
    parser.add_argument("paths", nargs="+", metavar="PATH", help=words)
    add = parser.add_argument_group("detector").add_argument
    add("--model_dir", metavar="DIR", help="folder of detectors; each scores the sub-folder with its name")
    add("--size", type=size, metavar="S|WxH", help="must agree with the detector, if given")
    rate = "share of new normal images that may be called anomalous (default: the detector's)"
    add("--false_alarm_rate", type=number(0, 1), metavar="X", help=rate)
    ignore = "patch models: image whose pixels that are not black are ignored, too, or a folder of <category>.png"
    add("--ignore", metavar="FILE|DIR", help=ignore + "; p-values only grow by it")
    add = parser.add_argument_group("output").add_argument
    add("--format", type=one_of(FORMATS), default="csv", metavar="|".join(FORMATS), help="of the rows (default: csv)")
    add("--output", metavar="FILE", help="file of the rows; an earlier run's is continued (default: stdout)")
    add("--overwrite", action="store_true", help="start --output anew, if the file holds rows")
    add("--heatmaps", metavar="DIR", help="folder for each image under its heat map; replaces earlier drawings")
    add("--masks", metavar="DIR", help="patch models: folder for a PNG of each image, 255 where anomalous, else 0")
    report = "HTML file of the images, the highest scores first; of patch models with heat maps"
    add("--report", type=html_file, metavar="FILE", help=report)
    explain = "folder for each anomalous image beside the nearest normal one (run_training.py --explain 1 keeps those)"
    add("--explain", metavar="DIR", help=explain)
    fail = "1: exit with 3 if an image is anomalous (default: 0)"
    add("--fail_on_anomaly", type=zero_or_one, default=False, metavar="0|1", help=fail)
    add("--watch", action="store_true", help="go on with files that come to the folders later, until Ctrl-C")
    second = "folder for copies of what needs a second look: images called anomalous, files that could not be scored"
    add("--copy_anomalous", metavar="DIR", help=second)
    add("--verbose", action="store_true", help="say all that the false-alarm rate promises")
    add = parser.add_argument_group("machine").add_argument
    add("--cuda", type=zero_or_one, default=False, metavar="0|1", help="use the GPU (default: 0)")
    workers = (
        "threads that decode images, and as many that score with an .onnx file (default: one per core, 16 at most)"
    )
    add("--workers", type=int_at_least(1), default=min(16, os.cpu_count() or 1), metavar="N", help=workers)
    return parser


def check_words(args: argparse.Namespace) -> None:
    """Raise ArgumentTypeError for words that are not a detector and images, or not a folder of folders; InputError for
    one that does not exist."""
    if args.model_dir is None:
        detector, *words = args.paths
        later = [word for word in words if word.endswith(SUFFIXES)]
        if os.path.isdir(detector) or (later and not detector.endswith(SUFFIXES)):
            what = "a folder" if os.path.isdir(detector) else "no detector"
            example = f"here {later[0]}" if later else "or --model_dir DIR for a folder of them"
            raise argparse.ArgumentTypeError(f"{detector}: is {what}; a detector file comes first, {example}")
        if not words:
            raise argparse.ArgumentTypeError("a detector file and images are needed, or --model_dir and a folder")
        if not os.path.isfile(detector):
            raise InputError(f"{detector}: no such file")
        for word in words:
            if word != "-" and not os.path.lexists(word):
                raise InputError(f"{word}: no such file or folder")
            if args.watch and not os.path.isdir(word):
                raise InputError(f"{word}: no folder; --watch looks at folders only")
    elif len(args.paths) > 1:
        raise argparse.ArgumentTypeError("--model_dir goes with one folder, of a sub-folder for each detector")


if __name__ == "__main__":
    check_usage(get_parser(), check_words)  # at once: what is imported below takes a while, torch seconds

from normals import load_normals, normals_path
from prediction.drift import Drift
from prediction.exported import ANEW as EXPORT_ANEW
from prediction.exported import Exported
from prediction.inputs import Task, list_paths, pair_folders, watch
from prediction.outputs import COLUMNS, Drawings, RowsFile, check_written, copy_below
from prediction.scorer import Model, Scorer
from runtime.image_files import read_size


def main(args: argparse.Namespace) -> None:
    tasks = find_tasks(args)
    checked = [check_detector(args, task.detector) for task in tasks]  # all, before any hour is spent
    drawings = Drawings(args.heatmaps, args.masks, args.explain)
    written = [*drawings.folders, *filter(None, [args.copy_anomalous])]  # those may lie within what is scored
    for task in tasks:
        task.paths = list_paths(task.words, written)
    check_files(args, tasks)
    drawings.prepare((path, task.folders) for task in tasks for path in task.paths)
    ignored = find_ignored(args, tasks, checked)
    columns = (*(["category"] if args.model_dir else []), *COLUMNS)
    with ExitStack() as stack:
        stop = stack.enter_context(Interrupts())
        rows = stack.enter_context(RowsFile(args.output, args.format, columns, args.overwrite))
        galleries: list[Gallery] = []
        stack.callback(write_report, args, galleries)  # after a signal too, of what was scored until then
        pool = stack.enter_context(ThreadPoolExecutor(args.workers))
        paths = [path for task in tasks for path in task.paths]
        done = sum(path in rows.done and not rows.outdated(path) for path in paths)
        on_screen = args.output is None and sys.stdout.isatty()  # the rows, which show how far it is
        bar = stack.enter_context(progress_bar("images", done, len(paths), not on_screen, "image"))
        tells = args.verbose or not rows.done  # what the rate promises: at the start of an output, not each time

        def tell(count: int) -> None:
            bar.update(count)
            halt(stop)

        watched: list[tuple[Task, Scorer, Drift]] = []  # with --watch all detectors are held, else one at a time
        try:
            for task, region in zip(tasks, ignored):
                model, detector = load_model(args, task, region, checked.pop(0), tells)
                scorer, drift = make_scorer(args, task, model, detector, drawings, galleries, pool)
                copy_earlier(args, task, rows)
                scorer.score(task.paths, rows, pool, tell)
                if args.watch:
                    watched.append((task, scorer, drift))
                else:
                    drift.on_end()
            for new_paths in watch_folders(args, tasks, rows, written, stop, galleries) if args.watch else ():
                for task, scorer, _ in watched:
                    scorer.score([path for path in new_paths if task.holds(path)], rows, pool, tell)
            for *_, drift in watched:
                drift.on_end()
            halt(stop)
        except KeyboardInterrupt:
            if not args.watch:  # which ends so
                raise
    if drawings.removed:
        say(f"{drawings.removed} panels of images that are not anomalous now are gone from {args.explain}")
    if args.explain:
        tell_of_no_panel(args, rows)
    count, anomalous, errors = rows.counts.values()
    say(f"{count} images, {anomalous} anomalous" + (f"; {errors} could not be scored, see their error" * bool(errors)))
    if errors or (anomalous and args.fail_on_anomaly):
        sys.stdout.flush()
        sys.exit(1 if errors else 3)


def halt(stop: Interrupts) -> None:
    """End as a signal asks for, now that rows are whole."""
    if stop.signal:
        if stop.signal == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + stop.signal)


def watch_folders(
    args: argparse.Namespace,
    tasks: list[Task],
    rows: RowsFile,
    written: list[str],
    stop: Interrupts,
    galleries: "list[Gallery]",
) -> Iterator[list[str]]:
    """Yield what comes to the folders until a signal; write the report every REPORT_SECONDS if it has changed."""
    folders = [folder for task in tasks for folder in task.words]
    shown, due = 0, time.monotonic() + REPORT_SECONDS
    for new_paths in watch(folders, rows, written, lambda: stop.signal):
        yield new_paths
        count = sum(gallery.count for gallery in galleries)
        if count > shown and time.monotonic() >= due:
            write_report(args, galleries)
            shown, due = count, time.monotonic() + REPORT_SECONDS


# Before anything is scored ----------------------------------------------------------------------------------------


def find_tasks(args: argparse.Namespace) -> list[Task]:
    """Return what the command line asks for; paths are not listed yet."""
    check_words(args)
    if args.model_dir is None:
        return [Task("", Path(args.paths[0]), args.paths[1:])]
    return pair_folders(args.model_dir, args.paths[0])


def torch_device(args: argparse.Namespace) -> "torch.device":
    """Import torch, say so since it takes seconds, and return the device that was asked for."""
    if "torch" not in sys.modules:
        print("loading torch and the detector", file=sys.stderr, flush=True)
    return choose_device(args.cuda)


def check_detector(args: argparse.Namespace, path: Path) -> "Config | Exported":
    """Return the settings of a detector file, or an exported detector. Raises InputError if they contradict the flags,
    or if the file is bad."""
    detector = check_exported(args, path) if path.suffix == SUFFIXES[1] else check_trained(args, path)
    if args.size not in (None, detector.size):
        asked, actual = (f"{width}x{height}" for height, width in (args.size, detector.size))
        raise InputError(f"--size: {asked} was asked for, but {path} has {actual}; leave the flag out")
    return detector


def check_exported(args: argparse.Namespace, path: Path) -> Exported:
    """Return an exported detector. Raises InputError for flags that need more than it holds, or if a file is bad."""
    exported = Exported.open(path, 1)  # by one thread a batch, see Model.of_exported
    for flag, reason in {
        "ignore": "which ignores what its detector ignored when it was exported",
        "cuda": "which is run on the CPU",
    }.items():
        if getattr(args, flag):
            raise InputError(f"--{flag}: {path} is an exported detector, {reason}; take {path.stem}.pt")
    for flag in ("masks", "heatmaps"):
        if getattr(args, flag) and not exported.has_maps:
            raise InputError(f"--{flag}: {path} is no patch model, it has no map; {path.stem}.pt draws --heatmaps")
    if args.explain:
        if exported.normals_digest is None:
            lacks = "gives nothing to find the nearest normal image by"
            raise InputError(f"--explain: {path} {lacks}; {EXPORT_ANEW} --explain 1")
        load_normals(normals_path(path), exported, exported=True, way_out=EXPORT_ANEW)
    return exported


def check_trained(args: argparse.Namespace, path: Path) -> "Config":
    """Return the settings of a detector file. Raises InputError if they contradict the flags, or if the file is bad."""
    torch_device(args)
    from dataset import ignored_path
    from density import has_gradient
    from detector import load, load_config

    config = load_config(path)
    if args.masks and config.patches is None:
        raise InputError(f"--masks: {path} is no patch model, it has no map; --heatmaps draws where its score is from")
    if args.heatmaps and config.patches is None and not has_gradient(config.density):
        raise InputError(f"--heatmaps: {path} needs a gradient, which the density {config.density} has not")
    if args.explain:
        load_normals(normals_path(path), load(path))
    if args.ignore and config.patches is None and ignored_path(args.ignore, config.category):
        raise InputError(f"--ignore: {path} is no patch model, it has no map; train it with run_training.py --ignore")
    return config


def check_files(args: argparse.Namespace, tasks: list[Task]) -> None:
    """Raise InputError if there is nothing to score, or if --output or --report would replace what is read, each
    other, or a report that is none of this program. What --output holds is checked where it is opened."""
    paths = [path for task in tasks for path in task.paths]
    if not paths and not args.watch:
        raise InputError(f"{', '.join(args.paths[args.model_dir is None :])}: no image found")
    detectors = [task.detector.with_suffix(suffix) for task in tasks for suffix in FILES]
    check_written((args.output, args.report), (*detectors, *paths))
    if args.report:
        check_replaceable(args.report, "take another --report")
        check_writable(Path(args.report).parent)


def find_ignored(
    args: argparse.Namespace, tasks: list[Task], configs: "list[Config | Exported]"
) -> "list[torch.Tensor | None]":
    """Return what each detector ignores beside its own, (H, W) bool, from a file of its size or of its first image's.
    Raises InputError if --ignore has nothing for any of them."""
    if not args.ignore:
        return [None] * len(tasks)
    from dataset import ignored_path, load_ignored

    ignored = []
    for task, config in zip(tasks, configs):
        path = ignored_path(args.ignore, config.category)
        file_size = None  # unknown where no image is readable: their rows say so
        for image in filter(os.path.isfile, task.paths if path else ()):
            with suppress(InputError):
                file_size = read_size(image)
                break
        ignored.append(load_ignored(path, config.size, file_size) if path else None)
    if all(region is None for region in ignored):
        names = ", ".join(config.category for config in configs)
        raise InputError(f"--ignore: {args.ignore} has no <category>.png for any of {names}")
    return ignored


# What scores ------------------------------------------------------------------------------------------------------


def load_model(
    args: argparse.Namespace, task: Task, ignored: "torch.Tensor | None", checked: "Config | Exported", tells: bool
) -> "tuple[Model, Detector | Exported]":
    """Return a task's model, with the ignored region (H, W) bool and the rate that were asked for, and the detector
    that it stands for; say what that rate promises, if it ``tells``. checked: what ``check_detector`` gave."""
    if isinstance(checked, Exported):
        model, detector = Model.of_exported(checked, args.false_alarm_rate, args.workers), checked
    else:
        from detector import load

        detector = load(task.detector, torch_device(args))
        if ignored is not None:
            detector.ignore_region(ignored)
        if args.false_alarm_rate is not None:
            detector.set_false_alarm_rate(args.false_alarm_rate)
        model = Model.of(detector, explain=bool(args.explain or (args.heatmaps and detector.config.patches is None)))
    guarantee = model.guarantee
    if tells:
        say(f"{model.category}: {guarantee.words() if args.verbose else guarantee.advice()}")
    return model, detector


def make_scorer(
    args: argparse.Namespace,
    task: Task,
    model: Model,
    detector: "Detector | Exported",
    drawings: Drawings,
    galleries: "list[Gallery]",
    pool: Executor,
) -> tuple[Scorer, Drift]:
    """Return what scores a task's images, and what compares them with normal ones and must be told when they end. Adds
    to the galleries that the report is made of. model, detector: of ``load_model``."""
    gallery, shows = None, []
    if args.report:
        from reporting.gallery import Gallery, facts_of

        gallery = Gallery(model.category, model, facts_of(*model.made, task.detector, task.words))
        galleries.append(gallery)
        shows.append(gallery.on_batch)
    warn = gallery.warnings.append if gallery else lambda words: None
    drift = Drift(model.category, model.appearance, model.guarantee, warn)
    if args.explain:
        from prediction.explain import Explainer

        normals = load_normals(normals_path(task.detector), detector, exported=isinstance(detector, Exported))
        target, remove = (partial(of, folders=task.folders) for of in (drawings.panel, drawings.remove_panel))
        shows.append(Explainer(model, normals, target, pool, remove).on_batch)
    draw = None
    if drawings.every_image:
        decided = {"threshold": model.threshold, "white": model.white}
        draw = partial(drawings.draw, folders=task.folders, **decided)
    first = {"category": task.category} if args.model_dir else {}
    lacks = lambda path, anomalous: bool(args.report) or drawings.lacks(path, task.folders, anomalous)  # noqa: E731
    on_rows = partial(second_look, args, task, gallery, [])
    return Scorer(model, args.workers, draw, [drift.on_batch], first, shows, lacks, args.watch, on_rows), drift


def second_look(
    args: argparse.Namespace, task: Task, gallery: "Gallery | None", named: list[str], rows: list[dict]
) -> None:
    """Copy the images of new rows that need a second look, if that is asked for. Tell of them while watching, else of
    the first errors, and of all errors in the report. named: the files whose errors have been told, which grows."""
    if gallery:
        gallery.on_rows(rows)
    for row in rows:
        if row["anomalous"] or row["error"]:
            if args.watch:
                say(f"{row['time']} {row['path']}: {row['error'] or 'anomalous, p {:.2g}'.format(row['p_value'])}")
            elif row["error"] and len(named) < NAMED_ERRORS:
                named.append(row["path"])
                say(f"{row['path']}: {row['error']}")
            if args.copy_anomalous:
                copy_below(args.copy_anomalous, row["path"], task.folders)


def copy_earlier(args: argparse.Namespace, task: Task, rows: RowsFile) -> None:
    """Copy the images that earlier rows call anomalous, if that is asked for."""
    for path in task.paths if args.copy_anomalous else ():
        if path in rows and rows.told[path][0]:
            copy_below(args.copy_anomalous, path, task.folders)


def tell_of_no_panel(args: argparse.Namespace, rows: RowsFile) -> None:
    """Say that no row is anomalous, if that is so, and how the most unusual image gets a panel nevertheless."""
    p_values = [(float(p), path) for path, (_, _, p, *_) in rows.told.items() if p]
    if rows.counts["anomalous"] or not p_values:
        return
    p, path = min(p_values)
    rate = f"--false_alarm_rate {math.ceil(1000 * p - 1e-6) / 1000:g}" + " and another --output" * bool(args.output)
    say(f"nothing was called anomalous, so there is no panel; {path} has the lowest p, {p:.2g}: {rate} draws it")


def write_report(args: argparse.Namespace, galleries: "list[Gallery]") -> None:
    """Write the HTML file of the images that have a score; leave it as it is if there is none."""
    if pages := [gallery.page() for gallery in galleries if gallery.count or gallery.unreadable]:
        from reporting.gallery import render

        title = f"CutPaste: {args.model_dir or Path(args.paths[0]).stem}"
        write_file(render(pages, title).encode(), args.report)
    elif args.report:
        say(f"nothing was scored, so {args.report} is not written")


if __name__ == "__main__":
    run_script(main, get_parser())
