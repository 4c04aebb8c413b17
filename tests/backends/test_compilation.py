"""One compilation for all lengths and batches: torch.compile's tracing, which needs no GPU, is counted; no kernel is made."""

from __future__ import annotations

import pickle
from functools import cache, partial

import pytest
import torch
from support.cases import unchecked
from torch._dynamo.backends.common import aot_autograd

from moba_flex import moba_attention
from moba_flex.backends import compilation, flex_calls
from moba_flex.backends.compilation import any_length, compiled


@pytest.fixture
def traced(monkeypatch) -> list[str]:
    """The name of a function each time that it is traced."""
    names: list[str] = []
    compile_with(monkeypatch, lambda graph, _, call: names.append(call.__code__.co_name) or graph.forward)
    return names


def compile_with(monkeypatch, backend) -> None:
    """Calls of FlexAttention are compiled on a CPU too, by `backend(graph, inputs, call)`."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, **options: compile_(call, backend=partial(backend, call=call), **options))
    monkeypatch.setattr(flex_calls, "compile_on_gpu", lambda call, key, is_cuda: compiled(call, key))
    for name in ("_forward_call", "_backward_call"):  # none that other tests have made
        monkeypatch.setattr(flex_calls, name, cache(getattr(flex_calls, name).__wrapped__))
    torch._dynamo.reset()


def call(n_query: int, n_key: int, rows: int, transposed: bool = False) -> None:
    """Forward and backward, with two key heads, so never one element of FlexAttention's batch."""
    sizes = (4, n_query), (2, n_key), (2, n_key)
    if transposed:  # [B, N, H, D] in memory
        query, key, value = (torch.randn(rows, n, h, 16).transpose(1, 2).requires_grad_() for h, n in sizes)
    else:
        query, key, value = (torch.randn(rows, h, n, 16, requires_grad=True) for h, n in sizes)
    unchecked(query, key, value, block_size=16, top_k=3, implementation="flex").sum().backward()


class Moba(torch.nn.Module):
    def __init__(self, block_size: int) -> None:
        super().__init__()
        self.block_size = block_size

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return moba_attention(query, key, value, block_size=self.block_size, top_k=3)


def operands(n_tokens: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(n_tokens)
    return tuple(torch.randn(1, 1, n_tokens, 8, generator=generator) for _ in range(3))


@pytest.mark.parametrize("block_size", [16, 128])
def test_the_operation_is_one_graph_for_all_lengths(block_size):
    torch._dynamo.reset()
    graphs, model = [], Moba(block_size)
    call = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True, dynamic=True)
    for n_tokens in (129, 100, 300):  # 128 tokens are nothing to it
        torch.testing.assert_close(call(*operands(n_tokens)), model(*operands(n_tokens)))
    assert len(graphs) == 1


def test_the_operation_is_exported_for_lengths_on_both_sides_of_128_tokens():
    n_tokens, model = torch.export.Dim("n_tokens", min=20, max=1000), Moba(16)
    exported = torch.export.export(model, operands(40), dynamic_shapes=({2: n_tokens},) * 3).module()
    for n in (20, 128, 300):
        torch.testing.assert_close(exported(*operands(n)), model(*operands(n)))


LENGTHS = [(150, 150), (40, 40), (128, 128), (129, 129), (33, 100), (90, 128), (200, 200), (60, 60)]


@pytest.mark.parametrize("transposed", [False, True])
def test_all_routed_lengths_share_one_compilation_of_each_call(traced, transposed):
    for lengths in LENGTHS:
        for rows in (1, 2):
            call(*lengths, rows, transposed)
    assert len(traced) == len(set(traced)) == 4, traced  # local and routed, forward and backward


def test_token_strides_of_transposed_inputs_are_constants_of_the_kernels(monkeypatch):
    """As variables they take registers, and the kernels up to 2.7 times as long. Lengths stay variables."""
    strides: list[list[str]] = []

    def keep(graph, inputs, call):
        if call.__code__.co_name.startswith("moba_flex_forward"):
            values = [node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"]
            strides.append([str(x.stride(2)) for x in values if isinstance(x, torch.Tensor) and x.is_floating_point()])
        return graph.forward

    compile_with(monkeypatch, keep)
    for n in (150, 200, 90):
        query, key, value = (torch.randn(1, n, h, 16).transpose(1, 2) for h in (4, 2, 2))
        unchecked(query, key, value, block_size=16, top_k=3, implementation="flex")
    assert strides == [["64", "32", "32"], ["16", "16", "16"]]  # local and routed; a variable would be called s50, or 16*s50


def test_a_capture_that_would_have_to_compile_is_told_what_to_do(monkeypatch):
    def fails(graph, inputs, call):
        raise RuntimeError("of the compiler")

    compile_with(monkeypatch, fails)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="of the compiler"):
        call(150, 150, 1)
    monkeypatch.setattr(compilation, "being_captured", lambda: True)
    with pytest.raises(RuntimeError, match="make the same call before the capture"):
        call(150, 150, 1)


def test_more_compilations_than_torch_compile_allows_are_no_error(traced):
    """Each set of sizes of 1 has one of its own."""
    double = compiled(lambda *tensors: [2 * x for x in tensors], ("doubled",))
    for ones in range(16):
        tensors = [torch.ones(1 if ones >> i & 1 else 3, 2) for i in range(4)]
        assert [x.tolist() for x in double(*any_length(*tensors))] == [(2 * x).tolist() for x in tensors]
    assert len(traced) == 16 > torch._dynamo.config.recompile_limit
    assert double(*any_length(*tensors))[0].shape == (1, 2) and len(traced) == 16


def test_a_later_compilation_serves_all_lengths_too(traced):
    """Whatever it is made for: here torch.compile has forgotten those before."""
    call(300, 300, 2)
    torch._dynamo.reset()
    traced.clear()
    for n in (300, 60, 200):
        call(n, n, 2)
    assert len(traced) == len(set(traced)) == 4, traced


def test_graphs_can_be_kept_on_disk(monkeypatch):
    """torch.compile's cache has the pickled graph in its key, and silently does without one where that fails."""
    kept = []

    def keep(graph, _):
        kept.append(pickle.dumps(graph))
        return graph.forward

    compile_with(monkeypatch, lambda graph, inputs, call: aot_autograd(fw_compiler=keep)(graph, inputs))
    call(50, 50, 2)
    assert len(kept) == 4, "own blocks and routed ones, forward and backward"
