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
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch

import overlays
from dataset import decode, read_size
from detector import SUFFIX, Detector, detector_path, load, load_config
from listing import listed, relative, watch
from overlays import Targets
from rows_file import COLUMNS, FORMATS, RowsFile
from runtime.files import InputError, say, write_file
from runtime.flags import int_at_least, new_parser, number, one_of, size, zero_or_one
from runtime.script import Interrupts, choose_device, progress_bar, run_script

T, R = TypeVar("T"), TypeVar("R")


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
    add = parser.add_argument_group("output").add_argument
    add("--format", type=one_of(FORMATS), default="csv", metavar="|".join(FORMATS), help="of the rows (default: csv)")
    add("--output", metavar="FILE", help="write rows there, and continue what is there (default: stdout)")
    add("--overwrite", action="store_true", help="start --output anew, whatever the file holds")
    add("--heatmaps", metavar="DIR", help="draw each image under its heat; earlier drawings are replaced")
    add("--masks", metavar="DIR", help="patch models: a PNG of what is above the threshold, 255 of 0 and 255")
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
    for task in tasks:  # all, before any hour is spent
        check(args, task)
    written = [folder for folder in (args.heatmaps, args.masks) if folder]  # may lie within what is scored
    lists = [listed(task.words, written) for task in tasks]
    if not any(lists) and not args.watch:
        raise InputError(f"{', '.join(args.paths[args.model_dir is None :])}: no image found")
    targets = Targets() if written else None
    for path in (path for paths in lists for path in paths if targets):
        targets.keep(path)
    for task, paths in zip(tasks, lists):
        name_drawings(args, task, paths, targets)
    for folder in written:
        os.makedirs(folder, exist_ok=True)  # here it is known before anything is scored that it cannot be
    columns = (*(["category"] if args.model_dir else []), *COLUMNS)
    with ExitStack() as stack:
        stop = stack.enter_context(Interrupts())
        rows = stack.enter_context(RowsFile(args.output, args.format, columns, args.overwrite))
        pool = stack.enter_context(ThreadPoolExecutor(args.workers))
        total, done = sum(map(len, lists)), sum(path in rows.done for paths in lists for path in paths)
        bar = stack.enter_context(progress_bar("images", done, total, True, "image"))
        scorers = []
        for task, paths in zip(tasks, lists):
            scorer = Scorer(args, task, load(task.detector, device), targets)
            scorer.score(paths, rows, pool, bar.update, stop)
            scorers = [*scorers, scorer] if args.watch else []  # else one is held at a time
        if args.watch:
            folders = [folder for task in tasks for folder in task.words]
            for ready in watch(folders, rows.done, written, lambda: stop.signal):
                for scorer in scorers:
                    scorer.score([path for path in ready if scorer.task.holds(path)], rows, pool, bar.update, stop)
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


def check(args: argparse.Namespace, task: Task) -> None:
    """Hold the flags against a detector file. Raises InputError on a contradiction, or if the file is bad."""
    config, path = load_config(task.detector), task.detector
    own = (config.height, config.width)
    if args.size not in (None, own):
        asked, has = (f"{width}x{height}" for height, width in (args.size, own))
        raise InputError(f"--size: {asked} was asked for, but {path} has {has}; leave the flag out")
    if args.masks and config.patches is None:
        raise InputError(f"--masks: {path} is no patch model, it has no map; --heatmaps draws where its score is from")
    if args.heatmaps and config.patches is None and not config.has_gradient:
        raise InputError(f"--heatmaps: {path} needs a gradient, which the density {config.density} has not")


def name_drawings(args: argparse.Namespace, task: Task, paths: list[str], targets: Targets | None) -> list[str]:
    """The files that will be drawn of images, of which none may be in the way of another; see Targets.add."""
    if targets is None:
        return []
    kinds = [(folder, suffix) for folder, suffix in ((args.heatmaps, None), (args.masks, ".png")) if folder]
    return [targets.add(folder, relative(path, task.folders), path, end) for path in paths for folder, end in kinds]


# Scoring ----------------------------------------------------------------------------------------------------------


class Read(NamedTuple):
    """A file, its pixels (h, w, 3) uint8 at the detector's size, and its own size (H, W), which only patch models
    need; or why there are none."""

    path: str
    pixels: np.ndarray | None = None
    size: tuple[int, int] | None = None
    error: str | None = None


class Scorer:
    """One detector at work: paths in, rows and drawings out."""

    def __init__(self, args: argparse.Namespace, task: Task, detector: Detector, targets: Targets | None) -> None:
        self.args, self.task, self.detector, self.targets = args, task, detector, targets
        self.has_maps = detector.config.patches is not None
        if args.false_alarm_rate is not None:
            detector.at_rate(args.false_alarm_rate)
        self.threshold, self.rate = detector.threshold.item(), detector.promise.rate
        say(f"{detector.config.category}: {detector.promise.words()}")

    def score(
        self, paths: list[str], rows: RowsFile, pool: Executor, tell: Callable[[int], object], stop: Interrupts
    ) -> None:
        """Add a row for each path that has none; as many as go through the detector together are written at once."""
        missing = (path for path in paths if path not in rows.done)
        at_once = self.detector.at_once
        with closing(in_order(pool, self.read, missing, at_once + self.args.workers)) as found:
            while block := list(islice(found, at_once)):
                rows.add(self.rows(block, pool))
                tell(len(block))
                halt(stop)

    def read(self, path: str) -> Read:
        try:
            if os.path.exists(path) and not os.path.isfile(path):
                raise InputError("no file, or a folder that cannot be listed")
            return Read(path, decode(path, self.detector.size), read_size(path) if self.has_maps else None)
        except InputError as error:
            return Read(path, error=reason(error, path))

    @torch.inference_mode()
    def rows(self, block: list[Read], pool: Executor) -> list[dict]:
        """Rows of images, whose drawings are in place when they come."""
        empty = dict.fromkeys(COLUMNS) | ({"category": self.task.category} if self.args.model_dir else {})
        rows = {each.path: empty | {"path": each.path, "error": each.error} for each in block}
        good = [each for each in block if each.error is None]
        if not good:
            return list(rows.values())
        pixels = torch.from_numpy(np.stack([each.pixels for each in good])).permute(0, 3, 1, 2)
        drawn = self.args.heatmaps or self.args.masks
        judged = self.detector.judge(pixels.to(self.detector.device), grad_cam=bool(drawn) and not self.has_maps)
        scores, p_values = judged.scores.tolist(), judged.p_values.tolist()
        maps = [None] * len(good) if judged.maps is None else list(judged.maps.cpu().numpy())
        faults = list(pool.map(self.draw, (each.path for each in good), scores, maps)) if drawn else [None] * len(good)
        for each, score, p, heat, fault in zip(good, scores, p_values, maps, faults):
            if fault:
                rows[each.path]["error"] = fault
                continue
            rows[each.path] |= {"score": score, "p_value": p, "anomalous": int(p <= self.rate)}
            if self.has_maps and (box := overlays.region(heat, self.threshold, each.size)):
                rows[each.path] |= dict(zip(("x", "y", "width", "height"), box))
        return list(rows.values())

    def draw(self, path: str, score: float, heat: np.ndarray) -> str | None:
        """Write what is asked for of an image with a map (h, w). Returns why it cannot be drawn."""
        try:
            self.targets.keep(path)  # it may have come later
            targets = name_drawings(self.args, self.task, [path], self.targets)
            pixels = decode(path)
            if not self.has_maps:  # brought to the score's unit, as the maximum of a patch model's map is its score
                heat = heat * np.float32(max(score, 0) / max(heat.max(), 1e-30))
            heat = overlays.enlarged(heat, pixels.shape[:2])
            if self.args.masks:
                write_file(overlays.encoded(overlays.mask(heat, self.threshold), targets[-1]), targets[-1])
            if self.args.heatmaps:
                picture = overlays.overlay(pixels, heat, self.threshold, outlined=self.has_maps)
                write_file(overlays.encoded(picture, targets[0]), targets[0])
        except InputError as error:
            return reason(error, path)


def reason(error: InputError, path: str) -> str:
    """What is wrong with a file, in one line, without its path."""
    return " ".join(str(error).removeprefix(f"{path}: ").splitlines())


def in_order(pool: Executor, work: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """work(item) of each, in order, done by a pool that is at most ``ahead`` items in front of who takes them."""
    waiting = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


if __name__ == "__main__":
    run_script(main, get_parser())
