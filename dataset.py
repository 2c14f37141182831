"""Folders in the MVTec AD layout -> images, labels and masks; anomaly maps -> a folder in that layout.

Owns what is an image file, how it is decoded, how masks pair with images, and what a bad file gets: an ``InputError``
whose one line names the file and says what to do. Writes nothing but anomaly maps, and nothing beside the images.

    <data_dir>/<category>/train/good/*          normal images to train on
    <data_dir>/<category>/test/good/*           normal test images
    <data_dir>/<category>/test/<defect type>/*  anomalous test images
    <data_dir>/<category>/ground_truth/<defect type>/<name>_mask.png  (or <name>.png), optional
"""

import io
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional

from runtime import cache
from runtime.cache import IN_MEMORY, ImageArray, Storage
from runtime.files import MARK, InputError, check_replaceable, has_mark, write_file

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")  # in any case
GOOD = "good"
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")  # some others tell their size only as they are decoded
# What a header may claim. One of a hundred bytes can keep Pillow busy for a minute
MAX_PIXELS = 178_956_970  # Pillow's own limit: seconds and gigabytes an image; industrial cameras reach 151 million
MAX_SIDE = 2**20  # in Pillow a row costs more than its pixels
MAX_RLE_PIXELS = 2**23  # of a run-length encoded BMP: decoded in Python, 0.3 us a pixel
SCANS = 16  # of a progressive JPEG that has MAX_PIXELS: each is a pass over all of them, writers make about ten
MAX_PARTS = 2**16  # strips or tiles of a TIFF: handled in Python, 10 us apiece, before the size is known
BAND = 2**18  # values that are brought to 8 bits together, so that they stay in the processor's cache
AT_ONCE = 4096  # images that are given to the threads together: each that waits takes a kilobyte
DECODER = f"2, Pillow {PIL.__version__}"  # raise the number when ``decode`` gives other pixels for the same file


@dataclass(frozen=True)
class TestSet:
    """The test images of a category, normal ones first, then defect type by defect type."""

    __test__ = False  # not a test for pytest to collect

    images: ImageArray  # (M, 3, H, W) uint8
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
        raise InputError(f"{data_dir}: no such folder; give the one that holds the categories")
    found = sorted(p.name for p in data_dir.iterdir() if (p / "train" / GOOD).is_dir())
    if not found:
        raise InputError(f"{data_dir}: no category in it (a folder with train/{GOOD}); see 'Data' in the README")
    return found


def choose_categories(data_dir: str | Path, names: Sequence[str]) -> list[str]:
    """Check ``names`` against the categories found; ["all"] means every one. Raises InputError for an unknown one."""
    data_dir = Path(data_dir)
    if list(names) == ["all"] or not data_dir.is_dir():
        return find_categories(data_dir)  # raises, with the reason, if there is no such folder
    for name in names:
        if not (data_dir / name).is_dir():
            known = ", ".join(p.name for p in sorted(data_dir.iterdir()) if p.is_dir()) or "nothing"
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
) -> ImageArray:
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
    suffixes = (path.suffix, *IMAGE_SUFFIXES, *(suffix.upper() for suffix in IMAGE_SUFFIXES))
    candidates = (folder / (stem + suffix) for stem in (f"{path.stem}_mask", path.stem) for suffix in suffixes)
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def load_images(
    paths: Sequence[Path], size: tuple[int, int], workers: int, storage: Storage = IN_MEMORY, folder: Path | None = None
) -> ImageArray:
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
            marked = Image.fromarray(decode_mask(path))
            masks[index] = torch.from_numpy(np.array(marked.resize(size[::-1], Image.Resampling.NEAREST)))

    _for_each(decode_into, len(test.paths), workers)
    return masks


def _for_each(work: Callable[[int], None], count: int, workers: int) -> None:
    """work(0) ... work(count - 1); the error of the lowest index is raised, whatever the number of threads."""
    with ThreadPoolExecutor(workers or 1) as pool:  # threads suffice: Pillow decodes and resizes outside the GIL
        run = pool.map if workers else map
        for first in range(0, count, AT_ONCE):
            list(run(work, range(first, min(first + AT_ONCE, count))))  # an error cancels those that wait


def check_maps_folder(folder: Path, data_dir: str | Path) -> None:
    """Raise InputError if a folder, wherever links lead, is, holds or lies in a category of ``data_dir``."""
    real = Path(os.path.realpath(folder))
    for test in Path(data_dir).glob("*/test"):
        images = Path(os.path.realpath(test.parent))
        if real == images or real in images.parents or images in real.parents:
            raise InputError(f"{folder}: maps would lie among the images of {test.parent}; take another --eval_dir")


def save_maps(folder: Path, images: Path, paths: Sequence[Path], maps: np.ndarray) -> None:
    """Write maps (M, H, W) as float16 TIFF files of their images' sizes, in place of the earlier maps in ``folder``.

    <images>/test/<defect type>/<name>.png -> <folder>/test/<defect type>/<name>.tiff, as MVTec's evaluation script
    reads them. Raises InputError, and changes nothing, if two images differ in nothing but the suffix, or if a file is
    in the way that this program has not written. Others than its maps stay.
    """
    import tifffile

    targets: dict[Path, Path] = {}  # in the order of paths
    for path in paths:
        target = (folder / path.relative_to(images)).with_suffix(".tiff")
        if target in targets:
            raise InputError(f"{path}: its map would be named like that of {targets[target].name}; rename one of them")
        check_replaceable(target, "take another --eval_dir")
        targets[target] = path
    real = os.path.realpath(folder)
    for earlier in folder.glob("test/*/*.tiff"):  # maps of images that may have gone
        linked = os.path.realpath(earlier) != os.path.join(real, earlier.relative_to(folder))
        if earlier not in targets and has_mark(earlier) and not linked:
            earlier.unlink()
    for (target, path), values in zip(targets.items(), maps):
        values = functional.interpolate(torch.from_numpy(values)[None, None], read_size(path), mode="bilinear")[0, 0]
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, values.clamp(max=torch.finfo(torch.float16).max).half().numpy(), software=MARK)
        write_file(buffer.getvalue(), target)


# Image files ------------------------------------------------------------------------------------------------------


def decode(path: str | Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """One image file as RGB: (H, W, 3) uint8, resized to ``size`` = (H, W) with an anti-aliased bilinear filter.

    Turned upright by its EXIF tag; 16-bit and float images brought to 8 bits; transparent pixels laid on white.
    Raises InputError, with the path, if the file is missing, truncated, no image, or claims to be too large.
    """
    with _opened(path) as image:
        ImageOps.exif_transpose(image, in_place=True)
        image = _to_8_bits(image, path)
        image = image if size is None else _resized(image, size)
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An image (H, W, 3) uint8, brought to ``size`` as by ``decode``. Raises InputError for another kind of array."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise InputError(f"an array (H, W, 3) uint8 is needed for an image, not {image.shape} {image.dtype}")
    return np.array(_resized(Image.fromarray(image), size))


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size[::-1] else image.resize(size[::-1], Image.Resampling.BILINEAR)


def decode_mask(path: str | Path) -> np.ndarray:
    """One mask upright: (H, W) bool, whether a pixel is not black. Raises InputError as ``decode`` does."""
    with _opened(path) as image:
        ImageOps.exif_transpose(image, in_place=True)
        values = np.asarray(image if image.mode in ("1", "L", "I", "I;16", "F") else image.convert("RGB"))
        return (values > 0).reshape(*values.shape[:2], -1).any(2)


def read_size(path: str | Path) -> tuple[int, int]:
    """(H, W) of an image file as it will be decoded, from its header."""
    with _opened(path) as image:
        # A TIFF's as it is stored: newer versions of Pillow turn the size when they open the file, older ones do not
        width, height = (image.tag_v2[256], image.tag_v2[257]) if image.format == "TIFF" else image.size
        # A whole PNG would be decoded to look for a tag behind its pixels
        turned = (image.format != "PNG" or "exif" in image.info) and image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        return (width, height) if turned else (height, width)


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """``with _opened(path) as image``: every way in which a file is no image becomes an InputError."""
    try:
        Image.MAX_IMAGE_PIXELS = None  # Pillow would print a warning for what is allowed here
        with open(path, "rb") as file:  # from a path, Pillow 13 maps gray TIFF files and scrambles those that it turns
            _check_parts(file, path)
            with Image.open(file, formats=FORMATS) as image:
                _check_pixels(image, path)
                yield image
    except (FileNotFoundError, PermissionError) as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError, TypeError, ArithmeticError, struct.error) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].partition(" <")[0]
        raise InputError(f"{path}: not a readable image ({reason}); replace or remove it") from error


def _check_parts(file: BinaryIO, path: str | Path) -> None:
    """Refuse a TIFF file with too many parts, by its own header. Fractions in a tag cost Pillow as much as strips."""
    head = file.read(16)
    if head[:2] not in (b"II", b"MM"):
        return
    order, big = "<" if head[:2] == b"II" else ">", head[2:3] == b"+"  # as Pillow tells a BigTIFF
    file.seek(*struct.unpack_from(order + ("Q" if big else "I"), head, 8 if big else 4))
    number, entry = (struct.Struct(order + part) for part in (("Q", "HHQ8x") if big else ("H", "HHI4x")))
    (count,) = number.unpack(file.read(number.size))
    tags = file.read(min(count, MAX_PARTS) * entry.size)
    whole = entry.iter_unpack(tags[: len(tags) // entry.size * entry.size])
    count = max([count, *(values for tag, kind, values in whole if tag in (273, 324) or kind in (5, 10))])
    if count > MAX_PARTS:
        raise InputError(f"{path}: claims {count} strips or tiles, at most {MAX_PARTS} are read; save larger ones")


def _check_pixels(image: Image.Image, path: str | Path) -> None:
    """Refuse an image that claims more pixels than are read, or than its file can hold."""
    (width, height), packing = image.size, (image.format, image.info.get("compression"))
    scans = Path(path).read_bytes().count(b"\xff\xda") if "progressive" in image.info else 1
    most = MAX_RLE_PIXELS if packing in (("BMP", 1), ("BMP", 2)) else MAX_PIXELS * SCANS // max(scans, SCANS)
    if width * height > most or max(width, height) > MAX_SIDE:
        raise InputError(f"{path}: claims {width}x{height} pixels; allowed: {most}, {MAX_SIDE} a side; scale it down")
    if packing == ("TIFF", "raw") and width * height > 8 * (held := os.path.getsize(path)):
        raise InputError(f"{path}: claims {width}x{height} pixels in {held} bytes, at most 8 a byte; replace it")


def _to_8_bits(image: Image.Image, path: str | Path) -> Image.Image:
    """As gray or RGB without transparency: gray is resized in a third of the time."""
    if image.mode == "F" or image.mode.startswith("I"):  # float; 16 bits, some of which Pillow reads as 32
        top, kind, how = (1, "float", "in [0, 1] or 8") if image.mode == "F" else (65535, "gray", "with 8 or 16")
        values = np.asarray(image).reshape(-1)
        if not (values.min() >= 0 and values.max() <= top):
            raise InputError(f"{path}: {kind} values from {values.min()} to {values.max()}; save it {how} bits")
        bands = np.array_split(values, len(values) // BAND + 1)
        scaled = np.concatenate([(band * np.float32(255 / top)).round().astype(np.uint8) for band in bands])
        image = Image.fromarray(scaled.reshape(image.size[::-1]))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image if image.mode in ("L", "RGB") else image.convert("RGB")
