"""What the benchmarks share: rows of results/*.csv, what a row tells of its making, peak memory.

Importing it makes the modules of the project importable from here.
"""

import argparse
import csv
import io
import resource
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

MAXRSS = 1 if sys.platform == "darwin" else 1024  # bytes in the unit of ru_maxrss


def add_record_flags(parser: argparse.ArgumentParser, name: str) -> None:
    add = parser.add_argument_group("record").add_argument
    results = f"CSV file that rows are added to (default: results/{name})"
    add("--results", default=ROOT / "results" / name, type=Path, metavar="FILE", help=results)
    add("--note", default="", metavar="TEXT", help="for the row: what else ran on the machine, say")


def command() -> str:
    """The benchmark's command as typed, from the root of the project."""
    from runtime.cli import command_line

    return command_line().replace("python ", "python benchmarks/", 1)


def commit() -> str:
    """The checkout's commit, "-dirty" if files other than results/ were changed since; empty outside a checkout."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()

    try:
        dirty = "-dirty" if git("status", "--porcelain", "-uno", "--", ".", ":!results") else ""
        return git("rev-parse", "--short", "HEAD") + dirty
    except OSError:  # no git
        return ""


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file as text, so that numbers keep their digits; none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append(row: dict, path: Path) -> None:
    """Add a row at the end of a CSV file, unless the very same is in it. The columns that only this row has become the
    last ones; None and what a row has not is empty. The file is replaced whole or not at all."""
    from runtime.files import write_file

    rows = [*read(path), {name: "" if value is None else str(value) for name, value in row.items()}]
    names = list(dict.fromkeys(name for each in rows for name in each))
    rows = dict.fromkeys(tuple(each.get(name, "") for name in names) for each in rows)
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([names, *rows])
    write_file(text.getvalue().encode(), path)


def wait(device: "torch.device") -> None:
    """Until a GPU has done what it was given."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def peak_mb(device: "torch.device") -> float:
    """The most memory so far, in millions of bytes: the GPU's, or the process's."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS / 1e6
