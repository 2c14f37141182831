"""Which image files are meant: files, folders with all their sub-folders, lists on stdin, and folders that fill up.

Hands out paths, as they were written on the command line, and opens no image.
"""

import os
import stat
import sys
import time
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path

from runtime.files import InputError
from runtime.image_files import find_images

LOOK_EVERY = 0.5  # seconds between two looks at files that are being written
SETTLED = 1.0  # seconds without a change after which a file counts as written
WALK_EVERY = 30  # seconds after which folders are walked even if the system tells of no change: network drives
WALK_SHARE = 5  # walking takes at most one of so many seconds
SPECIAL = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet takes for the start of a formula


def spreadsheet_safe(path: str) -> str:
    """The same file under a name that no spreadsheet takes for a formula: ``./=1.png`` for ``=1.png``."""
    return os.path.join(".", path) if path.startswith(SPECIAL) else path


def walk(folder: str, skipped: Iterable[str] = ()) -> Iterator[str]:
    """The image files of a folder by name, then those of its sub-folders; hidden ones are not. A folder that cannot be
    listed is given as if it were a file. skipped: sub-folders that are left out, such as those that are written to."""
    seen = {os.path.realpath(each) for each in skipped} - {os.path.realpath(folder)}

    def inside(folder: str) -> Iterator[str]:
        real = os.path.realpath(folder)
        if real in seen:  # a link may lead back
            return
        seen.add(real)
        try:
            yield from (spreadsheet_safe(str(path)) for path in find_images(Path(folder)))
            with os.scandir(folder) as entries:
                names = sorted(each.name for each in entries if each.is_dir() and not each.name.startswith("."))
        except OSError:
            yield folder
            return
        for name in names:
            yield from inside(spreadsheet_safe(os.path.join(folder, name)))

    return inside(spreadsheet_safe(folder))


def listed(words: Iterable[str], skipped: Iterable[str] = ()) -> list[str]:
    """The paths that words of a command line stand for, each once: a file, a folder, or ``-``, a list on stdin of one
    path a line. A folder in such a list is not walked."""
    found: dict[str, None] = {}
    for word in words:
        if word == "-":
            lines = (line.removesuffix(b"\r") for line in sys.stdin.buffer.read().split(b"\n"))
            found |= dict.fromkeys(spreadsheet_safe(os.fsdecode(line)) for line in lines if line)
        elif os.path.isdir(word):
            found |= dict.fromkeys(walk(word, skipped))
        else:
            found[spreadsheet_safe(word)] = None
    return list(found)


def watch(
    folders: list[str], known: Container[str], skipped: Iterable[str], stopped: Callable[[], bool]
) -> Iterator[list]:
    """The files that have come to folders and are written, as lists that may be empty, until ``stopped()``. A file is
    written when size and time have not changed for SETTLED seconds. known: paths that are not given again; the caller
    adds to it. Raises InputError if a folder goes away."""
    from watchfiles import watch as notices

    waiting: dict[str, tuple] = {}
    walked, pause = -WALK_EVERY, 0.0
    # It is told only that something has happened, and looks itself: some notices get lost, and names that are no UTF-8
    how = {"debounce": int(1000 * LOOK_EVERY), "rust_timeout": int(1000 * LOOK_EVERY), "yield_on_timeout": True}
    happened = False
    try:
        for changes in notices(*folders, watch_filter=None, ignore_permission_denied=True, **how):
            if stopped():
                return
            for folder in folders:
                if not os.path.isdir(folder):
                    raise InputError(f"{folder}: the folder that is watched has gone")
            happened, now = happened or bool(changes), time.monotonic()
            if now - walked > (pause if happened else WALK_EVERY):
                found = {path for folder in folders for path in walk(folder, skipped)}
                waiting = {path: waiting.get(path, ()) for path in sorted(found) if path not in known}
                happened, walked = False, time.monotonic()
                pause = WALK_SHARE * (walked - now)
            yield settled(waiting)
    except FileNotFoundError as error:
        raise InputError(f"{folders[0]}: cannot be watched ({error})") from error


def settled(waiting: dict[str, tuple]) -> list[str]:
    """Take out of ``waiting`` the files that have not changed for a while, and those that have gone."""
    ready = []
    for path, (*before, since) in [(path, state or (None, 0)) for path, state in waiting.items()]:
        try:
            found = os.stat(path)
        except OSError:
            del waiting[path]
            continue
        state = (found.st_size, found.st_mtime_ns)
        if tuple(before) != state:
            waiting[path] = (*state, time.monotonic())
        elif time.monotonic() - since >= SETTLED or not stat.S_ISREG(found.st_mode):
            del waiting[path]
            ready.append(path)
    return ready
