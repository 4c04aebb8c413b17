"""CUDA graphs where others use the GPU too: streams, threads, other captures and memory pools, and a GPU that is behind its host."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from support.gpu_graphs import SETTINGS, assert_same_bits, leaves, results, without_graphs
from torch import Tensor
from torch._dynamo.utils import counters

from moba_flex import moba_attention
from moba_flex.cuda_graphs import cache
from moba_flex.cuda_graphs.cache import EAGER_CALLS
from moba_flex.cuda_graphs.capture import CudaMarks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: CUDA graphs are captured from its streams"),
]


def test_while_the_gpu_is_far_behind_a_large_call_is_launched_kernel_by_kernel(replays, monkeypatch):
    """Some hundred million cycles of nothing keep the GPU from where the calls before began."""
    monkeypatch.setattr(cache, "LARGE_CALL", 0)
    tensors = [leaves(seed) for seed in range(16)]
    wanted = without_graphs(lambda: [results(x) for x in tensors])
    got = [results(x) for x in tensors[:4]]
    captured = len(replays)
    torch.cuda.synchronize()
    got += [results(x) for x in tensors[4:6]]
    assert len(replays) == captured + 4
    torch.cuda._sleep(500_000_000)
    got += [results(x) for x in tensors[6:14]]
    far_ahead = len(replays)
    assert captured + 4 <= far_ahead <= captured + 4 + cache.CALLS_AHEAD  # the first ones do not know yet
    torch.cuda.synchronize()
    got += [results(x) for x in tensors[14:]]
    assert len(replays) == far_ahead + 4
    for seed, x in enumerate(got):
        assert_same_bits(x, wanted[seed], seed)


def test_marks_say_how_far_the_gpu_is_behind_its_host():
    marks = CudaMarks()
    for _ in range(90):  # numbers begin again in between
        torch.cuda._sleep(50_000_000)
        for n in range(3):
            assert marks.behind == n
            marks.mark()
        torch.cuda.synchronize()
        assert marks.behind == 0


def test_another_stream_has_its_own_graphs(replays):
    tensors = [leaves(seed) for seed in range(12)]
    wanted = without_graphs(lambda: [results(x) for x in tensors])
    side, got = torch.cuda.Stream(), {}
    for seed, x in enumerate(tensors):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side if seed % 2 else torch.cuda.current_stream()):
            got[seed] = results(x)
    torch.cuda.synchronize()
    for seed in got:
        assert_same_bits(got[seed], wanted[seed], seed)
    assert len(cache._graphs) == 4
    assert len(replays) == 4 * (6 - EAGER_CALLS - 1)


def test_two_threads_may_call_at_once(replays):
    tensors = [leaves(seed) for seed in range(24)]
    wanted = without_graphs(lambda: [results(x) for x in tensors])
    got, failed = {}, []

    def work(mine: range) -> None:
        try:
            for seed in mine:
                got[seed] = results(tensors[seed])
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(range(first, 24, 2),)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    for seed, x in got.items():
        assert_same_bits(x, wanted[seed], seed)
    assert len(got) == 24
    assert len(replays) == 2 * (24 - EAGER_CALLS - 1)


def test_a_capture_in_another_thread_is_not_disturbed(replays, monkeypatch):
    """In PyTorch's default mode it ends where any thread asks for an event."""
    monkeypatch.setattr(cache, "LARGE_CALL", 0)
    tensors = [leaves(seed) for seed in range(EAGER_CALLS + 6)]
    wanted = without_graphs(lambda: [results(x) for x in tensors])
    got = [results(x) for x in tensors[: EAGER_CALLS + 2]]
    more = [results(x) for x in tensors[EAGER_CALLS + 2 :]]
    del more  # their memory stays with PyTorch: in that mode no thread may ask CUDA for any
    x, captured, open_, over = torch.ones(8, device="cuda"), torch.cuda.CUDAGraph(), threading.Event(), threading.Event()

    def capture() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            captured.capture_begin()  # torch.cuda.graph would empty PyTorch's cache first
            x.mul_(2)
            open_.set()
            over.wait(60)
            captured.capture_end()

    thread = threading.Thread(target=capture)
    thread.start()
    assert open_.wait(60)
    try:
        got += [results(x) for x in tensors[EAGER_CALLS + 2 :]]
    finally:
        over.set()
        thread.join()
    captured.replay()
    assert (x == 2).all()
    assert replays
    for seed, each in enumerate(got):
        assert_same_bits(each, wanted[seed], seed)


def test_a_capture_of_ones_own_takes_the_call_itself(replays):
    query, key, value = (x.detach() for x in leaves(0))
    for _ in range(EAGER_CALLS + 2):
        wanted = moba_attention(query, key, value, **SETTINGS)
    replayed = len(replays)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = moba_attention(query, key, value, **SETTINGS)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, wanted)
    query.copy_(torch.randn_like(query))
    graph.replay()
    assert len(replays) == replayed == 1
    assert torch.equal(captured, moba_attention(query, key, value, **SETTINGS))


def test_calls_within_another_memory_pool_are_replayed_or_a_warning_says_why_not(replays, monkeypatch):
    """Which of two pools gets the memory of a capture is PyTorch's to say, and differs between its versions."""
    monkeypatch.setattr(cache._graphs, "_warned", False)  # a process is warned once
    tensors = [[x.detach() for x in leaves(seed)] for seed in range(6)]
    wanted = without_graphs(lambda: [moba_attention(*x, **SETTINGS) for x in tensors])
    pool = torch.cuda.MemPool()
    with warnings.catch_warnings(record=True) as caught, torch.cuda.use_mem_pool(pool):
        warnings.simplefilter("always")
        got = [moba_attention(*x, **SETTINGS) for x in tensors[:5]]
    got.append(moba_attention(*tensors[5], **SETTINGS))  # by the same graph, if there is one
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)
    assert bool(replays) != any("memory is not the graph's own" in str(warning.message) for warning in caught)


def test_pytorchs_own_cuda_graphs_take_a_shape_that_nobody_saw_before():
    """They warm up in a memory pool of theirs, and raise if anything that they do not know of is left in it."""
    torch.compiler.reset()

    def three_layers(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        for _ in range(EAGER_CALLS + 1):
            query = moba_attention(query, key, value, **SETTINGS) + query
        return query

    def run(function, seed: int) -> list[Tensor]:
        tensors = leaves(seed, n_query=620, n_key=620)
        out = function(*tensors)
        return [out.detach().clone(), *(x.clone() for x in torch.autograd.grad(out.float().square().mean(), tensors))]

    compiled = torch.compile(three_layers, mode="reduce-overhead", fullgraph=True)
    skipped, got = counters["inductor"]["cudagraph_skips"], []
    for seed in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        got.append(run(compiled, seed))
    assert counters["inductor"]["cudagraph_skips"] == skipped, "PyTorch made graphs of its own"
    for seed, tensors in enumerate(got):
        for a, b in zip(tensors, run(three_layers, seed), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
