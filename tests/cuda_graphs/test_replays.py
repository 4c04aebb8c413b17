"""Which calls become graphs and are replayed, and that a replay gives what the call would, without a GPU."""

from __future__ import annotations

import threading

import pytest
import torch
from support.stand_in_graphs import ELSEWHERE, HERE, Doubling, StandIn, assert_equal, call, capture

from moba_flex.core.upstream import copy_all
from moba_flex.cuda_graphs import buffers, cache
from moba_flex.cuda_graphs.cache import CALLS_AHEAD, EAGER_CALLS, GraphCache, Place


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
    monkeypatch.setattr(cache, "LARGE_CALL", 12 if large else 13)
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
    assert not [*store._shapes, *StandIn.living]
    assert set(store._marks) == ({HERE, ELSEWHERE} if large else set()), "the GPU may still write to the memory of a mark"


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


def test_tensors_of_all_dtypes_are_copied_in_one_launch(monkeypatch):
    launches = []
    monkeypatch.setattr(buffers, "copy_all", lambda into, sources: launches.append(len(into)) or copy_all(into, sources))
    bits = torch.randint(-(2**15), 2**15, (2, 6, 3, 8), dtype=torch.int16)  # NaN and infinity among them
    same = [bits.view(dtype) for dtype in (torch.bfloat16, torch.float16, torch.int32, torch.float32, torch.int64)]
    same += [bits.view(torch.bfloat16).transpose(1, 2), bits.view(torch.int32)[0, 0, 0], bits.view(torch.float32)[:0]]
    others = [bits > 0, torch.tensor(3), bits.view(torch.bfloat16)[..., 0], bits.view(torch.int32)[..., ::2]]
    tensors = (*same, None, *others)
    into = [None if x is None else torch.empty_like(x) for x in tensors]
    into[0] = torch.empty_like(same[0]).mT.contiguous().mT  # other strides
    buffers.copy(tensors, tuple(into))
    assert launches == [len(same) - 1]
    for x, to in zip(tensors, into):
        if x is not None:
            given, got = (y.contiguous().flatten().view(torch.uint8) for y in (x, to))
            assert torch.equal(given, got), (x.dtype, x.stride())


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
