"""The making of one detector: what is on disk before, the training of its networks, the writing of its file.

Owns what happens before and after the training loop, and that both continue where they stopped. Knows no flag but in
its messages.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from config import REFITTED, Config, SettingError, flag_value, resume, with_flag
from conformal import BY_HAND
from dataset import TestSet, TrainSet, files_digest, has_test_images, load_fill_index, load_test, load_train
from detector import (
    EXPORT_AGAIN,
    Detector,
    build_network,
    check_enough,
    detector_path,
    load,
    load_config,
    made_from,
    save,
    set_since,
)
from normals import normals_path, save_normals
from runtime import cache
from runtime.cli import command_line, device_name, progress_bar, suitable_precision
from runtime.distributed import Ranks
from runtime.files import KILLED_AFTER, InputError, check_writable, damage_named, locked_folder, remove_abandoned, say
from runtime.image_files import FULL_RANGE
from runtime.tensors import check_tensors, rules_of
from training.choice import choose_density, with_settings
from training.trainer import (
    ANEW,
    Precision,
    RunOptions,
    Trainer,
    checkpoint_paths,
    choose_precision,
    find_checkpoints,
    load_checkpoint,
    remove_checkpoints,
    steps_within,
)

NAMED_SUSPICIOUS = 5  # training images that are named


@dataclass(frozen=True)
class Job:
    """One detector that is to be made: its settings, and the folders of its file and of TensorBoard's."""

    config: Config
    folder: Path
    logs: Path
    paths: list[Path]  # of its training images

    @property
    def path(self) -> Path:
        """Return the path of the detector file."""
        return detector_path(self.folder, self.config.category)

    @property
    def states(self) -> list[Path]:
        """Return the file of the saved state of each of its networks."""
        return checkpoint_paths(self.folder, self.config.category, self.config.folds)

    @property
    def finished(self) -> bool:
        """Return whether the detector file exists, and no newer training of it is under way."""
        return self.path.exists() and not find_checkpoints(self.folder, self.config.category)


# Training ---------------------------------------------------------------------------------------------------------


def train_networks(job: Job, numbers: list[int], options: RunOptions) -> TrainSet | None:
    """Train the networks of these numbers, each from its saved state on, up to the state after its last step.

    Returns the training images; None if the detector is finished already.
    """
    config, category, ranks = job.config, job.config.category, options.ranks
    if ranks.broadcast(lambda: job.finished and not options.overwrite):
        if ranks.is_main:
            say(f"{category}: {job.path} is finished; skipped{what_to_do(job)}")
        return None
    train_set = load_normal(job, options)
    if config.epochs and len(train_set) < config.batch_size and ranks.is_main:
        say(f"{category}: {len(train_set)} training images, so {len(train_set)} per step (--batch_size)")
    watches = config.epochs and options.test_epochs > 0 and ranks.is_main
    test_set = load_watched(config, options, train_set) if watches else None
    if options.overwrite:
        ranks.broadcast(lambda: remove_states(job, numbers))
    for number in numbers:
        path = job.states[number]
        state = ranks.broadcast(lambda path=path: load_state(path, train_set, job, options) if path.exists() else None)
        precision = precision_of(path, state, options)
        tells = config.epochs and ranks.is_main and "amp" not in options.asked_precision
        if tells and state is None and number == numbers[0]:
            amp, reason = suitable_precision(options.device)
            say(f"{category}: precision {amp.replace('off', 'float32')} ({reason})")
        torch.set_num_threads(precision.threads)
        with torch.random.fork_rng(devices=[]):
            if config.minutes and number == numbers[0]:
                config = state["config"] if state else plan_steps(config, train_set, options, precision)
            logs = job.logs if config.folds == 1 else job.logs / f"network{number}"
            Trainer(config, train_set, options, precision, state, number).train(logs, path, test_set)
    return train_set


def load_normal(job: Job, options: RunOptions) -> TrainSet:
    """Return the training images. Raises InputError or SettingError if nothing can be learned from them."""
    config, category, ranks = job.config, job.config.category, options.ranks
    where = options.data_dir, category, config.size, options.workers, options.storage
    train_set = load_train(*where, config.ignore, paths=job.paths)
    if train_set.white < FULL_RANGE and ranks.is_main:
        depth = f"{train_set.white} is white in 16-bit images, now and whenever this detector scores one"
        say(f"{category}: {depth}; no training image has a larger value")
    if cache.all_equal(train_set.images):
        raise InputError(f"{Path(options.data_dir) / category}: all training images are equal; nothing can be learned")
    if len(train_set) < ranks.world_size:
        counts = f"{len(train_set)} training images for {ranks.world_size} ranks"
        raise InputError(f"{category}: {counts}; start fewer of them")
    check_enough(config, len(train_set))
    return train_set


def load_watched(config: Config, options: RunOptions, train_set: TrainSet) -> TestSet | None:
    """Return the test images to watch while training, decoded as ``train_set`` is; None, which is told, unless there
    are normal and anomalous ones."""
    if not has_test_images(options.data_dir, config.category):
        say(f"{config.category}: no test images, so no AUROC while training")
        return None
    where = options.data_dir, config.category, config.size, options.workers, options.storage
    test_set = load_test(*where, train_set.fill_index, train_set.white)
    if 0 < test_set.labels.sum() < len(test_set.labels):
        return test_set
    say(f"{config.category}: test images of one kind only, so no AUROC while training")
    return None


def precision_of(path: Path, state: dict | None, options: RunOptions) -> Precision:
    """Return the precision to train by. Raises InputError, naming the flag, for one that cannot be. path: the file of
    the saved state."""
    try:
        saved = state["precision"] if state else {}
        return choose_precision(options.asked_precision, saved, options.device, options.cores)
    except SettingError as error:
        way_out = f"; {path} has it: leave the flag out, or start anew with --overwrite" if state else ""
        raise InputError(f"--{error}{way_out}") from error


def plan_steps(config: Config, train_set: TrainSet, options: RunOptions, precision: Precision) -> Config:
    """Return the settings with as many steps as ``minutes``, shared by the networks, allow on this machine."""
    minutes = config.minutes / config.folds
    unfrozen = replace(config, freeze_resnet=0)  # steps with the backbone frozen cost less
    steps = steps_within(60 * minutes, Trainer(unfrozen, train_set, options, precision))
    steps = options.ranks.broadcast(lambda: steps)
    if options.ranks.is_main:
        say(f"{config.category}: {steps} steps in {minutes:g} minutes")
    return replace(config, epochs=steps)


# Writing the detector ---------------------------------------------------------------------------------------------


def write_detector(job: Job, options: RunOptions, train_set: TrainSet | None = None) -> None:
    """Fit the detector of the trained networks, write its file, and remove their saved states; nothing if it is
    finished already. train_set: its training images, if they are loaded already."""
    category = job.config.category
    if not options.ranks.is_main or job.finished:
        return
    if train_set is None:
        train_set = load_normal(job, replace(options, ranks=Ranks()))
    states = [load_state(path, train_set, job, options) for path in job.states]
    config, precision = states[0]["config"], Precision(**states[0]["precision"])
    torch.set_num_threads(precision.threads)
    with torch.random.fork_rng(devices=[]):
        networks = [build_network(config).to(options.device) for _ in states]
    for network, state, path in zip(networks, states, job.states):
        with damage_named(path, "checkpoint", ANEW):
            check_tensors(state["network"], rules_of(network.state_dict()), {})
            network.load_state_dict(state["network"])
    detector = Detector(config, networks, train_set.fill_index.to(options.device), train_set.white)
    if config.density == "auto":
        say(f"{category}: choosing the density by defects pasted into normal images")
        detector = choose_density(detector, train_set.images)
    fit_densities(detector, train_set, options)
    detector.train_files = files_digest(train_set.paths)
    detector.metadata |= {
        "command": command_line(),
        "train_images": len(train_set),
        "train_seconds": round(sum(state["seconds"] for state in states), 1),
        "device": device_name(options.device),
        "threads": precision.threads,
        "amp": precision.amp,
        "compile": precision.compile,
        "ranks": states[0]["ranks"],
        "torch": str(torch.__version__),
    }
    save_with_normals(detector, train_set, job.path, options)
    remove_checkpoints(job.folder, category)
    say(f"{category}: wrote {job.path}, {job.path.stat().st_size / 1e6:.0f} MB")


def fit_densities(detector: Detector, train_set: TrainSet, options: RunOptions) -> None:
    """Fit a detector; of several networks a bar shows how many are done."""
    count = len(detector.members)
    with progress_bar(f"{detector.config.category} densities", 0, count, options.bar and count > 1, "network") as bar:
        detector.fit(train_set.images, tell=bar.update)


def save_with_normals(detector: Detector, train_set: TrainSet, path: Path, options: RunOptions) -> None:
    """Write a fitted detector and the normal images beside it, and tell what a person should know of it."""
    category = detector.config.category
    for line in detector.notes():
        say(f"{category}: {line}")
    if len(detector.members) > 1:
        say(f"{category}: {most_unusual(detector.calibration_scores, train_set.paths)}")
    # The normal images before the detector: there is none without them
    if options.explain:
        save_normals(detector, train_set, normals_path(path))
    else:
        normals_path(path).unlink(missing_ok=True)  # that of an earlier one
    save(detector, path)


def refit_detector(job: Job, options: RunOptions, given: dict) -> None:
    """Fit the densities, the threshold and the calibration scores of a finished detector anew to the training images
    that are there now; its networks stay.

    given: the settings that flags name. Those of the density and the false-alarm rate are the new ones; the others must
    be the detector's, as those that are not given are. Raises InputError if they are not, if there is no detector, or
    if images that a network has learned from would come to be among those that it must not know.
    """
    category = job.config.category
    if not job.finished:
        raise InputError(f"{job.path}: no finished detector, so nothing to fit anew; leave --refit out")
    detector = load(job.path, options.device)
    config, asked, new = detector.config, job.config.to_dict(), (*REFITTED, "false_alarm_rate")
    _check_agreement({name: asked[name] for name in given if name not in new}, config, job.path)
    if config.epochs and (config.folds > 1 or config.holdout):
        flag = "--folds" if config.folds > 1 else "--holdout"
        reason = f"was trained with {flag}, which new images would shift: nothing could be promised any more"
        raise InputError(f"{job.path}: {reason}; train it anew with --overwrite")
    where = (options.data_dir, category, config.size, options.workers, options.storage)
    train_set = load_train(*where, detector.fill_index, detector.white, job.paths)
    check_enough(config, len(train_set))
    try:
        other = with_settings(detector, given, train_set.images)
    except SettingError as error:
        raise InputError(f"{with_flag(error)} ({job.path})") from error
    before, rate = detector.metadata.get("train_images"), given.get("false_alarm_rate", config.false_alarm_rate)
    settings, new_settings = config.to_dict(), other.config.to_dict()
    changed = [name for name in REFITTED if settings.get(name) != new_settings.get(name)]
    if changed:
        other.metadata["refitted"] = " ".join(sorted({*detector.metadata.get("refitted", "").split(), *changed}))
    fit_densities(other, train_set, options)
    if rate != config.false_alarm_rate:
        other.set_false_alarm_rate(rate, BY_HAND)
    other.metadata["train_images"] = len(train_set)
    other.train_files = files_digest(train_set.paths)
    save_with_normals(other, train_set, job.path, options)
    count = f"{len(train_set)} images ({before} before)"
    told = [name for name in changed if new_settings.get(name) is not None]  # features other than level have no level
    now = "".join(f"; now {name} {flag_value(new_settings[name])}" for name in told)
    say(f"{category}: fitted {job.path} anew to {count}{now}; its networks stay; {EXPORT_AGAIN}")
    if rate != config.false_alarm_rate:
        say(f"{category}: {job.path} decides at {rate:g} from now on")


def what_to_do(job: Job) -> str:
    """Return in words what to do if the training images have changed since a detector was made; empty if they have
    not."""
    count, digest = made_from(job.path)
    if digest == files_digest(job.paths) or (not digest and count in (None, len(job.paths))):
        return " (--overwrite trains it anew)"
    images = f"{job.paths[0].parent} has changed since it was made: {len(job.paths)} images, {count} then"
    return f". {images}. --refit takes them in within seconds, --overwrite trains it anew"


def most_unusual(scores: Tensor, paths: list[Path]) -> str:
    """Return the training images with the highest scores (N,), in words."""
    highest = scores.argsort(descending=True)[:NAMED_SUSPICIOUS].tolist()
    listed = ", ".join(f"{paths[number].name} {scores[number]:.1f}" for number in highest)
    return f"training images least like the others, by networks that have not seen them: {listed}"


# What is on disk --------------------------------------------------------------------------------------------------


def check_masks(jobs: list[Job]) -> None:
    """Raise InputError for a bad mask of what is ignored, and for a folder without a mask for any of the jobs."""
    masks = [load_fill_index(job.config.ignore, job.config.category, job.config.size, job.paths[0]) for job in jobs]
    if jobs[0].config.ignore and not any(fill_index.numel() for fill_index in masks):
        categories = ", ".join(dict.fromkeys(job.config.category for job in jobs))
        raise InputError(f"--ignore: {jobs[0].config.ignore} has no <category>.png for any of {categories}")


@contextmanager
def reserved(folders: Iterable[Path], ranks: Ranks) -> Iterator[None]:
    """Make the folders of detectors, and keep other trainings out of them within it. What a killed one has left
    unfinished there is removed. Raises InputError if another training is at work there; InputError or OSError, naming
    the folder, if no file can be written to it."""
    with ExitStack() as stack:
        for folder in dict.fromkeys(folders):
            check_writable(folder)
            if ranks.is_main:
                stack.enter_context(locked_folder(folder, "wait for it, or take another --model_dir"))
                remove_abandoned(folder, 0 if ranks.world_size == 1 else KILLED_AFTER)
        yield


def check_settings(job: Job) -> None:
    """Raise InputError that names the first difference between the settings and those of what is on disk."""
    config = job.config
    if states := find_checkpoints(job.folder, config.category):  # newer than a detector that they are to replace
        path, saved = states[0], load_checkpoint(states[0])["config"]
    elif job.path.exists():
        path, saved = job.path, load_config(job.path)
    else:
        return
    asked = config.to_dict()
    if config.minutes:
        del asked["epochs"]  # the number of steps that the minutes came to is the saved one
    for name in set_since(path) if path == job.path else ():
        asked.pop(name, None)
    _check_agreement(asked, saved, path)


def _check_agreement(asked: dict, saved: Config, path: Path) -> None:
    """Raise InputError that names the first difference between settings, by name, and those of a file."""
    try:
        resume(asked, saved.to_dict())
    except SettingError as error:
        way_out = "choose another --model_dir, or start anew with --overwrite"
        raise InputError(f"{path}: {error.reason}; {way_out}") from error


def load_state(path: Path, train_set: TrainSet, job: Job, options: RunOptions) -> dict:
    """Return a saved state. Raises InputError if it is of other images than ``train_set``."""
    state = load_checkpoint(path)
    if state["images"] != train_set.digest:
        holds = f"{options.data_dir}/{job.config.category} holds now"
        if job.config.ignore:
            holds += f", or under another mask than {job.config.ignore}"
        way_out = "put them back, or start anew with --overwrite"
        raise InputError(f"{path}: was saved while training on other images than {holds}; {way_out}")
    return state


def remove_states(job: Job, numbers: list[int]) -> None:
    """Remove, before training anew, the saved states of the networks of these numbers, and those of an earlier detector
    that this one has not."""
    for path in find_checkpoints(job.folder, job.config.category):
        if path not in job.states or job.states.index(path) in numbers:
            path.unlink()
