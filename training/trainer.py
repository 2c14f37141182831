"""The training of one network: the loop, what it tells, and the saved state that a killed run continues from.

Owns the files ``<model_dir>/<category>.checkpoint`` or, of a detector of several networks,
``<model_dir>/<category>.checkpoints/<number>.checkpoint``.
"""

import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from config import Config, SettingError, resume
from cutpaste import VARIANTS, ViewParams, make_views_and_sample, rows, visible
from detector import Detector, all_but, category_seed, initial_network, unseen_by
from image_ops import NOTHING_IGNORED
from runtime.cli import PRECISIONS, Interrupts, open_tensorboard, progress_bar, suitable_precision
from runtime.distributed import Ranks, data_parallel, sync_batch_norm
from runtime.files import InputError, load_tensors, remove_file, save_tensors, say

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter
    from tqdm import tqdm


MOMENTUM, WEIGHT_DECAY = 0.9, 3e-5  # A.1
TIMED_STEPS = 6  # that a budget of minutes is planned by, after two that warm up


# Numerics ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Precision:
    """What changes the rounding of a run but not the experiment: kept by a run that is resumed."""

    threads: int  # of the network on the CPU: the order of floating point sums depends on it
    amp: str  # of PRECISIONS
    compile: bool


def choose_precision(asked: dict, saved: dict, device: torch.device, cores: int) -> Precision:
    """asked: what was asked for, saved: what the saved state has, by the names of Numerics; what neither holds is
    chosen to suit the device. Raises SettingError where they contradict each other, or the device cannot."""
    fitting = {"threads": cores, "amp": suitable_precision(device)[0], "compile": False}
    chosen = Precision(**fitting | resume(asked, saved))
    if chosen.amp == "fp16" and device.type == "cpu":
        raise SettingError("amp", "fp16 needs a GPU (--cuda 1); a CPU computes in bf16 or float32")
    if chosen.compile and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "c++"))):
        raise SettingError("compile", "no C++ compiler is found; install g++, or do without")
    return chosen


# The loop ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """The views of a batch, and what a step needs beside them."""

    views: Tensor  # (V*B, 3, H, W) in [0, 1]
    labels: Tensor  # (V*B,) int64
    statistics: tuple[Tensor, Tensor] | None  # mean and deviation to normalize by; None: each view by its own
    learned: Tensor | None  # (V*B,) bool, the views that enter the loss; None: all


class Trainer:
    """The training of one network. Everything that decides how it goes on is in ``state``.

    images (N, 3, H, W) uint8, all of the category, on the device unless they are mapped from a file; digest: of them,
    by which a saved state knows them. state: to continue from, or None. ranks: more than one train together, each on
    its part of every batch. member: the network's number among those of the detector, which says which of the images it
    sees. sources: (H, W), what takes the place of pixels that do not count.
    """

    def __init__(
        self,
        config: Config,
        images: Tensor,
        digest: str,
        device: torch.device,
        precision: Precision,
        state: dict | None = None,
        ranks: Ranks | None = None,
        member: int = 0,
        fill_index: Tensor = NOTHING_IGNORED,
    ) -> None:
        self.config, self.digest, self.device, self.precision = config, digest, device, precision
        self.ranks = ranks or Ranks()
        self.name = config.category if config.folds == 1 else f"{config.category} {member + 1} of {config.folds}"
        self.images, self.seen = images, all_but(unseen_by(config, len(images), member), len(images))
        self.fill_index = fill_index.to(device)
        self.network = initial_network(config, state is None, member).to(device)
        if self.ranks.world_size > 1:
            self.network = sync_batch_norm(self.network, device.type == "cuda")
        self.generator = torch.Generator().manual_seed(category_seed(config.seed, config.category, member))
        self.optimizer = new_optimizer(config, self.network)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision.amp == "fp16")
        self.step, self.seconds = (0, 0.0) if state is None else (state["step"], state["seconds"])
        self.schedule = None
        self.set_frozen()
        if state is not None:
            for name, part in self.parts().items():
                part.load_state_dict(state[name])
            self.generator.set_state(state["generator"])
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
            "format": FORMAT,
            "version": VERSION,
            "config": self.config.to_dict(),
            "images": self.digest,
            **{name: part.state_dict() for name, part in self.parts().items()},
            "generator": self.generator.get_state(),
            "step": self.step,
            "seconds": self.seconds,
            "ranks": self.ranks.world_size,
            "numerics": asdict(self.precision),
        }

    def set_frozen(self) -> None:
        """Freeze the backbone or let it go on, set the learning rate's schedule, and make ``forward``, the network as a
        step runs it.

        The rate falls along one cosine over all steps or, with ``lr_unfrozen``, along one of its own before and after
        the backbone is let go on.
        """
        config, frozen = self.config, self.step < self.config.frozen_steps
        self.network.freeze_backbone(frozen, config.freeze_bn)
        if config.lr_unfrozen is None:
            self.schedule = self.schedule or cosine(self.optimizer, config.lr, config.epochs)
        elif frozen:
            self.schedule = cosine(self.optimizer, config.lr, min(config.frozen_steps, config.epochs))
        else:
            self.schedule = cosine(self.optimizer, config.lr_unfrozen, config.epochs - config.frozen_steps)
        self.forward = self.network
        if self.ranks.world_size > 1:
            self.forward = data_parallel(self.network, self.ranks, self.device.type == "cuda")
        if self.precision.compile:
            self.forward = torch.compile(self.forward)

    @property
    def batch_size(self) -> int:
        """Images per step, over all ranks: all different, so never more than there are."""
        return min(self.config.batch_size, len(self.seen))

    def sample_batch(self) -> tuple[Tensor, ViewParams]:
        """The next batch's images (B,), by number, and the parameters of their views: this rank's part of what every
        rank draws alike."""
        chosen = self.seen[torch.randperm(len(self.seen), generator=self.generator)[: self.batch_size]]
        params = self.config.sample_params(self.batch_size, self.generator)
        if self.ranks.world_size == 1:
            return chosen, params
        return chosen[self.ranks.rows], rows(params, self.ranks.rows)

    def load_batch(self, chosen: Tensor) -> Tensor:
        """Images by number, (B, 3, H, W) uint8 on the device, filled where they do not count."""
        batch = self.images.index_select(0, chosen.to(self.images.device, non_blocking=True))
        if batch.device != self.device:
            batch = batch.pin_memory().to(self.device, non_blocking=True)
        return batch

    def make_views(self, images: Tensor, params: ViewParams) -> Batch:
        """The views of images (B, 3, H, W) uint8. Crops are normalized by the whole images that they are from, as the
        windows of a test image will be."""
        views, labels, whole = make_views_and_sample(images, params)
        statistics = None
        if params.corner is not None:
            mean, std = self.network.statistics(whole)
            if mean.ndim == 4:  # of each image
                mean, std = (each.repeat(len(views) // len(images), 1, 1, 1) for each in (mean, std))
            statistics = mean, std
        learned = visible(views, params, whole) if self.config.invisible == "drop" else None
        return Batch(views, labels, statistics, learned)

    def train_step(self) -> Tensor:
        """One step. Returns loss, accuracy and share of views left out of its batch, each this rank's share of that of
        all ranks: (3,) on the device."""
        chosen, params = self.sample_batch()
        batch = self.make_views(self.load_batch(chosen), params)
        precision = PRECISIONS[self.precision.amp]
        with torch.autocast(self.device.type, precision, enabled=precision is not None):
            logits, _ = self.forward(batch.views, batch.statistics)
        values = batch_values(logits, batch, len(chosen) / self.batch_size, self.ranks)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(values[0] * self.ranks.world_size).backward()  # the ranks' gradients are averaged
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.step += 1
        if self.step == self.config.frozen_steps:
            self.set_frozen()
        return torch.stack(values).detach()

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
        steps, category, is_main = self.config.epochs, self.name, self.ranks.is_main
        state_path.parent.mkdir(parents=True, exist_ok=True)
        if self.step == steps:  # 0 of 0, or done before
            if is_main and not state_path.exists():
                save_tensors(self.state(), state_path)
            return
        if self.step and is_main:
            say(f"{category}: continuing at step {self.step} of {steps}")
        with ExitStack() as stack:
            purge = self.step + 1 if self.step else 0
            writer = stack.enter_context(open_tensorboard(logdir, purge)) if is_main else None
            interrupts = stack.enter_context(Interrupts())
            progress = stack.enter_context(progress_bar(category, self.step, steps, bar and is_main))
            if self.step == 0 and is_main:
                log_start(writer, self.config, self.images, self.seen)
            log = Log(self.config, self.step, self.batch_size, self.ranks, writer, progress)
            saved, began = time.monotonic(), time.monotonic() - self.seconds
            while self.step < steps:
                values = self.train_step()
                log.add(self.step, values, self.optimizer.param_groups[0]["lr"])
                last = self.step == steps
                if watch is not None and is_main and (self.step % watch_every == 0 or last):
                    check_finite(category, self.step, values[0])
                    looked = time.monotonic()
                    alone = replace(self.config, folds=1, holdout=0.0)
                    detector = Detector(alone, [self.network], self.fill_index)
                    auroc = watch(detector.fit(self.images, threshold=False, numbers=self.seen))
                    self.network.train()
                    log.add_test_auroc(self.step, auroc, time.monotonic() - looked)
                self.seconds = time.monotonic() - began
                stop = self.ranks.all_reduce_max(interrupts.signal)  # all at the same step
                # The last step too: fitting the density can be stopped, or its file not be written
                if is_main and (stop or last or time.monotonic() - saved >= 60 * save_minutes):
                    check_finite(category, self.step, values[0], *self.network.parameters())
                    save_tensors(self.state(), state_path)
                    saved = time.monotonic()
                if stop:
                    progress.close()
                    if is_main:
                        say(f"{category}: stopped at step {self.step}, state saved; {again} continues")
                    sys.exit(128 + stop)


def batch_values(logits: Tensor, batch: Batch, share: float, ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, accuracy and share of views left out, of logits (V*B, C): each this rank's part of that of all ranks, which
    have to be here together. share: this rank's of the batch. The loss is the mean over all views that are learned."""
    hits = (logits.detach().argmax(1) == batch.labels).float()
    if batch.learned is None:
        loss = functional.cross_entropy(logits, batch.labels)
        return loss * share, hits.mean() * share, torch.zeros_like(hits[0])
    weight = batch.learned.float()
    total = ranks.all_reduce_sum(weight.sum()).clamp(min=1)
    losses = functional.cross_entropy(logits, batch.labels, reduction="none")
    return (losses * weight).sum() / total, (hits * weight).sum() / total, (1 - weight.mean()) * share


def new_optimizer(config: Config, network: torch.nn.Module) -> torch.optim.Optimizer:
    parameters = list(network.parameters())
    if config.optim == "adam":
        return torch.optim.Adam(parameters, config.lr, weight_decay=WEIGHT_DECAY, fused=True)
    optimizer = torch.optim.SGD(parameters, config.lr, MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)
    for parameter in parameters:  # torch's fused step fails where only some have one, as after the frozen steps
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def cosine(optimizer: torch.optim.Optimizer, lr: float, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule of a rate that falls from ``lr`` to zero in that many steps."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = lr
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))


def steps_within(seconds: float, run: Trainer) -> int:
    """The number of steps that fit into that time, by some steps of a run that is given up then. At least 1."""
    began = time.monotonic()
    for number in range(2 + TIMED_STEPS):
        if number == 2:
            lap = time.monotonic()
        run.train_step().tolist()  # waits for the device
    now = time.monotonic()
    return max(1, int((seconds - (now - began)) / (now - lap) * TIMED_STEPS))


LOG_EVERY = 10  # steps between two entries in TensorBoard; the only times the device is waited for
PREVIEW_IMAGES = 6
LOOKED_AT, AT_ONCE, MANY_INVISIBLE = 128, 8, 0.1  # views of each kind, images together, the share that is told


class NotFiniteLossError(InputError):
    """The training has diverged."""


def check_finite(category: str, step: int, loss: float | Tensor, *weights: Tensor) -> None:
    """Raises NotFiniteLossError if the loss or a weight is not finite."""
    for name, value in (("loss", torch.as_tensor(loss)), *(("network", weight) for weight in weights)):
        if not torch.isfinite(value).all():
            what = f"the loss is {float(value)}" if name == "loss" else "a weight of the network is not finite"
            raise NotFiniteLossError(f"{category}: {what} at step {step}")


class Log:
    """Loss, accuracy, learning rate and speed of a run's steps, to TensorBoard and the progress bar every LOG_EVERY
    steps; of several ranks the first one's. step: those done before; writer None: not written."""

    def __init__(
        self,
        config: Config,
        step: int,
        batch_size: int,
        ranks: Ranks,
        writer: "SummaryWriter | None",
        progress: "tqdm",
    ) -> None:
        self.config, self.batch_size, self.ranks, self.writer, self.progress = (
            config,
            batch_size,
            ranks,
            writer,
            progress,
        )
        self.sums: Tensor | int = 0
        self.since, self.lap = step, time.monotonic()

    def add(self, step: int, values: Tensor, lr: float) -> None:
        """What a step returned: loss, accuracy, share of views left out, (3,)."""
        self.sums = self.sums + values  # on the device: not waited for here
        self.progress.update()
        if step % LOG_EVERY and step < self.config.epochs:
            return
        count, now = step - self.since, time.monotonic()
        loss, accuracy, left_out = (self.ranks.all_reduce_sum(self.sums) / count).tolist()
        check_finite(self.config.category, step, loss)
        if self.writer is not None:
            speed = count * self.batch_size / (now - self.lap)
            values = {"loss": loss, "acc": accuracy, "lr": lr, "images_per_second": speed, "left_out": left_out}
            for tag, value in values.items():
                self.writer.add_scalar(tag, value, step)
            self.progress.set_postfix(loss=f"{loss:.3f}", acc=f"{accuracy:.3f}", refresh=False)
        self.sums, self.since, self.lap = 0, step, now

    def add_test_auroc(self, step: int, auroc: float, seconds: float) -> None:
        """The test AUROC so far. The time it took does not count in the speed."""
        self.writer.add_scalar("eval_auc", auroc, step)
        say(f"{self.config.category}: step {step}, test AUROC {auroc:.4f}")
        self.lap += seconds


def log_start(
    writer: "SummaryWriter",
    config: Config,
    images: Tensor,
    seen: Tensor | None = None,
) -> None:
    """Write settings, a sheet of samples and a warning of views that show nothing, once at the start.

    seen: the numbers of the images that are meant; default: all.
    """
    from reporting import figures

    seen = torch.arange(len(images)) if seen is None else seen
    invisible = invisible_shares(config, images, seen)
    rows = ["|setting|value|", "|---|---|", *(f"|{name}|{value}|" for name, value in config.to_dict().items())]
    writer.add_text("settings", "\n".join(rows), 0)
    samples = images[seen[:PREVIEW_IMAGES]]
    figure = figures.preview(samples, [f"image {i}" for i in range(len(samples))], config, invisible)
    figure.set_dpi(80)
    writer.add_figure("views", figure, 0)
    many = ", ".join(f"{100 * share:.0f} % of {name}" for name, share in invisible.items() if share > MANY_INVISIBLE)
    if many:
        done = "are left out of the loss" if config.invisible == "drop" else "are learned as anomalous"
        way_out = "" if config.invisible == "drop" else " (--invisible drop leaves them out)"
        say(f"{config.category}: views that show no difference from the image: {many}; they {done}{way_out}")


def invisible_shares(config: Config, images: Tensor, seen: Tensor | None = None) -> dict[str, float]:
    """Return for each kind of view, by its name in VIEWS, the share that shows no difference from the image, see
    cutpaste.visible. images: (N, 3, H, W) uint8, of which LOOKED_AT are taken, evenly spaced among those whose numbers
    are ``seen`` (default: all)."""
    seen = torch.arange(len(images)) if seen is None else seen
    generator, found = torch.Generator().manual_seed(config.seed), []
    for part in seen[torch.arange(LOOKED_AT) * len(seen) // LOOKED_AT].split(AT_ONCE):
        params = config.sample_params(len(part), generator)
        views, _, whole = make_views_and_sample(images[part], params)
        found.append(visible(views, params, whole).view(-1, len(part)))
    shares = 1 - torch.cat(found, 1).float().mean(1)
    return dict(zip(VARIANTS[config.variant].views[1:], shares[1:].tolist()))


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
    """What ``Trainer.state`` gave, its config as a Config. Raises InputError if the file holds something else."""
    state = load_tensors(path, "checkpoint")
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
