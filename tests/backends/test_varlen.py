"""PyTorch's attention, for calls that read every block on a GPU: with what it is called, and what is made of it. A stand-in computes it."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.cases import bounds, laid_out

from moba_flex import dispatch, explain, moba_attention, moba_attention_varlen
from moba_flex.backends import paths, varlen
from moba_flex.core import validation
from moba_flex.core.settings import AttentionSettings

BLOCKS = {"block_size": 16, "top_k": 4}


def _can_be_loaded(x: torch.Tensor) -> bool:
    return x.stride(-1) == 1 and all(stride % 8 == 0 for stride in x.stride()[:-1]) and x.data_ptr() % 16 == 0


class _Loads(torch.autograd.Function):
    """A kernel's output: its backward pass loads gradients."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        assert _can_be_loaded(grad)
        return grad


@pytest.fixture
def calls(monkeypatch) -> list[dict]:
    """The decisions of a GPU for tensors on a CPU, and what the stand-in for `varlen_attn` was called with."""
    found: list[dict] = []

    def by_sequence(query, key, value, of_queries, of_keys, max_q, max_k, *, scale, window_size, **grouped):
        found.append({"max_q": max_q, "max_k": max_k, "window_size": window_size})
        assert all(_can_be_loaded(x) for x in (query, key, value))
        assert all(x.dtype == torch.int32 and x.is_contiguous() for x in (of_queries, of_keys))
        assert not torch.is_autocast_enabled("cpu")
        assert query.dtype == torch.bfloat16 and set(grouped) <= {"enable_gqa"}
        outs, repeats = [], query.shape[1] // key.shape[1]
        for (a, b), (c, d) in zip(*(itertools.pairwise(x.tolist()) for x in (of_queries, of_keys))):
            assert b - a <= max_q and d - c <= max_k
            q, k, v = (x.transpose(0, 1) for x in (query[a:b], key[c:d], value[c:d]))
            k, v = (x.repeat_interleave(repeats, 0) for x in (k, v))
            later = torch.ones(b - a, d - c, dtype=torch.bool).triu(d - c - (b - a) + 1)
            outs.append(((q @ k.mT).float() * scale).masked_fill(later, -torch.inf).softmax(-1).to(v.dtype) @ v)
        return _Loads.apply(torch.cat(outs, 1).transpose(0, 1).contiguous())

    monkeypatch.setattr(varlen, "varlen_attn", by_sequence)
    monkeypatch.setattr(varlen, "obstacle", lambda query, n_sequences: None)
    monkeypatch.setattr(validation, "resolve_implementation", lambda asked, query: "flex" if asked == "auto" else asked)
    return found


@pytest.mark.parametrize("layout", ["contiguous", "tokens first", "width first", "sliced", "every other", "expanded"])
@pytest.mark.parametrize(
    ("queries", "keys"), [((64, 3, 0, 40), None), ((1, 30, 0, 2), (64, 30, 10, 5)), ((64,), None), ((0, 1, 0), None)], ids=str
)
def test_values_and_gradients_are_those_of_the_specification(calls, layout, queries, keys):
    shapes = (1, 4, sum(queries), 8), (1, 2, sum(keys or queries), 8), (1, 2, sum(keys or queries), 8)
    tensors = [laid_out(torch.randn(shape).bfloat16(), layout)[0].transpose(0, 1) for shape in shapes]
    given = {"cu_seqlens": bounds(*queries), "cu_seqlens_k": None if keys is None else bounds(*keys), "scale": 0.4, **BLOCKS}
    results = []
    for implementation, dtype in (("auto", torch.bfloat16), ("naive", torch.float64)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
        out = moba_attention_varlen(*leaves, **given, implementation=implementation)
        assert out.shape == leaves[0].shape and out.is_contiguous()
        results.append([out, *torch.autograd.grad(out.double().sin().sum(), leaves)])
    for got, wanted in zip(*results):
        torch.testing.assert_close(got.double(), wanted, rtol=0.05, atol=0.03)
    longest = max(keys or queries)
    assert calls == [{"max_q": min(longest, sum(queries)), "max_k": longest, "window_size": (-1, 0)}]


def test_bounds_may_lie_in_any_way(calls):
    x = torch.randn(70, 2, 8).bfloat16()
    table = torch.tensor([[0, 9], [64, 9], [70, 9]], dtype=torch.int32)
    wanted = moba_attention_varlen(x, x, x, bounds(64, 6), **BLOCKS)
    for given in (table[:, 0], table[:, 0].long()):
        assert torch.equal(moba_attention_varlen(x, x, x, given, **BLOCKS), wanted)
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(moba_attention_varlen(x, x, x, bounds(64, 6), **BLOCKS), wanted)
    assert len(calls) == 4
    with pytest.raises(NotImplementedError, match="naive"):
        torch.func.jvp(lambda x: moba_attention_varlen(x, x, x, bounds(64, 6), **BLOCKS), (x,), (x,))


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "rows"])
def test_gradients_may_be_missing_or_come_in_batches(calls, packed):
    class NoGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    x = torch.randn(1, 2, 20, 8).bfloat16().requires_grad_()
    tokens = x[0].transpose(0, 1)
    out = moba_attention_varlen(tokens, tokens, tokens, bounds(20), **BLOCKS) if packed else moba_attention(x, x, x, **BLOCKS)
    (grad,) = torch.autograd.grad(NoGradient.apply(out).sum(), x, allow_unused=True, retain_graph=True)
    assert grad is None or not grad.any()
    many = torch.randn(3, *out.shape).bfloat16()
    if not packed:  # the stand-in's own backward pass cannot
        (batch,) = torch.autograd.grad(out, x, many, is_grads_batched=True, retain_graph=True)
        for grad, one in zip(batch, many):
            torch.testing.assert_close(grad, torch.autograd.grad(out, x, one, retain_graph=True)[0], rtol=0.02, atol=0.02)


def test_short_rows_are_compiled_for_any_number_of_heads(calls):
    """PyTorch wants to know for certain whether heads are grouped."""
    compiled = torch.compile(lambda q, k: moba_attention(q, k, k, **BLOCKS), fullgraph=True, dynamic=True, backend="aot_eager")
    for heads in (4, 2, 6):
        query, key = torch.randn(1, heads, 20, 8).bfloat16(), torch.randn(1, 2, 20, 8).bfloat16()
        torch.testing.assert_close(compiled(query, key), moba_attention(query, key, key, **BLOCKS))


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "rows"])
@pytest.mark.parametrize("layout", ["odd", "contiguous", "tokens first", "width first", "sliced", "every other", "expanded"])
def test_the_kernels_get_rows_that_they_can_load(calls, monkeypatch, packed, layout):
    """PyTorch's kernels load 16 bytes at a time, forward and backward, and do not check that they can."""
    fused = dispatch.F.scaled_dot_product_attention

    def checked(query, *others, **given):
        assert all(_can_be_loaded(x) for x in (query, *others))
        return _Loads.apply(fused(query, *others, **given))

    monkeypatch.setattr(dispatch.F, "scaled_dot_product_attention", checked)
    if layout == "odd":
        x = torch.randn(20 * 16 + 3).bfloat16()[3:].view(1, 2, 20, 8).requires_grad_()
    else:
        x = laid_out(torch.randn(1, 2, 20, 8).bfloat16(), layout).requires_grad_()
    if packed:
        tokens = x.squeeze(0).transpose(0, 1)
        out = moba_attention_varlen(tokens, tokens, tokens, bounds(20, dtype=torch.int64), **BLOCKS)
    else:
        out = moba_attention(x, x, x, **BLOCKS)
    joined = torch.cat([torch.zeros(3, dtype=out.dtype), out.flatten()])  # whose gradient is cut at an odd place
    (grad,) = torch.autograd.grad(joined.double().sin().sum(), x)
    wide = x.detach().double().requires_grad_()
    wanted = moba_attention(wide, wide, wide, **BLOCKS, implementation="naive")
    torch.testing.assert_close(grad.double(), torch.autograd.grad(wanted.sin().sum(), wide)[0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("lengths", "change", "why"),
    [
        ((64, 65), {}, "more than top_k blocks"),
        ((64, 3), {"softcap": 2.0}, "softcap"),
        ((64, 3), {"sinks": torch.zeros(2)}, "sinks"),
        ((64, 3), {"return_lse": True}, "log-sum-exp"),
        ((64, 3), {"causal": False}, "not causal"),
        ((64, 3), {"scale": -0.5}, "scale"),
        ((64, 3), {"scale": 0.0}, "scale"),
        ((64, 3), {"scale": 9e-7}, "scale"),
    ],
    ids=str,
)
def test_other_calls_are_routed(calls, lengths, change, why):
    x = torch.randn(sum(lengths), 2, 8).bfloat16()
    assert explain(x, x, cu_seqlens=bounds(64, sum(lengths) - 64), **BLOCKS).path == ("routed" if "top_k" in why else "dense")
    found = explain(x, x, cu_seqlens=bounds(*lengths), **{**BLOCKS, **change})
    assert found.path == "routed" and why in found.reasons["dense attention"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"padding_mask": torch.tensor([[True] * 20 + [False] * 10])}, "padding"),
        ({"query": torch.randn(1, 2, 7, 8).bfloat16()}, "fewer queries"),
        ({"value": torch.randn(1, 2, 30, 16).bfloat16()}, "widths"),
        ({name: torch.randn(1, 2, 30, 12).bfloat16() for name in ("query", "key")}, "widths"),
        ({name: torch.randn(1, 2, 30, 8) for name in ("query", "key")}, "float32"),
    ],
    ids=["padding", "few queries", "wide values", "width 12", "float32"],
)
def test_other_short_rows_are_routed(calls, change, why):
    x = torch.randn(1, 2, 30, 8).bfloat16()
    found = explain(**{"query": x, "key": x, **BLOCKS, **change})
    assert found.path == "routed" and why in found.reasons["dense attention"]


def test_triton_refuses_more_keys_than_queries_however_short(calls):
    x, given = torch.randn(67, 2, 8).bfloat16(), {"cu_seqlens": bounds(1, 3), "cu_seqlens_k": bounds(64, 3), **BLOCKS}
    assert explain(x[:4], x, **given).path == "dense"
    found = explain(x[:4], x, **given, implementation="triton")
    assert found.path == "routed" and "cu_seqlens_k" in found.reasons["dense attention"]


def test_a_scale_of_which_pytorch_makes_nan_is_routed_for_rows_too(calls):
    x = torch.randn(1, 2, 30, 8).bfloat16()
    assert [explain(x, x, **BLOCKS, scale=scale).path for scale in (0.1, 0.0, -0.1, 1e-30)] == ["dense", *["routed"] * 3]


@pytest.mark.parametrize("said", ["GPU", "AMD", "FlashAttention", "32 queries", "8.0", "192"])
def test_what_the_kernels_do_not_take_is_said(monkeypatch, said):
    class OnGpu:
        is_cuda, device, shape = said != "GPU", "cuda:0", (1, 4, 3199 if said == "32 queries" else 3200, 256)

    monkeypatch.setattr(torch.version, "cuda", None if said == "AMD" else "13.0")
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: said != "FlashAttention")
    capability = {"8.0": (7, 5), "192": (8, 6)}.get(said, (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert said.replace("AMD", "NVIDIA") in varlen.obstacle(OnGpu(), 100)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    OnGpu.is_cuda, OnGpu.shape = True, (1, 4, 3200, 192)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert varlen.obstacle(OnGpu(), 100) is None and "too many" in varlen.obstacle(OnGpu(), 70_000)


def test_a_call_whose_lengths_are_not_known_is_routed(calls):
    """As in a graph."""
    x = torch.randn(67, 2, 8).bfloat16()
    settings = dict.fromkeys(("padded", "sinks", "return_lse"), False)
    reason = paths.dense_obstacle(
        *(x.transpose(0, 1)[None],) * 3,
        AttentionSettings(16, 4, scale=0.4, implementation="flex"),
        cu_seqlens=bounds(64, 3),
        longest=None,
        **settings,
    )
    assert "not known" in reason
