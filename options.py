"""The flags that two or more scripts share, their types, and what a script does with an error.

Owns how the command line looks and the exit codes: 0 done, 1 failed (one line on stderr), 2 wrong usage, 130 / 143
interrupted. Draws nothing, reads no image.
"""

import argparse
import ctypes
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

import cache
import ranks
from cutpaste import VARIANTS
from dataset import InputError
from density import DENSITIES
from localization import LOCATIONS
from model import LEVELS, NORMALIZATIONS, WeightsError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


def new_parser(description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """A parser that shows defaults and takes no shortened flags (``--epoch`` for ``--epochs`` hides a mistake)."""
    return argparse.ArgumentParser(description=description, epilog=epilog, allow_abbrev=False)


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data_dir", default="Data", metavar="DIR", help="folder of the categories (default: Data)")
    parser.add_argument(
        "--type",
        type=names,
        default=["all"],
        metavar="NAMES",
        help="categories, separated by commas, or 'all' (default)",
    )
    parser.add_argument(
        "--model_dir", default="models", metavar="DIR", help="folder of the detectors (default: models)"
    )
    parser.add_argument("--cuda", type=zero_or_one, default=False, metavar="0|1", help="use the GPU (default: 0)")
    parser.add_argument(
        "--workers",
        type=whole(0),
        default=min(8, os.cpu_count() or 1),
        metavar="N",
        help="threads that decode images; 0: none beside the main one (default: one per core, 8 at most)",
    )
    parser.add_argument(
        "--cache_dir",
        metavar="DIR|none",
        help="folder of decoded images; none: keep none (default: $XDG_CACHE_HOME/cutpaste or ~/.cache/cutpaste)",
    )
    parser.add_argument(
        "--memory_gb",
        type=number(0, 1e6),
        default=4.0,
        metavar="GB",
        help="decoded images that are held in memory; a larger folder is read from a file as needed (default: 4)",
    )


def add_network_flags(parser: argparse.ArgumentParser, defaults: dict | None) -> None:
    """What makes up the network. defaults None: each flag is None unless given, to be held against the detector."""

    def add(flag: str, help: str, **kwargs) -> None:
        default = None if defaults is None else defaults[flag]
        note = "must agree with the detector, if given" if defaults is None else "default: %(default)s"
        parser.add_argument(f"--{flag}", default=default, help=f"{help} ({note})", **kwargs)

    add("variant", "augmentation that normal images are told from", choices=tuple(VARIANTS))
    add("head_layer", "layers of 512 in the projection head", type=whole(0), metavar="N")
    add("size", "image size, a side or WIDTHxHEIGHT, in pixels", type=size, metavar="S|WxH")
    add("normalize", "input normalisation: ImageNet's statistics, or each image's own", choices=NORMALIZATIONS)


def add_density_flags(parser: argparse.ArgumentParser, density: str | None, l2: str) -> None:
    """density: its default; None keeps the detector's own unless given. l2: what --help says of its default (None)."""
    again = "; given: fit it anew to train/good" if density is None else ""
    shown = density or "the detector's own"
    parser.add_argument(
        "--density", choices=tuple(DENSITIES), default=density, help=f"density{again} (default: {shown})"
    )
    parser.add_argument(
        "--l2", type=zero_or_one, metavar="0|1", help=f"bring embeddings to length 1 first{again} (default: {l2})"
    )


def add_map_flags(parser: argparse.ArgumentParser, defaults: dict) -> None:
    """How a patch model makes its maps. Every flag is None unless given; defaults: what --help says of each."""

    def add(flag: str, help: str, **kwargs) -> None:
        parser.add_argument(f"--{flag}", help=f"patch models: {help} ({defaults[flag]})", **kwargs)

    add("window", "side of the windows that are scored", type=whole(8), metavar="P")
    add("stride", "pixels between them", type=whole(1), metavar="P")
    add("level", "stage of the network whose features are embedded", type=int, choices=LEVELS)
    add("dense", "run the network once per image, 0: for each window alone", type=zero_or_one, metavar="0|1")
    add("location", "one Gaussian for all locations, or one for each", choices=LOCATIONS)
    add(
        "sigma", "of the Gaussian that brings scores to the image's size, in pixels", type=number(0.1, 1e3), metavar="P"
    )


# Types ------------------------------------------------------------------------------------------------------------


def names(text: str) -> list[str]:
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found or any("/" in name or "\\" in name or name in (".", "..") for name in found):
        raise argparse.ArgumentTypeError(f"{text!r}: names of categories, separated by commas")
    return found


def category(text: str) -> str:
    """One name that --type can later ask for."""
    if names(text) != [text] or text == "all":
        raise argparse.ArgumentTypeError(f"{text!r}: the name of one category, without commas or slashes, not 'all'")
    return text


def zero_or_one(text: str) -> bool:
    if text not in ("0", "1"):
        raise argparse.ArgumentTypeError(f"{text!r}: 0 or 1")
    return text == "1"


def size(text: str) -> tuple[int, int]:
    """'256' -> (256, 256); '256x192' (width x height, as pictures are named) -> (H, W) = (192, 256)."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: a side such as 256, or WIDTHxHEIGHT such as 256x192")
    width, height = int(parts[0]), int(parts[-1])
    if not (32 <= width <= 4096 and 32 <= height <= 4096):
        raise argparse.ArgumentTypeError(f"{text!r}: each side lies in 32..4096 pixels")
    return height, width


def whole(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r}: a whole number, at least {least}")
        return value

    return parse


def number(least: float, most: float) -> Callable[[str], float]:
    """A float from ``least`` to ``most``."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r}: a number from {least:g} to {most:g}")
        return value

    return parse


# Running ----------------------------------------------------------------------------------------------------------


def choose_device(cuda: bool, local: int = 0) -> torch.device:
    """The device of ``--cuda``: GPU number ``local`` of this machine. Raises InputError if it is not there."""
    if not cuda:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError("--cuda 1: torch sees no CUDA device on this machine; use --cuda 0")
    if local >= torch.cuda.device_count():
        raise InputError(
            f"--cuda 1: rank {local} of this machine needs a GPU of its own; give torchrun fewer processes"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def storage(args: argparse.Namespace) -> cache.Storage:
    """Where decoded images live, by ``--cache_dir`` and ``--memory_gb``."""
    if args.cache_dir is None:
        folder = cache.default_folder()
    else:
        folder = None if args.cache_dir == "none" else Path(args.cache_dir)
    return cache.Storage(folder, args.memory_gb * 1e9)


def command_line() -> str:
    """The command as typed, without the path of the interpreter."""
    import shlex

    return "python " + shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])


def folder_name(path: str) -> str:
    """The name of a folder as typed: results and logs of models in ``runs/a/`` go to ``Eval/a``, ``logdirs/a``."""
    return os.path.basename(os.path.abspath(path))


def say(text: str) -> None:
    """A message for the person at the shell: stderr, past any progress bar. stdout is for data."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)


@ranks.ending()
def run_script(main: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser) -> None:
    """Parse, run, and turn a user's mistake into one line and exit code 1. A bug keeps its traceback."""
    args = parser.parse_args()
    keep_memory()
    try:
        main(args)
        sys.stdout.flush()
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))  # flags that contradict each other: exit code 2
    except (InputError, WeightsError, ranks.RankError) as error:
        fail(parser.prog, str(error))
    except torch.cuda.OutOfMemoryError:
        fail(parser.prog, "the GPU's memory is full; lower --batch_size or --size")
    except BrokenPipeError:  # the reader of stdout went away (| head): nothing more to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        fail(parser.prog, f"{name}{error.strerror or error}")
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        sys.exit(130)


def keep_memory() -> None:
    """Have the C library keep freed memory for the next step. A network's activations are allocated anew at each step;
    pages that went back to the system cost a fault each, about a third of a step's time at 256 px. Only glibc can."""
    with suppress(OSError, AttributeError, TypeError):  # the last: Windows
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def fail(prog: str, message: str) -> None:
    print(f"{prog}: error: {message}", file=sys.stderr)
    sys.exit(1)
