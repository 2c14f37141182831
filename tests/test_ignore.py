"""--ignore: what lies there changes nothing, whether it is learned from, scored or drawn."""

import csv
import io
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import again, one_line, same_weights
from PIL import Image
from test_detector import CONFIG, PATCHES, pictures

import run_training
from cutpaste import VIEWS
from dataset import load_fill_index, load_ignored, load_test, load_train
from detector import Detector, initial_network, load, save
from image_ops import NOTHING_IGNORED, fill_ignored, fill_index_of, ignored_pixels
from runtime.cache import Storage
from runtime.files import InputError
from runtime.image_files import decode, find_images
from training import trainer as log
from training.trainer import Precision

NUMERICS = Precision(1, "off", False)
BOX = (slice(4, 15), slice(20, 40))  # rows, columns


def box_of(height, width):
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[BOX] = True
    return mask


def painted(images, seed=9):
    """Copies of images (N, 3, H, W), with other noise in the box of each."""
    images = images.clone()
    noise = torch.randint(0, 256, images.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    images[(..., *BOX)] = noise[(..., *BOX)]
    return images


def write_mask(path, mask):
    Image.fromarray(np.asarray(mask).astype(np.uint8) * 200).save(path)
    return path


# Masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("own", "size"), [((64, 96), (32, 48)), ((50, 70), (32, 48)), ((20, 30), (32, 48))])
def test_what_resizing_mixes_with_an_ignored_pixel_is_ignored(tmp_path, own, size):
    mask = np.zeros(own, bool)
    mask[7:13, 12:17] = mask[15, -1] = True
    found = load_ignored(write_mask(tmp_path / "mask.png", mask), size, own).numpy()
    pictures = []
    for value in (0, 255):
        Image.fromarray(np.where(mask, value, 90).astype(np.uint8)).save(tmp_path / "a.png")
        pictures.append(decode(tmp_path / "a.png", size))
    differs = (pictures[0] != pictures[1]).any(2)
    assert differs.any()
    assert not (differs & ~found).any()
    assert (differs == found).mean() > 0.99  # a weight below half a gray value may show nothing
    if own == (64, 96):
        assert (differs == found).all()


def test_ignored_pixels_become_the_nearest_ones_that_count():
    mask = torch.rand(9, 13, generator=torch.Generator().manual_seed(0)) < 0.8
    sources = fill_index_of(mask)
    counts = [(y, x) for y in range(9) for x in range(13) if not mask[y, x]]
    for y in range(9):
        for x in range(13):
            source = divmod(sources[y, x].item(), 13)
            assert source in counts
            distances = [(y - v) ** 2 + (x - u) ** 2 for v, u in counts]
            assert (y - source[0]) ** 2 + (x - source[1]) ** 2 == min(distances)
    images = torch.randint(0, 256, (2, 3, 9, 13), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    before, found = images.clone(), fill_ignored(images, sources)
    assert torch.equal(images, before)
    for y in range(9):
        for x in range(13):
            v, u = divmod(sources[y, x].item(), 13)
            assert torch.equal(found[:, :, y, x], images[:, :, v, u])
    assert torch.equal(fill_ignored(found, sources), found)
    assert torch.equal(ignored_pixels(sources), mask)
    assert fill_ignored(images, NOTHING_IGNORED) is images


def test_masks_that_cannot_be(tmp_path):
    def fails(mask, words, file_size=(64, 96)):
        with pytest.raises(InputError, match=words):
            load_ignored(write_mask(tmp_path / "m.png", mask), (32, 48), file_size)

    fails(np.eye(60), "m.png: mask of 60x60 pixels for images of 96x64; give it their size, or 48x32")
    fails(np.ones((32, 48)), "m.png: every pixel is ignored at 48x32")
    fails(np.zeros((64, 96)), "m.png: no pixel is ignored at 48x32")
    assert load_ignored(write_mask(tmp_path / "m.png", np.eye(60)), (32, 48), None).any()
    own = np.zeros((32, 48), bool)
    own[3, 4] = True
    assert (load_ignored(write_mask(tmp_path / "m.png", own), (32, 48), (64, 96)).numpy() == own).all()


def test_a_folder_holds_masks_of_some_categories(tmp_path):
    Image.new("L", (48, 32)).save(tmp_path / "photo.png")
    write_mask(tmp_path / "brick.png", box_of(32, 48))
    found = [load_fill_index(str(tmp_path), name, (32, 48), tmp_path / "photo.png") for name in ("brick", "grass")]
    assert torch.equal(ignored_pixels(found[0]), box_of(32, 48))
    assert found[1] is NOTHING_IGNORED


# Scoring ----------------------------------------------------------------------------------------------------------

WHOLE = replace(CONFIG, backbone="mobilenet_v2", features="level", level=(3,))
SMALL = replace(PATCHES, backbone="mobilenet_v2", level=(2,), height=32, width=48)
BACKBONE = ("--backbone", "mobilenet_v2", "--level", 3)
KINDS = {
    "folds": replace(WHOLE, folds=2),
    "holdout": replace(WHOLE, holdout=0.25, normalize="imagenet", level=(2, 3)),
    "patches": SMALL,
    "levels": replace(SMALL, level=(2, 3), folds=2),
}


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
@torch.no_grad()
def test_what_is_ignored_changes_no_score_and_no_map(config, tmp_path):
    normal, test = (pictures(count, seed=seed)[..., :32, :48] for count, seed in ((16, 0), (4, 1)))
    mask, networks = box_of(32, 48), [initial_network(config, member=number) for number in range(config.folds)]
    made = Detector(config, networks, fill_index_of(mask)).fit(normal)
    before = test.clone()
    judged = made.predict_batch(test, explain=True)
    assert torch.equal(test, before)
    save(made, tmp_path / "brick.pt")
    again = load(tmp_path / "brick.pt")
    refitted = again.refit(painted(normal))
    heat = made.heat(judged)
    for other in (again, refitted):
        assert torch.equal(other.calibration_scores, made.calibration_scores)
        found = other.predict_batch(painted(test), explain=True)
        assert torch.equal(found.scores, judged.scores)
        assert torch.equal(other.heat(found), heat)
    arrays = [image.permute(1, 2, 0).numpy() for image in painted(test)]
    assert np.allclose(again.predict(arrays).scores, judged.scores, rtol=1e-4, atol=1e-4)
    assert torch.equal(again.untrained().fill_index, made.fill_index)
    hidden, counts = heat[:, mask], heat[:, ~mask]
    assert (hidden.amax(1) <= counts.amin(1)).all()
    assert (hidden < made.threshold).all()
    bare = Detector(config, networks).fit(normal)
    assert not torch.equal(bare.predict_batch(painted(test)).scores, bare.predict_batch(test).scores)
    if config.folds == 1 and config.patches:
        assert torch.equal(judged.scores, counts.amax(1).double())
        assert torch.equal(made.members[0].levels[0].density.mean, refitted.members[0].levels[0].density.mean)


@torch.no_grad()
def test_not_even_an_image_that_is_anomalous_everywhere_is_so_where_it_does_not_count():
    mask, calm = box_of(32, 48), 120 + pictures(16)[..., :32, :48] // 16
    for config in (SMALL, replace(SMALL, level=(2, 3), folds=2)):
        networks = [initial_network(config, member=number) for number in range(config.folds)]
        made = Detector(config, networks, fill_index_of(mask)).fit(calm)
        noise = torch.Generator().manual_seed(0)
        maps = made(torch.randint(0, 256, (2, *calm.shape[1:]), dtype=torch.uint8, generator=noise))[1]
        assert (maps[:, ~mask] > made.threshold).float().mean() > 0.9
        assert (maps[:, mask] < made.threshold).all()
        dark = made.threshold.item() - abs(made.threshold.item()) / 2
        assert np.allclose(maps[:, mask], dark)  # where overlays.overlay is transparent


@torch.no_grad()
def test_hiding_takes_a_region_from_the_maps_of_a_finished_detector():
    own, more = box_of(32, 48), torch.zeros(32, 48, dtype=torch.bool)
    more[20:, :25] = True
    made = Detector(SMALL, [initial_network(SMALL)], fill_index_of(own)).fit(pictures(16)[..., :32, :48])
    images = pictures(6, seed=1)[..., :32, :48]
    before, found, counts = made.predict_batch(images), made.ignore_region(more).predict_batch(images), ~(own | more)
    assert torch.equal(found.maps[:, counts], before.maps[:, counts])
    assert torch.equal(found.scores, before.maps[:, counts].amax(1).double())
    assert (found.scores < before.scores).any()
    assert (found.p_values >= before.p_values).all()
    assert (found.maps[:, more].amax(1) <= before.maps.amin((1, 2))).all()
    with pytest.raises(InputError, match="brick: every pixel is ignored"):
        made.ignore_region(~more)


# Training ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def two(data, tmp_path):
    """Folders "one" and "other" of brick whose images differ where the mask.png beside them ignores them."""
    for name in ("one", "other"):
        shutil.copytree(data / "brick", tmp_path / name / "brick")
    for seed, path in enumerate(sorted((tmp_path / "other/brick").glob("t*/*/*.png"))):
        image = torch.from_numpy(decode(path)).permute(2, 0, 1)[None]
        Image.fromarray(painted(image, seed)[0].permute(1, 2, 0).numpy()).save(path)
    write_mask(tmp_path / "mask.png", box_of(32, 32))
    return tmp_path


def test_images_come_out_filled(two, monkeypatch):
    """Training and test images, from the cache too; what they were made from decides which a saved state goes with."""
    monkeypatch.chdir(two)
    storage, where = Storage(two / "cache"), ("brick", (32, 32), 0)
    bare = load_train(two / "one", *where, storage)
    for _ in range(2):
        one, other = (load_train(two / name, *where, storage, "mask.png") for name in ("one", "other"))
        assert torch.equal(one.images, fill_ignored(bare.images, fill_index_of(box_of(32, 32))))
        assert torch.equal(one.images, other.images)
        assert one.digest == other.digest != bare.digest
    tests = [load_test(two / name, *where, storage, one.fill_index).images for name in ("one", "other")]
    assert torch.equal(*tests)


def test_training_and_evaluation_do_not_depend_on_it(two, script, monkeypatch):
    monkeypatch.chdir(two)
    monkeypatch.setattr(log, "LOOKED_AT", 16)
    told = []
    for name in ("one", "other"):
        done = again(
            script, name, two / f"models_{name}", *BACKBONE, "--ignore", "mask.png", "--epochs", 1, "--test_epochs", 1
        )
        assert done.code == 0, done.err
        told += [line for line in done.err.splitlines() if "test AUROC" in line]
        done = script("eval", "--data_dir", name, "--model_dir", f"models_{name}", "--save_plots", 0)
        assert done.code == 0, done.err
    assert told[0] == told[1]
    assert (two / "Eval/models_one/scores.csv").read_text() == (two / "Eval/models_other/scores.csv").read_text()
    assert same_weights(two / "models_one/brick.pt", two / "models_other/brick.pt")
    one, other = (load(two / f"models_{name}/brick.pt") for name in ("one", "other"))
    assert torch.equal(ignored_pixels(one.fill_index), box_of(32, 32))
    assert torch.equal(one.calibration_scores, other.calibration_scores)
    one, other = (load_train(name, "brick", (32, 32), 0).images for name in ("one", "other"))
    assert not torch.equal(one, other)


def test_another_mask_does_not_continue_what_is_there(two, script, monkeypatch):
    monkeypatch.chdir(two)
    start = ("one", two / "models", *BACKBONE, "--epochs", 0)
    with monkeypatch.context() as patch:  # as if killed before the densities were fitted
        patch.setattr(run_training, "write_detector", lambda *_: None)
        assert again(script, *start, "--ignore", "mask.png").code == 0
    own = Image.open("mask.png").copy()
    write_mask(two / "mask.png", np.eye(32))
    one_line(again(script, *start, "--ignore", "mask.png"), "under another mask than mask.png", "--overwrite")
    one_line(again(script, *start), "made with ignore mask.png, now None")
    own.save("mask.png")
    assert again(script, *start, "--ignore", "mask.png").code == 0
    one_line(again(script, *start, "--ignore", "other.png"), "other.png: No such file")
    write_mask(two / "other.png", np.eye(32))
    one_line(again(script, *start, "--ignore", "other.png"), "made with ignore mask.png, now other.png")


def test_a_bad_mask_is_told_before_any_training(two, script, monkeypatch):
    monkeypatch.chdir(two)
    write_mask(two / "wide.png", np.eye(40, 32))
    (two / "text.png").write_text("no image")
    (two / "masks").mkdir()
    for name, words in (
        ("none.png", ("none.png: No such file",)),
        ("text.png", ("text.png: not a readable image",)),
        ("wide.png", ("mask of 32x40 pixels", "images of 32x32")),
        ("masks", ("--ignore: masks has no <category>.png for any of brick",)),
    ):
        one_line(again(script, "one", two / "models", "--ignore", name), *words)
    assert not (two / "models").exists()


def test_the_preview_is_of_filled_images(two, script, monkeypatch):
    monkeypatch.chdir(two)
    shown = []
    monkeypatch.setattr(
        run_training, "invisible_shares", lambda config, images: shown.append(images) or dict.fromkeys(VIEWS, 0)
    )
    done = again(script, "other", two / "models", "--ignore", "mask.png", "--preview", "sheet.png")
    assert done.code == 0, done.err
    expected = load_train("one", "brick", (32, 32), 0).images[:6]
    assert torch.equal(shown[0], fill_ignored(expected, fill_index_of(box_of(32, 32))))


# predict.py -------------------------------------------------------------------------------------------------------


@pytest.fixture
def detectors(data, tmp_path, monkeypatch):
    """The working folder: patches/brick.pt, whole/brick.pt, photos/brick of 64x64 pixels."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos/brick").mkdir(parents=True)
    for path in find_images(data / "brick/test/hole"):
        Image.open(path).resize((64, 64)).save(tmp_path / "photos/brick" / path.name)
    train = load_train(data, "brick", (32, 32), 0).images
    sides = {"height": 32, "width": 32}
    for kind, config in (("patches", replace(SMALL, **sides)), ("whole", replace(WHOLE, **sides))):
        save(Detector(config, [initial_network(config)]).fit(train), tmp_path / kind / "brick.pt")
    return tmp_path


def rows_of(done):
    assert done.code == 0, done.err
    return list(csv.DictReader(io.StringIO(done.out)))


def test_predict_ignores_more_and_no_box_or_mask_covers_it(detectors, script):
    asked = ("patches/brick.pt", "photos/brick", "--false_alarm_rate", 0.5)
    before = rows_of(script("predict", *asked))
    assert any(row["x"] for row in before)
    smaller = 0
    for side in (slice(None, 32), slice(32, None)):
        mask = np.zeros((64, 64), bool)
        mask[:, side] = True
        write_mask(detectors / "mask.png", mask)
        after = rows_of(script("predict", *asked, "--ignore", "mask.png", "--masks", "drawn"))
        for row, earlier in zip(after, before):
            assert float(row["score"]) <= float(earlier["score"])
            assert float(row["p_value"]) >= float(earlier["p_value"])
            smaller += float(row["score"]) < float(earlier["score"])
            if row["x"]:
                x, width = int(row["x"]), int(row["width"])
                assert not mask[:, x : x + width].any()
        drawn = [np.asarray(Image.open(path)) > 0 for path in (detectors / "drawn").glob("**/*.png")]
        assert len(drawn) == len(before)
        assert not np.stack(drawn)[:, mask].any()
    assert smaller >= len(before)
    (detectors / "masks").mkdir()
    write_mask(detectors / "masks/brick.png", mask)
    folder = rows_of(script("predict", "--model_dir", "patches", "photos", "--ignore", "masks"))
    assert [row["score"] for row in folder] == [row["score"] for row in after]


def test_predict_tells_masks_that_cannot_be(detectors, script):
    write_mask(detectors / "mask.png", np.eye(64))
    done = script("predict", "whole/brick.pt", "photos", "--ignore", "mask.png")
    one_line(done, "whole/brick.pt is no patch model", "run_training.py --ignore")
    write_mask(detectors / "mask.png", np.eye(60))
    done = script("predict", "patches/brick.pt", "photos", "--ignore", "mask.png")
    one_line(done, "mask of 60x60 pixels for images of 64x64", "32x32")
    done = script("predict", "patches/brick.pt", "photos", "--ignore", "photos")
    one_line(done, "--ignore: photos has no <category>.png for any of brick")
