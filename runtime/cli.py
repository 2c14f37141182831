"""The command line and the machine, for every script: types of flags, exit codes, device, precision, signals.

Owns ``Rule``: what a value may be, as a type of argparse and as a check of a value that is there already; and the exit
codes: 0 done, 1 failed (one line on stderr), 2 wrong usage, 130 / 143 interrupted.
"""

import argparse
import ctypes
import difflib
import os
import platform
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from runtime.files import InputError, memory_is_full, shown

if TYPE_CHECKING:
    import torch  # takes seconds: functions that need it import it, so that flags are read without
    from torch.utils.tensorboard import SummaryWriter
    from tqdm import tqdm


LARGEST_SIDE = 4096  # of images, in pixels


@dataclass(frozen=True, eq=False)  # argparse needs a hash
class Rule:
    """Hold what a setting may be. Called with a flag's text, as argparse does, it returns the value."""

    kind: type
    words: str  # "a whole number, at least 2"
    allows: Callable[..., bool] = lambda value: True
    parse: Callable[[str], object] | None = None  # text -> value; default: kind
    choices: Collection[str] = ()  # all that it may be, if they are a few names

    def __call__(self, text: str) -> object:
        try:
            value = (self.parse or self.kind)(text)
        except (ValueError, KeyError):
            value = None
        if not self.holds(value):
            raise argparse.ArgumentTypeError(f"{text!r}: {self.words}")
        return value

    def holds(self, value: object) -> bool:
        kinds = (int, float) if self.kind is float else (self.kind,)
        return type(value) in kinds and self.allows(value)


def int_within(least: int, most: int) -> Rule:
    return Rule(int, f"a whole number from {least} to {most}", lambda value: least <= value <= most)


def int_at_least(least: int) -> Rule:
    return Rule(int, f"a whole number, at least {least}", lambda value: least <= value < 2**63)


def number(least: float, most: float) -> Rule:
    return Rule(float, f"a number from {least:g} to {most:g}", lambda value: least <= value <= most)


def one_of(choices: Collection[str]) -> Rule:
    """Allow the names in a table, which may grow."""
    return Rule(str, f"one of {', '.join(choices)}", lambda value: value in choices, choices=choices)


zero_or_one = Rule(bool, "0 or 1", parse={"0": False, "1": True}.__getitem__)
anything = Rule(str, "text")
html_file = Rule(str, "the name of an .html file", lambda value: value.lower().endswith((".html", ".htm")))


def _parse_size(text: str) -> tuple[int, int]:
    """Read '256' as (256, 256), '256x192' (width x height, as pictures are named) as (H, W) = (192, 256)."""
    width, *height = text.lower().split("x")
    return int(*(height or [width])), int(width)


side = int_within(32, LARGEST_SIDE)
size = Rule(
    tuple,
    f"a side such as 256, or WIDTHxHEIGHT such as 256x192, each in 32..{LARGEST_SIDE} pixels",
    lambda value: all(map(side.holds, value)),
    _parse_size,
)


def new_parser(description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """Return a parser that takes no shortened flags (``--epoch`` for ``--epochs`` hides a mistake) and keeps line
    breaks."""
    kind = argparse.RawDescriptionHelpFormatter
    formatter = lambda prog: kind(prog, max_help_position=30, width=100)  # noqa: E731
    return Parser(description=description, epilog=epilog, allow_abbrev=False, formatter_class=formatter)


class Parser(argparse.ArgumentParser):
    """A parser that tells wrong usage in one line, names the flag that was probably meant, and tells files from folders
    by the metavar: FILE or DIR."""

    def error(self, message: str, flags: Collection[str] = ()) -> NoReturn:
        hint = _did_you_mean(sys.argv[1:], flags or self._option_string_actions)
        self.exit(2, f"{self.prog}: error: {message}{hint} (usage: {self.prog} --help)\n")

    def parse_args(self, args: Sequence[str] | None = None, namespace: None = None) -> argparse.Namespace:
        values, unknown = self.parse_known_args(args, namespace)
        parsers = [self, *(choice for action in self._actions for choice in self._chosen(action, values))]
        actions = {flag: action for parser in parsers for flag, action in parser._option_string_actions.items()}
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}", actions)
        for flag, action in actions.items():
            path, kind = getattr(values, action.dest, None), action.metavar
            if kind == "DIR" and isinstance(path, str) and os.path.isfile(path):
                fail(self.prog, f"{flag} {path}: is a file; a folder is needed")
            if kind == "FILE" and isinstance(path, str) and os.path.isdir(path):
                fail(self.prog, f"{flag} {path}: Is a directory; the name of a file is needed")
        return values

    def _chosen(self, action: argparse.Action, values: argparse.Namespace) -> list[argparse.ArgumentParser]:
        """Return the parser of the command that was given, if the action chooses one."""
        is_command = isinstance(action, argparse._SubParsersAction)
        return [action.choices[getattr(values, action.dest)]] if is_command else []


def _did_you_mean(words: Sequence[str], flags: Collection[str]) -> str:
    """Return which flag was meant by the first of the words that is none of the flags; empty if none is like it."""
    plain = {re.sub("[-_]", "", flag): flag for flag in flags if flag.startswith("--")}
    for flag in (word.partition("=")[0] for word in words if word.startswith("--")):
        if flag not in flags and (close := difflib.get_close_matches(re.sub("[-_]", "", flag.lower()), plain, 1)):
            return f"; did you mean {plain[close[0]]}?"
    return ""


PRECISIONS = {"off": None, "bf16": "bfloat16", "fp16": "float16"}  # what autocast computes in, by torch's names
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


def run_script(main: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser) -> None:
    """Parse, run, and turn a user's mistake into one line and exit code 1. A bug keeps its traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # else not a file
            stream.reconfigure(errors="backslashreplace")  # of cp1252 or ASCII, which lack letters of names
    os.environ["MPLBACKEND"] = "agg"  # figures go to files: no window, no notebook that has started this process
    args = parser.parse_args()
    ending = nullcontext
    if (
        "TORCHELASTIC_RUN_ID" in os.environ
    ):  # of torchrun; without, there are no ranks, and torch takes seconds to import
        from runtime.distributed import ending

    keep_memory()
    with ending(), one_line_errors(parser):
        if getattr(signal.getsignal(signal.SIGINT), "func", None) is _end_imports:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        main(args)
        sys.stdout.flush()


def check_usage(parser: argparse.ArgumentParser, check: Callable[[argparse.Namespace], None] | None = None) -> None:
    """Parse and check, so that wrong usage is told before a script imports what takes seconds. From now on until
    ``run_script`` runs it, Ctrl-C ends the process in one line."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is to be ignored, as after nohup ... &
        signal.signal(signal.SIGINT, partial(_end_imports, parser.prog))
    args = parser.parse_args()
    if check is not None:
        with one_line_errors(parser):
            check(args)


def _end_imports(prog: str, *_: object) -> NoReturn:
    """End the process at once, as a handler of SIGINT while modules are imported: an exception would pass through code
    of theirs, which may catch it or call it a failed import. Nothing has been written by then."""
    os.write(2, f"{prog}: interrupted\n".encode())
    os._exit(130)


@contextmanager
def one_line_errors(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Turn a user's mistake into one line on stderr and an exit code."""
    try:
        yield
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))  # flags that contradict each other: exit code 2
    except InputError as error:
        fail(parser.prog, str(error))
    except BrokenPipeError:  # the reader of stdout went away (| head): nothing more to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        fail(parser.prog, f"{name}{error.strerror or error}")
    except ModuleNotFoundError as error:  # on a computer that has what another task needs
        fail(parser.prog, f"{error.name} is not installed; pip install {error.name.partition('.')[0]}")
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        sys.exit(130)
    except (MemoryError, RuntimeError) as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch.cuda's; torch may not be imported yet
            fail(parser.prog, "the GPU's memory is full; lower --batch_size or --size")
        if not memory_is_full(error):
            raise
        fail(parser.prog, "the memory is full; lower --batch_size, --size, --workers or --memory_gb, or free some")


def fail(prog: str, message: str) -> NoReturn:
    print(f"{prog}: error: {shown(message)}", file=sys.stderr)
    sys.exit(1)


def keep_memory() -> None:
    """Let malloc keep freed memory for the next step: large blocks come from the heap (M_MMAP_MAX 0), which is never
    trimmed (M_TRIM_THRESHOLD). Has no effect without glibc.

    Each training step allocates the activations of the one before again. If they went back to the system in between,
    every page would be faulted in anew: about a third of a step's time at 256 px.
    """
    with suppress(OSError, AttributeError, TypeError):  # the last: Windows
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


class Interrupts:
    """``with Interrupts() as interrupts``: the first SIGINT or SIGTERM only sets ``interrupts.signal`` to its number (0
    before), so that the step in progress finishes and its state can be saved. A second SIGINT raises
    KeyboardInterrupt. The previous handlers come back at the end."""

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


# What does the work -----------------------------------------------------------------------------------------------


def choose_device(cuda: bool, local_rank: int = 0) -> "torch.device":
    """Return the device of ``--cuda``: the CPU, or GPU number ``local_rank``. Raises InputError if it is not there."""
    import torch

    if not cuda:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError("--cuda 1: torch sees no CUDA device on this machine; use --cuda 0")
    if local_rank >= torch.cuda.device_count():
        raise InputError(
            f"--cuda 1: rank {local_rank} of this machine needs a GPU of its own; give torchrun fewer processes"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def suitable_precision(device: "torch.device") -> tuple[str, str]:
    """Return the fastest of PRECISIONS that the hardware computes in, and the reason for it in a few words.

    A GPU: bf16 from compute capability 8 on, fp16 with 7. A CPU: bf16 with AMX or with avx512_bf16; elsewhere it is
    emulated, or has not been measured against float32 (ARM). Else off.
    """
    import torch

    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        chosen = "bf16" if major >= 8 else "fp16" if major == 7 else "off"
        return chosen, f"compute capability {major}.{minor}"
    for name in ("amx_tile", "avx512_bf16"):
        supported = getattr(torch.cpu, f"_is_{name}_supported", lambda name=name: name in _cpuinfo("flags").split())
        if supported() and torch.backends.mkldnn.is_available():  # which has the kernels
            return "bf16", name
    return "off", "neither amx_tile nor avx512_bf16"


def autocast_type(precision: str) -> "torch.dtype | None":
    """Return what autocast computes in by the name of a precision; None for float32."""
    import torch

    return getattr(torch, PRECISIONS[precision]) if PRECISIONS[precision] else None


def device_name(device: "torch.device") -> str:
    """Return the model of the GPU or the processor, for the record."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(field: str) -> str:
    """Return the first value of a field of /proc/cpuinfo; empty if there is none."""
    with suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() == field:
                return value.strip()
    return ""


# For the record ---------------------------------------------------------------------------------------------------


def command_line() -> str:
    """Return the command as typed, without the path of the interpreter."""
    return "python " + shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])


def folder_name(path: str) -> str:
    """Return the last part of a path: results and logs of the models in ``runs/a/`` go to ``Eval/a`` and
    ``logdirs/a``."""
    return os.path.basename(os.path.abspath(path))


# Progress ---------------------------------------------------------------------------------------------------------


class WholeLines:
    """A file for a bar where nobody sees it move, such as a log: on stderr, each of its states is a line of its own."""

    def write(self, text: str) -> None:
        if text.strip():
            sys.stderr.write(text.strip() + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(category: str, step: int, steps: int, shown: bool, unit: str = "step") -> "tqdm":
    """Return a bar on stderr; where that is no terminal, a line every half a minute."""
    from tqdm import tqdm

    pace = {"file": sys.stderr, "mininterval": 0.1}
    if not sys.stderr.isatty():
        pace = {"file": WholeLines(), "mininterval": 30, "maxinterval": 30, "delay": 30}
    return tqdm(total=steps, initial=step, desc=category, unit=unit, disable=not shown, **pace)


@contextmanager
def open_tensorboard(folder: Path, purge_step: int) -> Iterator["SummaryWriter"]:
    """Open TensorBoard's files; entries from ``purge_step`` on, left by a killed run, are hidden.

    It writes in a thread: an error there (a full disk) would print a traceback of its own, and reaches this thread
    without the name of the folder.
    """
    from torch.utils.tensorboard import SummaryWriter

    report = threading.excepthook
    threading.excepthook = lambda error: None if issubclass(error.exc_type, OSError) else report(error)
    try:
        name = str(folder).encode("utf-8", "backslashreplace").decode()  # TensorBoard takes no other bytes
        with SummaryWriter(name, purge_step=purge_step) as writer:
            yield writer
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or str(folder)) from error
    finally:
        threading.excepthook = report
