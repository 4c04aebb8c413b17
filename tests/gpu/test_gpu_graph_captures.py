"""Captures of CUDA graphs leave nothing behind, however they end, and the memory of graphs is bounded and comes back."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
from support.gpu_graphs import HERE, leaves, results, without_graphs
from torch import Tensor

from moba_flex import set_cuda_graphs
from moba_flex.cuda_graphs import cache
from moba_flex.cuda_graphs.cache import EAGER_CALLS, GraphCache
from moba_flex.cuda_graphs.capture import CudaGraph

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: CUDA graphs are captured from its streams"),
]


def square(x: Tensor) -> tuple[Tensor, ...]:
    return (x * x,)


def in_order() -> None:
    """Captures, random numbers and the allocator work as if nothing had happened."""
    assert not torch.cuda.is_current_stream_capturing()
    assert torch.randn(8, device="cuda").isfinite().all()
    torch.nn.functional.dropout(torch.ones(8, device="cuda"))
    big = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    with_big = torch.cuda.memory_reserved()
    del big
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= with_big - (1 << 28)
    store, x = GraphCache(CudaGraph), torch.randn(8, device="cuda")
    for _ in range(EAGER_CALLS + 3):
        assert torch.equal(store(HERE, "square", square, (x,), 1 << 30)[0], x * x)
        x = x + 1
    assert len(store) == 1
    store.enable(False)


def test_a_capture_that_cuda_forbids_costs_a_warning_and_nothing_else():
    def reads_back(x: Tensor) -> tuple[Tensor, ...]:
        return (x * x.sum().item(),)

    store = GraphCache(CudaGraph)
    x = torch.arange(8.0, device="cuda")
    for _ in range(EAGER_CALLS + 3):  # a graph that shares its pool with the failure
        store(HERE, "square", square, (x,), 1 << 30)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(EAGER_CALLS + 3):
            assert torch.equal(store(HERE, "reads back", reads_back, (x,), 1 << 30)[0], x * 28)
    assert sum("set_cuda_graphs" in str(warning.message) for warning in caught) == 1
    assert torch.equal(store(HERE, "square", square, (x,), 1 << 30)[0], x * x)
    in_order()
    for _ in range(EAGER_CALLS + 3):
        y = torch.randn(9, device="cuda")
        assert torch.equal(store(HERE, "square of nine", square, (y,), 1 << 30)[0], y * y)
    assert len(store) == 2
    store.enable(False)


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError, ValueError])
def test_an_exception_within_a_capture_leaves_none_open(error):
    def fails(x: Tensor) -> tuple[Tensor, ...]:
        if torch.cuda.is_current_stream_capturing():
            raise error
        return (x * x,)

    x = torch.randn(8, device="cuda")
    with pytest.raises(error):
        CudaGraph(fails, (x,), None)
    in_order()


def test_a_graph_may_be_dropped_while_the_gpu_is_at_it():
    x = torch.randn(1 << 24, device="cuda")

    def slow(x: Tensor) -> tuple[Tensor, ...]:
        y = x
        for _ in range(50):
            y = (y * x).tanh()
        return (y,)

    wanted = slow(x)[0]
    store = GraphCache(CudaGraph)
    for _ in range(EAGER_CALLS + 1):
        store(HERE, "slow", slow, (x,), 1 << 30)
    torch.cuda.synchronize()
    got = [store(HERE, "slow", slow, (x,), 1 << 30)[0] for _ in range(5)]
    store.enable(False)
    torch.cuda.empty_cache()
    others = [torch.full_like(x, torch.nan) for _ in range(20)]
    for y in got:
        assert torch.equal(y, wanted)
    assert len(others) == 20


def test_memory_is_bounded_and_comes_back():
    def reserved() -> int:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    def work() -> None:
        for n in (700, 900, 1100):
            for seed in range(EAGER_CALLS + 2):
                results(leaves(seed, n_query=n, n_key=n))

    without_graphs(work)
    before = reserved()
    work()
    assert len(cache._graphs) == 6
    inputs_of_a_graph = sum(x.nbytes for x in leaves(0))
    assert cache._graphs.n_bytes > 6 * inputs_of_a_graph
    held = reserved() - before
    assert held > 0
    set_cuda_graphs(False)
    assert cache._graphs.n_bytes == 0
    assert reserved() <= before
