"""One CUDA graph, captured on a dedicated stream into a memory pool that other graphs of the caller's stream may share. Also measures how
far a GPU is behind its host.

`torch.cuda.graph` would synchronize the GPU, collect garbage and empty PyTorch's cache, which nobody expects of an attention call. Here
nothing synchronizes, and PyTorch and CUDA are in a valid state after any failure during a capture.
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
from ..ops import kernels

Function = Callable[..., tuple[Tensor, ...]]


class CudaPool:
    """A private pool of PyTorch's allocator. It lives as long as its graphs: a handle must not be reused once the last of them is gone."""

    def __init__(self) -> None:
        if "PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ:
            raise RuntimeError("with PYTORCH_NO_CUDA_MEMORY_CACHING memory is freed at once, which CUDA forbids within a capture")
        self.handle, self.usable, self.n_bytes = torch.cuda.graph_pool_handle(), True, 0

    def look(self) -> set[int]:
        """The addresses in use. Sets `n_bytes` to the GPU memory that the pool holds."""
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


# Captures that CUDA invalidated, kept alive since PyTorch's pinned-memory allocator keeps pointers to them.
_broken: list[torch.cuda.CUDAGraph] = []


class CudaGraph:
    """A captured function of tensors on the current GPU: `replay` computes `outputs` from the contents of `inputs`, on the current stream.

    Everything that the function compiles, loads or caches must exist before. Raises RuntimeError, or what the function raises, if the
    capture fails.
    """

    def __init__(self, function: Function, inputs: tuple[Tensor | None, ...], pool: CudaPool | None) -> None:
        self.pool = pool or CudaPool()
        self._device = torch.cuda.current_device()
        self._graph, self._used = torch.cuda.CUDAGraph(), torch.cuda.Event()
        before = self.pool.look()
        caller, stream = torch.cuda.current_stream(), _capture_stream(self._device)
        stream.wait_stream(caller)  # PyTorch 2.11 resets RNG state that other graphs of the caller read: keep it in order
        with torch.cuda.stream(stream), _without_collection():
            try:
                with torch.inference_mode(False):  # RNG state that PyTorch allocates here is shared by all later graphs
                    # Other threads may allocate or query events meanwhile, as NCCL's watchdog does, but not synchronize the GPU.
                    self._graph.capture_begin(pool=self.pool.handle, capture_error_mode="thread_local")
                self.outputs = function(*inputs)
                self._graph.capture_end()
            except BaseException:  # even an interrupt must not leave a capture open
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
        """Free the graph and its memory, even while the GPU runs it."""
        # PyTorch knows the pool's blocks as used on the capture stream only, and unmapping expandable segments waits for no other stream.
        # The capture stream must therefore wait for the last replay.
        _capture_stream(self._device).wait_event(self._used)
        self._graph.reset()

    def _abandon(self) -> None:
        try:
            self._graph.capture_end()
        except RuntimeError:  # CUDA had invalidated it, and PyTorch raises before its own cleanup
            self.pool.usable = False
            _broken.append(self._graph)
            with suppress(RuntimeError):  # nothing else can be done if this raises
                release_broken_pool(self._device, self.pool.handle)
            with suppress(RuntimeError):  # RNG state of PyTorch 2.11 stays in capture mode until another capture succeeds
                well, number = torch.cuda.CUDAGraph(), torch.empty(1, device=self._device)
                well.capture_begin(capture_error_mode="thread_local")
                number.zero_()
                well.capture_end()
        self._graph.reset()


@contextmanager
def _without_collection() -> Iterator[None]:
    """Disables garbage collection: work launched by a finalizer would become part of the graph."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


class CudaMarks:
    """Markers on the current stream: numbers that the GPU writes to host memory when it reaches them. Reading one needs no CUDA call.

    An event would give the same information, but while another thread captures a graph in PyTorch's default mode, querying an event is an
    error, which also invalidates that capture.

    Must not be dropped before the GPU has reached its last marker: PyTorch does not know of these writes, and gives the memory to others.
    """

    _COUNT = 256  # numbers wrap around: a host exactly this many markers ahead looks in sync

    def __init__(self) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        self._reached = allocate_persistent(lambda: torch.zeros((), dtype=torch.int32, pin_memory=True), device)
        self._made = 0

    @property
    def behind(self) -> int:
        return (self._made - int(self._reached.item())) % self._COUNT

    def mark(self) -> None:
        self._made = (self._made + 1) % self._COUNT
        kernels.mark(self._reached, self._made)
