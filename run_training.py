"""Train one detector per category on its normal images alone.

Owns the flags of training, what each category gets of them, and what is on disk before and after: writes
``<model_dir>/<category>.pt``; the same command again continues where the last one stopped. The loop is in training.py.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import torch

import cache
import options
import ranks
from dataset import InputError, TestSet, choose_categories, find_images, load_images, load_test, load_train, train_paths
from detector import Detector, check_enough, detector_path, load, remove_file, save, write_file
from localization import GRID_KEYS, Grid
from model import BACKBONES
from options import say
from ranks import Ranks
from training import (
    PRECISIONS,
    PREVIEW_IMAGES,
    Run,
    checkpoint_path,
    choose_arithmetic,
    device_name,
    load_checkpoint,
    preview,
)

LEARNING_RATES = {"sgd": 0.03, "adam": 0.001}  # sgd: the paper's
DEFAULTS = {"variant": "3way", "head_layer": 1, "size": (256, 256), "normalize": "image"}
MAP_DEFAULTS = {"window": 16, "stride": 8, "level": 1, "dense": True, "location": "auto", "sigma": 4.0}


def get_parser() -> argparse.ArgumentParser:
    parser = options.new_parser(
        "Train one CutPaste detector per category. The same command again continues; finished categories are skipped.",
        "Then: python eval.py --model_dir models",
    )
    options.add_data_flags(parser)
    options.add_network_flags(parser, DEFAULTS)
    options.add_density_flags(parser, "torch", "1; 0 for patch models")
    whole, number = options.whole, options.number

    def add(flag: str, help: str, **kwargs) -> None:
        parser.add_argument(f"--{flag}", help=help, **kwargs)

    add("backbone", "network that is trained (default: resnet18)", choices=tuple(BACKBONES), default="resnet18")
    add(
        "pretrained",
        "start from ImageNet weights (default), or with --no-pretrained from scratch as the paper does",
        action=argparse.BooleanOptionalAction,
        default=True,
    )
    add("weights", "ImageNet weights in torchvision's format (default: torchvision's download)", metavar="FILE")
    add(
        "freeze_resnet",
        "steps with the backbone frozen, BatchNorm too (default: 20 with pretrained weights, else 0)",
        type=whole(0),
        metavar="N",
    )
    add(
        "patch_size",
        "train a patch model, which makes anomaly maps: side of the crops that it sees, such as 64 (default: none)",
        # Crops of 16 leave the last stage a single feature, and the gradient that oneDNN computes there in bfloat16
        # reads memory nobody wrote: the loss is NaN in some runs
        type=whole(32),
        metavar="P",
    )
    shown = {name: int(value) if value is True else value for name, value in MAP_DEFAULTS.items()}
    options.add_map_flags(parser, {name: f"default: {value}" for name, value in shown.items()})
    add("epochs", "parameter updates (default: 10000)", type=whole(1), default=10000, metavar="N")
    add("batch_size", "images read per update; each gives 2 or 3 views (default: 32)", type=whole(2), default=32)
    add("optim", "optimiser (default: sgd)", choices=tuple(LEARNING_RATES), default="sgd")
    add("lr", "learning rate at the start (default: 0.03 for sgd, 0.001 for adam)", type=number(1e-9, 1e9))
    add("jitter", "colour jitter of the whole image (default: 0.1)", type=number(0, 0.5), default=0.1)
    add("patch_jitter", "colour jitter of the patch (default: 0.1)", type=number(0, 0.5), default=0.1)
    add("translate", "largest shift, fraction of the side (default: 0.04)", type=number(0, 0.5), default=0.04)
    add("seed", "seed of everything random (default: 0)", type=whole(0), default=0, metavar="N")
    add(
        "false_alarm_rate",
        "share of normal images above the stored threshold (default: 0.01)",
        type=number(0, 1),
        default=0.01,
    )
    add(
        "test_epochs",
        "updates between two looks at the test AUROC; -1: none (default: 256; none for patch models)",
        type=whole(-1),
    )
    add(
        "threads",
        "threads of the network on the CPU; another number rounds differently (default: one per core, or as saved)",
        type=whole(1),
        metavar="N",
    )
    add(
        "amp",
        "precision of the training; auto: bfloat16 or float16 where hardware has it (default: auto, or as saved)",
        choices=("auto", *PRECISIONS),
        default="auto",
    )
    add(
        "compile",
        "compile the network with torch.compile; needs a C++ compiler (default: 0, or as saved)",
        type=options.zero_or_one,
        metavar="0|1",
    )
    add(
        "ddp",
        "under torchrun: train each category on all ranks instead of giving each rank its own (default: 0)",
        type=options.zero_or_one,
        default=False,
        metavar="0|1",
    )
    add("logdir", "folder of TensorBoard's files (default: logdirs)", default="logdirs", metavar="DIR")
    add("save_minutes", "minutes between two saved states (default: 3)", type=number(0, 1e6), default=3.0)
    add("overwrite", "start anew, replacing detectors and saved states", action="store_true")
    add("preview", "write a sheet of augmented samples to this PNG file and stop", metavar="FILE")
    return parser


def main(args: argparse.Namespace) -> None:
    if args.weights is not None and not args.pretrained:
        raise argparse.ArgumentTypeError("--weights and --no-pretrained contradict each other")
    check_patch_flags(args)
    if args.test_epochs is None:
        args.test_epochs = 256 if args.patch_size is None else -1
    here = ranks.from_environment()
    device = options.choose_device(args.cuda, here.local)
    categories = choose_categories(args.data_dir, args.type)
    configs = [make_config(args, category) for category in categories]
    for category in categories:
        train_paths(args.data_dir, category)  # a missing folder now, not after hours of another category
    if args.preview:
        if here.first:
            write_preview(args, configs)
        return
    if args.overwrite and here.restarts:
        raise InputError("a rank died, and --overwrite would start anew: give the same command without --overwrite")
    if args.overwrite and here.machines > 1:  # torchrun does not tell a machine that another one's rank was restarted
        raise InputError("--overwrite: not on several machines, where a restart would start anew; empty --model_dir")
    if args.ddp and args.batch_size < here.count:
        raise InputError(f"--batch_size {args.batch_size}: at least one image for each of {here.count} ranks is needed")
    check_writable(Path(args.model_dir), here)
    if not args.overwrite:
        for config in configs:
            check_settings(args.model_dir, config)
    torch.backends.cudnn.deterministic = True

    from tqdm import tqdm

    together = here if args.ddp else Ranks()
    own = configs if args.ddp else ranks.share(configs, here)
    quiet = len(own) < 2 or not here.first
    cores = torch.get_num_threads()  # before a resumed category sets its own number
    with together.joined(args.cuda), tqdm(own, "categories", unit="category", file=sys.stderr, disable=quiet) as bar:
        for config in bar:
            train_category(args, config, device, cores, together, here.first)
    if here.first:
        follow = f"python eval.py --data_dir {args.data_dir} --model_dir {args.model_dir}"
        say(f"detectors are in {args.model_dir}; next: {follow}")


# Settings and what is on disk -------------------------------------------------------------------------------------


def check_patch_flags(args: argparse.Namespace) -> None:
    """Raises ArgumentTypeError for flags that do not go with --patch_size, or its absence."""
    given = [name for name in MAP_DEFAULTS if getattr(args, name) is not None]
    if args.patch_size is None:
        if given:
            raise argparse.ArgumentTypeError(f"--{given[0]}: goes with --patch_size, which makes a patch model")
        return
    if args.patch_size > min(args.size):
        height, width = args.size
        raise argparse.ArgumentTypeError(f"--patch_size {args.patch_size}: larger than the image, {width}x{height}")
    if args.density != "torch":
        raise argparse.ArgumentTypeError(f"--density {args.density}: a patch model has the density torch")
    settings = map_settings(args)
    try:
        Grid(*args.size, *(settings[name] for name in GRID_KEYS))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"--{error}") from error


def map_settings(args: argparse.Namespace) -> dict:
    """What the flags of the maps come to; nothing for an image-level model."""
    if args.patch_size is None:
        return dict.fromkeys(MAP_DEFAULTS)
    given = {name: getattr(args, name) for name in MAP_DEFAULTS}
    return {name: MAP_DEFAULTS[name] if value is None else value for name, value in given.items()}


def make_config(args: argparse.Namespace, category: str) -> dict:
    """Everything that decides what the detector of a category will be, as plain values; stored in its file."""
    height, width = args.size
    freeze = args.freeze_resnet if args.freeze_resnet is not None else (20 if args.pretrained else 0)
    copied = (
        "backbone variant head_layer normalize density false_alarm_rate seed pretrained weights epochs batch_size "
        "optim jitter patch_jitter translate patch_size"
    )
    return {
        "category": category,
        "height": height,
        "width": width,
        **{name: getattr(args, name) for name in copied.split()},
        "lr": LEARNING_RATES[args.optim] if args.lr is None else args.lr,
        "freeze_resnet": freeze,
        # the length of a patch's features says how much there is to see in it
        "l2": args.patch_size is None if args.l2 is None else args.l2,
        **map_settings(args),
    }


def check_writable(folder: Path, here: Ranks) -> None:
    """Make the folder and a file in it. Raises OSError, naming the folder, if that is not possible."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".writable.{here.rank}"
    probe.touch()
    probe.unlink(missing_ok=True)


def check_settings(model_dir: str, config: dict) -> None:
    """Hold the settings against what is saved. Raises InputError that names the first difference."""
    category = config["category"]
    if (path := checkpoint_path(model_dir, category)).exists():  # newer than a detector that it is to replace
        saved = load_checkpoint(path)["config"]
    elif (path := detector_path(model_dir, category)).exists():
        saved = load(path).config
    else:
        return
    for name, value in config.items():
        if saved.get(name) != value:
            raise InputError(
                f"{path}: made with {name} {saved.get(name)}, now {value}; choose another --model_dir, "
                "or start anew with --overwrite"
            )


def write_preview(args: argparse.Namespace, configs: list[dict]) -> None:
    import plots

    if Path(args.preview).suffix.lower() != ".png":
        raise InputError(f"--preview {args.preview}: the name of a .png file is needed")
    rows = max(1, PREVIEW_IMAGES // len(configs))
    images, names = [], []
    for config in configs:
        paths = train_paths(args.data_dir, config["category"])[:rows]
        images.append(load_images(paths, args.size, args.workers))
        names += [f"{config['category']}\n{path.name}" for path in paths]
    write_file(plots.png(preview(torch.cat(images), names, configs[0])), args.preview)
    say(f"wrote {args.preview}; nothing was trained")


# Training ---------------------------------------------------------------------------------------------------------


def train_category(
    args: argparse.Namespace, config: dict, device: torch.device, cores: int, together: Ranks, bar: bool
) -> None:
    """Train, fit the density and write the detector of one category, unless it is there already.

    together: the ranks that train it; the first one writes, and says what is done.
    """
    category = config["category"]
    path, state_path = detector_path(args.model_dir, category), checkpoint_path(args.model_dir, category)
    finished = path.exists() and not state_path.exists() and not args.overwrite
    if together.from_first(lambda: finished):
        if together.first:
            say(f"{category}: {path} is finished; skipped")
        return
    size, storage = (config["height"], config["width"]), options.storage(args)
    images = load_train(args.data_dir, category, size, args.workers, storage)
    if cache.all_equal(images):
        raise InputError(f"{Path(args.data_dir) / category}: all training images are equal; nothing can be learned")
    if len(images) < together.count:
        raise InputError(f"{category}: {len(images)} training images for {together.count} ranks; start fewer of them")
    check_enough(config, len(images))
    if len(images) < config["batch_size"] and together.first:
        say(f"{category}: {len(images)} training images, so {len(images)} per update (--batch_size)")
    test = load_watched_test(args, config) if args.test_epochs > 0 and together.first else None
    digest = cache.digest(images)
    state = together.from_first(lambda: saved_state(args, state_path, digest, category))
    arithmetic = choose_arithmetic(args.threads, args.amp, args.compile, device, cores, state, state_path)
    torch.set_num_threads(arithmetic.threads)
    with torch.random.fork_rng(devices=[]):
        run = Run(config, images, digest, device, arithmetic, state, together)
        run.train(
            Path(args.logdir) / options.folder_name(args.model_dir) / category,
            state_path,
            args.save_minutes,
            None if test is None else lambda detector: test_auroc(detector, test),
            args.test_epochs,
            bar,
            "the same command without --overwrite" if args.overwrite else "the same command",
        )
    if not together.first:
        return
    detector = Detector(config, run.network).eval().fit(run.images)
    detector.made = {
        "command": options.command_line(),
        "train_images": len(images),
        "train_seconds": round(run.seconds, 1),
        "device": device_name(device),
        **asdict(arithmetic),
        "ranks": together.count,
        "torch": str(torch.__version__),
    }
    if detector.grid:
        say(f"{category}: {detector.density.choice}")
    save(detector, path)
    remove_file(state_path)
    say(f"{category}: wrote {path}")


def saved_state(args: argparse.Namespace, path: Path, digest: str, category: str) -> dict | None:
    """The state to continue from, if there is one and it was not asked to start anew."""
    if args.overwrite:
        remove_file(path)
    state = load_checkpoint(path) if path.exists() else None
    if state is not None and state["images"] != digest:
        raise InputError(
            f"{path}: was saved while training on other images than {args.data_dir}/{category} holds now; "
            "put them back, or start anew with --overwrite"
        )
    return state


def test_auroc(detector: Detector, test: TestSet) -> float:
    from eval import evaluate

    return evaluate(detector, test)[-1]["image_auroc"]


def load_watched_test(args: argparse.Namespace, config: dict) -> TestSet | None:
    """The test images to look at while training, if there are both normal and anomalous ones."""
    category = config["category"]
    folder = Path(args.data_dir) / category / "test"
    if not folder.is_dir() or not any(find_images(kind) for kind in folder.iterdir() if kind.is_dir()):
        say(f"{category}: no test images, so no AUROC while training")
        return None
    size, storage = (config["height"], config["width"]), options.storage(args)
    test = load_test(args.data_dir, category, size, args.workers, storage)
    if 0 < test.labels.sum() < len(test.labels):
        return test
    say(f"{category}: test images of one kind only, so no AUROC while training")
    return None


if __name__ == "__main__":
    options.run_script(main, get_parser())
