"""eval.py: lines on stdout, tables, plots, several seeds, decisions, the report, maps, and what it refuses."""

import re
import resource
import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pandas
import pytest
import tifffile
import torch
from conftest import TINY, again, contents, fork, made_once, one_line, train
from PIL import Image
from scipy.stats import beta

import run_training
from config import config_of
from dataset import load_masks, load_test, load_train
from detector import Detector, initial_network, load, save, stream
from reporting.metrics import evaluate, image_metrics, pixel_metrics


def lines(done):
    """stdout as {(category, metric): value}."""
    assert done.code == 0, done.err
    parts = (re.fullmatch(r"(\S+) (.+): (\S+)", line).groups() for line in done.out.splitlines())
    return {(category, metric): float(value) for category, metric, value in parts}


def table(folder, name="results.csv"):
    return pandas.read_csv(folder / name, float_precision="round_trip")


@pytest.fixture(scope="session")
def patch_models(data, tmp_path_factory):
    """Patch models of brick and grass, of networks that are not the untrained ones."""
    folder = tmp_path_factory.mktemp("patches") / "patch_models"
    flags = [*TINY, "--patch_size", "32", "--window", "8", "--stride", "4", "--sigma", "3"]
    for category in ("brick", "grass"):
        config = config_of(run_training.get_parser().parse_args(flags), category)
        network = initial_network(config)
        with torch.no_grad():
            network.backbone.conv1.weight.mul_(torch.linspace(0.9, 1.1, 64)[:, None, None, None])
        images = load_train(data, category, (32, 32), 0).images
        save(Detector(config, [network]).fit(images), folder / f"{category}.pt")
    return folder


@pytest.fixture(scope="session")
def held(data, tmp_path_factory):
    """A detector of brick trained by the script, with three of eight images held out."""
    flags = ("--type", "brick", "--holdout", 0.4, "--false_alarm_rate", 0.25)
    return made_once(tmp_path_factory, "held/models", lambda folder: train(data, folder, *flags))[0]


def evaluated_once(tmp_path_factory, data, model_dir, *flags):
    """Return what eval.py --control 1 prints, and the folder of its tables."""

    def make(folder):
        where = ("--data_dir", data, "--model_dir", model_dir, "--eval_dir", folder)
        done = fork("eval.py", *where, "--control", 1, *flags)
        (folder / "stdout").write_text(done.out)
        return SimpleNamespace(code=done.code, out="", err=done.err)

    folder, err = made_once(tmp_path_factory, f"evaluated_{model_dir.name}/Eval", make)
    return SimpleNamespace(code=0, out=(folder / "stdout").read_text(), err=err), folder / model_dir.name


@pytest.fixture(scope="session")
def evaluated(data, models, tmp_path_factory):
    return evaluated_once(tmp_path_factory, data, models)


@pytest.fixture(scope="session")
def mapped(data, patch_models, tmp_path_factory):
    return evaluated_once(tmp_path_factory, data, patch_models, "--save_maps", 1)


@pytest.fixture
def call(script, data, tmp_path):
    """eval.py on brick alone, with the detectors of a folder; its files go to tmp_path/<name of the folder>."""

    def call(folder, *flags):
        where = ("--data_dir", data, "--model_dir", folder, "--eval_dir", tmp_path)
        return script("eval", *where, "--type", "brick", "--save_plots", 0, *flags)

    return call


# Lines, tables and plots ------------------------------------------------------------------------------------------


def test_stdout_is_a_line_for_each_metric_of_each_category_and_the_average(evaluated, mapped):
    patch_metrics = ("AUC", "pixel AUROC", "AUPRO", "control AUC", "control pixel AUROC")
    for (done, _), metrics in ((evaluated, ("AUC", "control AUC")), (mapped, patch_metrics)):
        values = lines(done)
        assert list(values) == [(name, metric) for name in ("brick", "grass", "average") for metric in metrics]
        assert all(0 <= value <= 1 for value in values.values())
        for metric in metrics:
            mean = (values["brick", metric] + values["grass", metric]) / 2
            assert values["average", metric] == pytest.approx(mean)
        assert "gravel: has images" in done.err


def test_tables_say_what_stdout_says(evaluated, mapped, data, models):
    image_columns = ["image_auroc", "control_auroc"]
    patch_columns = ["image_auroc", "pixel_auroc", "aupro", "control_auroc", "control_pixel_auroc"]
    for (done, folder), columns in ((evaluated, image_columns), (mapped, patch_columns)):
        for name, row in table(folder).set_index("category").iterrows():
            printed = [value for (category, _), value in lines(done).items() if category == name]
            assert row[columns].tolist() == pytest.approx(printed, rel=1e-12)
    folder = evaluated[1]
    results, scores = table(folder).set_index("category"), table(folder, "scores.csv")
    for name in ("brick", "grass"):
        row = results.loc[name]
        assert (row.test_normal, row.test_anomalous, row.train_images) == (3, 9, 8)
        assert row.train_command.startswith("python run_training.py")
        assert row.eval_command.startswith("python eval.py")
        assert (row.variant, row.seed, row.epochs, row.torch) == ("3way", 0, 12, torch.__version__)
        rows = scores[scores.category == name]
        normal, anomalous = (rows[rows.label == label].score.to_numpy() for label in (0, 1))
        wins = (anomalous[:, None] > normal).mean() + 0.5 * (anomalous[:, None] == normal).mean()
        assert row.image_auroc == pytest.approx(wins)
        assert row.anomalous_above_threshold == (anomalous > row.threshold).sum()
        assert row.normal_above_threshold == (normal > row.threshold).sum()
        assert 0 <= row.best_f1 <= 1
        assert 0 <= row.image_auprc <= 1
    assert list(scores.columns) == ["category", "path", "label", "defect_type", "score", "p_value"]
    assert scores.path[0] == "brick/test/good/000.png"
    assert (data / scores.path.iloc[-1]).is_file()
    expected = evaluate(load(models / "brick.pt"), load_test(data, "brick", (32, 32), 0)).scores
    assert np.allclose(scores[scores.category == "brick"].score, expected, rtol=1e-4)


def test_plots_are_pictures(evaluated, mapped):
    image_plots, patch_plots = ("histogram", "roc", "tsne"), ("heatmaps", "histogram", "roc")
    for (_, folder), plots in ((evaluated, image_plots), (mapped, patch_plots)):
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
        assert names == [*(f"{name}/{plot}.png" for name in ("brick", "grass") for plot in plots), "summary.png"]
        for name in names:
            picture = matplotlib.image.imread(folder / name)[..., :3]
            assert min(picture.shape[:2]) > 200
            assert picture.std() > 0.02


def test_without_anomalous_images_there_are_scores_but_no_auc(data, models, tmp_path, script):
    for part in ("train", "test/good"):
        shutil.copytree(data / "brick" / part, tmp_path / "Data/brick" / part)
    where = ["--data_dir", tmp_path / "Data", "--model_dir", models, "--eval_dir", tmp_path / "Eval"]
    done = script("eval", *where)
    assert lines(done) == {}
    assert "brick: no anomalous test image" in done.err
    assert "grass: has a detector" in done.err
    assert len(table(tmp_path / "Eval/models", "scores.csv")) == 3
    assert {path.name for path in (tmp_path / "Eval").rglob("*.png")} == {"histogram.png", "tsne.png"}


# Several seeds and several networks ------------------------------------------------------------------------------


def test_mean_standard_error_and_averaged_scores_of_seeds(seeds, data, tmp_path, script):
    done = script("eval", "--data_dir", data, "--model_dir", seeds, "--eval_dir", tmp_path)
    printed, rows = lines(done), table(tmp_path / "models")
    means = table(tmp_path / "models", "seeds.csv").set_index("category")
    assert rows.category.tolist() == 2 * ["brick"] + 2 * ["grass"]
    assert rows.seed.tolist() == 2 * [2, 10]
    for name in ("brick", "grass"):
        aurocs = rows[rows.category == name].image_auroc
        test, total = load_test(data, name, (32, 32), 0), 0
        for seed in (2, 10):
            detector = load(seeds / f"seed{seed}/{name}.pt")
            scores, normal = torch.cat([x for x, _ in stream(detector, test.images)]), detector.calibration_scores
            total = total + (scores - normal.mean()) / normal.std()
        averaged = image_metrics(test.labels, np.asarray(total))["image_auroc"]
        values = {"AUC": aurocs.mean(), "AUC standard error": aurocs.sem(), "AUC of averaged scores": averaged}
        assert {metric: printed[name, metric] for metric in values} == pytest.approx(values)
        assert means.averaged_auroc[name] == pytest.approx(averaged)
    assert printed["average", "AUC"] == pytest.approx(rows.image_auroc.mean())
    assert len(printed) == 7
    assert means.seeds.tolist() == [2, 2]
    assert (tmp_path / "models/seed10/brick/roc.png").is_file()
    assert sorted(set(table(tmp_path / "models", "scores.csv").seed)) == ["seed10", "seed2"]


def test_folders_of_seeds_are_told_from_all_else(seeds, call, data, tmp_path):
    """A category may begin as they do: its file, and the folder of its networks' states, are none of them. Detectors
    beside them are refused."""
    (tmp_path / "Data").mkdir()
    (tmp_path / "Data/brick").symlink_to(data / "brick")
    folder = tmp_path / "several"
    (folder / "seedling.checkpoints").mkdir(parents=True)
    for name in ("brick.pt", "seedling.pt"):
        shutil.copy(seeds / "seed2/brick.pt", folder / name)
    where = ("--data_dir", tmp_path / "Data", "--type", "all")
    assert list(lines(call(folder, *where))) == [("brick", "AUC")]
    (folder / "seed3").mkdir()
    one_line(call(folder, *where), "of its own and of several seeds", "seed3")


def test_the_training_images_are_listed_as_networks_saw_them_that_had_not_seen_them(three, call, tmp_path):
    assert ("brick", "control AUC") in lines(call(three[0], "--control", 1))
    rows, detector = table(tmp_path / "models", "normal_scores.csv"), load(three[0] / "brick.pt")
    assert rows.score.is_monotonic_decreasing
    scores = detector.calibration_scores
    expected = {f"brick/train/good/{i:03}.png": score for i, score in enumerate(scores.tolist())}
    assert dict(zip(rows.path, rows.score)) == pytest.approx(expected)
    assert rows.above_threshold.sum() == (scores > detector.threshold).sum()
    assert table(tmp_path / "models").folds[0] == 3


# Other densities --------------------------------------------------------------------------------------------------

WINDOWS = {"window": 16, "stride": 8, "level": 4, "dense": False, "location": "shared", "sigma": 5.0}


@pytest.mark.parametrize(
    ("kind", "flags", "columns"),
    [
        ("image", "--head_layer 1 --variant 3way --size 32 --normalize image --backbone resnet18", {}),
        ("image", "--density kde --l2 0", {"density": "kde", "l2": False}),
        ("image", "--false_alarm_rate 0.5", {"false_alarm_rate": 0.5}),
        (
            "patch",
            "--window 16 --stride 8 --level 4 --dense 0 --location shared --sigma 5",
            WINDOWS | {"location_chosen": "shared"},
        ),
        ("patch", "--level 2,3 --window 16 --stride 16", {"level": "2,3", "stride": 16, "dims": "64,64"}),
        ("patch", "--location auto", {"location": "auto"}),
    ],
)
def test_what_flags_change_is_fitted_anew(call, models, patch_models, tmp_path, kind, flags, columns):
    """Those that agree with the detector change nothing; none changes its file."""
    folder = models if kind == "image" else patch_models
    before = contents(folder)
    done = call(folder, *flags.split(), "--control", 1)
    metrics = {"AUC", "control AUC"} | ({"pixel AUROC", "AUPRO", "control pixel AUROC"} if kind == "patch" else set())
    assert {metric for _, metric in lines(done)} == metrics
    row = table(tmp_path / folder.name).iloc[0]
    assert {name: row[name] for name in columns} == columns
    if columns == {"location": "auto"}:
        assert re.search(r"brick: one Gaussian for \w+ locations?, which fits .* better \(mean log", done.err)
    assert not list(tmp_path.rglob("*.png"))
    assert contents(folder) == before


def test_two_ways_to_the_same_scores(call, models, evaluated, tmp_path):
    """Densities by torch and by scikit-learn, as printed; every stage by one word and by its numbers."""
    for density in ("torch", "sklearn"):
        assert f"{lines(call(models, '--density', density))['brick', 'AUC']:.6f}" == (
            f"{lines(evaluated[0])['brick', 'AUC']:.6f}"
        )
    scores = []
    for flags, features in ((("--features", "all"), "all"), (("--level", "1,2,3,4"), "level")):
        assert call(models, *flags).code == 0
        scores.append(table(tmp_path / "models", "scores.csv").score)
        assert table(tmp_path / "models").features[0] == features
    stored = table(evaluated[1], "scores.csv")
    assert np.allclose(*scores)
    assert not np.allclose(scores[0], stored[stored.category == "brick"].score)


# Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "flags", "words"),
    [
        ("image", "--head_layer 2", ["--head_layer", "2", "1", "models/brick.pt", "leave the flag out"]),
        ("image", "--variant scar", ["--variant", "scar", "3way"]),
        ("image", "--size 64", ["--size", "64", "32"]),
        ("image", "--size 32x48", ["--size", "48", "32"]),
        ("image", "--normalize imagenet", ["--normalize", "imagenet", "image"]),
        ("image", "--backbone resnet34", ["--backbone", "resnet34", "resnet18"]),
        ("image", "--sigma 4", ["--sigma", "no patch model"]),
        ("image", "--heatmaps 1 --density kde", ["--heatmaps 1", "kde"]),
        ("image", "--save_maps 1 --density kde", ["--save_maps 1", "kde"]),
        ("image", "--features pool --level 2", ["--level: goes with features level, not pool"]),
        ("image", "--level 5", ["--level: 5: resnet18 has 4 stages"]),
        ("patch", "--density kde", ["--density: kde", "patch model"]),
        ("patch", "--window 64", ["--window: 64", "larger than the image"]),
        ("patch", "--stride 6", ["--stride: 6", "multiple of 4"]),
        ("image", "--type glass", ["glass", "no such category"]),
        ("image", "--eval_dir {tmp_path}/mine.html/Eval", ["mine.html"]),
        ("image", "--data_dir nowhere", ["nowhere", "no such folder"]),
        ("image", "--model_dir nowhere", ["nowhere", "no such folder"]),
        ("image", "--type brick,gravel", ["no detector for gravel"]),
        ("image", "--model_dir {tmp_path}", ["no detector for any category"]),
        ("image", "--report {tmp_path}/mine.html", ["mine.html: is there already", "--report"]),
    ],
)
def test_flags_that_cannot_be_get_one_line(call, models, patch_models, tmp_path, kind, flags, words):
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    all_types = () if "--type" in flags else ("--type", "all")
    done = call(models if kind == "image" else patch_models, *all_types, *flags.format(tmp_path=tmp_path).split())
    one_line(done, *words)
    assert done.out == ""
    assert contents(tmp_path) == {tmp_path / "mine.html": b"<p>mine</p>"}


def test_outputs_are_checked_before_anything_is_scored(data, models, tmp_path, script, monkeypatch):
    import eval

    monkeypatch.setattr(eval, "evaluate_category", lambda *_: pytest.fail("scored"))
    (tmp_path / "file").touch()
    where = ["--data_dir", data, "--model_dir", models, "--save_plots", 0]
    one_line(script("eval", *where, "--eval_dir", tmp_path / "file/Eval"), "file/Eval", "Not a directory")
    report = ["--eval_dir", tmp_path, "--report", tmp_path / "file/a.html"]
    one_line(script("eval", *where, *report), "file: is a file; a folder is needed")


def test_wrong_usage_exits_with_2(script):
    for wrong in (["--density", "tree"], ["--save_plot", "0"], ["--l2", "2"], ["--report", "a.pdf"]):
        done = script("eval", *wrong)
        assert done.code == 2
    assert "argument --report: 'a.pdf': the name of an .html file" in done.err


def test_broken_files_get_one_line_and_leave_earlier_results_as_they_were(evaluated, data, models, tmp_path, script):
    shutil.copytree(evaluated[1], tmp_path / "Eval/models")
    shutil.copytree(data, tmp_path / "Data")
    where = ["--data_dir", tmp_path / "Data", "--model_dir", models, "--eval_dir", tmp_path / "Eval"]
    before = contents(tmp_path / "Eval")
    assert len(before) == 9

    small_disk = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (2**13, 2**13))  # the tables fit, a plot does not
    one_line(fork("eval.py", *where, "--type", "brick", preexec=small_disk), ".png", "cannot be written")
    grass = tmp_path / "Data/grass"  # the last category
    mask, photo = grass / "ground_truth/hole/001_mask.png", grass / "test/hole/002.png"
    content = mask.read_bytes()
    Image.open(mask).resize((16, 32)).save(mask)
    one_line(script("eval", *where, "--save_plots", 0), "001_mask.png", "16x32", "32x32")
    mask.write_bytes(content)
    photo.write_bytes(photo.read_bytes()[:100])
    one_line(script("eval", *where, "--save_plots", 0), "hole/002.png", "not a readable image")
    shutil.rmtree(grass / "test")
    one_line(script("eval", *where, "--save_plots", 0), "grass/test", "no such folder")
    broken = tmp_path / "models"
    broken.mkdir()
    (broken / "grass.pt").write_bytes((models / "grass.pt").read_bytes()[:1000])
    one_line(script("eval", *where, "--model_dir", broken), "grass.pt", "truncated, damaged")
    assert contents(tmp_path / "Eval") == before


# Decisions and the report -----------------------------------------------------------------------------------------


def test_tables_have_p_values_and_what_deciding_by_them_comes_to(held, call, tmp_path):
    page = tmp_path / "some report.html"
    done = call(held, "--report", page)
    assert list(lines(done)) == [("brick", "AUC")]
    row, scores = table(tmp_path / "models").iloc[0], table(tmp_path / "models", "scores.csv")
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
    listed = table(tmp_path / "models", "normal_scores.csv").path
    assert sorted(listed) == [f"brick/train/good/{i:03}.png" for i in (0, 2, 5)]
    text = page.read_text(encoding="utf-8")
    assert text.count("data:image/jpeg") == len(scores)
    assert "good/000.png" in text
    assert "://" not in text


def test_the_report_counts_what_results_csv_says(held, call, tmp_path, browser):
    """At two false-alarm rates, neither of which is the detector's; its file keeps its own, the second report replaces
    the first."""
    threshold = load(held / "brick.pt").calibration_scores.min().item()
    for rate in (0.75, 0.99):
        assert call(held, "--false_alarm_rate", rate, "--report", tmp_path / "report.html").code == 0
        row = table(tmp_path / "models").iloc[0]
        assert (row.false_alarm_rate, row.promised_rate) == (rate, 0.75)
        assert row.threshold == pytest.approx(threshold, rel=1e-12)
        tab = browser.new_page()
        tab.goto((tmp_path / "report.html").as_uri())
        shown = {role: tab.locator(f"[data-role={role}]").inner_text() for role in ("false-alarms", "detections")}
        assert shown["false-alarms"] == f"{row.false_alarms} of {row.test_normal}"
        assert shown["detections"] == f"{row.detections} of {row.test_anomalous}"
        assert tab.locator("[data-role=threshold]").text_content() == f"{row.threshold:.3g}"  # as in the histogram
        assert tab.locator("input[type=range]").input_value() != "0"
        tab.close()
    assert row.detections > 0
    assert load(held / "brick.pt").config.false_alarm_rate == 0.25


def test_the_rate_that_costs_least_is_told_and_set_on_request(held, call, tmp_path):
    """By a slow search; a detector whose rate labels have chosen says so, in eval.py, and as long as no other is asked
    for."""
    shutil.copytree(held, tmp_path / "held")
    path = tmp_path / "held/brick.pt"
    before = path.read_bytes()
    done = call(path.parent, "--costs", "1:2.5")
    scores, row = table(tmp_path / "held", "scores.csv"), table(tmp_path / "held").iloc[0]

    def cost(rate):
        called = scores.p_value <= rate
        return (~called & (scores.label == 1)).sum() + 2.5 * (called & (scores.label == 0)).sum()

    levels = [k / 4 for k in (1, 2, 3, 4)]  # of three calibration scores
    best = min(levels, key=lambda rate: (cost(rate), rate))
    assert (row.costs, row.cheapest_rate, row.least_cost) == ("1:2.5", best, cost(best))
    assert row.cheapest_low <= best <= row.cheapest_high
    assert f"brick: p <= {best:.3g} costs least on the test images" in done.err
    assert path.read_bytes() == before
    original = load(held / "brick.pt")
    low = original.calibration_scores.min().repeat(30) - 1
    original.calibration_scores = torch.cat((original.calibration_scores, low))  # rates have steps of 1 / 34
    save(original, path)
    done = call(path.parent, "--costs", "1000:1", "--set_rate", "--report", tmp_path / "lid.html")
    assert done.code == 0, done.err
    scores, row = table(tmp_path / "held", "scores.csv"), table(tmp_path / "held").iloc[0]
    chosen = float(row.cheapest_rate)
    assert chosen == scores.p_value[scores.label == 1].max()  # no miss is worth a false alarm
    assert row.false_alarm_rate == row.promised_rate == chosen  # tables and report are of the new rate
    assert row.detections == row.test_anomalous
    changed = load(path)
    assert row.threshold == pytest.approx(changed.threshold.item(), rel=1e-12)
    assert f"{row.detections} of {row.test_anomalous} detections" in done.err
    assert "The rate was chosen by 3 normal and 9 anomalous" in (tmp_path / "lid.html").read_text()
    assert changed.config == replace(original.config, false_alarm_rate=chosen)
    assert changed.threshold == original.set_false_alarm_rate(chosen).threshold
    words = "The rate was chosen by 3 normal and 9 anomalous labelled images, at costs of 1000 for a miss and 1 for a"
    assert words in changed.guarantee.words()
    assert words in call(path.parent).err
    assert words not in changed.set_false_alarm_rate(0.5).guarantee.words()
    for wrong in (["--costs", "5"], ["--costs", "0:0"], ["--costs", "nan:1"], ["--costs", "1:2:3"], ["--set_rate"]):
        assert call(path.parent, *wrong).code == 2
    assert call(path.parent, "--costs", "1:1", "--set_rate", "--false_alarm_rate", 0.1).code == 2
    assert call(path.parent, "--set_rate", "--false_alarm_rate", 0.1, "--density", "kde").code == 2


def test_a_rate_that_would_call_many_good_parts_bad_is_written_by_hand_alone(held, call, tmp_path):
    """Tables stay at the detector's rate, and the flag that the line names writes the rate that it says."""
    shutil.copytree(held, tmp_path / "held")
    path = tmp_path / "held/brick.pt"
    before = path.read_bytes()
    done = call(path.parent, "--costs", "1000:1", "--set_rate")
    assert done.code == 0, done.err
    row = table(tmp_path / "held").iloc[0]
    assert row.cheapest_rate > row.false_alarm_rate == 0.25
    share = f"about {100 * row.cheapest_rate:.0f} of 100"
    assert f"brick: {row.cheapest_rate:.3g} is not written into the detector: {share}" in done.err
    assert path.read_bytes() == before
    flags = re.search(r"(--false_alarm_rate) (\S+) (--set_rate) writes it nevertheless", done.err).groups()
    assert call(path.parent, *flags).code == 0
    assert load(path).guarantee.rate == row.cheapest_rate


def test_a_rate_is_set_by_hand_after_labels_have_chosen_one(held, call, tmp_path):
    """The way back: the detector is as it was, but for saying so."""
    shutil.copytree(held, tmp_path / "held")
    path = tmp_path / "held/brick.pt"
    original = load(path)
    save(load(path).set_false_alarm_rate(0.5, "The rate was chosen by labels"), path)
    assert "chosen by labels" in call(path.parent).err
    done = call(path.parent, "--false_alarm_rate", 0.25, "--set_rate")
    assert done.code == 0, done.err
    assert "brick.pt decides at 0.25 from now on; an exported file must be exported again" in done.err
    back = load(path)
    assert (back.config, back.threshold) == (original.config, original.threshold)
    assert back.guarantee.advice() == f"{original.guarantee.advice()}. The rate was set by hand"
    assert "chosen by labels" not in call(path.parent).err
    row = table(tmp_path / "held").iloc[0]
    assert row.false_alarm_rate == 0.25


def test_many_missed_defects_come_with_advice_that_works(models, data, call, script, tmp_path):
    """The rate that it leads to is set, fewer are missed then, a low one is not warned about, and the same training
    command still finds its detector."""
    shutil.copytree(models, tmp_path / "models")
    words = "anomalous images are called normal: --costs 10:1"
    before = call(tmp_path / "models")
    row = table(tmp_path / "models").iloc[0]
    assert row.detections < 0.8 * row.test_anomalous
    assert f"brick: {row.test_anomalous - row.detections} of {row.test_anomalous} {words}" in before.err
    for flags in (["--costs", "10:1"], ["--false_alarm_rate", 0.1], ["--density", "kde"]):
        assert words not in call(tmp_path / "models", *flags).err
    costly = (tmp_path / "models", "--costs", "10:1", "--set_rate")
    low = call(tmp_path / "models", "--costs", "1:1000", "--set_rate")
    assert "decides at 0.111 from now on" in low.err
    assert "is not written" not in low.err
    (rate,) = re.findall(r"--false_alarm_rate (\S+) --set_rate", call(*costly).err)
    assert call(tmp_path / "models", "--false_alarm_rate", rate, "--set_rate").code == 0
    after = call(tmp_path / "models")
    assert words not in after.err
    assert table(tmp_path / "models").detections[0] > row.detections
    assert "is finished; skipped" in again(script, data, tmp_path / "models", "--type", "brick").err


def test_tables_of_another_density_say_what_they_replace(models, call, tmp_path):
    words = "of other densities than the detectors' own, in place of earlier ones; another --eval_dir keeps both"
    assert words not in call(models, "--density", "kde").err  # nothing is there yet
    assert words in call(models, "--density", "kde").err
    for flags in ((), ("--density", "torch")):
        assert words not in call(models, *flags).err


# Maps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize(
    ("data_dir", "eval_dir"), [("x/patch_models/maps", "x"), ("x/patch_models/maps/brick", "x"), ("", "brick")]
)
def test_maps_are_not_written_among_images(data, patch_models, tmp_path, call, data_dir, eval_dir, linked):
    """Refuse a folder of maps that is a category, holds it, or lies in it; also by a link."""
    shutil.copytree(data / "brick", tmp_path / data_dir / "brick")
    before = contents(tmp_path)
    if linked:
        (tmp_path / "link").symlink_to(tmp_path / eval_dir)
    where = ("--data_dir", tmp_path / data_dir, "--eval_dir", tmp_path / ("link" if linked else eval_dir))
    one_line(call(patch_models, *where, "--save_maps", 1), "maps/brick: maps would lie among", "--eval_dir")
    assert contents(tmp_path) == before


def test_saved_maps_are_those_that_were_measured(mapped, data):
    """16-bit files in the layout of MVTec's evaluation; the metrics and image scores follow from them alone."""
    done, folder = mapped
    scores = table(folder, "scores.csv").set_index("path").score
    test = load_test(data, "brick", (32, 32), 0)
    names = [path.relative_to(data).with_suffix(".tiff") for path in test.paths]
    assert sorted((folder / "maps/brick").rglob("*.tiff")) == sorted(folder / "maps" / name for name in names)
    maps = [tifffile.imread(folder / "maps" / name) for name in names]
    assert all(values.dtype == np.float16 and values.shape == (32, 32) for values in maps)
    for path, values in zip(test.paths, maps):
        assert values.max() == pytest.approx(scores[path.relative_to(data).as_posix()], rel=2e-3)
    metrics = pixel_metrics(load_masks(test, (32, 32), 0).numpy(), np.stack(maps).astype(np.float32))
    for metric, name in (("pixel AUROC", "pixel_auroc"), ("AUPRO", "aupro")):
        assert metrics[name] == pytest.approx(lines(done)["brick", metric], abs=5e-3)


@pytest.mark.parametrize(
    ("name", "note"),
    [
        (
            "ground_truth/{kind}/{stem}_gt.png",
            "9 masks fit no test image: hole/000_gt.png, hole/001_gt.png, hole/002_gt.png, ...",
        ),
        ("masks/{kind}/{stem}_mask.png", "1 masks fit no test image: brick/masks"),
    ],
)
def test_masks_under_other_names_are_told(data, patch_models, tmp_path, call, name, note):
    shutil.copytree(data / "brick", tmp_path / "Data/brick", ignore=shutil.ignore_patterns("ground_truth"))
    for path in (data / "brick/ground_truth").rglob("*.png"):
        target = tmp_path / "Data/brick" / name.format(kind=path.parent.name, stem=path.stem.removesuffix("_mask"))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    done = call(patch_models, "--data_dir", tmp_path / "Data")
    assert f"brick: {note}; looked for: ground_truth/hole/000_mask.png" in done.err
    assert "brick: no such mask in ground_truth, so image metrics only" in done.err
    assert list(lines(done)) == [("brick", "AUC")]


def test_a_folder_of_masks_for_each_image_gives_the_same_metrics(mapped, data, patch_models, tmp_path, call):
    shutil.copytree(data / "brick", tmp_path / "Data/brick")
    for path in [*(tmp_path / "Data/brick/ground_truth").rglob("*.png")]:
        folder = path.with_name(path.stem.removesuffix("_mask"))
        folder.mkdir()
        values = np.array(Image.open(path))
        for number, part in enumerate((np.s_[:, :16], np.s_[:, 16:])):
            half = np.zeros_like(values)
            half[part] = values[part]
            Image.fromarray(half).save(folder / f"{number:03}.png")
        path.unlink()
    values, expected = lines(call(patch_models, "--data_dir", tmp_path / "Data")), lines(mapped[0])
    for metric in ("AUC", "pixel AUROC", "AUPRO"):
        assert values["brick", metric] == pytest.approx(expected["brick", metric], abs=1e-9)


def test_maps_of_an_image_level_model(call, models, evaluated, tmp_path):
    for flags, maps in ((("--heatmaps", 1, "--save_plots", 1), 0), (("--save_maps", 1), 12)):
        values = lines(call(models, *flags))
        assert [metric for name, metric in values if name == "brick"] == ["AUC", "pixel AUROC", "AUPRO"]
        assert values["brick", "AUC"] == pytest.approx(lines(evaluated[0])["brick", "AUC"], abs=1e-9)
        assert (tmp_path / "models/brick/heatmaps.png").is_file()
        assert len(list(tmp_path.rglob("maps/brick/test/*/*.tiff"))) == maps


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ("one", "brick: 1 anomalous images without a mask, left out of the pixel metrics"),
        ("none", "brick: no masks in ground_truth, so image metrics only"),
        ("white", "brick: the masks mark every pixel, so image metrics only"),
        ("black", "brick: the masks mark no pixel, so image metrics only"),
        ("one black", "brick: 1 masks mark nothing; their images are left out of the pixel metrics: hole/000_mask.png"),
        ("one white", "brick: 1 masks mark more than half of their image; are they inverted? hole/000_mask.png"),
    ],
)
def test_where_masks_are_missing_or_mark_all_or_nothing(mapped, data, patch_models, tmp_path, call, change, note):
    category = tmp_path / "Data/brick"
    shutil.copytree(data / "brick", category)
    for path in sorted((category / "ground_truth").rglob("*.png"))[: 1 if change.startswith("one") else None]:
        if change in ("one", "none"):
            path.unlink()
        else:
            Image.new("L", (32, 32), change.removeprefix("one ")).save(path)
    if change == "white":
        shutil.rmtree(category / "test/good")  # whose pixels are all normal
    done = call(patch_models, "--data_dir", tmp_path / "Data", "--save_plots", int(change == "none"))
    values, complete = lines(done), lines(mapped[0])
    assert note in done.err
    metrics = ("AUC", "pixel AUROC", "AUPRO") if change.startswith("one") else () if change == "white" else ("AUC",)
    assert list(values) == [("brick", metric) for metric in metrics]
    assert values.get(("brick", "AUC")) == (None if change == "white" else complete["brick", "AUC"])
    assert values.get(("brick", "pixel AUROC")) != complete["brick", "pixel AUROC"]
    assert (tmp_path / "patch_models/brick/heatmaps.png").is_file() == (change == "none")
