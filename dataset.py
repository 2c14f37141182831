"""Folders in the MVTec AD layout -> images, labels, masks and what is ignored; anomaly maps -> a folder in that layout.

Owns how masks pair with images, and the masks of regions that do not count, such as a clamp or a date stamp. Writes
nothing but anomaly maps, and nothing beside the images.

    <data_dir>/<category>/train/good/*          normal images to train on
    <data_dir>/<category>/test/good/*           normal test images
    <data_dir>/<category>/test/<defect type>/*  anomalous test images
    <data_dir>/<category>/ground_truth/<defect type>/<name>_mask.png  (or <name>.png), optional;
                                                     <name>/*.png  several for an image, as in MVTec LOCO AD
"""

import hashlib
import io
import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from image_ops import NOTHING_IGNORED, fill_ignored, fill_index_of
from runtime import cache
from runtime.cache import IN_MEMORY, Storage
from runtime.files import MARK, InputError, check_name, check_replaceable, has_mark, say_once, write_file
from runtime.image_files import (
    DECODER,
    FULL_RANGE,
    decode,
    decode_mask,
    find_folders,
    find_images,
    formats,
    is_hidden,
    list_folder,
    read_size,
    suffixes_in_words,
    white_of,
)

GOOD = "good"
AT_ONCE = 4096  # images that are given to the threads together: each that waits takes a kilobyte


@dataclass(frozen=True)
class TrainSet:
    """The normal training images of a category, by name."""

    images: Tensor  # (N, 3, H, W) uint8, ignored pixels filled
    paths: list[Path]
    fill_index: Tensor  # (H, W) int32, see image_ops.fill_ignored; empty if every pixel counts
    white: int = FULL_RANGE  # the value that is white in 16-bit images, see image_files.decode

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def digest(self) -> str:
        """Digest of the images and of what is ignored in them: a saved state knows by it what it was trained on."""
        ignored = cache.digest(self.fill_index[None]) if self.fill_index.numel() else ""
        return cache.digest(self.images) + ignored


@dataclass(frozen=True)
class TestSet:
    """The test images of a category, normal ones first, then defect type by defect type."""

    __test__ = False  # not a test for pytest to collect

    images: Tensor  # (M, 3, H, W) uint8, ignored pixels filled
    labels: np.ndarray  # (M,) int64, 0 normal, 1 anomalous
    defect_types: list[str]  # M names of folders
    paths: list[Path]
    mask_paths: list[Path | None]  # files, or folders of several; None: a normal image, or an anomalous one without

    @property
    def with_truth(self) -> np.ndarray:
        """(M,) bool: normal images, and anomalous ones that have a mask."""
        return np.array([path is not None or not label for path, label in zip(self.mask_paths, self.labels)])

    def known(self, masks: np.ndarray) -> np.ndarray:
        """Return (M,) bool: the images whose pixels are known, normal ones and anomalous ones with marks in their masks
        (M, H, W). An anomalous one without marks would count as all normal."""
        return (self.labels == 0) | masks.any((1, 2))


def find_categories(data_dir: str | Path) -> list[str]:
    """Return the names of the folders in ``data_dir`` that hold train/good, sorted. Raises InputError if there is
    none."""
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise InputError(f"{data_dir}: no such folder; give the one that holds the categories")
    folders = (path for path in data_dir.iterdir() if not is_hidden(path.name))
    categories = sorted(path.name for path in folders if (path / "train" / GOOD).is_dir())
    if not categories:
        raise InputError(f"{data_dir}: no category in it (a folder with train/{GOOD}); see 'Data' in the README")
    return categories


def choose_categories(data_dir: str | Path, names: Sequence[str]) -> list[str]:
    """Check ``names`` against the categories found; ["all"] means every one. Raises InputError for an unknown one."""
    data_dir = Path(data_dir)
    if list(names) == ["all"] or not data_dir.is_dir():
        return find_categories(data_dir)  # raises, with the reason, if there is no such folder
    for name in names:
        if not (data_dir / name).is_dir():
            known = ", ".join(p.name for p in sorted(data_dir.iterdir()) if p.is_dir() and not is_hidden(p.name))
            raise InputError(f"{name}: no such category in {data_dir}, which holds: {known or 'nothing'}")
    return list(dict.fromkeys(names))


def train_paths(data_dir: str | Path, category: str) -> list[Path]:
    """Return the paths of the normal training images of a category, sorted. Raises InputError if there are fewer than
    two."""
    folder = Path(data_dir) / category / "train" / GOOD
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; a category keeps its normal training images there")
    paths = find_images(folder)
    if others := [path.name for path in find_folders(folder.parent) if path.name != GOOD]:
        say_once(f"{folder.parent}: left out: {', '.join(others)}; only {GOOD} is learned from")
    if len(paths) < 2:
        ending = f"files ending in {suffixes_in_words()}"
        raise InputError(f"{folder}: {len(paths)} image(s) found, at least 2 are needed ({ending})")
    return paths


def files_digest(paths: Sequence[Path]) -> str:
    """Return a digest of the names and sizes of files: a detector knows by it whether its images have changed."""
    text = "\n".join(f"{path.name} {path.stat().st_size}" for path in paths)
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def load_train(
    data_dir: str | Path,
    category: str,
    size: tuple[int, int],
    workers: int,
    storage: Storage = IN_MEMORY,
    ignored: str | Tensor | None = None,
    white: int | None = None,
    paths: Sequence[Path] = (),
) -> TrainSet:
    """Return the normal training images of a category at ``size`` (H, W).

    ignored: what does not count, the text of --ignore or the fill index of a finished detector. white: that of a
    finished detector; default: as ``find_white`` finds it. paths: what ``train_paths`` has listed, or some of it;
    default: it is listed now. Raises InputError if there are fewer than two images, one is bad, or what is ignored
    cannot be.
    """
    paths = list(paths) or train_paths(data_dir, category)
    fill_index = load_fill_index(ignored, category, size, paths[0])
    white = white or find_white(paths, workers)
    images = load_images(paths, size, workers, storage, fill_index=fill_index, white=white)
    return TrainSet(images, paths, fill_index, white)


def find_white(paths: Sequence[Path], workers: int) -> int:
    """Return the value that is white in the 16-bit images of a training set: one less than the smallest power of two
    above the largest value of them all, such as 1023 for cameras of 10 bits; FULL_RANGE if there are none.

    One for all images, and for those that are scored later: one for each would hide which are darker.
    """
    whites = set()

    def look(index: int) -> None:
        if FULL_RANGE not in whites:  # which nothing exceeds: the others need not be decoded
            whites.add(white_of(paths[index]))

    _for_each(look, len(paths), workers)
    return max(whites) or FULL_RANGE


def load_test(
    data_dir: str | Path,
    category: str,
    size: tuple[int, int],
    workers: int,
    storage: Storage = IN_MEMORY,
    ignored: str | Tensor | None = None,
    white: int = FULL_RANGE,
) -> TestSet:
    """Return the test images of a category at ``size`` (H, W). Masks are paired and their sizes compared, not decoded.

    ignored, white: as ``load_train`` takes them. Raises InputError if the test folder is missing or empty, an image is
    bad, or a mask has another size than its image.
    """
    folder = Path(data_dir) / category / "test"
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; evaluation needs test/{GOOD} and a folder for each defect type")
    kinds = [path.name for path in find_folders(folder)]
    kinds.sort(key=lambda name: (name != GOOD, name))
    paths = [path for kind in kinds for path in find_images(folder / kind)]
    if not paths:
        raise InputError(f"{folder}: no image in its folders; evaluation needs test/{GOOD} and the defect types")
    masks = [find_mask(path) for path in paths]
    for path, mask in zip(paths, masks):
        for file in mask_files(mask) if mask else ():
            if (a := read_size(file)) != (b := read_size(path)):
                sizes = f"mask of {a[1]}x{a[0]} pixels for {path}, which has {b[1]}x{b[0]}"
                raise InputError(f"{file}: {sizes}; make them equal")
    types = [path.parent.name for path in paths]
    labels = np.array([kind != GOOD for kind in types], dtype=np.int64)
    fill_index = load_fill_index(ignored, category, size, paths[0])
    images = load_images(paths, size, workers, storage, folder, fill_index, white)
    return TestSet(images, labels, types, paths, masks)


def has_test_images(data_dir: str | Path, category: str) -> bool:
    """Return whether a category has any test image."""
    folder = Path(data_dir) / category / "test"
    return folder.is_dir() and any(map(find_images, find_folders(folder)))


def find_mask(path: Path) -> Path | None:
    """Return the ground truth of test/<defect type>/<name>: ground_truth/<defect type>/<name>_mask or <name>, any
    suffix, or a folder <name>; None if there is none."""
    if path.parent.name == GOOD:
        return None
    folder = path.parents[2] / "ground_truth" / path.parent.name
    suffixes = (path.suffix, *formats(), *(suffix.upper() for suffix in formats()))
    candidates = (folder / (stem + suffix) for stem in (f"{path.stem}_mask", path.stem) for suffix in suffixes)
    several = folder / path.stem
    # Path.is_file would fail on a name that is too long
    return next(filter(os.path.isfile, candidates), several if os.path.isdir(several) else None)


def mask_files(mask: Path) -> list[Path]:
    """Return the files of an image's ground truth, each of which marks a part: the file, or those in the folder."""
    return find_images(mask) if mask.is_dir() else [mask]


def unpaired_masks(test: TestSet) -> list[Path]:
    """Return what lies in ground_truth and is the mask of no test image; without that folder, the other folders beside
    test. Masks of normal images are not looked at."""
    category = test.paths[0].parents[2]
    if not (category / "ground_truth").is_dir():
        return [path for path in list_folder(category)[1] if path.name not in ("train", "test", "validation")]
    masks, kinds = list_folder(category / "ground_truth")
    for kind in kinds:
        masks += [path for group in list_folder(kind) for path in group if kind.name != GOOD]
    return [path for path in masks if path not in test.mask_paths]


def load_images(
    paths: Sequence[Path],
    size: tuple[int, int],
    workers: int,
    storage: Storage = IN_MEMORY,
    folder: Path | None = None,
    fill_index: Tensor = NOTHING_IGNORED,
    white: int = FULL_RANGE,
) -> Tensor:
    """Decode, resize and fill images in ``workers`` threads (0: in this one): (N, 3, H, W) uint8, in the order of
    ``paths``.

    storage: says whether they are kept for the next run and how many stay in memory; images beyond the memory are
    mapped from a file and must not be written to. folder: what they are called in the cache, see cache.load. white: see
    image_files.decode.
    """

    def decode_into(first: int, images: Tensor) -> None:
        def work(index: int) -> None:
            pixels = torch.from_numpy(decode(paths[first + index], size, white)).permute(2, 0, 1)
            images[index] = fill_ignored(pixels[None], fill_index)[0]

        _for_each(work, len(images), workers)

    decoder = DECODER + (f", filled {cache.digest(fill_index[None])}" if fill_index.numel() else "")
    decoder += f", white {white}" if white != FULL_RANGE else ""
    return cache.load(paths, size, decode_into, decoder, storage, folder)


def load_masks(test: TestSet, size: tuple[int, int], workers: int) -> Tensor:
    """Return the ground truth of the test images: (M, H, W) uint8 in {0, 1}, 1 is defective; all 0 where there is no
    mask."""
    masks = torch.zeros(len(test.paths), *size, dtype=torch.uint8)

    def decode_into(index: int) -> None:
        if (path := test.mask_paths[index]) is not None:
            for file in mask_files(path):
                masks[index] |= torch.from_numpy(_resized_mask(decode_mask(file), size))

    _for_each(decode_into, len(test.paths), workers)
    return masks


def _resized_mask(marked: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return a mask (h, w) bool at ``size`` (H, W). Where it shrinks, a pixel counts if any part of it is marked, so
    that no defect is lost."""
    small = np.zeros([min(sides) for sides in zip(marked.shape, size)], dtype=bool)
    places = []  # along each axis, the first and the last pixel that a marked one is a part of: two at most
    for numbers, length, smaller in zip(marked.nonzero(), marked.shape, small.shape):
        places.append((numbers * smaller // length, ((numbers + 1) * smaller - 1) // length))
    for rows, columns in itertools.product(*places):
        small[rows, columns] = True
    return np.array(Image.fromarray(small).resize(size[::-1], Image.Resampling.NEAREST))


def _for_each(work: Callable[[int], None], count: int, workers: int) -> None:
    """Call work(0) ... work(count - 1); the error of the lowest index is raised, whatever the number of threads."""
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
        check_name(target)
        check_replaceable(target, "take another --eval_dir")
        targets[target] = path
    real = os.path.realpath(folder)
    for earlier in folder.glob("test/*/*.tiff"):  # maps of images that may have gone
        linked = os.path.realpath(earlier) != os.path.join(real, earlier.relative_to(folder))
        if earlier not in targets and has_mark(earlier) and not linked:
            earlier.unlink(missing_ok=True)  # another run may have removed it
    for (target, path), values in zip(targets.items(), maps):
        values = functional.interpolate(torch.from_numpy(values)[None, None], read_size(path), mode="bilinear")[0, 0]
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, values.clamp(max=torch.finfo(torch.float16).max).half().numpy(), software=MARK)
        write_file(buffer.getvalue(), target)


def ignored_path(where: str, category: str) -> Path | None:
    """Return the mask of a category: the file ``where``, or <category>.png if that is a folder; None if it is not in
    there."""
    path = Path(where)
    if not path.is_dir():
        return path
    path = path / f"{category}.png"
    return path if path.exists() else None


def load_ignored(path: Path, size: tuple[int, int], file_size: tuple[int, int] | None) -> Tensor:
    """Return the pixels that do not count in images resized to ``size`` (H, W), as (H, W) bool: those of which any part
    is not black in the mask.

    file_size: (H, W) of the image files, None if unknown. The mask has it, or ``size``. Raises InputError if not, if
    the file is no image, or if it ignores every pixel or none.
    """
    mask = decode_mask(path, faint=True)
    if file_size is not None and mask.shape not in (size, file_size):
        here, files, resized = (f"{width}x{height}" for height, width in (mask.shape, file_size, size))
        raise InputError(f"{path}: mask of {here} pixels for images of {files}; give it their size, or {resized}")
    # By the filter that the images are resized with, which reaches beyond the pixel: what it mixes in is a part too
    parts = Image.fromarray(mask.astype(np.float32)).resize(size[::-1], Image.Resampling.BILINEAR)
    ignored = torch.from_numpy(np.array(parts) > 0)
    if ignored.all() or not ignored.any():
        which = f"{'every' if ignored.any() else 'no'} pixel is ignored at {size[1]}x{size[0]}"
        raise InputError(f"{path}: {which}; leave black what counts, and paint the rest white")
    return ignored


def load_fill_index(ignored: str | Tensor | None, category: str, size: tuple[int, int], example: Path) -> Tensor:
    """Return the fill index (H, W) of what is ignored in a category, see image_ops.fill_index_of.

    ignored: a fill index, or the text of --ignore: a mask or a folder of <category>.png; NOTHING_IGNORED comes of None
    and of a folder without one. example: one of the images. Raises InputError for a mask that cannot be.
    """
    if isinstance(ignored, Tensor):
        return ignored.cpu()
    path = ignored_path(ignored, category) if ignored else None
    return NOTHING_IGNORED if path is None else fill_index_of(load_ignored(path, size, read_size(example)))
