"""predict.py: rows of any images, in files that outlive a kill, drawings, folders that fill up."""

import base64
import html
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta

import numpy as np
import pandas
import pytest
import torch
from conftest import ROOT, contents, lines_in, one_line, rows_of, wait_for
from forked import Forked
from PIL import Image

from config import Config, PatchConfig
from dataset import load_train
from detector import Detector, initial_network, load, save
from normals import normals_path, save_normals
from prediction.inputs import list_paths
from prediction.outputs import COLUMNS, RowsFile
from reporting import gallery, overlays
from runtime.image_files import find_images, read_size

BOX = ("x", "y", "width", "height")


def rows_on_stdout(done, code=0):
    assert done.code == code, done.err
    return rows_of(done.out)


def scores_of(rows):
    return np.array([float(row["score"]) for row in rows])


def half_above(path, folder):
    """A copy of a detector whose threshold half of the images in photos/ exceed."""
    detector = load(path)
    detector.threshold = torch.from_numpy(detector.predict(list_paths(["photos"])).scores).median()
    detector.calibration_scores = torch.full_like(detector.calibration_scores, detector.threshold)  # p-values agree
    save(detector, folder / "brick.pt")
    return folder / "brick.pt"


# Rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["whole", "patch"])
def test_rows_say_what_the_detector_says(detectors, here, script, kind):
    path = half_above(detectors / kind / "brick.pt", here)
    done = script("predict", path, "photos")
    rows, detector = rows_on_stdout(done), load(path)
    paths = [f"photos/{name}" for name in ("a.jpg", "b.png", "c.TIF", "d.png", "more/a.png", "more/e.bmp")]
    expected = detector.predict(paths)
    assert tuple(rows[0]) == COLUMNS
    assert [row["path"] for row in rows] == paths
    assert np.allclose(scores_of(rows), expected.scores, rtol=1e-5)
    assert [float(row["p_value"]) for row in rows] == expected.p_values.tolist()
    assert [int(row["anomalous"]) for row in rows] == expected.anomalous.astype(int).tolist()
    assert not any(row["error"] for row in rows)
    assert done.err.count(detector.guarantee.advice()) == 1
    assert detector.guarantee.words() not in done.err
    threshold, boxes = detector.threshold.item(), [None] * 6
    if kind == "patch":
        boxes = [overlays.region(heat, threshold, read_size(path)) for heat, path in zip(expected.maps, paths)]
        assert 0 < boxes.count(None) < 6
    for row, box in zip(rows, boxes):
        assert [row[name] for name in BOX] == [str(value) for value in box or [""] * 4]


def test_rows_say_what_the_evaluation_says(detectors, data, here, script):
    where = ["--data_dir", data, "--model_dir", detectors / "patch", "--type", "brick", "--save_plots", 0]
    done = script("eval", *where, "--eval_dir", here / "Eval")
    assert done.code == 0, done.err
    evaluated = pandas.read_csv(here / "Eval/patch/scores.csv")
    rows = rows_on_stdout(script("predict", detectors / "patch/brick.pt", *(data / path for path in evaluated.path)))
    assert np.allclose(scores_of(rows), evaluated.score, rtol=1e-5)
    assert np.allclose([float(row["p_value"]) for row in rows], evaluated.p_value)


def test_the_rate_in_use_and_exit_codes(detectors, here, script):
    path = detectors / "whole/brick.pt"
    flags = ["--false_alarm_rate", 0.8]
    done = script("predict", path, "photos", *flags)
    guarantee = replace(load(path).guarantee, asked=0.8)
    assert guarantee.advice() in done.err
    assert guarantee.words() in script("predict", path, "photos", *flags, "--verbose").err
    decisions = [(int(row["anomalous"]), float(row["p_value"]) <= guarantee.rate) for row in rows_on_stdout(done)]
    assert {*decisions} <= {(0, False), (1, True)}
    assert (1, True) in decisions
    assert script("predict", path, "photos", *flags, "--fail_on_anomaly", 1).code == 3
    assert script("predict", path, "photos", "none.png", *flags, "--fail_on_anomaly", 1).code == 1
    for usage in ([path], ["--model_dir", "a", "photos", "more"], [path, "photos", "--format", "xml"]):
        assert script("predict", *usage).code == 2
    assert script("predict", path, "photos", "--report", "look.pdf").code == 2


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_names_come_out_as_they_are(detectors, here, script, monkeypatch, kind):
    """Also bytes that are no UTF-8; what a spreadsheet would compute gets ./ before it."""
    names = ["a b.png", "q\"u,o'te.png", "li\nne.png", "re\rturn.png", "日本.png", "=1+1.png", "-x.png", "@x.png"]
    if sys.platform == "linux":
        names.append(os.fsdecode(b"\xff\xfe.png"))
    folder, out = here / "names", here / "out"
    folder.mkdir()
    for name in names:
        shutil.copy(here / "photos/b.png", folder / name)
    (folder / "=1+1.png").write_text("no image")
    monkeypatch.chdir(folder)
    for _ in range(2):  # the second time everything is there
        done = script("predict", detectors / "whole/brick.pt", ".", "--output", out, "--format", kind)
        assert done.code == 1, done.err
        assert "9 images" in done.err
        assert done.err.splitlines()[-1].endswith("1 could not be scored, see their error")
        rows = rows_of(out) if kind == "csv" else [json.loads(line) for line in out.read_text().splitlines()]
        assert sorted(row["path"] for row in rows) == sorted(f"./{n}" if n[0] in "=-@" else n for n in names)
        assert [row["path"] for row in rows if row["error"]] == ["./=1+1.png"]
        assert not any(row["error"].startswith(("=", "./")) for row in rows if row["error"])


def test_a_terminal_has_rows_without_a_bar_and_a_promise_comes_once_for_an_output(detectors, here, script):
    path, advice = detectors / "patch/brick.pt", load(detectors / "patch/brick.pt").guarantee.advice()
    assert advice in script("predict", path, "photos", "--output", "a.csv").err
    shutil.copy("photos/b.png", "photos/new.png")
    again = script("predict", path, "photos", "--output", "a.csv")
    assert advice not in again.err
    assert "7 images" in again.err
    words = load(path).guarantee.words()
    assert words in script("predict", path, "photos", "--output", "a.csv", "--verbose").err
    terminal, end = pty.openpty()
    with subprocess.Popen(
        [sys.executable, ROOT / "predict.py", path, "photos"], stdin=subprocess.DEVNULL, stdout=end, stderr=end
    ):
        os.close(end)
        told = b""
        with suppress(OSError):  # which is how a terminal ends
            while part := os.read(terminal, 4096):
                told += part
    os.close(terminal)
    lines = told.decode().splitlines()
    assert sum(line.startswith("photos/") for line in lines) == 7
    assert "image/s" not in told.decode()


def test_files_that_cannot_be_read_are_named_the_first_of_them(detectors, here, script):
    path = detectors / "patch/brick.pt"
    for number in range(7):
        (here / f"photos/broken{number}.png").write_text("no image")
    done = script("predict", path, "photos", "--output", "a.csv")
    assert done.code == 1
    named = [line for line in done.err.splitlines() if "not a readable image" in line]
    assert [line.partition(": ")[0] for line in named] == [f"photos/broken{number}.png" for number in range(5)]
    assert done.err.splitlines()[-1].endswith("; 7 could not be scored, see their error")


def test_without_anomalous_images_it_says_how_to_get_panels(detectors, here, data, script):
    """As told, it works."""
    detector, path = load(detectors / "patch/brick.pt"), here / "brick.pt"
    detector.calibration_scores[:2] = 1e6  # which no image reaches
    save(detector, path)
    save_normals(detector, load_train(data, "brick", (32, 48), 0), normals_path(path))
    flags = ["--explain", "why", "--false_alarm_rate"]
    done = script("predict", path, "photos", *flags, 0.2, "--output", "a.csv")
    assert not list((here / "why").rglob("*.png"))
    advice = re.search(r"nothing was called .*; (\S+) has the lowest p, .*(--false_alarm_rate) (\S+) and ano", done.err)
    assert script("predict", path, "photos", *flags, advice[3], "--output", "b.csv").code == 0
    assert (here / "why" / os.path.relpath(advice[1], "photos")).with_suffix(".png").is_file()
    assert "nothing was called" not in script("predict", path, "photos", *flags, advice[3], "--output", "b.csv").err


def test_a_folder_of_detectors(detectors, here, script):
    for name in ("grass", "brick", "gravel"):
        shutil.copytree(here / "photos/more", here / "line" / name / "more")
    words = ["--masks", "masks", "--explain", "why", "--false_alarm_rate", 1]
    done = script("predict", "--model_dir", detectors / "patch", "line", *words)
    rows = rows_on_stdout(done)
    assert list(rows[0]) == ["category", *COLUMNS]
    assert [row["category"] for row in rows] == ["brick"] * 2 + ["grass"] * 2
    assert "gravel: has images but no detector; left out" in done.err
    for name in ("brick", "grass"):
        of_category = [row for row in rows if row["category"] == name]
        assert all(row["path"].startswith(f"line/{name}/") for row in of_category)
        expected = load(detectors / f"patch/{name}.pt").predict([row["path"] for row in of_category]).scores
        assert np.allclose(scores_of(of_category), expected, rtol=1e-5)
        assert (here / f"masks/{name}/more/a.png").is_file()
        assert (here / f"why/{name}/more/a.png").is_file()


def test_the_first_message_comes_before_torch_is_imported(detectors, here):
    """Within a fraction of a second, and the next ones are a bar and rows."""
    command = [sys.executable, "-X", "importtime", ROOT / "predict.py", detectors / "patch/brick.pt", "photos"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines()
    names = [line.rpartition("|")[2].strip() for line in told]
    assert names.index("loading torch and the detector") < names.index("torch") < names.index("detector")


# Files of rows ----------------------------------------------------------------------------------------------------


def test_a_killed_run_is_continued(detectors, here, data, script):
    """Nothing is lost and nothing twice."""
    folder, sources, out = here / "many", find_images(data / "brick/train/good"), here / "killed.csv"
    folder.mkdir()
    paths = [f"many/{number:03}.png" for number in range(160)]
    for number, path in enumerate(paths):
        os.link(sources[number % 8], path)
    words = [detectors / "patch/brick.pt", "many", "--output", out]
    process = Forked(ROOT / "predict.py", *words)
    try:
        wait_for(lambda: lines_in(out) > 20)
    finally:
        process.kill()
        process.wait()
    assert 20 < lines_in(out) < 160, "killed too late to tell"
    with out.open("ab") as file:
        file.write(b'many/160.png,0.1,"')
    done = script("predict", *words)
    assert done.code == 0, done.err
    rows = rows_of(out)
    assert [row["path"] for row in rows] == paths
    assert np.allclose(scores_of(rows), np.tile(scores_of(rows)[:8], 20), rtol=1e-5)


def test_rows_of_another_detector_are_not_continued(detectors, here, script):
    patch, whole = half_above(detectors / "patch/brick.pt", here), detectors / "whole/brick.pt"
    out, words = here / "rows.csv", ["photos", "--output", "rows.csv"]
    assert script("predict", patch, "photos/b.png", "photos/d.png", *words[1:]).code == 0
    before = out.read_bytes()
    another = "rows.csv: is another detector's (photos/b.png has the score"
    one_line(script("predict", whole, *words), another, "--overwrite")
    one_line(script("predict", patch, *words, "--format", "jsonl"), "rows.csv: holds something else", "--overwrite")
    assert out.read_bytes() == before
    one_line(
        script("predict", patch, *words, "--false_alarm_rate", 1), "rows.csv: was decided at another rate than 1 ("
    )
    assert out.read_bytes() == before
    shutil.copy("photos/a.jpg", "photos/b.png")  # replaced since; the other tells that it is the same detector
    assert script("predict", patch, *words).code == 0
    assert [row["path"] for row in rows_of(out)[:3]] == ["photos/d.png", "photos/a.jpg", "photos/b.png"]
    assert len(rows_of(out)) == 6
    assert script("predict", whole, *words, "--overwrite").code == 0
    assert np.allclose(scores_of(rows_of(out)), load(whole).predict(list_paths(["photos"])).scores, rtol=1e-5)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_what_was_mended_or_has_changed_is_scored_again(detectors, here, script, kind):
    """Each image has one row at any time; the others keep theirs, byte by byte."""
    good, out = (here / "photos/b.png").read_bytes(), here / "rows"
    words = ["predict", detectors / "patch/brick.pt", "photos", "--output", out, "--format", kind]
    (here / "photos/b.png").write_bytes(good[:100])
    assert script(*words).code == 1
    before = out.read_bytes().splitlines()
    again = script(*words)  # still broken
    assert again.code == 1
    assert again.err.splitlines()[-1].startswith("6 images, ")
    assert "; 1 could not be scored" in again.err
    (here / "photos/b.png").write_bytes(good)
    os.utime(here / "photos/d.png", (1e9, 1e9))  # older than its row, but another file
    done = script(*words)
    assert done.code == 0, done.err
    after = out.read_bytes().splitlines()
    assert len(after) == len(before)
    changed = [line for line in before if b"photos/b.png" in line or b"photos/d.png" in line]
    assert [line for line in before if line not in changed] == after[:-2]
    told = out.read_bytes()
    assert script(*words).code == 0
    assert out.read_bytes() == told
    (here / "photos/d.png").unlink()  # gone: its row stays
    assert script(*words).code == 0
    assert out.read_bytes() == told


def test_rows_of_an_earlier_version_are_continued_in_their_columns(detectors, here, script):
    out, words = here / "rows.csv", ["predict", detectors / "patch/brick.pt", "photos", "--output", "rows.csv"]
    assert script(*words).code == 0
    whole = pandas.read_csv(out)
    whole.iloc[:3, :9].to_csv(out, index=False)
    assert script(*words).code == 0
    assert list(rows_of(out)[0]) == list(COLUMNS[:9])
    assert np.allclose(scores_of(rows_of(out)), whole.score, rtol=1e-5)


def test_a_path_that_does_not_exist_stops_at_once(detectors, here, script):
    done = script("predict", detectors / "whole/brick.pt", "photos", "photos/bb.png", "--output", "rows.csv")
    one_line(done, "photos/bb.png: no such file or folder")
    assert not (here / "rows.csv").exists()


def test_rows_and_reports_replace_no_other_file(detectors, here, script):
    """Neither what is read, by any path, nor what lies about, also where all else would allow it."""
    for name in ("brick.pt", "brick.normals", "notes.html", "spare.pt"):
        shutil.copy(detectors / "whole/brick.pt", name)
    (here / "manifest.jsonl").write_text('{"path": "photos/b.png", "label": 1}\n')
    (here / "photos/empty.png").touch()
    for link, target in (("link.png", "photos/b.png"), ("link.csv", "spare.pt"), ("folder", "photos")):
        (here / link).symlink_to(here / target)
    before = contents(here)
    words = ["predict", "brick.pt", "photos"]
    for name in ("photos/b.png", "link.png", "folder/empty.png", "./brick.pt", "brick.normals"):
        one_line(script(*words, "--overwrite", "--output", name), "is read, and cannot be written to")
    for name in ("spare.pt", "link.csv", "manifest.jsonl"):
        one_line(script(*words, "--overwrite", "--output", name), f"{name}: holds something else than rows of this")
    one_line(script(*words, "--report", "notes.html"), "notes.html: is there already")
    one_line(script(*words, "--output", "a.html", "--report", "./a.html"), "both --output and --report")
    assert contents(here) == before


def test_a_signal_ends_with_whole_rows(detectors, here, script, monkeypatch):
    """Write the rows of what was being scored before the script ends."""
    add = RowsFile.add

    def interrupted(self, rows):
        signal.getsignal(signal.SIGTERM)(signal.SIGTERM, None)  # the handler itself: what a signal would do to pytest
        add(self, rows)

    monkeypatch.setattr(RowsFile, "add", interrupted)
    words = ["predict", detectors / "patch/brick.pt", "photos", "--output", here / "out.csv"]
    assert script(*words).code == 143
    assert len(rows_of(here / "out.csv")) == 4  # of six, so many at once
    monkeypatch.setattr(RowsFile, "add", add)
    assert script(*words).code == 0
    assert len(rows_of(here / "out.csv")) == 6


# Drawings and the report ------------------------------------------------------------------------------------------


def test_heatmaps_and_masks_are_drawn(detectors, here, script):
    path = half_above(detectors / "patch/brick.pt", here)
    words = ["predict", path, "photos", "--heatmaps", "photos/heat", "--masks", "masks"]
    rows = rows_on_stdout(script(*words))
    assert len(rows_on_stdout(script(*words))) == len(rows) == 6  # drawings within the folder are no images of it
    threshold, marked = load(path).threshold.item(), 0
    maps = load(path).predict([row["path"] for row in rows]).maps
    for row, heat in zip(rows, maps):
        name, suffix = os.path.splitext(row["path"].removeprefix("photos/"))
        size = read_size(row["path"])
        mask = Image.open(here / f"masks/{name}.png")
        assert (mask.mode, mask.size) == ("L", size[::-1])
        large = torch.nn.functional.interpolate(torch.from_numpy(heat)[None, None], size, mode="bilinear")[0, 0]
        assert (np.array(mask) == 255 * (large > threshold).numpy()).mean() > 0.999
        marked += bool(np.array(mask).any())
        with Image.open(here / f"photos/heat/{name}{'.jpg' if suffix == '.jpg' else '.png'}") as drawn:
            assert drawn.size == size[::-1]
    assert 0 < marked < 6
    assert len(contents(here / "masks")) == len(contents(here / "photos/heat")) == 6


def folds_that_disagree(data, folder):
    """A patch model of three networks, decisions by p-values of which differ from those by its threshold."""
    patches = PatchConfig(patch_size=32, window=8, stride=4, sigma=2.0)
    small = {"height": 32, "width": 48, "pretrained": False, "backbone": "mobilenet_v2", "false_alarm_rate": 0.5}
    config = Config("brick", **small, level=(1,), folds=3, patches=patches)
    networks = [initial_network(config, member=number) for number in range(3)]
    detector = Detector(config, networks).fit(load_train(data, "brick", (32, 48), 0).images)
    scores = torch.from_numpy(detector.predict(list_paths(["photos"])).scores).sort().values
    return detector, scores, folder / "brick.pt"


@pytest.mark.parametrize("threshold", ["low", "high"])
def test_what_is_decided_is_what_is_drawn(data, here, script, threshold):
    """Box, mask, outline and decision agree where p-values and the threshold of the mean score do not."""
    detector, scores, path = folds_that_disagree(data, here)
    decisions = detector.predict(list_paths(["photos"])).anomalous
    assert 0 < decisions.sum() < 6
    detector.threshold = scores[0] - 0.01 if threshold == "low" else scores[-1] + 0.01
    save(detector, path)
    flags = ["--masks", "masks", "--heatmaps", "heat", "--explain", "why"]
    save_normals(detector, load_train(data, "brick", (32, 48), 0), normals_path(path))
    for name in ("a.jpg", "b.png", "c.TIF", "d.png", "more/a.png", "more/e.bmp"):  # no color near the outline's
        Image.open(here / "photos" / name).convert("L").convert("RGB").save(here / "photos" / name)
    rows = rows_on_stdout(script("predict", path, "photos", *flags))
    called = {row["path"] for row in rows if row["anomalous"] == "1"}
    assert 0 < len(called) < 6
    for row in rows:
        name = os.path.splitext(row["path"].removeprefix("photos/"))[0]
        assert bool(row["x"]) == (row["path"] in called)
        assert np.array(Image.open(here / f"masks/{name}.png")).any() == (row["path"] in called)
        assert (here / f"why/{name}.png").exists() == (row["path"] in called)
        if (heat := here / f"heat/{name}.png").exists():
            outlined = (np.array(Image.open(heat).convert("RGB")) == overlays.OUTLINE).all(2).any()
            assert outlined == (row["path"] in called)


@pytest.mark.parametrize("kind", ["patch", "whole"])
def test_drawings_and_report_of_rows_that_are_there_already(detectors, here, script, kind):
    """Why? comes after the first scoring: they are made then, and rows stay as they are."""
    words = ["predict", detectors / kind / "brick.pt", "photos", "--output", "rows.csv", "--false_alarm_rate", 0.9]
    assert script(*words).code == 0
    before = (here / "rows.csv").read_bytes()
    anomalous = sum(row["anomalous"] == "1" for row in rows_of(here / "rows.csv"))
    assert anomalous
    done = script(*words, "--heatmaps", "heat", "--explain", "why", "--report", "look.html")
    assert done.code == 0, done.err
    assert "6 images that have a row are looked at again, to be shown" in done.err
    assert (here / "rows.csv").read_bytes() == before
    assert len(contents(here / "heat")) == 6
    assert len(contents(here / "why")) == anomalous
    assert (here / "look.html").read_text().count('class="tile"') == 6
    drawn = contents(here / "heat")
    (here / "heat/b.png").unlink()
    done = script(*words, "--heatmaps", "heat", "--explain", "why")  # only what is missing
    assert "1 images that have a row are looked at again" in done.err
    assert contents(here / "heat") == drawn


def test_image_level_models_draw_where_the_score_comes_from(detectors, here, script):
    path = detectors / "whole/brick.pt"
    plain = rows_on_stdout(script("predict", path, "photos"))
    drawn = rows_on_stdout(script("predict", path, "photos", "--heatmaps", "heat"))
    assert np.allclose(scores_of(plain), scores_of(drawn), rtol=1e-5)
    pairs = [
        [np.array(Image.open(here / folder / name)) for folder in ("photos", "heat")] for name in ("b.png", "d.png")
    ]
    assert all(photograph.shape == picture.shape for photograph, picture in pairs)
    assert any((photograph != picture).any() for photograph, picture in pairs)
    one_line(script("predict", path, "photos", "--masks", "masks"), "--masks", "is no patch model")


def test_a_report_of_new_images(detectors, here, script, monkeypatch):
    """The highest scores first, those of images that have a row already too."""
    path = half_above(detectors / "patch/brick.pt", here)
    shutil.copy("photos/b.png", "photos/<b>&'.png")
    words = ["predict", path, "photos", "--output", "rows.csv", "--report", "look.html"]

    def shown():
        """The names on the page in their order; all have heat maps."""
        return [html.unescape(x) for x in re.findall('"heat map of ([^"]*)"', (here / "look.html").read_text())]

    assert script(*words).code == 0
    scores = {row["path"]: float(row["score"]) for row in rows_of(here / "rows.csv")}
    names = shown()
    assert {*names} == {*scores}
    assert [scores[name] for name in names] == sorted(scores.values(), reverse=True)
    (here / "look.html").unlink()
    assert script(*words).code == 0
    assert shown() == names
    monkeypatch.setattr(gallery, "MAX_TILES", 4)
    assert script(*words, "--overwrite").code == 0  # the report has the mark of this program, and is replaced
    assert [scores[name] for name in shown()] == sorted(scores.values(), reverse=True)[:4]
    assert "The 4 images with the highest scores, of 7" in (here / "look.html").read_text()
    (here / "photos/d.png").write_text("broken")
    assert script(*words).code == 1
    page = html.unescape((here / "look.html").read_text())
    assert "1 file could not be scored" in page
    assert re.search(r"photos/d.png</span>: not a readable image", page)
    assert "About this report" in page
    for fact in (
        "python predict.py",
        f"torch {torch.__version__}",
        f"{path}",
        "backbone mobilenet_v2",
        "patch_size 32",
    ):
        assert fact in page
    assert load(path).guarantee.advice() in page


def test_panels_and_reports_show_the_photographs_own_pixels(detectors, here, script):
    """Stripes of four pixels, which no image of the detector's size could hold, in the enlarged region."""
    shutil.rmtree(here / "photos")
    (here / "photos").mkdir()
    pixels = np.full((320, 480, 3), 100, np.uint8)
    pixels[np.arange(320) // 4 % 2 == 0] = 150
    Image.fromarray(pixels).save(here / "photos/striped.png")
    path = detectors / "patch/brick.pt"
    words = ["predict", path, "photos", "--false_alarm_rate", 1, "--explain", "why", "--report", "look.html"]
    assert script(*words).code == 0
    panel = np.array(Image.open(here / "why/striped.png").convert("RGB")).astype(int)
    striped = np.abs(np.diff(panel[:, :, 0], axis=0)) > 15  # rows that differ from the next
    assert striped.mean() > 0.01
    (region,) = re.findall(r'data-region="data:image/jpeg;base64,([^"]+)"', (here / "look.html").read_text())
    image = np.array(Image.open(io.BytesIO(base64.b64decode(region))).convert("RGB")).astype(int)
    assert image.shape[1] >= 480 / 4
    assert (np.abs(np.diff(image[:, :, 0], axis=0)) > 15).sum(0).mean() > 0.2 * len(image)


# Errors -----------------------------------------------------------------------------------------------------------


def test_mistakes_get_one_line_and_change_nothing(detectors, here, script):
    path = detectors / "whole/brick.pt"
    for folder in ("empty", "damaged", "kde"):
        (here / folder).mkdir()
    (here / "kept.csv").write_text("mine")
    (here / "damaged/brick.pt").write_bytes(path.read_bytes()[:5000])
    save(Detector(replace(load(path).config, density="kde")), here / "kde/brick.pt")
    before = contents(here)
    for words, told in (
        ([path, "empty"], ["empty: no image found"]),
        ([path, "photos", "--size", 64], ["--size: 64x64", "48x32"]),
        (["none.pt", "photos"], ["none.pt: no such file"]),
        (["damaged/brick.pt", "photos"], ["brick.pt: truncated, damaged"]),
        ([path, "photos/b.png", "--watch"], ["--watch looks at folders only"]),
        ([path, "photos", "--heatmaps", "photos"], ["photos/a.jpg: photos/a.jpg would be drawn of it"]),
        ([path, "photos", "--heatmaps", "a", "--explain", "a"], ["a folder of its own"]),
        (["kde/brick.pt", "photos", "--heatmaps", "heat"], ["--heatmaps", "kde"]),
        (["--model_dir", "none", "photos"], ["none: no such folder"]),
        (["--model_dir", detectors / "patch", "photos"], ["photos: no sub-folder"]),
        ([path, "photos", "--output", "empty"], ["empty: Is a directory"]),
        ([path, "photos", "--output", "kept.csv/x.csv"], ["kept.csv"]),
        ([path, "photos", "--heatmaps", "kept.csv"], ["kept.csv"]),
        *([([path, "photos", "--cuda", 1], ["--cuda 1"])] * (not torch.cuda.is_available())),
        *(
            [([path, "photos", "--output", "/dev/full"], ["/dev/full: cannot be written"])]
            * os.path.exists("/dev/full")
        ),
    ):
        output = [] if "--output" in words else ["--output", "new.csv", "--overwrite"]
        one_line(script("predict", *words, *output), *told)
    assert contents(here) == before
    assert script("predict", path, "photos/b.png", "--size", "48x32").code == 0


# Watching ---------------------------------------------------------------------------------------------------------


def interrupt():
    """Do what a Ctrl-C does to a script in this process: call its handler, for a signal would be for pytest as well."""
    signal.getsignal(signal.SIGINT)(signal.SIGINT, None)


@pytest.fixture
def aside():
    """Does something beside the script, in a thread; what fails there fails the test."""
    errors, threads = [], []

    def start(function):
        def work():
            try:
                function()
            except BaseException as error:
                errors.append(error)
                interrupt()  # the script that the test waits for

        threads.append(threading.Thread(target=work))
        threads[-1].start()

    yield start
    for thread in threads:
        thread.join()
    assert not errors, errors


def test_new_files_are_scored_once_they_are_written(detectors, here, data, script, aside):
    """Until the folder goes away."""
    out, content, heat = here / "out.csv", find_images(data / "brick/train/good")[0].read_bytes(), {}

    def camera():
        wait_for(lambda: lines_in(out) == 7)
        with (here / "photos/slow.png").open("wb") as file:
            file.write(content[: len(content) // 2])
            file.flush()
            time.sleep(0.7)
            assert lines_in(out) == 7
            file.write(content[len(content) // 2 :])
        wait_for(lambda: lines_in(out) == 8)
        (here / "new").mkdir()
        (here / "new/in.png").write_bytes(content)
        (here / "new").rename(here / "photos/new")  # a folder that comes as a whole
        (here / "photos/notes.txt").write_text("no image")
        wait_for(lambda: lines_in(out) == 9)
        time.sleep(1.5)
        heat.update(contents(here / "photos/heat"))
        shutil.rmtree(here / "photos")

    aside(camera)
    words = ["photos", "--watch", "--output", out, "--heatmaps", "photos/heat"]
    done = script("predict", detectors / "patch/brick.pt", *words)
    one_line(done, "photos: the folder that is watched has gone")
    rows = rows_of(out)
    assert [row["path"] for row in rows[6:]] == ["photos/slow.png", "photos/new/in.png"]
    assert not any(row["error"] for row in rows)
    assert here / "photos/heat/new/in.png" in heat


def test_a_watch_tells_renews_the_report_and_copies_what_needs_a_second_look(
    detectors, here, script, aside, monkeypatch
):
    import predict

    monkeypatch.setattr(predict, "REPORT_SECONDS", 0.5)
    out, page, copies = here / "out.csv", here / "look.html", here / "photos/second"
    (here / "photos/more/a.png").write_text("broken")
    shown = lambda: page.read_text().count('class="tile"') if page.exists() else 0  # noqa: E731

    def camera():
        wait_for(lambda: lines_in(out) == 7)
        shutil.copy("photos/b.png", "photos/new.png")
        wait_for(lambda: shown() == 6)  # while it watches
        shutil.copy("photos/d.png", "photos/b.png")  # another photograph under the same name
        wait_for(lambda: (copies / "b.2.png").exists())
        shutil.copy("photos/d.png", "photos/more/a.png")  # mended
        wait_for(lambda: (copies / "more/a.2.png").exists())
        interrupt()

    aside(camera)
    words = ["photos", "--watch", "--output", out, "--report", page, "--copy_anomalous", copies]
    done = script("predict", detectors / "patch/brick.pt", *words, "--false_alarm_rate", 1)
    assert done.code == 0, done.err
    assert done.err.splitlines()[-1] == "7 images, 7 anomalous"
    rows = {row["path"]: row for row in rows_of(out)}
    assert len(rows) == len(rows_of(out)) == 7
    for path, row in rows.items():
        assert abs(datetime.fromisoformat(row["time"]) - datetime.now().astimezone()) < timedelta(minutes=5)
        assert f"{row['time']} {path}: anomalous, p {float(row['p_value']):.2g}" in done.err
    assert re.search(r"\+\d\d:\d\d photos/more/a.png: not a readable image", done.err)
    names = {str(path.relative_to(copies)) for path in contents(copies)}
    numbered = {"b.2.png", "more/a.2.png"}
    assert names == {"a.jpg", "b.png", "c.TIF", "d.png", "new.png", "more/a.png", "more/e.bmp"} | numbered
    assert (copies / "b.2.png").read_bytes() == (here / "photos/d.png").read_bytes()
    assert shown() == 7


def test_copies_are_made_of_rows_that_are_there(detectors, here, script):
    words = ["predict", detectors / "patch/brick.pt", "photos", "--output", "rows.csv", "--false_alarm_rate", 0.9]
    assert script(*words).code == 0
    called = {row["path"].removeprefix("photos/") for row in rows_of(here / "rows.csv") if row["anomalous"] == "1"}
    assert called
    for _ in range(2):
        assert script(*words, "--copy_anomalous", "second").code == 0
        assert {str(path.relative_to(here / "second")) for path in contents(here / "second")} == called


def test_a_watch_that_is_killed_is_continued(detectors, here, data):
    """Nothing is lost and nothing twice, whatever came before, while and after it was dead."""
    out, source = here / "out.csv", find_images(data / "brick/train/good")[0]
    words = [ROOT / "predict.py", detectors / "whole/brick.pt", "photos", "--watch", "--output", out]
    process = Forked(*words)
    try:
        wait_for(lambda: lines_in(out) > 6)
        for number in range(20):
            shutil.copy(source, here / f"photos/while{number:03}.png")
            time.sleep(0.1)
        wait_for(lambda: lines_in(out) > 7)
    finally:
        process.kill()
        process.wait()
    shutil.copy(source, here / "photos/after.png")
    process = Forked(*words)
    try:
        wait_for(lambda: lines_in(out) > 6 + 21)
        process.send_signal(signal.SIGINT)
        told = process.communicate(30)[1]
        assert process.returncode == 0
        assert told.splitlines()[-1].startswith("27 images, ")
        assert "Traceback" not in told
    finally:
        process.kill()
    paths = [row["path"] for row in rows_of(out)]
    assert sorted(paths) == sorted(list_paths(["photos"]))
    assert len(paths) == 6 + 21
