"""What the tests share: small categories of real textures, detectors trained on them, and ways to run a script."""

import csv
import fcntl
import importlib
import io
import itertools
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forked import HAS_BF16, Forked, rarely_collected
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # the work is tiny: threads would cost more than they bring

# In float32 on every processor: the precision that suits one would decide which bits a test compares
TINY = ["--no-pretrained", "--size", "32", "--epochs", "12", "--batch_size", "4", "--test_epochs", "-1", "--amp", "off"]

needs_export = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8), reason="export needs torch 2.8 or newer"
)

SMALL = ["--backbone", "mobilenet_v2", "--level", "3", "--epochs", "5"]  # beside TINY, for what trains several networks


def pytest_collection_finish() -> None:
    """Spare what has been imported from being searched for garbage again and again: a fifth of an export's time."""
    rarely_collected()


def run(*command: object, cwd: Path | None = None, preexec=None, **env: str) -> SimpleNamespace:
    """A script in a process of its own: returns code, out, err."""
    if HAS_BF16 is not None:  # a new interpreter would ask the processor itself
        return fork(*command, cwd=cwd, preexec=preexec, **env)
    done = subprocess.run(
        [sys.executable, str(ROOT / str(command[0])), *map(str, command[1:])],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=preexec,
    )
    return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)


def fork(*command: object, **kwargs) -> SimpleNamespace:
    """As ``run``, in a process that has not to import torch once more."""
    process = Forked(ROOT / str(command[0]), *command[1:], **kwargs)
    out, err = process.communicate()
    return SimpleNamespace(code=process.returncode, out=out, err=err)


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory) -> Iterator[Path]:
    """A folder for what this process and the scripts it starts would keep in the user's ~/.cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture
def script(monkeypatch, capsys):
    """A script in this process, through its own parser and error handling: returns code, out, err."""
    from runtime.cli import run_script

    def call(name: str, *args: object) -> SimpleNamespace:
        module = importlib.import_module(name)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
        capsys.readouterr()
        parser = module.get_parser()
        parser.prog = f"{name}.py"
        code = 0
        try:
            run_script(module.main, parser)
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return call


@pytest.fixture
def benchmarks(monkeypatch):
    """Lets the benchmarks be imported by name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def train_brick(script, data, tmp_path):
    """run_training.py for brick, tiny, in this process, into tmp_path/models: returns code, out, err."""
    return lambda *flags, data=data: again(script, data, tmp_path / "models", "--type", "brick", *flags)


@pytest.fixture
def train_unwritten(train_brick, monkeypatch):
    """As ``train_brick``, but ended before the densities are fitted: the saved states are there, no detector is."""
    import run_training

    def call(*flags: object, **kwargs) -> SimpleNamespace:
        with monkeypatch.context() as patch:
            patch.setattr(run_training, "write_detector", lambda *_: None)
            return train_brick(*flags, **kwargs)

    return call


def made_once(tmp_path_factory, name: str, make: Callable[[Path], SimpleNamespace]) -> tuple[Path, str]:
    """A folder, and what was told, of a script that the first of pytest's processes runs and the others wait for."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder = root / name
    folder.parent.mkdir(exist_ok=True)
    told = folder.parent / "told.txt"
    with open(folder.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not told.exists():
            done = make(folder)
            assert done.code == 0, done.err
            assert done.out == ""
            told.write_text(done.err)
    return folder, told.read_text()


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A data folder with the categories brick, grass and gravel at 32 pixels; read only."""
    flags = ("--size", 32, "--train", 8, "--test", 3)
    make = lambda folder: run("prepare_data.py", "textures", "--data_dir", folder, *flags)  # noqa: E731
    return made_once(tmp_path_factory, "photographs/Data", make)[0]


@pytest.fixture(scope="session")
def models(data, tmp_path_factory) -> Path:
    """Detectors of brick and grass, trained for a few steps by run_training.py; read only."""
    return made_once(tmp_path_factory, "trained/models", lambda folder: train(data, folder, "--type", "brick,grass"))[0]


@pytest.fixture(scope="session")
def small(data, tmp_path_factory) -> Path:
    """The folder of a detector of brick, trained in one go with the flags ``SMALL``; read only."""
    flags = ("--type", "brick", *SMALL)
    return made_once(tmp_path_factory, "small/models", lambda folder: train(data, folder, *flags))[0]


@pytest.fixture(scope="session")
def three(data, tmp_path_factory) -> tuple[Path, str]:
    """The folder of a detector of three networks of brick, trained in one go, and what was told; read only."""
    flags = ("--type", "brick", *SMALL, "--folds", 3)
    return made_once(tmp_path_factory, "three/models", lambda folder: train(data, folder, *flags))


@pytest.fixture(scope="session")
def seeds(data, tmp_path_factory) -> Path:
    """Detectors of brick and grass by seeds 10 and 2; read only."""
    flags = ("--type", "brick,grass", *SMALL, "--epochs", 1, "--seed", "10,2")
    return made_once(tmp_path_factory, "seeds/models", lambda folder: train(data, folder, *flags))[0]


@pytest.fixture(scope="session")
def detectors(data, tmp_path_factory) -> Path:
    """Folders "whole" and "patch", image-level and patch models of brick and grass with their normal images, at 32 x 48
    pixels; their small networks are untrained. Read only."""
    from config import Config, PatchConfig
    from dataset import load_train
    from detector import Detector, detector_path, initial_network, save
    from normals import normals_path, save_normals

    folder = tmp_path_factory.mktemp("detectors")
    kinds = {
        "whole": {"level": (3,), "features": "level"},
        "patch": {"level": (1,), "patches": PatchConfig(patch_size=32, window=8, stride=4, sigma=2.0)},
    }
    small = {"height": 32, "width": 48, "pretrained": False, "backbone": "mobilenet_v2", "false_alarm_rate": 0.2}
    for kind, name in itertools.product(kinds, ("brick", "grass")):
        config, train_set = Config(name, **small, **kinds[kind]), load_train(data, name, (32, 48), 0)
        made = Detector(config, [initial_network(config)]).fit(train_set.images)
        path = detector_path(folder / kind, name)
        save(made, path)
        save_normals(made, train_set, normals_path(path))
    return folder


@pytest.fixture(scope="session")
def exported(data, detectors, tmp_path_factory) -> Path:
    """Folders "whole" and "patch" of the detectors of brick, and what export.py has made of them. Read only."""
    import export

    def make(folder: Path) -> SimpleNamespace:
        for kind, flags in (("whole", ()), ("patch", ("--data_dir", data))):  # by kept normal images, and by all
            (folder / kind).mkdir(parents=True)
            for name in ("brick.pt", "brick.normals"):
                shutil.copy(detectors / kind / name, folder / kind)
            words = [folder / kind / "brick.pt", "--threads", 1, *flags]
            with redirect_stdout(io.StringIO()) as told:
                export.main(export.get_parser().parse_args([*map(str, words)]))
            assert "decisions that differ: 0" in told.getvalue()
            assert "ms an image" in told.getvalue()
        return SimpleNamespace(code=0, out="", err="")

    return made_once(tmp_path_factory, "exported/line", make)[0]


@pytest.fixture
def here(data, tmp_path, monkeypatch) -> Path:
    """The working folder: photos/ with six images of three sizes and kinds, two of them in a sub-folder."""
    from runtime.image_files import find_images

    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos/more").mkdir(parents=True)
    sources = [path for kind in ("good", "hole", "scratch") for path in find_images(data / "brick/test" / kind)]
    names = ["b.png", "a.jpg", "c.TIF", "d.png", "more/a.png", "more/e.bmp"]
    for name, source, size in zip(names, sources[::-1], itertools.cycle([(48, 32), (200, 100), (31, 77)])):
        Image.open(source).convert("RGB").resize(size).save(tmp_path / "photos" / name)
    return tmp_path


@pytest.fixture(scope="session")
def browser() -> Iterator:
    """Chromium, without a window; tests of it are skipped where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    with api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        path = own if Path(own).exists() else next(filter(None, map(shutil.which, names)), None)
        if path is None:
            pytest.skip("no Chromium is installed")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])  # as root too
        yield browser
        browser.close()


def training(data: Path, folder: Path, *flags: object) -> tuple:
    """The words of run_training.py, tiny; TensorBoard's files lie beside the detectors."""
    return "--data_dir", data, "--model_dir", folder, "--logdir", folder.parent / "logdirs", *TINY, *flags


def train(data: Path, folder: Path, *flags: object, **kwargs) -> SimpleNamespace:
    """run_training.py in a process of its own."""
    return fork("run_training.py", *training(data, folder, *flags), **kwargs)


def start(data, folder, *more, new=False):
    """run_training.py left running, state saved after every step, in a new process or a forked one."""
    command = [ROOT / "run_training.py", *training(data, folder, *more), "--save_minutes", 0]
    if not new:
        return Forked(*command)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *map(str, command)], env=env, stderr=subprocess.PIPE, text=True)


def again(script, data, folder, *more):
    """The same command as ``start``'s, in this process, but for how often it saves."""
    return script("run_training", *training(data, folder, *more))


def wait_for_step(process, checkpoint, step):
    """Wait until the saved state has reached a step."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        assert process.poll() is None, process.stderr.read()
        # mapped, so that a look costs no reading of all tensors, many times over
        if checkpoint.exists() and torch.load(checkpoint, mmap=True, weights_only=True)["step"] >= step:
            return
        time.sleep(0.02)
    raise AssertionError("no state was saved")


def network_of(detector):
    """The network of a detector's first member."""
    return detector.members[0].network


def wait_for(condition, seconds=60):
    """Wait until a condition holds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


def rows_of(content: str | Path) -> list[dict[str, str]]:
    """The rows of CSV: of a file, or text."""
    if isinstance(content, Path):
        content = os.fsdecode(content.read_bytes())
    return list(csv.DictReader(io.StringIO(content, newline=""), strict=True))


def lines_in(path: Path) -> int:
    """How many whole lines a file has; 0 if there is none."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


@contextmanager
def room(size):
    """No file can become larger than that: what a full disk looks like."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder: Path) -> dict[Path, bytes]:
    """Return what all files below a folder hold."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def one_line(done: SimpleNamespace, *words: str) -> None:
    """Assert that a script failed with exit code 1 and one last line on stderr that has the words, no traceback."""
    assert done.code == 1, (done.code, done.err)
    assert "Traceback" not in done.err
    last = done.err.strip().splitlines()[-1]
    assert "error:" in last
    assert done.err.count("error:") == 1
    for word in words:
        assert word in last, (word, last)


def same_weights(one: Path, other: Path) -> bool:
    """Whether two detector files hold the same networks and densities, bit for bit."""
    flat = []
    for path in (one, other):
        flat.append({})
        for number, member in enumerate(torch.load(path, weights_only=True)["members"]):
            parts = {"standardized": {"center": member["center"], "scale": member["scale"]}}
            parts |= {part: member[part] for part in ("network", "levels")}
            flat[-1] |= {f"{number}.{part}.{name}": v for part, own in parts.items() for name, v in own.items()}
    assert flat[0].keys() == flat[1].keys()
    assert len(flat[0]) > 60
    return all(torch.equal(flat[0][name], flat[1][name]) for name in flat[0])
