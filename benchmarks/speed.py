"""How fast training and scoring are, against the bare network and against the conventional way -> results/speed.csv.

    python benchmarks/speed.py
    python benchmarks/speed.py --only step --size 128
    python benchmarks/speed.py --cuda 1 --recipe paper fast --compile 0 1 --only views replay step launches
    python benchmarks/speed.py --only runtimes line

Measures in one process, each figure a median over repeats after a warm-up; things that are compared take turns, so
that a slow minute of the machine meets both. For each recipe, compiled or not, it prints one JSON object and adds it as
a row to the CSV file; a part that fails is told, and left empty. "runtimes" is another table: whole detectors in torch,
ONNX Runtime and OpenVINO, a row for each kind of model, runtime, number of threads and of images; "line" is what
predict.py scores of files with an exported detector. Images are photographs of textures, or those of --data_dir.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset, RandomSampler

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules

from config import RECIPES, Config, SettingError, with_flag
from cutpaste import (
    SCAR_IMAGE_SIZE,
    VARIANTS,
    VIEWS,
    make_packed_views,
    make_views,
    make_views_and_sample,
    pack_params,
    visible,
)
from dataset import TrainSet, load_images
from detector import IMAGES_AT_ONCE, Detector, stream
from image_ops import NOTHING_IGNORED, paste_, to_float
from model import CutPasteNet
from runtime.cli import (
    PRECISIONS,
    autocast_type,
    choose_device,
    command_line,
    device_name,
    int_at_least,
    new_parser,
    run_script,
    size,
    zero_or_one,
)
from runtime.files import InputError, say
from runtime.gpu import SETTLING, Recorded
from runtime.image_files import decode, find_images
from training.trainer import (
    LOG_EVERY,
    RunOptions,
    Trainer,
    choose_precision,
    compiled_views,
    new_optimizer,
    open_log,
    rate_of,
)

ROOT = Path(__file__).resolve().parents[1]
# The one that needs the least memory first; "replay" compares, and needs a GPU
PARTS = ("scoring", "files", "views", "replay", "step", "launches", "augmentation", "conventional")
RUNTIMES = ("runtimes", "line")  # parts with rows of their own
ANY_RECIPE = ("views", "replay", "step", "launches")  # what can be measured of every recipe
LAPS = LOG_EVERY  # steps between two stops of the clock on a GPU, where one step is too short to be measured alone
AGREE = 1e-5  # values in [0, 1] that are closer are the same
REPLAYED = 30  # steps that are compared
BOXES = 1024  # drawn beforehand for each conventional view: drawing one by one would slow its workers by 3 %


def get_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add = parser.add_argument_group("what is measured").add_argument
    parts = f"{', '.join(PARTS)} (default: all of these), or {', '.join(RUNTIMES)}"
    add("--only", choices=(*PARTS, *RUNTIMES), nargs="+", default=PARTS, metavar="PART", help=parts)
    add("--size", type=size, default=(256, 256), metavar="S|WxH", help="of images in pixels (default: 256)")
    add("--batch_size", type=int_at_least(2), metavar="N", help="images per step (default: the recipe's, 32 of paper)")
    recipes = f"some of {', '.join(RECIPES)} (default: paper)"
    add("--recipe", choices=tuple(RECIPES), nargs="+", default=["paper"], metavar="NAME", help=recipes)
    add("--variant", choices=tuple(VARIANTS), help="default: the recipe's, 3way of paper")
    add("--original", type=size, default=(900, 900), metavar="S|WxH", help="size of files (default: 900)")
    add("--data_dir", metavar="DIR", help="a folder of images (default: textures of scikit-image)")
    add = parser.add_argument_group("how").add_argument
    add("--cuda", type=zero_or_one, default=False, metavar="0|1", help="use the GPU (default: 0)")
    add("--amp", choices=("auto", *PRECISIONS), default="auto", help="precision, as of run_training.py")
    compiles = "compile the network, or do not, or each in turn (default: 0)"
    add("--compile", type=zero_or_one, nargs="+", default=[False], metavar="0|1", help=compiles)
    add("--repeats", type=int_at_least(1), default=7, metavar="N", help="the median counts (default: 7)")
    add = parser.add_argument_group("record").add_argument
    results = ROOT / "results/speed.csv"
    help = "CSV file that the row is added to (default: results/speed.csv)"
    add("--results", default=results, type=Path, metavar="FILE", help=help)
    add("--note", default="", metavar="TEXT", help="for the row: what else ran on the machine, say")
    return parser


def main(args: argparse.Namespace) -> None:
    if {*RUNTIMES} & {*args.only}:
        from runtimes import measure_line, measure_runtimes

        if args.cuda or not {*args.only} <= {*RUNTIMES}:
            raise argparse.ArgumentTypeError(f"--only {' or '.join(RUNTIMES)} is measured alone, and on a CPU")
        photographs = load_photographs(args.data_dir, IMAGES_AT_ONCE)
        for part, measure_part in zip(RUNTIMES, (measure_runtimes, measure_line)):
            if part in args.only:
                measure_part(args, photographs)
        return
    device = choose_device(args.cuda)
    torch.backends.cudnn.deterministic = True  # as run_training.py
    rows = [(config_of(args, recipe), compiled) for compiled in args.compile for recipe in args.recipe]
    photographs = load_photographs(args.data_dir, max(64, *(2 * config.batch_size for config, _ in rows)))
    with tempfile.TemporaryDirectory() as folder:
        paths = write_photographs(photographs, Path(folder), args.original)
        train_set = TrainSet(load_images(paths, args.size, os.cpu_count()), paths, NOTHING_IGNORED)
        failed = [part for config, compiled in rows for part in measure(args, config, compiled, device, train_set)]
    if failed:
        raise InputError(f"not measured: {', '.join(failed)}")


def config_of(args: argparse.Namespace, recipe: str) -> Config:
    """Return the settings of a row. Raises argparse.ArgumentTypeError for those that cannot be."""
    # On a CPU every step is the last and so logged, a little more than it costs: laps of ten would take too long
    settings = {"recipe": recipe, "height": args.size[0], "width": args.size[1]}
    settings |= {name: getattr(args, name) for name in ("variant", "batch_size") if getattr(args, name) is not None}
    settings |= {"epochs": 10**6 if args.cuda else 1}
    try:
        config = Config.from_dict({"category": "speed", "pretrained": False} | RECIPES[recipe] | settings)
    except SettingError as error:
        raise argparse.ArgumentTypeError(with_flag(error)) from error
    alone = config.patches is not None or config.variant == "soft"
    if alone and not set(args.only) <= set(ANY_RECIPE):
        parts = ", ".join(ANY_RECIPE)
        raise argparse.ArgumentTypeError(f"of a patch model or soft patches {parts} are measured: say which by --only")
    return config


def measure(
    args: argparse.Namespace, config: Config, compiled: bool, device: torch.device, train_set: TrainSet
) -> list[str]:
    """Print and record a row. Returns the names of parts that have failed."""
    threads = torch.get_num_threads()
    try:
        asked = {"compile": compiled, "replay": device.type == "cuda"} | (
            {} if args.amp == "auto" else {"amp": args.amp}
        )
        precision = choose_precision(asked, {}, device, threads)
    except SettingError as error:
        raise argparse.ArgumentTypeError(with_flag(error)) from error
    row = {
        "command": command_line().replace("python ", "python benchmarks/", 1),
        "processor": device_name(torch.device("cpu")),
        "cores": os.cpu_count(),
        "threads": threads,
        "gpu": device_name(device) if args.cuda else "",
        "torch": str(torch.__version__),
        "commit": commit(),
        **{name: getattr(config, name) for name in ("height", "width", "batch_size", "variant", "recipe")},
        "amp": precision.amp,
        "compile": precision.compile,
        "repeats": args.repeats,
        "note": args.note,
    }
    run, failed = Trainer(config, train_set, RunOptions(device), precision), []
    parts = {
        "scoring": lambda: scoring(run, args.repeats),
        "files": lambda: files(run, args.repeats, train_set.paths),
        "views": lambda: views(run, args.repeats),
        "replay": lambda: replay(run),
        "step": lambda: step(run, args.repeats),
        "launches": lambda: launches(run),
        "augmentation": lambda: augmentation(run, args.repeats),
        "conventional": lambda: conventional(run, args.repeats),
    }
    for part in (part for part in parts if part in args.only and (part != "replay" or run.replays)):
        say(f"measuring: {config.recipe}, {part}")
        try:
            row |= parts[part]()
        except Exception:
            traceback.print_exc()
            failed.append(f"{config.recipe}, {part}")
    row = {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in row.items()}
    print(json.dumps(row, indent=2), flush=True)
    from tables import append  # and pandas with it: only now, for its memory is not to be measured

    append(row, args.results)
    return failed


# What is measured -------------------------------------------------------------------------------------------------


def step(run: Trainer, repeats: int) -> dict:
    """The loop of run_training.py, its log included, against forward, backward and optimizer on a resident batch, which
    is replayed if the steps are. On a GPU the first steps, which compile and record, are timed too, and the step that
    is issued operation by operation."""
    began = time.perf_counter()
    for _ in range(SETTLING + 1 if run.replays else 2):
        run.train_step()
    wait(run.device)
    settling, peak = time.perf_counter() - began, peak_mb(run.device)  # before there is another network
    bare = bare_step(run, run.precision.amp, run.precision.compile, torch.channels_last)
    if run.replays:
        recorded, issued = Recorded(run.device), bare
        bare = lambda: recorded(issued)  # noqa: E731
    with tempfile.TemporaryDirectory() as folder, open_log(run, Path(folder), bar=False) as log:
        ours, alone = medians(repeats, run.device, lambda: log.add(run.train_step()), bare)
    figures = {
        "step_seconds": ours,
        "bare_seconds": alone,
        "step_over_bare": ours / alone,
        "steps_per_second": 1 / ours,
        "training_peak_mb": peak,
        "replayed": run.replays,
    }
    if run.device.type == "cuda":
        plain = Trainer(run.config, run.train_set, run.options, run.precision)
        plain.recorded = None
        issued_step = medians(1, run.device, plain.train_step)[0]
        figures |= {"settling_seconds": settling, "issued_step_seconds": issued_step}
    return figures


def views(run: Trainer, repeats: int) -> dict:
    """Making a batch's views, as a step does; on a GPU they are held against those of a CPU."""
    chosen, params = run.sample_batch()
    images = run.load_batch(chosen)
    if not run.replays:
        return {"views_seconds": medians(repeats, run.device, lambda: make_views_and_sample(images, params))[0]}
    how, numbers = packed_how(run), pack_params(params)
    make, recorded = compiled_views(images.shape, *how), Recorded(run.device)
    work = lambda numbers: make(images, numbers, *how)[0]  # noqa: E731
    began = time.perf_counter()
    result = recorded(work, numbers)
    wait(run.device)
    compiling = time.perf_counter() - began
    expected, _, whole = make_views_and_sample(images.cpu(), params)
    far = (result.cpu() - expected).abs().amax(1)
    seen = make(images, numbers.to(run.device), *how)[2]
    return {
        "views_seconds": medians(repeats, run.device, lambda: recorded(work, numbers))[0],
        "views_compiling_seconds": compiling,
        "views_largest_difference": far.max().item(),
        "views_pixels": far.numel(),
        "views_pixels_that_differ": (far > AGREE).sum().item(),
        "views_seen_differently": 0 if seen is None else (seen.cpu() != visible(expected, params, whole)).sum().item(),
    }


def replay(run: Trainer) -> dict:
    """Return whether replayed steps are those that are issued operation by operation, bit for bit; and whether those
    are the same twice."""
    values, weights = [], []
    for how in ("issued", "replayed", "issued again"):
        one = Trainer(run.config, run.train_set, run.options, run.precision)
        if how != "replayed":
            one.recorded = lambda work, *inputs: work(*(x.to(run.device) for x in inputs))
        values.append(torch.stack([one.train_step() for _ in range(REPLAYED)]))
        weights.append([x.clone() for x in one.network.state_dict().values()])
    same = [
        torch.equal(values[0], values[other]) and all(map(torch.equal, weights[0], weights[other])) for other in (1, 2)
    ]
    return {
        "replayed_steps": REPLAYED,
        "replayed_equal": same[0],
        "issued_equal": same[1],
        "replayed_largest_difference": (values[0] - values[1]).abs().max().item(),
    }


def launches(run: Trainer) -> dict:
    """Operations on the device that a step issues, by part, with copies to it; on a GPU the kernels that one replay
    runs, and their time.

    The views are made of tensors without values, so that no GPU is needed to tell the device's operations from the
    host's; network, loss and optimizer have no others.
    """
    chosen, params = run.sample_batch()
    config, images = run.config, run.images.new_empty((len(chosen), *run.images.shape[1:]), device="meta")
    with Operations() as today:
        made, _, whole = make_views_and_sample(images, params)
        if config.invisible == "drop":
            visible(made, params, whole)
    numbers = pack_params(params).to("meta")
    with Operations() as packed:
        make_packed_views(images, numbers, *packed_how(run))
    network, loader = Operations(run.device.type), run.load_batch(chosen)
    batch, forward = run.make_views(loader, params), run.forward
    run.forward = run.network  # not compiled: its operations would not be seen
    with network:
        run.update(batch, 1.0)
    run.forward = forward
    figures = {
        "views_operations": today.count,
        "views_copies": today.copies,
        "packed_views_operations": packed.count,
        "network_operations": network.count,
    }
    if run.replays:
        make = compiled_views(loader.shape, *packed_how(run))
        numbers = pack_params(params).to(run.device)
        made = kernels(run, lambda: make(loader, numbers, *packed_how(run)))
        every = kernels(run, run.train_step)
        figures |= {"views_kernels": made[0], "views_kernel_seconds": made[1]}
        figures |= {"step_kernels": every[0], "step_kernel_seconds": every[1]}
    return figures


def augmentation(run: Trainer, repeats: int) -> dict:
    """Images read per second that become views, ours and conventionally, in as many workers as there are cores."""

    def work() -> None:
        chosen, params = run.sample_batch()
        make_views(run.load_batch(chosen), params)

    ours = medians(repeats, run.device, work)[0]
    theirs = steady(conventional_batches(run), lambda views: None, repeats)
    return {
        "augmentation_images_per_second": run.batch_size / ours,
        "conventional_augmentation_images_per_second": run.batch_size / theirs,
        "augmentation_gain": theirs / ours,
    }


def conventional(run: Trainer, repeats: int) -> dict:
    """Our loop against per-image transforms in a DataLoader and a float32 network in torch's default layout."""
    bare = bare_step(run, "off", False, torch.contiguous_format)
    ours = medians(repeats, run.device, run.train_step)[0]
    theirs = steady(conventional_batches(run), lambda views: (bare(views.to(run.device)), wait(run.device)), repeats)
    return {"conventional_step_seconds": theirs, "conventional_over_ours": theirs / ours}


def scoring(run: Trainer, repeats: int) -> dict:
    """Resident images to scores against the network's forward pass alone, both float32."""
    detector = Detector(run.config, [run.network]).fit(run.images)
    run.network.eval()  # the detector has a copy of it
    images = run.images[:IMAGES_AT_ONCE]
    batch = prepared(images)

    @torch.inference_mode()
    def bare() -> None:
        run.network.embed(batch)

    ours, alone = medians(repeats, run.device, lambda: score(detector, images), bare)
    run.network.train()
    return {
        "scoring_images_per_second": len(images) / ours,
        "scoring_over_bare": ours / alone,
        "scoring_peak_mb": peak_mb(run.device),
    }


def files(run: Trainer, repeats: int, paths: list[Path]) -> dict:
    """PNG files of original size to scores against decoding alone plus the forward pass alone."""
    detector = Detector(run.config, [run.network]).fit(run.images)
    run.network.eval()  # the detector has a copy of it
    batch = prepared(run.images)

    def decoding() -> Tensor:
        return load_images(paths, detector.config.size, os.cpu_count())

    @torch.inference_mode()
    def bare() -> None:
        for block in batch.split(IMAGES_AT_ONCE):
            run.network.embed(block)

    whole, decoded, alone = medians(repeats, run.device, lambda: score(detector, decoding()), decoding, bare)
    single = medians(repeats, run.device, lambda: [decode(path, detector.config.size) for path in paths])[0]
    run.network.train()
    return {
        "files_images_per_second": len(paths) / whole,
        "files_over_decoding_and_bare": whole / (decoded + alone),
        "decoding_images_per_second": len(paths) / decoded,
        "decoding_gain_of_threads": single / decoded,
    }


# Parts of it ------------------------------------------------------------------------------------------------------


def bare_step(run: Trainer, amp: str, compile: bool, layout: torch.memory_format) -> Callable[..., None]:
    """Forward, backward and optimizer of the same network on one batch of views that lies on the device."""
    config, device, classes = run.config, run.device, VARIANTS[run.config.variant].num_classes
    network = CutPasteNet(config.backbone, config.head_layer, classes, config.normalize).train()
    network = network.to(device, memory_format=layout)
    forward = torch.compile(network, dynamic=False) if compile else network
    optimizer, rate = new_optimizer(config, network), torch.tensor(config.lr, device=device)
    height, width = (config.patches.patch_size,) * 2 if config.patches else (config.height, config.width)
    resident = torch.rand(classes * run.batch_size, 3, height, width, device=device)
    resident = resident.contiguous(memory_format=layout)
    labels = torch.arange(classes, device=device).repeat_interleave(run.batch_size)
    precision = autocast_type(amp)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")

    def work(views: Tensor = resident) -> Tensor:
        with torch.autocast(device.type, precision, enabled=precision is not None):
            logits, _ = forward(views)
        loss = functional.cross_entropy(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        with rate_of(optimizer, rate) if run.replays else nullcontext():
            scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    return work


class Operations(TorchDispatchMode):
    """Counts operations whose result is on a device, but for views of tensors, and copies from another one to it."""

    def __init__(self, device: str = "meta") -> None:
        super().__init__()
        self.device, self.count, self.copies = device, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, list | tuple) and result else result
        returned = function._schema.returns
        is_view = bool(returned) and returned[0].alias_info is not None and not returned[0].alias_info.is_write
        if isinstance(first, Tensor) and first.device.type == self.device and not is_view:
            self.count += 1
            self.copies += any(isinstance(x, Tensor) and x.device.type != self.device and x.ndim for x in args[:1])
        return result


def packed_how(run: Trainer) -> tuple[str, int | None, bool]:
    """Return the settings that ``make_packed_views`` takes."""
    return run.config.variant, run.config.patches and run.config.patches.patch_size, run.config.invisible == "drop"


def kernels(run: Trainer, work: Callable[[], object]) -> tuple[int, float]:
    """Return the number of kernels that some work runs on a GPU, once it has settled, and their seconds."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    for _ in range(SETTLING + 2):
        work()
    wait(run.device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        work()
        wait(run.device)
    events = [event for event in profiled.events() if event.device_type == DeviceType.CUDA]
    events = [event for event in events if not event.name.startswith("Mem")]  # copies, and memory set
    return len(events), sum(event.time_range.elapsed_us() for event in events) / 1e6


def score(detector: Detector, images: Tensor) -> None:
    for _ in stream(detector, images):
        pass


def prepared(images: Tensor) -> Tensor:
    """Images as the network takes them."""
    return to_float(images).contiguous(memory_format=torch.channels_last)


def medians(repeats: int, device: torch.device, *works: Callable[[], object]) -> list[float]:
    """Median seconds of each of some works, which take turns; the first turn warms up."""
    laps = LAPS if device.type == "cuda" else 1
    seconds: list[list[float]] = [[] for _ in works]
    for turn in range(repeats + 1):
        for work, found in zip(works, seconds):
            wait(device)
            began = time.perf_counter()
            for _ in range(laps):
                work()
            wait(device)
            if turn:
                found.append((time.perf_counter() - began) / laps)
    return [statistics.median(found) for found in seconds]


# The conventional way ---------------------------------------------------------------------------------------------


class ConventionalViews(Dataset):
    """Makes views (V, 3, H, W) in [0, 1] of one image at a time by torchvision and Pillow, as cutpaste.VIEWS has them.

    Raises ValueError for a view that does anything else than paste a box.
    """

    def __init__(self, images: list[Image.Image], variant: str) -> None:
        from torchvision.transforms import ColorJitter, RandomAffine, ToTensor

        self.images, self.boxes = images, []
        self.jitter, self.shift = ColorJitter(0.1, 0.1, 0.1, 0.1), RandomAffine(0, (0.04, 0.04))
        self.to_tensor = ToTensor()
        (width, height), generator = images[0].size, torch.Generator().manual_seed(0)
        for name in VARIANTS[variant].views[1:]:
            scale = min(height, width) / SCAR_IMAGE_SIZE
            pasted = name in VIEWS and VIEWS[name].paste is paste_
            drawn = VIEWS[name].draw(BOXES, height, width, scale, generator) if pasted else {}
            if not pasted or "soft" in drawn:
                raise ValueError(f"view {name!r}: the conventional way is written for views that paste a hard box")
            columns = zip(*(values.tolist() for values in drawn.values()))
            self.boxes.append([dict(zip(drawn, values)) for values in columns])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        base = self.jitter(self.shift(self.images[index]))
        further = [self.paste(base, random.choice(boxes)) for boxes in self.boxes]
        return torch.stack([self.to_tensor(view) for view in (base, *further)])

    def paste(self, base: Image.Image, box: dict[str, float]) -> Image.Image:
        """Return a copy of the image with its source box, colors jittered, in its target box (a row of PasteParams)."""
        left, top, width, height = (int(box[name]) for name in ("source_x", "source_y", "width", "height"))
        patch, mask = self.jitter(base.crop((left, top, left + width, top + height))), None
        if box["angle"]:
            turned = patch.convert("RGBA").rotate(-box["angle"], expand=True)  # Pillow turns counterclockwise
            mask, patch = turned.getchannel("A"), turned.convert("RGB")
        place = round(box["center_x"] - patch.width / 2), round(box["center_y"] - patch.height / 2)
        result = base.copy()
        result.paste(patch, place, mask)
        return result


def conventional_batches(run: Trainer) -> Iterator[Tensor]:
    """Yield batches of views (V*B, 3, H, W), view after view, endlessly, from a DataLoader with a worker per core."""
    images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in run.images.cpu()]
    views = ConventionalViews(images, run.config.variant)
    loader = DataLoader(
        views,
        run.batch_size,
        sampler=RandomSampler(views, replacement=True, num_samples=10**9),
        num_workers=os.cpu_count(),
        collate_fn=lambda items: torch.stack(items, 1).flatten(0, 1),
        pin_memory=run.device.type == "cuda",
    )
    return iter(loader)


def steady(batches: Iterator[Tensor], use: Callable[[Tensor], object], repeats: int) -> float:
    """Return seconds per batch, once what the workers have made ahead is used up.

    Whole rounds of the workers are measured, for they finish together.
    """
    for _ in range(2 * os.cpu_count() + 1):
        use(next(batches))
    began = time.perf_counter()
    count = os.cpu_count() * max(4, repeats // os.cpu_count())
    for _ in range(count):
        use(next(batches))
    return (time.perf_counter() - began) / count


# Images -----------------------------------------------------------------------------------------------------------


def load_photographs(folder: str | None, count: int) -> list[Image.Image]:
    if folder is not None:
        photographs = [Image.fromarray(decode(path)) for path in find_images(Path(folder))[:count]]
        if not photographs:
            raise InputError(f"{folder}: no image in it")
    else:
        from skimage import data

        photographs = [Image.fromarray(getattr(data, name)()).convert("RGB") for name in ("brick", "grass", "gravel")]
    return (photographs * count)[:count]


def write_photographs(photographs: list[Image.Image], folder: Path, size: tuple[int, int]) -> list[Path]:
    """PNG files of the photographs at (H, W), each its own section."""
    random, paths = np.random.default_rng(0), []
    for number, photograph in enumerate(photographs):
        left, top = random.integers(photograph.width // 4), random.integers(photograph.height // 4)
        box = (left, top, left + photograph.width * 3 // 4, top + photograph.height * 3 // 4)
        paths.append(folder / f"{number:04}.png")
        photograph.resize(size[::-1], Image.Resampling.BICUBIC, box).save(paths[-1])
    return paths


# The machine ------------------------------------------------------------------------------------------------------


def commit() -> str:
    """Return the checkout's commit, "-dirty" if files outside results/ were changed since; "" outside a checkout."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()

    try:
        dirty = "-dirty" if git("status", "--porcelain", "-uno", "--", ".", ":!results") else ""
        return git("rev-parse", "--short", "HEAD") + dirty
    except OSError:  # no git
        return ""


def wait(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_mb(device: torch.device) -> float:
    """Return the most memory held so far, in millions of bytes: the GPU's or, on a CPU, the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024  # bytes, of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


if __name__ == "__main__":
    run_script(main, get_parser())
