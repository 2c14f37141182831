"""check_data.py: duplicates against planted copies, densities of fewer images against refits, the script."""

import io
import re
import shutil
from dataclasses import replace

import numpy as np
import pandas
import pytest
import torch
from conftest import one_line
from PIL import Image
from test_detector import CONFIG, PATCHES, pictures

import check_data
from check_data import SubsetScores, curve_rows, find_duplicates, fit_subsets, subset_sizes, unseen_map, verdict
from config import PatchConfig
from dataset import load_train
from detector import Detector, initial_network, load, save, stream
from reporting import figures
from runtime.image_files import decode, find_images
from training.choice import CANDIDATES, CHANCE, Judge, choose


def as_jpeg(image):
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=75)
    return torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1)


# Duplicates -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def textures():
    """40 parts of one texture, moved, with noise: (40, 3, 128, 128) uint8."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(40, 1, 24, 24, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (128, 128), mode="bicubic", align_corners=False)
    noise = 0.03 * torch.randn(40, 3, 128, 128, generator=generator)
    return (220 * (0.2 + 0.6 * smooth.clamp(0, 1) + noise)).clamp(0, 255).byte()


@pytest.mark.parametrize("alike", [0.0, 0.8])  # of each picture the share that is the same in all: a fixed part
def test_planted_copies_are_found_and_nothing_else(textures, alike):
    images = ((1 - alike) * textures[:32].float() + alike * textures[39].float()).round().byte()
    lighter = (1.05 * images[2].float()).round().clamp(0, 255).byte()
    moved = images[3].roll((1, -1), (1, 2))
    copies = torch.stack([images[0], as_jpeg(images[1]), lighter, moved])
    expected = {("exact", 0, 32), ("near", 1, 33), ("near", 2, 34), ("near", 3, 35)}
    within, between = find_duplicates(torch.cat([images, copies]))
    assert {pair[:3] for pair in within} == expected
    assert between == []
    assert [pair.similarity for pair in within] == sorted((pair.similarity for pair in within), reverse=True)
    within, between = find_duplicates(images, torch.cat([textures[32:36], copies]))
    assert within == []
    assert {pair[:3] for pair in between} == {(kind, i, j - 28) for kind, i, j in expected}


def test_images_that_are_all_there_twice_and_images_without_change(textures):
    again = torch.stack([as_jpeg(image) for image in textures])
    within, _ = find_duplicates(torch.cat([textures, again]))
    assert {pair[:3] for pair in within} == {("near", i, i + 40) for i in range(40)}
    flat = torch.full((3, 3, 32, 32), 90, dtype=torch.uint8)
    flat[2] += 9  # without any change there is nothing to compare but pixels
    assert [pair[:3] for pair in find_duplicates(flat)[0]] == [("exact", 0, 1)]


# Enough -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CONFIG, replace(PATCHES, folds=2, level=(1,))])
def test_densities_of_subsets_are_those_of_a_refit(config, monkeypatch):
    """All that is not new, and one subset, against a detector of one network that is fitted to exactly these."""
    images, test = (pictures(count, seed)[..., : config.height, : config.width] for count, seed in ((36, 0), (6, 1)))
    detector = Detector(config, [initial_network(config, member=k) for k in range(config.folds)]).fit(images)
    new = range(0, 36, 2) if config.folds == 2 else range(0, 36, 5)
    known = [i for i in range(36) if i not in new]
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    drawn, draw = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *args, **kwargs: drawn.append(draw(*args, **kwargs)) or drawn[-1])
    subsets = fit_subsets(detector, images, test)
    monkeypatch.undo()
    expected_sizes = [n for n in subset_sizes(len(known)) for _ in range(1 + 3 * (n < len(known)))]
    assert [subset.images for subset in subsets] == expected_sizes
    for which in (-1, -2):
        chosen = [known[i] for i in sorted(drawn[which][: subsets[which].images].tolist())]
        alone = replace(config, folds=1, holdout=0.0)
        other = Detector(alone, [detector.members[0].network]).fit(images[chosen], threshold=False)
        for scores, scored in ((subsets[which].scores, images[list(new)]), (subsets[which].test_scores, test)):
            expected = torch.cat([batch for batch, _ in stream(other, scored)]).numpy()
            assert scores == pytest.approx(expected, rel=1e-4)
    for name, value in detector.state_dict().items():
        assert torch.equal(value, before[name]), name
    again = fit_subsets(detector, images)
    assert all((one.scores == two.scores).all() for one, two in zip(subsets, again))
    assert again[0].test_scores is None


def test_what_the_curve_says():
    assert subset_sizes(100) == [3, 6, 12, 25, 50, 100]
    assert subset_sizes(1000) == [31, 62, 125, 250, 500, 1000]
    assert subset_sizes(5) == []
    base = np.array([1.0, 2.0, 3.0, 8.0])
    subsets = [SubsetScores(5, base + 2, np.array([3.0, 2.0])), SubsetScores(10, base, np.array([2.0, 3.0]))]
    rows = curve_rows(subsets, np.array([0, 1]))
    scale = base.std(ddof=1)
    assert [row["image_auroc"] for row in rows] == [0, 1]
    assert [row["rise"] for row in rows] == pytest.approx([2 / scale, 0])
    assert [row["median"] for row in rows] == pytest.approx([2 / scale, 0])
    assert rows[1]["quantile_90"] == pytest.approx((np.quantile(base, 0.9) - 2.5) / scale)
    assert verdict(rows) == (
        "no: with only 5 of the 10 images, new good ones look 0.64 deviations more unusual (0.64 to 0.64), "
        "AUC 0.0 instead of 100.0; twice as many might bring half of that"
    )
    rows[0]["rise"] = 0.3
    assert verdict(rows).startswith("nearly: ")
    for rise, words in ((0.02, "0.02 deviations more"), (-0.3, "0.30 deviations less")):
        rows[0]["rise"] = rise
        assert verdict(rows).startswith("yes, probably: with only 5 of the 10 images, new good ones look ")
        assert f"look {words} unusual (" in verdict(rows)
        assert verdict(rows).endswith("; twice as many would bring little")


# The script -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checked(data, tmp_path_factory):
    """Brick with a copy in train/good, one of a test image, and a spoiled image; a detector of two networks."""
    folder = tmp_path_factory.mktemp("checked")
    shutil.copytree(data / "brick", folder / "real/brick")
    train, test = (folder / "real/brick" / name / "good" for name in ("train", "test"))
    shutil.copy(find_images(train)[2], train / "y_copy.png")
    shutil.copy(find_images(test)[0], train / "y_leak.png")
    for number in (0, 1):
        turned = np.rot90(decode(find_images(train)[number])).copy()
        Image.fromarray(turned).save(train / f"x_turned_{number}.png")
    spoiled = decode(find_images(train)[4]).copy()
    spoiled[8:24, 8:24] = (255, 0, 0)
    Image.fromarray(spoiled).save(train / "z_spoiled.png")
    (folder / "Data").symlink_to(folder / "real")
    config = replace(PATCHES, category="brick", height=32, width=32, folds=2, patches=PatchConfig(32))
    networks = [initial_network(config, member=number) for number in range(2)]
    images = load_train(folder / "Data", "brick", (32, 32), 0).images
    save(Detector(config, networks).fit(images), folder / "two/brick.pt")
    return folder


def test_the_script(checked, tmp_path, script, monkeypatch):
    sheets, draw = [], figures.heat_sheet
    monkeypatch.setattr(figures, "heat_sheet", lambda *args: sheets.append((args, draw(*args))) or sheets[-1][1])
    done = script("check_data", "--data_dir", checked / "Data", "--model_dir", checked / "two", "--eval_dir", tmp_path)
    assert done.code == 0, done.err
    first, second, third = done.out.splitlines()
    assert first == "brick duplicates: 1 exact and 0 near within train, 1 exact and 0 near between train and test"
    assert second.startswith("brick suspicious: z_spoiled.png (")
    assert re.match(r"brick enough: (no|nearly|yes, probably): with only 3 of the 6 images, new good ones look ", third)
    for step in ("looking for copies", "drawing the most unusual training images", "fitting the densities to fewer"):
        assert f"brick: {step}" in done.err
    assert "the curve is of the first of 2 networks" in done.err
    out = tmp_path / "two/brick"
    assert sorted(path.name for path in out.iterdir()) == [
        *("duplicates.csv", "enough.csv", "enough.png", "suspicious.csv", "suspicious.png")
    ]
    rows = pandas.read_csv(out / "duplicates.csv")
    assert rows.columns.tolist() == ["kind", "path", "other", "similarity"]
    assert rows.other.tolist()[0] == "brick/train/good/y_copy.png"
    assert rows.path.tolist()[1] == "brick/train/good/y_leak.png"
    assert rows.other.tolist()[1].startswith("brick/test/good/")
    table = pandas.read_csv(out / "suspicious.csv")
    scores = load(checked / "two/brick.pt").calibration_scores
    assert table.score.tolist() == pytest.approx(scores.sort(descending=True).values.tolist())
    assert table.p_value[0] == pytest.approx(1 / len(scores), rel=1e-12)
    assert Image.open(out / "suspicious.png").size[0] > 500
    (((_, cases, *_), sheet),) = sheets  # heat, colors and scores have one unit, and an outline shows the place
    for case, score in zip(cases, table.score):
        assert case.heat.max() == pytest.approx(score, abs=1e-4)
        assert f"score {score:.3g}" in case.title
        assert case.level < case.heat.max()
    assert "blue outline: the most unusual place" in sheet._suptitle.get_text().replace("\n", " ")
    assert pandas.read_csv(out / "enough.csv").columns.tolist() == [
        *("category", "images", "median", "quantile_90", "rise", "image_auroc")
    ]


def test_detectors_are_compared_by_normal_images_alone(data, detectors, tmp_path, script):
    """A row for each folder, draw and density; the figures on stdout are their means."""
    folders = [detectors / "patch", detectors / "whole"]
    where = ("--data_dir", data, "--type", "brick", "--eval_dir", tmp_path)
    done = script("check_data", "--choose", *folders, *where, "--draws", 3)
    assert done.code == 0, done.err
    rows = pandas.read_csv(tmp_path / "choose.csv")
    assert len(rows) == 3 * (2 * len(CANDIDATES) - 1)  # windows from anywhere are for patch models
    detector = load(folders[0] / "brick.pt")
    judge = Judge(detector, load_train(data, "brick", detector.config.size, 0).images)
    for draw in range(3):
        drawn = rows[(rows.model_dir == str(folders[0])) & (rows.draw == draw)]
        assert dict(zip(drawn.density, drawn.pasted_auroc)) == pytest.approx(judge.aurocs(draw))
        assert {*drawn.chosen} == {choose(judge.aurocs(draw))}
    *lines, last = done.out.splitlines()
    means = rows.groupby(["model_dir", "density"], sort=False).pasted_auroc.mean()
    assert len(lines) == len(means)
    for line, ((folder, density), mean) in zip(lines, means.items()):
        assert line.startswith(f"brick {folder} {density}: {100 * mean:.1f} ± ")
    best = "{} {} is first".format(*means.idxmax())
    assert last == f"brick choose: {best if means.max() > CHANCE else 'chance: what was pasted cannot be told'}"
    one_line(script("check_data", "--choose", tmp_path / "none", *where), "no such folder")


def test_maps_are_of_the_network_that_has_not_seen_the_image(checked):
    detector, images = load(checked / "two/brick.pt"), load_train(checked / "Data", "brick", (32, 32), 0).images
    for number in range(len(images)):
        heat = unseen_map(detector, images[number : number + 1], number)
        assert heat.max() == pytest.approx(detector.calibration_scores[number].item(), abs=1e-4)


def test_image_models_without_test_images_and_other_densities(data, models, tmp_path, script, monkeypatch):
    """With a gradient for maps, and without one."""
    monkeypatch.setattr(check_data, "SHOWN", 3)  # drawing takes seconds
    for category in ("brick", "grass"):
        shutil.copytree(data / category / "train", tmp_path / "Data" / category / "train")
    (tmp_path / "Data/grass/test/good").mkdir(parents=True)  # empty
    (tmp_path / "models").mkdir()
    shutil.copy(models / "brick.pt", tmp_path / "models")
    images = load_train(data, "grass", (32, 32), 0).images
    save(load(models / "grass.pt").refit(images, density="kde"), tmp_path / "models/grass.pt")
    where = ["--data_dir", tmp_path / "Data", "--model_dir", tmp_path / "models", "--eval_dir", tmp_path]
    done = script("check_data", *where)
    assert done.code == 0, done.err
    for category in ("brick", "grass"):
        assert f"{category} duplicates: 0 exact and 0 near within train\n" in done.out
        assert f"{category}: the network has seen all these images" in done.err
        assert (tmp_path / "models" / category / "suspicious.png").stat().st_size > 10_000


def test_refusals(checked, data, models, tmp_path, script):
    where = ["--eval_dir", tmp_path, "--data_dir", data]
    for flags, words in (
        (["--model_dir", tmp_path / "none"], "none: no such folder"),
        (["--model_dir", tmp_path], "no detector for any category"),
        (["--model_dir", models, "--type", "gravel"], "no detector for gravel"),
        (["--model_dir", checked / "two"], "two/brick.pt: made from other images than"),
    ):
        one_line(script("check_data", *where, *flags), words)
    assert list(tmp_path.iterdir()) == []
