"""predict.py: rows of any images, whatever is wrong with some of them, in files that outlive a kill."""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from dataclasses import replace

import numpy as np
import pandas
import pytest
import torch
from conftest import ROOT, one_line
from PIL import Image

import predict
from config import Config, PatchConfig
from conformal import FalseAlarmGuarantee
from dataset import load_train
from detector import Detector, initial_network, load, save
from prediction.inputs import list_paths as listed
from prediction.inputs import walk
from prediction.outputs import COLUMNS, RowsFile
from prediction.outputs import name_below as relative
from reporting import gallery as report
from reporting import overlays
from runtime.files import InputError
from runtime.image_files import find_images, read_size

SIZE = (32, 48)


@pytest.fixture(scope="module")
def detectors(data, tmp_path_factory):
    """Folders "whole" and "patch" of detectors of brick and grass, with networks as they begin; read only."""
    folder = tmp_path_factory.mktemp("detectors")
    patches = PatchConfig(patch_size=32, window=8, stride=4, sigma=2.0)
    for kind, name, part in (("whole", "brick", None), ("patch", "brick", patches), ("patch", "grass", patches)):
        config = Config(name, height=32, width=48, pretrained=False, false_alarm_rate=0.2, patches=part)
        made = Detector(config, [initial_network(config)]).fit(load_train(data, name, SIZE, 0).images)
        save(made, folder / kind / f"{name}.pt")
    return folder


@pytest.fixture
def here(data, tmp_path, monkeypatch):
    """The working folder: photos/ of three sizes and kinds, two of them in a sub-folder."""
    monkeypatch.chdir(tmp_path)
    sources = [path for kind in ("good", "hole", "scratch") for path in find_images(data / "brick/test" / kind)]
    (tmp_path / "photos/more").mkdir(parents=True)
    sizes = ((48, 32), (200, 100), (31, 77))
    names = ["b.png", "a.jpg", "c.TIF", "d.png", "more/a.png", "more/e.bmp"]
    for number, (name, source) in enumerate(zip(names, sources[::-1])):
        Image.open(source).convert("RGB").resize(sizes[number % 3]).save(tmp_path / "photos" / name)
    return tmp_path


def table(done, code=0):
    """The rows on stdout."""
    assert done.code == code, done.err
    return list(csv.DictReader(io.StringIO(done.out, newline="")))


def rows_in(path):
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def half_above(path, folder):
    """A copy of a detector whose threshold half of the images in photos/ exceed."""
    made = load(path)
    made.threshold = torch.from_numpy(made.predict(listed(["photos"])).scores).median()
    save(made, folder / "brick.pt")
    return folder / "brick.pt"


def slow_region(heat, threshold):
    """Top, left, bottom, right of the region around the maximum, by flooding."""
    start = tuple(int(i) for i in np.unravel_index(heat.argmax(), heat.shape))
    if not heat[start] > threshold:
        return None
    found, waiting = {start}, [start]
    while waiting:
        y, x = waiting.pop()
        for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            inside = 0 <= near[0] < heat.shape[0] and 0 <= near[1] < heat.shape[1]
            if inside and near not in found and heat[near] > threshold:
                found.add(near)
                waiting.append(near)
    ys, xs = zip(*found)
    return min(ys), min(xs), max(ys) + 1, max(xs) + 1


# Rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["whole", "patch"])
def test_rows_say_what_the_detector_says(detectors, here, script, kind):
    path = half_above(detectors / kind / "brick.pt", here)
    done = script("predict", path, "photos")
    rows = table(done)
    paths = [f"photos/{name}" for name in ("a.jpg", "b.png", "c.TIF", "d.png", "more/a.png", "more/e.bmp")]
    assert [row["path"] for row in rows] == paths
    assert tuple(rows[0]) == COLUMNS
    detector = load(path)
    expected = detector.predict(paths)
    assert np.allclose([float(row["score"]) for row in rows], expected.scores, rtol=1e-5)
    assert [float(row["p_value"]) for row in rows] == expected.p_values.tolist()
    assert [int(row["anomalous"]) for row in rows] == expected.anomalous.astype(int).tolist()
    assert not any(row["error"] for row in rows)
    assert done.err.count(detector.guarantee.words()) == 1
    if kind == "whole":
        assert {row[name] for row in rows for name in ("x", "y", "width", "height")} == {""}
        return
    boxes = [slow_region(heat, detector.threshold.item()) for heat in expected.maps]
    assert None in boxes
    assert boxes != [None] * len(boxes)
    for row, box in zip(rows, boxes):
        if box is None:
            assert (row["x"], row["height"]) == ("", "")
            continue
        height, width = read_size(row["path"])
        left, top = int(row["x"]), int(row["y"])
        right, bottom = left + int(row["width"]), top + int(row["height"])
        assert (left, top) == (box[1] * width // 48, box[0] * height // 32)
        assert (right, bottom) == (np.ceil(box[3] * width / 48), np.ceil(box[2] * height / 32))


def test_rows_say_what_the_evaluation_says(detectors, data, here, script):
    where = ["--data_dir", data, "--model_dir", detectors / "patch", "--type", "brick", "--save_plots", 0]
    done = script("eval", *where, "--eval_dir", here / "Eval")
    assert done.code == 0, done.err
    evaluated = pandas.read_csv(here / "Eval/patch/scores.csv")
    rows = table(script("predict", detectors / "patch/brick.pt", *(data / path for path in evaluated.path)))
    assert np.allclose([float(row["score"]) for row in rows], evaluated.score, rtol=1e-5)
    assert np.allclose([float(row["p_value"]) for row in rows], evaluated.p_value)


def test_the_region_of_a_planted_maximum():
    generator = np.random.default_rng(0)
    for _ in range(50):
        heat = generator.random((13, 9)).astype(np.float32)
        heat[generator.integers(13), generator.integers(9)] = 2
        top, left, bottom, right = slow_region(heat, 0.6)
        assert overlays.region(heat, 0.6, (13, 9)) == (left, top, right - left, bottom - top)
        assert overlays.region(heat, 0.6, (26, 90)) == (10 * left, 2 * top, 10 * (right - left), 2 * (bottom - top))
    assert overlays.region(heat, 2.0, (13, 9)) is None  # above, not at
    assert overlays.region(heat, 0.6, (1, 1)) == (0, 0, 1, 1)


def test_json_lines(detectors, here, script):
    found = script("predict", detectors / "patch/brick.pt", "photos", "nothing.png", "--format", "jsonl")
    assert found.code == 1
    rows = [json.loads(line) for line in found.out.splitlines()]
    plain = table(script("predict", detectors / "patch/brick.pt", "photos", "nothing.png"), 1)
    for row, other in zip(rows, plain, strict=True):
        assert {name: "" if value is None else str(value) for name, value in row.items()} == other
    assert rows[-1]["score"] is None
    assert rows[0]["anomalous"] in (0, 1)


def test_the_rate_in_use(detectors, here, script):
    found = script("predict", detectors / "whole/brick.pt", "photos", "--false_alarm_rate", 0.6)
    guarantee = load(detectors / "whole/brick.pt").guarantee
    assert isinstance(guarantee, FalseAlarmGuarantee)
    changed = replace(guarantee, asked=0.6)
    assert changed.words() in found.err
    for row in table(found):
        assert int(row["anomalous"]) == (float(row["p_value"]) <= changed.rate)


def test_exit_codes(detectors, here, script):
    path = detectors / "whole/brick.pt"
    alarm = ["--false_alarm_rate", 1, "--fail_on_anomaly", 1]  # every image
    assert script("predict", path, "photos", "--false_alarm_rate", 1).code == 0
    assert script("predict", path, "photos", *alarm).code == 3
    assert script("predict", path, "photos", "none.png", *alarm).code == 1
    assert script("predict", path).code == 2
    assert script("predict", path, "photos", "--format", "xml").code == 2
    assert script("predict", "--model_dir", "a", "photos", "more").code == 2


def test_broken_files_do_not_stop_the_others(detectors, here, script, data):
    """30 files, six of them broken in six ways; the list of names comes from stdin."""
    folder, sources = here / "many", find_images(data / "brick/train/good")
    folder.mkdir()
    for number in range(30):
        shutil.copy(sources[number % len(sources)], folder / f"{number:02}.png")
    whole = (folder / "03.png").read_bytes()
    (folder / "03.png").write_bytes(whole[: len(whole) // 2])
    (folder / "07.png").write_bytes(b"")
    (folder / "11.png").write_text("no picture\n")
    (folder / "15.png").unlink()
    (folder / "15.png").mkdir()
    (folder / "15.png/in.txt").touch()
    (folder / "19.png").unlink()  # missing
    claim = bytearray(whole)
    claim[16:24] = (1_000_000).to_bytes(4, "big") * 2
    claim[29:33] = zlib.crc32(claim[12:29]).to_bytes(4, "big")
    (folder / "23.png").write_bytes(claim)
    names = [f"many/{number:02}.png" for number in range(30)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\r\n".join(names).encode() + b"\n\n")))
        done = script("predict", detectors / "whole/brick.pt", "-")
    rows = table(done, 1)
    assert [row["path"] for row in rows] == names
    bad = {int(row["path"][5:7]): row for row in rows if row["error"]}
    assert set(bad) == {3, 7, 11, 15, 19, 23}
    for row in bad.values():
        assert "".join(row[name] for name in COLUMNS[1:-1]) == ""
        assert len(row["error"].splitlines()) == 1
    assert "truncated" in bad[3]["error"]
    assert "not a readable image" in bad[7]["error"]
    assert "folder" in bad[15]["error"]
    assert bad[19]["error"] == "No such file or directory"
    assert bad[23]["error"].startswith("claims 1000000x1000000 pixels")
    assert done.err.splitlines()[-1].endswith("6 could not be scored, see their error")
    good = [row["path"] for row in rows if not row["error"]]
    expected = load(detectors / "whole/brick.pt").predict(good).scores
    assert np.allclose([float(row["score"]) for row in rows if not row["error"]], expected, rtol=1e-5)


def test_what_may_not_be_read_has_a_row(detectors, here, script, monkeypatch):
    real = os.scandir
    refused = PermissionError(13, "Permission denied")

    def scandir(path):
        if str(path).endswith("more"):
            raise refused
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    rows = table(script("predict", detectors / "whole/brick.pt", "photos"), 1)
    assert (rows[-1]["path"], rows[-1]["error"]) == ("photos/more", "no file, or a folder that cannot be listed")


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
        found = rows_in(out) if kind == "csv" else [json.loads(line) for line in out.read_text().splitlines()]
        assert sorted(row["path"] for row in found) == sorted(f"./{n}" if n[0] in "=-@" else n for n in names)
        assert [row["path"] for row in found if row["error"]] == ["./=1+1.png"]
        assert not any(row["error"].startswith(("=", "./")) for row in found if row["error"])


def test_folders_are_walked_once(here):
    (here / "photos/more/back").symlink_to(here / "photos")
    (here / "photos/.hidden").mkdir()
    shutil.copy(here / "photos/b.png", here / "photos/.hidden/b.png")
    shutil.copy(here / "photos/b.png", here / "photos/._b.png")
    assert len(list(walk("photos"))) == 6
    (here / "photos/more/back").unlink()
    assert listed(["photos/b.png", "photos", "photos/more"])[0] == "photos/b.png"
    assert len(listed(["photos/b.png", "photos", "photos/more"])) == 6
    assert len(listed(["photos"], ["photos/more"])) == 4
    assert relative("photos/more/a.png", ["photos"]) == "more/a.png"
    assert relative("../photos/a.png", []) == "photos/a.png"
    assert relative(str(here / "x.png"), []) == str(here / "x.png")[1:]


# Files of rows ----------------------------------------------------------------------------------------------------


def test_a_killed_run_is_continued(detectors, here, data, script):
    """Nothing is lost and nothing twice."""
    folder, sources, out = here / "many", find_images(data / "brick/train/good"), here / "killed.csv"
    folder.mkdir()
    for number in range(160):
        shutil.copy(sources[number % len(sources)], folder / f"{number:03}.png")
    words = [detectors / "patch/brick.pt", "many", "--output", out]
    process = subprocess.Popen([sys.executable, ROOT / "predict.py", *words], stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: seen(out) > 20)
    finally:
        process.kill()
        process.wait()
    assert 20 < seen(out) < 160, "killed too late to tell"
    with out.open("ab") as file:
        file.write(b'many/160.png,0.1,"')
    done = script("predict", *words)
    assert done.code == 0, done.err
    rows = rows_in(out)
    assert [row["path"] for row in rows] == [f"many/{number:03}.png" for number in range(160)]
    scores = np.array([float(row["score"]) for row in rows])
    assert np.allclose(scores, scores[: len(sources)][np.arange(160) % len(sources)], rtol=1e-5)


def test_rows_of_another_detector_are_not_continued(detectors, here, script):
    words = ["photos", "--output", "rows.csv"]
    first = half_above(detectors / "patch/brick.pt", here)
    assert script("predict", first, "photos/b.png", "photos/d.png", *words[1:]).code == 0
    content = (here / "rows.csv").read_bytes()
    done = script("predict", detectors / "whole/brick.pt", *words)
    one_line(done, "rows.csv: is another detector's (photos/b.png has the score", "--overwrite")
    assert (here / "rows.csv").read_bytes() == content
    shutil.copy("photos/a.jpg", "photos/b.png")  # replaced since; the other tells that it is the same detector
    assert script("predict", first, *words).code == 0
    assert len(rows_in("rows.csv")) == 6
    assert script("predict", detectors / "whole/brick.pt", *words, "--overwrite").code == 0


def test_two_runs_do_not_write_to_one_file(tmp_path):
    pytest.importorskip("fcntl")
    path = str(tmp_path / "rows.csv")
    row = dict.fromkeys(COLUMNS, 0.25) | {"error": None}
    with RowsFile(path, "csv", COLUMNS) as first:
        first.add([row | {"path": "a"}])
        for overwrite in (False, True):
            with (
                pytest.raises(InputError, match="another run is writing to it"),
                RowsFile(path, "csv", COLUMNS, overwrite),
            ):
                pass
        first.add([row | {"path": "b"}])
    with RowsFile(path, "csv", COLUMNS) as third:
        assert third.done == {"a": 0.25, "b": 0.25}


def test_a_thousand_files_of_which_twenty_are_broken(detectors, here, data, script):
    folder, sources = here / "many", find_images(data / "brick/train/good")
    folder.mkdir()
    for number in range(1000):
        os.link(shutil.copy(sources[number % 8], here / f"{number % 8}.png"), folder / f"{number:04}.png")
    png, gray = sources[0].read_bytes(), Image.open(sources[0]).convert("L")
    for kind in ("jpeg", "tiff", "bmp", "webp"):
        gray.save(here / f"x.{kind}")
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(here / "nan.tiff")
    bmp = (here / "x.bmp").read_bytes()
    contents = [b"", b"x", png[:8], png[:60], png[:-40], png[:41] + bytes(len(png) - 41), b"GIF89a" + bytes(90)]
    whole = [(here / f"x.{kind}").read_bytes() for kind in ("jpeg", "tiff", "bmp", "webp")]
    contents += [content[:size] for content in whole for size in (20, len(content) // 2)]
    contents += [bmp[:18] + b"\xff\xff\x0f\x00" * 2 + bmp[26:], (here / "nan.tiff").read_bytes(), b"\0" * 5000]
    broken = [f"many/{50 * number + 7:04}.png" for number in range(20)]
    for name, content in zip(broken, contents):
        os.unlink(name)
        (here / name).write_bytes(content)
    os.unlink(broken[18])
    os.mkfifo(broken[18])  # would be waited for
    os.unlink(broken[19])
    os.symlink("loop.png", "many/loop.png")
    os.link("many/loop.png", broken[19], follow_symlinks=False)
    os.unlink("many/loop.png")
    done = script("predict", detectors / "whole/brick.pt", *sorted(f"many/{n:04}.png" for n in range(1000)))
    rows = table(done, 1)
    assert len(contents) == 18
    assert [row["path"] for row in rows] == [f"many/{number:04}.png" for number in range(1000)]
    assert [row["path"] for row in rows if row["error"]] == broken
    assert {row["score"] for row in rows if row["error"]} == {""}
    scores = np.array([float(row["score"] or "nan") for row in rows]).reshape(-1, 8)
    assert np.allclose(np.nanmin(scores, 0), np.nanmax(scores, 0), rtol=1e-5)
    assert np.isfinite(scores).sum() == 980
    assert "20 could not be scored" in done.err


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def seen(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_half_a_row_is_cut_off(tmp_path, kind):
    """Wherever a run was killed, the next one makes the same file and counts all rows."""
    path = tmp_path / "rows"
    rows = [dict.fromkeys(COLUMNS, 0.25) | {"path": name, "error": None} for name in ("a", 'q",\n"', "é\r\n", "b")]
    rows[1] |= {"error": "bad"}
    rows[2] |= {"anomalous": 1}

    def write():
        with RowsFile(str(path), kind, COLUMNS) as file:
            file.add([row for row in rows if row["path"] not in file.done])
        assert file.counts == {"rows": 4, "anomalous": 1, "errors": 1}

    write()
    whole = path.read_bytes()
    assert strip(whole, kind) == [row["path"] for row in rows]
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        write()
        assert path.read_bytes() == whole, length


def strip(content, kind):
    """Paths of rows in order."""
    text = content.decode()
    if kind == "jsonl":
        return [json.loads(line)["path"] for line in text.splitlines()]
    return [row["path"] for row in csv.DictReader(io.StringIO(text, newline=""), strict=True)]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize(
    "content", ["a,b\n1,2\n", "path,score\n", "letter", '{"a": 1}\n', '"' * 99, '{"pass', "x\ny\n", "[1]\n", "\n"]
)
def test_another_file_is_not_touched(tmp_path, kind, content):
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(InputError, match=r"notes\.txt: holds something else"), RowsFile(str(path), kind, COLUMNS):
        pass
    overwriting = RowsFile(str(path), kind, COLUMNS, overwrite=True)
    with pytest.raises(InputError, match=r"notes\.txt: holds something else than rows of this program"), overwriting:
        pass
    assert path.read_text() == content


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("columns", [COLUMNS, ("category", *COLUMNS)])
def test_rows_of_any_kind_are_overwritten_wherever_they_end(tmp_path, kind, columns):
    path, other = tmp_path / "rows", {"csv": "jsonl", "jsonl": "csv"}[kind]
    with RowsFile(str(path), kind, columns) as rows:
        rows.add([dict.fromkeys(columns, "x") | {"path": "é.png", "score": 0.5}])
    whole = path.read_bytes()
    for length in range(1, len(whole) + 1):
        path.write_bytes(whole[:length])
        with RowsFile(str(path), other, COLUMNS, overwrite=True) as rows:
            rows.add([dict.fromkeys(COLUMNS) | {"path": "a.png"}])
        assert strip(path.read_bytes(), other) == ["a.png"]


def test_only_overwrite_starts_anew(detectors, here, script):
    words = ["predict", detectors / "whole/brick.pt", "photos/b.png", "--output", "rows.txt"]
    assert script(*words, "--format", "jsonl").code == 0
    content = (here / "rows.txt").read_bytes()
    one_line(script(*words), "rows.txt: holds something else", "--overwrite")
    assert (here / "rows.txt").read_bytes() == content
    assert script(*words, "--overwrite").code == 0
    words[2] = "photos"
    assert script(*words).code == 0
    assert strip((here / "rows.txt").read_bytes(), "csv")[:2] == ["photos/b.png", "photos/a.jpg"]


def test_rows_and_reports_replace_no_other_file(detectors, here, script):
    """Neither what is read, by any path, nor what lies about, also where all else would allow it."""
    shutil.copy(detectors / "whole/brick.pt", "brick.pt")
    for name in ("brick.normals", "notes.html", "spare.pt"):
        shutil.copy("brick.pt", name)
    (here / "manifest.jsonl").write_text('{"path": "photos/b.png", "label": 1}\n')
    (here / "photos/empty.png").touch()
    for link, target in (("link.png", "photos/b.png"), ("link.csv", "spare.pt"), ("folder", "photos")):
        (here / link).symlink_to(here / target)
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    words = ["predict", "brick.pt", "photos", "--overwrite", "--output"]
    for name in ("photos/b.png", "link.png", "folder/empty.png", "./brick.pt", "brick.normals"):
        one_line(script(*words, name), "is read, and cannot be written to")
    for name in ("spare.pt", "link.csv", "manifest.jsonl"):
        one_line(script(*words, name), f"{name}: holds something else than rows of this program")
    one_line(script(*words[:3], "--report", "notes.html"), "notes.html: is there already")
    one_line(script(*words[:3], "--output", "a.html", "--report", "./a.html"), "both --output and --report")
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before
    (here / "photos/empty.png").unlink()
    for _ in range(2):
        assert script(*words[:3], "--report", "look.html").code == 0


def test_a_row_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "rows.csv"
    row = dict.fromkeys(COLUMNS, 1) | {"path": "a.png", "error": None}
    with RowsFile(str(path), "csv", COLUMNS) as rows:
        rows.add([row])
        before = path.read_bytes()
        real = rows.file

        class Full:
            """Takes a few bytes, then none."""

            count = 0

            def write(self, content):
                self.count += 1
                if self.count > 1:
                    raise OSError(28, "No space left on device")
                return real.write(content[:4])

            def __getattr__(self, name):
                return getattr(real, name)

        rows.file = Full()
        with pytest.raises(OSError, match="cannot be written"):
            rows.add([row | {"path": "b.png"}])
        assert path.read_bytes() == before
        rows.file = real
        rows.add([row | {"path": "c.png"}])
    assert strip(path.read_bytes(), "csv") == ["a.png", "c.png"]


# Drawings ---------------------------------------------------------------------------------------------------------


def test_heatmaps_and_masks_are_drawn(detectors, here, script):
    path = half_above(detectors / "patch/brick.pt", here)
    words = ["predict", path, "photos", "--heatmaps", "photos/heat", "--masks", "masks"]
    rows = table(script(*words))
    assert len(table(script(*words))) == len(rows) == 6  # drawings within the folder are no images of it
    detector = load(path)
    threshold = detector.threshold.item()
    maps = detector.predict([row["path"] for row in rows]).maps
    marked = 0
    for row, heat in zip(rows, maps):
        below = row["path"].removeprefix("photos/").rpartition(".")[0]
        mask = Image.open(here / f"masks/{below}.png")
        size = read_size(row["path"])
        assert (mask.mode, mask.size) == ("L", size[::-1])
        large = torch.nn.functional.interpolate(torch.from_numpy(heat)[None, None], size, mode="bilinear")[0, 0]
        assert (np.array(mask) == 255 * (large > threshold).numpy()).mean() > 0.999
        marked += bool(np.array(mask).any())
        (drawn,) = [
            p for p in (here / "photos/heat").rglob("*") if str(p.relative_to(here / "photos/heat"))[:-4] == below
        ]
        assert drawn.suffix == (".jpg" if row["path"].endswith(".jpg") else ".png")
        assert Image.open(drawn).size == size[::-1]
    assert 0 < marked < 6


def test_the_scale_of_an_overlay_is_the_threshold():
    gray = np.full((40, 60, 3), 100, np.uint8)
    heat = np.zeros((40, 60), np.float32)
    heat[10:30, 10:50] = 3.0
    heat[0] = 1.0  # half of the threshold: nothing
    plain = np.array(overlays.overlay(gray, heat, 2.0, outlined=False))
    assert (plain[:10] == 100).all()
    assert (plain[15, 20] != 100).any()
    lined = np.array(overlays.overlay(gray, heat, 2.0, outlined=True))
    assert (lined[10, 10:50] == overlays.OUTLINE).all()
    changed = (lined != plain).any(2)
    assert changed.sum() == 2 * 40 + 2 * 18
    strong = np.array(overlays.overlay(gray, np.full_like(heat, 4), 2.0, outlined=False))
    assert np.array_equal(strong, overlays.overlay(gray, np.full_like(heat, 9), 2.0, outlined=True))
    expected = 100 + overlays.OPACITY * (np.array(overlays.COLORS[-1]) - 100.0)
    assert np.abs(strong[0, 0] - expected).max() <= 1
    for threshold in (0.0, -1.0):
        assert np.array(overlays.overlay(gray, heat, threshold, True)).shape == gray.shape


def test_image_level_models_draw_where_the_score_comes_from(detectors, here, script):
    plain = table(script("predict", detectors / "whole/brick.pt", "photos"))
    drawn = table(script("predict", detectors / "whole/brick.pt", "photos", "--heatmaps", "heat"))
    assert np.allclose(*([float(row["score"]) for row in rows] for rows in (plain, drawn)), rtol=1e-5)
    pictures = [np.array(Image.open(here / "heat" / name).convert("RGB")) for name in ("b.png", "more/a.png")]
    originals = [np.array(Image.open(here / "photos" / name).convert("RGB")) for name in ("b.png", "more/a.png")]
    assert all(a.shape == b.shape for a, b in zip(pictures, originals))
    assert any((a != b).any() for a, b in zip(pictures, originals))
    asked = ["predict", detectors / "whole/brick.pt", "photos", "--masks", "masks"]
    one_line(script(*asked), "--masks", "is no patch model")


def test_no_drawing_is_in_the_way(detectors, here, script):
    """Of another image, of the image itself, or of the other drawing."""
    path = detectors / "patch/brick.pt"
    before = {p: p.read_bytes() for p in (here / "photos").rglob("*") if p.is_file()}
    one_line(script("predict", path, "photos", "--heatmaps", "photos"), "photos/a.jpg would be drawn of it")
    one_line(script("predict", path, "photos", "--heatmaps", "a", "--masks", "./a"), "b.png would be drawn of it")
    shutil.copy(here / "photos/b.png", here / "photos/b.bmp")
    one_line(script("predict", path, "photos", "--heatmaps", "a"), "b.png would be drawn", "b.bmp")
    one_line(script("predict", path, "photos/b.png", here / "photos", "--masks", "photos"), "would be drawn")
    assert {p: p.read_bytes() for p in before} == before
    assert not (here / "a").exists()


def test_no_other_photograph_is_drawn_over(detectors, here, script):
    path = detectors / "patch/brick.pt"
    shutil.copy("photos/more/a.png", "photos/more/b.png")
    table(script("predict", path, "photos/d.png", "--heatmaps", "heat"))
    shutil.copy("heat/photos/d.png", "photos/drawn.png")  # is a photograph now
    for name in ("b.png", "drawn.png"):
        (here / "in" / name[0]).mkdir(parents=True)
        (here / "in" / name[0] / name).symlink_to(here / "photos" / name)
    (here / "gone").mkdir()
    (here / "gone/b.png").symlink_to("/nowhere/b.png")
    before = {p: p.read_bytes() for p in here.rglob("*") if p.is_file()}
    for flag in ("--heatmaps", "--masks"):
        one_line(script("predict", path, "photos/more", flag, "photos"), "photos/b.png: is there already", "folder")
        one_line(script("predict", path, "in/b", flag, "photos"), "photos/b.png would be drawn of it")
        one_line(script("predict", path, "in/d", flag, "photos"), "photos/drawn.png would be drawn of it")
        one_line(script("predict", path, "photos/more", flag, "gone"), "gone/b.png: is there already")
    assert {p: p.read_bytes() for p in here.rglob("*") if p.is_file()} == before
    assert (here / "gone/b.png").is_symlink()


def test_what_comes_in_the_way_while_images_are_scored_is_told_in_a_row(detectors, here, script, monkeypatch):
    make = predict.make_scorer

    def late(*args):
        (here / "heat/b.png").write_bytes(b"mine")
        return make(*args)

    monkeypatch.setattr(predict, "make_scorer", late)
    rows = table(script("predict", detectors / "patch/brick.pt", "photos", "--heatmaps", "heat"), 1)
    assert {row["path"]: "heat/b.png: is there already" in row["error"] for row in rows if row["error"]} == {
        "photos/b.png": True
    }
    assert (here / "heat/b.png").read_bytes() == b"mine"
    assert (here / "heat/a.jpg").is_file()


def test_a_report_of_new_images(detectors, here, script, monkeypatch, browser):
    path = half_above(detectors / "patch/brick.pt", here)
    shutil.copy("photos/b.png", "photos/<b>&'.png")
    words = ["predict", path, "photos", "--output", "rows.csv", "--report", "look.html"]
    done = script(*words)
    assert done.code == 0, done.err
    rows = rows_in("rows.csv")
    tab = browser.new_page(viewport={"width": 390, "height": 800})
    tab.goto((here / "look.html").as_uri())
    scores = {row["path"]: float(row["score"]) for row in rows}
    names = tab.locator(".name").evaluate_all("all => all.map(e => e.textContent)")
    assert {*names} == {*scores}
    assert [scores[name] for name in names] == sorted(scores.values(), reverse=True)
    called = sum(row["anomalous"] == "1" for row in rows)
    assert tab.locator("[data-role=called]").inner_text() == f"{called} of 7"
    assert tab.locator("button.frame").count() == 7  # with heat maps
    tab.close()
    content = (here / "look.html").read_text()
    done = script(*words)
    assert "nothing new was scored, so look.html is not written" in done.err
    monkeypatch.setattr(report, "MAX_TILES", 4)
    done = script(*words, "--overwrite")
    fewer = (here / "look.html").read_text()
    assert done.code == 0, done.err
    assert (content.count('class="tile"'), fewer.count('class="tile"')) == (7, 4)
    assert "The 4 images with the highest scores, of 7" in fewer
    alone = [name for name in names if "b" not in name.rpartition("/")[2][:2]]  # two are the same picture
    assert len(alone) == 5
    assert [name for name in alone if f"heat map of {name}" in fewer] == [name for name in alone if name in names[:4]]
    assert script("predict", path, "photos", "--report", "look.pdf").code == 2


# Several categories -----------------------------------------------------------------------------------------------


def test_a_folder_of_detectors(detectors, here, script):
    for name in ("grass", "brick", "gravel"):
        shutil.copytree(here / "photos", here / "line" / name)
    done = script("predict", "--model_dir", detectors / "patch", "line", "--masks", "masks")
    rows = table(done)
    assert list(rows[0]) == ["category", *COLUMNS]
    assert [row["category"] for row in rows] == ["brick"] * 6 + ["grass"] * 6
    assert "gravel: has images but no detector; left out" in done.err
    for name in ("brick", "grass"):
        own = [row for row in rows if row["category"] == name]
        assert all(row["path"].startswith(f"line/{name}/") for row in own)
        expected = load(detectors / f"patch/{name}.pt").predict([row["path"] for row in own]).scores
        assert np.allclose([float(row["score"]) for row in own], expected, rtol=1e-5)
        assert (here / f"masks/{name}/more/a.png").is_file()
    one_line(script("predict", "--model_dir", detectors / "patch", "photos"), "photos: no sub-folder")
    one_line(script("predict", "--model_dir", "none", "photos"), "none: no such folder")


# Errors -----------------------------------------------------------------------------------------------------------


def test_mistakes_get_one_line(detectors, here, script):
    path = detectors / "whole/brick.pt"
    (here / "empty").mkdir()
    kept = here / "kept.csv"
    kept.write_text("mine")
    output = ["--output", kept, "--overwrite"]
    one_line(script("predict", path, "empty", *output), "empty: no image found")
    one_line(script("predict", path, "photos", "--size", 64, *output), "--size: 64x64", "48x32")
    assert script("predict", path, "photos/b.png", "--size", "48x32").code == 0
    one_line(script("predict", "none.pt", "photos", *output), "none.pt: no such file")
    damaged = here / "brick.pt"
    damaged.write_bytes(path.read_bytes()[:5000])
    one_line(script("predict", damaged, "photos", *output), "brick.pt: truncated, damaged")
    one_line(script("predict", path, "photos/b.png", "--watch", *output), "--watch looks at folders only")
    assert kept.read_text() == "mine"
    one_line(script("predict", path, "photos", "--output", here / "empty"), "empty: Is a directory")
    one_line(script("predict", path, "photos", "--output", kept / "x.csv"), "kept.csv")
    one_line(script("predict", path, "photos", "--heatmaps", kept, "--output", here / "new.csv"), "kept.csv")
    assert not (here / "new.csv").exists()
    if not torch.cuda.is_available():
        one_line(script("predict", path, "photos", "--cuda", 1), "--cuda 1")
    if os.path.exists("/dev/full"):
        one_line(script("predict", path, "photos", "--output", "/dev/full"), "/dev/full: cannot be written (No space")
    kde = Detector(replace(load(path).config, density="kde"))
    save(kde, here / "kde/brick.pt")
    one_line(script("predict", here / "kde/brick.pt", "photos", "--heatmaps", "heat"), "--heatmaps", "kde")


# Watching ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def aside():
    """Does something beside the script, in a thread; what fails there fails the test."""
    found = []

    def start(function):
        def work():
            try:
                function()
            except BaseException as error:
                found.append(error)
                os.kill(os.getpid(), signal.SIGINT)  # end the script that the test waits for

        thread = threading.Thread(target=work)
        thread.start()
        threads.append(thread)

    threads = []
    yield start
    for thread in threads:
        thread.join()
    assert not found, found


def test_new_files_are_scored_once_they_are_written(detectors, here, data, script, aside):
    out, content = here / "out.csv", find_images(data / "brick/train/good")[0].read_bytes()

    def camera():
        wait_for(lambda: seen(out) == 7)
        with (here / "photos/slow.png").open("wb") as file:
            file.write(content[: len(content) // 2])
            file.flush()
            time.sleep(0.7)
            assert seen(out) == 7
            file.write(content[len(content) // 2 :])
        wait_for(lambda: seen(out) == 8)
        (here / "new").mkdir()
        (here / "new/in.png").write_bytes(content)
        (here / "new").rename(here / "photos/new")  # a folder that comes as a whole
        (here / "photos/notes.txt").write_text("no image")
        wait_for(lambda: seen(out) == 9)
        time.sleep(1.5)
        os.kill(os.getpid(), signal.SIGINT)

    aside(camera)
    words = ["photos", "--watch", "--output", out, "--heatmaps", "photos/heat"]
    done = script("predict", detectors / "patch/brick.pt", *words)
    assert done.code == 130, done.err
    assert "Traceback" not in done.err
    assert done.err.splitlines()[-1] == "predict.py: interrupted"
    rows = rows_in(out)
    assert [row["path"] for row in rows[6:]] == ["photos/slow.png", "photos/new/in.png"]
    assert not any(row["error"] for row in rows)
    assert (here / "photos/heat/new/in.png").is_file()


def test_a_watch_that_is_killed_is_continued(detectors, here, data):
    """Nothing is lost and nothing twice, whatever came before, while and after it was dead."""
    out, sources = here / "out.csv", find_images(data / "brick/train/good")
    words = [sys.executable, ROOT / "predict.py", detectors / "whole/brick.pt", "photos", "--watch", "--output", out]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: seen(out) > 6)
        for number in range(20):
            shutil.copy(sources[0], here / f"photos/while{number:03}.png")
            time.sleep(0.1)
        wait_for(lambda: seen(out) > 7)
    finally:
        process.kill()
        process.wait()
    shutil.copy(sources[0], here / "photos/after.png")
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: seen(out) > 6 + 21)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    finally:
        process.kill()
    paths = [row["path"] for row in rows_in(out)]
    assert sorted(paths) == sorted(listed(["photos"]))
    assert len(paths) == 6 + 21


def test_a_watched_folder_that_goes_away(detectors, here, script, aside):
    def remove():
        wait_for(lambda: seen(here / "out.csv") == 7)
        shutil.rmtree(here / "photos")

    aside(remove)
    words = ["photos", "--watch", "--output", here / "out.csv"]
    one_line(script("predict", detectors / "whole/brick.pt", *words), "photos: the folder that is watched has gone")


def test_a_signal_ends_with_whole_rows(detectors, here, script, monkeypatch):
    """What was being scored is written before the script ends."""
    add = RowsFile.add

    def interrupted(self, rows):
        os.kill(os.getpid(), signal.SIGTERM)
        add(self, rows)

    monkeypatch.setattr(RowsFile, "add", interrupted)
    words = ["predict", detectors / "patch/brick.pt", "photos", "--output", here / "out.csv"]
    assert script(*words).code == 143
    assert len(rows_in(here / "out.csv")) == 4  # of six, so many at once
    monkeypatch.setattr(RowsFile, "add", add)
    assert script(*words).code == 0
    assert len(rows_in(here / "out.csv")) == 6
