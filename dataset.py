"""Folders in the MVTec AD layout -> images, labels and masks in memory.

Owns what is an image file, how it is decoded, how masks pair with images, and what a bad file gets: an ``InputError``
whose one line names the file and says what to do. Reads only; what it decoded, ``cache.py`` may keep elsewhere.

    <data_dir>/<category>/train/good/*          normal images to train on
    <data_dir>/<category>/test/good/*           normal test images
    <data_dir>/<category>/test/<defect type>/*  anomalous test images
    <data_dir>/<category>/ground_truth/<defect type>/<name>_mask.png  (or <name>.png), optional
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps
from torch import Tensor

import cache
from cache import IN_MEMORY, Storage

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")  # in any case
GOOD = "good"
AT_ONCE = 4096  # images that are given to the threads together: each that waits takes a kilobyte
DECODER = f"1, Pillow {PIL.__version__}"  # raise the number when ``decode`` gives other pixels for the same file


class InputError(ValueError):
    """A user's mistake or a bad file: one line that names it, says what was found and what to do."""


@dataclass(frozen=True)
class TestSet:
    """The test images of a category, normal ones first, then defect type by defect type."""

    __test__ = False  # not a test for pytest to collect

    images: Tensor  # (M, 3, H, W) uint8
    labels: np.ndarray  # (M,) int64, 0 normal, 1 anomalous
    defect_types: list[str]  # M names of folders
    paths: list[Path]
    mask_paths: list[Path | None]  # None: a normal image, or an anomalous one without a mask

    @property
    def with_truth(self) -> np.ndarray:
        """(M,) bool: the images whose pixels are known. An anomalous one without a mask would count as all normal."""
        return np.array([path is not None or not label for path, label in zip(self.mask_paths, self.labels)])


def find_categories(data_dir: str | Path) -> list[str]:
    """The names of the folders in ``data_dir`` that hold train/good, sorted. Raises InputError if there is none."""
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise InputError(f"{data_dir}: no such folder; give the folder that holds the categories with --data_dir")
    found = sorted(p.name for p in data_dir.iterdir() if (p / "train" / GOOD).is_dir())
    if not found:
        raise InputError(f"{data_dir}: no category in it (a folder with train/{GOOD}); see 'Data' in the README")
    return found


def choose_categories(data_dir: str | Path, names: Sequence[str]) -> list[str]:
    """Check ``names`` against the categories found; ["all"] means every one. Raises InputError for an unknown one."""
    if list(names) == ["all"]:
        return find_categories(data_dir)
    if not Path(data_dir).is_dir():
        find_categories(data_dir)  # raises, with the reason
    for name in names:
        if not (Path(data_dir) / name).is_dir():
            known = ", ".join(p.name for p in sorted(Path(data_dir).iterdir()) if p.is_dir()) or "nothing"
            raise InputError(f"{name}: no such category in {data_dir}, which holds: {known}")
    return list(dict.fromkeys(names))


def train_paths(data_dir: str | Path, category: str) -> list[Path]:
    """The normal training images of a category, sorted. Raises InputError if there are fewer than two."""
    folder = Path(data_dir) / category / "train" / GOOD
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; a category keeps its normal training images there")
    paths = find_images(folder)
    if len(paths) < 2:
        kinds = ", ".join(s[1:] for s in IMAGE_SUFFIXES)
        raise InputError(f"{folder}: {len(paths)} image(s) found, at least 2 are needed (files ending in {kinds})")
    return paths


def load_train(
    data_dir: str | Path, category: str, size: tuple[int, int], workers: int, storage: Storage = IN_MEMORY
) -> Tensor:
    """The normal training images of a category: (N, 3, H, W) uint8. size: (H, W)."""
    return load_images(train_paths(data_dir, category), size, workers, storage)


def load_test(
    data_dir: str | Path, category: str, size: tuple[int, int], workers: int, storage: Storage = IN_MEMORY
) -> TestSet:
    """The test images of a category. size: (H, W). Masks are paired and their sizes compared, not decoded.

    Raises InputError if the test folder is missing or empty, an image is bad, or a mask has another size than its
    image.
    """
    folder = Path(data_dir) / category / "test"
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; evaluation needs test/{GOOD} and a folder for each defect type")
    kinds = [p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")]
    kinds.sort(key=lambda name: (name != GOOD, name))
    paths = [path for kind in kinds for path in find_images(folder / kind)]
    if not paths:
        raise InputError(f"{folder}: no image in its folders; evaluation needs test/{GOOD} and the defect types")
    masks = [find_mask(path) for path in paths]
    for path, mask in zip(paths, masks):
        if mask is not None and (a := read_size(mask)) != (b := read_size(path)):
            raise InputError(
                f"{mask}: mask of {a[1]}x{a[0]} pixels for {path}, which has {b[1]}x{b[0]}; make them equal"
            )
    types = [path.parent.name for path in paths]
    labels = np.array([kind != GOOD for kind in types], dtype=np.int64)
    return TestSet(load_images(paths, size, workers, storage, folder), labels, types, paths, masks)


def find_images(folder: Path) -> list[Path]:
    """The image files of a folder by name; hidden files (macOS leaves ``._x.png``) and sub-folders are not."""
    with os.scandir(folder) as entries:
        names = sorted(e.name for e in entries if e.is_file() and not e.name.startswith("."))
    return [folder / name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]


def find_mask(path: Path) -> Path | None:
    """The ground truth of test/<defect type>/<name>: ground_truth/<defect type>/<name>_mask or <name>, any suffix."""
    if path.parent.name == GOOD:
        return None
    folder = path.parents[2] / "ground_truth" / path.parent.name
    for stem in (f"{path.stem}_mask", path.stem):
        for suffix in (path.suffix, *IMAGE_SUFFIXES, *(s.upper() for s in IMAGE_SUFFIXES)):
            if (candidate := folder / (stem + suffix)).is_file():
                return candidate
    return None


def load_images(
    paths: Sequence[Path],
    size: tuple[int, int],
    workers: int,
    storage: Storage = IN_MEMORY,
    folder: Path | None = None,
) -> Tensor:
    """Decode and resize in ``workers`` threads (0: in this one): (N, 3, H, W) uint8, in the order of ``paths``.

    ``storage`` says whether they are kept for the next run and how many stay in memory, ``folder`` what they are
    called there (see cache.load); images beyond the memory are mapped from a file and must not be written to.
    """

    def decode_into(first: int, images: Tensor) -> None:
        def work(index: int) -> None:
            images[index] = torch.from_numpy(decode(paths[first + index], size)).permute(2, 0, 1)

        _for_each(work, len(images), workers)

    return cache.load(paths, size, decode_into, DECODER, storage, folder)


def load_masks(test: TestSet, size: tuple[int, int], workers: int) -> Tensor:
    """Ground truth of the test images: (M, H, W) uint8 in {0, 1}, 1 is defective; all 0 where there is no mask."""
    masks = torch.zeros(len(test.paths), *size, dtype=torch.uint8)

    def decode_into(index: int) -> None:
        if (path := test.mask_paths[index]) is not None:
            with _opened(path) as image:
                mask = ImageOps.exif_transpose(image)
                values = np.asarray(mask if mask.mode in ("1", "L", "I", "I;16", "F") else mask.convert("RGB"))
                marked = Image.fromarray((values > 0).reshape(*values.shape[:2], -1).any(2))
                masks[index] = torch.from_numpy(np.array(marked.resize(size[::-1], Image.Resampling.NEAREST)))

    _for_each(decode_into, len(test.paths), workers)
    return masks


def _for_each(work: Callable[[int], None], count: int, workers: int) -> None:
    """work(0) ... work(count - 1); the error of the lowest index is raised, whatever the number of threads."""
    if workers == 0:
        for index in range(count):
            work(index)
        return
    with ThreadPoolExecutor(workers) as pool:  # threads suffice: Pillow decodes and resizes outside the GIL
        for first in range(0, count, AT_ONCE):
            futures = [pool.submit(work, index) for index in range(first, min(first + AT_ONCE, count))]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def decode(path: str | Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """One image file as RGB: (H, W, 3) uint8, resized to ``size`` = (H, W) with an anti-aliased bilinear filter.

    Turned upright by its EXIF tag; 16-bit and float images brought to 8 bits; transparent pixels laid on white.
    Raises InputError, with the path, if the file is missing, truncated or no image.
    """
    with _opened(path) as image:
        image = _to_8_bits(ImageOps.exif_transpose(image), path)
        if size is not None and image.size != size[::-1]:
            image = image.resize(size[::-1], Image.Resampling.BILINEAR)
        return np.array(image.convert("RGB"))


def read_size(path: str | Path) -> tuple[int, int]:
    """(H, W) of an image file as it will be decoded, from its header where that says it."""
    with _opened(path) as image:
        width, height = image.size
        if image.format == "TIFF":
            image.load()  # older versions of Pillow turn it only then, newer ones when it is opened
            width, height = image.size
        # A TIFF is turned already, and a whole PNG would be decoded to look for a tag behind its pixels
        tagged = image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info)
        turned = tagged and image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # the orientations that swap the sides
        return (width, height) if turned else (height, width)


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """``with _opened(path) as image``: every way in which a file is no image becomes an InputError."""
    try:
        with Image.open(path) as image:
            yield image
    except InputError:
        raise
    except (FileNotFoundError, PermissionError) as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError, Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        reason = reason.replace(f" {str(path)!r}", "")
        raise InputError(f"{path}: not a readable image ({reason}); replace or remove it") from error


def _to_8_bits(image: Image.Image, path: str | Path) -> Image.Image:
    """As grey or RGB without transparency: grey is resized in a third of the time."""
    if image.mode.startswith("I;16") or image.mode == "I":  # 16 bits; Pillow also reads some as 32-bit integers
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise InputError(f"{path}: grey values from {values.min()} to {values.max()}; save it with 8 or 16 bits")
        image = Image.fromarray(((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):
            raise InputError(f"{path}: float values from {values.min()} to {values.max()}; save it in [0, 1] or 8 bits")
        image = Image.fromarray((values * 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "L" else image.convert("RGB")
