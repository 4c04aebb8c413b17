"""`moba_flex.compat`: other implementations' functions, against dense masks written from their published definitions.

MoonshotAI/MoBA: equations 2 to 6 of arXiv 2502.13189, and its README. FlashMoBA: its README, and FlashAttention's convention for fewer or
more queries than keys. float64 throughout; random scores are never equal.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cases import assert_same, bounds, examples, random
from torch import Tensor

from moba_flex import compat, moba_attention_varlen
from moba_flex.compat import flash_moba_varlen_func, moba_attn_varlen, moba_attn_varlen_naive

both = pytest.mark.parametrize("function", [moba_attn_varlen, moba_attn_varlen_naive], ids=lambda f: f.__name__)
every = pytest.mark.parametrize("function", [moba_attn_varlen, moba_attn_varlen_naive, flash_moba_varlen_func], ids=lambda f: f.__name__)

sizes = st.lists(st.integers(0, 20), min_size=1, max_size=4)
heads_and_groups = st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)])
widths = st.integers(1, 6)
chunks = st.integers(1, 9) | st.just(32)
topks = st.integers(1, 5) | st.just(64)
seeds = st.integers(0, 2**16)


def operands(n_query: int, n_key: int, heads: tuple[int, int], widths: tuple[int, int], seed: int) -> dict[str, Tensor]:
    shapes = {"q": (n_query, heads[0], widths[0]), "k": (n_key, heads[1], widths[0]), "v": (n_key, heads[1], widths[1])}
    return {name: random(*shape, seed=seed + i).requires_grad_() for i, (name, shape) in enumerate(shapes.items())}


def chosen_keys(q: Tensor, k: Tensor, chunk: int, topk: int, causal: bool) -> Tensor:
    """`[H, Nq, Nk]` bool for one sequence `[Nq, H, D]`, `[Nk, H, D]`: the gate as it is defined, one query at a time."""
    n_query, heads, _ = q.shape
    n_key = k.shape[0]
    visible = torch.zeros(heads, n_query, n_key, dtype=torch.bool)
    means = [part.mean(0) for part in k.split(chunk)] if n_key else []
    for i in range(n_query):
        position = n_key - n_query + i  # the last query lies at the last key
        if causal and position < 0:
            continue
        own = position // chunk
        for head in range(heads):
            past = range(own) if causal else range(len(means))
            scores = {block: float(q[i, head] @ means[block][head]) for block in past}
            best = sorted(past, key=lambda block: -scores[block])
            read = [own, *best[: topk - 1]] if causal else best[:topk]
            for block in read:
                visible[head, i, block * chunk : (block + 1) * chunk] = True
            if causal:
                visible[head, i, position + 1 :] = False
    return visible


def reference(tensors: dict[str, Tensor], q_sizes, k_sizes, chunk: int, topk: int, causal: bool = True, dense: bool = False) -> Tensor:
    """Softmax attention under the mask of `chosen_keys`; with `dense`, to all keys up to the query's own. Queries with no key get 0."""
    outs = []
    for q, k, v in zip(tensors["q"].split(q_sizes), tensors["k"].split(k_sizes), tensors["v"].split(k_sizes)):
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        visible = chosen_keys(q.detach(), k.detach(), max(1, len(k)) if dense else chunk, topk, causal)
        score = torch.einsum("qhd,khd->hqk", q, k) * q.shape[2] ** -0.5
        some = visible.any(-1, keepdim=True)
        weight = score.masked_fill(~visible, -torch.inf).masked_fill(~some, 0).softmax(-1) * visible
        outs.append(torch.einsum("hqk,khd->qhd", weight, v))
    return torch.cat(outs)


def check(out: Tensor, expected: Tensor, tensors: dict[str, Tensor]) -> None:
    assert_same(out, expected, "output")
    upstream = random(*out.shape, seed=1)
    got, wanted = (torch.autograd.grad(x, list(tensors.values()), upstream, materialize_grads=True) for x in (out, expected))
    for name, *pair in zip(tensors, got, wanted):
        assert_same(*pair, f"gradient of {name}")


# MoonshotAI/MoBA


@both
@examples(60)
@given(sizes=sizes, heads=heads_and_groups, width=widths, value_width=widths, chunk=chunks, topk=topks, seed=seeds)
def test_moba_attn_varlen_is_the_reports_attention(function, sizes, heads, width, value_width, chunk, topk, seed):
    tensors = operands(sum(sizes), sum(sizes), heads, (width, value_width), seed)
    out = function(*tensors.values(), bounds(*sizes), max(sizes), chunk, topk)
    dense = function is moba_attn_varlen and topk == 1
    check(out, reference(tensors, sizes, sizes, chunk, topk, dense=dense), tensors)


def test_topk_1_reads_everything_in_the_efficient_function_and_the_own_block_in_the_naive_one():
    tensors = operands(12, 12, (2, 2), (4, 4), seed=0)
    call = (*tensors.values(), bounds(12), 12, 4, 1)
    assert_same(moba_attn_varlen(*call), reference(tensors, [12], [12], 12, 1), "all keys")
    assert_same(moba_attn_varlen_naive(*call), reference(tensors, [12], [12], 4, 1), "own block")
    assert (moba_attn_varlen(*call) - moba_attn_varlen_naive(*call)).abs().max() > 0.1


# FlashMoBA


@examples(80)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=4),
    heads=heads_and_groups,
    width=widths,
    value_width=widths,
    chunk=chunks,
    topk=topks,
    causal=st.booleans(),
    seed=seeds,
)
def test_flash_moba_takes_queries_that_are_fewer_or_more_than_the_keys(pairs, heads, width, value_width, chunk, topk, causal, seed):
    q_sizes, k_sizes = map(list, zip(*pairs))
    tensors = operands(sum(q_sizes), sum(k_sizes), heads, (width, value_width), seed)
    lengths = (bounds(*q_sizes), bounds(*k_sizes), max(q_sizes), max(k_sizes))
    out = flash_moba_varlen_func(*tensors.values(), *lengths, chunk, topk, causal)
    check(out, reference(tensors, q_sizes, k_sizes, chunk, topk, causal), tensors)


@examples(40)
@given(sizes=sizes, heads=heads_and_groups, chunk=chunks, topk=topks, causal=st.booleans(), seed=seeds)
def test_flash_moba_of_self_attention(sizes, heads, chunk, topk, causal, seed):
    tensors = operands(sum(sizes), sum(sizes), heads, (4, 4), seed)
    lengths = (bounds(*sizes), bounds(*sizes), max(sizes), max(sizes))
    out = flash_moba_varlen_func(*tensors.values(), *lengths, chunk, topk, causal=causal)
    check(out, reference(tensors, sizes, sizes, chunk, topk, causal), tensors)


def test_flash_moba_gives_0_to_queries_before_the_first_key():
    tensors = operands(7, 3, (2, 1), (4, 4), seed=0)
    out = flash_moba_varlen_func(*tensors.values(), bounds(7), bounds(3), 7, 3, 2, 2)
    assert torch.equal(out[:4], torch.zeros(4, 2, 4)) and (out[4:] != 0).all()
    out = flash_moba_varlen_func(*tensors.values(), bounds(7), bounds(3), 7, 3, 2, 2, causal=False)
    assert (out != 0).all()


def test_without_causal_the_last_partial_block_is_chosen_by_its_own_mean():
    q, k = torch.zeros(1, 1, 2), torch.zeros(5, 1, 2)
    q[0, 0, 0], k[:, 0, 0] = 1.0, torch.tensor([1.0, 1.0, 1.0, 1.0, 1.5])  # 1.5 would be 0.75 as the mean of 2
    v = torch.arange(5.0)[:, None, None]
    out = flash_moba_varlen_func(q, k, v, bounds(1), bounds(5), 1, 5, moba_chunk_size=2, moba_topk=1, causal=False)
    assert out.item() == 4.0


# What all of them promise


@pytest.mark.parametrize(
    ("function", "published"),
    [
        (moba_attn_varlen, "q, k, v, cu_seqlens, max_seqlen, moba_chunk_size, moba_topk"),
        (moba_attn_varlen_naive, "q, k, v, cu_seqlens, max_seqlen, moba_chunk_size, moba_topk"),
        (
            flash_moba_varlen_func,
            "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, moba_chunk_size, moba_topk, causal=True",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_names_order_and_defaults_are_the_published_ones(function, published):
    parameters = [p.replace(annotation=p.empty) for p in inspect.signature(function).parameters.values()]
    assert ", ".join(map(str, parameters)) == published
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


def call(function, q: Tensor, k: Tensor, v: Tensor, chunk: object = 4, topk: object = 2, **changes) -> Tensor:
    """Self-attention of one sequence, by keywords."""
    if function is flash_moba_varlen_func:
        given = {f"cu_seqlens_{x}": changes.pop("cu_seqlens", bounds(len(t))) for x, t in (("q", q), ("k", k))}
        given |= {"max_seqlen_q": len(q), "max_seqlen_k": len(k)}
    else:
        given = {"cu_seqlens": bounds(len(q)), "max_seqlen": len(q)}
    return function(q=q, k=k, v=v, **{**given, "moba_chunk_size": chunk, "moba_topk": topk, **changes})


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_output_has_the_querys_dtype_and_the_values_width(function, dtype):
    q, k, v = (random(10, heads, width, seed=0, dtype=dtype) for heads, width in ((4, 8), (2, 8), (2, 6)))
    out = call(function, q, k, v)
    assert out.dtype == dtype and out.shape == (10, 4, 6)


@every
def test_the_longest_length_may_be_a_tensor(function):
    x = random(10, 2, 4, seed=0)
    names = [name for name in inspect.signature(function).parameters if name.startswith("max_seqlen")]
    assert torch.equal(call(function, x, x, x, **dict.fromkeys(names, torch.tensor(10))), call(function, x, x, x))


@every
def test_no_tokens_give_no_output(function):
    x = torch.zeros(0, 2, 4, requires_grad=True)
    for topk in (1, 2):
        out = call(function, x, x, x, topk=topk)
        assert out.shape == (0, 2, 4)
        out.sum().backward()


@every
def test_equal_scores_go_to_the_earlier_block(function):
    x = torch.ones(10, 1, 2)
    value = torch.arange(10.0)[:, None, None]
    out = call(function, x, x, value, chunk=2, topk=2)
    assert out[9].item() == pytest.approx((0 + 1 + 8 + 9) / 4)


@every
def test_the_gate_compares_means_of_float32_whatever_the_dtype(function):
    # The second block's mean is 1.00390625, which bfloat16 rounds to the first one's 1.
    key = torch.tensor([1, 1, 1, 1.0078125, 0, 0]).bfloat16()[:, None, None]
    value = torch.arange(6.0).bfloat16()[:, None, None]
    out = call(function, torch.ones_like(key), key, value, chunk=2, topk=2)
    alone = moba_attention_varlen(torch.ones_like(key[2:]), key[2:], value[2:], bounds(4), block_size=2, top_k=2)
    assert torch.equal(out[4:], alone[2:])


@every
@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"chunk": 0}, ValueError, ["moba_chunk_size", "at least 1", "0"]),
        ({"chunk": 4.0}, ValueError, ["moba_chunk_size", "int", "4.0"]),
        ({"topk": 0}, ValueError, ["moba_topk", "at least 1", "0"]),
        ({"topk": True}, ValueError, ["moba_topk", "int", "True"]),
        ({"q": torch.zeros(10, 3, 4)}, ValueError, ["q ", "3 heads", "multiple", "2"]),
        ({"q": torch.zeros(10, 2, 5)}, ValueError, ["q (10, 2, 5)", "k (10, 2, 4)"]),
        ({"v": torch.zeros(9, 2, 4)}, ValueError, ["v (9, 2, 4)", "k (10, 2, 4)"]),
        ({"k": torch.zeros(10, 2, 4).half()}, TypeError, ["k torch.float16"]),
        ({"q": None}, TypeError, ["q must be", "NoneType"]),
    ],
    ids=str,
)
def test_bad_input_is_named(function, changes, error, words):
    given = {name: torch.zeros(10, 2, 4) for name in ("q", "k", "v")}
    q = changes.get("q", given["q"])
    given |= {name: bounds(10) for name in inspect.signature(function).parameters if name.startswith("cu_")}
    given |= {name: 10 for name in inspect.signature(function).parameters if name.startswith("max_")}
    given |= {"moba_chunk_size": changes.get("chunk", 4), "moba_topk": changes.get("topk", 2)}
    given |= {name: x for name, x in changes.items() if name in "qkv"} | {"q": q}
    with pytest.raises(error) as raised:
        function(**given)
    for word in words:
        assert word in str(raised.value), f"{word!r} is not in {raised.value!r}"


@every
def test_bad_lengths_are_named(function):
    x = torch.zeros(10, 2, 4)
    for name in [name for name in inspect.signature(function).parameters if name.startswith("cu_")]:
        for wrong, error in ((bounds(4, 5), ValueError), (bounds(10).float(), TypeError), ([0, 10], TypeError)):
            good = {n: bounds(10) for n in inspect.signature(function).parameters if n.startswith("cu_")}
            with pytest.raises(error, match=rf"\b{name}\b"):
                call(function, x, x, x, **{**good, name: wrong})


def test_flash_moba_wants_as_many_sequences_of_queries_as_of_keys():
    x = torch.zeros(10, 2, 4)
    with pytest.raises(ValueError, match=r"cu_seqlens_q and cu_seqlens_k .* 1 and 2"):
        flash_moba_varlen_func(x, x, x, bounds(10), bounds(4, 6), 10, 6, 4, 2)


@both
def test_moba_attn_varlen_wants_one_key_a_query(function):
    with pytest.raises(ValueError, match="agree in tokens"):
        function(torch.zeros(10, 2, 4), torch.zeros(9, 2, 4), torch.zeros(9, 2, 4), bounds(10), 10, 4, 1)


@both
@pytest.mark.parametrize("topk", [1, 3])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nan_reaches_no_earlier_token_and_no_other_sequence(function, topk, name):
    call_of = {"cu_seqlens": bounds(10, 20, 10), "max_seqlen": 20, "moba_chunk_size": 4, "moba_topk": topk}
    tensors = operands(40, 40, (4, 2), (8, 8), seed=0)
    expected = function(**tensors, **call_of).detach()
    tensors[name].data[20] = torch.nan
    out = function(**tensors, **call_of)
    spoilt = out.isnan().flatten(1).any(1)
    assert spoilt[20] and not spoilt[:20].any() and not spoilt[30:].any()
    assert_same(out[~spoilt], expected[~spoilt])
    for x in torch.autograd.grad(out[~spoilt].sum(), list(tensors.values())):
        assert x[:10].isfinite().all() and x[30:].isfinite().all(), "another sequence"


def test_what_reads_lengths_says_so_of_lengths_without_values():
    x, lengths, others = torch.zeros(10, 2, 4, device="meta"), bounds(10).to("meta"), bounds(10).to("meta")
    assert moba_attn_varlen(x, x, x, lengths, 10, 4, 2).shape == x.shape
    assert flash_moba_varlen_func(x, x, x, lengths, lengths, 10, 10, 4, 2).shape == x.shape
    for function in (moba_attn_varlen, moba_attn_varlen_naive):
        with pytest.raises(ValueError, match=r"cu_seqlens must have values, .* but is on the meta device"):
            function(x, x, x, lengths, 10, 4, 1)
    with pytest.raises(ValueError, match="cu_seqlens_q must have values, which flash_moba_varlen_func reads"):
        flash_moba_varlen_func(x, x, x, lengths, others, 10, 10, 4, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@every
@pytest.mark.parametrize("topk", [1, 3])
def test_on_a_gpu_in_bfloat16_too(function, topk):
    sizes = [70, 0, 213]
    tensors = {name: x.detach().bfloat16() for name, x in operands(283, 283, (4, 2), (64, 64), seed=0).items()}
    exact = {name: x.double().requires_grad_() for name, x in tensors.items()}
    given = {name: x.cuda().requires_grad_() for name, x in tensors.items()}
    expected = reference(exact, sizes, sizes, 16, topk, dense=function is moba_attn_varlen and topk == 1)
    length_arguments = {name: 213 if name.startswith("max_") else bounds(*sizes).cuda() for name in inspect.signature(function).parameters}
    length_arguments = {name: x for name, x in length_arguments.items() if "seqlen" in name}
    out = function(**given, **length_arguments, moba_chunk_size=16, moba_topk=topk)
    upstream = random(*out.shape, seed=1)
    wanted = torch.autograd.grad(expected, list(exact.values()), upstream)
    got = torch.autograd.grad(out, list(given.values()), upstream.cuda().bfloat16())
    for name, a, b in zip(("output", *tensors), (out, *got), (expected, *wanted)):
        distance = (a.cpu().double() - b).norm() / b.norm()
        assert distance < 1e-2, f"{name}: {distance:.1e}"


@pytest.mark.parametrize("topk", [1, 2])
@pytest.mark.parametrize("bounds", [[0], [0, 0]], ids=str)
def test_no_tokens_have_gradients_too(bounds: list[int], topk: int):
    q = torch.zeros(0, 2, 4, requires_grad=True)
    out = moba_attn_varlen(q, q, q, torch.tensor(bounds, dtype=torch.int32), 0, moba_chunk_size=4, moba_topk=topk)
    out.sum().backward()
    assert out.shape == (0, 2, 4) and q.grad.shape == q.shape


def test_one_block_a_query_gives_pytorch_s_attention_rows_that_it_can_load(monkeypatch):
    """It loads 16 bytes at a time on a GPU, and does not check that it can."""
    real, seen = compat.F.scaled_dot_product_attention, []

    def checked(*operands, **given):
        seen.append(all(x.stride(-1) == 1 and x.data_ptr() % 16 == 0 for x in operands))
        return real(*operands, **given)

    monkeypatch.setattr(compat.F, "scaled_dot_product_attention", checked)
    even = torch.randn(50, 2, 16)
    odd = torch.cat([torch.zeros(3), even.flatten()])[3:].view(even.shape)
    outs = [moba_attn_varlen(x, x, x, bounds(20, 30), 30, moba_chunk_size=8, moba_topk=1) for x in (odd, even, even.mT.contiguous().mT)]
    assert seen == [True] * 6 and all(torch.equal(out, outs[0]) for out in outs)
