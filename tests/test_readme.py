"""What the README promises: commands are accepted, steps run, tables are the files'. And the order of imports."""

import ast
import csv
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, one_line, run, train

README = (ROOT / "README.md").read_text()
ORDER = [
    *["cutpaste", "density", "metrics", "cache", "dataset", "model", "localization", "gradcam", "detector", "plots"],
    *["ranks", "options", "training", "eval", "run_training", "predict", "export", "prepare_data"],
]
MISSION = (
    "python run_training.py --model_dir models --head_layer 2",
    "python run_training.py --model_dir models --head_layer 2 --cuda 1",
    "python eval.py --model_dir models --head_layer 2",
    "python eval.py --density torch --cuda 1 --head_layer 2 --save_plots 0 | grep AUC",
    "python eval.py --density sklearn --cuda 1 --head_layer 2 --save_plots 0 | grep AUC",
    "python run_training.py --epochs 10000 --test_epochs 32 --no-pretrained --cuda 1 --head_layer 1 --batch_size 32 "
    "--variant normal",
    "python run_training.py --epochs 10000 --test_epochs 32 --no-pretrained --cuda 1 --head_layer 1 --batch_size 32 "
    "--variant scar",
    "python run_training.py --epochs 10000 --test_epochs -1 --no-pretrained --cuda 1 --head_layer 1 --batch_size 32 "
    "--variant 3way",
)


def commands(text):
    """The shell commands of a text's sh blocks, continued lines joined."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.S)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def parsed(command):
    """A command's flags, by the parser of its own script."""
    words = shlex.split(command.split("|")[0])
    assert words[0] == "python"
    return importlib.import_module(words[1].removesuffix(".py")).get_parser().parse_args(words[2:])


def test_every_command_of_the_readme_is_accepted():
    found = [re.sub(r"^torchrun (--[\w-]+ \d+ )*", "python ", command) for command in commands(README)]
    scripts = [c for c in found if re.match(r"python \w+\.py", c)]
    assert len(scripts) >= 12
    for command in scripts:
        parsed(command)
    for command in set(found) - set(scripts):
        program = command.split()[0]
        assert program in ("make", "tensorboard", "source") or command.startswith("python benchmarks/"), command


def test_the_commands_people_know_are_in_the_readme_and_mean_what_they_meant():
    for command in (*MISSION[:1], *MISSION[2:]):
        assert command in commands(README), command
    assert "tensorboard --logdir logdirs" in commands(README)
    for command in MISSION:
        args = parsed(command)
        assert args.cuda == ("--cuda 1" in command)
        if "run_training" in command:
            assert args.pretrained == ("--no-pretrained" not in command)
            assert args.epochs == 10000
            assert args.batch_size == 32


@pytest.fixture(scope="module")
def workplace(data, tmp_path_factory):
    """A folder with a small Data/ in it, and the file that torchvision's download of its weights would leave."""
    from torchvision.models import ResNet18_Weights, resnet18

    folder = tmp_path_factory.mktemp("workplace")
    for name in ("brick", "grass"):
        shutil.copytree(data / name, folder / "Data" / name)
    cache = folder / "torch/hub/checkpoints"
    cache.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(resnet18().state_dict(), cache / ResNet18_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1])
    return folder


SMALL = {"run_training.py": ["--epochs", "3", "--size", "32"], "eval.py": []}
# the networks that the first four commands are about stay apart from those of the others
ELSEWHERE = {"normal": "normal", "scar": "scar", "3way": "3way"}


def test_the_commands_people_know_do_their_work(workplace):
    """As written, on a small Data/, with added flags for steps and size, and without the GPU where there is none."""
    home = {"TORCH_HOME": str(workplace / "torch")}
    for command in MISSION:
        if command == MISSION[1]:
            continue  # the first on another device: its result is there already
        words = shlex.split(command.split("|")[0])[1:]
        more = list(SMALL[words[0]])
        variant = parsed(command).variant
        if variant in ELSEWHERE and "--variant" in command:
            more += ["--model_dir", f"models_{variant}"]
        if "--cuda" in words and not torch.cuda.is_available():
            one_line(run(*words, *more, cwd=workplace, **home), "--cuda 1")
            more += ["--cuda", "0"]
        done = run(*words, *more, cwd=workplace, **home)
        assert done.code == 0, done.err
        if words[0] == "eval.py":
            assert [line.split(" AUC: ")[0] for line in done.out.splitlines()] == ["brick", "grass", "average"]
            assert (workplace / "Eval/models/results.csv").is_file()
            if "--save_plots" not in words:
                assert (workplace / "Eval/models/brick/roc.png").is_file()
        else:
            folder = workplace / (f"models_{variant}" if "--variant" in command else "models")
            assert sorted(p.name for p in folder.iterdir()) == ["brick.pt", "grass.pt"]
    assert list((workplace / "logdirs/models/brick").glob("events.out.tfevents*"))


def test_the_way_of_the_data_runs(data, tmp_path, monkeypatch):
    """The README's walk through the modules, executed."""
    (tmp_path / "Data").symlink_to(data)
    monkeypatch.chdir(tmp_path)
    block = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    values: dict = {}
    exec(block.replace("bottle", "brick").replace("(256, 256)", "(32, 32)"), values)
    assert values["scores"].shape == (12,)
    assert (tmp_path / "walk/brick.pt").is_file()


def test_tables_are_what_the_files_say():
    done = subprocess.run([sys.executable, ROOT / "benchmarks/tables.py", "check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_row_is_added_once_with_its_digits_and_columns(tmp_path):
    source, target = tmp_path / "new.csv", tmp_path / "kept/all.csv"
    source.write_text("name,side,value\nbrick,64,0.38501262687347226\ngrass,,0.10000000000000002\n")
    target.parent.mkdir()
    target.write_text("name,value\ngravel,0.30000000000000004\n")
    for _ in range(2):
        done = run("benchmarks/tables.py", "add", source, target)
        assert done.code == 0, done.err
    assert target.read_text().splitlines() == [
        "name,value,side",
        "gravel,0.30000000000000004,",
        "brick,0.38501262687347226,64",
        "grass,0.10000000000000002,",
    ]


def test_tables_show_the_deviation_of_several_seeds(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import pandas
    from tables import spread

    several = pandas.Series([0.25, 0.5, 0.75])
    assert spread(several) == "50.0 ± 25.0"
    assert spread(several[:1]) == "25.0"
    assert spread(pandas.Series([float("nan")])) == ""


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="measures by os.wait4")
def test_the_memory_benchmark_runs(tmp_path):
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
    for r in runs:
        assert 100 < r["peak_mb"] < 10_000
        assert 0 < r["steps_per_second"] < 1000
        assert r["steps"] == 2
        assert r["command"].startswith("python benchmarks/memory.py --count 40 20 --steps 2")
        assert r["note"] == "a, b"
    growth = runs[1]["peak_mb"] - runs[0]["peak_mb"]
    assert result["peak_growth_mb"] == pytest.approx(growth, abs=0.1)
    with table.open(newline="") as file:
        assert [{name: str(value) for name, value in r.items()} for r in runs] == list(csv.DictReader(file))
    assert not list(place.iterdir())


def test_modules_import_only_from_rows_above():
    present = sorted(path.stem for path in ROOT.glob("*.py"))
    assert set(present) <= set(ORDER)
    assert len(present) >= 10
    for name in present:
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                found = [node.module]
            else:
                continue
            for other in set(found) & set(ORDER):
                assert ORDER.index(other) < ORDER.index(name), f"{name} imports {other}"
                if other in ("eval", "run_training", "prepare_data", "predict", "export"):
                    assert (name, other) == ("run_training", "eval")
                    assert [alias.name for alias in node.names] == ["evaluate"]


def test_only_plots_imports_a_plotting_library():
    for path in ROOT.glob("*.py"):
        if path.stem != "plots":
            assert not re.search(r"^\s*(import|from) (matplotlib|seaborn)", path.read_text(), re.M), path.name


def test_help_imports_nothing_heavy():
    """Of each script: what takes seconds is imported when it is needed."""
    heavy = (
        "torchvision",
        "sklearn",
        "scipy",
        "pandas",
        "matplotlib",
        "seaborn",
        "tensorboard",
        "torch.distributed.run",
    )
    for path in ROOT.glob("*.py"):
        if "__main__" not in path.read_text():
            continue
        code = (
            f"import runpy, sys; sys.argv = [{path.name!r}, '--help']\n"
            f"sys.path.insert(0, {str(ROOT)!r})\n"
            f"try:\n    runpy.run_path({str(path)!r}, run_name='__main__')\n"
            f"except SystemExit as stop:\n    assert not stop.code\n"
            f"print('imported:', [name for name in {heavy!r} if name in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.endswith("imported: []\n"), (path.name, done.stdout[-300:], done.stderr)


def test_the_benchmark_of_maps_runs(data, tmp_path):
    """Every combination that can be is a row; the others are left out."""
    models, table = tmp_path / "models", tmp_path / "maps.csv"
    done = train(data, models, "--type", "brick", "--patch_size", 32, "--window", 8, "--epochs", 1)
    assert done.code == 0, done.err
    flags = ["--data_dir", data, "--model_dir", models, "--results", table, "--workers", 0, "--repeats", 1]
    done = run("benchmarks/maps.py", *flags, "--window", 8, 64, "--location", "shared", "each", "--dims", 16)
    assert done.code == 0, done.err
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["window"], row["location_chosen"], row["dims"]) for row in rows] == [
        ("8", "shared", "64"),
        ("8", "each", "16"),
    ]
    assert done.err.count("cannot be; left out") == 2
    for row in rows:
        assert 0 < float(row["pixel_auroc"]) < 1
        assert 0 < float(row["seconds_per_image"]) < 10
        assert 40 < float(row["file_mb"]) < 60
        assert 200 < float(row["peak_mb"]) < 10_000
        assert row["bench_command"].startswith("python benchmarks/maps.py --data_dir")
