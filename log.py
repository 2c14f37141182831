"""What a run tells: TensorBoard's entries, the progress bar, warnings.

Owns what is logged and how often. Decides nothing but that a loss which is not finite ends the run.
"""

import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from config import Config
from cutpaste import VARIANTS, apply_and_sample, visible
from ignore import ALL_COUNT, filled
from runtime.cache import ImageArray
from runtime.files import InputError, say
from runtime.ranks import Ranks

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter
    from tqdm import tqdm

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


def log_start(writer: "SummaryWriter", config: Config, images: ImageArray, sources: Tensor = ALL_COUNT) -> None:
    """Settings, a sheet of samples and a warning of views that show nothing, once at the start; of images filled where
    they do not count."""
    import plots

    invisible = invisible_shares(config, images, sources)
    rows = ["|setting|value|", "|---|---|", *(f"|{name}|{value}|" for name, value in config.to_dict().items())]
    writer.add_text("settings", "\n".join(rows), 0)
    samples = filled(images[:PREVIEW_IMAGES], sources)
    figure = plots.preview(samples, [f"image {i}" for i in range(len(samples))], config, invisible)
    figure.set_dpi(80)
    writer.add_figure("views", figure, 0)
    many = ", ".join(f"{100 * share:.0f} % of {name}" for name, share in invisible.items() if share > MANY_INVISIBLE)
    if many:
        done = "are left out of the loss" if config.invisible == "drop" else "are learned as anomalous"
        way_out = "" if config.invisible == "drop" else " (--invisible drop leaves them out)"
        say(f"{config.category}: views that show no difference from the image: {many}; they {done}{way_out}")


def invisible_shares(config: Config, images: ImageArray, sources: Tensor = ALL_COUNT) -> dict[str, float]:
    """Of each kind of view, by its name in VIEWS, the share that shows no difference from the image, see
    cutpaste.visible. images: (N, 3, H, W) uint8, of which LOOKED_AT are taken, evenly spaced."""
    generator, found = torch.Generator().manual_seed(config.seed), []
    for part in (torch.arange(LOOKED_AT) * len(images) // LOOKED_AT).split(AT_ONCE):
        params = config.make_params(len(part), generator)
        views, _, whole = apply_and_sample(filled(images[part], sources), params)
        found.append(visible(views, params, whole).view(-1, len(part)))
    shares = 1 - torch.cat(found, 1).float().mean(1)
    return dict(zip(VARIANTS[config.variant].views[1:], shares[1:].tolist()))
