"""One detector that is to be made: what is on disk before, the training of its networks, the writing of its file.

Owns what happens before and after the training loop, and that both continue where they stopped. Knows no flag but in
its messages.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from config import Config, SettingError, resume
from dataset import TrainSet, load_train
from detector import Detector, build_network, check_enough, detector_path, load_config, save
from normals import normals_path, save_normals
from runtime import cache
from runtime.cli import command_line, device_name, suitable_precision
from runtime.distributed import Ranks
from runtime.files import InputError, remove_file, say
from training.trainer import (
    Precision,
    Trainer,
    checkpoint_paths,
    choose_precision,
    found_checkpoints,
    load_checkpoint,
    remove_checkpoints,
    steps_within,
)

NAMED_SUSPICIOUS = 5  # training images that are named


@dataclass(frozen=True)
class Job:
    """One detector that is to be made, and the folders of its file and of TensorBoard's."""

    config: Config
    folder: Path
    logs: Path

    @property
    def path(self) -> Path:
        return detector_path(self.folder, self.config.category)

    @property
    def states(self) -> list[Path]:
        """The saved state of each of its networks."""
        return checkpoint_paths(self.folder, self.config.category, self.config.folds)

    @property
    def finished(self) -> bool:
        """Whether the detector is there, and no newer training of it under way."""
        return self.path.exists() and not found_checkpoints(self.folder, self.config.category)


@dataclass(frozen=True)
class RunOptions:
    """How trainings run: nothing of it decides what a detector is.

    ranks: those that train each network together; the first one writes, and says what is done. numerics: what was asked
    for, by the names of training.Numerics, None for what is to be chosen. explain: keep normal images beside the
    detector. watcher: gives what is called with a detector
    every ``test_epochs`` steps, see Run.train.
    """

    data_dir: str
    workers: int
    storage: cache.Storage
    device: torch.device
    ranks: Ranks
    precision: dict
    cores: int
    overwrite: bool
    explain: bool
    test_epochs: int
    save_minutes: float
    bar: bool
    watcher: Callable[[Config], Callable[[Detector], float] | None]


def train_networks(job: Job, numbers: list[int], running: RunOptions) -> TrainSet | None:
    """Train those of a detector's networks up to their last saved state. Returns all training images; None if the
    detector is there already."""
    config, category, ranks = job.config, job.config.category, running.ranks
    if ranks.broadcast(lambda: job.finished and not running.overwrite):
        if ranks.is_main:
            say(f"{category}: {job.path} is finished; skipped (--overwrite trains it anew, as after adding images)")
        return None
    train = load_normal(config, running)
    images = train.images
    if len(images) < config.batch_size and ranks.is_main:
        say(f"{category}: {len(images)} training images, so {len(images)} per step (--batch_size)")
    watch = running.watcher(config) if running.test_epochs > 0 and ranks.is_main else None
    now = f"{running.data_dir}/{category} holds now" + (
        f", or under another mask than {config.ignore}" * bool(config.ignore)
    )
    if running.overwrite:
        ranks.broadcast(lambda: remove_states(job, numbers))
    # On the device for the whole run, unless they are too many
    placed = images if running.storage.maps(images.shape) else images.to(running.device)
    for number in numbers:
        path = job.states[number]
        state = ranks.broadcast(lambda path=path: saved_state(path, train.digest, now))
        precision = precision_of(path, state, running)
        if running.precision["amp"] is None and state is None and ranks.is_main and number == numbers[0]:
            amp, reason = suitable_precision(running.device)
            say(f"{category}: precision {amp.replace('off', 'float32')} ({reason})")
        torch.set_num_threads(precision.threads)
        with torch.random.fork_rng(devices=[]):
            if config.minutes and number == numbers[0]:
                config = state["config"] if state else timed(config, placed, precision, running)
            run = Trainer(
                config, placed, train.digest, running.device, precision, state, ranks, number, train.fill_index
            )
            run.train(
                job.logs if config.folds == 1 else job.logs / f"network{number}",
                path,
                running.save_minutes,
                watch,
                running.test_epochs,
                running.bar,
                "the same command without --overwrite" if running.overwrite else "the same command",
            )
    return train


def precision_of(path: Path, state: dict | None, running: RunOptions) -> Precision:
    asked = {name: value for name, value in running.precision.items() if value is not None}
    try:
        return choose_precision(asked, state["numerics"] if state else {}, running.device, running.cores)
    except SettingError as error:
        saved = f"; {path} has it: leave the flag out, or start anew with --overwrite" if state else ""
        raise InputError(f"--{error}{saved}") from error


def timed(config: Config, images: Tensor, precision: Precision, running: RunOptions) -> Config:
    """The settings with as many steps as ``minutes``, shared by the detector's networks, allow on this machine."""
    whole = replace(config, freeze_resnet=0)  # steps with the backbone frozen cost less
    run = Trainer(whole, images, "", running.device, precision, None, running.ranks)
    minutes = config.minutes / config.folds
    steps = steps_within(60 * minutes, run)
    steps = running.ranks.broadcast(lambda: steps)
    if running.ranks.is_main:
        say(f"{config.category}: {steps} steps in {minutes:g} minutes")
    return replace(config, epochs=steps)


def load_normal(config: Config, running: RunOptions) -> TrainSet:
    """Return the training images of a category. Raises InputError or SettingError if they teach nothing."""
    category, where = config.category, (running.workers, running.storage, config.ignore)
    train = load_train(running.data_dir, category, config.size, *where)
    if cache.all_equal(train.images):
        raise InputError(f"{Path(running.data_dir) / category}: all training images are equal; nothing can be learned")
    if len(train) < running.ranks.world_size:
        ranks_here = f"{len(train)} training images for {running.ranks.world_size} ranks"
        raise InputError(f"{category}: {ranks_here}; start fewer of them")
    check_enough(config, len(train))
    return train


def write_detector(job: Job, running: RunOptions, train: TrainSet | None = None) -> None:
    """Fit the detector of trained networks to all training images, write it, and remove their saved states; nothing if
    it is there already. train: its images, if they are loaded already."""
    category, folds = job.config.category, job.config.folds
    if not running.ranks.is_main or job.finished:
        return
    states = [load_checkpoint(path) for path in job.states]
    if train is None:
        train = load_normal(job.config, replace(running, ranks=Ranks()))
    config, precision = states[0]["config"], Precision(**states[0]["numerics"])
    torch.set_num_threads(precision.threads)
    with torch.random.fork_rng(devices=[]):
        networks = [build_network(config) for _ in states]
    for network, state in zip(networks, states):
        network.load_state_dict(state["network"])
    fill_index = train.fill_index.to(running.device)
    detector = Detector(config, [network.to(running.device) for network in networks], fill_index).fit(train.images)
    detector.metadata = {
        "command": command_line(),
        "train_images": len(train),
        "train_seconds": round(sum(state["seconds"] for state in states), 1),
        "device": device_name(running.device),
        **asdict(precision),
        "ranks": states[0]["ranks"],
        "torch": str(torch.__version__),
    }
    for note in detector.notes():
        say(f"{category}: {note}")
    if folds > 1:
        say(f"{category}: {most_unusual(detector.calibration_scores, train.paths)}")
    keep_normals(job, running, detector, train)  # before the detector: there is none without them
    save(detector, job.path)
    remove_checkpoints(job.folder, category)
    say(f"{category}: wrote {job.path}")


def keep_normals(job: Job, running: RunOptions, detector: Detector, train: TrainSet) -> None:
    """Write the file of normal images of a detector, if that is asked for; else remove that of an earlier one."""
    path = normals_path(job.path)
    if not running.explain:
        remove_file(path)
        return
    save_normals(detector, train, path)


def most_unusual(scores: Tensor, paths: list[Path]) -> str:
    """The training images with the highest scores (N,), in words."""
    worst = scores.argsort(descending=True)[:NAMED_SUSPICIOUS].tolist()
    listed = ", ".join(f"{paths[i].name} {scores[i]:.1f}" for i in worst)
    return f"training images least like the others, by networks that have not seen them: {listed}"


def saved_state(path: Path, digest: str, now: str) -> dict | None:
    """The state to continue from, if there is one. now: what would be trained on, for the message."""
    state = load_checkpoint(path) if path.exists() else None
    if state is not None and state["images"] != digest:
        raise InputError(
            f"{path}: was saved while training on other images than {now}; "
            "put them back, or start anew with --overwrite"
        )
    return state


def remove_states(job: Job, numbers: list[int]) -> None:
    """Before a detector is trained anew: the saved states of these networks, and of earlier ones that it has not."""
    for path in found_checkpoints(job.folder, job.config.category):
        if path not in job.states or job.states.index(path) in numbers:
            remove_file(path)


def check_writable(folder: Path, here: Ranks) -> None:
    """Make the folder and a file in it. Raises OSError, naming the folder, if that is not possible."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".writable.{here.rank}"
    probe.touch()
    probe.unlink(missing_ok=True)


def check_settings(job: Job) -> None:
    """Hold the settings against what is saved. Raises InputError that names the first difference."""
    config = job.config
    if states := found_checkpoints(job.folder, config.category):  # newer than a detector that they are to replace
        path, saved = states[0], load_checkpoint(states[0])["config"]
    elif job.path.exists():
        path, saved = job.path, load_config(job.path)
    else:
        return
    asked = config.to_dict()
    if config.minutes:
        del asked["epochs"]  # the number of steps that the minutes came to is the saved one
    try:
        resume(asked, saved.to_dict())
    except SettingError as error:
        way_out = "choose another --model_dir, or start anew with --overwrite"
        raise InputError(f"{path}: {error.reason}; {way_out}") from error
