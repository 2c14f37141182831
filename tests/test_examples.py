"""The samples for other programs: without this project they say what predict.py says."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, needs_export, rows_of
from PIL import Image

pytestmark = needs_export
COMPARED = ("p_value", "anomalous", "x", "y", "width", "height")
SAMPLE = ROOT / "examples/predict_onnx.py"
PYTHON = (sys.executable, "-I", SAMPLE)  # which finds no module of this project
HEADER = "onnxruntime_cxx_api.h"


def check_rows(sample, script, model, photos, suffix=""):
    """Assert that a sample, a command, prints the rows of predict.py, some of them anomalous, some not. suffix: of the
    files that it reads, where those are other files of the same names."""
    given = [path.with_suffix(suffix) for path in photos] if suffix else photos
    done = subprocess.run([*map(str, (*sample, model, *given))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = rows_of(script("predict", model, *photos).out)
    rows = rows_of(done.stdout)
    assert [row["path"] for row in rows] == [*map(str, given)]
    assert len(rows) == len(expected) == len(photos)
    for row, other in zip(rows, expected):
        values = [(row[name], other[name]) for name in COMPARED]
        assert all(one == two or float(one) == float(two) for one, two in values), values
        assert float(row["score"]) == pytest.approx(float(other["score"]), rel=1e-6)
    assert {row["anomalous"] for row in rows} == {"0", "1"}


@pytest.fixture
def photos(data, exported, here):
    """Photographs of the files' own sizes, one of them black."""
    Image.new("RGB", (64, 96)).save(here / "photos/black.png")
    others = sorted((data / "brick/train/good").iterdir())[:3]
    return [*sorted(path for path in (here / "photos").rglob("*.*") if path.suffix != ".TIF"), *others]


@pytest.mark.parametrize("kind", ["patch", "whole"])
def test_the_python_sample(exported, photos, script, kind):
    assert (lines := len(SAMPLE.read_text().splitlines())) <= 60
    assert (
        f"`examples/predict_onnx.py` is a program of its own, of {lines} lines"
        in (ROOT / "docs/deploying.md").read_text()
    )
    check_rows(PYTHON, script, exported / kind / "brick.onnx", photos)


def test_the_python_sample_tells_of_what_it_cannot_read(exported, data, tmp_path):
    """One line for each, and the other photographs have their rows; a graph of another .json has none."""
    for name in ("brick.onnx", "brick.json"):
        shutil.copy(exported / "patch" / name, tmp_path)
    good = sorted((data / "brick/train/good").iterdir())[:2]
    half = tmp_path / "half.png"
    half.write_bytes(good[0].read_bytes()[:300])
    (tmp_path / "text.png").write_text("no picture")
    bad = [half, tmp_path, tmp_path / "none.png", tmp_path / "text.png"]
    model = tmp_path / "brick.onnx"

    def call(*words: object) -> subprocess.CompletedProcess:
        done = subprocess.run([*map(str, (*PYTHON, *words))], capture_output=True, text=True)
        assert done.returncode == 1
        return done

    done = call(model, good[0], *bad, good[1])
    assert [row["path"] for row in rows_of(done.stdout)] == [*map(str, good)]
    assert [line.split(": ")[0] for line in done.stderr.splitlines()] == [*map(str, bad)]
    shutil.copy(exported / "whole/brick.onnx", model)
    done = call(model, good[0])
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{model}: is not the file")
    for words in ((), (model,)):
        (line,) = call(*words).stderr.splitlines()
        assert line.startswith("usage: ")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Path:
    """The C++ sample, built by CMake with the headers at hand and the library of Python's onnxruntime."""
    import onnxruntime

    for tool in ("cmake", "g++"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    places = [Path(os.environ.get("ORT_ROOT", "/usr"), "include"), Path("/usr/include/onnxruntime")]
    headers = next((place for place in places if (place / HEADER).is_file()), None)
    if headers is None:
        pytest.skip(f"no header {HEADER}: ORT_ROOT may name an unpacked release of ONNX Runtime, for C++")
    (library,) = Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*.*")
    root = tmp_path_factory.mktemp("cpp")
    (root / "ort/lib").mkdir(parents=True)
    (root / "ort/include").symlink_to(headers)
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (root / "ort/lib" / name).symlink_to(library)
    for command in (["-S", ROOT / "examples/cpp", "-B", root, f"-DORT_ROOT={root / 'ort'}"], ["--build", root]):
        done = subprocess.run(["cmake", *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return root / "predict_onnx"


@pytest.mark.parametrize("kind", ["patch", "whole"])
def test_the_cpp_sample(exported, photos, script, compiled, kind, tmp_path):
    small = []
    for number, path in enumerate(photos):
        small.append(tmp_path / f"{number}.png")
        pixels = Image.open(path).convert("RGB").resize((48, 32), Image.Resampling.BILINEAR)
        pixels.save(small[-1])
        pixels.save(small[-1].with_suffix(".ppm"))
    check_rows([compiled], script, exported / kind / "brick.onnx", small, ".ppm")


def test_the_cpp_sample_tells_of_what_it_cannot_read(exported, compiled, tmp_path):
    Image.fromarray(np.zeros((30, 30, 3), np.uint8)).save(tmp_path / "small.ppm")
    model = exported / "patch/brick.onnx"
    for words, told in (
        ([model, tmp_path / "small.ppm"], "small.ppm: is no PPM file (P6, 8 bits) of 48x32"),
        ([tmp_path / "none.onnx"], "the .json file lacks rate"),
    ):
        done = subprocess.run([compiled, *words], capture_output=True, text=True)
        assert done.returncode == 1
        assert told in done.stderr
