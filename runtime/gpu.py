"""Keep a GPU from waiting for Python: pinned copies, compiled functions, work that is recorded and replayed."""

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
SETTLING = 3  # calls before a recording, in which libraries and compilers choose their kernels


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the CPU on the device. A GPU copies it from pinned memory, which the host does not wait
    for."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def issued_ahead(items: Iterable[T], device: torch.device) -> Iterator[T]:
    """Yield the items; on a GPU each after the next one was taken. What makes the items then issues the work of the
    next one before the host reads, and so waits for, the results of this one."""
    waiting = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > (device.type == "cuda"):
            yield waiting.popleft()
    yield from waiting


@functools.cache
def can_compile(device: torch.device) -> bool:
    """Return whether torch.compile makes kernels for that GPU on this machine. It needs Triton and a C compiler that
    finds Python's headers, and each of them may be missing in a way of its own: so it is tried, once, in a few
    seconds."""
    try:
        torch.compile(lambda x: x + 1, fullgraph=True, dynamic=False)(torch.zeros(8, device=device))
    except Exception:
        return False
    return True


class Recorded:
    """Work on tensors of fixed shapes that a GPU does again and again: recorded once, then replayed by one launch.

    The first SETTLING calls run it as it is, the next one records it (a CUDA graph); those that follow replay what was
    recorded. Whatever the work reads beside its inputs (weights, images) has to stay where it is on the device, what it
    changes (weights, the optimizer's state) is changed in place, and no value of it may reach the host.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor] = []
        self.result: Tensor | None = None

    def __call__(self, work: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Return work(*inputs) of inputs on the CPU, brought to the device by one pinned copy each. The work is given
        here and not kept, for it holds what holds this object: the memory goes when that does, not with a later
        collection."""
        here = torch.cuda.current_stream(self.device)
        self.inputs = self.inputs or [torch.empty_like(x, device=self.device) for x in inputs]
        for held, x in zip(self.inputs, inputs, strict=True):
            held.copy_(x.pin_memory(), non_blocking=True)
        if self.graph is None and self.calls < SETTLING:
            self.calls += 1
            self.stream.wait_stream(here)
            with torch.cuda.stream(self.stream):  # that of the recording: autograd remembers it with the weights
                result = work(*self.inputs)
            here.wait_stream(self.stream)
            return result
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                self.result = work(*self.inputs)  # recorded, not run
        self.graph.replay()
        return self.result.clone()  # which the next replay overwrites
