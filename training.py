"""The training of one category: network, optimiser, schedule and generator, stepped, watched, saved and continued.

Owns the loop, what a saved state holds (``<model_dir>/<category>.checkpoint``), TensorBoard's files, and what is
left open to the machine: threads, precision, compilation. Knows no flag and no folder of images.
"""

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from cache import is_mapped, release
from cutpaste import VARIANTS, ViewParams, apply, augment, crop, cut_paste, make_params, to_float
from dataset import InputError
from detector import Detector, category_seed, initial_network, load_file, save_file
from options import say
from ranks import Ranks, synchronised, wrapped

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from plots import Figure

LOG_EVERY = 10  # steps between two entries in TensorBoard; the only times the device is waited for
CHECKPOINT_VERSION = 2
MOMENTUM, WEIGHT_DECAY = 0.9, 3e-5  # A.1
PREVIEW_IMAGES = 6
PRECISIONS = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # what autocast computes in


# What is left open to the machine ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arithmetic:
    """What rounds the numbers of a run but is no part of the experiment. A run keeps what it began with."""

    threads: int  # of the network on the CPU: the sums of floating point numbers depend on it
    amp: str  # of PRECISIONS
    compile: bool


def choose_arithmetic(
    threads: int | None,
    amp: str,
    compile: bool | None,
    device: torch.device,
    cores: int,
    state: dict | None,
    path: Path,
) -> Arithmetic:
    """What was asked for (None, "auto": nothing), else what the saved state has, else what suits the machine.

    Raises InputError where the first two contradict each other, or the device cannot.
    """
    given = {"threads": threads, "amp": None if amp == "auto" else amp, "compile": compile}
    saved = state["arithmetic"] if state is not None else {}
    fitting = {"threads": cores, "amp": suitable_precision(device), "compile": False}
    for name, value in given.items():
        if value is not None and value != saved.get(name, value):
            shown = {True: 1, False: 0}.get(saved[name], saved[name])
            raise InputError(
                f"{path}: made with --{name} {shown}, now {int(value) if name == 'compile' else value}; "
                "leave the flag out or give --overwrite"
            )
    chosen = {name: value if value is not None else saved.get(name, fitting[name]) for name, value in given.items()}
    if chosen["amp"] == "fp16" and device.type == "cpu":
        if given["amp"] is None:
            raise InputError(f"{path}: made with --amp fp16 on a GPU; continue with --cuda 1, or give --overwrite")
        raise InputError("--amp fp16: needs --cuda 1; on a CPU take --amp bf16 or leave it to --amp auto")
    if chosen["compile"] and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "c++"))):
        way_out = "leave the flag out" if saved.get("compile") is None else "start anew with --overwrite"
        raise InputError(f"--compile 1: no C++ compiler is found; install g++, or {way_out}")
    return Arithmetic(**chosen)


def suitable_precision(device: torch.device) -> str:
    """The fastest precision that the device has in hardware: bfloat16 where it does not merely emulate it."""
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        return "bf16" if major >= 8 else "fp16" if major == 7 else "off"
    # avx512_bf16 alone was no faster than float32; the tiles of AMX are
    return "bf16" if getattr(torch.cpu, "_is_amx_tile_supported", bool)() else "off"


# The saved state --------------------------------------------------------------------------------------------------


def checkpoint_path(model_dir: str | Path, category: str) -> Path:
    return Path(model_dir) / f"{category}.checkpoint"


def load_checkpoint(path: Path) -> dict:
    """What ``Run.state`` gave. Raises InputError if the file holds something else."""
    state = load_file(path, "checkpoint")
    if not isinstance(state, dict) or state.get("format") != "cutpaste-checkpoint":
        raise InputError(f"{path}: not a saved state of this program; remove it or give --overwrite")
    if state.get("version") != CHECKPOINT_VERSION:
        raise InputError(f"{path}: saved by another version of this program; finish it there or give --overwrite")
    return state


# The loop ---------------------------------------------------------------------------------------------------------


class Run:
    """The training of one category; everything that decides how it goes on can be saved.

    images (N, 3, H, W) uint8, digest: theirs, by which a saved state knows them. state: to continue from, or None.
    ranks: more than one train together, each on its part of every batch.
    """

    def __init__(
        self,
        config: dict,
        images: Tensor,
        digest: str,
        device: torch.device,
        arithmetic: Arithmetic,
        state: dict | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.config, self.digest, self.device, self.arithmetic = config, digest, device, arithmetic
        self.ranks = ranks or Ranks()
        self.images = images if is_mapped(images) else images.to(device)  # uint8, on the device for the whole run
        self.network = initial_network(config | ({"pretrained": False} if state else {})).to(device)
        if self.ranks.count > 1:
            self.network = synchronised(self.network, device.type == "cuda")
        self.generator = torch.Generator().manual_seed(category_seed(config["seed"], config["category"]))
        self.optimizer = new_optimizer(config, self.network)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, config["epochs"])
        self.scaler = torch.amp.GradScaler(device.type, enabled=arithmetic.amp == "fp16")
        self.step = 0
        self.seconds = 0.0
        if state is not None:
            for name, part in self.parts().items():
                part.load_state_dict(state[name])
            self.generator.set_state(state["generator"])
            self.step, self.seconds = state["step"], state["seconds"]
        self.freeze(self.step < config["freeze_resnet"])
        self.network.train()

    def parts(self) -> dict:
        return {
            "network": self.network,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "scaler": self.scaler,
        }

    def state(self) -> dict:
        return {
            "format": "cutpaste-checkpoint",
            "version": CHECKPOINT_VERSION,
            "config": self.config,
            "images": self.digest,
            **{name: part.state_dict() for name, part in self.parts().items()},
            "generator": self.generator.get_state(),
            "step": self.step,
            "seconds": self.seconds,
            "arithmetic": asdict(self.arithmetic),
        }

    def freeze(self, frozen: bool) -> None:
        """Freeze the backbone or let it go on, and make ``forward``, the network as the step runs it."""
        self.network.freeze_backbone(frozen)
        self.forward = self.network
        if self.ranks.count > 1:
            self.forward = wrapped(self.network, self.ranks, self.device.type == "cuda")
        if self.arithmetic.compile:
            self.forward = torch.compile(self.forward)

    @property
    def batch_size(self) -> int:
        """Images per step, over all ranks: all different, so never more than there are."""
        return min(self.config["batch_size"], len(self.images))

    def draw(self) -> tuple[Tensor, ViewParams]:
        """The next batch's images (B,), by number, and the parameters of their views; the same on every rank."""
        chosen = torch.randperm(len(self.images), generator=self.generator)[: self.batch_size]
        size = self.images.shape[2:]
        params = make_params(self.config["variant"], self.batch_size, *size, self.generator, **amounts(self.config))
        if self.ranks.count == 1:
            return chosen, params
        return chosen[self.ranks.part], params.rows(self.ranks.part)

    def batch(self, chosen: Tensor) -> Tensor:
        """Images by number, (B, 3, H, W) uint8 on the device."""
        if not is_mapped(self.images):
            return self.images[chosen.to(self.device, non_blocking=True)]
        batch = self.images[chosen]
        release(self.images)  # pages that were read count as memory of this process
        return batch.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else batch

    def make_views(self, images: Tensor, params: ViewParams) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Views and labels, and the statistics to normalise them by if not their own: a crop is normalised as the whole
        image that it is from, as a window of a test image will be."""
        if params.corner is None:
            return *apply(images, params), None
        base = augment(images, params)
        views, labels = cut_paste(crop(base, params), params)
        mean, std = self.network.statistics(base)
        if mean.ndim == 4:  # of each image
            mean, std = (each.repeat(len(views) // len(base), 1, 1, 1) for each in (mean, std))
        return views, labels, (mean, std)

    def update(self) -> tuple[Tensor, Tensor]:
        """One parameter update. Returns loss and hits of its batch, each as a share of the batch of all ranks: 0-d
        tensors on the device."""
        if self.network.frozen and self.step >= self.config["freeze_resnet"]:
            self.freeze(False)
        chosen, params = self.draw()
        views, labels, statistics = self.make_views(self.batch(chosen), params)
        precision = PRECISIONS[self.arithmetic.amp]
        with torch.autocast(self.device.type, precision, enabled=precision is not None):
            logits, _ = self.forward(views, statistics)
        share = len(chosen) / self.batch_size
        loss = functional.cross_entropy(logits, labels) * share
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss * self.ranks.count).backward()  # the ranks' gradients are averaged
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.step += 1
        return loss.detach(), (logits.detach().argmax(1) == labels).float().mean() * share

    def train(
        self,
        logdir: Path,
        state_path: Path,
        save_minutes: float,
        watch: Callable[[Detector], float] | None = None,
        watch_every: int = 0,
        bar: bool = True,
        again: str = "the same command",
    ) -> None:
        """Run the steps that are left.

        watch: the test AUROC of a detector, to be looked at every ``watch_every`` steps; it decides nothing.
        again: what continues, for the message. Leaves by SystemExit (130, 143) on SIGINT or SIGTERM, the state saved.
        """
        from tqdm import tqdm

        steps, category, first = self.config["epochs"], self.config["category"], self.ranks.first
        if self.step and first:
            say(f"{category}: continuing at step {self.step} of {steps}")
        saved = began = time.monotonic()
        seconds_before, sums, since = self.seconds, 0, self.step
        interval = 0.1 if sys.stderr.isatty() else 30
        with ExitStack() as stack:
            writer = stack.enter_context(open_tensorboard(logdir, self.step + 1 if self.step else 0)) if first else None
            interrupts = stack.enter_context(Interrupts())
            progress = tqdm(
                total=steps,
                initial=self.step,
                desc=category,
                unit="step",
                file=sys.stderr,
                mininterval=interval,
                maxinterval=max(10, interval),
                disable=not (bar and first),
            )
            stack.enter_context(progress)
            if self.step == 0 and first:
                self.describe(writer)
            lap = time.monotonic()
            while self.step < steps:
                loss, hit = self.update()
                sums = sums + torch.stack([loss, hit])  # on the device: not waited for here
                progress.update()
                last = self.step == steps
                if self.step % LOG_EVERY == 0 or last:
                    count, now = self.step - since, time.monotonic()
                    means = (self.ranks.sum(sums) / count).tolist()
                    check_finite(category, self.step, means[0])
                    if first:
                        self.log(writer, progress, *means, count * self.batch_size / (now - lap))
                    sums, since, lap = 0, self.step, now
                if watch is not None and first and (self.step % watch_every == 0 or last):
                    check_finite(category, self.step, loss)
                    lap -= time.monotonic()  # a look does not count as training
                    self.look(writer, watch)
                    lap += time.monotonic()
                self.seconds = seconds_before + time.monotonic() - began
                stop = self.ranks.largest(interrupts.signal)  # all at the same step
                # The last step too: fitting the density can be stopped, or its file not be written
                if first and (stop or last or time.monotonic() - saved >= 60 * save_minutes):
                    check_finite(category, self.step, loss, *self.network.parameters())
                    save_file(self.state(), state_path)
                    saved = time.monotonic()
                if stop:
                    progress.close()
                    if first:
                        say(f"{category}: stopped at step {self.step}, state saved; {again} continues")
                    sys.exit(128 + stop)

    def log(self, writer: "SummaryWriter", progress, loss: float, accuracy: float, speed: float) -> None:
        """Write means since the last log."""
        values = {"loss": loss, "acc": accuracy, "lr": self.optimizer.param_groups[0]["lr"], "images_per_second": speed}
        for tag, value in values.items():
            writer.add_scalar(tag, value, self.step)
        progress.set_postfix(loss=f"{loss:.3f}", acc=f"{accuracy:.3f}", refresh=False)

    def look(self, writer: "SummaryWriter", watch: Callable[[Detector], float]) -> None:
        """The test AUROC so far, for TensorBoard."""
        auroc = watch(Detector(self.config, self.network).fit(self.images, threshold=False))
        writer.add_scalar("eval_auc", auroc, self.step)
        say(f"{self.config['category']}: step {self.step}, test AUROC {auroc:.4f}")

    def describe(self, writer: "SummaryWriter") -> None:
        """Settings and a sheet of samples, once at the start."""
        rows = ["|setting|value|", "|---|---|", *(f"|{name}|{value}|" for name, value in self.config.items())]
        writer.add_text("settings", "\n".join(rows), 0)
        samples = self.images[:PREVIEW_IMAGES]
        figure = preview(samples, [f"image {i}" for i in range(len(samples))], self.config)
        figure.set_dpi(80)
        writer.add_figure("views", figure, 0)


def new_optimizer(config: dict, network: torch.nn.Module) -> torch.optim.Optimizer:
    parameters = list(network.parameters())
    if config["optim"] == "adam":
        return torch.optim.Adam(parameters, config["lr"], weight_decay=WEIGHT_DECAY, fused=True)
    optimizer = torch.optim.SGD(parameters, config["lr"], MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)
    for parameter in parameters:  # torch's fused step fails where only some have one, as after the frozen steps
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def amounts(config: dict) -> dict:
    return {name: config.get(name) for name in ("translate", "jitter", "patch_jitter", "patch_size")}


def preview(images: Tensor, names: list[str], config: dict) -> "Figure":
    """A figure of images (R, 3, H, W) uint8, each beside its views."""
    import plots

    views = VARIANTS[config["variant"]].views
    generator = torch.Generator().manual_seed(category_seed(config["seed"], config["category"]))
    params = make_params(config["variant"], len(images), *images.shape[2:], generator, **amounts(config))
    augmented, _ = apply(images, params)
    shown = to_float(images)
    if params.corner is not None:
        shown = functional.interpolate(shown, augmented.shape[2:], mode="area")
    cells = torch.stack([shown, *augmented.split(len(images))], 1)  # (R, 1 + V, 3, H, W)
    titles = {
        "image": "image view (0)" if params.corner is None else "crop (0)",
        "patch": "CutPaste",
        "scar": "CutPaste-Scar",
        "patch or scar": "CutPaste or Scar",
    }
    columns = ["original", *(titles[v] if i == 0 else f"{titles[v]} ({i})" for i, v in enumerate(views))]
    return plots.views_sheet(cells.permute(0, 1, 3, 4, 2).cpu().numpy(), columns, names)


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
