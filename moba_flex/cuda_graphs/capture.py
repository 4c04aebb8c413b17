"""One CUDA graph: a function captured on a stream of its own, into a pool of memory that other graphs of the caller's stream may share;
and how far a GPU is behind its host.

`torch.cuda.graph` would wait for the GPU, collect garbage and empty PyTorch's cache, which nobody expects of a call of attention. Here
nothing waits, and whatever happens within a capture, PyTorch and CUDA are in order afterwards.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache

import torch
from torch import Tensor

from ..core.allocation import allocate_persistent
from ..core.upstream import release_broken_pool

Function = Callable[..., tuple[Tensor, ...]]


class CudaPool:
    """A private pool of PyTorch's allocator. It lives as long as its graphs: no handle may be used again when the last of them is gone."""

    def __init__(self) -> None:
        if "PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ:
            raise RuntimeError("with PYTORCH_NO_CUDA_MEMORY_CACHING memory is freed at once, which CUDA forbids within a capture")
        self.handle, self.usable, self.n_bytes = torch.cuda.graph_pool_handle(), True, 0

    def look(self) -> set[int]:
        """The addresses that are in use; `n_bytes` becomes what the pool has of the GPU's memory."""
        self.n_bytes, in_use = 0, set()
        for segment in torch.cuda.memory_snapshot(self.handle, include_traces=False):
            self.n_bytes += segment["total_size"]
            address = segment["address"]
            for block in segment["blocks"]:
                if block["state"] == "active_allocated":
                    in_use.add(address)
                address += block["size"]
        return in_use


@cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


# Captures that CUDA ended: PyTorch's allocator of pinned memory keeps pointers to them.
_broken: list[torch.cuda.CUDAGraph] = []


class CudaGraph:
    """A function of tensors on the current GPU, captured: `replay` computes `outputs` from the contents of `inputs`, on the current stream.

    Whatever the function compiles, loads or keeps for later has to be there before. Raises RuntimeError, or what the function raises, if
    there is no graph.
    """

    def __init__(self, function: Function, inputs: tuple[Tensor | None, ...], pool: CudaPool | None) -> None:
        self.pool = pool or CudaPool()
        self._device = torch.cuda.current_device()
        self._graph, self._used = torch.cuda.CUDAGraph(), torch.cuda.Event()
        before = self.pool.look()
        caller, stream = torch.cuda.current_stream(), _capture_stream(self._device)
        stream.wait_stream(caller)  # PyTorch 2.11 resets what its graphs with random numbers read: between those of the caller
        with torch.cuda.stream(stream), _without_collection():
            try:
                with torch.inference_mode(False):  # what PyTorch makes for its random numbers serves all graphs to come
                    # Other threads may allocate meanwhile or ask for an event, as NCCL's watchdog does; only wait for the GPU they may not.
                    self._graph.capture_begin(pool=self.pool.handle, capture_error_mode="thread_local")
                self.outputs = function(*inputs)
                self._graph.capture_end()
            except BaseException:  # an interrupt too must not leave a capture open
                self._abandon()
                raise
        caller.wait_stream(stream)
        if self.pool.look() - before != {x.untyped_storage().data_ptr() for x in self.outputs if x.numel()}:
            self._graph.reset()
            raise RuntimeError("its memory is not the graph's own, as within torch.cuda.use_mem_pool or PyTorch's own CUDA graphs")

    def replay(self) -> None:
        self._graph.replay()

    def used(self) -> None:
        self._used.record()

    def release(self) -> None:
        """Give everything back, even while the GPU is at it."""
        # Blocks of the pool count as used on the stream of the capture alone, and expandable segments wait for no other when they are
        # unmapped. Let it come after the last replay.
        _capture_stream(self._device).wait_event(self._used)
        self._graph.reset()

    def _abandon(self) -> None:
        try:
            self._graph.capture_end()
        except RuntimeError:  # CUDA had ended it, and PyTorch stops before it has put its own things in order
            self.pool.usable = False
            _broken.append(self._graph)
            with suppress(RuntimeError):  # nothing is left to do if this raises
                release_broken_pool(self._device, self.pool.handle)
            with suppress(RuntimeError):  # the random numbers of PyTorch 2.11 stay within a capture until another one has ended well
                well, number = torch.cuda.CUDAGraph(), torch.empty(1, device=self._device)
                well.capture_begin(capture_error_mode="thread_local")
                number.zero_()
                well.capture_end()
        self._graph.reset()


@contextmanager
def _without_collection() -> Iterator[None]:
    """No garbage is collected meanwhile: whatever a finalizer launched would become part of the graph."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


class CudaMarks:
    """Marks on the current stream: numbers that the GPU copies to the host's memory as it comes to them. To read one asks CUDA for nothing.

    An event would tell as much. But while another thread captures a graph in PyTorch's default mode, to ask for one is an error, which
    also ends that capture.
    """

    _COUNT = 256  # then numbers begin again: a host that is as many marks ahead looks as if it were not

    def __init__(self) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        self._numbers = allocate_persistent(lambda: torch.arange(self._COUNT, device=device), device).unbind()
        self._reached = allocate_persistent(lambda: torch.zeros((), dtype=torch.int64, pin_memory=True), device)
        self._made = 0

    @property
    def behind(self) -> int:
        return (self._made - int(self._reached.item())) % self._COUNT

    def mark(self) -> None:
        self._made = (self._made + 1) % self._COUNT
        self._reached.copy_(self._numbers[self._made], non_blocking=True)
