"""The processes that torchrun starts: which one this is, what falls to it, and how they agree.

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

T = TypeVar("T")
_groups: list = []  # that this process was in, kept until it ends: see ``ending``
PATIENCE = timedelta(days=7)  # one category may take hours longer than another; torchrun notices a dead rank itself


class RankError(RuntimeError):
    """Another rank went away while this one waited for it."""


@dataclass(frozen=True)
class Ranks:
    """This process among ``count``. local: its number on its own machine, that of its GPU. restarts: how often
    torchrun has started the ranks of this machine anew because one of them died. machines: how many there are."""

    rank: int = 0
    count: int = 1
    local: int = 0
    restarts: int = 0
    machines: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes what is written once: stdout, tables, the files of a joint training."""
        return self.rank == 0

    @property
    def part(self) -> slice:
        """Every ``count``-th item, from the ``rank``-th on: what falls to this rank."""
        return slice(self.rank, None, self.count)

    @contextmanager
    def joined(self, cuda: bool) -> Iterator[None]:
        """Within it the ranks can talk to each other; a rank that goes away becomes a RankError in the others."""
        if self.count == 1:
            yield
            return
        from torch import distributed

        try:
            store, _, _ = next(distributed.rendezvous("env://"))
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                # torchrun keeps this store when it restarts the ranks: under the old names they find dead addresses
                store = distributed.PrefixStore(f"start {self.restarts}", store)
            kinds = "cpu:gloo,cuda:nccl" if cuda else "gloo"
            distributed.init_process_group(kinds, timeout=PATIENCE, world_size=self.count, rank=self.rank, store=store)
            yield
        except RuntimeError as error:  # torch has no error of its own for all of them
            if not isinstance(error, distributed.DistError) and not any(
                kind in str(error) for kind in ("gloo", "NCCL")
            ):
                raise
            raise RankError(f"rank {self.rank} of {self.count} lost another rank; its own message says why") from error
        finally:
            if distributed.is_initialized():
                _groups.append(distributed.group.WORLD)
                distributed.destroy_process_group()

    def gather(self, value: T) -> list[T] | None:
        """The values of all ranks, in their order, on the first; None on the others."""
        if self.count == 1:
            return [value]
        from torch import distributed

        values = [None] * self.count if self.first else None
        distributed.gather_object(value, values)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """What ``make()`` gives on the first rank, on all of them."""
        if self.count == 1:
            return make()
        from torch import distributed

        values = [make() if self.first else None]
        distributed.broadcast_object_list(values)
        return values[0]

    def largest(self, value: int) -> int:
        """The largest of the ranks' whole numbers. Goes from processor to processor: no GPU is waited for."""
        if self.count == 1:
            return value
        from torch import distributed

        number = torch.tensor(value)
        distributed.all_reduce(number, distributed.ReduceOp.MAX)
        return int(number)

    def sum(self, value: Tensor) -> Tensor:
        """The sum of the ranks' tensors, on all of them."""
        if self.count > 1:
            from torch import distributed

            value = value.clone()
            distributed.all_reduce(value)
        return value


def from_environment() -> Ranks:
    """As torchrun says, else alone."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return Ranks()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT", "GROUP_WORLD_SIZE")
    return Ranks(*(int(os.environ[name]) for name in names))


@contextmanager
def ending() -> Iterator[None]:
    """Around all that a script does. A process that was in a group ends here, with the exit code it would have had, as
    multiprocessing ends its own: at once, the interpreter not taken down.

    After an operation Gloo's threads still free its tensors, for which they need Python. One that does so while the
    interpreter goes aborts the process; one that does so while the group is freed waits for the thread that waits for
    it (torch 2.6). So the group is kept, and nothing is taken down.
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


def share(items: Sequence[T], ranks: Ranks) -> list[T]:
    """The items that fall to this rank; the same whatever is finished already, so that no two ranks take one."""
    return list(items[ranks.part])


# One network over all ranks ---------------------------------------------------------------------------------------


class _Sum(torch.autograd.Function):
    """The sum of the ranks' tensors, on all of them; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        from torch import distributed

        value = value.clone()
        distributed.all_reduce(value)
        return value

    backward = forward


class SyncedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation over the batches of all ranks, as torch's SyncBatchNorm, which works on GPUs only."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        x = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
        over = [axis for axis in range(x.ndim) if axis != 1]
        count = torch.tensor(float(x.numel() // x.shape[1]), dtype=x.dtype)
        count = _Sum.apply(count)
        mean = _Sum.apply(x.sum(over)) / count
        shape = [1, -1] + [1] * (x.ndim - 2)
        x = x - mean.view(shape)
        variance = _Sum.apply(x.square().sum(over)) / count  # of what is centred already: nothing cancels
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            unbiased = variance * (count / (count - 1))
            self.running_var.lerp_(unbiased.to(self.running_var), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        return (x * scale.view(shape) + self.bias.view(shape)).to(input.dtype)


def synchronised(network: nn.Module, cuda: bool) -> nn.Module:
    """The network with its batch normalisation over all ranks; weights, their names and buffers stay the same."""
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
            synchronised(module, cuda)
    return network


def wrapped(network: nn.Module, ranks: Ranks, cuda: bool) -> nn.Module:
    """The network with the gradients of all ranks averaged. Only weights that are trained now are: wrap it anew when
    others are."""
    import inspect

    from torch.nn.parallel import DistributedDataParallel

    # The ranks' running statistics are equal as it is. Torch 2.13 has renamed the argument that says so
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(network, device_ids=[ranks.local] if cuda else None, **{buffers: False})
