"""Train one detector per category on its normal images alone.

Owns the training loop, its saved state (``<model_dir>/<category>.checkpoint``) and TensorBoard's files. Writes
``<model_dir>/<category>.pt``; the same command again continues where the last one stopped.
"""

import argparse
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

import cache
import options
from cutpaste import VARIANTS, apply, make_params, to_float
from dataset import InputError, TestSet, choose_categories, find_images, load_images, load_test, load_train, train_paths
from detector import (
    Detector,
    category_seed,
    detector_path,
    initial_network,
    load,
    load_file,
    remove_file,
    save,
    save_file,
    write_file,
)
from model import BACKBONES
from options import say

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

LOG_EVERY = 10  # steps between two entries in TensorBoard; the only times the device is waited for
LEARNING_RATES = {"sgd": 0.03, "adam": 0.001}  # sgd: the paper's
CHECKPOINT_VERSION = 1
MOMENTUM, WEIGHT_DECAY = 0.9, 3e-5  # A.1
PREVIEW_IMAGES = 6
DEFAULTS = {"variant": "3way", "head_layer": 1, "size": (256, 256), "normalize": "image"}


def get_parser() -> argparse.ArgumentParser:
    parser = options.new_parser(
        "Train one CutPaste detector per category. The same command again continues; finished categories are skipped.",
        "Then: python eval.py --model_dir models",
    )
    options.add_data_flags(parser)
    options.add_network_flags(parser, DEFAULTS)
    options.add_density_flags(parser, density="torch", l2=True)
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
        "updates between two looks at the test AUROC; -1: none (default: 256)",
        type=whole(-1),
        default=256,
    )
    add(
        "threads",
        "threads of the network on the CPU; another number rounds differently (default: one per core, or as saved)",
        type=whole(1),
        metavar="N",
    )
    add("logdir", "folder of TensorBoard's files (default: logdirs)", default="logdirs", metavar="DIR")
    add("save_minutes", "minutes between two saved states (default: 3)", type=number(0, 1e6), default=3.0)
    add("overwrite", "start anew, replacing detectors and saved states", action="store_true")
    add("preview", "write a sheet of augmented samples to this PNG file and stop", metavar="FILE")
    return parser


def main(args: argparse.Namespace) -> None:
    if args.weights is not None and not args.pretrained:
        raise argparse.ArgumentTypeError("--weights and --no-pretrained contradict each other")
    device = options.choose_device(args.cuda)
    categories = choose_categories(args.data_dir, args.type)
    configs = [make_config(args, category) for category in categories]
    for category in categories:
        train_paths(args.data_dir, category)  # a missing folder now, not after hours of another category
    if args.preview:
        write_preview(args, configs)
        return
    check_writable(Path(args.model_dir))
    if not args.overwrite:
        for config in configs:
            check_settings(args.model_dir, config)
    torch.backends.cudnn.deterministic = True

    from tqdm import tqdm

    with tqdm(configs, desc="categories", unit="category", file=sys.stderr, disable=len(configs) == 1) as bar:
        cores = torch.get_num_threads()  # before a resumed category sets its own number
        for config in bar:
            train_category(args, config, device, cores)
    follow = f"python eval.py --data_dir {args.data_dir} --model_dir {args.model_dir}"
    say(f"detectors are in {args.model_dir}; next: {follow}")


# Settings and what is on disk -------------------------------------------------------------------------------------


def make_config(args: argparse.Namespace, category: str) -> dict:
    """Everything that decides what the detector of a category will be, as plain values; stored in its file."""
    height, width = args.size
    freeze = args.freeze_resnet if args.freeze_resnet is not None else (20 if args.pretrained else 0)
    copied = (
        "backbone variant head_layer normalize density l2 false_alarm_rate seed pretrained weights epochs batch_size "
        "optim jitter patch_jitter translate"
    )
    return {
        "category": category,
        "height": height,
        "width": width,
        **{name: getattr(args, name) for name in copied.split()},
        "lr": LEARNING_RATES[args.optim] if args.lr is None else args.lr,
        "freeze_resnet": freeze,
    }


def checkpoint_path(model_dir: str | Path, category: str) -> Path:
    return Path(model_dir) / f"{category}.checkpoint"


def check_writable(folder: Path) -> None:
    """Make the folder and a file in it. Raises OSError, naming the folder, if that is not possible."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / ".writable"
    probe.touch()
    probe.unlink()


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


def load_checkpoint(path: Path) -> dict:
    state = load_file(path, "checkpoint")
    if not isinstance(state, dict) or state.get("format") != "cutpaste-checkpoint":
        raise InputError(f"{path}: not a saved state of this program; remove it or give --overwrite")
    if state.get("version") != CHECKPOINT_VERSION:
        raise InputError(f"{path}: saved by another version of this program; finish it there or give --overwrite")
    return state


def fingerprint(images: Tensor) -> str:
    """A digest of the decoded training images: a saved state continues on the very same ones only."""
    return cache.digest(images)


# The preview sheet ------------------------------------------------------------------------------------------------


def preview(images: Tensor, names: list[str], config: dict):
    """A figure of images (R, 3, H, W) uint8, each beside its views."""
    import plots

    views = VARIANTS[config["variant"]].views
    generator = torch.Generator().manual_seed(category_seed(config["seed"], config["category"]))
    augmented, _ = apply(images, make_params(config["variant"], *size_of(images), generator, **amounts(config)))
    cells = torch.stack([to_float(images), *augmented.split(len(images))], 1)  # (R, 1 + V, 3, H, W)
    titles = {
        "image": "image view (0)",
        "patch": "CutPaste",
        "scar": "CutPaste-Scar",
        "patch or scar": "CutPaste or Scar",
    }
    columns = ["original", *(titles[v] if i == 0 else f"{titles[v]} ({i})" for i, v in enumerate(views))]
    return plots.views_sheet(cells.permute(0, 1, 3, 4, 2).cpu().numpy(), columns, names)


def size_of(images: Tensor) -> tuple[int, int, int]:
    """(B, H, W) of images (B, 3, H, W)."""
    return len(images), images.shape[2], images.shape[3]


def amounts(config: dict) -> dict:
    return {name: config[name] for name in ("translate", "jitter", "patch_jitter")}


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


def train_category(args: argparse.Namespace, config: dict, device: torch.device, cores: int) -> None:
    """Train, fit the density and write the detector of one category, unless it is there already."""
    category = config["category"]
    path, state_path = detector_path(args.model_dir, category), checkpoint_path(args.model_dir, category)
    if path.exists() and not state_path.exists() and not args.overwrite:
        say(f"{category}: {path} is finished; skipped")
        return
    size, storage = (config["height"], config["width"]), options.storage(args)
    images = load_train(args.data_dir, category, size, args.workers, storage)
    if cache.all_equal(images):
        raise InputError(f"{Path(args.data_dir) / category}: all training images are equal; nothing can be learned")
    if len(images) < config["batch_size"]:
        say(f"{category}: {len(images)} training images, so {len(images)} per update (--batch_size)")
    test = load_watched_test(args, config) if args.test_epochs > 0 else None
    if args.overwrite:
        remove_file(state_path)
    state = load_checkpoint(state_path) if state_path.exists() else None
    digest = fingerprint(images)
    if state is not None and state["images"] != digest:
        raise InputError(
            f"{state_path}: was saved while training on other images than {args.data_dir}/{category} holds now; "
            "put them back, or start anew with --overwrite"
        )
    torch.set_num_threads(choose_threads(args.threads, cores, state, state_path))
    with torch.random.fork_rng(devices=[]):
        run = Run(config, images, digest, device, state)
        run.train(args, state_path, test)
    detector = Detector(config, run.network).eval().fit(run.images)
    detector.made = {
        "command": options.command_line(),
        "train_images": len(images),
        "train_seconds": round(run.seconds, 1),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }
    save(detector, path)
    remove_file(state_path)
    say(f"{category}: wrote {path}")


def choose_threads(given: int | None, cores: int, state: dict | None, path: Path) -> int:
    """Threads of the network on the CPU. A run continues with the number it began with, on any machine, for the sums
    of floating point numbers depend on it."""
    saved = state["threads"] if state is not None else None
    if given is not None and saved is not None and given != saved:
        raise InputError(f"{path}: made with --threads {saved}, now {given}; leave the flag out or give --overwrite")
    return given or saved or cores


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


class Run:
    """The training of one category: network, optimiser, schedule, generator and step; all of it can be saved."""

    def __init__(self, config: dict, images: Tensor, digest: str, device: torch.device, state: dict | None) -> None:
        self.config, self.digest, self.device = config, digest, device
        self.images = images.to(device)  # uint8, on the device for the whole run
        self.network = initial_network(config | ({"pretrained": False} if state else {})).to(device)
        self.generator = torch.Generator().manual_seed(category_seed(config["seed"], config["category"]))
        parameters = self.network.parameters()
        if config["optim"] == "sgd":
            self.optimizer = torch.optim.SGD(parameters, config["lr"], MOMENTUM, weight_decay=WEIGHT_DECAY)
        else:
            self.optimizer = torch.optim.Adam(parameters, config["lr"], weight_decay=WEIGHT_DECAY)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, config["epochs"])
        self.step = 0
        self.seconds = 0.0
        if state is not None:
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.generator.set_state(state["generator"])
            self.step, self.seconds = state["step"], state["seconds"]

    def state(self) -> dict:
        return {
            "format": "cutpaste-checkpoint",
            "version": CHECKPOINT_VERSION,
            "config": self.config,
            "images": self.digest,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
            "seconds": self.seconds,
            "threads": torch.get_num_threads(),
        }

    def train(self, args: argparse.Namespace, state_path: Path, test: TestSet | None) -> None:
        """Run the steps that are left. Leaves by SystemExit (130, 143) on SIGINT or SIGTERM, the state saved."""
        from tqdm import tqdm

        config, category = self.config, self.config["category"]
        folder = Path(args.logdir) / options.folder_name(args.model_dir) / category
        if self.step:
            say(f"{category}: continuing at step {self.step} of {config['epochs']}")
        self.network.freeze_backbone(self.step < config["freeze_resnet"])
        self.network.train()
        saved = began = time.monotonic()
        seconds_before, loss_sum, hits, since = self.seconds, 0, 0, self.step
        interval = 0.1 if sys.stderr.isatty() else 30
        with (
            open_tensorboard(folder, self.step + 1 if self.step else 0) as writer,
            Interrupts() as interrupts,
            tqdm(
                total=config["epochs"],
                initial=self.step,
                desc=category,
                unit="step",
                file=sys.stderr,
                mininterval=interval,
                maxinterval=max(10, interval),
            ) as bar,
        ):
            if self.step == 0:
                self.describe(writer)
            lap = time.monotonic()
            while self.step < config["epochs"]:
                loss, hit = self.update()
                loss_sum, hits = loss_sum + loss, hits + hit  # tensors on the device: not waited for here
                bar.update()
                last = self.step == config["epochs"]
                if self.step % LOG_EVERY == 0 or last:
                    count, now = self.step - since, time.monotonic()
                    speed = count * self.batch_size / (now - lap)
                    self.log(writer, bar, loss_sum / count, hits / count, speed)
                    loss_sum, hits, since, lap = 0, 0, self.step, now
                if test is not None and (self.step % args.test_epochs == 0 or last):
                    check_finite(category, self.step, loss)
                    lap -= time.monotonic()  # a look does not count as training
                    self.look(writer, test)
                    lap += time.monotonic()
                self.seconds = seconds_before + time.monotonic() - began
                # The last step too: fitting the density can be stopped, or its file not be written
                if interrupts.signal or last or time.monotonic() - saved >= 60 * args.save_minutes:
                    check_finite(category, self.step, loss, *self.network.parameters())
                    save_file(self.state(), state_path)
                    saved = time.monotonic()
                if interrupts.signal:
                    bar.close()
                    how = "the same command without --overwrite" if args.overwrite else "the same command"
                    say(f"{category}: stopped at step {self.step}, state saved; {how} continues")
                    sys.exit(128 + interrupts.signal)

    @property
    def batch_size(self) -> int:
        """Images per step: all different, so never more than there are."""
        return min(self.config["batch_size"], len(self.images))

    def update(self) -> tuple[Tensor, Tensor]:
        """One parameter update. Returns loss and accuracy of its batch, 0-d tensors on the device."""
        if self.network.frozen and self.step >= self.config["freeze_resnet"]:
            self.network.freeze_backbone(False)
        chosen = torch.randperm(len(self.images), generator=self.generator)[: self.batch_size]
        batch = self.images[chosen.to(self.device, non_blocking=True)]
        params = make_params(self.config["variant"], *size_of(batch), self.generator, **amounts(self.config))
        views, labels = apply(batch, params)
        logits, _ = self.network(views)
        loss = functional.cross_entropy(logits, labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        return loss.detach(), (logits.detach().argmax(1) == labels).float().mean()

    def log(self, writer, bar, loss: Tensor, accuracy: Tensor, speed: float) -> None:
        """Write means since the last log; stop if the loss is not finite."""
        loss, accuracy = float(loss), float(accuracy)
        check_finite(self.config["category"], self.step, loss)
        values = {"loss": loss, "acc": accuracy, "lr": self.optimizer.param_groups[0]["lr"], "images_per_second": speed}
        for tag, value in values.items():
            writer.add_scalar(tag, value, self.step)
        bar.set_postfix(loss=f"{loss:.3f}", acc=f"{accuracy:.3f}", refresh=False)

    def look(self, writer, test: TestSet) -> None:
        """The test AUROC so far, for TensorBoard: to be looked at, it decides nothing."""
        from eval import evaluate

        detector = Detector(self.config, self.network).fit(self.images, threshold=False)
        _, metrics = evaluate(detector, test)
        writer.add_scalar("eval_auc", metrics["image_auroc"], self.step)
        say(f"{self.config['category']}: step {self.step}, test AUROC {metrics['image_auroc']:.4f}")

    def describe(self, writer) -> None:
        """Settings and a sheet of samples, once at the start."""
        rows = ["|setting|value|", "|---|---|", *(f"|{name}|{value}|" for name, value in self.config.items())]
        writer.add_text("settings", "\n".join(rows), 0)
        samples = self.images[:PREVIEW_IMAGES]
        figure = preview(samples, [f"image {i}" for i in range(len(samples))], self.config)
        figure.set_dpi(80)
        writer.add_figure("views", figure, 0)


class Interrupts:
    """SIGINT and SIGTERM only leave a note in ``signal``, so that a step ends whole; a second SIGINT stops at once."""

    def __enter__(self) -> "Interrupts":
        self.signal = 0
        self.previous = {s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number: int, _frame) -> None:
        if self.signal == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def check_finite(category: str, step: int, loss: float | Tensor, *weights: Tensor) -> None:
    """Raises InputError if the loss or a weight is not finite."""
    for name, value in (("loss", torch.as_tensor(loss)), *(("network", weight) for weight in weights)):
        if not torch.isfinite(value).all():
            what = f"the loss is {float(value)}" if name == "loss" else "a weight of the network is not finite"
            raise InputError(
                f"{category}: {what} at step {step}; start anew with a lower --lr "
                "(and --overwrite, if a state was saved)"
            )


@contextmanager
def open_tensorboard(folder: Path, purge_step: int) -> Iterator["SummaryWriter"]:
    """TensorBoard's files; entries from ``purge_step`` on, left by a killed run, are hidden.

    It writes in a thread: an error there (a full disk) would print a traceback of its own, and reaches this thread
    without the name of the folder.
    """
    from torch.utils.tensorboard import SummaryWriter

    report = threading.excepthook
    threading.excepthook = lambda error: None if issubclass(error.exc_type, OSError) else report(error)
    try:
        with SummaryWriter(str(folder), purge_step=purge_step) as writer:
            yield writer
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or str(folder)) from error
    finally:
        threading.excepthook = report


def device_name(device: torch.device) -> str:
    """What did the work, for the record."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    import platform

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return name


if __name__ == "__main__":
    options.run_script(main, get_parser())
