"""CUDA graphs: a small call whose shape keeps coming is launched once as a whole instead of kernel by kernel.

A call is a dozen kernels or more, and up to some thousands of tokens a GPU is done with each before the host has launched the next. So a
call of the third time is captured, and from then on its inputs are copied to where the graph reads them, the graph is replayed, and its
outputs are copied out: a handful of launches. Nothing is read back to the host, and results are those of the same kernels, to the bit.
Only where the copies are large, and the GPU so far behind that the host has time, a call of a graph's shape is launched kernel by kernel.

What makes that safe:
- All that a graph reads or writes is held by it: its inputs, its outputs and, through its function, the layout of blocks. A layout that
  follows from padding or packed sequences is an input: its tensors are copied, and what follows from them is computed in the graph.
- Before a capture the function runs on the graph's own inputs. So whatever is compiled, loaded or kept for later calls is there by then,
  and the call has its result whether or not the capture succeeds.
- After a capture its memory pool must hold the outputs and nothing more: a tensor kept from within a capture would have no contents.
- Graphs are used under one lock, and a graph only on the stream that it was made for. Work on a stream is done in order, so that memory
  may be used again as soon as the host has launched what needed it: by the next graph in the pool, or by anyone once a graph is dropped.
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
# Calls with one mask that no model has layers for. Where each step brings sequences of other lengths, a shape that is new with its mask may
# never come again: it is captured once it comes with another mask, or so often with one.
MANY_CALLS = 128
MAX_GRAPHS = 16  # of a GPU
MAX_SHAPES = 256  # whose calls are counted
# A query of 2,048 tokens of 32 heads of width 128 is copied in some 27 us with its key, value and output, 1 % of a layer of such a model.
# Four calls of this size and what is between them keep a GPU busy for longer than the host needs to launch one kernel by kernel.
LARGE, CALLS_AHEAD = 1 << 23, 4


def set_cuda_graphs(enabled: bool = True) -> bool:
    """Set whether small calls are captured in CUDA graphs, and return what was set before. It is on by default; off frees all graphs.

    On a GPU the host takes longer to launch a short call than the GPU to do it. So from the third call of the same shapes, strides, dtype
    and settings on the same stream, forward and backward passes are replayed from a CUDA graph, with the same results to the bit. That is
    for bfloat16 and float16, for tensors of at most 2**25 elements (8,192 tokens of 32 heads of width 128; half of it in backward passes),
    and neither within a capture of one's own nor with `set_flex_backend("flash")`; all other calls are as without graphs. So are those of
    2**23 elements or more while the GPU is some calls behind: then the host has the time, and a graph's copies are saved. Packed batches
    share a graph if they have as many tokens and as many sequences, padded ones if they have as many rows and tokens; it is captured once
    such a batch comes with another mask.

    It costs memory: on each GPU up to as many bytes as `set_working_memory` says, for inputs, outputs and working memory of at most 16
    graphs, those used last. A call of ours that has too little memory takes it back. What turning graphs off frees goes back to PyTorch's
    cache, and from there, with `torch.cuda.empty_cache()`, to the GPU. Turn them off where threads of a program wait for the whole GPU, or
    draw random numbers on it, while others compute attention: CUDA forbids the former, and PyTorch 2.11 the latter, for the milliseconds in
    which a graph is captured.

    Raises ValueError if `enabled` is neither True nor False.

    >>> from moba_flex import set_cuda_graphs
    >>> before = set_cuda_graphs(False)
    >>> set_cuda_graphs(before)
    False
    """
    check_flag("enabled", enabled)
    return _graphs.enable(enabled)


def run(function: Function, tensors: tuple[Tensor | None, ...], layout: BlockLayout, settings: AttentionSettings) -> tuple[Tensor, ...]:
    """`function(*tensors, layout, settings)`, from a graph once the shape has come often enough. The current GPU is that of `tensors`.

    The caller has found that the call can be captured: `moba_flex.backends.paths.capture_obstacle`.
    """
    if not _graphs.enabled:
        return function(*tensors, layout, settings)
    stream = torch.cuda.current_stream()
    place, name = Place(stream.device_index, stream.cuda_stream), (function.__name__, settings)
    if layout.dense:

        def call(*tensors: Any) -> tuple[Tensor, ...]:
            return function(*tensors, layout, settings)

        return _graphs(place, (*name, *signature(tensors)), call, tensors, settings.working_memory)

    # A layout that follows from data is an input too. Of a graph, what follows from it is part of the graph, which holds no other.
    form, of_layout, bare = layout.cached(("taken apart",), layout.taken_apart)
    n, whole = len(tensors), weakref.ref(layout)

    def call_with_layout(*given: Any) -> tuple[Tensor, ...]:
        there = whole() if given[n] is of_layout[0] else bare.put_together(form, given[n:])
        return function(*given[:n], there, settings)

    every = (*tensors, *of_layout)
    key = (*name, form, *signature(every))
    return _graphs(place, key, call_with_layout, every, settings.working_memory, mask=of_layout[0])


def cuda_graphs_enabled() -> bool:
    """What `set_cuda_graphs` has set."""
    return _graphs.enabled


def signature(tensors: tuple[Tensor | None, ...]) -> tuple[Hashable, ...]:
    """All that a graph depends on but settings of the call."""
    modes = torch.is_inference_mode_enabled(), torch.are_deterministic_algorithms_enabled()
    return *modes, *(None if x is None else (x.shape, x.stride(), x.dtype) for x in tensors)


class Place(NamedTuple):
    """Where a graph is replayed."""

    gpu: int
    stream: int


class Pool(Protocol):
    """Memory of graphs that are replayed on one stream."""

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
        """What was launched by now is all that reads the outputs of the last replay."""

    def release(self) -> None: ...


# A function, its inputs, and the pool of other graphs of that stream if there is one -> the graph, which has not been replayed.
# A pool is one that it made itself.
Capture = Callable[[Function, tuple[Tensor | None, ...], Any], Graph]


class Captured:
    """A graph and the buffers of its inputs."""

    def __init__(self, capture: Capture, function: Function, inputs: tuple[Tensor | None, ...], pool: Pool | None) -> None:
        self.graph = capture(function, inputs, pool)
        self.function, self.inputs = function, inputs  # they hold the layout
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
    """What is known of calls that a graph could serve."""

    calls: int = 0  # eager ones, since the beginning or since its graph was dropped
    wait: float = EAGER_CALLS
    captured: Captured | None = None
    mask: weakref.ref[Tensor] | None = None  # what stands for the mask of its first call, if it has one
    came_again: bool = True  # with another mask

    def is_due(self, mask: Tensor | None) -> bool:
        """Count a call; whether its shape is to be captured."""
        self.calls += 1
        if mask is not None:
            if self.mask is None:
                self.mask, self.came_again = weakref.ref(mask), False
            self.came_again = self.came_again or self.mask() is not mask
        return self.calls > self.wait and (self.came_again or self.calls > MANY_CALLS)

    def release(self) -> None:
        if self.captured is not None:
            self.captured.graph.release()
            self.captured = None

    def back_off(self) -> None:
        """No graph for twice as many calls as last time: to capture over and over, where room is short, would cost more than it saves."""
        self.release()
        self.calls, self.wait = 0, 2 * self.wait


class Marks(Protocol):
    """Marks on the stream that was current when this was made."""

    @property
    def behind(self) -> int:
        """How many of them the GPU has not come to."""

    def mark(self) -> None: ...


class GraphCache:
    """The graphs of a process, of each GPU those that were used last."""

    def __init__(self, capture: Capture, marks: Callable[[], Marks] = CudaMarks) -> None:
        self.enabled = True
        self._capture, self._new_marks = capture, marks
        self._marks: dict[Place, Marks] = {}  # where large calls began
        self._shapes: OrderedDict[tuple[Place, Hashable], Shape] = OrderedDict()  # by place and key; the one used last is last
        self._lock = threading.Lock()
        self._warned = False

    def __len__(self) -> int:
        return sum(1 for _ in self._captured())

    @property
    def n_bytes(self) -> int:
        """What all graphs hold."""
        return _n_bytes(list(self._captured()))

    def enable(self, enabled: bool) -> bool:
        """Allow or forbid graphs, and return what held before. Forbidden, they are freed."""
        with self._lock:
            before, self.enabled = self.enabled, enabled
            if not enabled:
                for shape in self._shapes.values():
                    shape.release()
                self._shapes.clear()
                self._marks.clear()
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
        """`function(*tensors)`; all graphs of a GPU together keep to `most_bytes`, and give it back if there is no memory for a call.

        `mask`: one of the tensors, another one in calls with another mask.
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
        """Whether this is a large call, and the GPU has not come to where some large calls before it began."""
        if first_of(tensors).numel() < LARGE:
            return False
        if place not in self._marks:
            self._marks[place] = self._new_marks()
        behind = self._marks[place].behind >= CALLS_AHEAD
        self._marks[place].mark()
        return behind

    def _captures(self, shape: Shape, place: Place, function: Function, tensors: tuple[Tensor | None, ...]) -> tuple[Tensor, ...] | None:
        """Run the function where a graph will, and capture it. None if there is no memory for a second set of inputs."""
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
        except torch.OutOfMemoryError:  # PyTorch does not empty its cache for a capture, as it does for the call itself
            shape.back_off()
        except Exception as error:  # whatever a driver or a library may forbid within a capture
            shape.wait = math.inf
            self._warn(error)
        return outputs

    def _give_back(self, gpu: int) -> bool:
        """Drop all graphs of a GPU. Whether there were any."""
        with self._lock:
            held = list(self._captured(gpu))
            for shape in held:
                shape.back_off()
        return bool(held)

    def _make_room(self, gpu: int, most_bytes: int) -> None:
        while (held := list(self._captured(gpu))) and (len(held) > MAX_GRAPHS or _n_bytes(held) > most_bytes):
            held[0].back_off()

    def _captured(self, gpu: int | None = None) -> Iterator[Shape]:
        """Shapes with a graph, of one GPU or of all, the one used last at the end."""
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
    """What their graphs hold. Several may share a pool."""
    held = [shape.captured for shape in shapes if shape.captured is not None]
    pools = {id(captured.graph.pool): captured.graph.pool.n_bytes for captured in held}
    return sum(pools.values()) + sum(captured.n_bytes for captured in held)


_graphs = GraphCache(CudaGraph)
