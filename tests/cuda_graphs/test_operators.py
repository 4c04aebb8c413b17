"""Graphs of the operation itself: which calls of `moba_attention` are captured, with which masks, and the layouts that graphs hold."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.attention.flex_attention as flex_module
from support.cases import unchecked
from support.stand_in_graphs import StandIn, assert_equal
from torch import Tensor

from moba_flex import moba_attention, moba_attention_varlen
from moba_flex.backends import flash, paths
from moba_flex.backends.paths import MAX_CAPTURED_ELEMENTS, capture_obstacle
from moba_flex.core import layout_builders, memo
from moba_flex.core.layout_builders import _persistent_layout, dense_layout
from moba_flex.core.settings import AttentionSettings
from moba_flex.cuda_graphs import cache
from moba_flex.cuda_graphs.cache import EAGER_CALLS, MANY_CALLS, GraphCache
from moba_flex.dispatch import attend

SETTINGS = AttentionSettings(8, 3, scale=0.25, implementation="flex")


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


# Padding and packed sequences


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
    layouts, build = [], layout_builders._layout_from
    monkeypatch.setattr(layout_builders, "_layout_from", lambda *args: layouts.append(weakref.ref(made := build(*args))) or made)
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


# Layouts, and the implementation for CUDA


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
