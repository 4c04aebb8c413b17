"""`explain` names the path that a call really takes, and why it takes no other."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.attention.flex_attention as flex_module
from support.cases import bounds, unchecked

import moba_flex
from moba_flex import dispatch, explain, moba_attention
from moba_flex.analysis.explain import share_of_keys
from moba_flex.backends import dense_mask, flex, paths
from moba_flex.core.settings import AttentionSettings

CALL = {"block_size": 16, "top_k": 3}


def tensors(n_query: int = 100, n_key: int = 100, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(1, 4, n_query, 16).to(dtype), torch.randn(1, 2, n_key, 16).to(dtype)


@pytest.fixture
def as_if_on_cuda(monkeypatch):
    """The decisions of a GPU for tensors on a CPU."""
    monkeypatch.setattr("moba_flex.core.validation.resolve_implementation", lambda *_: "flex")


def test_on_a_cpu_a_call_is_routed():
    found = explain(*tensors(), **CALL)
    assert (found.path, found.implementation, found.cuda_graph) == ("routed", "eager", False)
    assert str(found).startswith("100 tokens, block 16, top-3: routed (eager)")


@pytest.mark.parametrize(("implementation", "path"), [("naive", "reference"), ("eager", "routed")])
def test_an_implementation_that_is_asked_for_is_named(implementation, path):
    found = explain(*tensors(), **CALL, implementation=implementation)
    assert (found.path, found.implementation) == (path, implementation)


def test_no_queries_are_an_empty_call():
    assert explain(*tensors(n_query=0), **CALL).path == "empty"


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ({"block_size": 64}, "dense"),
        ({}, "routed"),
        ({"block_size": 2}, "routed"),
        ({"top_k": 1}, "routed"),
        ({"causal": False}, "routed"),
        ({"padding_mask": torch.ones(1, 100).bool()}, "routed"),
        ({"block_size": 64, "return_lse": True}, "routed"),
    ],
    ids=str,
)
def test_the_path_is_the_one_that_the_operation_takes(as_if_on_cuda, monkeypatch, given, path):
    query, key = tensors(dtype=torch.bfloat16)
    call, taken = {**CALL, **given}, []
    found = explain(query, key, **call)
    assert found.path == path
    monkeypatch.setattr(flex, "attend", lambda *_: taken.append("routed"))
    unchecked(query, key, key, **call, implementation="flex")
    assert set(taken) == ({path} - {"dense"})


def test_packed_sequences_are_explained_as_packed():
    query, key = (x[0].transpose(0, 1) for x in tensors())
    found = explain(query, key, **CALL, cu_seqlens=torch.tensor([0, 40, 100], dtype=torch.int32))
    assert found.path == "routed" and "GPU" in found.reasons["CUDA graph"]
    assert "packed" in found.reasons["dense attention"] or "flex" in found.reasons["dense attention"]


def test_packed_sequences_with_more_keys_are_explained_too():
    query, key = (x[0].transpose(0, 1) for x in tensors())
    bounds = {"cu_seqlens": torch.tensor([0, 40, 41]), "cu_seqlens_k": torch.tensor([0, 99, len(key)])}
    found = explain(query[:41], key, **CALL, **bounds)
    assert found.path == "routed" and f"41 queries on {len(key)} tokens" in found.call and 0 < found.share_of_keys < 1
    with pytest.raises(ValueError, match="cu_seqlens_k must give each sequence at least as many keys"):
        explain(query[:41], key, **CALL, **{**bounds, "cu_seqlens_k": torch.tensor([0, 39, len(key)])})


@pytest.mark.parametrize("enabled", [True, False])
def test_cuda_graphs_are_named(as_if_on_cuda, monkeypatch, enabled):
    monkeypatch.setattr(paths, "capture_obstacle", lambda *_: None)
    before = moba_flex.set_cuda_graphs(enabled)
    try:
        found = explain(*tensors(), **CALL)
    finally:
        moba_flex.set_cuda_graphs(before)
    assert found.cuda_graph is enabled
    assert ("from a CUDA graph from call 3 on" in str(found)) is enabled
    assert ("CUDA graph" in found.reasons) is not enabled


def test_what_keeps_a_call_from_a_cuda_graph_is_said(monkeypatch):
    def obstacle(settings: dict) -> str | None:
        x = SimpleNamespace(**{"is_cuda": True, "dtype": torch.bfloat16, "numel": lambda: 8, **settings})
        return paths.capture_obstacle((x,), SimpleNamespace(implementation="flex"))

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert obstacle({}) is None
    assert "bfloat16" in obstacle({"dtype": torch.float32})
    assert "2**25" in obstacle({"numel": lambda: 1 << 26})
    assert "GPU" in obstacle({"is_cuda": False})


@pytest.mark.parametrize(("n_query", "block_size", "top_k"), [(100, 16, 3), (37, 16, 2), (100, 1, 5), (100, 16, 7), (1, 9, 4)])
def test_the_share_of_keys_is_what_queries_read(n_query, block_size, top_k):
    query, key = tensors(n_query)
    dense = moba_flex.select_blocks(query, key, block_size=block_size, top_k=top_k).to_dense()
    token = torch.arange(100)
    read = dense[..., token // block_size] & (token <= torch.arange(100 - n_query, 100)[:, None])
    wanted = read[0, 0].sum() / (torch.arange(100 - n_query, 100) + 1).sum()
    assert share_of_keys(n_query, 100, block_size, top_k) == pytest.approx(float(wanted))


def test_bad_input_is_refused_as_the_operation_refuses_it():
    query, key = tensors()
    for call in (explain, lambda *args, **given: moba_attention(*args, key, **given)):
        with pytest.raises(ValueError, match="block_size must be an int of at least 1, but is 0"):
            call(query, key, block_size=0, top_k=3)


def test_it_is_data_too():
    assert explain(*tensors(), **CALL).to_dict()["path"] == "routed"


@pytest.mark.parametrize("block_size, top_k", [(1, 1), (4, 1), (4, 2), (5, 3), (16, 2), (200, 3)])
@pytest.mark.parametrize("n_query, n_key", [(1, 1), (60, 60), (7, 61), (1, 60)])
def test_the_share_of_keys_is_the_sum_over_queries(block_size, top_k, n_query, n_key):
    positions = range(n_key - n_query, n_key)
    read = sum(min(i + 1, (top_k - 1) * block_size + i % block_size + 1) for i in positions)
    assert share_of_keys(n_query, n_key, block_size, top_k) == read / sum(i + 1 for i in positions)


def test_the_block_size_that_is_asked_for_is_shown():
    assert explain(*tensors(40, 40), block_size=256, top_k=3).call == "40 tokens, block 256, top-3"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"padding_mask": torch.ones(1, 100).bool(), "cu_seqlens": torch.tensor([0, 100])},
            "padding_mask is for rows of a batch, and cu_seqlens",
        ),
        ({"cu_seqlens_k": torch.tensor([0, 100])}, "cu_seqlens_k is for packed sequences, and needs cu_seqlens"),
    ],
    ids=str,
)
def test_arguments_that_no_call_takes_together_are_refused(given, said):
    query, key = tensors()
    with pytest.raises(ValueError, match=said):
        explain(query, key, **CALL, **given)


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ({}, "dense mask"),
        ({"n_query": 30}, "dense mask"),
        ({"padded": True}, "dense mask"),
        ({"lengths": (100, 0, 200)}, "dense mask"),
        ({"lengths": (3,) * 100}, "routed"),  # more blocks than a query has bits
        ({"n_key": 2000, "n_query": 2000}, "routed"),
        ({"block_size": 32}, "routed"),
        ({"causal": False}, "routed"),
        ({"top_k": 1}, "routed"),
        ({"width": 256}, "routed"),
    ],
    ids=str,
)
def test_a_dense_mask_is_named_where_the_operation_takes_it(monkeypatch, as_if_on_cuda, given, path):
    """Decided twice: by `explain` from its arguments, by the operator from the layout."""
    monkeypatch.setattr(paths, "on_nvidia_gpu", lambda _: True)
    monkeypatch.setattr(flex_module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    taken, attend, under_mask = [], flex.attend, dense_mask.attend
    monkeypatch.setattr(flex, "attend", lambda *args: taken.append("routed") or attend(*args))
    monkeypatch.setattr(dense_mask, "attend", lambda *args: taken.append("dense mask") or under_mask(*args))
    lengths = given.get("lengths")
    n_key = sum(lengths) if lengths else given.get("n_key", 300)
    n_query, width = given.get("n_query", n_key), given.get("width", 16)
    call = {"block_size": 64, "top_k": 3} | {name: given[name] for name in ("block_size", "top_k", "causal") if name in given}
    query, key = torch.randn(1, 4, n_query, width).bfloat16(), torch.randn(1, 2, n_key, width).bfloat16()
    if lengths:
        packed = {"cu_seqlens": bounds(*lengths), "return_lse": True}
        found = explain(*(x[0].transpose(0, 1) for x in (query, key)), **call, **packed)
        settings = AttentionSettings(**call, scale=0.25, implementation="flex")
        dispatch.attend(query, key, key, settings, cu_seqlens=packed["cu_seqlens"], longest=max(lengths), return_lse=True)
    else:
        mask = {"padding_mask": torch.arange(n_key)[None] > 20} if given.get("padded") else {}
        found = explain(query, key, **call, **mask, return_lse=True)
        unchecked(query, key, key, **call, **mask, return_lse=True, implementation="flex")
    assert found.path == path and set(taken) == {path}
    assert ("dense mask" in found.reasons) == (path == "routed")
