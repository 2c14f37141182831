"""Images of 10 bits in files of 16: learned from, scored and drawn as in 8 bits, by what the detector's file says."""

import shutil

import numpy as np
import pytest
import torch
from conftest import again, one_line, rows_of, same_weights
from PIL import Image

from dataset import find_white, load_images, load_test, load_train
from detector import WHITES, load, save
from runtime.cache import Storage
from runtime.files import load_tensors, save_tensors
from runtime.image_files import FULL_RANGE, decode, find_images

FLAGS = ("--type", "brick", "--patch_size", 32, "--epochs", 1, "--test_epochs", 1)


def as_10_bits(source, target):
    """Write an 8-bit gray image as one of 16 bits with values up to 1023."""
    values = (np.asarray(Image.open(source)) * (1023 / 255)).round().astype(np.uint16)
    Image.fromarray(values).save(target)


@pytest.fixture(scope="module")
def deep(data, tmp_path_factory):
    """Folders "8" and "10" of brick in so many bits."""
    folder = tmp_path_factory.mktemp("depth")
    for kind in ("8", "10"):
        shutil.copytree(data / "brick", folder / kind / "brick")
    for path in [*(folder / "10").glob("brick/*/*/*.png")]:
        if "ground_truth" not in path.parts:
            as_10_bits(path, path)
    return folder


@pytest.fixture
def trained(deep, script):
    """The same, beside folders "models8" and "models10" of detectors, and files of what training told."""
    if not (deep / "models8").exists():
        for kind in ("8", "10"):
            done = again(script, deep / kind, deep / f"models{kind}", *FLAGS)
            assert done.code == 0, done.err
            (deep / f"told{kind}").write_text(done.err)
    return deep


def test_the_largest_value_of_a_training_set_says_what_is_white(deep, tmp_path):
    ten, eight = (find_images(deep / kind / "brick/train/good") for kind in ("10", "8"))
    assert find_white(ten, 2) == find_white([*eight, *ten], 0) == 1023
    assert find_white(eight, 2) == FULL_RANGE
    for largest, white in ((1023, 1023), (1024, 2047), (4095, 4095), (40000, FULL_RANGE), (FULL_RANGE, FULL_RANGE)):
        Image.fromarray(np.array([[0, largest]], np.uint16)).save(tmp_path / "a.png")
        assert find_white([*ten, tmp_path / "a.png"], 2) == white
        assert white in WHITES
    assert load_train(deep / "10", "brick", (32, 32), 0).white == 1023


def test_training_evaluation_and_prediction_are_as_in_8_bits(trained, script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = "brick: 1023 is white in 16-bit images, now and whenever this detector scores one"
    assert told in (trained / "told10").read_text()
    assert "grays" not in (trained / "told10").read_text()  # of test images that are watched
    assert "16-bit" not in (trained / "told8").read_text()
    assert same_weights(trained / "models8/brick.pt", trained / "models10/brick.pt")
    outputs = {}
    for kind in ("8", "10"):
        where = ("--data_dir", trained / kind, "--model_dir", trained / f"models{kind}", "--eval_dir", tmp_path / kind)
        runs = [
            script("eval", *where, "--control", 1, "--sigma", 2),
            script("eval", *where),
            script("check_data", *where),
        ]
        flags = ("--heatmaps", tmp_path / f"heat{kind}", "--masks", tmp_path / f"masks{kind}")
        runs.append(script("predict", trained / f"models{kind}/brick.pt", trained / kind / "brick/test", *flags))
        runs.append(
            script("run_training", "--data_dir", trained / kind, *FLAGS, "--size", 32, "--preview", f"{kind}.png")
        )
        assert [done.code for done in runs] == 5 * [0], [done.err for done in runs]
        assert not any("grays" in done.err or "cut off" in done.err for done in runs)
        outputs[kind] = [done.out.replace(str(trained / kind), "") for done in runs[:3]]
        file_columns = {"path": "", "time": "", "bytes": "", "modified": ""}  # they tell the files apart
        outputs[kind] += [row | file_columns for row in rows_of(runs[3].out)]
        drawings = [
            *sorted((tmp_path / f"heat{kind}").rglob("*.png")),
            *sorted((tmp_path / f"masks{kind}").rglob("*.png")),
        ]
        assert len(drawings) == 24
        outputs[kind] += [path.read_bytes() for path in [*drawings, tmp_path / f"{kind}.png"]]
    assert outputs["8"] == outputs["10"]


def test_what_a_detector_takes_for_white_is_in_its_file(trained, tmp_path):
    detector, eight = load(trained / "models10/brick.pt"), load(trained / "models8/brick.pt")
    assert (detector.white, eight.white) == (1023, FULL_RANGE)
    paths = [find_images(trained / kind / "brick/test/hole") for kind in ("10", "8")]
    expected = eight.predict(paths[1]).scores
    assert np.array_equal(detector.predict(paths[0]).scores, expected)
    images = load_train(trained / "10", "brick", (32, 32), 0, white=detector.white).images
    for other in (detector.refit(images), detector.untrained()):
        assert other.white == 1023
    save(eight, tmp_path / "brick.pt")
    content = load_tensors(tmp_path / "brick.pt", "detector")
    del content["white"]
    save_tensors(content | {"version": 8}, tmp_path / "brick.pt")  # earlier files have none
    assert load(tmp_path / "brick.pt").white == FULL_RANGE
    assert np.array_equal(load(tmp_path / "brick.pt").predict(paths[1]).scores, expected)


@pytest.mark.parametrize("white", [1000, 0, 1023.0, "1023", None, 2**20 - 1, torch.tensor([1023, 1023])])
def test_a_file_with_a_white_that_cannot_be_is_damaged(trained, tmp_path, script, white):
    content = load_tensors(trained / "models10/brick.pt", "detector")
    save_tensors(content | {"white": white}, tmp_path / "brick.pt")
    one_line(script("predict", tmp_path / "brick.pt", trained / "10/brick/test"), "damaged detector file (white ")


def test_cached_images_are_of_one_white(deep, tmp_path):
    paths, storage = find_images(deep / "10/brick/train/good"), Storage(tmp_path)
    for white in (1023, FULL_RANGE, 1023, 4095):
        images = load_images(paths, (32, 32), 0, storage, white=white)
        expected = [decode(path, (32, 32), white) for path in paths]
        assert np.array_equal(images.permute(0, 2, 3, 1), expected)
    test = load_test(deep / "10", "brick", (32, 32), 0, storage, white=1023)
    assert torch.equal(test.images, load_test(deep / "8", "brick", (32, 32), 0).images)


def test_an_image_that_is_brighter_than_white_is_cut_off_and_told(trained, tmp_path, script):
    photo = find_images(trained / "10/brick/test/good")[0]
    (tmp_path / "photos").mkdir()
    values = np.asarray(Image.open(photo)).copy()
    values[10:14, 10:14] = 1023
    Image.fromarray(values).save(tmp_path / "photos/a.png")
    values[10:14, 10:14] = 5000
    Image.fromarray(values).save(tmp_path / "photos/b.png")
    done = script("predict", trained / "models10/brick.pt", tmp_path / "photos")
    assert done.code == 0, done.err
    first, second = rows_of(done.out)
    assert first["score"] == second["score"]
    assert f"{tmp_path / 'photos'}: 16-bit images with values above 1023" in done.err
