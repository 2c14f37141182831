"""Score images with a finished detector, whatever folders they are in.

    python predict.py models/bottle.pt photos
    python predict.py models/bottle.pt a.png b.png --format jsonl
    find photos -name '*.jpg' | python predict.py models/bottle.pt - --output scores.csv
    python predict.py models/bottle.pt inbox --watch --output scores.csv --heatmaps heat
    python predict.py --model_dir models photos        (photos/bottle, photos/screw, ...)

A row for each image, in the order of the command line, folders with their sub-folders by name:

    path        as it was given; one that begins with = + - @ gets ./ before it, so that no spreadsheet computes it
    score       higher is more anomalous
    p_value     share of normal images that look at least as unusual
    anomalous   1 if p_value is at most the rate that is told at the start, else 0
    x y width height    patch models: the strongest region of the map above the threshold, in pixels of the image
    error       why an image could not be scored; the others are empty then

The same command again continues an --output FILE where it stopped. Exit code: 0 done, 1 failed or some image could not
be scored, 2 wrong usage, 3 with --fail_on_anomaly 1 if some image is anomalous.
"""

import argparse
import os
import signal
import sys
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from config import Config
from dataset import ignored_path, load_ignored
from detector import SUFFIX, Detector, detector_path, load, load_config
from normals import load_normals, normals_path
from prediction.drift import Drift
from prediction.explain import Explainer
from prediction.inputs import listed, watch
from prediction.outputs import COLUMNS, FORMATS, Drawings, RowsFile
from prediction.scorer import Scorer
from reporting.gallery import Gallery
from runtime.cli import (
    Interrupts,
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
from runtime.files import InputError, check_replaceable, say, write_file
from runtime.image_files import read_size


def get_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    parser.usage = "%(prog)s DETECTOR IMAGE_OR_FOLDER ... [flags]\n       %(prog)s --model_dir DIR FOLDER [flags]"
    words = "a detector file (not with --model_dir); then images, folders, or - for a list of paths on stdin"
    parser.add_argument("paths", nargs="+", metavar="PATH", help=words)
    add = parser.add_argument_group("detector").add_argument
    add("--model_dir", metavar="DIR", help="folder of detectors; each scores the sub-folder with its name")
    add("--size", type=size, metavar="S|WxH", help="must agree with the detector, if given")
    rate = "call so many of new normal images anomalous, as a share (default: the detector's)"
    add("--false_alarm_rate", type=number(0, 1), metavar="X", help=rate)
    ignore = "patch models: mask, or folder of <category>.png, of what does not count either; p-values only grow by it"
    add("--ignore", metavar="FILE", help=ignore)
    add = parser.add_argument_group("output").add_argument
    add("--format", type=one_of(FORMATS), default="csv", metavar="|".join(FORMATS), help="of the rows (default: csv)")
    add("--output", metavar="FILE", help="write rows there, and continue what is there (default: stdout)")
    add("--overwrite", action="store_true", help="start --output anew, if the file holds rows")
    add("--heatmaps", metavar="DIR", help="draw each image under its heat; earlier drawings are replaced")
    add("--masks", metavar="DIR", help="patch models: a PNG of what is above the threshold, 255 of 0 and 255")
    about = "an HTML file of the images that are scored, the highest scores first, with heat maps of patch models"
    add("--report", type=html_file, metavar="FILE", help=about)
    why = "draw each anomalous image next to the normal one nearest to it, as run_training.py --explain 1 keeps them"
    add("--explain", metavar="DIR", help=why)
    fail = "exit with 3 if an image is anomalous (default: 0)"
    add("--fail_on_anomaly", type=zero_or_one, default=False, metavar="0|1", help=fail)
    add("--watch", action="store_true", help="go on with the files that come to the folders, until Ctrl-C")
    add = parser.add_argument_group("machine").add_argument
    add("--cuda", type=zero_or_one, default=False, metavar="0|1", help="use the GPU (default: 0)")
    workers = "threads that decode images (default: one per core, 8 at most)"
    add("--workers", type=int_at_least(1), default=min(8, os.cpu_count() or 1), metavar="N", help=workers)
    return parser


def main(args: argparse.Namespace) -> None:
    tasks, device = find_tasks(args), choose_device(args.cuda)
    configs = [check(args, task) for task in tasks]  # all, before any hour is spent
    drawings = Drawings(args.heatmaps, args.masks, args.explain)
    lists = [listed(task.words, drawings.folders) for task in tasks]  # the folders may lie within what is scored
    if not any(lists) and not args.watch:
        raise InputError(f"{', '.join(args.paths[args.model_dir is None :])}: no image found")
    check_files(args, tasks, lists)
    check_drawings(drawings, tasks, lists)
    masks = [find_mask(args, config, paths) for config, paths in zip(configs, lists)]
    if args.ignore and not any(mask is not None for mask in masks):
        names = ", ".join(config.category for config in configs)
        raise InputError(f"--ignore: {args.ignore} has no <category>.png for any of {names}")
    columns = (*(["category"] if args.model_dir else []), *COLUMNS)
    with ExitStack() as stack:
        stop = stack.enter_context(Interrupts())
        rows = stack.enter_context(RowsFile(args.output, args.format, columns, args.overwrite))
        galleries: list[Gallery] = []
        stack.callback(write_report, args, galleries)  # of what was scored until a signal too
        pool = stack.enter_context(ThreadPoolExecutor(args.workers))
        total, done = sum(map(len, lists)), sum(path in rows.done for paths in lists for path in paths)
        bar = stack.enter_context(progress_bar("images", done, total, True, "image"))

        def tell(count: int) -> None:
            bar.update(count)
            halt(stop)

        scorers = []
        for task, paths, mask in zip(tasks, lists, masks):
            detector = load(task.detector, device)
            if mask is not None:
                detector.ignore_region(mask)
            scorer = make_scorer(args, task, detector, drawings, pool)
            galleries += [each for each in scorer.callbacks if isinstance(each, Gallery)]
            scorer.score(paths, rows, pool, tell)
            if not args.watch:
                scorer.on_end()
            scorers = [*scorers, scorer] if args.watch else []  # else one is held at a time
        if args.watch:
            folders = [folder for task in tasks for folder in task.words]
            for ready in watch(folders, rows.done, drawings.folders, lambda: stop.signal):
                for task, scorer in zip(tasks, scorers):
                    scorer.score([path for path in ready if task.holds(path)], rows, pool, tell)
            for scorer in scorers:
                scorer.on_end()
            halt(stop)
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


# What there is to do ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """Images for one detector. category: empty if there is only one; words: files, folders and -; root: the folder
    that drawings are named from, of several categories."""

    category: str
    detector: Path
    words: list[str]
    root: str | None = None

    @property
    def folders(self) -> list[str]:
        return [self.root] if self.root else [word for word in self.words if os.path.isdir(word)]

    def holds(self, path: str) -> bool:
        """Whether a path is in one of its folders."""
        return any(os.path.relpath(path, word).split(os.sep)[0] != os.pardir for word in self.words)


def find_tasks(args: argparse.Namespace) -> list[Task]:
    if args.model_dir is None:
        first, *words = args.paths
        if not words:
            raise argparse.ArgumentTypeError("a detector file and images are needed, or --model_dir and a folder")
        tasks = [Task("", Path(first), words)]
    else:
        if len(args.paths) > 1:
            raise argparse.ArgumentTypeError("--model_dir goes with one folder, of a sub-folder for each detector")
        root, models = args.paths[0], Path(args.model_dir)
        for folder in (args.model_dir, root):
            if not os.path.isdir(folder):
                raise InputError(f"{folder}: no such folder")
        names = sorted(path.name for path in Path(root).iterdir() if path.is_dir() and not path.name.startswith("."))
        trained = sorted(path.stem for path in models.glob("*" + SUFFIX) if not path.name.startswith("."))
        for name in sorted({*names} ^ {*trained}):
            say(f"{name}: has {'images but no detector' if name in names else 'a detector but no images'}; left out")
        both = [name for name in names if name in trained]
        if not both:
            raise InputError(f"{root}: no sub-folder that is named like a detector in {models}")
        tasks = [Task(name, detector_path(models, name), [os.path.join(root, name)], root) for name in both]
    for word in (word for task in tasks for word in task.words if args.watch):
        if not os.path.isdir(word):
            raise InputError(f"{word}: no folder; --watch looks at folders only")
    return tasks


def check(args: argparse.Namespace, task: Task) -> Config:
    """Hold the flags against a detector file, whose settings come back. Raises InputError on a contradiction, or if the
    file is bad."""
    config, path = load_config(task.detector), task.detector
    own = (config.height, config.width)
    if args.size not in (None, own):
        asked, has = (f"{width}x{height}" for height, width in (args.size, own))
        raise InputError(f"--size: {asked} was asked for, but {path} has {has}; leave the flag out")
    if args.masks and config.patches is None:
        raise InputError(f"--masks: {path} is no patch model, it has no map; --heatmaps draws where its score is from")
    if args.heatmaps and config.patches is None and not config.has_gradient:
        raise InputError(f"--heatmaps: {path} needs a gradient, which the density {config.density} has not")
    if args.explain:
        load_normals(normals_path(path), load(path))
    if args.ignore and config.patches is None and ignored_path(args.ignore, config.category):
        raise InputError(f"--ignore: {path} is no patch model, it has no map; train it with run_training.py --ignore")
    return config


def find_mask(args: argparse.Namespace, config: Config, paths: list[str]) -> Tensor | None:
    """What a detector ignores beside its own, (H, W) bool, by a mask of its size or of the first image's."""
    path = ignored_path(args.ignore, config.category) if args.ignore else None
    if path is None:
        return None
    file_size = None  # unknown where no image is readable: those are told in their rows
    for image in filter(os.path.isfile, paths):
        with suppress(InputError):
            file_size = read_size(image)
            break
    return load_ignored(path, (config.height, config.width), file_size)


def check_files(args: argparse.Namespace, tasks: list[Task], lists: list[list[str]]) -> None:
    """Raise InputError if --output or --report, wherever links lead, would replace a file that is read, each other, or
    a report that is none of this program. What --output holds is checked where it is opened."""
    written = [os.path.realpath(path) for path in (args.output, args.report) if path]
    if written:
        if len({*written}) < len(written):
            raise InputError(f"{args.output}: cannot be both --output and --report")
        used = [str(path) for task in tasks for path in (task.detector, normals_path(task.detector))]
        for path in (*used, *(path for paths in lists for path in paths)):
            if os.path.realpath(path) in written:
                raise InputError(f"{path}: is read, and cannot be written to; take another --output or --report")
    if args.report:
        check_replaceable(args.report, "take another --report")


def check_drawings(drawings: Drawings, tasks: list[Task], lists: list[list[str]]) -> None:
    """Know before anything is scored what cannot be drawn. Raises InputError or OSError."""
    if len({*drawings.folders}) < len(drawings.folders):
        raise InputError(f"{', '.join(drawings.folders)}: each kind of drawing needs a folder of its own")
    for path in (path for paths in lists for path in paths if drawings.folders):
        drawings.keep(path)
    for task, paths in zip(tasks, lists):
        for path in paths:
            drawings.name(path, task.folders)
            if drawings.panels:
                drawings.panel(path, task.folders)
    for folder in drawings.folders:
        os.makedirs(folder, exist_ok=True)


def make_scorer(args: argparse.Namespace, task: Task, detector: Detector, drawings: Drawings, pool: Executor) -> Scorer:
    """What scores a task's images; its followers are what else was asked for."""
    if args.false_alarm_rate is not None:
        detector.set_false_alarm_rate(args.false_alarm_rate)
    say(f"{detector.config.category}: {detector.guarantee.words()}")
    first = {"category": task.category} if args.model_dir else {}
    callbacks = [Drift(detector.config.category, detector.appearance, detector.guarantee)]
    if args.report:
        callbacks.append(Gallery(detector))
    if args.explain:
        normals = load_normals(normals_path(task.detector), detector)
        callbacks.append(Explainer(detector, normals, lambda path: drawings.panel(path, task.folders), pool))
    return Scorer(detector, first, drawings, task.folders, args.workers, callbacks)


def write_report(args: argparse.Namespace, galleries: list[Gallery]) -> None:
    """The HTML file of what was scored in this run; none, if that is nothing."""
    if pages := [each.page() for each in galleries if each.count]:
        from reporting.gallery import render

        title = f"CutPaste: {args.model_dir or Path(args.paths[0]).stem}"
        write_file(render(pages, title).encode(), args.report)
    elif args.report:
        say(f"nothing new was scored, so {args.report} is not written")


if __name__ == "__main__":
    run_script(main, get_parser())
