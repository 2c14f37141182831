"""Whether more normal images would help: a detector's densities fitted to fewer of them, and what new ones then score.

Nothing is trained. Owns which images are fitted to and which count as new, and the words for what came out. Knows
nothing of files.
"""

import copy
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from density import FOLDS, DensityError, fit_density
from detector import Detector
from member import DENSITY_IMAGES, PATCH_DENSITY_IMAGES, Member, category_seed, stream, unseen_by
from metrics import image_metrics
from runtime.cache import ImageArray, subset
from runtime.files import InputError

LEAST, MOST_HALVINGS = 3, 5  # images in the smallest subset; how often the images are halved
DRAWS = 4  # subsets of each size
FLAT, STEEP = 0.1, 0.5  # deviations by which scores rise when half of the images go


class Fitted(NamedTuple):
    """What a density of a number of ``images`` says: scores (P,) of new normal images, and (M,) of test images or
    None."""

    images: int
    scores: np.ndarray
    test_scores: np.ndarray | None


def fit_subsets(detector: Detector, images: ImageArray, test_images: ImageArray | None = None) -> list[Fitted]:
    """The first member's densities, fitted to ever larger random subsets of the normal images (N, 3, H, W) uint8 that
    it was made of, up to all that are not new; none if N is too small.

    New are the images that the member has not seen, the same ones each time; of a member that has seen all, every
    FOLDS-th: its densities have not. Axes, kinds of density and the scales of several levels stay the detector's. The
    subsets depend on seed and category alone. Raises InputError where no density can be fitted.
    """
    config, member = detector.config, copy.deepcopy(detector.members[0])
    new = unseen_by(config, len(images), 0)
    new = new if len(new) else torch.arange(0, len(images), FOLDS)
    rest = torch.ones(len(images), dtype=torch.bool)
    rest[new] = False
    most = DENSITY_IMAGES if config.patches is None else PATCH_DENSITY_IMAGES
    known, unknown = (projected(member, subset(images, part), most) for part in (rest.nonzero()[:, 0], new))
    tested = None if test_images is None else projected(member, test_images, len(test_images))
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
            parts = [None if x is None else scores(member, x) for x in (unknown, tested)]
            found.append(Fitted(count, *parts))
    return found


def sizes(count: int) -> list[int]:
    """Halves of ``count``, halves of them and so on, the smallest first, and ``count`` itself; [] if it is too small
    for a half."""
    found = [count >> times for times in range(MOST_HALVINGS + 1) if count >> times >= LEAST]
    return found[::-1] if len(found) > 1 else []


def projected(member: Member, images: ImageArray, most: int) -> list[Tensor]:
    """Embeddings (n, L, d) of each level as its density takes them; of more than ``most`` images, as many."""

    def project(block: Tensor) -> list[Tensor]:
        return [level.project(x) for level, x in zip(member.levels, member.embed(block))]

    return [torch.cat(parts) for parts in zip(*stream(member, images, project, most))]


@torch.inference_mode()
def scores(member: Member, levels: list[Tensor]) -> np.ndarray:
    """Scores (n,) of projected embeddings of each level, not standardized."""
    blocks = zip(*(x.split(member.at_once) for x in levels))
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
