"""Messages, and files that are written whole or not at all.

Owns ``InputError``, the line on stderr, atomic writing, the mark of this program's files, and files of tensors and
plain values with a checksum.
"""

import hashlib
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

CHECKSUM = "checksum"  # the key that save_tensors adds and load_tensors takes away
PLAIN = (type(None), bool, int, float, str, bytes)
# Tells pictures, maps and reports of this program from other files: PNG and TIFF have it as their Software, JPEG as a
# comment, HTML as its generator, all within the first HEAD bytes
MARK = "Made by CutPaste"
HEAD = 4096


class InputError(Exception):
    """A user's mistake or a bad file: one line that names it, says what was found and what to do."""


def say(text: str) -> None:
    """A message for the person at the shell: stderr, past any progress bar. stdout is for data."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)


# Atomic writing ---------------------------------------------------------------------------------------------------


def write_file(content: bytes | memoryview, path: str | Path) -> None:
    """Put a file in place, whole or not at all. Raises OSError, naming it, if it cannot be written."""
    write_files({Path(path): content})


def write_files(contents: dict[Path, bytes | memoryview]) -> None:
    """Put files in place together: none is replaced before all are written. Raises OSError, naming the bad one."""
    for path, content in contents.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(part_path(path), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            for other in contents:
                part_path(other).unlink(missing_ok=True)
            reason = f"cannot be written ({error.strerror}); nothing was replaced"
            raise OSError(error.errno, reason, str(path)) from error
    for path in contents:
        os.replace(part_path(path), path)


def part_path(path: Path) -> Path:
    """The temporary name that a file is written under."""
    return path.with_name(f".{path.name}.part")


def has_mark(path: str | Path) -> bool:
    """Return whether a file carries MARK; False for what is no file or cannot be read."""
    if not os.path.isfile(path):  # a pipe would be waited for
        return False
    try:
        with open(path, "rb") as file:
            return MARK.encode() in file.read(HEAD)
    except OSError:
        return False


def check_replaceable(path: str | Path, way_out: str) -> None:
    """Raise InputError if something without MARK, even a link that leads nowhere, is in the place of a file that is to
    be written. way_out: what to do about it, beside moving that away."""
    if os.path.lexists(path) and not has_mark(path):
        there = "is there already, without the mark of this program (earlier versions left none)"
        raise InputError(f"{path}: {there}; move it away, or {way_out}")


def remove_file(path: Path) -> None:
    """Remove a file, if it is there, and what a killed process left of it."""
    path.unlink(missing_ok=True)
    part_path(path).unlink(missing_ok=True)


# Tensors and plain values -----------------------------------------------------------------------------------------


def save_tensors(content: dict, path: str | Path) -> None:
    """Write a dict of tensors and plain values, nested as they like, atomically and with a checksum.

    Raises TypeError for a value of another type, OSError, naming the file, if it cannot be written.
    """
    buffer = io.BytesIO()
    # To memory first: torch's own writer hides a full disk behind a RuntimeError
    torch.save(content | {CHECKSUM: _checksum(content)}, buffer)
    with buffer.getbuffer() as view:  # released here: Python 3.13 complains of a buffer that goes before its view
        write_file(view, path)


def load_tensors(path: str | Path, what: str, checked: Callable[[dict], bool] = lambda content: False) -> dict:
    """Read what ``save_tensors`` wrote, onto the CPU, without its checksum.

    what: names the kind of file in messages. checked(content): whether the content must have a checksum; without one
    others pass, as files of earlier versions must. Raises InputError, naming the file, if it is missing, truncated,
    damaged or holds no dict.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    data = io.BytesIO(Path(path).read_bytes())  # here what the disk says is an OSError; in torch.load damage is one too
    try:
        content = torch.load(data, map_location="cpu", weights_only=True)
        found = content.pop(CHECKSUM, None)
        whole = found == _checksum(content) if found is not None or checked(content) else True
    except Exception as error:  # torch.load has no error of its own: a text file may end in an IndexError
        raise InputError(f"{path}: truncated, damaged or not a {what} file; restore it or train again") from error
    if not whole:
        raise InputError(f"{path}: damaged: its content does not match its checksum; restore it or train again")
    return content


def _checksum(content: object) -> str:
    """64 hexadecimal digits that depend on structure, plain values, and dtypes, shapes and bytes of the tensors."""
    state = hashlib.blake2b(digest_size=32)

    def add(value: object) -> None:
        if isinstance(value, Tensor):
            state.update(f"{value.dtype} {tuple(value.shape)}\n".encode())
            # reshape before view: a tensor without axes has no bytes of its own to show
            state.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(value, dict):
            state.update(b"dict %d\n" % len(value))
            for pair in value.items():
                add(pair)
        elif isinstance(value, (list, tuple)):
            state.update(b"%s %d\n" % (b"list" if isinstance(value, list) else b"tuple", len(value)))
            for item in value:
                add(item)
        elif type(value) in PLAIN:  # of a subclass, such as NumPy's numbers, torch.load would refuse the file
            state.update(f"{value!r}\n".encode())
        else:
            raise TypeError(f"{type(value).__name__} {value!r} is neither a tensor nor a plain value")

    add(content)
    return state.hexdigest()
