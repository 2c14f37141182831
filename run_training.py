"""Train one detector per category on its normal images alone.

    python run_training.py --model_dir models --head_layer 2
    python run_training.py --model_dir patch_models --recipe fast --no-pretrained

Writes <model_dir>/<category>.pt and the normal images that predict.py --explain shows, <category>.normals; with several
seeds below <model_dir>/seed<S>. The same command again continues where it stopped; finished categories are skipped.
After images were added to train/good, --refit takes them in within seconds, with the same networks.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from config import (
    BACKBONES,
    RECIPES,
    REFITTED,
    Config,
    SettingError,
    add_config_flags,
    add_data_flags,
    config_of,
    flag_value,
    given_settings,
    storage,
    with_flag,
)
from runtime.cli import (
    PRECISIONS,
    check_usage,
    choose_device,
    folder_name,
    int_at_least,
    new_parser,
    number,
    progress_bar,
    run_script,
    zero_or_one,
)
from runtime.files import InputError, check_replaceable, say, write_file


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
    replay = "record a training step and let the GPU repeat it as one launch (default: 0)"
    add("--replay", type=zero_or_one, metavar="0|1", help=replay)
    ddp = "under torchrun: all ranks train each category together (default: 0, each its own)"
    add("--ddp", type=zero_or_one, default=False, metavar="0|1", help=ddp)
    add("--logdir", default="logdirs", metavar="DIR", help="folder of TensorBoard's files (default: logdirs)")
    minutes = "between two saved states (default: 3)"
    add("--save_minutes", type=number(0, 1e6), default=3.0, metavar="X", help=minutes)
    normals = "keep up to 1,000 training images beside the detector, for predict.py --explain (default: 1)"
    add("--explain", type=zero_or_one, default=True, metavar="0|1", help=normals)
    add("--overwrite", action="store_true", help="start anew, replacing detectors and saved states")
    refit = (
        "fit the densities and the threshold of finished detectors anew to train/good as it is now; train nothing, and "
        "change only what is given of density and maps, and --false_alarm_rate"
    )
    add("--refit", action="store_true", help=refit)
    add("--list_backbones", action="store_true", help="print the networks with their stages, and stop")
    add("--preview", metavar="FILE", help="write a sheet of augmented samples to this PNG file and stop")
    return parser


if __name__ == "__main__":
    check_usage(get_parser())  # at once: what is imported below takes seconds

import torch

from cutpaste import invisible_shares
from dataset import choose_categories, find_white, load_train, train_paths
from density import NotFiniteError
from model import WeightsError
from runtime.distributed import Ranks, from_environment
from training.jobs import (
    Job,
    check_masks,
    check_settings,
    refit_detector,
    reserved,
    train_networks,
    write_detector,
)
from training.trainer import PREVIEW_IMAGES, NotFiniteLossError, RunOptions


def main(args: argparse.Namespace) -> None:
    if args.list_backbones:
        print_backbones()
        return
    if args.refit and args.overwrite:
        raise argparse.ArgumentTypeError("--refit keeps the networks, --overwrite trains them anew; choose one")
    given = given_settings(args)
    for name in REFITTED if args.refit else ():
        setattr(args, name, None)  # they are changes of the detector's settings, no settings of their own
    try:
        config = config_of(args, "any")
    except SettingError as error:
        raise argparse.ArgumentTypeError(with_flag(error)) from error
    ranks = from_environment()
    options = run_options(args, config, ranks)
    categories = choose_categories(args.data_dir, args.type)
    jobs = make_jobs(args, config, categories)
    check_masks(jobs[: len(categories)])
    if args.preview:
        if ranks.is_main:
            write_preview(args.preview, jobs[: len(categories)], options)
        return
    if args.refit:
        with reserved((job.folder for job in jobs), ranks):
            for job in ranks.shard(jobs):
                with hints():
                    refit_detector(job, options, given)
        return
    check_ranks(args, config, ranks)
    with reserved((job.folder for job in jobs), ranks):
        for job in jobs:
            if not args.overwrite:
                check_settings(job)
        tell_recipe(config, ranks)
        torch.backends.cudnn.deterministic = True
        make_detectors(jobs, options, ranks)
    if ranks.is_main:
        evaluation = f"python eval.py --data_dir {args.data_dir} --model_dir {args.model_dir}"
        say(f"detectors are in {args.model_dir}; next: {evaluation}")


def tell_recipe(config: Config, ranks: Ranks) -> None:
    """Say which settings the recipe has set."""
    if RECIPES[config.recipe] and ranks.is_main:
        settings = {name: flag_value(config.to_dict()[name]) for name in RECIPES[config.recipe]}
        settings.pop("epochs" if config.minutes else "", None)
        more = "" if config.epochs or config.minutes else " (the network as it is; --recipe finetune trains it)"
        say(f"recipe {config.recipe}: " + ", ".join(f"{name} {value}" for name, value in settings.items()) + more)


def print_backbones() -> None:
    """Print each network's name, its stage of --features level, widths and strides of its stages, and its weights."""
    for name, spec in BACKBONES.items():
        stages = ", ".join(f"{level}: {w}/{stride}" for level, w, stride in zip(spec.levels, spec.widths, spec.strides))
        print(f"{name}  level {spec.level}; stages (width/stride) {stages}; {spec.weights}")


def run_options(args: argparse.Namespace, config: Config, ranks: Ranks) -> RunOptions:
    """Return how the trainings run."""
    test_epochs = args.test_epochs
    if test_epochs is None:
        test_epochs = 256 if config.patches is None else -1
    asked = {"threads": args.threads, "amp": None if args.amp == "auto" else args.amp}
    asked |= {"compile": args.compile, "replay": args.replay}
    return RunOptions(
        device=choose_device(args.cuda, ranks.local_rank),
        data_dir=args.data_dir,
        workers=args.workers,
        storage=storage(args),
        ranks=ranks if args.ddp else Ranks(),
        asked_precision={name: value for name, value in asked.items() if value is not None},
        cores=torch.get_num_threads(),  # before a resumed category sets its own number
        overwrite=args.overwrite,
        explain=args.explain,
        test_epochs=test_epochs,
        save_minutes=args.save_minutes,
        bar=ranks.is_main,
    )


def make_jobs(args: argparse.Namespace, config: Config, categories: list[str]) -> list[Job]:
    """Return the detectors to make, seed by seed. Those of several seeds have folders of their own.

    Raises InputError for a category without images: now, not after hours of another one.
    """
    paths = {category: train_paths(args.data_dir, category) for category in categories}
    jobs = []
    for seed in args.seed or [config.seed]:
        folder = f"seed{seed}" if len(args.seed or []) > 1 else ""
        for category in categories:
            logs = Path(args.logdir, folder_name(args.model_dir), folder, category)
            settings = replace(config, category=category, seed=seed)
            jobs.append(Job(settings, Path(args.model_dir, folder), logs, paths[category]))
    return jobs


def make_detectors(jobs: list[Job], options: RunOptions, ranks: Ranks) -> None:
    """Train and write the detectors that are not there yet.

    ranks: all. With --ddp they train each network together, and are those of ``options``; else they share the networks.
    """
    together, several = options.ranks.world_size > 1, jobs[0].config.folds > 1
    networks = [(job, number) for job in jobs for number in range(job.config.folds)]
    networks = networks if together else ranks.shard(networks)
    work = [(job, [number for _, number in group]) for job, group in groupby(networks, key=lambda network: network[0])]
    divided = several and ranks.world_size > 1 and not together  # the networks of a detector, among ranks
    silent = len(work) < 2 or not ranks.is_main
    cuda = options.device.type == "cuda"
    with options.ranks.joined(cuda), progress_bar("categories", 0, len(work), not silent, "category") as bar:
        for job, numbers in work:
            with hints():
                train_set = train_networks(job, numbers, options)
                if not divided:
                    write_detector(job, options, train_set)
            bar.update()
    if divided:
        with ranks.joined(False):
            ranks.all_reduce_max(0)  # wait for the networks of the others
            for job in ranks.shard(jobs):
                with hints():
                    write_detector(job, options)
            ranks.all_reduce_max(0)


@contextmanager
def hints() -> Iterator[None]:
    """Add to an error of the modules below which flag helps."""
    try:
        yield
    except WeightsError as error:
        hint = "give a --weights FILE or another --backbone, or train from scratch with --no-pretrained"
        raise InputError(f"{error}; {hint}") from error
    except SettingError as error:
        raise InputError(with_flag(error)) from error
    except InputError as error:
        if isinstance(error, NotFiniteLossError) or isinstance(error.__cause__, NotFiniteError):
            hint = "start anew with a lower --lr (and --overwrite, if a state was saved)"
            raise InputError(f"{error}; {hint}") from error
        raise


def check_ranks(args: argparse.Namespace, config: Config, ranks: Ranks) -> None:
    """Raise InputError for what several processes cannot do."""
    if args.overwrite and ranks.restarts:
        raise InputError("a rank died, and --overwrite would start anew: give the same command without --overwrite")
    if args.overwrite and ranks.machines > 1:  # torchrun does not tell a machine that another one's rank was restarted
        raise InputError("--overwrite: not on several machines, where a restart would start anew; empty --model_dir")
    if config.minutes and config.folds > 1 and ranks.world_size > 1 and not args.ddp:
        raise InputError("--minutes: not with --folds shared by ranks, which would count other steps; give --epochs")
    if args.ddp and config.batch_size < ranks.world_size:
        needed = f"at least one image for each of {ranks.world_size} ranks is needed"
        raise InputError(f"--batch_size {config.batch_size}: {needed}")


def write_preview(path: str, jobs: list[Job], options: RunOptions) -> None:
    """Write a sheet of augmented samples of some images of each category."""
    from reporting import figures

    if Path(path).suffix.lower() != ".png":
        raise InputError(f"--preview {path}: the name of a .png file is needed")
    check_replaceable(path, "take another --preview")
    rows = max(1, PREVIEW_IMAGES // len(jobs))
    images, names, config = [], [], jobs[0].config
    for job in jobs:
        category, paths = job.config.category, job.paths[:rows]
        white = find_white(job.paths, options.workers)
        where = options.data_dir, category, config.size, options.workers
        train_set = load_train(*where, ignored=config.ignore, white=white, paths=paths)
        images.append(train_set.images)
        names += [f"{category}\n{path.name}" for path in paths]
    shown = torch.cat(images)
    sheet = figures.preview(shown, names, config, invisible_shares(shown, config))
    write_file(figures.png(sheet), path)
    say(f"wrote {path}; nothing was trained")


if __name__ == "__main__":
    run_script(main, get_parser())
