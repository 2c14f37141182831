"""What prediction writes: rows of CSV or JSON lines that outlive a killed run, and the files that are drawn of images.

Owns the columns, how a row becomes bytes and a file of rows is continued; how drawings are named, and that they harm no
other file.
"""

import csv
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from reporting import overlays
from runtime.files import InputError, check_replaceable, csv_record, write_file
from runtime.image_files import decode

COLUMNS = ("path", "score", "p_value", "anomalous", "x", "y", "width", "height", "error")
FORMATS = ("csv", "jsonl")
LONGEST = 2**20  # bytes of a first row


class RowsFile:
    """``with RowsFile(path, ...) as rows``: rows are appended whole; ``path`` None is stdout.

    done: the paths that have a row, those of earlier runs included, with the score, None without one; counts: all rows,
    the anomalous ones, and those with an error. Bytes of a path that are no UTF-8 are written to CSV as they are, to
    JSON as ``\\udcXX``.

    A file that is there is continued: half a row at its end, from a killed run, is cut off. Raises InputError, and
    changes nothing, if it holds something else, or if another run is writing to it. overwrite: start anew, if it holds
    rows of this program, of any columns and kind.
    """

    def __init__(self, path: str | None, kind: str, columns: Iterable[str], overwrite: bool = False) -> None:
        self.path, self.kind, self.columns = path, kind, tuple(columns)
        self.done: dict[str, float | None] = {}
        self.counts = {"rows": 0, "anomalous": 0, "errors": 0}
        self.file: BinaryIO | None = None
        self.overwrite, self.cuts = overwrite, False

    def __enter__(self) -> "RowsFile":
        header = b"" if self.kind == "jsonl" else csv_record(self.columns)
        if self.path is None:
            sys.stdout.flush()
            # What a full disk refused must not wait in a buffer, to fail once more at the end
            self.file = getattr(sys.stdout.buffer, "raw", sys.stdout.buffer)
            self.write(header)
            return self
        path = Path(self.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("ab", buffering=0)
        self.cuts = path.is_file()  # else a device, or a pipe
        whole = 0
        try:
            if self.cuts:
                self.lock()
                with path.open("rb") as file:
                    if not begins_like_rows(file):
                        raise InputError(f"{path}: holds something else than rows of this program; another --output")
                    if not self.overwrite:
                        whole = self.read(file, header)
                self.file.truncate(whole)
        except InputError:
            self.file.close()
            raise
        if not whole:
            self.write(header)
        return self

    def lock(self) -> None:
        """Let no other run write to the file, until this process ends; systems without such locks trust the user."""
        try:
            import fcntl

            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{self.path}: another run is writing to it; wait for it, or take another file") from error
        except (ImportError, OSError):
            pass

    def __exit__(self, *_) -> None:
        if self.path is not None:
            self.file.close()

    def add(self, rows: list[dict]) -> None:
        """Append rows, by the names of the columns; None is empty. Raises OSError, naming the file."""
        self.write(b"".join(self.as_bytes(row) for row in rows))
        for row in rows:
            self.note(row)

    def as_bytes(self, row: dict) -> bytes:
        values = {name: row[name] for name in self.columns}
        return csv_record(values.values()) if self.kind == "csv" else json.dumps(values).encode() + b"\n"

    def note(self, row: dict) -> None:
        try:
            self.done[row["path"]] = float(row["score"])
        except (TypeError, ValueError):  # an image without a score
            self.done[row["path"]] = None
        self.counts["rows"] += 1
        self.counts["anomalous"] += str(row["anomalous"]) == "1"
        self.counts["errors"] += bool(row["error"])

    def write(self, content: bytes) -> None:
        """All of it, or nothing of it where the file can be cut."""
        start, rest = os.fstat(self.file.fileno()).st_size if self.cuts else 0, memoryview(content)
        try:
            try:
                while rest:
                    rest = rest[self.file.write(rest) :]
            except OSError:
                if self.cuts:
                    self.file.truncate(start)
                raise
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OSError(error.errno, f"cannot be written ({error.strerror})", self.path or "stdout") from error

    def read(self, file: BinaryIO, header: bytes) -> int:
        """Note the rows of an earlier run; returns where the last whole one ends, in bytes."""
        if header and (first := file.readline(len(header))) != header:
            if file.read(1) or not header.startswith(first):
                self.refuse()
            return 0  # a run that was killed at once
        end = len(header)
        for record in records(file, self.kind):
            if not record.endswith(b"\n"):
                start = b'{"%s"' % self.columns[0].encode()
                if not end and record[: len(start)] != start[: len(record)]:
                    self.refuse()
                break
            row = self.parsed(record)
            self.note(row)
            end = file.tell()
        return end

    def parsed(self, record: bytes) -> dict:
        try:
            text = record.decode("utf-8", "surrogateescape")
            if self.kind == "jsonl":
                row = json.loads(text)
            else:
                (values,) = csv.reader(io.StringIO(text, newline=""), strict=True)
                row = dict(zip(self.columns, values, strict=True))
            if tuple(row) != self.columns or not isinstance(row["path"], str):
                self.refuse()
        except (ValueError, TypeError, csv.Error):
            self.refuse()
        return row

    def refuse(self) -> None:
        asked = f"{self.kind.upper()} rows with the columns {','.join(self.columns)}"
        raise InputError(f"{self.path}: holds something else than {asked}; another --output, or --overwrite")


def begins_like_rows(file: BinaryIO) -> bool:
    """Return whether a file is empty or begins with a record of this program, of one or several categories and of any
    of FORMATS, which a kill may have cut off. ``file.tell()`` is 0 then."""
    first = file.readline(LONGEST)
    file.seek(0)
    for columns in (COLUMNS, ("category", *COLUMNS)):
        start = b'{"%s": ' % columns[0].encode()
        if csv_record(columns).startswith(first) or start.startswith(first):
            return True
        try:
            if first.startswith(start) and tuple(json.loads(first)) == columns:
                return True
        except ValueError:
            if not first.endswith(b"\n"):  # half a row
                return True
    return False


def records(file: BinaryIO, kind: str) -> Iterator[bytes]:
    """The records of a file of rows; a line break within quotes ends none. The last may be half a record, without one.
    While a record is looked at, ``file.tell()`` is where it ends."""
    record, quotes = b"", 0
    while line := file.readline():
        record, quotes = record + line, quotes + line.count(b'"')
        if kind == "jsonl" or quotes % 2 == 0:
            yield record
            record = b""
    if record:
        yield record.removesuffix(b"\n")  # which is within quotes


class Drawings:
    """Heat maps, masks and panels of images, each in a folder, None: not drawn. Each file is of one image: no two share
    a name, and none replaces an image, nor a file that this program has not drawn. It is true if there are heat maps or
    masks, which every image has."""

    def __init__(self, heatmaps: str | None, masks: str | None, panels: str | None = None) -> None:
        self.heatmaps, self.masks, self.panels = heatmaps, masks, panels
        self.folders = [folder for folder in (heatmaps, masks, panels) if folder]
        self.owners: dict[str, tuple[str, str]] = {}  # of a file: the image, and the folder of results
        self.real = lru_cache(1024)(os.path.realpath)  # of folders

    def __bool__(self) -> bool:
        return bool(self.heatmaps or self.masks)

    def draw(self, path: str, folders: Sequence[str], heat: np.ndarray, threshold: float, outlined: bool) -> None:
        """Write what is asked for of an image with a map (h, w). folders: those it is named from. outlined: with a line
        around what is above the threshold. Raises InputError if it cannot be drawn."""
        self.keep(path)  # it may have come later
        targets = self.name(path, folders)
        pixels = decode(path)
        heat = overlays.enlarged(heat, pixels.shape[:2])
        if self.heatmaps:
            picture = overlays.overlay(pixels, heat, threshold, outlined)
            write_file(overlays.encoded(picture, targets[0]), targets[0])
        if self.masks:
            write_file(overlays.encoded(overlays.above_threshold(heat, threshold), targets[-1]), targets[-1])

    def name(self, path: str, folders: Sequence[str]) -> list[str]:
        """The files that are drawn of an image, of which none may be in the way of another; see ``add``."""
        kinds = [(folder, suffix) for folder, suffix in ((self.heatmaps, None), (self.masks, ".png")) if folder]
        return [self.add(folder, relative(path, folders), path, suffix) for folder, suffix in kinds]

    def panel(self, path: str, folders: Sequence[str]) -> str:
        """The file of an image's panel. Raises InputError as ``add`` does."""
        self.keep(path)
        return self.add(self.panels, relative(path, folders), path, ".png")

    def place(self, path: str) -> str:
        return os.path.join(self.real(os.path.dirname(path)), os.path.basename(path))

    def keep(self, path: str) -> None:
        """Let nothing be drawn over an image, nor over the file that a link to it leads to."""
        self.owners[self.place(path)] = (path, "")
        if os.path.islink(path):
            self.owners[os.path.realpath(path)] = (path, "")

    def add(self, folder: str, below: str, path: str, suffix: str | None = None) -> str:
        """The file for an image that is called ``below``; without a ``suffix`` a JPEG for a JPEG, else a PNG. Raises
        InputError if another image has that name, or the other drawing of this one, or if something is there that this
        program has not drawn."""
        stem, own = os.path.splitext(below)
        target = os.path.join(folder, stem + (suffix or (own if own.lower() in (".jpg", ".jpeg") else ".png")))
        owner = self.owners.setdefault(self.place(target), (path, folder))
        if owner != (path, folder):
            found = f"{target} would be drawn of it, but that name is taken by {owner[0]}"
            raise InputError(f"{path}: {found}; rename one, or take another folder")
        check_replaceable(target, f"draw {path} in another folder")
        return target


def relative(path: str, folders: Iterable[str] = ()) -> str:
    """What a path is called below a folder of results: relative to the one of ``folders`` that holds it, else as it is,
    without what leads to a root or upwards."""
    for folder in folders:
        below = os.path.relpath(path, folder)
        if below.split(os.sep)[0] != os.pardir:
            return below
    return os.path.join(*(part for part in Path(path).parts if part not in (Path(path).anchor, os.pardir)))
