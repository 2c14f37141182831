"""Train one detector per category on its normal images alone.

    python run_training.py --model_dir models --head_layer 2
    python run_training.py --model_dir patch_models --recipe fast --no-pretrained

Writes <model_dir>/<category>.pt. The same command again continues where it stopped; finished categories are skipped.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch

import options
from config import RECIPES, Config, SettingError, resume
from dataset import TestSet, choose_categories, find_images, load_images, load_test, load_train, train_paths
from density import NotFiniteError
from detector import Detector, check_enough, detector_path, load_config, save
from log import PREVIEW_IMAGES, NotFiniteLossError, invisible_shares
from model import WeightsError
from options import flagged
from runtime import cache, ranks
from runtime.files import InputError, remove_file, say, write_file
from runtime.flags import int_at_least, new_parser, number, zero_or_one
from runtime.ranks import Ranks
from runtime.script import (
    PRECISIONS,
    choose_device,
    command_line,
    device_name,
    folder_name,
    run_script,
    suitable_precision,
)
from training import Numerics, Run, checkpoint_path, choose_numerics, load_checkpoint, steps_within


def get_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__, "Then: python eval.py --model_dir models")
    options.add_data_flags(parser)
    options.add_config_flags(parser)
    add = parser.add_argument_group("running").add_argument
    steps = "steps between two looks at the test AUROC; -1: none (default: 256; none for patch models)"
    add("--test_epochs", type=int_at_least(-1), metavar="N", help=steps)
    add("--threads", type=int_at_least(1), metavar="N", help="of the network on the CPU (default: one per core)")
    auto = "precision; auto: bf16 or fp16 where the GPU, AMX or avx512_bf16 has it (default: auto)"
    add("--amp", choices=("auto", *PRECISIONS), default="auto", help=auto)
    add("--compile", type=zero_or_one, metavar="0|1", help="torch.compile, needs a C++ compiler (default: 0)")
    ddp = "under torchrun: all ranks train each category together (default: 0, each its own)"
    add("--ddp", type=zero_or_one, default=False, metavar="0|1", help=ddp)
    add("--logdir", default="logdirs", metavar="DIR", help="folder of TensorBoard's files (default: logdirs)")
    minutes = "between two saved states (default: 3)"
    add("--save_minutes", type=number(0, 1e6), default=3.0, metavar="X", help=minutes)
    add("--overwrite", action="store_true", help="start anew, replacing detectors and saved states")
    add("--preview", metavar="FILE", help="write a sheet of augmented samples to this PNG file and stop")
    return parser


def main(args: argparse.Namespace) -> None:
    try:
        settings = options.config_of(args, "any")
    except SettingError as error:
        raise argparse.ArgumentTypeError(flagged(error)) from error
    if args.test_epochs is None:
        args.test_epochs = 256 if settings.patches is None else -1
    here = ranks.from_environment()
    device = choose_device(args.cuda, here.local_rank)
    categories = choose_categories(args.data_dir, args.type)
    configs = [replace(settings, category=category) for category in categories]
    for category in categories:
        train_paths(args.data_dir, category)  # a missing folder now, not after hours of another category
    if args.preview:
        if here.is_main:
            write_preview(args, configs)
        return
    check_ranks(args, settings.batch_size, here)
    check_writable(Path(args.model_dir), here)
    if not args.overwrite:
        for config in configs:
            check_settings(args.model_dir, config)
    torch.backends.cudnn.deterministic = True
    if RECIPES[settings.recipe] and here.is_main:
        own = {name: settings.to_dict()[name] for name in RECIPES[settings.recipe]}
        own.pop("epochs" if settings.minutes else "", None)
        say(f"recipe {settings.recipe}: " + ", ".join(f"{name} {value}" for name, value in own.items()))

    from tqdm import tqdm

    together = here if args.ddp else Ranks()
    own = configs if args.ddp else here.shard(configs)
    quiet = len(own) < 2 or not here.is_main
    cores = torch.get_num_threads()  # before a resumed category sets its own number
    with together.joined(args.cuda), tqdm(own, "categories", unit="category", file=sys.stderr, disable=quiet) as bar:
        for config in bar:
            with hints():
                train_category(args, config, device, cores, together, here.is_main)
    if here.is_main:
        follow = f"python eval.py --data_dir {args.data_dir} --model_dir {args.model_dir}"
        say(f"detectors are in {args.model_dir}; next: {follow}")


@contextmanager
def hints() -> Iterator[None]:
    """Add to an error of the modules below which flag helps."""
    try:
        yield
    except WeightsError as error:
        hint = "give a file with --weights FILE or train from scratch with --no-pretrained"
        raise InputError(f"{error}; {hint}") from error
    except SettingError as error:
        raise InputError(flagged(error)) from error
    except InputError as error:
        if isinstance(error, NotFiniteLossError) or isinstance(error.__cause__, NotFiniteError):
            hint = "start anew with a lower --lr (and --overwrite, if a state was saved)"
            raise InputError(f"{error}; {hint}") from error
        raise


# What is on disk --------------------------------------------------------------------------------------------------


def check_ranks(args: argparse.Namespace, batch_size: int, here: Ranks) -> None:
    """Raises InputError for what several processes cannot do."""
    if args.overwrite and here.restarts:
        raise InputError("a rank died, and --overwrite would start anew: give the same command without --overwrite")
    if args.overwrite and here.machines > 1:  # torchrun does not tell a machine that another one's rank was restarted
        raise InputError("--overwrite: not on several machines, where a restart would start anew; empty --model_dir")
    if args.ddp and batch_size < here.world_size:
        raise InputError(f"--batch_size {batch_size}: at least one image for each of {here.world_size} ranks is needed")


def check_writable(folder: Path, here: Ranks) -> None:
    """Make the folder and a file in it. Raises OSError, naming the folder, if that is not possible."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".writable.{here.rank}"
    probe.touch()
    probe.unlink(missing_ok=True)


def check_settings(model_dir: str, config: Config) -> None:
    """Hold the settings against what is saved. Raises InputError that names the first difference."""
    if (path := checkpoint_path(model_dir, config.category)).exists():  # newer than a detector that it is to replace
        saved = load_state(path)["config"]
    elif (path := detector_path(model_dir, config.category)).exists():
        saved = load_config(path)
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


def load_state(path: Path) -> dict:
    try:
        return load_checkpoint(path)
    except InputError as error:
        raise InputError(f"{error} (--overwrite)") from error


def write_preview(args: argparse.Namespace, configs: list[Config]) -> None:
    import plots

    if Path(args.preview).suffix.lower() != ".png":
        raise InputError(f"--preview {args.preview}: the name of a .png file is needed")
    rows = max(1, PREVIEW_IMAGES // len(configs))
    images, names = [], []
    for config in configs:
        paths = train_paths(args.data_dir, config.category)[:rows]
        images.append(load_images(paths, (config.height, config.width), args.workers))
        names += [f"{config.category}\n{path.name}" for path in paths]
    shown = torch.cat(images)
    sheet = plots.preview(shown, names, configs[0], invisible_shares(configs[0], shown))
    write_file(plots.png(sheet), args.preview)
    say(f"wrote {args.preview}; nothing was trained")


# Training ---------------------------------------------------------------------------------------------------------


def train_category(
    args: argparse.Namespace, config: Config, device: torch.device, cores: int, together: Ranks, bar: bool
) -> None:
    """Train, fit the density and write the detector of one category, unless it is there already.

    together: the ranks that train it; the first one writes, and says what is done.
    """
    category = config.category
    path, state_path = detector_path(args.model_dir, category), checkpoint_path(args.model_dir, category)
    if together.broadcast(lambda: path.exists() and not state_path.exists() and not args.overwrite):
        if together.is_main:
            say(f"{category}: {path} is finished; skipped (--overwrite trains it anew, as after adding images)")
        return
    images = load_normal(args, config, together)
    test = load_watched_test(args, config) if args.test_epochs > 0 and together.is_main else None
    digest = cache.digest(images)
    state = together.broadcast(lambda: saved_state(args, state_path, digest, category))
    asked = {"threads": args.threads, "amp": None if args.amp == "auto" else args.amp, "compile": args.compile}
    asked = {name: value for name, value in asked.items() if value is not None}
    try:
        numerics = choose_numerics(asked, state["numerics"] if state else {}, device, cores)
    except SettingError as error:
        saved = f"; {state_path} has it: leave the flag out, or start anew with --overwrite" if state else ""
        raise InputError(f"{flagged(error)}{saved}") from error
    if args.amp == "auto" and state is None and together.is_main:
        amp, reason = suitable_precision(device)
        say(f"{category}: precision {amp.replace('off', 'float32')} ({reason})")
    torch.set_num_threads(numerics.threads)
    with torch.random.fork_rng(devices=[]):
        if config.minutes:
            config = state["config"] if state else timed(config, images, device, numerics, together)
        run = Run(config, images, digest, device, numerics, state, together)
        run.train(
            Path(args.logdir) / folder_name(args.model_dir) / category,
            state_path,
            args.save_minutes,
            None if test is None else lambda detector: test_auroc(detector, test),
            args.test_epochs,
            bar,
            "the same command without --overwrite" if args.overwrite else "the same command",
        )
    if together.is_main:
        save(finished(run), path)
        remove_file(state_path)
        say(f"{category}: wrote {path}")


def timed(
    config: Config, images: cache.ImageArray, device: torch.device, numerics: Numerics, together: Ranks
) -> Config:
    """The settings with as many steps as ``minutes`` allow on this machine."""
    whole = replace(config, freeze_resnet=0)  # steps with the backbone frozen cost less
    steps = steps_within(60 * config.minutes, Run(whole, images, "", device, numerics, None, together))
    steps = together.broadcast(lambda: steps)
    if together.is_main:
        say(f"{config.category}: {steps} steps in {config.minutes:g} minutes")
    return replace(config, epochs=steps)


def load_normal(args: argparse.Namespace, config: Config, together: Ranks) -> cache.ImageArray:
    """The training images of a category. Raises InputError or SettingError if nothing can be learned from them."""
    category, size = config.category, (config.height, config.width)
    images = load_train(args.data_dir, category, size, args.workers, options.storage(args))
    if cache.all_equal(images):
        raise InputError(f"{Path(args.data_dir) / category}: all training images are equal; nothing can be learned")
    if len(images) < together.world_size:
        ranks_here = f"{len(images)} training images for {together.world_size} ranks"
        raise InputError(f"{category}: {ranks_here}; start fewer of them")
    check_enough(config, len(images))
    if len(images) < config.batch_size and together.is_main:
        say(f"{category}: {len(images)} training images, so {len(images)} per step (--batch_size)")
    return images


def finished(run: Run) -> Detector:
    """The detector that a run ends in, and how it was made."""
    detector = Detector(run.config, run.network).fit(run.images)
    detector.metadata = {
        "command": command_line(),
        "train_images": len(run.images),
        "train_seconds": round(run.seconds, 1),
        "device": device_name(run.device),
        **asdict(run.numerics),
        "ranks": run.ranks.world_size,
        "torch": str(torch.__version__),
    }
    for note in detector.notes():
        say(f"{run.config.category}: {note}")
    return detector


def saved_state(args: argparse.Namespace, path: Path, digest: str, category: str) -> dict | None:
    """The state to continue from, if there is one and it was not asked to start anew."""
    if args.overwrite:
        remove_file(path)
    state = load_state(path) if path.exists() else None
    if state is not None and state["images"] != digest:
        raise InputError(
            f"{path}: was saved while training on other images than {args.data_dir}/{category} holds now; "
            "put them back, or start anew with --overwrite"
        )
    return state


def test_auroc(detector: Detector, test: TestSet) -> float:
    from eval import evaluate

    return evaluate(detector, test)[-1]["image_auroc"]


def load_watched_test(args: argparse.Namespace, config: Config) -> TestSet | None:
    """The test images to look at while training, if there are both normal and anomalous ones."""
    category, size = config.category, (config.height, config.width)
    folder = Path(args.data_dir) / category / "test"
    if not folder.is_dir() or not any(find_images(kind) for kind in folder.iterdir() if kind.is_dir()):
        say(f"{category}: no test images, so no AUROC while training")
        return None
    test = load_test(args.data_dir, category, size, args.workers, options.storage(args))
    if 0 < test.labels.sum() < len(test.labels):
        return test
    say(f"{category}: test images of one kind only, so no AUROC while training")
    return None


if __name__ == "__main__":
    run_script(main, get_parser())
