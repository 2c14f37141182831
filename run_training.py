"""Train one detector per category on its normal images alone.

    python run_training.py --model_dir models --head_layer 2
    python run_training.py --model_dir patch_models --recipe fast --no-pretrained

Writes <model_dir>/<category>.pt and the normal images that predict.py --explain shows, <category>.normals; with several
seeds below <model_dir>/seed<S>. The same command again continues where it stopped; finished categories are skipped.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch

from config import (
    RECIPES,
    Config,
    SettingError,
    add_config_flags,
    add_data_flags,
    config_of,
    flag_value,
    storage,
    with_flag,
)
from dataset import TestSet, choose_categories, load_fill_index, load_images, load_test, train_paths
from density import NotFiniteError
from detector import Detector
from model import BACKBONES, WeightsError
from runtime.cli import (
    PRECISIONS,
    choose_device,
    folder_name,
    int_at_least,
    new_parser,
    number,
    run_script,
    zero_or_one,
)
from runtime.distributed import Ranks, from_environment
from runtime.files import InputError, check_replaceable, say, write_file
from runtime.image_files import find_images
from training.jobs import (
    Job,
    RunOptions,
    check_settings,
    check_writable,
    train_networks,
    write_detector,
)
from training.trainer import PREVIEW_IMAGES, NotFiniteLossError, invisible_shares


def get_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__, "Then: python eval.py --model_dir models")
    add_data_flags(parser)
    add_config_flags(parser)
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
    normals = "keep up to 1,000 training images beside the detector, for predict.py --explain (default: 1)"
    add("--explain", type=zero_or_one, default=True, metavar="0|1", help=normals)
    add("--overwrite", action="store_true", help="start anew, replacing detectors and saved states")
    add("--list_backbones", action="store_true", help="print the networks with their stages, and stop")
    add("--preview", metavar="FILE", help="write a sheet of augmented samples to this PNG file and stop")
    return parser


def main(args: argparse.Namespace) -> None:
    if args.list_backbones:
        print_backbones()
        return
    try:
        settings = config_of(args, "any")
    except SettingError as error:
        raise argparse.ArgumentTypeError(with_flag(error)) from error
    if args.test_epochs is None:
        args.test_epochs = 256 if settings.patches is None else -1
    here = from_environment()
    device = choose_device(args.cuda, here.local_rank)
    categories = choose_categories(args.data_dir, args.type)
    jobs = list(make_jobs(args, settings, categories))
    # A missing folder or a bad mask now, not after hours of another category
    paths = {category: train_paths(args.data_dir, category) for category in categories}
    masks = [load_fill_index(settings.ignore, category, settings.size, paths[category][0]) for category in categories]
    if settings.ignore and not any([fill_index.numel() for fill_index in masks]):
        raise InputError(f"--ignore: {settings.ignore} has no <category>.png for any of {', '.join(categories)}")
    if args.preview:
        if here.is_main:
            write_preview(args, [job.config for job in jobs[: len(categories)]])
        return
    check_ranks(args, settings, here)
    for job in jobs:
        check_writable(job.folder, here)
        if not args.overwrite:
            check_settings(job)
    torch.backends.cudnn.deterministic = True
    if RECIPES[settings.recipe] and here.is_main:
        own = {name: settings.to_dict()[name] for name in RECIPES[settings.recipe]}
        own.pop("epochs" if settings.minutes else "", None)
        say(f"recipe {settings.recipe}: " + ", ".join(f"{name} {flag_value(value)}" for name, value in own.items()))
    make_detectors(args, jobs, device, here)
    if here.is_main:
        follow = f"python eval.py --data_dir {args.data_dir} --model_dir {args.model_dir}"
        say(f"detectors are in {args.model_dir}; next: {follow}")


def print_backbones() -> None:
    """Print each network's name, its stage of --features level, widths and strides of its stages, and its weights."""
    for name, spec in BACKBONES.items():
        stages = ", ".join(f"{level}: {w}/{stride}" for level, w, stride in zip(spec.levels, spec.widths, spec.strides))
        print(f"{name}  level {spec.level}; stages (width/stride) {stages}; {spec.weights}")


def make_jobs(args: argparse.Namespace, settings: Config, categories: list[str]) -> Iterator[Job]:
    """Each seed's detectors; those of several seeds have folders of their own."""
    for seed in args.seed or [settings.seed]:
        own = f"seed{seed}" if len(args.seed or []) > 1 else ""
        for category in categories:
            logs = Path(args.logdir, folder_name(args.model_dir), own, category)
            yield Job(replace(settings, category=category, seed=seed), Path(args.model_dir, own), logs)


def make_detectors(args: argparse.Namespace, jobs: list[Job], device: torch.device, here: Ranks) -> None:
    """Train what is not there yet. Ranks share the networks, or with --ddp the training of each."""
    from tqdm import tqdm

    work = [(job, number) for job in jobs for number in range(job.config.folds)]
    own = work if args.ddp else here.shard(work)
    own = [(job, [number for _, number in some]) for job, some in groupby(own, key=lambda item: item[0])]
    running = RunOptions(
        data_dir=args.data_dir,
        workers=args.workers,
        storage=storage(args),
        device=device,
        ranks=here if args.ddp else Ranks(),
        precision={"threads": args.threads, "amp": None if args.amp == "auto" else args.amp, "compile": args.compile},
        cores=torch.get_num_threads(),  # before a resumed category sets its own number
        overwrite=args.overwrite,
        explain=args.explain,
        test_epochs=args.test_epochs,
        save_minutes=args.save_minutes,
        bar=here.is_main,
        watcher=lambda config: watcher(args, config),
    )
    shared = jobs[0].config.folds > 1 and here.world_size > 1 and not args.ddp  # a detector's networks, by the ranks
    quiet = len(own) < 2 or not here.is_main
    with running.ranks.joined(args.cuda), tqdm(own, "categories", file=sys.stderr, disable=quiet) as bar:
        for job, numbers in bar:
            with hints():
                images = train_networks(job, numbers, running)
                if not shared:
                    write_detector(job, running, images)
    if shared:
        with here.joined(False):
            here.all_reduce_max(0)  # wait for the networks of the others
            for job in here.shard(jobs):
                with hints():
                    write_detector(job, running)
            here.all_reduce_max(0)


@contextmanager
def hints() -> Iterator[None]:
    """Add to an error of the modules below which flag helps."""
    try:
        yield
    except WeightsError as error:
        hint = "give a file with --weights FILE or train from scratch with --no-pretrained"
        raise InputError(f"{error}; {hint}") from error
    except SettingError as error:
        raise InputError(with_flag(error)) from error
    except InputError as error:
        if isinstance(error, NotFiniteLossError) or isinstance(error.__cause__, NotFiniteError):
            hint = "start anew with a lower --lr (and --overwrite, if a state was saved)"
            raise InputError(f"{error}; {hint}") from error
        raise


# What is on disk --------------------------------------------------------------------------------------------------


def check_ranks(args: argparse.Namespace, settings: Config, here: Ranks) -> None:
    """Raises InputError for what several processes cannot do."""
    if args.overwrite and here.restarts:
        raise InputError("a rank died, and --overwrite would start anew: give the same command without --overwrite")
    if args.overwrite and here.machines > 1:  # torchrun does not tell a machine that another one's rank was restarted
        raise InputError("--overwrite: not on several machines, where a restart would start anew; empty --model_dir")
    if settings.minutes and settings.folds > 1 and here.world_size > 1 and not args.ddp:
        raise InputError("--minutes: not with --folds shared by ranks, which would count other steps; give --epochs")
    if args.ddp and settings.batch_size < here.world_size:
        needed = f"at least one image for each of {here.world_size} ranks is needed"
        raise InputError(f"--batch_size {settings.batch_size}: {needed}")


def write_preview(args: argparse.Namespace, configs: list[Config]) -> None:
    from reporting import figures

    if Path(args.preview).suffix.lower() != ".png":
        raise InputError(f"--preview {args.preview}: the name of a .png file is needed")
    check_replaceable(args.preview, "take another --preview")
    rows = max(1, PREVIEW_IMAGES // len(configs))
    images, names = [], []
    for config in configs:
        paths = train_paths(args.data_dir, config.category)[:rows]
        fill_index = load_fill_index(config.ignore, config.category, config.size, paths[0])
        images.append(load_images(paths, config.size, args.workers, fill_index=fill_index))
        names += [f"{config.category}\n{path.name}" for path in paths]
    shown = torch.cat(images)
    sheet = figures.preview(shown, names, configs[0], invisible_shares(configs[0], shown))
    write_file(figures.png(sheet), args.preview)
    say(f"wrote {args.preview}; nothing was trained")


# Looking at the test images while training ------------------------------------------------------------------------


def watcher(args: argparse.Namespace, config: Config) -> Callable[[Detector], float] | None:
    """What gives the test AUROC of a detector, if there are test images of both kinds."""
    test = load_watched_test(args, config)
    return None if test is None else lambda detector: test_auroc(detector, test)


def test_auroc(detector: Detector, test: TestSet) -> float:
    from reporting.metrics import evaluate

    return evaluate(detector, test).metrics["image_auroc"]


def load_watched_test(args: argparse.Namespace, config: Config) -> TestSet | None:
    """The test images to look at while training, if there are both normal and anomalous ones."""
    category = config.category
    folder = Path(args.data_dir) / category / "test"
    if not folder.is_dir() or not any(find_images(kind) for kind in folder.iterdir() if kind.is_dir()):
        say(f"{category}: no test images, so no AUROC while training")
        return None
    test = load_test(args.data_dir, category, config.size, args.workers, storage(args), config.ignore)
    if 0 < test.labels.sum() < len(test.labels):
        return test
    say(f"{category}: test images of one kind only, so no AUROC while training")
    return None


if __name__ == "__main__":
    run_script(main, get_parser())
