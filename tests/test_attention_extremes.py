"""NaN and infinity reach what sees them and nothing else, and weights are right however large the scores."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cases import (
    HALF,
    Case,
    Packed,
    assert_same,
    attend,
    attend_packed,
    cases,
    each_implementation,
    examples,
    gradients,
    operands,
    random,
)
from support.oracle import expected as expected_of
from support.oracle import upstream_for, visible_keys

from moba_flex import moba_attention, select_blocks
from moba_flex.backends import eager_routes

# NaN and infinity


@each_implementation
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("position", [0, 8, 9, 22])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_nan_and_infinity_reach_the_outputs_that_can_see_them(implementation, name, bad, position, top_k):
    case = Case(2, 2, 1, 23, 23, block_size=4, top_k=top_k, seed=8)
    tensors = operands(case, torch.float64)
    tensors = {other: x.abs() for other, x in tensors.items()}  # so that a key of infinity has a score of infinity
    clean, _ = attend(case, tensors, implementation)
    tensors[name][1, 0, position] = bad
    tensors = {other: x.requires_grad_() for other, x in tensors.items()}
    out, lse = attend(case, tensors, implementation)
    spoilt = ~out[1].isfinite().all(-1)  # [H, N]
    last = position if name == "query" else position // 4 * 4 + 3
    assert spoilt[0 if name == "query" else slice(None), position : last + 1].all(), "not seen by its own block"
    if top_k > 1 and name == "key":  # its block has the highest score of all
        assert spoilt[:, position:].all(), "not seen by those who choose its block"
    assert_same(out[0], clean[0], "another row of the batch")
    if name == "query":
        others = torch.ones_like(spoilt)
        others[0, position] = False
        assert_same(out[1][others], clean[1][others], "another query")
    gradients((out, lse), tensors)  # nothing to promise about what it holds, but that it comes


def test_heads_that_share_a_selection_agree_about_a_key_of_infinity():
    """Its scores are infinity of both signs, whose sum is no number. The score of the heads' summed query is one."""
    query = torch.tensor([1.0, -2.0]).view(1, 2, 1, 1).expand(1, 2, 4, 1)
    key, value = torch.tensor([torch.inf, 1, -1, 0]).view(1, 1, 4, 1), torch.arange(4.0).view(1, 1, 4, 1)
    settings = {"block_size": 1, "top_k": 2, "share_selection": True}
    assert select_blocks(query, key, **settings).indices[0, :, :, 0].tolist() == [[-1, 0, 1, 2]] * 2
    outputs = [moba_attention(query, key, value, **settings, implementation=name) for name in ("eager", "naive")]
    assert outputs[0][0, :, 2:].isfinite().all(), "their own block and the one before hold no infinity"
    torch.testing.assert_close(outputs[1], outputs[0], equal_nan=True)


@each_implementation
def test_a_sink_of_infinity_leaves_no_weight_for_keys(implementation: str):
    tensors = [torch.randn(1, 4, 12, 8).requires_grad_() for _ in range(3)]
    sinks = torch.tensor([torch.inf, 0.0, -torch.inf, 1.0]).requires_grad_()
    mask = torch.arange(12)[None] >= 2
    settings = {"block_size": 4, "top_k": 2, "padding_mask": mask, "return_lse": True, "implementation": implementation}
    out, lse = moba_attention(*tensors, sinks=sinks, **settings)
    without, _ = moba_attention(*tensors, **settings)
    assert (out[:, 0] == 0).all()
    assert (lse[:, 0, 2:] == torch.inf).all() and (lse[:, 0, :2] == -torch.inf).all()
    torch.testing.assert_close(out[:, 2], without[:, 2])
    for x in torch.autograd.grad(out.square().sum() + lse[:, :, 2:].sum(), tensors):
        assert (x[:, 0] == 0).all() and x[:, 1:].isfinite().all()
    (grad,) = torch.autograd.grad(moba_attention(*tensors, sinks=sinks, **settings)[1][:, :, 2:].sum(), sinks)
    assert grad[0] == 10 and grad[2] == 0, "each of ten queries has a log-sum-exp of the sink itself"


@pytest.mark.parametrize("name", ["key", "value"])
def test_nan_does_not_reach_earlier_blocks_or_other_packed_sequences(name: str):
    packed = Packed((10, 13), Case(1, 2, 1, 23, 23, block_size=4, top_k=3, seed=9))
    tensors = operands(packed.case, torch.float64)
    clean, _ = attend_packed(packed, tensors)
    tensors[name][:, :, 10 + 6] = torch.nan
    out, _ = attend_packed(packed, tensors)
    assert out[:, :, 16].isnan().all()
    assert_same(out[:, :, :14], clean[:, :, :14])


@each_implementation
@examples(80)
@given(cases(), st.sampled_from([torch.nan, torch.inf, -torch.inf]), st.sampled_from(["query", "key", "value"]), st.data())
def test_nan_and_infinity_reach_nothing_that_cannot_see_them(implementation: str, case: Case, bad: float, name: str, data):
    tensors = operands(case)
    place = [data.draw(st.integers(0, n - 1), label="place") for n in tensors[name].shape]
    tensors[name][tuple(place)] = bad
    visible, tensors = visible_keys(case, tensors), {other: x.requires_grad_() for other, x in tensors.items()}
    out, lse = attend(case, tensors, implementation)
    upstream = upstream_for(out, lse, case.seed)
    wanted = expected_of(case, tensors, visible, upstream)
    results = {"out": out, "lse": lse}
    grads = torch.autograd.grad([out, lse], list(tensors.values()), list(upstream.values()))
    results |= {f"gradient of {other}": grad for other, grad in zip(tensors, grads)}
    for what, x in results.items():
        clean = wanted.clean[what]
        assert_same(x[clean], wanted.results[what][clean], what)
    if bad != bad:
        assert not out[~wanted.clean["out"]].isfinite().all(-1).any(), "NaN does not reach an output that sees it"


@each_implementation
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 3e38], ids=str)
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_what_later_tokens_hold_reaches_no_earlier_one_of_its_block(implementation: str, name: str, bad: float):
    """A weight of 0 alone does not hide NaN, nor a product that overflows before it is hidden."""
    tensors = operands(Case(1, 2, 1, 12, 12, 4, 4, block_size=6, top_k=2, seed=3), torch.float32)
    clean = {other: x.clone().requires_grad_() for other, x in tensors.items()}
    tensors[name][:, :, 10:] = bad
    spoilt = {other: x.requires_grad_() for other, x in tensors.items()}
    settings = {"block_size": 6, "top_k": 2, "implementation": implementation}
    results = []
    for x in (clean, spoilt):
        out = moba_attention(**x, **settings)[:, :, :10]
        results.append((out, *torch.autograd.grad(100 * out.square().sum(), list(x.values()))))
    for (what, x), y in zip(zip(("output", "query", "key", "value"), results[1]), results[0]):
        overflows = bad != 3e38 or name != "value"  # then a later token's own gradient, 0 for NaN, is NaN, and reaches what it read
        last = 0 if overflows and what in ("key", "value") else 10
        torch.testing.assert_close(x[:, :, :last], y[:, :, :last], msg=lambda m: f"{what}: {m}", rtol=1e-4, atol=1e-4)  # noqa: B023


@each_implementation
@pytest.mark.parametrize("padding", [((0, 19),), ((25, 0),), None], ids=str)
def test_nan_in_a_value_gives_no_gradient_to_queries_that_are_not_there(implementation: str, padding):
    """A slot of a block without a query has a gradient of 0, which must not meet the NaN."""
    case = Case(1, 2, 1, 3, 29, 4, 5, block_size=29, top_k=1, padding=padding, seed=1)
    tensors = operands(case)
    tensors["value"][0, 0, 4] = torch.nan
    visible, tensors = visible_keys(case, tensors), {name: x.requires_grad_() for name, x in tensors.items()}
    out, lse = attend(case, tensors, implementation)
    upstream = upstream_for(out, lse, 0)
    wanted = expected_of(case, tensors, visible, upstream)
    grads = torch.autograd.grad([out, lse], list(tensors.values()), list(upstream.values()))
    for name, grad in zip(tensors, grads):
        clean = wanted.clean[f"gradient of {name}"]
        assert_same(grad[clean], wanted.results[f"gradient of {name}"][clean], f"gradient of {name}")


@each_implementation
@examples(25)
@given(cases(), st.sampled_from([torch.nan, torch.inf, -torch.inf]), st.sampled_from([0.05, 0.5, 1.0]))
def test_no_input_crashes(implementation: str, case: Case, bad: float, share: float):
    tensors = operands(case, torch.float64)
    for i, (name, x) in enumerate(tensors.items()):
        tensors[name] = x.masked_fill(random(*x.shape, seed=case.seed + i).sigmoid() < share, bad).requires_grad_()
    outputs = attend(case, tensors, implementation)
    gradients(outputs, tensors)
    padded = ~case.real_queries()[:, None].expand(-1, case.heads, -1)
    assert (outputs[0][padded] == 0).all() and (outputs[1][padded] == -torch.inf).all()


# Large scores


@each_implementation
@pytest.mark.parametrize("size", [4.0, 182.5, 2.0**9, 2.0**12])  # scores of 64 to 2**26, all exact; 182.5 gives 133,225
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_weights_sum_to_1_however_large_the_scores(implementation: str, size: float, dtype: torch.dtype, causal: bool):
    """All keys are equal: an output is the mean of the values that its query reads, and each query hands out weights that sum to 1."""
    n = 40
    query = torch.full((1, 2, n, 16), size, dtype=dtype)
    key = query[:, :1].clone()
    value = random(1, 1, n, 8, seed=1).to(dtype)
    tensors = {name: x.requires_grad_() for name, x in {"query": query, "key": key, "value": value}.items()}
    case = Case(1, 2, 1, n, n, 16, 8, block_size=7, top_k=3, causal=causal)
    visible = visible_keys(case, tensors)
    settings = {"block_size": 7, "top_k": 3, "causal": causal, "return_lse": True, "implementation": implementation}
    out, lse = moba_attention(**tensors, **settings)
    weight = visible.double() / visible.sum(-1, keepdim=True)
    assert_same(out, weight @ value.double(), "output", rtol=HALF[dtype], atol=HALF[dtype])
    grad_value, grad_key = torch.autograd.grad([out.sum() + lse.sum()], [value, key])
    per_key = weight.sum((1, 2))[0]
    assert_same(grad_value[0, 0], per_key[:, None].expand(-1, 8), "gradient of value", rtol=2 * HALF[dtype], atol=0)
    # The log-sum-exp's gradient is the weights; with values of 1 the output's own is 0.
    (grad_key,) = torch.autograd.grad(moba_attention(query, key, torch.ones_like(value), **settings)[1].sum(), [key])
    expected = per_key[:, None] * size / 4
    assert_same(grad_key[0, 0], expected.expand(-1, 16), "gradient of key", rtol=2 * HALF[dtype], atol=0)


@each_implementation
@pytest.mark.parametrize("size", [1e3, 1e5, 1e7])
@pytest.mark.parametrize("causal", [True, False])
def test_blocks_of_large_scores_are_mixed_in_the_right_shares(implementation: str, size: float, causal: bool):
    """Scores that float32 holds exactly: all that could be wrong is how partial results are put together."""
    n, width = 48, 4
    query, key = torch.zeros(1, 1, n, width), torch.zeros(1, 1, n, width)
    query[..., 0], query[..., 1] = 1, 1
    key[..., 0] = 2.0 ** round(torch.tensor(size).log2().item())  # the same for all, and exact
    key[..., 1] = torch.randint(-3, 4, (n,), generator=torch.Generator().manual_seed(0))
    value = random(1, 1, n, 8, seed=1, dtype=torch.float32)
    results = []
    for dtype, name in ((torch.float32, implementation), (torch.float64, "naive")):
        tensors = [x.to(dtype).requires_grad_() for x in (query, key, value)]
        settings = {"block_size": 8, "top_k": 6, "causal": causal, "scale": 1.0}  # all blocks, whatever the gate's rounding
        out = moba_attention(*tensors, **settings, implementation=name)
        results.append((out, *torch.autograd.grad((out * random(1, 1, n, 8, seed=2, dtype=dtype)).sum(), tensors[1:])))
    for x, y in zip(*results):
        error = (x.double() - y).norm() / y.norm()
        assert error < 1e-5, f"relative error {error:.1e}"


@pytest.mark.parametrize("height", [1.0, 30.0, 1e4], ids=["small", "too large to add up", "huge"])
def test_a_past_block_may_outweigh_the_own_one_by_any_amount(height: float, monkeypatch):
    """Scores far above those of the own block overflow a plain sum of exponentials, and are merged another way."""
    added_up = []
    plain = eager_routes._sum_routed
    monkeypatch.setattr(eager_routes, "_sum_routed", lambda *operands: added_up.append(plain(*operands)) or added_up[-1])
    query = torch.randn(1, 2, 60, 8)
    query[..., 0] = height
    key, value = torch.randn(1, 1, 60, 8), torch.randn(1, 1, 60, 8)
    key[:, :, 10:20, 0] += height
    results = [
        moba_attention(query, key, value, block_size=10, top_k=3, return_lse=True, implementation=implementation)
        for implementation in ("eager", "naive")
    ]
    for got, wanted in zip(*results):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert added_up == [height == 1.0]
