"""The choice of a density by faintly pasted normal images."""

import pytest
import torch
from conftest import SMALL

from detector import load, save
from image_ops import to_float
from runtime.files import InputError
from training.choice import CANDIDATES, CHANCE, CROP, FAINT, MARGIN, Judge, choose, choose_density, pasted_images

PATCHES = ["--patch_size", 32, "--window", 8, "--stride", 8, "--epochs", 0]


def noise(count, size=128):
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(0)).byte()


def test_pasted_images_differ_faintly_in_one_small_place():
    images = noise(6)
    before = images.clone()
    pasted = pasted_images(images, torch.Generator().manual_seed(0))
    assert torch.equal(images, before)
    assert 6 < len(pasted) <= 12
    for image in pasted:
        difference = min(((image - other).abs() for other in to_float(images)), key=torch.sum)
        rows, columns = difference.amax(0).nonzero().T
        assert len(rows) > 9
        assert rows.max() - rows.min() < CROP
        assert columns.max() - columns.min() < CROP
        assert difference.max() <= FAINT + 1e-6
    again = pasted_images(images, torch.Generator().manual_seed(0))
    assert torch.equal(pasted, again)


@pytest.mark.parametrize(
    ("aurocs", "expected"),
    [
        ((0.9, 0.9 + MARGIN / 2, 0.8), "both"),
        ((0.9, 0.9 + 2 * MARGIN, 0.8), "nearest"),
        ((0.7, 0.8, 0.8 + MARGIN / 2), "nearest"),
        ((0.5, 0.6, 0.9), "torch"),
        ((0.42, CHANCE, 0.5), "both"),
        ((0.42, CHANCE + 0.01, 0.5), "nearest"),
        ((0.7, 0.7, 0.7, 0.7 + 2 * MARGIN), "nearest shared"),
        ((0.7, 0.8, 0.7, 0.8 + MARGIN / 2), "nearest"),
    ],
)
def test_the_best_is_chosen_or_the_first_that_is_nearly_as_good(aurocs, expected):
    """The last candidate is not always there."""
    assert choose(dict(zip(CANDIDATES[: len(aurocs)], aurocs, strict=True))) == expected


def test_a_detector_says_which_density_it_has_and_why(data, tmp_path, train_brick, script):
    done = train_brick(*SMALL, *PATCHES, "--density", "auto", "--join", 1)
    assert done.code == 0, done.err
    made = load(tmp_path / "models/brick.pt")
    assert made.config.density == "auto"
    assert made.density in CANDIDATES
    assert f"brick: density {made.density} was chosen: both " in done.err
    assert made.metadata["density_chosen"] == made.density
    images = noise(2, 32)
    other = made.changed(density=made.density)  # named by a flag: the same
    assert [level.kind for level in other.members[0].levels] == [level.kind for level in made.members[0].levels]
    assert torch.isfinite(made(images)[0]).all()
    where = ("--data_dir", data, "--model_dir", tmp_path / "models")
    done = script("eval", *where, "--density", "auto", "--save_plots", 0)
    assert done.code == 0, done.err
    assert "was chosen" in done.err
    assert "is finished; skipped" in train_brick(*SMALL, *PATCHES, "--density", "auto", "--join", 1).err


def loose_parts(count, seed=0):
    """Squares with a fine pattern, each somewhere: (N, 3, 32, 48) uint8."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.full((count, 3, 32, 48), 128) + torch.randint(-2, 3, (count, 3, 32, 48), generator=generator)
    pattern = torch.randint(0, 256, (16, 16), generator=torch.Generator().manual_seed(9))
    for image in images:
        y, x = torch.randint(0, 17, (), generator=generator), torch.randint(0, 33, (), generator=generator)
        image[:, y : y + 16, x : x + 16] = pattern
    return images.byte()


def test_windows_from_anywhere_are_a_candidate_unless_a_location_is_asked_for(detectors, tmp_path):
    """It is fitted as --location shared is; the choice goes into the file; a location that is asked for later wins."""
    detector = load(detectors / "patch/brick.pt").changed(density="auto", window=8, stride=8)
    assert detector.config.patches.location == "auto"
    images = loose_parts(40)
    judge = Judge(detector, images)
    assert [*judge.aurocs()] == [*judge.candidates] == [*CANDIDATES]
    known = torch.arange(40)[torch.arange(40) % 5 != 0]
    alone = detector.changed(density="nearest", location="shared").fit(images, threshold=False, numbers=known)
    (candidate,), (expected,) = judge.candidates["nearest shared"].levels, alone.members[0].levels
    assert candidate.shared
    assert not judge.candidates["nearest"].levels[0].shared
    assert torch.allclose(candidate.density.points, expected.density.points)
    assert [*Judge(detector.changed(location="each"), images).candidates] == [*CANDIDATES[:3]]
    made = detector.changed("nearest shared").fit(images)
    assert torch.equal(made(images)[0], detector.changed(density="nearest", location="shared").fit(images)(images)[0])
    save(made, tmp_path / "brick.pt")
    again = load(tmp_path / "brick.pt")
    assert again.density == "nearest shared"
    assert again.members[0].levels[0].shared
    assert torch.equal(again(images)[0], made(images)[0])
    assert again.changed(sigma=3.0).fit(images).members[0].levels[0].shared
    each = again.changed(location="each").fit(images)
    assert (each.density, each.members[0].levels[0].shared) == ("nearest", False)


def test_a_choice_by_chance_says_so(detectors):
    """In noise nothing that is pasted faintly can be told."""
    detector = load(detectors / "patch/brick.pt").changed(density="auto")
    chosen = choose_density(detector, noise(60, 48)[..., :32, :].contiguous())
    (note,) = [note for note in chosen.notes() if "was chosen" in note]
    assert note.startswith("density both was chosen: both ")
    assert note.endswith("; none could tell them much better than chance, 50 %, so the sum of the others was taken")


def test_images_that_are_too_few_or_too_much_alike(detectors):
    detector = load(detectors / "patch/brick.pt")
    size = detector.config.size
    with pytest.raises(InputError, match="2 normal images are too few"):
        Judge(detector, torch.zeros(2, 3, *size, dtype=torch.uint8))
    flat = torch.arange(8)[:, None, None, None].expand(8, 3, *size).byte() * 9
    with pytest.raises(InputError, match="no density can be fitted: all embeddings are equal"):
        Judge(detector, flat)
