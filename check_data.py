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
import copy
import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from config import add_data_flags, storage
from conformal import leave_one_out_p_values
from dataset import TestSet, load_test, load_train, train_paths
from density import FOLDS, DensityError, fit_density
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
from reporting.tables import as_csv, normal_table
from runtime.cache import iterate
from runtime.cli import choose_device, folder_name, new_parser, run_script
from runtime.files import InputError, say, write_files

SHOWN, NAMED = 12, 3  # of the most unusual images: on the sheet, on stdout


def get_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add_data_flags(parser)
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
        paths = train_paths(args.data_dir, category)
        if scored_paths(paths, detector) is None:
            count = len(paths)
            found = f"made from other images than the {count} of {Path(args.data_dir, category, 'train/good')}"
            raise InputError(f"{path}: {found}; train it again")
        where = (args.data_dir, category, detector.config.size, args.workers, storage(args), detector.fill_index)
        images = load_train(*where).images
        test = load_test(*where) if Path(args.data_dir, category, "test").is_dir() else None
        files = check_duplicates(args.data_dir, category, images, test)
        files |= check_suspicious(args.data_dir, detector, images)
        files |= report_enough(detector, images, test)
        write_files({out_dir / category / name: content for name, content in files.items()})
    say(f"tables and plots are in {out_dir}/")


CELLS, CELL = 32, 8  # a thumbnail: so many cells a side, each the mean of so many points a side
REACH = 2  # points that one of two pictures is moved at most: a 130th of the side
BLUR = 5  # cells; slower changes, such as of the light, count for nothing
NEIGHBOR = 4  # whose distance is typical of pictures that are no copies, though most of them are there twice
NEAR = 0.1  # of that distance, up to which two pictures are taken for one
MOST = 0.005  # and never more: what repeats, such as a mesh, is often alike by chance
AT_ONCE = 32


class Pair(NamedTuple):
    """Numbers of two images; kind: exact (the same pixels) or near; similarity: at most 1, of the same."""

    kind: str
    first: int
    second: int
    similarity: float


def find_duplicates(images: Tensor, others: Tensor | None = None) -> tuple[list[Pair], list[Pair]]:
    """Pairs within images (N, 3, H, W) uint8, N >= 2, and between them and others (M, 3, H, W), the most similar first.

    Two pictures are near if 1 - similarity is at most NEAR of what is typical of the images: the median of the distance
    to the NEIGHBOR-th nearest. So photographs of fixed parts, all of them alike, are not taken for copies.
    """
    known = torch.cat([thumbnails(block, [REACH])[:, 0] for block in iterate(images, AT_ONCE)])
    within = similarities(images, known)
    neighbor = min(NEIGHBOR, len(images) - 1)
    typical = (1 - within.fill_diagonal_(-1)).kthvalue(neighbor, 1).values.median()
    least = 1 - min(MOST, NEAR * typical.item())
    inside = pairs(digests(images), digests(images), within, least, lambda i, j: i < j)
    if others is None:
        return inside, []
    return inside, pairs(digests(images), digests(others), similarities(others, known).T, least)


def pairs(
    own: list[bytes],
    others: list[bytes],
    similar: Tensor,
    least: float,
    wanted: Callable[[int, int], bool] = lambda i, j: True,
) -> list[Pair]:
    """Wanted pairs of the same digest, and those of other digests with a similarity (N, M) of at least ``least``."""
    places = defaultdict(list)
    for j, digest in enumerate(others):
        places[digest].append(j)
    exact = [(i, j) for i, digest in enumerate(own) for j in places[digest] if wanted(i, j)]
    near = {(i, j): similar[i, j].item() for i, j in (similar >= least).nonzero().tolist()}
    near = {(i, j): value for (i, j), value in near.items() if wanted(i, j) and own[i] != others[j]}
    found = [Pair("exact", i, j, 1.0) for i, j in exact]
    return found + sorted((Pair("near", *pair, value) for pair, value in near.items()), key=lambda p: -p.similarity)


def digests(images: Tensor) -> list[bytes]:
    """Of the pixels of each image."""
    return [hashlib.blake2b(image.numpy().tobytes()).digest() for block in iterate(images) for image in block]


def similarities(images: Tensor, known: Tensor) -> Tensor:
    """Correlations (M, N) in [-1, 1] of images (M, 3, H, W), each moved as it fits best, with thumbnails (N, D)."""
    moves = range(2 * REACH + 1)
    blocks = (thumbnails(block, moves) @ known.T for block in iterate(images, AT_ONCE))
    return torch.cat([block.amax(1) for block in blocks])


def thumbnails(images: Tensor, moves: Sequence[int]) -> Tensor:
    """Thumbnails (B, S, D) float32 of zero mean and length 1 of images (B, 3, H, W), gray, without slow changes, cut
    out at every two of ``moves``, in points from the upper left; all 0 of an image without any change."""
    side = CELLS * CELL
    gray = functional.adaptive_avg_pool2d(images.float().mean(1, keepdim=True), side + 2 * REACH)
    moved = torch.cat([gray[:, :, y : y + side, x : x + side] for y in moves for x in moves], 1)
    small = functional.avg_pool2d(moved, CELL)
    small = small - functional.avg_pool2d(small, BLUR, 1, BLUR // 2, count_include_pad=False)
    small = (small - small.mean((2, 3), keepdim=True)).flatten(2)
    return functional.normalize(small, dim=2, eps=1e-3)


# One category, one question: files by name out, a line on stdout --------------------------------------------------


def check_duplicates(data_dir: str, category: str, images: Tensor, test: TestSet | None) -> dict[str, bytes]:
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


def check_suspicious(data_dir: str, detector: Detector, images: Tensor) -> dict[str, bytes]:
    """By normal_scores, and maps by the member that has not seen the image."""
    from reporting import figures

    config, scores = detector.config, detector.calibration_scores.cpu()
    rows = normal_table(data_dir, detector, scored_paths(train_paths(data_dir, detector.config.category), detector))
    order = scores.argsort(descending=True)
    p = leave_one_out_p_values(scores)[order].tolist()
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
    sheet = figures.heat_sheet(config.category, cases, level, unit, what, with_masks=False)
    return {"suspicious.csv": as_csv(rows), "suspicious.png": figures.png(sheet)}


@torch.inference_mode()
def unseen_map(detector: Detector, image: torch.Tensor, number: int) -> np.ndarray:
    """Map (H, W) float32 of normal image ``number`` (1, 3, H, W) uint8 by the member that has not seen it."""
    member = detector.members[number % len(detector.members)]  # as member.unseen_by has it
    image = image.to(detector.device)
    prepared = detector.prepare(image)
    if detector.config.patches:
        return member(prepared)[1][0].cpu().numpy()
    return member.grad_cam(member.features(prepared, detector.config.levels))[0].cpu().numpy()


LEAST, MOST_HALVINGS = 3, 5  # images in the smallest subset; how often the images are halved
DRAWS = 4  # subsets of each size
FLAT, STEEP = 0.1, 0.5  # deviations by which scores rise when half of the images go


class Fitted(NamedTuple):
    """What a density of a number of ``images`` says: scores (P,) of new normal images, and (M,) of test images or
    None."""

    images: int
    scores: np.ndarray
    test_scores: np.ndarray | None


def fit_subsets(detector: Detector, images: Tensor, test_images: Tensor | None = None) -> list[Fitted]:
    """The first member's densities, fitted to ever larger random subsets of the normal images (N, 3, H, W) uint8 that
    it was made of, up to all that are not new; none if N is too small.

    New are the images that the member has not seen, the same ones each time; of a member that has seen all, every
    FOLDS-th: its densities have not. Axes, kinds of density and the scales of several levels stay the detector's. The
    subsets depend on seed and category alone. Raises InputError where no density can be fitted.
    """
    config, member = detector.config, copy.deepcopy(detector.members[0])
    new = unseen_by(config, len(images), 0)
    new = new if len(new) else torch.arange(0, len(images), FOLDS)
    most = DENSITY_IMAGES if config.patches is None else PATCH_DENSITY_IMAGES
    known, unknown = (
        projected(detector, member, images, most, numbers) for numbers in (all_but(new, len(images)), new)
    )
    tested = None if test_images is None else projected(detector, member, test_images, len(test_images))
    shared = [level.shared for level in member.levels]
    generator = torch.Generator().manual_seed(category_seed(config.seed, config.category))
    found = []
    for count in sizes(len(known[0])):
        for _ in range(DRAWS if count < len(known[0]) else 1):
            chosen = torch.randperm(len(known[0]), generator=generator)[:count].sort().values.to(detector.device)
            try:
                for level, x, one in zip(member.levels, known, shared):
                    level.density = fit_density(level.kind, x[chosen], one)
            except DensityError as error:
                raise InputError(f"{config.category}: no density of {count} images can be fitted: {error}") from error
            parts = [None if x is None else scores(member, x, detector.batch_size) for x in (unknown, tested)]
            found.append(Fitted(count, *parts))
    return found


def sizes(count: int) -> list[int]:
    """Halves of ``count``, halves of them and so on, the smallest first, and ``count`` itself; [] if it is too small
    for a half."""
    found = [count >> times for times in range(MOST_HALVINGS + 1) if count >> times >= LEAST]
    return found[::-1] if len(found) > 1 else []


def projected(
    detector: Detector, member: EnsembleMember, images: Tensor, most: int, numbers: Tensor | None = None
) -> list[Tensor]:
    """Embeddings (n, L, d) of each level as its density takes them, of those of the images that ``stream`` chooses."""

    def project(block: Tensor) -> list[Tensor]:
        return [level.project(x) for level, x in zip(member.levels, member.embed(block))]

    return [torch.cat(parts) for parts in zip(*stream(detector, images, project, most, numbers))]


@torch.inference_mode()
def scores(member: EnsembleMember, levels: list[Tensor], batch_size: int) -> np.ndarray:
    """Scores (n,) of projected embeddings of each level, not standardized."""
    blocks = zip(*(x.split(batch_size) for x in levels))
    parts = [member.aggregate([level.distances(x) for level, x in zip(member.levels, block)])[0] for block in blocks]
    return torch.cat(parts).cpu().numpy()


# What it says -----------------------------------------------------------------------------------------------------


def curve_rows(found: list[Fitted], labels: np.ndarray | None) -> list[dict]:
    """A row for each density. images; median and 90 % quantile of what new normal images score, and the mean rise of
    their scores against those with all images: all in standard deviations of the scores with all, the first two from
    the median with all; image_auroc, None unless labels (M,) have both kinds."""
    base, both = found[-1].scores, labels is not None and 0 < labels.sum() < len(labels)
    center, scale = np.median(base), max(float(np.std(base, ddof=int(len(base) > 1))), 1e-9)
    rows = []
    for each in found:
        median, high = ((np.quantile(each.scores, (0.5, 0.9)) - center) / scale).tolist()
        rise = float((each.scores - base).mean()) / scale
        auroc = image_metrics(labels, each.test_scores)["image_auroc"] if both else None
        rows.append({"images": each.images, "median": median, "quantile_90": high, "rise": rise, "image_auroc": auroc})
    return rows


def verdict(rows: list[dict]) -> str:
    """What the right end of the curve says, in words. Errors of a mean go with 1 / n: twice as many images bring about
    half of what the last doubling has brought."""
    most = rows[-1]["images"]
    half = [row for row in rows if row["images"] == most // 2]
    rises, aurocs = ([row[name] for row in half] for name in ("rise", "image_auroc"))
    rise = float(np.mean(rises))
    change = f"{abs(rise):.2f} deviations {'higher' if rise >= 0 else 'lower'} ({min(rises):.2f} to {max(rises):.2f})"
    text = f"with {most // 2} instead of {most} images, new normal ones score {change}"
    if None not in aurocs:
        text += f", AUC {100 * np.mean(aurocs):.1f} instead of {100 * rows[-1]['image_auroc']:.1f}"
    if rise < FLAT:
        return f"{text}; twice as many would probably bring little"
    words = "the curve still falls" if rise >= STEEP else "the curve still falls a little"
    return f"{text}; {words}: twice as many might bring about half of that"


def report_enough(detector: Detector, images: Tensor, test: TestSet | None) -> dict[str, bytes]:
    from reporting import figures

    category, labels = detector.config.category, None if test is None else test.labels
    if len(detector.members) > 1:
        say(f"{category}: the curve is of the first of {len(detector.members)} networks, alone")
    found = fit_subsets(detector, images, None if test is None else test.images)
    if not found:
        print(f"{category} enough: {len(images)} images are too few to tell", flush=True)
        return {}
    rows = [{"category": category} | row for row in curve_rows(found, labels)]
    print(f"{category} enough: {verdict(rows)}", flush=True)
    return {"enough.csv": as_csv(rows), "enough.png": figures.png(figures.enough(category, rows))}


if __name__ == "__main__":
    run_script(main, get_parser())
