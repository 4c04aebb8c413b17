"""Packed sequences, of any number of queries and keys, are separate sequences: values, gradients, and what an empty one gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from support.cases import (
    IMPLEMENTATIONS,
    Case,
    Packed,
    assert_same,
    attend,
    attend_packed,
    each_implementation,
    examples,
    gradients,
    laid_out,
    operands,
    packed_cases,
    softmax_attention,
)

from moba_flex import moba_attention_varlen
from moba_flex.backends import eager
from moba_flex.core.layout import BlockLayout
from moba_flex.core.layout_builders import layout_of


@examples(80)
@given(packed_cases(more_keys=None))
def test_eager_gives_the_specification_s_values_and_gradients_for_packed_sequences(packed: Packed):
    assume(sum(packed.lengths))
    results = []
    for implementation in IMPLEMENTATIONS:
        tensors = operands(packed.case, requires_grad=True)
        outputs = attend_packed(packed, tensors, implementation)
        results.append((*outputs, *gradients(outputs, tensors).values()))
    for i, (actual, expected) in enumerate(zip(*results)):
        assert_same(actual, expected, f"result {i} of output, log-sum-exp and gradients")


@each_implementation
@examples(30)
@given(packed_cases(more_keys=None))
def test_packed_sequences_are_separate_sequences(implementation: str, packed: Packed):
    """Values and gradients, as those of one call of `moba_attention` for each."""
    tensors = operands(packed.case, requires_grad=True)
    out, lse = attend_packed(packed, tensors, implementation)
    assert out.shape[2] == lse.shape[2] == sum(packed.lengths)
    parts = []
    for queries, keys, alone in packed.sequences():
        part = {name: x if name == "sinks" else x[:, :, queries if name == "query" else keys] for name, x in tensors.items()}
        parts.append(attend(alone, part, implementation))
        assert_same(out[:, :, queries], parts[-1][0], f"tokens from {queries.start}")
        assert_same(lse[:, :, queries], parts[-1][1], f"log-sum-exp from {queries.start}")
    expected = gradients(tuple(torch.cat(x, 2) for x in zip(*parts)), tensors)
    for name, grad in gradients((out, lse), tensors).items():
        assert_same(grad, expected[name], f"gradient of {name}")


@each_implementation
@examples(25)
@given(packed_cases(more_keys=True), st.sampled_from(["width first", "sliced", "every other", "expanded"]))
def test_packed_tensors_may_lie_in_any_way(implementation: str, packed: Packed, layout: str):
    tensors = operands(packed.case)
    if layout == "expanded":
        tensors = {name: x if name == "sinks" else x[:, :1].expand_as(x).clone() for name, x in tensors.items()}
    moved = {name: (x if name == "sinks" else laid_out(x, layout)).requires_grad_() for name, x in tensors.items()}
    tensors = {name: x.requires_grad_() for name, x in tensors.items()}
    results = [attend_packed(packed, x, implementation) for x in (moved, tensors)]
    for x, y in zip(*results):
        assert_same(x, y)
    for (name, x), y in zip(gradients(results[0], moved).items(), gradients(results[1], tensors).values()):
        assert_same(x, y, f"gradient of {name}")


@each_implementation
@pytest.mark.parametrize("lengths", [(0,), (0, 0), (0, 3, 0, 0, 5, 0), (1,), (1, 1, 1)], ids=str)
def test_empty_packed_sequences_are_allowed(implementation: str, lengths: tuple[int, ...]):
    total = sum(lengths)
    packed = Packed(lengths, Case(1, 2, 1, total, total, 4, 3, block_size=2, top_k=3))
    tensors = operands(packed.case, requires_grad=True)
    out, lse = attend_packed(packed, tensors, implementation)
    assert out.shape == (1, 2, total, 3) and lse.shape == (1, 2, total)
    assert out.isfinite().all() and lse.isfinite().all()
    out.sum().backward()


@each_implementation
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("lengths", "keys"),
    [
        ((0,), (0,)),
        ((0, 0), (7, 0)),  # no query at all
        ((0, 1, 0), (9, 9, 9)),
        ((1,), (1,)),
        ((1, 1, 1), (1, 17, 4)),
        ((0, 0, 3), (0, 5, 3)),
        ((12, 1, 0, 1), (30, 25, 3, 8)),
    ],
    ids=str,
)
def test_packed_sequences_may_have_no_query_and_no_key(implementation: str, causal: bool, lengths: tuple, keys: tuple):
    case = Case(1, 2, 1, sum(lengths), sum(keys), 4, 3, block_size=4, top_k=2, causal=causal)
    packed, tensors = Packed(lengths, case, keys), operands(case, requires_grad=True)
    out, lse = attend_packed(packed, tensors, implementation)
    assert out.shape == (1, 2, sum(lengths), 3) and lse.shape == (1, 2, sum(lengths))
    assert out.isfinite().all() and lse.isfinite().all()
    grads = gradients((out, lse), tensors)
    for queries, of_keys, _ in packed.sequences():
        if queries.start == queries.stop:  # nobody reads these keys
            assert (grads["key"][:, :, of_keys] == 0).all() and (grads["value"][:, :, of_keys] == 0).all()


@each_implementation
def test_without_causal_a_packed_query_sees_all_keys_of_its_sequence(implementation: str):
    case = Case(1, 2, 1, 4, 30, 4, 3, block_size=4, top_k=9, causal=False)
    tensors = operands(case)
    out, _ = attend_packed(Packed((3, 1), case, (20, 10)), tensors, implementation)
    sees = (torch.arange(4)[:, None] < 3) == (torch.arange(30) < 20)
    expected, _ = softmax_attention(case, tensors, sees.expand(1, 1, 4, 30))
    assert_same(out, expected)


@each_implementation
@examples(25)
@given(packed_cases(more_keys=True), st.sampled_from([torch.nan, torch.inf, 1e300]), st.data())
def test_what_stands_in_another_packed_sequence_has_no_effect(implementation: str, packed: Packed, rubbish: float, data):
    tensors = operands(packed.case)
    one = data.draw(st.integers(0, len(packed.lengths) - 1), label="the sequence that is looked at")
    queries, keys, _ = list(packed.sequences())[one]
    spoilt = {name: x if name == "sinks" else torch.full_like(x, rubbish) for name, x in tensors.items()}
    for name, part in (("query", queries), ("key", keys), ("value", keys)):
        spoilt[name][:, :, part] = tensors[name][:, :, part]
    results = []
    for given_ in (tensors, spoilt):
        leaves = {name: x.clone().requires_grad_() for name, x in given_.items()}
        out, lse = (x[:, :, queries] for x in attend_packed(packed, leaves, implementation))
        grads = gradients((out, lse), leaves) if out.numel() else {}
        of_it = {"query": queries, "key": keys, "value": keys}
        results.append((out, lse, *(grads[name][:, :, part] for name, part in of_it.items() if grads)))
    for x, y in zip(*results):
        assert_same(y, x)


@pytest.mark.parametrize("block_size", [512, 700])
def test_a_packed_sequence_with_one_query_takes_no_block_of_slots(block_size: int):
    """Memory and time follow the number of tokens: of decoding, and of decoding beside a chunk of a prompt."""
    for chunk, most in ((0, 40), (1, 41), (300, 1300), (3000, 8000)):
        lengths, keys = (chunk, *(1,) * 40), (4000, *(700,) * 40)
        layout = last_queries_layout(Packed(lengths, Case(block_size=block_size), keys))
        assert layout.n_query_blocks * layout.query_width <= most, f"slots of {sum(lengths)} queries"


def last_queries_layout(packed: Packed) -> BlockLayout:
    query, key = torch.empty(1, 1, sum(packed.lengths), 4), torch.empty(1, 1, sum(packed.keys), 4)
    return layout_of(query, key, None, packed.layout_bounds(), packed.case.block_size, eager)


def test_no_packed_sequence_at_all_gives_an_empty_output():
    x = torch.zeros(0, 2, 4)
    nothing = torch.zeros(1, dtype=torch.int32)
    for more in (None, nothing):
        assert moba_attention_varlen(x, x, x, nothing, cu_seqlens_k=more, block_size=2, top_k=2).shape == (0, 2, 4)
