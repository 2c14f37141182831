"""The processes that torchrun starts: which rank this one is, which items are its own, and how the ranks communicate.

Owns everything about torch.distributed. Without torchrun there is one process, rank 0 of 1, and nothing is set up.
"""

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, nn

from runtime.files import InputError

T = TypeVar("T")
_groups: list = []  # process groups of the past: never freed, see ``ending``
TIMEOUT = timedelta(days=7)  # one category may take hours longer than another; torchrun notices a dead rank itself


class RankError(InputError):
    """Another rank died while this one waited for it."""


@dataclass(frozen=True)
class Ranks:
    """This process among the ``world_size`` that torchrun has started.

    rank: 0 ... world_size - 1. local_rank: its number on its own machine, and that of its GPU. restarts: how often
    torchrun has restarted this machine's ranks because one of them died. machines: how many the ranks are on.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    restarts: int = 0
    machines: int = 1

    @property
    def is_main(self) -> bool:
        """Return whether this rank writes what is written once: stdout, tables, the files of a joint training."""
        return self.rank == 0

    @property
    def rows(self) -> slice:
        """Return this rank's rows of a batch: every ``world_size``-th, from the ``rank``-th on."""
        return slice(self.rank, None, self.world_size)

    def shard(self, items: Sequence[T]) -> list[T]:
        """Return this rank's items: every ``world_size``-th, from the ``rank``-th on. Give all ranks the same items,
        finished ones too, or two ranks may take the same one."""
        return list(items[self.rows])

    @contextmanager
    def joined(self, cuda: bool) -> Iterator[None]:
        """Let the ranks communicate within it: by Gloo for CPU tensors and objects, by NCCL for CUDA tensors if
        ``cuda``. Raises RankError if another rank dies meanwhile."""
        if self.world_size == 1:
            yield
            return
        from torch import distributed

        try:
            store, _, _ = next(distributed.rendezvous("env://"))
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                # torchrun keeps this store when it restarts the ranks; the old keys in it lead to dead processes
                store = distributed.PrefixStore(f"restart {self.restarts}", store)
            backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
            distributed.init_process_group(
                backend, timeout=TIMEOUT, world_size=self.world_size, rank=self.rank, store=store
            )
            yield
        except RuntimeError as error:  # torch does not raise DistError for all of them
            if not isinstance(error, distributed.DistError) and not any(
                backend in str(error) for backend in ("gloo", "NCCL")
            ):
                raise
            message = f"rank {self.rank} of {self.world_size} lost another rank; its own message says why"
            raise RankError(message) from error
        finally:
            if distributed.is_initialized():
                _groups.append(distributed.group.WORLD)
                distributed.destroy_process_group()

    def gather(self, value: T) -> list[T] | None:
        """Return the values of all ranks by rank, on rank 0; None on the others."""
        if self.world_size == 1:
            return [value]
        from torch import distributed

        values = [None] * self.world_size if self.is_main else None
        distributed.gather_object(value, values)
        return values

    def broadcast(self, make: Callable[[], T]) -> T:
        """Call ``make()`` on rank 0 and return its result on all ranks."""
        if self.world_size == 1:
            return make()
        from torch import distributed

        values = [make() if self.is_main else None]
        distributed.broadcast_object_list(values)
        return values[0]

    def all_reduce_max(self, value: int) -> int:
        """Return the largest of the ranks' integers, on all of them. Reduced on the CPU: no GPU is waited for."""
        if self.world_size == 1:
            return value
        from torch import distributed

        number = torch.tensor(value)
        distributed.all_reduce(number, distributed.ReduceOp.MAX)
        return int(number)

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        """Return the sum of the ranks' tensors, on all of them; ``value`` is left as it was."""
        if self.world_size > 1:
            from torch import distributed

            value = value.clone()
            distributed.all_reduce(value)
        return value


def from_environment() -> Ranks:
    """Return the rank that torchrun's environment variables name; without torchrun, rank 0 of 1."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return Ranks()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT", "GROUP_WORLD_SIZE")
    return Ranks(*(int(os.environ[name]) for name in names))


@contextmanager
def ending() -> Iterator[None]:
    """Wrap a script's main function: a rank that was in a process group then ends by ``os._exit``, with the exit code
    it would have had anyway and the traceback of a bug. Any other process ends as usual.

    Why: after ``destroy_process_group`` Gloo's threads may still free tensors, which takes the GIL. If that happens
    while the interpreter finalizes, the process aborts. If it happens while the group itself is freed, the process
    deadlocks: the thread waits for the GIL, and its holder waits for the thread (torch 2.6). So ``_groups`` keeps the
    groups alive and the interpreter is not finalized.
    """
    code = 0
    try:
        yield
    except BaseException as error:
        if not _groups:
            raise
        code = error.code or 0 if isinstance(error, SystemExit) else 1
        if not isinstance(error, SystemExit):
            traceback.print_exc()
    if _groups:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)


# One network over all ranks ---------------------------------------------------------------------------------------


class _Sum(torch.autograd.Function):
    """Sum the ranks' tensors, on all of them; the gradient is the sum of theirs. (torch.distributed.nn.functional
    has the same, deprecated and, under torch.compile, refused.)"""

    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        from torch import distributed

        value = value.clone()
        distributed.all_reduce(value)
        return value

    backward = forward


class SyncedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalization with the statistics of all ranks' batches, for the CPU: torch's SyncBatchNorm needs GPUs."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        x = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
        axes = [axis for axis in range(x.ndim) if axis != 1]
        count = _Sum.apply(torch.tensor(float(x.numel() // x.shape[1]), dtype=x.dtype))
        mean = _Sum.apply(x.sum(axes)) / count
        shape = [1, -1] + [1] * (x.ndim - 2)
        x = x - mean.view(shape)
        variance = _Sum.apply(x.square().sum(axes)) / count  # of centered values: nothing cancels
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            unbiased = variance * (count / (count - 1))
            self.running_var.lerp_(unbiased.to(self.running_var), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        return (x * scale.view(shape) + self.bias.view(shape)).to(input.dtype)


def sync_batch_norm(network: nn.Module, cuda: bool) -> nn.Module:
    """Return the network with batch normalization over all ranks; weights, buffers and their names stay the same."""
    if cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    for name, module in list(network.named_children()):
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            synced = SyncedBatchNorm(module.num_features, module.eps, module.momentum)
            synced.weight, synced.bias = module.weight, module.bias
            for buffer, value in module.named_buffers():
                setattr(synced, buffer, value)
            setattr(network, name, synced.train(module.training))
        else:
            sync_batch_norm(module, cuda)
    return network


def data_parallel(network: nn.Module, ranks: Ranks, cuda: bool) -> nn.Module:
    """Return the network as DistributedDataParallel, which averages the gradients of all ranks, of the parameters that
    require gradients now: call this anew after freezing or unfreezing some."""
    import inspect

    from torch.nn.parallel import DistributedDataParallel

    # Buffers need no broadcast: sync_batch_norm keeps them equal. Torch 2.13 has renamed the argument that says so
    names = inspect.signature(DistributedDataParallel).parameters
    argument = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    return DistributedDataParallel(network, device_ids=[ranks.local_rank] if cuda else None, **{argument: False})
