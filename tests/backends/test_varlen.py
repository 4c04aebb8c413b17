"""PyTorch's attention, for calls that read every block on a GPU: with what it is called, and what is made of it. A stand-in computes it."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.cases import laid_out

from moba_flex import dispatch, explain, moba_attention, moba_attention_varlen
from moba_flex.backends import paths, varlen
from moba_flex.core import validation

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
        found.append({"max_q": max_q, "max_k": max_k, "dtypes": {of_queries.dtype, of_keys.dtype}, "window_size": window_size})
        assert all(_can_be_loaded(x) for x in (query, key, value))
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


def bounds(*lengths: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)


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
    assert calls == [{"max_q": min(longest, sum(queries)), "max_k": longest, "dtypes": {torch.int32}, "window_size": (-1, 0)}]


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
        ((64, 3), {"scale": 1e-30}, "scale"),
    ],
    ids=str,
)
def test_other_calls_are_routed(calls, lengths, change, why):
    x = torch.randn(sum(lengths), 2, 8).bfloat16()
    assert explain(x, x, cu_seqlens=bounds(64, sum(lengths) - 64), **BLOCKS).path == ("routed" if "top_k" in why else "dense")
    found = explain(x, x, cu_seqlens=bounds(*lengths), **{**BLOCKS, **change})
    assert found.path == "routed" and why in found.reasons["dense attention"]


def test_a_scale_of_which_pytorch_makes_nan_is_routed_for_rows_too(calls):
    x = torch.randn(1, 2, 30, 8).bfloat16()
    assert [explain(x, x, **BLOCKS, scale=scale).path for scale in (0.1, 0.0, -0.1, 1e-30)] == ["dense", *["routed"] * 3]


@pytest.mark.parametrize("said", ["GPU", "32 tokens", "8.0", "192"])
def test_what_the_kernels_do_not_take_is_said(monkeypatch, said):
    class OnGpu:
        is_cuda, device, shape = said != "GPU", "cuda:0", (1, 4, 3199 if said == "32 tokens" else 3200, 256)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    capability = {"8.0": (7, 5), "192": (8, 6)}.get(said, (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert said in varlen.obstacle(OnGpu(), 100)
    OnGpu.is_cuda, OnGpu.shape = True, (1, 4, 3200, 192)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert varlen.obstacle(OnGpu(), 100) is None and "too many" in varlen.obstacle(OnGpu(), 70_000)


def test_a_traced_call_is_routed(calls):
    """A graph does not know the lengths."""
    x = torch.randn(67, 2, 8).bfloat16()
    settings = dict.fromkeys(("padded", "sinks", "return_lse"), False)
    reason = paths.dense_obstacle(
        *(x.transpose(0, 1)[None],) * 3,
        paths.AttentionSettings(16, 4, scale=0.4, implementation="flex"),
        cu_seqlens=bounds(64, 3),
        longest=None,
        **settings,
    )
    assert "graph" in reason
