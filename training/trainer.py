"""The training of one network: the loop, its log, and the saved state that a killed run continues from.

Owns the files ``<model_dir>/<category>.checkpoint`` or, for a detector of several networks,
``<model_dir>/<category>.checkpoints/<number>.checkpoint``.
"""

import functools
import math
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from config import Config, SettingError, resume
from cutpaste import (
    VARIANTS,
    Drawn,
    ViewParams,
    config_params,
    invisible_shares,
    make_packed_views,
    make_views_and_sample,
    pack_params,
    packable,
    rows,
    visible,
)
from dataset import TestSet, TrainSet
from detector import Detector, all_but, category_seed, initial_network, unseen_by
from reporting.metrics import evaluate
from runtime.cache import IN_MEMORY, Storage
from runtime.cli import PRECISIONS, Interrupts, autocast_type, open_tensorboard, progress_bar, suitable_precision
from runtime.distributed import Ranks, data_parallel, sync_batch_norm
from runtime.files import InputError, damage_named, load_tensors, save_tensors, say, say_once, shown
from runtime.gpu import SETTLING, Recorded, can_compile, to_device
from runtime.tensors import TensorRule, check_tensor, check_tensors, rules_of

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter
    from tqdm import tqdm


FORMAT = "cutpaste-checkpoint"
VERSION = 8  # raise it when the layout of the saved state changes: states of other versions are refused
SUFFIX = ".checkpoint"
ANEW = "start anew with --overwrite"
MOMENTUM, WEIGHT_DECAY = 0.9, 3e-5  # A.1
TIMED_STEPS = 6  # that a budget of minutes is planned by, after some that warm up
DRAWN_AHEAD = 20  # batches whose random numbers are drawn at once where steps are replayed
LOG_EVERY = 10  # steps between two entries in TensorBoard; the only times the device is waited for
PREVIEW_IMAGES = 6  # rows of a sheet of samples
MANY_INVISIBLE = 0.1  # share of pasted views that show nothing; more are told


# The loop ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """The views of a batch, and what a step needs beside them."""

    views: Tensor  # (V*B, 3, H, W) in [0, 1]
    labels: Tensor  # (V*B,) int64
    statistics: tuple[Tensor, Tensor] | None  # mean and deviation to normalize by; None: each view by its own
    learned: Tensor | None  # (V*B,) bool, the views that enter the loss; None: all


class Trainer:
    """The training of one network. ``state`` holds everything that decides how it goes on.

    train_set: all training images of the category. state: a saved state to continue from, or None. member: the
    network's number in its detector, which decides which of the images it sees.
    """

    def __init__(
        self,
        config: Config,
        train_set: TrainSet,
        options: "RunOptions",
        precision: "Precision",
        state: dict | None = None,
        member: int = 0,
    ) -> None:
        self.config, self.train_set, self.options, self.precision = config, train_set, options, precision
        self.device, self.ranks = options.device, options.ranks
        self.name = config.category if config.folds == 1 else f"{config.category} {member + 1} of {config.folds}"
        # On the device for the whole run, unless they are too many
        mapped = options.storage.maps(train_set.images.shape)
        self.images = train_set.images if mapped else train_set.images.to(self.device)
        self.seen = all_but(unseen_by(config, len(train_set), member), len(train_set))  # numbers of images
        self.network = initial_network(config, state is None, member).to(self.device)
        if self.ranks.world_size > 1:
            self.network = sync_batch_norm(self.network, self.device.type == "cuda")
        self.generator = torch.Generator().manual_seed(category_seed(config.seed, config.category, member))
        self.optimizer = new_optimizer(config, self.network)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision.amp == "fp16")
        self.replays = self._can_replay()
        self.recorded: Recorded | None = None  # the step, where it is replayed
        self.ahead: deque[tuple[Tensor, Tensor, Tensor]] = deque()  # batches that were drawn, see ``sample_packed``
        self.generator_state: Tensor | None = None  # after the last of them that was used; None: the generator's own
        self.step, self.seconds = (0, 0.0) if state is None else (state["step"], state["seconds"])
        self.schedule = None
        self.set_frozen()
        if state is not None:
            self.load_state(state)
        self.network.train()

    def train(self, logs: Path, state_path: Path, test_set: TestSet | None = None) -> None:
        """Run the steps that are left; log them, and save the state from time to time and after the last one.

        logs: folder of TensorBoard's files. test_set: images whose AUROC is told every ``options.test_epochs`` steps;
        it decides nothing. Ends in SystemExit (130, 143) on SIGINT or SIGTERM, the state saved.
        """
        steps, options, is_main = self.config.epochs, self.options, self.ranks.is_main
        if self.step == steps:  # none was asked for, or all were done before
            if is_main and not state_path.exists():
                save_tensors(self.state(), state_path)
            return
        if self.step and is_main:
            say(f"{self.name}: continuing at step {self.step} of {steps}")
        with Interrupts() as interrupts, open_log(self, logs, options.bar) as log:
            if self.step == 0:
                log.add_samples()
            stop, saved, began = 0, time.monotonic(), time.monotonic() - self.seconds
            while self.step < steps and not stop:
                values = self.train_step()
                log.add(values)
                last = self.step == steps
                if test_set is not None and (last or self.step % options.test_epochs == 0):
                    check_finite(self.name, self.step, values[0])
                    paused = time.monotonic()
                    log.add_test_auroc(self.test_auroc(test_set), paused)
                self.seconds = time.monotonic() - began
                stop = self.ranks.all_reduce_max(interrupts.signal)  # all ranks at the same step
                # The last step too: fitting the density can be stopped, or its file not be written
                if is_main and (stop or last or time.monotonic() - saved >= 60 * options.save_minutes):
                    check_finite(self.name, self.step, values[0], *self.network.parameters())
                    save_tensors(self.state(), state_path)
                    saved = time.monotonic()
        self.recorded = None  # and its memory, gradients included
        self.optimizer.zero_grad(set_to_none=True)
        if stop:
            if is_main:
                command = "the same command" + (" without --overwrite" if options.overwrite else "")
                say(f"{self.name}: stopped at step {self.step}, state saved; {command} continues")
            sys.exit(128 + stop)

    def test_auroc(self, test_set: TestSet) -> float:
        """Return the image AUROC, in [0, 1], of the network as it is now, with densities of the images that it sees."""
        alone = replace(self.config, folds=1, holdout=0.0)
        detector = Detector(alone, [self.network], self.train_set.fill_index.to(self.device))
        detector.fit(self.images, threshold=False, numbers=self.seen)
        return evaluate(detector, test_set).metrics["image_auroc"]

    def load_state(self, state: dict) -> None:
        """Set what has a state to a saved one. Raises InputError, with the reason, for one that does not fit or whose
        weights are not finite."""
        with damage_named(self.name, "checkpoint", ANEW):
            check_tensors(state["network"], rules_of(self.network.state_dict()), {})
            slots = state["optimizer"]["state"]
            names = {name for values in slots.values() for name in values}
            parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            for number, name in product(slots, names):
                shape = () if name == "step" else tuple(parameters[number].shape)
                rule = TensorRule(shape, (torch.float32,))
                check_tensor(f"the optimizer's {name}", slots[number].get(name), rule, {})
            for name, part in self.parts().items():
                part.load_state_dict(state[name])
            self.generator.set_state(state["generator"])

    def parts(self) -> dict:
        """Return what has a state of its own, by its name in the saved state."""
        return {
            "network": self.network,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "scaler": self.scaler,
        }

    def state(self) -> dict:
        """Return what is saved, see ``load_checkpoint``."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "config": self.config.to_dict(),
            "images": self.train_set.digest,
            **{name: part.state_dict() for name, part in self.parts().items()},
            "generator": self.generator.get_state() if self.generator_state is None else self.generator_state,
            "step": self.step,
            "seconds": self.seconds,
            "ranks": self.ranks.world_size,
            "precision": asdict(self.precision),
        }

    def set_frozen(self) -> None:
        """Freeze or unfreeze the backbone, set the learning rate's schedule, and make ``forward``, the network as a
        step runs it. What was recorded of a step is forgotten.

        The rate falls along one cosine over all steps or, with ``lr_unfrozen``, along one before the backbone is
        unfrozen and another one after.
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
            self.forward = torch.compile(self.forward, dynamic=False)
        self.recorded = Recorded(self.device) if self.replays else None

    def _can_replay(self) -> bool:
        """Return whether steps are recorded and replayed. Says once why not, where that was asked for."""
        if self.device.type != "cuda" or not self.precision.replay:
            return False
        if self.ranks.world_size > 1:
            reason = "several processes train together"
        elif self.precision.amp == "fp16":
            reason = "with fp16 the host looks at the gradients"
        elif not packable(self.config.variant):
            reason = f"{self.config.variant} has views that are made one by one"
        elif not can_compile(self.device):
            reason = "torch.compile finds no Triton or no C compiler"
        else:
            return True
        if self.ranks.is_main:
            say_once(f"training steps are issued one operation at a time, which a GPU waits for: {reason}")
        return False

    @property
    def batch_size(self) -> int:
        """Return the number of images per step, over all ranks: all different, so at most as many as there are."""
        return min(self.config.batch_size, len(self.seen))

    def sample_batch(self) -> tuple[Tensor, ViewParams]:
        """Draw the next batch: the numbers of its images (B,) and the parameters of their views.

        Every rank draws the same and returns its part.
        """
        chosen = self.seen[torch.randperm(len(self.seen), generator=self.generator)[: self.batch_size]]
        params = config_params(self.config, self.batch_size, self.generator)
        if self.ranks.world_size == 1:
            return chosen, params
        return chosen[self.ranks.rows], rows(params, self.ranks.rows)

    def load_batch(self, chosen: Tensor) -> Tensor:
        """Return images by their numbers, (B, 3, H, W) uint8, on the device."""
        batch = self.images.index_select(0, chosen.to(self.images.device, non_blocking=True))
        return batch if batch.device == self.device else to_device(batch, self.device)

    def make_views(self, images: Tensor, params: ViewParams) -> Batch:
        """Make the views of images (B, 3, H, W) uint8. Crops are normalized by the statistics of their whole images, as
        the windows of a test image will be."""
        views, labels, whole = make_views_and_sample(images, params)
        learned = visible(views, params, whole) if self.config.invisible == "drop" else None
        return self._batch(views, labels, whole if params.corner is not None else None, learned)

    def _batch(self, views: Tensor, labels: Tensor, whole: Tensor | None, learned: Tensor | None) -> Batch:
        """Return views with what a step needs beside them. whole: pixels of the whole images that crops are from."""
        statistics = None
        if whole is not None:
            mean, std = self.network.statistics(whole)
            if mean.ndim == 4:  # of each image
                mean, std = (value.repeat(len(views) // len(whole), 1, 1, 1) for value in (mean, std))
            statistics = mean, std
        return Batch(views, labels, statistics, learned)

    def train_step(self) -> Tensor:
        """Run one step. Returns loss, accuracy and share of views left out, (3,) on the device: this rank's part of
        each, so that their sum over all ranks is that of the batch."""
        if self.recorded is None:
            chosen, params = self.sample_batch()
            batch = self.make_views(self.load_batch(chosen), params)
            values = self.update(batch, len(chosen) / self.batch_size)
        else:
            values = self.recorded(self.packed_step, *self.sample_packed())
        self.schedule.step()
        self.step += 1
        if self.step == self.config.frozen_steps:
            self.set_frozen()
        return values

    def update(self, batch: Batch, share: float) -> Tensor:
        """Run forward, loss, backward and optimizer. share: this rank's, of the batch. Returns what ``train_step``
        does."""
        precision = autocast_type(self.precision.amp)
        with torch.autocast(self.device.type, precision, enabled=precision is not None):
            logits, _ = self.forward(batch.views, batch.statistics)
        values = batch_values(logits, batch, share, self.ranks)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(values[0] * self.ranks.world_size).backward()  # the ranks' gradients are averaged
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return torch.stack(values).detach()

    # The step that is replayed ------------------------------------------------------------------------------------

    def sample_packed(self) -> list[Tensor]:
        """Draw the next batch as ``packed_step`` takes it, on the CPU: the same as ``sample_batch`` draws.

        DRAWN_AHEAD batches are drawn at once: the hundreds of small operations for one take longer than a GPU's step.
        Each batch's numbers are drawn in the same order as if it were drawn alone.
        """
        if not self.ahead:
            count, steps = self.batch_size, max(1, min(DRAWN_AHEAD, self.config.epochs - self.step))
            needed = Drawn(torch.zeros(1, 1).expand(1, 2**30))
            config_params(self.config, count, needed)  # to see how many numbers it takes
            chosen, numbers, states = [], [], []
            for _ in range(steps):
                chosen.append(self.seen[torch.randperm(len(self.seen), generator=self.generator)[:count]])
                numbers.append(torch.rand(needed.taken, generator=self.generator))
                states.append(self.generator.get_state())
            packed = pack_params(config_params(self.config, steps * count, Drawn(torch.stack(numbers))))
            self.ahead.extend(zip(chosen, packed.split(count), states))
        chosen, packed, self.generator_state = self.ahead.popleft()
        rate = torch.tensor(self.optimizer.param_groups[0]["lr"])
        numbers = torch.cat([rate.expand(len(chosen), 1), chosen[:, None].float(), packed], 1)
        return [numbers] if self.images.device == self.device else [numbers, self.images.index_select(0, chosen)]

    def packed_step(self, numbers: Tensor, images: Tensor | None = None) -> Tensor:
        """Run a step of which no value reaches the host. Returns what ``train_step`` does.

        numbers: (B, 2 + K) on the device. In each row: the learning rate, which would be frozen into a recording as a
        float; the image's number; those of ``pack_params``. images: the batch (B, 3, H, W) uint8, if not all images lie
        on the device.
        """
        rate, chosen, packed = numbers.split([1, 1, numbers.shape[1] - 2], 1)
        images = self.images.index_select(0, chosen[:, 0].long()) if images is None else images
        config, side = self.config, self.config.patches and self.config.patches.patch_size
        how = config.variant, side, config.invisible == "drop"
        make = make_packed_views if self.device.type == "cpu" else compiled_views(images.shape, *how)
        views, whole, learned = make(images, packed.contiguous(), *how)
        labels = torch.arange(VARIANTS[config.variant].num_classes, device=self.device).repeat_interleave(len(images))
        with rate_of(self.optimizer, rate[0, 0]):
            return self.update(self._batch(views, labels, whole, learned), 1.0)


@functools.lru_cache(maxsize=1)
def compiled_views(*_shapes: object) -> Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]:
    """Compile ``make_packed_views`` for batches of these shapes and settings."""
    torch.compiler.reset()  # torch gives up on a function that it has compiled for eight others
    return torch.compile(make_packed_views, fullgraph=True, dynamic=False)


@contextmanager
def rate_of(optimizer: torch.optim.Optimizer, rate: Tensor) -> Iterator[None]:
    """Let the optimizer, within it, take its rate from the device and be recorded. Its schedule and every saved state
    keep the float."""
    (group,) = optimizer.param_groups
    before = {name: group[name] for name in ("lr", "capturable") if name in group}
    group["lr"] = rate
    if rate.is_cuda and "capturable" in group:
        group["capturable"] = torch.cuda.is_current_stream_capturing()  # elsewhere torch warns of it
    try:
        yield
    finally:
        group.update(before)


def batch_values(logits: Tensor, batch: Batch, share: float, ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, accuracy and share of views left out, from logits (V*B, C): of each, this rank's part.

    All ranks have to call it together. share: this rank's, of the batch. The loss is the mean over all views that are
    learned.
    """
    hits = (logits.detach().argmax(1) == batch.labels).float()
    if batch.learned is None:
        loss = functional.cross_entropy(logits, batch.labels)
        return loss * share, hits.mean() * share, torch.zeros_like(hits[0])
    weight = batch.learned.float()
    total = ranks.all_reduce_sum(weight.sum()).clamp(min=1)
    losses = functional.cross_entropy(logits, batch.labels, reduction="none")
    return (losses * weight).sum() / total, (hits * weight).sum() / total, (1 - weight.mean()) * share


def new_optimizer(config: Config, network: torch.nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of a network, with the momentum and the weight decay of the paper (A.1)."""
    parameters = list(network.parameters())
    if config.optim == "adam":
        return torch.optim.Adam(parameters, config.lr, weight_decay=WEIGHT_DECAY, fused=True)
    optimizer = torch.optim.SGD(parameters, config.lr, MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)
    for parameter in parameters:  # torch's fused step fails where only some have one, as after the frozen steps
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def cosine(optimizer: torch.optim.Optimizer, lr: float, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Return the schedule of a rate that falls from ``lr`` to zero in that many steps."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = lr
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))


def steps_within(seconds: float, run: Trainer) -> int:
    """Return how many steps fit into that time, at least 1. It times some steps of a run that is given up then."""
    began, warm_up, timed = time.monotonic(), 2, TIMED_STEPS
    if run.replays:  # steps that are short, after those that compile and record
        warm_up, timed = SETTLING + 2, 10 * TIMED_STEPS
    for number in range(warm_up + timed):
        if number == warm_up:
            lap = time.monotonic()
        values = run.train_step()
        if number in (warm_up - 1, warm_up + timed - 1):
            values.tolist()  # waits for the device
    now = time.monotonic()
    return max(1, int((seconds - (now - began)) / (now - lap) * timed))


# The log ----------------------------------------------------------------------------------------------------------


class NotFiniteLossError(InputError):
    """The training has diverged."""


def check_finite(name: str, step: int, loss: float | Tensor, *weights: Tensor) -> None:
    """Raise NotFiniteLossError if the loss or a weight is not finite. name: the network's."""
    if not torch.isfinite(torch.as_tensor(loss)).all():
        raise NotFiniteLossError(f"{name}: the loss is {float(loss)} at step {step}")
    if not all(torch.isfinite(weight).all() for weight in weights):
        raise NotFiniteLossError(f"{name}: a weight of the network is not finite at step {step}")


@contextmanager
def open_log(trainer: Trainer, folder: Path, bar: bool) -> Iterator["Log"]:
    """Open the log of a run: TensorBoard's files in ``folder`` and, if ``bar``, a progress bar; both on rank 0 alone.

    Entries of steps that the saved state does not know, left by a killed run, are hidden.
    """
    is_main, purge_step = trainer.ranks.is_main, trainer.step + 1 if trainer.step else 0
    with (
        open_tensorboard(folder, purge_step) if is_main else nullcontext() as writer,
        progress_bar(trainer.name, trainer.step, trainer.config.epochs, bar and is_main) as progress,
    ):
        yield Log(trainer, writer, progress)


class Log:
    """Tell of a run. Every LOG_EVERY steps: loss, accuracy, learning rate, speed, share of views left out.

    writer: None on all ranks but the first, whose steps count too.
    """

    def __init__(self, trainer: Trainer, writer: "SummaryWriter | None", progress: "tqdm") -> None:
        self.trainer, self.writer, self.progress = trainer, writer, progress
        self.sums: Tensor | int = 0  # of the steps since the last entry
        self.last_step, self.last_time = trainer.step, time.monotonic()  # of the last entry

    def add_samples(self) -> None:
        """Write the settings and a sheet of samples, and warn of views that show nothing."""
        if self.writer is None:
            return
        from reporting import figures

        config, images, seen = self.trainer.config, self.trainer.images, self.trainer.seen
        shares = invisible_shares(images, config, seen)
        table = [
            "|setting|value|",
            "|---|---|",
            *(shown(f"|{name}|{value}|") for name, value in config.to_dict().items()),
        ]
        self.writer.add_text("settings", "\n".join(table), 0)
        samples = images[seen[:PREVIEW_IMAGES]]
        figure = figures.preview(samples, [f"image {number}" for number in range(len(samples))], config, shares)
        figure.set_dpi(80)
        self.writer.add_figure("views", figure, 0)
        many = ", ".join(f"{100 * share:.0f} % of {view}" for view, share in shares.items() if share > MANY_INVISIBLE)
        if many:
            consequence = "they are learned as anomalous (--invisible drop leaves them out)"
            if config.invisible == "drop":
                consequence = "they are left out of the loss"
            say(f"{config.category}: views that show no difference from the image: {many}; {consequence}")

    def add(self, values: Tensor) -> None:
        """Add what a step returned: loss, accuracy, share of views left out, (3,)."""
        self.sums = self.sums + values  # on the device: not waited for here
        self.progress.update()
        trainer, step = self.trainer, self.trainer.step
        if step % LOG_EVERY and step < trainer.config.epochs:
            return
        steps, now = step - self.last_step, time.monotonic()
        loss, accuracy, left_out = (trainer.ranks.all_reduce_sum(self.sums) / steps).tolist()
        check_finite(trainer.name, step, loss)
        if self.writer is not None:
            speed, rate = steps * trainer.batch_size / (now - self.last_time), trainer.optimizer.param_groups[0]["lr"]
            entries = {"loss": loss, "acc": accuracy, "lr": rate, "images_per_second": speed, "left_out": left_out}
            for tag, value in entries.items():
                self.writer.add_scalar(tag, value, step)
            self.progress.set_postfix(loss=f"{loss:.3f}", acc=f"{accuracy:.3f}", refresh=False)
        self.sums, self.last_step, self.last_time = 0, step, now

    def add_test_auroc(self, auroc: float, paused: float) -> None:
        """Add the test AUROC of the network as it is now. paused: the time.monotonic() since which training has waited
        for it, which does not count in the speed."""
        self.writer.add_scalar("eval_auc", auroc, self.trainer.step)
        say(f"{self.trainer.name}: step {self.trainer.step}, test AUROC {auroc:.4f}")
        self.last_time += time.monotonic() - paused


# The saved state --------------------------------------------------------------------------------------------------


def checkpoint_paths(folder: str | Path, category: str, folds: int) -> list[Path]:
    """Return the file of the saved state of each network of a detector."""
    if folds == 1:
        return [Path(folder) / (category + SUFFIX)]
    return [_several(folder, category) / f"{number}{SUFFIX}" for number in range(folds)]


def _several(folder: str | Path, category: str) -> Path:
    """Return the folder of the saved states of a detector of several networks."""
    return Path(folder) / f"{category}{SUFFIX}s"


def find_checkpoints(folder: str | Path, category: str) -> list[Path]:
    """Return the files of the saved states of a category that exist, of however many networks."""
    single = Path(folder) / (category + SUFFIX)
    return [path for path in (single, *sorted(_several(folder, category).glob("*" + SUFFIX))) if path.exists()]


def load_checkpoint(path: Path) -> dict:
    """Return what ``Trainer.state`` gave, its config as a Config. Raises InputError if the file holds something else,
    or a state of another version."""
    state = load_tensors(path, "checkpoint")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(f"{path}: not a saved state of this program; remove it or start anew (--overwrite)")
    try:
        config = Config.from_dict(state["config"]) if state.get("version") == VERSION else None
    except (SettingError, KeyError, TypeError, AttributeError):
        config = None
    if config is None:
        way_out = "finish it there or start anew (--overwrite)"
        raise InputError(f"{path}: saved by another version of this program; {way_out}")
    with damage_named(path, "checkpoint", ANEW):
        _check_numbers(state, config)
    return state | {"config": config}


def _check_numbers(state: dict, config: Config) -> None:
    """Raise ValueError for numbers of a saved state that cannot be."""
    step, seconds, ranks, precision = (state[name] for name in ("step", "seconds", "ranks", "precision"))
    if type(step) is not int or not 0 <= step <= config.epochs:
        raise ValueError(f"step {step!r} of {config.epochs}")
    if type(seconds) not in (int, float) or not 0 <= seconds < math.inf:
        raise ValueError(f"{seconds!r} seconds")
    threads, amp = (getattr(Precision(**precision), name) for name in ("threads", "amp"))
    if not all(type(number) is int and number > 0 for number in (ranks, threads)) or amp not in PRECISIONS:
        raise ValueError(f"{ranks!r} ranks, {threads!r} threads, amp {amp!r}")


def remove_checkpoints(folder: str | Path, category: str) -> None:
    """Remove the saved states of a category. Those of several networks go at once: if some were left, they would look
    like a training that was stopped."""
    Path(folder, category + SUFFIX).unlink(missing_ok=True)
    several = _several(folder, category)
    removed = several.with_name(f".{several.name}")
    shutil.rmtree(removed, ignore_errors=True)  # of a run that was killed here
    if several.exists():
        os.replace(several, removed)
        shutil.rmtree(removed)


# How a run runs ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunOptions:
    """Hold how trainings run. Nothing of it decides what a detector is."""

    device: torch.device
    data_dir: str = "Data"
    workers: int = 0
    storage: Storage = IN_MEMORY
    ranks: Ranks = field(default_factory=Ranks)  # that train each network together; the first one writes and tells
    asked_precision: dict = field(default_factory=dict)  # by the names of Precision; what it lacks is chosen
    cores: int = 1
    overwrite: bool = False
    explain: bool = True  # keep normal images beside the detector
    test_epochs: int = -1  # steps between two looks at the test AUROC; -1: none
    save_minutes: float = 3.0
    bar: bool = False  # show progress


@dataclass(frozen=True)
class Precision:
    """Hold what changes the rounding of a run but not the experiment. A run that is resumed keeps it."""

    threads: int  # of the network on the CPU: the order of floating point sums depends on it
    amp: str  # of PRECISIONS
    compile: bool
    replay: bool = False  # record a step on the GPU, and replay it as one launch


def choose_precision(asked: dict, saved: dict, device: torch.device, cores: int) -> Precision:
    """Return the precision that was asked for, else that of the saved state, else what suits the device.

    asked, saved: values by the names of Precision, any of which may be missing. Raises SettingError where the two
    contradict each other, or for what the device cannot do.
    """
    suitable = {"threads": cores, "amp": suitable_precision(device)[0], "compile": False, "replay": False}
    precision = Precision(**suitable | resume(asked, saved))
    if precision.amp == "fp16" and device.type == "cpu":
        raise SettingError("amp", "fp16 needs a GPU (--cuda 1); a CPU computes in bf16 or float32")
    if precision.replay and device.type == "cpu":
        raise SettingError("replay", "only a GPU replays steps (--cuda 1)")
    if precision.compile and device.type == "cuda" and not can_compile(device):
        raise SettingError("compile", "torch finds no Triton or no C compiler; install both, or do without")
    compilers = os.environ.get("CXX", "g++"), "clang++", "c++"
    if precision.compile and device.type == "cpu" and not any(map(shutil.which, compilers)):
        raise SettingError("compile", "no C++ compiler is found; install g++, or do without")
    return precision
