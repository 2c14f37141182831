"""Names of categories, defect types and files that mean something elsewhere harm no script and stay as they are."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import ROOT, SMALL, TINY, again, one_line, rows_of

from detector import load, save
from normals import normals_path
from runtime.files import is_formula
from runtime.image_files import find_images

# A formula of spreadsheets and one of matplotlib, which it could not read; a byte that is no UTF-8
CATEGORY = os.fsdecode(b"=1$\\frac$\xe9") if sys.platform == "linux" else "=1$\\frac$"
SHOWN = CATEGORY.replace("\udce9", "\\udce9")  # on stdout, in figures and on pages
DEFECT = "@SUM(1)$^$"
NAMES = ["$x_{$.png", "re\rturn.png", "li\nne.png", "日本.png", "x" * 251 + ".png"]  # the last is as long as can be


def renamed(data, detectors, root, category, folder_of_bad):
    """Make a data folder and a folder with a detector, both of that category."""
    target, model = root / "Data" / category, root / "models" / f"{category}.pt"
    shutil.copytree(data / "brick", target)
    for split in ("test", "ground_truth"):
        (target / split / "hole").rename(target / split / folder_of_bad)
    made = load(detectors / "patch/brick.pt")
    made.config = replace(made.config, category=category)
    save(made, model)
    shutil.copy(normals_path(detectors / "patch/brick.pt"), normals_path(model))
    folders = ["--data_dir", target.parent, "--model_dir", model.parent]
    return SimpleNamespace(data=target.parent, models=model.parent, root=root, folders=folders)


@pytest.fixture
def hostile(data, detectors, tmp_path):
    made = renamed(data, detectors, tmp_path, CATEGORY, DEFECT)
    for folder, names in (("train/good", NAMES), (f"test/{DEFECT}", NAMES[::-1]), ("test/good", NAMES[::-1])):
        for path, name in zip(find_images(made.data / CATEGORY / folder), names):
            path.rename(path.with_name(name))
    return made


def cells_of(folder):
    """The rows of all tables below a folder; no cell of theirs, nor of a head, is a formula."""
    rows = [row for path in sorted(folder.rglob("*.csv")) for row in rows_of(path)]
    assert rows
    for row in rows:
        assert None not in row, "more cells than the head has"
        cells = [cell for cell in (*row, *row.values()) if is_formula(cell)]
        assert all(cell[1:].replace(".", "").isdigit() for cell in cells), cells  # a number below zero
    return rows


def lines_of(text):
    return text.removesuffix("\n").split("\n")


def test_eval(hostile, script):
    done = script("eval", *hostile.folders, "--eval_dir", hostile.root / "Eval", "--report", hostile.root / "a.html")
    assert done.code == 0, done.err
    assert [line.split(": ")[0] for line in lines_of(done.out)] == [
        f"{SHOWN} {metric}" for metric in ("AUC", "pixel AUROC", "AUPRO")
    ]
    rows = cells_of(hostile.root / "Eval")
    assert {row["category"] for row in rows} == {f"'{CATEGORY}"}
    paths = [row["path"] for row in rows if "path" in row]
    assert len(paths) == 12
    assert all((hostile.data / path).is_file() for path in paths)
    plots = {f"{CATEGORY}/{name}.png" for name in ("roc", "histogram", "heatmaps")} | {"summary.png"}
    folder = hostile.root / "Eval/models"
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.png")} == plots


def test_maps_of_names_that_cannot_be(hostile, script):
    """A name of 255 bytes that ends in .tiff instead of .png has one more: nothing is written then."""
    done = script("eval", *hostile.folders, "--eval_dir", hostile.root / "Eval", "--save_maps", 1, "--save_plots", 0)
    one_line(done, "xxx.tiff: cannot be written (File name too long); shorten it")
    assert not [path for path in (hostile.root / "Eval").rglob("*") if path.is_file()]


def test_check_data(hostile, script):
    done = script("check_data", *hostile.folders, "--eval_dir", hostile.root / "Eval")
    assert done.code == 0, done.err
    names = [f"{SHOWN} {kind}" for kind in ("duplicates", "suspicious", "enough")]
    assert [line.split(": ")[0] for line in lines_of(done.out)] == names
    rows = cells_of(hostile.root / "Eval")
    assert {row["path"] for row in rows if "score" in row} >= {f"./{CATEGORY}/train/good/{name}" for name in NAMES}


def test_predict(hostile, script):
    folders = [flag for name in ("heatmaps", "masks", "explain") for flag in (f"--{name}", hostile.root / name)]
    output = hostile.root / "rows/a.csv"
    done = script("predict", *hostile.folders[2:], hostile.data, "--output", output, "--false_alarm_rate", 1, *folders)
    assert done.code == 0, done.err
    rows = cells_of(output.parent)
    assert {row["category"] for row in rows} == {f"'{CATEGORY}"}
    assert all(os.path.isfile(row["path"]) and not row["error"] for row in rows)
    assert [len([*(hostile.root / name).rglob("*.png")]) for name in ("heatmaps", "masks", "explain")] == [
        len(rows)
    ] * 3


def test_a_drawing_whose_path_cannot_be_is_an_error_in_its_row(detectors, here, script):
    deep = here / "photos"
    while len(str(deep)) < 3900:
        deep = deep / ("x" * 100)
    deep.mkdir(parents=True)
    (deep / "y.png").write_bytes((here / "photos/b.png").read_bytes())
    done = script(
        "predict", detectors / "patch/brick.pt", "photos", "--heatmaps", "/".join(["h" * 200] * 2), "--output", "a.csv"
    )
    assert done.code == 1
    errors = [row["error"] for row in rows_of(here / "a.csv")]
    assert [error for error in errors if error] == errors[-1:]
    assert "cannot be written (File name too long)" in errors[-1]


def test_training(hostile, script):
    done = script("run_training", "--data_dir", hostile.data, *TINY, "--preview", hostile.root / "a.png")
    assert done.code == 0, done.err
    done = again(script, hostile.data, hostile.root / "new", *SMALL, "--epochs", 1)
    assert done.code == 0, done.err
    assert load(hostile.root / "new" / f"{CATEGORY}.pt").config.category == CATEGORY
    assert f"{SHOWN}: wrote" in done.err


def test_neither_the_backend_nor_the_encoding_of_the_environment_matters(data, detectors, tmp_path):
    """Set what a notebook hands down to !python, and the encoding of a stdout that lacks letters."""
    made = renamed(data, detectors, tmp_path, "日本é", "hole")
    env = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "PYTHONIOENCODING": "cp1252"}
    command = [sys.executable, ROOT / "eval.py", *made.folders, "--eval_dir", tmp_path / "Eval"]
    done = subprocess.run(command, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert lines_of(done.stdout.decode("cp1252"))[0].startswith("\\u65e5\\u672cé AUC: ")
    assert (tmp_path / "Eval/models/summary.png").is_file()
