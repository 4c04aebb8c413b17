"""What must not matter to `moba_attention`: later tokens, padding, how heads and memory are laid out, and in what parts it works."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cases import (
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
    packed_cases,
    random,
)

from moba_flex import attention as attention_module
from moba_flex import set_working_memory
from moba_flex.backends import eager, eager_routes
from moba_flex.core.layout_builders import _persistent_layout
from moba_flex.ops import gate, rows


@each_implementation
@examples(35)
@given(cases(causal=True, padding=None), st.data())
def test_output_does_not_change_when_later_tokens_do(implementation: str, case: Case, data):
    first_query = case.n_key - case.n_query
    last = data.draw(st.integers(first_query, case.n_key - 1), label="last unchanged token")
    tensors = operands(case)
    changed = {name: x.clone() for name, x in tensors.items()}
    for name in ("key", "value"):
        changed[name][:, :, last + 1 :] = 10 * random(*changed[name][:, :, last + 1 :].shape, seed=case.seed + 1)
    changed["query"][:, :, last + 1 - first_query :] += 100
    before, after = attend(case, tensors, implementation), attend(case, changed, implementation)
    for x, y in zip(before, after):
        assert_same(y[:, :, : last + 1 - first_query], x[:, :, : last + 1 - first_query])


@examples(40)
@given(cases())
def test_grouped_heads_are_repeated_heads(case: Case):
    tensors = operands(case, requires_grad=True)
    repeated = {
        name: x.detach().repeat_interleave(case.repeats if name in ("key", "value") else 1, 0 if name == "sinks" else 1)
        for name, x in tensors.items()
    }
    repeated = {name: x.requires_grad_() for name, x in repeated.items()}
    alike = case.but(groups=case.heads)
    outputs, expected = attend(case, tensors), attend(alike, repeated)
    for x, y in zip(outputs, expected):
        assert_same(x, y)
    grads, expected_grads = gradients(outputs, tensors), gradients(expected, repeated)
    for name in ("key", "value"):
        expected_grads[name] = expected_grads[name].unflatten(1, (case.groups, case.repeats)).sum(2)
    for name, grad in grads.items():
        assert_same(grad, expected_grads[name], f"gradient of {name}")


@each_implementation
@examples(35)
@given(cases(padded=True))
def test_a_padded_row_is_the_row_alone(implementation: str, case: Case):
    tensors = operands(case)
    out, lse = attend(case, tensors, implementation)
    for row, (left, right) in enumerate(case.padding):
        n_key = case.n_key - left - right
        skipped = max(0, case.n_key - case.n_query - left)  # real keys before the first query
        alone = case.but(batch=1, padding=None, n_key=n_key, n_query=max(0, n_key - skipped))
        first = max(0, left - (case.n_key - case.n_query))
        queries = slice(first, first + alone.n_query)
        cut = {name: x if name == "sinks" else x[row : row + 1] for name, x in tensors.items()}
        cut["query"] = cut["query"][:, :, queries]
        cut["key"], cut["value"] = (cut[name][:, :, left : left + n_key] for name in ("key", "value"))
        expected, expected_lse = attend(alone, cut, implementation)
        assert_same(out[row : row + 1, :, queries], expected, f"row {row}")
        assert_same(lse[row : row + 1, :, queries], expected_lse, f"log-sum-exp of row {row}")
    padded = ~case.real_queries()[:, None].expand(-1, case.heads, -1)
    assert (out[padded] == 0).all() and (lse[padded] == -torch.inf).all()


@each_implementation
@examples(30)
@given(cases(padded=True), st.sampled_from([torch.nan, torch.inf, -torch.inf, 1e300]), st.sampled_from(["all", "query", "key", "value"]))
def test_what_stands_at_padding_has_no_effect(implementation: str, case: Case, rubbish: float, where: str):
    tensors, spoilt = operands(case, requires_grad=True), operands(case)
    keys, queries = case.padding_mask()[:, None, :, None], case.real_queries()[:, None, :, None]
    for name, real in (("query", queries), ("key", keys), ("value", keys)):
        if where in ("all", name):
            spoilt[name] = spoilt[name].masked_fill(~real, rubbish)
    spoilt = {name: x.requires_grad_() for name, x in spoilt.items()}
    clean, outputs = attend(case, tensors, implementation), attend(case, spoilt, implementation)
    for x, y in zip(outputs, clean):
        assert_same(x, y)
    expected = gradients(clean, tensors)
    for name, grad in gradients(outputs, spoilt).items():
        assert_same(grad, expected[name], f"gradient of {name}")
    for name, real in (("query", queries), ("key", keys), ("value", keys)):
        assert (expected[name].masked_fill(real, 0) == 0).all(), f"padding has a gradient of {name}"


@each_implementation
@examples(35)
@given(cases())
def test_fewer_queries_than_keys_are_the_tail_of_all(implementation: str, case: Case):
    whole = case.but(n_query=case.n_key)
    tensors = operands(whole)
    tail = {**tensors, "query": tensors["query"][:, :, case.n_key - case.n_query :]}
    for x, y in zip(attend(case, tail, implementation), attend(whole, tensors, implementation)):
        assert_same(x, y[:, :, case.n_key - case.n_query :])


@each_implementation
def test_one_new_token_reads_the_blocks_that_it_would_in_the_whole(implementation: str):
    case = Case(1, 4, 2, 1, 37, 8, 8, block_size=5, top_k=3, seed=5)
    whole = operands(case.but(n_query=37))
    for n_key in range(1, 38):  # token after token, as in decoding
        seen = {name: x[:, :, :n_key] for name, x in whole.items()}
        out, _ = attend(case.but(n_query=n_key, n_key=n_key), seen, implementation)
        last, _ = attend(case.but(n_key=n_key), {**seen, "query": seen["query"][:, :, -1:]}, implementation)
        assert_same(last, out[:, :, -1:], f"token {n_key}")


@examples(30)
@given(cases())
def test_transposed_views_and_expanded_gradients_give_the_same(case: Case):
    tensors = operands(case, requires_grad=True)
    views = {
        name: x.detach() if name == "sinks" else x.detach().transpose(1, 2).contiguous().transpose(1, 2) for name, x in tensors.items()
    }
    views["value"] = torch.cat([views["value"], views["value"] + 1], -1)[..., : case.value_width]  # a slice of wider rows
    views = {name: x.requires_grad_() for name, x in views.items()}
    outputs, expected = attend(case, views)[0], attend(case, tensors)[0]
    assert_same(outputs, expected)
    grads = torch.autograd.grad(outputs.sum(), list(views.values()))  # its upstream gradient has strides of 0
    upstream = torch.ones_like(expected)
    for name, x, y in zip(views, grads, torch.autograd.grad(expected, list(tensors.values()), upstream)):
        assert_same(x, y, f"gradient of {name}")


@examples(15)
@given(cases())
def test_two_runs_give_the_same_bits(case: Case):
    results = []
    for _ in range(2):
        tensors = operands(case, torch.float32, requires_grad=True)
        outputs = attend(case, tensors)
        results.append((*outputs, *gradients(outputs, tensors).values()))
    for x, y in zip(*results):
        assert torch.equal(x, y)


def test_training_works_after_inference_mode_saw_the_same_shape():
    case = Case(2, 2, 1, 26, 26, block_size=7, seed=3)  # a shape that no other test uses: layouts are cached
    with torch.inference_mode():
        expected, _ = attend(case, operands(case))
    tensors = operands(case, requires_grad=True)
    out, _ = attend(case, tensors)
    out.sum().backward()
    assert_same(out.detach(), expected.clone())
    assert all(x.grad.isfinite().all() for x in tensors.values())


# Working memory and chunks


@examples(40)
@given(cases(), st.sampled_from([1, 3000, 20000]))
def test_working_memory_does_not_change_the_result(case: Case, n_bytes: int):
    tensors = operands(case, requires_grad=True)
    expected = attend(case, tensors)
    expected_grads = gradients(expected, tensors)
    before = set_working_memory(n_bytes)
    try:
        outputs = attend(case, tensors)
        grads = gradients(outputs, tensors)
        assert set_working_memory(n_bytes) == n_bytes
    finally:
        set_working_memory(before)
    for x, y in zip(outputs, expected):
        assert_same(x, y)
    for name, grad in grads.items():
        assert_same(grad, expected_grads[name], f"gradient of {name}")


@examples(50)
@given(cases() | packed_cases(more_keys=None), st.sampled_from([1, 7, 200]), st.booleans())
def test_taking_few_rows_at_a_time_does_not_change_the_result(case: Case | Packed, few: int, head_by_head: bool):
    """Long inputs are worked through in parts; small parts make short inputs do so too."""
    attended, case = (attend, case) if isinstance(case, Case) else (attend_packed, case)
    tensors = operands(case if isinstance(case, Case) else case.case, requires_grad=True)
    expected = attended(case, tensors)
    expected_grads = gradients(expected, tensors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "_SCORES_AT_ONCE", few)
        patch.setattr(eager, "_SCORES_AT_ONCE", few)
        patch.setattr(eager_routes, "_ROWS_AT_ONCE", few)
        patch.setattr(rows, "_QUERIES_AT_ONCE", few)
        patch.setattr(attention_module, "HEAD_BY_HEAD_FROM", 0 if head_by_head else 1 << 18)
        _persistent_layout.cache_clear()  # with the pieces of calls before
        outputs = attended(case, tensors)
        grads = gradients(outputs, tensors)
    for x, y in zip(outputs, expected):
        assert_same(x, y)
    for name, grad in grads.items():
        assert_same(grad, expected_grads[name], f"gradient of {name}")
