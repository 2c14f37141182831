"""Make faults on purpose and count what becomes of them: damaged images, damaged and forged models, kills, full disks,
two runs at once, hostile names.

    make faults
    python tests/faults.py --share 0.1 --only "kills,two at once"

Everything follows from --seed but the moments at which the system lets a process run. Prints one table, which
docs/reliability.md holds; exits with 1 if anything was lost, crashed, was executed or is silently wrong, and names it:

    same        the result is the one without the fault (of a damaged image: it could still be read)
    told        one line said what is wrong, and nothing was changed
    lost        something that was there is gone, or the same command again does not end as if nothing had happened
    crashed     a traceback, a signal, or no end
    executed    code in a file was run
    wrong       another result, and no word of it
"""

import argparse
import csv
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from forged import Code, forged, forged_parts  # noqa: E402
from forked import SERVER, Forked  # noqa: E402

from detector import load  # noqa: E402
from normals import EMBEDDINGS, LIST, load_normals  # noqa: E402
from runtime.files import PART, InputError, archive_of, load_parts  # noqa: E402
from runtime.image_files import decode  # noqa: E402
from training.trainer import load_checkpoint  # noqa: E402

OUTCOMES = ("same", "told", "lost", "crashed", "executed", "wrong")
BAD = OUTCOMES[2:]
SLOW = 20  # seconds in which an image is decoded at most
PATIENCE = 120  # seconds after which a script counts as hanging
STATE = ("time", "bytes", "modified")  # columns of a row that depend on when it was made
TINY = [
    "--no-pretrained",
    "--size",
    "32",
    "--batch_size",
    "4",
    "--test_epochs",
    "-1",
    "--amp",
    "off",
    "--save_minutes",
    "0",
]
TINY += ["--backbone", "mobilenet_v2", "--level", "3"]
STEPS = 8  # of a training
STATE_STEPS = 50  # of the one whose saved state is damaged and forged


# What is there before the faults ----------------------------------------------------------------------------------


def where(root: Path, place: Path) -> list[object]:
    """Return the flags of the folders, those that are written to below ``place``."""
    return ["--data_dir", root / "Data", "--model_dir", place / "models", "--type", "brick"]


def training(root: Path, place: Path, epochs: int = STEPS) -> list[object]:
    return ["run_training.py", *where(root, place), "--logdir", place / "logs", *TINY, "--epochs", epochs]


def evaluation(root: Path, place: Path) -> list[object]:
    return ["eval.py", *where(root, root), "--eval_dir", place / "Eval", "--heatmaps", 1]


def checking(root: Path, place: Path) -> list[object]:
    return ["check_data.py", *where(root, root), "--eval_dir", place / "Check"]


def prediction(root: Path, place: Path) -> list[object]:
    flags = ["--output", place / "rows.jsonl", "--format", "jsonl", "--heatmaps", place / "heat"]
    return ["predict.py", root / "models/brick.pt", root / "photos", *flags]


def watching(root: Path, place: Path) -> list[object]:
    return [*prediction(root, place), "--watch"]


SCRIPTS = {"training": training, "fitting": partial(training, epochs=0), "evaluation": evaluation}
SCRIPTS |= {"prediction": prediction, "watching": watching, "checking": checking}
CONTINUED = {"continued": partial(training, epochs=STATE_STEPS)}  # the training whose saved state is forged


def start(command: list[object], **options: object) -> Forked:
    return Forked(ROOT / str(command[0]), *command[1:], XDG_CACHE_HOME=tempfile.gettempdir(), **options)


def finish(command: list[object], **options: object) -> tuple[int, str]:
    """Run a script to its end, and return exit code and stderr. One that watches is stopped once all photographs have a
    row."""
    process = start(command, **options)
    if "--watch" in command:
        rows, until = Path(command[command.index("--output") + 1]), time.monotonic() + PATIENCE
        count = sum(path.is_file() for path in Path(command[2]).rglob("*"))
        while process.poll() is None and time.monotonic() < until:
            if rows.exists() and rows.read_bytes().count(b"\n") >= count:
                process.terminate()
                break
            time.sleep(0.1)
    try:
        _, err = process.communicate(PATIENCE)
    except TimeoutError as error:
        return -1, str(error)
    stopped = "--watch" in command and process.returncode in (128 + signal.SIGTERM, -signal.SIGTERM)
    return 0 if stopped else process.returncode, err


def result(kind: str, place: Path) -> object:
    """Return what a script has made, without what depends on the time and on the place."""
    if kind in ("training", "fitting", "continued"):
        content = torch.load(place / "models/brick.pt", weights_only=True)
        left = [path.name for path in (place / "models").iterdir() if path.suffix not in (".pt", ".normals")]
        return digest_of({name: content[name] for name in ("members", "threshold", "normal_scores")}), left
    if kind in ("prediction", "watching"):
        rows = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]
        drawn = sorted(path.name for path in (place / "heat").rglob("*.*") if path.suffix != PART)
        return sorted(tuple((k, v) for k, v in row.items() if k not in STATE) for row in rows), drawn
    folder = place / ("Eval" if kind == "evaluation" else "Check")
    tables = {}
    for path in sorted(folder.rglob("*.csv")):
        rows = csv.DictReader(io.StringIO(path.read_text(), newline=""))
        tables[path.name] = [{k: v for k, v in row.items() if not k.startswith("eval_")} for row in rows]
    return tables, sorted(path.name for path in folder.rglob("*.png"))


def digest_of(value: object) -> object:
    """Return nested content with bytes in the place of tensors, to be compared."""
    if isinstance(value, torch.Tensor):
        return value.contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {key: digest_of(part) for key, part in value.items()}
    return list(map(digest_of, value)) if isinstance(value, list) else value


def prepare(root: Path) -> None:
    """Make a data set, photographs and a detector, with what each script makes of them undisturbed."""
    flags = ["textures", "--size", 32, "--train", 8, "--test", 3, "--data_dir", root / "Data"]
    for command in (["prepare_data.py", *flags], training(root, root)):
        code, err = finish(command)
        assert code == 0, err
    shutil.copytree(root / "Data/brick/test", root / "photos")
    for path in list((root / "photos").rglob("*.png")):
        for number in range(2):
            shutil.copy(path, path.with_name(f"{number}{path.name}"))


@cache
def expected(root: Path, kind: str) -> object:
    """Return what a script makes undisturbed."""
    place = new_place(root, "expected", kind, os.getpid())
    code, err = finish((SCRIPTS | CONTINUED)[kind](root, place))
    assert code == 0, err
    return result(kind, place)


def new_place(root: Path, *words: object) -> Path:
    place = root / "trials" / "-".join(map(str, words))
    place.mkdir(parents=True)
    return place


# Trials: each returns the outcome of each fault, with a word on the bad ones ---------------------------------------

Outcomes = list[tuple[str, str]]


def verdict(root: Path, kind: str, place: Path, code: int, err: str) -> tuple[str, str]:
    """Return the outcome after the last run of a script, which should have ended as if nothing had happened."""
    if "Traceback" in err or code < 0:
        return "crashed", err[-500:]
    if code:
        return "lost", err[-300:]
    same = result(kind, place) == expected(root, kind)
    return ("same" if same else "wrong"), f"{kind} in {place}"


def damage(content: bytes, rng: random.Random) -> bytes:
    """Return a file's content with bits flipped, bytes set to zero or to noise, cut off, or taken out."""
    content, count = bytearray(content), len(content)
    place, length = rng.randrange(count), rng.choice((1, 4, 64, 1024))
    kind = rng.randrange(5)
    if kind == 0:
        for _ in range(rng.choice((1, 1, 3, 20))):
            content[rng.randrange(count)] ^= 1 << rng.randrange(8)
    elif kind == 1:
        content[place : place + length] = bytes(len(content[place : place + length]))
    elif kind == 2:
        content[place : place + length] = rng.randbytes(len(content[place : place + length]))
    elif kind == 3:
        del content[place:]
    else:
        del content[place : place + length]
    return bytes(content)


@cache
def pictures() -> list[tuple[str, bytes]]:
    """Return image files of every format and several modes, with their suffixes."""
    made, rng = [], np.random.default_rng(0)
    rgb = rng.integers(0, 256, (24, 20, 3), np.uint8).repeat(2, 0).repeat(2, 1)
    arrays = {
        "RGB": rgb,
        "L": rgb[..., 0],
        "RGBA": np.dstack([rgb, rgb[..., :1]]),
        "I;16": rgb[..., 0].astype(np.uint16),
    }
    kinds = [("png", mode, {}) for mode in arrays] + [("tif", mode, {}) for mode in arrays]
    kinds += [("tif", "RGB", {"compression": name}) for name in ("tiff_lzw", "jpeg", "tiff_adobe_deflate")]
    kinds += [("jpg", mode, options) for mode in ("RGB", "L") for options in ({}, {"progressive": True})]
    kinds += [("bmp", "RGB", {}), ("bmp", "L", {}), ("webp", "RGB", {}), ("webp", "RGBA", {"lossless": True})]
    for suffix, mode, options in kinds:
        buffer, kind = io.BytesIO(), {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper())
        Image.fromarray(arrays[mode]).save(buffer, kind, **options)
        made.append((suffix, buffer.getvalue()))
    return made


def images(root: Path, rng: random.Random, number: int, count: int = 100) -> Outcomes:
    warnings.filterwarnings("ignore")  # Pillow's, of broken tags
    place, outcomes = new_place(root, "images", number), []
    for index in range(count):
        suffix, content = rng.choice(pictures())
        path = place / f"{index}.{suffix}"
        path.write_bytes(damage(content, rng))
        began, outcome, words = time.monotonic(), "same", ""
        try:
            decode(path, (32, 32))
        except InputError as error:
            outcome = "told" if str(path) in str(error) and "\n" not in str(error) else "crashed"
        except BaseException as error:
            outcome, words = "crashed", f"{path}: {error!r}"
        outcomes.append((outcome if time.monotonic() - began < SLOW else "crashed", words))
    return outcomes


@cache
def reader(root: Path, kind: str) -> tuple[Path, Callable[[Path], object]]:
    """Return the file of a kind that is read, with what is read of it, to be compared."""
    path = root / "models/brick.pt"
    if kind == "detector":
        return path, lambda path: digest_of(dict(load(path).state_dict()))
    if kind == "normal images":
        detector = load(path)
        return path.with_suffix(".normals"), lambda path: load_normals(path, detector).jpegs
    state = new_place(root, "state", os.getpid())
    process = start(training(root, state, STATE_STEPS))
    while not (state / "models/brick.checkpoint").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.kill()
    process.wait()
    return state / "models/brick.checkpoint", lambda path: digest_of(load_checkpoint(path)["network"])


def continued(root: Path, path: Path, good: object, words: str) -> tuple[str, str]:
    """Return the outcome of going on from a bad saved state, and remove what came of it."""
    place, content = path.parents[1], path.read_bytes()
    code, err = finish(training(root, place, STATE_STEPS))
    kept = path.exists() and path.read_bytes() == content
    outcome = "crashed"
    if code == 1 and "Traceback" not in err:
        named = (
            err.strip()
            .splitlines()[-1]
            .startswith((f"run_training.py: error: {path}", "run_training.py: error: brick: "))
        )
        outcome = "told" if kept and named else "lost"
    elif code == 0:
        outcome = "same" if result("training", place) == good else "wrong"
        shutil.rmtree(place / "models")
    return outcome, f"{words}: {err[-300:]}"


def reading(path: Path, read: Callable[[Path], object], good: object, words: str) -> tuple[str, str]:
    """Return the outcome of a bad file."""
    try:
        value = read(path)
    except InputError as error:
        return ("told" if str(error).startswith(f"{path}: ") and "\n" not in str(error) else "crashed"), words
    except BaseException as error:
        return "crashed", f"{words}: {error!r}"
    return ("same" if value == good else "wrong"), words


def damaged(root: Path, rng: random.Random, number: int, kind: str = "", count: int = 25) -> Outcomes:
    source, read = reader(root, kind)
    content, good, place = source.read_bytes(), read(source), new_place(root, "damaged", kind, number)
    outcomes = []
    for index in range(count):
        path = place / source.name
        path.write_bytes(damage(content, rng))
        outcomes.append(reading(path, read, good, f"{kind} {number} {index}"))
    return outcomes


def forgeries(content: dict, rng: random.Random) -> Iterator[tuple[str, Callable[[], dict]]]:
    """Yield forgeries in a random order; those of normal images, which have few parts, in ever other places."""
    parts = LIST in content
    forgeries = list(forged_parts(content) if parts else forged(content))
    rng.shuffle(forgeries)
    yield from forgeries
    while parts:
        listed, embeddings = json.loads(content[LIST]), np.frombuffer(content[EMBEDDINGS], "<f2")
        names, scaled = listed["names"], embeddings.reshape(len(listed["names"]), -1).copy()
        at = rng.randrange(len(names))
        jpeg = bytearray(content[f"{at}.jpg"])
        jpeg[rng.randrange(2)] = rng.randrange(0, 0xD8)
        yield "no JPEG", partial(dict, content, **{f"{at}.jpg": bytes(jpeg)})
        scaled[at] *= rng.choice((0, 0.5, 2))
        yield "another length", partial(dict, content, **{EMBEDDINGS: scaled.tobytes()})
        listed |= {"names": [*names[:at], at, *names[at + 1 :]]}
        yield "a number for a name", partial(dict, content, **{LIST: json.dumps(listed).encode()})


def forge(root: Path, rng: random.Random, number: int, kind: str = "", count: int = 25) -> Outcomes:
    """Try forgeries of a kind of file; a tenth of them holds code."""
    warnings.filterwarnings("ignore", "Validating sparse tensor invariants")
    source, read = reader(root, kind)
    good, place = read(source), new_place(root, "forged", kind, number)
    content = load_parts(source, kind) if kind == "normal images" else torch.load(source, weights_only=True)
    path, marker, outcomes = place / source.name, place / "executed", []
    if kind == "saved state":  # some of it is checked as it is used: training goes on from it
        path, good = place / "models" / source.name, expected(root, "continued")
    for index, (words, make) in enumerate(islice(forgeries(content, rng), count)):
        code = index % 10 == 9
        path.parent.mkdir(exist_ok=True)
        if code or LIST not in content:
            torch.save(content | {rng.choice([*content]): Code(f"touch {marker}")} if code else make(), path)
        else:
            path.write_bytes(archive_of(make()))
        outcomes.append(
            continued(root, path, good, words) if kind == "saved state" else reading(path, read, good, words)
        )
        if marker.exists():
            outcomes[-1] = ("executed", words)
    return outcomes


def kills(root: Path, rng: random.Random, number: int, kind: str = "", count: int = 6) -> Outcomes:
    """Kill a script again and again, then let it end."""
    place = new_place(root, "kills", kind, number)
    command = SCRIPTS[kind](root, place)
    seconds, killed = duration(root, kind), 0
    for _ in range(count):
        process = start(command)
        time.sleep(rng.random() * seconds)
        killed += process.poll() is None
        process.kill()
        process.wait()
    return [verdict(root, kind, place, *finish(command))] * max(1, killed)


@cache
def duration(root: Path, kind: str) -> float:
    """Return how long a script runs undisturbed, in seconds."""
    expected(root, kind)
    began = time.monotonic()
    finish(SCRIPTS[kind](root, new_place(root, "timed", kind, os.getpid())))
    return time.monotonic() - began


SIZES = {
    "training": (2_000, 20e6),
    "evaluation": (16_000, 100_000),
    "prediction": (2_000, 20_000),
    "checking": (16_000, 1e5),
}


def disks(root: Path, rng: random.Random, number: int, kind: str = "") -> Outcomes:
    """Let no file become larger than so many bytes, which is what a full disk looks like; then let the script end."""
    low, high = SIZES[kind]
    size = int(low * (high / low) ** rng.random())
    place = new_place(root, "disks", kind, number)
    command = [*SCRIPTS[kind](root, place)]
    if kind in ("training", "evaluation"):
        command += ["--cache_dir", place / "cache"]
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
    code, err = finish(command, preexec=limit)
    if "Traceback" in err or code not in (0, 1):
        return [("crashed", err[-500:])]
    outcome = verdict(root, kind, place, *finish(command))
    return [("told", "") if code and outcome[0] == "same" else outcome]


def pairs(root: Path, rng: random.Random, number: int, kind: str = "") -> Outcomes:
    """Start the same command twice at once."""
    place = new_place(root, "pairs", kind, number)
    command = SCRIPTS[kind](root, place)
    first = start(command)
    time.sleep(rng.choice((0, 0, rng.random() / 2)) * duration(root, kind))
    ends = [finish(command)]
    try:
        ends.append((first.wait(PATIENCE), first.communicate()[1]))
    except TimeoutError as error:
        return [("crashed", str(error))]
    for code, err in ends:
        if "Traceback" in err or code not in (0, 1) or (code and "another run is writing" not in err):
            return [("crashed", err[-500:])]
    told = any(code for code, _ in ends)
    outcome = verdict(root, kind, place, *min(ends))
    return [("told", "") if told and outcome[0] == "same" else outcome]


LETTERS = [
    *"=+-@$^_{}%#&~'\"`;|<>*?!()[] \\\t\r\n",
    "é",
    "日",
    "\u202e",
    "\u200b",
    "\x1b",
    "\x00"[:0] or "\x7f",
    "\udcff",
]


def names(root: Path, rng: random.Random, number: int, count: int = 12) -> Outcomes:
    """Evaluate and predict images of hostile names, in a category and a defect type of hostile names."""

    def name() -> str:
        return "".join(rng.choices(LETTERS, k=rng.choice((1, 3, 8)))).strip() + f"{rng.randrange(10**6)}"

    place, category = new_place(root, "names", number), name().replace(",", "")
    target = place / "Data" / category
    shutil.copytree(root / "Data/brick/train", target / "train")
    (target / "test/good").mkdir(parents=True)
    (target / "test" / (defect := name())).mkdir()
    (place / "models").mkdir()
    content = torch.load(root / "models/brick.pt", weights_only=True)
    torch.save(content | {"config": content["config"] | {"category": category}}, place / "models" / f"{category}.pt")
    for index, source in enumerate(islice(sorted((root / "Data/brick/test").rglob("*.png")), count)):
        shutil.copy(source, target / "test" / ("good", defect)[index % 2] / f"{name()}.png")
    folders = ["--data_dir", place / "Data", "--model_dir", place / "models"]
    first = finish(["eval.py", *folders, "--eval_dir", place / "Eval", "--report", place / "a.html"])
    second = finish(["predict.py", *folders[2:], place / "Data", "--output", place / "a.csv"])
    for code, err in (first, second):
        if code:
            return [("crashed" if "Traceback" in err else "lost", err[-500:])] * count
    with open(place / "Eval/models/scores.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
        paths = [row["path"] for row in csv.DictReader(file)]
    outcomes = [("same" if (place / "Data" / path).is_file() else "wrong", path) for path in paths]
    return outcomes + [("lost", category)] * (count - len(outcomes))


# All of them ------------------------------------------------------------------------------------------------------

FILES = ("detector", "normal images", "saved state")
TRIALS: dict[str, tuple[Callable, int]] = {  # by row of the table: what makes its faults, how often
    "damaged images": (images, 50),
    **{f"damaged files: {kind}": (partial(damaged, kind=kind), 20) for kind in FILES},
    **{f"forged files: {kind}": (partial(forge, kind=kind), 20) for kind in FILES},
    **{f"kills: {kind}": (partial(kills, kind=kind), 8 if kind == "training" else 4) for kind in SCRIPTS},
    **{f"full disk: {kind}": (partial(disks, kind=kind), 5) for kind in SIZES},
    **{f"two at once: {kind}": (partial(pairs, kind=kind), 10) for kind in SIZES},
    "names": (names, 5),
}


def attempt(row: str, trial: Callable, root: Path, seed: int, number: int) -> Outcomes:
    """Run a trial in a process of the pool."""
    torch.set_num_threads(1)
    try:
        return trial(root, random.Random(f"{seed}/{row}/{number}"), number)
    except Exception as error:
        return [("crashed", f"{row} {number}: {error!r}")]


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of all faults (default: 0)")
    parser.add_argument("--share", type=float, default=1.0, help="of the trials (default: 1)")
    parser.add_argument("--only", default="", help="beginnings of rows, separated by commas (default: all)")
    return parser


def main(args: argparse.Namespace) -> int:
    began, bad = time.monotonic(), []
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        root = Path(folder)
        prepare(root)
        print(f"| fault | tried | {' | '.join(OUTCOMES)} |\n|---|{'---:|' * (1 + len(OUTCOMES))}", flush=True)
        with ProcessPoolExecutor(2, mp_context=SERVER) as pool:
            rows = {
                row: [
                    pool.submit(attempt, row, trial, root, args.seed, number)
                    for number in range(max(1, round(args.share * times)))
                ]
                for row, (trial, times) in TRIALS.items()
                if row.startswith(tuple(args.only.split(",")))
            }
            for row, trials in rows.items():
                outcomes = [outcome for trial in trials for outcome in trial.result()]
                counts = Counter(name for name, _ in outcomes)
                bad += [f"{row}: {name}: {words}" for name, words in outcomes if name in BAD]
                print(f"| {row} | {len(outcomes)} | {' | '.join(str(counts[name]) for name in OUTCOMES)} |", flush=True)
    print(f"\nseed {args.seed}, {time.monotonic() - began:.0f} seconds")
    print(*dict.fromkeys(bad), sep="\n", file=sys.stderr)
    return int(bool(bad))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main(get_parser().parse_args()))
