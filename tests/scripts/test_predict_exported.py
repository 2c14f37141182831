"""predict.py on an exported detector: as on the detector itself, and without torch."""

import hashlib
import io
import json
import re
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, contents, lines_in, needs_export, one_line, rows_of, wait_for
from forged import of_version_2
from PIL import Image
from test_export import JOINED, SIZE, fitted

import export
import prediction.explain as explain_module
from config import Config, PatchConfig
from dataset import load_train
from detector import Detector, initial_network, load, save
from image_ops import fill_index_of
from normals import save_normals
from prediction.exported import Exported
from prediction.scorer import Model
from runtime.files import load_parts, save_tensors
from runtime.image_files import decode

pytestmark = needs_export
SAME = ("path", "p_value", "anomalous", "x", "y", "width", "height", "error", "bytes", "modified")
HEAVY = ("torch", "torchvision", "pandas", "seaborn", "sklearn", "scipy", "matplotlib", "onnx", "onnxscript")
# A script where those are not installed: it ends with what has come in none the less
WITHOUT = f"""
import atexit, runpy, sys
sys.modules |= dict.fromkeys({HEAVY}, None)
atexit.register(lambda: print("imported:", [name for name in {HEAVY} if sys.modules[name]], file=sys.stderr))
sys.argv = sys.argv[1:]
sys.path.insert(0, {str(ROOT)!r})
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def without_torch(*words):
    """predict.py in a process of its own that cannot import torch, started."""
    command = [sys.executable, "-c", WITHOUT, ROOT / "predict.py", *words]
    return subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def check_same(rows, expected):
    """Assert that rows are those of the detector itself; scores are in single precision."""
    assert [[row[name] for name in SAME] for row in rows] == [[row[name] for name in SAME] for row in expected]
    for row, other in zip(rows, expected):
        assert row["score"] == other["score"] or float(row["score"]) == pytest.approx(
            float(other["score"]), rel=1e-5, abs=1e-5
        )


# The same, without torch ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "drawings"), [("patch", ["heat", "masks"]), ("whole", [])])
def test_rows_drawings_report_and_copies_are_those_of_the_detector(exported, here, script, kind, drawings):
    """While it watches, too; and nothing heavy is imported."""
    (here / "photos/empty.png").touch()
    flags = {"heat": "--heatmaps", "masks": "--masks"}
    for form in ("pt", "onnx"):
        words = [exported / kind / f"brick.{form}", "photos", "--output", f"{form}.csv", "--false_alarm_rate", 0.5]
        words += ["--report", f"{form}.html", "--copy_anomalous", f"{form}/copies"]
        words += [word for name in drawings for word in (flags[name], f"{form}/{name}")]
        if form == "pt":
            assert script("predict", *words).code == 1  # of the empty file
            continue
        process = without_torch(*words, "--watch")
        try:
            wait_for(lambda: lines_in(here / "onnx.csv") == 8)
            shutil.copy("photos/b.png", "photos/new.png")
            wait_for(lambda: lines_in(here / "onnx.csv") == 9)
            process.send_signal(signal.SIGINT)
            told = process.communicate(timeout=60)[1]
        finally:
            process.kill()
        assert process.returncode == 1, told
        assert told.splitlines()[-1] == "imported: []"
        assert "loading torch" not in told
    rows, expected = rows_of(here / "onnx.csv"), rows_of(here / "pt.csv")
    assert rows.pop()["path"] == "photos/new.png"
    check_same(rows, expected)
    called = [row["path"] for row in rows if row["anomalous"] == "1"]
    assert 0 < len(called) < 6
    for name in ("copies", *drawings):
        drawn, wanted = (
            {path.relative_to(here / form / name): path for path in contents(here / form / name) if path.stem != "new"}
            for form in ("onnx", "pt")
        )
        assert drawn.keys() == wanted.keys()
        for path in wanted:
            if name == "copies":
                assert drawn[path].read_bytes() == wanted[path].read_bytes()
                continue
            pixels = [np.array(Image.open(files[path])).astype(int) for files in (drawn, wanted)]
            assert np.abs(pixels[0] - pixels[1]).max() <= 3  # of 255: heat is rounded otherwise
    pages = [(here / f"{form}.html").read_text() for form in ("onnx", "pt")]
    shown = [re.findall(r'<div class="name">(.*?)\n?</div>', page.replace("<wbr>", "")) for page in pages]
    assert len(shown[1]) == 6
    assert [name for name in shown[0] if name != "photos/new.png"] == shown[1]
    assert "onnxruntime" in pages[0]
    assert "onnxruntime" not in pages[1]


def test_what_the_rate_promises_is_told_in_the_same_words(exported, here, script):
    for flags in ([], ["--false_alarm_rate", 0.3], ["--verbose"]):
        told = [script("predict", exported / f"patch/brick.{form}", "photos", *flags).err for form in ("pt", "onnx")]
        lines = [[line for line in text.splitlines() if line.startswith("brick: ")] for text in told]
        assert lines[0] == lines[1]
        assert len(lines[0]) >= 1


def test_rows_of_one_form_are_continued_by_the_other(exported, here, script):
    words = ["photos", "--output", "rows.csv"]
    assert script("predict", exported / "patch/brick.pt", "photos/b.png", "photos/d.png", *words[1:]).code == 0
    before = (here / "rows.csv").read_bytes()
    assert script("predict", exported / "patch/brick.onnx", *words).code == 0
    after = (here / "rows.csv").read_bytes()
    assert after.startswith(before)
    assert len(rows_of(here / "rows.csv")) == 6
    assert script("predict", exported / "patch/brick.pt", *words).code == 0
    assert (here / "rows.csv").read_bytes() == after
    one_line(script("predict", exported / "whole/brick.onnx", *words), "rows.csv: is another detector's")


def test_a_folder_of_exported_detectors(exported, here, script):
    """Beside their export detectors themselves are taken."""
    for name in ("brick", "grass"):
        shutil.copytree(here / "photos/more", here / "line" / name)
    (here / "models").mkdir()
    for name in ("brick.onnx", "brick.json"):
        shutil.copy(exported / "patch" / name, here / "models")
    done = script("predict", "--model_dir", "models", "line", "--masks", "masks")
    assert done.code == 0, done.err
    assert "grass: has images but no detector; left out" in done.err
    rows = rows_of(done.out)
    assert [row["category"] for row in rows] == ["brick"] * 2
    check_same(rows, rows_of(script("predict", exported / "patch/brick.onnx", "line/brick").out))
    assert (here / "masks/brick/a.png").is_file()
    shutil.copy(exported / "patch/brick.pt", here / "models")
    done = script("predict", "--model_dir", "models", "line", "--report", "look.html")
    assert done.code == 0, done.err
    assert "models/brick.pt" in (here / "look.html").read_text()


def test_ignored_pixels_folds_and_looks(data, tmp_path, script):
    """Compare what both forms see and decide where several networks ignore a part of the image."""
    patches = PatchConfig(patch_size=32, window=8, stride=4, sigma=2.0)
    config = Config("brick", height=32, width=32, pretrained=False, backbone="mobilenet_v2", level=(1,), folds=2)
    config = replace(config, patches=patches, false_alarm_rate=0.3)
    ignored = torch.zeros(32, 32, dtype=torch.bool)
    ignored[4:12, 20:] = True
    fill_index = fill_index_of(ignored)
    networks = [initial_network(config, member=number) for number in range(2)]
    train = load_train(data, "brick", (32, 32), 0, ignored=fill_index)
    save(Detector(config, networks, fill_index).fit(train.images), tmp_path / "brick.pt")
    done = script("export", tmp_path / "brick.pt", data / "brick/test", "--threads", 1)
    assert done.code == 0, done.err
    detector = load(tmp_path / "brick.pt")
    models = [Model.of(detector, False), Model.of_exported(Exported.open(tmp_path / "brick.onnx"))]
    assert models[0].guarantee == models[1].guarantee
    assert models[0].threshold == pytest.approx(models[1].threshold)
    assert np.allclose(models[0].appearance, models[1].appearance)
    paths = sorted((data / "brick/test").rglob("*.png"))[:4]
    pixels = np.stack([decode(path, (32, 32)) for path in paths])
    (seen, said), (other_seen, other_said) = (model.end(model.begin(pixels)) for model in models)
    assert np.array_equal(seen, other_seen)
    assert not np.array_equal(seen, pixels)
    assert np.array_equal(said.p_values, other_said.p_values)
    assert np.allclose(said.scores, other_said.scores, rtol=1e-5, atol=1e-5)
    assert np.allclose(said.maps, other_said.maps, rtol=1e-4, atol=1e-4)
    rows = [rows_of(script("predict", tmp_path / f"brick.{form}", *paths).out) for form in ("onnx", "pt")]
    check_same(*rows)


# Panels -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def joined(data, tmp_path_factory):
    """The folder of a patch model that knows nearest windows, with its normal images, and what export.py has made."""
    train = load_train(data, "brick", SIZE, 0)
    detector = fitted(replace(JOINED, density="both"), train.images)
    folder = tmp_path_factory.mktemp("joined")
    save(detector, folder / "brick.pt")
    save_normals(detector, train, folder / "brick.normals")
    words = [folder / "brick.pt", "--threads", 1, "--data_dir", data, "--output", folder / "line/brick.onnx"]
    with redirect_stdout(io.StringIO()):
        export.main(export.get_parser().parse_args([*map(str, words)]))
    return folder


@pytest.mark.parametrize("kind", ["joined", "whole"])
def test_panels_are_those_of_the_detector(request, exported, here, script, monkeypatch, kind):
    """But for the heat of an image-level model, Grad-CAM, which is not in the graph."""
    if kind == "joined":
        folder = request.getfixturevalue("joined")
        forms = {"pt": folder / "brick.pt", "onnx": folder / "line/brick.onnx"}
    else:
        forms = {form: exported / kind / f"brick.{form}" for form in ("pt", "onnx")}
        monkeypatch.setattr("density.has_gradient", lambda kind: False)
    titles, panel = [], explain_module.panel

    def noted(lines, pictures, *rest):
        titles.append(pictures[1][0])
        return panel(lines, pictures, *rest)

    monkeypatch.setattr(explain_module, "panel", noted)
    flags = ["--false_alarm_rate", 1, "--explain"]
    assert script("predict", forms["pt"], "photos", *flags, "why/pt").code == 0
    process = without_torch(forms["onnx"], "photos", *flags, "why/onnx")
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 0, told
    assert told.splitlines()[-1] == "imported: []"
    panels, expected = (
        {path.relative_to(here / "why" / form): path for path in contents(here / "why" / form)}
        for form in ("onnx", "pt")
    )
    assert panels.keys() == expected.keys()
    assert len(panels) == 6
    for name in expected:
        pixels, wanted = (np.array(Image.open(files[name])).astype(int) for files in (panels, expected))
        assert pixels.shape == wanted.shape
        differ = np.abs(pixels - wanted).max(2) > 3  # of 255: heat is rounded otherwise, which moves its outline
        assert differ.mean() < (5e-4 if kind == "joined" else 1e-9)  # another normal image would be a tenth of it
    assert all(title.startswith("nearest normal" + " window" * (kind == "joined")) for title in titles)
    assert len({*titles}) > 1


def test_normal_images_that_do_not_fit_get_one_line(exported, detectors, here, script):
    shutil.copytree(exported / "whole", "line")
    path, words = here / "line/brick.normals", ("predict", "line/brick.onnx", "photos", "--explain", "why")
    content, other = path.read_bytes(), detectors / "whole/grass.normals"
    save_tensors(of_version_2(load_parts(path, "normals")), here / "earlier.normals")
    for replacement, told in (
        (other.read_bytes(), "was written with another detector"),
        (content[:3000], "truncated, damaged or not a normals file"),
        ((here / "earlier.normals").read_bytes(), "of an earlier version, which needs torch"),
    ):
        path.write_bytes(replacement)
        one_line(script(*words), f"line/brick.normals: {told}", "export it again with export.py")
    path.unlink()
    one_line(script(*words), "line/brick.normals: no such file", "export it again with export.py")
    assert not (here / "why").exists()


def test_files_of_version_1_give_rows_and_no_panels(exported, here, script):
    """Their graphs compared no normal images, and their .json files did not say whose those are."""
    shutil.copytree(exported / "patch", "line")
    expected = script("predict", "line/brick.onnx", "photos")
    facts = json.loads((here / "line/brick.json").read_text())
    assert facts.pop("normals") is None
    (here / "line/brick.json").write_text(json.dumps(facts | {"version": 1}))
    done = script("predict", "line/brick.onnx", "photos")
    assert (done.code, done.err) == (0, expected.err)
    check_same(rows_of(done.out), rows_of(expected.out))
    done = script("predict", "line/brick.onnx", "photos", "--explain", "why")
    one_line(done, "--explain: line/brick.onnx gives nothing", "export it again with export.py --explain 1")


# Errors -----------------------------------------------------------------------------------------------------------


def test_mistakes_get_one_line_and_change_nothing(exported, here, script):
    for kind in ("patch", "whole"):
        shutil.copytree(exported / kind, kind)
    for folder in ("alone", "altered", "newer", "other"):
        (here / folder).mkdir()
        for name in ("brick.onnx", "brick.json"):
            shutil.copy(exported / "patch" / name, folder)
    (here / "alone/brick.json").unlink()
    content = bytearray((here / "altered/brick.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (here / "altered/brick.onnx").write_bytes(content)
    facts = json.loads((here / "newer/brick.json").read_text())
    (here / "newer/brick.json").write_text(json.dumps(facts | {"version": 99}))
    (here / "other/brick.onnx").write_bytes(b"no graph")
    digest = hashlib.sha256(b"no graph").hexdigest()
    (here / "other/brick.json").write_text(json.dumps(facts | {"sha256": digest}))
    before = contents(here)
    patch, whole = "patch/brick.onnx", "whole/brick.onnx"
    for words, told in (
        ([patch, "photos", "--size", 64], ["--size: 64x64", "48x32"]),
        ([patch, "photos", "--explain", "why"], ["--explain: patch/brick.onnx", "export.py --explain 1"]),
        ([patch, "photos", "--ignore", "photos/b.png"], ["--ignore: patch/brick.onnx", "take brick.pt"]),
        ([patch, "photos", "--cuda", 1], ["--cuda: patch/brick.onnx", "take brick.pt"]),
        ([whole, "photos", "--heatmaps", "heat"], ["--heatmaps: whole/brick.onnx is no patch model"]),
        ([whole, "photos", "--masks", "masks"], ["--masks: whole/brick.onnx is no patch model"]),
        ([patch, "photos", "--output", "patch/brick.json"], ["patch/brick.json: is read, and cannot be written to"]),
        (["alone/brick.onnx", "photos"], ["alone/brick.json: no such file"]),
        (["altered/brick.onnx", "photos"], ["altered/brick.onnx", "sha256"]),
        (["newer/brick.onnx", "photos"], ["newer/brick.json: format 99"]),
        (["other/brick.onnx", "photos"], ["other/brick.onnx", "cannot load it"]),
        (["photos/b.png", patch], []),
    ):
        output = [] if "--output" in words else ["--output", "new.csv"]
        done = script("predict", *words, *output)
        if told:
            one_line(done, *told)
        else:  # wrong usage
            assert done.code == 2
            assert "a detector file comes first, here patch/brick.onnx" in done.err
    assert contents(here) == before


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("onnxruntime", ["brick.onnx", "photos"]),
        ("jinja2", ["brick.onnx", "photos", "--report", "look.html"]),
        ("watchfiles", ["brick.onnx", "photos", "--watch", "--output", "rows.csv"]),
        ("torch", ["brick.pt", "photos"]),
    ],
)
def test_a_computer_is_told_what_it_lacks(exported, here, missing, words):
    code = f"import sys; sys.modules[{missing!r}] = None\n{WITHOUT}"
    command = [sys.executable, "-c", code, ROOT / "predict.py", exported / "patch" / words[0], *words[1:]]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert f"; pip install {missing}\n" in done.stderr
