"""Before and after the training loop: what is on disk is checked and continued, and a finished detector is one file."""

import re
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SMALL, TINY, contents, network_of, one_line, same_weights, start, wait_for_step
from forked import Forked
from PIL import Image

import run_training
from dataset import load_train
from detector import load, save
from normals import load_normals, normals_path
from runtime.files import PART, load_tensors, save_tensors

FILES = ["brick.normals", "brick.pt"]  # all that is left of a training


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def copied(data, tmp_path):
    """A data folder with brick that a test may change."""
    shutil.copytree(data / "brick", tmp_path / "Data/brick")
    return tmp_path / "Data"


# Several networks, several seeds ----------------------------------------------------------------------------------


def test_training_names_the_most_unusual_images_and_leaves_one_file(three, data):
    folder, err = three
    assert names(folder) == FILES
    made = load(folder / "brick.pt")
    highest = f"{made.calibration_scores.argmax():03}.png {made.calibration_scores.max():.1f}, "
    assert f"least like the others, by networks that have not seen them: {highest}" in err
    refitted = made.refit(load_train(data, "brick", made.config.size, 0).images)
    assert torch.equal(refitted.calibration_scores, made.calibration_scores)
    assert names(folder.parent / "logdirs/models/brick") == ["network0", "network1", "network2"]


def test_killed_within_the_second_network_equals_uninterrupted(three, data, tmp_path, train_brick):
    folder, flags = tmp_path / "models", (*SMALL, "--folds", 3)
    process = start(data, folder, "--type", "brick", *flags)
    wait_for_step(process, folder / "brick.checkpoints/1.checkpoint", 2)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "brick.pt").exists()
    one_line(train_brick(*flags, "--folds", 2), "made with folds 3, now 2", "--overwrite")
    done = train_brick(*flags)
    assert done.code == 0, done.err
    assert "brick 2 of 3: continuing at step" in done.err
    assert same_weights(folder / "brick.pt", three[0] / "brick.pt")
    assert names(folder) == FILES


def test_overwriting_leaves_no_state_of_another_number_of_networks(tmp_path, train_brick, train_unwritten):
    assert train_unwritten(*SMALL, "--folds", 2, "--epochs", 1).code == 0
    assert names(tmp_path / "models/brick.checkpoints") == ["0.checkpoint", "1.checkpoint"]
    done = train_brick(*SMALL, "--overwrite", "--epochs", 2)
    assert done.code == 0, done.err
    assert names(tmp_path / "models") == FILES
    assert load(tmp_path / "models/brick.pt").config.folds == 1


def test_a_budget_of_minutes_sets_the_number_of_steps(data, tmp_path, script):
    """It is shared by the networks and stored, and an interrupted run continues with it; another one is refused."""
    given = ["--data_dir", data, "--model_dir", tmp_path / "models", "--logdir", tmp_path / "logdirs"]
    given += [*TINY, *SMALL, "--type", "brick", "--folds", 2, "--minutes", 0.1]  # on a busy machine too, steps are left
    for place in [place for place, flag in enumerate(given) if flag == "--epochs"][::-1]:
        del given[place : place + 2]
    process = Forked(run_training.__file__, "--save_minutes", 0, *given)
    state = tmp_path / "models/brick.checkpoints/0.checkpoint"
    wait_for_step(process, state, 1)
    process.send_signal(signal.SIGINT)
    told = process.communicate()[1]
    (steps,) = map(int, re.findall(r"brick: (\d+) steps in 0.05 minutes", told))
    assert process.returncode == 130
    assert load_tensors(state, "checkpoint")["config"]["epochs"] == steps
    done = script("run_training", *given)
    assert done.code == 0, done.err
    assert "steps in" not in done.err  # not planned anew
    config = load(tmp_path / "models/brick.pt").config
    assert (config.epochs, config.minutes) == (steps, 0.1)
    assert "is finished; skipped" in script("run_training", *given).err
    one_line(script("run_training", *given[:-1], 0.5), "minutes 0.1, now 0.5")


def test_seeds_have_folders_of_their_own(seeds, data, tmp_path, train_brick):
    assert names(seeds) == ["seed10", "seed2"]
    assert load(seeds / "seed10/brick.pt").config.seed == 10
    assert not same_weights(seeds / "seed10/brick.pt", seeds / "seed2/brick.pt")
    assert train_brick(*SMALL, "--epochs", 1, "--seed", 10).code == 0
    assert same_weights(tmp_path / "models/brick.pt", seeds / "seed10/brick.pt")


def test_the_network_as_it_is(data, tmp_path, script, train_brick):
    """--epochs 0: the untrained baseline as a detector."""
    done = train_brick(*SMALL, "--epochs", 0, "--amp", "auto", "--test_epochs", 1, "--batch_size", 32)
    assert done.code == 0, done.err
    assert [line.partition(": ")[0] for line in done.err.splitlines()[:-1]] == ["brick"] * 2  # nothing of training
    assert "needs 99 normal images" in done.err
    made = load(tmp_path / "models/brick.pt")
    initial = network_of(made.untrained()).state_dict()
    assert all(torch.equal(value, initial[name]) for name, value in network_of(made).state_dict().items())
    assert names(tmp_path / "models") == FILES
    where = ["--data_dir", data, "--model_dir", tmp_path / "models", "--eval_dir", tmp_path / "Eval"]
    done = script("eval", *where, "--control", 1, "--save_plots", 0)
    auc, control = (float(line.rsplit(": ", 1)[1]) for line in done.out.splitlines()[:2])
    assert auc == pytest.approx(control)


def test_a_second_training_in_a_folder_says_so_and_stops(data, tmp_path, train_brick):
    """While the first one is at work; what that one leaves when it is killed goes, and no link in the way of its
    temporary names is followed."""
    folder, flags = tmp_path / "models", (*SMALL, "--epochs", 50)
    folder.mkdir()
    (tmp_path / "victim").write_text("precious")
    for name in (".brick.checkpoint.part", ".brick.pt.part", ".writable.0"):
        (folder / name).symlink_to("../victim")
    process = start(data, folder, "--type", "brick", *flags)
    wait_for_step(process, folder / "brick.checkpoint", 2)
    for more in ((), ("--overwrite",)):
        one_line(train_brick(*flags, *more), f"{folder}: another run is writing to it; wait for it, or take another")
    assert process.poll() is None
    process.kill()
    process.wait()
    (folder / f".0{PART}").write_text("half")
    done = train_brick(*flags)
    assert done.code == 0, done.err
    assert "continuing at step" in done.err
    assert [name for name in names(folder) if not name.endswith((".part", ".writable.0"))] == FILES
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_detector_takes_in_new_images(data, tmp_path, script, train_brick):
    """It is told that train/good has changed; --refit gives what a training on all images would, of the same networks:
    here as they are, so that the two can be compared."""
    folder, models = tmp_path / "Data/brick/train/good", tmp_path / "models"
    shutil.copytree(data / "brick/train", tmp_path / "Data/brick/train")
    last = sorted(folder.glob("*.png"))[-1]
    last.rename(tmp_path / "later.png")
    flags = [*SMALL, "--epochs", 0, "--folds", 2]
    assert train_brick(*flags, data=tmp_path / "Data").code == 0
    made = load(models / "brick.pt")
    assert "(--overwrite trains it anew)" in train_brick(*flags, data=tmp_path / "Data").err
    (tmp_path / "later.png").rename(last)
    done = train_brick(*flags, data=tmp_path / "Data")
    assert done.code == 0, done.err
    assert f"{folder} has changed since it was made: 8 images, 7 then. --refit takes them in" in done.err
    where = [
        "--data_dir",
        tmp_path / "Data",
        "--model_dir",
        models,
        "--logdir",
        tmp_path / "logdirs",
        "--type",
        "brick",
    ]
    done = script("run_training", *where, "--refit")  # settings are the detector's
    assert done.code == 0, done.err
    assert "anew to 8 images (7 before); its networks stay; an exported file must be exported again" in done.err
    refitted = load(models / "brick.pt")
    assert (len(made.calibration_scores), len(refitted.calibration_scores)) == (7, 8)
    assert refitted.config == made.config
    assert train_brick(*flags, "--overwrite", data=tmp_path / "Data").code == 0
    assert torch.equal(load(models / "brick.pt").calibration_scores, refitted.calibration_scores)
    assert "(--overwrite trains it anew)" in train_brick(*flags, data=tmp_path / "Data").err
    load_normals(normals_path(models / "brick.pt"), load(models / "brick.pt"))
    one_line(script("run_training", *where, *TINY, *flags, "--folds", 3, "--refit"), "folds 2", "3")
    assert script("run_training", *where, "--refit", "--overwrite").code == 2


def test_a_refit_takes_settings_that_are_not_given_from_the_detector(data, tmp_path, script, train_brick):
    """A false-alarm rate that is given is the new one, also after --set_rate, and training finds the detector then."""
    flags = [*SMALL, "--epochs", 0]
    assert train_brick(*flags).code == 0
    path = tmp_path / "models/brick.pt"
    made = load(path)
    save(load(path).set_false_alarm_rate(0.4, "The rate was chosen by labels"), path)
    where = ["--data_dir", data, "--logdir", tmp_path / "logdirs", "--type", "brick", "--model_dir", path.parent]
    done = script("run_training", *where, "--refit", "--false_alarm_rate", 0.2)
    assert done.code == 0, done.err
    assert f"brick: {path} decides at 0.2 from now on" in done.err
    refitted = load(path)
    assert refitted.config == replace(made.config, false_alarm_rate=0.2)
    assert refitted.rate_chosen == "The rate was set by hand"
    assert refitted.threshold == made.set_false_alarm_rate(0.2).threshold
    again = script("run_training", *where, "--refit", "--density", made.config.density)
    assert again.code == 0, again.err
    assert "from now on" not in again.err
    assert load(path).config == refitted.config
    one_line(script("run_training", *where, "--refit", "--variant", "scar"), "made with variant 3way, now scar")
    assert "is finished; skipped" in train_brick(*flags).err


def test_refit_refuses_what_would_break_a_promise(three, data, tmp_path, script):
    """Networks trained on folds know images that others would come to stand for; and a detector must be there."""
    shutil.copytree(three[0], tmp_path / "models")
    before = contents(tmp_path / "models")
    where = ["--data_dir", data, "--logdir", tmp_path / "logdirs", "--type", "brick", "--refit", "--model_dir"]
    one_line(script("run_training", *where, tmp_path / "models"), "brick.pt: was trained with --folds", "--overwrite")
    assert contents(tmp_path / "models") == before
    one_line(script("run_training", *where, tmp_path / "none"), "brick.pt: no finished detector")


# What is on disk --------------------------------------------------------------------------------------------------


def test_a_finished_category_is_skipped_and_other_settings_are_named(models, tmp_path, train_brick):
    shutil.copytree(models, tmp_path / "models")
    path = tmp_path / "models/brick.pt"
    before = path.stat().st_mtime_ns
    done = train_brick()
    assert done.code == 0
    assert "is finished; skipped" in done.err
    one_line(train_brick("--lr", 0.1), str(path), "lr 0.03", "0.1", "--overwrite")
    one_line(train_brick("--variant", "scar"), "3way", "scar")
    assert path.stat().st_mtime_ns == before
    assert train_brick("--epochs", 1, "--overwrite").code == 0
    assert load(path).config.epochs == 1


def test_a_state_of_other_images_or_another_version_is_refused(
    copied, tmp_path, monkeypatch, train_brick, train_unwritten
):
    flags, state = (*SMALL, "--epochs", 0), tmp_path / "models/brick.checkpoint"
    assert train_unwritten(*flags, data=copied).code == 0
    image = copied / "brick/train/good/000.png"
    content, pixels = image.read_bytes(), np.array(Image.open(image))
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(image)
    refused = ("brick.checkpoint", "other images", "--overwrite")
    one_line(train_brick(*flags, data=copied), *refused)
    with monkeypatch.context() as patch:  # as where ranks have shared the networks, and one writes the detector
        patch.setattr(run_training, "train_networks", lambda *_: None)
        one_line(train_brick(*flags, data=copied), *refused)
    image.write_bytes(content)
    saved = load_tensors(state, "checkpoint")
    save_tensors(saved | {"version": saved["version"] - 1}, state)
    one_line(train_brick(*flags, data=copied), "brick.checkpoint", "another version of this program", "--overwrite")
    state.write_text("hello")
    one_line(train_brick(*flags, data=copied), "brick.checkpoint", "truncated, damaged")
    assert names(tmp_path / "models") == ["brick.checkpoint"]


def test_equal_images_are_refused_and_copies_of_one_are_not(copied, data, tmp_path, train_brick):
    good = copied / "brick/train/good"
    for path in good.iterdir():
        shutil.copy(data / "brick/train/good/000.png", path)
    one_line(train_brick(data=copied), "brick", "all training images are equal")
    shutil.copy(data / "brick/train/good/001.png", good / "9.png")
    done = train_brick(*SMALL, "--epochs", 2, "--batch_size", 16, data=copied)
    assert done.code == 0, done.err
    assert "9 training images, so 9 per step" in done.err
    assert load(tmp_path / "models/brick.pt").threshold > 0


def test_too_few_images_for_a_gaussian_each_are_told_before_training(copied, tmp_path, train_brick):
    for path in sorted((copied / "brick/train/good").iterdir())[5:]:
        path.unlink()
    patches = ("--patch_size", 32, "--window", 8, "--location", "each")
    one_line(
        train_brick(*patches, data=copied), "--location", "brick: 5 training images", "needs 8", "take shared or auto"
    )
    assert not (tmp_path / "logdirs").exists()


@pytest.mark.parametrize(("kind", "words"), [("hole", "test images of one kind only"), ("", "no test images")])
def test_it_trains_without_test_images_of_both_kinds(copied, tmp_path, train_brick, kind, words):
    for folder in (copied / "brick/test").iterdir():
        if folder.name != kind:
            shutil.rmtree(folder)
    done = train_brick(*SMALL, "--epochs", 1, "--test_epochs", 1, data=copied)
    assert done.code == 0, done.err
    assert f"brick: {words}, so no AUROC while training" in done.err


def test_watched_images_of_another_size_ignore_what_the_training_images_do(copied, tmp_path, train_brick):
    width, height = Image.open(copied / "brick/train/good/000.png").size
    Image.fromarray(np.eye(height, width, dtype=np.uint8) * 255).save(tmp_path / "mask.png")
    for path in (copied / "brick/test").glob("*/*.png"):
        Image.open(path).resize((2 * width, 2 * height)).save(path)
    shutil.rmtree(copied / "brick/ground_truth", ignore_errors=True)
    flags = ("--size", 48, "--epochs", 1, "--test_epochs", 1, "--ignore", tmp_path / "mask.png")
    done = train_brick(*SMALL, *flags, data=copied)
    assert done.code == 0, done.err
    assert "brick: step 1, test AUROC" in done.err


def test_bad_input_gets_one_line(data, tmp_path, train_brick):
    def fails(*words, flags=(), data=tmp_path / "Data"):
        one_line(train_brick(*flags, data=data), *words)
        assert not (tmp_path / "models/brick.pt").exists()

    fails("nowhere", "no such folder", data=tmp_path / "nowhere")
    fails("glass", "no such category", "brick, grass, gravel", flags=("--type", "glass"), data=data)
    good = tmp_path / "Data/brick/train/good"
    good.parents[1].mkdir(parents=True)
    fails("brick/train/good", "no such folder")
    good.mkdir(parents=True)
    fails(str(good), "0 image(s) found, at least 2", "png")
    shutil.copy(data / "brick/train/good/000.png", good)
    fails(str(good), "1 image(s) found, at least 2")
    whole = (good / "000.png").read_bytes()
    (good / "001.png").write_bytes(whole[: len(whole) // 2])
    fails("001.png", "not a readable image")
    if not torch.cuda.is_available():
        fails("--cuda 1", flags=("--cuda", 1), data=data)
    (tmp_path / "file").write_text("")
    fails("file/models", flags=("--model_dir", tmp_path / "file/models"), data=data)


def test_a_refit_takes_new_settings_of_the_density(data, tmp_path, script, train_brick):
    """As eval.py does, but into the file; the command that trained it finds it finished all the same."""
    flags = ["--size", 32, "--patch_size", 32, "--window", 16, "--no-pretrained", "--epochs", 0, "--head_layer", 0]
    assert train_brick(*flags).code == 0
    path = tmp_path / "models/brick.pt"
    made = load(path)
    where = ["--data_dir", data, "--logdir", tmp_path / "logdirs", "--type", "brick", "--model_dir", path.parent]
    done = script("run_training", *where, "--refit", "--sigma", 3, "--density", "nearest")
    assert done.code == 0, done.err
    assert "now density nearest; now sigma 3.0; its networks stay" in done.err
    expected = made.refit(load_train(data, "brick", (32, 32), 0).images, sigma=3.0, density="nearest")
    refitted = load(path)
    assert refitted.config == expected.config
    assert torch.equal(refitted.calibration_scores, expected.calibration_scores)
    assert "is finished; skipped (--overwrite trains it anew)" in train_brick(*flags).err
    one_line(train_brick(*flags, "--stride", 4), "made with stride 8, now 4")
    done = script("run_training", *where, "--refit", "--density", "auto")
    assert done.code == 0, done.err
    chosen = load(path)
    assert (chosen.config.density, chosen.config.patches.sigma) == ("auto", 3.0)
    assert chosen.metadata["refitted"] == "density sigma"
    assert script("run_training", *where, "--refit", "--density", "torch").code == 0
    assert "density_chosen" not in load(path).metadata
    one_line(
        script("run_training", *where, "--refit", "--density", "kde"), "--density: kde cannot be fitted", str(path)
    )
    one_line(script("run_training", *where, "--refit", "--head_layer", 2), "made with head_layer 0, now 2")


def test_a_refit_of_an_image_level_model_takes_no_settings_of_maps(data, tmp_path, script, train_brick):
    assert train_brick("--size", 32, "--no-pretrained", "--epochs", 0, "--level", 3).code == 0
    where = ["--data_dir", data, "--logdir", tmp_path / "logdirs", "--model_dir", tmp_path / "models"]
    done = script("run_training", *where, "--type", "brick", "--refit", "--features", "all")
    assert done.code == 0, done.err
    assert "; now features all; its networks stay" in done.err  # and no word of a level, which it has not
    one_line(
        script("run_training", *where, "--type", "brick", "--refit", "--sigma", 3), "--sigma: it is no patch model"
    )
