"""One compilation for all lengths and batches: torch.compile's tracing, which needs no GPU, is counted; no kernel is made."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from moba_flex import flex
from moba_flex.compiled import compiled
from moba_flex.functional import attend


@pytest.fixture
def traced(monkeypatch) -> list[str]:
    """The name of a function each time that it is traced."""
    names, compile_ = [], torch.compile

    def counting(call, **options):
        return compile_(call, backend=lambda graph, _: names.append(call.__code__.co_name) or graph.forward, **options)

    monkeypatch.setattr(torch, "compile", counting)
    monkeypatch.setattr(flex, "_compile", lambda call, settings, is_cuda: compiled(call, settings))
    for name in ("_forward_call", "_backward_call"):  # none that other tests have made
        monkeypatch.setattr(flex, name, cache(getattr(flex, name).__wrapped__))
    torch._dynamo.reset()
    return names


def call(n_query: int, n_key: int, rows: int) -> None:
    """Forward and backward, with two key heads, so never one element of FlexAttention's batch."""
    query, key, value = (torch.randn(rows, h, n, 16, requires_grad=True) for h, n in ((4, n_query), (2, n_key), (2, n_key)))
    attend(query, key, value, block_size=16, top_k=3, implementation="flex").sum().backward()


SHORT = [(300, 300), (40, 40), (128, 128), (129, 129), (500, 500), (2, 300), (128, 512), (33, 511), *((n, n) for n in range(20, 500, 40))]
ROUTED = [(150, 150), (40, 40), (128, 128), (129, 129), (33, 100), (90, 128), (200, 200), (60, 60)]


def test_all_short_lengths_share_one_compilation_forward_and_one_backward(traced):
    for lengths in SHORT:
        for rows in (1, 2):
            call(*lengths, rows)
    assert len(traced) == len(set(traced)) == 2, traced


def test_all_routed_lengths_share_one_compilation_of_each_call(traced, monkeypatch):
    monkeypatch.setattr("moba_flex.attention.few_blocks", lambda *_: False)
    for lengths in ROUTED:
        for rows in (1, 2):
            call(*lengths, rows)
    assert len(traced) == len(set(traced)) == 4, traced  # local and routed, forward and backward


@pytest.mark.parametrize("masked", [True, False])
def test_a_later_compilation_serves_all_lengths_too(traced, monkeypatch, masked):
    """Whatever it is made for: here torch.compile has forgotten those before."""
    if not masked:
        monkeypatch.setattr("moba_flex.attention.few_blocks", lambda *_: False)
    call(300, 300, 2)
    torch._dynamo.reset()
    traced.clear()
    for n in (300, 60, 200):
        call(n, n, 2)
    assert len(traced) == len(set(traced)) == (2 if masked else 4), traced
