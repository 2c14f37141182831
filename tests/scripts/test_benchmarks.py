"""The benchmarks: speed.py runs, a row keeps its digits, tables are filled wherever a document shows them."""

import csv
import json
import shutil
import statistics
import sys
from functools import cache

import numpy as np
import pandas
import pytest
import torch
from conftest import ROOT, fork, needs_export, one_line
from PIL import Image

from config import VARIANTS, Variant
from cutpaste import VIEWS, View, rows
from image_ops import PasteParams, paste_
from runtime.files import InputError

pytestmark = pytest.mark.usefixtures("benchmarks")


def table_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# Tables -----------------------------------------------------------------------------------------------------------


def marked(*names):
    return "".join(f"Before {name}.\n<!-- table: {name} -->\nold\n<!-- end of table -->\nAfter.\n" for name in names)


@pytest.fixture
def tables(benchmarks, monkeypatch, tmp_path):
    """The module, on a copy of results/ and documents that show every table."""
    module = benchmarks("tables")
    shutil.copytree(ROOT / "results", tmp_path / "results")
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(marked("results"))
    (tmp_path / "docs/results.md").write_text(marked(*(name for name in module.TABLES if name != "results")))
    (tmp_path / "docs/none.md").write_text("No table.\n")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


@pytest.fixture
def made_once(tables, monkeypatch):
    """The same, each table made once: results/ stays as it is."""
    monkeypatch.setattr(tables, "TABLES", {name: cache(make) for name, make in tables.TABLES.items()})
    return tables


def test_a_row_is_added_once_with_its_digits_and_columns(script, tmp_path):
    source, target = tmp_path / "new.csv", tmp_path / "kept/all.csv"
    source.write_text("name,side,value\nbrick,64,0.38501262687347226\ngrass,,0.10000000000000002\n")
    target.parent.mkdir()
    target.write_text("name,value\ngravel,0.30000000000000004\n")
    for _ in range(2):
        done = script("tables", "add", source, target)
        assert done.code == 0, done.err
    assert target.read_text().splitlines() == [
        "name,value,side",
        "gravel,0.30000000000000004,",
        "brick,0.38501262687347226,64",
        "grass,0.10000000000000002,",
    ]
    one_line(script("tables", "add", tmp_path / "none.csv", target), "none.csv")
    assert script("tables", "add", source).code == 2
    assert script("tables", "write", source).code == 2


def test_every_table_is_filled_where_it_is_shown(made_once, script, tmp_path):
    one_line(script("tables", "check"), "README.md", "tables.py write")
    assert script("tables", "write").code == 0
    assert script("tables", "check").code == 0
    readme, results = (tmp_path / name for name in ("README.md", "docs/results.md"))
    for name, make in made_once.TABLES.items():
        path = readme if name == "results" else results
        assert f"Before {name}.\n<!-- table: {name} -->\n{make()}\n<!-- end of table -->\nAfter.\n" in path.read_text()
    assert (tmp_path / "docs/none.md").read_text() == "No table.\n"
    results.write_text(results.read_text().replace("training step, seconds", "training step, hours"))
    one_line(script("tables", "check"), "docs/results.md")


def test_a_table_that_is_unknown_endless_or_nowhere(made_once, script, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(marked("paper", "spped"))
    before = (tmp_path / "docs/results.md").read_text()
    for command in ("write", "check"):
        one_line(script("tables", command), "README.md", "'spped'", "speed")
    assert (tmp_path / "docs/results.md").read_text() == before  # all or none
    readme.write_text("<!-- table: paper -->\n" + marked("results"))
    one_line(script("tables", "write"), "README.md", "'paper'", "end of table")
    readme.write_text("No table.\n")
    assert script("tables", "write").code == 0
    one_line(script("tables", "check"), "'results'")


def test_tables_show_the_deviation_of_several_seeds(tables):
    several = pandas.Series([0.25, 0.5, 0.75])
    assert tables.spread(several) == "50.0 ± 25.0"
    assert tables.spread(several[:1]) == "25.0"
    assert tables.spread(pandas.Series([float("nan")])) == ""


# Rows of one column of the README's table of results, by what they must have
FAST = {"recipe": "fast", "minutes": "10.0", "note": "", "device": "AMD EPYC", "patch_size": "48", "batch_size": "28"}
FROZEN = {"patch_size": "64", "features": "level", "epochs": "0"}
WINDOW = {"window": "24"}  # of stages that are seen together
LITE, MOBILE = (
    FROZEN | WINDOW | {"density": "both", "join": "True", "normalize": normalize, "backbone": name}
    for name, normalize in (("efficientnet_lite0", "half"), ("mobilenet_v2", "imagenet"))
)
TRANSFER = FROZEN | {"backbone": "efficientnet_lite0", "level": "3,5", "invisible": "keep", "freeze_bn": "True"}
COLUMNS = {
    "efficientnet_lite0": (LITE, "image_auroc"),
    "mobilenet_v2": (MOBILE, "image_auroc"),
    "from scratch": (FAST, "image_auroc"),
    "untrained": (FAST, "control_auroc"),
    "paper": ("3way", "image_auroc", "paper"),
    "re-impl.": ("3way", "image_auroc", "re-implementation"),
    "pixel: efficientnet_lite0": (LITE, "pixel_auroc"),
    "pixel: mobilenet_v2": (MOBILE, "pixel_auroc"),
    "pixel: from scratch": (FAST, "pixel_auroc"),
    "pixel: untrained": (FAST, "control_pixel_auroc"),
    "pixel: paper": ("3way patches", "pixel_auroc", "paper"),
    "AUPRO: efficientnet_lite0": (LITE, "aupro"),
    "AUPRO: mobilenet_v2": (MOBILE, "aupro"),
    "AUPRO: from scratch": (FAST, "aupro"),
}


def with_values(rows, values):
    """The rows that have some values; "64.0" is 64."""
    same = lambda one, other: one.removesuffix(".0") == other.removesuffix(".0")  # noqa: E731
    return [row for row in rows if all(same(row[name], value) for name, value in values.items())]


def test_the_results_are_what_the_files_say(tables, tmp_path):
    """Each cell from its own rows. Rows with other settings or budgets, or of another device, are not mixed in."""
    path = tmp_path / "results/recipe.csv"
    own = {"recipe": table_of(path), "density": table_of(tmp_path / "results/density.csv")}
    before = tables.results_table()
    changes = [{"minutes": "5.0"}, {"minutes": ""}, {"note": "old"}, {"device": "other"}, {"recipe": "paper"}]
    for change in (*changes, {"patch_size": "64"}, {"batch_size": "16"}):
        row = with_values(own["recipe"], FAST)[0]
        tables.append(row | {"image_auroc": "0.1", "seed": "9"} | change, path)
    assert tables.results_table() == before
    head, _, *lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in before.splitlines()]
    assert head == ["category", *COLUMNS]
    assert len(lines) == 9
    for category, *cells in lines:
        for cell, (values, measure, *source) in zip(cells, COLUMNS.values()):
            if source:
                published = tables.published(values, measure, *source)
                assert cell == (f"{100 * published[category]:.1f}" if category in published else "")
                continue
            table = own["recipe" if values is FAST else "density"]
            figures = [row[measure] for row in with_values(table, values | {"category": category})]
            figures = [100 * float(figure) for figure in figures if figure]
            deviation = f" ± {statistics.stdev(figures):.1f}" if len(figures) > 1 else ""
            assert cell == (f"{statistics.mean(figures):.1f}{deviation}" if figures else ""), (category, measure)


@pytest.mark.parametrize(("name", "table", "values"), [("recipe", "results", FAST), ("transfer", "transfer", TRANSFER)])
def test_the_newest_row_of_a_setting_counts(tables, tmp_path, name, table, values):
    path = tmp_path / f"results/{name}.csv"
    before, first = tables.TABLES[table](), with_values(table_of(path), values)[0]
    tables.append(first | {"image_auroc": "0.1", "torch": "9.9", "location": "each"}, path)
    changed = tables.TABLES[table]()
    assert changed != before
    assert len(changed.splitlines()) == len(before.splitlines())
    tables.append(first | {"torch": "9.10"}, path)
    assert tables.TABLES[table]() == before
    tables.append(first | {"torch": "9.11", "normalize": "imagenet", "seed": "9"}, path)
    with pytest.raises(InputError, match=f"{name}.csv: rows that differ in normalize"):
        tables.TABLES[table]()


# speed.py ---------------------------------------------------------------------------------------------------------


def test_the_benchmark_of_speed_runs(data, tmp_path):
    table = tmp_path / "speed.csv"
    flags = ["--size", 32, "--original", "48x40", "--batch_size", 2, "--repeats", 1, "--results", table]
    done = fork("benchmarks/speed.py", *flags, "--data_dir", data / "brick/train/good", "--amp", "off")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    (row,) = table_of(table)
    assert row == {name: str(value) for name, value in result.items()}
    recorded = [row for row in table_of(ROOT / "results/speed.csv") if not (row["gpu"] or row["runtime"])]
    assert {name for old in recorded for name, value in old.items() if value} <= set(row)
    assert row["command"].startswith("python benchmarks/speed.py --size 32")
    assert (row["height"], row["batch_size"], row["amp"], row["compile"]) == ("32", "2", "off", "False")
    for name, value in result.items():
        if isinstance(value, float):
            assert 0 < value < 1e6, name


@needs_export
def test_runtimes_are_measured(benchmarks, data, tmp_path, monkeypatch):
    """One model in all runtimes that are installed, but for torch.compile, which takes long; what they say is the same.
    And predict.py on it."""
    speed, runtimes = benchmarks("speed"), benchmarks("runtimes")
    monkeypatch.setattr(runtimes, "BACKBONES", ("resnet18",))
    monkeypatch.setattr(runtimes, "KINDS", {"patch": runtimes.KINDS["patch"]})
    monkeypatch.setattr(runtimes, "BATCHES", {1: (1, 2), 3: (1, 1)})
    monkeypatch.setattr(runtimes, "FILES", 9)
    monkeypatch.delitem(runtimes.FORMS, "torch.compile")
    monkeypatch.setattr(runtimes.os, "cpu_count", lambda: 1)
    seen = {}

    def timed(calls, images, *args):
        pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
        for name, (whole, _) in calls.items():
            seen[name, len(images)] = np.asarray(whole(pixels)[0])
        return measured(calls, images, *args)

    measured = runtimes.timed
    monkeypatch.setattr(runtimes, "timed", timed)
    flags = [
        "--only",
        "runtimes",
        "line",
        "--size",
        48,
        "--original",
        64,
        "--repeats",
        1,
        "--results",
        tmp_path / "speed.csv",
    ]
    flags += ["--data_dir", data / "brick/train/good"]
    speed.main(speed.get_parser().parse_args(list(map(str, flags))))
    *rows, line = table_of(tmp_path / "speed.csv")
    assert line["runtime"] == "predict.py"
    rates = [float(line[f"{name}_per_second"]) for name in ("files_images", "decoding_images", "scored")]
    assert float(line["line_over_slower"]) == pytest.approx(rates[0] / min(rates[1:]), rel=1e-2)
    names = {row["runtime"] for row in rows}
    assert {"torch", "onnxruntime", "onnxruntime int8"} <= names
    assert len(rows) == 2 * len(names)
    for row in rows:
        assert 0 < float(row["bare_ms"]) < 1e5
        assert 0 < float(row["scoring_ms"]) <= float(row["scoring_p99_ms"])
        assert float(row["whole_over_bare"]) == pytest.approx(
            float(row["scoring_ms"]) / float(row["bare_ms"]), rel=1e-2
        )
    for batch in (1, 3):
        for name in names - {"torch", "onnxruntime int8", "openvino int8"}:
            assert np.allclose(seen[name, batch], seen["torch", batch], rtol=1e-3), name


@pytest.fixture
def picture():
    return torch.randint(0, 256, (1, 3, 60, 80), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize("name", ["patch", "scar"])
def test_the_conventional_way_pastes_the_same_boxes(benchmarks, picture, name):
    base = Image.fromarray(picture[0].permute(1, 2, 0).numpy())
    views = benchmarks("speed").ConventionalViews([base], "3way")
    views.jitter = lambda image: image
    drawn = VIEWS[name].draw(20, 60, 80, 1.0, torch.Generator().manual_seed(1))
    params = PasteParams(**drawn, jitter=None)
    for index in range(20):
        ours = paste_(picture / 255, picture / 255, rows(params, slice(index, index + 1)))
        ours = (ours[0] * 255).round()
        theirs = views.paste(base, {key: values[index].item() for key, values in drawn.items()})
        theirs = torch.from_numpy(np.array(theirs)).permute(2, 0, 1)
        if name == "patch":
            assert torch.equal(ours, theirs.float())
        else:  # turned the same way, by another rounding
            one, other = ((view != picture[0]).any(0) for view in (ours, theirs))
            assert (one & other).sum() > 0.6 * (one | other).sum()


@pytest.mark.parametrize("view", ["noise", "elsewhere", "soft scar"])
def test_the_conventional_way_refuses_other_views(benchmarks, monkeypatch, view):
    monkeypatch.setitem(VIEWS, "noise", View(VIEWS["patch"].draw, lambda *_: None, "noise", "#000000"))
    monkeypatch.setitem(VARIANTS, "new", Variant(("image", "patch", view), ""))
    with pytest.raises(ValueError, match=view):
        benchmarks("speed").ConventionalViews([Image.new("RGB", (40, 40))], "new")


# The machine ------------------------------------------------------------------------------------------------------


def test_doctor_prints_ten_lines_with_what_this_machine_has(benchmarks, script, monkeypatch):
    monkeypatch.setattr(benchmarks("doctor"), "IMAGES", 8)
    done = script("doctor")
    assert done.code == 0, done.err
    said = dict(line.split(":", 1) for line in done.out.splitlines())
    names = ["Python", "torch", "device", "precision", "compiler", "weights", "disk", "memory", "step", "image"]
    assert list(said) == names
    assert sys.version.split()[0] in said["Python"]
    assert torch.__version__ in said["torch"]
    for name in ("step", "image"):
        assert 0 < float(said[name].split(" s ")[0]) < 600
