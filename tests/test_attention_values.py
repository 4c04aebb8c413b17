"""Values and gradients of `moba_attention` are the specification's, and textbook attention's where the blocks are known without a gate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given
from support.cases import (
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
    softmax_attention,
)


@examples(120)
@given(cases())
def test_eager_gives_the_specification_s_values_and_gradients(case: Case):
    results = []
    for implementation in IMPLEMENTATIONS:
        tensors = operands(case, requires_grad=True)
        outputs = attend(case, tensors, implementation)
        results.append((outputs, gradients(outputs, tensors)))
    (values, grads), (expected_values, expected_grads) = results
    assert_same(values[0], expected_values[0], "output")
    assert_same(values[1], expected_values[1], "log-sum-exp")
    for name, expected in expected_grads.items():
        assert_same(grads[name], expected, f"gradient of {name}")


@examples(25)
@given(cases(max_tokens=12))
def test_gradients_are_those_of_finite_differences(case: Case):
    tensors = operands(case, requires_grad=True)

    def run(*values):
        out, lse = attend(case, dict(zip(tensors, values)))
        return out, lse.masked_fill(lse == -torch.inf, 0)

    assert torch.autograd.gradcheck(run, tuple(tensors.values()), fast_mode=True)


@each_implementation
@examples(30)
@given(cases(sink_blocks=0, recent_blocks=0, softcap=None, sinks=False))
def test_reading_every_block_is_dense_attention(implementation: str, case: Case):
    case = case.but(top_k=case.n_blocks)
    query, key = positions(case)
    visible = (key <= query) if case.causal else torch.ones(1, case.n_key).bool()
    visible = visible.expand(case.batch, 1, case.n_query, case.n_key)
    real = case.real_queries()[:, None, :, None]
    if case.padding:
        visible = visible & case.padding_mask()[:, None, None] | ~real  # something for the padded queries too

    tensors = operands(case, requires_grad=True)
    out, lse = attend(case, tensors, implementation)
    expected = F.scaled_dot_product_attention(
        tensors["query"], tensors["key"], tensors["value"], attn_mask=visible, scale=case.scale, enable_gqa=True
    )
    _, expected_lse = softmax_attention(case, tensors, visible)
    expected = torch.where(real, expected, 0)
    assert_same(out, expected, "output")
    assert_same(lse, torch.where(real[..., 0], expected_lse, -torch.inf), "log-sum-exp")
    dense = gradients((expected,), tensors)
    for name, grad in gradients((out,), tensors).items():
        assert_same(grad, dense[name], f"gradient of {name}")


@each_implementation
@examples(30)
@given(cases(causal=True, padding=None, top_k=1, sink_blocks=0, recent_blocks=0))
def test_top_k_1_is_block_diagonal(implementation: str, case: Case):
    query, key = positions(case)
    visible = (key <= query) & (key // case.block_size == query // case.block_size)
    tensors = operands(case)
    expected = softmax_attention(case, tensors, visible)
    for actual, wanted in zip(attend(case, tensors, implementation), expected):
        assert_same(actual, wanted)


@each_implementation
@examples(35)
@given(cases(causal=True, padding=None))
def test_sink_and_recent_blocks_are_always_read_and_take_places(implementation: str, case: Case):
    case = case.but(top_k=1 + case.sink_blocks + case.recent_blocks)  # no place is left for others
    query, key = positions(case)
    own, block = query // case.block_size, key // case.block_size
    visible = (key <= query) & ((block < case.sink_blocks) | (block >= own - case.recent_blocks))
    tensors = operands(case)
    expected = softmax_attention(case, tensors, visible)
    for actual, wanted in zip(attend(case, tensors, implementation), expected):
        assert_same(actual, wanted)


@each_implementation
@examples(30)
@given(cases(sinks=True))
def test_a_sink_is_one_more_logit_in_the_denominator(implementation: str, case: Case):
    tensors = operands(case)
    sinks = tensors.pop("sinks")[None, :, None]
    plain, plain_lse = attend(case.but(sinks=False), tensors, implementation)
    out, lse = attend(case, {**tensors, "sinks": sinks.flatten()}, implementation)
    share = plain_lse.exp() / (plain_lse.exp() + sinks.exp())
    assert_same(out, plain * share[..., None])
    assert_same(lse.exp(), torch.where(plain_lse == -torch.inf, 0, plain_lse.exp() + sinks.exp()))


@each_implementation
@examples(15)
@given(cases(sinks=True))
def test_a_sink_of_minus_infinity_is_no_sink(implementation: str, case: Case):
    tensors = operands(case)
    sinks = tensors.pop("sinks")
    expected = attend(case.but(sinks=False), tensors, implementation)
    for x, y in zip(attend(case, {**tensors, "sinks": torch.full_like(sinks, -torch.inf)}, implementation), expected):
        assert_same(x, y)
