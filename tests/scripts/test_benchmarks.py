"""The benchmarks: each runs, a row keeps its digits, tables are filled wherever a document shows them."""

import csv
import importlib
import json
import os
import shutil
import statistics

import numpy as np
import pandas
import pytest
import torch
from conftest import ROOT, TINY, fork, one_line, run
from PIL import Image

from config import Config, PatchConfig
from cutpaste import VARIANTS, VIEWS, Variant, View, rows
from dataset import load_test, load_train
from detector import Detector, initial_network, save
from image_ops import PasteParams, paste
from reporting.metrics import image_metrics


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    """Lets the benchmarks be imported by name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def table_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


GOOD = {"a0": 1, "a1": 2, "b0": 11}
BAD = {"b4": 10, "a2": 1.5, "a3": 4, "b2": 12, "b3": 13}  # by area

# Rows -------------------------------------------------------------------------------------------------------------


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
    for each in (module, benchmarks("trials"), benchmarks("paper")):
        monkeypatch.setattr(each, "ROOT", tmp_path)
    return module


def cells_of(table):
    """The cells of a table, line by line, as text."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]


def test_every_table_is_filled_where_it_is_shown(tables, script, tmp_path):
    one_line(script("tables", "check"), "README.md", "tables.py write")
    assert script("tables", "write").code == 0
    assert script("tables", "check").code == 0
    readme, results = (tmp_path / name for name in ("README.md", "docs/results.md"))
    for name, make in tables.TABLES.items():
        path = readme if name == "results" else results
        assert f"Before {name}.\n<!-- table: {name} -->\n{make()}\n<!-- end of table -->\nAfter.\n" in path.read_text()
    assert (tmp_path / "docs/none.md").read_text() == "No table.\n"
    results.write_text(results.read_text().replace("steps per second", "updates per second"))
    one_line(script("tables", "check"), "docs/results.md")


def test_a_table_that_is_unknown_endless_or_nowhere(tables, script, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(marked("image", "spped"))
    before = (tmp_path / "docs/results.md").read_text()
    for command in ("write", "check"):
        one_line(script("tables", command), "README.md", "'spped'", "speed")
    assert (tmp_path / "docs/results.md").read_text() == before  # all or none
    readme.write_text("<!-- table: image -->\n" + marked("results"))
    one_line(script("tables", "write"), "README.md", "'image'", "end of table")
    readme.write_text("No table.\n")
    assert script("tables", "write").code == 0
    one_line(script("tables", "check"), "'results'")


def test_tables_show_the_deviation_of_several_seeds(tables):
    several = pandas.Series([0.25, 0.5, 0.75])
    assert tables.spread(several) == "50.0 ± 25.0"
    assert tables.spread(several[:1]) == "25.0"
    assert tables.spread(pandas.Series([float("nan")])) == ""


def shown_rows(path):
    """The rows of results/recipe.csv that the README's table of results is made of."""
    fast = {"recipe": "fast", "minutes": "10.0", "note": "", "device": "AMD EPYC", "patch_size": "48"}
    fast |= {"batch_size": "28"}
    return [row for row in table_of(path) if all(row[name] == value for name, value in fast.items())]


def tuned_rows(path):
    """Those of results/transfer.csv that it shows beside them."""
    tuned = {"backbone": "mobilenet_v2", "recipe": "finetune", "patch_size": "64.0", "level": "2,3", "epochs": "185"}
    tuned["invisible"] = "keep"
    return [row for row in table_of(path) if all(row[name] in (value, "64") for name, value in tuned.items())]


def test_the_results_are_those_of_the_fast_recipe(tables, tmp_path):
    """Rows with other settings or budgets, or of another device, are not mixed in."""
    path = tmp_path / "results/recipe.csv"
    rows = shown_rows(path)
    before = tables.results_table()
    for change in ({"minutes": "5.0"}, {"minutes": ""}, {"note": "old"}, {"device": "other"}, {"recipe": "paper"}):
        tables.append(rows[0] | {"image_auroc": "0.1", "seed": "9"} | change, path)
    for change in ({"patch_size": "64"}, {"batch_size": "16"}):
        tables.append(rows[0] | {"image_auroc": "0.1", "seed": "9"} | change, path)
    assert tables.results_table() == before
    head, _, *found = cells_of(before)
    paper = {"IMAGE": tables.published("3way"), "PIXEL": tables.published("3way patches", "pixel_auroc")}
    paper["OTHER"] = tables.published("3way", source="re-implementation")
    names = ["category", "seeds", "image AUROC", "untrained", "fine-tuned", "paper", "re-impl."]
    assert head == [*names, "pixel AUROC", "untrained", "paper", "AUPRO"]
    tuned = tuned_rows(ROOT / "results/transfer.csv")
    columns = ("image_auroc", "control_auroc", "TUNED", "IMAGE", "OTHER")
    columns += ("pixel_auroc", "control_pixel_auroc", "PIXEL", "aupro")
    assert len(found) == len({row["category"] for row in rows}) >= 8
    for category, count, *cells in found:
        own = [row for row in rows if row["category"] == category]
        assert int(count) == len({row["seed"] for row in own}) == len(own)
        shown = iter(cells)
        for name in columns:
            cell, source = next(shown), own
            if name == "TUNED":
                source, name = [row for row in tuned if row["category"] == category], "image_auroc"
            if name.isupper():
                assert cell == (f"{100 * paper[name][category]:.1f}" if category in paper[name] else "")
                continue
            values = [100 * float(row[name]) for row in source if row[name]]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            assert cell == (f"{statistics.mean(values):.1f}{spread}" if values else "")


@pytest.mark.parametrize(
    ("name", "table"), [("recipe", "recipe"), ("recipe", "results"), ("pixel", "pixel"), ("maps", "maps")]
)
def test_the_newest_row_of_a_setting_counts(tables, tmp_path, name, table):
    path = tmp_path / f"results/{name}.csv"
    before, first = tables.TABLES[table](), (shown_rows(path) if table == "results" else table_of(path))[0]
    tables.append(first | {"pixel_auroc": "0.1", "torch": "9.9", "density": "", "location": "each"}, path)
    changed = tables.TABLES[table]()
    assert changed != before
    assert len(changed.splitlines()) == len(before.splitlines())
    tables.append(first | {"torch": "9.10"}, path)
    assert tables.TABLES[table]() == before


# Measurements -----------------------------------------------------------------------------------------------------


def test_the_benchmark_of_speed_runs(data, tmp_path):
    table = tmp_path / "speed.csv"
    flags = ["--size", 32, "--original", "48x40", "--batch_size", 2, "--repeats", 1, "--results", table]
    done = fork("benchmarks/speed.py", *flags, "--data_dir", data / "brick/train/good", "--amp", "off")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    (row,) = table_of(table)
    assert row == {name: str(value) for name, value in result.items()}
    assert set(row) == set(table_of(ROOT / "results/speed.csv")[0])
    assert row["command"].startswith("python benchmarks/speed.py --size 32")
    assert (row["height"], row["batch_size"], row["amp"], row["compile"]) == ("32", "2", "off", "False")
    for name, value in result.items():
        if isinstance(value, float):
            assert 0 < value < 1e6, name


def test_the_benchmark_of_invisible_views_runs(script, data, tmp_path):
    table = tmp_path / "invisible.csv"
    flags = ["--data_dir", data, "--type", "brick", "--size", 32, "--patch_size", 32, "--results", table]
    assert script("invisible", *flags).code == 0
    rows = table_of(table)
    assert set(rows[0]) == set(table_of(ROOT / "results/invisible.csv")[0])
    kinds = [(row["patch_size"], row["variant"], row["view"]) for row in rows]
    views = [(variant, view) for variant in ("3way", "soft") for view in VARIANTS[variant].views[1:]]
    assert kinds == [(side, *view) for side in ("32", "") for view in views]
    assert all(0 <= float(row["share"]) < 1 for row in rows)


def test_a_curve_starts_untrained_and_ends_at_the_detector(script, benchmarks, data, tmp_path, monkeypatch):
    models, table = tmp_path / "models", tmp_path / "curve.csv"
    where = ["--data_dir", data, "--model_dir", models, "--type", "brick"]
    results = tmp_path / "Eval/models/results.csv"
    for name, more in (
        ("run_training", [*TINY, "--logdir", tmp_path / "logdirs", "--test_epochs", 5]),
        ("eval", ["--eval_dir", tmp_path / "Eval", "--save_plots", 0, "--control", 1]),
        ("curve", ["add", tmp_path / "logdirs/models", results, "--results", table]),
    ):
        done = script(name, *([] if name == "curve" else where), *more)
        assert done.code == 0, done.err
    rows, (found,) = table_of(table), table_of(results)
    assert [row["step"] for row in rows] == ["0", "5", "10", "12"]
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds)
    assert 0 < seconds[-1] < 60
    assert float(rows[0]["image_auroc"]) == float(found["control_auroc"])
    assert [row["accuracy"] == "" for row in rows] == [True, True, False, False]  # logged every ten steps
    assert 0 < float(rows[-1]["accuracy"]) < 1
    assert float(rows[-1]["image_auroc"]) == pytest.approx(float(found["image_auroc"]), abs=1e-6)
    monkeypatch.setattr(benchmarks("curve"), "ROOT", tmp_path)
    (tmp_path / "images").mkdir()
    assert script("curve", "draw", "--results", table).code == 0
    assert (tmp_path / "images/curve.png").read_bytes().startswith(b"\x89PNG")
    one_line(script("curve", "add", tmp_path, tmp_path / "none.csv"), "none.csv")


def test_curves_of_two_recipes():
    """A line for each category, recipe and measure, through the points that have it."""
    from curve import curves

    rows = [("lid", "fast", 0, 0.5, None), ("lid", "fast", 60, None, 0.4), ("lid", "fast", 120, 0.9, 0.8)]
    rows += [("cap", "fast", 60, 0.7, 0.6), ("lid", "paper", 60, 0.6, 0.5)]
    figure = curves(
        pandas.DataFrame(rows, columns=["category", "recipe", "seconds", "image_auroc", "accuracy"]).assign(seed=0)
    )
    assert [[line.get_xydata().tolist() for line in axes.lines] for axes in figure.axes] == [
        [[[0, 50], [2, 90]], [[1, 60]]],
        [[[1, 70]]],
        [[[1, 40], [2, 80]], [[1, 50]]],
        [[[1, 60]]],
    ]
    assert [text.get_text() for text in figure.axes[1].get_legend().get_texts()] == ["fast", "paper"]


@pytest.fixture
def picture():
    return torch.randint(0, 256, (1, 3, 60, 80), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize("name", ["patch", "scar"])
def test_the_conventional_way_pastes_the_same_boxes(benchmarks, picture, name):
    base = Image.fromarray(picture[0].permute(1, 2, 0).numpy())
    views = benchmarks("conventional").ConventionalViews([base], "3way")
    views.jitter = lambda image: image
    drawn = VIEWS[name].draw(20, 60, 80, 1.0, torch.Generator().manual_seed(1))
    params = PasteParams(**drawn, jitter=None)
    for index in range(20):
        ours = (paste(picture / 255, rows(params, slice(index, index + 1)))[0] * 255).round()
        theirs = views.paste(base, {key: values[index].item() for key, values in drawn.items()})
        theirs = torch.from_numpy(np.array(theirs)).permute(2, 0, 1)
        if name == "patch":
            assert torch.equal(ours, theirs.float())
        else:  # turned the same way, by another rounding
            one, other = ((each != picture[0]).any(0) for each in (ours, theirs))
            assert (one & other).sum() > 0.6 * (one | other).sum()


@pytest.mark.parametrize("view", ["noise", "elsewhere", "soft scar"])
def test_the_conventional_way_refuses_other_views(benchmarks, monkeypatch, view):
    monkeypatch.setitem(VIEWS, "noise", View(VIEWS["patch"].draw, lambda *_: None, "noise", "#000000"))
    monkeypatch.setitem(VARIANTS, "new", Variant(("image", "patch", view), ""))
    with pytest.raises(ValueError, match=view):
        benchmarks("conventional").ConventionalViews([Image.new("RGB", (40, 40))], "new")


def test_areas_of_defects_and_groups(script, tmp_path):
    """Two groups of images, one with higher scores throughout: 11 of all 15 pairs are in order, 5 of the 7 within."""
    holes, table, folder = tmp_path / "Data/lid/ground_truth/hole", tmp_path / "areas.csv", tmp_path / "Eval"
    holes.mkdir(parents=True)
    folder.mkdir()
    lines = ["category,path,label,score", *(f"lid,lid/test/good/{name}.png,0,{v}" for name, v in GOOD.items())]
    for side, (name, value) in enumerate(BAD.items(), start=2):
        mask = np.zeros((20, 20), np.uint16)
        mask[1 : 1 + side, 2 : 2 + side] = 1  # a mask is what is not black, however dark
        Image.fromarray(mask).save(holes / f"{name}_mask.png")
        lines.append(f"lid,lid/test/hole/{name}.png,1,{value}")
    (folder / "scores.csv").write_text("\n".join(lines))
    (folder / "results.csv").write_text("category,seed,train_command\nlid,7,python run_training.py\n")
    flags = [folder, "--data_dir", tmp_path / "Data", "--results", table, "--type"]
    done = script("areas", *flags, "lid", "--group", "^(.)")
    assert done.code == 0, done.err
    rows = table_of(table)
    assert [(row["part"], row["least_area"], row["most_area"], row["anomalous"]) for row in rows] == [
        ("all", "", "", "5"),
        ("smallest quarter", "4", "9", "2"),
        ("second quarter", "16", "16", "1"),
        ("third quarter", "25", "25", "1"),
        ("largest quarter", "36", "36", "1"),
        ("within groups", "", "", "5"),
        ("group a", "", "", "2"),
        ("group b", "", "", "3"),
    ]
    expected = [11 / 15, 3 / 6, 2 / 3, 3 / 3, 3 / 3, 5 / 7, 3 / 4, 2 / 3]
    assert [float(row["image_auroc"]) for row in rows] == pytest.approx(expected)
    assert {(row["seed"], row["train_command"]) for row in rows} == {("7", "python run_training.py")}
    one_line(script("areas", *flags, "lid", "--group", "(...)"), "no group has both normal and anomalous test images")
    one_line(script("areas", *flags, "lid", "--group", "(x)"), "lid/test/good/a0.png", "finds nothing in its name")
    one_line(script("areas", *flags, "cap"), "no category cap")
    one_line(script("areas", tmp_path / "none", *flags[1:], "lid"), "none: no scores.csv", "eval.py writes them")
    for pattern in ("(", "a", "(a)(b)"):
        assert script("areas", *flags, "lid", "--group", pattern).code == 2
    for name in ("a3", "b3"):
        (holes / f"{name}_mask.png").unlink()
    one_line(script("areas", *flags, "lid"), "lid: 3 anomalous images with a mask, 4 are needed")


def test_the_benchmark_of_maps_runs(script, data, tmp_path):
    """Every combination that can be is a row; the others are left out."""
    models, table = tmp_path / "models", tmp_path / "maps.csv"
    for category, patches in (("brick", PatchConfig(32, window=8)), ("grass", None)):
        config = Config(category, height=32, width=32, pretrained=False, patches=patches)
        made = Detector(config, [initial_network(config)]).fit(load_train(data, category, (32, 32), 0).images)
        made.metadata = {"command": "python run_training.py"}
        models.mkdir(exist_ok=True)
        save(made, models / f"{category}.pt")
    flags = ["--data_dir", data, "--model_dir", models, "--results", table, "--workers", 0, "--repeats", 1]
    flags += ["--level", "1", "1,2", "--density", "torch", "kde", "--location", "each", "--dims", 16]
    one_line(script("maps", *flags), "grass.pt", "no patch model")
    done = fork("benchmarks/maps.py", *flags, "--type", "brick")
    assert done.code == 0, done.err
    found = table_of(table)
    assert [(row["level"], row["location_chosen"], row["dims"]) for row in found] == [
        ("1", "each", "16"),
        ("1,2", "each,each", "16,16"),
    ]
    for level in ("1", "1,2"):
        assert f"brick --level {level} --location each --dims 16 --density kde: left out: --density: kde" in done.err
    for row in found:
        assert 0 < float(row["pixel_auroc"]) < 1
        assert 0 < float(row["seconds_per_image"]) < 10
        assert 0 < float(row["fit_seconds"]) < 100
        assert 0 < float(row["fit_threshold_seconds"]) < 100
        assert 40 < float(row["file_mb"]) < 60
        assert 200 < float(row["peak_mb"]) < 10_000
        assert row["bench_command"].startswith("python benchmarks/maps.py --data_dir")
        assert row["train_command"] == "python run_training.py"


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="measures by os.wait4")
def test_the_benchmark_of_memory_runs(tmp_path):
    table, place = tmp_path / "memory.csv", tmp_path / "place"
    flags = ["--count", 40, 20, "--steps", 2, "--size", 32, "--results", table, "--folder", place, "--note", "a, b"]
    done = run("benchmarks/memory.py", *flags)
    assert done.code == 0, done.err
    result = json.loads(done.out)
    runs = [*result["mapped"], result["in_memory"]]
    assert [(r["images"], r["memory_gb"], r["decoded_mb"]) for r in runs] == [
        (20, 0, 0.061),
        (40, 0, 0.123),
        (40, 1, 0.123),
    ]
    held = "anonymous_mb" if os.path.exists("/proc/self/status") else "peak_mb"
    for r in runs:
        assert 100 < r[held] <= r["peak_mb"] < 10_000
        assert 0 < r["steps_per_second"] < 1000
        assert r["steps"] == 2
        assert r["command"].startswith("python benchmarks/memory.py --count 40 20 --steps 2")
        assert r["note"] == "a, b"
    growth = runs[1][held] - runs[0][held]
    assert result["peak_growth_mb"] == pytest.approx(growth, abs=0.1)
    assert [{name: str(value) for name, value in r.items()} for r in runs] == table_of(table)
    assert not list(place.iterdir())


def test_members_are_measured_beside_their_detector(script, data, tmp_path):
    models, table = tmp_path / "models", tmp_path / "members.csv"
    models.mkdir()
    made = {}
    for category, folds in (("brick", 3), ("grass", 1)):
        config = Config(category, height=32, width=32, pretrained=False, folds=folds)
        networks = [initial_network(config, member=number) for number in range(folds)]
        made[category] = Detector(config, networks).fit(load_train(data, category, (32, 32), 0).images)
        made[category].metadata = {"command": "python run_training.py", "device": "x", "amp": "off", "torch": "3"}
        save(made[category], models / f"{category}.pt")
    flags = [models, "--data_dir", data, "--results", table, "--note", "a note", "--type"]
    one_line(script("members", *flags, "grass"), "grass has one network", "--folds")
    assert script("members", *flags, "brick").code == 0
    (row,) = table_of(table)
    test = load_test(data, "brick", (32, 32), 0)
    alone = [
        image_metrics(test.labels, member(test.images)[0].detach().numpy())["image_auroc"]
        for member in made["brick"].members
    ]
    assert [float(value) for value in row["members"].split()] == pytest.approx(alone, abs=1e-4)
    assert float(row["members_mean"]) == pytest.approx(sum(alone) / 3)
    expected = image_metrics(test.labels, made["brick"](test.images)[0].detach().numpy())["image_auroc"]
    assert float(row["ensemble"]) == pytest.approx(expected)
    assert (row["folds"], row["train_device"], row["note"]) == ("3", "x", "a note")


def test_the_tables_of_pretrained_networks_take_the_mean_of_seeds(monkeypatch, tmp_path):
    import transfer

    (tmp_path / "results").mkdir()
    head = "category,backbone,pretrained,patch_size,width,features,level,epochs,batch_size,optim,lr,lr_unfrozen,"
    head += "freeze_bn,seed,image_auroc,pixel_auroc"
    rows = [
        "grid,b0,True,,128,pool,,185,24,adam,0.001,0.0001,True,0,0.9,",
        "grid,b0,True,,128,pool,,185,24,adam,0.001,0.0001,True,1,0.7,",
        "grid,b0,True,,128,pool,,185,24,adam,0.001,0.0001,True,1,0.8,",
        'screw,b0,True,64,256,level,"2,3",0,24,adam,0.001,,True,0,0.6,0.5',
    ]
    (tmp_path / "results/transfer.csv").write_text("\n".join([head, *rows]))
    monkeypatch.setattr(transfer, "ROOT", tmp_path)
    image, pixel = (transfer.transfer_table(column).splitlines()[2:] for column in ("image_auroc", "pixel_auroc"))
    steps = "185 steps of 24, adam 0.001, then 0.0001, BatchNorm frozen"
    assert image == [
        f"| b0 | ImageNet | image | 128 | {steps} | pool | 2 |  |  | 85.0 ± 7.1 |  |",
        "| b0 | ImageNet | crops of 64 px | 256 | as it is | level 2,3 | 1 |  | 60.0 |  |  |",
    ]
    assert pixel == ["| b0 | ImageNet | crops of 64 px | 256 | as it is | level 2,3 | 1 |  | 50.0 |  |  |"]
