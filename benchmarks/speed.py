"""How fast training and scoring are, against the bare network and against the conventional way.

    python benchmarks/speed.py                       everything, at 256 px, batch 32, 3-way
    python benchmarks/speed.py --only step --size 128

Measures in one process, each figure a median over repeats after a warm-up; things that are compared take turns, so
that a slow minute of the machine meets both. Prints one JSON object and appends it as a row to results/speed.csv.
Images are photographs of textures, or those of --data_dir.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import options  # noqa: E402
from cutpaste import VARIANTS, apply, make_params, to_float  # noqa: E402
from dataset import InputError, decode, find_images, load_images  # noqa: E402
from detector import Detector  # noqa: E402
from model import CutPasteNet  # noqa: E402
from training import LOG_EVERY, PRECISIONS, Arithmetic, Run, device_name, new_optimizer, suitable_precision  # noqa: E402

PARTS = ("scoring", "files", "step", "augmentation", "conventional")  # the one that needs the least memory first
LAPS = LOG_EVERY  # steps between two stops of the clock on a GPU, where one step is too short to be measured alone


def get_parser() -> argparse.ArgumentParser:
    parser = options.new_parser("Measure training and scoring.", "One JSON object on stdout, one row in --results.")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="what to measure (default: all)")
    parser.add_argument("--size", type=options.size, default=(256, 256), metavar="S|WxH", help="default: 256")
    parser.add_argument("--batch_size", type=options.whole(2), default=32, metavar="N", help="default: 32")
    parser.add_argument("--variant", choices=tuple(VARIANTS), default="3way", help="default: 3way")
    parser.add_argument("--amp", choices=("auto", *PRECISIONS), default="auto", help="as of run_training.py")
    parser.add_argument("--compile", type=options.zero_or_one, default=False, metavar="0|1", help="default: 0")
    parser.add_argument("--cuda", type=options.zero_or_one, default=False, metavar="0|1", help="default: 0")
    parser.add_argument("--repeats", type=options.whole(1), default=7, metavar="N", help="default: 7")
    parser.add_argument("--original", type=options.size, default=(900, 900), metavar="S|WxH", help="of files: 900")
    parser.add_argument("--data_dir", metavar="DIR", help="a folder of images (default: textures of scikit-image)")
    parser.add_argument("--results", default=ROOT / "results/speed.csv", type=Path, metavar="FILE")
    parser.add_argument("--note", default="", help="for the row: what else ran on the machine, say")
    return parser


def main(args: argparse.Namespace) -> None:
    device = options.choose_device(args.cuda)
    amp = suitable_precision(device) if args.amp == "auto" else args.amp
    arithmetic = Arithmetic(torch.get_num_threads(), amp, args.compile)
    photographs = load_photographs(args.data_dir, max(64, 2 * args.batch_size))
    row = {
        "command": options.command_line().replace("speed.py", "benchmarks/speed.py", 1),
        "processor": device_name(torch.device("cpu")),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": device_name(device) if args.cuda else "",
        "torch": str(torch.__version__),
        "commit": commit(),
        "height": args.size[0],
        "width": args.size[1],
        "batch_size": args.batch_size,
        "variant": args.variant,
        "amp": amp,
        "compile": args.compile,
        "repeats": args.repeats,
        "note": args.note,
    }
    with tempfile.TemporaryDirectory() as folder:
        paths = write_files(photographs, Path(folder), args.original)
        images = load_images(paths, args.size, os.cpu_count())
        run = Run(config(args), images, "", device, arithmetic)
        measure = {
            "scoring": lambda: scoring(args, run, images),
            "files": lambda: files(args, run, paths),
            "step": lambda: step(args, run),
            "augmentation": lambda: augmentation(args, images, device),
            "conventional": lambda: conventional(args, run, images),
        }
        for part, work in measure.items():
            if part in args.only:
                options.say(f"measuring: {part}")
                row |= work()
    row = {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in row.items()}
    print(json.dumps(row, indent=2))
    append(row, args.results)


# What is measured -------------------------------------------------------------------------------------------------


def step(args: argparse.Namespace, run: Run) -> dict:
    """The loop of run_training.py, its log included, against forward, backward and optimiser on a resident batch."""
    run.update()
    run.update()
    peak = peak_mb(run.device)  # before there is another network
    bare = bare_step(args, run.device, run.arithmetic, channels_last=True)
    with tempfile.TemporaryDirectory() as folder:
        logs = Logged(run, Path(folder))
        ours, alone = medians(args.repeats, run.device, logs.step, bare)
        logs.close()
    return {
        "step_seconds": ours,
        "bare_seconds": alone,
        "step_over_bare": ours / alone,
        "steps_per_second": 1 / ours,
        "training_peak_mb": peak,
    }


def augmentation(args: argparse.Namespace, images: Tensor, device: torch.device) -> dict:
    """Images read per second that become views, ours and conventionally, in as many workers as there are cores."""
    resident = images.to(device)
    generator = torch.Generator().manual_seed(0)

    def ours() -> None:
        chosen = torch.randperm(len(images), generator=generator)[: args.batch_size]
        params = make_params(args.variant, args.batch_size, *args.size, generator)
        apply(resident[chosen.to(device)], params)

    mine = medians(args.repeats, device, ours)[0]
    theirs = steady(args, images, lambda views: None)
    return {
        "augmentation_images_per_second": args.batch_size / mine,
        "conventional_augmentation_images_per_second": args.batch_size / theirs,
        "augmentation_gain": theirs / mine,
    }


def conventional(args: argparse.Namespace, run: Run, images: Tensor) -> dict:
    """Our loop against per-image transforms in a DataLoader and a float32 NCHW network."""
    bare = bare_step(args, run.device, Arithmetic(run.arithmetic.threads, "off", False), channels_last=False)
    ours = medians(args.repeats, run.device, run.update)[0]
    theirs = steady(args, images, lambda views: (bare(views.to(run.device)), wait(run.device)))
    return {"conventional_step_seconds": theirs, "conventional_over_ours": theirs / ours}


def steady(args: argparse.Namespace, images: Tensor, use: Callable[[Tensor], object]) -> float:
    """Seconds per batch of the conventional pipeline, once what its workers have made ahead is used up; over whole
    rounds of them, for they finish together."""
    ahead = 2 * os.cpu_count() + 1
    batches = conventional_batches(args, images)
    for _ in range(ahead):
        use(next(batches))
    began = time.perf_counter()
    count = os.cpu_count() * max(4, args.repeats // os.cpu_count())
    for _ in range(count):
        use(next(batches))
    return (time.perf_counter() - began) / count


def scoring(args: argparse.Namespace, run: Run, images: Tensor) -> dict:
    """Resident images to scores against the network's forward pass alone, both float32."""
    detector = Detector(run.config, run.network).eval().fit(run.images)
    batch = prepared(images[:64].to(run.device))

    @torch.inference_mode()
    def bare() -> None:
        detector.network.embed(batch)

    resident = images[:64].to(run.device)
    ours, alone = medians(args.repeats, run.device, lambda: detector(resident), bare)
    run.network.train()
    return {
        "scoring_images_per_second": len(batch) / ours,
        "scoring_over_bare": ours / alone,
        "scoring_peak_mb": peak_mb(run.device),
    }


def files(args: argparse.Namespace, run: Run, paths: list[Path]) -> dict:
    """PNG files of original size to scores against decoding alone plus the forward pass alone."""
    detector = Detector(run.config, run.network).eval().fit(run.images)
    batch = prepared(run.images[: len(paths)])

    @torch.inference_mode()
    def bare() -> None:
        for block in batch.split(64):
            detector.network.embed(block)

    decoding = lambda: load_images(paths, args.size, os.cpu_count())  # noqa: E731
    whole, decoded, alone = medians(args.repeats, run.device, lambda: detector(decoding()), decoding, bare)
    single = medians(args.repeats, run.device, lambda: [decode(path, args.size) for path in paths])[0]
    run.network.train()
    return {
        "files_images_per_second": len(paths) / whole,
        "files_over_decoding_and_bare": whole / (decoded + alone),
        "decoding_images_per_second": len(paths) / decoded,
        "decoding_gain_of_threads": single / decoded,
    }


class Logged:
    """Steps as ``Run.train`` takes them, with what it logs at every tenth: on a GPU once in ten steps, on a CPU, where
    laps of ten steps would take too long, at every step, which is a little more than it costs."""

    def __init__(self, run: Run, folder: Path) -> None:
        from training import open_tensorboard

        self.run, self.sums = run, 0
        self.writing = open_tensorboard(folder, 0)
        self.writer = self.writing.__enter__()

    def step(self) -> None:
        run = self.run
        self.sums = self.sums + torch.stack(run.update())
        if run.device.type == "cpu" or run.step % LOG_EVERY == 0:
            loss, accuracy = self.sums.tolist()
            for tag, value in (("loss", loss), ("acc", accuracy), ("lr", run.optimizer.param_groups[0]["lr"])):
                self.writer.add_scalar(tag, value, run.step)
            self.sums = 0

    def close(self) -> None:
        self.writing.__exit__(None, None, None)


def bare_step(
    args: argparse.Namespace, device: torch.device, arithmetic: Arithmetic, channels_last: bool
) -> Callable[..., None]:
    """Forward, backward and optimiser of the same network on one batch of views that lies on the device."""
    classes = VARIANTS[args.variant].num_classes
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network = CutPasteNet("resnet18", 1, classes, "image").to(device, memory_format=layout).train()
    forward = torch.compile(network) if arithmetic.compile else network
    optimizer = new_optimizer(config(args), network)
    shape = (classes * args.batch_size, 3, *args.size)
    resident = torch.rand(shape, device=device).contiguous(memory_format=layout)
    labels = torch.arange(classes, device=device).repeat_interleave(args.batch_size)
    precision = PRECISIONS[arithmetic.amp]
    scaler = torch.amp.GradScaler(device.type, enabled=arithmetic.amp == "fp16")

    def work(views: Tensor = resident) -> None:
        with torch.autocast(device.type, precision, enabled=precision is not None):
            logits, _ = forward(views)
        loss = functional.cross_entropy(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return work


# The conventional way ---------------------------------------------------------------------------------------------


class ConventionalViews(torch.utils.data.Dataset):
    """PIL images to views, one by one, by torchvision's transforms: what one would write without thinking of speed."""

    def __init__(self, images: list[Image.Image], variant: str) -> None:
        from torchvision.transforms import ColorJitter, RandomAffine, ToTensor

        self.images, self.views = images, VARIANTS[variant].views
        self.jitter, self.shift = ColorJitter(0.1, 0.1, 0.1, 0.1), RandomAffine(0, (0.04, 0.04))
        self.to_tensor = ToTensor()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        """The views (V, 3, H, W) of one image."""
        base = self.jitter(self.shift(self.images[index]))
        return torch.stack([self.to_tensor(self.view(base, kind)) for kind in self.views])

    def view(self, base: Image.Image, kind: str) -> Image.Image:
        if kind == "image":
            return base
        random = np.random.default_rng(int(torch.randint(2**31, ())))  # torch seeds its workers, numpy not
        if kind == "patch or scar":
            kind = ("patch", "scar")[random.integers(2)]
        width, height = base.size
        if kind == "patch":
            area, aspect = random.uniform(0.02, 0.15), np.exp(random.uniform(np.log(0.3), np.log(3.3)))
            size = (width * (area * aspect) ** 0.5, height * (area / aspect) ** 0.5)
        else:
            size = (random.uniform(2, 16) * width / 256, random.uniform(10, 25) * height / 256)
        w, h = (max(1, min(side, round(length))) for length, side in zip(size, base.size))
        left, top = random.integers(width - w + 1), random.integers(height - h + 1)
        patch = self.jitter(base.crop((left, top, left + w, top + h)))
        mask = None
        if kind == "scar":
            patch = patch.convert("RGBA").rotate(random.uniform(-45, 45), expand=True)
            mask, patch = patch.getchannel("A"), patch.convert("RGB")
        at = (random.integers(max(1, width - patch.width + 1)), random.integers(max(1, height - patch.height + 1)))
        result = base.copy()
        result.paste(patch, at, mask)
        return result


def conventional_batches(args: argparse.Namespace, images: Tensor):
    """Batches of views (V*B, 3, H, W), endlessly, from as many workers as there are cores."""
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    views = ConventionalViews(pictures, args.variant)
    loader = torch.utils.data.DataLoader(
        views,
        args.batch_size,
        sampler=torch.utils.data.RandomSampler(views, replacement=True, num_samples=10**9),
        num_workers=os.cpu_count(),
        collate_fn=lambda items: torch.cat([torch.stack(view) for view in zip(*items)]),
        pin_memory=args.cuda,
    )
    return iter(loader)


# The clock and the record -----------------------------------------------------------------------------------------


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


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_mb(device: torch.device) -> float:
    """The most memory so far, in millions of bytes: the GPU's, or the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def config(args: argparse.Namespace) -> dict:
    from run_training import get_parser, make_config

    flags = ["--no-pretrained", "--variant", args.variant, "--batch_size", str(args.batch_size)]
    return make_config(get_parser().parse_args(flags), "speed") | {"height": args.size[0], "width": args.size[1]}


def prepared(images: Tensor) -> Tensor:
    """Images as the network takes them."""
    return to_float(images).contiguous(memory_format=torch.channels_last)


def load_photographs(folder: str | None, count: int) -> list[Image.Image]:
    if folder is not None:
        photographs = [Image.open(path).convert("RGB") for path in find_images(Path(folder))[:count]]
        if not photographs:
            raise InputError(f"{folder}: no image in it")
        return (photographs * count)[:count]
    from skimage import data

    photographs = [Image.fromarray(getattr(data, name)()).convert("RGB") for name in ("brick", "grass", "gravel")]
    return (photographs * count)[:count]


def write_files(photographs: list[Image.Image], folder: Path, size: tuple[int, int]) -> list[Path]:
    """PNG files of the photographs at (H, W), each its own section."""
    random, paths = np.random.default_rng(0), []
    for number, photograph in enumerate(photographs):
        left, top = random.integers(photograph.width // 4), random.integers(photograph.height // 4)
        box = (left, top, left + photograph.width * 3 // 4, top + photograph.height * 3 // 4)
        paths.append(folder / f"{number:04}.png")
        photograph.resize(size[::-1], Image.Resampling.BICUBIC, box).save(paths[-1])
    return paths


def commit() -> str:
    git = ["git", "-C", str(ROOT)]
    name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    return name + ("-dirty" if changed else "")


def append(row: dict, path: Path) -> None:
    import pandas

    rows = pandas.DataFrame([row])
    if path.exists():
        rows = pandas.concat([pandas.read_csv(path, dtype=str), rows])
    path.parent.mkdir(parents=True, exist_ok=True)
    rows.to_csv(path, index=False)


if __name__ == "__main__":
    options.run_script(main, get_parser())
