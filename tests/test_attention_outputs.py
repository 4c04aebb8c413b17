"""Shapes and dtypes of what `moba_attention` returns, how exact low precision is, and no input or one token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from support.cases import (
    HALF,
    IMPLEMENTATIONS,
    Case,
    assert_same,
    attend,
    cases,
    each_implementation,
    examples,
    gradients,
    operands,
    positions,
    random,
)

from moba_flex import moba_attention, moba_attention_varlen
from moba_flex.reference import gate_scores, reference_selection


@each_implementation
@pytest.mark.parametrize("dtype", HALF, ids=str)
@examples(8)
@given(cases())
def test_output_has_the_query_s_dtype_and_the_log_sum_exp_is_float32(implementation: str, dtype: torch.dtype, case: Case):
    tensors = operands(case, dtype, requires_grad=True)
    out, lse = attend(case, tensors, implementation)
    assert out.dtype == dtype and out.shape == (case.batch, case.heads, case.n_query, case.value_width)
    assert lse.dtype == torch.float32 and lse.shape == (case.batch, case.heads, case.n_query)
    for name, grad in gradients((out, lse), tensors).items():
        assert grad.dtype == dtype and grad.shape == tensors[name].shape
        assert grad.isfinite().all()


@each_implementation
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(1, 4, 2, 150, 150, 32, 32, 16, 3, seed=1),
        Case(2, 3, 1, 70, 161, 16, 24, 13, 6, 1, 1, softcap=20.0, sinks=True, seed=2),
        Case(1, 2, 2, 90, 90, 16, 16, 10, 3, causal=False, scale=0.5, seed=3),
        Case(1, 6, 2, 120, 120, 16, 16, 10, 3, share_selection=True, seed=4),
    ],
    ids=["plain", "sinks and soft-cap", "not causal", "shared selection"],
)
def test_low_precision_stays_close_to_float64(implementation: str, dtype: torch.dtype, case: Case):
    low = operands(case, dtype, requires_grad=True)
    exact = {name: x.detach().double().requires_grad_() for name, x in low.items()}
    assert _smallest_gap(case, exact) > 1e-5, "the gate's choice hangs on rounding: take another seed"
    outputs, expected = attend(case, low, implementation), attend(case, exact, "naive")
    grads, expected_grads = gradients(outputs, low), gradients(expected, exact)
    assert_same(outputs[1], expected[1], "log-sum-exp", rtol=1e-5, atol=1e-5)
    for name, x, y in [("output", outputs[0], expected[0]), *((n, grads[n], expected_grads[n]) for n in grads)]:
        error = (x.double() - y).norm() / y.norm()
        assert error < HALF[dtype], f"{name}: relative error {error:.1e} in {case}"


def _smallest_gap(case: Case, tensors: dict[str, torch.Tensor]) -> float:
    """How far, in gate score, the worst chosen block is above the best one left out, over all queries."""
    query, key = tensors["query"].detach(), tensors["key"].detach()
    selected, of_key = reference_selection(query, key, case.attention_settings())
    block = torch.arange(case.n_blocks)
    score = gate_scores(query, key, of_key, case.block_size)
    if case.share_selection:
        score = score.unflatten(1, (case.groups, case.repeats)).sum(2).repeat_interleave(case.repeats, 1)
    own = positions(case)[0] // case.block_size
    choice = (block >= case.sink_blocks) & (block < own - case.recent_blocks) if case.causal else block >= 0
    worst = score.masked_fill(~(selected & choice), torch.inf).amin(-1)
    best = score.masked_fill(selected | ~choice, -torch.inf).amax(-1)
    return float((worst - best).min())


@each_implementation
@pytest.mark.parametrize(
    "shape",
    [(0, 2, 1, 5, 5), (1, 2, 1, 0, 0), (2, 2, 1, 0, 7), (0, 4, 2, 0, 0)],
    ids=["no batch", "no token", "no query", "nothing"],
)
def test_an_empty_input_gives_an_empty_output(implementation: str, shape: tuple[int, ...]):
    batch, heads, groups, n_query, n_key = shape
    case = Case(batch, heads, groups, n_query, n_key, 4, 3, sinks=True)
    tensors = operands(case, torch.float32, requires_grad=True)
    out, lse = attend(case, tensors, implementation)
    assert out.shape == (batch, heads, n_query, 3) and lse.shape == (batch, heads, n_query)
    assert out.dtype == lse.dtype == torch.float32
    out.sum().backward()
    assert tensors["query"].grad.shape == tensors["query"].shape


@each_implementation
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_one_token_reads_itself(implementation: str, top_k: int):
    query, key, value = random(2, 4, 1, 3, seed=0), random(2, 2, 1, 3, seed=1), random(2, 2, 1, 5, seed=2)
    out, lse = moba_attention(query, key, value, block_size=4, top_k=top_k, scale=2, return_lse=True, implementation=implementation)
    assert_same(out, value.repeat_interleave(2, 1))
    assert_same(lse, (query * key.repeat_interleave(2, 1)).sum(-1) * 2)


def test_return_lse_only_adds_the_log_sum_exp():
    case = Case(n_query=20, n_key=20)
    tensors = operands(case)
    for implementation in ("auto", *IMPLEMENTATIONS):
        alone = moba_attention(**tensors, block_size=3, top_k=2, implementation=implementation)
        both = moba_attention(**tensors, block_size=3, top_k=2, implementation=implementation, return_lse=True)
        assert isinstance(alone, torch.Tensor) and torch.equal(alone, both[0])
        packed = [x[0].transpose(0, 1) for x in tensors.values()]
        bounds = torch.tensor([0, 20], dtype=torch.int32)
        alone = moba_attention_varlen(*packed, bounds, block_size=3, top_k=2, implementation=implementation)
        assert isinstance(alone, torch.Tensor) and torch.equal(alone, both[0][0].transpose(0, 1))
