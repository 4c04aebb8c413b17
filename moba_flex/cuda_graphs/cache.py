"""CUDA graph cache: a small call whose shape recurs is launched as one graph instead of kernel by kernel.

A call is a dozen kernels or more, and up to some thousands of tokens the GPU finishes each before the host has launched the next. The third
call of a shape is therefore captured. From then on, inputs are copied to the graph's buffers, the graph is replayed, and outputs are copied
out: a handful of launches. Nothing is read back to the host, and results are bitwise identical to those of the same kernels without a
graph. A large call is still launched kernel by kernel while the GPU is far behind: launches then cost no time, and the copies are saved.

Why this is safe:
- A graph owns all that it reads or writes: its inputs, its outputs and, through its function, the block layout. A layout that depends on
  padding or packed sequences is an input: its tensors are copied, and values derived from them are computed in the graph.
- Before a capture the function runs on the graph's own inputs. Everything that is compiled, loaded or cached for later calls then exists,
  and the call has its result whether or not the capture succeeds.
- After a capture its memory pool must hold the outputs and nothing more: a tensor cached during the capture would have no contents.
- Graphs are used under one lock, and each graph only on the stream that it was captured for. Work on a stream runs in order, so memory
  may be reused as soon as the host has launched its last use: by the next graph in the pool, or by anyone once a graph is dropped.
"""

from __future__ import annotations

import math
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..core.layout import BlockLayout
from ..core.settings import AttentionSettings
from ..core.validation import check_flag
from .buffers import buffers_like, copy, first_of
from .capture import CudaGraph, CudaMarks, Function

EAGER_CALLS = 2  # of a shape, before it is captured
# Calls with one mask: more than any model has layers. If every step has other sequence lengths, a new shape may never recur. It is
# captured only once it recurs with another mask, or has had more calls than this with one.
MANY_CALLS = 128
MAX_GRAPHS = 16  # per GPU
MAX_SHAPES = 256  # shapes whose calls are counted
# Copying a query of 2,048 tokens, 32 heads and head dimension 128 with key, value and output takes about 27 us, 1 % of a layer of such a
# model. Four calls of this size, with the work between them, keep a GPU busy for longer than the host needs to launch one kernel by kernel.
LARGE_CALL, CALLS_AHEAD = 1 << 23, 4


def set_cuda_graphs(enabled: bool = True) -> bool:
    """Set whether small calls are captured in CUDA graphs, and return the previous setting.

    Graphs are on by default; turning them off frees all graphs. They pay off because the host takes longer to launch a short call than the
    GPU to run it. From the third call with the same shapes, strides, dtype and settings on the same stream, forward and backward passes are
    replayed from a CUDA graph, with bitwise identical results. This applies to bfloat16 and float16 and to tensors of at most 2**25
    elements (8,192 tokens, 32 heads, head dimension 128; half of that in backward passes). It does not apply while you capture a CUDA graph
    yourself, or with `set_flex_backend("flash")`. Calls of 2**23 elements or more run without a graph while the GPU is some calls behind:
    launches then cost no time, and the graph's copies are saved. Packed batches share a graph if they have the same numbers of tokens and
    sequences, padded batches if they have the same numbers of rows and tokens. It is captured once such a batch recurs with another mask,
    or after 128 calls with one mask.

    Graphs cost memory. Each GPU keeps at most the 16 graphs used last, whose inputs, outputs and working memory take at most
    `set_working_memory` bytes in all. An attention call that runs out of memory frees them. Turning graphs off returns their memory to
    PyTorch's cache, from which `torch.cuda.empty_cache()` returns it to the GPU. Turn graphs off if other threads synchronize the GPU, or
    draw random numbers on it, during attention: in the milliseconds of a capture CUDA forbids the former, and PyTorch 2.11 the latter.

    Raises ValueError if `enabled` is not a bool.

    >>> from moba_flex import set_cuda_graphs
    >>> before = set_cuda_graphs(False)
    >>> set_cuda_graphs(before)
    False
    """
    check_flag("enabled", enabled)
    return _graphs.enable(enabled)


def run(function: Function, tensors: tuple[Tensor | None, ...], layout: BlockLayout, settings: AttentionSettings) -> tuple[Tensor, ...]:
    """`function(*tensors, layout, settings)`, from a graph once the shape has recurred often enough. `tensors` must be on the current GPU.

    The caller must have checked that the call can be captured: `moba_flex.backends.paths.capture_obstacle`.
    """
    if not _graphs.enabled:
        return function(*tensors, layout, settings)
    stream = torch.cuda.current_stream()
    place, name = Place(stream.device_index, stream.cuda_stream), (function.__name__, settings)
    if layout.dense:

        def call(*tensors: Any) -> tuple[Tensor, ...]:
            return function(*tensors, layout, settings)

        return _graphs(place, (*name, *signature(tensors)), call, tensors, settings.working_memory)

    # A data-dependent layout is an input too. A graph computes what is derived from it, and holds no other layout than `bare`.
    form, of_layout, bare = layout.cached(("flattened",), layout.flatten)
    n, whole = len(tensors), weakref.ref(layout)

    def call_with_layout(*given: Any) -> tuple[Tensor, ...]:
        there = whole() if given[n] is of_layout[0] else bare.unflatten(form, given[n:])
        return function(*given[:n], there, settings)

    every = (*tensors, *of_layout)
    key = (*name, form, *signature(every))
    return _graphs(place, key, call_with_layout, every, settings.working_memory, mask=of_layout[0])


def cuda_graphs_enabled() -> bool:
    """The current setting, see `set_cuda_graphs`."""
    return _graphs.enabled


def signature(tensors: tuple[Tensor | None, ...]) -> tuple[Hashable, ...]:
    """Everything that a graph depends on, except the settings of the call."""
    modes = torch.is_inference_mode_enabled(), torch.are_deterministic_algorithms_enabled()
    return *modes, *(None if x is None else (x.shape, x.stride(), x.dtype) for x in tensors)


class Place(NamedTuple):
    """Where a graph is replayed."""

    gpu: int
    stream: int


class Pool(Protocol):
    """The memory pool of graphs that are replayed on one stream."""

    @property
    def usable(self) -> bool:
        """Whether another graph may be captured into it."""

    @property
    def n_bytes(self) -> int: ...


class Graph(Protocol):
    """A captured function: `replay` computes `outputs` from the contents of the inputs."""

    @property
    def outputs(self) -> tuple[Tensor, ...]: ...

    @property
    def pool(self) -> Pool: ...

    def replay(self) -> None: ...

    def used(self) -> None:
        """Says that all reads of the last replay's outputs have been launched."""

    def release(self) -> None: ...


# A function, its inputs, and the pool of other graphs of that stream, if any -> the graph, not yet replayed.
# The pool comes from an earlier graph of the same kind.
Capture = Callable[[Function, tuple[Tensor | None, ...], Any], Graph]


class Captured:
    """A graph and the buffers of its inputs."""

    def __init__(self, capture: Capture, function: Function, inputs: tuple[Tensor | None, ...], pool: Pool | None) -> None:
        self.graph = capture(function, inputs, pool)
        self.function, self.inputs = function, inputs  # these keep the layout alive
        self.n_bytes = sum(x.nbytes for x in inputs if x is not None)

    def __call__(self, tensors: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
        outputs = tuple(torch.empty_like(x) for x in self.graph.outputs)
        try:
            copy(tensors, self.inputs)
            self.graph.replay()
            copy(self.graph.outputs, outputs)
        finally:
            self.graph.used()
        return outputs


@dataclass
class Shape:
    """The state of one call shape: its counts, and its graph if captured."""

    calls: int = 0  # without a graph, since the start or since its graph was dropped
    wait: float = EAGER_CALLS
    captured: Captured | None = None
    mask: weakref.ref[Tensor] | None = None  # identifies the mask of its first call, if any
    came_with_other_mask: bool = True  # whether it recurred with another mask; True without masks

    def is_due(self, mask: Tensor | None) -> bool:
        """Counts a call. Returns whether its shape should be captured now."""
        self.calls += 1
        if mask is not None:
            if self.mask is None:
                self.mask, self.came_with_other_mask = weakref.ref(mask), False
            self.came_with_other_mask = self.came_with_other_mask or self.mask() is not mask
        return self.calls > self.wait and (self.came_with_other_mask or self.calls > MANY_CALLS)

    def release(self) -> None:
        if self.captured is not None:
            self.captured.graph.release()
            self.captured = None

    def back_off(self) -> None:
        """Drops the graph and waits twice as many calls as last time: if memory is short, repeated captures cost more than they save."""
        self.release()
        self.calls, self.wait = 0, 2 * self.wait


class Marks(Protocol):
    """Markers on one stream."""

    @property
    def behind(self) -> int:
        """Number of markers that the GPU has not reached."""

    def mark(self) -> None: ...


class GraphCache:
    """The graphs of a process: for each GPU, those used last."""

    def __init__(self, capture: Capture, marks: Callable[[], Marks] = CudaMarks) -> None:
        self.enabled = True
        self._capture, self._new_marks = capture, marks
        self._marks: dict[Place, Marks] = {}  # at the start of large calls
        self._shapes: OrderedDict[tuple[Place, Hashable], Shape] = OrderedDict()  # by place and key, least recently used first
        self._lock = threading.Lock()
        self._warned = False

    def __len__(self) -> int:
        return sum(1 for _ in self._captured())

    @property
    def n_bytes(self) -> int:
        """Bytes held by all graphs."""
        return _n_bytes(list(self._captured()))

    def enable(self, enabled: bool) -> bool:
        """Enable or disable graphs, and return the previous setting. Disabling frees them."""
        with self._lock:
            before, self.enabled = self.enabled, enabled
            if not enabled:
                for shape in self._shapes.values():
                    shape.release()
                self._shapes.clear()  # but no marks: the GPU may still write to their memory
        return before

    @torch.no_grad()
    def __call__(
        self,
        place: Place,
        key: Hashable,
        function: Function,
        tensors: tuple[Tensor | None, ...],
        most_bytes: int,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """`function(*tensors)`. All graphs of a GPU together hold at most `most_bytes`, and are freed if a call runs out of memory.

        `mask`: one of the tensors, which identifies the mask: calls with another mask have another tensor here.
        """
        try:
            with self._lock:
                if self.enabled:
                    shape, behind = self._shape(place, key), self._gpu_is_behind(place, tensors)
                    if shape.captured is None:
                        if shape.is_due(mask) and (outputs := self._captures(shape, place, function, tensors)) is not None:
                            self._make_room(place.gpu, most_bytes)
                            return outputs
                    elif not behind:
                        return shape.captured(tensors)
            return function(*tensors)
        except torch.OutOfMemoryError:
            if not self._give_back(place.gpu):
                raise
        return function(*tensors)

    def _shape(self, place: Place, key: Hashable) -> Shape:
        shape = self._shapes.setdefault((place, key), Shape())
        self._shapes.move_to_end((place, key))
        if len(self._shapes) > MAX_SHAPES:
            _, oldest = self._shapes.popitem(last=False)
            oldest.release()
        return shape

    def _gpu_is_behind(self, place: Place, tensors: tuple[Tensor | None, ...]) -> bool:
        """Whether this is a large call, and the GPU has not reached the start of the last `CALLS_AHEAD` large calls."""
        if first_of(tensors).numel() < LARGE_CALL:
            return False
        if place not in self._marks:
            self._marks[place] = self._new_marks()
        behind = self._marks[place].behind >= CALLS_AHEAD
        self._marks[place].mark()
        return behind

    def _captures(self, shape: Shape, place: Place, function: Function, tensors: tuple[Tensor | None, ...]) -> tuple[Tensor, ...] | None:
        """Run the function on a graph's inputs, then capture it. Returns its outputs, or None if the run is out of memory."""
        try:
            inputs = buffers_like(tensors)
            copy(tensors, inputs)
            outputs = function(*inputs)
        except torch.OutOfMemoryError:
            shape.back_off()
            return None
        pools = (other.captured.graph.pool for (where, _), other in self._shapes.items() if where == place and other.captured is not None)
        try:
            shape.captured = Captured(self._capture, function, inputs, next((pool for pool in pools if pool.usable), None))
        except torch.OutOfMemoryError:  # unlike for the call itself, PyTorch does not empty its cache and retry
            shape.back_off()
        except Exception as error:  # whatever a driver or library forbids during a capture
            shape.wait = math.inf
            self._warn(error)
        return outputs

    def _give_back(self, gpu: int) -> bool:
        """Drop all graphs of a GPU. Returns whether there were any."""
        with self._lock:
            held = list(self._captured(gpu))
            for shape in held:
                shape.back_off()
        return bool(held)

    def _make_room(self, gpu: int, most_bytes: int) -> None:
        while (held := list(self._captured(gpu))) and (len(held) > MAX_GRAPHS or _n_bytes(held) > most_bytes):
            held[0].back_off()

    def _captured(self, gpu: int | None = None) -> Iterator[Shape]:
        """Shapes with a graph, of one GPU or of all, least recently used first."""
        return (shape for (place, _), shape in self._shapes.items() if shape.captured is not None and gpu in (None, place.gpu))

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            reason = next(iter(str(error).splitlines()), "")
            warnings.warn(
                "moba_flex could not capture a call in a CUDA graph and goes on without, with the same results but more work for the host; "
                f"moba_flex.set_cuda_graphs(False) keeps it from trying: {type(error).__name__}: {reason}",
                stacklevel=2,
            )


def _n_bytes(shapes: list[Shape]) -> int:
    """Bytes held by the graphs of `shapes`. A shared pool counts once."""
    held = [shape.captured for shape in shapes if shape.captured is not None]
    pools = {id(captured.graph.pool): captured.graph.pool.n_bytes for captured in held}
    return sum(pools.values()) + sum(captured.n_bytes for captured in held)


_graphs = GraphCache(CudaGraph)
