"""--ignore: what lies there changes nothing, whether it is learned from, scored or drawn."""

import csv
import io
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SMALL, again, one_line, same_weights
from PIL import Image
from test_detector import CONFIG, PATCHES, pictures

import cutpaste
from dataset import load_fill_index, load_ignored, load_test, load_train
from detector import Detector, initial_network, load, save
from image_ops import NOTHING_IGNORED, fill_ignored, fill_index_of, ignored_pixels
from runtime.cache import Storage
from runtime.files import InputError
from runtime.image_files import decode, find_images

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


def small_pictures(count, seed=0):
    return pictures(count, seed)[..., :32, :48]


def write_mask(path, mask):
    Image.fromarray(np.asarray(mask).astype(np.uint8) * 200).save(path)
    return path


# Masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_size", [(64, 96), (50, 70), (20, 30)])
def test_what_resizing_mixes_with_an_ignored_pixel_is_ignored(tmp_path, file_size):
    mask = np.zeros(file_size, bool)
    mask[7:13, 12:17] = mask[15, -1] = True
    ignored = load_ignored(write_mask(tmp_path / "mask.png", mask), (32, 48), file_size).numpy()
    resized = []
    for value in (0, 255):
        Image.fromarray(np.where(mask, value, 90).astype(np.uint8)).save(tmp_path / "a.png")
        resized.append(decode(tmp_path / "a.png", (32, 48)))
    differs = (resized[0] != resized[1]).any(2)
    assert differs.any()
    assert not (differs & ~ignored).any()
    least = 1 if file_size == (64, 96) else 0.99  # a weight below half a gray value may show nothing
    assert (differs == ignored).mean() >= least


def test_what_is_not_black_in_a_mask_is_ignored_but_not_what_is_transparent(tmp_path):
    """Smoothed edges are ignored too."""
    values = np.linspace(0, 255, 32 * 48).round().astype(np.uint8).reshape(32, 48)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert np.array_equal(load_ignored(tmp_path / "a.png", (32, 48), None), values > 0)
    Image.fromarray(np.dstack([np.full_like(values, 255), values])).save(tmp_path / "a.png")
    assert np.array_equal(load_ignored(tmp_path / "a.png", (32, 48), None), values > 0)


def test_ignored_pixels_become_the_nearest_ones_that_count():
    mask = torch.rand(9, 13, generator=torch.Generator().manual_seed(0)) < 0.8
    fill_index = fill_index_of(mask)
    counts = [(y, x) for y in range(9) for x in range(13) if not mask[y, x]]
    images = torch.randint(0, 256, (2, 3, 9, 13), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    before, filled = images.clone(), fill_ignored(images, fill_index)
    assert torch.equal(images, before)
    for y in range(9):
        for x in range(13):
            v, u = divmod(fill_index[y, x].item(), 13)
            assert (v, u) in counts
            assert (y - v) ** 2 + (x - u) ** 2 == min((y - row) ** 2 + (x - column) ** 2 for row, column in counts)
            assert torch.equal(filled[:, :, y, x], images[:, :, v, u])
    assert torch.equal(fill_ignored(filled, fill_index), filled)
    assert torch.equal(ignored_pixels(fill_index), mask)
    assert fill_ignored(images, NOTHING_IGNORED) is images


def test_masks_that_cannot_be(tmp_path):
    path, dot = tmp_path / "m.png", torch.arange(32 * 48).view(32, 48) == 100
    for mask, words in (
        (np.eye(60), "m.png: mask of 60x60 pixels for images of 96x64; give it their size, or 48x32"),
        (np.ones((32, 48)), "m.png: every pixel is ignored at 48x32"),
        (np.zeros((64, 96)), "m.png: no pixel is ignored at 48x32"),
    ):
        with pytest.raises(InputError, match=words):
            load_ignored(write_mask(path, mask), (32, 48), (64, 96))
    assert load_ignored(write_mask(path, np.eye(60)), (32, 48), None).any()
    assert torch.equal(load_ignored(write_mask(path, dot), (32, 48), (64, 96)), dot)


def test_a_folder_holds_masks_of_some_categories(tmp_path):
    Image.new("L", (48, 32)).save(tmp_path / "photo.png")
    write_mask(tmp_path / "brick.png", box_of(32, 48))
    brick, grass = (
        load_fill_index(str(tmp_path), name, (32, 48), tmp_path / "photo.png") for name in ("brick", "grass")
    )
    assert torch.equal(ignored_pixels(brick), box_of(32, 48))
    assert grass is NOTHING_IGNORED


# Scoring ----------------------------------------------------------------------------------------------------------

WHOLE = replace(CONFIG, backbone="mobilenet_v2", features="level", level=(3,))
PATCH = replace(PATCHES, backbone="mobilenet_v2", level=(2,), height=32, width=48)
KINDS = {
    "folds": replace(WHOLE, folds=2),
    "holdout": replace(WHOLE, holdout=0.25, normalize="imagenet", level=(2, 3)),
    "patches": PATCH,
    "levels": replace(PATCH, level=(2, 3), folds=2),
}


def fitted(config, images, ignored=None):
    networks = [initial_network(config, member=number) for number in range(config.folds)]
    return Detector(config, networks, NOTHING_IGNORED if ignored is None else fill_index_of(ignored)).fit(images)


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
@torch.no_grad()
def test_what_is_ignored_changes_no_score_and_no_map(config, tmp_path):
    normal, test, mask = small_pictures(16), small_pictures(4, seed=1), box_of(32, 48)
    made, before = fitted(config, normal, mask), test.clone()
    prediction = made.predict_batch(test, explain=True)
    heat = made.heat(prediction)
    assert torch.equal(test, before)
    save(made, tmp_path / "brick.pt")
    loaded = load(tmp_path / "brick.pt")
    refitted = loaded.refit(painted(normal))
    for other in (loaded, refitted):
        assert torch.equal(other.calibration_scores, made.calibration_scores)
        same = other.predict_batch(painted(test), explain=True)
        assert torch.equal(same.scores, prediction.scores)
        assert torch.equal(other.heat(same), heat)
    arrays = [image.permute(1, 2, 0).numpy() for image in painted(test)]
    assert np.allclose(loaded.predict(arrays).scores, prediction.scores, rtol=1e-4, atol=1e-4)
    assert torch.equal(loaded.untrained().fill_index, made.fill_index)
    ignored, counts = heat[:, mask], heat[:, ~mask]
    assert (ignored.amax(1) <= counts.amin(1)).all()
    assert (ignored < made.threshold).all()
    bare = fitted(config, normal)
    assert not torch.equal(bare.predict_batch(painted(test)).scores, bare.predict_batch(test).scores)
    if config.folds == 1 and config.patches:
        assert torch.equal(prediction.scores, counts.amax(1).double())
        assert torch.equal(made.members[0].levels[0].density.mean, refitted.members[0].levels[0].density.mean)


@pytest.mark.parametrize("kind", ["patches", "levels"])
@torch.no_grad()
def test_not_even_an_image_that_is_anomalous_everywhere_is_so_where_it_does_not_count(kind):
    mask = box_of(32, 48)
    made = fitted(KINDS[kind], 120 + small_pictures(16) // 16, mask)
    maps = made(torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))[1]
    assert (maps[:, ~mask] > made.threshold).float().mean() > 0.9
    assert (maps[:, mask] < made.threshold).all()
    dark = made.threshold.item() - abs(made.threshold.item()) / 2
    assert np.allclose(maps[:, mask], dark)  # where overlays.overlay is transparent


@torch.no_grad()
def test_a_finished_detector_ignores_one_more_region():
    mask, more = box_of(32, 48), torch.zeros(32, 48, dtype=torch.bool)
    more[20:, :25] = True
    made, images, counts = fitted(PATCH, small_pictures(16), mask), small_pictures(6, seed=1), ~(mask | more)
    before, after = made.predict_batch(images), made.ignore_region(more).predict_batch(images)
    assert torch.equal(after.maps[:, counts], before.maps[:, counts])
    assert torch.equal(after.scores, before.maps[:, counts].amax(1).double())
    assert (after.scores < before.scores).any()
    assert (after.p_values >= before.p_values).all()
    assert (after.maps[:, more].amax(1) <= before.maps.amin((1, 2))).all()
    with pytest.raises(InputError, match="brick: every pixel is ignored"):
        made.ignore_region(~more)


# Training ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def two(data, tmp_path, monkeypatch):
    """The working folder, with folders "one" and "other" of brick whose images differ where mask.png ignores them."""
    monkeypatch.chdir(tmp_path)
    for name in ("one", "other"):
        shutil.copytree(data / "brick", tmp_path / name / "brick")
    for seed, path in enumerate(sorted((tmp_path / "other/brick").glob("t*/*/*.png"))):
        image = torch.from_numpy(decode(path)).permute(2, 0, 1)[None]
        Image.fromarray(painted(image, seed)[0].permute(1, 2, 0).numpy()).save(path)
    write_mask(tmp_path / "mask.png", box_of(32, 32))
    return tmp_path


def test_images_come_out_filled(two):
    """Training and test images, from the cache too; what they were made from decides which a saved state goes with."""
    storage, where = Storage(two / "cache"), ("brick", (32, 32), 0)
    bare, other = (load_train(name, *where, storage) for name in ("one", "other"))
    assert not torch.equal(bare.images, other.images)
    for _ in range(2):
        one, other = (load_train(name, *where, storage, "mask.png") for name in ("one", "other"))
        assert torch.equal(one.images, fill_ignored(bare.images, fill_index_of(box_of(32, 32))))
        assert torch.equal(one.images, other.images)
        assert one.digest == other.digest != bare.digest
    tests = [load_test(name, *where, storage, one.fill_index).images for name in ("one", "other")]
    assert torch.equal(*tests)


def test_training_evaluation_and_preview_do_not_depend_on_it(two, script, monkeypatch):
    monkeypatch.setattr(cutpaste, "SURVEYED_VIEWS", 16)
    told, sheets = [], []
    for name in ("one", "other"):
        flags = (name, two / f"models_{name}", *SMALL, "--ignore", "mask.png")
        assert again(script, *flags, "--preview", "sheet.png").code == 0
        sheets.append((two / "sheet.png").read_bytes())
        done = again(script, *flags, "--epochs", 1, "--test_epochs", 1)
        assert done.code == 0, done.err
        told += [line for line in done.err.splitlines() if "test AUROC" in line]
        done = script("eval", "--data_dir", name, "--model_dir", f"models_{name}", "--save_plots", 0)
        assert done.code == 0, done.err
    assert told[0] == told[1]
    assert sheets[0] == sheets[1]
    assert (two / "Eval/models_one/scores.csv").read_text() == (two / "Eval/models_other/scores.csv").read_text()
    assert same_weights(two / "models_one/brick.pt", two / "models_other/brick.pt")
    one, other = (load(two / f"models_{name}/brick.pt") for name in ("one", "other"))
    assert torch.equal(ignored_pixels(one.fill_index), box_of(32, 32))
    assert torch.equal(one.calibration_scores, other.calibration_scores)


def test_another_mask_does_not_continue_what_is_there(two, train_brick, train_unwritten):
    flags = (*SMALL, "--epochs", 0)
    assert train_unwritten(*flags, "--ignore", "mask.png", data="one").code == 0
    first = (two / "mask.png").read_bytes()
    write_mask(two / "mask.png", np.eye(32))
    done = train_brick(*flags, "--ignore", "mask.png", data="one")
    one_line(done, "under another mask than mask.png", "--overwrite")
    one_line(train_brick(*flags, data="one"), "made with ignore mask.png, now None")
    (two / "mask.png").write_bytes(first)
    assert train_brick(*flags, "--ignore", "mask.png", data="one").code == 0
    write_mask(two / "other.png", np.eye(32))
    done = train_brick(*flags, "--ignore", "other.png", data="one")
    one_line(done, "made with ignore mask.png, now other.png")


def test_a_bad_mask_is_told_before_any_training(two, train_brick):
    write_mask(two / "wide.png", np.eye(40, 32))
    (two / "text.png").write_text("no image")
    (two / "masks").mkdir()
    for name, words in (
        ("none.png", ("none.png: No such file",)),
        ("text.png", ("text.png: not a readable image",)),
        ("wide.png", ("mask of 32x40 pixels", "images of 32x32")),
        ("masks", ("--ignore: masks has no <category>.png for any of brick",)),
    ):
        one_line(train_brick("--ignore", name, data="one"), *words)
    assert not (two / "models").exists()


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
    for kind, config in (("patches", replace(PATCH, **sides)), ("whole", replace(WHOLE, **sides))):
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
