"""The commands that measure what stands next to the paper, and the tables of what they found."""

import importlib
import os
import re
import shlex
import shutil
import statistics
import subprocess
from pathlib import Path

import pandas
import pytest
from conftest import ROOT

from config import config_of
from runtime.files import InputError

SCRIPT = ROOT / "benchmarks/reproduce.sh"
SECTIONS = ["frozen", "patches", "ensemble", "finetune", "steps10000", "steps65536"]
NAME = r"eval\.py --model_dir reproduce/(.*?) --cuda "


pytestmark = pytest.mark.usefixtures("benchmarks")


def reproduce(*flags, script=SCRIPT, **env):
    return subprocess.run(
        ["bash", script, *map(str, flags)], capture_output=True, text=True, timeout=60, env=os.environ | env
    )


def printed(*flags):
    """The lines of a dry run."""
    done = reproduce("--dry_run", *flags)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def accepted(line):
    """The flags of a command, by the parser of its own script."""
    words = shlex.split(line)
    at = 1 if words[0] == "python" else 3
    assert words[:at] in (["python"], ["torchrun", "--nproc_per_node", "4"])
    return importlib.import_module(Path(words[at]).stem).get_parser().parse_args(words[at + 1 :])


# Commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["--gpus", 4, "--data_dir", "all my/Data"], ["--gpus", 0]])
@pytest.mark.parametrize("section", SECTIONS)
def test_every_command_is_accepted(section, flags):
    head, *lines, last = printed(*flags, section)
    assert (head, last) == (f"# {section}", "python benchmarks/tables.py write")
    trained = None
    for line in lines:
        args = accepted(line)
        if "run_training.py" in line:
            trained = args.model_dir
            config = config_of(args, "bottle")
            assert (config.height, config.width, args.test_epochs) == (256, 256, -1)
            assert config.patches is None or section == "patches"
        if "run_training.py" in line or "eval.py" in line:
            assert args.model_dir == trained
            assert args.cuda == (0 not in flags)
            assert args.data_dir == ("all my/Data" if 4 in flags else "Data")
            assert line.startswith("torchrun") == (4 in flags)
        else:
            name = trained.removeprefix("reproduce/")
            assert line == f"python benchmarks/tables.py add Eval/{name}/results.csv results/paper.csv"


def test_each_command_has_a_folder_of_its_own():
    lines = printed()
    assert [line[2:] for line in lines if line.startswith("# ")] == SECTIONS
    text = "\n".join(lines)
    folders = re.findall(r"run_training\.py --model_dir (\S+) ", text)
    assert len(folders) == len(set(folders)) == 9
    assert not re.search(r"[ =]/", text)  # no path of one machine
    assert re.search(r"10000_3way .*--no-pretrained --variant 3way --epochs 10000 --seed 0,1,2,3,4\n", text)
    assert printed("ensemble", "frozen")[0] == "# ensemble"


def test_the_documented_commands_run():
    for page in ROOT.glob("docs/*.md"):
        for line in re.findall(r"^bash benchmarks/reproduce.sh(.*)$", page.read_text(), re.M):
            assert printed(*line.split())


@pytest.mark.parametrize(
    ("flags", "words"), [(["steps"], SECTIONS), (["--gpus"], ["--gpus"]), (["--gpus", "two"], ["two"])]
)
def test_wrong_usage_is_named(flags, words):
    done = reproduce(*flags)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    for word in ["reproduce.sh: error:", *words]:
        assert word in line


def test_help_names_every_section_and_flag():
    done = reproduce("--help")
    assert done.returncode == 0
    for word in (*SECTIONS, "--dry_run", "--gpus", "--data_dir"):
        assert word in done.stdout
    assert "set -" not in done.stdout


@pytest.fixture
def copy(tmp_path):
    """The script in a folder with two categories, and a python on the PATH that only notes what it is asked to do, and
    fails at what FAIL names. Returns what it noted in a run, and the exit code."""
    for name in ("cap", "lid"):
        (tmp_path / f"Data/{name}/train/good").mkdir(parents=True)
    for name in ("benchmarks", "bin", "results"):
        (tmp_path / name).mkdir()
    shutil.copy(SCRIPT, tmp_path / "benchmarks")
    python, noted = tmp_path / "bin/python", tmp_path / "noted"
    python.write_text(f'#!/bin/sh\necho "$@" >> {noted}\ncase "$*" in *"$FAIL"*) exit 3;; esac\n')
    python.chmod(0o755)

    def call(*flags, fail="nothing"):
        noted.write_text("")
        path = f"{python.parent}:{os.environ['PATH']}"
        done = reproduce(*flags, script=tmp_path / "benchmarks/reproduce.sh", PATH=path, FAIL=fail)
        return noted.read_text().splitlines(), done.returncode

    return call


def test_what_is_measured_is_not_measured_again(copy, tmp_path):
    done, code = copy("finetune")
    scripts = ["run_training.py", "eval.py", "benchmarks/tables.py"]
    assert [line.split()[0] for line in done] == [*scripts, *scripts[1:], scripts[2]]
    assert (done[-1], code) == ("benchmarks/tables.py write", 0)
    rows, pool = ["category,train_command,eval_command"], "reproduce/finetune_b4 --features pool"
    for category, model_dir, expected in (
        ("cap", "reproduce/finetune_b4", done),  # lid is missing
        ("lid", "reproduce/finetune_b4", [done[0], *done[3:]]),
        ("cap", pool, [done[0], *done[3:]]),
        ("lid", pool, done[-1:]),
    ):
        train = "python run_training.py --model_dir reproduce/finetune_b4 --cuda 1 --seed 0,1"
        rows.append(f'{category},"{train}",python eval.py --model_dir {model_dir} --cuda 1 --control 1')
        (tmp_path / "results/paper.csv").write_text("\n".join(rows) + "\n")
        assert copy("finetune") == (expected, 0)
    assert len(copy()[0]) == len([line for line in printed() if line[0] != "#"]) - 5
    assert len(copy("--dry_run", "finetune")[0]) == 0


def test_a_failure_ends_it(copy):
    done, code = copy("ensemble", "patches", fail="eval.py")
    assert [line.split()[0] for line in done] == ["run_training.py", "eval.py"]
    assert code == 3


# Tables -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def paper(benchmarks, monkeypatch, tmp_path):
    """The module, on a folder of results with the published figures alone."""
    (tmp_path / "results").mkdir()
    shutil.copy(ROOT / "results/published.csv", tmp_path / "results")
    module = benchmarks("tables")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def cells_of(table):
    """Cells by row and column of a table."""
    head, _, *lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return {cells[0]: dict(zip(head[1:], cells[1:])) for cells in lines}


def test_the_published_figures_average_to_the_published_averages(paper):
    """Up to the rounding of what is averaged."""
    known = {"normal": 90.9, "scar": 93.5, "3way": 95.2, "ensemble": 96.1}
    for source, averages in {"paper": known, paper.OTHER: {"normal": 88.3, "scar": 89.1, "3way": 91.0}}.items():
        for variant, average in averages.items():
            values = paper.published(variant, source=source)
            assert len(values) == 15
            assert 100 * statistics.mean(values.values()) == pytest.approx(average, abs=0.1)
    values = paper.published("3way patches", "pixel_auroc")
    assert values.keys() == paper.published("3way").keys()
    assert 100 * statistics.mean(values.values()) == pytest.approx(96.0, abs=0.1)


def test_the_tables_show_what_is_measured(paper):
    """Every run, by the name that it has in the commands."""
    found = re.findall(NAME, "\n".join(printed()))
    assert sorted(found) == sorted([*paper.RUNS, "patches"])
    for line in paper.RUNS.values():
        assert line[1] == "" or paper.published(line[1])


def row(run, category, seed, image, **more):
    commands = {
        "train_command": f"train {run.split()[0]}",
        "eval_command": f"python eval.py --model_dir reproduce/{run}",
    }
    commands["eval_command"] += " --cuda 1 --control 1 --save_plots 0"
    made = {"device": "GPU", "torch": "2.9", "train_seconds": 360.0, "eval_date": "2026-03-02T10:00"}
    return {"category": category, "seed": seed, "image_auroc": image, **commands, **made, **more}


def test_means_errors_and_averages(paper, tmp_path):
    rows = [row("10000_3way", "bottle", 0, 0.1)]  # measured again below
    for number, category in enumerate(paper.published("3way")):
        rows += [row("10000_3way", category, 0, 0.9, control_auroc=0.5), row("10000_3way", category, 1, 0.94)]
        if number:
            rows.append(row("10000_3way", category, 2, 0.2))  # not every category: in no average
        rows.append(row("patches", category, 0, 0.8, pixel_auroc=0.97, control_pixel_auroc=0.9, aupro=0.91))
    rows += [row("frozen_b4", "screw", 0, 0.61, eval_date="2026-02-01T10:00", device="CPU")]
    rows += [row("frozen_b4 --features pool", "screw", 0, 0.72), row("10000_3way", "brick", 0, 0.3)]
    rows.append({**row("x", "screw", 0, 0.3), "eval_command": "python eval.py --model_dir models --cuda 1"})
    pandas.DataFrame(rows).to_csv(tmp_path / "results/paper.csv", index=False)

    table = cells_of(paper.paper_table())
    assert "ensemble" not in table["carpet"]  # a column of nothing is left out
    assert list(table) == [*paper.published("3way"), "average"]
    assert table["carpet"]["10,000 steps"] == "92.0 ± 2.0 (2)"
    assert table["bottle"]["10,000 steps"] == "68.0 ± 24.0 (3)"
    assert table["average"]["10,000 steps"] == "92.0 ± 2.0 (2)"
    assert table["screw"]["frozen B4"] == "61.0 (1)"
    assert table["average"]["frozen B4"] == table["bottle"]["frozen B4"] == ""
    assert (table["carpet"]["paper, 3-way"], table["average"]["re-impl., 3-way"]) == ("93.1", "91.0")

    runs = cells_of(paper.paper_runs_table())
    assert list(runs["3-way, 10,000 steps"].values()) == ["95.2", "91.0", "92.0 ± 2.0 (2)", "50.0 (1)"]
    assert list(runs["EfficientNet-B4 as it is, level 7"].values()) == ["96.8", "", "", ""]
    for category in ("zipper", "average"):
        assert table[category]["patch model"] == "80.0 (1)"
        assert list(table[category].values())[-3:] == ["97.0 (1)", "90.0 (1)", "91.0 (1)"]
    hours = (15 * 2 + 14 + 15 + 1 + 1) * 0.1  # of two evaluations of one training once
    made = f"Hardware: CPU, GPU; torch 2.9; {hours:.1f} hours of training; evaluated 2026-02-01 to 2026-03-02."
    assert paper.paper_made() == made


def test_runs_with_other_settings_are_not_mixed(paper, tmp_path):
    rows = [row("10000_3way", "bottle", seed, 0.9, epochs=10000 + seed) for seed in (0, 1)]
    pandas.DataFrame(rows).to_csv(tmp_path / "results/paper.csv", index=False)
    with pytest.raises(InputError, match="differ in epochs"):
        paper.paper_table()


@pytest.mark.parametrize("text", [None, "", "category,seed,image_auroc,eval_command\n"])
def test_nothing_is_measured_yet(paper, tmp_path, text):
    if text is not None:
        (tmp_path / "results/paper.csv").write_text(text)
    for name, cells in cells_of(paper.paper_table()).items():
        assert list(cells) == ["paper, 3-way", "re-impl., 3-way", "paper, pixel AUROC"], name
        assert all(re.fullmatch(r"\d+\.\d", cell) for cell in cells.values())
    assert {(cells["here"], cells["untrained"]) for cells in cells_of(paper.paper_runs_table()).values()} == {("", "")}
    assert paper.paper_made() == "Nothing has been measured yet."
