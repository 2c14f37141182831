"""eval.py of detectors of several networks, and of several seeds."""

import numpy as np
import pandas
import pytest
import torch
from conftest import one_line

from dataset import load_test
from detector import load, stream
from reporting.metrics import image_metrics


def test_the_training_images_are_listed_as_they_were_not_seen(three, data, tmp_path, script):
    where = ["--data_dir", data, "--model_dir", three[0], "--eval_dir", tmp_path, "--type", "brick"]
    done = script("eval", *where, "--control", 1, "--save_plots", 0)
    assert done.code == 0, done.err
    rows = pandas.read_csv(tmp_path / "models/normal_scores.csv")
    made = load(three[0] / "brick.pt")
    assert rows.score.is_monotonic_decreasing
    listed = {row.path: row.score for row in rows.itertuples()}
    expected = {f"brick/train/good/{i:03}.png": score for i, score in enumerate(made.calibration_scores.tolist())}
    assert listed == pytest.approx(expected)
    assert all((data / path).is_file() for path in listed)
    assert rows.above_threshold.sum() == (made.calibration_scores > made.threshold).sum()
    row = pandas.read_csv(tmp_path / "models/results.csv").iloc[0]
    assert row.folds == 3
    assert 0 <= row.control_auroc <= 1


def test_mean_standard_error_and_averaged_scores_of_seeds(seeds, data, tmp_path, script):
    done = script("eval", "--data_dir", data, "--model_dir", seeds, "--eval_dir", tmp_path)
    assert done.code == 0, done.err
    printed = dict(line.rsplit(": ", 1) for line in done.out.splitlines())
    rows = pandas.read_csv(tmp_path / "models/results.csv")
    assert rows.category.tolist() == 2 * ["brick"] + 2 * ["grass"]
    assert rows.seed.tolist() == 2 * [2, 10]
    for name in ("brick", "grass"):
        aurocs = rows[rows.category == name].image_auroc
        assert float(printed[f"{name} AUC"]) == pytest.approx(aurocs.mean())
        assert float(printed[f"{name} AUC standard error"]) == pytest.approx(aurocs.sem())
        test, total = load_test(data, name, (32, 32), 0), 0
        for seed in (2, 10):
            made = load(seeds / f"seed{seed}/{name}.pt")
            scores, normal = torch.cat([scores for scores, _ in stream(made, test.images)]), made.calibration_scores
            total = total + (scores - normal.mean()) / normal.std()
        expected = image_metrics(test.labels, np.asarray(total))["image_auroc"]
        assert float(printed[f"{name} AUC of averaged scores"]) == pytest.approx(expected)
    assert float(printed["average AUC"]) == pytest.approx(rows.image_auroc.mean())
    assert (tmp_path / "models/seed10/brick/roc.png").is_file()
    assert sorted(set(pandas.read_csv(tmp_path / "models/scores.csv").seed)) == ["seed10", "seed2"]
    table = pandas.read_csv(tmp_path / "models/seeds.csv").set_index("category")
    assert table.seeds.tolist() == [2, 2]
    assert table.averaged_auroc["grass"] == pytest.approx(float(printed["grass AUC of averaged scores"]))


def test_folders_of_seeds_are_told_from_all_else(seeds, data, tmp_path, script):
    """A category may begin as they do: its file, and the folder of its networks' states, are none of them. Detectors
    beside them are refused."""
    (tmp_path / "Data").mkdir()
    (tmp_path / "Data/brick").symlink_to(data / "brick")
    folder = tmp_path / "models"
    (folder / "seedling.checkpoints").mkdir(parents=True)
    for name in ("brick.pt", "seedling.pt"):
        (folder / name).write_bytes((seeds / "seed2/brick.pt").read_bytes())
    where = ["--data_dir", tmp_path / "Data", "--model_dir", folder, "--eval_dir", tmp_path / "Eval"]
    done = script("eval", *where, "--save_plots", 0)
    assert done.code == 0, done.err
    assert [line.split(" AUC: ")[0] for line in done.out.splitlines()] == ["brick", "average"]
    (folder / "seed3").mkdir()
    one_line(script("eval", *where), "of its own and of several seeds", "seed3")
