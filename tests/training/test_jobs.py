"""Detectors of several networks, and of several seeds: who sees which images, what is averaged, that all continues."""

import signal
from dataclasses import replace

import numpy as np
import pandas
import pytest
import torch
from conftest import again, fork, network_of, one_line, same_weights, start, train, wait_for_step
from test_detector import CONFIG, PATCHES, pictures

import run_training
from config import SettingError
from dataset import load_test, load_train
from detector import Detector, all_but, initial_network, load, save, stream, unseen_by
from reporting.metrics import image_metrics

FOLDS = replace(CONFIG, folds=3)


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (13, 3, 32, 48), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture(scope="module")
def fitted(images):
    return Detector(FOLDS, [initial_network(FOLDS, member=number) for number in range(3)]).fit(images)


def scores_of(made, images):
    return torch.cat([scores for scores, _ in stream(made, images)])


# Members ----------------------------------------------------------------------------------------------------------


def test_each_image_is_left_out_by_one_member():
    for number in range(3):
        assert all_but(unseen_by(FOLDS, 13, number), 13).tolist() == [i for i in range(13) if i % 3 != number]
    assert unseen_by(CONFIG, 13, 0).tolist() == []


def test_scores_are_those_of_the_members_in_deviations_of_the_images_they_have_not_seen(fitted, images):
    expected, held_out = 0, torch.empty(13, dtype=torch.float64)
    for number in range(3):
        alone = Detector(CONFIG, [initial_network(FOLDS, member=number)])
        alone.fit(images[[i for i in range(13) if i % 3 != number]], threshold=False)
        unseen = scores_of(alone, images[number::3])
        held_out[number::3] = (unseen - unseen.mean()) / unseen.std()
        expected = expected + (scores_of(alone, images) - unseen.mean()) / unseen.std() / 3
    assert torch.allclose(fitted.calibration_scores, held_out, rtol=1e-6, atol=1e-9)
    assert torch.allclose(scores_of(fitted, images), expected, rtol=1e-6, atol=1e-9)
    assert fitted.threshold == fitted.calibration_scores.sort().values[12 - 1]  # the ceil(0.8 * 14)-th
    assert fitted.unit == "standardized Mahalanobis distance, mean of 3 networks"


def test_members_begin_with_networks_of_their_own_the_first_as_if_alone(fitted):
    weights = [member.network.head[0].weight for member in fitted.untrained().members]
    assert torch.equal(weights[0], initial_network(CONFIG).head[0].weight)
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])


@pytest.mark.parametrize("config", [FOLDS, replace(PATCHES, folds=2), replace(PATCHES, folds=2, level=(2, 3))])
def test_round_trip(tmp_path, config):
    normal = pictures(20)[..., : config.height, : config.width]
    one = Detector(config).fit(normal)
    save(one, tmp_path / "brick.pt")
    other = load(tmp_path / "brick.pt")
    for found, expected in zip(stream(other, normal), stream(one, normal)):
        assert torch.equal(found[0], expected[0])
        assert found[1] is expected[1] is None or torch.equal(found[1], expected[1])
    assert other.config == config
    assert torch.equal(other.calibration_scores, one.calibration_scores)
    assert len(other.members) == config.folds


def test_maps_are_averaged(tmp_path):
    config = replace(PATCHES, folds=2)
    made = Detector(config).fit(pictures(20))
    scores, maps = made(pictures(3, seed=1))
    parts = [member(pictures(3, seed=1)) for member in made.members]
    assert torch.allclose(maps, (parts[0][1] + parts[1][1]) / 2, atol=1e-4)
    assert torch.allclose(scores, (parts[0][0] + parts[1][0]) / 2)
    assert torch.allclose(parts[0][0], parts[0][1].amax((1, 2)).double(), atol=1e-4)


def test_grad_cam_has_the_scores_of_the_detector(fitted, images):
    cam = lambda prepared: fitted.predict_prepared(prepared, explain=True)  # noqa: E731
    predictions = list(stream(fitted, images, cam))
    scores = torch.cat([prediction.scores for prediction in predictions])
    maps = torch.cat([fitted.heat(prediction) for prediction in predictions])
    assert torch.allclose(scores, scores_of(fitted, images), rtol=1e-4, atol=1e-4)
    assert maps.shape == (13, 32, 48)
    every = Detector(replace(CONFIG, features="all")).fit(images)
    prediction = every.predict_batch(images, explain=True)
    scores, maps = prediction.scores, every.heat(prediction)
    assert torch.allclose(scores, every(images)[0], rtol=1e-4, atol=1e-4)
    assert maps.min() >= 0
    assert maps.max() > 0


def test_too_few_images_for_the_folds(images):
    with pytest.raises(SettingError, match="brick: 5 training images make at most 2 folds of two, 3 were asked for"):
        Detector(FOLDS).fit(images[:5])


# Training ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three(data, tmp_path_factory):
    """A detector of three networks, trained in one go."""
    folder = tmp_path_factory.mktemp("three") / "models"
    done = train(data, folder, "--type", "brick", "--folds", 3)
    assert done.code == 0, done.err
    return folder, done.err


def test_training_names_the_most_unusual_images_and_leaves_one_file(three, data):
    folder, err = three
    assert sorted(path.name for path in folder.iterdir()) == ["brick.normals", "brick.pt"]
    made = load(folder / "brick.pt")
    worst = f"{made.calibration_scores.argmax():03}.png {made.calibration_scores.max():.1f}, "
    assert f"least like the others, by networks that have not seen them: {worst}" in err
    again = made.refit(load_train(data, "brick", made.config.size, 0).images)
    assert torch.equal(again.calibration_scores, made.calibration_scores)
    logs = sorted(path.name for path in (folder.parent / "logdirs/models/brick").iterdir())
    assert logs == ["network0", "network1", "network2"]


def test_killed_within_the_second_member_equals_uninterrupted(three, data, tmp_path, script):
    folder = tmp_path / "models"
    more = ("--type", "brick", "--folds", 3)
    process = start(data, folder, *more)
    wait_for_step(process, folder / "brick.checkpoints/1.checkpoint", 2)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "brick.pt").exists()
    one_line(again(script, data, folder, *more, "--folds", 2), "made with folds 3, now 2", "--overwrite")
    done = again(script, data, folder, *more)
    assert done.code == 0, done.err
    assert "brick 2 of 3: continuing at step" in done.err
    assert same_weights(folder / "brick.pt", three[0] / "brick.pt")
    assert sorted(path.name for path in folder.iterdir()) == ["brick.normals", "brick.pt"]


def test_overwriting_leaves_no_state_of_another_number_of_networks(data, tmp_path, script, monkeypatch):
    folder = tmp_path / "models"
    with monkeypatch.context() as patch:  # as if killed before the densities were fitted
        patch.setattr(run_training, "write_detector", lambda *_: None)
        assert again(script, data, folder, "--type", "brick", "--folds", 2, "--epochs", 1).code == 0
    assert len(list((folder / "brick.checkpoints").iterdir())) == 2
    done = again(script, data, folder, "--type", "brick", "--overwrite", "--epochs", 2)
    assert done.code == 0, done.err
    assert sorted(path.name for path in folder.iterdir()) == ["brick.normals", "brick.pt"]
    assert load(folder / "brick.pt").config.folds == 1


def test_minutes_are_shared_by_the_networks(data, tmp_path, script):
    where = ["--data_dir", data, "--model_dir", tmp_path, "--logdir", tmp_path / "logs", "--type", "brick"]
    small = ["--no-pretrained", "--size", 32, "--batch_size", 4, "--test_epochs", -1, "--folds", 2]
    done = script("run_training", *where, *small, "--minutes", 0.1)
    assert done.code == 0, done.err
    assert done.err.count("steps in 0.05 minutes") == 1
    assert load(tmp_path / "brick.pt").config.epochs > 1


# Evaluation -------------------------------------------------------------------------------------------------------


def test_eval_lists_the_training_images_as_they_were_not_seen(three, data, tmp_path, script):
    where = ["--data_dir", data, "--model_dir", three[0], "--eval_dir", tmp_path, "--type", "brick"]
    done = script("eval", *where, "--control", 1)
    assert done.code == 0, done.err
    rows = pandas.read_csv(tmp_path / "models/normal_scores.csv")
    made = load(three[0] / "brick.pt")
    assert rows.score.is_monotonic_decreasing
    found = {row.path: row.score for row in rows.itertuples()}
    expected = {f"brick/train/good/{i:03}.png": s for i, s in enumerate(made.calibration_scores.tolist())}
    assert found == pytest.approx(expected)
    assert all((data / path).is_file() for path in found)
    assert rows.above_threshold.sum() == (made.calibration_scores > made.threshold).sum()
    row = pandas.read_csv(tmp_path / "models/results.csv").iloc[0]
    assert row.folds == 3
    assert 0 <= row.control_auroc <= 1


@pytest.fixture(scope="module")
def seeds(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds") / "models"
    done = train(data, folder, "--type", "brick,grass", "--seed", "10,2", "--epochs", 1)
    assert done.code == 0, done.err
    return folder


def test_seeds_have_folders_of_their_own(seeds, data, tmp_path, script):
    assert sorted(path.name for path in seeds.iterdir()) == ["seed10", "seed2"]
    assert load(seeds / "seed10/brick.pt").config.seed == 10
    alone = train(data, tmp_path / "models", "--type", "brick", "--seed", 10, "--epochs", 1)
    assert alone.code == 0, alone.err
    assert same_weights(tmp_path / "models/brick.pt", seeds / "seed10/brick.pt")


def test_eval_gives_mean_error_and_averaged_scores_of_seeds(seeds, data, tmp_path):
    where = ["--data_dir", data, "--model_dir", seeds, "--eval_dir", tmp_path]
    done = fork("eval.py", *where)
    assert done.code == 0, done.err
    printed = dict(line.rsplit(": ", 1) for line in done.out.splitlines())
    rows = pandas.read_csv(tmp_path / "models/results.csv")
    assert rows.category.tolist() == 2 * ["brick"] + 2 * ["grass"]
    assert rows.seed.tolist() == 2 * [2, 10]
    for name in ("brick", "grass"):
        own = rows[rows.category == name].image_auroc
        assert float(printed[f"{name} AUC"]) == pytest.approx(own.mean())
        assert float(printed[f"{name} AUC standard error"]) == pytest.approx(own.sem())
        test, total = load_test(data, name, (32, 32), 0), 0
        for seed in (2, 10):
            made = load(seeds / f"seed{seed}/{name}.pt")
            total = (
                total + (scores_of(made, test.images) - made.calibration_scores.mean()) / made.calibration_scores.std()
            )
        expected = image_metrics(test.labels, np.asarray(total))["image_auroc"]
        assert float(printed[f"{name} AUC of averaged scores"]) == pytest.approx(expected)
    assert float(printed["average AUC"]) == pytest.approx(rows.image_auroc.mean())
    assert (tmp_path / "models/seed10/brick/roc.png").is_file()
    assert sorted(set(pandas.read_csv(tmp_path / "models/scores.csv").seed)) == ["seed10", "seed2"]
    table = pandas.read_csv(tmp_path / "models/seeds.csv").set_index("category")
    assert table.seeds.tolist() == [2, 2]
    assert table.averaged_auroc["grass"] == pytest.approx(float(printed["grass AUC of averaged scores"]))


def test_a_folder_of_seeds_with_detectors_of_its_own_is_refused(seeds, data, tmp_path, script):
    (tmp_path / "seed3").mkdir()
    (tmp_path / "brick.pt").write_bytes((seeds / "seed2/brick.pt").read_bytes())
    one_line(script("eval", "--data_dir", data, "--model_dir", tmp_path), "of its own and of several seeds", "seed3")


def test_a_category_may_begin_as_the_folders_of_seeds_do(seeds, data, tmp_path, script):
    """Its file, and the folder of its networks' states, are none of them."""
    (tmp_path / "Data").mkdir()
    (tmp_path / "Data/brick").symlink_to(data / "brick")
    folder = tmp_path / "models"
    (folder / "seedling.checkpoints").mkdir(parents=True)
    for name in ("brick.pt", "seedling.pt"):
        (folder / name).write_bytes((seeds / "seed2/brick.pt").read_bytes())
    done = script("eval", "--data_dir", tmp_path / "Data", "--model_dir", folder, "--eval_dir", tmp_path / "Eval")
    assert done.code == 0, done.err
    assert [line.split(" AUC: ")[0] for line in done.out.splitlines()] == ["brick", "average"]


@pytest.mark.parametrize("wrong", ["", "1,", "-1", "1,1", "a"])
def test_seeds_that_are_none(wrong, script):
    assert script("run_training", "--seed", wrong).code == 2


def test_the_network_as_it_is(data, tmp_path, script):
    """--epochs 0: the untrained baseline as a detector."""
    done = train(data, tmp_path / "models", "--type", "brick", "--epochs", 0)
    assert done.code == 0, done.err
    made = load(tmp_path / "models/brick.pt")
    start = network_of(made.untrained()).state_dict()
    assert all(torch.equal(value, start[name]) for name, value in network_of(made).state_dict().items())
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["brick.normals", "brick.pt"]
    done = script("eval", "--data_dir", data, "--model_dir", tmp_path / "models", "--control", 1, "--save_plots", 0)
    auc, control = (float(line.rsplit(": ", 1)[1]) for line in done.out.splitlines()[:2])
    assert auc == pytest.approx(control)
