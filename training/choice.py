"""Choose a density by normal images alone: CutPaste itself is the judge.

Some normal images are held out. Patches and scars are pasted into them, and each density, fitted to the other images,
must tell the pasted images from those held out. Owns what is pasted, the densities that are compared, and the choice.
"""

import torch
from torch import Tensor

from config import CANDIDATES, refitted
from cutpaste import make_views_and_sample, sample_params, visible
from density import DensityError
from detector import Detector, EnsembleMember, all_but, category_seed, evenly_spaced, stream, unseen_by
from image_ops import to_float
from localization import AXES_IMAGES
from runtime.files import InputError

MOST_IMAGES = 250  # normal images that are looked at
HELD_OUT = 5  # one image of so many is held out
MARGIN = 0.02  # of AUROC: a smaller difference is a matter of chance
CHANCE = 0.6  # AUROC up to which a density tells next to nothing: 0.5 is chance
FAINT = 0.3  # opacity of what is pasted: every density would tell what is as strong as in training
CROP = 96  # pixels: patches and scars are drawn as for a square of this side


def pasted_images(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images (n, 3, H, W) float in [0, 1], two or fewer of each of images (N, 3, H, W) uint8: with a patch and
    with a scar, as the variant "soft" draws them, but faint, somewhere. Those that show no difference are left out."""
    height, width = images.shape[2:]
    side = min(CROP, height, width)
    amounts = {"translate": 0.0, "jitter": 0.0, "patch_size": side}
    params = sample_params("soft", len(images), height, width, generator, **amounts)
    views, _, whole = make_views_and_sample(images, params)
    shown = visible(views, params, whole).view(-1, len(images))[1:].flatten()
    pasted = to_float(images).repeat(2, 1, 1, 1)
    for image, view, (y, x) in zip(pasted, views[len(images) :], params.corner.repeat(2, 1).tolist()):
        image[:, y : y + side, x : x + side].lerp_(view, FAINT)
    return pasted[shown]


class Judge:
    """Compare CANDIDATES as the density of a detector's first network, from normal images (N, 3, H, W) uint8 alone:
    those that it was or will be fitted to. The last one only where windows may be compared with those from anywhere.
    Raises InputError if they are too few or too much alike."""

    @torch.inference_mode()
    def __init__(self, detector: Detector, images: Tensor) -> None:
        config, self.detector, self.network = detector.config, detector, detector.members[0]
        numbers = all_but(unseen_by(config, len(images), 0), len(images))
        numbers = numbers[evenly_spaced(len(numbers), MOST_IMAGES)]
        known = numbers[all_but(torch.arange(0, len(numbers), HELD_OUT), len(numbers))]
        if len(known) < 2:
            raise InputError(f"{config.category}: {len(images)} normal images are too few to choose a density by")
        fitted = EnsembleMember(config, self.network.network, self.network.hidden, "both").to(detector.device)
        try:
            fitted.choose_axes(stream(detector, images, fitted.embed, AXES_IMAGES, known))
            projected = fitted.project_all(stream(detector, images, fitted.embed, numbers=known), len(known))
            fitted.fit_projected(projected, False, detector.batch_size)
            self.candidates = {density: fitted.with_density(density) for density in CANDIDATES}
            *_, anywhere = CANDIDATES
            if config.patches and config.patches.location == "auto":
                seen = {level.stages: x for level, x in zip(fitted.levels, projected)}
                candidate = self.candidates[anywhere]
                candidate.fit_projected([seen[level.stages] for level in candidate.levels], False, detector.batch_size)
            else:
                del self.candidates[anywhere]
        except DensityError as error:
            raise InputError(f"{config.category}: no density can be fitted: {error}") from error
        self.normal = images[numbers[::HELD_OUT]].cpu()  # held out
        self.normal_scores = self.scores(to_float(self.normal))

    @torch.inference_mode()
    def scores(self, images: Tensor) -> dict[str, Tensor]:
        """Return the scores (n,) that each candidate gives images (n, 3, H, W)."""
        embeddings = list(stream(self.detector, images, self.network.embed))
        return {
            density: torch.cat([candidate.score_projected(candidate.project(batch))[0] for batch in embeddings]).cpu()
            for density, candidate in self.candidates.items()
        }

    def aurocs(self, seed: int = 0) -> dict[str, float]:
        """Return how well each candidate tells pasted from normal images that were both held out, an image AUROC in
        [0, 1]. seed: of what is pasted, and where. Raises InputError if nothing shows that is pasted."""
        from sklearn.metrics import roc_auc_score

        category = self.detector.config.category
        pasted = pasted_images(self.normal, torch.Generator().manual_seed(category_seed(seed, category)))
        if not len(pasted):
            raise InputError(f"{category}: nothing shows that is pasted into its images; name a --density")
        labels, aurocs = [0] * len(self.normal) + [1] * len(pasted), {}
        for density, scores in self.scores(pasted).items():
            aurocs[density] = float(roc_auc_score(labels, torch.cat([self.normal_scores[density], scores]).numpy()))
        return aurocs


def choose(aurocs: dict[str, float]) -> str:
    """Return the density with the highest AUROC; the first of those that are less than MARGIN behind it, and the first
    of all where none is better than CHANCE. aurocs: in the order of CANDIDATES."""
    best = max(aurocs.values())
    margin = MARGIN if best > CHANCE else 1.0
    return next(density for density, auroc in aurocs.items() if auroc >= best - margin)


def with_settings(detector: Detector, given: dict, images: Tensor) -> Detector:
    """Return a detector of the same networks with the settings of the density that are given, see config.refitted, not
    yet fitted; a density "auto" is chosen. Raises SettingError for what cannot be, InputError as ``Judge`` does."""
    other = detector.changed(**refitted(detector.config, given).to_dict())
    return choose_density(other, images) if given.get("density") == "auto" else other


def choose_density(detector: Detector, images: Tensor) -> Detector:
    """Return a detector of the same networks with the density that the judge prefers, not yet fitted; how it was chosen
    is in its metadata. Raises InputError as ``Judge`` does."""
    aurocs = Judge(detector, images).aurocs(detector.config.seed)
    other = detector.changed(choose(aurocs))
    listed = ", ".join(f"{density} {100 * auroc:.1f}" for density, auroc in aurocs.items())
    told = f"{listed} % AUROC of pasted against held-out normal images"
    if max(aurocs.values()) <= CHANCE:
        told += "; none could tell them much better than chance, 50 %, so the sum of the others was taken"
    other.metadata["density_chosen"] = other.density
    other.metadata["density_aurocs"] = told
    return other
