"""eval.py: the lines on stdout, the tables, the plots, and what it refuses."""

import re
import resource
import shutil
from dataclasses import replace
from functools import partial

import matplotlib.image
import numpy as np
import pandas
import pytest
import tifffile
import torch
from conftest import fork, one_line, run, train
from PIL import Image

from cutpaste import VARIANTS, VIEWS, Variant
from dataset import load_masks, load_test
from detector import load
from reporting import figures as plots
from reporting.metrics import evaluate, pixel_metrics
from runtime.files import load_tensors, save_tensors


def lines(done):
    """stdout as {name: value}."""
    assert done.code == 0, done.err
    return {name: float(value) for name, value in (line.split(" AUC: ") for line in done.out.splitlines())}


@pytest.fixture
def where(data, models, tmp_path):
    return ["--data_dir", data, "--model_dir", models, "--eval_dir", tmp_path / "Eval"]


@pytest.fixture(scope="module")
def evaluated(data, models, tmp_path_factory):
    """One run with everything on, in a new process."""
    folder = tmp_path_factory.mktemp("evaluated")
    done = run("eval.py", "--data_dir", data, "--model_dir", models, "--eval_dir", folder, "--control", 1)
    return done, folder / "models"


def test_stdout_is_one_line_per_category_and_the_average(evaluated):
    done, _ = evaluated
    values = lines(done)
    assert list(values) == [
        "brick",
        "brick control",
        "grass",
        "grass control",
        "average",
        "average control",
    ]
    assert all(0 <= value <= 1 for value in values.values())
    assert values["average"] == pytest.approx((values["brick"] + values["grass"]) / 2)


def test_features_of_other_stages_are_fitted_anew(data, where, script, tmp_path):
    """Every stage, and stages by number, of image-level models and of patch models."""
    found = {}
    for name, more in {"all": ["--features", "all"], "each": ["--level", "1,2,3,4"], "pool": []}.items():
        done = script("eval", *where, "--type", "brick", "--save_plots", 0, *more)
        assert done.code == 0, done.err
        found[name] = pandas.read_csv(tmp_path / "Eval/models/scores.csv").score
        assert pandas.read_csv(tmp_path / "Eval/models/results.csv").features[0] == name.replace("each", "level")
    assert np.allclose(found["all"], found["each"])
    assert not np.allclose(found["all"], found["pool"])
    one_line(script("eval", *where, "--features", "pool", "--level", 2), "--level: goes with features level, not pool")
    one_line(script("eval", *where, "--level", 5), "--level: 5: resnet18 has 4 stages")


def test_a_category_without_a_detector_is_named(evaluated):
    done, _ = evaluated
    assert "gravel: has images" in done.err
    assert "gravel" not in done.out


def test_tables_say_what_stdout_says(evaluated, data, models):
    done, folder = evaluated
    results = pandas.read_csv(folder / "results.csv").set_index("category")
    scores = pandas.read_csv(folder / "scores.csv")
    values = lines(done)
    for name in ("brick", "grass"):
        row = results.loc[name]
        assert row.image_auroc == pytest.approx(values[name], abs=1e-12)
        assert row.control_auroc == pytest.approx(values[f"{name} control"], abs=1e-12)
        assert (row.test_normal, row.test_anomalous, row.train_images) == (3, 9, 8)
        assert row.train_command.startswith("python run_training.py")
        assert row.eval_command.startswith("python eval.py")
        assert (row.variant, row.seed, row.epochs, row.torch) == ("3way", 0, 12, torch.__version__)
        own = scores[scores.category == name]
        normal, bad = own[own.label == 0].score.to_numpy(), own[own.label == 1].score.to_numpy()
        wins = (bad[:, None] > normal).mean() + 0.5 * (bad[:, None] == normal).mean()
        assert row.image_auroc == pytest.approx(wins)
        assert row.anomalous_above_threshold == (bad > row.threshold).sum()
        assert row.normal_above_threshold == (normal > row.threshold).sum()
        assert 0 <= row.best_f1 <= 1
        assert 0 <= row.image_auprc <= 1
    assert list(scores.columns) == ["category", "path", "label", "defect_type", "score", "p_value"]
    assert scores.path[0] == "brick/test/good/000.png"
    assert (data / scores.path.iloc[-1]).is_file()
    test = load_test(data, "brick", (32, 32), 0)
    expected, *_ = evaluate(load(models / "brick.pt"), test)
    assert np.allclose(scores[scores.category == "brick"].score, expected, rtol=1e-4)


def test_plots_are_pictures(evaluated):
    _, folder = evaluated
    found = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.png"))
    kinds = ("histogram", "roc", "tsne")
    assert found == [f"{c}/{k}.png" for c in ("brick", "grass") for k in kinds] + ["summary.png"]
    for name in found:
        picture = matplotlib.image.imread(folder / name)[..., :3]
        assert min(picture.shape[:2]) > 200
        assert picture.std() > 0.02


def test_save_plots_0_writes_tables_only(where, tmp_path, script):
    assert list(lines(script("eval", *where, "--save_plots", 0, "--type", "brick"))) == ["brick", "average"]
    assert not list(tmp_path.rglob("*.png"))
    assert len(list(tmp_path.rglob("*.csv"))) == 2


def test_torch_and_sklearn_print_the_same(where, script):
    stored = lines(script("eval", *where, "--save_plots", 0))
    ours = lines(script("eval", *where, "--save_plots", 0, "--density", "torch"))
    theirs = lines(script("eval", *where, "--save_plots", 0, "--density", "sklearn"))
    for name, value in stored.items():
        assert f"{ours[name]:.6f}" == f"{theirs[name]:.6f}" == f"{value:.6f}"


def test_kde_and_l2_are_fitted_anew(where, tmp_path, models, script):
    before = (models / "brick.pt").read_bytes()
    done = script("eval", *where, "--type", "brick", "--density", "kde", "--l2", 0)
    assert list(lines(done)) == ["brick", "average"]
    row = pandas.read_csv(tmp_path / "Eval/models/results.csv").iloc[0]
    assert (row.density, row.l2) == ("kde", False)
    assert (models / "brick.pt").read_bytes() == before


def test_workers_change_nothing(where, script):
    done = [script("eval", *where, "--save_plots", 0, "--workers", n) for n in (0, 4)]
    assert lines(done[0]) == lines(done[1])


def test_flags_that_agree_are_taken_and_others_named(where, models, script):
    good = ["--head_layer", 1, "--variant", "3way", "--size", 32, "--normalize", "image", "--save_plots", 0]
    assert script("eval", *where, *good).code == 0
    for flag, given, own in (
        ("head_layer", 2, 1),
        ("variant", "scar", "3way"),
        ("size", 64, 32),
        ("size", "32x48", 32),
        ("normalize", "imagenet", "image"),
    ):
        done = script("eval", *where, f"--{flag}", given)
        one_line(done, f"--{flag}", str(given).split("x")[-1], str(own), str(models / "brick.pt"))
        assert done.out == ""


def test_without_anomalous_images_there_are_scores_but_no_auc(data, models, tmp_path, script):
    shutil.copytree(data / "brick/train", tmp_path / "Data/brick/train")
    shutil.copytree(data / "brick/test/good", tmp_path / "Data/brick/test/good")
    where = ["--data_dir", tmp_path / "Data", "--model_dir", models, "--eval_dir", tmp_path / "Eval"]
    done = script("eval", *where)
    assert done.code == 0
    assert done.out == ""
    assert "brick: no anomalous test image" in done.err
    assert "grass: has a detector" in done.err
    assert len(pandas.read_csv(tmp_path / "Eval/models/scores.csv")) == 3
    assert {p.name for p in (tmp_path / "Eval").rglob("*.png")} == {"histogram.png", "tsne.png"}


def test_bad_input_gets_one_line(data, models, where, tmp_path, script):
    def fails(*words, more=()):
        done = script("eval", *where, "--save_plots", 0, *more)
        one_line(done, *words)
        return done

    fails("nowhere", "no such folder", more=("--model_dir", "nowhere"))
    fails("nowhere", "no such folder", more=("--data_dir", "nowhere"))
    fails("glass", "no such category", more=("--type", "glass"))
    fails("no detector for gravel", more=("--type", "brick,gravel"))
    if not torch.cuda.is_available():
        fails("--cuda 1", "--cuda 0", more=("--cuda", 1))
    (tmp_path / "file").write_text("")
    fails("file", more=("--eval_dir", tmp_path / "file/Eval"))
    (tmp_path / "empty").mkdir()
    fails("empty", "no detector for any category", more=("--model_dir", tmp_path / "empty"))

    own = tmp_path / "models"
    own.mkdir()
    shutil.copy(models / "brick.pt", own / "grass.pt")
    fails("grass.pt", "category 'brick' under another name", more=("--model_dir", own))
    (own / "grass.pt").write_bytes((models / "grass.pt").read_bytes()[:1000])
    fails("grass.pt", "truncated, damaged", more=("--model_dir", own))

    content = load_tensors(models / "grass.pt", "detector")
    save_tensors(content | {"version": 99}, own / "grass.pt")
    fails("grass.pt", "format 99", "update the program", more=("--model_dir", own))
    save_tensors(content["members"][0]["network"], own / "grass.pt")
    fails("grass.pt", "not a detector file of this project", more=("--model_dir", own))

    images = tmp_path / "Data"
    shutil.copytree(data / "brick", images / "brick")
    mask = images / "brick/ground_truth/hole/001_mask.png"
    shutil.copy(mask, tmp_path / "whole.png")
    from PIL import Image

    Image.open(mask).resize((16, 32)).save(mask)
    more = ("--data_dir", images, "--type", "brick")
    fails("001_mask.png", "16x32", "32x32", more=more)
    shutil.copy(tmp_path / "whole.png", mask)
    photo = images / "brick/test/hole/002.png"
    photo.write_bytes(photo.read_bytes()[:100])
    fails("hole/002.png", "not a readable image", more=more)
    shutil.rmtree(images / "brick/test")
    fails("brick/test", "no such folder", more=more)


def test_a_failure_leaves_earlier_tables_and_plots_as_they_were(data, models, tmp_path, script):
    shutil.copytree(data, tmp_path / "Data")
    where = ["--data_dir", tmp_path / "Data", "--model_dir", models, "--eval_dir", tmp_path / "Eval"]
    assert script("eval", *where).code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "Eval").rglob("*") if path.is_file()}
    assert len(before) == 9

    small_disk = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (2**13, 2**13))  # the tables fit, a plot does not
    one_line(fork("eval.py", *where, "--density", "kde", preexec=small_disk), ".png", "cannot be written")
    photo = tmp_path / "Data/grass/test/hole/000.png"
    photo.write_bytes(photo.read_bytes()[:100])
    one_line(script("eval", *where), "hole/000.png", "not a readable image")
    assert {path: path.read_bytes() for path in (tmp_path / "Eval").rglob("*") if path.is_file()} == before


def test_a_report_replaces_reports_only(where, tmp_path, script):
    words = ["eval", *where, "--type", "brick", "--save_plots", 0, "--report", tmp_path / "look.html"]
    (tmp_path / "look.html").write_text("<p>mine</p>")
    one_line(script(*words), "look.html: is there already", "--report")
    assert (tmp_path / "look.html").read_text() == "<p>mine</p>"
    (tmp_path / "look.html").unlink()
    for _ in range(2):
        assert script(*words).code == 0
    assert "brick" in (tmp_path / "look.html").read_text()


# Maps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["is", "holds", "lies in"])
@pytest.mark.parametrize("linked", [False, True])
def test_maps_are_not_written_among_images(data, patch_models, tmp_path, script, place, linked):
    maps = tmp_path / "x/patch_models/maps"
    folder = {"is": maps, "holds": maps / "brick", "lies in": tmp_path / "x"}[place]
    if place == "lies in":
        shutil.copytree(data / "brick", tmp_path / "brick")
        folder = tmp_path
        maps = folder / "brick/patch_models/maps"
    else:
        shutil.copytree(data, folder)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    eval_dir = maps.parents[1]
    if linked:
        eval_dir = tmp_path / "link"
        eval_dir.symlink_to(maps.parents[1])
    words = ["--data_dir", folder, "--model_dir", patch_models, "--type", "brick", "--save_maps", 1]
    one_line(script("eval", *words, "--eval_dir", eval_dir), "maps/brick: maps would lie among", "--eval_dir")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def all_lines(done):
    """stdout as {(category, metric): value}."""
    assert done.code == 0, done.err
    found = (re.fullmatch(r"(\S+) (.+): (\S+)", line).groups() for line in done.out.splitlines())
    return {(category, metric): float(value) for category, metric, value in found}


@pytest.fixture(scope="module")
def patch_models(data, tmp_path_factory):
    """Patch models of brick and grass."""
    folder = tmp_path_factory.mktemp("patches") / "patch_models"
    more = ("--type", "brick,grass", "--patch_size", 32, "--window", 8, "--stride", 4, "--sigma", 3)
    done = train(data, folder, *more)
    assert done.code == 0, done.err
    return folder


@pytest.fixture(scope="module")
def mapped(data, patch_models, tmp_path_factory):
    """A patch model's evaluation with everything on, in a process of its own."""
    folder = tmp_path_factory.mktemp("mapped")
    where = ("--data_dir", data, "--model_dir", patch_models, "--eval_dir", folder)
    return fork("eval.py", *where, "--control", 1, "--save_maps", 1), folder / "patch_models"


def test_a_patch_model_prints_pixel_lines_beside_the_auc(mapped, patch_models):
    done, folder = mapped
    values = all_lines(done)
    metrics = ["AUC", "pixel AUROC", "AUPRO", "control AUC", "control pixel AUROC"]
    assert list(values) == [(name, metric) for name in ("brick", "grass", "average") for metric in metrics]
    assert all(0 <= value <= 1 for value in values.values())
    assert [line.split(" AUC")[0] for line in done.out.splitlines() if "AUC" in line] == [
        *["brick", "brick control", "grass", "grass control", "average", "average control"]
    ]
    results = pandas.read_csv(folder / "results.csv", dtype=str).set_index("category")  # pandas 2 loses a digit
    columns = ["image_auroc", "pixel_auroc", "aupro", "control_auroc", "control_pixel_auroc"]
    for name in ("brick", "grass"):
        assert results.loc[name, columns].astype(float).tolist() == [values[name, metric] for metric in metrics]
    chosen = {name: load(patch_models / f"{name}.pt").members[0].levels[0].shared for name in ("brick", "grass")}
    assert {name: kind == "shared" for name, kind in results.location_chosen.items()} == chosen
    assert {p.name for p in folder.rglob("*.png")} == {"roc.png", "histogram.png", "heatmaps.png", "summary.png"}


def test_saved_maps_are_those_that_were_measured(mapped, data, patch_models):
    """16-bit files in the layout of MVTec's evaluation; the metrics and image scores follow from them alone."""
    done, folder = mapped
    scores = pandas.read_csv(folder / "scores.csv").set_index("path").score
    files = sorted((folder / "maps/brick").rglob("*.tiff"))
    test = load_test(data, "brick", (32, 32), 0)
    names = [path.relative_to(data).with_suffix(".tiff") for path in test.paths]
    assert files == sorted(folder / "maps" / name for name in names)
    maps = [tifffile.imread(folder / "maps" / name) for name in names]
    assert all(values.dtype == np.float16 and values.shape == (32, 32) for values in maps)
    for path, values in zip(test.paths, maps):
        assert values.max() == pytest.approx(scores[path.relative_to(data).as_posix()], rel=2e-3)
    masks = load_masks(test, (32, 32), 0).numpy()
    found = pixel_metrics(masks, np.stack(maps).astype(np.float32))
    for metric, name in (("pixel AUROC", "pixel_auroc"), ("AUPRO", "aupro")):
        assert found[name] == pytest.approx(all_lines(done)["brick", metric], abs=5e-3)


@pytest.mark.parametrize(("gray", "word"), [(255, "every"), (0, "no")])
def test_masks_that_mark_all_or_nothing(data, patch_models, tmp_path, script, gray, word):
    shutil.copytree(data / "brick", tmp_path / "Data/brick")
    shutil.rmtree(tmp_path / "Data/brick/test/good")
    for path in (tmp_path / "Data/brick/ground_truth").rglob("*.png"):
        Image.new("L", (32, 32), gray).save(path)
    where = ["--data_dir", tmp_path / "Data", "--model_dir", patch_models, "--eval_dir", tmp_path / "Eval"]
    done = script("eval", *where)
    assert all_lines(done) == {}
    assert f"the masks mark {word} pixel" in done.err


def test_other_settings_of_maps_are_fitted_anew(data, patch_models, tmp_path, script):
    where = ["--data_dir", data, "--model_dir", patch_models, "--eval_dir", tmp_path, "--type", "brick"]
    before = (patch_models / "brick.pt").read_bytes()
    more = ["--window", 16, "--stride", 8, "--level", 4, "--dense", 0, "--location", "shared", "--sigma", 5]
    assert ("brick", "pixel AUROC") in all_lines(script("eval", *where, *more, "--save_plots", 0))
    row = pandas.read_csv(tmp_path / "patch_models/results.csv").iloc[0]
    assert (row.window, row.stride, row.level, row.dense) == (16, 8, 4, False)
    assert (row.location, row.location_chosen, row.sigma) == ("shared", "shared", 5)
    done = script("eval", *where, "--location", "auto", "--save_plots", 0)
    assert re.search(r"brick: one Gaussian for \w+ locations? \(mean log", done.err)
    assert (patch_models / "brick.pt").read_bytes() == before


@pytest.mark.parametrize("flag", ["--heatmaps", "--save_maps"])
def test_maps_of_an_image_level_model(where, tmp_path, script, flag):
    done = script("eval", *where, "--type", "brick", flag, 1)
    values = all_lines(done)
    assert [metric for name, metric in values if name == "brick"] == ["AUC", "pixel AUROC", "AUPRO"]
    without = all_lines(script("eval", *where, "--type", "brick", "--save_plots", 0))
    assert without["brick", "AUC"] == pytest.approx(values["brick", "AUC"], abs=1e-9)
    folder = tmp_path / "Eval/models"
    assert (folder / "brick/heatmaps.png").is_file()
    assert len(list(folder.rglob("maps/brick/test/*/*.tiff"))) == (12 if flag == "--save_maps" else 0)


def test_where_masks_are_missing(data, patch_models, tmp_path, script):
    """Without any: image metrics only. Of some images: those images are left out of the pixel metrics."""
    shutil.copytree(data / "brick", tmp_path / "Data/brick")
    where = ["--data_dir", tmp_path / "Data", "--model_dir", patch_models, "--eval_dir", tmp_path / "Eval"]
    whole = all_lines(script("eval", *where, "--save_plots", 0))
    (tmp_path / "Data/brick/ground_truth/hole/000_mask.png").unlink()
    done = script("eval", *where)
    some = all_lines(done)
    assert "brick: 1 anomalous images without a mask" in done.err
    assert some["brick", "AUC"] == whole["brick", "AUC"]
    assert some["brick", "pixel AUROC"] != whole["brick", "pixel AUROC"]
    shutil.rmtree(tmp_path / "Data/brick/ground_truth")
    done = script("eval", *where)
    assert all_lines(done) == {("brick", "AUC"): whole["brick", "AUC"], ("average", "AUC"): whole["average", "AUC"]}
    assert "no masks in ground_truth, so image metrics only" in done.err
    assert (tmp_path / "Eval/patch_models/brick/heatmaps.png").is_file()


def test_flags_that_do_not_fit_the_kind_of_model(data, where, patch_models, script):
    one_line(script("eval", *where, "--sigma", 4), "--sigma", "no patch model")
    for flag in ("--heatmaps", "--save_maps"):
        one_line(script("eval", *where, flag, 1, "--density", "kde"), f"{flag} 1", "kde")
    patches = [*where, "--model_dir", patch_models]
    one_line(script("eval", *patches, "--density", "kde"), "--density: kde", "patch model")
    one_line(script("eval", *patches, "--window", 64), "--window: 64", "larger than the image")
    one_line(script("eval", *where, "--backbone", "resnet34"), "--backbone", "resnet18", "leave the flag out")
    one_line(script("eval", *patches, "--stride", 6), "--stride: 6", "multiple of 4")


def test_a_sheet_shows_every_kind_and_the_worst_mistakes(data):
    test = load_test(data, "brick", (32, 32), 0)
    scores = np.arange(len(test.labels), dtype=float)[::-1]  # the first image, a normal one, has the highest
    masks = load_masks(test, (32, 32), 0).numpy()
    cases = plots.choose_cases(test, scores, masks, np.zeros(masks.shape))
    titles = [title.split(":")[0] for title, *_ in cases]
    kinds = {title.split(",")[0] for title in titles}
    assert kinds == {"normal", *test.defect_types} - {"good"}
    assert "normal, highest\n000.png" in titles
    assert f"{test.defect_types[-1]}, lowest\n{test.paths[-1].name}" in titles
    assert len({title for title, *_ in cases}) == len(cases)
    (shown,) = (image for title, image, *_ in cases if "highest\n000" in title)
    assert np.allclose(shown, test.images[0].permute(1, 2, 0) / 255)


def test_two_levels_are_fitted_by_a_flag(data, patch_models, tmp_path, script):
    where = ["--data_dir", data, "--model_dir", patch_models, "--eval_dir", tmp_path, "--type", "brick"]
    done = script("eval", *where, "--level", "2,3", "--window", 16, "--stride", 16, "--control", 1)
    assert 0 <= all_lines(done)["brick", "pixel AUROC"] <= 1
    row = pandas.read_csv(tmp_path / "patch_models/results.csv", dtype=str).iloc[0]
    assert (row.level, row.stride, row.dims) == ("2,3", "16", "64,64")
    assert len(row.location_chosen.split(",")) == 2


def test_a_view_that_is_added_to_the_table_is_drawn(models, data, monkeypatch):
    """In previews and in the t-SNE plot, of a variant with three augmented views."""
    views = ("image", "patch", "scar", "hole")
    monkeypatch.setitem(VIEWS, "hole", replace(VIEWS["patch"], title="Hole", color="#000000"))
    monkeypatch.setitem(VARIANTS, "4way", Variant(views, "four classes"))
    test = load_test(data, "brick", (32, 32), 0)
    trained = load(models / "brick.pt")
    trained.config = replace(trained.config, variant="4way")
    invisible = {"patch": 0.0, "scar": 0.256, "hole": 1.0}
    (axes,) = plots.preview(test.images[:2], ["a", "b"], trained.config, invisible).axes
    titles = [label.get_text() for label in axes.get_xticklabels()]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    shown = [("CutPaste (1)", 0), ("CutPaste-Scar (2)", 26), ("Hole (3)", 100)]
    shown = [f"{title}\n{share} % show nothing" for title, share in shown]
    assert titles == ["original", "image view (0)", *shown]
    embeddings, groups = plots.sample_views(trained, test)
    assert len(embeddings) == len(groups) == 12 + 3 * 3
    assert set(groups) == {"normal", "anomalous", *views[1:]}
    legend = [text.get_text() for text in plots.tsne("brick", embeddings, groups).axes[0].get_legend().get_texts()]
    assert legend == ["CutPaste", "CutPaste-Scar", "Hole", "normal", "anomalous"]


def test_wrong_usage_exits_with_2(script):
    for wrong in (["--density", "tree"], ["--save_plot", "0"], ["--l2", "2"]):
        assert script("eval", *wrong).code == 2
