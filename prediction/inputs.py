"""Find the images that are meant, and their detectors: files, folders, lists on stdin, folders that fill up.

Hands out paths, as they were written on the command line, and opens no file.
"""

import os
import stat
import sys
import time
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from config import SUFFIXES
from runtime.files import InputError, say, spreadsheet_safe
from runtime.image_files import find_folders, is_hidden, list_folder

LOOK_EVERY = 0.5  # seconds between two looks at files that are being written
SETTLED = 1.0  # seconds without a change after which a file counts as written
WALK_EVERY = 30  # seconds after which folders are walked even if the system tells of no change: network drives
WALK_SHARE = 5  # walking takes at most one of so many seconds


@dataclass
class Task:
    """Images for one detector."""

    category: str  # "" if there is only one detector
    detector: Path
    words: list[str]  # of the command line: files, folders, and - for stdin
    root: str | None = None  # of several categories: the folder that drawings are named from
    paths: list[str] = field(default_factory=list)  # what the words stand for

    @property
    def folders(self) -> list[str]:
        """The folders that drawings are named from."""
        return [self.root] if self.root else [word for word in self.words if os.path.isdir(word)]

    def holds(self, path: str) -> bool:
        """Return whether a path is in one of its folders."""
        return any(os.path.relpath(path, word).split(os.sep)[0] != os.pardir for word in self.words)


def pair_folders(model_dir: str, root: str) -> list[Task]:
    """Return a task for each sub-folder of ``root`` that has the name of a detector in ``model_dir``; say what is left
    out. Of a detector and its export the detector is taken. Raises InputError if nothing is left, or if a folder is
    missing."""
    for folder in (model_dir, root):
        if not os.path.isdir(folder):
            raise InputError(f"{folder}: no such folder")
    names = [path.name for path in find_folders(Path(root))]
    trained: dict[str, Path] = {}
    for suffix in reversed(SUFFIXES):
        trained |= {path.stem: path for path in Path(model_dir).glob("*" + suffix) if not is_hidden(path.name)}
    for name in sorted({*names} ^ {*trained}):
        say(f"{name}: has {'images but no detector' if name in names else 'a detector but no images'}; left out")
    tasks = [Task(name, trained[name], [os.path.join(root, name)], root) for name in names if name in trained]
    if not tasks:
        raise InputError(f"{root}: no sub-folder that is named like a detector in {model_dir}")
    return tasks


def walk(folder: str, skipped: Iterable[str] = ()) -> Iterator[str]:
    """Yield the image files of a folder by name, then those of its sub-folders, without hidden ones and a system's.

    A folder that cannot be listed is given as if it were a file. skipped: sub-folders that are left out, such as those
    that are written to.
    """
    seen = {*map(os.path.realpath, skipped)} - {os.path.realpath(folder)}

    def inside(folder: str) -> Iterator[str]:
        real = os.path.realpath(folder)
        if real in seen:  # a link may lead back
            return
        seen.add(real)
        try:
            images, folders = list_folder(Path(folder))
        except OSError:
            yield folder
            return
        yield from (spreadsheet_safe(str(path)) for path in images)
        for path in folders:
            yield from inside(spreadsheet_safe(os.path.join(folder, path.name)))

    return inside(spreadsheet_safe(folder))


def list_paths(words: Iterable[str], skipped: Iterable[str] = ()) -> list[str]:
    """Return the paths that words of a command line stand for, each once: a file, a folder, or ``-``, a list on stdin
    of one path a line. A folder in such a list is not walked. skipped: see ``walk``."""
    paths: dict[str, None] = {}  # in their order
    for word in words:
        if word == "-":
            lines = (line.removesuffix(b"\r") for line in sys.stdin.buffer.read().split(b"\n"))
            paths |= dict.fromkeys(spreadsheet_safe(os.fsdecode(line)) for line in lines if line)
        elif os.path.isdir(word):
            paths |= dict.fromkeys(walk(word, skipped))
        else:
            paths[spreadsheet_safe(word)] = None
    return list(paths)


def watch(
    folders: list[str], known: Container[str], skipped: Iterable[str], stopped: Callable[[], bool]
) -> Iterator[list[str]]:
    """Yield the files that have come to folders and are written, in lists that may be empty, until ``stopped()``.

    A file is written when its size and time have not changed for SETTLED seconds. known: paths that are not given
    again; the caller adds to it. skipped: see ``walk``. Raises InputError if a folder goes away.
    """
    from watchfiles import watch as notices

    waiting: dict[str, tuple] = {}
    walked, pause = -WALK_EVERY, 0.0
    # A notice only says that folders must be walked: some get lost, and so do names that are no UTF-8
    timing = {"debounce": int(1000 * LOOK_EVERY), "rust_timeout": int(1000 * LOOK_EVERY), "yield_on_timeout": True}
    happened = False
    try:
        for changes in notices(*folders, watch_filter=None, ignore_permission_denied=True, **timing):
            if stopped():
                return
            for folder in folders:
                if not os.path.isdir(folder):
                    raise InputError(f"{folder}: the folder that is watched has gone")
            happened, now = happened or bool(changes), time.monotonic()
            if now - walked > (pause if happened else WALK_EVERY):
                paths = {path for folder in folders for path in walk(folder, skipped)}
                waiting = {path: waiting.get(path, ()) for path in sorted(paths) if path not in known}
                happened, walked = False, time.monotonic()
                pause = WALK_SHARE * (walked - now)
            yield settled(waiting)
    except FileNotFoundError as error:
        raise InputError(f"{folders[0]}: cannot be watched ({error})") from error


def settled(waiting: dict[str, tuple]) -> list[str]:
    """Take the files out of ``waiting`` that have not changed for a while, and return them; take out, too, those that
    have gone. waiting: size, time of the file, and since when they are so; () for a new path."""
    ready = []
    for path, (*before, since) in [(path, state or (None, 0)) for path, state in waiting.items()]:
        try:
            status = os.stat(path)
        except OSError:
            del waiting[path]
            continue
        state = (status.st_size, status.st_mtime_ns)
        if tuple(before) != state:
            waiting[path] = (*state, time.monotonic())
        elif time.monotonic() - since >= SETTLED or not stat.S_ISREG(status.st_mode):
            del waiting[path]
            ready.append(path)
    return ready
