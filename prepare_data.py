"""Bring public data sets and a user's own photographs into the layout that training and evaluation read.

    python prepare_data.py mvtec mvtec_anomaly_detection.tar.xz
    python prepare_data.py folder --good photos/good --bad photos/bad --name lid
    python prepare_data.py folder --good photos/more --name lid --add

Writes new categories, <data_dir>/<category>/ with the folders of MVTec AD. It changes no file of one that is there, and
only --add adds some. Splits and drawings come from fixed seeds: everybody gets the same.
"""

import argparse
import hashlib
import lzma
import math
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from config import category
from runtime.cli import check_usage, int_at_least, new_parser, number, run_script
from runtime.files import InputError, say, write_file

# Official numbers of images (training, test) of MVTec AD (Bergmann et al., CVPR 2019).
# fmt: off
MVTEC_COUNTS = {
    "bottle": (209, 83), "cable": (224, 150), "capsule": (219, 132), "carpet": (280, 117), "grid": (264, 78),
    "hazelnut": (391, 110), "leather": (245, 124), "metal_nut": (220, 115), "pill": (267, 167), "screw": (320, 160),
    "tile": (230, 117), "toothbrush": (60, 42), "transistor": (213, 100), "wood": (247, 79), "zipper": (240, 151),
}
# fmt: on
BROKEN = (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, RuntimeError, OSError)
ELPV_CELLS = ("mono", "poly")  # monocrystalline, polycrystalline
TEXTURES = ("brick", "grass", "gravel")  # 512 x 512 gray photographs in scikit-image's wheel


def get_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    shape = parser.formatter_class

    def command(name: str, help: str) -> Callable:
        sub = commands.add_parser(name, help=help, description=help, allow_abbrev=False, formatter_class=shape)
        sub.add_argument("--data_dir", default="Data", metavar="DIR", help="where categories go (default: Data)")
        return sub.add_argument

    add = command("mvtec", "unpack MVTec AD and compare it with the official numbers of images")
    add("source", help="the .tar.xz or .zip archive, or a folder that is unpacked already")

    add = command("elpv", "solar cells from the package elpv-dataset (CC BY-NC-SA 4.0)")
    add("--cells", choices=ELPV_CELLS, default="mono", help="kind of cell (default: mono)")
    add("--name", type=category, metavar="NAME", help="name of the category (default: solar_<kind of cell>)")
    add("--held_out", type=number(0.01, 0.9), default=0.25, metavar="X", help="share for test/good (default: 0.25)")
    add("--seed", type=int_at_least(0), default=0, metavar="N", help="seed of the split (default: 0)")

    add = command("folder", "a category from your own photographs")
    add("--good", required=True, metavar="DIR", help="photographs of good parts")
    add("--bad", metavar="DIR", help="photographs of bad parts, or a folder for each type of defect")
    add("--name", type=category, metavar="NAME", help="name of the category (default: that of the --good folder)")
    add("--held_out", type=number(0, 0.9), default=0.2, metavar="X", help="share for test/good (default: 0.2)")
    add("--seed", type=int_at_least(0), default=0, metavar="N", help="seed of the split (default: 0)")
    add("--add", action="store_true", help="put them into a category that is there; copies of its images are left out")

    add = command("textures", "small categories from scikit-image's textures, with drawn defects and masks")
    add("--size", type=int_at_least(32), default=64, metavar="N", help="side of the images (default: 64)")
    add("--train", type=int_at_least(2), default=24, metavar="N", help="training images (default: 24)")
    add("--test", type=int_at_least(1), default=8, metavar="N", help="test images a defect type (default: 8)")
    return parser


if __name__ == "__main__":
    check_usage(get_parser())  # at once: what is imported below takes seconds

import numpy as np
from PIL import Image

from dataset import GOOD, find_mask
from runtime.image_files import decode, find_folders, find_images, is_hidden, list_folder


def main(args: argparse.Namespace) -> None:
    {"mvtec": mvtec, "elpv": elpv, "folder": folder, "textures": textures}[args.command](args, Path(args.data_dir))


@contextmanager
def new_category(data_dir: Path, name: str, way_out: str = "") -> Iterator[Path]:
    """Open a temporary folder that becomes data_dir/name when the block ends well. Raises InputError if that exists.
    way_out: what to do about it, beside removing that or taking another folder."""
    target = data_dir / name
    if target.exists():
        instead = f"{way_out}remove it or choose another --data_dir"
        raise InputError(f"{target}: is there already and is left alone; {instead}")
    data_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data_dir, prefix=".new-") as temporary:
        building = Path(temporary) / name
        building.mkdir()
        yield building
        building.rename(target)
    folders = [path for split in ("train", "test") for path in sorted((target / split).glob("*"))]
    say(f"wrote {target}: " + ", ".join(f"{len(find_images(path))} {path.parent.name}/{path.name}" for path in folders))


# MVTec AD ---------------------------------------------------------------------------------------------------------


def mvtec(args: argparse.Namespace, data_dir: Path) -> None:
    """Unpack if it is an archive, then verify. Raises InputError if an image or a mask is missing."""
    source = Path(args.source)
    if not source.exists():
        raise InputError(f"{source}: no such file or folder")
    if source.is_file():
        unpack(source, data_dir)
    root = data_dir if source.is_file() else source  # a folder is not copied: it is used where it lies
    checked = {name: verify(root / name, *counts) for name, counts in MVTEC_COUNTS.items() if (root / name).is_dir()}
    for name in MVTEC_COUNTS:
        say(f"{name}: " + ("; ".join(checked[name]) or "complete" if name in checked else "not there"))
    problems = [f"{name}: {problem}" for name in checked for problem in checked[name]]
    complete = sum(not of_category for of_category in checked.values())
    say(f"{complete} of {len(MVTEC_COUNTS)} categories are complete in {root}, the folder for --data_dir")
    if problems:
        first = f"{len(problems)} problem(s), the first: {problems[0]}"
        raise InputError(f"{root}: {first}; remove that folder and unpack the archive anew")
    if not complete:
        raise InputError(f"{root}: no category of MVTec AD in it; it should hold folders such as bottle/train/{GOOD}")


def unpack(archive: Path, data_dir: Path) -> None:
    """Unpack the categories of an archive beside each other. No file leaves the folder, no category is overwritten."""
    data_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data_dir, prefix=".new-") as temporary:
        say(f"unpacking {archive}")
        try:
            extract(archive, temporary)
        except BROKEN as error:  # what a damaged archive raises
            if isinstance(error, OSError) and error.errno is not None:
                raise  # a full disk is not the archive's fault
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"{archive}: cannot be unpacked ({reason}); download it again") from error
        sources = sorted({path.parent.parent for path in Path(temporary).rglob(f"train/{GOOD}") if path.is_dir()})
        sources = [path for path in sources if not any(map(is_hidden, path.relative_to(temporary).parts))]
        if not sources:
            raise InputError(f"{archive}: no category in it (a folder with train/{GOOD})")
        targets = [data_dir / path.name for path in sources]
        if len(set(targets)) < len(sources):
            raise InputError(f"{archive}: two folders of one category in it; nothing was unpacked")
        if taken := [target for target in targets if target.exists()]:
            raise InputError(f"{taken[0]}: is there already and is left alone; nothing was unpacked")
        for source, target in zip(sources, targets):
            source.rename(target)


def extract(archive: Path, folder: str) -> None:
    """Unpack a zip or tar archive of folders and files alone. Raises InputError for anything else in it."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as file:
            for member in file.namelist():
                refuse_escape(archive, member)
            file.extractall(folder)
        return
    safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    with tarfile.open(archive) as file:
        for member in file:
            refuse_escape(archive, member.name)
            if not (member.isfile() or member.isdir()):
                raise InputError(f"{archive}: {member.name!r} is a link or device; nothing was unpacked")
            file.extract(member, folder, set_attrs=False, **safe)
        while file.fileobj.read(2**20):  # tarfile takes a damaged header for the end; checksums do not
            pass


def refuse_escape(archive: Path, member: str) -> None:
    """Raise InputError for a member whose path would lead out of the folder it is unpacked in."""
    parts = member.replace("\\", "/").split("/")
    if member.startswith(("/", "\\")) or ".." in parts or (len(member) > 1 and member[1] == ":"):
        raise InputError(f"{archive}: {member!r} would be written outside the folder; nothing was unpacked")


def verify(folder: Path, train: int, test: int) -> list[str]:
    """Return what is wrong with a category, in words: with its numbers of images, and anomalous ones without a mask."""
    problems = []
    for split, expected in (("train", train), ("test", test)):
        kinds = find_folders(folder / split) if (folder / split).is_dir() else []
        images = [path for kind in kinds for path in find_images(kind)]
        if len(images) != expected:
            problems.append(f"{split} has {len(images)} images instead of {expected}")
    lacking = [path for path in images if path.parent.name != GOOD and find_mask(path) is None]  # of the test images
    if lacking:
        first = lacking[0].relative_to(folder)
        problems.append(f"{len(lacking)} mask(s) missing in ground_truth, the first for {first}")
    return problems


# Solar cells ------------------------------------------------------------------------------------------------------


def elpv(args: argparse.Namespace, data_dir: Path) -> None:
    """Write a category of solar cells: defect probability 0 is normal, 1 is anomalous. The cells that the experts
    disagreed on are left out.

    Buerhop-Lopez et al., "A benchmark for visual identification of defective solar cells in electroluminescence
    imagery", EU PVSEC 2018.
    """
    try:
        from elpv_dataset.utils import load_dataset
    except ImportError as error:
        raise InputError("the package elpv-dataset is not installed: pip install elpv-dataset") from error
    with new_category(data_dir, args.name or f"solar_{args.cells}") as target:
        images, probability, kinds = load_dataset()  # (N, 300, 300) uint8, (N,), (N,); seconds
        normal, bad = (np.flatnonzero((kinds == args.cells) & (probability == value)) for value in (0, 1))
        train, held_out = split(normal, args.held_out, args.seed)
        for kind, members in ((f"train/{GOOD}", train), (f"test/{GOOD}", held_out), ("test/defective", bad)):
            for index in members:
                write_image(target / kind / f"cell{index + 1:04d}.png", images[index], compress_level=1)


def split(items: np.ndarray, held_out: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return items to train on and items held out, each in the order given; ``seed`` draws which is which."""
    is_held_out = np.random.default_rng(seed).permutation(len(items)) < round(held_out * len(items))
    return items[~is_held_out], items[is_held_out]


# Own photographs --------------------------------------------------------------------------------------------------


def folder(args: argparse.Namespace, data_dir: Path) -> None:
    """Copy photographs, unchanged. Every one is decoded once first, so that a bad file is found now."""
    check_folder(Path(args.good), "--good")
    good, least = find_images(Path(args.good)), 1 if args.add else 2
    if len(good) < least:
        raise InputError(f"{args.good}: {len(good)} photograph(s) found, at least {least} needed (--good)")
    train, held_out = split(np.arange(len(good)), args.held_out, args.seed)
    if len(train) < least:
        raise InputError(f"--held_out {args.held_out}: leaves {len(train)} of {len(good)} photographs to train on")
    plan = {f"train/{GOOD}": [good[i] for i in train], f"test/{GOOD}": [good[i] for i in held_out]}
    if args.bad is not None:
        bad = Path(args.bad)
        if Path(args.good).resolve() in (bad.resolve(), *(p.resolve() for p in bad.glob("*") if p.is_dir())):
            raise InputError(f"{args.good}: is among the photographs of --bad too; keep good and bad parts apart")
        check_folder(bad, "--bad")
        loose, folders = list_folder(bad)
        kinds = {path.name: find_images(path) for path in folders}
        plan |= {f"test/{name}": paths for name, paths in kinds.items() if paths}
        plan["test/bad"] = plan.get("test/bad", []) + loose
        if GOOD in kinds:
            raise InputError(f"{bad / GOOD}: a folder named {GOOD!r} among the defects; rename or remove it")
        if not any(kinds.values()) and not loose:
            raise InputError(f"{bad}: no photograph found (--bad)")
    for place, paths in plan.items():
        if len({path.name for path in paths}) < len(paths):
            raise InputError(f"{args.bad}: two photographs of one name would both go to {place}; rename one")
    name = args.name or Path(args.good).resolve().name
    if args.add:
        add_photographs(data_dir / name, plan)
        return
    with new_category(data_dir, name, "--add puts photographs into it, another --name goes beside it; else ") as target:
        for place, paths in plan.items():
            if paths:
                (target / place).mkdir(parents=True)
            for path in paths:
                decode(path)
                shutil.copyfile(path, target / place / path.name)


def add_photographs(category: Path, plan: dict[str, list[Path]]) -> None:
    """Copy photographs into the folders of a category that is there, by folder; none that it holds already, under
    whatever name. One of a name that is taken gets a number behind it. Raises InputError before anything is copied."""
    if not (category / "train" / GOOD).is_dir():
        raise InputError(f"{category}: no such category to add to; leave --add out to make it")
    folders = [path for part in ("train", "test") for path in category.glob(f"{part}/*") if path.is_dir()]
    known = {hashlib.sha256(path.read_bytes()).digest() for folder in folders for path in find_images(folder)}
    sources: dict[Path, Path] = {}  # by where they go
    copies = 0
    for place, paths in plan.items():
        for path in paths:
            decode(path)
            if (digest := hashlib.sha256(path.read_bytes()).digest()) in known:
                copies += 1
                continue
            known.add(digest)
            target, number = category / place / path.name, 1
            while target in sources or target.exists():
                number += 1
                target = category / place / f"{path.stem}.{number}{path.suffix}"
            sources[target] = path
    for target, path in sources.items():
        write_file(path.read_bytes(), target)
    added = Counter(f"{path.parent.parent.name}/{path.parent.name}" for path in sources)
    words = ", ".join(f"{count} to {place}" for place, count in added.items()) or "nothing"
    say(f"{category}: added {words}" + f"; {copies} were there already" * bool(copies))
    if sources:
        say(f"detectors made of them: run_training.py --type {category.name} --model_dir DIR --refit takes them in")


def check_folder(path: Path, flag: str) -> None:
    if not path.is_dir():
        raise InputError(f"{path}: no such folder ({flag})")


# Textures ---------------------------------------------------------------------------------------------------------


def textures(args: argparse.Namespace, data_dir: Path) -> None:
    """Write categories of crops of real textures; stains, scratches and holes are drawn on crops of the half that is
    not trained on."""
    try:
        from skimage import data
    except ImportError as error:
        raise InputError("the package scikit-image is not installed: pip install scikit-image") from error
    for seed, name in enumerate(TEXTURES):
        picture = getattr(data, name)()
        if args.size > min(picture.shape) // 2:
            raise InputError(f"--size {args.size}: the textures give at most {min(picture.shape) // 2}")
        rng = np.random.default_rng(seed)
        seen, unseen = np.split(picture, 2, axis=1)
        with new_category(data_dir, name) as target:
            for index in range(args.train):
                write_image(target / f"train/{GOOD}/{index:03d}.png", crop(seen, args.size, rng))
            for index in range(args.test):
                write_image(target / f"test/{GOOD}/{index:03d}.png", crop(unseen, args.size, rng))
                for defect, draw in DEFECTS.items():
                    image, mask = draw(crop(unseen, args.size, rng), rng)
                    write_image(target / f"test/{defect}/{index:03d}.png", image)
                    write_image(target / f"ground_truth/{defect}/{index:03d}_mask.png", mask * np.uint8(255))


def crop(picture: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Return a random square of a gray picture (H, W): (size, size) uint8."""
    top, left = (rng.integers(0, side - size + 1) for side in picture.shape)
    return picture[top : top + size, left : left + size]


def write_image(path: Path, image: np.ndarray, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **options)


def draw_stain(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw a bright or dark ellipse that lets the texture through. Returns image and mask {0, 1}, (H, W) uint8."""
    mask = ellipse(image.shape, rng, (0.12, 0.22))
    return blend(image, mask, rng.choice([30.0, 230.0]), 0.6), mask


def draw_scratch(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw a thin straight line, bright or dark."""
    size = len(image)
    angle, length = rng.uniform(0, math.pi), rng.uniform(0.3, 0.6) * size
    rows, cols = np.mgrid[:size, :size] - rng.uniform(0.35, 0.65, (2, 1, 1)) * size
    along, across = cols * math.cos(angle) + rows * math.sin(angle), rows * math.cos(angle) - cols * math.sin(angle)
    mask = ((np.abs(along) < length / 2) & (np.abs(across) < max(1.0, size / 50))).astype(np.uint8)
    return blend(image, mask, rng.choice([10.0, 245.0]), 0.85), mask


def draw_hole(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw a smooth ellipse without texture, in the picture's own mean gray."""
    mask = ellipse(image.shape, rng, (0.12, 0.2))
    return blend(image, mask, float(image.mean()), 1.0), mask


DEFECTS = {"stain": draw_stain, "scratch": draw_scratch, "hole": draw_hole}


def ellipse(shape: tuple[int, ...], rng: np.random.Generator, shares: tuple[float, float]) -> np.ndarray:
    """Return a random ellipse inside the image as a mask (H, W) uint8, its radii shares of the image's side."""
    size = shape[0]
    radii = rng.uniform(*shares, 2) * size
    center = [rng.uniform(r, size - r) for r in radii]
    rows, cols = np.mgrid[:size, :size]
    return (((rows - center[0]) / radii[0]) ** 2 + ((cols - center[1]) / radii[1]) ** 2 <= 1).astype(np.uint8)


def blend(image: np.ndarray, mask: np.ndarray, gray: float, strength: float) -> np.ndarray:
    return np.where(mask == 1, (1 - strength) * image + strength * gray, image).round().astype(np.uint8)


if __name__ == "__main__":
    run_script(main, get_parser())
