"""What one CUDA graph asks of PyTorch, and that a capture leaves it in order however it ends, without a GPU."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from moba_flex.cuda_graphs import capture
from moba_flex.cuda_graphs.capture import CudaGraph, CudaPool


class StandInCuda:
    """What `CudaGraph` asks of PyTorch, in the order asked. `fails` names what raises; `elsewhere`: allocations go to another pool."""

    def __init__(self, monkeypatch, fails: frozenset[str] = frozenset(), elsewhere: bool = False):
        self.asked, self.fails, self.elsewhere, self.in_use = [], fails, elsewhere, []
        stream = SimpleNamespace(wait_stream=lambda other: None, wait_event=lambda event: self.ask("wait_event"))
        monkeypatch.setattr(capture, "_capture_stream", lambda device: stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
        monkeypatch.setattr(torch.cuda, "memory_snapshot", self.snapshot)
        monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: self.ask("record")))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", self.graph)
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            monkeypatch.setattr(torch._C, name, lambda device, pool, name=name: self.ask(name), raising=False)

    def ask(self, name: str) -> None:
        self.asked.append(name)
        if name in self.fails:
            raise RuntimeError(name)

    def graph(self) -> SimpleNamespace:
        def capture_begin(capture_error_mode, pool=None):
            assert capture_error_mode == "thread_local"
            self.ask("capture_begin")

        return SimpleNamespace(
            capture_begin=capture_begin, **{name: partial(self.ask, name) for name in ("capture_end", "replay", "reset")}
        )

    def snapshot(self, handle: tuple[int, int], include_traces: bool) -> list[dict]:
        assert not include_traces
        if self.elsewhere:
            return []
        free, taken = {"state": "inactive", "size": 1 << 9}, {"state": "active_allocated", "size": 1 << 9}
        return [{"address": x.data_ptr() - (1 << 9), "total_size": 1 << 20, "blocks": [free, taken, free]} for x in self.in_use]

    def double(self, x: Tensor) -> tuple[Tensor, ...]:
        assert not gc.isenabled()
        self.ask("call")
        self.in_use += [x * 2, x + 1]
        return tuple(self.in_use[-2:])


def test_a_capture_asks_pytorch_for_what_it_needs_in_this_order(monkeypatch):
    cuda = StandInCuda(monkeypatch)
    graph = CudaGraph(cuda.double, (torch.ones(3),), None)
    graph.replay()
    graph.used()
    graph.release()
    assert cuda.asked == ["capture_begin", "call", "capture_end", "replay", "record", "wait_event", "reset"]
    assert graph.pool.usable
    assert graph.pool.n_bytes == 2 << 20
    CudaGraph(cuda.double, (torch.ones(3),), graph.pool)  # what is there already is no business of the next graph
    assert gc.isenabled()


def test_memory_that_is_not_the_graphs_own_is_no_graph(monkeypatch):
    cuda = StandInCuda(monkeypatch, elsewhere=True)
    with pytest.raises(RuntimeError, match="its memory is not the graph's own"):
        CudaGraph(cuda.double, (torch.ones(3),), None)
    assert cuda.asked[-1] == "reset"


def test_a_tensor_that_is_kept_from_a_capture_is_no_graph(monkeypatch):
    cuda = StandInCuda(monkeypatch)
    with pytest.raises(RuntimeError, match="its memory is not the graph's own"):
        CudaGraph(lambda x: cuda.double(x)[:1], (torch.ones(3),), None)


def test_without_pytorchs_cache_nothing_is_captured(monkeypatch):
    cuda = StandInCuda(monkeypatch)
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    with pytest.raises(RuntimeError, match="PYTORCH_NO_CUDA_MEMORY_CACHING"):
        CudaGraph(cuda.double, (torch.ones(3),), None)
    assert not cuda.asked


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_exception_leaves_no_capture_open(monkeypatch, error):
    def fails(x: Tensor):
        raise error

    cuda, pool = StandInCuda(monkeypatch), CudaPool()
    with pytest.raises(error):
        CudaGraph(fails, (torch.ones(3),), pool)
    assert cuda.asked == ["capture_begin", "capture_end", "reset"]
    assert pool.usable
    assert gc.isenabled()


def test_a_capture_that_cuda_ended_leaves_pytorch_in_order(monkeypatch):
    cuda, pool = StandInCuda(monkeypatch, fails=frozenset({"capture_end"})), CudaPool()
    monkeypatch.setattr(torch, "empty", lambda *shape, device: torch.ones(shape))
    with pytest.raises(RuntimeError, match="capture_end"):
        CudaGraph(cuda.double, (torch.ones(3),), pool)
    ended = ["capture_begin", "call", "capture_end", "capture_end"]
    mended = ["_cuda_endAllocateToPool", "_cuda_releasePool", "capture_begin", "capture_end"]
    assert cuda.asked == [*ended, *mended, "reset"]
    assert not pool.usable
