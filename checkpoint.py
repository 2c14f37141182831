"""Saved states of trainings: where they are, what is read from them, and that they go when a detector is there.

Owns the files ``<model_dir>/<category>.checkpoint`` or, of a detector of several networks,
``<model_dir>/<category>.checkpoints/<number>.checkpoint``. What is in them is training.py's to say.
"""

import os
import shutil
from pathlib import Path

from config import Config, SettingError
from runtime.files import InputError, load_tensors, remove_file

FORMAT = "cutpaste-checkpoint"
VERSION = 6
SUFFIX = ".checkpoint"


def checkpoint_paths(folder: str | Path, category: str, folds: int) -> list[Path]:
    """The file of each of a detector's networks."""
    if folds == 1:
        return [Path(folder) / (category + SUFFIX)]
    return [_several(folder, category) / f"{number}{SUFFIX}" for number in range(folds)]


def _several(folder: str | Path, category: str) -> Path:
    return Path(folder) / f"{category}{SUFFIX}s"


def found_checkpoints(folder: str | Path, category: str) -> list[Path]:
    """The saved states of a category that there are, of however many networks."""
    single = Path(folder) / (category + SUFFIX)
    return [path for path in (single, *sorted(_several(folder, category).glob("*" + SUFFIX))) if path.exists()]


def load_checkpoint(path: Path) -> dict:
    """What ``Run.state`` gave, its config as a Config. Raises InputError if the file holds something else."""
    state = load_tensors(path, "checkpoint", lambda content: content.get("version", 0) > 2)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(f"{path}: not a saved state of this program; remove it or start anew (--overwrite)")
    try:
        config = Config.from_dict(state["config"]) if state.get("version") == VERSION else None
    except SettingError:
        config = None
    if config is None:
        message = "saved by another version of this program; finish it there or start anew (--overwrite)"
        raise InputError(f"{path}: {message}")
    return state | {"config": config}


def remove_checkpoints(folder: str | Path, category: str) -> None:
    """Remove a category's saved states. Those of several networks go at once, for some that were left would look like
    a training that was stopped."""
    remove_file(Path(folder) / (category + SUFFIX))
    several = _several(folder, category)
    gone = several.with_name(f".{several.name}")
    shutil.rmtree(gone, ignore_errors=True)  # of a run that was killed here
    if several.exists():
        os.replace(several, gone)
        shutil.rmtree(gone)
