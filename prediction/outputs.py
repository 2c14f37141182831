"""Write what was found: rows of CSV or JSON lines that outlive a killed run, and files that are drawn of images.

Owns the columns, how a row becomes bytes and how a file of rows is continued; what drawings are called, and that no
file is lost by them.
"""

import csv
import io
import json
import os
import shutil
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np

from reporting import overlays
from runtime.files import InputError, check_replaceable, csv_record, has_mark, lock, write_file
from runtime.image_files import decode

STATE = ("time", "bytes", "modified")  # when an image was scored, if it was watched for; size and time of its file
COLUMNS = ("path", "score", "p_value", "anomalous", "x", "y", "width", "height", "error", *STATE)
LONGEST_ROW = 2**20  # bytes of a first row that is looked at


class RowsFile:
    """``with RowsFile(path, ...) as rows``: append rows, whole ones only; ``path`` None is stdout.

    done: the paths that have a row, of earlier runs too, with the score; None for an image without one. told: what else
    their rows say, by path: anomalous, error, p-value, size and time of the file. counts: of all rows, of anomalous
    images and of errors. Bytes of a path that are no UTF-8 go to CSV as they are, to JSON as ``\\udcXX``.

    A file that is there is continued: half a row at its end, from a killed run, is cut off. Raises InputError, and
    changes nothing, if it holds something else, or if another run is writing to it. A file of an earlier version,
    without the columns STATE, is continued without them. overwrite: start anew, if it holds rows of this program, of
    any columns and kind.
    """

    def __init__(self, path: str | None, kind: str, columns: Iterable[str], overwrite: bool = False) -> None:
        self.path, self.kind, self.columns = path, kind, tuple(columns)
        self.done: dict[str, float | None] = {}
        self.told: dict[str, tuple[bool, bool, str, str, str]] = {}
        self.counts = {"rows": 0, "anomalous": 0, "errors": 0}
        self.file: BinaryIO | None = None
        self.overwrite, self.can_cut = overwrite, False

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
        self.can_cut = path.is_file()  # else a device, or a pipe
        end = 0  # of the last row that is kept, in bytes
        try:
            if self.can_cut:
                self.lock()
                with path.open("rb") as file:
                    if not begins_like_rows(file):
                        raise InputError(f"{path}: holds something else than rows of this program; another --output")
                    if not self.overwrite:
                        end = self.read(file, header)
                self.file.truncate(end)
        except InputError:
            self.file.close()
            raise
        if not end:
            self.write(header)
        return self

    def lock(self) -> None:
        """Let no other run write to the file until it is closed. Raises InputError if one does."""
        message = f"{self.path}: another run is writing to it; wait for it, or take another file"
        lock(self.file, message)
        if not os.path.samestat(os.stat(self.path), os.fstat(self.file.fileno())):  # it has been replaced meanwhile
            raise InputError(message)

    def __exit__(self, *_) -> None:
        if self.path is not None:
            self.file.close()

    def __contains__(self, path: str) -> bool:
        """Return whether a path has a row that its file has not changed since."""
        return path in self.done and not self.outdated(path, errors=False)

    def add(self, rows: list[dict]) -> None:
        """Append rows: values by column, None is empty. Raises OSError, naming the file, if they cannot be written."""
        self.write(b"".join(self.as_bytes(row) for row in rows))
        for row in rows:
            self.note(row)

    def as_bytes(self, row: dict) -> bytes:
        """Return one record."""
        values = {name: row[name] for name in self.columns}
        return csv_record(values.values()) if self.kind == "csv" else json.dumps(values).encode() + b"\n"

    def note(self, row: dict) -> None:
        """Count a row that is in the file, and remember its path."""
        try:
            self.done[row["path"]] = float(row["score"])
        except (TypeError, ValueError):  # an image without a score
            self.done[row["path"]] = None
        anomalous, error = str(row["anomalous"]) == "1", bool(row["error"])
        p_value, size, modified = (str(row.get(name) or "") for name in ("p_value", *STATE[1:]))
        self.told[row["path"]] = (anomalous, error, p_value, size, modified)
        self.count(1, anomalous, error)

    def count(self, rows: int, anomalous: int, errors: int) -> None:
        """Add to the counts."""
        for name, number in zip(self.counts, (rows, anomalous, errors)):
            self.counts[name] += number

    def outdated(self, path: str, errors: bool = True) -> bool:
        """Return whether a path has a row that says what is true no longer: its file is there, and has another size or
        time than when it was scored; or, with ``errors``, it could not be scored."""
        _, error, _, *state = self.told.get(path, (False, False, "", "", ""))
        return (error and errors) or (any(state) and file_state(path) not in (None, tuple(state)))

    def forget(self, paths: Collection[str]) -> None:
        """Take the rows of these paths out of the file, which is replaced whole: they will be added anew."""
        gone = {*paths}
        for path in gone:
            anomalous, error, *_ = self.told.pop(path)
            self.count(-1, -anomalous, -error)
            del self.done[path]
        if gone and self.can_cut:
            path = os.path.realpath(self.path)
            with open(path, "rb") as file:
                header = file.readline() if self.kind == "csv" else b""
                kept = [record for record in records(file, self.kind) if self.parsed(record)["path"] not in gone]
            write_file(header + b"".join(kept), path)
            earlier, self.file = self.file, open(path, "ab", buffering=0)  # noqa: SIM115
            self.lock()
            earlier.close()  # only now: no other run has had the lock in between

    def write(self, content: bytes) -> None:
        """Write all of it; if that fails, nothing of it where the file can be cut."""
        start, rest = os.fstat(self.file.fileno()).st_size if self.can_cut else 0, memoryview(content)
        try:
            try:
                while rest:
                    rest = rest[self.file.write(rest) :]
            except OSError:
                if self.can_cut:
                    self.file.truncate(start)
                raise
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OSError(error.errno, f"cannot be written ({error.strerror})", self.path or "stdout") from error

    def read(self, file: BinaryIO, header: bytes) -> int:
        """Note the rows of an earlier run, and return where the last whole one ends, in bytes."""
        if header and (first := file.readline(len(header))) != header:
            if first == csv_record(without_state(self.columns)):
                self.columns, header = without_state(self.columns), first
            elif file.read(1) or not header.startswith(first):
                self.refuse()
            else:
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
        """Return a record as values by column. Raises InputError if it is none of this kind of file."""
        try:
            text = record.decode("utf-8", "surrogateescape")
            if self.kind == "jsonl":
                row = json.loads(text)
                if not self.done and tuple(row) == without_state(self.columns):
                    self.columns = tuple(row)
            else:
                (values,) = csv.reader(io.StringIO(text, newline=""), strict=True)
                row = dict(zip(self.columns, values, strict=True))
            if tuple(row) != self.columns or not isinstance(row["path"], str):
                self.refuse()
        except (ValueError, TypeError, csv.Error):
            self.refuse()
        return row

    def refuse(self) -> NoReturn:
        needed = f"{self.kind.upper()} rows with the columns {','.join(self.columns)}"
        raise InputError(f"{self.path}: holds something else than {needed}; another --output, or --overwrite")


def file_state(path: str) -> tuple[str, str] | None:
    """Return size and time of a file as a row tells them, None if it is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    modified = datetime.fromtimestamp(status.st_mtime, timezone.utc)
    return str(status.st_size), modified.isoformat(timespec="milliseconds")


def without_state(columns: Sequence[str]) -> tuple[str, ...]:
    """Return the columns that an earlier version wrote."""
    return tuple(name for name in columns if name not in STATE)


def begins_like_rows(file: BinaryIO) -> bool:
    """Return whether a file is empty or begins with a record of this program, which a kill may have cut off: of any of
    ``config.FORMATS``, with or without a column for the category. The file is at its start afterwards."""
    first = file.readline(LONGEST_ROW)
    file.seek(0)
    earlier = without_state(COLUMNS)
    for columns in (COLUMNS, ("category", *COLUMNS), earlier, ("category", *earlier)):
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
    """Yield the records of a file of rows. A line break within quotes ends none; the last record may be cut off and
    have no line break. While one is looked at, ``file.tell()`` is where it ends."""
    record, quotes = b"", 0
    while line := file.readline():
        record, quotes = record + line, quotes + line.count(b'"')
        if kind == "jsonl" or quotes % 2 == 0:
            yield record
            record = b""
    if record:
        yield record.removesuffix(b"\n")  # which is within quotes


class Drawings:
    """Draw heat maps, masks of what is above the threshold, and panels of images, each kind in its folder; None: not.

    Each file is of one image: no two share a name, and none replaces an image, nor a file that this program has not
    drawn.
    """

    def __init__(self, heatmaps: str | None, masks: str | None, panels: str | None = None) -> None:
        self.heatmaps, self.masks, self.panels = heatmaps, masks, panels
        self.folders = [folder for folder in (heatmaps, masks, panels) if folder]
        self.owners: dict[str, tuple[str, str]] = {}  # by the file that is drawn: the image, the folder of drawings
        self.real_folder = lru_cache(1024)(os.path.realpath)
        self.removed = 0  # panels

    @property
    def every_image(self) -> bool:
        """True if something is drawn of each image, not only of the anomalous ones."""
        return bool(self.heatmaps or self.masks)

    def prepare(self, images: Iterable[tuple[str, Sequence[str]]]) -> None:
        """Make the folders, once it is known that nothing is in the way of what will be drawn of the images.

        images: each path with the folders that its drawings are named from. Raises InputError or OSError.
        """
        if len({*self.folders}) < len(self.folders):
            raise InputError(f"{', '.join(self.folders)}: each kind of drawing needs a folder of its own")
        if not self.folders:
            return
        images = list(images)
        for path, _ in images:
            self.protect(path)
        for path, folders in images:
            self.targets(path, folders)
            if self.panels:
                self.panel(path, folders)
        for folder in self.folders:
            os.makedirs(folder, exist_ok=True)

    def draw(
        self,
        path: str,
        heat: np.ndarray,
        level: float | None,
        folders: Sequence[str],
        threshold: float,
        white: int | None = None,
    ) -> None:
        """Draw an image's heat map and mask, as asked for, in the image's own size.

        heat: its map (h, w). level: what the outline and the mask are of, see overlays.drawn_above; None without them.
        folders: those that drawings are named from. white: see image_files.decode. Raises InputError if it cannot be
        drawn.
        """
        self.protect(path)  # it may have come later
        targets = self.targets(path, folders)
        pixels = decode(path, white=white)
        heat = overlays.enlarged(heat, pixels.shape[:2])
        if self.heatmaps:
            picture = overlays.overlay(pixels, heat, threshold, level)
            write_file(overlays.encoded(picture, targets[0]), targets[0])
        if self.masks:
            write_file(overlays.encoded(overlays.above(heat, level), targets[-1]), targets[-1])

    def targets(self, path: str, folders: Sequence[str]) -> list[str]:
        """Return the files of an image's heat map and mask. Raises InputError if one would harm another file."""
        kinds = [(folder, suffix) for folder, suffix in ((self.heatmaps, None), (self.masks, ".png")) if folder]
        return [self.target(folder, name_below(path, folders), path, suffix) for folder, suffix in kinds]

    def panel(self, path: str, folders: Sequence[str]) -> str:
        """Return the file of an image's panel. Raises InputError if it would harm another file."""
        self.protect(path)
        return self.target(self.panels, name_below(path, folders), path, ".png")

    def remove_panel(self, path: str, folders: Sequence[str]) -> None:
        """Remove the panel that an earlier run has drawn of an image which is not anomalous now. Anything else under
        its name, and what is another image's, stays."""
        self.protect(path)
        target = os.path.join(self.panels, os.path.splitext(name_below(path, folders))[0] + ".png")
        owner = self.owners.get(self.place(target), (path, self.panels))
        if owner == (path, self.panels) and has_mark(target) and not os.path.islink(target):
            os.unlink(target)
            self.removed += 1

    def place(self, path: str) -> str:
        """Return one name for a file, whatever links its folder is reached by."""
        return os.path.join(self.real_folder(os.path.dirname(path)), os.path.basename(path))

    def protect(self, path: str) -> None:
        """Let nothing be drawn over an image, nor over the file that a link to it leads to."""
        self.owners[self.place(path)] = (path, "")
        if os.path.islink(path):
            self.owners[os.path.realpath(path)] = (path, "")

    def lacks(self, path: str, folders: Sequence[str], anomalous: bool) -> bool:
        """Return whether an image that was scored before is there, and has not all of its drawings, newer than it."""
        targets = self.targets(path, folders) + ([self.panel(path, folders)] if self.panels and anomalous else [])
        try:
            return not all(
                os.path.isfile(target) and os.path.getmtime(target) >= os.path.getmtime(path) for target in targets
            )
        except OSError:
            return False

    def target(self, folder: str, name: str, path: str, suffix: str | None = None) -> str:
        """Return the file in a folder of drawings for the image that is called ``name`` there; without a ``suffix`` a
        JPEG for a JPEG, else a PNG.

        Raises InputError if that is the name of another image, of another's drawing or of this one's other drawing, or
        if something is there that this program has not drawn.
        """
        stem, image_suffix = os.path.splitext(name)
        suffix = suffix or (image_suffix if image_suffix.lower() in (".jpg", ".jpeg") else ".png")
        target = os.path.join(folder, stem + suffix)
        owner = self.owners.setdefault(self.place(target), (path, folder))
        if owner != (path, folder):
            taken = f"{target} would be drawn of it, but that name is taken by {owner[0]}"
            raise InputError(f"{path}: {taken}; rename one, or take another folder")
        check_replaceable(target, f"draw {path} in another folder")
        return target


def name_below(path: str, folders: Iterable[str] = ()) -> str:
    """Return what a path is called in a folder of drawings: relative to the one of ``folders`` that holds it, else as
    it is, without what leads to a root or upwards."""
    for folder in folders:
        name = os.path.relpath(path, folder)
        if name.split(os.sep)[0] != os.pardir:
            return name
    return os.path.join(*(part for part in Path(path).parts if part not in (Path(path).anchor, os.pardir)))


def copy_below(folder: str, path: str, folders: Sequence[str]) -> None:
    """Copy an image into a folder, under its name there, see ``name_below``; with a number before the suffix where
    another file has that name. A copy that is there already stays. Raises OSError if it cannot be written."""
    try:
        content = Path(path).read_bytes()
    except OSError:  # it has gone, and its row says so or is older
        return
    target = first = Path(folder, name_below(path, folders))
    number = 1
    while os.path.lexists(target):
        if target.is_file() and target.read_bytes() == content:
            return
        number += 1
        target = first.with_name(f"{first.stem}.{number}{first.suffix}")
    write_file(content, target)
    shutil.copystat(path, target)


def check_written(written: Iterable[str | None], read: Iterable[str | Path]) -> None:
    """Raise InputError if files that are to be written, wherever links lead, are the same or among those that are
    read. None: not written."""
    names = {}
    for path in filter(None, written):
        if os.path.realpath(path) in names:
            raise InputError(f"{names[os.path.realpath(path)]}: cannot be both --output and --report")
        names[os.path.realpath(path)] = path
    for path in read if names else ():
        if os.path.realpath(path) in names:
            raise InputError(f"{path}: is read, and cannot be written to; take another --output or --report")
