"""Messages, and files that are written whole or not at all.

Owns ``InputError``, the line on stderr, atomic writing, the mark of this program's files, the bytes of CSV files, and
archives: of tensors and plain values, or of any parts; both are verified when read.
"""

import csv
import errno
import functools
import io
import os
import secrets
import stat
import sys
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

PLAIN = (type(None), bool, int, float, str, bytes)
# Tells pictures, maps and reports of this program from other files: PNG and TIFF have it as their Software, JPEG as a
# comment, HTML as its generator, all within the first HEAD bytes
MARK = "Made by CutPaste"
HEAD = 4096
PART = ".cutpaste-part"  # the suffix of a file that is not whole yet
KILLED_AFTER = 24 * 3600  # seconds since its last byte until such a file is taken for a killed run's
RESTORE = "restore it or train again"  # what to do about a damaged file
FORMULA_STARTS = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")  # of what a spreadsheet computes


class InputError(Exception):
    """A user's mistake or a bad file: one line that names it, says what was found and what to do."""


def memory_is_full(error: BaseException) -> bool:
    """Return whether an error says that no memory is left. torch has no type of its own for that of the CPU."""
    words = ("can't allocate memory", "not enough memory", "std::bad_alloc", "can't start new thread")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(w in str(error) for w in words))


def shown(text: str) -> str:
    """Return a name, or text with names in it, as a line, a figure or a page can show it: bytes that are no UTF-8 and
    characters that cannot be printed, such as line breaks, as escapes with a backslash."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def say(text: str) -> None:
    """Print a message for the person at the shell: on stderr, past any progress bar. stdout is for data."""
    from tqdm import tqdm

    tqdm.write(shown(text), file=sys.stderr)


def print_line(text: str) -> None:
    """Print a line of data on stdout, now."""
    print(shown(text), flush=True)


@functools.cache
def say_once(text: str) -> None:
    """Print a message, as ``say`` does, unless this process has printed it before."""
    say(text)


# Atomic writing ---------------------------------------------------------------------------------------------------


def write_file(content: bytes | memoryview, path: str | Path) -> None:
    """Put a file in place, whole or not at all. Raises OSError, naming it, if it cannot be written."""
    write_files({Path(path): content})


def write_files(contents: dict[Path, bytes | memoryview]) -> None:
    """Put files in place together: none is replaced before all are written. Raises OSError, naming the bad one;
    InputError if its name cannot be, such as one that is too long."""
    with ExitStack() as parts:
        written = {}
        for path, content in contents.items():
            try:
                check_name(path)
                path.parent.mkdir(parents=True, exist_ok=True)
                remove_abandoned_once(path.parent)
                part, file = parts.enter_context(new_part(path.parent))
                with file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                written[part] = path
            except OSError as error:
                reason = f"cannot be written ({error.strerror}); nothing was replaced"
                raise OSError(error.errno, reason, str(path)) from error
        for part, path in written.items():
            os.replace(part, path)


def check_regular(path: str | Path) -> None:
    """Raise InputError for a pipe or a device, which would be waited for. Raises OSError if nothing is there."""
    kind = os.stat(path).st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
        raise InputError(f"{path}: a pipe or a device, not a file; write it to a file first")


def check_name(path: Path) -> None:
    """Raise InputError if no file can have this name or path, because it is too long."""
    for part in (path.name, path):  # alone too: in a folder that is not there yet a name is not looked at
        try:
            os.lstat(part)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise InputError(f"{path}: cannot be written ({error.strerror}); shorten it") from error


@contextmanager
def new_part(folder: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """Open a new file in a folder, under a short name that no other run has and that is no link; it loses that name at
    the end. Raises OSError, naming the folder, if that is not possible."""
    part = folder / f".{secrets.token_hex(8)}{PART}"
    try:
        file = open(part, "x+b")  # noqa: SIM115
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error
    with file:
        try:
            yield part, file
        finally:
            part.unlink(missing_ok=True)


def remove_abandoned(folder: Path, seconds: float = KILLED_AFTER) -> None:
    """Remove the parts in a folder to which nobody has written for so long: those of killed runs."""
    for part in folder.glob(".*" + PART):
        with suppress(OSError):  # another run has removed it
            if time.time() - part.lstat().st_mtime >= seconds:
                part.unlink()


remove_abandoned_once = functools.cache(remove_abandoned)


def lock(file: int | BinaryIO, message: str) -> None:
    """Let no other process lock this file or folder until it is closed or this process ends; no effect on systems
    without such locks. Raises InputError with the message if another one has locked it."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(message) from error
    except (ImportError, OSError):
        pass


@contextmanager
def locked_folder(folder: Path, way_out: str) -> Iterator[None]:
    """Lock a folder, see ``lock``: nothing is left in it, even of a killed process. Raises InputError, with what to do
    about it, if another process has locked it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows opens no folder
        yield
        return
    try:
        lock(descriptor, f"{folder}: another run is writing to it; {way_out}")
        yield
    finally:
        os.close(descriptor)


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


def check_writable(folder: Path) -> None:
    """Make the folder, and a file in it that goes again. Raises InputError or OSError, naming the folder, if that is
    not possible."""
    if folder.is_file():
        raise InputError(f"{folder}: is a file; a folder is needed")
    folder.mkdir(parents=True, exist_ok=True)
    with new_part(folder):
        pass


# CSV --------------------------------------------------------------------------------------------------------------


def csv_record(values: Iterable[object]) -> bytes:
    """Return a line of a CSV file. Numbers keep all digits; None is empty; a name that is no UTF-8 keeps its bytes. An
    apostrophe comes before text that a spreadsheet would compute."""
    values = ["" if value is None else value for value in values]
    values = [f"'{value}" if isinstance(value, str) and is_formula(value) else value for value in values]
    # Not every version of the module quotes a carriage return
    quoting = csv.QUOTE_ALL if any("\r" in str(value) for value in values) else csv.QUOTE_MINIMAL
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n", quoting=quoting).writerow(values)
    return text.getvalue().encode("utf-8", "surrogateescape")


def is_formula(text: str) -> bool:
    """Return whether a spreadsheet takes a text for a formula."""
    return text.startswith(FORMULA_STARTS)


def spreadsheet_safe(path: str) -> str:
    """Return the same file under a name that no spreadsheet takes for a formula: ``./=1.png`` for ``=1.png``."""
    return os.path.join(".", path) if is_formula(path) else path


def csv_table(rows: Sequence[dict], columns: Iterable[str] = ()) -> bytes:
    """Return a CSV file of rows by the names of their columns, in the order in which those first come. columns: the
    names that come first, which may be all there is."""
    columns = list(dict.fromkeys([*columns, *(name for row in rows for name in row)]))
    return csv_record(columns) + b"".join(csv_record(map(row.get, columns)) for row in rows)


# Archives ---------------------------------------------------------------------------------------------------------


def archive_of(parts: Mapping[str, bytes]) -> bytes:
    """Return the content of a zip archive of parts by name, not compressed: the same bytes for the same parts."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, part in parts.items():
            archive.writestr(zipfile.ZipInfo(name), part)  # which has no time
    return buffer.getvalue()


def load_parts(path: str | Path, what: str, way_out: str = RESTORE) -> dict[str, bytes]:
    """Read the parts of an archive that is not compressed, whose CRCs must match. what: names the kind of file in
    messages. Raises InputError, naming the file, as ``load_tensors``."""
    data = Path(path).read_bytes()
    with unreadable_named(path, what, way_out), zipfile.ZipFile(io.BytesIO(data)) as archive:
        check_stored(archive, len(data))
        return {part.filename: archive.read(part) for part in archive.infolist()}


def check_stored(archive: zipfile.ZipFile, size: int) -> None:
    """Raise BadZipFile for an archive whose parts are compressed, or overlap, so that a small file could fill the
    memory. size: of the file, in bytes."""
    parts = archive.infolist()
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or sum(part.file_size for part in parts) > size:
        raise zipfile.BadZipFile


def save_tensors(content: dict, path: str | Path) -> None:
    """Write a dict of tensors and plain values, nested as they like, atomically.

    torch.save writes a zip archive, with a CRC of every part. Raises TypeError for a value of another type, OSError,
    naming the file, if it cannot be written.
    """
    import torch  # imported late: it takes seconds

    _check_types(content)
    buffer = io.BytesIO()
    torch.save(content, buffer)  # to memory first: torch's own writer hides a full disk behind a RuntimeError
    with buffer.getbuffer() as view:  # released here: Python 3.13 complains of a buffer that goes before its view
        write_file(view, path)


def load_tensors(path: str | Path, what: str) -> dict:
    """Read what ``save_tensors`` wrote, onto the CPU.

    what: names the kind of file in messages. Raises InputError, naming the file, if it is missing, truncated, damaged
    (a CRC of the archive does not match) or holds no dict.
    """
    import torch

    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    data = io.BytesIO(Path(path).read_bytes())  # here what the disk says is an OSError; in torch.load damage is one too
    with unreadable_named(path, what, RESTORE):
        with zipfile.ZipFile(data) as archive:
            check_stored(archive, data.getbuffer().nbytes)
            # No CRC covers the attributes; torch leaves the memory of a tensor with those of a folder as it was
            if archive.testzip() or any(part.external_attr for part in archive.infolist()):
                raise zipfile.BadZipFile
        data.seek(0)
        content = torch.load(data, map_location="cpu", weights_only=True)
        content.pop("checksum", None)  # of files written before the archive's own was read
    return content


@contextmanager
def unreadable_named(path: str | Path, what: str, way_out: str) -> Iterator[None]:
    """Turn whatever a reader of archives raises into an InputError: none has an error of its own, and a text file may
    end in an IndexError."""
    try:
        yield
    except Exception as error:
        if memory_is_full(error):
            raise
        raise InputError(f"{path}: truncated, damaged or not a {what} file; {way_out}") from error


@contextmanager
def damage_named(path: str | Path, what: str, way_out: str) -> Iterator[None]:
    """Turn every way in which the content of a file can fail into an InputError that names file and reason: nobody
    knows what a file holds that this program has not written. An InputError that names the file stays as it is."""
    try:
        yield
    except Exception as error:
        if memory_is_full(error) or (isinstance(error, InputError) and str(error).startswith(f"{path}: ")):
            raise
        reason = f"it lacks {error}" if isinstance(error, KeyError) else (str(error).splitlines() or [repr(error)])[0]
        raise InputError(f"{path}: damaged {what} file ({reason}); {way_out}") from error


def _check_types(value: object) -> None:
    """Raise TypeError for what torch.load would refuse: a value that is neither a tensor nor plain."""
    from torch import Tensor

    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, (list, tuple)):
        for part in value:
            _check_types(part)
    elif not isinstance(value, Tensor) and type(value) not in PLAIN:  # type: NumPy's numbers are subclasses
        raise TypeError(f"{type(value).__name__} {value!r} is neither a tensor nor a plain value")
