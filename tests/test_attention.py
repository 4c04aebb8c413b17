"""What `moba_attention` and `moba_attention_varlen` promise, as properties of drawn cases."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from support.cases import (
    IMPLEMENTATIONS,
    Case,
    Packed,
    assert_same,
    attend,
    attend_packed,
    cases,
    examples,
    gradients,
    laid_out,
    operands,
    packed_cases,
    positions,
    random,
    softmax_attention,
)
from support.oracle import expected as expected_of
from support.oracle import upstream_for, visible_keys

from moba_flex import attention as attention_module
from moba_flex import moba_attention, moba_attention_varlen, set_working_memory
from moba_flex.backends import eager, eager_routes
from moba_flex.core.layout import BlockLayout
from moba_flex.core.layout_builders import _persistent_layout, layout_of
from moba_flex.operator import attention
from moba_flex.ops import gate, rows
from moba_flex.reference import gate_scores, reference_selection

each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
HALF = {
    torch.float32: 1e-5,
    torch.bfloat16: 2**-7,
    torch.float16: 2**-10,
}  # relative errors that are a dtype's own rounding


# Against the specification, and against textbook attention where the blocks are known without a gate


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


# What must not matter


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
@examples(35)
@given(cases())
def test_fewer_queries_than_keys_are_the_tail_of_all(implementation: str, case: Case):
    whole = case.but(n_query=case.n_key)
    tensors = operands(whole)
    tail = {**tensors, "query": tensors["query"][:, :, case.n_key - case.n_query :]}
    for x, y in zip(attend(case, tail, implementation), attend(whole, tensors, implementation)):
        assert_same(x, y[:, :, case.n_key - case.n_query :])


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


# Dtypes


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


# Edges


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


@each_implementation
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_one_token_reads_itself(implementation: str, top_k: int):
    query, key, value = random(2, 4, 1, 3, seed=0), random(2, 2, 1, 3, seed=1), random(2, 2, 1, 5, seed=2)
    out, lse = moba_attention(query, key, value, block_size=4, top_k=top_k, scale=2, return_lse=True, implementation=implementation)
    assert_same(out, value.repeat_interleave(2, 1))
    assert_same(lse, (query * key.repeat_interleave(2, 1)).sum(-1) * 2)


@each_implementation
def test_one_new_token_reads_the_blocks_that_it_would_in_the_whole(implementation: str):
    case = Case(1, 4, 2, 1, 37, 8, 8, block_size=5, top_k=3, seed=5)
    whole = operands(case.but(n_query=37))
    for n_key in range(1, 38):  # token after token, as in decoding
        seen = {name: x[:, :, :n_key] for name, x in whole.items()}
        out, _ = attend(case.but(n_query=n_key, n_key=n_key), seen, implementation)
        last, _ = attend(case.but(n_key=n_key), {**seen, "query": seen["query"][:, :, -1:]}, implementation)
        assert_same(last, out[:, :, -1:], f"token {n_key}")


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


def test_training_works_after_inference_mode_saw_the_same_shape():
    case = Case(2, 2, 1, 26, 26, block_size=7, seed=3)  # a shape that no other test uses: layouts are cached
    with torch.inference_mode():
        expected, _ = attend(case, operands(case))
    tensors = operands(case, requires_grad=True)
    out, _ = attend(case, tensors)
    out.sum().backward()
    assert_same(out.detach(), expected.clone())
    assert all(x.grad.isfinite().all() for x in tensors.values())


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


# The operator as PyTorch sees it

OPERATOR_CASES = {
    "plain": Case(2, 4, 2, 8, 8, 3, 5, block_size=3),
    "one block": Case(1, 2, 1, 3, 3, block_size=4, top_k=3),
    "tail": Case(1, 2, 1, 5, 11, block_size=4),
    "routed blocks only": Case(1, 2, 1, 9, 9, block_size=4, causal=False),
    "shared selection": Case(1, 4, 2, 9, 9, 3, 5, block_size=3, share_selection=True),
    "padded": Case(2, 2, 1, 5, 11, block_size=4, padding=((3, 0), (0, 2)), softcap=3.0),
}


def _operator_arguments(case: Case, tensors: dict[str, torch.Tensor], cu_seqlens: torch.Tensor | None = None) -> tuple:
    query, key, value = (tensors[name].requires_grad_() for name in ("query", "key", "value"))
    mask = case.padding_mask()
    sizes = (case.block_size, case.top_k, case.sink_blocks, case.recent_blocks, 1 << 20)
    return query, key, value, mask, cu_seqlens, sizes, case.causal, case.share_selection, 0.5, case.softcap, "eager"


@pytest.mark.parametrize("case", OPERATOR_CASES.values(), ids=OPERATOR_CASES)
def test_the_operator_passes_opcheck(case: Case):
    torch.library.opcheck(attention, _operator_arguments(case, operands(case)))


def test_the_operator_passes_opcheck_on_transposed_views_and_packed_sequences():
    case = Case(1, 4, 2, 11, 11, 3, 5, block_size=3)
    views = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in operands(case).items()}
    torch.library.opcheck(attention, _operator_arguments(case, views))
    bounds = Packed((4, 0, 7), case).cu_seqlens()
    torch.library.opcheck(attention, _operator_arguments(case, views, bounds))


def test_results_of_one_head_are_aligned_where_queries_begin_within_a_block():
    """torch.compile takes them for that, and on a GPU its kernels, or an assertion of theirs, fail where they are not."""
    case = Case(1, 1, 1, 3, 21, 7, 5, block_size=16)
    given_ = _operator_arguments(case, operands(case))
    out, lse, _ = attention(*given_)
    grads = torch.autograd.grad(out.sum() + lse.sum(), given_[:3])
    assert [x.storage_offset() for x in (out, lse, *grads)] == [0] * 5


@pytest.mark.parametrize("lengths", [(4, 0, 7), (1, 1, 1), (19, 1, 0)], ids=str)
def test_the_operator_passes_opcheck_where_packed_sequences_have_more_keys(lengths: tuple[int, ...]):
    packed = Packed(lengths, Case(1, 4, 2, sum(lengths), 50, 3, 5, block_size=3), (20, 10, 20))
    torch.library.opcheck(attention, _operator_arguments(packed.case, operands(packed.case), packed.layout_bounds()))


@pytest.mark.parametrize("case", OPERATOR_CASES.values(), ids=OPERATOR_CASES)
def test_torch_compile_sees_one_graph_and_the_same_result(case: Case):
    case = case.but(sinks=True)
    torch.compiler.reset()

    def run(tensors):
        out, lse = attend(case, tensors)
        return out * 2, lse + 1

    tensors = operands(case, requires_grad=True)
    expected = run(tensors)
    outputs = torch.compile(run, fullgraph=True, backend="aot_eager")(tensors)
    for x, y in zip(outputs, expected):
        assert_same(x, y)
    grads, expected_grads = gradients(outputs, tensors), gradients(expected, tensors)
    for name, grad in grads.items():
        assert_same(grad, expected_grads[name], f"gradient of {name}")


def test_torch_compile_sees_one_graph_for_packed_sequences():
    packed = Packed((4, 0, 7), Case(1, 4, 2, 11, 11, 3, 5, block_size=3))
    torch.compiler.reset()

    def run(query, key, value, bounds):
        return moba_attention_varlen(query, key, value, bounds, block_size=3, top_k=2)

    tensors = [x[0].transpose(0, 1) for x in operands(packed.case).values()]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_same(compiled(*tensors, packed.cu_seqlens()), run(*tensors, packed.cu_seqlens()))


@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_gives_values_and_gradients_where_packed_sequences_have_more_keys(dynamic: bool):
    torch.compiler.reset()
    compiled = torch.compile(attend_packed_plainly, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for lengths, keys in (((4, 0, 7), (20, 10, 8)), ((1, 1, 1, 1), (5, 9, 2, 30)), ((19, 1), (25, 40))):
        case = Case(1, 4, 2, sum(lengths), sum(keys), 3, 5, block_size=3, sinks=True)
        packed, tensors = Packed(lengths, case, keys), operands(case, requires_grad=True)
        results = []
        for run in (attend_packed_plainly, compiled):
            outputs = run(*tensors.values(), packed.cu_seqlens(), packed.cu_seqlens_k())
            results.append((*outputs, *gradients(outputs, tensors).values()))
        for x, y in zip(*results):
            assert_same(y, x, f"{lengths} of {keys}")


def attend_packed_plainly(query, key, value, sinks, bounds, bounds_k):
    tensors = (x[0].transpose(0, 1) for x in (query, key, value))
    return moba_attention_varlen(*tensors, bounds, cu_seqlens_k=bounds_k, sinks=sinks, block_size=3, top_k=2, return_lse=True)


def test_an_exported_program_takes_any_lengths_and_any_number_of_packed_sequences():
    class Packing(torch.nn.Module):
        def forward(self, query, key, bounds, bounds_k):
            own = moba_attention_varlen(key, key, key, bounds_k, block_size=4, top_k=2)
            return own, moba_attention_varlen(query, key, key, bounds, cu_seqlens_k=bounds_k, block_size=4, top_k=2)

    def given(lengths, keys):
        packed = Packed(lengths, Case(), keys)
        return random(sum(lengths), 2, 3, seed=0), random(sum(keys), 2, 3, seed=1), packed.cu_seqlens(), packed.cu_seqlens_k()

    sizes = {0: torch.export.Dim("T")}, {0: torch.export.Dim("Tk")}, *[{0: torch.export.Dim("n", min=3)}] * 2
    program = torch.export.export(Packing(), given((5, 1, 0, 30), (5, 40, 7, 60)), dynamic_shapes=sizes).module()
    for lengths, keys in (((1, 1, 1, 1, 1), (9, 20, 1, 4, 30)), ((50, 3), (220, 3))):
        for x, y in zip(program(*given(lengths, keys)), Packing()(*given(lengths, keys))):
            assert_same(x, y, f"{lengths} of {keys}")


# Without vectors inductor asks the C++ compiler for less, and need not try out first which ones the processor has.
PLAIN = {"cpp.simdlen": 1, "cpp.vec_isa_ok": False}
BACKENDS = {"aot_eager": {"backend": "aot_eager"}, "inductor": {"backend": "inductor", "options": PLAIN}}


@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_bounds_of_keys_are_noticed_under_torch_compile(backend: str):
    torch.compiler.reset()
    query, key, bounds = torch.randn(12, 2, 8), torch.randn(37, 2, 8), torch.tensor([0, 10, 12], dtype=torch.int32)
    run = torch.compile(
        lambda bounds_k: moba_attention_varlen(query, key, key, bounds, cu_seqlens_k=bounds_k, block_size=5, top_k=2),
        fullgraph=True,
        **BACKENDS[backend],
    )
    for wrong, words in (
        ((0, 20, 30), "cu_seqlens_k must start at 0, never fall and end at the number of tokens"),
        ((0, 9, 37), "cu_seqlens_k must give each sequence at least as many keys as cu_seqlens gives it queries"),
    ):
        with pytest.raises(RuntimeError, match=words):
            run(torch.tensor(wrong, dtype=torch.int32))
    run(torch.tensor([0, 10, 37], dtype=torch.int32))


WRONG_BOUNDS = [(0, 10, 30), (5, 37), (0, 20, 10, 37), (0, 10, 40), (0,), (-1, 37)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_packed_bounds_and_masks_are_noticed_under_torch_compile(backend: str):
    torch.compiler.reset()
    x, y = torch.randn(37, 2, 8), torch.randn(2, 2, 9, 8)
    packed = torch.compile(
        lambda x, bounds: moba_attention_varlen(x, x, x, bounds, block_size=5, top_k=2), fullgraph=True, **BACKENDS[backend]
    )
    padded = torch.compile(
        lambda y, mask: moba_attention(y, y, y, block_size=4, top_k=2, padding_mask=mask), fullgraph=True, **BACKENDS[backend]
    )
    for bounds in WRONG_BOUNDS if backend == "aot_eager" else WRONG_BOUNDS[:2]:
        for grad in (False, True):
            with pytest.raises(RuntimeError, match="cu_seqlens must start at 0, never fall and end at the number of tokens"):
                packed(x.clone().requires_grad_(grad), torch.tensor(bounds, dtype=torch.int32))
    right = torch.tensor([0, 10, 37], dtype=torch.int32)
    assert_same(packed(x, right), moba_attention_varlen(x, x, x, right, block_size=5, top_k=2), rtol=1e-5, atol=1e-6)
    mask = torch.ones(2, 9, dtype=torch.bool)
    padded(y, mask)
    mask[1, 4] = False
    with pytest.raises(RuntimeError, match="padding_mask has a hole"):
        padded(y, mask)


def test_an_exported_program_notices_wrong_packed_bounds():
    class Packing(torch.nn.Module):
        def forward(self, x, bounds):
            return moba_attention_varlen(x, x, x, bounds, block_size=5, top_k=2)

    x = torch.randn(37, 2, 8)
    program = torch.export.export(Packing(), (x, torch.tensor([0, 10, 37], dtype=torch.int32))).module()
    with pytest.raises(RuntimeError, match="cu_seqlens must start at 0"):
        program(x, torch.tensor([0, 10, 36], dtype=torch.int32))


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
