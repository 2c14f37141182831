"""Decoded images: kept on disk for the next run, and mapped from there where they are larger than the memory.

Owns the folder of the cache, the files in it, and how a pass over many images stays small. Writes to that folder, or
to a temporary file that has no name; knows nothing of image files but their paths, sizes and times, and nothing of
decoding: ``load`` is handed a function.

    <cache folder>/<digest of image folder and size>.images    N*3*H*W bytes, a line of JSON that says what they were
                                                               made from, a line with their checksum
"""

import functools
import hashlib
import json
import math
import mmap
import os
import secrets
import sys
import tempfile
import time
import warnings
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

FORMAT = "cutpaste-images 2"  # raise the number when the layout of the file changes
BLOCK = 64 * 2**20  # bytes of images that are decoded, written or looked at in one go
LEAST = 8  # images in such a block, so that large ones are decoded in parallel too
AROUND = 2**21  # bytes on either side of a byte looked at that Linux may map with it: a large page
SUFFIX, PART = ".images", ".cutpaste-part"
KILLED_AFTER = 24 * 3600  # seconds since its last byte until an unfinished file is taken for a killed run's


@dataclass(frozen=True)
class Storage:
    """Where decoded images live. folder: the cache (None: keep none). memory: bytes that the images of one folder may
    take in memory; larger ones are mapped from a file."""

    folder: Path | None = None
    memory: float = math.inf


IN_MEMORY = Storage()

# Maps by the address of their first byte; each lives as long as the tensor on it
_maps: "weakref.WeakValueDictionary[int, mmap.mmap]" = weakref.WeakValueDictionary()


def default_folder() -> Path | None:
    """$XDG_CACHE_HOME/cutpaste, or ~/.cache/cutpaste; None for a user without a home."""
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
    """The images of ``paths``, from the cache or decoded: (N, 3, H, W) uint8, not to be written to. size: (H, W).

    decode_into(first, images) fills ``images`` (n, 3, H, W) with those from index ``first`` on. decoder: what the
    pixels depend on beside files and size. folder: what the entry of the cache stands for, one for each size; another
    load for the same one replaces it (default: the deepest folder that holds all). A cache that cannot be written
    costs a line on stderr. Raises OSError if images larger than ``storage.memory`` find no room on disk either, and
    what decode_into raises.
    """
    shape = (len(paths), 3, *size)
    mapped = math.prod(shape) > storage.memory
    seal = None
    if storage.folder is not None and len(paths):
        parents = {os.path.dirname(path) for path in paths}
        folder = folder or Path(os.path.commonpath([os.path.abspath(parent) for parent in parents]))
        entry = _entry(storage.folder, folder, size)
        seal = _seal(paths, shape, decoder)
    if seal is not None and (images := _read(entry, seal, shape, mapped)) is not None:
        return images
    if not mapped:
        images = torch.empty(shape, dtype=torch.uint8)
        decode_into(0, images)
    if seal is not None:
        try:
            with _new_file(entry) as (file, keep):
                checksum = _write(file, _decoded(shape, decode_into) if mapped else blocks(images))
                if _seal(paths, shape, decoder) == seal:  # else a file was changed meanwhile
                    file.write(seal + _line(checksum))
                    keep()
                return _map(file, shape) if mapped else images
        except OSError as error:
            reason = error.strerror or error
            _complain(f"{storage.folder}: decoded images cannot be kept there ({reason}); see --cache_dir")
    return _without_name(_decoded(shape, decode_into), shape) if mapped else images


# Passes over images -----------------------------------------------------------------------------------------------


def blocks(images: Tensor, length: int | None = None) -> Iterator[Tensor]:
    """Slices of ``length`` images (default: of BLOCK bytes), in order, each given back to the system after its use."""
    for block in images.split(length or _block_length(images.shape)):
        try:
            yield block
        finally:
            release(block)


def release(images: Tensor) -> None:
    """Let go of the memory of mapped images, or of a slice of them; they are read from the disk again when needed.
    Other tensors stay as they are."""
    held = _maps.get(images.untyped_storage().data_ptr())
    if held is not None and images.numel() and hasattr(held, "madvise"):
        first = images.storage_offset()
        start = max(0, first - AROUND) // mmap.PAGESIZE * mmap.PAGESIZE
        end = min(len(held), first + images.numel() + AROUND)
        held.madvise(mmap.MADV_DONTNEED, start, end - start)


def is_mapped(images: Tensor) -> bool:
    """Whether images lie in a file rather than in memory."""
    return images.untyped_storage().data_ptr() in _maps


def digest(images: Tensor) -> str:
    """A digest of the pixels, in order: 32 hexadecimal digits."""
    state = hashlib.blake2b(digest_size=16)
    for block in blocks(images):
        state.update(block.numpy())
    return state.hexdigest()


def all_equal(images: Tensor) -> bool:
    """Whether all images are the same."""
    return all((block == images[0]).all() for block in blocks(images))


def _block_length(shape: Sequence[int]) -> int:
    return max(LEAST, BLOCK // max(1, math.prod(shape[1:])))


# The files --------------------------------------------------------------------------------------------------------


def _entry(cache: Path, folder: Path, size: tuple[int, int]) -> Path:
    """The file for the images of a folder at a size, whatever they are at the moment."""
    name = hashlib.blake2b(os.fsencode(os.path.realpath(folder)) + b"\0%d\0%d" % size, digest_size=16).hexdigest()
    return cache / (name + SUFFIX)


def _seal(paths: Sequence[Path], shape: tuple[int, ...], decoder: str) -> bytes | None:
    """What the pixels are made from, as it stands behind them in the file: the same bytes, the same pixels.

    None if a file is not to be had: decoding it says why.
    """
    files = hashlib.sha256()
    folders: dict[str, str] = {}
    try:
        for path in paths:
            folder, name = os.path.split(path)
            if folder not in folders:
                folders[folder] = os.path.realpath(folder)
            status = os.stat(path)
            # ctime too: mv and cp -p hand a file another name, or a name another file, with its size and mtime
            files.update(
                os.fsencode(f"{folders[folder]}/{name}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}\0")
            )
    except OSError:
        return None
    made_from = {"format": FORMAT, "decoder": decoder, "shape": shape, "files": files.hexdigest()}
    return b"\n" + json.dumps(made_from).encode() + b"\n"


def _line(checksum: int) -> bytes:
    return b"%08x\n" % checksum


def _read(entry: Path, seal: bytes, shape: tuple[int, ...], mapped: bool) -> Tensor | None:
    """The images of an entry that is whole and made from the same files; None for any other."""
    length = math.prod(shape)
    try:
        with open(entry, "rb", buffering=0) as file:
            file.seek(length)  # beyond the end of a shorter file there is nothing to be read
            end = file.read(len(seal) + len(_line(0)) + 1)
            if end[: len(seal)] != seal:
                return None
            file.seek(0)
            step = _block_length(shape)
            images = torch.empty((min(step, shape[0]) if mapped else shape[0], *shape[1:]), dtype=torch.uint8)
            checksum = 0
            for first in range(0, shape[0], step):
                block = images[: shape[0] - first] if mapped else images[first : first + step]
                block = block.numpy().reshape(-1)
                if file.readinto(block) != len(block):
                    return None
                checksum = zlib.crc32(block, checksum)
            if end[len(seal) :] != _line(checksum):
                return None
            return _map(file, shape) if mapped else images
    except OSError:
        return None


def _decoded(shape: tuple[int, ...], decode_into: Callable[[int, Tensor], None]) -> Iterator[Tensor]:
    """All images, block by block, each in the place of the one before."""
    step = _block_length(shape)
    buffer = torch.empty((min(step, shape[0]), *shape[1:]), dtype=torch.uint8)
    for first in range(0, shape[0], step):
        block = buffer[: shape[0] - first]
        decode_into(first, block)
        yield block


def _write(file: BinaryIO, pixels: Iterable[Tensor]) -> int:
    """Write blocks of images one behind the other. Returns their checksum."""
    checksum = 0
    for block in pixels:
        data = block.numpy().reshape(-1)
        file.write(data)
        checksum = zlib.crc32(data, checksum)
    file.flush()
    return checksum


@contextmanager
def _new_file(entry: Path) -> Iterator[tuple[BinaryIO, Callable[[], None]]]:
    """``with _new_file(entry) as (file, keep)``: a file under a name of its own, so that several runs may write the
    same entry at once. keep() puts it in place, whole; without that it is removed, though it can still be mapped."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(entry.parent)
    part = entry.with_name(f".{entry.stem}.{secrets.token_hex(8)}{PART}")

    def keep() -> None:
        file.flush()
        os.fsync(file.fileno())
        os.replace(part, entry)

    with open(part, "x+b") as file:
        try:
            yield file, keep
        finally:
            part.unlink(missing_ok=True)


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed runs have left unfinished."""
    for part in folder.glob(".*" + PART):
        with suppress(OSError):  # another run has removed it
            if time.time() - part.stat().st_mtime > KILLED_AFTER:
                part.unlink()


def _without_name(pixels: Iterable[Tensor], shape: tuple[int, ...]) -> Tensor:
    """Images mapped from a temporary file that goes when they go, even if the process is killed."""
    folder = tempfile.gettempdir()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            _write(file, pixels)
            return _map(file, shape)
    except OSError as error:
        needed = f"{math.prod(shape) / 1e9:.1f} GB of images larger than --memory_gb find no room"
        raise OSError(error.errno, f"{needed} ({error.strerror}); set TMPDIR to another folder", folder) from error


def _map(file: BinaryIO, shape: tuple[int, ...]) -> Tensor:
    """The first bytes of a file as images. They cannot be written to: that would end the process."""
    length = math.prod(shape)
    # Read-only and shared: Linux refuses a private map, which could be written to, beyond the size of the memory
    held = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        images = torch.frombuffer(held, dtype=torch.uint8).view(shape)
    _maps[images.data_ptr()] = held
    return images


@functools.cache
def _complain(text: str) -> None:
    """A line on stderr, past any progress bar; the same one only once."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)
