"""A script in a process of its own that has not to import torch once more: a fork of a server that has.

Own process id, arguments, environment, working folder, standard streams and signals, as with ``python FILE``. What the
libraries take to import, seconds for each process, is spent once. The interpreter ends without running its finalizers.

``HAS_BF16=0 make test`` runs the suite as on a processor without bfloat16 in hardware, ``HAS_BF16=1 make test`` as on
one with it: here, because the tests' process and every forked script import this module before they ask torch.
"""

import gc
import multiprocessing
import os
import runpy
import sys
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path

import torch

os.environ["OMP_NUM_THREADS"] = "1"  # of the server too
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["torch._dynamo", "torchvision", "torch.utils.tensorboard", "seaborn", "sklearn.manifold"]
)
HAS_BF16 = os.environ.get("HAS_BF16") or None
if HAS_BF16 is not None:
    for name in ("amx_tile", "avx512_bf16"):
        setattr(torch.cpu, f"_is_{name}_supported", lambda: HAS_BF16 == "1")


def rarely_collected() -> None:
    """Look for garbage more rarely, and not among what is there already: that of libraries is large."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


class Forked:
    """A script that has been started, with what the tests use of subprocess.Popen."""

    def __init__(self, *command: object, cwd: Path | None = None, preexec: Callable | None = None, **env: str) -> None:
        self.stdout, self.stderr = (tempfile.NamedTemporaryFile("r") for _ in range(2))  # noqa: SIM115
        streams = self.stdout.name, self.stderr.name
        words = [str(word) for word in command]
        self.process = SERVER.Process(
            target=_work, args=(words, streams, cwd or os.getcwd(), preexec, {**os.environ, **env})
        )
        self.process.start()
        weakref.finalize(self, _kill, self.process)  # a test that fails leaves none running
        self.pid, self.kill, self.terminate = self.process.pid, self.process.kill, self.process.terminate

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float = 300) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.kill()
            raise TimeoutError(f"not done after {timeout} seconds: {self.stderr.read()}")
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        self.wait(timeout)
        return self.stdout.read(), self.stderr.read()

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode


def _kill(process: multiprocessing.Process) -> None:
    """Kill it if it runs: one that has ended has given back its number, which a thread of the tests may have by now."""
    if process.is_alive():
        process.kill()


def _work(words: list[str], streams: tuple[str, str], cwd: Path | str, preexec: Callable | None, env: dict) -> None:
    """In the new process."""
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(Path(words[0]).parent), *(p for p in sys.path if Path(p).resolve() not in (here, here.parent))]
    sys.argv = words
    multiprocessing.set_start_method(None, force=True)
    torch.set_num_threads(1)
    rarely_collected()
    if preexec is not None:
        preexec()
    runpy.run_path(words[0], run_name="__main__")
