"""Decisions of detectors: images held out, p-values of folds, eval.py's tables and report, the Python interface."""

import re
from dataclasses import replace

import numpy as np
import pandas
import pytest
import torch
from conftest import train
from scipy.stats import beta

from config import Config, SettingError
from dataset import load_test, load_train
from detector import Detector, initial_network, load, save, stream, unseen_by
from reporting.metrics import evaluate
from runtime.files import InputError
from runtime.image_files import decode

CONFIG = Config("brick", height=32, width=32, false_alarm_rate=0.2, pretrained=False)


@pytest.fixture(scope="module")
def images(data):
    return load_train(data, "brick", (32, 32), 0).images


@pytest.fixture(scope="module")
def held(data, tmp_path_factory):
    """A detector trained by the script, with three of eight images held out."""
    folder = tmp_path_factory.mktemp("held") / "models"
    done = train(data, folder, "--type", "brick", "--holdout", "0.4", "--false_alarm_rate", "0.25")
    assert done.code == 0, done.err
    return folder


# Which images are compared with -----------------------------------------------------------------------------------


def test_held_out_images_are_seen_by_neither_network_nor_density(images):
    config = replace(CONFIG, holdout=0.4)
    assert unseen_by(config, 8, 0).tolist() == [0, 2, 5]
    seen = images[[1, 3, 4, 6, 7]]
    made = Detector(config, [initial_network(config)]).fit(images)
    other = Detector(CONFIG, [initial_network(config)]).fit(seen, threshold=False)
    scores = torch.cat([some for some, _ in stream(other, images[[0, 2, 5]])])
    assert torch.equal(made.calibration_scores, scores)
    assert made.guarantee.kind == "split"
    assert made.guarantee.rate == 0.25  # the finest, of three


def test_p_values_of_folds_compare_with_each_member_s_own(images):
    config = replace(CONFIG, folds=3)
    made = Detector(config, [initial_network(config, member=number) for number in range(3)]).fit(images)
    new = images[:5].flip(-1)
    count = torch.zeros(5)
    for number, member in enumerate(made.members):
        unseen = torch.cat([some for some, _ in stream(made, images[number::3], member)])
        own = torch.cat([some for some, _ in stream(made, new, member)])
        count += (unseen[:, None] >= own).sum(0)
    with torch.inference_mode():
        assert made.predict_batch(new).p_values.tolist() == pytest.approx(((1 + count) / 9).tolist())
    assert made.guarantee.kind == "cross"


def test_a_holdout_that_cannot_be(images, data, tmp_path, script):
    config = replace(CONFIG, holdout=0.9)
    made = Detector(config, [initial_network(config)])
    with pytest.raises(SettingError, match="leave 1 to learn from"):
        made.fit(images)
    where = ["--data_dir", data, "--model_dir", tmp_path, "--no-pretrained", "--size", 32, "--type", "brick"]
    done = script("run_training", *where, "--holdout", 0.2, "--folds", 2)
    assert done.code == 2
    assert "--holdout: not with folds" in done.err


# eval.py ----------------------------------------------------------------------------------------------------------


def test_tables_have_p_values_and_what_deciding_by_them_comes_to(held, data, tmp_path, script):
    page = tmp_path / "some report.html"
    where = ["--data_dir", data, "--model_dir", held, "--eval_dir", tmp_path, "--save_plots", 0]
    done = script("eval", *where, "--report", page)
    assert done.code == 0, done.err
    row = pandas.read_csv(tmp_path / "models/results.csv").iloc[0]
    scores = pandas.read_csv(tmp_path / "models/scores.csv")
    normal = load(held / "brick.pt").calibration_scores.numpy()
    assert len(normal) == 3
    expected = [(1 + (normal >= score).sum()) / 4 for score in scores.score]
    assert scores.p_value.tolist() == pytest.approx(expected)
    assert (row.normal_scores, row.promised_rate) == ("split", 0.25)
    assert [row.promised_low, row.promised_high] == pytest.approx(beta.ppf([0.05, 0.95], 1, 3))
    called = scores.p_value <= 0.25
    assert row.false_alarms == (called & (scores.label == 0)).sum()
    assert row.detections == (called & (scores.label == 1)).sum()
    assert row.detections_low <= row.detections / row.test_anomalous <= row.detections_high
    assert re.search(rf"brick: p <= 0\.25, promised: {row.false_alarms} of 3 false alarms", done.err)
    listed = pandas.read_csv(tmp_path / "models/normal_scores.csv").path
    assert sorted(listed) == [f"brick/train/good/{i:03}.png" for i in (0, 2, 5)]
    text = page.read_text(encoding="utf-8")
    assert text.count("data:image/jpeg") == len(scores)
    assert "good/000.png" in text
    assert "://" not in text


def test_the_report_counts_what_results_csv_says(held, data, tmp_path, script, browser):
    where = ["--data_dir", data, "--model_dir", held, "--eval_dir", tmp_path, "--save_plots", 0]
    for rate in (0.25, 0.99):
        done = script("eval", *where, "--false_alarm_rate", rate, "--report", tmp_path / "report.html")
        assert done.code == 0, done.err
        row = pandas.read_csv(tmp_path / "models/results.csv").iloc[0]
        tab = browser.new_page()
        tab.goto((tmp_path / "report.html").as_uri())
        shown = {role: tab.locator(f"[data-role={role}]").inner_text() for role in ("false-alarms", "detections")}
        assert shown["false-alarms"] == f"{row.false_alarms} of {row.test_normal}"
        assert shown["detections"] == f"{row.detections} of {row.test_anomalous}"
        tab.close()
    assert row.detections > 0


def test_another_rate_decides_otherwise(held, data, tmp_path, script):
    where = ["--data_dir", data, "--model_dir", held, "--eval_dir", tmp_path, "--save_plots", 0]
    assert script("eval", *where, "--false_alarm_rate", 0.75).code == 0
    row = pandas.read_csv(tmp_path / "models/results.csv", float_precision="round_trip").iloc[0]  # every digit
    normal = load(held / "brick.pt").calibration_scores
    assert (row.false_alarm_rate, row.promised_rate) == (0.75, 0.75)
    assert row.threshold == normal.min()
    assert load(held / "brick.pt").config.false_alarm_rate == 0.25


def test_of_one_image_held_out_the_score_has_no_deviation(images, data, tmp_path, script):
    config = replace(CONFIG, holdout=0.01)
    for seed in (0, 1):
        own = replace(config, seed=seed)
        made = Detector(own, [initial_network(own)]).fit(images)
        made.metadata = {"train_images": len(images)}
        assert made.guarantee.count == 1
        save(made, tmp_path / f"models/seed{seed}/brick.pt")
    where = ["--data_dir", data, "--model_dir", tmp_path / "models", "--eval_dir", tmp_path, "--save_plots", 0]
    done = script("eval", *where)
    assert done.code == 0, done.err
    assert 0 <= pandas.read_csv(tmp_path / "models/seeds.csv").averaged_auroc[0] <= 1


def test_a_report_needs_a_name_for_html(held, data, script):
    done = script("eval", "--data_dir", data, "--model_dir", held, "--report", "a.pdf")
    assert done.code == 2
    assert "argument --report: 'a.pdf': the name of an .html file" in done.err


# The Python interface ---------------------------------------------------------------------------------------------


def test_predict_gives_what_eval_gives(held, data):
    test, made = load_test(data, "brick", (32, 32), 0), Detector.load(held / "brick.pt")
    found, expected = made.predict(test.paths), evaluate(made, test)
    assert np.allclose(found.scores, expected.scores, rtol=1e-5)
    assert np.array_equal(found.p_values, expected.p_values)
    assert np.array_equal(found.anomalous, expected.p_values <= 0.25)
    assert found.maps is None
    again = made.predict([decode(path) for path in test.paths])  # arrays of any size
    assert np.array_equal(again.scores, found.scores)
    assert made.predict([]).scores.shape == (0,)


def test_predict_names_what_is_no_image(held, tmp_path):
    (tmp_path / "a.png").write_text("no image")
    made = Detector.load(held / "brick.pt")
    with pytest.raises(InputError, match=r"a\.png"):
        made.predict([tmp_path / "a.png"])
    with pytest.raises(InputError, match=r"\(H, W, 3\) uint8"):
        made.predict([np.zeros((8, 8))])
