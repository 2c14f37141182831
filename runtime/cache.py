"""Decoded images: kept on disk for the next run, and mapped from there where they are larger than the memory.

Owns the folder of the cache and the files in it. Writes to that folder, or to a temporary file that has no name;
knows nothing of image files but their paths, sizes and times, and nothing of decoding: ``load`` is handed a function.

    <cache folder>/<digest of image folder and size>.images    N*3*H*W bytes, a line of JSON that says what they were
                                                               made from, a line with their checksum
"""

import functools
import hashlib
import json
import math
import mmap
import os
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from runtime.files import new_part, remove_abandoned, say_once

FORMAT = "cutpaste-images 2"  # raise the number when the layout of the file changes
BLOCK = 64 * 2**20  # bytes of images that are decoded, written or looked at in one go
SUFFIX = ".images"


@dataclass(frozen=True)
class Storage:
    """Where decoded images live. folder: the cache (None: keep none). memory: bytes that the images of one folder may
    take in memory; larger ones are mapped from a file."""

    folder: Path | None = None
    memory: float = math.inf

    def maps(self, shape: Sequence[int]) -> bool:
        """Return whether images of this shape (N, 3, H, W) are mapped from a file, being larger than the memory."""
        return math.prod(shape) > self.memory


IN_MEMORY = Storage()


def default_folder() -> Path | None:
    """Return $XDG_CACHE_HOME/cutpaste, or ~/.cache/cutpaste; None for a user without a home."""
    for parent in (os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")):
        if os.path.isabs(parent):  # what the standard asks for, and what an unknown home is not
            return Path(parent) / "cutpaste"
    return None


def load(
    paths: Sequence[Path],
    size: tuple[int, int],
    decode_into: Callable[[int, Tensor], None],
    decoder: str,
    storage: Storage,
    folder: Path | None = None,
) -> Tensor:
    """Return the images of ``paths``, from the cache or decoded: (N, 3, H, W) uint8, not to be written to.

    size: (H, W).
    decode_into(first, images): decodes those from index ``first`` on into ``images`` (n, 3, H, W).
    decoder: its name and version; what another one has decoded is not taken from the cache.
    storage: images that it maps take no memory of their own: the system reads and drops their pages as it needs.
    folder: the cache keeps one file for each folder and size; loading other paths for the same ones replaces it.
        Default: the deepest folder that holds all paths.

    A cache that cannot be written costs a line on stderr. Raises OSError if mapped images find no room on disk, and
    what decode_into raises.
    """
    shape = (len(paths), 3, *size)
    mapped = storage.maps(shape)
    seal = None
    if storage.folder is not None and len(paths):
        parents = {os.path.dirname(path) for path in paths}
        folder = folder or os.path.commonpath([os.path.abspath(parent) for parent in parents])
        name = hashlib.blake2b(os.fsencode(os.path.realpath(folder)) + b"\0%d\0%d" % size, digest_size=16).hexdigest()
        entry = storage.folder / (name + SUFFIX)
        seal = _seal(paths, shape, decoder)
    if seal is not None and (images := _read(entry, seal, shape, mapped)) is not None:
        return images
    if not mapped:
        images = torch.empty(shape, dtype=torch.uint8)
        decode_into(0, images)
    if seal is not None:
        try:
            storage.folder.mkdir(parents=True, exist_ok=True)
            remove_abandoned(storage.folder)
            with new_part(storage.folder) as (part, file):
                checksum = _write(file, _decoded(shape, decode_into) if mapped else iterate(images))
                if _seal(paths, shape, decoder) == seal:  # else a file was changed meanwhile
                    file.write(seal + b"%08x\n" % checksum)
                    file.flush()
                    os.fsync(file.fileno())
                    os.replace(part, entry)
                return _map(file, shape) if mapped else images
        except OSError as error:
            reason = error.strerror or error
            say_once(f"{storage.folder}: decoded images cannot be kept there ({reason}); choose another folder")
    return _without_name(_decoded(shape, decode_into), shape) if mapped else images


# Passes over images -----------------------------------------------------------------------------------------------


def iterate(images: Tensor, count: int | None = None) -> Iterator[Tensor]:
    """Yield slices of ``count`` images (default: of BLOCK bytes), in order."""
    step = count or _block_length(images.shape)
    for first in range(0, len(images), step):
        yield images[first : first + step]


def digest(images: Tensor) -> str:
    """Return a digest of the pixels, in order: 32 hexadecimal digits."""
    state = hashlib.blake2b(digest_size=16)
    for block in iterate(images):
        state.update(block.numpy())
    return state.hexdigest()


def all_equal(images: Tensor) -> bool:
    """Return whether all images are the same."""
    return all((block == images[0]).all() for block in iterate(images))


def _block_length(shape: Sequence[int]) -> int:
    return max(8, BLOCK // math.prod(shape[1:]))  # 8: large images are decoded in parallel too


# The files --------------------------------------------------------------------------------------------------------


def _seal(paths: Sequence[Path], shape: tuple[int, ...], decoder: str) -> bytes | None:
    """Return what the pixels are made from, as it stands behind them in the file: the same bytes, the same pixels. None
    if a file cannot be found: decoding it says why."""
    real_path, files = functools.cache(os.path.realpath), hashlib.sha256()
    with suppress(OSError):
        for path in paths:
            folder, name = os.path.split(path)
            status = os.stat(path)
            # ctime too: mv and cp -p hand a file another name, or a name another file, with its size and mtime
            numbers = f"{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}\0"
            files.update(os.fsencode(f"{real_path(folder)}/{name}\0{numbers}"))
        made_from = {"format": FORMAT, "decoder": decoder, "shape": shape, "files": files.hexdigest()}
        return b"\n" + json.dumps(made_from).encode() + b"\n"
    return None


def _read(entry: Path, seal: bytes, shape: tuple[int, ...], mapped: bool) -> Tensor | None:
    """Return the images of an entry that is whole and made from the same files; None for any other."""
    with suppress(OSError), open(entry, "rb") as file:
        file.seek(math.prod(shape))  # beyond the end of a shorter file there is nothing to be read
        end = file.read(len(seal) + 10)  # the line of the checksum takes 9: a longer file is another one
        if end.startswith(seal):
            file.seek(0)
            images = _map(file, shape) if mapped else torch.empty(shape, dtype=torch.uint8)
            if not mapped:
                file.readinto(images.numpy())
            checksum = functools.reduce(lambda crc, block: zlib.crc32(block.numpy(), crc), iterate(images), 0)
            if end == seal + b"%08x\n" % checksum:
                return images
    return None


def _decoded(shape: tuple[int, ...], decode_into: Callable[[int, Tensor], None]) -> Iterator[Tensor]:
    """Yield all images block by block, each in the place of the one before."""
    step = _block_length(shape)
    buffer = torch.empty((min(step, shape[0]), *shape[1:]), dtype=torch.uint8)
    for first in range(0, shape[0], step):
        block = buffer[: shape[0] - first]
        decode_into(first, block)
        yield block


def _write(file: BinaryIO, blocks: Iterable[Tensor]) -> int:
    """Write blocks of images one behind the other, and return their checksum."""
    checksum = 0
    for block in blocks:
        file.write(block.numpy())
        checksum = zlib.crc32(block.numpy(), checksum)
    file.flush()
    return checksum


def _without_name(blocks: Iterable[Tensor], shape: tuple[int, ...]) -> Tensor:
    """Return images in a temporary file that goes when they go, even if the process is killed."""
    folder = tempfile.gettempdir()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            _write(file, blocks)
            return _map(file, shape)
    except OSError as error:
        needed = f"{math.prod(shape) / 1e9:.1f} GB of images larger than the memory for them find no room"
        raise OSError(error.errno, f"{needed} ({error.strerror}); set TMPDIR to another folder", folder) from error


def _map(file: BinaryIO, shape: tuple[int, ...]) -> Tensor:
    """Map images (N, 3, H, W), the beginning of a file, into memory. The file may be closed and lose its name.

    Read-only, so writing to them ends the process: Linux refuses a private, writable mapping (ACCESS_COPY) that is
    larger than its memory.
    """
    pixels = mmap.mmap(file.fileno(), math.prod(shape), access=mmap.ACCESS_READ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns of the crash above
        return torch.frombuffer(pixels, dtype=torch.uint8).view(shape)
