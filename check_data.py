"""Are the good photographs all good, and are they enough? Answers from the normal images of each category.

    python run_training.py --model_dir five --patch_size 64 --folds 5
    python check_data.py --model_dir five

Prints three lines for each category on stdout and writes to <eval_dir>/<name of model_dir>/<category>/:

    duplicates.csv      pairs of images that show one photograph: kind exact (the same pixels at the detector's size) or
                        near (encoded again, lighter, moved by a pixel), two paths, similarity; within train/good, and
                        between it and test, whose metrics are then too good
    suspicious.csv      training images, the most unusual first, by a network that has not seen them, if there is one
                        (--folds, --holdout); p_value: share of them, this image counted in, that look as unusual
    suspicious.png      the first twelve and their heat maps
    enough.csv, .png    what new normal images score when the densities are fitted to fewer images

    python check_data.py --choose first second

compares detectors of several folders (other stages, another --size, fine-tuned or not), with each density, by normal
images alone: patches and scars are pasted into held-out ones, faintly, and must be told from those without. Prints the
AUROC of each, writes it to <eval_dir>/choose.csv, and makes no other check.

Trains nothing and changes no detector.
"""

import argparse
import copy
import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from config import add_data_flags, storage
from runtime.cli import check_usage, choose_device, folder_name, int_at_least, new_parser, progress_bar, run_script
from runtime.files import InputError, csv_table, print_line, say, write_files


def get_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add_data_flags(parser)
    add = parser.add_argument_group("output").add_argument
    add("--eval_dir", default="Eval", metavar="DIR", help="folder of tables and plots (default: Eval)")
    add = parser.add_argument_group("choice by normal images alone").add_argument
    add("--choose", nargs="+", metavar="DIR", help="folders of the detectors to compare, instead of --model_dir")
    draws = "how often patches and scars are drawn and pasted (default: 10)"
    add("--draws", type=int_at_least(1), default=10, metavar="N", help=draws)
    return parser


if __name__ == "__main__":
    check_usage(get_parser())  # at once: what is imported below takes seconds

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from conformal import leave_one_out_p_values
from dataset import TestSet, TrainSet, has_test_images, load_test, load_train, train_paths
from density import FOLDS, DensityError, fit_density, has_gradient
from detector import (
    DENSITY_IMAGES,
    PATCH_DENSITY_IMAGES,
    Detector,
    EnsembleMember,
    all_but,
    category_seed,
    find_work,
    load,
    scored_images,
    scored_paths,
    stream,
    unseen_by,
)
from reporting.metrics import image_metrics
from reporting.overlays import as_score, drawn_above
from reporting.tables import normal_table, path_below
from runtime.cache import iterate
from training.choice import CHANCE, Judge, choose


def main(args: argparse.Namespace) -> None:
    device = choose_device(args.cuda)
    if args.choose:
        compare(args, device)
        return
    out_dir = Path(args.eval_dir) / folder_name(args.model_dir)
    for category, path in first_detectors(args, args.model_dir).items():
        detector, train = load_both(args, path, device)
        where = (args.data_dir, category, detector.config.size, args.workers, storage(args))
        has_test = has_test_images(args.data_dir, category)
        test = load_test(*where, detector.fill_index, detector.white) if has_test else None
        say(f"{category}: looking for copies")
        files = check_duplicates(args.data_dir, category, train, test)
        say(f"{category}: drawing the most unusual training images")
        files |= check_suspicious(args.data_dir, detector, train)
        files |= check_count(detector, train, test)
        write_files({out_dir / category / name: content for name, content in files.items()})
    say(f"tables and plots are in {out_dir}/")


def first_detectors(args: argparse.Namespace, model_dir: str) -> dict[str, Path]:
    """Return the detector file of each category asked for; of several seeds the first."""
    work: dict[str, Path] = {}
    for path in find_work(model_dir, args.data_dir, args.type):
        work.setdefault(path.stem, path)
    return work


def load_both(args: argparse.Namespace, path: Path, device: torch.device) -> tuple[Detector, TrainSet]:
    """Return the detector of a file and the training images that it was made from. Raises InputError if they are others
    now."""
    detector = load(path, device)
    category = detector.config.category
    paths = train_paths(args.data_dir, category)
    if scored_paths(paths, detector) is None:
        others = f"made from other images than the {len(paths)} of {paths[0].parent}"
        raise InputError(f"{path}: {others}; train it again")
    where = (args.data_dir, category, detector.config.size, args.workers, storage(args))
    return detector, load_train(*where, detector.fill_index, detector.white, paths)


# Which detector, which density ------------------------------------------------------------------------------------


def compare(args: argparse.Namespace, device: torch.device) -> None:
    """Compare the detectors of several folders by normal images alone, print the table, and write it with all draws."""
    rows: list[dict] = []
    for model_dir in args.choose:
        for category, path in first_detectors(args, model_dir).items():
            detector, train = load_both(args, path, device)
            say(f"{category} {model_dir}: fitting the densities that are compared")
            judge = Judge(detector, train.images)
            with progress_bar(f"{category} {model_dir}", 0, args.draws, True, "draw") as bar:
                for draw in range(args.draws):
                    aurocs = judge.aurocs(draw)
                    common = {"category": category, "model_dir": model_dir, "draw": draw, "chosen": choose(aurocs)}
                    rows += [common | {"density": name, "pasted_auroc": auroc} for name, auroc in aurocs.items()]
                    bar.update()
    by_category = defaultdict(lambda: defaultdict(list))
    for row in rows:
        by_category[row["category"]][row["model_dir"], row["density"]].append(row)
    for category, candidates in by_category.items():
        means = {}
        for (model_dir, density), draws in candidates.items():
            values = np.array([row["pasted_auroc"] for row in draws])
            means[model_dir, density] = values.mean()
            chosen = sum(row["chosen"] == density for row in draws)
            figures = f"{100 * values.mean():.1f} ± {100 * values.std():.1f}, chosen in {chosen} of {len(draws)} draws"
            print_line(f"{category} {model_dir} {density}: {figures}")
        best = max(means, key=means.get)
        advice = f"{' '.join(best)} is first" if means[best] > CHANCE else "chance: what was pasted cannot be told"
        print_line(f"{category} choose: {advice}")
    write_files({Path(args.eval_dir) / "choose.csv": csv_table(rows)})
    say(f"all draws are in {Path(args.eval_dir) / 'choose.csv'}")


# Duplicates -------------------------------------------------------------------------------------------------------

CELLS, CELL = 32, 8  # a thumbnail has 32 x 32 cells, each the mean of 8 x 8 points
REACH = 2  # points by which an image is moved at most to fit another one: a 130th of the side
BLUR = 5  # cells; slower changes, such as of the light, count for nothing
NEIGHBOR = 4  # the distance to this neighbor is typical of different photographs, though most may be there twice
NEAR_SHARE = 0.1  # of the typical distance: up to it, two images are near
NEAR_LIMIT = 0.005  # but never a larger distance: images of what repeats, such as a mesh, are often alike by chance
BATCH_SIZE = 32


class Pair(NamedTuple):
    """Two images, by number, that show one photograph."""

    kind: str  # exact: the same pixels; near: nearly
    first: int
    second: int
    similarity: float  # at most 1, that of equal images


def check_duplicates(data_dir: str, category: str, train: TrainSet, test: TestSet | None) -> dict[str, bytes]:
    """Print how many pairs of images show one photograph, and return the file that lists them, by name."""
    within, between = find_duplicates(train.images, None if test is None else test.images)
    line = f"{category} duplicates: {_counted(within)} within train"
    print_line(line + ("" if test is None else f", {_counted(between)} between train and test"))
    rows = []
    for pairs, others in ((within, train), (between, test)):
        for pair in pairs:
            paths = (train.paths[pair.first], others.paths[pair.second])
            rows.append((pair.kind, *(path_below(path, data_dir) for path in paths), pair.similarity))
    columns = ("kind", "path", "other", "similarity")
    return {"duplicates.csv": csv_table([dict(zip(columns, row)) for row in rows], columns)}


def _counted(pairs: list[Pair]) -> str:
    exact = sum(pair.kind == "exact" for pair in pairs)
    return f"{exact} exact and {len(pairs) - exact} near"


def find_duplicates(images: Tensor, others: Tensor | None = None) -> tuple[list[Pair], list[Pair]]:
    """Return the pairs within images (N, 3, H, W) uint8, N >= 2, and those between them and others (M, 3, H, W), exact
    ones first, then the most similar first.

    Two images are near if their distance, 1 - similarity, is at most NEAR_SHARE of the typical one: the median of the
    distances to the NEIGHBOR-th nearest image. So photographs of fixed parts, all of them alike, are no duplicates.
    """
    thumbnails = torch.cat([_thumbnails(batch, [REACH])[:, 0] for batch in iterate(images, BATCH_SIZE)])
    similarity = _similarities(images, thumbnails)
    neighbor = min(NEIGHBOR, len(images) - 1)
    typical = (1 - similarity.fill_diagonal_(-1)).kthvalue(neighbor, 1).values.median()
    least = 1 - min(NEAR_LIMIT, NEAR_SHARE * typical.item())
    digests = _digests(images)
    within = _pairs(digests, digests, similarity, least, lambda i, j: i < j)
    if others is None:
        return within, []
    return within, _pairs(digests, _digests(others), _similarities(others, thumbnails).T, least)


def _pairs(
    digests: list[bytes],
    other_digests: list[bytes],
    similarity: Tensor,
    least: float,
    wanted: Callable[[int, int], bool] = lambda i, j: True,
) -> list[Pair]:
    """Return the wanted pairs of equal digests, and those of other digests with a similarity (N, M) of at least
    ``least``."""
    numbers = defaultdict(list)
    for j, digest in enumerate(other_digests):
        numbers[digest].append(j)
    exact = [Pair("exact", i, j, 1.0) for i, digest in enumerate(digests) for j in numbers[digest] if wanted(i, j)]
    near = [
        Pair("near", i, j, similarity[i, j].item())
        for i, j in (similarity >= least).nonzero().tolist()
        if wanted(i, j) and digests[i] != other_digests[j]
    ]
    return exact + sorted(near, key=lambda pair: -pair.similarity)


def _digests(images: Tensor) -> list[bytes]:
    """Return a digest of the pixels of each image."""
    return [hashlib.blake2b(image.numpy().tobytes()).digest() for batch in iterate(images) for image in batch]


def _similarities(images: Tensor, thumbnails: Tensor) -> Tensor:
    """Return correlations (M, N) in [-1, 1] of images (M, 3, H, W), each moved as it fits best, with thumbnails
    (N, D)."""
    moves = range(2 * REACH + 1)
    batches = (_thumbnails(batch, moves) @ thumbnails.T for batch in iterate(images, BATCH_SIZE))
    return torch.cat([correlations.amax(1) for correlations in batches])


def _thumbnails(images: Tensor, moves: Sequence[int]) -> Tensor:
    """Return thumbnails (B, S, D) float32 of images (B, 3, H, W): gray, without slow changes, of mean 0 and length 1.

    moves: an image is cut out at each pair of them, S in all, in points from the upper left. An image without any
    change has zeros.
    """
    side = CELLS * CELL
    gray = functional.adaptive_avg_pool2d(images.float().mean(1, keepdim=True), side + 2 * REACH)
    moved = torch.cat([gray[:, :, y : y + side, x : x + side] for y in moves for x in moves], 1)
    small = functional.avg_pool2d(moved, CELL)
    small = small - functional.avg_pool2d(small, BLUR, 1, BLUR // 2, count_include_pad=False)
    small = (small - small.mean((2, 3), keepdim=True)).flatten(2)
    return functional.normalize(small, dim=2, eps=1e-3)


# Suspicious images ------------------------------------------------------------------------------------------------

SHOWN, NAMED = 12, 3  # of the most unusual images: on the sheet, on stdout


def check_suspicious(data_dir: str, detector: Detector, train: TrainSet) -> dict[str, bytes]:
    """Print the names of the most unusual training images, and return their table and sheet by file name.

    Scores are the calibration scores; a heat map is by the network that has not seen the image.
    """
    from reporting import figures

    config, scores = detector.config, detector.calibration_scores.cpu()
    order = scores.argsort(descending=True)
    p_values = leave_one_out_p_values(scores)[order].tolist()
    rows = normal_table(detector, scored_paths(train.paths, detector), data_dir)
    rows = [row | {"p_value": p_value} for row, p_value in zip(rows, p_values)]
    names = [Path(row["path"]).name for row in rows]
    named = ", ".join(f"{name} ({row['score']:.3g})" for name, row in zip(names[:NAMED], rows))
    print_line(f"{config.category} suspicious: {named}")
    if config.holdout:
        say(f"{config.category}: {len(rows)} of {len(train)} images were held out; only they are scored")
    elif len(detector.members) == 1:
        seen = "the network has seen all these images, and so has the density of a map: defects may look normal to them"
        say(f"{config.category}: {seen}; train with --folds 5 to be sure")
    with_maps = config.patches is not None or has_gradient(config.density)
    cases = []
    for name, row, number in zip(names[:SHOWN], rows, scored_images(detector, len(train))[order].tolist()):
        image = train.images[number]
        title = f"{name}\nscore {row['score']:.3g}, p {row['p_value']:.2g}"
        heat = level = None
        if with_maps:
            heat = unseen_map(detector, image[None], number)
            heat = heat if config.patches else as_score(heat, row["score"])
            level = drawn_above(heat, detector.threshold.item(), True)  # the strongest place of each, however weak
        cases.append(figures.Case(title, image.permute(1, 2, 0).numpy() / 255, None, heat, level))
    sheet = figures.heat_sheet(detector, cases, "the most unusual training images", "the most unusual place")
    return {"suspicious.csv": csv_table(rows), "suspicious.png": figures.png(sheet)}


@torch.inference_mode()
def unseen_map(detector: Detector, image: Tensor, number: int) -> np.ndarray:
    """Return the map (H, W) float32 of training image ``number`` (1, 3, H, W) uint8 by the network that has not seen
    it."""
    member = detector.members[number % len(detector.members)]  # as detector.unseen_by deals them out
    prepared = detector.prepare(image.to(detector.device))
    if detector.config.patches:
        _, maps = member(prepared)
    else:
        maps = member.grad_cam(member.features(prepared, detector.config.levels))
    return maps[0].cpu().numpy()


# Enough images ----------------------------------------------------------------------------------------------------

SMALLEST_SUBSET, MAX_HALVINGS = 3, 5  # images in the smallest subset; how often the images are halved
DRAWS = 4  # subsets of each size
FLAT, STEEP = 0.1, 0.5  # deviations by which scores rise when half of the images go


class SubsetScores(NamedTuple):
    """Hold what densities say that were fitted to a subset of the images."""

    images: int  # in the subset
    scores: np.ndarray  # (P,) of new normal images
    test_scores: np.ndarray | None  # (M,) of the test images


def check_count(detector: Detector, train: TrainSet, test: TestSet | None) -> dict[str, bytes]:
    """Print whether more normal images would help, and return the curve's table and plot by file name; {} if there are
    too few to tell."""
    from reporting import figures

    category = detector.config.category
    first = f"; the curve is of the first of {len(detector.members)} networks, alone"
    say(f"{category}: fitting the densities to fewer images{first * (len(detector.members) > 1)}")
    subsets = fit_subsets(detector, train.images, None if test is None else test.images)
    if not subsets:
        print_line(f"{category} enough: {len(train)} images are too few to tell")
        return {}
    rows = curve_rows(subsets, None if test is None else test.labels)
    print_line(f"{category} enough: {verdict(rows)}")
    rows = [{"category": category} | row for row in rows]
    return {"enough.csv": csv_table(rows), "enough.png": figures.png(figures.enough(category, rows))}


def fit_subsets(detector: Detector, images: Tensor, test_images: Tensor | None = None) -> list[SubsetScores]:
    """Fit the first network's densities to ever larger random subsets of the normal images (N, 3, H, W) uint8 that the
    detector was made of, up to all but the new ones, and return what they say; [] if N is too small.

    New are the images that the network has not seen, the same ones for each subset. If it has seen all, new is every
    FOLDS-th: no density here has seen it. Axes, kinds of density and the scales of several levels stay the detector's.
    The subsets depend on seed and category alone. Raises InputError where no density can be fitted.
    """
    config, member = detector.config, copy.deepcopy(detector.members[0])
    new = unseen_by(config, len(images), 0)
    new = new if len(new) else torch.arange(0, len(images), FOLDS)
    limit = DENSITY_IMAGES if config.patches is None else PATCH_DENSITY_IMAGES
    known_embeddings = _embed(detector, member, images, limit, all_but(new, len(images)))
    new_embeddings = _embed(detector, member, images, limit, new)
    test_embeddings = None if test_images is None else _embed(detector, member, test_images)
    shared = [level.shared for level in member.levels]
    generator = torch.Generator().manual_seed(category_seed(config.seed, config.category))
    total, subsets = len(known_embeddings[0]), []
    counts = [count for count in subset_sizes(total) for _ in range(DRAWS if count < total else 1)]
    with progress_bar(f"{config.category} subsets", 0, len(counts), True, "fit") as bar:
        for count in counts:
            chosen = torch.randperm(total, generator=generator)[:count].sort().values.to(detector.device)
            try:
                for level, embeddings, one_for_all in zip(member.levels, known_embeddings, shared):
                    level.density = fit_density(level.kind, embeddings[chosen], one_for_all, level.grid.shape)
            except DensityError as error:
                raise InputError(f"{config.category}: no density of {count} images can be fitted: {error}") from error
            scores = [_score(detector, member, embeddings) for embeddings in (new_embeddings, test_embeddings)]
            subsets.append(SubsetScores(count, *scores))
            bar.update()
    return subsets


def subset_sizes(count: int) -> list[int]:
    """Return ``count``, its half, the half of that and so on, ascending; [] if it is too small for a half."""
    sizes = [count >> times for times in range(MAX_HALVINGS + 1) if count >> times >= SMALLEST_SUBSET]
    return sizes[::-1] if len(sizes) > 1 else []


def _embed(
    detector: Detector,
    member: EnsembleMember,
    images: Tensor,
    limit: int | None = None,
    numbers: Tensor | None = None,
) -> list[Tensor]:
    """Return the embeddings (n, L, d) of each level as its density takes them. limit, numbers: of the images that are
    taken, see detector.batches_of."""
    batches = stream(detector, images, lambda prepared: member.project(member.embed(prepared)), limit, numbers)
    return [torch.cat(levels) for levels in zip(*batches)]


@torch.inference_mode()
def _score(detector: Detector, member: EnsembleMember, embeddings: list[Tensor] | None) -> np.ndarray | None:
    """Return scores (n,) of the embeddings of each level, not standardized; None without any."""
    if embeddings is None:
        return None
    batches = zip(*(x.split(detector.batch_size) for x in embeddings))
    distances = ([level.distances(x) for level, x in zip(member.levels, batch)] for batch in batches)
    return torch.cat([member.aggregate(batch)[0] for batch in distances]).cpu().numpy()


def curve_rows(subsets: list[SubsetScores], labels: np.ndarray | None) -> list[dict]:
    """Return a row of the curve for each subset; the last subset holds all images.

    images: in the subset. median, quantile_90: of the scores of new normal images, less the median with all images.
    rise: by how much these scores are higher than with all images, on average. All three are in standard deviations of
    the scores with all images. image_auroc: None unless labels (M,) have both kinds.
    """
    base, both = subsets[-1].scores, labels is not None and 0 < labels.sum() < len(labels)
    center, scale = np.median(base), max(float(np.std(base, ddof=int(len(base) > 1))), 1e-9)
    rows = []
    for images, scores, test_scores in subsets:
        median, high = ((np.quantile(scores, (0.5, 0.9)) - center) / scale).tolist()
        rise = float((scores - base).mean()) / scale
        auroc = image_metrics(labels, test_scores)["image_auroc"] if both else None
        rows.append({"images": images, "median": median, "quantile_90": high, "rise": rise, "image_auroc": auroc})
    return rows


def verdict(rows: list[dict]) -> str:
    """Say in words whether the images are enough, by the right end of the curve. The error of a mean goes with 1 / n:
    twice as many images bring about half of what the last doubling has brought."""
    count = rows[-1]["images"]
    half = [row for row in rows if row["images"] == count // 2]
    rises, aurocs = ([row[name] for row in half] for name in ("rise", "image_auroc"))
    rise = float(np.mean(rises))
    more = f"{'more' if rise >= 0 else 'less'} unusual ({min(rises):.2f} to {max(rises):.2f})"
    text = f"with only {count // 2} of the {count} images, new good ones look {abs(rise):.2f} deviations {more}"
    if None not in aurocs:
        text += f", AUC {100 * np.mean(aurocs):.1f} instead of {100 * rows[-1]['image_auroc']:.1f}"
    if rise < FLAT:
        return f"yes, probably: {text}; twice as many would bring little"
    answer = "no" if rise >= STEEP else "nearly"
    return f"{answer}: {text}; twice as many might bring half of that"


if __name__ == "__main__":
    run_script(main, get_parser())
