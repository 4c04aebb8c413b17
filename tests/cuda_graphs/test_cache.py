"""Which calls become graphs, when, and what they hold, without a GPU: the graph is a stand-in that runs its function again."""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import torch.nn.attention.flex_attention as flex_module
from support.cases import unchecked
from torch import Tensor

from moba_flex import moba_attention, moba_attention_varlen, operator, set_cuda_graphs
from moba_flex.backends import flash, paths
from moba_flex.backends.paths import MAX_CAPTURED_ELEMENTS, capture_obstacle
from moba_flex.core import layout_builders, memo
from moba_flex.core.layout_builders import _persistent_layout, dense_layout
from moba_flex.core.settings import AttentionSettings
from moba_flex.cuda_graphs import buffers, cache
from moba_flex.cuda_graphs.cache import CALLS_AHEAD, EAGER_CALLS, MANY_CALLS, MAX_GRAPHS, MAX_SHAPES, GraphCache, Place
from moba_flex.dispatch import attend

MUCH = 1 << 40
HERE, ELSEWHERE, ON_ANOTHER_GPU = Place(0, 10), Place(0, 11), Place(1, 10)
SETTINGS = AttentionSettings(8, 3, scale=0.25, implementation="flex")


@dataclass(eq=False)
class StandInPool:
    usable: bool = True
    n_bytes: int = 0


class StandIn:
    """As with a CUDA graph, what a capture computes has no contents until a replay, which reads the inputs where they lie."""

    pool_bytes: ClassVar[int]
    living: ClassVar[list[StandIn]]

    def __init__(self, function, inputs, pool):
        self.function, self.inputs, self.pool = function, inputs, pool or StandInPool()
        self.pool.n_bytes += self.pool_bytes
        self.outputs = tuple(torch.full_like(x, -7) for x in function(*inputs))
        self.replays = self.uses = 0
        self.living.append(self)

    def replay(self):
        self.replays += 1
        for place, x in zip(self.outputs, self.function(*self.inputs)):
            place.copy_(x)

    def used(self):
        self.uses += 1

    def release(self):
        self.living.remove(self)


@pytest.fixture(autouse=True)
def _none_left(monkeypatch):
    monkeypatch.setattr(StandIn, "living", [], raising=False)
    monkeypatch.setattr(StandIn, "pool_bytes", 0, raising=False)


class Doubling:
    """A function of tensors that counts how often it is run."""

    def __init__(self):
        self.runs = 0

    def __call__(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, ...]:
        self.runs += 1
        return x * 2, (x + 1).transpose(0, 1) if y is None else x + y


def call(store: GraphCache, function, *tensors: Tensor | None, key="key", place=HERE, most_bytes: int = MUCH):
    return store(place, (key, *cache.signature(tensors)), function, tensors, most_bytes)


def assert_equal(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()


def capture(store: GraphCache, function, *tensors, **more) -> None:
    for _ in range(EAGER_CALLS + 1):
        call(store, function, *tensors, **more)


def test_the_third_call_of_a_shape_is_captured_and_later_ones_are_replayed():
    store, function = GraphCache(StandIn), Doubling()
    for n in range(6):
        x = torch.randn(3, 4)
        before = len(store), function.runs
        assert_equal(call(store, function, x), Doubling()(x))
        assert (before[0], len(store)) == ((0, 0), (0, 0), (0, 1), (1, 1), (1, 1), (1, 1))[n]
    assert StandIn.living[0].replays == StandIn.living[0].uses == 3
    assert function.runs == 2 + 2 + 3  # eager; before and within the capture; the stand-in's replays


class Gpu:
    """It comes to what was launched when it is told to."""

    def __init__(self):
        self.launched = self.done = 0


class GpuMarks:
    def __init__(self, gpu: Gpu):
        self._gpu, self._at = gpu, []

    @property
    def behind(self) -> int:
        return sum(at > self._gpu.done for at in self._at)

    def mark(self) -> None:
        self._at.append(self._gpu.launched)


@pytest.mark.parametrize("large", [True, False])
def test_a_large_call_is_launched_kernel_by_kernel_while_the_gpu_is_calls_behind(monkeypatch, large):
    monkeypatch.setattr(cache, "LARGE", 12 if large else 13)
    gpu, function = Gpu(), Doubling()
    store = GraphCache(StandIn, lambda: GpuMarks(gpu))

    def go(calls: int, place: Place = HERE, keeps_up: bool = False) -> int:
        """How many of so many calls are replayed."""
        before = sum(graph.replays for graph in StandIn.living)
        for _ in range(calls):
            x = torch.randn(3, 4)
            assert_equal(call(store, function, x, place=place), Doubling()(x))
            gpu.launched += 1
            if keeps_up:
                gpu.done = gpu.launched
        return sum(graph.replays for graph in StandIn.living) - before

    assert go(EAGER_CALLS + 1, keeps_up=True) == 0
    assert go(5, keeps_up=True) == 5
    assert go(10) == (CALLS_AHEAD + 1 if large else 10)  # the GPU has come to the begin of the first of them
    assert go(EAGER_CALLS + 2, ELSEWHERE) == 1  # of the calls on another stream too few have been launched
    gpu.done = gpu.launched
    assert go(3) == 3
    assert len(store) == 2
    store.enable(False)
    assert not [*store._marks, *store._shapes, *StandIn.living]


def test_outputs_of_one_call_are_untouched_by_the_next():
    store, function = GraphCache(StandIn), Doubling()
    calls = [(x, call(store, function, x)) for x in torch.randn(6, 3, 4)]
    for x, got in calls:
        assert_equal(got, Doubling()(x))


def test_a_graph_reads_its_own_copy_of_the_inputs():
    store, function, x = GraphCache(StandIn), Doubling(), torch.randn(3, 4)
    capture(store, function, x)
    wanted = Doubling()(x.clone())
    got = call(store, function, x)
    x.zero_()
    assert_equal(got, wanted)
    assert StandIn.living[0].inputs[0].data_ptr() != x.data_ptr()


@pytest.mark.parametrize(
    ("x", "kept"),
    [
        (torch.randn(1, 4, 6, 8), True),
        (torch.randn(1, 6, 4, 8).transpose(1, 2), True),
        (torch.randn(2, 6, 4, 8).transpose(1, 2), True),
        (torch.randn(1, 6, 4, 24)[..., :8].transpose(1, 2), False),
        (torch.randn(()).expand(1, 4, 6, 8), False),
        (torch.randn(1, 4, 12, 8)[:, :, ::2], False),
    ],
    ids=["contiguous", "tokens first", "rows of tokens first", "part of a fused projection", "expanded", "every second token"],
)
def test_inputs_lie_as_a_call_would_bring_them_to_lie(x, kept):
    place = buffers.buffer_like(x)
    assert (place.stride() == x.stride()) == kept
    assert kept or place.is_contiguous()
    store, function = GraphCache(StandIn), Doubling()
    for _ in range(EAGER_CALLS + 3):
        x = x.clone(memory_format=torch.preserve_format) if kept else x
        assert torch.equal(call(store, function, x)[0], x * 2)
    assert StandIn.living[0].replays == 2


def test_graphs_give_their_memory_back_to_a_call_that_has_too_little():
    store, x = GraphCache(StandIn), torch.randn(3, 4)
    for name in ("one", "other"):
        for _ in range(EAGER_CALLS + 2):
            call(store, Doubling(), x, key=name)
    assert len(StandIn.living) == len(store) == 2

    def needs_memory(y):
        if StandIn.living:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return (y * 3,)

    assert torch.equal(call(store, needs_memory, x, key="large")[0], x * 3)
    assert not StandIn.living
    assert len(store) == 0
    assert torch.equal(call(store, Doubling(), x, key="one")[0], x * 2)

    def too_large(y):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        call(store, too_large, x, key="too large")


def test_an_argument_that_is_none_is_another_shape():
    store, function = GraphCache(StandIn), Doubling()
    for _ in range(5):
        x, y = torch.randn(3, 4), torch.randn(3, 4)
        for tensors in ((x, None), (x, y)):
            assert_equal(call(store, function, *tensors), Doubling()(*tensors))
    assert len(store) == 2


def test_what_differs_in_shape_strides_dtype_settings_or_stream_shares_no_graph():
    x = torch.randn(4, 4)
    variants = [
        {"x": x},
        {"x": x[:, :3].clone()},
        {"x": x.T},
        {"x": x.half()},
        {"x": x, "key": "other settings"},
        {"x": x, "place": ELSEWHERE},
    ]
    store, function = GraphCache(StandIn), Doubling()
    for n, variant in enumerate(variants, start=1):
        more = {name: value for name, value in variant.items() if name != "x"}
        capture(store, function, variant["x"], **more)
        assert len(store) == n
    torch.use_deterministic_algorithms(True)
    try:
        call(store, function, x)
    finally:
        torch.use_deterministic_algorithms(False)
    with torch.inference_mode():
        call(store, function, x)
    assert all(graph.replays == 0 for graph in StandIn.living)


def test_graphs_of_one_stream_share_a_pool_that_is_usable():
    store, function = GraphCache(StandIn), Doubling()
    for n in (2, 3):
        capture(store, function, torch.randn(n, n))
    capture(store, function, torch.randn(2, 2), place=ELSEWHERE)
    StandIn.living[0].pool.usable = False
    capture(store, function, torch.randn(5, 5))
    first, second, elsewhere, afterwards = (graph.pool for graph in StandIn.living)
    assert first is second
    assert len({id(first), id(elsewhere), id(afterwards)}) == 3


def test_a_capture_that_fails_warns_once_and_results_are_those_of_eager_calls():
    def no_capture(*_):
        raise RuntimeError("operation not permitted\nmore about it")

    store, function = GraphCache(no_capture), Doubling()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for n in (3, 4):
            for _ in range(5):
                x = torch.randn(n, n)
                assert_equal(call(store, function, x), Doubling()(x))
    assert len(caught) == 1
    assert "set_cuda_graphs(False)" in str(caught[0].message)
    assert str(caught[0].message).endswith("RuntimeError: operation not permitted")
    assert function.runs == 2 * 5
    assert len(store) == 0


def test_an_interrupt_within_a_capture_is_the_callers_and_the_next_call_works():
    interrupts = count()

    def interrupted(*arguments):
        if next(interrupts) == 0:
            raise KeyboardInterrupt
        return StandIn(*arguments)

    store, function, x = GraphCache(interrupted), Doubling(), torch.randn(3, 4)
    for _ in range(EAGER_CALLS):
        call(store, function, x)
    with pytest.raises(KeyboardInterrupt):
        call(store, function, x)
    for _ in range(3):
        assert_equal(call(store, function, x), Doubling()(x))
    assert StandIn.living[0].replays == 2


def test_an_error_of_the_call_itself_is_raised_as_without_graphs():
    def fails(x):
        raise ValueError("as always")

    store = GraphCache(StandIn)
    for _ in range(5):
        with pytest.raises(ValueError, match="as always"):
            call(store, fails, torch.randn(2))
    assert len(store) == 0


def test_without_memory_for_a_second_set_of_inputs_a_call_is_eager(monkeypatch):
    def no_room(x):
        raise torch.OutOfMemoryError

    store, function = GraphCache(StandIn), Doubling()
    with monkeypatch.context() as patch:
        patch.setattr(buffers, "buffer_like", no_room)
        for _ in range(2 * EAGER_CALLS + 1):
            x = torch.randn(3, 4)
            assert_equal(call(store, function, x), Doubling()(x))
    assert len(store) == 0
    for _ in range(2 * EAGER_CALLS):
        call(store, function, x)
    assert len(store) == 1


def test_without_memory_for_a_capture_a_call_is_eager_and_the_next_capture_comes_later():
    captures = count()

    def no_room_at_first(*arguments):
        if next(captures) == 0:
            raise torch.OutOfMemoryError
        return StandIn(*arguments)

    store, function = GraphCache(no_room_at_first), Doubling()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(EAGER_CALLS + 1 + 2 * EAGER_CALLS):
            x = torch.randn(3, 4)
            assert_equal(call(store, function, x), Doubling()(x))
            assert len(store) == 0
        call(store, function, x)
    assert len(store) == 1


def test_of_too_many_graphs_the_one_used_last_long_ago_goes_and_waits_twice_as_long():
    store, function = GraphCache(StandIn), Doubling()
    shapes = [torch.randn(n, 2) for n in range(1, MAX_GRAPHS + 2)]
    for x in shapes[:-1]:
        capture(store, function, x)
    call(store, function, shapes[0])
    capture(store, function, shapes[-1])
    assert len(store) == len(StandIn.living) == MAX_GRAPHS
    assert [graph.inputs[0].shape[0] for graph in StandIn.living] == [1, *range(3, MAX_GRAPHS + 2)]
    for n in range(2 * EAGER_CALLS + 1):
        assert shapes[1].shape not in [graph.inputs[0].shape for graph in StandIn.living], n
        assert_equal(call(store, function, shapes[1]), Doubling()(shapes[1]))
    assert StandIn.living[-1].inputs[0].shape == shapes[1].shape


def test_all_graphs_together_keep_to_their_bytes(monkeypatch):
    monkeypatch.setattr(StandIn, "pool_bytes", 1000)  # a pool grows and does not shrink
    store, function = GraphCache(StandIn), Doubling()
    held = []
    for n in range(1, 20):
        capture(store, function, torch.randn(n, 10), most_bytes=5000)
        held.append(store.n_bytes)
    assert max(held) <= 5000
    assert max(held) > 2000
    assert len(store) == len(StandIn.living)


def test_each_gpu_has_a_number_of_graphs_and_bytes_of_its_own():
    store, function = GraphCache(StandIn), Doubling()
    shapes = [torch.randn(n, 2) for n in range(1, MAX_GRAPHS + 1)]
    for place in (HERE, ON_ANOTHER_GPU):
        for x in shapes:
            capture(store, function, x, place=place, most_bytes=sum(x.nbytes for x in shapes))
    assert len(store) == len(StandIn.living) == 2 * MAX_GRAPHS
    capture(store, function, torch.randn(1, 3), place=ELSEWHERE)  # another stream of the first
    assert len(store) == 2 * MAX_GRAPHS
    assert [graph.inputs[0].shape for graph in StandIn.living[:1]] == [shapes[1].shape]

    def no_memory(x: Tensor) -> tuple[Tensor, ...]:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        call(store, no_memory, torch.randn(3, 3), key="no memory", place=ON_ANOTHER_GPU)
    assert len(store) == len(StandIn.living) == MAX_GRAPHS


def test_a_graph_that_alone_is_too_large_is_tried_ever_more_rarely():
    store, function, x = GraphCache(StandIn), Doubling(), torch.randn(100)[None]
    runs = []
    for _ in range(100):
        before = function.runs
        assert_equal(call(store, function, x, most_bytes=100), Doubling()(x))
        runs.append(function.runs - before)
    assert [n for n, count in enumerate(runs) if count == 2] == [2, 7, 16, 33, 66]  # once for the result and once to capture
    assert store.n_bytes == len(StandIn.living) == 0


def test_ever_new_shapes_leave_a_bounded_number_of_counts():
    store, function = GraphCache(StandIn), Doubling()
    for n in range(2 * MAX_SHAPES):
        call(store, function, torch.empty(1, n))
    capture(store, function, torch.empty(3, 3))
    for n in range(MAX_SHAPES):
        call(store, function, torch.empty(2, n))
    assert len(store._shapes) == MAX_SHAPES
    assert len(store) == len(StandIn.living) == 0


def test_turned_off_all_graphs_are_freed_and_nothing_is_captured():
    store, function, x = GraphCache(StandIn), Doubling(), torch.randn(3, 4)
    capture(store, function, x)
    assert store.n_bytes == x.nbytes
    assert store.enable(False) is True
    assert len(store) == store.n_bytes == len(StandIn.living) == 0
    capture(store, function, x)
    assert len(StandIn.living) == 0
    assert store.enable(True) is False
    capture(store, function, x)
    assert len(StandIn.living) == 1


def test_two_threads_never_mix_their_calls():
    store, function, wrong = GraphCache(StandIn), Doubling(), []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(200):
            x = torch.randn(8, 8, generator=generator)
            if not torch.equal(call(store, function, x)[0], x * 2):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert StandIn.living[0].replays == 3 * 200 - EAGER_CALLS - 1


def on_a_gpu(*shape: int, dtype: torch.dtype = torch.bfloat16, **more) -> SimpleNamespace:
    n = 1
    for size in shape:
        n *= size
    return SimpleNamespace(**{"is_cuda": True, "dtype": dtype, "numel": lambda: n, **more})


def test_only_small_calls_in_half_precision_are_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    x, large = on_a_gpu(1, 4, 64, 16), on_a_gpu(MAX_CAPTURED_ELEMENTS + 1)
    assert capture_obstacle((x, x, x), SETTINGS) is None
    assert capture_obstacle((x, None, x), SETTINGS) is None
    assert capture_obstacle((on_a_gpu(MAX_CAPTURED_ELEMENTS, dtype=torch.float16), x, x), SETTINGS) is None
    assert capture_obstacle((x, large, x), SETTINGS)
    half = on_a_gpu(MAX_CAPTURED_ELEMENTS // 2)  # of a backward pass, which has more operands
    assert capture_obstacle((half, None, x, x, x, x, x, x), SETTINGS) is None
    assert capture_obstacle((on_a_gpu(MAX_CAPTURED_ELEMENTS // 2 + 1), None, x, x, x, x, x, x), SETTINGS)
    assert capture_obstacle((on_a_gpu(8, dtype=torch.float32), x, x), SETTINGS)
    assert capture_obstacle((on_a_gpu(8, is_cuda=False), x, x), SETTINGS)
    assert capture_obstacle((on_a_gpu(0), x, x), SETTINGS)
    assert capture_obstacle((x, x, x), replace(SETTINGS, implementation="eager"))
    with monkeypatch.context() as patch:
        patch.setattr(flash, "_backend", "flash")
        assert capture_obstacle((x, x, x), SETTINGS)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert capture_obstacle((x, x, x), SETTINGS)


@pytest.fixture
def store(monkeypatch) -> GraphCache:
    """The operators on the CPU, as if it were a GPU."""
    store = GraphCache(StandIn)
    monkeypatch.setattr(cache, "_graphs", store)
    monkeypatch.setattr(paths, "capture_obstacle", lambda tensors, settings: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(device_index=0, cuda_stream=0))
    return store


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("settings", [{}, {"share_selection": True}, {"softcap": 2.0}, {"causal": False}], ids=str)
def test_the_operators_are_replayed_forward_and_backward(store, settings, with_lse):
    def results(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        leaves = [torch.randn(2, heads, 40, 16, generator=generator).requires_grad_() for heads in (4, 2, 2)]
        out, lse = moba_attention(*leaves, block_size=8, top_k=3, return_lse=True, **settings)
        loss = out.sin().sum() + (lse.cos().sum() if with_lse else 0)
        return [out, lse, *torch.autograd.grad(loss, leaves)]

    with_graphs = [results(seed) for seed in range(5)]
    assert [graph.replays for graph in StandIn.living] == [2, 2]
    store.enable(False)
    for seed, got in enumerate(with_graphs):
        assert_equal(tuple(got), tuple(results(seed)))


def test_calls_that_differ_in_a_setting_share_no_graph(store):
    tensors = [torch.randn(1, heads, 40, 16) for heads in (4, 2, 2)]
    variants = [{}, {"scale": 0.5}, {"softcap": 2.0}, {"block_size": 16}, {"top_k": 2}, {"sink_blocks": 1}, {"share_selection": True}]
    for n, more in enumerate(variants, start=1):
        for _ in range(EAGER_CALLS + 2):
            moba_attention(*tensors, **{"block_size": 8, "top_k": 3, **more})
        assert len(store) == n
        assert StandIn.living[-1].replays == 1


KINDS = ["padded", "packed", "packed, more keys", "padded, few queries"]


def told(kind: str, seed: int) -> dict[str, Tensor]:
    """Padding, or bounds of three packed sequences, of 40 keys."""
    generator = torch.Generator().manual_seed(seed)
    if "padded" in kind:
        real = torch.randint(1, 41, (2, 1), generator=generator)
        return {"padding_mask": torch.arange(40) < real if seed % 2 else torch.arange(40) >= 40 - real}
    bounds = torch.tensor([0, *torch.randint(0, 41, (2,), generator=generator).sort().values.tolist(), 40])
    if kind == "packed":
        return {"cu_seqlens": bounds}
    last = bounds.diff().clamp(max=3)  # and the rest of 20 queries to the longest
    last[bounds.diff().argmax()] += 20 - last.sum()
    return {"cu_seqlens": torch.stack((torch.nn.functional.pad(last.cumsum(0), (1, 0)), bounds))}


@pytest.mark.parametrize("implementation", ["eager", "flex"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_serves_any_padding_and_any_sequences(store, kind, implementation, monkeypatch):
    """Its layout is an input, that of the call, and nothing of it is left to the next one."""
    monkeypatch.setattr(flex_module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    rows, n_query = 1 if "packed" in kind else 2, 20 if kind in KINDS[2:] else 40
    settings = replace(SETTINGS, top_k=2, implementation=implementation)

    def results(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        leaves = [torch.randn(rows, heads, n, 16, generator=generator).requires_grad_() for heads, n in ((4, n_query), (2, 40), (2, 40))]
        out, lse = attend(*leaves, settings, **told(kind, seed), return_lse=True)
        return [out, lse, *torch.autograd.grad(out.sin().sum(), leaves)]

    with_graphs = [results(seed) for seed in range(8)]
    assert [graph.replays for graph in StandIn.living] == [5, 5]
    store.enable(False)
    for seed, got in enumerate(with_graphs):
        assert_equal(tuple(got), tuple(results(seed)))


def packed_call(bounds: Tensor) -> None:
    tensors = [torch.randn(40, heads, 16) for heads in (4, 2, 2)]
    moba_attention_varlen(*tensors, bounds, block_size=8, top_k=3)


def remembered(monkeypatch) -> None:
    monkeypatch.setattr(memo, "may_be_remembered", lambda x: type(x) is Tensor and not x.is_inference())


def test_a_shape_that_may_never_come_again_is_not_captured(store, monkeypatch):
    """All layers of a model have one mask. Where the next step has as many tokens and sequences, its first layer is captured."""
    remembered(monkeypatch)
    first, second = torch.tensor([0, 9, 40]), torch.tensor([0, 21, 40])
    for _ in range(30):
        packed_call(first)
    assert len(store) == 0
    packed_call(second)
    assert len(store) == 1
    for _ in range(3):
        packed_call(first)
    assert StandIn.living[0].replays == 3


def test_one_mask_that_serves_more_calls_than_a_model_has_layers_is_captured(store, monkeypatch):
    remembered(monkeypatch)
    bounds = torch.tensor([0, 9, 40])
    for _ in range(MANY_CALLS):
        packed_call(bounds)
    assert len(store) == 0
    packed_call(bounds)
    assert len(store) == 1


def test_a_graph_holds_no_layout_of_a_mask_that_is_gone(store, monkeypatch):
    remembered(monkeypatch)
    layouts, build = [], layout_builders._layout_told
    monkeypatch.setattr(layout_builders, "_layout_told", lambda *args: layouts.append(weakref.ref(made := build(*args))) or made)
    for middle in range(5, 5 + EAGER_CALLS + 1):
        packed_call(torch.tensor([0, middle, 40]))
    gc.collect()
    assert len(store) == 1 and len(layouts) == EAGER_CALLS + 1
    assert [layout() for layout in layouts] == [None] * len(layouts)


def test_other_numbers_of_sequences_have_graphs_of_their_own(store):
    tensors = [torch.randn(40, heads, 16) for heads in (4, 2, 2)]
    for n, bounds in enumerate(([0, 40], [0, 9, 40], [0, 9, 20, 40]), start=1):
        for _ in range(EAGER_CALLS + 2):
            moba_attention_varlen(*tensors, torch.tensor(bounds), block_size=8, top_k=3)
        assert len(store) == n


@pytest.fixture
def flex_on_the_cpu(monkeypatch) -> Callable[[], Tensor]:
    """A call of the implementation for CUDA, uncompiled; forward and backward."""
    monkeypatch.setattr(flex_module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)

    def run() -> Tensor:
        leaves = [torch.randn(1, 300, heads, 16).transpose(1, 2).requires_grad_() for heads in (4, 2, 2)]
        out = unchecked(*leaves, block_size=32, top_k=3, implementation="flex")
        torch.autograd.grad(out.sin().sum(), leaves)
        return out

    return run


def test_a_graph_holds_the_layout_that_it_reads(store, flex_on_the_cpu):
    _persistent_layout.cache_clear()
    for _ in range(EAGER_CALLS + 1):
        flex_on_the_cpu()
    layout = weakref.ref(dense_layout(1, 300, 300, 32, 32, torch.device("cpu")))
    _persistent_layout.cache_clear()
    assert len(store) == 2
    assert layout() is not None
    store.enable(False)
    StandIn.living.clear()
    gc.collect()
    assert layout() is None


def test_nothing_is_kept_that_was_made_during_a_capture(store, flex_on_the_cpu):
    """What layouts keep for later calls is all there when a capture begins."""
    _persistent_layout.cache_clear()
    real, kept = store._capture, []

    def observed(*arguments):
        layout = dense_layout(1, 300, 300, 32, 32, torch.device("cpu"))
        before = set(layout._cache)
        assert before
        graph = real(*arguments)
        kept.append(set(layout._cache) - before)
        return graph

    store._capture = observed
    for _ in range(EAGER_CALLS + 1):
        flex_on_the_cpu()
    assert kept == [set(), set()]


def test_outputs_lie_in_memory_as_without_graphs(store, flex_on_the_cpu):
    strides = {flex_on_the_cpu().stride() for _ in range(EAGER_CALLS + 3)}
    assert [graph.replays for graph in StandIn.living] == [2, 2]
    assert len(strides) == 1


@pytest.mark.parametrize("enabled", [None, 1, "off"], ids=repr)
def test_set_cuda_graphs_names_what_is_wrong_and_changes_nothing(enabled):
    before = set_cuda_graphs(True)
    with pytest.raises(ValueError, match=f"enabled must be True or False, but is {enabled!r}"):
        set_cuda_graphs(enabled)
    assert set_cuda_graphs(before) is True


def test_it_is_on_unless_turned_off():
    assert cache._graphs.enabled
    assert operator.cache is cache
